"""Measure from outside what each code of a checkpoint controls.

    python data/measure.py checkpoint/v3/last.pt                       effects, tint and MI
    python data/measure.py checkpoint/v3/last.pt --steps 0             the same without MI: sooner
    python data/measure.py checkpoint/demo/last.pt --faces data/drawn  also which factors Q found

effect     share of the pictures' variance that goes when only this code is fixed: 0 nothing, 1 all
edges      the same for edges, where tints and soft light do not count
coarse     the same for the picture averaged to 4x4: which colours are where
tint       share of a code's change that one map of colours per face explains: 1 for a tint of the
           whole picture, near 0 for a change of shape
MI         what a new Q reads of the code, in nats, from pictures that it never saw. It is trained
           here on the frozen generator and sees pictures behind noise: a code that hides in what
           nobody sees reads low. A continuous code that does nothing has -0.18, as Q's Gaussian
           cannot be uniform
shuffled   the same with the codes of other pictures. It must be 0 or below,
           else do not trust the MI; far below is normal

With --faces, for faces that data/draw_faces.py drew, as the run's own Q reads them:

NMI        I(code; factor) / H(factor) of the code that knows most; from 0.2 a factor is "found"
MIG        the gap in NMI between the two codes that know most, mean over factors (1802.04942)
FactorVAE  how often the code that varies least among faces tells which factor they share
           (1802.05983); 1 is best, chance is one in as many as there are factors
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generate import edge_map, effect, low_high, tint
from infogan import (
    Codes,
    CodeSpec,
    Parser,
    QOutput,
    UserError,
    as_program,
    load_encoder,
    load_generator,
    mutual_information,
    pick_device,
    replacing,
    run,
)

AT_ONCE = 100  # pictures that a network draws or reads: of 256x256 they still fit a small memory
N_TINTED = 400  # faces behind each code's tint
BINS = 20  # of equal number, that a continuous code or factor is cut into
FOUND = 0.2  # NMI from which a factor is found
VOTES, VOTERS = 2000, 64  # of the FactorVAE score: batches, and the faces of each

Draw = Callable[[Codes], Tensor]  # n codes to pictures (n, channels, size, size) in [-1, 1]

# effects ------------------------------------------------------------------------------------------

VIEWS = {"effect": Tensor.float, "edges": edge_map}
VIEWS["coarse"] = partial(F.adaptive_avg_pool2d, output_size=4)


def measure_effects(draw: Draw, spec: CodeSpec, n: int, rng: torch.Generator) -> dict[str, dict]:
    """The figure of every view for every part, from n pictures drawn again with that part new."""
    codes, other = spec.sample(n, rng), spec.sample(n, rng)
    x, rows = draw(codes), {}
    seen = {name: view(x) for name, view in VIEWS.items()}
    for part in [*(["z"] if spec.z_dim else []), *spec.kinds, *spec.names]:
        y = draw(spec.replace(codes, part, other))
        name = f"all {part}" if part in spec.kinds else part
        rows[name] = {name: effect(seen[name], view(y)) for name, view in VIEWS.items()}
    return rows


def measure_tints(draw: Draw, spec: CodeSpec, n: int, rng: torch.Generator) -> dict[str, float]:
    """The tint of each code: from -0.8 to 0.8, or from a category to another."""
    codes = spec.sample(n, rng)
    return {name: tint(*map(draw, low_high(spec, codes, name, rng))) for name in spec.names}


# mutual information -------------------------------------------------------------------------------


def new_q(spec: CodeSpec, channels: int, size: int, rng: torch.Generator) -> nn.Sequential:
    """Pictures (n, channels, size, size) to (n, spec.q_dim); shares nothing with the run's Q."""
    layers, now = [], channels
    for i in range(int(math.log2(size)) - 2):
        then = min(32 * 2**i, 256)
        layers += [nn.Conv2d(now, then, 4, 2, 1, bias=False), nn.BatchNorm2d(then)]
        layers, now = [*layers, nn.LeakyReLU(0.2)], then
    layers += [nn.Flatten(), nn.Linear(16 * now, 256, bias=False), nn.BatchNorm1d(256)]
    net = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Linear(256, spec.q_dim, bias=False))
    for weight in net.parameters():
        if weight.dim() > 1:  # PyTorch's start, from our chance; a larger one learns too slowly
            nn.init.kaiming_uniform_(weight, math.sqrt(5), generator=rng)
    return net


def measure_MI(
    draw: Draw, spec: CodeSpec, n: int, steps: int, noise: float, rng: torch.Generator, device: str
) -> tuple[Tensor, Tensor]:
    """(MI, shuffled): nats of each code in n new samples, by a Q trained for `steps` batches.

    Unlike the run's Q its sigma may fall below 0.1, down to 0.02: it asks what can be read at all.
    """
    Q = new_q(spec, *draw(spec.sample(1, rng)).shape[1:3], rng).to(device)

    def read(codes: Codes) -> QOutput:
        x = draw(codes)
        x = x + noise * torch.randn(x.shape, generator=rng)
        q = torch.cat([Q(part.to(device)) for part in x.split(AT_ONCE)]).cpu()
        logits, mu, logvar = q.split([spec.n_cat * spec.cat_dim, spec.n_cont, spec.n_cont], 1)
        return QOutput(logits.unflatten(1, (spec.n_cat, spec.cat_dim)), mu, logvar.clamp(-8, 4))

    adam = torch.optim.Adam(Q.parameters())
    for i in tqdm(range(steps), "a new Q", leave=False, disable=None):
        adam.param_groups[0]["lr"] = 1e-3 * (1 - i / steps)
        codes = spec.sample(64, rng)
        loss = -mutual_information(spec, read(codes), codes).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    Q.eval()
    codes = spec.sample(n, rng)
    with torch.no_grad():
        q = read(codes)
    others = Codes(*(c.roll(1, 0) for c in codes))
    return mutual_information(spec, q, codes), mutual_information(spec, q, others)


# factors ------------------------------------------------------------------------------------------


def labels_of(values: Tensor) -> Tensor:
    """Whole numbers (n,) from 0: which of few values, or which of BINS bins of equal number."""
    known, labels = values.unique(return_inverse=True)
    edges = values.quantile(torch.linspace(0, 1, BINS + 1)[1:-1])
    return labels if len(known) <= BINS else torch.searchsorted(edges, values.contiguous())


def alike(factor: Tensor) -> list[Tensor]:
    """For each value that enough faces share: which faces, (m,)."""
    faces = [(factor == value).nonzero()[:, 0] for value in factor.unique()]
    return [group for group in faces if len(group) >= VOTERS]


def read_factors(folder: Path) -> tuple[list[Path], dict[str, Tensor]]:
    """The faces' files, and the labels (n,) of each factor that varies."""
    table = folder / "factors.csv"
    if not table.is_file():
        how = "`python data/draw_faces.py data/drawn --n 6000` draws faces with one"
        raise UserError(f"--faces {folder}: has no factors.csv; {how}")
    try:
        with table.open(encoding="utf-8", newline="") as file:
            (_, *names), *rows = csv.reader(file)
        files, *columns = zip(*rows, strict=True)
        values = [torch.tensor([*map(float, column)]) for column in columns]
        factors = dict(zip(names, map(labels_of, values), strict=True))
    except (ValueError, csv.Error) as error:
        raise UserError(f"--faces {table}: not by data/draw_faces.py: {error}") from error
    factors = {name: labels for name, labels in factors.items() if labels.any()}
    if not any(map(alike, factors.values())):
        raise UserError(f"--faces {folder}: no factor has a value in {VOTERS} faces; draw more")
    return [folder / file for file in files], factors


@torch.no_grad()
def read_codes(
    Q: Callable, files: list[Path], channels: int, size: int, device: str
) -> tuple[Tensor, Tensor]:
    """The likeliest categories (n, n_cat) and the means (n, n_cont) that Q reads from faces."""
    read, mode = [], "L" if channels == 1 else "RGB"
    for i in range(0, len(files), AT_ONCE):
        x = []
        for path in files[i : i + AT_ONCE]:
            try:
                face = Image.open(path, formats=("PNG",)).convert(mode)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                why = getattr(error, "strerror", None) or error
                raise UserError(f"--faces {path}: {why}; draw the folder again") from error
            face = ImageOps.fit(face, (size, size), Image.Resampling.BILINEAR)  # as in training
            x.append(torch.frombuffer(bytearray(face.tobytes()), dtype=torch.uint8))
        pixels = torch.stack(x).view(-1, size, size, channels).permute(0, 3, 1, 2)
        p, mu, _ = Q(pixels.to(device) / 127.5 - 1)
        read.append((p.argmax(2).cpu(), mu.cpu()))
    cat, cont = map(torch.cat, zip(*read, strict=True))
    return cat, cont


def entropy(labels: Tensor) -> float:
    """H of labels (n,), in nats."""
    return torch.special.entr(labels.bincount() / len(labels)).sum().item()


def nmi(code: Tensor, factor: Tensor) -> float:
    """I(code; factor) / H(factor) of labels (n,)."""
    both = entropy(code * (factor.max() + 1) + factor)
    return (entropy(code) + entropy(factor) - both) / entropy(factor)


def factor_vae(cat: Tensor, cont: Tensor, factors: list[Tensor], rng: torch.Generator) -> float:
    """The score: half of the votes name each code's factor by majority, the others are checked."""

    def spread(faces: Tensor | slice) -> Tensor:
        """Of each code: a category's share of unequal pairs, a continuous one's variance."""
        shares, c = F.one_hot(cat[faces], dim).float().mean(0), cont[faces]
        return torch.cat([1 - shares.square().sum(1), (c - c.mean(0)).square().mean(0)])

    dim = int(cat.max()) + 1 if cat.numel() else 1
    whole, groups = spread(slice(None)), [known for known in map(alike, factors) if known]
    votes = torch.zeros(2, len(whole), len(groups))
    for i in range(VOTES):
        k = torch.randint(len(groups), (), generator=rng)
        group = groups[k][torch.randint(len(groups[k]), (), generator=rng)]
        some = group[torch.randperm(len(group), generator=rng)[:VOTERS]]
        share = torch.where(whole > 1e-6, spread(some) / whole, math.inf)  # dead codes have no vote
        votes[i % 2, share.argmin(), k] += 1
    right = votes[1].gather(1, votes[0].argmax(1, keepdim=True))
    return (right.sum() / votes[1].sum()).item()


def compare_factors(
    cat: Tensor, cont: Tensor, factors: dict[str, Tensor], names: list[str], rng: torch.Generator
) -> dict:
    """MIG, FactorVAE, and for each factor the best code and the NMI of all; codes are (n, …)."""
    codes, best, gaps = [*cat.T, *map(labels_of, cont.T)], {}, []
    for name, factor in factors.items():
        known = {code: nmi(labels, factor) for code, labels in zip(names, codes, strict=True)}
        first, second = sorted([*known.values(), 0.0])[:-3:-1]  # a single code has no rival
        best[name] = {"code": max(known, key=known.get), "NMI": first, "NMI of all": known}
        gaps.append(first - second)
    score = factor_vae(cat, cont, [*factors.values()], rng)
    found = sum(row["NMI"] >= FOUND for row in best.values())
    return {"MIG": sum(gaps) / len(gaps), "FactorVAE": score, "found": found, "factors": best}


# output -------------------------------------------------------------------------------------------


def print_codes(rows: dict[str, dict], means: dict[str, float]) -> None:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"{'code':8}" + "".join(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:8}" + "".join(f"{row[key]:10.3f}" for key in columns if key in row))
    for kind, mean in means.items():
        print(f"MI of each {kind}, mean: {mean:.2f} nats")


def print_factors(known: dict) -> None:
    print(f"\n{'factor':13}{'best code':>10}{'NMI':>10}")
    for name, row in known["factors"].items():
        print(f"{name:13}{row['code']:>10}{row['NMI']:10.3f}")
    told = f"MIG {known['MIG']:.3f}, FactorVAE {known['FactorVAE']:.3f}"
    print(f"{told}, {known['found']} of {len(known['factors'])} factors found")


def measure(args: argparse.Namespace) -> int:
    """Prints the tables, and writes their figures as JSON where asked."""
    device, path = str(pick_device(args.device)), Path(args.json) if args.json else None
    if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UserError(f"--json {path}: cannot be written; give a file in a folder of yours")
    G, spec = load_generator(args.ckpt, device)
    files, factors = read_factors(Path(args.faces)) if args.faces else ([], {})
    if files and not spec.names:
        raise UserError(f"--faces {args.faces}: this checkpoint has no codes to compare")

    @torch.no_grad()
    def draw(codes: Codes) -> Tensor:
        return torch.cat([G(part.to(device)).cpu() for part in spec.join(codes).split(AT_ONCE)])

    def chance() -> torch.Generator:  # one for each kind of figure: no flag changes another's
        return torch.Generator().manual_seed(args.seed)

    rows, means = measure_effects(draw, spec, args.n, chance()), {}
    for name, share in measure_tints(draw, spec, min(args.n, N_TINTED), chance()).items():
        rows[name]["tint"] = share
    if args.steps and spec.names:
        MI = measure_MI(draw, spec, args.n, args.steps, args.noise, chance(), device)
        for name, known, shuffled in zip(spec.names, *(t.tolist() for t in MI), strict=True):
            rows[name] |= {"MI": known, "shuffled": shuffled}
        each = {"cat": MI[0][: spec.n_cat], "cont": MI[0][spec.n_cat :]}
        means = {kind: known.mean().item() for kind, known in each.items() if len(known)}
    print_codes(rows, means)
    figures = {"flags": vars(args), "codes": rows, "mean MI": means}
    if files:
        channels, size = draw(spec.sample(1, chance())).shape[1:3]
        read = read_codes(load_encoder(args.ckpt, device)[0], files, channels, size, device)
        figures["faces"] = compare_factors(*read, factors, spec.names, chance())
        print_factors(figures["faces"])
    if path:
        with replacing(path) as file:
            file.write(json.dumps(figures, indent=2).encode() + b"\n")
    return 0


# fmt: off
FLAGS = {"measuring": [  # as in infogan.py
    ("--faces", None, "FOLDER", "also compare with drawn faces and their factors.csv"),
    ("--n", 2000, (2, 10**6), "samples behind every effect and MI"),
    ("--steps", 1500, (0, 10**6), "batches of 64 that train the new Q; 0: no MI"),
    ("--noise", 0.2, (0.0, 10.0), "standard deviation of noise on the pictures for the new Q"),
    ("--json", None, "FILE", "write the same figures there"),
    ("--seed", 0, (0, 2**63 - 1), "of all random numbers"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
]}
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises UserError in one line for what is out of range."""
    p = Parser("measure.py", __doc__, FLAGS, {})
    p.add_argument("ckpt", metavar="CKPT", help="such as checkpoint/v3/last.pt")
    return argparse.Namespace(**p.defaults | vars(p.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the user can fix."""
    return run("measure.py", lambda: measure(parse_args(argv)))


if __name__ == "__main__":
    as_program(main)
