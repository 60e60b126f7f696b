"""Draw cartoon anime faces from known factors: a data set that needs no download.

    python data/draw_faces.py OUT --n 5000 --size 64 --seed 0

writes OUT/000000.png, OUT/000001.png, ... (RGB) and OUT/factors.csv, one row per picture, so that
learned codes can be compared with the truth. All factors are independent and uniform, nothing else
varies, and face i depends only on the seed and i:

    hair_colour 0..9, hair_style 0..5, eye_colour 0..9, background 0..5, blush 0..1
                  categories, named in HAIR_COLOURS, HAIR_STYLES, EYE_COLOURS, BACKGROUNDS
    tilt          -1..1   head leaning to the left .. right of the picture, up to 20 degrees
    x, y          -1..1   figure to the left .. right by 8 %, up .. down by 6 % of the picture
    eye_openness  -1..1   nearly shut .. wide open
    gaze          -1..1   looking to the left .. right of the picture
    mouth         -1..1   frown .. neutral (0) .. open smile
    skin          -1..1   slightly lighter .. slightly darker

With --only tilt,mouth those alone vary and the others stay 0: as many factors as a model has codes.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

Colour = tuple[int, ...]
Points = list[tuple[float, float]]

# Hair colours are at least 100 apart (RGB): of two that are close, one category takes both.
# fmt: off
HAIR_COLOURS: dict[str, Colour] = {
    "black": (28, 28, 44), "brown": (140, 92, 50), "blond": (250, 222, 118), "red": (226, 40, 58),
    "pink": (246, 132, 182), "orange": (246, 138, 44), "green": (98, 186, 108),
    "blue": (60, 126, 224), "purple": (158, 88, 206), "silver": (214, 222, 232),
}
EYE_COLOURS: dict[str, Colour] = {
    "brown": (132, 76, 40), "amber": (238, 168, 30), "red": (214, 40, 50),
    "pink": (244, 104, 170), "purple": (140, 70, 210), "blue": (40, 96, 226),
    "cyan": (40, 186, 226), "green": (40, 166, 76), "lime": (160, 206, 40),
    "grey": (124, 132, 146),
}
BACKGROUNDS: dict[str, Colour] = {
    "rose": (255, 218, 224), "peach": (255, 230, 204), "lemon": (252, 246, 200),
    "mint": (208, 240, 218), "sky": (206, 230, 250), "lilac": (228, 218, 248),
}
WHITE, INK, RIBBON = (255, 255, 255), (52, 30, 56), (226, 66, 84)
# Outlines as "x y  x y ...": a point of the outline, then the control point of the quadratic curve
# to the next one, and so on. 99 units are half the picture, the origin is between the eyes, y down.
# An outline that begins with "|" is a left half, from the middle above to the middle below.
FACE = "| 0 -50  -44 -50  -53 -6  -55 24  -43 42  -24 63  0 67"
BODY = "| 0 74  -14 78  -22 80  -62 84  -74 130  -74 150  0 150"
COLLAR = "| 0 108  -14 94  -20 74  -34 78  -50 84  -46 100  -30 122  -10 122  0 108"
BOW = "| 0 101  -10 96  -22 94  -26 106  -22 120  -10 114  0 110"
SHINE = ("-50 -38  -42 -56  -24 -62  -8 -66  10 -65  38 -64  50 -38  42 -50  34 -52  28 -46  "
         "22 -54  14 -56  8 -50  0 -57  -10 -57  -14 -50  -24 -52  -40 -50")
CAP = "| 0 -84  -34 -85  -53 -63  -69 -42  -69 -6  "
# Each style: behind the head in shade, in front of the face, then any tails behind the head.
HAIR: dict[str, list[str]] = {
    "short": [
        CAP + "-68 24  -56 40  -40 40  0 40",
        "0 -84  -34 -85  -53 -63  -69 -42  -69 -6  -66 14  -56 26  -52 8  -51 -12  -46 -20  "
        "-38 -34  -38 -14  -44 0  -18 -10  0 -36  2 -16  -8 0  24 -8  34 -30  38 -14  50 -4  "
        "51 10  56 26  66 14  69 -6  69 -42  53 -63  34 -85",
        "-4 -80  -16 -94  2 -100  -4 -92  8 -80  2 -80"],
    "long": [
        CAP + "-88 60  -84 150  0 150",
        CAP + "-74 40  -72 100  -62 80  -58 40  -56 10  -51 -14  -48 -6  -42 -5  -32 -2  "
        "-27 -5  -27 -14  -26 -20  -24 -8  -22 -4  -12 -2  -2 -4  -1 -14  0 -22"],
    "twin tails": [
        CAP + "-66 30  -40 40  -20 40  0 40",
        CAP + "-70 24  -58 48  -54 20  -51 -10  -46 -24  -38 -32  -38 -12  -28 -2  -8 -12  0 -42",
        "-58 -46  -104 -72  -100 -4  -98 40  -76 94  -78 70  -68 62  -60 20  -62 -10  -58 -30",
        "58 -46  104 -72  100 -4  98 40  76 94  78 70  68 62  60 20  62 -10  58 -30"],
    "bob": [
        CAP + "-90 26  -76 62  -60 74  -36 70  -10 70  0 60",
        CAP + "-84 24  -68 60  -54 62  -44 52  -60 24  -51 -12  -26 -2  0 -4"],
    "spiky": [
        "| 0 -60  -60 -60  -60 10  -60 40  -40 46  -20 40  0 40",
        "-55 30  -64 30  -76 32  -72 16  -70 4  -80 4  -92 -2  -80 -14  -74 -28  -82 -38  "
        "-90 -56  -74 -56  -60 -62  -62 -76  -58 -92  -42 -86  -26 -80  -18 -90  -2 -98  2 -86  "
        "14 -80  30 -86  50 -94  48 -80  48 -68  64 -68  84 -66  76 -50  71 -34  80 -26  92 -16  "
        "80 -4  70 2  72 16  78 30  66 30  55 30  54 8  51 -14  46 -6  38 4  34 -10  30 -30  "
        "26 -10  14 8  8 -10  6 -32  0 -10  -18 6  -18 -12  -22 -30  -28 -8  -40 4  -46 -6  "
        "-51 -14  -54 8"],
    "ponytail": [
        CAP + "-66 30  -40 40  -20 40  0 40",
        "0 -84  -34 -85  -53 -63  -69 -42  -69 -6  -68 34  -58 52  -54 24  -52 -6  -40 -12  "
        "-24 -46  -4 -8  48 -4  53 14  58 36  68 20  69 -6  69 -42  53 -63  34 -85",
        "34 -66  56 -108  86 -72  108 -30  92 16  86 44  98 66  68 54  66 14  66 -44"],
}
TIES = {"twin tails": [(-64, -36), (64, -36)], "ponytail": [(48, -66)]}
STRANDS = ["-8 -82  -34 -74  -44 -48  -34 -74", "8 -82  34 -74  44 -48  34 -74",
           "-57 -30  -66 0  -62 26  -66 0", "57 -30  66 0  62 26  66 0"]
HAIR_STYLES = tuple(HAIR)
CHUNK = 250  # faces a process draws at a time
FACTORS: dict[str, int | None] = {
    "hair_colour": len(HAIR_COLOURS), "hair_style": len(HAIR),
    "eye_colour": len(EYE_COLOURS), "background": len(BACKGROUNDS), "blush": 2,
    **dict.fromkeys(("tilt", "x", "y", "eye_openness", "gaze", "mouth", "skin")),
}
# fmt: on


def sample_factors(rng: random.Random) -> dict[str, int | float]:
    """Draw every factor: a category 0..k-1, or uniform in [-1, 1] with 4 decimals."""
    return {
        # Rounded here, not in the CSV, so that a row redraws its picture exactly.
        name: rng.randrange(k) if k else round(rng.uniform(-1, 1), 4)
        for name, k in FACTORS.items()
    }


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """a with the given share (0..1) of b."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


@functools.cache
def path(outline: str) -> Points:
    """Points along an outline (see FACE), 8 for each curve."""
    values = [float(v) for v in outline.strip("|").split()]
    knots = list(zip(values[::2], values[1::2], strict=True))
    if outline.startswith("|"):
        knots += [(-x, y) for x, y in knots[-2:0:-1]]
    points: Points = []
    for k in range(0, len(knots), 2):
        (x0, y0), (x1, y1), (x2, y2) = knots[k], knots[k + 1], knots[(k + 2) % len(knots)]
        for t in (j / 8 for j in range(8)):
            a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
            points.append((a * x0 + b * x1 + c * x2, a * y0 + b * y1 + c * y2))
    return points


def oval(x: float, y: float, rx: float, ry: float) -> Points:
    """24 points of an ellipse round (x, y)."""
    turns = [math.tau * k / 24 for k in range(24)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in turns]


class Drawing:
    """A face in the making: its factors, its colours and the picture so far."""

    def __init__(self, factors: dict[str, int | float], size: int):
        self.factors = factors
        self.style = HAIR_STYLES[int(factors["hair_style"])]
        self.paper = list(BACKGROUNDS.values())[int(factors["background"])]
        self.iris = list(EYE_COLOURS.values())[int(factors["eye_colour"])]
        self.hair = list(HAIR_COLOURS.values())[int(factors["hair_colour"])]
        self.hair_dark, self.hair_line = mix(self.hair, INK, 0.32), mix(self.hair, INK, 0.62)
        self.skin = mix((255, 231, 212), (242, 200, 168), (factors["skin"] + 1) / 2)
        self.skin_dark = mix(self.skin, (214, 120, 110), 0.35)
        self.skin_line = mix(self.skin, (120, 50, 50), 0.7)

        self.scale = max(3, math.ceil(256 / size))  # drawn larger, then reduced: smooth edges
        half = size * self.scale / 2
        self.unit = half / 99
        self.image = Image.new("RGB", (size * self.scale, size * self.scale), self.paper)
        self.pen = ImageDraw.Draw(self.image)
        self.left = half * (1 + 0.16 * factors["x"])
        self.top = half * (1.06 + 0.12 * factors["y"])
        tilt = math.radians(20 * factors["tilt"])
        self.cos, self.sin = self.unit * math.cos(tilt), self.unit * math.sin(tilt)

    def head(self, points: Points) -> Points:
        """Where points of the head, which is tilted, are in the picture."""
        cos, sin = self.cos, self.sin
        return [(self.left + cos * x - sin * y, self.top + sin * x + cos * y) for x, y in points]

    def body(self, points: Points) -> Points:
        """Where points of the body, which stays upright, are in the picture."""
        return [(self.left + self.unit * x, self.top + self.unit * y) for x, y in points]

    def line(self, points: Points, colour: Colour, width: float = 2.6) -> None:
        self.pen.line(points, colour, max(1, round(width * self.unit)))

    def fill(self, points: Points, colour: Colour, edge: Colour | None = None) -> None:
        self.pen.polygon(points, colour)
        if edge:
            self.line(points + points[:2], edge)

    def draw_background(self) -> None:
        half = self.image.width / 2
        box = [half * k for k in (0.16, 0.16, 1.84, 1.84)]
        self.pen.ellipse(box, mix(self.paper, WHITE, 0.55))

    def draw_hair_behind(self) -> None:
        """The hair behind the head, and its tails with their ribbons."""
        behind, _, *tails = map(path, HAIR[self.style])
        self.fill(self.head(behind), self.hair_dark, self.hair_line)
        for tail in tails:
            self.fill(self.head(tail), self.hair, self.hair_line)
        for x, y in TIES.get(self.style, ()):
            self.fill(self.head(oval(x, y, 8, 10)), RIBBON, mix(RIBBON, INK, 0.5))

    def draw_body(self) -> None:
        self.fill(self.body(path(BODY)), (250, 250, 255), INK)
        neck = self.head([(-15, 40), (15, 40)]) + self.body([(17, 84), (0, 100), (-17, 84)])
        self.fill(neck, self.skin_dark)
        self.fill(self.body(path(COLLAR)), (70, 84, 140), INK)
        self.fill(self.body(path(BOW)), RIBBON, mix(RIBBON, INK, 0.5))

    def draw_head(self) -> None:
        """Ears, face, cheeks and nose."""
        for side in (-1, 1):
            self.fill(self.head(oval(54 * side, 16, 8, 13)), self.skin, self.skin_line)
        self.fill(self.head(path(FACE)), self.skin, self.skin_line)
        if self.factors["blush"]:
            for side in (-1, 1):
                cheek = self.head(oval(34 * side, 37, 10, 6))
                self.fill(cheek, mix(self.skin, (255, 100, 115), 0.5))
        self.fill(self.head([(-1, 33), (3, 38), (-2, 38)]), self.skin_dark)

    def draw_mouth(self) -> None:
        mouth = self.factors["mouth"]
        smile, wide = max(0.0, mouth), 13 + 7 * abs(mouth)
        arc = [(t / 6, 1 - (t / 6) ** 2) for t in range(-6, 7)]
        lip = [(wide * t, 49 + 12 * mouth * (b - 0.6) - 4 * smile) for t, b in arc]
        jaw = [(x * 0.96, y + 15 * smile * b) for (x, y), (_, b) in zip(lip, arc, strict=True)]
        self.fill(self.head(lip + jaw[::-1]), (168, 44, 62))
        for edge in (lip, jaw):
            self.line(self.head(edge), self.skin_line, 3.2)

    def draw_hair(self) -> None:
        """The hair in front of the face, and the shadow of its fringe."""
        front = path(HAIR[self.style][1])
        # of the fringe alone: below and beside it there is no face to throw a shadow on
        shadow = [(x, y + 5 if y < 20 and abs(x) < 52 else y) for x, y in front]
        self.fill(self.head(shadow), self.skin_dark)
        self.fill(self.head(front), self.hair, self.hair_line)
        for strand in STRANDS:
            self.line(self.head(path(strand)), self.hair_dark, 2)
        self.fill(self.head(path(SHINE)), mix(self.hair, WHITE, 0.42))

    def draw_eye(self, side: int) -> None:
        """The left eye (side -1) or the right one (1), with its lashes and its brow."""
        middle, wake = 27 * side, (self.factors["eye_openness"] + 1) / 2
        rise, drop, level = 33 * wake**0.7 - 5, 9 + 4 * wake, 16 - 3 * wake

        def lids(x: float) -> tuple[float, float]:
            """How high the upper and the lower lid are at x."""
            bulge = 1 - min(1, abs(x - middle) / 20) ** 2.5
            base = level + (x - middle) * side / 9
            return base - rise * bulge, base + drop * bulge

        def between_lids(points: Points, colour: Colour) -> None:
            inside = [(max(middle - 20, min(middle + 20, x)), y) for x, y in points]
            inside = [(x, max(lids(x)[0], min(lids(x)[1], y))) for x, y in inside]
            self.fill(self.head(inside), colour)

        at = middle + 9 * self.factors["gaze"]
        between_lids(oval(middle, 13, 60, 60), WHITE)
        between_lids(oval(at, 11, 14, 20), mix(self.iris, INK, 0.5))
        between_lids(oval(at, 14, 12, 16), self.iris)
        between_lids(oval(at, 22, 9, 7), mix(self.iris, WHITE, 0.5))
        between_lids(oval(at, 11, 5.5, 8), mix(self.iris, INK, 0.85))  # the pupil
        between_lids(oval(at - 6, 3, 5, 5.5), WHITE)
        between_lids(oval(at + 6, 21, 2.5, 3), WHITE)
        steps = [t / 8 for t in range(-8, 9)]
        upper = [(middle + 20 * t, lids(middle + 20 * t)[0]) for t in steps]
        lash = [(x + 3 * t, y - 4.5 - t * side) for (x, y), t in zip(upper, steps, strict=True)]
        self.fill(self.head(upper + lash[::-1]), INK)
        lower = [(x, lids(x)[1]) for x, _ in upper[4:13]]
        self.line(self.head(lower), mix(self.skin_line, INK, 0.3), 2)
        brow = [(middle + 14 * t, -30 - 6 * wake + 3 * t * t + 2 * t * side) for t in steps[::2]]
        self.line(self.head(brow), self.hair_line, 3.4)


def draw_face(factors: dict[str, int | float], size: int = 64) -> Image.Image:
    """Draw the face with a value for each of FACTORS: an RGB picture of size x size pixels."""
    drawing = Drawing(factors, size)
    drawing.draw_background()
    drawing.draw_hair_behind()
    drawing.draw_body()
    drawing.draw_head()
    drawing.draw_mouth()
    drawing.draw_hair()
    for side in (-1, 1):
        drawing.draw_eye(side)
    return drawing.image.reduce(drawing.scale)


def face(i: int, seed: int, only: Sequence[str]) -> tuple[str, dict[str, int | float]]:
    """File name and factors of face i; those not in `only` are 0."""
    factors = sample_factors(random.Random(f"{seed} {i}"))
    return f"{i:06d}.png", {k: v if k in only else 0 for k, v in factors.items()}


def table_lines(n: int, seed: int, only: Sequence[str] = tuple(FACTORS)) -> Iterator[str]:
    """The lines of factors.csv, header first."""
    yield ",".join(["file", *FACTORS]) + "\n"
    for i in range(n):
        name, factors = face(i, seed, only)
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in factors.values()]
        yield ",".join([name, *cells]) + "\n"


def picture(i: int, seed: int, size: int, only: Sequence[str]) -> tuple[str, bytes]:
    """File name and contents of face i."""
    name, factors = face(i, seed, only)
    data = io.BytesIO()
    draw_face(factors, size).save(data, "PNG")
    return name, data.getvalue()


def draw_chunk(start: int, out: Path, n: int, seed: int, size: int, only: Sequence[str]) -> None:
    """Write faces start .. start + CHUNK - 1, as far as they are below n."""
    for i in range(start, min(start + CHUNK, n)):
        name, data = picture(i, seed, size, only)
        (out / name).write_bytes(data)


def draw_folder(out: Path, n: int, seed: int, size: int, only: Sequence[str], workers: int) -> bool:
    """Fill the folder; False if it holds this very drawing already. OSError if it cannot be."""
    out.mkdir(parents=True, exist_ok=True)
    table, draft = out / "factors.csv", out / "factors.csv.part"
    names = {p.name for p in out.iterdir() if p.name[0] != "."}
    old_pictures = {name for name in names if re.fullmatch(r"\d{6,7}\.png", name)}
    if table.name in names:
        with table.open(encoding="utf-8", errors="replace", newline="") as old:
            if any(a != b for a, b in zip_longest(old, table_lines(n, seed, only))):
                raise FileExistsError("its factors.csv is of another set; give another folder")
        last, data = picture(n - 1, seed, size, only)
        same = len(old_pictures) == n and last in old_pictures
        if same and (out / last).read_bytes() == data:
            return False
    marks = names & {table.name, draft.name}
    if names != marks | (old_pictures if marks else set()):
        raise FileExistsError("it holds files that this script did not draw; give another folder")
    # The draft marks the folder as ours, should the drawing be interrupted; factors.csv, gone until
    # the last picture is there, marks it as complete.
    with draft.open("w", encoding="utf-8", newline="") as new:
        new.writelines(table_lines(n, seed, only))
    table.unlink(missing_ok=True)
    for name in old_pictures:
        (out / name).unlink()
    print(f"drawing {n} faces into {out}", flush=True)
    draw = functools.partial(draw_chunk, out=out, n=n, seed=seed, size=size, only=only)
    starts = range(0, n, CHUNK)
    workers = min(workers, len(starts), 61)  # 61: the most that Windows can wait for
    bar = functools.partial(tqdm, desc="parts", total=len(starts), leave=False, disable=None)
    if workers == 1:
        list(bar(map(draw, starts)))
    else:
        with ProcessPoolExecutor(workers) as pool:
            list(bar(pool.map(draw, starts)))
    os.replace(draft, table)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw cartoon anime faces from known factors.")
    parser.print_usage = lambda *_: None  # an error is one line
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to fill, made if missing")
    parser.add_argument("--n", type=int, default=5000, help="faces, 1..10000000 (default 5000)")
    parser.add_argument("--size", type=int, default=64, help="pixels, 16..1024 (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="any whole number (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, 1..")
    parser.add_argument("--only", metavar="NAMES", help="factors that vary (default: all)")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(FACTORS)
    if unknown := set(args.only) - set(FACTORS):
        parser.error(f"--only: no factor is named {min(unknown)}; there are {', '.join(FACTORS)}")
    for name, low, high in (("n", 1, 10_000_000), ("size", 16, 1024), ("workers", 1, math.inf)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must be in {low}..{high}, not {getattr(args, name)}")
    start = time.perf_counter()
    try:
        drawn = draw_folder(**vars(args))
    except OSError as error:
        parser.error(f"cannot draw into {args.out}: {error.strerror or error}")
    faces = f"{args.n} faces of {args.size}x{args.size} pixels"
    if drawn:
        print(f"drew {faces} into {args.out} in {time.perf_counter() - start:.1f} s")
    else:
        print(f"{args.out} already holds these {faces}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
