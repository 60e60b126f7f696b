"""Show what an InfoGAN learned: one labelled sheet per code, and a table of what every code does.

    python generate.py --ckpt checkpoint/v3/last.pt                   sheets and table of all codes
    python generate.py --ckpt checkpoint/v3/last.pt --explorer        a web page that moves codes
    python generate.py --ckpt checkpoint/v3/last.pt --sort ~/faces    real faces, by their codes
    python generate.py --ckpt checkpoint/v3/last.pt --samples 10000   pictures, for FID tools
    python generate.py --ckpt checkpoint/v3/last.pt --samples 50 --set cat0=3    of one category
    python generate.py --ckpt checkpoint/v3/last.pt --walk            an animation through faces
    python generate.py --ckpt checkpoint/v3/last.pt --read me.png     what Q reads from a picture
    python generate.py --ckpt A/last.pt --versus B/last.pt --data ~/faces   two runs side by side

The architecture comes from the checkpoint. Along a row of a sheet only one code changes.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from inspect import signature
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

Seeds, Held, Ends = Sequence[int], dict[str, float], tuple[float, float]  # of --set and --range
Names = dict[str, str]
N_MEASURED, N_MOVED = 400, 100  # samples behind a table's figures; behind its tints, heat maps
MOST_SHOWN = 100  # categories on a sheet
DRAWN_AT_ONCE, N_READ = 32, 4  # pictures in each pass of G; drawings beside a picture of --read
N_REAL = 1000  # pictures behind a distance to real ones
PAGE = Path(__file__).parent / "data/explorer.html"
PAGE_MB = 9  # at most: it must open, and follow a slider, at once
FONTS = ("DejaVuSans", "arial", "Arial Unicode", "NotoSansCJK-Regular", "wqy-microhei", "msgothic")
FONTS += ("msyh", "malgun", "Nirmala", "unifont")  # for names in other scripts
MARK, EXIF = "generate.py of InfoGAN", Image.Exif()  # what is ours may be written again
EXIF[ExifTags.Base.Software] = MARK
MARKED = {"exif": EXIF.tobytes(), "comment": MARK}  # of PNG and WebP, and of GIF
HEADS = (b"code,L_I,", b"file,seed", b"file,cat0,", b"file,cont0,")  # of our tables
save_picture = partial(infogan.save_picture, **MARKED)
to_floats = partial(infogan.make_batch, flip=False, rng=None, device=torch.device("cpu"))

# drawing and saving -------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained checkpoint: generator, encoder, its codes, and the checkpoint's contents."""

    path: Path
    G: nn.Sequential  # in plain layers, see folded
    Q: infogan.Encoder
    spec: CodeSpec
    ckpt: dict
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, str]:
        """Size and channels of its pictures, and what is kept of those that are not square."""
        args = self.ckpt["args"]
        return args["image_size"], args["channels"], args.get("crop", "centre")


def folded(G: Generator) -> nn.Sequential:
    """G in plain layers: doubling and batch norm are in the weights of the convolutions."""
    layers = [nn.Unflatten(1, (-1, 1, 1))]
    for m in G.layers:
        if isinstance(m, nn.BatchNorm2d):
            transposed = isinstance(layers[-1], nn.ConvTranspose2d)
            layers[-1] = fuse_conv_bn_eval(layers[-1], m, transpose=transposed)
            continue
        if isinstance(m, (infogan.UpsampleConv2d, infogan.ConvTranspose2dFromPixel)):
            up, bias = isinstance(m, infogan.UpsampleConv2d), m.bias
            weight = nn.Parameter(m.folded() if up else m.weight)
            m = nn.ConvTranspose2d(*weight.shape[:2], 4, 1 + up, int(up), bias=bias is not None)
            m.weight, m.bias = weight, bias
        layers.append(m.eval())
    net = nn.Sequential(*layers).eval().requires_grad_(False)
    return net.to(memory_format=torch.channels_last)


def load_model(path: str, device: torch.device) -> Model:
    """A checkpoint, or the last one of a run's folder."""
    file = Path(path, "last.pt") if os.path.isdir(path) else Path(path)
    ckpt = infogan.load_checkpoint(file)
    (G, spec), (Q, _) = infogan.load_generator(ckpt, device), infogan.load_encoder(ckpt, device)
    Q = Q.to(memory_format=torch.channels_last)  # faster
    return Model(file, folded(G), Q, spec, ckpt, device)


@torch.no_grad()
def draw(G: nn.Module, joined: Tensor) -> Tensor:
    """Pictures (n, channels, size, size) in [-1, 1] of G's inputs (n, spec.dim), on the CPU."""
    # always as many at once, as rounding depends on it: the same seed is the same file everywhere
    device, parts = next(G.parameters()).device, joined.split(DRAWN_AT_ONCE)
    full = (F.pad(part, (0, 0, 0, DRAWN_AT_ONCE - len(part))).to(device) for part in parts)
    return torch.cat([G(part).float().cpu() for part in full])[: len(joined)]


def hold(spec: CodeSpec, codes: Codes, held: Held) -> Codes:
    """codes with the values of --set."""
    for name, value in held.items():
        codes = spec.traverse(codes, name, [value])
    return codes


def traversal(model: Model, base: Codes, code: str, values: Sequence, held: Held) -> Tensor:
    """Pictures (n * len(values), …) along a code, or along all categoricals that are not held."""
    moved = model.spec.traverse(base, code, values)
    return draw(model.G, model.spec.join(hold(model.spec, moved, held if code == "cat" else {})))


def check_ours(paths: Iterable[Path]) -> None:
    """Raises UserError for the first file that is there but that generate.py did not write."""
    for path in (path for path in paths if path.exists()):
        raw = path.read_bytes() if path.is_file() else b"a folder"
        if raw and MARK.encode() not in raw and not raw.startswith(HEADS):
            why = "is there, but not from this version of generate.py"
            raise UserError(f"{path}: {why}; move it, or give another --out")


def save_table(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """A CSV, complete or not at all."""
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(lines)
    with replacing(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def print_table(lines: list[list[str]]) -> None:
    """Columns: the first to the left, the others to the right."""
    left, *right = (max(map(len, column)) for column in zip(*lines, strict=True))
    for name, *cells in lines:
        print(f"{name:{left}}", *map(str.rjust, cells, right), sep="  ")


# names --------------------------------------------------------------------------------------------


def check_codes(spec: CodeSpec, where: str, codes: Iterable[str]) -> None:
    """Raises UserError for a code that spec does not have."""
    for code in (code for code in codes if code not in spec.names):
        raise UserError(f"{where}: {code!a}: this checkpoint has {', '.join(spec.names) or 'none'}")


def read_names(model: Model, given: str | None) -> Names:
    """What people call the codes: by --names, names.json beside the checkpoint, or within it."""
    path, spec = Path(given or model.path.with_name("names.json")), model.spec
    where, names = f"--names {path}" if given else str(path), model.ckpt.get("names", {})
    if given or path.exists():
        try:
            names = {**names, **json.loads(path.read_text(encoding="utf-8-sig"))}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            why = f'must be a table like {{"cont3": "tilt"}}: {error}'
            raise UserError(f"{where}: {why}") from error
    if not isinstance(names, dict):
        raise UserError(f"{model.path}: its names are no table")
    if not given:  # the file may be for the checkpoints of two runs
        others = [c for c in names if re.fullmatch("(cat|cont)[0-9]+", c) and c not in spec.names]
        names = {code: name for code, name in names.items() if code not in others}
    check_codes(spec, where, names)
    for code, name in names.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 40:
            raise UserError(f"{where}: {code}: must be one line of 1 to 40 characters")
    return names


def read_set(text: str | None, spec: CodeSpec) -> Held:
    """The codes of "cat0=3,cont5=-0.8", with their values. Raises UserError."""
    held, one_of = {}, f"a whole number from 0 to {spec.cat_dim - 1}"
    for part in map(str.strip, text.split(",") if text else []):
        code, _, value = part.partition("=")
        check_codes(spec, "--set", [code])
        v = float(value) if re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", value) else math.nan
        cat = code.startswith("cat")
        if code in held or not (v in range(spec.cat_dim) if cat else abs(v) <= 1000):
            must = one_of if cat else "a number from -1000 to 1000"
            raise UserError(f"--set {part}: {code} must be given once, as {must}")
        held[code] = v
    return held


def label(code: str, names: Names) -> str:
    """The code with its name, where it has one: "cont3 (tilt)"."""
    return f"{code} ({names[code]})" if code in names else code


@cache
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Pillow's own font for ASCII, else the first of FONTS that has all letters of the text."""
    if text.isascii():
        return ImageFont.load_default(size)
    for name in FONTS:
        with suppress(OSError):  # not on this system; Pillow looks through its folders of fonts
            font = ImageFont.truetype(name, size)
            missing = bytes(font.getmask("\U0010fffd"))  # the box for a letter that a font lacks
            if all(bytes(font.getmask(letter)) != missing for letter in {*text} - {"\n"}):
                return font
    return None


def drawable(names: Names) -> Names:
    """The names that a font here can write; the others are told of in one line."""
    boxes = [code for code, name in names.items() if not font_for(name, 12)]
    if boxes:
        print(f"no font here has the letters of {', '.join(boxes)}: pictures show the codes alone")
    return {code: name for code, name in names.items() if code not in boxes}


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
def measure(model: Model, seed: int, batch_size: int) -> list[Row]:
    """Rows for z and each kind of code together, then for every code, strongest effect first."""
    spec, rng, device = model.spec, torch.Generator().manual_seed(seed), model.device
    codes, other = spec.sample(N_MEASURED, rng), spec.sample(N_MEASURED, rng)
    fast = device.type == "cpu" and infogan.speed_up(device)  # a GPU needs no bfloat16 for this

    def pictures(codes: Codes) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            return draw(model.G, spec.join(codes))

    x = pictures(codes)
    x_edges, read = edge_map(x), [model.Q.D(part.to(device))[1] for part in x.split(batch_size)]
    q = infogan.QOutput(*(torch.cat(parts).cpu() for parts in zip(*read, strict=True)))
    L_I = dict(zip(spec.names, infogan.mutual_information(spec, q, codes).tolist(), strict=True))
    most, few = dict(zip(spec.names, spec.ceilings, strict=True)), [c[:N_MOVED] for c in codes]
    groups, each = [], []
    names = [*(["z"] if spec.z_dim else []), *spec.kinds, *spec.names]
    for name in tqdm(names, "measuring", leave=False, disable=None):
        y = pictures(spec.replace(codes, name, other))
        figures = L_I.get(name), most.get(name), effect(x, y), effect(x_edges, edge_map(y))
        if name in L_I:
            ends = [*map(pictures, low_high(spec, Codes(*few), name, rng))]
            each.append(Row(name, *figures, tint(*ends), heat_map(*ends)))
        else:
            groups.append(Row(name, *figures))
    return groups + sorted(each, key=lambda r: -r.effect)


def table_of(rows: list[Row], names: Names) -> list[list[str]]:
    """The rows as text, and the codes' names."""
    table = [[*Row._fields[:-1], "name"]]
    for row in rows:
        figures = ("" if v is None else f"{v:.4f}" for v in row[1:-1])
        table.append([row.code, *figures, names.get(row.code, "")])
    return table


def sliced_wasserstein(x: Tensor, y: Tensor, rng: torch.Generator) -> list[float]:
    """Distance of 7x7 patches of as many pictures, fine to coarse (after 1710.10196, section 5).

    Sets (n, channels, size, size); a figure for each size down to 16.
    """
    directions = F.normalize(torch.randn(512, 49 * x.shape[1], generator=rng), dim=1)
    kernels, distances = directions.unflatten(1, (-1, 7, 7)), []
    while x.shape[2] >= 16:
        normed = [F.batch_norm(v, None, None, training=True) for v in (x, y)]  # as bright, as vivid
        slices = [F.conv2d(v, kernels, stride=v.shape[2] // 8).transpose(0, 1) for v in normed]
        x_sorted, y_sorted = (values.flatten(1).sort(1)[0] for values in slices)
        distances.append((x_sorted - y_sorted).abs().mean().item())
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return distances


# sheets -------------------------------------------------------------------------------------------


def sheet(
    title: str, x: Tensor, above: Sequence[str], left: Sequence[str] = (), zoom: int = 1,
    bar: Ends | None = None,
) -> Image.Image:  # fmt: skip
    """len(above) pictures in a row, labels above the columns and left of the rows.

    A bar goes from the middle of one column to that of another, not always whole numbers.
    """
    k, columns = max(1, 64 // x.shape[3]) * zoom, len(above)  # 64 pixels at least: labels must fit
    tiles = [ImageOps.scale(to_image(p).convert("RGB"), k, Image.Resampling.NEAREST) for p in x]
    gap, edge, top = 2 * zoom, 12 * zoom, (54 if any(above) else 40) * zoom

    def font(text: str, size: int = 12) -> ImageFont.FreeTypeFont:
        return font_for(text, size * zoom) or ImageFont.load_default(size * zoom)

    step, lines = tiles[0].width + gap, [line for text in left for line in text.split("\n")]
    wide = max((font(line).getlength(line) for line in lines), default=-8 * zoom)
    margin = edge + int(wide) + 8 * zoom
    width = max(margin + columns * step - gap, edge + int(font(title, 15).getlength(title))) + edge
    page = Image.new("RGB", (width, top + step * -(-len(x) // columns) - gap + edge), "white")
    pen = ImageDraw.Draw(page)
    pen.text((edge, 10 * zoom), title, "black", font(title, 15))
    middles = [margin + i * step + tiles[0].width // 2 for i in range(columns)]
    for at, text in zip(middles, above, strict=True):
        pen.text((at, top - 6 * zoom), text, "#333333", font(text), anchor="ms")
    for i, text in enumerate(left):
        at = (edge, top + i * step + tiles[0].width // 2)
        pen.multiline_text(at, text, "#333333", font(text), anchor="lm", spacing=3 * zoom)
    for i, picture in enumerate(tiles):
        page.paste(picture, (margin + i % columns * step, top + i // columns * step))
    if bar and bar[0] < bar[1]:
        a, b = (middles[0] + v * step for v in bar)
        pen.rectangle((a, top - 4 * zoom, b, top - 2 * zoom), "#2f62c9")
    return page


def beside(pages: list[Image.Image]) -> Image.Image:
    """Pages next to each other."""
    whole = Image.new("RGB", (sum(p.width for p in pages), max(p.height for p in pages)), "white")
    for i, page in enumerate(pages):
        whole.paste(page, (sum(p.width for p in pages[:i]), 0))
    return whole


def sheets(
    model: Model, out: Path, seed: int, seeds: Seeds, set_: Held, range_: Ends, steps: int,
    codes: list[str], names: Names, gif: bool, zoom: int, batch_size: int,
) -> str:  # fmt: skip
    """The table, a sheet per code, sheets of several codes; nothing selected: the seed's first."""
    spec, rows = model.spec, measure(model, seed, batch_size)
    table = table_of(rows, names)
    print_table(table)
    save_table(out / "table.csv", table)
    base, names = hold(spec, spec.sample_seeds(seeds), set_), drawable(names)
    each_z, (low, high), every = (
        [f"seed {s}" for s in seeds],
        range_,
        range(spec.cat_dim)[:MOST_SHOWN],
    )
    smooth = [round(v, 6) + 0.0 for v in torch.linspace(low, high, steps).tolist()]
    each, numbers = [f"{v:+.2f}" if v else "0" for v in smooth], [str(k) for k in every]
    ends = sorted((v - low) / (high - low) * (steps - 1) for v in (-1, 1))  # of training, columns
    bar = max(ends[0], 0), min(ends[1], steps - 1)
    held = "".join(f"; {code} = {v:g}" for code, v in set_.items())
    strips, left = [], []
    for row in (row for row in rows if row.code in codes):
        cat, name = row.code.startswith("cat"), label(row.code, names)
        values, above, mark = (every, numbers, None) if cat else (smooth, each, bar)
        x, nats = traversal(model, base, row.code, values, set_), f"L_I {row.L_I:.2f}"
        title = f"{name}: {nats} of {row.ceiling:.2f} nats, effect {row.effect:.3f}"
        page = sheet(f"{title}, tint {row.tint:.2f}", x, above, each_z, zoom, mark)
        where = sheet("", row.where[None], ["where"], zoom=zoom)
        save_picture(out / f"{row.code}.png", beside([page, where]))
        if gif:
            save_gif(out / f"{row.code}.gif", name, x, above, not cat, zoom)
        of_seed = x.expand(-1, 3, -1, -1).unflatten(0, (len(seeds), -1))
        best = of_seed.var(1).sum((1, 2, 3)).argmax()  # the face that this code changes most
        blank = torch.ones(max(0, steps - len(values)), *row.where.shape)
        strips.append(torch.cat([row.where[None], of_seed[best, :steps], blank]))
        left.append(f"{name}\n{nats}\neffect {row.effect:.3f}\n{each_z[best]}")
    if strips:
        title = f"strongest code first (category / value), on the seed that it changes most{held}"
        both = [f"{k} / {v}" if k in every and spec.n_cat else v for k, v in enumerate(each)]
        mark = (bar[0] + 1, bar[1] + 1) if spec.n_cont else None
        page = sheet(title, torch.cat(strips), ["where", *both], left, zoom, mark)
        save_picture(out / "overview.png", page)
    if spec.n_cat:
        title = f"all categoricals together (columns); z and continuous codes (rows){held}"
        page = sheet(title, traversal(model, base, "cat", every, set_), numbers, each_z, zoom)
        save_picture(out / "all-categoricals.png", page)
    if spec.n_cat and spec.n_cont:
        pages, categories = [], spec.traverse(Codes(*(c[:1] for c in base)), "cat0", every)
        for name in spec.names[spec.n_cat :][:2]:
            x, title = traversal(model, categories, name, smooth, set_), f"cat0 (rows) by {name}"
            pages.append(sheet(f"{title} (columns)", x, each, numbers, zoom, bar))
        save_picture(out / "cat-by-cont.png", beside(pages))
    first = hold(spec, spec.sample_seeds(range(seed, seed + 100)), set_)
    title = f"100 samples, seeds {seed} to {seed + 99}, nothing selected{held}"
    page = sheet(title, draw(model.G, spec.join(first)), [""] * 10, zoom=zoom)
    save_picture(out / "samples.png", page)
    return f"{out} has sheets and table.csv" + "; bars: -1 to 1, as in training" * (spec.n_cont > 0)


def save_gif(path: Path, title: str, x: Tensor, values: list[str], back: bool, zoom: int) -> None:
    """A loop over a traversal's columns, its rows side by side; `back` runs it there and back."""
    steps = zip(x.unflatten(0, (-1, len(values))).unbind(1), values, strict=True)
    frames = [sheet(title, faces, [value] * len(faces), zoom=zoom) for faces, value in steps]
    frames += frames[-2:0:-1] if back else []
    how = {"duration": 100 if back else 500, "loop": 0, "save_all": True}
    save_picture(path, frames[0], append_images=frames[1:], **how)


def walk(model: Model, out: Path, seeds: Seeds, set_: Held, steps: int, zoom: int) -> str:
    """From the face of each seed to the next, and from the last to the first, as GIF or WebP."""
    spec = model.spec
    a = spec.join(hold(spec, spec.sample_seeds(seeds), set_))[:, None]
    b, t = a.roll(-1, 0), torch.arange(steps)[:, None] / steps
    codes, turn = a + t * (b - a), t * math.pi / 2  # (faces, steps, spec.dim)
    z = turn.cos() * a + turn.sin() * b  # of variance 1 on the way too, so that faces stay sharp
    codes[..., : spec.z_dim] = z[..., : spec.z_dim]
    codes, k = codes.flatten(0, 1), max(1, 128 // model.shape[0]) * zoom
    x = chain.from_iterable(draw(model.G, part) for part in codes.split(DRAWN_AT_ONCE))
    frames = (ImageOps.scale(to_image(p).convert("RGB"), k, Image.Resampling.BICUBIC) for p in x)
    save_picture(out, next(frames), append_images=frames, duration=80, loop=0, save_all=True)
    return f"{out} has {len(codes)} frames"


def save_pngs(out: Path, names: list[str], batches: Iterable[Tensor]) -> None:
    """Pictures as PNGs under these names, a batch at a time, into a folder that has no others."""
    if others := {p.name for p in out.glob("*.png")} - {*names}:
        raise UserError(f"--out {out}: holds {len(others):,} other pictures; give an empty folder")
    check_ours(out / name for name in names)
    out.mkdir(parents=True, exist_ok=True)

    def save(x: Tensor, name: str) -> None:
        # lossless at any level; more would take four times as long for files as large
        to_image(x).save(out / name, compress_level=1, **MARKED)

    paths = iter(names)
    with ThreadPoolExecutor() as pool:  # Pillow compresses without the interpreter's lock
        for x in batches:
            list(pool.map(save, x, paths))  # raises what a thread could not write


def samples(
    model: Model, out: Path, seeds: Seeds, set_: Held, data: str | None, batch_size: int
) -> str:
    """A PNG for each seed and codes.csv, its codes; of --data, what a run sees, into OUT-real."""
    spec, table = model.spec, [["file", "seed", *model.spec.names]]
    step, names = -(-batch_size // DRAWN_AT_ONCE) * DRAWN_AT_ONCE, [f"{s:06d}.png" for s in seeds]

    def batches() -> Iterator[Tensor]:
        save_table(out / "codes.csv", table)  # no row of an earlier call, should this one stop
        for i in range(0, len(seeds), step):
            codes = hold(spec, spec.sample_seeds(seeds[i : i + step]), set_)
            each = zip(codes.c_cat.tolist(), codes.c_cont.tolist(), strict=True)
            for k, (c_cat, c_cont) in enumerate(each, i):
                table.append([names[k], seeds[k], *c_cat, *(f"{v:.4f}" for v in c_cont)])
            yield draw(model.G, spec.join(codes))

    save_pngs(out, names, batches())
    save_table(out / "codes.csv", table)
    told = f"{out} has {len(names):,} pictures and codes.csv"
    if data:
        real, x = out.with_name(f"{out.name}-real"), load_pictures(data, *model.shape).x
        save_pngs(real, [f"{i:06d}.png" for i in range(len(x))], map(to_floats, x.split(step)))
        told += f", {real} the {len(x):,} of {data}"
    return told


# two runs -----------------------------------------------------------------------------------------


def versus(
    model: Model, out: Path, versus: str, data: str | None, seed: int, seeds: Seeds, set_: Held,
    range_: Ends, zoom: int, batch_size: int,
) -> str:  # fmt: skip
    """Two runs in one table, with their distance to --data, and side by side in comparison.png."""
    spec, pages, both = model.spec, [], [model, load_model(versus, model.device)]
    ours, theirs = (vars(m.spec) | {"image_size": m.shape[0], "channels": m.shape[1]} for m in both)
    if differ := [name for name in ours if ours[name] != theirs[name]]:
        how = ", ".join(f"--{n.replace('_', '-')} {theirs[n]}, not {ours[n]}" for n in differ)
        raise UserError(f"--versus {both[1].path}: has other codes or pictures: {how}")
    rng, columns = torch.Generator().manual_seed(seed), min(spec.cat_dim, MOST_SHOWN)
    if data:
        real = load_pictures(data, *model.shape).x
        real = to_floats(real[torch.randperm(len(real), generator=rng)[:N_REAL]])
    base = hold(spec, spec.sample_seeds(seeds), set_)
    some = spec.join(hold(spec, spec.sample_seeds(range(seed, seed + columns)), set_))
    for one in both:
        rows, x = measure(one, seed, batch_size), [draw(one.G, some)]
        print(one.path)
        print_table(table_of(rows, {}))
        if data:
            drawn = draw(one.G, spec.join(spec.sample(len(real), rng.manual_seed(seed))))
            swd = [f"{1000 * d:.0f}" for d in sliced_wasserstein(real, drawn, rng)]
            print("SWD x 1000 to real pictures, fine to coarse:", *swd)
        moves = {"cat": range(columns)} if spec.n_cat else {}
        for row in [r for r in rows if r.code[:4] == "cont" and r.where is not None][:1]:
            moves[row.code] = torch.linspace(*range_, columns).tolist()
        x += [traversal(one, base, code, values, set_) for code, values in moves.items()]
        left = [code.replace("cat", "all cat") for code in moves for _ in seeds]
        above = [str(k) for k in range(columns)]
        pages.append(sheet(str(one.path), torch.cat(x), above, ["samples", *left], zoom))
    save_picture(out / "comparison.png", beside(pages))
    return f"{out} has comparison.png"


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


def labels_of(data: str, names: list[str]) -> list[str]:
    """The class of each picture: MNIST's, else the folder that it is in; "" where it has none."""
    if data not in ("mnist", "fashion-mnist"):
        return [Path(name).parent.name for name in names]
    from torchvision.datasets.mnist import read_label_file

    path = infogan.DATA / infogan.NAMED_SETS[data][1].replace("images-idx3", "labels-idx1")
    labels = read_label_file(str(path)).tolist() if path.exists() else []
    return [str(labels[int(name)]) if labels else "" for name in names]


@torch.no_grad()
def read_codes(model: Model, x: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Of bytes (n, h, w, channels): each code as Q reads it; how sure, or sigma: (n, codes)."""
    read = []
    for part in x.split(batch_size):
        p, mu, sigma = model.Q(to_floats(part, device=model.device))
        sure, c_cat = p.max(2)
        read.append([torch.cat(pair, 1).cpu() for pair in ((c_cat, mu), (sure, sigma))])
    return tuple(map(torch.cat, zip(*read, strict=True)))


def sort(
    model: Model, out: Path, sort: str, rows: int, steps: int, codes: list[str], names: Names,
    zoom: int, batch_size: int,
) -> str:  # fmt: skip
    """Sheets of real pictures by the codes that Q reads from them; codes.csv; how they agree."""
    spec, root, n_cat = model.spec, Path(sort).resolve(), model.spec.n_cat
    if out.resolve().is_relative_to(root):
        raise UserError(f"--out {out}: lies within --sort {sort}; give another folder")
    if root.is_file():
        raise UserError(f"--sort {sort}: must be a folder; --read takes single pictures")
    x, _, files, *_ = load_pictures(sort, *model.shape, flag="--sort")
    if sort not in infogan.NAMED_SETS:
        files = [os.path.relpath(name, root) for name in files]
    values, doubts = read_codes(model, x, batch_size)
    c_cat, floats = values[:, :n_cat].int(), torch.cat([values[:, n_cat:], doubts], 1)
    head = ["file", *spec.names, *(f"{c}_{'p' if 'cat' in c else 'sigma'}" for c in spec.names)]
    lines = zip(files, c_cat.tolist(), floats.tolist(), strict=True)
    lines = ([name, *cat, *(f"{v:.4f}" for v in rest)] for name, cat, rest in lines)
    save_table(out / "codes.csv", chain([head], lines))
    labels, shown = labels_of(sort, files), drawable(names)
    labelled = [i for i, text in enumerate(labels) if text]
    kinds = {labels[i] for i in labelled}
    if n_cat:
        left_out = f"{len(files) - len(labelled):,} pictures without one left out"
        none = "" if len(kinds) > 1 else "; an error needs two: a label is a picture's folder"
        print(f"labels: {len(kinds)}, {left_out}{none}")
    for code in codes:
        title, j = label(code, shown), spec.names.index(code)
        if j < n_cat:
            order, left, parts = doubts[:, j].argsort(descending=True), [], []
            for k in range(spec.cat_dim)[:MOST_SHOWN]:
                mine = order[c_cat[order, j] == k]
                left.append(f"{k}\n{len(mine):,}")
                blank = (0,) * 7 + (max(0, steps - len(mine)),)
                parts.append(F.pad(to_floats(x[mine[:steps]]), blank, value=1.0))
            title += ": category, its number of pictures; the most certain first"
            page = sheet(title, torch.cat(parts), [""] * steps, left, zoom)
            if len(kinds) > 1:
                error, nmi = agreement(c_cat[labelled, j].tolist(), [labels[i] for i in labelled])
                print(f"{label(code, names)}: {error:.1%} error, NMI {nmi:.3f}")
        else:
            below = min(rows, len(files))  # neighbours below each other
            start = torch.linspace(0, len(files) - below, steps).round().long()
            chosen = values[:, j].argsort()[start + torch.arange(below)[:, None]]
            above = [f"{v:+.2f}" for v in values[chosen, j].mean(0).tolist()]
            title += ": lowest to highest, as Q reads it"
            page = sheet(title, to_floats(x[chosen.flatten()]), above, zoom=zoom)
        save_picture(out / f"{code}.png", page)
    return f"{out} has sheets and codes.csv"


def read(
    model: Model, out: Path, read: list[str], seeds: Seeds, set_: Held, codes: list[str],
    names: Names, zoom: int, batch_size: int,
) -> str:  # fmt: skip
    """A table of what Q reads from each picture; read.png: each beside what G draws of it."""
    spec, raw, (size, channels, _) = model.spec, bytearray(), model.shape
    paths = [Path(os.path.expanduser(path)) for path in read]
    for why, pixels, _ in (infogan.read_picture(path, *model.shape) for path in paths):
        if pixels is None:
            raise UserError(f"--read {why}: cannot be read as a picture; --sort takes a folder")
        raw += pixels
    x = torch.frombuffer(raw, dtype=torch.uint8).view(-1, size, size, channels)
    values, doubts = read_codes(model, x, batch_size)
    table = {"": [path.name for path in paths]}
    for code, v, d in zip(spec.names, values.T.tolist(), doubts.T.tolist(), strict=True):
        form = "{:.0f} ({:.0%})" if code.startswith("cat") else "{:+.2f} ± {:.2f}"
        table[code] = [*map(form.format, v, d)]
    print_table([[label(code, names), *table[code]] for code in ("", *codes)])
    c_cat, c_cont = values.repeat_interleave(len(seeds), 0).split([spec.n_cat, spec.n_cont], 1)
    again = Codes(spec.sample_seeds(seeds).z.repeat(len(x), 1), c_cat.long(), c_cont)
    drawn = draw(model.G, spec.join(hold(spec, again, set_))).unflatten(0, (-1, len(seeds)))
    shown = torch.cat([to_floats(x)[:, None], drawn], 1).flatten(0, 1)
    title, above = "each picture, and what G draws from the codes that Q reads", ["picture"]
    page = sheet(title, shown, above + [f"seed {s}" for s in seeds], table[""], zoom)
    save_picture(out / "read.png", page)
    return f"{out} has read.png"


# for other programs -------------------------------------------------------------------------------


def explorer(
    model: Model, out: Path, seed: int, seeds: Seeds, set_: Held, range_: Ends, names: Names,
    batch_size: int,
) -> str:  # fmt: skip
    """One HTML file that draws by itself, from --set on; its first z are those of the sheets."""
    spec, weights, scales = model.spec, [], []
    convs = [m for m in model.G if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    for m in convs:  # 8 bits a weight, with a scale for each channel that it makes
        w = m.weight if isinstance(m, nn.ConvTranspose2d) else m.weight.transpose(0, 1)
        scale = w.abs().amax((0, 2, 3)).clamp(min=1e-12) / 127
        weights.append((w / scale[:, None, None]).round().to(torch.int8).flatten())
        scales += [scale, m.bias]
    size = 4 / 3e6 * sum(map(len, weights))
    if size > PAGE_MB:
        why = f"a page of {size:.1f} MB, the limit is {PAGE_MB}; train with a smaller --width"
        raise UserError(f"--explorer: generator too large: {why}")
    rows, codes = measure(model, seed, batch_size), []
    print_table(table_of(rows, names))
    reach = [*range_, *(v for code, v in set_.items() if code.startswith("cont"))]

    def encode(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    for row in (row for row in rows if row.where is not None):
        to_image(row.where).save(file := io.BytesIO(), "JPEG", quality=85)
        where = f"data:image/jpeg;base64,{encode(file.getvalue())}"
        codes.append(row._asdict() | {"name": names.get(row.code), "where": where})
    data = {
        "title": f"{model.path.parent.name}/{model.path.name}, step {model.ckpt['step']:,}",
        "spec": vars(spec),
        "range": [min(reach), max(reach)],
        "at": "#" + "&".join(f"{code}={value:g}" for code, value in set_.items()),
        "seeds": [*seeds],
        "layers": [{"outputs": m.out_channels, "kernel": m.kernel_size[0]} for m in convs],
        "codes": codes,
        "z": [[round(v, 4) for v in z] for z in spec.sample_seeds(seeds).z.tolist()],
        "weights": encode(torch.cat(weights).cpu().numpy().tobytes()),
        "scales": encode(torch.cat(scales).cpu().numpy().astype("<f4").tobytes()),
    }
    filled = json.dumps(data).replace("<", "\\u003c")  # a name must not end the script
    page = PAGE.read_text(encoding="utf-8").replace("data = null;", f"data = {filled};")
    with replacing(out / "explorer.html") as file:
        file.write(page.encode())
    return f"{out} has explorer.html"


def onnx(model: Model, out: Path) -> str:
    """G as ONNX, from "codes" (n, spec.dim) to "x" (n, channels, size, size) in [-1, 1]."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--onnx: needs `pip install onnx onnxscript`") from error
    spec, G = model.spec, model.G.cpu().to(memory_format=torch.contiguous_format)
    names, n = {"input_names": ["codes"], "output_names": ["x"]}, ({0: torch.export.Dim("n")},)
    how = {"dynamic_shapes": n, "dynamo": True, "verbose": False, **names}
    proto = torch.onnx.export(G, (torch.zeros(2, spec.dim),), **how).model_proto  # a new object
    proto.doc_string = f"{MARK}. codes: z ({spec.z_dim}), {spec.n_cat} categoricals one-hot"
    proto.doc_string += f" ({spec.cat_dim} each), {spec.n_cont} continuous. x: from -1 to 1"
    with replacing(out / "generator.onnx") as file:
        file.write(proto.SerializeToString())
    return f"{out} has generator.onnx"


def shrink(model: Model, shrink: str, names: Names) -> str:
    """A checkpoint to share: what the loaders need, in half precision, with the codes' names."""
    ckpt, path = model.ckpt, Path(shrink)
    if path.exists():
        raise UserError(f"--shrink {path}: exists; give a new name")
    args_kept = ckpt["args"] | {"data": "", "out": "", "init": None}  # nobody else's business
    small = {"args": args_kept, **{key: ckpt.get(key) for key in ("spec", "step", "minutes")}}
    for net in ("G_ema", "D"):  # vectors stay: they are small, and variances may be tiny
        small[net] = {k: w.half() if w.dim() > 1 else w for k, w in ckpt[net].items()}
    infogan.save_file(path, small | {"format": infogan.FORMAT, "names": names})
    return f"{path} has {path.stat().st_size / 1e6:.1f} MB"


# flags --------------------------------------------------------------------------------------------

# fmt: off
MODES = {  # by whom, its parameters are its flags; into which folder beside the checkpoint; files
"sheets": (sheets, "traversals", "table.csv CODE.png CODE.gif overview.png samples.png"
  " all-categoricals.png cat-by-cont.png"),
"--explorer": (explorer, "traversals", "explorer.html"),
"--walk": (walk, "traversals/walk.gif", "."),
"--samples": (samples, "generated", "codes.csv"),
"--read": (read, "traversals", "read.png"),
"--sort": (sort, "sorted", "codes.csv CODE.png"),
"--versus": (versus, "traversals", "comparison.png"),
"--onnx": (onnx, "traversals", "generator.onnx"),
"--shrink": (shrink, "", ""),
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
    ("--batch-size", 256, (1, 65_536), "pictures in memory at once"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
], "instead of sheets": [
    ("--explorer", False, bool, "write explorer.html, a page to move the codes"),
    ("--sort", None, "FOLDER", "sort real pictures by the codes that Q reads: a folder or mnist"),
    ("--samples", None, (0, 10**7), "write N PNGs, or that of each of --seeds, and codes.csv"),
    ("--read", None, "PICTURE", "tell what Q reads from pictures, draw each again"),
    ("--walk", False, bool, "write an animation that moves through the faces of the seeds"),
    ("--versus", None, "FILE", "compare with this checkpoint"),
    ("--data", None, "FOLDER", "real pictures: --versus measures both against them,"
     " --samples writes them too, as a run sees them, into OUT-real"),
    ("--onnx", False, bool, "write generator.onnx, for other runtimes"),
    ("--shrink", None, "FILE", "write a checkpoint in half precision, to share"),
]}
SEVERAL = {"samples": {"nargs": "?", "const": 0}, "read": {"nargs": "+"},
  "range": {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}}
# fmt: on


def flags_of(mode: str) -> set[str]:
    """Its function's parameters, and what may tell which seeds are meant."""
    flags = {"--" + p.strip("_").replace("_", "-") for p in signature(MODES[mode][0]).parameters}
    flags |= {"--ckpt", "--device", mode, *(["--seed"] if "--seeds" in flags else [])}
    rows = "--seeds" in flags and mode not in ("--samples", "--read")
    return flags | {"--rows"} if rows else flags


def read_seeds(args: Namespace) -> Seeds:
    """The numbers of "3,17,40-49", or as many as the mode takes, from --seed on."""
    count = {"--samples": args.samples, "--read": N_READ}.get(args.mode, args.rows)
    seeds, text = range(args.seed, args.seed + count), args.seeds
    if text:
        parts = [re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", p.strip()) for p in text.split(",")]
        each = [range(int(m[1]), int(m[2] or m[1]) + 1) if m else range(0) for m in parts]
        seeds = [*chain(*each)] if all(each) and sum(map(len, each)) <= 10**7 else []
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"--seeds {text}: must be different whole numbers such as 3,17,40-49")
    least, most = 1 + (args.mode == "--walk"), 10**7 if args.mode == "--samples" else 100
    if not least <= len(seeds) <= most:
        raise UserError(f"{args.mode}: needs {least:,} to {most:,} seeds, not {len(seeds):,}")
    return seeds


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags and the mode. Raises UserError in one line for what is wrong or has no effect."""
    p = infogan.Parser("generate.py", __doc__, FLAGS)
    for action in p._actions:
        vars(action).update(SEVERAL.get(action.dest, {}))
    args = p.parse_args(argv)
    given = {w.partition("=")[0] for w in (sys.argv if argv is None else argv) if w[:2] == "--"}
    if not args.ckpt:
        raise UserError("--ckpt: give a checkpoint, such as checkpoint/v3/last.pt; see --help")
    if len(modes := [mode for mode in MODES if mode in given]) > 1:
        raise UserError(f"{modes[0]} and {modes[1]}: give only one of them")
    args.mode = [*modes, "sheets"][0]
    for flag in sorted(given - flags_of(args.mode)):
        users = ", ".join(mode for mode in MODES if flag in flags_of(mode))
        raise UserError(f"{flag} has no effect on {args.mode}, only on {users}")
    low, high = args.range or (-1, 1)
    if low == high or not all(abs(v) <= 1000 for v in (low, high)):  # true for NaN
        raise UserError("--range: must be two different numbers from -1000 to 1000")
    if args.seeds and (given & {"--seed", "--rows"} or args.samples):
        raise UserError("--seeds: leave out --seed, --rows and N of --samples")
    return args


def show(args: Namespace) -> int:
    """Writes what was asked for and says where it is."""
    (write, folder, files), seeds = MODES[args.mode], read_seeds(args)
    model = load_model(args.ckpt, infogan.pick_device(args.device))
    spec, path = model.spec, model.path
    codes = [code.strip() for code in args.codes.split(",")] if args.codes else spec.names
    check_codes(spec, "--codes", codes)
    folder = folder if path.name == "last.pt" else f"{path.stem}-{folder}"
    out, reach = Path(args.out or path.parent / folder), 3.0 if spec.n_cont > 5 else 1.5
    values = vars(args) | {"model": model, "out": out, "seeds": seeds, "codes": codes}
    values |= {"names": read_names(model, args.names), "set": read_set(args.set, spec)}
    values["range"] = args.range or (-reach, reach)
    if args.mode == "--walk" and out.suffix.lower() not in (".gif", ".webp"):
        raise UserError(f"--out {out}: must end with .gif or .webp")
    stems = map(os.path.splitext, files.split())
    check_ours(out / f"{c}{e}" for stem, e in stems for c in (codes if stem == "CODE" else [stem]))
    if files:
        (out.parent if files == "." else out).mkdir(parents=True, exist_ok=True)
    print(write(**{name: values[name.strip("_")] for name in signature(write).parameters}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix."""
    return infogan.run("generate.py", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
