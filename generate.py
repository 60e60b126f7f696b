"""Show what an InfoGAN learned: one labelled sheet per code, and a table of what every code does.

    python generate.py --ckpt checkpoint/v3/last.pt                   sheets and table of all codes
    python generate.py --ckpt checkpoint/v3/last.pt --codes cat0,cont3 --gif
    python generate.py --ckpt checkpoint/v3/last.pt --explorer        a web page that moves codes
    python generate.py --ckpt checkpoint/v3/last.pt --sort ~/faces    real faces, by what Q reads
    python generate.py --ckpt checkpoint/v3/last.pt --samples 10000   pictures, for FID tools
    python generate.py --ckpt A/last.pt --versus B/last.pt --data ~/faces   two runs side by side

The architecture comes from the checkpoint. Along a row of a sheet one code moves, all else stays.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from infogan import (
    DATA,
    DEVICES,
    FORMAT,
    NAMED_SETS,
    Codes,
    CodeSpec,
    Encoder,
    Generator,
    Parser,
    Problem,
    load_checkpoint,
    load_encoder,
    load_generator,
    load_pictures,
    make_batch,
    mutual_information,
    pack,
    pick_device,
    replacing,
    run,
    save_picture,
    save_table,
)

N_MEASURED = 1000  # samples behind every figure of the table
MOST_SHOWN = 100  # categories on one sheet

# codes and pictures -------------------------------------------------------------------------------


def locate(name: str) -> tuple[str, slice]:
    """The field of Codes and its columns: of a code ("cat0"), or a group ("z", "cat", "cont")."""
    kind = name.rstrip("0123456789")
    j = int(name[len(kind) :] or -1)
    columns = slice(None) if j < 0 else slice(j, j + 1)
    return {"z": "z", "cat": "c_cat", "cont": "c_cont"}[kind], columns


def put(codes: Codes, name: str, values: Tensor) -> Codes:
    """codes with values (n, 1) or (n, columns) in place of one code or group."""
    where, columns = locate(name)
    changed = getattr(codes, where).clone()
    changed[:, columns] = values.to(changed)
    return codes._replace(**{where: changed})


def traverse(base: Codes, name: str, values: Sequence[float]) -> Codes:
    """Each of n base codes len(values) times, one code or group set to every value in turn."""
    rows = Codes(*(c.repeat_interleave(len(values), 0) for c in base))
    return put(rows, name, torch.tensor(values).repeat(len(base.z))[:, None])


@torch.no_grad()
def draw(G: Generator, spec: CodeSpec, codes: Codes, batch_size: int) -> Tensor:
    """Pictures (n, channels, size, size) in [-1, 1], on the CPU."""
    device = next(G.parameters()).device
    return torch.cat([G(part.to(device)).cpu() for part in spec.join(codes).split(batch_size)])


# names --------------------------------------------------------------------------------------------


def read_names(args: argparse.Namespace, spec: CodeSpec, ckpt: dict) -> dict[str, str]:
    """What people call the codes: by --names, or names.json beside the checkpoint, or within it.

    Raises Problem for what is no table of known codes, like {"cont3": "tilt"}.
    """
    path = Path(args.names or Path(args.ckpt).with_name("names.json"))
    names = ckpt.get("names", {})
    if args.names or path.exists():
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or error
            raise Problem(f"--names {path}: cannot be read as JSON: {why}") from error
    if not isinstance(names, dict):
        raise Problem(f'--names {path}: must be a table like {{"cont3": "tilt"}}')
    for code, name in names.items():
        if code not in spec.names:
            raise Problem(f"--names {path}: {code!a}: {codes_of(spec)}")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 40:
            raise Problem(f"--names {path}: {code}: must be a line of 1 to 40 letters")
    return names


def codes_of(spec: CodeSpec) -> str:
    return f"this checkpoint has {', '.join(spec.names) or 'no codes'}"


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


@torch.no_grad()
def measure(G: Generator, Q: Encoder, spec: CodeSpec, args: argparse.Namespace) -> list[Row]:
    """Rows for z and each kind of code together, then for every code, strongest effect first."""
    rng, batch_size = torch.Generator().manual_seed(args.seed), args.batch_size
    codes, other = spec.sample(N_MEASURED, rng), spec.sample(N_MEASURED, rng)
    x = draw(G, spec, codes, batch_size)
    device, x_edges = next(Q.parameters()).device, edge_map(x)
    L_I = torch.zeros(len(spec.names))
    for i in range(0, N_MEASURED, batch_size):
        part = Codes(*(c[i : i + batch_size].to(device) for c in codes))
        q = Q.D(x[i : i + batch_size].to(device))[1]
        L_I += mutual_information(spec, q, part).cpu() * len(part.z) / N_MEASURED

    def row(name: str, *known: float | None) -> Row:
        where, columns = locate(name)
        y = draw(G, spec, put(codes, name, getattr(other, where)[:, columns]), batch_size)
        return Row(name, *known, effect(x, y), effect(x_edges, edge_map(y)))

    sizes = {"z": spec.z_dim, "cat": spec.n_cat, "cont": spec.n_cont}
    groups = [name for name, size in sizes.items() if size]
    each = [row(*known) for known in zip(spec.names, L_I.tolist(), spec.ceilings, strict=True)]
    return [row(name, None, None) for name in groups] + sorted(each, key=lambda r: -r.effect)


def print_table(rows: list[Row], names: dict[str, str]) -> None:
    told = [f"all {r.code}" if r.code in ("cat", "cont") else label(r.code, names) for r in rows]
    width = max(8, *map(len, told))
    head = f"{'code':{width}}   L_I / most  effect   edges"
    print(head + "   (nats; shares of all variance in pictures, edges)")
    for r, name in zip(rows, told, strict=True):
        known = "" if r.L_I is None else f"{r.L_I:.2f} / {r.ceiling:.2f}"
        print(f"{name:{width}} {known:>12}  {r.effect:.4f}  {r.edges:.4f}")


N_DIRECTIONS, N_PATCHES = 512, 32  # of the Wasserstein distance; patches of each picture


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
    """Distance of the patches of two equal numbers of pictures, for each level, finest first.

    0 for equal distributions (1710.10196, section 5): the mean over random directions of the
    distance between sorted projections.
    """
    distances = []
    for a, b in zip(patches(x, rng), patches(y, rng), strict=True):
        to = F.normalize(torch.randn(a.shape[1], N_DIRECTIONS, generator=rng), dim=0)
        distances.append(((a @ to).sort(0)[0] - (b @ to).sort(0)[0]).abs().mean().item())
    return distances


# sheets -------------------------------------------------------------------------------------------


def tile(x: Tensor, zoom: int) -> Image.Image:
    """One picture (channels, size, size), enlarged to 64 at least, so that labels fit."""
    image = to_pil_image(x.add(1).div(2).clamp(0, 1)).convert("RGB")
    k = max(1, 64 // image.width) * zoom
    return image.resize((image.width * k, image.height * k), Image.Resampling.NEAREST)


def sheet(
    title: str, x: Tensor, above: Sequence[str], left: Sequence[str] = (), zoom: int = 1
) -> Image.Image:
    """len(above) pictures in a row, labels above the columns and left of the rows."""
    tiles, columns = [tile(picture, zoom) for picture in x], len(above)
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


def write_sheets(
    G: Generator, spec: CodeSpec, args: argparse.Namespace, rows: list[Row], out: Path
) -> None:
    """A sheet (and a GIF) per chosen code, all-categoricals, cat-by-cont, overview and samples.

    Nothing is picked out: all are drawn from the first latents of the seed.
    """
    rng = torch.Generator().manual_seed(args.seed)
    base, each_z = spec.sample(args.rows, rng), [f"z {i}" for i in range(args.rows)]
    first = Codes(*(c[:1] for c in base))
    smooth = [round(v, 6) + 0.0 for v in torch.linspace(*args.range, args.steps).tolist()]
    every = list(range(min(spec.cat_dim, MOST_SHOWN)))
    each, numbers = [f"{v:+.2f}" if v else "0" for v in smooth], [str(k) for k in every]

    def pictures(codes: Codes, name: str) -> Tensor:
        values = every if name.startswith("cat") else smooth
        return draw(G, spec, traverse(codes, name, values), args.batch_size)

    def save(name: str, *contents: object) -> None:
        save_picture(out / name, sheet(*contents, zoom=args.zoom))

    strips, told = [], []
    for row in rows:
        if row.code not in args.codes:
            continue
        x, above = pictures(base, row.code), numbers if row.code.startswith("cat") else each
        name = label(row.code, args.names)
        known = f"L_I {row.L_I:.2f} of {row.ceiling:.2f} nats, effect {row.effect:.3f}"
        save(f"{row.code}.png", f"{name}: {known}", x, above, each_z)
        if args.gif:
            back = row.code.startswith("cont")
            save_gif(out / f"{row.code}.gif", name, x, above, back, args.zoom)
        strip = pictures(first, row.code)[: args.steps]
        blank = torch.ones_like(strip[:1]).expand(args.steps - len(strip), -1, -1, -1)
        strips.append(torch.cat([strip, blank]))
        told.append(f"{name}\nL_I {row.L_I:.2f}\neffect {row.effect:.3f}")
    if strips:
        heads = [f"{k} / {v}" if k in every else v for k, v in enumerate(each)]
        title = "strongest code first (category / value); along a row all else stays"
        heads = heads if spec.n_cat else each
        save("overview.png", title, torch.cat(strips), heads, told)
    if spec.n_cat:
        title = "all categoricals together (columns); z and continuous codes (rows)"
        save("all-categoricals.png", title, pictures(base, "cat"), numbers, each_z)
    if spec.n_cat and spec.n_cont:
        pages, categories = [], traverse(first, "cat0", every)
        for name in ("cont0", "cont1")[: spec.n_cont]:
            title = f"cat0 (rows) by {name} (columns)"
            pages.append(sheet(title, pictures(categories, name), each, numbers, args.zoom))
        save_picture(out / "cat-by-cont.png", beside(pages))
    x = draw(G, spec, spec.sample(100, rng.manual_seed(args.seed)), args.batch_size)
    save("samples.png", f"100 samples, seed {args.seed}, none picked out", x, [""] * 10)


def save_gif(
    path: Path, title: str, x: Tensor, values: Sequence[str], back: bool, zoom: int
) -> None:
    """A loop over a traversal's columns, its rows side by side; `back` runs it forth and back."""
    steps = zip(x.unflatten(0, (-1, len(values))).unbind(1), values, strict=True)
    frames = [sheet(title, faces, [value] * len(faces), zoom=zoom) for faces, value in steps]
    frames += frames[-2:0:-1] if back else []
    pause = 100 if back else 500  # milliseconds
    with replacing(path) as file:
        frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=pause, loop=0)


def write_samples(G: Generator, spec: CodeSpec, args: argparse.Namespace, out: Path) -> None:
    """000000.png, … and codes.csv with the codes each was drawn from."""
    names = [f"{i:06d}.png" for i in range(args.samples)]
    if others := {p.name for p in out.glob("*.png")} - set(names):
        raise Problem(f"--out {out}: holds {len(others):,} other pictures; give an empty folder")
    rng, table = torch.Generator().manual_seed(args.seed), [["file", *spec.names]]

    def write(x: Tensor, name: str) -> None:
        # lossless at any level; more would take four times as long for files as large
        to_pil_image(x).save(out / name, compress_level=1)

    written = iter(())
    with ThreadPoolExecutor() as pool:  # Pillow compresses without the interpreter's lock
        for start in range(0, args.samples, args.batch_size):
            part = names[start : start + args.batch_size]
            codes = spec.sample(len(part), rng)
            x = draw(G, spec, codes, args.batch_size).add_(1).mul_(127.5).round_().byte()
            list(written)  # the batch before, which the threads wrote while this one was drawn
            written = pool.map(write, x, part)
            cont = ([f"{v:.4f}" for v in row] for row in codes.c_cont.tolist())
            known = zip(part, codes.c_cat.tolist(), cont, strict=True)
            table += [[name, *c_cat, *c_cont] for name, c_cat, c_cont in known]
        list(written)  # raises what a thread could not write
    save_table(out / "codes.csv", table)


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


def strongest(
    G: Generator, spec: CodeSpec, args: argparse.Namespace, rows: list[Row], title: str
) -> Image.Image:
    """A page with all categoricals moved together and, below, the strongest continuous code."""
    base = spec.sample(-(-args.rows // 2), torch.Generator().manual_seed(args.seed))
    columns = min(spec.cat_dim, MOST_SHOWN) if spec.n_cat else args.steps
    x, left, above = [], [], [str(k) for k in range(columns)]
    values = {"cat": range(columns), "cont": torch.linspace(*args.range, columns).tolist()}
    conts = [r.code for r in rows if r.code.startswith("cont") and r.L_I is not None]
    for code in ["cat"] * (spec.n_cat > 0) + conts[:1]:
        moved = traverse(base, code, list(values[code.rstrip("0123456789")]))
        x.append(draw(G, spec, moved, args.batch_size))
        left += [code.replace("cat", "all cat")] * len(base.z)
    return sheet(title, torch.cat(x), above, left, args.zoom)


def compare(args: argparse.Namespace, out: Path) -> None:
    """Two runs in one table and, drawn from the same z and codes, in comparison.png.

    With --data the table has their distance to real pictures. Raises Problem when the runs have
    other codes or pictures of another size.
    """
    told, pages, real, first = {}, [], None, None
    for path in (args.ckpt, args.versus):
        G, spec = load_generator(path, args.device)
        rng = torch.Generator().manual_seed(args.seed)
        x = draw(G, spec, spec.sample(N_MEASURED, rng), args.batch_size)
        if first not in (None, (spec, x.shape)):
            raise Problem(f"--versus {path}: has other codes or pictures than {args.ckpt}")
        if args.data and real is None:
            some = load_pictures(args.data, x.shape[2], x.shape[1]).x
            some = some[torch.randperm(len(some), generator=rng)[:N_MEASURED]]
            real = make_batch(some, False, rng, torch.device("cpu"))
        first, rows = (spec, x.shape), measure(G, load_encoder(path, args.device)[0], spec, args)
        told[path] = summarise(rows)
        if real is not None:
            swd = sliced_wasserstein(real, x[: len(real)], rng.manual_seed(args.seed))
            told[path]["SWD x 1000, fine to coarse"] = " / ".join(f"{1000 * d:.0f}" for d in swd)
        pages.append(strongest(G, spec, args, rows, path))
    width = max(16, *map(len, told))
    for name in ("", *told[args.ckpt]):
        cells = [column.get(name, run) for run, column in told.items()]
        print(f"{name:33}" + "".join(f"  {cell:>{width}}" for cell in cells))
    save_picture(out / "comparison.png", beside(pages))


# real pictures by code ----------------------------------------------------------------------------


def assign(cost: list[list[float]]) -> list[int]:
    """Each row's own column, such that the sum of their costs is least; no more rows than columns.

    The Hungarian method: rows join one by one along the cheapest path of reassignments, and the
    potentials u and v keep every cost[i][j] - u[i] - v[j] at 0 or above.
    """
    n, m = len(cost), len(cost[0])
    u, v, row_of = [0.0] * (n + 1), [0.0] * (m + 1), [n] * (m + 1)  # n: no row; m: the path's start
    for i in range(n):
        row_of[m], j, free = i, m, set(range(m))
        best, before = [math.inf] * m, [m] * m
        while row_of[j] != n:
            i = row_of[j]
            for k in free:
                if (reduced := cost[i][k] - u[i] - v[k]) < best[k]:
                    best[k], before[k] = reduced, j
            nearest = min(free, key=best.__getitem__)
            step = best[nearest]
            for k in range(m + 1):
                if k in free:
                    best[k] -= step
                else:
                    u[row_of[k]] += step
                    v[k] -= step
            free.remove(nearest)
            j = nearest
        while j != m:
            row_of[j], j = row_of[before[j]], before[j]
    return [row_of.index(i, 0, m) for i in range(n)]


def agreement(categories: Sequence[int], labels: Sequence[str]) -> tuple[float, float]:
    """(error, NMI): of the best one-to-one match of categories with labels, 0 for a perfect one.

    NMI is I(a; b) over the mean of H(a) and H(b); 1 when either tells the other, 0 for chance.
    """
    n, pairs = len(labels), Counter(zip(categories, labels, strict=True))
    a, b = sorted(set(categories)), sorted(set(labels))
    few, many = (a, b) if len(a) <= len(b) else (b, a)
    cost = [[-max(pairs[i, j], pairs[j, i]) for j in many] for i in few]
    matched = -sum(row[j] for row, j in zip(cost, assign(cost), strict=True))
    H = [-sum(c / n * math.log(c / n) for c in Counter(x).values()) for x in (categories, labels)]
    H_both = -sum(c / n * math.log(c / n) for c in pairs.values())
    return 1 - matched / n, 2 * (sum(H) - H_both) / sum(H) if sum(H) else 1.0


def labels_of(data: str, names: list[str]) -> list[str]:
    """The label of each picture: MNIST's, else its subfolder; [] where there are none."""
    if data in ("mnist", "fashion-mnist"):
        from torchvision.datasets.mnist import read_label_file

        known = DATA / NAMED_SETS[data] / "raw/train-labels-idx1-ubyte"
        labels = read_label_file(str(known)).tolist() if known.exists() else []
        return [str(labels[int(name)]) for name in names] if labels else []
    folders = [str(Path(name).parent) for name in names]
    return folders if "." not in folders and len(set(folders)) > 1 else []


def sort_pictures(args: argparse.Namespace, spec: CodeSpec, shape: dict, out: Path) -> None:
    """Sheets of real pictures by the codes that Q reads from them, codes.csv, and how they agree.

    A categorical's rows are its categories, the most certain picture first. A continuous code's
    columns go from the lowest to the highest.
    """
    Q, _ = load_encoder(args.ckpt, args.device)
    pictures = load_pictures(args.sort, shape["image_size"], shape["channels"])
    files = pictures.names
    if args.sort not in NAMED_SETS:
        files = [os.path.relpath(name, Path(args.sort).expanduser().resolve()) for name in files]
    x = make_batch(pictures.x, False, torch.Generator(), torch.device("cpu"))
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
        name, j = label(code, args.names), locate(code)[1].start
        if code.startswith("cat"):
            order, left, rows = sure[:, j].argsort(descending=True), [], []
            for k in range(min(spec.cat_dim, MOST_SHOWN)):
                mine = order[c_cat[order, j] == k]
                left.append(f"{k}\n{len(mine):,}")
                blank = torch.ones_like(x[:1]).expand(max(0, columns - len(mine)), -1, -1, -1)
                rows.append(torch.cat([x[mine[:columns]], blank]))
            title = f"{name}: category and how many it has; the surest first"
            page = sheet(title, torch.cat(rows), [""] * columns, left, args.zoom)
            if labels:
                error, nmi = agreement(c_cat[:, j].tolist(), labels)
                told = f"{error:.1%} error, NMI {nmi:.3f}"
                print(f"{name}: {told} (matched one to one with {len(set(labels))} labels)")
        else:
            rows = min(args.rows, n)  # neighbours in rank, below each other
            start = torch.linspace(0, n - rows, columns).round().long()
            chosen = mu[:, j].argsort()[start + torch.arange(rows)[:, None]]
            above = [f"{v:+.2f}" for v in mu[chosen, j].mean(0).tolist()]
            title = f"{name}: lowest to highest, as Q reads it"
            page = sheet(title, x[chosen.flatten()], above, zoom=args.zoom)
        save_picture(out / f"{code}.png", page)


# for other programs -------------------------------------------------------------------------------

PAGE = Path(__file__).parent / "data/explorer.html"
PAGE_MB = 6  # the most that a page may weigh: it must open, and follow a slider, at once


def folded(G: Generator) -> list[tuple[Tensor, Tensor]]:
    """(weight (inputs, outputs, 4, 4), bias) of each transposed convolution, batch norm within."""
    layers = []
    for m in G.layers:
        if isinstance(m, nn.ConvTranspose2d):
            w = m.weight.double().cpu()
            layers.append((w, w.new_zeros(w.shape[1]) if m.bias is None else m.bias.double().cpu()))
        elif isinstance(m, nn.BatchNorm2d):
            gain, shift, mean, var = (
                t.double().cpu() for t in (m.weight, m.bias, m.running_mean, m.running_var)
            )
            gain, (w, b) = gain / (var + m.eps).sqrt(), layers[-1]
            layers[-1] = w * gain[:, None, None], (b - mean) * gain + shift
    return layers


def write_explorer(
    G: Generator, Q: Encoder, spec: CodeSpec, args: argparse.Namespace, title: str, path: Path
) -> None:
    """One HTML file that draws by itself; its first z are those of the sheets.

    Raises Problem for a generator too large for a page.
    """
    layers = folded(G)
    weights = torch.cat([t.flatten() for layer in layers for t in layer]).half()
    if not weights.isfinite().all():
        raise Problem("--explorer: this generator's weights do not fit half precision")
    encoded = base64.b64encode(weights.numpy().astype("<f2").tobytes()).decode()
    if len(encoded) > PAGE_MB * 1e6:
        much = f"its page would have {len(encoded) / 1e6:.1f} MB, and {PAGE_MB} are the most"
        raise Problem(f"--explorer: this generator is too large: {much}; train with less --width")
    rows = measure(G, Q, spec, args)
    print_table(rows, args.names)
    z = spec.sample(args.rows, torch.Generator().manual_seed(args.seed)).z
    data = {
        "title": title,
        "spec": vars(spec),
        "range": sorted(args.range),
        "maps": [len(bias) for _, bias in layers],
        "codes": [r._asdict() | {"name": args.names.get(r.code)} for r in rows if r.ceiling],
        "z": [[round(v, 4) for v in row] for row in z.tolist()],
        "weights": encoded,
    }
    filled = json.dumps(data).replace("<", "\\u003c")  # a name must not end the script
    page = PAGE.read_text(encoding="utf-8").replace("data = null;", f"data = {filled};")
    with replacing(path) as file:
        file.write(page.encode())


def write_onnx(G: Generator, spec: CodeSpec, path: Path) -> None:
    """G as ONNX, from "codes" (n, spec.dim) to "x" (n, channels, size, size) in [-1, 1]."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Problem("--onnx: wants `pip install onnx onnxscript`") from error
    G = G.cpu().to(memory_format=torch.contiguous_format)
    names = {"input_names": ["codes"], "output_names": ["x"]}
    shapes = ({0: torch.export.Dim("n")},)
    some = (torch.zeros(2, spec.dim),)
    program = torch.onnx.export(G, some, dynamic_shapes=shapes, dynamo=True, verbose=False, **names)
    with replacing(path) as file:
        file.write(program.model_proto.SerializeToString())


def shrink(ckpt: dict, names: dict[str, str], path: Path) -> None:
    """A checkpoint to hand on: what the loaders need, in half precision, with the codes' names."""
    small = {key: ckpt.get(key) for key in ("spec", "args", "step", "minutes")}
    for net in ("G_ema", "D"):  # vectors stay: they are small, and variances may be tiny
        small[net] = {k: w.half() if w.dim() > 1 else w for k, w in ckpt[net].items()}
    pack(path, small | {"format": FORMAT, "names": names})


# flags --------------------------------------------------------------------------------------------


LIMITS = {
    "rows": (1, 100),
    "steps": (2, 100),
    "samples": (1, 10**7),
    "zoom": (1, 8),
    "seed": (0, 2**63 - 1),
    "batch_size": (1, 65_536),
}
MODES = ("explorer", "sort", "samples", "versus", "onnx", "shrink")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises Problem in one line for what is out of range."""
    p = Parser("generate.py", LIMITS, __doc__)
    p.add("--ckpt", None, "such as checkpoint/v3/last.pt", metavar="FILE", required=True)
    beside = "default: traversals, sorted for --sort, generated for --samples, by the checkpoint"
    p.add("--out", None, f"where the pictures go ({beside})", metavar="FOLDER")
    p.add("--codes", None, "such as cat0,cont3 (default: every code)", metavar="NAMES")
    p.add("--rows", 8, "rows of a sheet")
    p.add("--steps", 11, "values of a continuous code")
    low_high = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    p.add("--range", (-1.0, 1.0), "of these values; training draws from -1 to 1", **low_high)
    p.add("--zoom", 1, "sheets this many times as large")
    p.add("--gif", False, "also an animated loop per code", action="store_true")
    p.add("--names", None, "what codes are called (default: names.json beside the checkpoint)",
        metavar="FILE")  # fmt: skip
    p.add("--seed", 0, "of z and codes")
    p.add("--batch-size", 250, "pictures drawn at once")
    p.add("--device", "auto", "auto takes the fastest", choices=DEVICES)
    p.group = p.add_argument_group("instead of sheets")
    p.add("--explorer", False, "explorer.html, to move codes by hand", action="store_true")
    p.add("--sort", None, "real pictures by the codes Q reads: a folder or mnist", metavar="FOLDER")
    p.add("--samples", None, "write N single PNGs and codes.csv, for FID tools")
    p.add("--versus", None, "compare with this checkpoint", metavar="FILE")
    p.add("--data", None, "real pictures to measure both against", metavar="FOLDER")
    p.add("--onnx", False, "generator.onnx, for other runtimes", action="store_true")
    p.add("--shrink", None, "write a checkpoint in half precision, to hand on", metavar="FILE")
    args = p.check(p.parse_args(argv))
    if not all(math.isfinite(v) and abs(v) <= 1000 for v in args.range):
        raise Problem("--range: must be two numbers from -1000 to 1000")
    if len(given := [mode for mode in MODES if getattr(args, mode)]) > 1:
        raise Problem(f"--{given[0]} and --{given[1]}: one at a time")
    if args.data and not args.versus:
        raise Problem("--data: measures two runs, so give --versus too")
    return args


def show(args: argparse.Namespace) -> int:
    """Writes what was asked for and says where it lies."""
    args.device, path = str(pick_device(args.device)), Path(args.ckpt)
    G, spec = load_generator(path, args.device)
    args.codes = args.codes.split(",") if args.codes else spec.names
    if unknown := [code for code in args.codes if code not in spec.names]:
        raise Problem(f"--codes {unknown[0]}: {codes_of(spec)}")
    ckpt = load_checkpoint(path)
    args.names = read_names(args, spec, ckpt)
    if args.shrink:
        shrink(ckpt, args.names, Path(args.shrink))
        print(f"{args.shrink} has {Path(args.shrink).stat().st_size / 1e6:.1f} MB")
        return 0
    folder = "generated" if args.samples else "sorted" if args.sort else "traversals"
    folder = folder if path.name == "last.pt" else f"{path.stem}-{folder}"
    out = Path(args.out) if args.out else path.parent / folder
    out.mkdir(parents=True, exist_ok=True)
    if args.samples:
        write_samples(G, spec, args, out)
        made = f"{args.samples:,} pictures and codes.csv"
    elif args.sort:
        sort_pictures(args, spec, ckpt["args"], out)
        made = "sheets and codes.csv"
    elif args.onnx:
        write_onnx(G, spec, out / "generator.onnx")
        made = "generator.onnx"
    elif args.versus:
        compare(args, out)
        made = "comparison.png"
    elif args.explorer:
        title = f"{path.parent.name}/{path.name}, step {ckpt['step']:,}"
        Q, _ = load_encoder(path, args.device)
        write_explorer(G, Q, spec, args, title, out / "explorer.html")
        made = "explorer.html"
    else:
        rows = measure(G, load_encoder(path, args.device)[0], spec, args)
        print_table(rows, args.names)
        figures = [[r.code, *("" if v is None else f"{v:.5f}" for v in r[1:])] for r in rows]
        named = [[*row, args.names.get(row[0], "")] for row in figures]
        save_table(out / "table.csv", [[*Row._fields, "name"], *named])
        write_sheets(G, spec, args, rows, out)
        made = "sheets and table.csv"
    print(f"{out} has {made}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something to mend."""
    return run("generate.py", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
