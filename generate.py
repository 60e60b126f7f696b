"""Show what an InfoGAN learned: one labelled sheet per code, and a table of what every code does.

    python generate.py --ckpt checkpoint/v3/last.pt                   sheets and table of all codes
    python generate.py --ckpt checkpoint/v3/last.pt --explorer        a web page that moves codes
    python generate.py --ckpt checkpoint/v3/last.pt --sort ~/faces    real faces, by their codes
    python generate.py --ckpt checkpoint/v3/last.pt --samples 10000   pictures, for FID tools
    python generate.py --ckpt A/last.pt --versus B/last.pt --data ~/faces   two runs side by side

The architecture comes from the checkpoint. Along a row of a sheet only one code changes.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

import infogan
from infogan import Codes, CodeSpec, Generator, UserError, load_pictures, replacing, save_picture

N_MEASURED, N_MOVED = 1000, 200  # samples behind a table's figures; behind its tints, heat maps
MOST_SHOWN = 100  # categories on a sheet
N_DIRECTIONS, N_PATCHES = 512, 32  # of the Wasserstein distance; patches of each picture
PAGE = Path(__file__).parent / "data/explorer.html"
PAGE_MB = 6  # at most: it must open, and follow a slider, at once

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
def draw(G: Generator, spec: CodeSpec, codes: Codes, batch_size: int) -> Tensor:
    """Pictures (n, channels, size, size) in [-1, 1], on the CPU."""
    device = next(G.parameters()).device
    return torch.cat([G(part.to(device)).cpu() for part in spec.join(codes).split(batch_size)])


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
    names = ckpt.get("names", {})
    if args.names or path.exists():
        try:
            names = {**names, **json.loads(path.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            like = '{"cont3": "tilt"}'
            raise UserError(f"--names {path}: must be a table like {like}: {error}") from error
    if not isinstance(names, dict):
        raise UserError(f"{args.ckpt}: its names are no table")
    check_codes(spec, f"--names {path}", names)
    for code, name in names.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 40:
            raise UserError(f"--names {path}: {code}: must be one line of 1 to 40 characters")
    return names


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
    rng, batch_size = torch.Generator().manual_seed(args.seed), args.batch_size
    codes, other = spec.sample(N_MEASURED, rng), spec.sample(N_MEASURED, rng)
    x = draw(G, spec, codes, batch_size)
    device, x_edges = next(Q.parameters()).device, edge_map(x)
    L_I = torch.zeros(len(spec.names))
    for i in range(0, N_MEASURED, batch_size):
        part = Codes(*(c[i : i + batch_size].to(device) for c in codes))
        q = Q.D(x[i : i + batch_size].to(device))[1]
        L_I += infogan.mutual_information(spec, q, part).cpu() * len(part.z) / N_MEASURED

    def row(name: str, *known: float | None) -> Row:
        y = draw(G, spec, spec.replace(codes, name, other), batch_size)
        figures = Row(name, *known, effect(x, y), effect(x_edges, edge_map(y)))
        if None in known:  # a group
            return figures
        ends = low_high(spec, Codes(*(c[:N_MOVED] for c in codes)), name, rng)
        low, high = (draw(G, spec, end, batch_size) for end in ends)
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
    images, columns = [infogan.to_image(picture).convert("RGB") for picture in x], len(above)
    k = max(1, 64 // x.shape[3]) * zoom  # 64 pixels at least, so that labels fit
    tiles = [ImageOps.scale(image, k, Image.Resampling.NEAREST) for image in images]
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
    rng = torch.Generator().manual_seed(args.seed)
    base, each_z = spec.sample(args.rows, rng), [f"z {i}" for i in range(args.rows)]
    first = Codes(*(c[:1] for c in base))
    smooth = [round(v, 6) + 0.0 for v in torch.linspace(*args.range, args.steps).tolist()]
    every = list(range(min(spec.cat_dim, MOST_SHOWN)))
    each, numbers = [f"{v:+.2f}" if v else "0" for v in smooth], [str(k) for k in every]

    def pictures(codes: Codes, name: str) -> Tensor:
        values = every if name.startswith("cat") else smooth
        return draw(G, spec, spec.traverse(codes, name, values), args.batch_size)

    def save(name: str, *contents: object) -> None:
        save_picture(out / name, sheet(*contents, zoom=args.zoom))

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
    x = draw(G, spec, spec.sample(100, rng.manual_seed(args.seed)), args.batch_size)
    save("samples.png", f"100 samples, seed {args.seed}, nothing selected", x, [""] * 10)
    return f"{out} has sheets and table.csv"


def save_gif(path: Path, title: str, x: Tensor, values: list[str], back: bool, zoom: int) -> None:
    """A loop over a traversal's columns, its rows side by side; `back` runs it there and back."""
    steps = zip(x.unflatten(0, (-1, len(values))).unbind(1), values, strict=True)
    frames = [sheet(title, faces, [value] * len(faces), zoom=zoom) for faces, value in steps]
    frames += frames[-2:0:-1] if back else []
    how = {"duration": 100 if back else 500, "loop": 0, "save_all": True}
    save_picture(path, frames[0], append_images=frames[1:], **how)


def write_samples(model: Model, args: argparse.Namespace, out: Path) -> str:
    """000000.png, … and codes.csv with the codes each was drawn from."""
    G, _, spec, _ = model
    names = [f"{i:06d}.png" for i in range(args.samples)]
    there = {p.name for p in out.glob("*.png")}
    if others := there - set(names) if (out / "codes.csv").exists() else there:
        raise UserError(f"--out {out}: holds {len(others):,} other pictures; give an empty folder")
    rng, table = torch.Generator().manual_seed(args.seed), [["file", *spec.names]]
    save_table(out / "codes.csv", table)  # the folder is ours from now on, also if this is stopped

    def write(x: Tensor, name: str) -> None:
        # lossless at any level; more would take four times as long for files as large
        infogan.to_image(x).save(out / name, compress_level=1)

    written = iter(())
    with ThreadPoolExecutor() as pool:  # Pillow compresses without the interpreter's lock
        for start in range(0, args.samples, args.batch_size):
            part = names[start : start + args.batch_size]
            codes = spec.sample(len(part), rng)
            x = draw(G, spec, codes, args.batch_size)
            list(written)  # the batch before, which the threads wrote while this one was drawn
            written = pool.map(write, x, part)
            cont = ([f"{v:.4f}" for v in row] for row in codes.c_cont.tolist())
            known = zip(part, codes.c_cat.tolist(), cont, strict=True)
            table += [[name, *c_cat, *c_cont] for name, c_cat, c_cont in known]
        list(written)  # raises what a thread could not write
    save_table(out / "codes.csv", table)
    return f"{out} has {args.samples:,} pictures and codes.csv"


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
    base = spec.sample(-(-args.rows // 2), torch.Generator().manual_seed(args.seed))
    columns = min(spec.cat_dim, MOST_SHOWN) if spec.n_cat else args.steps
    x, left, above = [], [], [str(k) for k in range(columns)]
    values = {"cat": range(columns), "cont": torch.linspace(*args.range, columns).tolist()}
    conts = [r.code for r in rows if r.code.startswith("cont") and r.L_I is not None]
    for code in ["cat"] * (spec.n_cat > 0) + conts[:1]:
        moved = spec.traverse(base, code, list(values[code.rstrip("0123456789")]))
        x.append(draw(G, spec, moved, args.batch_size))
        left += [code.replace("cat", "all cat")] * len(base.z)
    return sheet(title, torch.cat(x), above, left, args.zoom)


def compare(model: Model, args: argparse.Namespace, out: Path) -> str:
    """Two runs in one table, with their distance to --data, and side by side in comparison.png."""
    columns, pages, real, first = {}, [], None, None
    for path, one in (args.ckpt, model), (args.versus, load_model(args.versus, args.device)):
        spec, rng = one.spec, torch.Generator().manual_seed(args.seed)
        x = draw(one.G, spec, spec.sample(N_MEASURED, rng), args.batch_size)
        if first not in (None, (spec, x.shape)):
            raise UserError(f"--versus {path}: has other codes or pictures than {args.ckpt}")
        if args.data and real is None:
            some = load_pictures(args.data, x.shape[2], x.shape[1]).x
            some = some[torch.randperm(len(some), generator=rng)[:N_MEASURED]]
            real = infogan.make_batch(some, False, rng, torch.device("cpu"))
        first, rows = (spec, x.shape), measure(one, args)
        columns[path] = summarise(rows)
        if real is not None:
            swd = sliced_wasserstein(real, x[: len(real)], rng.manual_seed(args.seed))
            columns[path]["SWD x 1000, fine to coarse"] = " / ".join(f"{1000 * d:.0f}" for d in swd)
        pages.append(strongest(one, args, rows, path))
    width = max(16, *map(len, columns))
    for name in ("", *columns[args.ckpt]):
        cells = [column.get(name, path) for path, column in columns.items()]
        print(f"{name:33}" + "".join(f"  {cell:>{width}}" for cell in cells))
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


def sort_pictures(model: Model, args: argparse.Namespace, out: Path) -> str:
    """Sheets of real pictures by the codes that Q reads from them; codes.csv; how they agree."""
    _, Q, spec, ckpt = model
    root, named = Path(args.sort).expanduser().resolve(), args.sort in infogan.NAMED_SETS
    if out.resolve().is_relative_to(root):
        raise UserError(f"--out {out}: lies within --sort {args.sort}; give another folder")
    pictures = load_pictures(args.sort, ckpt["args"]["image_size"], ckpt["args"]["channels"])
    files = [name if named else os.path.relpath(name, root) for name in pictures.names]
    x = infogan.make_batch(pictures.x, False, torch.Generator(), torch.device("cpu"))
    with torch.no_grad():
        read = [Q(part.to(args.device)) for part in x.split(args.batch_size)]
    p, mu, sigma = (torch.cat(parts).cpu() for parts in zip(*read, strict=True))
    sure, c_cat = p.max(2)  # both (n, n_cat)

    head = ["file", *spec.names, *(f"{name}_p" for name in spec.names[: spec.n_cat])]
    table = [[*head, *(f"{name}_sigma" for name in spec.names[spec.n_cat :])]]
    floats = torch.cat([mu, sure, sigma], 1).tolist()
    for name, cat, known in zip(files, c_cat.tolist(), floats, strict=True):
        table.append([name, *cat, *(f"{v:.4f}" for v in known)])
    save_table(out / "codes.csv", table)

    n, columns, labels = len(x), args.steps, labels_of(args.sort, files)
    for code in args.codes:
        name, j = label(code, args.names), spec.names.index(code)
        if j < spec.n_cat:
            order, left, rows = sure[:, j].argsort(descending=True), [], []
            for k in range(min(spec.cat_dim, MOST_SHOWN)):
                mine = order[c_cat[order, j] == k]
                left.append(f"{k}\n{len(mine):,}")
                blank = (0,) * 7 + (max(0, columns - len(mine)),)
                rows.append(F.pad(x[mine[:columns]], blank, value=1.0))
            title = f"{name}: category, its number of pictures; the most certain first"
            page = sheet(title, torch.cat(rows), [""] * columns, left, args.zoom)
            if labels:
                error, nmi = agreement(c_cat[:, j].tolist(), labels)
                print(f"{name}: {error:.1%} error, NMI {nmi:.3f} ({len(set(labels))} labels)")
        else:
            values, rows = mu[:, j - spec.n_cat], min(args.rows, n)  # neighbours below each other
            start = torch.linspace(0, n - rows, columns).round().long()
            chosen = values.argsort()[start + torch.arange(rows)[:, None]]
            above = [f"{v:+.2f}" for v in values[chosen].mean(0).tolist()]
            title = f"{name}: lowest to highest, as Q reads it"
            page = sheet(title, x[chosen.flatten()], above, zoom=args.zoom)
        save_picture(out / f"{code}.png", page)
    return f"{out} has sheets and codes.csv"


# for other programs -------------------------------------------------------------------------------


def folded(G: Generator) -> list[nn.ConvTranspose2d]:
    """G's convolutions, each with the batch norm that follows it in its weights and bias."""
    convs = [m for m in G.layers if isinstance(m, nn.ConvTranspose2d)]
    norms = [m for m in G.layers if isinstance(m, nn.BatchNorm2d)]
    fused = [fuse_conv_bn_eval(*pair, transpose=True) for pair in zip(convs, norms, strict=False)]
    return [*fused, convs[-1]]


def write_explorer(model: Model, args: argparse.Namespace, out: Path) -> str:
    """One HTML file that draws by itself; its first z are those of the sheets."""
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
    z = spec.sample(args.rows, torch.Generator().manual_seed(args.seed)).z.tolist()

    def told(row: Row) -> dict:
        file = io.BytesIO()
        infogan.to_image(row.where).save(file, "JPEG", quality=85)
        where = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        return row._asdict() | {"name": args.names.get(row.code), "where": where}

    data = {
        "title": f"{path.parent.name}/{path.name}, step {model.ckpt['step']:,}",
        "spec": vars(spec),
        "range": sorted(args.range),
        "maps": [m.out_channels for m in layers],
        "codes": [told(r) for r in rows if r.where is not None],
        "z": [[round(v, 4) for v in row] for row in z],
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

MODES = {  # a flag, what it does in place of sheets, and the folder beside the checkpoint
    "explorer": (write_explorer, "traversals"),
    "sort": (sort_pictures, "sorted"),
    "samples": (write_samples, "generated"),
    "versus": (compare, "traversals"),
    "onnx": (write_onnx, "traversals"),
    "shrink": (shrink, ""),
}
# fmt: off
FLAGS = {  # as in infogan.py
"sheets": [
    ("--ckpt", None, "FILE", "such as checkpoint/v3/last.pt"),
    ("--out", None, "FOLDER", "where everything goes (default: a folder beside the checkpoint)"),
    ("--codes", None, "NAMES", "such as cat0,cont3 (default: every code)"),
    ("--rows", 8, (1, 100), "rows of a sheet"),
    ("--steps", 11, (2, 100), "columns of a sheet of a continuous code"),
    ("--zoom", 1, (1, 8), "enlarge sheets N times"),
    ("--gif", False, bool, "also write an animated GIF for each code"),
    ("--names", None, "FILE", "names for codes, JSON (default: names.json beside the checkpoint)"),
    ("--seed", 0, (0, 2**63 - 1), "seed of z and codes"),
    ("--batch-size", 250, (1, 65_536), "pictures drawn at once"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
], "instead of sheets": [
    ("--explorer", False, bool, "write explorer.html, a page to move the codes"),
    ("--sort", None, "FOLDER", "sort real pictures by the codes that Q reads: a folder or mnist"),
    ("--samples", None, (1, 10**7), "write N single PNGs and codes.csv, for FID tools"),
    ("--versus", None, "FILE", "compare with this checkpoint"),
    ("--data", None, "FOLDER", "with --versus: real pictures to measure both against"),
    ("--onnx", False, bool, "write generator.onnx, for other runtimes"),
    ("--shrink", None, "FILE", "write a checkpoint in half precision, to share"),
]}
# fmt: on
LIMITS = infogan.limits_of(FLAGS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError in one line for what is out of range."""
    p = infogan.Parser("generate.py", __doc__, FLAGS)
    low_high = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"), "default": (-1.0, 1.0)}
    p.add_argument(
        "--range",
        help="range of a continuous code's values (default -1 1, as in training)",
        **low_high,
    )
    args = p.parse_args(argv)
    if not args.ckpt:
        raise UserError("--ckpt: give a checkpoint, such as checkpoint/v3/last.pt; see --help")
    if not all(abs(v) <= 1000 for v in args.range):  # false for NaN too
        raise UserError("--range: must be two numbers from -1000 to 1000")
    if len(given := [mode for mode in MODES if getattr(args, mode)]) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: give only one of them")
    if args.data and not args.versus:
        raise UserError("--data: measures two runs, so give --versus too")
    return args


def show(args: argparse.Namespace) -> int:
    """Writes what was asked for and says where it is."""
    args.device, path = str(infogan.pick_device(args.device)), Path(args.ckpt)
    model = load_model(args.ckpt, args.device)
    args.codes = args.codes.split(",") if args.codes else model.spec.names
    check_codes(model.spec, "--codes", args.codes)
    args.names = read_names(args, model.spec, model.ckpt)
    given = [mode for name, mode in MODES.items() if getattr(args, name)]
    write, folder = [*given, (write_sheets, "traversals")][0]
    folder = folder if path.name == "last.pt" else f"{path.stem}-{folder}"
    out = Path(args.out) if args.out else path.parent / folder
    if write is not shrink:
        out.mkdir(parents=True, exist_ok=True)
    print(write(model, args, out))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix."""
    return infogan.run("generate.py", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
