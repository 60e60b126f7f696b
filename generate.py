"""Show what an InfoGAN learned: one labelled sheet per code, and a table of what every code does.

    python generate.py --ckpt checkpoint/v3/last.pt                   sheets and table of all codes
    python generate.py --ckpt checkpoint/v3/last.pt --explorer        a web page that moves codes
    python generate.py --ckpt checkpoint/v3/last.pt --sort ~/faces    real faces, by their codes
    python generate.py --ckpt checkpoint/v3/last.pt --samples 50 --set cat0=3    of one category

The architecture comes from the checkpoint. README.md has an example of each mode.
"""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import math
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is loading, which takes a second: no traceback
    sys.excepthook = lambda kind, *e: kind is KeyboardInterrupt or sys.__excepthook__(kind, *e)

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from tqdm import tqdm

import infogan
from infogan import Codes, CodeSpec, Generator, UserError, load_pictures, replacing, to_image

Held, Names = dict[str, float], dict[str, str]  # of codes: the values of --set; what people say
N_MEASURED, N_MOVED = 400, 100  # samples behind a table's figures; behind its tints, heat maps
MOST_SHOWN = 100  # categories on a sheet
AT_ONCE, N_READ = 32, 4  # pictures in each pass of a network; drawings beside one of --read
N_REAL, MOST_SAMPLES = 1000, 10**6  # pictures that --versus compares, that --samples writes
PAGE = Path(__file__).parent / "data/explorer.html"
FONTS = ["DejaVuSans", "NotoSansCJK-Regular", "DroidSansFallbackFull", "arial", "msyh", "malgun"]
MARK, EXIF = "generate.py of InfoGAN", Image.Exif()  # what is ours may be written again
EXIF[ExifTags.Base.Software] = MARK
MARKED = {"exif": EXIF.tobytes(), "comment": MARK}  # of PNG and WebP, and of GIF
HEADS = (b"code,L_I,", b"file,seed", b"file,cat0,", b"file,cont0,")  # of our tables
to_floats = partial(infogan.make_batch, flip=False, rng=None, device=torch.device("cpu"))

# drawing and saving -------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained checkpoint: generator, encoder, its codes, and the checkpoint's contents."""

    path: Path
    G: Generator  # in plain layers, see folded
    Q: infogan.Encoder
    spec: CodeSpec
    ckpt: dict
    shape: tuple[int, int, str]  # size and channels of its pictures, --crop of those not square
    device: torch.device


def folded(G: Generator) -> Generator:
    """G in plain layers: doubling and batch norm are in the weights of the convolutions."""
    G = copy.deepcopy(G)
    for i, m in enumerate(G.layers):
        if isinstance(m, nn.BatchNorm2d):
            conv = G.layers[i - 1]
            G.layers[i - 1] = fuse_conv_bn_eval(conv, m, isinstance(conv, nn.ConvTranspose2d))
            G.layers[i] = nn.Identity()
            if i == 4 and G.maps:  # they are added before this batch norm
                U = G.maps.weight - G.maps.weight.mean((2, 3), keepdim=True)
                U *= (m.weight / (m.running_var + m.eps).sqrt())[:, None, None]
                G.maps.weight = nn.Parameter(U)
        elif isinstance(m, (infogan.UpsampleConv2d, infogan.ConvTranspose2dFromPixel)):
            up, bias = isinstance(m, infogan.UpsampleConv2d), m.bias
            weight = nn.Parameter(m.folded() if up else m.weight)
            plain = nn.ConvTranspose2d(*weight.shape[:2], 4, 1 + up, int(up), bias=bias is not None)
            plain.weight, plain.bias = weight, bias
            G.layers[i] = plain.eval()
    return G.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_model(path: str, device: torch.device) -> Model:
    """A checkpoint, or the last one of a run's folder."""
    file = Path(path, "last.pt") if os.path.isdir(path) else Path(path)
    ckpt = infogan.load_checkpoint(file)
    (G, spec), (Q, _) = infogan.load_generator(ckpt, device), infogan.load_encoder(ckpt, device)
    Q = Q.to(memory_format=torch.channels_last)  # faster
    args = {"crop": "centre", **ckpt["args"]}
    shape = args["image_size"], args["channels"], args["crop"]
    return Model(file, folded(G), Q, spec, ckpt, shape, device)


@torch.no_grad()
def draw(G: nn.Module, joined: Tensor) -> Tensor:
    """Pictures (n, channels, size, size) in [-1, 1] of G's inputs (n, spec.dim), on the CPU."""
    # always as many at once, as rounding depends on it: the same seed is the same file everywhere
    device, parts = next(G.parameters()).device, joined.split(AT_ONCE)
    full = (F.pad(part, (0, 0, 0, AT_ONCE - len(part))).to(device) for part in parts)
    return torch.cat([G(part).float().cpu() for part in full])[: len(joined)]


def hold(spec: CodeSpec, codes: Codes, held: Held) -> Codes:
    """codes with the values of --set."""
    for name, value in held.items():
        codes = spec.traverse(codes, name, [value])
    return codes


def sample_seeds(spec: CodeSpec, seeds: Iterable[int], held: Held) -> Codes:
    """One draw for each seed, which depends on nothing else, with the values of --set."""
    each = [spec.sample(1, torch.Generator().manual_seed(seed)) for seed in seeds]
    return hold(spec, Codes(*map(torch.cat, zip(*each, strict=True))), held)


def traversal(model: Model, base: Codes, code: str, values: Sequence, held: Held) -> Tensor:
    """Pictures (n, len(values), …) along a code, or along all categoricals that are not held."""
    moved = model.spec.traverse(base, code, values)
    moved = hold(model.spec, moved, held if code == "cat" else {})
    return draw(model.G, model.spec.join(moved)).unflatten(0, (-1, len(values)))


def checked(path: Path) -> Path:
    """path, in a folder that is made if missing. Raises UserError for a file that is not ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raw = path.read_bytes() if path.is_file() else b"a folder"
        if raw and MARK.encode() not in raw and not raw.startswith(HEADS):
            why = "is there, but not from this version of generate.py"
            raise UserError(f"{path}: {why}; move it, or give another --out")
    return path


def save_picture(path: Path, image: Image.Image, **how: object) -> None:
    """A PNG, GIF or WebP with our mark, complete or not at all."""
    infogan.save_picture(checked(path), image, **MARKED, **how)


def save_table(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """A CSV, complete or not at all, with numbers to four decimals."""
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    for line in lines:
        writer.writerow(f"{round(v, 4):g}" if isinstance(v, float) else v for v in line)
    with replacing(checked(path)) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def print_table(lines: list[list[str]]) -> None:
    """Columns: the first to the left, the others to the right."""
    left, *right = (max(map(len, column)) for column in zip(*lines, strict=True))
    for name, *cells in lines:
        print(f"{name:{left}}", *map(str.rjust, cells, right), sep="  ")


# figures ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table: what a code, or a group of codes, does."""

    code: str
    L_I: float | None  # nats, by the run's own Q on new samples; None for groups
    ceiling: float | None
    effect: float  # share of the pixels' variance that goes when this alone is frozen
    edges: float  # the same for edges, where tints and soft light do not count
    tint: float | None = None  # of a code: see tint()
    where: Tensor | None = None  # of a code: see heat_map()


def edge_map(x: Tensor) -> Tensor:
    """Sobel magnitude of the luminance, (n, 1, H - 2, W - 2)."""
    weights = torch.tensor([0.299, 0.587, 0.114] if x.shape[1] == 3 else [1.0])
    grey = (x * weights[:, None, None]).sum(1, keepdim=True)
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]]) / 8
    slopes = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    return slopes.square().sum(1, keepdim=True).add(1e-8).sqrt()


def effect(x: Tensor, x_redrawn: Tensor) -> float:
    """E[(x - x')^2] / 2 / Var(x), x' with one code or group drawn again: 0 nothing, 1 all."""
    return ((x - x_redrawn).square().mean(0).sum() / 2 / x.var(0).sum().clamp(min=1e-12)).item()


def low_high(spec: CodeSpec, codes: Codes, name: str, rng: torch.Generator) -> tuple[Codes, Codes]:
    """codes with a continuous code at -0.8 and at 0.8, or with two categories of a categorical."""
    step = torch.randint(1, spec.cat_dim, codes.c_cat.shape, generator=rng)
    low = codes._replace(c_cont=torch.full_like(codes.c_cont, -0.8))
    high = Codes(codes.z, (codes.c_cat + step) % spec.cat_dim, -low.c_cont)
    return spec.replace(codes, name, low), spec.replace(codes, name, high)


def tint(x: Tensor, y: Tensor) -> float:
    """Share of the change from x to y that the best affine map of each face's colours explains.

    1 for a tint of the whole picture, near 0 for a change of shape; 0 where nothing changes.
    """
    u, v = F.pad(x.flatten(2), (0, 0, 0, 1), value=1.0).mT, y.flatten(2).mT  # (n, pixels, colours)
    left, change = v - u @ torch.linalg.lstsq(u, v).solution, (y - x).square().sum()
    nothing = change < 1e-6 * x.numel()  # too little to see, or to divide by
    return 0.0 if nothing else (1 - left.square().sum() / change).item()


def heat_map(x: Tensor, y: Tensor) -> Tensor:
    """Where x becomes y: the mean face, red where the mean |x - y| is large, (3, size, size)."""
    heat, face = (x - y).abs().mean((0, 1)), x.mean((0, 1)) / 2
    much = (heat / heat.max().clamp(min=1e-8)).square()  # squared: small changes are everywhere
    red = torch.tensor([1.0, -0.4, -0.8])[:, None, None].expand(3, *face.shape)
    return torch.lerp(face.expand_as(red), red, much)


@torch.no_grad()
def measure(model: Model, seed: int) -> list[Row]:
    """Rows for z and each kind of code together, then for every code, strongest effect first."""
    spec, rng, device = model.spec, torch.Generator().manual_seed(seed), model.device
    codes, other = spec.sample(N_MEASURED, rng), spec.sample(N_MEASURED, rng)
    fast = device.type == "cpu" and infogan.speed_up(device)  # a GPU needs no bfloat16 for this

    def pictures(codes: Codes) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            return draw(model.G, spec.join(codes))

    x = pictures(codes)
    x_edges, read = edge_map(x), [model.Q.D(part.to(device))[1] for part in x.split(AT_ONCE)]
    q = infogan.QOutput(*(torch.cat(parts).cpu() for parts in zip(*read, strict=True)))
    L_I = infogan.mutual_information(spec, q, codes).tolist()
    figures = [*zip(spec.names, L_I, spec.ceilings, strict=True)]
    few = Codes(*(c[:N_MOVED] for c in codes))

    def effects(name: str) -> tuple[float, float]:
        y = pictures(spec.replace(codes, name, other))
        return effect(x, y), effect(x_edges, edge_map(y))

    parts = ["z", *spec.kinds] if spec.z_dim else [*spec.kinds]
    groups, each = [Row(part, None, None, *effects(part)) for part in parts], []
    for name, nats, ceiling in tqdm(figures, "measuring", leave=False, disable=None):
        ends = [*map(pictures, low_high(spec, few, name, rng))]
        each.append(Row(name, nats, ceiling, *effects(name), tint(*ends), heat_map(*ends)))
    return groups + sorted(each, key=lambda row: -row.effect)


def print_rows(rows: list[Row], names: Names) -> list[list[str]]:
    """Prints the rows with the codes' names; returns the lines, cell by cell."""
    table = [[*Row._fields[:-1], "name"]]
    for row in rows:
        figures = ("" if v is None else f"{v:.4f}" for v in row[1:-1])
        table.append([row.code, *figures, names.get(row.code, "")])
    print_table(table)
    return table


def tell_apart(x: Tensor, y: Tensor) -> float:
    """The accuracy of nearest neighbours at telling sets of n pictures apart (1610.06545).

    0.5: not at all, 1: always. They see 16x16 pixels: what pictures show, not how sharp they are.
    """
    both = F.adaptive_avg_pool2d(torch.cat([x, y]), 16).flatten(1)
    nearest = torch.cdist(both, both).fill_diagonal_(math.inf).argmin(1)
    of_x = torch.arange(len(both)) < len(x)
    return (of_x == of_x[nearest]).float().mean().item()


# pictures of codes --------------------------------------------------------------------------------


@cache
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first of FONTS here that has all letters of text; Pillow's own for ASCII, or if none."""
    for name in [] if text.isascii() else FONTS:
        with suppress(OSError):  # not here; Pillow looks through the system's folders by itself
            font = ImageFont.truetype(name, size)
            if has_letters(font, text):
                return font
    return ImageFont.load_default(size)


def has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font draws each letter, and not the box for what it lacks."""
    lacking = {b"", bytes(font.getmask("\U0010fffd"))}
    return not any(bytes(font.getmask(letter)) in lacking for letter in {*text} - {" ", "\n"})


def sheet(
    title: str, rows: Sequence[Tensor], above: list[str], left: list[str], zoom: int,
    bar: tuple[float, float] = (0, 0),
) -> Image.Image:  # fmt: skip
    """Rows of up to len(above) pictures, with labels above the columns and left of the rows.

    A bar goes from the middle of one column to that of another, not always whole numbers.
    """
    size = rows[0].shape[3] * max(1, 64 // rows[0].shape[3]) * zoom  # labels need 64 pixels
    gap, edge, top = 2 * zoom, 12 * zoom, (54 if any(above) else 40) * zoom
    step, title_font = size + gap, font_for(title, 15 * zoom)
    lines = [line for text in left for line in text.splitlines()]
    widths = [font_for(line, 12 * zoom).getlength(line) + 8 * zoom for line in lines]
    margin = edge + int(max(widths, default=0))
    width = max(margin + len(above) * step - gap, edge + int(title_font.getlength(title))) + edge
    page = Image.new("RGB", (width, top + len(rows) * step - gap + edge), "white")
    pen = ImageDraw.Draw(page)
    pen.text((edge, 10 * zoom), title, "black", title_font)
    middles = [margin + i * step + size // 2 for i in range(len(above))]
    for at, text in zip(middles, above, strict=True):
        pen.text((at, top - 6 * zoom), text, "#333333", font_for(text, 12 * zoom), anchor="ms")
    for i, (row, text) in enumerate(zip(rows, left, strict=True)):
        at, font = (edge, top + i * step + size // 2), font_for(text, 12 * zoom)
        pen.multiline_text(at, text, "#333333", font, anchor="lm", spacing=3 * zoom)
        for j, picture in enumerate(row):
            tile = to_image(picture).resize((size, size), Image.Resampling.NEAREST)
            page.paste(tile, (margin + j * step, top + i * step))
    if bar[0] < bar[1]:
        a, b = (middles[0] + v * step for v in bar)
        pen.rectangle((a, top - 4 * zoom, b, top - 2 * zoom), "#2f62c9")
    return page


def sheets(model: Model, args: Namespace) -> str:
    """The table, a sheet per code, sheets of several codes; nothing selected: the seed's first."""
    spec, out, zoom, held, last = model.spec, args.out, args.zoom, args.set, args.steps - 1
    rows, base = measure(model, args.seed), sample_seeds(spec, args.seeds, held)
    save_table(out / "table.csv", print_rows(rows, args.names))
    categories, (low, high) = range(spec.cat_dim)[:MOST_SHOWN], args.range
    values = [round(v, 6) + 0.0 for v in torch.linspace(low, high, args.steps).tolist()]
    numbers, signed = [str(k) for k in categories], [f"{v:+.2f}" if v else "0" for v in values]
    ends = sorted((v - low) / (high - low) * last for v in (-1, 1))  # of training, in columns
    bar = max(ends[0], 0), min(ends[1], last)
    axes = {"cat": (categories, numbers, (0, 0), 500), "cont": (values, signed, bar, 100)}
    seeds, strips, left = [f"seed {seed}" for seed in args.seeds], [], []
    suffix = "".join(f"; {code} = {v:g}" for code, v in held.items())
    for row in (row for row in rows if row.code in args.codes):
        steps, above, mark, milliseconds = axes[row.code.rstrip("0123456789")]
        name, nats = args.labels[row.code], f"L_I {row.L_I:.2f}"
        faces = traversal(model, base, row.code, steps, held).expand(-1, -1, 3, -1, -1)
        shown = [torch.cat([faces[0], row.where[None]]), *faces[1:]]
        title = f"{name}: {nats} of {row.ceiling:.2f} nats, effect {row.effect:.3f}, tint"
        page = sheet(f"{title} {row.tint:.2f}", shown, [*above, "where"], seeds, zoom, mark)
        save_picture(out / f"{row.code}.png", page)
        if args.gif:
            columns = zip(faces.unbind(1), above, strict=True)
            frames = [sheet(name, [x], [text] * len(x), [""], zoom) for x, text in columns]
            frames += frames[-2:0:-1]  # and back
            save_loop(out / f"{row.code}.gif", frames, milliseconds)
        best = faces.var(1).sum((1, 2, 3)).argmax()  # the face that this code changes most
        strips.append(torch.cat([row.where[None], faces[best, : args.steps]]))
        left.append(f"{name}\n{nats}\neffect {row.effect:.3f}\n{seeds[best]}")
    if strips:
        title = f"strongest code first (category / value), on the seed that it changes most{suffix}"
        both = [f"{k} / {v}" if k in categories and spec.n_cat else v for k, v in enumerate(signed)]
        mark = (bar[0] + 1, bar[1] + 1) if spec.n_cont else (0, 0)
        page = sheet(title, strips, ["where", *both], left, zoom, mark)
        save_picture(out / "overview.png", page)
    if spec.n_cat:
        title = f"all categoricals together (columns); z and continuous codes (rows){suffix}"
        page = sheet(title, traversal(model, base, "cat", categories, held), numbers, seeds, zoom)
        save_picture(out / "all-categoricals.png", page)
    first = sample_seeds(spec, range(args.seed, args.seed + 100), held)
    title = f"100 samples, seeds {args.seed} to {args.seed + 99}, nothing selected{suffix}"
    x = draw(model.G, spec.join(first)).unflatten(0, (10, 10))
    save_picture(out / "samples.png", sheet(title, x, [""] * 10, [""] * 10, zoom))
    return f"{out} has sheets and table.csv; bars: -1 to 1, as in training"


def save_loop(path: Path, frames: Iterable[Image.Image], milliseconds: int) -> None:
    """An animation without end, as GIF or WebP."""
    first, *more = frames
    save_picture(path, first, append_images=more, duration=milliseconds, loop=0, save_all=True)


def walk(model: Model, args: Namespace) -> str:
    """From the face of each seed to the next, and from the last to the first, as GIF or WebP."""
    spec, size = model.spec, model.shape[0]
    a = spec.join(sample_seeds(spec, args.seeds, args.set))[:, None]
    b, t = a.roll(-1, 0), torch.arange(args.steps)[:, None] / args.steps
    codes, turn = a + t * (b - a), t * math.pi / 2  # (faces, steps, spec.dim)
    z = turn.cos() * a + turn.sin() * b  # of variance 1 on the way too, so that faces stay sharp
    codes[..., : spec.z_dim] = z[..., : spec.z_dim]
    x, k = draw(model.G, codes.flatten(0, 1)), max(1, 128 // size) * args.zoom
    frames = (ImageOps.scale(to_image(p).convert("RGB"), k, Image.Resampling.BICUBIC) for p in x)
    save_loop(args.out, frames, 80)
    return f"{args.out} has {len(x)} frames"


def save_pngs(folder: Path, names: list[str], x: Iterable[Tensor]) -> None:
    """Pictures (channels, size, size) in [-1, 1] as PNGs, into a folder that has no others."""
    if others := {path.name for path in folder.glob("*.png")} - {*names}:
        raise UserError(f"--out {folder}: holds {len(others):,} other pictures; give an empty one")
    checked(folder / "codes.csv").unlink(missing_ok=True)  # of other pictures
    for name, picture in zip(names, x, strict=True):
        # lossless at any level; more would take four times as long for files as large
        to_image(picture).save(checked(folder / name), compress_level=1, **MARKED)


def samples(model: Model, args: Namespace) -> str:
    """A PNG for each seed and codes.csv, its codes; of --data, what a run sees, into OUT-real."""
    spec, out, names = model.spec, args.out, [f"{seed:06d}.png" for seed in args.seeds]
    codes = sample_seeds(spec, args.seeds, args.set)
    parts = spec.join(codes).split(AT_ONCE)
    save_pngs(out, names, (picture for part in parts for picture in draw(model.G, part)))
    table, values = [["file", "seed", *spec.names]], torch.cat([codes.c_cat, codes.c_cont], 1)
    for name, seed, row in zip(names, args.seeds, values.tolist(), strict=True):
        table.append([name, seed, *row])
    save_table(out / "codes.csv", table)
    written = f"{out} has {len(names):,} pictures and codes.csv"
    if args.data:
        real, x = out.with_name(f"{out.name}-real"), load_pictures(args.data, *model.shape).x
        numbered = [f"{i:06d}.png" for i in range(len(x))]
        save_pngs(real, numbered, chain.from_iterable(map(to_floats, x.split(AT_ONCE))))
        written += f", {real} the {len(x):,} of {args.data}"
    return written


def versus(model: Model, args: Namespace) -> str:
    """The tables of two runs, how far from --data they are, and both in comparison.png."""
    spec, other, halves = model.spec, load_model(args.versus, model.device), []
    shape, flags = infogan.LIMITS.keys() - {"width", "upsample"}, Namespace(**model.ckpt["args"])
    if differ := infogan.differences(flags, other.ckpt["args"], shape):
        differ = ", ".join(differ)
        raise UserError(f"--versus {other.path}: has other codes or pictures: {differ}")
    rng, columns = torch.Generator().manual_seed(args.seed), min(spec.cat_dim, MOST_SHOWN)
    if args.data:
        real = load_pictures(args.data, *model.shape).x
        real = to_floats(real[torch.randperm(len(real), generator=rng)[:N_REAL]])
    base = sample_seeds(spec, args.seeds, args.set)
    first = sample_seeds(spec, range(args.seed, args.seed + columns), args.set)
    for run in (model, other):
        print(run.path)
        rows, x = measure(run, args.seed), [draw(run.G, spec.join(first))]
        print_rows(rows, {})
        if args.data:
            drawn = draw(run.G, spec.join(spec.sample(len(real), rng.manual_seed(args.seed))))
            share = tell_apart(real, drawn)
            print(f"real or not, by the nearest neighbour: {share:.1%} right, 50% is best")
        moves = {"cat": range(columns)} if spec.n_cat else {}
        for row in [row for row in rows if row.code in spec.names[spec.n_cat :]][:1]:
            moves[row.code] = torch.linspace(*args.range, columns).tolist()
        for code, values in moves.items():
            x += traversal(run, base, code, values, args.set)
        halves.append(torch.stack(x))
    shown = torch.cat([F.pad(halves[0], (0,) * 7 + (1,), value=1.0), halves[1]], 1)
    numbers = [str(k) for k in range(columns)]
    kinds = {"cat": "all cat", "cont": "strongest cont"}
    left = ["samples", *(kinds[kind] for kind in spec.kinds for _ in args.seeds)]
    title = f"left: {model.path}, right: {other.path}"
    page = sheet(title, shown, [*numbers, "", *numbers], left, args.zoom)
    save_picture(args.out / "comparison.png", page)
    return f"{args.out} has comparison.png"


# real pictures by code ----------------------------------------------------------------------------


def agreement(categories: Sequence[int], labels: Sequence[str]) -> tuple[float, float]:
    """The best one-to-one match's error, and I(a; b) / mean(H(a), H(b)): 1 perfect, 0 chance."""
    import networkx  # comes with torch

    n, pairs, graph = len(labels), Counter(zip(categories, labels, strict=True)), networkx.Graph()
    for (category, label), count in pairs.items():
        graph.add_edge(("category", category), ("label", label), weight=count)
    matched = sum(graph.edges[pair]["weight"] for pair in networkx.max_weight_matching(graph))
    H = [-sum(c / n * math.log(c / n) for c in Counter(x).values()) for x in (categories, labels)]
    H_both = -sum(c / n * math.log(c / n) for c in pairs.values())
    return 1 - matched / n, 2 * (sum(H) - H_both) / sum(H) if sum(H) else 1.0


@torch.no_grad()
def read_codes(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of bytes (n, h, w, channels): each code as Q reads it; how sure, or sigma: (n, codes)."""
    read = []
    for part in x.split(AT_ONCE):
        p, mu, sigma = model.Q(to_floats(part, device=model.device))
        sure, c_cat = p.max(2)
        read.append([torch.cat(pair, 1).cpu() for pair in ((c_cat, mu), (sure, sigma))])
    return tuple(map(torch.cat, zip(*read, strict=True)))


def sort(model: Model, args: Namespace) -> str:
    """Sheets of real pictures by the codes that Q reads from them; codes.csv; how they agree.

    A label is a picture's class in a named set, or the folder that it is in.
    """
    spec, out, steps, root = model.spec, args.out, args.steps, Path(args.sort).resolve()
    if out.resolve().is_relative_to(root):
        raise UserError(f"--out {out}: lies within --sort {args.sort}; give another folder")
    if root.is_file():
        raise UserError(f"--sort {args.sort}: must be a folder; --read takes single pictures")
    x, _, files, *_ = load_pictures(args.sort, *model.shape, flag="--sort")
    if args.sort in infogan.NAMED_SETS:
        classes = [str(label) for _, label in infogan.open_named_set(args.sort, "--sort")]
        labels = [classes[int(number)] for number in files]
    else:
        files = [os.path.relpath(name, root) for name in files]
        labels = [Path(name).parent.name for name in files]
    values, doubts = read_codes(model, x)
    doubted = [f"{code}_{'p' if code.startswith('cat') else 'sigma'}" for code in spec.names]
    table = [["file", *spec.names, *doubted]]
    for name, row in zip(files, torch.cat([values, doubts], 1).tolist(), strict=True):
        table.append([name, *row])
    save_table(out / "codes.csv", table)
    labelled = [i for i, label in enumerate(labels) if label]
    kinds, n_without = {*labels} - {""}, len(labels) - len(labelled)
    if spec.n_cat:
        none = "" if len(kinds) > 1 else "; an error needs two: a label is a picture's folder"
        print(f"labels: {len(kinds)}, {n_without:,} pictures without one left out{none}")
    for code in args.codes:
        j = spec.names.index(code)
        if j < spec.n_cat:
            order, shown, above = doubts[:, j].argsort(descending=True), [], [""] * steps
            left = []
            for k in range(spec.cat_dim)[:MOST_SHOWN]:
                mine = order[values[order, j] == k]
                left.append(f"{k}\n{len(mine):,}")
                shown.append(to_floats(x[mine[:steps]]))
            how = "category, its number of pictures; the most certain first"
            if len(kinds) > 1:
                of_labelled = values[labelled, j].tolist(), [labels[i] for i in labelled]
                error, nmi = agreement(*of_labelled)
                print(f"{args.labels[code]}: {error:.1%} error, NMI {nmi:.3f}")
        else:
            below = min(args.rows, len(files))  # neighbours below each other
            start = torch.linspace(0, len(files) - below, steps).round().long()
            chosen = values[:, j].argsort()[start + torch.arange(below)[:, None]]
            above = [f"{v:+.2f}" for v in values[chosen, j].mean(0).tolist()]
            shown, left = [to_floats(x[row]) for row in chosen], [""] * below
            how = "lowest to highest, as Q reads it"
        page = sheet(f"{args.labels[code]}: {how}", shown, above, left, args.zoom)
        save_picture(out / f"{code}.png", page)
    return f"{out} has sheets and codes.csv"


def read(model: Model, args: Namespace) -> str:
    """A table of what Q reads from each picture; read.png: each beside what G draws of it."""
    spec, pixels, (size, channels, _) = model.spec, bytearray(), model.shape
    paths = [Path(os.path.expanduser(path)) for path in args.read]
    for why, picture, _ in (infogan.read_picture(path, *model.shape) for path in paths):
        if picture is None:
            raise UserError(f"--read {why}: cannot be read as a picture; --sort takes a folder")
        pixels += picture
    x = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, size, size, channels)
    values, doubts = read_codes(model, x)
    table = {"": [path.name for path in paths]}
    for code, v, d in zip(spec.names, values.T.tolist(), doubts.T.tolist(), strict=True):
        form = "{:.0f} ({:.0%})" if code.startswith("cat") else "{:+.2f} ± {:.2f}"
        table[code] = [*map(form.format, v, d)]
    print_table([[args.labels.get(code, ""), *table[code]] for code in ("", *args.codes)])
    n_drawn = len(args.seeds)
    c_cat, c_cont = values.repeat_interleave(n_drawn, 0).split([spec.n_cat, spec.n_cont], 1)
    z = sample_seeds(spec, args.seeds, {}).z.repeat(len(x), 1)
    codes = hold(spec, Codes(z, c_cat.long(), c_cont), args.set)
    drawn = draw(model.G, spec.join(codes)).unflatten(0, (-1, n_drawn))
    shown = torch.cat([to_floats(x)[:, None], drawn], 1)
    title = "each picture, and what G draws from the codes that Q reads"
    above = ["picture", *(f"seed {seed}" for seed in args.seeds)]
    save_picture(args.out / "read.png", sheet(title, shown, above, table[""], args.zoom))
    return f"{args.out} has read.png"


# for other programs -------------------------------------------------------------------------------


def explorer(model: Model, args: Namespace) -> str:
    """One HTML file that draws by itself, from --set on; its first z are those of the sheets."""
    spec, weights, scales = model.spec, [], []
    convs = [m for m in model.G.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for m in convs:  # 8 bits a weight, with a scale for each channel that it makes
        w = m.weight if isinstance(m, nn.ConvTranspose2d) else m.weight.transpose(0, 1)
        scale = w.abs().amax((0, 2, 3)).clamp(min=1e-12) / 127
        weights.append((w / scale[:, None, None]).round().to(torch.int8).flatten())
        scales += [scale, torch.zeros_like(scale) if m.bias is None else m.bias]
    rows, codes = measure(model, args.seed), []
    print_rows(rows, args.names)
    reach = [*args.range, *(v for code, v in args.set.items() if code.startswith("cont"))]

    def encode(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    for row in (row for row in rows if row.where is not None):
        to_image(row.where).save(file := io.BytesIO(), "JPEG", quality=85)
        where = f"data:image/jpeg;base64,{encode(file.getvalue())}"
        codes.append(row._asdict() | {"name": args.names.get(row.code), "where": where})
    data = {
        "title": f"{model.path.parent.name}/{model.path.name}, step {model.ckpt['step']:,}",
        "spec": vars(spec),
        "range": [min(reach), max(reach)],
        "at": "#" + "&".join(f"{code}={value:g}" for code, value in args.set.items()),
        "seeds": [*args.seeds],
        "layers": [
            {"inputs": m.in_channels, "outputs": m.out_channels, "kernel": m.kernel_size[0]}
            for m in convs
        ],
        "codes": codes,
        "z": [[round(v, 4) for v in z] for z in sample_seeds(spec, args.seeds, {}).z.tolist()],
        "weights": encode(torch.cat(weights).cpu().numpy().tobytes()),
        "scales": encode(torch.cat(scales).cpu().numpy().astype("<f4").tobytes()),
    }
    filled = json.dumps(data).replace("<", "\\u003c")  # a name must not end the script
    page = PAGE.read_text(encoding="utf-8").replace("data = null;", f"data = {filled};")
    with replacing(checked(args.out / "explorer.html")) as file:
        file.write(page.encode())
    return f"{args.out} has explorer.html, {len(page) / 1e6:.1f} MB"


def onnx(model: Model, args: Namespace) -> str:
    """G as ONNX, from "codes" (n, spec.dim) to "x" (n, channels, size, size) in [-1, 1]."""
    spec, G = model.spec, model.G.cpu().to(memory_format=torch.contiguous_format)
    names, n = {"input_names": ["codes"], "output_names": ["x"]}, ({0: torch.export.Dim("n")},)
    how = {"dynamic_shapes": n, "dynamo": True, "verbose": False, **names}
    try:
        proto = torch.onnx.export(G, (torch.zeros(2, spec.dim),), **how).model_proto  # a new object
    except ImportError as error:
        raise UserError("--onnx: needs `pip install onnx onnxscript`") from error
    proto.doc_string = f"{MARK}. codes: z ({spec.z_dim}), {spec.n_cat} categoricals one-hot"
    proto.doc_string += f" ({spec.cat_dim} each), {spec.n_cont} continuous. x: from -1 to 1"
    with replacing(checked(args.out / "generator.onnx")) as file:
        file.write(proto.SerializeToString())
    return f"{args.out} has generator.onnx"


def shrink(model: Model, args: Namespace) -> str:
    """A checkpoint to share: what the loaders need, in half precision, with the codes' names."""
    ckpt, path = model.ckpt, Path(args.shrink)
    if path.exists():
        raise UserError(f"--shrink {path}: exists; give a new name")
    args_kept = ckpt["args"] | {"data": "", "out": "", "init": None}  # nobody else's business
    small = {"args": args_kept, **{key: ckpt.get(key) for key in ("spec", "step", "minutes")}}
    for net in ("G_ema", "D"):  # vectors stay: they are small, and variances may be tiny
        small[net] = {k: w.half() if w.dim() > 1 else w for k, w in ckpt[net].items()}
    infogan.save_file(path, small | {"format": infogan.FORMAT, "names": args.names})
    return f"{path} has {path.stat().st_size / 1e6:.1f} MB"


# flags --------------------------------------------------------------------------------------------

# fmt: off
MODES = {  # by whom; what it writes, beside the checkpoint; the flags that it takes
"sheets": (sheets, "traversals", "out codes rows seed seeds set range steps zoom gif names"),
"--explorer": (explorer, "traversals", "out rows seed seeds set range names"),
"--walk": (walk, "traversals/walk.gif", "out rows seed seeds set steps zoom"),
"--samples": (samples, "generated", "out seed seeds set data"),
"--read": (read, "traversals", "out seed seeds set codes names zoom"),
"--sort": (sort, "sorted", "out codes rows steps zoom names"),
"--versus": (versus, "traversals", "out rows seed seeds set range zoom data"),
"--onnx": (onnx, "traversals", "out"),
"--shrink": (shrink, "", "names"),
}
FLAGS = {  # as in infogan.py
"sheets": [
    ("--ckpt", None, "FILE", "such as checkpoint/v3/last.pt"),
    ("--out", None, "FOLDER", "where to write (default: a folder beside the checkpoint)"),
    ("--codes", None, "NAMES", "such as cat0,cont3 (default: every code)"),
    ("--rows", 8, (1, 100), "rows of a sheet; faces of --walk"),
    ("--seed", 0, (0, 10**9), "of the first picture or row; the others have the next numbers"),
    ("--seeds", None, "LIST", "these instead, such as 3,17,40-49"),
    ("--set", None, "LIST", "hold codes at values, such as cat0=3,cont5=-0.8"),
    ("--range", None, "V", "values of a continuous code (default -3 3; of up to 5: -1.5 1.5)"),
    ("--steps", 11, (2, 100), "columns of a continuous code's sheet; frames to the next face"),
    ("--zoom", 1, (1, 8), "enlarge sheets N times"),
    ("--gif", False, bool, "also write an animated GIF for each code"),
    ("--names", None, "FILE", "names for codes, JSON (default: names.json beside the checkpoint)"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
], "instead of sheets": [
    ("--explorer", False, bool, "write explorer.html, a page to move the codes"),
    ("--sort", None, "FOLDER", "sort real pictures by the codes that Q reads: a folder or mnist"),
    ("--samples", None, (0, MOST_SAMPLES), "write N PNGs, or one for each of --seeds; codes.csv"),
    ("--read", None, "PICTURE", "tell what Q reads from pictures, draw each again"),
    ("--walk", False, bool, "write an animation that moves through the faces of the seeds"),
    ("--versus", None, "FILE", "compare with this checkpoint"),
    ("--data", None, "FOLDER", "real pictures: --versus compares both with them, --samples"
     " writes them too, as a run sees them, into OUT-real"),
    ("--onnx", False, bool, "write generator.onnx, for other runtimes"),
    ("--shrink", None, "FILE", "write a checkpoint in half precision, to share"),
]}
MORE = {  # of flags that are not one word with a default
"ckpt": {"required": True}, "samples": {"nargs": "?", "const": 0}, "read": {"nargs": "+"},
"range": {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")},
}
# fmt: on


def check_codes(spec: CodeSpec, where: str, codes: Iterable[str]) -> None:
    """Raises UserError for a code that spec does not have."""
    for code in (code for code in codes if code not in spec.names):
        raise UserError(f"{where}: {code!a}: this checkpoint has {', '.join(spec.names) or 'none'}")


def read_names(model: Model, given: str | None) -> Names:
    """What people call the codes: by --names, names.json beside the checkpoint, or within it."""
    path, names = Path(given or model.path.with_name("names.json")), model.ckpt.get("names", {})
    try:
        if given or path.exists():
            names = {**names, **json.loads(path.read_text(encoding="utf-8-sig"))}
        for code, name in names.items():
            if not re.fullmatch("(cat|cont)[0-9]+", code):
                raise ValueError(f"{code!a} is no code")
            if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= 40):
                raise ValueError(f"the name of {code} must be one line of 1 to 40 characters")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path}: must be a table like {{"cont3": "tilt"}}: {error}') from error
    return {code: name for code, name in names.items() if code in model.spec.names}


def read_set(text: str, spec: CodeSpec) -> Held:
    """The codes of "cat0=3,cont5=-0.8", with their values. Raises UserError."""
    held = {}
    for part in map(str.strip, text.split(",")):
        code, _, value = part.partition("=")
        check_codes(spec, "--set", [code])
        v = float(value) if re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", value) else math.nan
        fits, must = abs(v) <= 1000, "a number from -1000 to 1000"
        if code.startswith("cat"):
            fits, must = v in range(spec.cat_dim), f"a whole number from 0 to {spec.cat_dim - 1}"
        if code in held or not fits:
            raise UserError(f"--set {part}: {code} must be given once, as {must}")
        held[code] = v
    return held


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, the mode, its seeds. Raises UserError for what is wrong or has no effect."""
    parser = infogan.Parser("generate.py", __doc__, FLAGS)
    for action in parser._actions:
        vars(action).update(MORE.get(action.dest, {}))
    given = parser.given(argv)
    args, given = Namespace(**parser.defaults | given), {f"--{name}" for name in given}
    modes = [mode for mode in MODES if mode in given]
    if len(modes) > 1:
        raise UserError(f"{modes[0]} and {modes[1]}: give only one of them")
    args.mode = modes[0] if modes else "sheets"
    for flag in sorted(given - {"--ckpt", "--device", args.mode}):
        users = [mode for mode, (*_, flags) in MODES.items() if flag[2:] in flags.split()]
        if args.mode not in users:
            raise UserError(f"{flag} has no effect on {args.mode}, only on {', '.join(users)}")
    low, high = args.range or (-1, 1)
    if low == high or not all(abs(v) <= 1000 for v in (low, high)):  # true for NaN
        raise UserError("--range: must be two different numbers from -1000 to 1000")
    if args.mode == "--walk" and args.out and not args.out.lower().endswith((".gif", ".webp")):
        raise UserError(f"--out {args.out}: must end with .gif or .webp")
    if args.seeds and (given & {"--seed", "--rows"} or args.samples):
        raise UserError("--seeds: leave out --seed, --rows and N of --samples")
    count = {"--samples": args.samples, "--read": N_READ}.get(args.mode, args.rows)
    ranges = [range(args.seed, args.seed + count)]
    if args.seeds:
        pattern = r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*"
        parts = [re.fullmatch(pattern, part) for part in args.seeds.split(",")]
        ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in parts if m]
        n = sum(map(len, ranges))
        if not all([*parts, *ranges]) or n > MOST_SAMPLES or len({*chain(*ranges)}) < n:
            raise UserError(f"--seeds {args.seeds}: must be different numbers such as 3,17,40-49")
    args.seeds = [*chain(*ranges)]
    bounds = {"--walk": (2, 100), "--samples": (1, MOST_SAMPLES)}
    least, most = bounds.get(args.mode, (1, 100))
    if not least <= len(args.seeds) <= most:
        raise UserError(f"{args.mode}: needs {least} to {most:,} seeds, not {len(args.seeds):,}")
    return args


def show(args: Namespace) -> int:
    """Writes what was asked for and says where it is."""
    write, place, _ = MODES[args.mode]
    model = load_model(args.ckpt, infogan.pick_device(args.device))
    spec, path = model.spec, model.path
    names, reach = read_names(model, args.names), 3.0 if spec.n_cont > 5 else 1.5
    codes = [code.strip() for code in args.codes.split(",")] if args.codes else spec.names
    check_codes(spec, "--codes", codes)
    boxes = [code for code, name in names.items() if not has_letters(font_for(name, 12), name)]
    if boxes:
        print(f"no font here has the letters of {', '.join(boxes)}: pictures show the codes alone")
    shown = {code: f"{code} ({name})" for code, name in names.items() if code not in boxes}
    labels = {code: shown.get(code, code) for code in spec.names}
    place = place if path.name == "last.pt" else f"{path.stem}-{place}"
    values = {"codes": codes, "names": names, "labels": labels}  # labels: of sheets
    values |= {"set": read_set(args.set, spec) if args.set else {}}
    values |= {"range": args.range or (-reach, reach), "out": Path(args.out or path.parent / place)}
    args = Namespace(**vars(args) | values)
    print(write(model, args))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix."""
    return infogan.run("generate.py", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
