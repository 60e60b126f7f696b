"""InfoGAN in one file: a GAN whose codes mean something, learned without labels.

Chen et al. 2016, arXiv:1606.03657. The generator G draws a picture x = G(z, c) from noise z and a
code c, the discriminator D tells it from real pictures, and a head Q on D's trunk must read c back
from x. L_I is a lower bound of the mutual information I(c; x) (Eqs. 5 and 6):

    min over G and Q, max over D:  V(D, G) - lambda L_I(G, Q),   L_I(G, Q) = E[log Q(c|x)] + H(c)

    python infogan.py --data ~/faces                          any folder of pictures
    python infogan.py --n-cat 10 --n-cont 20 --epochs 360     the third version, on data/anime
    python infogan.py --data mnist --n-cat 1 --n-cont 2       digits, downloaded by torchvision
    python infogan.py --data ~/faces --image-size 32 --width 32 --max-minutes 20    on a laptop
    python infogan.py --recipe notebook --out checkpoint/notebook    README's notebook, to compare
    python generate.py --ckpt checkpoint/cat1-cont2/last.pt   look at what each code does
The same command given again resumes the run.

What the default adds to the paper; `--recipe notebook` leaves it out:
    --shift         D sees shifted pictures, so it does not remember the set (2006.10738)
    --lam-identity  pictures of the same categories have the same colours in the same places
    --cap-cont      G is not rewarded for codes that Q already reads well
    --r1            a penalty on D's gradient, so it does not win (1801.04406)
    --ema           what is shown and saved is an average of G's weights (2312.02696)
    --upsample      nearest neighbours and 3x3 convolutions in G, not transposed ones
    --cont-at       continuous codes enter G at its 8x8 layer, where they move and reshape

Sections, the paper first (search for "# step ---"): errors, codes, networks, objective, step; then
device, pictures, checkpoint, run folder, display, train, flags, program.
Left out on purpose: labels, learning-rate schedules, growing networks, several GPUs, configs.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import zipfile
from argparse import (
    SUPPRESS,
    ArgumentParser,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from fnmatch import fnmatch
from functools import lru_cache, partial
from hashlib import sha256
from itertools import cycle, pairwise, product, zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

# errors -------------------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can fix, in one line: what is wrong, where, what to do."""

    code = 2  # of the program's exit


class Diverged(UserError):
    """The training itself went wrong: NaN, infinity, or a loss far too large."""

    code = 1


def check_limits(values: dict, limits: dict) -> None:
    """Raises UserError when a value of a name in limits is missing, of another type, or outside.

    Limits are those of FLAGS: (lowest, highest) or a list of choices.
    """
    for name, allowed in limits.items():
        low, *_, high = allowed
        value, listed = values.get(name), isinstance(allowed, list)
        fits = type(value) is type(low) and (value in allowed if listed else low <= value <= high)
        if not fits:
            kind = "a whole number" if type(low) is int else "a number"
            must = f"one of {allowed}" if listed else f"{kind} from {low} to {high}"
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
        check_limits(vars(self), {name: LIMITS[name] for name in vars(self)})
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
        kind, number = re.fullmatch(r"(\D+)(\d*)", name).groups()
        part = kind if kind == "z" else f"c_{kind}"
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
    """A convolution as large as its input: a matrix product, which is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(flatten_hwc(x), flatten_hwc(self.weight), self.bias)[:, :, None, None]


class ConvTranspose2dFromPixel(nn.ConvTranspose2d):
    """A transposed convolution whose input is one pixel (n, channels, 1, 1): the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) @ flatten_hwc(self.kernel())
        return y.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)

    def kernel(self) -> Tensor:
        """(in, out, h, w)."""
        return self.weight


class UpsampleConv2d(nn.Conv2d):
    """Nearest neighbours to twice the size, then a 3x3 convolution with padding 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.folded(), self.bias, stride=2, padding=1)

    def folded(self) -> Tensor:
        """Both as one transposed convolution (4, 2, 1): a 4x4 kernel (in, out, 4, 4), as fast."""
        # a pixel that is doubled meets the sum of the kernel's weights in each 2x2 window
        kernel = 4 * F.avg_pool2d(F.pad(self.weight, [1] * 4), 2, 1)
        return kernel.flip(2, 3).transpose(0, 1)


class CodeMaps(ConvTranspose2dFromPixel):
    """The sum over k of c_k L_k U_k, with a learned map U_k (channels, size, size) for each code.

    U_k has mean 0 in each channel, so a code moves and reshapes, and does not tint (after
    EigenGAN, 2104.12476). It has root mean square 1, so U_k turns fast, and its strength L_k grows
    slowly, because maps that grow fast keep the first change that they find.
    """

    def __init__(self, n_cont: int, channels: int, size: int):
        super().__init__(n_cont, channels, size, bias=False)
        self.L = nn.Parameter(torch.full((n_cont, 1, 1, 1), 0.2))

    def kernel(self) -> Tensor:
        """L_k U_k: (n_cont, channels, size, size)."""
        U = self.weight - self.weight.mean((2, 3), keepdim=True)
        return self.L * U / U.square().mean((1, 2, 3), keepdim=True).sqrt()


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
        self.spec, widths = spec, layer_widths(image_size, width)[::-1]
        double = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        if upsample == "nearest":
            double = partial(UpsampleConv2d, kernel_size=3, padding=1)
        n_maps = spec.n_cont if cont_at == 8 and spec.dim > spec.n_cont else 0
        layers = [ConvTranspose2dFromPixel(spec.dim - n_maps, widths[0], 4, bias=False)]
        for n_in, n_out in zip(widths, [*widths[1:], width], strict=True):
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(True), double(n_in, n_out, bias=False)]
        if upsample == "nearest" and image_size >= 64:  # at 32x32 this layer made pictures worse
            layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, channels, 3, 1, 1)]
        else:
            layers[-1] = double(width, channels, bias=True)
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.maps = CodeMaps(n_maps, widths[1], 8) if n_maps else None

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
        self.spec, widths = spec, layer_widths(image_size, width)
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for n_in, n_out in pairwise(widths):
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
        h = self.trunk(x)  # (n, channels, 4, 4)
        return self.d_logits(h), self.q_output(h)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_cat's probabilities (n, n_cat, cat_dim); c_cont's means and sigmas (n, n_cont)."""
        q = self(x)[1]
        return q.q_logits.softmax(2), q.q_mu, (q.q_logvar / 2).exp()

    def d_logits(self, h: Tensor) -> Tensor:
        """D's logits (n,) from the trunk's output."""
        return self.d_head(h).flatten().float()

    def q_output(self, h: Tensor) -> QOutput:
        """Q(c|x) from the trunk's output."""
        return self.spec.split(self.q_head(h)[:, : self.spec.q_dim, 0, 0].float())


@torch.no_grad()
def init_weights(net: nn.Module, rng: torch.Generator) -> None:
    """DCGAN's start: convolutions N(0, 0.02), batch norm N(1, 0.02), biases 0."""
    for name, p in net.named_parameters():
        if name.endswith("weight"):
            p.normal_(float(p.dim() == 1), 0.02, generator=rng)  # a vector is batch norm's
        elif name.endswith("bias"):
            p.zero_()


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


def kept_categories(logits: Tensor, logits_augmented: Tensor) -> Tensor:
    """I(k; k') of the categories that Q reads from pictures and from augmented copies of them.

    Of logits (n, n_cat, cat_dim), in nats, the sum over the codes (IIC, 1807.06653, Eq. 3): at most
    n_cat log(cat_dim), where no category is lost by the augmentation and all come equally often.
    """
    p, q = logits.softmax(2), logits_augmented.softmax(2)
    joint = (p[:, :, :, None] * q[:, :, None]).mean(0)  # (n_cat, cat_dim, cat_dim)
    joint = ((joint + joint.mT) / 2).clamp(min=1e-6)
    apart = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
    return (joint * (joint / apart).log()).sum()


def local_loss(x: Tensor, y: Tensor) -> Tensor:
    """How large a part of pictures x (n, channels, h, w) changes, with one code, to y.

    With |d| the change of each of 16x16 cells: E[|d|]^2 / E[|d|^2], 1 where all cells change
    alike, 1/256 where one does (after the spatial constriction of 2104.05622).
    """
    square = F.avg_pool2d(x - y, x.shape[3] // 16).square().sum(1).flatten(1) + 1e-8
    return (square.sqrt().mean(1).square() / square.mean(1)).mean()


def losses_of_change(spec: CodeSpec, x: Tensor, args: Namespace) -> tuple[Tensor, Tensor]:
    """identity_loss and local_loss of pictures x of pair's and vary's codes; 0 without weight."""
    identity = local = torch.zeros((), device=x.device)
    n = len(x) // 4 if args.lam_local else 0
    if args.lam_identity and spec.n_cat:
        identity = identity_loss(x[: len(x) - n])
    if n:
        local = local_loss(x[:n], x[len(x) - n :])
    return identity, local


def pair(codes: Codes) -> Codes:
    """The same codes, but each two neighbours share their categories."""
    return codes._replace(c_cat=codes.c_cat[::2].repeat_interleave(2, 0)[: len(codes.z)])


def vary(codes: Codes, n_codes: int, rng: torch.Generator) -> Codes:
    """The same codes, but the last quarter are the first ones with one code of each changed.

    One of the first n_codes, of which the categorical ones come first. Its new value is that of
    another picture, so a category may stay the same.
    """
    z, c = codes.z.clone(), torch.cat([codes.c_cat, codes.c_cont], 1)
    n, n_cat = len(z) // 4, codes.c_cat.shape[1]
    rest = len(z) - n
    changed = torch.randint(n_codes, (n, 1), generator=rng) == torch.arange(c.shape[1])
    z[rest:], c[rest:] = z[:n], torch.where(changed, c[rest:], c[:n])
    return Codes(z, c[:, :n_cat].long(), c[:, n_cat:])


R1_EVERY = 16  # steps, with R1 times 16: the same for less time (1912.04958, appendix B)


def r1_penalty(d_real: Tensor, x: Tensor) -> Tensor:
    """R1 = E[|dD(x)/dx|^2] / 2 on real pictures: keeps D from winning (1801.04406, Eq. 9)."""
    (gradient,) = torch.autograd.grad(d_real.sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def shift(x: Tensor, u: Tensor, max_shift: Tensor | None) -> Tensor:
    """Pictures moved by up to max_shift whole pixels in x and y, on grey (DiffAugment).

    u (n, 2) says how far each goes, uniform in [0, 1). Without max_shift: x itself.
    """
    if max_shift is None:
        return x
    by = ((2 * max_shift + 1) * u).floor() - max_shift
    i = torch.arange(x.shape[3], device=x.device)
    # Y moves rows and X columns, both (n, size, size): 1 where [row, source] says who goes where
    Y, X = (i[:, None] + by[:, :, None, None] == i).to(x.dtype).unbind(1)
    return (Y[:, None] @ x @ X[:, None].mT).to(x.dtype)


def augment(x: Tensor, u: Tensor, strength: float) -> Tensor:
    """Pictures (n, channels, size, size) warped, blurred, in another light, each in its own way.

    At strength 1: turned up to 17 degrees, 30% larger or smaller, moved by 15% of the width, half
    as much light or half as much again. u (n, 8) says how, uniform in [0, 1).
    """
    u = strength * (2 * u - 1)
    warp = 0.3 * u[:, :6].unflatten(1, (2, 3))
    gain, light = (0.5 * u[:, 6:, None, None]).split(1, 1)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for places
        where = F.affine_grid(torch.eye(2, 3, device=x.device) + warp, x.shape, align_corners=False)
    edge = 1 - 1 / x.shape[3]  # clamped to the outermost pixels: just what padding_mode="border" is
    on = "cpu" if x.device.type == "mps" else x.device  # until torch 2.13 MPS has no gradient of it
    y = F.grid_sample(x.to(on), where.clamp(-edge, edge).to(on), align_corners=False).to(x.device)
    y = F.avg_pool2d(F.pad(y, [1] * 4, mode="replicate"), 3, 1)
    y = (gain.exp() * (y + light)).clamp(-1, 1)
    return y.contiguous(memory_format=torch.channels_last)


@contextmanager
def frozen_averages(D: Discriminator) -> Iterator[None]:
    """Inside, the running averages of D's batch norm do not change."""
    norms = [m for m in D.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = 0.1  # torch's default


def judge_real(
    D: Discriminator, x: Tensor, u: Tensor, args: Namespace
) -> tuple[Tensor, Tensor | float]:
    """D's logits of real pictures, and their kept_categories where --lam-real asks for them."""
    with frozen_averages(D):
        h, kept = D.trunk(x), 0.0
        if args.lam_real:  # what a category means must hold for real pictures too
            augmented = D.trunk(augment(x.detach(), u, args.q_augment))
            kept = kept_categories(D.q_output(h).q_logits, D.q_output(augmented).q_logits)
        return D.d_logits(h), kept


def d_and_q(
    D: Discriminator, shifted: Tensor, x: Tensor, u: Tensor, strength: float
) -> tuple[Tensor, QOutput]:
    """D's logits of shifted x, Q(c|x) of x as it is; in one pass where both are the same tensor.

    If strength > 0, Q reads the categoricals from augmented x: what a category means must survive
    that, so it is not pose, stroke or light. u (n, 8) says how x is augmented. Batch norm's running
    averages are of the pass of x as it is, which is what users of Q give it.
    """
    if shifted is x:
        d, q = D(x)
    else:
        with frozen_averages(D):
            d = D.d_logits(D.trunk(shifted))
        q = D.q_output(D.trunk(x))
    if strength and D.spec.n_cat:
        with frozen_averages(D):
            augmented = D.q_output(D.trunk(augment(x, u, strength)))
        q = q._replace(q_logits=augmented.q_logits)
    return d, q


# step ---------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that training changes."""

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
    changed: tuple[int, int] = (0, 0)  # the step and epoch from which per_epoch holds
    minutes: float = 0.0  # of training, over all starts
    sums: dict[str, Tensor] = field(default_factory=dict)  # of metrics, since the last row
    rows: list[dict[str, float]] = field(default_factory=list)  # of log.csv

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, and the steps taken in it."""
        step, epoch = self.changed
        epochs, steps = divmod(self.step - step, self.per_epoch)
        return epoch + epochs, steps

    @property
    def epochs(self) -> float:
        """Passes over the pictures so far."""
        epoch, steps = self.place
        return epoch + steps / self.per_epoch

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds up a step's metrics, on the device."""
        if self.sums:
            torch._foreach_add_([*self.sums.values()], [*metrics.values()])
        else:
            self.sums = tree_map(torch.clone, metrics)


NETS, OPTIMISERS = ("G", "G_ema", "D"), ("opt_G", "opt_D")  # of State, in checkpoints as well
COUNTS = ("per_epoch", "step", "changed", "minutes", "sums")


N_U = 22  # uniform numbers that a step takes for each picture


class Batch(NamedTuple):
    """What a step takes, all of it on the device: a CUDA graph can copy nothing from the CPU."""

    x: Tensor  # (n, channels, size, size), real pictures in [-1, 1]
    codes: Codes  # of n pictures to draw
    u: Tensor  # (n, N_U), uniform in [0, 1): how pictures are shifted and augmented
    max_shift: Tensor  # (): how far D's pictures are shifted, in pixels
    beta: Tensor  # (): the share of G_ema that stays


Metrics = dict[str, Tensor]  # by METRICS' names and the codes', each a number
Variant = tuple[bool, bool]  # of a step: with R1, with shifts; a CUDA graph has no branches


# a new loss: its function under "objective", two lines in train_step (loss; values, in the same
# place as its name here), and for its weight a row in FLAGS
METRICS = ("loss_D", "loss_G", "D_real", "D_fake", "R1", "identity", "local")  # and each code's L_I


def train_step(state: State, args: Namespace, batch: Batch, kind: Variant | None = None) -> Metrics:
    """One step of D, then of G, of a kind (by default whose turn it is); returns the metrics.

    L_I always trains G. It trains Q together with D's trunk in D's step (args.info_to "trunk", as
    the paper's own code does), or Q's head alone in G's step ("head", the notebook).
    """
    spec, G, D, to_trunk = state.spec, state.G, state.D, args.info_to == "trunk"
    x, codes, u, max_shift, beta = batch
    mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)
    with_r1, with_shifts = kind or variant(state, args)
    shift_real, shift_D, augment_D, shift_G, augment_G = u.split([2, 2, 8, 2, 8], 1)
    max_shift = max_shift if with_shifts else None

    D.requires_grad_(True)
    with mixed:
        x_fake = G(spec.join(codes))  # drawn once, for both steps
        x = shift(x, shift_real, max_shift).detach().requires_grad_(with_r1)
        d_real, kept = judge_real(D, x, augment_G, args)  # the same numbers, other pictures
        x_D = x_fake.detach()
        d_fake, q = d_and_q(D, shift(x_D, shift_D, max_shift), x_D, augment_D, args.q_augment)
    loss_D = loss = d_loss(d_real, d_fake)
    loss = loss - args.lam_real * kept
    if to_trunk:  # -V - lambda L_I, which trains Q and the trunk
        loss = loss - lambda_L_I(spec, mutual_information(spec, q, codes), args)
    R1 = identity = local = torch.zeros((), device=x.device)
    if with_r1:
        R1 = r1_penalty(d_real, x)
        loss = loss + R1_EVERY * args.r1 * R1
    descend(state.opt_D, loss)

    D.requires_grad_(False)  # G's step needs no gradient of D's weights
    D.q_head.requires_grad_(not to_trunk)
    with mixed:
        shifted = shift(x_fake, shift_G, max_shift)
        d_fake_G, q = d_and_q(D, shifted, x_fake, augment_G, args.q_augment)
    loss_G = g_loss(d_fake_G)
    L_I = mutual_information(spec, q, codes)
    # here L_I reaches G (Eq. 6); a continuous code that Q reads well need not grow further
    loss = loss_G - lambda_L_I(spec, L_I, args, args.cap_cont)
    if spec.names:  # both wait until Q reads the codes, because at first only z varies x
        q_knows = L_I[: spec.n_cat or None].detach().mean() / spec.ceilings[0]
        identity, local = losses_of_change(spec, x_fake, args)
        change = args.lam_identity * identity + args.lam_local * local
        loss = loss + q_knows.clamp(0, 1) ** 4 * change
    descend(state.opt_G, loss)
    update_ema(state.G_ema, G, beta)

    values = [loss_D, loss_G, d_real.sigmoid().mean(), d_fake.sigmoid().mean()]
    values += [R1_EVERY * R1, identity, local, *L_I]  # R1 comes once in R1_EVERY steps
    return {k: v.detach() for k, v in zip([*METRICS, *spec.names], values, strict=True)}


def variant(state: State, args: Namespace) -> Variant:
    """Of the step whose turn it is."""
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
    share = 1 - beta
    for average, new in zip(G_ema.state_dict().values(), G.state_dict().values(), strict=True):
        if average.is_floating_point():
            average.lerp_(new, share)
        else:
            average.copy_(new)


def spec_of(args: Namespace) -> CodeSpec:
    """The codes that a run's flags ask for."""
    return CodeSpec(args.n_cat, args.cat_dim, args.n_cont, args.z_dim)


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
    of_G, of_D = [*G.parameters()], [*D.trunk.parameters(), *D.d_head.parameters()]
    (of_D if args.info_to == "trunk" else of_G).extend(D.q_head.parameters())
    adam = {
        "betas": (0.5, 0.999),
        "fused": device.type in ("cpu", "cuda"),
        "capturable": args.cuda_graph is True,
    }
    opt_G = torch.optim.Adam(of_G, args.lr_g, **adam)
    opt_D = torch.optim.Adam(of_D, args.lr_d, **adam)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    return State(G.spec, device, G, G_ema, D, opt_G, opt_D, rng)


# device -------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The fastest device for "auto"; a GPU has its number. Raises UserError if it cannot work."""
    if name == "auto":
        kinds = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((kind for kind, its in kinds.items() if its.is_available()), "cpu")
    try:
        x = torch.ones(1, device=name)
        x.add_(1).item()  # a GPU that is too old for this torch fails here
        return x.device
    except Exception as error:  # of any kind: torch has several
        raise UserError(f"--device {name}: {error!s:.99}; use --device cpu") from error


def speed_up(device: torch.device) -> bool:
    """Prepares a device for training; returns whether it has fast bfloat16."""
    if device.type != "cuda":
        return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.benchmark = True  # a search for the fastest kernels
    return torch.cuda.is_bf16_supported(including_emulation=False)  # since Ampere


def choose_precision(args: Namespace, device: torch.device) -> None:
    """Sets args.amp and args.cuda_graph where they are AUTO. Raises UserError if impossible."""
    fast_bfloat16, on_cuda = speed_up(device), device.type == "cuda"
    if args.cuda_graph is AUTO:
        args.cuda_graph = on_cuda
    if args.cuda_graph and not on_cuda:
        raise UserError("--cuda-graph: needs a CUDA device; leave it out")
    if args.amp is AUTO:  # on a GPU its casts are kernels too, which only a graph makes cheap
        args.amp = fast_bfloat16 and (args.cuda_graph or not on_cuda)
    if args.amp and on_cuda and not fast_bfloat16:
        raise UserError("--amp: this GPU has no fast bfloat16; leave it out")


def to_device_if_it_fits(x: Tensor, device: torch.device) -> Tensor:
    """The set on a GPU where it takes less than half of the free memory there, else unchanged."""
    fits = device.type == "cuda" and x.nbytes < torch.cuda.mem_get_info(device)[0] // 2
    return x.to(device) if fits else x


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that does not wait for the device's earlier work: a GPU's from pinned memory."""
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=True)


def tensors_of(state: State) -> list[Tensor]:
    """All weights, batch norm's averages, then what the optimisers keep."""
    nets = [getattr(state, name).state_dict() for name in NETS]
    return tree_leaves([nets, state.opt_G.state, state.opt_D.state])


class GraphedStep:
    """train_step as CUDA graphs, so that the GPU never waits for Python: the same arguments.

    The first call captures every variant of the step and puts all weights back. So memory is taken
    and errors come at once, and no result changes. If a capture fails, steps go on one by one.
    """

    def __init__(self) -> None:
        self.batch = None  # the tensors that all graphs read
        self.graphs = {}  # variant: the graph, and the metrics that it fills

    def __call__(self, state: State, args: Namespace, batch: Batch) -> Metrics:
        if self.batch is None:
            self.batch = tree_map(torch.clone, batch)
            self.capture_all(state, args)
        key = variant(state, args)
        if key not in self.graphs:
            return train_step(state, args, batch)
        tree_map(Tensor.copy_, self.batch, batch)
        graph, metrics = self.graphs[key]
        graph.replay()
        return metrics

    def capture_all(self, state: State, args: Namespace) -> None:
        """Captures each variant that the run can come to, and undoes the steps that this takes."""
        before = [t.clone() for t in tensors_of(state)]
        shifts = [False, True] if int(args.shift * args.image_size) else [False]
        try:
            for key in product([False, True] if args.r1 else [False], shifts):
                self.graphs[key] = self.capture(state, args, key)
        except RuntimeError as error:
            self.graphs.clear()
            while error.__context__:  # a capture that was broken off hides why
                error = error.__context__
            why = str(error).partition("\n")[0]
            print(f"no CUDA graph: {why}; slower steps do the same", file=sys.stderr)
        with torch.no_grad():
            for now, old in zip_longest(tensors_of(state), before):
                # of a new run Adam's, the last ones, were not there before: they begin as zeros
                now.zero_() if old is None else now.copy_(old)

    def capture(self, state: State, args: Namespace, kind: Variant) -> tuple[object, dict]:
        """The graph of one variant, which runs nothing yet, and the metrics that it will fill."""
        if not self.graphs:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        usual = torch.cuda.current_stream()
        self.stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self.stream):
                for _ in range(3):  # cuDNN searches for kernels, which no graph can hold
                    train_step(state, args, self.batch, kind)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, self.stream):
                metrics = train_step(state, args, self.batch, kind)
        finally:
            torch.cuda.set_stream(usual)  # torch.cuda.graph does not where a capture fails
            usual.wait_stream(self.stream)
        return graph, metrics


# pictures -----------------------------------------------------------------------------------------
# load_pictures: find_pictures, then decode (read_picture, to_square for each), then the cache.
# next_batch: the pictures and codes of a step. make_batch: bytes to floats.

FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "ICO", "PCX", "SGI"]
FORMATS += ["QOI", "TGA", "AVIF"]  # not all that Pillow knows: for EPS it starts a program
DECODE_THREADS = 8  # so many files are decoded at once
DECODER_VERSION = 8  # counts up whenever decode changes its result
CROPS = {"centre": 0.5, "top": 0.0}  # how much of what a tall picture loses lies above the square
HIDDEN = r"(?is)\..*|@eadir|[@#$]recycle(\.bin)?|recycler|#snapshot|__macosx|lost\+found|lost\.dir"
HIDDEN += r"|found\.000|system volume information|desktop\.ini|thumbs(\.db)?"  # of systems too
OTHER_CACHE = "decoded pictures must go somewhere: XDG_CACHE_HOME names another folder"
MARK = ".generated"  # generate.py leaves it in each folder that it makes: what G draws is no data
OURS = {MARK, "args.json", "last.pt", "codes.csv"}  # each marks a run's folder, or generate.py's
DATA, IDX = Path("data"), "raw/train-images-idx3-ubyte"  # where torchvision keeps named sets
NAMED_SETS = {  # torchvision's class, its file; digits and clothes: 32x32, never mirrored
    "mnist": ("MNIST", f"MNIST/{IDX}"),
    "fashion-mnist": ("FashionMNIST", f"FashionMNIST/{IDX}"),
    "svhn": ("SVHN", "train_32x32.mat"),
}


@dataclass
class Pictures:
    """A training set, decoded once."""

    x: Tensor  # uint8 (N, size, size, channels), mapped from a file, or on the GPU
    fingerprint: str  # of the files' bytes, whatever their names, and the crop: a run keeps it
    names: list[str]  # paths, or numbers in a named set
    order: Tensor  # int64 (N,), the order that runs take them in: by their hashes
    sizes: list[tuple[int, int]]  # of the pictures in their files
    summary: str  # what was left out, in words


def first_ten(texts: Sequence[str]) -> str:
    """Ten at most, in one line that every terminal can show."""
    return ascii(", ".join(texts if len(texts) <= 10 else [*texts[:10], "..."]))[1:-1]


def find_pictures(root: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """All picture files below a folder, sorted; prints how often what else was passed over.

    exclude: patterns such as "*_mask.png" or "small/*" for paths within root.
    Linked folders are followed, each once; what cannot be opened counts as a file.
    """
    files, passed_over, visited = [], Counter(), {*root.resolve().parents}
    suffixes = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
    walk = os.walk(root, onerror=lambda e: files.append(Path(e.filename)), followlinks=True)
    for here, folders, names in walk:
        folder = Path(here)
        hidden = {name for name in folders if re.fullmatch(HIDDEN, name)}
        folders[:] = sorted({*folders} - hidden)
        if is_ours := folder != root and not OURS.isdisjoint(names):
            passed_over[f"folder {folder.name} (a run, or by generate.py)"] += 1
        if is_ours or folder.resolve() in visited:  # by a link, also one upwards
            folders.clear()
            continue
        visited.add(folder.resolve())
        passed_over.update(f"folder {name}" for name in hidden)
        for file in map(folder.joinpath, names):
            suffix = re.split("[?:_]", file.suffix.lower())[0]  # .jpg?w=400 and .jpg_large too
            inside = file.relative_to(root).as_posix()
            if by := [pattern for pattern in exclude if fnmatch(inside, pattern)]:
                passed_over[f"by --exclude {by[0]}"] += 1
            elif file.name.startswith("."):
                passed_over["hidden"] += 1
            elif suffix not in suffixes:
                passed_over[f"of {suffix or 'no suffix'}"] += 1
            else:
                files.append(file)
    if passed_over:
        most = [f"{n:,} {what}" for what, n in passed_over.most_common()]
        print(f"passed over in {root}: {first_ten(most)}")
    return sorted(files)


def open_named_set(name: str) -> Collection[tuple]:
    """torchvision's (picture, label) pairs, downloaded where they are missing."""
    kind, file = NAMED_SETS[name]
    path = DATA / file
    try:
        from torchvision import datasets  # only here: few runs need it

        return getattr(datasets, kind)(DATA, download=True)
    except Exception as error:  # of any kind: torchvision and scipy raise them
        why = f"torchvision cannot get it, or {path} is damaged or not all: delete it, and the same"
        why += f" command gets it again ({type(error).__name__}: {error})"
        raise UserError(f"{name}: {why}") from error


def to_square(image: Image.Image, size: int, channels: int, crop: str) -> Image.Image:
    """Any picture as (size, size) in 1 or 3 channels: upright, on white, cropped, scaled."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bit, which convert() would clip instead of scale
        image = image.convert("I").point(lambda v: v / 257 + 1e-6).convert("L")  # it rounds down
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, 0, (0.5, CROPS[crop]))


class Decoded(NamedTuple):
    """A picture as a run sees it, or the error that its file gave."""

    hash: str = ""  # of the file's bytes
    pixels: bytes = b""  # (size, size, channels)
    whole: tuple = ()  # the size of the picture in its file
    error: Exception | None = None


def read_picture(
    item: Path | Image.Image, size: int, channels: int, crop: str = "centre"
) -> Decoded:
    """Decodes a file, or takes a picture."""
    try:
        if isinstance(item, Image.Image):
            raw, image = item.tobytes(), item
        elif not item.is_file():  # a pipe would never end
            raise FileNotFoundError
        else:
            raw = item.read_bytes()
            image = Image.open(io.BytesIO(raw), formats=FORMATS)  # decodes nothing yet
        whole = image.size
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at 1/2, 1/4 or 1/8
        pixels = to_square(image, size, channels, crop).tobytes()
        return Decoded(sha256(raw).hexdigest(), pixels, whole)
    except Exception as error:  # decoders raise anything
        return Decoded(error=error)


def remarks(pictures: Pictures, crop: str) -> str:
    """Lines on a set that a user should see before a long training."""
    some = pictures.x[:: 1 + len(pictures.x) // 200].flatten(1)
    text, sizes, size = "", pictures.sizes, pictures.x.shape[1]
    cut = sum(3 * min(sides) <= 2 * max(sides) for sides in sizes)
    if crop == "centre" and cut > len(sizes) / 10:
        text += f"\n{cut:,} of them lose a third of their area or more: their middle is taken;"
        text += " infogan.py --crop top takes the upper part of tall ones"
    if (side := max(map(min, sizes))) < size:
        text += f"\nall are smaller than {size}x{size}, at most {side}: they are enlarged,"
        text += " which takes time and shows no more; give a smaller --image-size"
    levels, spread = some.flatten().bincount().count_nonzero(), some.float().std(1).median()
    if levels < 16 or spread < 2:
        text += f"\nthey look empty: {levels} levels of brightness, a standard deviation of "
        text += f"{spread:.1f} (of 255); are they masks, white on nothing, or 12 bits in 16?"
        text += " --exclude leaves files out"
    return text


def decode(root: Path, items: dict, form: tuple, write: Callable) -> dict:
    """Decodes paths or pictures, by their names, and writes the bytes of each.

    Returns the other values of Pictures, and the shape of its x. root: where the set is. form:
    size, channels, crop.
    """
    kept, names, unreadable = {}, [], []  # kept: the size of each in its file, by its hash
    Image.init()  # loads Pillow's formats, which threads must not do at the same time
    with warnings.catch_warnings(), ThreadPoolExecutor(DECODE_THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about files that it can read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # of over 89 megapixels
        read = pool.map(lambda item: read_picture(item, *form), items.values())
        hidden = None if sys.stderr else True  # None: where it is no terminal
        read = tqdm(read, "pictures", len(items), leave=False, disable=hidden)
        for name, picture in zip(items, read, strict=True):
            if picture.error:
                unreadable.append(f"{name} ({type(picture.error).__name__})")
            elif picture.hash not in kept:
                write(picture.pixels)
                kept[picture.hash] = picture.whole
                names.append(str(name))
    n, hashes, summary = len(kept), [*kept], ""
    if copies := len(items) - len(unreadable) - n:
        summary += f", exact copies dropped: {copies:,}"
    if unreadable:
        summary += f", unreadable files skipped: {len(unreadable):,} ({first_ten(unreadable)})"
    if n < 2:
        raise UserError(f"{root}: {n} pictures{summary}, at least 2 are needed; {hint(root)}")
    size, channels, crop = form
    return {
        "shape": (n, size, size, channels),
        "fingerprint": sha256("".join([crop, *sorted(hashes)]).encode()).hexdigest()[:16],
        "names": names,
        "order": sorted(range(n), key=hashes.__getitem__),
        "sizes": [*kept.values()],
        "summary": summary,
    }


def hint(root: Path) -> str:
    """What helps where there are no pictures: to unpack an archive, root or one below it."""
    for path in [root, *sorted(root.rglob("*"))]:
        name, suffix = shlex.quote(str(path)), path.suffix.lower()
        if suffix in (".zip", ".tar", ".gz", ".tgz"):
            tool = "zipfile" if suffix == ".zip" else "tarfile"
            return f"unpack it: python -m {tool} -e {name} {name}-unpacked"
        if suffix in (".npz", ".parquet"):
            return f"unpack it: write each picture in {name} as a file, such as a PNG"
    return "give a folder of pictures; `make data` downloads faces, `make demo` draws some"


def read_cache(path: Path, stamp: str) -> Pictures | None:
    """x is mapped into memory; None where the file is missing, damaged, or of other files."""
    with suppress(Exception), zipfile.ZipFile(path) as archive:
        values = json.loads(archive.read(stamp))
        shape, order = values.pop("shape"), torch.tensor(values.pop("order"))
        x = torch.from_file(str(path), size=math.prod(shape), dtype=torch.uint8)
        return Pictures(x.view(shape), order=order, **values)


def write_cache(path: Path, stamp: str, decode_to: Callable) -> None:
    """Pixels as they are decoded, so that no set is too large; then a zip file of the rest."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in path.parent.glob(".*.part"):
            if time.time() - part.stat().st_mtime > 3600:  # of a start that was killed
                part.unlink()
        with replacing(path) as file:
            values = decode_to(file.write)
            # "a" appends to what is no zip file; readers find it from the end
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr(stamp, json.dumps(values))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {OTHER_CACHE}") from error


def load_pictures(
    data: str,
    size: int,
    channels: int | None = None,
    crop: str = "centre",
    exclude: Sequence[str] = (),
) -> Pictures:
    """A folder or a named set, decoded once: later starts map the cache's file into memory.

    channels None: 1 when every picture is grey, else 3. crop: the "centre" or the "top" of tall
    pictures. exclude: see find_pictures. Exact copies and unreadable files are counted, left out.
    Raises UserError when fewer than two remain.
    """
    named = data in NAMED_SETS
    root = DATA / NAMED_SETS[data][1] if named else Path(data)
    root, form = root.resolve(), (size, channels or 3, crop)  # one set, however its path is written
    if not named and not root.is_dir():
        raise UserError(f"{data}: no such folder; {hint(root)}")
    files = [root] if named else find_pictures(root, exclude)
    place = sha256(os.fsencode(f"{DECODER_VERSION} {form} {root}")).hexdigest()
    stamp = sha256()  # changes with every file's name, size and time
    for file in files:
        stamp.update(os.fsencode(file))
        with suppress(OSError):  # an unreadable one counts by its name
            stamp.update(f" {file.stat().st_size} {file.stat().st_mtime_ns}\0".encode())
    stamp = stamp.hexdigest()
    # the user's own folder: one of pictures may be read-only, or shared
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "infogan")
    path = folder / f"{place[:16]}.pixels"
    pictures = read_cache(path, stamp)
    if not pictures:
        items = {file: file for file in files}
        if named:
            items = dict(enumerate(image for image, _ in open_named_set(data)))
        write_cache(path, stamp, partial(decode, root, items, form))
        pictures = read_cache(path, stamp)
        if not pictures:  # some drives map no files into memory
            raise UserError(f"{path}: cannot be read as it was written; {OTHER_CACHE}")
    print(f"{len(pictures.x):,} pictures in {data}{pictures.summary}{remarks(pictures, crop)}")
    parts = pictures.x.split(100)
    if channels is None and all((part == part[..., :1]).all() for part in parts):
        pictures.x = pictures.x[..., :1]
    return pictures


def make_batch(x: Tensor, flip: bool, rng: torch.Generator, device: torch.device) -> Tensor:
    """uint8 (n, h, w, channels) as floats (n, channels, h, w) in [-1, 1]; flip mirrors half."""
    x = to_device(x, device)
    if flip:
        mirrored = torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5
        x = torch.where(to_device(mirrored, device), x.flip(2), x)
    x = x.contiguous().permute(0, 3, 1, 2).float()  # moved as bytes; its layout is channels_last
    return torch.add(torch.tensor(-1.0), x, alpha=1 / 127.5)  # x / 127.5 - 1 in one pass


@lru_cache(1)  # once an epoch
def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The numbers below n in the order of an epoch."""
    rng = torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**63)
    return torch.randperm(n, generator=rng)


def next_batch(state: State, args: Namespace, pictures: Pictures) -> Batch:
    """What the state's step takes: the next pictures of its epoch, codes, chance."""
    n, device, x = min(args.batch_size, len(pictures.x)), state.device, pictures.x
    epoch, i = state.place
    rows = pictures.order[shuffled(len(x), args.seed, epoch)[i * n : (i + 1) * n]]
    real = x.index_select(0, to_device(rows, x.device))
    real = make_batch(real, args.flip, state.rng, device)
    codes = state.spec.sample(n, state.rng)
    # what losses_of_change expects: neighbours that share their categories; a last quarter that are
    # the first with one code changed
    codes = pair(codes) if args.lam_identity else codes
    if args.lam_local and state.spec.names:
        n_codes = state.spec.n_cat if args.local_to == "cat" else len(state.spec.names)
        codes = vary(codes, n_codes, state.rng)
    u = torch.rand(n, N_U, generator=state.rng)
    numbers = torch.tensor([max_shift_at(state, args), beta_at(state, args)])
    return tree_map(lambda t: to_device(t, device), Batch(real, codes, u, *numbers))


# checkpoint ---------------------------------------------------------------------------------------
# gather_checkpoint: all that a run needs to resume. restore: puts it back. find_checkpoint (run
# folder): from which file, and whether the flags fit (KEPT, ALLOWED and PRINTED, below FLAGS).

FORMAT = 2
NEW_RUN = "another --out starts a new run"


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


def write_file(path: Path, raw: bytes | memoryview) -> None:
    """Writes a file, complete or not at all."""
    with replacing(path) as file:
        file.write(raw)


def to_bytes(values: dict) -> memoryview:
    """A dict as torch.load takes it."""
    buffer = io.BytesIO()  # written to a file, torch.save calls a full disk an internal error
    torch.save(values, buffer)
    return buffer.getbuffer()


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint, or a folder's last.pt, on the CPU: "args" (a dict of the flags), "D", "path", …

    Runs no code from the file. Raises UserError for a file that is not a checkpoint of ours.
    """
    path = Path(path, "last.pt") if os.path.isdir(path) else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; infogan.py saves last.pt in a run's folder")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not verify checksums
                raise zipfile.BadZipFile
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["format"] != FORMAT:
            raise ValueError("another version's")
        before = {"cont_at": 4, "lam_local": 0.0}  # of all runs before there was a choice
        ckpt["args"] = before | ckpt["args"]
        check_limits(ckpt["args"], LIMITS)
    except Exception as error:  # of any kind: the file is at fault
        why = f"broken, or not a checkpoint of this infogan.py ({error!r:.99})"
        raise UserError(f"{path}: {why}; a copy of epoch_*.pt can take its place") from error
    return ckpt | {"path": str(path)}


def load_net(path: str | Path | dict, key: str, device: str) -> Generator | Discriminator:
    """G ("G_ema") or D (its read() tells codes) of a file or of load_checkpoint's dict, frozen."""
    ckpt = path if isinstance(path, dict) else load_checkpoint(path)
    with torch.device("meta"):  # takes no memory before the shapes are known to fit
        G, D = networks(Namespace(**ckpt["args"]))
    net = G if key == "G_ema" else D
    try:
        net.load_state_dict(ckpt[key], assign=True)
    except Exception as error:  # of any kind here too
        raise UserError(f"{ckpt['path']}: its {key} does not fit its own flags") from error
    net = net.float().eval().requires_grad_(False)
    return net.to(device, memory_format=torch.contiguous_format)


def load_generator(path: str | Path | dict, device: str = "cpu") -> tuple[Generator, CodeSpec]:
    """(G, spec) of a file or of load_checkpoint's dict: `x = G(spec.join(spec.sample(n, rng)))`."""
    G = load_net(path, "G_ema", device)
    return G, G.spec


def load_encoder(path: str | Path | dict, device: str = "cpu") -> tuple[Callable, CodeSpec]:
    """(Q, spec): Q reads codes from pictures in [-1, 1], see Discriminator.read."""
    D = load_net(path, "D", device)
    return D.read, D.spec


def check_learned(state: State) -> None:
    """Raises Diverged for a run that ends far off."""
    for name in ("loss_D", "loss_G", *state.spec.names):
        value = state.rows[-1][name] if state.rows else 0.0
        if abs(value) > 50:
            cure = "it has learned nothing; give another --out, and smaller --lr-g and --lr-d"
            raise Diverged(f"step {state.step:,}: {name} is {value:.0f}: {cure}")


def check_finite(step: int, metrics: dict[str, float]) -> None:
    """Raises Diverged that names the first metric which is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            cure = "last.pt is the last good one, if saved. Lower --lr-g and --lr-d"
            raise Diverged(f"step {step}: {name} is {value}; {cure}")


def gather_checkpoint(state: State, args: Namespace, fingerprint: str) -> dict:
    """All that a run needs to resume bit for bit."""
    ckpt = {name: getattr(state, name).state_dict() for name in NETS + OPTIMISERS}
    weights = {
        f"the sum of {name}'s weights": sum(map(torch.sum, ckpt[name].values())) for name in NETS
    }
    check_finite(state.step, state.sums | weights)
    ckpt |= {name: getattr(state, name) for name in COUNTS}
    return ckpt | {
        "format": FORMAT,
        "args": vars(args),
        "fingerprint": fingerprint,
        "rng": state.rng.get_state(),
        "rows": torch.tensor([[*row.values()] for row in state.rows], dtype=torch.float64),
    }


def restore(state: State, ckpt: dict, weights_only: bool = False) -> None:
    """Puts a checkpoint into state. Raises UserError where it does not fit."""
    per_epoch = state.per_epoch
    try:
        for name in NETS:  # --shrink keeps of G only the average
            getattr(state, name).load_state_dict(ckpt.get(name, ckpt["G_ema"]))
        if weights_only:
            return
        for name in OPTIMISERS:
            opt = getattr(state, name)  # with the learning rates of today's flags
            opt.load_state_dict({**ckpt[name], "param_groups": opt.state_dict()["param_groups"]})
        for name in COUNTS:
            setattr(state, name, ckpt.get(name, getattr(state, name)))
        state.sums = tree_map(lambda value: value.to(state.device), state.sums)
        columns = log_columns(state.spec)  # a run with other ones would lose rows
        state.rows = [dict(zip(columns, row, strict=True)) for row in ckpt["rows"].tolist()]
        state.rng.set_state(ckpt["rng"].clone())  # torch reads a wrong part of a view
    except Exception as error:  # of any kind here too
        cure = "give another --init" if weights_only else NEW_RUN
        why = f"training cannot go on from it ({error!r:.99})"
        raise UserError(f"{ckpt['path']}: {why}; {cure}") from error
    if state.per_epoch != per_epoch:  # other pictures or another batch: the next epoch begins
        state.changed = state.step, math.ceil(state.epochs)
        state.per_epoch = per_epoch


# run folder ---------------------------------------------------------------------------------------

IGNORED = HIDDEN + r"|.*\.(txt|log|out|err|sh|[oe]\d+)|logs"  # in a run's folder
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # the last by batch systems, also repeatedly
SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A run's folder, made if missing, for this process alone: the lock ends with the process."""
    others = sorted(p.name for p in out.glob("*") if not re.fullmatch(IGNORED, p.name))
    if others and {"args.json", "last.pt"}.isdisjoint(others):
        raise UserError(f"--out {out}: has {others[0]} but no run in it; give another folder")
    lock = FileLock(out / ".lock", timeout=0)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"--out {out}: another process is training there") from None
    except (OSError, NotImplementedError) as error:  # as on some network drives
        print(f"{out}: cannot be locked ({error}); start no second run there")
    for part in out.rglob(".*.part"):
        part.unlink()  # from a process that was killed while it wrote
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
            out.rmdir()  # only if it is empty: a start that failed
        lock.release()


def differences(args: Namespace, before: dict, names: Collection[str]) -> list[str]:
    """ "--r1 0.3, not --r1 1.0" for each flag that is not as before, when it was there already."""
    return [
        f"{as_typed(name, before[name])}, not {as_typed(name, new)}"
        for name, new in vars(args).items()
        if name in names and new not in (None, AUTO, before.get(name, new))
    ]


def as_typed(name: str, value: object) -> str:
    """A flag as one gives it: "--lam-cat 1.0", "--no-flip"; or "no --init"."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if value is None:
        return f"no --{flag}"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"--{flag} {shlex.quote(str(v))}" for v in values)


def refuse(args: Namespace, changes: list[str]) -> None:
    """Raises UserError where there are changes."""
    if changes:
        text = f"{args.out} was trained with {', '.join(changes)}; {NEW_RUN}, or --allow-changes"
        raise UserError(text + " permits other pictures, --crop and --batch-size")


def find_checkpoint(args: Namespace) -> dict | None:
    """last.pt of the run in args.out, or its newest kept one, if it fits the flags; or None."""
    out = Path(args.out)
    kept = sorted(out.glob("epoch_*.pt"), key=lambda path: (len(path.name), path.name))
    paths = [*kept, *out.glob("last.pt")]  # without last.pt: killed before the first
    if not paths:
        return None
    path, ckpt = paths[-1], load_checkpoint(paths[-1])
    allowed = [] if args.allow_changes else ALLOWED
    refuse(args, differences(args, ckpt["args"], KEPT + allowed))
    print(f"resuming from {path}, step {ckpt['step']:,}")
    if changes := differences(args, ckpt["args"], PRINTED):
        print(f"until now it had {', '.join(changes)}")
    return ckpt


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects signals that ask a run to stop; a second INT, TERM or HUP stops it at once."""
    caught, before = [], {}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        if number in SIGNALS[:3]:
            signal.signal(number, before[number])

    for number in SIGNALS:
        # ignored: by nohup, or a shell for a job with &; None: a handler that is not Python's
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            with suppress(ValueError):  # in a thread of another program, which has its own
                before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# display ------------------------------------------------------------------------------------------
# Recorder.after_step: what is shown and saved when. State.rows: what log.csv and curves.png show.


def to_image(x: Tensor) -> Image.Image:
    """A picture (channels, h, w) in [-1, 1] as 8 bits a channel."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu()
    return Image.fromarray(x.squeeze(2).numpy())  # grey has no third dimension


def make_grid(x: Tensor) -> Image.Image:
    """Pictures (n, channels, size, size) in rows of 8, black between them."""
    cell, columns, rows = x.shape[3] + 2, min(8, len(x)), math.ceil(len(x) / 8)
    grid = Image.new("RGB", (2 + cell * columns, 2 + cell * rows))
    for i, picture in enumerate(x):
        grid.paste(to_image(picture), (2 + cell * (i % 8), 2 + cell * (i // 8)))
    return grid


def save_picture(path: Path, image: Image.Image, **options: object) -> None:
    """A PNG or a GIF, by the path's ending, complete or not at all."""
    with replacing(path) as file:
        image.save(file, path.suffix[1:], **options)


def save_animation(out: Path) -> None:
    """training.gif: at most 60 of the run's grids with their epochs; the last stays longer."""
    epochs, frames = sorted(int(p.stem[6:]) for p in out.glob("samples/epoch_*.png")), []
    for i in torch.linspace(0, len(epochs) - 1, min(len(epochs), 60)).round().int():
        grid = Image.open(out / f"samples/epoch_{epochs[i]:04d}.png")
        frame = ImageOps.expand(ImageOps.contain(grid, (530, 530)), (0, 28, 0, 0), "white")
        title = f"epoch {epochs[i]}"
        ImageDraw.Draw(frame).text((6, 4), title, "black", ImageFont.load_default(16))
        frames.append(frame.quantize(256))  # a palette for each: few shades would show as steps
    if len(frames) > 1:
        duration = [250] * (len(frames) - 1) + [2000]  # milliseconds
        first, *rest = frames
        how = {"append_images": rest, "loop": 0, "duration": duration}
        save_picture(out / "training.gif", first, save_all=True, **how)


def tell_apart(x: Tensor, y: Tensor) -> float:
    """The accuracy of nearest neighbours at telling sets of n pictures apart (1610.06545).

    0.5: not at all, 1: always. They see 16x16 pixels: what pictures show, not how sharp they are.
    """
    both = F.adaptive_avg_pool2d(torch.cat([x, y]), 16).flatten(1)
    nearest = torch.cdist(both, both).fill_diagonal_(math.inf).argmin(1)
    of_x = torch.arange(len(both)) < len(x)
    return (of_x == of_x[nearest]).float().mean().item()


def log_columns(spec: CodeSpec) -> list[str]:
    """Of log.csv."""
    return ["step", "epoch", "minutes", *METRICS, *spec.names, "told_apart"]


def draw_panel(title: str, epochs: Tensor, lines: Tensor, top: float) -> Image.Image:
    """A chart of 640x200 that shows zero, `top` and all but the most extreme 2% of the values."""
    colours = cycle(("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2"))
    panel = Image.new("RGB", (640, 200), "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    low, high = lines.quantile(0.02).clamp(max=0), lines.quantile(0.98).clamp(min=top)

    def height(v: Tensor) -> list[float]:
        return (175 - 145 * (v.clamp(low, high) - low) / (high - low)).tolist()

    pen.text((50, 8), f"{title}, by epoch", "black", font)
    for v in (torch.zeros(()), high):
        pen.line([(50, height(v)), (620, height(v))], "#dddddd")
        pen.text((44, height(v)), f"{v:.2f}", "black", font, anchor="rm")
    x = (50 + 570 * (epochs - epochs[0]) / (epochs[-1] - epochs[0])).tolist()
    for line, colour in zip(lines, colours, strict=False):
        pen.line([*zip(x, height(line), strict=True)], colour, 2)
    for k, epoch in enumerate(torch.linspace(epochs[0], epochs[-1], 5)):
        pen.text((50 + 570 * k / 4, 180), f"{epoch:.3g}", "black", font, anchor="ma")
    return panel


# what is saved when: last.pt each SAVE_SECONDS, with log.csv and samples/last.png; epoch_*.pt and
# samples/epoch_*.png by --save-every and --sample-every; everything at the end of a start
LOG_EVERY = R1_EVERY  # steps between two rows of log.csv, each with one R1
SAVE_SECONDS = 60.0  # between two saves of last.pt
SHOW_SECONDS = 30.0  # between two grids, two kept checkpoints, two lines of progress in a file
EARLY = (1, 2, 5, 10, 20, 50)  # epochs with a grid, however soon they come
N_COMPARED = 1000  # real and drawn pictures each that tell_apart gets
MOST_FAILED_SAVES = 5  # one after the other


class Recorder:
    """What a run shows and saves while it trains: progress, log.csv, curves, grids, checkpoints."""

    def __init__(
        self, state: State, args: Namespace, pictures: Pictures, last_step: int, end: float
    ):
        self.state, self.args, self.fingerprint = state, args, pictures.fingerprint
        self.out, self.last_step, self.end = Path(args.out), last_step, end
        self.failed, self.failed_saves = set(), 0
        self.in_terminal = bool(sys.stderr) and sys.stderr.isatty()
        self.told_apart = state.rows[-1]["told_apart"] if state.rows else 1.0
        self.batch_size = min(args.batch_size, len(pictures.x))
        self.began = time.monotonic()
        self.first_step, self.minutes_before = state.step, state.minutes
        self.last = {"progress": -math.inf}  # when each was due last; else this start's begin
        self.compare_seconds = SHOW_SECONDS
        rng = torch.Generator().manual_seed(args.seed)  # the same pictures and z at each start
        chosen = pictures.order[torch.randperm(len(pictures.x), generator=rng)[:N_COMPARED]]
        self.latents, self.more_latents = (
            state.spec.join(state.spec.sample(n, rng)).to(state.device) for n in (64, len(chosen))
        )
        self.real = make_batch(pictures.x[chosen], False, rng, torch.device("cpu"))
        self.save_grid("real", self.real[:64])
        if state.step == 0:
            self.save_grid("epoch_0000")
        self.board = self.attempt("TensorBoard", self.open_board)

    def attempt(self, what: str, job: Callable, *args: object) -> object:
        """What job returns. A failure is told once, and training goes on, which is worth more."""
        try:
            return job(*args)
        except Exception as error:  # viewers, full disks, old packages raise anything
            if what not in self.failed:
                print(f"{what}: {error}; training goes on", file=sys.stderr)
            self.failed.add(what)

    def is_due(self, what: str, seconds: float, epochs: int = 0) -> bool:
        """Whether so many seconds have passed since it last was; of epochs, after each n-th."""
        (epoch, steps), now = self.state.place, time.monotonic()
        within = epochs and (steps or epoch % epochs)
        if within or now - self.last.get(what, self.began) < seconds:
            return False
        self.last[what] = now
        return True

    def after_step(self, is_asked_to_stop: bool) -> bool:
        """Shows and saves what is due; returns whether the run stops here, with all saved."""
        state, args, now = self.state, self.args, time.monotonic()
        state.minutes = self.minutes_before + (now - self.began) / 60
        stops = state.step == self.last_step or is_asked_to_stop or now > self.end
        if self.is_due("told_apart", self.compare_seconds):
            self.compare()
        if state.step % LOG_EVERY == 0:
            self.add_row()
        if self.is_due("progress", 0.5 if self.in_terminal else SHOW_SECONDS) or stops:
            with suppress(OSError):  # whoever read this is gone
                self.show(stops)
        epoch, steps = state.place
        seconds = 0 if args.sample_every else SHOW_SECONDS
        is_early = epoch in EARLY and not steps
        if self.is_due("grid", seconds, args.sample_every or 5) or is_early:
            self.save_grid(f"epoch_{epoch:04d}")
            self.attempt("curves.png", self.save_curves)
        seconds = 0 if args.save_every else SHOW_SECONDS
        keeps = self.is_due("kept", seconds, args.save_every or 25)
        if self.is_due("last.pt", SAVE_SECONDS) or keeps or stops:
            self.save(keeps, stops)
        if stops:  # after last.pt: a second signal may end us
            self.attempt("training.gif", save_animation, self.out)
        return stops

    def add_row(self) -> None:
        """The next row of log.csv, and of TensorBoard."""
        state = self.state
        row = {"step": state.step, "epoch": state.epochs, "minutes": state.minutes}
        row |= self.means() | {"told_apart": self.told_apart}
        state.rows.append(row)
        state.sums = {}
        if self.board:
            self.attempt("TensorBoard", self.add_to_board, row)
        check_finite(state.step, row)

    def means(self) -> dict[str, float]:
        """Of the metrics, since the last row."""
        sums, n = self.state.sums, self.state.step % LOG_EVERY or LOG_EVERY
        return dict(zip(sums, (torch.stack([*sums.values()]) / n).tolist(), strict=True))

    def open_board(self) -> object:
        from torch.utils.tensorboard import SummaryWriter  # which takes a second

        return SummaryWriter(str(self.out), purge_step=self.state.step + 1)

    def add_to_board(self, row: dict[str, float]) -> None:
        """One event for the whole row: one for each value takes as long as a GPU's step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        groups = {name: "L_I" if name in self.state.spec.names else "GAN" for name in row}
        values = [{"tag": f"{groups[name]}/{name}", "simple_value": row[name]} for name in row]
        self.board.file_writer.add_summary(Summary(value=values), row["step"])

    def show(self, stops: bool) -> None:
        """The line of progress: in a terminal one that changes, in a file a new one."""
        state, steps = self.state, self.last_step - self.state.step
        now, epochs = time.monotonic(), round(state.epochs + steps / state.per_epoch, 1)
        speed = (state.step - self.first_step) / (now - self.began)  # steps a second
        left = timedelta(seconds=max(0, round(min(steps / speed, self.end - now, 1e10))))
        row, spec = state.rows[-1] if state.rows else self.means(), state.spec
        text = f"epoch {state.epochs:.1f}/{epochs:.12g}  eta {left}"
        text += f"  D {row['loss_D']:.2f}  G {row['loss_G']:.2f}  L_I"
        for kind, place in spec.kinds.items():  # the mean L_I, beside its ceiling
            L_I = [row[name] for name in spec.names[place]]
            text += f" {kind} {sum(L_I) / len(L_I):.2f}/{spec.ceilings[place][0]:.2f}"
        text += f"  {speed * self.batch_size:,.0f} img/s"
        if self.in_terminal:
            width = shutil.get_terminal_size().columns - 1
            text = f"\r{text:<{width}.{width}}"
        print(text, end="" if self.in_terminal and not stops else "\n", file=sys.stderr, flush=True)

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """What G draws from latents, on the CPU; in parts: it takes no more memory than a step."""
        parts = latents.split(min(16, self.batch_size))
        return torch.cat([self.state.G_ema(part).cpu() for part in parts])

    def compare(self) -> None:
        """Renews told_apart; takes at most 4% of the run's time."""
        began = time.monotonic()
        with torch.autocast(self.state.device.type, torch.bfloat16, enabled=self.args.amp):
            self.told_apart = tell_apart(self.real, self.draw(self.more_latents))
        self.compare_seconds = max(SHOW_SECONDS, 25 * (time.monotonic() - began))

    def save_grid(self, name: str, x: Tensor | None = None) -> None:
        """Saves a grid of x, or of what G draws from the run's latents."""
        grid = make_grid(self.draw(self.latents) if x is None else x)
        grid = ImageOps.scale(grid, math.ceil(512 / grid.width), Image.Resampling.NEAREST)
        self.attempt("samples", save_picture, self.out / f"samples/{name}.png", grid)

    def save_curves(self) -> None:
        """curves.png: losses, D's mean probabilities, and each code's L_I below its ceiling."""
        spec, columns = self.state.spec, log_columns(self.state.spec)
        rows = torch.tensor([[*row.values()] for row in self.state.rows]).view(-1, len(columns))
        rows = rows[rows.isfinite().all(1)][:: 1 + len(rows) // 1000]  # pixels show no more
        if len(rows) < 2:
            return
        panels = {  # what they show, and what they reach up to
            "losses of D (blue) and G (red)": (["loss_D", "loss_G"], 0.0),
            "D(x) (blue) and D(G(z, c)) (red)": (["D_real", "D_fake"], 1.0),
            "real or drawn, told right by nearest neighbours": (["told_apart"], 1.0),
        }
        for kind, place in spec.kinds.items():
            top = spec.ceilings[place][0]
            panels[f"L_I of {kind}, nats, at most {top:.2f}"] = spec.names[place], top
        page = Image.new("RGB", (640, 200 * len(panels)), "white")
        for i, (title, (names, top)) in enumerate(panels.items()):
            lines = rows.T[[columns.index(name) for name in names]]
            page.paste(draw_panel(title, rows[:, 1], lines, top), (0, 200 * i))
        save_picture(self.out / "curves.png", page)

    def save_log(self) -> None:
        rows = [[f"{round(v, 5):.12g}" for v in row.values()] for row in self.state.rows]
        text = "".join(",".join(row) + "\n" for row in [log_columns(self.state.spec), *rows])
        write_file(self.out / "log.csv", text.encode())

    def save(self, keeps: bool, stops: bool) -> None:
        """Saves last.pt, after a copy that is kept, so that no kill leaves out the copy."""
        raw = to_bytes(gather_checkpoint(self.state, self.args, self.fingerprint))
        self.attempt("log.csv", self.save_log)
        if keeps:
            kept = self.out / f"epoch_{self.state.place[0]:04d}.pt"
            self.attempt("checkpoint", write_file, kept, raw)
        last = self.out / "last.pt"
        try:
            write_file(last, raw)
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            if stops or self.failed_saves > MOST_FAILED_SAVES:
                raise
            print(f"{last}: {error.strerror}; training goes on and tries again", file=sys.stderr)
        self.save_grid("last")

    def close(self) -> None:
        """The newest log.csv and curves.png; the end of TensorBoard's events."""
        self.attempt("curves.png", self.save_curves)
        self.attempt("log.csv", self.save_log)
        if self.board:
            self.attempt("TensorBoard", self.board.close)


# train --------------------------------------------------------------------------------------------


def train(args: Namespace) -> int:
    """Trains until --epochs, --max-steps, --max-minutes or a signal; returns the exit code."""
    end = time.monotonic() + 60 * (args.max_minutes or math.inf)
    device, out = pick_device(args.device), Path(args.out)
    choose_precision(args, device)
    with locked(out):
        ckpt = find_checkpoint(args)
        if ckpt:
            args.channels = ckpt["args"]["channels"]
            args.init = args.init or ckpt["args"].get("init")
        form = args.image_size, args.channels, args.crop
        pictures = load_pictures(args.data, *form, exclude=args.exclude or ())
        n, args.channels = len(pictures.x), pictures.x.shape[3]
        state = new_state(args, device)
        state.per_epoch = n // min(args.batch_size, n)
        if ckpt:
            restore(state, ckpt)
            if ckpt["fingerprint"] != pictures.fingerprint and not args.allow_changes:
                refuse(args, ["other pictures"])
        elif args.init:
            restore(state, load_checkpoint(args.init), weights_only=True)
        step, epoch = state.changed  # from which on an epoch has per_epoch steps
        last_step = step + (args.epochs - epoch) * state.per_epoch
        last_step = min(last_step, args.max_steps or math.inf)
        if state.step >= last_step:
            print(f"{out} is finished, {state.step:,} steps; raise --epochs or --max-steps")
            return 0
        describe(state, args, n, last_step)
        write_file(out / "args.json", json.dumps(vars(args), indent=2).encode() + b"\n")
        (out / "samples").mkdir(exist_ok=True)
        recorder = Recorder(state, args, pictures, last_step, end)
        return loop(state, args, pictures, recorder)


def describe(state: State, args: Namespace, n: int, last_step: int) -> None:
    """Prints what the run works with, and what is unusual about it."""
    if last_step < 1000 and not args.max_minutes:
        print(f"{last_step} steps are too few to learn from; raise --epochs or --max-steps")
    if n < 1000 and not args.init:
        print(f"{n} pictures are few: some thousands of one kind are needed, or begin with --init")
    text = f"{state.device.type.upper()}, {torch.get_num_threads()} threads"
    if state.device.type == "cuda":
        text = torch.cuda.get_device_name(state.device)
    text += f", {'bfloat16' if args.amp else 'float32'}{', CUDA graph' * args.cuda_graph}"
    G, D = (sum(p.numel() for p in net.parameters()) / 1e6 for net in (state.G, state.D))
    text += f"; G {G:.1f} M, D and Q {D:.1f} M parameters; {state.per_epoch:,} steps an epoch, of"
    print(f"{text} {min(args.batch_size, n)} pictures each")


def loop(state: State, args: Namespace, pictures: Pictures, recorder: Recorder) -> int:
    """Steps until the recorder says that the run stops; prints why, and returns the exit code."""
    step_once, stops = GraphedStep() if args.cuda_graph else train_step, False
    pictures.x = to_device_if_it_fits(pictures.x, state.device)
    try:
        with caught_signals() as caught:
            while not stops:
                state.add(step_once(state, args, next_batch(state, args, pictures)))
                state.step += 1
                stops = recorder.after_step(bool(caught))
    finally:
        if recorder.in_terminal and not stops:
            print(file=sys.stderr)  # what is told next has its own line
        recorder.close()  # which shows how it came to an error, too
    path, code = recorder.out / "last.pt", 0
    why, advice = "time is up", "the same command resumes"
    if state.step == recorder.last_step:
        why, advice = "finished", f"see python generate.py --ckpt {shlex.quote(str(path))}"
        check_learned(state)
    elif caught:
        why, code = signal.Signals(caught[0]).name, 128 + caught[0]
    steps = f"{state.step:,} steps, {state.epochs:.1f} epochs, {state.minutes:.1f} minutes in all"
    print(f"{why}: {steps}. {path} is saved; {advice}")
    return code


# flags --------------------------------------------------------------------------------------------
# FLAGS: each flag with its default. AUTO: by derived, or by choose_precision. parse_args: all.

AUTO = "auto"  # a default that follows from other flags, the pictures or the device
# fmt: off
RECIPES = {  # what differs from the defaults in FLAGS
"default": {},
"notebook": dict(upsample="transposed", cont_at=4, info_to="head", flip=False, shift=0.0, ema=0.0,
    r1=0.0, lam_identity=0.0, cap_cont=3.0),
# lr_g is the paper's; a z of 16 is too small to choose the digit in place of c
"mnist": dict(upsample="transposed", cont_at=4, width=32, batch_size=64, lr_g=1e-3, z_dim=16,
    r1=0.1, lam_identity=0.0, q_augment=1.0, lam_real=1.0, shift=0.0),
}
WEIGHT = (0.0, 1000.0)  # limits of a loss's
FLAGS = {  # by group: flag, default, limits or choices or kind, meaning
"pictures": [
    ("--data", "data/anime", "FOLDER", f"a folder, or {', '.join(NAMED_SETS)}"),
    ("--exclude", None, "PATTERN", "leave out files whose path within --data fits, such as"
     " '*_mask.png' or 'small/*'; may be given several times"),
    ("--flip", True, bool, "mirror half of them; digits and clothes: off"),
    ("--crop", "centre", [*CROPS], "what is kept of tall pictures, centre or top; of wide ones the"
     " centre"),
], "codes and networks": [
    ("--n-cat", 1, (0, 64), "categorical codes, 0 to 64"),
    ("--cat-dim", 10, (2, 1000), "categories of each, 2 to 1000"),
    ("--n-cont", 2, (0, 256), "continuous codes in [-1, 1], 0 to 256"),
    ("--z-dim", 100, (0, 10_000), "noise, 0 to 10000"),
    ("--image-size", 64, [16, 32, 64, 128, 256], "width and height, 16, 32, 64, 128 or 256; named"
     " sets 32"),
    ("--channels", None, [1, 3], "1 grey, 3 colour (default: what the set has)"),
    ("--width", 64, (1, 1024), "channels of D's first and G's last layer"),
    ("--upsample", "nearest", ["nearest", "transposed"], "G's layers: nearest (neighbours, then"
     " 3x3 convolutions) or transposed (4x4 convolutions)"),
    ("--cont-at", 8, [8, 4], "size of the layer of G that continuous codes enter: 8, where they"
     " move and reshape, or 4, the first, where z and categoricals enter"),
], "objective": [
    ("--recipe", AUTO, [*RECIPES], "default, mnist, or notebook: its settings and faults (default:"
     " by --data)"),
    ("--lam-cat", 1.0, WEIGHT, "lambda of each categorical code's L_I"),
    ("--lam-cont", AUTO, WEIGHT, "of each continuous code's (default 3 / n_cont, max 0.3)"),
    ("--cap-cont", AUTO, (0.0, 3.0), "G is rewarded for a continuous code's L_I up to X nats"
     " (default 1.4; with up to 5 codes 3, more than a code can reach)"),
    ("--lam-identity", 2.0, WEIGHT, "of the identity loss: pictures of the same categories"
     " must have the same colours in the same places"),
    ("--lam-local", 0.0, WEIGHT, "of the local loss: one code changes one part of the"
     " picture; try 4"),
    ("--local-to", "all", ["all", "cat"], "the codes that have it: all, or the categorical ones"),
    ("--info-to", "trunk", ["trunk", "head"], "L_I trains Q with D's trunk, or its head alone"),
    ("--q-augment", 0.0, (0.0, 3.0), "how strongly pictures are moved, turned, blurred and relit"
     " before Q reads categorical codes; mnist 1"),
    ("--lam-real", 0.0, WEIGHT, "how much a real picture must keep its category when it is"
     " augmented, as strongly as --q-augment says; mnist 1"),
    ("--shift", AUTO, (0.0, 0.5), "D sees pictures shifted by up to this share of their width,"
     f" growing over {SHIFT_EPOCHS} epochs (default 0.125; below 64 pixels 0.0625)"),
    ("--r1", AUTO, WEIGHT, "D's gradient penalty (default 0.3; below 64 pixels 0.01)"),
    ("--r1-from", AUTO, (0, 10**9), "the epoch from which it acts (default 0; below 64 pixels, if"
     " --r1 is not given, 75)"),
    ("--ema", 0.03, (0.0, 1.0), "half-life of G's average, as a share of its steps"),
], "training": [
    ("--batch-size", 128, (2, 65_536), "pictures in a step"),
    ("--lr-g", 2e-4, (0.0, 1.0), "G's learning rate"),
    ("--lr-d", 2e-4, (0.0, 1.0), "D's learning rate"),
    ("--init", None, "FILE", "begin with the weights, codes and networks of a checkpoint"),
    ("--seed", 0, (0, 2**63 - 1), "seed of all random numbers"),
], "this start": [  # a run that resumes may have others, and says nothing
    ("--epochs", 150, (1, 10**9), "passes over the pictures"),
    ("--max-steps", None, (1, 10**12), "finish after N steps in all"),
    ("--max-minutes", None, (0.001, 1e7), "stop this call after X minutes; repeat it to resume"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
    ("--amp", AUTO, bool, "bfloat16 convolutions (default: where they are faster)"),
    ("--cuda-graph", AUTO, bool, "replay the step as a CUDA graph, so that a GPU never waits for"
     " Python (default: on CUDA)"),
    ("--out", AUTO, "FOLDER", "the run's folder (default checkpoint/cat1-cont2, by its codes)"),
    ("--save-every", None, (1, 10**9), "epochs between checkpoints that are kept (default 25, and"
     " at least 30 seconds)"),
    ("--sample-every", None, (1, 10**9), "epochs between grids (default 5, and at least 30"
     " seconds)"),
    ("--allow-changes", False, bool, "go on though pictures, --crop or --batch-size are not those"
     " of the run"),
]}
MORE = {"exclude": {"action": "append"}}
# fmt: on


def dest(flag: str) -> str:
    """A flag's name in args: "--lam-cat" is lam_cat."""
    return flag[2:].replace("-", "_")


LIMITS = {dest(flag): limits for flag, _, limits, _ in FLAGS["codes and networks"]}
# flags that a run must keep when it resumes; that only --allow-changes may change; and those whose
# changes it prints
KEPT, ALLOWED = [*LIMITS, "info_to", "init"], ["crop", "batch_size"]
PRINTED = [dest(row[0]) for title in FLAGS if title != "this start" for row in FLAGS[title]]


def derived(args: dict) -> dict:
    """The defaults that follow from the codes, the size and the recipe."""
    n_cat, n_cont = args["n_cat"], args["n_cont"]
    few, large = n_cat + n_cont <= 5, args["image_size"] >= 64
    lam_cont = min(0.3, 3 / max(n_cont, 1))  # their sum stays the same
    if args["recipe"] == "notebook":  # its v3 forgot to add the loss of its 20 codes
        lam_cont = 0.0 if n_cont == 20 else 0.1
    return {
        "out": f"checkpoint/cat{n_cat}-cont{n_cont}",
        "lam_cont": lam_cont,
        "cap_cont": 3.0 if few else 1.4,  # else they go on growing, and categoricals fade
        "r1": 0.3 if large else 0.01,  # without it D wins
        "r1_from": 0 if large or args["r1"] is not AUTO else 75,  # before, it costs small pictures
        "shift": 0.125 if large else 0.0625,  # small pictures lose variety with more
    }


class Parser(ArgumentParser):
    """Flags from a table like FLAGS, of every program here; parse_args tells only the given ones.

    more: argparse's own settings of some flags, by their names in args.
    """

    def __init__(self, program: str, about: str, flags: dict, more: dict):
        super().__init__(
            program,
            description=about,
            formatter_class=RawDescriptionHelpFormatter,
            argument_default=SUPPRESS,
            allow_abbrev=False,
        )
        self.defaults = {}
        for title, rows in flags.items():
            group = self.add_argument_group(title)
            for flag, default, kind, meaning in rows:
                name = dest(flag)
                if kind is bool:
                    how = {"action": "store_true" if default is False else BooleanOptionalAction}
                else:
                    how = {"type": partial(self.value, name, kind)}
                    how["metavar"] = kind if isinstance(kind, str) else "X"
                    if default not in (None, AUTO):
                        meaning += f" (default {default})"
                group.add_argument(flag, help=meaning, **how | more.get(name, {}))
                self.defaults[name] = default

    @staticmethod
    def value(name: str, kind: str | tuple | list, text: str) -> str | float:
        """A flag's text as a path, as a number within its limits, or as a choice."""
        if isinstance(kind, str):
            if not text:
                raise UserError(f"--{name}: is empty")
            return os.path.expanduser(text)  # shells leave --out=~/run as it is
        with suppress(ValueError):  # else check_limits names the type
            text = type(kind[0])(text)
        check_limits({name: text}, {name: kind})
        return text

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """All flags of a run: the table's, the recipe's, those of --init's networks, the given ones.

    --channels, --amp and --cuda-graph wait for pictures and device.
    """
    parser = Parser("infogan.py", __doc__.split("\nSections")[0], FLAGS, MORE)
    given, shape = vars(parser.parse_args(argv)), {}
    if init := given.get("init"):
        # should that file be gone, the run that it began has the same codes and networks
        last = Path(given.get("out", ""), "last.pt")
        gone = "out" in given and not os.path.exists(init)
        before = load_checkpoint(last if gone else init)["args"]
        shape = {name: before[name] for name in LIMITS}
        if other := differences(Namespace(**shape | given), shape, LIMITS):
            raise UserError(f"--init {init} has {', '.join(other)}; leave these flags out")
    data = given.get("data")
    recipe = given.get("recipe") or ("mnist" if data == "mnist" else "default")
    named = {"image_size": 32, "flip": False} if data in NAMED_SETS else {}
    flags = {**parser.defaults, **named, **RECIPES[recipe], **shape, **given, "recipe": recipe}
    flags |= {name: value for name, value in derived(flags).items() if flags[name] is AUTO}
    if flags["lam_local"] and flags["local_to"] == "cat" and not flags["n_cat"]:
        raise UserError("--local-to cat: there are no categorical codes; leave it out")
    args = Namespace(**flags)
    spec_of(args)  # raises UserError for --z-dim 0 where it cannot be
    return args


# program ------------------------------------------------------------------------------------------

# what Python and torch say of a full memory
NO_MEMORY = "(?i)memoryerror|allocate|out of memory|alloc_failed|unable to find an engine"


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
    except BrokenPipeError:  # whoever read the output is gone, as after `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail
        return 128 + 13  # as of SIGPIPE
    except OSError as error:
        text, code = f"{error.filename or 'a file'}: {error.strerror or error}; fix this", 2
        text += " or give another --out, and run it again; saved files are unchanged"
    except (MemoryError, RuntimeError) as error:
        if not re.search(NO_MEMORY, repr(error)):
            raise
        text, code = f"out of memory; {if_out_of_memory}", 2
    except KeyboardInterrupt:
        text, code = "stopped", 130
    print(f"{program}: {text}".replace("\n", " "), file=sys.stderr)
    return code


def as_program(main: Callable[[], int]) -> None:
    """Runs main and ends the process, with streams that take any letter."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if getattr(stream, "closed", stream is None):  # in a service, or after >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError, ValueError):  # those of a notebook have no reconfigure
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged, 2 an error that the user can fix, 128 + signal if stopped."""
    return run("infogan.py", lambda: train(parse_args(argv)))


if __name__ == "__main__":
    as_program(main)
