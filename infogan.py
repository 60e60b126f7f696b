"""InfoGAN in one file: a GAN whose codes mean something, learned without labels.

Chen et al. 2016, arXiv:1606.03657. The generator G draws a picture x = G(z, c) from noise z and a
code c, the discriminator D tells it from real pictures, and a head Q on D's trunk must read c back
from x. L_I is a lower bound of the mutual information I(c; x) (Eqs. 5 and 6):

    min over G and Q, max over D:  V(D, G) - lambda L_I(G, Q),   L_I(G, Q) = E[log Q(c|x)] + H(c)

    python infogan.py --data ~/faces                          any folder of pictures
    python infogan.py --n-cat 10 --n-cont 20 --epochs 360     the third version, on data/anime
    python infogan.py --data mnist --n-cat 1 --n-cont 2       digits, downloaded by torchvision
    python infogan.py --data ~/faces --image-size 32 --width 32 --max-minutes 20    on a laptop
    python infogan.py --recipe notebook --out checkpoint/notebook    to compare with
    python generate.py --ckpt checkpoint/cat1-cont2/last.pt   look at what each code does
The same command given again resumes the run.

What the default adds to the paper; `--recipe notebook` leaves it out:
    --shift         D sees shifted pictures, so it does not remember the set (2006.10738)
    --lam-identity  pictures of the same categories have the same colours in the same places
    --cap-cont      G is not rewarded for codes that Q already reads well
    --r1            a penalty on D's gradient, so it does not win (1801.04406)
    --ema           what is shown and saved is an average of G's weights (2312.02696)
    --upsample      nearest neighbours and 3x3 convolutions in G, not transposed ones

Sections, the paper first (search for "# step ---"): limits, codes, networks, objective, step; then
device, pictures, checkpoint, run folder, display, train, flags, program.
Left out on purpose: labels, learning-rate schedules, growing networks, several GPUs, configs.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace
from argparse import RawDescriptionHelpFormatter as RawHelp
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import count, cycle
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

if __name__ == "__main__":  # Ctrl-C while torch is loading, which takes a second: no traceback
    sys.excepthook = lambda kind, *e: kind is KeyboardInterrupt or sys.__excepthook__(kind, *e)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# limits -------------------------------------------------------------------------------------------

# what a flag, or a checkpoint from a stranger, may ask for: a range, or a list of choices
LIMITS = {"n_cat": (0, 64), "cat_dim": (2, 1000), "n_cont": (0, 256), "z_dim": (0, 10_000)}
LIMITS |= {"image_size": [16, 32, 64, 128, 256], "width": (1, 1024), "channels": [1, 3]}
LIMITS |= {"upsample": ["nearest", "transposed"], "cont_at": [8, 4]}
SHAPE = tuple(LIMITS)  # the flags that decide the networks


class UserError(Exception):
    """What the user can fix, in one line: what is wrong, where, what to do."""

    code = 2  # of the program's exit


class Diverged(UserError):
    """The training itself went wrong: NaN, infinity, or a loss far too large."""

    code = 1


def check_limits(values: dict, limits: dict = LIMITS) -> None:
    """Raises UserError when a value that is named in limits has another type or lies outside."""
    for name, allowed in limits.items():
        low, high = allowed[0], allowed[-1]
        value, kind = values.get(name, low), "a whole number" if type(low) is int else "a number"
        fits, must = type(value) is type(low), f"{kind} from {low} to {high}"
        if isinstance(allowed, list):
            fits, must = fits and value in allowed, " or ".join(map(str, allowed))
        elif fits:
            fits = low <= value <= high
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {must}")


# codes --------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """What G draws n pictures from."""

    z: Tensor  # (n, z_dim), N(0, 1): noise, what no code controls
    c_cat: Tensor  # (n, n_cat), whole numbers from 0 to cat_dim - 1
    c_cont: Tensor  # (n, n_cont), uniform in [-1, 1]


class QOutput(NamedTuple):
    """Q(c|x) for n pictures: a distribution over each code."""

    q_logits: Tensor  # (n, n_cat, cat_dim)
    q_mu: Tensor  # (n, n_cont)
    q_logvar: Tensor  # (n, n_cont)


SIGMA_MIN = 0.1  # of Q's Gaussian: without it Q is paid for differences that nobody sees


@dataclass(frozen=True)
class CodeSpec:
    """How many codes of which kind (paper, section 4). Raises UserError outside LIMITS."""

    n_cat: int = 1
    cat_dim: int = 10
    n_cont: int = 2
    z_dim: int = 100

    def __post_init__(self) -> None:
        check_limits(asdict(self))
        if not self.dim:
            raise UserError("--z-dim 0: without codes G needs noise, give --z-dim 100")

    @property
    def dim(self) -> int:
        """Width of G's input."""
        return self.z_dim + self.n_cat * self.cat_dim + self.n_cont

    @property
    def q_dim(self) -> int:
        """Width of Q's output: logits, means, variances."""
        return self.n_cat * self.cat_dim + 2 * self.n_cont

    @property
    def names(self) -> list[str]:
        """cat0, cat1, …, cont0, cont1, …: the order of all figures per code."""
        return [f"cat{k}" for k in range(self.n_cat)] + [f"cont{j}" for j in range(self.n_cont)]

    @property
    def kinds(self) -> dict[str, slice]:
        """ "cat" and "cont" where there are any: their places in the figures per code."""
        places = {"cat": slice(self.n_cat), "cont": slice(self.n_cat, None)}
        return {kind: place for kind, place in places.items() if self.names[place]}

    @property
    def ceilings(self) -> list[float]:
        """The most that L_I can reach, in nats: H(c), or log 2 plus log of Q's peak."""
        narrowest = math.log(2) - math.log(SIGMA_MIN * math.sqrt(2 * math.pi))
        return [math.log(self.cat_dim)] * self.n_cat + [narrowest] * self.n_cont

    def sample(self, n: int, rng: torch.Generator) -> Codes:
        """n draws of z and c, on the generator's device."""
        at = {"generator": rng, "device": rng.device}
        z, c_cont = torch.randn(n, self.z_dim, **at), torch.rand(n, self.n_cont, **at) * 2 - 1
        return Codes(z, torch.randint(self.cat_dim, (n, self.n_cat), **at), c_cont)

    def join(self, codes: Codes) -> Tensor:
        """(n, dim), what G takes: z, the categoricals one-hot, the continuous codes."""
        one_hot = F.one_hot(codes.c_cat, self.cat_dim).flatten(1)
        return torch.cat([codes.z, one_hot, codes.c_cont], 1)

    def split(self, q: Tensor) -> QOutput:
        """Q's raw output (n, q_dim) as a distribution, sigma between SIGMA_MIN and 1."""
        logits, mu, raw = q.split([self.n_cat * self.cat_dim, self.n_cont, self.n_cont], 1)
        variance = SIGMA_MIN**2 + (1 - SIGMA_MIN**2) * raw.sigmoid()
        return QOutput(logits.unflatten(1, (self.n_cat, self.cat_dim)), mu, variance.log())

    def replace(self, codes: Codes, name: str, other: Codes) -> Codes:
        """codes with one code ("cat0") or group ("z", "cat", "cont") taken from other."""
        kind = name.rstrip("0123456789")
        part, number = {"z": "z", "cat": "c_cat", "cont": "c_cont"}[kind], name[len(kind) :]
        columns = [int(number)] if number else slice(None)
        changed = getattr(codes, part).clone()
        changed[:, columns] = getattr(other, part)[:, columns]
        return codes._replace(**{part: changed})

    def traverse(self, codes: Codes, name: str, values: Sequence[float]) -> Codes:
        """Each of n codes len(values) times, one code or group set to every value in turn."""
        rows = Codes(*(c.repeat_interleave(len(values), 0) for c in codes))
        every = torch.tensor(values).repeat(len(codes.z))[:, None]
        return self.replace(rows, name, Codes(*(every.to(c).expand_as(c) for c in rows)))


# networks -----------------------------------------------------------------------------------------

Q_HIDDEN = 256


def layer_widths(image_size: int, width: int) -> list[int]:
    """Channels after each halving of image_size down to 4; at 64, width 64: 64, 128, 256, 512."""
    return [width * min(2**i, 8) for i in range(int(math.log2(image_size)) - 2)]


def flatten_hwc(x: Tensor) -> Tensor:
    """(n, channels, h, w) as (n, h w channels): a view where the layout is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1)


class Conv2dToPixel(nn.Conv2d):
    """A convolution as large as its input: a matrix product, five times as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(flatten_hwc(x), flatten_hwc(self.weight), self.bias)[:, :, None, None]


class ConvTranspose2dFromPixel(nn.ConvTranspose2d):
    """A transposed convolution whose input is one pixel (n, channels, 1, 1): the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) @ flatten_hwc(self.weight)
        return y.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)


class UpsampleConv2d(nn.Conv2d):
    """Nearest neighbours to twice the size, then a 3x3 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.folded(), self.bias, stride=2, padding=1)

    def folded(self) -> Tensor:
        """Both as one transposed convolution (4, 2, 1): a 4x4 kernel (in, out, 4, 4), as fast."""
        # a pixel that is doubled meets the sum of the kernel's weights in each 2x2 window
        kernel = 4 * F.avg_pool2d(F.pad(self.weight, [1] * 4), 2, 1)
        return kernel.flip(2, 3).transpose(0, 1)


class CodeMaps(ConvTranspose2dFromPixel):
    """The sum over k of c_k U_k, with a learned map U_k (channels, size, size) for each code.

    U_k has mean 0 in each channel, so a code moves and reshapes, and does not tint (after
    EigenGAN, 2104.12476).
    """

    def forward(self, c: Tensor) -> Tensor:
        y = super().forward(c)
        return y - y.mean((2, 3), keepdim=True)


class Generator(nn.Module):
    """x = G(z, c): (n, spec.dim) to (n, channels, size, size) in [-1, 1].

    upsample "nearest": UpsampleConv2d; "transposed": transposed convolutions (DCGAN, 1511.06434).
    cont_at 8: the continuous codes enter at the 8x8 layer, by CodeMaps; 4: at the first, as z does.
    """

    def __init__(
        self,
        spec: CodeSpec,
        image_size: int = 64,
        width: int = 64,
        channels: int = 3,
        upsample: str = "nearest",
        cont_at: int = 8,
    ):
        super().__init__()
        check_limits({"image_size": image_size, "width": width, "channels": channels})
        widths = layer_widths(image_size, width)[::-1]
        double = {"nearest": (UpsampleConv2d, 3, 1, 1), "transposed": (nn.ConvTranspose2d, 4, 2, 1)}
        conv, *shape = double[upsample]
        self.spec = spec
        n_maps = spec.n_cont if cont_at == 8 and spec.dim > spec.n_cont else 0
        layers = [ConvTranspose2dFromPixel(spec.dim - n_maps, widths[0], 4, bias=False)]
        for n_in, n_out in zip(widths, [*widths[1:], width], strict=True):
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(True), conv(n_in, n_out, *shape, bias=False)]
        if upsample == "nearest" and image_size >= 64:  # at 32x32 this layer made pictures worse
            layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, channels, 3, 1, 1)]
        else:
            layers[-1] = conv(width, channels, *shape)
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.maps = CodeMaps(n_maps, widths[1], 8, bias=False) if n_maps else None

    def forward(self, joined: Tensor) -> Tensor:
        joined = joined[:, :, None, None]
        if self.maps is None:
            return self.layers(joined).float()
        z_and_cat, c_cont = joined.tensor_split([-self.spec.n_cont], 1)
        h = self.layers[:4](z_and_cat)  # the 8x8 layer, before its batch norm
        return self.layers[4:](h + self.maps(c_cont)).float()


class Discriminator(nn.Module):
    """A trunk that D and Q share (paper, section 5), D's head (a logit), Q's head (q_dim wide)."""

    def __init__(self, spec: CodeSpec, image_size: int = 64, width: int = 64, channels: int = 3):
        super().__init__()
        check_limits({"image_size": image_size, "width": width, "channels": channels})
        self.spec, widths = spec, layer_widths(image_size, width)
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(n_in, n_out, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.LeakyReLU(0.2, True)]
        self.trunk = nn.Sequential(*layers)
        self.d_head = Conv2dToPixel(widths[-1], 1, 4)
        self.q_head = nn.Sequential(
            Conv2dToPixel(widths[-1], Q_HIDDEN, 4, bias=False),
            nn.BatchNorm2d(Q_HIDDEN),
            nn.LeakyReLU(0.1, True),
            Conv2dToPixel(Q_HIDDEN, max(spec.q_dim, 1), 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, QOutput]:
        """D's logits (n,) and Q(c|x) of pictures in [-1, 1], in one pass of the trunk."""
        h = self.trunk(x)  # (n, 8 width, 4, 4)
        return self.d_logits(h), self.q_output(h)

    def d_logits(self, h: Tensor) -> Tensor:
        """D's logits (n,) from the trunk's output."""
        return self.d_head(h).flatten().float()

    def q_output(self, h: Tensor) -> QOutput:
        """Q(c|x) from the trunk's output."""
        return self.spec.split(self.q_head(h)[:, : self.spec.q_dim, 0, 0].float())


@torch.no_grad()
def init_weights(net: nn.Module, rng: torch.Generator) -> None:
    """DCGAN's start: convolutions N(0, 0.02), batch norm N(1, 0.02), biases 0; CodeMaps larger."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            std = 0.2 if isinstance(m, CodeMaps) else 0.02
            m.weight.normal_(float(isinstance(m, nn.BatchNorm2d)), std, generator=rng)
            if m.bias is not None:
                m.bias.zero_()


# objective ----------------------------------------------------------------------------------------


def d_loss(d_real: Tensor, d_fake: Tensor) -> Tensor:
    """-V(D, G) = -E[log D(x)] - E[log(1 - D(G(z, c)))], from logits (paper, Eq. 1)."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def g_loss(d_fake: Tensor) -> Tensor:
    """-E[log D(G(z, c))], from logits: the non-saturating form (1406.2661, section 3)."""
    return F.softplus(-d_fake).mean()


def log_q(q: QOutput, codes: Codes) -> Tensor:
    """log Q(c|x) of each code in nats, (n, n_cat + n_cont)."""
    cat = q.q_logits.log_softmax(2).gather(2, codes.c_cat[:, :, None])[:, :, 0]
    square = (codes.c_cont - q.q_mu) ** 2 / q.q_logvar.exp()
    return torch.cat([cat, -0.5 * (math.log(2 * math.pi) + q.q_logvar + square)], 1)


def mutual_information(spec: CodeSpec, q: QOutput, codes: Codes) -> Tensor:
    """L_I = E[log Q(c|x)] + H(c) of each code in nats (paper, Eq. 5), (n_cat + n_cont,)."""
    cat, cont = log_q(q, codes).mean(0).split([spec.n_cat, spec.n_cont])
    return torch.cat([cat + math.log(spec.cat_dim), cont + math.log(2)])  # H(c) of a uniform code


def lambda_L_I(spec: CodeSpec, L_I: Tensor, args: Namespace, cap_cont: float = math.inf) -> Tensor:
    """lambda L_I (paper, section 7.2); a continuous code counts up to cap_cont nats."""
    cat, cont = L_I.split([spec.n_cat, spec.n_cont])
    return args.lam_cat * cat.sum() + args.lam_cont * cont.clamp(max=cap_cont).sum()


IDENTITY_FREE = 0.25, 0.05  # of brightness, of colour: what z and c_cont may change for free


def identity_loss(x: Tensor) -> Tensor:
    """How much z and continuous codes change the coarse pictures, where categoricals should.

    Of pictures (n, channels, h, w) each two neighbours share their categories. With p the 4x4
    averages: E[(p - p')^2] / 2 / Var(p), 0 where p is decided by the categories, 1 where they do
    not matter. The mean over brightness and colour of what lies above IDENTITY_FREE.
    """
    p = F.avg_pool2d(x[: len(x) // 2 * 2], x.shape[3] // 4)
    light, losses = p.mean(1, keepdim=True), []
    parts = (light, p - light)[: p.shape[1]]  # a grey picture has no colour
    for part, free in zip(parts, IDENTITY_FREE, strict=False):
        change = (part[0::2] - part[1::2]).square().mean() / 2
        losses.append(F.relu(change / (part.var(0).mean() + 1e-4) - free))
    return torch.stack(losses).mean()


def pair(codes: Codes) -> Codes:
    """The same codes, but each two neighbours share their categories."""
    return codes._replace(c_cat=codes.c_cat[::2].repeat_interleave(2, 0)[: len(codes.z)])


R1_EVERY = 16  # steps, with R1 times 16: the same for less time (1912.04958, appendix B)


def r1_penalty(d_real: Tensor, x: Tensor) -> Tensor:
    """R1 = E[|dD(x)/dx|^2] / 2 on real pictures: keeps D from winning (1801.04406, Eq. 9)."""
    (gradient,) = torch.autograd.grad(d_real.sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def shift(x: Tensor, u: Tensor, max_shift: Tensor) -> Tensor:
    """Pictures moved by up to max_shift whole pixels in x and y, on grey (DiffAugment).

    u (n, 2) says how far each goes, uniform in [0, 1).
    """
    by = ((2 * max_shift + 1) * u).floor() - max_shift
    i = torch.arange(x.shape[3], device=x.device)  # Y[n, row, source] is 1 where row takes source
    Y, X = (i[:, None] + by[:, :, None, None] == i).to(x.dtype).unbind(1)  # (n, size, size): 0, 1
    return (Y[:, None] @ x @ X[:, None].mT).to(x.dtype)


def augment(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Pictures (n, channels, size, size) warped, blurred, in another light, each in its own way.

    At strength 1: turned up to 17 degrees, 30% larger or smaller, moved by 15% of the width, half
    as much light or half as much again. u (n, 8) says how, uniform in [0, 1).
    """
    u = strength * (2 * u - 1)
    warp = 0.3 * u[:, :6].unflatten(1, (2, 3))
    gain, light = (0.5 * u[:, 6:, None, None]).split(1, 1)
    where = F.affine_grid(torch.eye(2, 3, device=x.device) + warp, x.shape, align_corners=False)
    edge = 1 - 1 / x.shape[3]  # clamped to the outermost pixels: just what padding_mode="border" is
    on = "cpu" if x.device.type == "mps" else x.device  # until torch 2.13 MPS has no gradient of it
    y = F.grid_sample(x.to(on), where.clamp(-edge, edge).to(on), align_corners=False).to(x.device)
    y = F.avg_pool2d(F.pad(y, [1] * 4, mode="replicate"), 3, 1)
    y = (gain.exp() * (y + light)).clamp(-1, 1)
    return y.contiguous(memory_format=torch.channels_last)


@contextmanager
def averages_stay(D: Discriminator) -> Iterator[None]:
    """Batch norm's running averages stay: they are of G's pictures as Q sees them."""
    norms = [m for m in D.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm in norms:
        norm.momentum = 0.1  # torch's default


def d_and_q(
    D: Discriminator, x: Tensor, u: Tensor, max_shift: Tensor | None, strength: float
) -> tuple[Tensor, QOutput]:
    """D's logits of shifted x, Q(c|x) of x as it is; in one pass where max_shift is None.

    If strength > 0, Q reads the categoricals from augmented x: what a category means must survive
    that, so it is not pose, stroke or light. u (n, 10) says how x is shifted and augmented.
    """
    if max_shift is None:
        d, q = D(x)
    else:
        with averages_stay(D):
            d = D.d_logits(D.trunk(shift(x, u[:, :2], max_shift)))
        q = D.q_output(D.trunk(x))
    if strength and D.spec.n_cat:
        with averages_stay(D):
            augmented = D.q_output(D.trunk(augment(x, u[:, 2:], strength)))
        q = q._replace(q_logits=augmented.q_logits)
    return d, q


# step ---------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that training changes, and so all that a checkpoint holds."""

    spec: CodeSpec
    device: torch.device
    G: Generator
    G_ema: Generator  # the average of G's weights over time, which is shown and used
    D: Discriminator
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer
    rng: torch.Generator  # the only randomness; on the CPU, as a run can change devices
    per_epoch: int = 1  # steps
    step: int = 0
    minutes: float = 0.0  # of training, over all starts
    sums: dict[str, Tensor] = field(default_factory=dict)  # of metrics, since the last row
    rows: list[list[float]] = field(default_factory=list)  # of log.csv

    @property
    def epochs(self) -> float:
        """Passes over the pictures so far."""
        return self.step / self.per_epoch

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds up a step's metrics, on the device."""
        if self.sums:
            torch._foreach_add_([*self.sums.values()], [*metrics.values()])
        else:
            self.sums = {name: value.clone() for name, value in metrics.items()}

    @property
    def columns(self) -> list[str]:
        """The names of what stands in a row of log.csv."""
        return ["step", "epoch", "minutes", *METRICS, *self.spec.names]

    def add_row(self) -> dict[str, float]:
        """The next row of log.csv: the metrics' means over LOG_EVERY steps."""
        means = torch.stack([*self.sums.values()]) / LOG_EVERY
        self.rows.append([self.step, self.epochs, self.minutes, *means.tolist()])
        self.sums = {}
        return dict(zip(self.columns, self.rows[-1], strict=True))


N_U = 22  # uniform numbers that a step takes for each picture


class Batch(NamedTuple):
    """What a step takes, all of it on the device: a CUDA graph can copy nothing from the CPU."""

    x: Tensor  # (n, channels, size, size), real pictures in [-1, 1]
    codes: Codes  # of n pictures to draw
    u: Tensor  # (n, N_U), uniform in [0, 1): how pictures are shifted and augmented
    max_shift: Tensor  # (): how far D's pictures are shifted, in pixels
    beta: Tensor  # (): the share of G_ema that stays


# a new loss: its function under "objective", two lines in train_step (loss; values, in the same
# place as its name here), and for its weight a line in FLAGS and its name in MAY_CHANGE
METRICS = ("loss_D", "loss_G", "D_real", "D_fake", "R1", "identity")  # and each code's L_I


def train_step(state: State, args: Namespace, batch: Batch) -> dict[str, Tensor]:
    """One step of D, then of G, on n real pictures and n drawn codes; returns the metrics.

    L_I always trains G. It trains Q together with D's trunk in D's step (args.info_to "trunk", as
    the paper's own code does), or Q's head alone in G's step ("head", the notebook).
    """
    spec, G, D, to_trunk = state.spec, state.G, state.D, args.info_to == "trunk"
    x, codes, u, max_shift, beta = batch
    mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)
    with_r1, shifted = variant(state, args)
    u_real, u_fake, u_fake_G = u.split([2, 10, 10], 1)
    max_shift = max_shift if shifted else None  # None: d_and_q takes one pass

    D.requires_grad_(True)
    with mixed:
        x_fake = G(spec.join(codes))  # drawn once, for both steps
        x = (shift(x, u_real, max_shift) if shifted else x).detach().requires_grad_(with_r1)
        with averages_stay(D):
            d_real = D.d_logits(D.trunk(x))
        d_fake, q = d_and_q(D, x_fake.detach(), u_fake, max_shift, args.q_augment)
    loss_D = loss = d_loss(d_real, d_fake)
    if to_trunk:  # -V - lambda L_I, which trains Q and the trunk
        loss = loss - lambda_L_I(spec, mutual_information(spec, q, codes), args)
    R1 = torch.zeros((), device=x.device)
    if with_r1:
        R1 = r1_penalty(d_real, x)
        loss = loss + R1_EVERY * args.r1 * R1
    descend(state.opt_D, loss)

    D.requires_grad_(False)  # G's step needs no gradient of D's weights
    D.q_head.requires_grad_(not to_trunk)
    with mixed:
        d_fake_G, q = d_and_q(D, x_fake, u_fake_G, max_shift, args.q_augment)
    loss_G = g_loss(d_fake_G)
    L_I = mutual_information(spec, q, codes)
    # here L_I reaches G (Eq. 6); a continuous code that Q reads well need not grow further
    loss = loss_G - lambda_L_I(spec, L_I, args, args.cap_cont)
    identity = torch.zeros((), device=x.device)
    if args.lam_identity and spec.n_cat:  # once Q reads c: at first G has only z to vary x with
        q_knows = L_I[: spec.n_cat].detach().mean() / math.log(spec.cat_dim)
        identity = identity_loss(x_fake)
        loss = loss + args.lam_identity * q_knows.clamp(0, 1) ** 4 * identity
    descend(state.opt_G, loss)
    update_ema(state.G_ema, G, beta)

    values = [loss_D, loss_G, d_real.sigmoid().mean(), d_fake.sigmoid().mean()]
    values += [R1_EVERY * R1, identity, *L_I]  # R1 comes once in R1_EVERY steps
    return {k: v.detach() for k, v in zip([*METRICS, *spec.names], values, strict=True)}


def variant(state: State, args: Namespace) -> tuple[bool, bool]:
    """Whether this step has R1, and whether D sees shifted pictures."""
    with_r1 = args.r1 > 0 and state.epochs >= args.r1_from and state.step % R1_EVERY == 0
    return with_r1, max_shift_at(state, args) > 0


SHIFT_EPOCHS = 40  # D remembers only what it has seen often: shifts grow until then


def max_shift_at(state: State, args: Namespace) -> int:
    """How far D's pictures are shifted at this step, in pixels."""
    return int(args.shift * args.image_size * min(1, state.epochs / SHIFT_EPOCHS))


def beta_at(state: State, args: Namespace) -> float:
    """Of G_ema: a half-life that grows with training fits runs of any length (2312.02696, 3.1)."""
    steps = state.step + 1 + (1000 if args.init else 0)  # or one step erases --init's
    return 0.5 ** (1 / (args.ema * steps)) if args.ema else 0.0


def descend(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of opt against loss."""
    opt.zero_grad()
    loss.backward()
    opt.step()


@torch.no_grad()
def update_ema(G_ema: nn.Module, G: nn.Module, beta: Tensor) -> None:
    """G_ema = beta G_ema + (1 - beta) G, batch norm's statistics included."""
    for average, new in zip(G_ema.state_dict().values(), G.state_dict().values(), strict=True):
        if average.is_floating_point():
            average.lerp_(new, 1 - beta)
        else:
            average.copy_(new)


def networks(args: Namespace) -> tuple[Generator, Discriminator]:
    """G and D of a run's flags."""
    shape = (spec_of(args), args.image_size, args.width, args.channels)
    return Generator(*shape, args.upsample, args.cont_at), Discriminator(*shape)


def new_state(args: Namespace, device: torch.device) -> State:
    """Networks and optimisers at step 0; every random number comes from args.seed."""
    rng = torch.Generator().manual_seed(args.seed)
    G, D = networks(args)
    for net in (G, D):
        init_weights(net, rng)
        net.to(device, memory_format=torch.channels_last)
    heads = {"trunk": [D.trunk, D.d_head, D.q_head], "head": [D.trunk, D.d_head]}[args.info_to]
    with_D = [p for part in heads for p in part.parameters()]
    with_G = [*G.parameters()]
    if args.info_to == "head":
        with_G += D.q_head.parameters()
    adam = {"betas": (0.5, 0.999), "fused": device.type in ("cpu", "cuda")}
    adam["capturable"] = args.cuda_graph
    opt_G = torch.optim.Adam(with_G, args.lr_g, **adam)
    opt_D = torch.optim.Adam(with_D, args.lr_d, **adam)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    return State(G.spec, device, G, G_ema, D, opt_G, opt_D, rng)


# device -------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The fastest device for "auto", a GPU always with its number. Raises UserError if missing."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if has_mps else "cpu"
    if name == "cuda":
        name = "cuda:0"  # set_device takes none without a number
    there = ["cpu", "cpu:0", *(f"cuda:{i}" for i in range(n_cuda))]
    there += ["mps", "mps:0"] if has_mps else []
    if name not in there:
        raise UserError(f"--device {name}: not available here; use --device auto")
    return torch.device(name)


def speed_up(device: torch.device) -> bool:
    """Turns on TF32 and a search for the fastest kernels; returns whether bfloat16 is fast too."""
    if device.type != "cuda":
        return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.cuda.is_bf16_supported(including_emulation=False)  # since Ampere


def to_device_if_it_fits(x: Tensor, device: torch.device) -> Tensor:
    """The set on a GPU where it takes less than half of the free memory there, else unchanged."""
    fits = device.type == "cuda" and x.nbytes < torch.cuda.mem_get_info(device)[0] // 2
    return x.to(device) if fits else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for the device's earlier work: a GPU's from pinned memory."""
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


def describe(state: State, args: Namespace) -> str:
    """What a run works with: "CPU, 2 threads, float32; G 1.2 M, D and Q 1.5 M parameters"."""
    where = f"{state.device.type.upper()}, {torch.get_num_threads()} threads"
    if state.device.type == "cuda":
        where = torch.cuda.get_device_name(state.device)
    how = "bfloat16" if args.amp else "float32"
    how += ", CUDA graph" if args.cuda_graph else ""
    G, D = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (state.G, state.D))
    return f"{where}, {how}; G {G:.1f} M, D and Q {D:.1f} M parameters"


class GraphedStep:
    """train_step as CUDA graphs, so that the GPU never waits for Python: the same arguments.

    Each variant of the step runs eagerly three times, which lets cuDNN search for kernels. Then it
    is captured, and from then on replayed on tensors that stay in their places.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None  # the tensors that all graphs read
        self.runs: Counter = Counter()  # of each variant
        self.graphs: dict = {}  # variant: the graph, and the metrics that it fills

    def __call__(self, state: State, args: Namespace, batch: Batch) -> dict[str, Tensor]:
        self.batch = self.batch or tree_map(torch.clone, batch)
        for fixed, new in zip(tree_leaves(self.batch), tree_leaves(batch), strict=True):
            fixed.copy_(new)
        key = variant(state, args)
        self.runs[key] += 1
        if self.runs[key] <= 3:
            return self.on_side_stream(state, args)
        if key not in self.graphs:
            try:
                self.graphs[key] = self.capture(state, args)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise UserError(
                    f"--cuda-graph: {why}; the same command without it goes on"
                ) from error
        graph, metrics = self.graphs[key]
        graph.replay()
        return metrics

    def on_side_stream(self, state: State, args: Namespace) -> dict[str, Tensor]:
        """An eager step, where capturing will be: not on the default stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = train_step(state, args, self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        return metrics

    def capture(self, state: State, args: Namespace) -> tuple[object, dict[str, Tensor]]:
        """The graph of one step, which does not run it yet, and the metrics that it will fill."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            metrics = train_step(state, args, self.batch)
        return graph, metrics


# pictures -----------------------------------------------------------------------------------------
# load_pictures: find_pictures, then decode (read_picture, to_square for each), then the cache.
# make_batch: bytes to floats.

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "ICO", "PCX", "SGI")
FORMATS += ("QOI", "TGA", "AVIF")  # not all that Pillow knows: for EPS it starts a program
MAX_PIXELS = 2**30 // 12  # of one file, Pillow's own limit: decoding takes up to 16 bytes for each
DECODE_THREADS = 8  # what is larger than their share of MAX_PIXELS is decoded alone
DECODER_VERSION = 4  # counts up whenever decode changes its result
CROPS = {"centre": 0.5, "top": 0.0}  # how much of what a tall picture loses lies above the square
HIDDEN = r"(?is)\..*|@eadir|[@#$]recycle(\.bin)?|recycler|#snapshot|__macosx|lost\+found|lost\.dir"
HIDDEN += r"|found\.000|system volume information|desktop\.ini|thumbs(\.db)?"  # of systems too
MARK = ".generated"  # generate.py leaves it in each folder that it makes: what G draws is no data
OUR_FOLDERS = [{"args.json", "log.csv"}, {"last.pt"}, {MARK}, {"codes.csv"}]
OUR_FOLDERS += [{"table.csv", "overview.png"}]
GET_PICTURES = "give a folder of pictures; `make data` downloads faces, `make demo` draws some"
DATA, IDX = Path("data"), "raw/train-images-idx3-ubyte"  # where torchvision keeps named sets
NAMED_SETS = {  # torchvision's class, its file; digits and clothes: 32x32, never mirrored
    "mnist": ("MNIST", f"MNIST/{IDX}"),
    "fashion-mnist": ("FashionMNIST", f"FashionMNIST/{IDX}"),
    "svhn": ("SVHN", "train_32x32.mat"),
}


class Pictures(NamedTuple):
    """A training set, decoded once."""

    x: Tensor  # uint8 (N, size, size, channels), mapped from a file and read as needed
    fingerprint: str  # of the files' bytes, whatever their names, and the crop: a run keeps it
    names: list[str]  # paths, or numbers in a named set
    order: Tensor  # int64 (N,), the order that runs take them in: by their hashes


def first_ten(texts: list[str]) -> str:
    """Ten at most, in one line that every terminal can show."""
    return ascii(", ".join(texts if len(texts) <= 10 else [*texts[:10], "..."]))[1:-1]


def find_pictures(folder: Path) -> tuple[list[Path], str]:
    """All picture files below a folder, sorted, and in words what else is there.

    Linked folders are followed, each once; what cannot be opened counts as a file.
    """
    files, others, formats = [], Counter(), Image.registered_extensions()
    visited, fail = {*map(str, folder.parents)}, lambda error: files.append(Path(error.filename))
    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        path, real, below = Path(here), os.path.realpath(here), folders.copy()
        folders.clear()
        if real in visited:
            continue
        visited.add(real)
        if path != folder and any(marks <= {*names} for marks in OUR_FOLDERS):
            others[f"folder {path.name} (a run, or by generate.py)"] += 1
            continue
        for name in below:
            if re.fullmatch(HIDDEN, name):
                others[f"folder {name}"] += 1
            else:
                folders.append(name)
        folders.sort(key=lambda name: (path.joinpath(name).is_symlink(), name))
        for file in map(path.joinpath, names):
            suffix = re.split("[?:_]", file.suffix.lower())[0]  # .jpg?w=400 and .jpg_large too
            is_picture = formats.get(suffix) in FORMATS
            if file.name[0] == ".":
                others["hidden"] += is_picture
            elif is_picture or not os.path.exists(file):
                files.append(file)
            else:
                others[f"of {suffix or 'no suffix'}"] += 1
    return sorted(files), first_ten([f"{n:,} {kind}" for kind, n in others.most_common() if n])


def open_named_set(name: str, flag: str) -> Collection[tuple]:
    """torchvision's (picture, label) pairs, downloaded where they are missing."""
    kind, file = NAMED_SETS[name]
    path = DATA / file
    try:
        from torchvision import datasets  # takes a second, so only here

        return getattr(datasets, kind)(DATA, download=not path.exists())
    except Exception as error:  # of any kind: torchvision and scipy raise them
        why = f"torchvision cannot get it into {DATA}/"
        if path.exists() and not isinstance(error, ImportError):
            why = f"{path} is damaged or not all: delete it, and the same command gets it again"
        raise UserError(f"{flag} {name}: {why} ({type(error).__name__}: {error})") from error


def to_square(image: Image.Image, size: int, channels: int, crop: str = "centre") -> Image.Image:
    """Any picture as (size, size) in 1 or 3 channels: upright, on white, cropped, scaled."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise NotImplementedError("floats have no known white")
    if image.mode.startswith("I"):  # 16 bit, which convert() would clip instead of scale
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, 0, (0.5, CROPS[crop]))


def read_picture(
    item: Path | Image.Image, size: int, channels: int, crop: str = "centre", most: int = MAX_PIXELS
) -> tuple[str, bytes | None, bool]:
    """A picture's hash, its (size, size, channels) bytes, whether the crop takes a third or more.

    What cannot be read, or has more than `most` pixels: what is wrong with it, None, False.
    """
    try:
        if isinstance(item, Image.Image):
            raw, image = item.tobytes(), item
        elif not item.is_file():  # a pipe would never end
            raise FileNotFoundError
        elif item.stat().st_size > 4 * most:
            raise Image.DecompressionBombError
        else:
            raw = item.read_bytes()
            image = Image.open(io.BytesIO(raw), formats=FORMATS)  # decodes nothing yet
        whole = image.size
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at 1/2, 1/4 or 1/8
        if math.prod(whole if "progressive" in image.info else image.size) > most:
            raise Image.DecompressionBombError
        x = to_square(image, size, channels, crop).tobytes()
        return hashlib.sha256(raw).hexdigest(), x, 3 * min(whole) <= 2 * max(whole)
    except Exception as error:  # decoders raise anything; decode tells it
        return f"{item} ({type(error).__name__})", None, False


def decode(where: str, items: list, how: tuple[int, int, str]) -> dict:
    """Decodes paths or pictures (how: size, channels, crop): x, and facts about the set."""
    places, unreadable, raw, n_cut, is_grey = {}, [], bytearray(), 0, True  # places: by hash
    (size, channels, crop), share = how, MAX_PIXELS // DECODE_THREADS
    Image.init()  # loads Pillow's formats, which threads must not do at the same time
    with warnings.catch_warnings(), ThreadPoolExecutor(DECODE_THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about files that it can read all the same
        read = pool.map(lambda item: read_picture(item, *how, share), items)  # without the GIL
        read = tqdm(read, "pictures", len(items), leave=False, disable=None)
        for i, (hash_or_why, x, is_cut) in enumerate(read):
            if x is None and "(DecompressionBomb" in hash_or_why:  # too large for several at once
                hash_or_why, x, is_cut = read_picture(items[i], *how)
            if x is None:
                unreadable.append(hash_or_why)
            elif hash_or_why not in places:
                places[hash_or_why] = i
                n_cut += is_cut
                is_grey = is_grey and all(x[::channels] == x[c::channels] for c in range(channels))
                raw += x
    n, hashes, summary = len(places), sorted(places), ""
    if copies := len(items) - len(unreadable) - n:
        summary += f", {copies:,} exact {'copy' if copies == 1 else 'copies'} dropped"
    if unreadable:
        kind = "file" if len(unreadable) == 1 else "files"
        summary += f", {len(unreadable):,} unreadable {kind} skipped: {first_ten(unreadable)}"
    if n < 2:
        why = f"{n} pictures{summary}, at least 2 are needed"
        raise UserError(f"{where}: {why}; {GET_PICTURES}")
    if crop == "centre" and n_cut > n / 10:
        summary += f"\n{n_cut:,} of them lose a third of their area or more: their middle is taken;"
        summary += " infogan.py --crop top takes the upper part of tall ones"
    facts = {"summary": summary, "grey": is_grey, "checksum": zlib.crc32(raw)}
    facts["x"] = torch.frombuffer(raw, dtype=torch.uint8).view(n, size, size, channels)
    facts["fingerprint"] = hashlib.sha256("".join([crop, *hashes]).encode()).hexdigest()[:16]
    facts["names"] = [str(items[i] if isinstance(items[i], Path) else i) for i in places.values()]
    return facts | {"order": torch.tensor(sorted(range(n), key=[*places].__getitem__))}


def cache_folder() -> Path:
    """The user's own: a folder of pictures may be read-only, or shared."""
    path = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.devnull if path[0] == "~" else path) / "infogan"  # no home: caches nothing


def read_cache(path: Path, key: str) -> dict | None:
    """What decode returned, with x mapped into memory; None where it is damaged or out of date."""
    with suppress(Exception):  # torch raises anything for a damaged file
        facts = torch.load(path, mmap=True, weights_only=True)
        if facts["key"] == key and facts["checksum"] == zlib.crc32(facts["x"].numpy()):
            return facts
    return None


def load_pictures(
    data: str, size: int, channels: int | None = None, crop: str = "centre", flag: str = "--data"
) -> Pictures:
    """A folder or a named set, decoded once: later starts map the cache's file into memory.

    channels None takes what the set has: 1 when every picture is grey, else 3. crop: the "centre"
    or the "top" of tall pictures. Exact copies and unreadable files are left out and counted.
    Raises UserError, with the flag that names the set, when fewer than two remain.
    """
    named = data in NAMED_SETS
    root = DATA / NAMED_SETS[data][1] if named else Path(os.path.expanduser(data))
    if named and not root.exists():
        open_named_set(data, flag)  # downloads it
    elif not named and not root.is_dir():
        raise UserError(f"{flag} {data}: no such folder; {GET_PICTURES}")
    root = root.resolve()  # one set, however its path is written
    files, others = ([root], "") if named else find_pictures(root)
    if others:
        print(f"passed over in {data}: {others}")
    stamp = hashlib.sha256(str(DECODER_VERSION).encode())  # changes with every name, size and time
    for path in files:
        stamp.update(os.fsencode(path))
        with suppress(OSError):  # an unreadable one counts by its name
            stamp.update(f" {path.stat().st_size} {path.stat().st_mtime_ns}\0".encode())
    key, place = stamp.hexdigest(), hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    for depth in (3, 1):  # a cache for each way to decode; one of 3 channels tells if all are grey
        path = cache_folder() / f"{place}-{size}x{size}x{depth}-{crop}.pixels"
        cached = read_cache(path, key)
        if channels != 1 or (cached and cached["grey"]):
            break
    if not cached:
        pictures = [x for x, _ in open_named_set(data, flag)] if named else files
        cached = decode(f"{flag} {data}", pictures, (size, depth, crop)) | {"key": key}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save(cached, file)
            cached = read_cache(path, key) or cached
        except (OSError, RuntimeError) as error:  # torch calls a full disk an internal error
            why = getattr(error, "strerror", None) or error
            print(f"{path}: {why}; not cached, each start decodes the pictures")
    x = cached["x"]
    print(f"{len(x):,} pictures in {data}{cached['summary']}")
    x = x[..., :1] if cached["grey"] and channels != 3 else x
    return Pictures(x, cached["fingerprint"], cached["names"], cached["order"])


def make_batch(x: Tensor, flip: bool, rng: torch.Generator, device: torch.device) -> Tensor:
    """uint8 (n, h, w, channels) as floats (n, channels, h, w) in [-1, 1]; flip mirrors half."""
    x = to_device(x, device)
    if flip:
        mirrored = torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5
        x = torch.where(to_device(mirrored, device), x.flip(2), x)
    x = x.contiguous().permute(0, 3, 1, 2).float()  # moved as bytes; its layout is channels_last
    return torch.add(x.new_full((), -1.0), x, alpha=1 / 127.5, out=x)  # x / 127.5 - 1 in one pass


# checkpoint ---------------------------------------------------------------------------------------

FORMAT = 2
NETS, OPTIMISERS = ("G", "G_ema", "D"), ("opt_G", "opt_D")  # names in State and in the file
LOWER_LR = "last.pt is the last good one, if saved. Lower --lr-g and --lr-d"
NEW_RUN = "another --out starts a new run"
BROKEN = (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write at once
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()


def save_file(path: Path, values: dict) -> None:
    """Writes a dict for torch.load, complete or not at all."""
    buffer = io.BytesIO()  # torch.save reports a full disk as an internal error
    torch.save(values, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint on the CPU: "args" (a dict of the flags), "spec", "step", "G_ema", …

    Runs no code from the file. Raises UserError for a file that is not a checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; infogan.py saves last.pt in a run's folder")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not verify checksums
                raise zipfile.BadZipFile
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["format"] != FORMAT:
            raise UserError("is from another version of infogan.py")
        ckpt["args"] = {"cont_at": 4, **ckpt["args"]}  # as in all runs before there was a choice
        check_limits({name: ckpt["args"].get(name) for name in LIMITS})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # of any kind: the file is at fault
        why = f"broken, or not a checkpoint of infogan.py ({type(error).__name__})"
        raise UserError(f"{path}: {why}") from error
    return ckpt | {"path": str(path)}


def load_net(path: str | Path | dict, key: str, device: str) -> Generator | Discriminator:
    """The weights under key in the architecture that the checkpoint names: float32, frozen."""
    ckpt = path if isinstance(path, dict) else load_checkpoint(path)
    path = ckpt["path"]
    with torch.device("meta"):  # takes no memory before the shapes are known to fit
        G, D = networks(Namespace(**ckpt["args"]))
    net = G if key == "G_ema" else D
    try:
        weights = {name: w.contiguous() for name, w in ckpt[key].items()}
        weights = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
        net.load_state_dict(weights, assign=True)
    except BROKEN as error:
        raise UserError(f"{path}: its {key} does not fit its own flags") from error
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: its {key} has weights that are not finite")
    return net.eval().requires_grad_(False).to(device)


def load_generator(path: str | Path | dict, device: str = "cpu") -> tuple[Generator, CodeSpec]:
    """(G, spec) of a file or of load_checkpoint's dict: `x = G(spec.join(spec.sample(n, rng)))`."""
    G = load_net(path, "G_ema", device)
    return G, G.spec


class Encoder(nn.Module):
    """Q for users: reads codes from pictures in [-1, 1]."""

    def __init__(self, D: Discriminator):
        super().__init__()
        self.D = D

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_cat's probabilities (n, n_cat, cat_dim); c_cont's means and sigmas (n, n_cont)."""
        q = self.D(x)[1]
        return q.q_logits.softmax(2), q.q_mu, (q.q_logvar / 2).exp()


def load_encoder(path: str | Path | dict, device: str = "cpu") -> tuple[Encoder, CodeSpec]:
    """(Q, spec): reads codes from pictures in [-1, 1], see Encoder."""
    D = load_net(path, "D", device)
    return Encoder(D).eval(), D.spec


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raises Diverged that names the first metric which is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value}; {LOWER_LR}")


def gather_checkpoint(state: State, args: Namespace, fingerprint: str) -> dict:
    """All that a run needs to resume bit for bit."""
    check_finite(state.step, state.sums)
    ckpt = {name: getattr(state, name).state_dict() for name in NETS + OPTIMISERS}
    for name in NETS:
        if not all(w.isfinite().all() for w in ckpt[name].values()):
            raise Diverged(f"step {state.step}: {name} has weights that are not finite; {LOWER_LR}")
    ckpt |= {name: getattr(state, name) for name in ("sums", "step", "minutes")}
    ckpt["rows"] = torch.tensor(state.rows, dtype=torch.float64)
    ckpt |= {"format": FORMAT, "spec": asdict(state.spec), "args": vars(args)}
    return ckpt | {"rng": state.rng.get_state(), "fingerprint": fingerprint}


def restore(state: State, ckpt: dict, path: Path, weights_only: bool = False) -> None:
    """Puts a checkpoint, read from path, into state. Raises UserError where it does not fit."""
    if "opt_G" not in ckpt and not weights_only:
        why = "its checkpoint is for generate.py only (by --shrink); --init begins a run with it"
        raise UserError(f"{path}: {why}, {NEW_RUN}")
    try:
        for name in NETS:  # --shrink keeps of G only the average
            getattr(state, name).load_state_dict(ckpt.get(name, ckpt["G_ema"]))
        if weights_only:
            return
        for name in OPTIMISERS:
            opt = getattr(state, name)  # with the learning rates of today's flags
            opt.load_state_dict({**ckpt[name], "param_groups": opt.state_dict()["param_groups"]})
        state.step, state.minutes = int(ckpt["step"]), float(ckpt["minutes"])
        state.sums = {name: v.to(state.device) for name, v in ckpt["sums"].items()}
        state.rows = ckpt["rows"].tolist()
        if any(len(row) != len(state.columns) for row in state.rows):
            raise ValueError("METRICS has changed")
        state.rng.set_state(ckpt["rng"].clone())  # torch reads beside a part of a tensor
    except BROKEN as error:
        cure = "give another --init" if weights_only else NEW_RUN
        raise UserError(f"{path}: training cannot go on from its checkpoint; {cure}") from error


# run folder ---------------------------------------------------------------------------------------

MUST_MATCH = {*SHAPE, "info_to", "batch_size", "crop"}  # must match to resume; pictures too: train
MAY_CHANGE = {"flip", "recipe", "lam_cat", "lam_cont", "cap_cont", "lam_identity", "q_augment"}
MAY_CHANGE |= {"r1", "r1_from", "shift", "ema", "lr_g", "lr_d", "seed", "init"}  # it is told
IGNORED = HIDDEN + r"|.*\.(txt|log|out|err|sh|[oe]\d+)|logs"  # in a run's folder
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A run's folder, made if missing, for this process alone: the lock ends with the process."""
    names = sorted(os.listdir(out)) if out.is_dir() else []
    others = [name for name in names if not re.fullmatch(IGNORED, name)]
    if others and not any(re.fullmatch(r"args\.json|last\.pt|epoch_.*\.pt", n) for n in others):
        raise UserError(f"--out {out}: has {others[0]} but no run in it; give another folder")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # a run that has just ended removed it
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"--out {out}: another process is training there") from None
        except (ImportError, OSError) as error:  # Windows and some network drives have no locks
            print(f"{out}: cannot be locked ({error}); start no second run there")
        for part in [*out.glob(".*.part"), *out.glob("samples/.*.part")]:
            part.unlink()  # from a process that was killed while it wrote
        try:
            yield
        finally:
            with suppress(OSError):
                Path(file.name).unlink()
                if is_new:
                    out.rmdir()  # only if it is empty: a start that failed


def differences(args: Namespace, before: dict, names: Collection[str]) -> list[str]:
    """ "--r1 0.3, not 1.0" for each flag that is not as before."""
    pairs = [(name, before.get(name), getattr(args, name)) for name in sorted(names)]
    changed = [(name, old, new) for name, old, new in pairs if new is not None and new != old]
    return [f"--{name.replace('_', '-')} {old}, not {new}" for name, old, new in changed]


def check_same(args: Namespace, changes: list[str]) -> None:
    """A run resumes with the same networks, codes, batch and pictures: else raises UserError."""
    if changes and not args.allow_changes:
        why = f"{args.out} was started with {', '.join(changes)}"
        raise UserError(f"{why}; --allow-changes goes on all the same, {NEW_RUN}")


def find_checkpoint(args: Namespace) -> dict | None:
    """last.pt of the run in args.out, else its newest that can be read; None in a new folder."""
    out = Path(args.out)
    older = sorted(out.glob("epoch_*.pt"), key=lambda p: (len(p.name), p.name), reverse=True)
    paths = [path for path in [out / "last.pt", *older] if path.exists()]
    for path in paths:
        try:
            ckpt = load_checkpoint(path)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        check_same(args, differences(args, ckpt["args"], MUST_MATCH))
        print(f"resuming from {path}, step {ckpt['step']:,}")
        if changes := differences(args, ckpt["args"], MAY_CHANGE):
            print(f"until now it had {', '.join(changes)}")
        return ckpt
    if paths:
        raise UserError(f"{out}: none of its checkpoints can be read; {NEW_RUN}")
    return None


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects signals that ask a run to stop; a second INT, TERM or HUP stops it at once."""
    caught, before = [], {}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        if number in SIGNALS[:3]:  # XCPU comes every second
            signal.signal(number, before[number])

    for number in SIGNALS:
        # ignored: by nohup, or a shell for a job with &; None: a handler that is not Python's
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            with suppress(ValueError):  # in a thread of another program, which has its own
                before[number] = signal.getsignal(number)
                signal.signal(number, note)
    try:
        yield caught
    finally:
        with suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


# display ------------------------------------------------------------------------------------------


def to_image(x: Tensor) -> Image.Image:
    """A picture (channels, h, w) in [-1, 1] as 8 bits a channel."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu()
    return Image.fromarray((x if x.shape[2] == 3 else x[:, :, 0]).numpy())


def make_grid(x: Tensor, columns: int = 8, gap: int = 2) -> Tensor:
    """Pictures (n, channels, h, w) as one (channels, H, W), black between them."""
    columns = min(columns, len(x))
    x = F.pad(x, (gap, 0, gap, 0, 0, 0, 0, -len(x) % columns), value=-1.0)
    rows = x.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return F.pad(rows.flatten(3).flatten(1, 2), (0, gap, 0, gap), value=-1.0)


def save_picture(path: Path, image: Image.Image, **how: object) -> None:
    """A PNG or a GIF, by the path's ending, complete or not at all."""
    with replacing(path) as file:
        image.save(file, path.suffix[1:], **how)


def save_animation(out: Path) -> None:
    """training.gif: at most 60 of the run's grids with their epochs; the last stays longer."""
    paths = [p for p in out.glob("samples/epoch_*.png") if p.stem[6:].isdecimal()]
    grids, frames = sorted((int(path.stem[6:]), path) for path in paths), []
    for i in torch.linspace(0, len(grids) - 1, min(len(grids), 60)).round().int():
        epoch, path = grids[i]
        grid = ImageOps.contain(Image.open(path).convert("RGB"), (530, 530))
        frame, font = ImageOps.expand(grid, (0, 28, 0, 0), "white"), ImageFont.load_default(16)
        ImageDraw.Draw(frame).text((6, 4), f"epoch {epoch}", "black", font)
        palette = frame.reduce(4).quantize(128)  # ten times as fast as from all pixels, as good
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    if len(frames) > 1:
        how = {"duration": [250] * (len(frames) - 1) + [2000], "loop": 0, "save_all": True}
        save_picture(out / "training.gif", frames[0], append_images=frames[1:], **how)


class Log:
    """log.csv, curves.png and TensorBoard's events of a run, from the rows in its checkpoints."""

    def __init__(self, out: Path, state: State):
        self.path, self.state, self.failed = out / "log.csv", state, set()
        self.attempt("log.csv", self.keep_edited)
        tb = self.attempt("TensorBoard", import_module, "torch.utils.tensorboard")  # takes a second
        where = (str(out), "", state.step + 1)
        self.board = tb and self.attempt("TensorBoard", tb.SummaryWriter, *where)

    def attempt(self, what: str, job: Callable, *args: object) -> object:
        """What job returns. A failure is told once, and training goes on, which is worth more."""
        try:
            return job(*args)
        except Exception as error:  # viewers, full disks, old packages raise anything
            where, why = (getattr(error, name, None) for name in ("filename", "strerror"))
            if what not in self.failed:
                print(f"{where or what}: {why or error}; training goes on", file=sys.stderr)
            self.failed.add(what)

    def text(self) -> str:
        rows = [[f"{round(value, 5):.12g}" for value in row] for row in self.state.rows]
        return "".join(",".join(row) + "\n" for row in [self.state.columns, *rows])

    def keep_edited(self) -> None:
        """A log.csv that somebody has edited is renamed before this run writes its own."""
        edited = self.path.read_text(errors="replace") if self.path.exists() else ""
        if not edited.startswith(self.text()) and not self.text().startswith(edited):
            number = next(i for i in count(1) if not Path(f"{self.path}.old-{i}").exists())
            aside = self.path.rename(f"{self.path}.old-{number}")
            print(f"{self.path}: has other lines than this run's; as it was it is now {aside}")

    def save(self) -> None:
        with replacing(self.path) as file:
            file.write(self.text().encode())

    def add(self, row: dict[str, float]) -> None:
        for group, names in {"GAN": METRICS, "L_I": self.state.spec.names}.items():
            for name in names:
                self.to_board("add_scalar", f"{group}/{name}", row[name], self.state.step)

    def to_board(self, method: str, *what: object) -> None:
        """A call of TensorBoard's writer, where there is one."""
        if self.board:
            self.attempt("TensorBoard", getattr(self.board, method), *what)

    def draw(self) -> None:
        """curves.png: losses, D's mean probabilities, and each code's L_I below its ceiling."""
        spec, rows = self.state.spec, self.state.rows
        if len(rows) < 2:
            return
        panels = [("losses of D (blue) and G (red)", ["loss_D", "loss_G"], 0.0)]
        panels += [("D(x) (blue) and D(G(z, c)) (red)", ["D_real", "D_fake"], 1.0)]
        for kind, place in spec.kinds.items():
            top = spec.ceilings[place][0]
            panels.append((f"L_I of {kind}, nats, at most {top:.2f}", spec.names[place], top))
        page = Image.new("RGB", (640, 200 * len(panels)), "white")
        shown = rows[:: -(-len(rows) // 1000)]  # more than the page has pixels for
        values = dict(zip(self.state.columns, zip(*shown, strict=True), strict=True))
        for i, (title, names, top) in enumerate(panels):
            lines = [values[name] for name in names]
            page.paste(draw_panel(title, values["epoch"], lines, top), (0, 200 * i))
        save_picture(self.path.with_name("curves.png"), page)

    def close(self) -> None:
        self.attempt("curves.png", self.draw)
        self.attempt("log.csv", self.save)
        self.to_board("close")


def draw_panel(
    title: str, x: Sequence[float], lines: list[Sequence[float]], top: float
) -> Image.Image:
    """A chart of 640x200 that shows zero, `top` and all but the most extreme 2% of the values."""
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2")
    values = sorted(v for line in lines for v in line)
    low, high = min(0.0, values[len(values) // 50]), max(top, values[-1 - len(values) // 50])
    panel, font = Image.new("RGB", (640, 200), "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(panel)

    def at(u: float, v: float) -> tuple[float, float]:
        share = (min(max(v, low), high) - low) / ((high - low) or 1)
        return 50 + 570 * (u - x[0]) / ((x[-1] - x[0]) or 1), 175 - 145 * share

    for v in {0.0, high, low if low < -0.08 * high else 0.0}:  # labels that do not overlap
        pen.line([at(x[0], v), at(x[-1], v)], "#dddddd")
        pen.text((44, at(x[0], v)[1]), f"{v:.2f}", "black", font, anchor="rm")
    for line, colour in zip(lines, cycle(colours), strict=False):
        pen.line([at(*point) for point in zip(x, line, strict=True)], colour, 2)
    pen.text((50, 8), title, "black", font)
    pen.text((50, 180), f"epoch {x[0]:.1f} to {x[-1]:.1f}", "black", font)
    return panel


def describe_row(spec: CodeSpec, row: dict[str, float]) -> str:
    """Losses, and the mean L_I of each kind of code beside its ceiling."""
    text = f"D {row['loss_D']:.2f}  G {row['loss_G']:.2f}"
    for kind, place in spec.kinds.items():
        L_I = [row[name] for name in spec.names[place]]
        text += f"  L_I {kind} {sum(L_I) / len(L_I):.2f}/{spec.ceilings[place][0]:.2f}"
    return text


# train --------------------------------------------------------------------------------------------

LOG_EVERY = R1_EVERY  # steps between two rows of log.csv, each with one R1; no wait between them
SAVE_SECONDS = 60.0  # between two saves of last.pt
RETRY_SECONDS = 300.0  # in which a save that failed is tried again
SAVE_STEPS = 100  # shorter epochs count together for grids and for checkpoints that are kept


def batches(state: State, args: Namespace, pictures: Pictures, B: int) -> Iterator[Batch]:
    """Endless batches of B pictures, each epoch in a new order."""
    spec, device, x = state.spec, state.device, pictures.x
    while True:
        epoch, done = divmod(state.step, state.per_epoch)
        rng = torch.Generator().manual_seed((args.seed + epoch) % 2**63)  # to resume in an epoch
        order = pictures.order[torch.randperm(len(x), generator=rng)]
        for i in range(done, state.per_epoch):
            rows = to_device(order[i * B : (i + 1) * B], x.device)
            real = make_batch(x.index_select(0, rows), args.flip, state.rng, device)
            codes = spec.sample(B, state.rng)
            codes = pair(codes) if args.lam_identity else codes
            codes = Codes(*(to_device(c, device) for c in codes))
            u = to_device(torch.rand(B, N_U, generator=state.rng), device)
            numbers = float(max_shift_at(state, args)), beta_at(state, args)
            yield Batch(real, codes, u, *(torch.full((), v, device=device) for v in numbers))


def train(args: Namespace) -> int:
    """Trains until --epochs, --max-steps, --max-minutes or a signal; returns the exit code."""
    end = time.monotonic() + 60 * (args.max_minutes or math.inf)
    device, out = pick_device(args.device), Path(args.out)
    fast = speed_up(device)
    if args.cuda_graph and device.type != "cuda":
        raise UserError("--cuda-graph: needs a CUDA device; leave it out")
    with locked(out):
        ckpt = find_checkpoint(args)
        init = load_checkpoint(args.init) if args.init and not ckpt else None
        channels = args.channels or (ckpt and ckpt["args"]["channels"])
        pictures = load_pictures(args.data, args.image_size, channels, args.crop)
        if ckpt and ckpt.get("fingerprint", pictures.fingerprint) != pictures.fingerprint:
            check_same(args, ["other pictures"])
        # on a GPU bfloat16 is faster only inside a graph: its casts are kernels too
        fast = fast and (device.type != "cuda" or args.cuda_graph)
        resolved = {"channels": pictures.x.shape[3], "amp": fast if args.amp is None else args.amp}
        resolved["init"] = args.init or (ckpt and ckpt["args"]["init"])
        args, n = Namespace(**{**vars(args), **resolved}), len(pictures.x)
        state = new_state(args, device)
        if source := ckpt or init:
            restore(state, source, Path(args.init) if init else out, weights_only=bool(init))

        B = min(args.batch_size, n)
        state.per_epoch = n // B
        total = min(args.epochs * state.per_epoch, args.max_steps or sys.maxsize)
        if state.step >= total:
            print(f"{out} is finished, {state.step:,} steps; raise --epochs or --max-steps")
            return 0
        if args.recipe == "notebook":
            print("--recipe notebook: the notebook's settings and its defects, to compare with")
        if total < 1000 and not args.max_minutes:
            print(f"{total} steps are too few to learn from; raise --epochs or --max-steps")
        if args.batch_size > B:
            print(f"--batch-size {args.batch_size}: there are only {n} pictures, so a batch is {B}")
        print(f"{describe(state, args)}, {state.per_epoch:,} steps an epoch")
        with replacing(out / "args.json") as file:  # first: it makes the folder a run's
            file.write(json.dumps(vars(args), indent=2).encode() + b"\n")
        (out / "samples").mkdir(exist_ok=True)
        stopped_by, row = loop(state, args, pictures, B, total, end)

    finished = state.step >= total
    bad = {k: v for k, v in row.items() if abs(v) > 50 and k.startswith(("loss", "cat", "cont"))}
    steps = f"{state.step:,} steps, {state.epochs:.1f} epochs, {state.minutes:.1f} minutes in all"
    if finished and bad:
        name = max(bad, key=lambda k: abs(bad[k]))
        cure = "it has learned nothing; give another --out, and smaller --lr-g and --lr-d"
        raise Diverged(f"{steps}, but {name} is {bad[name]:.0f}: {cure}")
    why, do = "time is up", "the same command resumes"
    if finished:
        why, do = "finished", f"see python generate.py --ckpt {out / 'last.pt'}"
    elif stopped_by:
        why = signal.Signals(stopped_by).name
    print(f"{why}: {steps}. {out / 'last.pt'} is saved; {do}")
    return 128 + stopped_by if stopped_by and not finished else 0


def loop(
    state: State, args: Namespace, pictures: Pictures, B: int, total: int, end: float
) -> tuple[int, dict[str, float]]:
    """Steps until `total`, the time `end` or a signal: returns that, and the last row of the log.

    Saves last.pt and log.csv each minute and when it stops, epoch_*.pt each --save-every epochs,
    samples/ and curves.png each --sample-every epochs, training.gif at the end.
    """
    out, spec, per_epoch = Path(args.out), state.spec, state.per_epoch
    rng = torch.Generator().manual_seed(args.seed)  # the same pictures and z at each start
    shown = pictures.x[pictures.order[torch.randperm(len(pictures.x), generator=rng)[:64]]]
    latents = Codes(*(c.to(state.device) for c in spec.sample(64, rng)))
    log, step_once = Log(out, state), GraphedStep() if args.cuda_graph else train_step
    began, first_step = time.monotonic(), state.step
    start, next_save, row = began - 60 * state.minutes, began + SAVE_SECONDS, {}
    tty, next_shown = sys.stderr.isatty(), began  # a file gets lines, a terminal one that changes
    together = -(-SAVE_STEPS // per_epoch)  # epochs
    draw_every, keep_every = args.sample_every or 5 * together, args.save_every or 25 * together

    def save_samples(name: str, x: Tensor | None = None) -> Tensor:
        grid = make_grid(state.G_ema(spec.join(latents)) if x is None else x)
        log.attempt("samples", save_picture, out / f"samples/{name}.png", to_image(grid))
        return grid

    def finish() -> None:
        save_samples("last")
        log.attempt("training.gif", save_animation, out)
        log.close()

    save_samples("real", make_batch(shown, False, rng, state.device))
    if state.step == 0:
        save_samples("epoch_0000")
    pictures = pictures._replace(x=to_device_if_it_fits(pictures.x, state.device))
    with caught_signals() as caught:
        for batch in batches(state, args, pictures, B):
            state.add(step_once(state, args, batch))
            state.step += 1
            now, done = time.monotonic(), state.step == total
            state.minutes = (now - start) / 60
            ends = done or now > end or bool(caught)
            epoch, rest = divmod(state.step, per_epoch)

            if state.step % LOG_EVERY == 0:
                row = state.add_row()
                check_finite(state.step, row)
                log.add(row)
            if row and (now >= next_shown or ends):
                next_shown = now + (0.5 if tty else 30.0)
                speed = (state.step - first_step) / (now - began)  # steps a second
                left = max(0, round(min((total - state.step) / speed, end - now, 1e10)))
                text = (
                    f"epoch {state.epochs:.1f}/{total / per_epoch:.4g}  {describe_row(spec, row)}"
                )
                text += f"  {speed * B:,.0f} img/s  eta {timedelta(seconds=left)}"
                text = f"\r{text:<110}" if tty else text
                print(text, end="" if tty and not ends else "\n", file=sys.stderr, flush=True)
            if rest == 0 and epoch % draw_every == 0:
                grid = save_samples(f"epoch_{epoch:04d}").cpu().add(1).div(2).clamp(0, 1)
                log.to_board("add_image", "samples", grid, epoch)
                log.attempt("curves.png", log.draw)
            if done:  # before last.pt: a start that finds the run finished draws nothing
                finish()
            keep = rest == 0 and epoch % keep_every == 0
            if keep or ends or now > next_save:
                ckpt = gather_checkpoint(state, args, pictures.fingerprint)
                log.attempt("log.csv", log.save)
                if keep:
                    log.attempt("checkpoint", save_file, out / f"epoch_{epoch:04d}.pt", ckpt)
                save_last(out / "last.pt", ckpt, caught)  # last: a kill before it repeats the rest
                next_save = time.monotonic() + SAVE_SECONDS
            if ends:
                break
        if not done:  # last.pt first: a second signal may end us
            finish()
    return next(iter(caught), 0), row


def save_last(path: Path, ckpt: dict, caught: list[int]) -> None:
    """Saves last.pt. A drive that is away is waited for, unless a signal asks to stop."""
    patience = time.monotonic() + RETRY_SECONDS
    for attempt in count():
        try:
            return save_file(path, ckpt)
        except OSError as error:
            if caught or time.monotonic() >= patience:
                raise
            if attempt == 0:
                minutes = f"{RETRY_SECONDS / 60:.0f} minutes"
                print(f"{path}: {error.strerror or error}; tried again for {minutes}")
        time.sleep(min(5.0, RETRY_SECONDS))


# flags --------------------------------------------------------------------------------------------

# fmt: off
RECIPES = {  # what differs from the defaults in FLAGS
"default": {},
"notebook": dict(upsample="transposed", cont_at=4, info_to="head", flip=False, shift=0.0, ema=0.0,
    r1=0.0, lam_identity=0.0, cap_cont=3.0),
# the paper's lr_g; a z too small to choose the digit in place of c; a digit is its stroke
"mnist": dict(upsample="transposed", cont_at=4, width=32, batch_size=64, lr_g=1e-3, z_dim=16,
    r1=0.1, lam_identity=0.0, q_augment=1.0, shift=0.0),
}
AUTO = None  # a default that derived computes
FLAGS = {  # by group: flag, default, limits or choices or kind, meaning
"pictures": [
    ("--data", "data/anime", "FOLDER", f"a folder, or {', '.join(NAMED_SETS)}"),
    ("--image-size", 64, LIMITS["image_size"], "width and height; named sets 32"),
    ("--channels", None, LIMITS["channels"], "1 grey, 3 colour (default: what the set has)"),
    ("--flip", True, bool, "mirror half of them; digits and clothes: off"),
    ("--crop", "centre", ["centre", "top"], "what is kept of pictures that are not square"),
], "codes": [
    ("--n-cat", 1, LIMITS["n_cat"], "categorical codes, 0 to 64"),
    ("--cat-dim", 10, LIMITS["cat_dim"], "categories of each, 2 to 1000"),
    ("--n-cont", 2, LIMITS["n_cont"], "continuous codes in [-1, 1], 0 to 256"),
    ("--z-dim", 100, LIMITS["z_dim"], "noise, 0 to 10000"),
], "networks and objective": [
    ("--recipe", None, [*RECIPES], "notebook: its settings and faults (default: by --data)"),
    ("--width", 64, LIMITS["width"], "channels of D's first and G's last layer"),
    ("--upsample", "nearest", LIMITS["upsample"], "G's layers: nearest neighbours and 3x3"
     " convolutions, or transposed 4x4 ones"),
    ("--cont-at", 8, LIMITS["cont_at"], "size of the layer of G that the continuous codes enter:"
     " 8, where they move and reshape, or 4, the first, where z and categoricals enter"),
    ("--lam-cat", 1.0, (0.0, 1000.0), "lambda of each categorical code's L_I"),
    ("--lam-cont", AUTO, (0.0, 1000.0), "of each continuous code's (default 3 / n_cont, max 0.3)"),
    ("--cap-cont", AUTO, (0.0, 3.0), "G is rewarded for a continuous code's L_I up to X nats"
     " (default 1.4; with up to 5 codes 3, which is no limit)"),
    ("--lam-identity", 2.0, (0.0, 1000.0), "of the identity loss: pictures of the same categories"
     " must have the same colours in the same places"),
    ("--info-to", "trunk", ["trunk", "head"], "L_I trains Q with D's trunk, or Q's head"),
    ("--q-augment", 0.0, (0.0, 3.0), "how strongly pictures are moved, turned, blurred and"
     " relit before Q reads categorical codes; mnist 1"),
    ("--shift", AUTO, (0.0, 0.5), "D sees pictures shifted by up to this share of their width,"
     f" growing over {SHIFT_EPOCHS} epochs (default 0.125; below 64 pixels 0.0625)"),
    ("--r1", AUTO, (0.0, 1e3), "D's gradient penalty (default 0.3; below 64 pixels 0.01)"),
    ("--r1-from", AUTO, (0, 10**9), "the epoch from which it acts (default 0; below 64 pixels, if"
     " --r1 is not given, 75)"),
    ("--ema", 0.03, (0.0, 1.0), "half-life of G's average, as a share of its steps"),
], "training": [
    ("--epochs", 150, (1, 10**9), "passes over the pictures"),
    ("--batch-size", 128, (2, 65_536), "pictures in a step"),
    ("--lr-g", 2e-4, (0.0, 1.0), "G's learning rate"),
    ("--lr-d", 2e-4, (0.0, 1.0), "D's learning rate"),
    ("--init", None, "FILE", "begin with the weights, codes and networks of this checkpoint"),
    ("--seed", 0, (0, 2**63 - 1), "seed of all random numbers"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
    ("--amp", None, bool, "bfloat16 convolutions (default: where they are faster)"),
    ("--cuda-graph", False, bool, "replay the step as a CUDA graph, so that no kernel waits"),
    ("--max-steps", None, (1, 10**12), "finish after N steps in all"),
    ("--max-minutes", None, (0.001, 1e7), "stop this call after X minutes; repeat it to resume"),
], "output": [
    ("--out", AUTO, "FOLDER", "the run's folder (default checkpoint/cat1-cont2, by its codes)"),
    ("--save-every", None, (1, 10**9),
     "epochs between checkpoints that are kept (default 25; more if they are short)"),
    ("--sample-every", None, (1, 10**9), "epochs between grids (default 5; more if short)"),
    ("--allow-changes", False, bool, "go on though pictures or flags are not those of the run"),
]}
# fmt: on


def derived(args: dict) -> dict:
    """The defaults that follow from the codes, the size and the recipe."""
    n_cat, n_cont = args["n_cat"], args["n_cont"]
    values = {"out": f"checkpoint/cat{n_cat}-cont{n_cont}"}
    values["lam_cont"] = min(0.3, 3 / max(n_cont, 1))  # their sum stays the same
    few = n_cat + n_cont <= 5
    values["cap_cont"] = 3.0 if few else 1.4  # else they go on growing, and categoricals fade
    large = args["image_size"] >= 64
    values["r1"] = 0.3 if large else 0.01  # without it D wins
    values["r1_from"] = 0 if large or args["r1"] is not None else 75  # small: not before
    values["shift"] = 0.125 if large else 0.0625  # small pictures lose variety with more
    if args["recipe"] == "notebook":  # its defect: the loss of 20 continuous codes was never added
        values["lam_cont"] = 0.0 if n_cont == 20 else 0.1
    return values


def resolve(given: dict, shape: dict) -> Namespace:
    """All flags: the table's, then the recipe's, a checkpoint's shape, what was given."""
    flags = {dest(flag): default for rows in FLAGS.values() for flag, default, *_ in rows}
    data = given.get("data")
    recipe = given.get("recipe") or ("mnist" if data == "mnist" else "default")
    named = {"image_size": 32, "flip": False} if data in NAMED_SETS else {}
    flags |= {**named, **RECIPES[recipe], **shape, **given, "recipe": recipe}
    rest = {k: v for k, v in derived(flags).items() if flags[k] is None}
    return Namespace(**flags | rest)


def spec_of(args: Namespace) -> CodeSpec:
    """The codes that a run's flags ask for."""
    return CodeSpec(args.n_cat, args.cat_dim, args.n_cont, args.z_dim)


def dest(flag: str) -> str:
    """A flag's name in args: "--lam-cat" is lam_cat."""
    return flag[2:].replace("-", "_")


class Parser(ArgumentParser):
    """Flags from a table like FLAGS; errors in one line, where argparse would print the usage.

    more: what else add_argument is given for a flag, by the flag's name in args.
    """

    def __init__(self, program: str, about: str | None, flags: dict, more: dict | None = None):
        super().__init__(program, None, about, allow_abbrev=False, argument_default=SUPPRESS)
        self.formatter_class, self.defaults = RawHelp, {}
        for title, rows in flags.items():
            group = self.add_argument_group(title)
            for flag, default, kind, meaning in rows:
                if kind is bool:
                    how = {"action": "store_true" if default is False else BooleanOptionalAction}
                elif isinstance(kind, list):
                    how = {"choices": kind, "type": type(kind[0])}
                else:
                    kinds = {int: "N", float: "X", str: kind}
                    how = {"type": partial(self.value, flag, kind)}
                    how["metavar"] = kinds[type(kind[0])]
                meaning += "" if default is None or default is False else f" (default {default})"
                how |= (more or {}).get(dest(flag), {})
                group.add_argument(flag, help=meaning, **how)
                self.defaults[dest(flag)] = default

    @staticmethod
    def value(flag: str, kind: str | tuple, text: str) -> str | float:
        """A flag's text as a path, or as a number within its limits."""
        if isinstance(kind, str):
            if not text:
                raise UserError(f"{flag}: is empty")
            return os.path.expanduser(text)  # shells leave --out=~/run as it is
        try:
            value = type(kind[0])(text)
        except ValueError:
            value = text
        check_limits({dest(flag): value}, {dest(flag): kind})
        return value

    def given(self, argv: list[str] | None = None) -> dict:
        """Only the flags that argv has, by their names in args."""
        return vars(self.parse_args(argv))

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """All flags of a run; only --channels and --amp wait for pictures and device."""
    given = Parser("infogan.py", (__doc__ or "").split("\nSections")[0], FLAGS).given(argv)
    shape = {}
    if "init" in given:  # a run that is there has codes and networks too, should the file be gone
        paths = [given["init"], f"{resolve(given, {}).out}/last.pt"]
        for path in [path for path in paths if os.path.isfile(path)][:1]:
            before = load_checkpoint(path)["args"]
            shape = {flag: before[flag] for flag in SHAPE}
            if other := differences(Namespace(**{**shape, **given}), shape, SHAPE):
                raise UserError(f"--init {path} has {other[0]}; leave this flag out")
    args = resolve(given, shape)
    spec_of(args)
    return args


# program ------------------------------------------------------------------------------------------


class Output:
    """A stream that survives its reader: a closed terminal must not end a run."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def run(
    program: str,
    job: Callable[[], int],
    if_out_of_memory: str = "lower --batch-size, --width or --image-size",
) -> int:
    """The job's exit code; an error that the user can fix is one line on stderr and exit code 2."""
    try:
        return job()
    except UserError as error:
        text, code = str(error), error.code
    except OSError as error:
        text, code = f"{error.filename or 'a file'}: {error.strerror or error}; fix this", 2
        text += " or give another --out, and run it again; saved files are unchanged"
    except (MemoryError, RuntimeError) as error:
        text, code = f"out of memory; {if_out_of_memory}", 2
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
    except KeyboardInterrupt:
        text, code = "stopped", 130
    print(f"{program}: {text}".replace("\n", " "), file=sys.stderr)
    return code


def as_program(main: Callable[[], int]) -> None:
    """Runs main and ends the process, with streams that take any letter and survive."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.exit(main())


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged, 2 an error that the user can fix, 128 + signal if stopped."""
    return run("infogan.py", lambda: train(parse_args(argv)))


if __name__ == "__main__":
    as_program(main)
