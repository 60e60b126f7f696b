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

import argparse
import base64
import csv
import io
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is loading, which takes a second: no traceback
    sys.excepthook = lambda kind, *e: kind is KeyboardInterrupt or sys.__excepthook__(kind, *e)

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import infogan
from infogan import Codes, CodeSpec, Generator, UserError, load_pictures, replacing, to_image

N_MEASURED, N_MOVED = 1000, 200  # samples behind a table's figures; behind its tints, heat maps
MOST_SHOWN = 100  # categories on a sheet
DRAWN_AT_ONCE, N_READ = 32, 4  # pictures in each pass of G; drawings beside a picture of --read
N_DIRECTIONS, N_PATCHES = 512, 32  # of the Wasserstein distance; patches of each picture
PAGE = Path(__file__).parent / "data/explorer.html"
PAGE_MB = 6  # at most: it must open, and follow a slider, at once
MARK, EXIF = "generate.py of InfoGAN", Image.Exif()  # what is ours may be written again
EXIF[ExifTags.Base.Software] = MARK
MARKED = {"exif": EXIF.tobytes(), "comment": MARK}  # of PNG and WebP, and of GIF
HEADS = (b"code,L_I,", b"file,seed", b"file,cat0,", b"file,cont0,")  # of our tables
save_picture = partial(infogan.save_picture, **MARKED)
to_floats = partial(infogan.make_batch, flip=False, rng=None, device=torch.device("cpu"))

# drawing and saving -------------------------------------------------------------------------------


class Model(NamedTuple):
    """A trained checkpoint: generator, encoder, its codes, and the checkpoint's contents."""

    G: Generator
    Q: infogan.Encoder
    spec: CodeSpec
    ckpt: dict


def load_model(path: str, device: str) -> Model:
    G, spec = infogan.load_generator(path, device)
    return Model(G, infogan.load_encoder(path, device)[0], spec, infogan.load_checkpoint(path))


@torch.no_grad()
def draw(G: Generator, joined: Tensor) -> Tensor:
    """Pictures (n, channels, size, size) in [-1, 1] of G's inputs (n, spec.dim), on the CPU."""
    # always as many at once, as rounding depends on it: the same seed is the same file everywhere
    device, parts = next(G.parameters()).device, joined.split(DRAWN_AT_ONCE)
    full = (F.pad(part, (0, 0, 0, DRAWN_AT_ONCE - len(part))).to(device) for part in parts)
    return torch.cat([G(part).cpu() for part in full])[: len(joined)]


def hold(spec: CodeSpec, codes: Codes, held: dict[str, float]) -> Codes:
    """codes with the values of --set."""
    for name, value in held.items():
        codes = spec.traverse(codes, name, [value])
    return codes


def save_table(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """A CSV, complete or not at all."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        text.detach()  # `replacing` flushes and closes the file itself


# names --------------------------------------------------------------------------------------------


def check_codes(spec: CodeSpec, where: str, codes: Iterable[str]) -> None:
    """Raises UserError for a code that spec does not have."""
    for code in (code for code in codes if code not in spec.names):
        raise UserError(f"{where}: {code!a}: this checkpoint has {', '.join(spec.names) or 'none'}")


def read_names(args: argparse.Namespace, spec: CodeSpec, ckpt: dict) -> dict[str, str]:
    """What people call the codes: by --names, names.json beside the checkpoint, or within it."""
    path = Path(args.names or Path(args.ckpt).with_name("names.json"))
    where, names = f"--names {path}" if args.names else str(path), ckpt.get("names", {})
    if args.names or path.exists():
        try:
            names = {**names, **json.loads(path.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            why = f'must be a table like {{"cont3": "tilt"}}: {error}'
            raise UserError(f"{where}: {why}") from error
    if not isinstance(names, dict):
        raise UserError(f"{args.ckpt}: its names are no table")
    check_codes(spec, where, names)
    for code, name in names.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 40:
            raise UserError(f"{where}: {code}: must be one line of 1 to 40 characters")
    return names


def read_set(text: str, spec: CodeSpec) -> dict[str, float]:
    """The codes of "cat0=3,cont5=-0.8", with their values. Raises UserError."""
    held, one_of = {}, f"a whole number from 0 to {spec.cat_dim - 1}"
    for part in text.split(",") if text else ():
        code, _, value = part.strip().partition("=")
        check_codes(spec, "--set", [code])
        v = float(value) if re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", value) else math.nan
        cat = code.startswith("cat")
        if code in held or not (v in range(spec.cat_dim) if cat else abs(v) <= 1000):
            must = one_of if cat else "a number from -1000 to 1000"
            raise UserError(f"--set {part.strip()}: {code} must be given once, as {must}")
        held[code] = v
    return held


def label(code: str, names: dict[str, str]) -> str:
    """The code with its name, where it has one: "cont3 (tilt)"."""
    return f"{code} ({names[code]})" if code in names else code


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
def measure(model: Model, args: argparse.Namespace) -> list[Row]:
    """Rows for z and each kind of code together, then for every code, strongest effect first."""
    G, Q, spec, _ = model
    rng = torch.Generator().manual_seed(args.seed)
    codes, other = spec.sample(N_MEASURED, rng), spec.sample(N_MEASURED, rng)
    x = draw(G, spec.join(codes))
    read, x_edges = [Q.D(part.to(args.device))[1] for part in x.split(args.batch_size)], edge_map(x)
    q = infogan.QOutput(*(torch.cat(parts).cpu() for parts in zip(*read, strict=True)))
    L_I = infogan.mutual_information(spec, q, codes)

    def row(name: str, *known: float | None) -> Row:
        y = draw(G, spec.join(spec.replace(codes, name, other)))
        figures = Row(name, *known, effect(x, y), effect(x_edges, edge_map(y)))
        if None in known:  # a group
            return figures
        ends = low_high(spec, Codes(*(c[:N_MOVED] for c in codes)), name, rng)
        low, high = (draw(G, spec.join(end)) for end in ends)
        return figures._replace(tint=tint(low, high), where=heat_map(low, high))

    groups = (["z"] if spec.z_dim else []) + [*spec.kinds]
    each = [row(*known) for known in zip(spec.names, L_I.tolist(), spec.ceilings, strict=True)]
    return [row(name, None, None) for name in groups] + sorted(each, key=lambda r: -r.effect)


def print_table(rows: list[Row], names: dict[str, str]) -> None:
    told = [f"all {r.code}" if r.code in ("cat", "cont") else label(r.code, names) for r in rows]
    width = max(8, *map(len, told))
    print(f"{'code':{width}}   L_I / most  effect   edges  tint  (nats; shares, see README)")
    for r, name in zip(rows, told, strict=True):
        known = "" if r.L_I is None else f"{r.L_I:.2f} / {r.ceiling:.2f}"
        tinted = "" if r.tint is None else f"  {r.tint:.2f}"
        print(f"{name:{width}} {known:>12}  {r.effect:.4f}  {r.edges:.4f}{tinted}")


def print_columns(rows: dict[str, list[str]]) -> None:
    """A table: names to the left, cells to the right."""
    wide, cell = max(map(len, rows)), max(16, *(len(c) for cells in rows.values() for c in cells))
    for name, cells in rows.items():
        print(f"{name:{wide}}" + "".join(f"  {c:>{cell}}" for c in cells))


def patches(x: Tensor, rng: torch.Generator) -> list[Tensor]:
    """Normalised 7x7 patches (m, channels * 49) of each level of a Laplacian pyramid, 16 up."""
    levels = []
    while x.shape[2] >= 16:
        small = F.avg_pool2d(x, 2)
        coarsest = small.shape[2] < 16
        level = x if coarsest else x - F.interpolate(small, scale_factor=2, mode="bilinear")
        places = level.unfold(2, 7, 1).unfold(3, 7, 1)  # (n, channels, rows, columns, 7, 7)
        i, j = torch.randint(places.shape[2], (2, len(x), N_PATCHES), generator=rng)
        y = places[torch.arange(len(x))[:, None], :, i, j].flatten(0, 1)
        std, mean = torch.std_mean(y, (0, 2, 3), keepdim=True)
        levels.append(((y - mean) / std.clamp(min=1e-8)).flatten(1))
        x = small
    return levels


def sliced_wasserstein(x: Tensor, y: Tensor, rng: torch.Generator) -> list[float]:
    """Distance of the patches of equally many pictures, level by level (1710.10196, section 5)."""
    distances = []
    for a, b in zip(patches(x, rng), patches(y, rng), strict=True):
        to = F.normalize(torch.randn(a.shape[1], N_DIRECTIONS, generator=rng), dim=0)
        distances.append(((a @ to).sort(0)[0] - (b @ to).sort(0)[0]).abs().mean().item())
    return distances


# sheets -------------------------------------------------------------------------------------------


def sheet(
    title: str, x: Tensor, above: Sequence[str], left: Sequence[str] = (), zoom: int = 1
) -> Image.Image:
    """len(above) pictures in a row, labels above the columns and left of the rows."""
    k, columns = max(1, 64 // x.shape[3]) * zoom, len(above)  # 64 pixels at least: labels must fit
    tiles = [ImageOps.scale(to_image(p).convert("RGB"), k, Image.Resampling.NEAREST) for p in x]
    font, small = ImageFont.load_default(15 * zoom), ImageFont.load_default(12 * zoom)
    gap, edge, top = 2 * zoom, 12 * zoom, (54 if any(above) else 40) * zoom
    step, lines = tiles[0].width + gap, [line for text in left for line in text.split("\n")]
    margin = edge + (int(max(map(small.getlength, lines))) + 8 * zoom if lines else 0)
    width = max(margin + columns * step - gap, edge + int(font.getlength(title))) + edge
    height = top + step * -(-len(tiles) // columns) - gap + edge
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((edge, 10 * zoom), title, "black", font)
    for i, text in enumerate(above):
        at = (margin + i * step + tiles[0].width // 2, top - 5 * zoom)
        pen.text(at, text, "#333333", small, anchor="ms")
    for i, text in enumerate(left):
        at = (edge, top + i * step + tiles[0].width // 2)
        pen.multiline_text(at, text, "#333333", small, anchor="lm", spacing=3 * zoom)
    for i, picture in enumerate(tiles):
        page.paste(picture, (margin + i % columns * step, top + i // columns * step))
    return page


def beside(pages: list[Image.Image]) -> Image.Image:
    """Pages next to each other."""
    whole = Image.new("RGB", (sum(p.width for p in pages), max(p.height for p in pages)), "white")
    for i, page in enumerate(pages):
        whole.paste(page, (sum(p.width for p in pages[:i]), 0))
    return whole


def write_sheets(model: Model, args: argparse.Namespace, out: Path) -> str:
    """The table, a sheet per code, sheets of several codes; nothing selected: the seed's first."""
    G, spec, rows = model.G, model.spec, measure(model, args)
    print_table(rows, args.names)
    figures = [[r.code, *("" if v is None else f"{v:.5f}" for v in r[1:-1])] for r in rows]
    named = [[*row, args.names.get(row[0], "")] for row in figures]
    save_table(out / "table.csv", [[*Row._fields[:-1], "name"], *named])
    base = hold(spec, spec.sample_seeds(args.seeds), args.set)
    each_z = [f"seed {s}" for s in args.seeds]
    first = Codes(*(c[:1] for c in base))
    smooth = [round(v, 6) + 0.0 for v in torch.linspace(*args.range, args.steps).tolist()]
    every = list(range(min(spec.cat_dim, MOST_SHOWN)))
    each, numbers = [f"{v:+.2f}" if v else "0" for v in smooth], [str(k) for k in every]

    def pictures(codes: Codes, name: str) -> Tensor:
        moved = spec.traverse(codes, name, every if name.startswith("cat") else smooth)
        moved = hold(spec, moved, args.set) if name == "cat" else moved
        return draw(G, spec.join(moved))

    def save(name: str, title: str, *contents: object) -> None:
        held = "".join(f"; {c} = {v:g}" for c, v in args.set.items() if name != f"{c}.png")
        save_picture(out / name, sheet(title + held, *contents, zoom=args.zoom))

    strips, told = [], []
    for row in (row for row in rows if row.code in args.codes):
        x, above = pictures(base, row.code), numbers if row.code.startswith("cat") else each
        name = label(row.code, args.names)
        known = f"L_I {row.L_I:.2f} of {row.ceiling:.2f} nats, effect {row.effect:.3f}"
        where = sheet("", row.where[None], ["where"], zoom=args.zoom)
        page = sheet(f"{name}: {known}, tint {row.tint:.2f}", x, above, each_z, args.zoom)
        save_picture(out / f"{row.code}.png", beside([page, where]))
        if args.gif:
            save_gif(out / f"{row.code}.gif", name, x, above, above is each, args.zoom)
        strip = pictures(first, row.code)[: args.steps].expand(-1, 3, -1, -1)
        blank = torch.ones(args.steps - len(strip), *strip.shape[1:])
        strips.append(torch.cat([row.where[None], strip, blank]))
        told.append(f"{name}\nL_I {row.L_I:.2f}\neffect {row.effect:.3f}\ntint {row.tint:.2f}")
    if strips:
        title = "strongest code first (category / value); along a row only this code changes"
        both = [f"{k} / {v}" if k in every and spec.n_cat else v for k, v in enumerate(each)]
        save("overview.png", title, torch.cat(strips), ["where", *both], told)
    if spec.n_cat:
        title = "all categoricals together (columns); z and continuous codes (rows)"
        save("all-categoricals.png", title, pictures(base, "cat"), numbers, each_z)
    if spec.n_cat and spec.n_cont:
        pages, categories = [], spec.traverse(first, "cat0", every)
        for name in ("cont0", "cont1")[: spec.n_cont]:
            title = f"cat0 (rows) by {name} (columns)"
            pages.append(sheet(title, pictures(categories, name), each, numbers, args.zoom))
        save_picture(out / "cat-by-cont.png", beside(pages))
    some = spec.sample_seeds(range(args.seed, args.seed + 100))
    title = f"100 samples, seeds {args.seed} to {args.seed + 99}, nothing selected"
    save("samples.png", title, draw(G, spec.join(hold(spec, some, args.set))), [""] * 10)
    return f"{out} has sheets and table.csv"


def save_gif(path: Path, title: str, x: Tensor, values: list[str], back: bool, zoom: int) -> None:
    """A loop over a traversal's columns, its rows side by side; `back` runs it there and back."""
    steps = zip(x.unflatten(0, (-1, len(values))).unbind(1), values, strict=True)
    frames = [sheet(title, faces, [value] * len(faces), zoom=zoom) for faces, value in steps]
    frames += frames[-2:0:-1] if back else []
    how = {"duration": 100 if back else 500, "loop": 0, "save_all": True}
    save_picture(path, frames[0], append_images=frames[1:], **how)


def write_walk(model: Model, args: argparse.Namespace, path: Path) -> str:
    """From the face of each seed to the next, and from the last to the first, as GIF or WebP."""
    G, _, spec, _ = model
    a = spec.join(hold(spec, spec.sample_seeds(args.seeds), args.set))[:, None]
    b, t = a.roll(-1, 0), torch.arange(args.steps)[:, None] / args.steps
    codes, turn = a + t * (b - a), t * math.pi / 2  # (faces, steps, spec.dim)
    z = turn.cos() * a + turn.sin() * b  # of variance 1 on the way too, so that faces stay sharp
    codes[..., : spec.z_dim] = z[..., : spec.z_dim]
    x = draw(G, codes.flatten(0, 1))
    k = max(1, 128 // x.shape[3]) * args.zoom
    frames = [ImageOps.scale(to_image(p).convert("RGB"), k, Image.Resampling.NEAREST) for p in x]
    save_picture(path, frames[0], append_images=frames[1:], duration=80, loop=0, save_all=True)
    return f"{path} has {len(frames)} frames"


def write_samples(model: Model, args: argparse.Namespace, out: Path) -> str:
    """A PNG for each seed, 000000.png, …, and codes.csv with the codes it was drawn from."""
    G, _, spec, _ = model
    names = [f"{seed:06d}.png" for seed in args.seeds]
    if others := {p.name for p in out.glob("*.png")} - set(names):
        raise UserError(f"--out {out}: holds {len(others):,} other pictures; give an empty folder")
    table = [["file", "seed", *spec.names]]
    save_table(out / "codes.csv", table)  # no row of an earlier call, also if this one is stopped

    def write(x: Tensor, name: str) -> None:
        # lossless at any level; more would take four times as long for files as large
        to_image(x).save(out / name, compress_level=1, **MARKED)

    written, step = iter(()), -(-args.batch_size // DRAWN_AT_ONCE) * DRAWN_AT_ONCE
    with ThreadPoolExecutor() as pool:  # Pillow compresses without the interpreter's lock
        for start in range(0, len(names), step):
            part, seeds = names[start : start + step], args.seeds[start : start + step]
            codes = hold(spec, spec.sample_seeds(seeds), args.set)
            x = draw(G, spec.join(codes))
            list(written)  # the batch before, which the threads wrote while this one was drawn
            written = pool.map(write, x, part)
            known = zip(part, seeds, codes.c_cat.tolist(), codes.c_cont.tolist(), strict=True)
            table += [[*at, *c_cat, *(f"{v:.4f}" for v in c_cont)] for *at, c_cat, c_cont in known]
        list(written)  # raises what a thread could not write
    save_table(out / "codes.csv", table)
    return f"{out} has {len(names):,} pictures and codes.csv"


# two runs -----------------------------------------------------------------------------------------


def summarise(rows: list[Row]) -> dict[str, str]:
    """The table's rows of groups, and for each kind of code its mean L_I and weakest effect."""
    told = {f"effect of {r.code}, pixels / edges": r for r in rows if r.L_I is None}
    told = {name: f"{r.effect:.3f} / {r.edges:.3f}" for name, r in told.items()}
    for kind in ("cat", "cont"):
        if each := [r for r in rows if r.L_I is not None and r.code.rstrip("0123456789") == kind]:
            mean = sum(r.L_I for r in each) / len(each)
            told[f"L_I of each {kind}, mean"] = f"{mean:.2f} of {each[0].ceiling:.2f}"
            told[f"effect of the weakest {kind}"] = f"{each[-1].effect:.4f}"
    return told


def strongest(model: Model, args: argparse.Namespace, rows: list[Row], title: str) -> Image.Image:
    """A page with all categoricals moved together and, below, the strongest continuous code."""
    G, _, spec, _ = model
    base = hold(spec, spec.sample_seeds(args.seeds[: -(-args.rows // 2)]), args.set)
    columns = min(spec.cat_dim, MOST_SHOWN) if spec.n_cat else args.steps
    x, left, above = [], [], [str(k) for k in range(columns)]
    values = {"cat": range(columns), "cont": torch.linspace(*args.range, columns).tolist()}
    conts = [r.code for r in rows if r.code.startswith("cont") and r.L_I is not None]
    for code in ["cat"] * (spec.n_cat > 0) + conts[:1]:
        moved = spec.traverse(base, code, list(values[code.rstrip("0123456789")]))
        moved = hold(spec, moved, args.set) if code == "cat" else moved
        x.append(draw(G, spec.join(moved)))
        left += [code.replace("cat", "all cat")] * len(base.z)
    return sheet(title, torch.cat(x), above, left, args.zoom)


def compare(model: Model, args: argparse.Namespace, out: Path) -> str:
    """Two runs in one table, with their distance to --data, and side by side in comparison.png."""
    columns, pages, real, other = {}, [], None, load_model(args.versus, args.device)
    then, now = model.ckpt["args"], other.ckpt["args"]
    if differ := [n for n in infogan.SHAPE if n != "width" and now[n] != then[n]]:
        how = ", ".join(f"--{n.replace('_', '-')} {now[n]}, not {then[n]}" for n in differ)
        raise UserError(f"--versus {args.versus}: has other codes or pictures: {how}")
    for path, one in (args.ckpt, model), (args.versus, other):
        rng = torch.Generator().manual_seed(args.seed)
        x = draw(one.G, one.spec.join(one.spec.sample(N_MEASURED, rng)))
        if args.data and real is None:
            some = load_pictures(args.data, x.shape[2], x.shape[1]).x
            real = to_floats(some[torch.randperm(len(some), generator=rng)[:N_MEASURED]])
        rows = measure(one, args)
        columns[path] = summarise(rows)
        if real is not None:
            swd = sliced_wasserstein(real, x[: len(real)], rng.manual_seed(args.seed))
            columns[path]["SWD x 1000, fine to coarse"] = " / ".join(f"{1000 * d:.0f}" for d in swd)
        pages.append(strongest(one, args, rows, path))
    print_columns({n: [c.get(n, p) for p, c in columns.items()] for n in ("", *columns[args.ckpt])})
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
    """The label of each picture: MNIST's, else its subfolder; [] where there are none."""
    if data in ("mnist", "fashion-mnist"):
        from torchvision.datasets.mnist import read_label_file

        known = infogan.DATA / infogan.NAMED_SETS[data][1].replace("images-idx3", "labels-idx1")
        labels = read_label_file(str(known)).tolist() if known.exists() else []
        return [str(labels[int(name)]) for name in names] if labels else []
    folders = [str(Path(name).parent) for name in names]
    return folders if "." not in folders and len(set(folders)) > 1 else []


@torch.no_grad()
def read_codes(model: Model, x: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Of bytes (n, h, w, channels): each code as Q reads it; how sure, or sigma: (n, codes)."""
    read = []
    for part in x.split(args.batch_size):
        p, mu, sigma = model.Q(to_floats(part, device=args.device))
        sure, c_cat = p.max(2)
        read.append([torch.cat(pair, 1).cpu() for pair in ((c_cat, mu), (sure, sigma))])
    return tuple(map(torch.cat, zip(*read, strict=True)))


def sort_pictures(model: Model, args: argparse.Namespace, out: Path) -> str:
    """Sheets of real pictures by the codes that Q reads from them; codes.csv; how they agree."""
    _, _, spec, ckpt = model
    root, named = Path(args.sort).resolve(), args.sort in infogan.NAMED_SETS
    if out.resolve().is_relative_to(root):
        raise UserError(f"--out {out}: lies within --sort {args.sort}; give another folder")
    if root.is_file():
        raise UserError(f"--sort {args.sort}: must be a folder; --read takes single pictures")
    shape = ckpt["args"]["image_size"], ckpt["args"]["channels"]
    pictures = load_pictures(args.sort, *shape, flag="--sort")
    files = [name if named else os.path.relpath(name, root) for name in pictures.names]
    values, doubts = read_codes(model, pictures.x, args)
    c_cat, n_cat = values[:, : spec.n_cat].int(), spec.n_cat

    head = ["file", *spec.names, *(f"{c}_{'p' if 'cat' in c else 'sigma'}" for c in spec.names)]
    known = zip(files, c_cat, torch.cat([values[:, n_cat:], doubts], 1), strict=True)
    lines = ([name, *cat.tolist(), *(f"{v:.4f}" for v in row.tolist())] for name, cat, row in known)
    save_table(out / "codes.csv", itertools.chain([head], lines))

    n, columns, labels = len(files), args.steps, labels_of(args.sort, files)
    for code in args.codes:
        name, j = label(code, args.names), spec.names.index(code)
        if j < spec.n_cat:
            order, left, rows = doubts[:, j].argsort(descending=True), [], []
            for k in range(min(spec.cat_dim, MOST_SHOWN)):
                mine = order[c_cat[order, j] == k]
                left.append(f"{k}\n{len(mine):,}")
                blank = (0,) * 7 + (max(0, columns - len(mine)),)
                rows.append(F.pad(to_floats(pictures.x[mine[:columns]]), blank, value=1.0))
            title = f"{name}: category, its number of pictures; the most certain first"
            page = sheet(title, torch.cat(rows), [""] * columns, left, args.zoom)
            if labels:
                error, nmi = agreement(c_cat[:, j].tolist(), labels)
                print(f"{name}: {error:.1%} error, NMI {nmi:.3f} ({len(set(labels))} labels)")
        else:
            rows = min(args.rows, n)  # neighbours below each other
            start = torch.linspace(0, n - rows, columns).round().long()
            chosen = values[:, j].argsort()[start + torch.arange(rows)[:, None]]
            above = [f"{v:+.2f}" for v in values[chosen, j].mean(0).tolist()]
            title = f"{name}: lowest to highest, as Q reads it"
            page = sheet(title, to_floats(pictures.x[chosen.flatten()]), above, zoom=args.zoom)
        save_picture(out / f"{code}.png", page)
    return f"{out} has sheets and codes.csv"


def read_pictures(model: Model, args: argparse.Namespace, out: Path) -> str:
    """A table of what Q reads from each picture; read.png: each beside what G draws of it."""
    G, _, spec, ckpt = model
    size, channels = ckpt["args"]["image_size"], ckpt["args"]["channels"]
    paths = [Path(os.path.expanduser(path)) for path in args.read]
    found = [infogan.read_picture(path, size, channels) for path in paths]
    for why in (why for why, raw, _ in found if raw is None):
        raise UserError(f"--read {why}: cannot be read as a picture; --sort takes a folder")
    raw = bytearray(b"".join(raw for _, raw, _ in found))
    x = torch.frombuffer(raw, dtype=torch.uint8).view(-1, size, size, channels)
    values, doubts = read_codes(model, x, args)
    forms = ["{:.0f} ({:.0%})"] * spec.n_cat + ["{:+.2f} ± {:.2f}"] * spec.n_cont
    known = zip(spec.names, forms, values.T.tolist(), doubts.T.tolist(), strict=True)
    told = {c: [*map(form.format, v, d)] for c, form, v, d in known if c in args.codes}
    files = [path.name for path in paths]
    print_columns({"": files} | {label(c, args.names): cells for c, cells in told.items()})
    n = len(args.seeds)
    c_cat, c_cont = values.repeat_interleave(n, 0).split([spec.n_cat, spec.n_cont], 1)
    codes = Codes(spec.sample_seeds(args.seeds).z.repeat(len(x), 1), c_cat.long(), c_cont)
    drawn = draw(G, spec.join(hold(spec, codes, args.set))).unflatten(0, (-1, n))
    shown = torch.cat([to_floats(x)[:, None], drawn], 1).flatten(0, 1)
    above = ["picture", *(f"seed {s}" for s in args.seeds)]
    title = "each picture, and what G draws from the codes that Q reads"
    save_picture(out / "read.png", sheet(title, shown, above, files, args.zoom))
    return f"{out} has read.png"


# for other programs -------------------------------------------------------------------------------


def folded(G: Generator) -> list[nn.ConvTranspose2d]:
    """G's convolutions, each with the batch norm that follows it in its weights and bias."""
    convs = [m for m in G.layers if isinstance(m, nn.ConvTranspose2d)]
    norms = [m for m in G.layers if isinstance(m, nn.BatchNorm2d)]
    fused = [fuse_conv_bn_eval(*pair, transpose=True) for pair in zip(convs, norms, strict=False)]
    return [*fused, convs[-1]]


def write_explorer(model: Model, args: argparse.Namespace, out: Path) -> str:
    """One HTML file that draws by itself, from --set on; its first z are those of the sheets."""
    spec, path, layers = model.spec, Path(args.ckpt), folded(model.G)
    weights = torch.cat([t.flatten() for m in layers for t in (m.weight, m.bias)]).cpu().half()
    if not weights.isfinite().all():
        raise UserError("--explorer: this generator's weights do not fit half precision")
    encoded = base64.b64encode(weights.numpy().astype("<f2").tobytes()).decode()
    if len(encoded) > PAGE_MB * 1e6:
        much = f"a page of {len(encoded) / 1e6:.1f} MB, the limit is {PAGE_MB}"
        raise UserError(f"--explorer: generator too large: {much}; train with a smaller --width")
    rows = measure(model, args)
    print_table(rows, args.names)
    reach = [*args.range, *(v for code, v in args.set.items() if code.startswith("cont"))]

    def told(row: Row) -> dict:
        file = io.BytesIO()
        to_image(row.where).save(file, "JPEG", quality=85)
        where = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        return row._asdict() | {"name": args.names.get(row.code), "where": where}

    data = {
        "title": f"{path.parent.name}/{path.name}, step {model.ckpt['step']:,}",
        "spec": vars(spec),
        "range": [min(reach), max(reach)],
        "at": "#" + "&".join(f"{code}={value:g}" for code, value in args.set.items()),
        "seeds": [*args.seeds],
        "maps": [m.out_channels for m in layers],
        "codes": [told(r) for r in rows if r.where is not None],
        "z": [[round(v, 4) for v in z] for z in spec.sample_seeds(args.seeds).z.tolist()],
        "weights": encoded,
    }
    filled = json.dumps(data).replace("<", "\\u003c")  # a name must not end the script
    page = PAGE.read_text(encoding="utf-8").replace("data = null;", f"data = {filled};")
    with replacing(out / "explorer.html") as file:
        file.write(page.encode())
    return f"{out} has explorer.html"


def write_onnx(model: Model, args: argparse.Namespace, out: Path) -> str:
    """G as ONNX, from "codes" (n, spec.dim) to "x" (n, channels, size, size) in [-1, 1]."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--onnx: needs `pip install onnx onnxscript`") from error
    G = model.G.cpu().to(memory_format=torch.contiguous_format)
    names, n = {"input_names": ["codes"], "output_names": ["x"]}, ({0: torch.export.Dim("n")},)
    some = (torch.zeros(2, model.spec.dim),)
    program = torch.onnx.export(G, some, dynamic_shapes=n, dynamo=True, verbose=False, **names)
    program.model_proto.doc_string = MARK
    with replacing(out / "generator.onnx") as file:
        file.write(program.model_proto.SerializeToString())
    return f"{out} has generator.onnx"


def shrink(model: Model, args: argparse.Namespace, _out: Path) -> str:
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
DRAW = "out seed seeds set "
MODES = {  # what writes, into which folder beside the checkpoint; its files; the flags it uses
"sheets": (write_sheets, "traversals", "table.csv CODE.png CODE.gif overview.png samples.png"
  " all-categoricals.png cat-by-cont.png",
  DRAW + "rows range batch-size zoom steps names codes gif"),
"--explorer": (write_explorer, "traversals", "explorer.html", DRAW + "rows range batch-size names"),
"--walk": (write_walk, "traversals/walk.gif", ".", DRAW + "rows zoom steps"),
"--samples": (write_samples, "generated", "codes.csv SEED.png", DRAW + "batch-size"),
"--read": (read_pictures, "traversals", "read.png", DRAW + "batch-size zoom names codes"),
"--sort": (sort_pictures, "sorted", "codes.csv CODE.png",
  "out rows zoom steps batch-size names codes"),
"--versus": (compare, "traversals", "comparison.png",
  "out seed set rows range batch-size zoom steps data"),
"--onnx": (write_onnx, "traversals", "generator.onnx", "out"),
"--shrink": (shrink, "", "", "names"),
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
    ("--range", None, "V", "of a continuous code's values (default -1 1, as in training)"),
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
    ("--data", None, "FOLDER", "with --versus: real pictures to measure both against"),
    ("--onnx", False, bool, "write generator.onnx, for other runtimes"),
    ("--shrink", None, "FILE", "write a checkpoint in half precision, to share"),
]}
SEVERAL = {"samples": {"nargs": "?", "const": 0}, "read": {"nargs": "+"},
  "range": {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}}
# fmt: on
LIMITS = infogan.limits_of(FLAGS)


def read_seeds(text: str) -> list[int]:
    """The numbers of "3,17,40-49". Raises UserError."""
    parts = [re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", p.strip()) for p in text.split(",")]
    each = [range(int(m[1]), int(m[2] or m[1]) + 1) if m else range(0) for m in parts]
    seeds = [*itertools.chain(*each)] if all(each) and sum(map(len, each)) <= 10**7 else []
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: must be different whole numbers such as 3,17,40-49")
    return seeds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError in one line for what is out of range or has no effect."""
    p = infogan.Parser("generate.py", __doc__, FLAGS)
    for action in p._actions:
        vars(action).update(SEVERAL.get(action.dest, {}))
    args = p.parse_args(argv)
    given = {w.partition("=")[0] for w in (sys.argv if argv is None else argv) if w[:2] == "--"}
    if not args.ckpt:
        raise UserError("--ckpt: give a checkpoint, such as checkpoint/v3/last.pt; see --help")
    if len(modes := [mode for mode in MODES if mode in given]) > 1:
        raise UserError(f"{modes[0]} and {modes[1]}: give only one of them")
    args.mode = mode = [*modes, "sheets"][0]
    used = {"--ckpt", "--device", mode, *(f"--{flag}" for flag in MODES[mode][3].split())}
    for flag in sorted(given - used):
        users = ", ".join(m for m, (*_, flags) in MODES.items() if flag[2:] in flags.split())
        raise UserError(f"{flag} has no effect on {mode}, only on {users}")
    args.range = low, high = args.range or (-1.0, 1.0)
    if low == high or not all(abs(v) <= 1000 for v in args.range):  # true for NaN
        raise UserError("--range: must be two different numbers from -1000 to 1000")
    for name in ("ckpt", "versus"):
        if os.path.isdir(getattr(args, name) or ""):
            setattr(args, name, os.path.join(getattr(args, name), "last.pt"))
    count = {"--samples": args.samples, "--read": N_READ}.get(mode, args.rows)
    seeds = read_seeds(args.seeds) if args.seeds else range(args.seed, args.seed + count)
    number = args.samples or ("--rows" in given and args.rows)
    if args.seeds and ("--seed" in given or number not in (False, 0, len(seeds))):
        raise UserError(f"--seeds names {len(seeds)}; leave out --seed, --rows and N of --samples")
    least, most = 1 + (mode == "--walk"), 10**7 if mode == "--samples" else 100
    if not least <= len(seeds) <= most:
        raise UserError(f"{mode}: needs {least:,} to {most:,} seeds, not {len(seeds):,}")
    args.seeds, args.rows = seeds, len(seeds)
    return args


def show(args: argparse.Namespace) -> int:
    """Writes what was asked for and says where it is."""
    args.device, path = infogan.pick_device(args.device), Path(args.ckpt)
    model, (write, folder, files, _) = load_model(args.ckpt, args.device), MODES[args.mode]
    args.codes = args.codes.split(",") if args.codes else model.spec.names
    check_codes(model.spec, "--codes", args.codes)
    args.names = read_names(args, model.spec, model.ckpt)
    args.set = read_set(args.set or "", model.spec)
    folder = folder if path.name == "last.pt" else f"{path.stem}-{folder}"
    out = Path(args.out or path.parent / folder)
    stems = {"CODE": args.codes, "SEED": (f"{seed:06d}" for seed in args.seeds)}
    names = map(os.path.splitext, files.split())
    paths = (out / f"{stem}{end}" for name, end in names for stem in stems.get(name, [name]))
    if write is write_walk and out.suffix.lower() not in (".gif", ".webp"):
        raise UserError(f"--out {out}: must end with .gif or .webp")
    for path in (path for path in paths if path.exists()):
        raw = path.read_bytes() if path.is_file() else b"a folder"
        if raw and MARK.encode() not in raw and not raw.startswith(HEADS):
            why = "is there, but not from this version of generate.py"
            raise UserError(f"{path}: {why}; move it, or give another --out")
    if files:
        (out.parent if write is write_walk else out).mkdir(parents=True, exist_ok=True)
    print(write(model, args, out))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix."""
    return infogan.run("generate.py", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
