"""Show what an InfoGAN learned: one labelled sheet per code, and a table of what every code does.

    python generate.py --ckpt checkpoint/v3/last.pt                   sheets and table of all codes
    python generate.py --ckpt checkpoint/v3/last.pt --explorer        a web page that moves codes
    python generate.py --ckpt checkpoint/v3/last.pt --sort ~/faces    real faces, by their codes
    python generate.py --ckpt checkpoint/v3/last.pt --samples 50 --set cat0=3    of one category
    python generate.py --ckpt checkpoint/v3/last.pt --read me.png     the codes that draw a picture

The architecture comes from the checkpoint. README.md has an example of each mode.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

import infogan
from infogan import (
    MARK,
    Codes,
    CodeSpec,
    Generator,
    Parser,
    UserError,
    load_pictures,
    save_picture,
    to_image,
    write_file,
)

Held = dict[str, float]  # codes with their values, by --set
N_MEASURED, N_MOVED = 400, 100  # samples behind a table's figures; behind its tints
MOST_SHOWN = 100  # categories on a sheet
AT_ONCE, N_READ = 32, 4  # pictures in each pass of a network; poses of each one of --read
FIT_ROUNDS, FIT_STEPS, FIT_RATE = 3, 100, 0.1  # of find_codes: more steps change nothing
N_FOLLOWED = 4  # categories of one code that find_codes follows to the end
MOST_SAMPLES = 10**6  # that --samples writes
N_TRIED, N_FACES, N_NEAR = 64, 10, 5  # seeds for the page: tried, shown (and characters); typical()
PAGE = Path(__file__).parent / "data/explorer.html"
FONTS = ["DejaVuSans", "NotoSansCJK-Regular", "DroidSansFallbackFull", "arial", "msyh", "malgun"]
progress = partial(tqdm, leave=False, disable=None)  # a bar, in a terminal

# drawing and saving -------------------------------------------------------------------------------


class Model:
    """A trained checkpoint (path: its file, or a run's folder): networks, codes, all it holds."""

    def __init__(self, path: str, device: torch.device, names: str | None = None):
        self.ckpt, self.device = infogan.load_checkpoint(path), device
        nets = (infogan.load_net(self.ckpt, net, device) for net in ("G_ema", "D"))
        # G, and D with the head Q
        self.G, self.D = (net.to(memory_format=torch.channels_last) for net in nets)  # faster
        self.path, self.spec, args = Path(self.ckpt["path"]), self.G.spec, self.ckpt["args"]
        # what a picture is to it: size, channels, --crop of those that are not square
        self.form = args["image_size"], args["channels"], args.get("crop", "centre")
        self.names, self.labels = self.read_names(names), {}
        for code in self.spec.names:
            self.labels[code] = f"{code} ({self.names[code]})" if code in self.names else code

    def read_names(self, given: str | None) -> dict[str, str]:
        """What people call codes: by --names, names.json beside the checkpoint, or within it."""
        names, path = self.ckpt.get("names", {}), Path(given or self.path.with_name("names.json"))
        try:
            if given or path.exists():
                names = {**names, **json.loads(path.read_text(encoding="utf-8-sig"))}
            for code, name in names.items():
                if not re.fullmatch("(cat|cont)[0-9]+: .{1,40}", f"{code}: {name}"):
                    raise ValueError(f"not {code!a}: {name!a}")
        except Exception as error:  # of any kind: the file is at fault
            must = 'must be a table like {"cont3": "tilt"}, each name a line of up to 40 letters'
            raise UserError(f"{path}: {must}: {error}") from error
        return {code: str(name) for code, name in names.items() if code in self.spec.names}


def to_floats(x: Tensor) -> Tensor:
    """Bytes (n, h, w, channels) as pictures (n, channels, h, w) in [-1, 1]."""
    return infogan.make_batch(x, False, None, x.device)


def in_parts(model: Model, net: Callable, x: Tensor) -> Any:
    """net(x) on the CPU, of n pictures or latents, AT_ONCE at a time on the device.

    Always as many: rounding depends on it, and on one device a seed must be one file.
    """
    blank = (0, 0) * (x.dim() - 1)
    full = (F.pad(part, (*blank, 0, AT_ONCE - len(part))) for part in x.split(AT_ONCE))
    return tree_map(lambda y: y[: len(x)], gather(net(part.to(model.device)) for part in full))


def draw(model: Model, codes: Codes) -> Tensor:
    """Pictures (n, channels, size, size) in [-1, 1]."""
    return in_parts(model, model.G, model.spec.join(codes))


def pick(codes: Codes, which: Tensor | slice | list[int]) -> Codes:
    """Some of the draws, in this order."""
    return Codes(*(c[which] for c in codes))


def gather(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Codes, or Q's answers, one after the other as one, on the CPU."""
    return tree_map(lambda *columns: torch.cat(columns).cpu(), *parts)


def hold(spec: CodeSpec, codes: Codes, held: Held) -> Codes:
    """codes with the values of --set."""
    for name, value in held.items():
        codes = spec.traverse(codes, name, [value])
    return codes


def sample_seeds(spec: CodeSpec, seeds: Iterable[int], held: Held) -> Codes:
    """One draw for each seed, which depends on nothing else, with the values of --set."""
    each = (spec.sample(1, torch.Generator().manual_seed(seed)) for seed in seeds)
    return hold(spec, gather(each), held)


def cross(model: Model, base: Codes, name: str, others: Codes) -> Tensor:
    """Pictures (n, m, channels, size, size): n faces, each with a code or group of all m others."""
    spec, shape = model.spec, (len(base.z), len(others.z))
    i, j = torch.cartesian_prod(*map(torch.arange, shape)).T
    codes = spec.replace(pick(base, i), name, pick(others, j))
    return draw(model, codes).unflatten(0, shape)


def traversal(model: Model, base: Codes, code: str, values: Sequence) -> Tensor:
    """Pictures (n, len(values), channels, size, size) of n faces along a code."""
    return cross(model, base, code, model.spec.traverse(pick(base, [0]), code, values))


def characters(model: Model, base: Codes, held: Held) -> Tensor:
    """Pictures (n, up to 10, …) of n faces: with all categorical codes as seeds 0 to 9 have them.

    Of a single categorical code its categories.
    """
    spec = model.spec
    if spec.n_cat == 1:
        return traversal(model, base, "cat0", range(spec.cat_dim)[:N_FACES])
    return cross(model, base, "cat", sample_seeds(spec, range(N_FACES), held))


def quick(device: torch.device) -> torch.autocast:
    """bfloat16 on a CPU that is fast at it, for what need not be exact; a GPU needs none of it."""
    fast = device.type == "cpu" and infogan.speed_up(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def claim(folder: Path, file: str = "") -> Path:
    """The folder, made if it is missing, for what we write alone, or a file that is no picture.

    The folder gets a mark: no run takes its pictures for data, and what is in it may be written
    again. Into a folder with files of others goes only a file, if it is new; else UserError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, mark = folder / file, folder / MARK
    if not any(folder.iterdir()):
        mark.touch()
    if path.exists() and not mark.exists():
        another = "a file of its own" if file else "a folder of its own"
        raise UserError(f"{path}: is not from this version of generate.py; give --out {another}")
    return path


def short_hash(tensors: Iterable[Tensor]) -> str:
    """The same only for the same numbers."""
    raw = (t.cpu().numpy().tobytes() for t in tensors)
    return hashlib.sha256(b"".join(raw)).hexdigest()[:12]


def save_table(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """A CSV, complete or not at all, with numbers to four decimals."""
    writer = csv.writer(text := io.StringIO(), lineterminator="\n")
    for line in lines:
        writer.writerow(f"{round(v, 4):g}" if isinstance(v, float) else v for v in line)
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def code_columns(spec: CodeSpec) -> list[str]:
    """Of a file from which --start draws faces."""
    return ["file", *spec.names, *(f"z{i}" for i in range(spec.z_dim))]


def save_codes(path: Path, files: list[str], codes: Codes, spec: CodeSpec) -> None:
    """What draws each of the files, for --start."""
    values = torch.cat([*codes[1:], codes.z], 1).tolist()
    lines = ([file, *row] for file, row in zip(files, values, strict=True))
    save_table(path, [code_columns(spec), *lines])


def print_table(lines: list[list[str]]) -> None:
    """Columns, all but the first and the last to the right; cut at the end of a terminal's line."""
    left, *right = (max(map(len, column)) for column in zip(*lines, strict=True))
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, *cells, last in lines:
        print("  ".join([f"{name:{left}}", *map(str.rjust, cells, right), last])[:room])


# figures ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table: what a code, or a group of codes, does; NaN for what a group lacks."""

    code: str
    L_I: float  # nats, by the run's own Q on new samples
    ceiling: float
    effect: float  # share of the pixels' variance that goes when this alone is frozen
    edges: float  # the same for edges, where tints and soft light do not count
    tint: float  # see tint()


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
    if change < 1e-6 * x.numel():  # too little to see, or to divide by
        return 0.0
    return (1 - left.square().sum() / change).item()


def measure(model: Model) -> list[Row]:
    """Rows for z and each kind of code together, then for every code, strongest effect first.

    Of the same samples each time, and to four decimals: a table depends on the checkpoint alone.
    """
    spec, rng, rows = model.spec, torch.Generator().manual_seed(0), []
    codes, other = spec.sample(N_MEASURED, rng), spec.sample(N_MEASURED, rng)
    few = pick(codes, slice(N_MOVED))

    def pictures(codes: Codes) -> Tensor:
        with quick(model.device):
            return draw(model, codes)

    x, no_code = pictures(codes), (math.nan, math.nan)  # a group
    x_edges = edge_map(x)
    q = in_parts(model, model.D, x)[1]
    L_I = infogan.mutual_information(spec, q, codes).tolist()
    known = dict(zip(spec.names, zip(L_I, spec.ceilings, strict=True), strict=True))
    for name in progress(["z", *spec.kinds, *spec.names], "measuring"):
        y, moved = pictures(spec.replace(codes, name, other)), math.nan
        if name in known:
            moved = tint(*map(pictures, low_high(spec, few, name, rng)))
        values = *known.get(name, no_code), effect(x, y), effect(x_edges, edge_map(y)), moved
        rows.append(Row(name, *(round(v, 4) for v in values)))
    return sorted(rows, key=lambda row: -row.effect if row.code in known else -math.inf)


def figures(model: Model, path: Path) -> list[Row]:
    """Prints the table and returns its rows: those of the file at path, if it is of this model.

    Else they are measured. The file then has the names of today.
    """
    spec, rows = model.spec, []
    weights = short_hash(w for net in (model.G, model.D) for w in net.state_dict().values())
    measured = f"step {model.ckpt['step']}, weights {weights}, {N_MEASURED} samples of seed 0"
    with suppress(Exception), open(path, newline="", encoding="utf-8") as file:
        for code, *values, _, of in csv.reader(file):
            if of == measured:
                rows.append(Row(code, *(float(v or "nan") for v in values)))
    if {row.code for row in rows} == {"z", *spec.kinds, *spec.names}:
        print(f"figures from {path}")
    else:
        rows = measure(model)
    table = [[*Row._fields, "name", "measured"]]
    for code, *values in rows:
        cells = ["" if math.isnan(v) else f"{v:.4f}" for v in values]
        table.append([code, *cells, model.names.get(code, ""), measured])
    print_table([line[:-1] for line in table])
    if (path.parent / MARK).exists():
        save_table(path, table)
    return rows[1 + len(spec.kinds) :]


# pictures of codes --------------------------------------------------------------------------------


@cache
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first of FONTS here that has all letters of text; Pillow's own for ASCII, or if none."""
    for name in [] if text.isascii() else FONTS:
        with suppress(OSError):  # not here; Pillow looks through the system's folders by itself
            font = ImageFont.truetype(name, size)
            box = bytes(font.getmask("\U0010fffd"))  # what it draws for a letter that it lacks
            if box not in {bytes(font.getmask(letter)) for letter in text if not letter.isspace()}:
                return font
    return ImageFont.load_default(size)


def sheet(
    title: str, labels: Sequence[str], rows: Sequence[Tensor], above: Sequence, zoom: int
) -> Image.Image:
    """Rows of up to len(above) pictures, with labels at their left and above the columns.

    Floats above are a continuous code's values: below those of training, -1 to 1, is a bar.
    """
    size = rows[0].shape[3] * max(1, 64 // rows[0].shape[3]) * zoom  # labels need 64 pixels
    step, edge, top = size + 2 * zoom, 12 * zoom, 54 * zoom
    text, title_font = "\n".join(labels), font_for(title, 15 * zoom)
    font = font_for(text, 12 * zoom)
    widest = max(map(font.getlength, text.split("\n")))
    margin = edge + (int(widest) + 8 * zoom if widest else 0)
    width = max(margin + len(above) * step, edge + int(title_font.getlength(title))) + edge
    page = Image.new("RGB", (width, top + len(rows) * step + edge), "white")
    pen = ImageDraw.Draw(page)
    pen.text((edge, 10 * zoom), title, "black", title_font)
    for i, value in enumerate(above):
        left, text = margin + i * step, str(value)
        if isinstance(value, float):
            text = f"{value:+.2f}"
            if abs(value) <= 1:
                pen.rectangle((left, top - 4 * zoom, left + step, top - 3 * zoom), "#2f62c9")
        pen.text((left + size // 2, top - 6 * zoom), text, "#333333", font, anchor="ms")
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        at = edge, top + i * step + size // 2
        pen.text(at, label, "#333333", font, anchor="lm", spacing=3 * zoom)
        for j, picture in enumerate(row):
            tile = to_image(picture).resize((size, size), Image.Resampling.NEAREST)
            page.paste(tile, (margin + j * step, top + i * step))
    return page


def place(args: Namespace, name: str, suffix: str = ".png") -> Path:
    """Where a file goes that shows faces: its name tells what is unusual about them."""
    return args.out / f"{name}{args.unusual}{suffix}"


def save_sheet(args: Namespace, name: str, *parts: Any) -> Path:
    """Saves the sheet of these parts, and returns where it is."""
    path = place(args, name)
    save_picture(path, sheet(*parts, args.zoom))
    return path


def sheets(model: Model, args: Namespace) -> str:
    """The table and a sheet per code; without --codes, sheets of several codes too.

    Nothing is selected.
    """
    spec, rows = model.spec, figures(model, claim(args.out) / "table.csv")
    values = [round(v, 6) + 0.0 for v in torch.linspace(*args.range, args.steps).tolist()]
    axes = {"cat": [*range(spec.cat_dim)][:MOST_SHOWN], "cont": values}
    best = {kind: [] for kind in spec.kinds}
    for row in (row for row in rows if row.code in args.codes):
        kind, name = row.code.rstrip("0123456789"), model.labels[row.code]
        above, faces = axes[kind], traversal(model, args.base, row.code, axes[kind])
        told = f"L_I {row.L_I:.2f} of {row.ceiling:.2f} nats, effect {row.effect:.3f}"
        title = f"{name}: {told}, tint {row.tint:.2f}"
        path = save_sheet(args, row.code, title, args.faces, faces, above)
        if args.gif:
            columns = zip(above, faces.unbind(1), strict=True)
            frames = [sheet(name, [""], [x], [f"{v:g}"] * len(x), args.zoom) for v, x in columns]
            frames += frames[-2:0:-1]  # and back
            save_loop(path.with_suffix(".gif"), frames, {"cat": 500, "cont": 100}[kind])
        most = faces.var(1).sum((1, 2, 3)).argmax()  # the face that this code changes most
        label = f"{name}\nL_I {row.L_I:.2f}\neffect {row.effect:.3f}\n{args.faces[most]}"
        best[kind].append((label, faces[most]))
    if args.codes == spec.names:
        several(model, args, best, axes)
    return f"{args.out} has sheets and table.csv; bars: -1 to 1, as in training"


def several(model: Model, args: Namespace, best: dict[str, list], axes: dict[str, list]) -> None:
    """Sheets of all codes. best: of each kind the rows of overview, their labels and pictures."""
    spec, parts = model.spec, []
    what = {"cat": "categorical codes (columns: categories)", "cont": "continuous codes (values)"}
    for kind, rows in best.items():
        title = f"{what[kind]}, strongest first, each on the face that it changes most"
        parts.append(sheet(title, *zip(*rows, strict=True), axes[kind], args.zoom))
    if parts:  # below each other, each at the left
        width = max(page.width for page in parts)
        wide = [ImageOps.expand(page, (0, 0, width - page.width, 0), "white") for page in parts]
        save_picture(place(args, "overview"), Image.fromarray(np.vstack(wide)))
    if spec.n_cat > 1:
        columns = "a column is one setting of all categorical codes (those of seeds 0 to 9)"
        title = f"ten characters: {columns}; z and continuous codes of the rows"
        shown = characters(model, args.base, args.set)
        save_sheet(args, "characters", title, args.faces, shown, range(N_FACES))
    if not args.chosen:
        first = sample_seeds(spec, range(args.seed, args.seed + 100), args.set)
        title = f"100 samples, seeds {args.seed} to {args.seed + 99}, nothing selected"
        rows, blank = draw(model, first).split(10), [""] * 10
        save_sheet(args, "samples", title, blank, rows, blank)


def save_loop(path: Path, frames: Iterable[Image.Image], milliseconds: int) -> None:
    """An animation without end, as GIF or WebP."""
    first, *more = frames
    save_picture(path, first, append_images=more, duration=milliseconds, loop=0, save_all=True)


def walk(model: Model, args: Namespace) -> str:
    """From the face of each seed to the next, and from the last to the first, as GIF or WebP."""
    spec, path = model.spec, claim(args.out.parent, args.out.name)
    a = spec.join(args.base)[:, None]
    t = torch.arange(args.steps)[:, None] / args.steps
    codes = a.lerp(a.roll(-1, 0), t)  # (faces, steps, spec.dim)
    # of variance 1 on the way too, so that faces stay sharp
    codes[..., : spec.z_dim] /= (t**2 + (1 - t) ** 2).sqrt()
    x = in_parts(model, model.G, codes.flatten(0, 1))
    scale = max(1, 128 // x.shape[3]) * args.zoom
    frames = (ImageOps.scale(to_image(face), scale, Image.Resampling.BICUBIC) for face in x)
    save_loop(path, frames, 80)
    return f"{path} has {len(x)} frames"


def clear(folder: Path) -> Path:
    """The folder, ours, without the pictures and codes that an earlier call has left there.

    Raises UserError, with nothing changed, where there are pictures that its mark does not list.
    """
    mark, old = claim(folder) / MARK, {path.name for path in folder.glob("*.png")}
    if foreign := old.difference(mark.read_text().split()):
        raise UserError(f"--out {folder}: holds {len(foreign):,} other pictures; give an empty one")
    if old:
        print(f"{len(old):,} earlier pictures in {folder} are replaced")
    for name in [*old, "codes.csv"]:
        (folder / name).unlink(missing_ok=True)
    mark.write_text("")
    return folder


def save_pngs(folder: Path, names: list[str], parts: Iterable[Tensor]) -> None:
    """PNGs of pictures that come in parts (n, channels, size, size), one after the other.

    The folder's mark lists each, so that a later call removes these alone.
    """
    pictures = chain.from_iterable(parts)
    with open(folder / MARK, "a") as mark:
        for name, x in zip(progress(names, "pictures"), pictures, strict=True):
            image = to_image(x)
            print(name, file=mark, flush=True)  # before it is there, should we be killed
            try:
                # lossless at any level; more would take four times as long for files as large
                image.save(folder / name, compress_level=1)
            except BaseException:  # Ctrl-C, too
                (folder / name).unlink(missing_ok=True)
                raise


def samples(model: Model, args: Namespace) -> str:
    """A PNG for each seed and codes.csv, its codes; of --data, what a run sees, into OUT-real.

    Where it is stopped, codes.csv has the pictures that are there.
    """
    if os.path.abspath(args.start or "").startswith(os.path.abspath(args.out / "codes.csv")):
        raise UserError(f"--start {args.start}: --samples would write over it; give another --out")
    real = load_pictures(args.data, *model.form).x if args.data else []
    out, codes = clear(args.out), args.base
    names = [f"{seed:06d}.png" for seed in args.numbers]
    try:
        inputs = model.spec.join(codes).split(AT_ONCE)
        save_pngs(out, names, (in_parts(model, model.G, part) for part in inputs))
    finally:
        n = len([*out.glob("*.png")])
        save_codes(out / "codes.csv", names[:n], pick(codes, slice(n)), model.spec)
    told = f"{out} has {n:,} pictures and codes.csv"
    if not args.data:
        return told
    folder = clear(out.with_name(f"{out.name}-real"))
    print(f"{told}; now the {len(real):,} of {args.data} are written", flush=True)
    names = [f"{i:06d}.png" for i in range(len(real))]
    save_pngs(folder, names, map(to_floats, real.split(AT_ONCE)))
    return f"{folder} has the {len(real):,} pictures of {args.data}"


def versus(model: Model, args: Namespace) -> str:
    """The tables of two runs, how far from --data they are, and both in comparison.png."""
    spec, other, labels, shown = model.spec, Model(args.versus, model.device), [], []
    flags, same = Namespace(**model.ckpt["args"]), [*vars(spec), "image_size", "channels"]
    if changes := ", ".join(infogan.differences(flags, other.ckpt["args"], same)):
        raise UserError(f"--versus {other.path}: has other codes or pictures: {changes}")
    rng = torch.Generator().manual_seed(args.seed)
    if args.data:
        real = load_pictures(args.data, *model.form).x
        real = to_floats(real[torch.randperm(len(real), generator=rng)[: infogan.N_COMPARED]])
    first = sample_seeds(spec, range(args.seed, args.seed + N_FACES), args.set)
    of_other = f"{other.path.parent.name}-{other.path.stem}"
    for run, table in ((model, "table.csv"), (other, f"table-{of_other}.csv")):
        print(run.path)
        rows = figures(run, claim(args.out) / table)
        if args.data:
            drawn = draw(run, spec.sample(len(real), rng.manual_seed(args.seed)))
            right = f"{infogan.tell_apart(real, drawn):.1%} right, 50% is best"
            print(f"real or not, by the nearest neighbour: {right}")
        each = {"samples": draw(run, first)[None]}
        if spec.n_cat:
            each["categorical codes"] = characters(run, args.base, args.set)
        if spec.n_cont:
            strongest = next(row.code for row in rows if row.code.startswith("cont"))
            values = torch.linspace(*args.range, N_FACES)
            each[f"{strongest}, strongest"] = traversal(run, args.base, strongest, values.tolist())
        for label, faces in each.items():
            labels += [label] * len(faces)
            shown += faces
    title = f"above: {model.path}, below: {other.path}"
    path = save_sheet(args, f"comparison-{of_other}", title, labels, shown, range(N_FACES))
    return f"{path} has both"


# real pictures by code ----------------------------------------------------------------------------


def entropy(values: Iterable) -> float:
    """H of what is counted here, in nats."""
    counts = torch.tensor([*Counter(values).values()], dtype=torch.double)
    return torch.distributions.Categorical(counts).entropy().item()


def agreement(categories: Iterable[float], labels: Iterable[str]) -> tuple[float, float]:
    """The best one-to-one match's error, and I(a; b) / mean(H(a), H(b)): 1 perfect, 0 chance.

    Of the pictures that have a label.
    """
    import networkx  # comes with torch

    pairs = [pair for pair in zip(categories, labels, strict=True) if pair[1]]
    graph = networkx.Graph()
    graph.add_weighted_edges_from((*pair, count) for pair, count in Counter(pairs).items())
    matched = graph.edge_subgraph(networkx.max_weight_matching(graph)).size("weight")
    both = sum(map(entropy, zip(*pairs, strict=True)))
    nmi = 2 * (both - entropy(pairs)) / both if both else 1.0
    return 1 - matched / len(pairs), nmi


def read_codes(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of bytes (n, h, w, channels): each code as Q reads it; how sure, or sigma: (n, codes)."""
    p, mu, sigma = in_parts(model, lambda part: model.D.read(to_floats(part)), x)
    sure, c_cat = p.max(2)
    return torch.cat([c_cat, mu], 1), torch.cat([sure, sigma], 1)


def sort(model: Model, args: Namespace) -> str:
    """Sheets of real pictures by the codes that Q reads from them; codes.csv; how they agree.

    A picture's label is its class in a named set, or the folder that it is in; "" for none.
    """
    spec, steps, folder = model.spec, args.steps, args.sort
    if os.path.isfile(folder):
        raise UserError(f"--sort {folder}: must be a folder; --read takes single pictures")
    pictures = load_pictures(folder, *model.form)
    x, files = pictures.x, pictures.names
    if folder in infogan.NAMED_SETS:
        classes = [str(label) for _, label in infogan.open_named_set(folder)]
        labels = [classes[int(number)] for number in files]
    else:
        files = [os.path.relpath(file, os.path.realpath(folder)) for file in files]
        labels = [Path(file).parent.name for file in files]
    out, (values, doubts) = claim(args.out), read_codes(model, x)
    doubted = [f"{code}_{'p' if code.startswith('cat') else 'sigma'}" for code in spec.names]
    lines = zip(files, *values.T.tolist(), *doubts.T.tolist(), strict=True)
    save_table(out / "codes.csv", [["file", *spec.names, *doubted], *lines])
    n_labels = len({*labels} - {""})
    if spec.n_cat and n_labels:
        print(f"labels: {n_labels}, {labels.count(''):,} pictures without one left out")
    elif spec.n_cat:
        print("no labels: to see how well categories match, make a subfolder for each label")
    for code in args.codes:
        j, name = spec.names.index(code), model.labels[code]
        value = values[:, j]
        if j < spec.n_cat:
            order = doubts[:, j].argsort(descending=True)
            chosen = [order[value[order] == k] for k in range(spec.cat_dim)[:MOST_SHOWN]]
            above, left = [""] * steps, [f"{k}\n{len(mine):,}" for k, mine in enumerate(chosen)]
            title = f"{name}: category, its number of pictures; the most certain first"
            if n_labels > 1:
                error, nmi = agreement(value.tolist(), labels)
                print(f"{name}: {error:.1%} error, NMI {nmi:.3f}")
        else:
            n = min(args.rows, len(files))  # neighbours below each other
            start = torch.linspace(0, len(files) - n, steps).round().long()
            chosen = value.argsort()[start + torch.arange(n)[:, None]]
            above, left = [f"{v:+.2f}" for v in value[chosen].mean(0)], [""] * n
            title = f"{name}: lowest to highest, as Q reads it"
        save_sheet(args, code, title, left, [to_floats(x[some[:steps]]) for some in chosen], above)
    return f"{out} has sheets and codes.csv"


def look(model: Model, x: Tensor) -> Tensor:
    """What two pictures must share to look alike, of x (n, channels, size, size): (n, features).

    Colours by place (4x4, 16x16 averages) and D's first features, which see lines. Not the pixels:
    where G cannot draw a line in its place, they ask for none, and pictures get soft.
    """
    coarse, fine = (F.adaptive_avg_pool2d(x, size) for size in (4, 16))
    parts = (10.0, coarse), (2.0, fine), (0.5, model.D.trunk[:2](x))
    weighted = [part.flatten(1) * math.sqrt(w / part[0].numel()) for w, part in parts]
    return torch.cat(weighted, 1).float()


def misfit(model: Model, codes: Codes, wanted: Tensor) -> Tensor:
    """How far G's drawings of n m codes are from the n wanted (n, features): (n, m)."""
    with quick(model.device):
        parts = model.spec.join(codes).split(AT_ONCE)
        looks = torch.cat([look(model, model.G(part)) for part in parts])
    return (looks.unflatten(0, (len(wanted), -1)) - wanted[:, None]).square().sum(2)


def nearest(model: Model, codes: Codes, wanted: Tensor, most: int) -> Codes:
    """Of n m codes those that fit the n wanted best, `most` for each."""
    far = misfit(model, codes, wanted)
    rows = torch.arange(far.numel(), device=far.device).view_as(far)
    return pick(codes, rows.gather(1, far.argsort(1)[:, :most]).flatten())


def find_codes(model: Model, x: Tensor, guess: Codes) -> Codes:
    """The codes of n pictures x (n, channels, size, size) in [-1, 1], from Q's guess on.

    First the categories, one code after the other; then z, from 0 on, and the continuous codes by
    gradient. What training never drew is no face: |z| stays within sqrt(z_dim), its usual length,
    and continuous codes within [-1, 1]. To four decimals, as files of codes have them.
    """
    spec, wanted = model.spec, look(model, x.to(model.device))
    codes = guess._replace(z=torch.zeros_like(guess.z), c_cont=guess.c_cont.clamp(-1, 1))
    codes = tree_map(lambda c: c.to(model.device), codes)
    order = [*range(spec.n_cat)] * FIT_ROUNDS
    for i, k in enumerate(progress(order, "categories"), 1):
        every = spec.traverse(codes, f"cat{k}", range(spec.cat_dim))
        # z can turn the order of the last code's best ones: with it each is tried
        codes = nearest(model, every, wanted, N_FOLLOWED if i == len(order) else 1)
    adam = torch.optim.Adam([codes.z.requires_grad_(), codes.c_cont.requires_grad_()], FIT_RATE)
    for step in progress(range(FIT_STEPS), "z, cont"):
        adam.param_groups[0]["lr"] = FIT_RATE * min(1, 2 - 2 * step / FIT_STEPS)  # to rest
        infogan.descend(adam, misfit(model, codes, wanted).sum())
        with torch.no_grad():
            codes.c_cont.clamp_(-1, 1)
            codes.z.renorm_(2, 0, spec.z_dim**0.5)
    found = nearest(model, codes, wanted, 1)
    return tree_map(lambda c: c.detach().cpu().double().round(decimals=4).to(c.dtype), found)


def read(model: Model, args: Namespace) -> str:
    """A table of what Q reads from each picture; a file of what draws it; a sheet shows both.

    The files have the pictures' names, so only the same ones are read in their place.
    """
    spec, pixels, (size, channels, _) = model.spec, bytearray(), model.form
    of = ",".join(Path(path).stem for path in args.read)[:60]
    found_in, page = place(args, f"codes-{of}", ".csv"), f"read-{of}"
    for path in args.read:
        picture = infogan.read_picture(Path(path), *model.form)
        if picture.error:
            why = f"cannot be read as a picture ({type(picture.error).__name__})"
            raise UserError(f"--read {path}: {why}; --sort takes a folder")
        pixels += picture.pixels
    x = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, size, size, channels)
    (values, doubts), x = read_codes(model, x), to_floats(x)
    names = [os.path.basename(path) for path in args.read]
    table = [["Q alone", *names]]
    for code in args.codes:
        j = spec.names.index(code)
        form = "{:.0f} ({:.0%})" if j < spec.n_cat else "{:+.2f} ± {:.2f}"
        table.append([model.labels[code], *map(form.format, values[:, j], doubts[:, j])])
    print_table(table)
    claim(args.out)
    c_cat, c_cont = values.split([spec.n_cat, spec.n_cont], 1)
    z = args.base.z[:1].expand(len(x), -1)
    by_Q = hold(spec, Codes(z, c_cat.long(), c_cont), args.set)
    # find_codes follows N_FOLLOWED drawings of each picture: AT_ONCE together
    parts = torch.arange(len(x)).split(AT_ONCE // N_FOLLOWED)
    each = [find_codes(model, x[part], pick(by_Q, part)) for part in parts]
    found = hold(spec, gather(each), args.set)
    save_codes(found_in, names, found, spec)
    drawn = [draw(model, codes)[:, None] for codes in (by_Q, found)]
    posed = cross(model, found, "cont" if spec.n_cont else "z", args.base)
    title = "each picture; what Q alone makes of it; what is found; that face posed as seeds"
    above = ["picture", "Q alone", "found", *(f"as {seed}" for seed in args.faces)]
    shown = torch.cat([x[:, None], *drawn, posed], 1)
    save_sheet(args, page, title, names, shown, above)
    return f"{place(args, page)} shows them; for --start: {found_in}"


# for other programs -------------------------------------------------------------------------------


def folded(G: Generator) -> Iterator[tuple[Tensor, Tensor, int]]:
    """G's convolutions with batch norm in them: weights (inputs, outputs, k, k), biases, and 2
    where the input is doubled first, else 1.

    At the end, where G has them, CodeMaps: what each code adds at 8x8, before the same batch norm.
    """
    parts = [m for m in G.layers if [*m.parameters()]]  # a convolution, its batch norm, …
    pairs = [*zip_longest(parts[::2], parts[1::2])] + [(G.maps, parts[3])] * bool(G.maps)
    for conv, norm in pairs:
        weight, bias, twice = conv.weight, conv.bias, 1
        if conv is G.maps:
            weight = conv.kernel()
        if isinstance(conv, nn.Conv2d):
            weight = weight.transpose(0, 1)
        if isinstance(conv, infogan.UpsampleConv2d):
            weight, twice = weight.flip(2, 3), 2
        if norm:
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight, bias = weight * gain[:, None, None], norm.bias - gain * norm.running_mean
        yield weight, bias * (conv is not G.maps), twice  # the maps add to what has one


def typical(model: Model, codes: Codes) -> list[int]:
    """Which of the codes have the most typical pictures, the most typical first.

    Those whose N_NEAR nearest are near in the features that D and Q share, as in 1904.06991. D(x)
    would take broken faces: it is highest for what training has seldom shown to D.
    """
    h = in_parts(model, model.D.trunk, draw(model, codes)).flatten(1)
    h = h / h.std(0).clamp(min=1e-6)
    near = torch.cdist(h, h).sort(1).values[:, 1 : N_NEAR + 1].mean(1)
    return near.argsort()[:N_FACES].tolist()


def explorer(model: Model, args: Namespace) -> str:
    """One HTML file that draws by itself; opens on a typical face, or on --seeds or --start."""
    path = claim(args.out, f"explorer{args.unusual}.html")
    spec, rows = model.spec, figures(model, path.with_name("table.csv"))
    shown = [*range(len(args.numbers))] if args.chosen else typical(model, args.base)
    faces = pick(args.base, shown)
    values = torch.cat(faces[1:], 1).tolist()
    layers, weights, scales = [], [], []
    for weight, bias, twice in folded(model.G.cpu()):
        # 8 bits a weight, with a scale for each channel
        scale = weight.abs().amax((0, 2, 3)).clamp(min=1e-12) / 127
        weights.append((weight / scale[:, None, None]).round().to(torch.int8).flatten())
        scales += [scale, bias]
        layers.append([*weight.shape[:3], twice])
    data = {
        "title": f"{model.path.parent.name}/{model.path.name}, step {model.ckpt['step']:,}",
        "spec": vars(spec),
        "range": args.range,
        "set": args.set,
        "seeds": [] if args.start else [args.numbers[k] for k in shown],
        "tried": 0 if args.chosen else N_TRIED,
        "faces": [dict(zip(spec.names, row, strict=True)) for row in values],
        "layers": layers,
        "codes": [row._asdict() | {"name": model.names.get(row.code)} for row in rows],
        "z": faces.z.tolist(),
        "weights": base64.b64encode(torch.cat(weights).numpy()).decode(),
        "scales": base64.b64encode(torch.cat(scales).numpy()).decode(),
    }
    filled = json.dumps(data).replace("<", "\\u003c")  # a name must not end the script
    page = PAGE.read_text(encoding="utf-8").replace("data = null;", f"data = {filled};")
    write_file(path, page.encode())
    return f"{path} has {len(page) / 1e6:.1f} MB"


def onnx(model: Model, args: Namespace) -> str:
    """G as ONNX, from "codes" (n, spec.dim) to "x" (n, channels, size, size) in [-1, 1]."""
    spec, G = model.spec, model.G.cpu().to(memory_format=torch.contiguous_format)
    path = claim(args.out, "generator.onnx")
    try:
        program = torch.onnx.export(
            G,
            (torch.zeros(2, spec.dim),),
            input_names=["codes"],
            output_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    except ImportError as error:
        raise UserError("--onnx: needs `pip install onnx onnxscript`") from error
    proto = program.model_proto  # a new object
    proto.doc_string = (
        f"codes: z ({spec.z_dim}), {spec.n_cat} categoricals one-hot ({spec.cat_dim} each), "
        f"{spec.n_cont} continuous. x: from -1 to 1"
    )
    write_file(path, proto.SerializeToString())
    return f"{path} is written"


def shrink(model: Model, args: Namespace) -> str:
    """A checkpoint to share: what the loaders need, in half precision, with the codes' names."""
    ckpt, path = model.ckpt, Path(args.shrink)
    if path.exists():
        raise UserError(f"--shrink {path}: exists; give a new name")
    args_kept = ckpt["args"] | {"data": "", "out": "", "init": None}  # nobody else's business
    small = {"args": args_kept, "step": ckpt["step"], "names": model.names}
    for net in ("G_ema", "D"):  # vectors stay: they are small, and variances may be tiny
        small[net] = {k: w.half() if w.dim() > 1 else w for k, w in ckpt[net].items()}
    write_file(path, infogan.to_bytes(small | {"format": infogan.FORMAT}))
    return f"{path} has {path.stat().st_size / 1e6:.1f} MB"


# flags --------------------------------------------------------------------------------------------

# fmt: off
MODES = {  # by whom; what it writes, beside the checkpoint; the flags that it takes
"sheets": (sheets, "traversals", "out codes rows seed seeds start set range steps zoom gif names"),
"--explorer": (explorer, "traversals", "out seed seeds start set range names"),
"--walk": (walk, "traversals/walk{}.gif", "out rows seed seeds start set steps zoom"),
"--samples": (samples, "generated", "out seed seeds start set data"),
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
    ("--start", None, "FILE", "begin with faces that --read found: FILE, some of them: FILE:0,2"),
    ("--set", None, "LIST", "hold codes at values, such as cat0=3,cont5=-0.8"),
    ("--range", None, "V", "values of a continuous code (default -3 3; of up to 5: -1.5 1.5)"),
    ("--steps", 13, (2, 100), "columns of a continuous code's sheet; frames to the next face"),
    ("--zoom", 1, (1, 8), "enlarge sheets N times"),
    ("--gif", False, bool, "also write an animated GIF for each code"),
    ("--names", None, "FILE", "names for codes, JSON (default: names.json beside the checkpoint)"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
], "instead of sheets": [
    ("--explorer", False, bool, "write explorer.html, a page to move the codes"),
    ("--sort", None, "FOLDER", "sort real pictures by the codes that Q reads: a folder or mnist"),
    ("--samples", None, (0, MOST_SAMPLES), "write N PNGs, or one for each of --seeds; codes.csv"),
    ("--read", None, "PICTURE", "tell what Q reads from pictures; find codes that draw them"),
    ("--walk", False, bool, "write an animation that moves through the faces of the seeds"),
    ("--versus", None, "FILE", "compare with this checkpoint"),
    ("--data", None, "FOLDER", "real pictures: --versus compares both with them, --samples"
     " writes them too, as a run sees them, into OUT-real"),
    ("--onnx", False, bool, "write generator.onnx, for other runtimes"),
    ("--shrink", None, "FILE", "write a checkpoint in half precision, to share"),
]}
MORE = {  # of flags that are not one word with a default
"ckpt": {"required": True}, "samples": {"nargs": "?", "const": 0}, "read": {"nargs": "+"},
"range": {"nargs": 2, "type": partial(Parser.value, "range", (-1000.0, 1000.0)),
    "metavar": ("LOW", "HIGH")},
}
# fmt: on


def to_codes(flag: str, text: str | None, model: Model) -> dict[str, str]:
    """The codes in a list like "cat0=3, eyes close=1", with their values, "" where none is.

    In --codes a name stands for all codes that have it. Raises UserError for what is no code.
    """
    found, text = {}, (text or "").lower()
    called = {code: name.lower().replace(",", ";") for code, name in model.names.items()}
    for name in called.values():  # its commas would split it
        text = text.replace(name.replace(";", ","), name)
    for part in filter(None, map(str.strip, text.split(","))):
        word, _, value = map(str.strip, part.partition("="))
        codes = [word] if word in model.labels else [c for c in called if called[c] == word]
        part = part.replace(";", ",")
        if not codes or (value and flag == "--codes"):
            has = ", ".join(model.labels.values()) or "none"
            raise UserError(f"{flag}: {part!a}: this checkpoint has {has}")
        if flag == "--set" and len(codes) > 1:
            raise UserError(f"--set {part}: {' and '.join(codes)} have this name; give one of them")
        if flag == "--set" and codes[0] in found:
            raise UserError(f"--set {part}: {codes[0]} must be given once")
        found |= dict.fromkeys(codes, value)
    return found


def read_set(texts: dict[str, str], spec: CodeSpec) -> Held:
    """The codes of --set with their values. Raises UserError for one that does not fit."""
    held = {}
    for code, text in texts.items():
        is_cat = code.startswith("cat")
        limits = (0, spec.cat_dim - 1) if is_cat else (-1000.0, 1000.0)
        held[code] = Parser.value(f"set {code}", limits, text)
        if abs(held[code]) > 3 and not is_cat:
            print(f"--set {code}={text}: training has seen -1 to 1 only, pictures may fall apart")
    return held


def read_seeds(text: str, flag: str = "--seeds") -> list[int]:
    """The numbers of "3,17,40-49". Raises UserError where they are not different, or too many."""
    parts = [re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part) for part in text.split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in parts if m]
    n = sum(map(len, ranges))
    if not all([*parts, *ranges]) or n > MOST_SAMPLES or len({*chain(*ranges)}) < n:
        raise UserError(f"{flag} {text}: must be different numbers such as 3,17,40-49")
    return [*chain(*ranges)]


def read_start(text: str, spec: CodeSpec) -> tuple[list[str], Codes]:
    """The files and codes of what save_codes wrote, or of some rows: "codes.csv:0,2-4"."""
    path, some = re.fullmatch(r"(.+?)(?::([\d,\s-]+))?", text, re.S).groups()
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            head, *rows = csv.reader(file)
        if head != code_columns(spec):
            raise ValueError("it has other columns")
        rows = [rows[i] for i in read_seeds(some, "--start")] if some else rows
        values = torch.tensor([[*map(float, row[1:])] for row in rows])
        c_cat, c_cont, z = values.split([spec.n_cat, spec.n_cont, spec.z_dim], 1)
        codes = Codes(z, c_cat.long(), c_cont)
        spec.join(codes)  # fails for what is no category
        if not (values.abs() <= 1000).all() or not c_cat.equal(codes.c_cat.float()):  # NaN too
            raise ValueError("a value is out of range")
    except Exception as error:  # of any kind: the file is at fault
        must = "must be a codes*.csv by --read or --samples with this checkpoint, rows from 0"
        raise UserError(f"--start {text}: {must} ({error!s:.99})") from error
    return [row[0] for row in rows], codes


def choose_faces(spec: CodeSpec, args: Namespace) -> None:
    """Sets the faces to begin with: args.numbers (seeds, or places from 0), .faces (their labels)
    and .base (their codes). Raises UserError for too few or too many.
    """
    usual = {"--samples": args.samples, "--read": N_READ, "--explorer": N_TRIED}
    args.numbers = range(args.seed, args.seed + usual.get(args.mode, args.rows))
    if args.seeds:
        args.numbers = read_seeds(args.seeds)
    if args.start:
        args.faces, args.base = read_start(args.start, spec)
        args.numbers = range(len(args.faces))
    n, least = len(args.numbers), 1 + (args.mode == "--walk")
    most = MOST_SAMPLES if args.mode == "--samples" else 100
    if not least <= n <= most:
        raise UserError(f"{args.mode}: needs {least} to {most:,} faces, not {n:,}; see --seeds")
    if not args.start:
        args.faces = [f"seed {seed}" for seed in args.numbers]
        args.base = sample_seeds(spec, args.numbers, {})
    args.base = hold(spec, args.base, args.set)


def unusual(args: Namespace, usual_range: list[float]) -> str:
    """What sheets of other faces or values than usual have in their names: "-seeds-3,17".

    So that no call writes over the sheets of another that shows something else.
    """
    differs = {
        "seed": args.seed,
        "seeds": args.seeds,
        "start": args.start and ",".join(Path(face).stem for face in args.faces),
        "set": ",".join(f"{code}={v:g}" for code, v in args.set.items()),
        "range": args.range != usual_range and "{:g}-{:g}".format(*args.range),
    }
    text = "".join(f"-{flag}-{value}" for flag, value in differs.items() if value)
    safe = re.sub(r"[^\w.,=+-]", "", text)
    if args.start or len(safe) > 60:  # other pictures may have the same names
        safe = f"{safe[:50]}-{short_hash([*args.base, torch.tensor(args.range)])}"
    return safe


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags and the mode. Raises UserError for what is wrong or has no effect."""
    parser = Parser("generate.py", __doc__, FLAGS, MORE)
    given = vars(parser.parse_args(argv))
    args, given = Namespace(**parser.defaults | given), {f"--{name}" for name in given}
    args.mode, *others = [mode for mode in MODES if mode in given] or ["sheets"]
    if others:
        raise UserError(f"{' and '.join([args.mode, *others])}: only one of them at a time")
    for flag in sorted(given - {"--ckpt", "--device", args.mode}):
        users = [mode for mode, (*_, takes) in MODES.items() if flag[2:] in takes.split()]
        if args.mode not in users:
            raise UserError(f"{flag} has no effect on {args.mode}, only on {', '.join(users)}")
    if args.range and args.range[0] == args.range[1]:
        raise UserError("--range: must be two different numbers")
    if args.mode == "--walk" and args.out and not args.out.lower().endswith((".gif", ".webp")):
        raise UserError(f"--out {args.out}: must end with .gif or .webp")
    args.chosen = args.seeds or args.start
    ways = given & {"--seed", "--rows", "--seeds", "--start"}
    if args.chosen and (args.samples or len(ways) > 1):
        others = "--seed, --rows, N of --samples, and the other of --seeds and --start"
        raise UserError(f"{max(ways)}: chooses the faces, so leave out {others}")
    return args


def show(args: Namespace) -> int:
    """Writes what was asked for and says where it is."""
    write, folder, _ = MODES[args.mode]
    model = Model(args.ckpt, infogan.pick_device(args.device), args.names)
    spec, path = model.spec, model.path
    args.codes = [*to_codes("--codes", args.codes, model)] or spec.names
    args.set = read_set(to_codes("--set", args.set, model), spec)
    choose_faces(spec, args)
    usual = [-3.0, 3.0] if spec.n_cont > 5 else [-1.5, 1.5]
    args.range = args.range or usual
    args.unusual = unusual(args, usual)
    of = "" if path.name == "last.pt" else f"{path.stem}-"
    args.out = Path(args.out or path.parent / f"{of}{folder.format(args.unusual)}")
    # a GPU draws in full precision and always with the same kernels: on one device a seed is
    # always the same file, on others up to rounding
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        print(write(model, args))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix."""
    cure = "give --device cpu, or smaller --rows, --steps and --zoom"
    return infogan.run("generate.py", lambda: show(parse_args(argv)), cure)


if __name__ == "__main__":
    infogan.as_program(main)
