"""Show what an InfoGAN learned: one labelled sheet per code, and a table of what every code does.

    python generate.py --ckpt checkpoint/v3/last.pt                   sheets and table of all codes
    python generate.py --ckpt checkpoint/v3/last.pt --codes cat0,cont3 --gif
    python generate.py --ckpt checkpoint/v3/last.pt --samples 10000   pictures, for FID tools
    python generate.py --ckpt A/last.pt --versus B/last.pt --data ~/faces   two runs side by side

The architecture comes from the checkpoint. Along a row of a sheet one code moves, all else stays.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from infogan import (
    DEVICES,
    Codes,
    CodeSpec,
    Encoder,
    Generator,
    Parser,
    Problem,
    load_encoder,
    load_generator,
    load_pictures,
    make_batch,
    mutual_information,
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


def print_table(rows: list[Row]) -> None:
    print(
        "code       L_I / most  effect   edges   (nats; shares of all variance in pictures, edges)"
    )
    for r in rows:
        name = f"all {r.code}" if r.code in ("cat", "cont") else r.code
        known = "" if r.L_I is None else f"{r.L_I:.2f} / {r.ceiling:.2f}"
        print(f"{name:8} {known:>12}  {r.effect:.4f}  {r.edges:.4f}")


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


def tile(x: Tensor) -> Image.Image:
    """One picture (channels, size, size), enlarged to 64 at least, so that labels fit."""
    image = to_pil_image(x.add(1).div(2).clamp(0, 1)).convert("RGB")
    k = max(1, 64 // image.width)
    return image.resize((image.width * k, image.height * k), Image.Resampling.NEAREST)


def sheet(title: str, x: Tensor, above: Sequence[str], left: Sequence[str] = ()) -> Image.Image:
    """len(above) pictures in a row, labels above the columns and left of the rows."""
    tiles, columns = [tile(picture) for picture in x], len(above)
    font, small, step = ImageFont.load_default(15), ImageFont.load_default(12), tiles[0].width + 2
    lines = [line for text in left for line in text.split("\n")]
    margin = 8 + max([int(small.getlength(line)) for line in lines], default=0)
    width = max(margin + columns * step + 8, 16 + int(font.getlength(title)))
    page = Image.new("RGB", (width, 50 + step * -(-len(tiles) // columns) + 6), "white")
    pen = ImageDraw.Draw(page)
    pen.text((8, 7), title, "black", font)
    for i, text in enumerate(above):
        pen.text((margin + i * step + step // 2, 46), text, "#333333", small, anchor="ms")
    for i, text in enumerate(left):
        middle = 50 + i * step + step // 2
        pen.multiline_text((4, middle), text, "#333333", small, anchor="lm", spacing=3)
    for i, picture in enumerate(tiles):
        page.paste(picture, (margin + i % columns * step, 50 + i // columns * step))
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
    """A sheet (and a GIF) per chosen code, all-categoricals, cat-by-cont, and the overview."""
    base = spec.sample(args.rows, torch.Generator().manual_seed(args.seed))
    first = Codes(*(c[:1] for c in base))
    smooth = [round(v, 6) + 0.0 for v in torch.linspace(*args.range, args.steps).tolist()]
    every = list(range(min(spec.cat_dim, MOST_SHOWN)))
    each, numbers = [f"{v:+.2f}" if v else "0" for v in smooth], [str(k) for k in every]

    def pictures(codes: Codes, name: str) -> Tensor:
        values = every if name.startswith("cat") else smooth
        return draw(G, spec, traverse(codes, name, values), args.batch_size)

    strips, told = [], []
    for row in rows:
        if row.code not in args.codes:
            continue
        x, above = pictures(base, row.code), numbers if row.code.startswith("cat") else each
        known = f"L_I {row.L_I:.2f} of {row.ceiling:.2f} nats, effect {row.effect:.3f}"
        save_picture(out / f"{row.code}.png", sheet(f"{row.code}: {known}", x, above))
        if args.gif:
            save_gif(out / f"{row.code}.gif", x, len(above), back=row.code.startswith("cont"))
        strip = pictures(first, row.code)[: args.steps]
        blank = torch.ones_like(strip[:1]).expand(args.steps - len(strip), -1, -1, -1)
        strips.append(torch.cat([strip, blank]))
        told.append(f"{row.code}\nL_I {row.L_I:.2f}\neffect {row.effect:.3f}")
    if strips:
        heads = [f"{k} / {v}" if k in every else v for k, v in enumerate(each)]
        title = "strongest code first (category / value); along a row all else stays"
        heads = heads if spec.n_cat else each
        save_picture(out / "overview.png", sheet(title, torch.cat(strips), heads, told))
    if spec.n_cat:
        title = "all categoricals together (columns); z and continuous codes (rows)"
        page = sheet(title, pictures(base, "cat"), numbers)
        save_picture(out / "all-categoricals.png", page)
    if spec.n_cat and spec.n_cont:
        pages, categories = [], traverse(first, "cat0", every)
        for name in ("cont0", "cont1")[: spec.n_cont]:
            title = f"cat0 (rows) by {name} (columns)"
            pages.append(sheet(title, pictures(categories, name), each, numbers))
        save_picture(out / "cat-by-cont.png", beside(pages))


def save_gif(path: Path, x: Tensor, columns: int, back: bool) -> None:
    """A loop over a traversal's columns, its rows side by side; `back` runs it forth and back."""
    rows = [[tile(picture) for picture in row] for row in x.unflatten(0, (-1, columns))]
    frames = [beside([row[i] for row in rows]) for i in range(columns)]
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
    return sheet(title, torch.cat(x), above, left)


def compare(args: argparse.Namespace, device: str, out: Path) -> None:
    """Two runs in one table and, drawn from the same z and codes, in comparison.png.

    With --data the table has their distance to real pictures. Raises Problem when the runs have
    other codes or pictures of another size.
    """
    told, pages, real, first = {}, [], None, None
    for path in (args.ckpt, args.versus):
        G, spec = load_generator(path, device)
        rng = torch.Generator().manual_seed(args.seed)
        x = draw(G, spec, spec.sample(N_MEASURED, rng), args.batch_size)
        if first not in (None, (spec, x.shape)):
            raise Problem(f"--versus {path}: has other codes or pictures than {args.ckpt}")
        if args.data and real is None:
            some = load_pictures(args.data, x.shape[2], x.shape[1]).x
            some = some[torch.randperm(len(some), generator=rng)[:N_MEASURED]]
            real = make_batch(some, False, rng, torch.device("cpu"))
        first, rows = (spec, x.shape), measure(G, load_encoder(path, device)[0], spec, args)
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


# flags --------------------------------------------------------------------------------------------


LIMITS = {
    "rows": (1, 100),
    "steps": (2, 100),
    "samples": (1, 10**7),
    "seed": (0, 2**63 - 1),
    "batch_size": (1, 65_536),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises Problem in one line for what is out of range."""
    p = Parser("generate.py", LIMITS, __doc__)
    p.add("--ckpt", None, "such as checkpoint/v3/last.pt", metavar="FILE", required=True)
    beside = "default: traversals, or generated for --samples, beside the checkpoint"
    p.add("--out", None, f"where the pictures go ({beside})", metavar="FOLDER")
    p.add("--codes", None, "such as cat0,cont3 (default: every code)", metavar="NAMES")
    p.add("--rows", 8, "rows of a sheet")
    p.add("--steps", 11, "values of a continuous code")
    low_high = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    p.add("--range", (-1.0, 1.0), "of these values; training draws from -1 to 1", **low_high)
    p.add("--versus", None, "compare with this checkpoint instead of sheets", metavar="FILE")
    p.add("--data", None, "real pictures to measure both against", metavar="FOLDER")
    p.add("--gif", False, "also an animated loop per code", action="store_true")
    p.add("--samples", None, "write N single PNGs and codes.csv instead, for FID tools")
    p.add("--seed", 0, "of z and codes")
    p.add("--batch-size", 250, "pictures drawn at once")
    p.add("--device", "auto", "auto takes the fastest", choices=DEVICES)
    args = p.check(p.parse_args(argv))
    if not all(math.isfinite(v) and abs(v) <= 1000 for v in args.range):
        raise Problem("--range: must be two numbers from -1000 to 1000")
    if args.data and not args.versus:
        raise Problem("--data: measures two runs, so give --versus too")
    return args


def show(args: argparse.Namespace) -> int:
    """Writes what was asked for and says where it lies."""
    device, path = str(pick_device(args.device)), Path(args.ckpt)
    G, spec = load_generator(path, device)
    wanted = args.codes.split(",") if args.codes else spec.names
    if unknown := [name for name in wanted if name not in spec.names]:
        known = ", ".join(spec.names) or "no codes"
        raise Problem(f"--codes {unknown[0]}: this checkpoint has {known}")
    args.codes = wanted
    folder = "generated" if args.samples else "traversals"
    folder = folder if path.name == "last.pt" else f"{path.stem}-{folder}"
    out = Path(args.out) if args.out else path.parent / folder
    out.mkdir(parents=True, exist_ok=True)
    if args.samples:
        write_samples(G, spec, args, out)
        print(f"{args.samples:,} pictures and codes.csv are in {out}")
        return 0
    if args.versus:
        compare(args, device, out)
        print(f"comparison.png is in {out}")
        return 0
    Q, _ = load_encoder(path, device)
    rows = measure(G, Q, spec, args)
    print_table(rows)
    figures = [[r.code, *("" if v is None else f"{v:.5f}" for v in r[1:])] for r in rows]
    save_table(out / "table.csv", [Row._fields, *figures])
    write_sheets(G, spec, args, rows, out)
    print(f"sheets and table.csv are in {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 something to mend."""
    return run("generate.py", lambda: show(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
