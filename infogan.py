"""InfoGAN in one file: a GAN whose codes mean something, learned without labels.

Chen et al. 2016, arXiv:1606.03657. The generator G draws a picture x = G(z, c) from noise z and a
code c, the discriminator D tells it from real pictures, and a head Q on D's trunk must read c back
from x. With L_I, a lower bound of the mutual information I(c; x) (Eqs. 5 and 6):

    min over G and Q, max over D:  V(D, G) - lambda L_I(G, Q),   L_I(G, Q) = E[log Q(c|x)] + H(c)

    python infogan.py --data ~/faces                          any folder of pictures
    python infogan.py --n-cat 10 --n-cont 20 --epochs 360     the third version, on data/anime
    python infogan.py --data mnist --n-cat 1 --n-cont 2       digits, downloaded by torchvision
    python infogan.py --data ~/faces --image-size 32 --width 32 --max-minutes 20    on a laptop
    python infogan.py --recipe notebook --out checkpoint/notebook    to compare with
    python generate.py --ckpt checkpoint/cat1-cont2/last.pt   look at what each code does
The same command given again resumes the run.

Sections, the paper first (search for "# step ---"): codes, networks, objective, step; then
pictures, checkpoint, run folder (lock, resume, signals), display, processes, loop, flags.
Left out on purpose: labels, learning-rate schedules, growing networks, loader processes, configs.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import pickletools
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from itertools import chain, count, cycle
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

if __name__ == "__main__":  # Ctrl-C while torch is loading, which takes a second: no traceback
    sys.excepthook = lambda kind, *e: kind is KeyboardInterrupt or sys.__excepthook__(kind, *e)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

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


SIGMA_MIN = 0.1  # of Q's Gaussian: without a floor it rewards precision that nobody can see


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
    def metrics(self) -> list[str]:
        """The figures that train_step returns, in order."""
        return ["loss_D", "loss_G", "D_real", "D_fake", "R1", "identity", *self.names]

    @property
    def entropies(self) -> list[float]:
        """H(c) of each code in nats; that of a continuous one is differential."""
        return [math.log(self.cat_dim)] * self.n_cat + [math.log(2)] * self.n_cont

    @property
    def ceilings(self) -> list[float]:
        """The most that L_I can reach, in nats: H(c), or what Q's narrowest Gaussian can tell."""
        best = [0.0] * self.n_cat + [-math.log(SIGMA_MIN * math.sqrt(2 * math.pi))] * self.n_cont
        return [h + log_q for h, log_q in zip(self.entropies, best, strict=True)]

    def sample(self, n: int, rng: torch.Generator) -> Codes:
        """n draws of z and c, on the generator's device."""
        at = {"generator": rng, "device": rng.device}
        z, c_cont = torch.randn(n, self.z_dim, **at), torch.rand(n, self.n_cont, **at) * 2 - 1
        return Codes(z, torch.randint(self.cat_dim, (n, self.n_cat), **at), c_cont)

    def sample_seeds(self, seeds: Sequence[int]) -> Codes:
        """One draw for each seed, which depends on nothing else."""
        each = [self.sample(1, torch.Generator().manual_seed(seed)) for seed in seeds]
        return Codes(*map(torch.cat, zip(*each, strict=True)))

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
        field, number = {"z": "z", "cat": "c_cat", "cont": "c_cont"}[kind], name[len(kind) :]
        columns = [int(number)] if number else slice(None)
        changed = getattr(codes, field).clone()
        changed[:, columns] = getattr(other, field)[:, columns]
        return codes._replace(**{field: changed})

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
    """A convolution as large as its input: a matrix product, ten times as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(flatten_hwc(x), flatten_hwc(self.weight), self.bias)[:, :, None, None]


class ConvTranspose2dFromPixel(nn.ConvTranspose2d):
    """The same from a single pixel (n, channels, 1, 1) to the kernel's size."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) @ flatten_hwc(self.weight)
        return y.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)


class UpsampleConv2d(nn.Conv2d):
    """Nearest neighbours to twice the size, then a 3x3 convolution; no chequered grain."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.folded(), self.bias, stride=2, padding=1)

    def folded(self) -> Tensor:
        """Both as one transposed convolution (4, 2, 1): a 4x4 kernel (in, out, 4, 4), as fast."""
        # a pixel that is doubled meets the sum of the kernel's weights in each 2x2 window
        kernel = 4 * F.avg_pool2d(F.pad(self.weight, [1] * 4), 2, 1)
        return kernel.flip(2, 3).transpose(0, 1)


class Generator(nn.Module):
    """x = G(z, c): (n, spec.dim) to (n, channels, size, size) in [-1, 1].

    upsample "nearest": UpsampleConv2d; "transposed": transposed convolutions (DCGAN, 1511.06434).
    """

    def __init__(
        self,
        spec: CodeSpec,
        image_size: int = 64,
        width: int = 64,
        channels: int = 3,
        upsample: str = "nearest",
    ):
        super().__init__()
        check_limits({"image_size": image_size, "width": width, "channels": channels})
        widths = layer_widths(image_size, width)[::-1]
        double = {"nearest": (UpsampleConv2d, 3, 1, 1), "transposed": (nn.ConvTranspose2d, 4, 2, 1)}
        conv, *shape = double[upsample]
        layers = [ConvTranspose2dFromPixel(spec.dim, widths[0], 4, bias=False)]
        for n_in, n_out in zip(widths, [*widths[1:], width], strict=True):
            layers += [nn.BatchNorm2d(n_in), nn.ReLU(True), conv(n_in, n_out, *shape, bias=False)]
        if upsample == "nearest" and image_size >= 64:  # at 32x32 this layer made pictures worse
            layers += [nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, channels, 3, 1, 1)]
        else:
            layers[-1] = conv(width, channels, *shape)
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, joined: Tensor) -> Tensor:
        return self.layers(joined[:, :, None, None]).float()


class Discriminator(nn.Module):
    """A trunk that D and Q share (paper, section 5), D's head (a logit), Q's head (q_dim wide)."""

    def __init__(self, spec: CodeSpec, image_size: int = 64, width: int = 64, channels: int = 3):
        super().__init__()
        check_limits({"image_size": image_size, "width": width, "channels": channels})
        widths = layer_widths(image_size, width)
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for now, then in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(now, then, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(then), nn.LeakyReLU(0.2, True)]
        self.spec = spec
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


class Encoder(nn.Module):
    """Q for users: reads codes from pictures in [-1, 1]."""

    def __init__(self, D: Discriminator):
        super().__init__()
        self.D = D

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_cat's probabilities (n, n_cat, cat_dim); c_cont's means and sigmas (n, n_cont)."""
        q = self.D(x)[1]
        return q.q_logits.softmax(2), q.q_mu, (q.q_logvar / 2).exp()


@torch.no_grad()
def init_weights(net: nn.Module, rng: torch.Generator) -> None:
    """DCGAN's start: convolutions N(0, 0.02), batch norm N(1, 0.02), biases 0."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            m.weight.normal_(float(isinstance(m, nn.BatchNorm2d)), 0.02, generator=rng)
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
    return torch.cat([cat + math.log(spec.cat_dim), cont + math.log(2)])  # H(c), see entropies


def lambda_L_I(spec: CodeSpec, L_I: Tensor, args: Namespace, cap_cont: float = math.inf) -> Tensor:
    """lambda L_I (paper, section 7.2); a continuous code counts up to cap_cont nats."""
    cat, cont = L_I.split([spec.n_cat, spec.n_cont])
    return args.lam_cat * cat.sum() + args.lam_cont * cont.clamp(max=cap_cont).sum()


IDENTITY_FREE = 0.25, 0.05  # shares of brightness and colour that others may change from afar


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


R1_EVERY = 16  # steps; a lazy R1 costs a sixteenth and does the same (1912.04958, appendix B)


def r1_penalty(d_real: Tensor, x: Tensor) -> Tensor:
    """R1 = E[|dD(x)/dx|^2] / 2 on real pictures: keeps D from winning (1801.04406, Eq. 9)."""
    (gradient,) = torch.autograd.grad(d_real.sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def shift(x: Tensor, u: Tensor, reach: Tensor) -> Tensor:
    """Pictures moved by up to `reach` whole pixels in x and y, on grey (DiffAugment, 2006.10738).

    u (n, 2) says how far each goes, uniform in [0, 1).
    """
    by = ((2 * reach + 1) * u).floor() - reach
    i = torch.arange(x.shape[3], device=x.device)
    Y, X = (i[:, None] + by[:, :, None, None] == i).to(x.dtype).unbind(1)  # (n, size, size): 0, 1
    return Y[:, None] @ x @ X[:, None].mT


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
def not_recorded(D: Discriminator) -> Iterator[None]:
    """Batch norm's running averages stay: they are of pictures as they are, which Q is used on."""
    norms = [m for m in D.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm in norms:
        norm.momentum = 0.1


def d_and_q(
    D: Discriminator, x: Tensor, u: Tensor, reach: Tensor | None, strength: float
) -> tuple[Tensor, QOutput]:
    """D's logits of shifted x, and Q(c|x) of x as it is; one pass for both where reach is None.

    With a strength Q reads the categoricals from augmented x: what a category means must survive
    that, so it is not pose, stroke or light. u (n, 10) says how x is shifted and augmented.
    """
    if reach is None:
        d, q = D(x)
    else:
        with not_recorded(D):
            d = D.d_logits(D.trunk(shift(x, u[:, :2], reach)))
        q = D.q_output(D.trunk(x))
    if strength and D.spec.n_cat:
        with not_recorded(D):
            augmented = D.q_output(D.trunk(augment(x, u[:, 2:], strength)))
        q = q._replace(q_logits=augmented.q_logits)
    return d, q


# step ---------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that training changes, and so all that a checkpoint holds."""

    spec: CodeSpec
    G: Generator
    G_ema: Generator  # the average of G's weights over time, which is shown and used
    D: Discriminator
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer
    rng: torch.Generator  # the run's only randomness; on the CPU, so a run can change devices
    sums: dict[str, Tensor]  # metrics added up since the last logged step
    per_epoch: int = 1  # steps
    epoch_seed: int = 0  # draws the order of this epoch's pictures, also after a resume
    step: int = 0
    epoch: int = 0  # whole epochs until step `since`; before, they may have had another length
    since: int = 0
    minutes: float = 0.0  # of training, over all starts

    @property
    def epochs(self) -> float:
        """Passes over the pictures so far."""
        return self.step / self.per_epoch


COMPILE = {"mode": "reduce-overhead"}  # CUDA graphs: no kernel waits for Python


def new_state(args: Namespace, device: torch.device) -> State:
    """Networks and optimisers at step 0; every random number comes from args.seed."""
    spec, rng = spec_of(args), torch.Generator().manual_seed(args.seed)
    shape = (spec, args.image_size, args.width, args.channels)
    G, D = Generator(*shape, args.upsample), Discriminator(*shape)
    for net in (G, D):
        init_weights(net, rng)
        net.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and rank_and_world()[1] > 1:  # gloo has none; R1 cannot go through it
        G = nn.SyncBatchNorm.convert_sync_batchnorm(G)
        D = D if args.r1 else nn.SyncBatchNorm.convert_sync_batchnorm(D)
    heads = {"trunk": [D.trunk, D.d_head, D.q_head], "head": [D.trunk, D.d_head]}[args.info_to]
    with_D = [p for part in heads for p in part.parameters()]
    with_G = [*G.parameters(), *(D.q_head.parameters() if args.info_to == "head" else ())]
    adam = {"betas": (0.5, 0.999), "fused": device.type in ("cpu", "cuda")}
    opt_G = torch.optim.Adam(with_G, args.lr_g, **adam)
    opt_D = torch.optim.Adam(with_D, args.lr_d, **adam)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    for net in (G.layers, D.trunk, D.q_head) if args.compile else ():
        net.compile(**COMPILE)  # at the first step; checkpoints hold the same names as without
    return State(spec, G, G_ema, D, opt_G, opt_D, rng, {})


class Batch(NamedTuple):
    """What a step takes, all of it on the device: a CUDA graph can copy nothing from the CPU."""

    x: Tensor  # (n, channels, size, size), real pictures in [-1, 1]
    codes: Codes  # of n pictures to draw
    u: Tensor  # (n, 22), uniform in [0, 1): how pictures are shifted and augmented
    reach: Tensor  # (): how far D's pictures are shifted, in pixels
    beta: Tensor  # (): the share of G_ema that stays


def variant(state: State, args: Namespace) -> tuple[bool, bool]:
    """Whether this step has R1, and whether D sees shifted pictures."""
    return args.r1 > 0 and state.step % R1_EVERY == 0, reach_at(state, args) > 0


SHIFT_EPOCHS = 40  # D remembers only what it has seen often: shifts grow until then


def reach_at(state: State, args: Namespace) -> int:
    """How far D's pictures are shifted at this step, in pixels."""
    return int(args.shift * args.image_size * min(1, state.epochs / SHIFT_EPOCHS))


def beta_at(state: State, args: Namespace) -> float:
    """Of G_ema: a half-life that grows with training fits runs of any length (2312.02696, 3.1)."""
    steps = state.step + 1 + (1000 if args.init else 0)  # else --init's were gone after one
    return 0.5 ** (1 / (args.ema * steps)) if args.ema else 0.0


def train_step(state: State, args: Namespace, batch: Batch) -> dict[str, Tensor]:
    """One step of D, then of G, on n real pictures and n drawn codes; returns the metrics.

    L_I always trains G. It trains Q together with D's trunk in D's step (args.info_to "trunk", as
    the paper's own code does), or Q's head alone in G's step ("head", the notebook).
    """
    spec, G, D, to_trunk = state.spec, state.G, state.D, args.info_to == "trunk"
    x, codes, u, reach, beta = batch
    mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)
    with_r1, shifted = variant(state, args)
    u_real, u_fake, u_fake_G = u.split([2, 10, 10], 1)
    reach = reach if shifted else None

    D.requires_grad_(True)
    with mixed:
        x_fake = G(spec.join(codes))  # drawn once, for both steps
        x = (shift(x, u_real, reach) if shifted else x).detach().requires_grad_(with_r1)
        with not_recorded(D):
            d_real = D.d_logits(D.trunk(x))
        d_fake, q = d_and_q(D, x_fake.detach(), u_fake, reach, args.q_augment)
    loss_D = loss = d_loss(d_real, d_fake)
    if to_trunk:  # -V - lambda L_I, which trains Q and the trunk
        loss = loss - lambda_L_I(spec, mutual_information(spec, q, codes), args)
    R1 = r1_penalty(d_real, x) if with_r1 else x.new_zeros(())
    descend(state.opt_D, loss + R1_EVERY * args.r1 * R1 if with_r1 else loss)

    D.requires_grad_(False)  # G's step needs no gradient of D's weights
    D.q_head.requires_grad_(not to_trunk)
    with mixed:
        d_fake_G, q = d_and_q(D, x_fake, u_fake_G, reach, args.q_augment)
    loss_G = g_loss(d_fake_G)
    L_I = mutual_information(spec, q, codes)
    # here L_I reaches G (Eq. 6); a continuous code that Q reads well need not grow further
    loss = loss_G - lambda_L_I(spec, L_I, args, args.cap_cont)
    identity = x.new_zeros(())
    if args.lam_identity and spec.n_cat:  # as far as Q knows c: before, G has only z to vary x with
        known = L_I[: spec.n_cat].detach().mean() / math.log(spec.cat_dim)
        identity = identity_loss(x_fake)
        loss = loss + args.lam_identity * known.clamp(0, 1) ** 4 * identity
    descend(state.opt_G, loss)
    update_ema(state.G_ema, G, beta)

    metrics = {"loss_D": loss_D, "loss_G": loss_G}
    metrics |= {"D_real": d_real.sigmoid().mean(), "D_fake": d_fake.sigmoid().mean()}
    metrics |= {"R1": R1_EVERY * R1, "identity": identity}  # a mean over R1_EVERY steps is R1's
    metrics |= dict(zip(spec.names, L_I.unbind(), strict=True))
    return {name: value.detach() for name, value in metrics.items()}


def descend(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of opt against loss; the gradient is the mean over all processes."""
    opt.zero_grad()
    loss.backward()
    gradients = [p.grad for group in opt.param_groups for p in group["params"]]
    all_mean_([g for g in gradients if g is not None])
    opt.step()


@torch.no_grad()
def update_ema(G_ema: nn.Module, G: nn.Module, beta: Tensor) -> None:
    """G_ema = beta G_ema + (1 - beta) G, batch norm's statistics included."""
    pairs = list(zip(G_ema.state_dict().values(), G.state_dict().values(), strict=True))
    averages, news = zip(*[(e, g) for e, g in pairs if e.is_floating_point()], strict=True)
    change = torch._foreach_sub(news, averages)
    torch._foreach_mul_(change, 1 - beta)
    torch._foreach_add_(averages, change)
    for e, g in pairs:
        if not e.is_floating_point():
            e.copy_(g)


# pictures -----------------------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "ICO", "PCX", "SGI")
FORMATS += ("QOI", "TGA", "AVIF")  # not all that Pillow knows: for EPS it starts a program
MAX_PIXELS = 2**30 // 12  # of one file, Pillow's own limit: decoding takes up to 16 bytes for each
DECODERS = 8  # threads; what is larger than their share of MAX_PIXELS is decoded alone
SYSTEM = r"(?is)\..*|@eadir|[@#$]recycle(\.bin)?|recycler|#snapshot|__macosx|lost\+found|lost\.dir"
SYSTEM += r"|found\.000|system volume information|desktop\.ini|thumbs(\.db)?"  # hidden ones too
MADE = [{"args.json", "log.csv"}, {"last.pt"}, {"codes.csv"}, {"table.csv", "overview.png"}]
DATA = Path("data")  # where torchvision keeps the named sets
NAMED_SETS = {  # torchvision's class, a file or folder of the set, a package that it needs
    "mnist": ("MNIST", "MNIST/raw/train-images-idx3-ubyte", None),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte", None),
    "svhn": ("SVHN", "train_32x32.mat", "scipy"),
    "celeba": ("CelebA", "celeba/img_align_celeba", "gdown"),
}
CELEBA = 202_599  # pictures
GET_PICTURES = "give a folder of pictures; `make data` downloads faces, `make demo` draws some"
DECODED_AT_ONCE = 512  # so memory stays flat however large a set is
DECODER = 2  # counts up whenever decode changes its result


class Pictures(NamedTuple):
    """A training set, decoded once."""

    x: Tensor  # uint8 (N, size, size, channels), mapped from a file and read as needed
    fingerprint: str  # of its contents, whatever their names: what a run resumes with
    names: list[str]  # paths, or numbers in a named set
    order: Tensor  # int64 (N,), the order that runs take them in: by their contents


def find_pictures(folder: Path) -> tuple[list[Path], str]:
    """All picture files below a folder, sorted, and in words what else is there.

    Linked folders are followed, each once; what cannot be opened counts as a file.
    """
    kinds, found, passed = Image.registered_extensions(), [], Counter()
    roots, seen = [folder], {*map(str, folder.parents)}
    for root in roots:  # links last, so that pictures keep the names that they have without
        for at, folders, names in os.walk(root, onerror=lambda e: found.append(Path(e.filename))):
            here, real = Path(at), os.path.realpath(at)
            if real in seen or (here != folder and any(marks <= {*names} for marks in MADE)):
                passed[f"folder {here.name} (a run, or by generate.py)"] += real not in seen
                names, folders[:] = [], []
            seen.add(real)
            hidden = [name for name in folders if re.fullmatch(SYSTEM, name)]
            passed.update(f"folder {name}" for name in hidden)
            folders[:] = [name for name in folders if name not in hidden]
            roots += [path for path in map(here.joinpath, folders) if path.is_symlink()]
            for path in map(here.joinpath, names):
                suffix = re.split("[?:_]", path.suffix.lower())[0]  # .jpg?w=400 and .jpg_large too
                if kinds.get(suffix) not in FORMATS and os.path.exists(path):
                    passed[f"of {suffix or 'no suffix'}"] += path.name[0] != "."
                elif path.name[0] == ".":
                    passed["hidden"] += 1
                else:
                    found.append(path)
    told = [f"{n:,} {ascii(what)[1:-1]}" for what, n in (+passed).most_common()]
    return sorted(found), ", ".join(told[:10] + ["…"] * (len(told) > 10))


def get_named_set(name: str, flag: str, opened: bool = False) -> Path | list[Image.Image]:
    """The file or folder of a set, downloaded if it is missing; or the pictures in its file."""
    kind, path, package = NAMED_SETS[name]
    path, own = DATA / path, Path(name)
    usable = own.is_dir() and not (own / "log.csv").exists()  # which a run has
    if not path.exists() and usable and find_pictures(own)[0]:
        why = f"a known set, and a folder of pictures here: give {flag} ./{name} for the folder"
        raise UserError(f"{flag} {name}: {why}, or rename it to get the known set")
    try:
        if opened or not path.exists():
            from torchvision import datasets  # takes a second, so only here
        if not path.exists():
            getattr(datasets, kind)(DATA, download=True)
        if not opened:
            return path
        if name == "svhn":
            return [*map(Image.fromarray, datasets.SVHN(DATA).data.transpose(0, 2, 3, 1))]
        return [*map(Image.fromarray, datasets.mnist.read_image_file(str(path)).numpy())]
    except Exception as error:  # of any kind: torchvision, gdown and scipy raise them
        why = " ".join(str(error).split()) or type(error).__name__
        if opened and not isinstance(error, ImportError):
            why = f"{path} is damaged: delete it, and the same command gets it again ({why})"
        why += f"; it needs `pip install {package}`" if package else ""
        raise UserError(f"{flag} {name}: torchvision cannot get it into {DATA}/: {why}") from error


def to_square(image: Image.Image, size: int, channels: int) -> Image.Image:
    """Any picture as (size, size) in 1 or 3 channels: upright, on white, scaled, centre cropped."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise NotImplementedError("floats have no known white")
    if image.mode.startswith("I"):  # 16 bit, which convert() would clip instead of scale
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def read_picture(
    item: Path | Image.Image, size: int, channels: int, max_pixels: int = MAX_PIXELS
) -> tuple[str, bytes | None]:
    """A picture's hash and its (size, size, channels) bytes; or what is wrong with it, and None."""
    try:
        if isinstance(item, Image.Image):
            raw, image = item.tobytes(), item
        elif not item.is_file():  # a pipe would never end
            raise FileNotFoundError
        elif item.stat().st_size > 4 * max_pixels:
            raise Image.DecompressionBombError
        else:
            raw = item.read_bytes()
            image = Image.open(io.BytesIO(raw), formats=FORMATS)  # decodes nothing yet
        whole = image.size
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at 1/2, 1/4 or 1/8
        if math.prod(whole if "progressive" in image.info else image.size) > max_pixels:
            raise Image.DecompressionBombError
        return hashlib.sha256(raw).hexdigest(), to_square(image, size, channels).tobytes()
    except Exception as error:  # decoders raise anything; load_pictures reports it
        return f"{item} ({type(error).__name__})", None


def decode(
    data: str, items: list, size: int, channels: int, file: BinaryIO, flag: str
) -> dict[str, object]:
    """Writes (size, size, channels) bytes for each picture to file; returns facts about the set."""
    kept, skipped, checksum, grey = {}, [], 0, True
    Image.init()  # loads Pillow's formats, which threads must not do at the same time
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with warnings.catch_warnings(), ThreadPoolExecutor(min(cores or 1, DECODERS)) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about files that it can read all the same
        parts = (items[i : i + DECODED_AT_ONCE] for i in range(0, len(items), DECODED_AT_ONCE))
        how = (size, channels, MAX_PIXELS // DECODERS)
        read = (pool.map(lambda p: read_picture(p, *how), part) for part in parts)
        read = tqdm(chain.from_iterable(read), "pictures", len(items), leave=False, disable=None)
        for i, (key, x) in enumerate(read):  # decoders release the GIL
            if x is None and "(DecompressionBomb" in key:  # too large for several at once
                key, x = read_picture(items[i], size, channels)
            if x is None:
                skipped.append(key)
            elif key not in kept:
                kept[key] = str(items[i] if isinstance(items[i], Path) else i)
                file.write(x)
                checksum = zlib.crc32(x, checksum)
                grey = grey and all(x[::channels] == x[c::channels] for c in range(channels))
    summary = f"{len(kept):,} pictures in {data}"
    if copies := len(items) - len(skipped) - len(kept):
        summary += f", {copies:,} exact {'copy' if copies == 1 else 'copies'} dropped"
    if skipped:
        named = ascii(", ".join(skipped[:10]) + ", ..." * (len(skipped) > 10))
        summary += f", {len(skipped):,} unreadable file{'s' * (len(skipped) > 1)} skipped: {named}"
    if len(kept) < 2:
        raise UserError(f"{flag} {data}: {summary}, at least 2 are needed; {GET_PICTURES}")
    old, now = (hashlib.sha256("".join(k).encode()).hexdigest() for k in (kept, sorted(kept)))
    facts = {"n": len(kept), "told": summary, "checksum": checksum, "grey": grey}
    facts |= {"fingerprint": now[:16], "by_name": old[:16], "names": "\0".join(kept.values())}
    return facts | {"order": sorted(range(len(kept)), key=[*kept].__getitem__)}


def cache_folder() -> Path:
    """The user's own: a folder of pictures may be read-only, or shared."""
    path = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.devnull if path[0] == "~" else path) / "infogan"  # no home: caches nothing


def read_cache(path: Path, key: str, shape: tuple[int, ...]) -> tuple[Tensor, dict] | None:
    """(N, *shape), mapped into memory, and facts; None where the file is not as it was written."""
    # it holds the pictures' bytes, then the facts as JSON, then the JSON's length
    with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError), open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(), "little")
        size = file.seek(-8 - length, os.SEEK_END)
        facts = json.loads(file.read(length))
        if facts["key"] == key and size == facts["n"] * math.prod(shape):
            x = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            if zlib.crc32(x.numpy()) == facts["checksum"]:
                return x.view(-1, *shape), facts
    return None


def load_pictures(
    data: str, size: int, channels: int | None = None, flag: str = "--data", seen: str | None = None
) -> Pictures:
    """A folder or a named set, decoded once: later starts map the cache's file into memory.

    channels None takes what the set has: 1 when every picture is grey, else 3. Exact copies and
    unreadable files are left out and counted. seen, a run's fingerprint, may be one of before,
    which depended on names: the pictures then have it, and their order of then. Raises UserError,
    with the flag that names the set, when fewer than two remain.
    """
    named = data in NAMED_SETS
    folder = get_named_set(data, flag) if named else Path(os.path.expanduser(data))
    if not named and not folder.is_dir():
        raise UserError(f"{flag} {data}: no such folder; {GET_PICTURES}")
    folder = folder.resolve()  # one set, however its path is written
    files, passed = find_pictures(folder) if folder.is_dir() else ([folder], "")
    if passed:
        print(f"passed over in {data}: {passed}")
    if data == "celeba" and len(files) < CELEBA:
        cure = f"delete it to get it anew, or give {flag} {folder} to use these"
        raise UserError(f"{flag} celeba: {folder} has {len(files):,} of {CELEBA:,}; {cure}")
    contents = hashlib.sha256(str(DECODER).encode())  # changes with every name, size and time
    for path in files:
        contents.update(os.fsencode(path))
        with suppress(OSError):  # an unreadable one counts by its name
            now = path.stat()
            contents.update(f" {now.st_size} {now.st_mtime_ns}\0".encode())
    # one file for each folder and way to decode it, so that a changed set replaces the old one
    where, key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16], contents.hexdigest()
    for depth in (3, 1):
        path, shape = cache_folder() / f"{where}-{size}x{size}x{depth}", (size, size, depth)
        found = read_cache(path, key, shape)
        if channels != 1 or (found and found[1]["grey"]):
            break
    if not found:
        items = files if folder.is_dir() else get_named_set(data, flag, opened=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for part in path.parent.glob(".*.part"):  # who still writes one holds its lock
                with suppress(OSError, AttributeError), open(part, "r+b") as file:
                    os.lockf(file.fileno(), os.F_TLOCK, 0)
                    part.unlink()
            with replacing(path) as file:
                with suppress(OSError, AttributeError):  # Windows has no lockf
                    os.lockf(file.fileno(), os.F_TLOCK, 0)
                facts = decode(data, items, size, depth, file, flag)
                tail = json.dumps(facts | {"key": key}).encode()
                file.write(tail + len(tail).to_bytes(8, "little"))
            found = read_cache(path, key, shape)
            why = "damaged as soon as it was written"
        except OSError as error:
            why = error.strerror or str(error)
        if not found:
            print(f"{path}: {why}; pictures are not cached, each start decodes them")
            memory = io.BytesIO()
            facts = decode(data, items, size, depth, memory, flag)
            x = torch.frombuffer(memory.getbuffer(), dtype=torch.uint8)
            found = x.view(-1, *shape), facts
    x, facts = found
    print(facts["told"])
    x = x[..., :1] if facts["grey"] and channels != 3 else x
    names, order = facts["names"].split("\0"), torch.tensor(facts["order"])
    if seen == facts["by_name"]:
        return Pictures(x, seen, names, torch.arange(len(x)))
    return Pictures(x, facts["fingerprint"], names, order)


def make_batch(x: Tensor, flip: bool, rng: torch.Generator, device: torch.device) -> Tensor:
    """uint8 (n, h, w, channels) as floats (n, channels, h, w) in [-1, 1]; flip mirrors half."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # so that the copy does not wait for the device's earlier work
    x = x.to(device, non_blocking=True)
    if flip:
        mirrored = my_rows(torch.rand(len(x) * rank_and_world()[1], 1, 1, 1, generator=rng) < 0.5)
        x = torch.where(mirrored.to(device, non_blocking=True), x.flip(2), x)
    x = x.contiguous().permute(0, 3, 1, 2).float()  # moved as bytes; its layout is channels_last
    return torch.add(x.new_full((), -1.0), x, alpha=1 / 127.5, out=x)  # x / 127.5 - 1 in one pass


# checkpoint ---------------------------------------------------------------------------------------

FORMAT = 1
SHAPE = ("n_cat", "cat_dim", "n_cont", "z_dim", "image_size", "width", "channels", "upsample")
RENAMED = {"enough": "cap_cont", "q_view": "q_augment"}  # flags of older checkpoints
ADDED = {"lam_identity": 0.0, "init": None, "changes": (), "compile": False}  # how it was then
NETS, OPTIMISERS = ("G", "G_ema", "D"), ("opt_G", "opt_D")  # names in State and in the file
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
PICKLED |= {f"torch {kind}Storage" for kind in ("Float", "Half", "Long", "Byte")}
LOWER_LR = "last.pt is the last good one, if saved. Lower --lr-g and --lr-d"
BROKEN = (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete or not at all, once its readers let go of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write at once
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for seconds in (0.1, 0.2, 0.5, 1.0, 2.0, 0.0):
            with suppress(PermissionError if seconds else ()):  # of a scanner or viewer on Windows
                os.replace(part, path)
                break
            time.sleep(seconds)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()
    with suppress(OSError, NotImplementedError), ExitStack() as opened:  # not every drive can
        folder = os.open(path.parent, os.O_RDONLY)
        opened.callback(os.close, folder)
        os.fsync(folder)  # the new name must reach the disk too


def save_file(path: Path, contents: dict) -> None:
    """Writes contents for torch.load, complete or not at all."""
    buffer = io.BytesIO()  # torch.save reports a full disk as an internal error
    torch.save(contents, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint's contents on the CPU: "args" (a dict of the flags), "spec", "step", "G_ema", …

    Runs no code from the file, takes no more memory than it has bytes, verifies its checksums.
    Raises UserError for a file that is not a checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; infogan.py saves last.pt in a run's folder")
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > size or archive.testzip():
                raise zipfile.BadZipFile
            pickles = [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
        ops = (op for raw in pickles for op in pickletools.genops(raw))
        if not {name for op, name, _ in ops if op.name.endswith("GLOBAL")} <= PICKLED:
            raise ValueError
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        tensors = [leaf for leaf in tree_leaves(ckpt) if isinstance(leaf, Tensor)]
        if sum(t.nbytes for t in tensors) > size:  # one number stretched over a huge shape
            raise ValueError
        if (written := int(ckpt["format"])) not in range(1, FORMAT + 1):
            raise UserError(f"format {written}, but this infogan.py knows only 1 to {FORMAT}")
        args = ADDED | {RENAMED.get(name, name): value for name, value in ckpt["args"].items()}
        args["changes"] = [*map(str, args["changes"])]
        check_limits({name: args.get(name) for name in SHAPE})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # of any kind: the file is at fault
        why = f"broken, or not a checkpoint of infogan.py ({type(error).__name__})"
        raise UserError(f"{path}: {why}") from error
    return ckpt | {"args": args}


def load_net(path: str | Path, kind: type, key: str, device: str) -> nn.Module:
    """The weights under key in the architecture that the checkpoint names: float32, frozen."""
    ckpt = load_checkpoint(path)
    args, weights = Namespace(**ckpt["args"]), ckpt.get(key)
    with torch.device("meta"):  # takes no memory before the shapes are known to fit
        shape = (spec_of(args), args.image_size, args.width, args.channels)
        net = kind(*shape, args.upsample) if kind is Generator else kind(*shape)
    try:
        weights = {k: w.float() if w.is_floating_point() else w for k, w in weights.items()}
        net.load_state_dict(weights, assign=True)
    except BROKEN as error:
        raise UserError(f"{path}: its {key} does not fit its own flags") from error
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: its {key} has weights that are not finite")
    net.spec = spec_of(args)
    return net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def load_generator(path: str | Path, device: str = "cpu") -> tuple[Generator, CodeSpec]:
    """(G, spec), the averaged generator: `x = G(spec.join(spec.sample(n, rng)))`."""
    G = load_net(path, Generator, "G_ema", device)
    return G, G.spec


def load_encoder(path: str | Path, device: str = "cpu") -> tuple[Encoder, CodeSpec]:
    """(Q, spec): reads codes from pictures in [-1, 1], see Encoder."""
    D = load_net(path, Discriminator, "D", device)
    return Encoder(D).eval(), D.spec


def check_finite(state: State, metrics: dict[str, float]) -> None:
    """Raises Diverged that names the first metric which is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {state.step}: {name} is {value}; {LOWER_LR}")


def gather_checkpoint(state: State, args: Namespace, fingerprint: str) -> dict:
    """All that a run needs to resume bit for bit; all processes call it, to average the metrics."""
    all_mean_([*state.sums.values()])
    check_finite(state, state.sums)
    ckpt = {name: getattr(state, name).state_dict() for name in NETS + OPTIMISERS}
    for name in NETS:
        if not all(w.isfinite().all() for w in ckpt[name].values()):
            raise Diverged(f"step {state.step}: {name} has weights that are not finite; {LOWER_LR}")
    numbers = ("sums", "epoch_seed", "step", "epoch", "since", "minutes")
    ckpt |= {name: getattr(state, name) for name in numbers}
    ckpt |= {"format": FORMAT, "spec": asdict(state.spec), "args": vars(args)}
    return ckpt | {"rng": state.rng.get_state(), "fingerprint": fingerprint}


def restore(state: State, ckpt: dict, out: Path, weights_only: bool = False) -> None:
    """Puts the contents of out's checkpoint into state. Raises UserError where they do not fit."""
    if "opt_G" not in ckpt and not weights_only:
        why = "its checkpoint is for generate.py only (by --shrink); --init begins a run with it"
        raise UserError(f"{out}: {why}, {NEW_RUN}")
    try:
        for name in NETS:  # --shrink keeps of G only the average
            getattr(state, name).load_state_dict(ckpt.get(name, ckpt["G_ema"]))
        if weights_only:
            return
        for opt, kept in ((state.opt_G, ckpt["opt_G"]), (state.opt_D, ckpt["opt_D"])):
            own = opt.state_dict()["param_groups"]  # with the learning rates of today's flags
            if [g["params"] for g in own] == [g["params"] for g in kept["param_groups"]]:
                opt.load_state_dict({**kept, "param_groups": own})  # else --info-to has changed
        moments = [*state.opt_G.state.items(), *state.opt_D.state.items()]
        if any(v.dim() and v.shape != p.shape for p, kept in moments for v in kept.values()):
            raise ValueError
        state.epoch_seed, state.step = int(ckpt["epoch_seed"]), int(ckpt["step"])
        state.epoch, state.since = int(ckpt.get("epoch", 0)), int(ckpt.get("since", 0))
        state.minutes = float(ckpt["minutes"])
        state.sums = {k: v.to(next(state.G.parameters()).device) for k, v in ckpt["sums"].items()}
        state.rng.set_state(ckpt["rng"])
    except BROKEN as error:
        cure = "give another --init" if weights_only else NEW_RUN
        raise UserError(f"{out}: training cannot go on from its checkpoint; {cure}") from error


# run folder ---------------------------------------------------------------------------------------

NEW_RUN = "--restart moves the old run aside, another --out starts beside it"
MAY_DIFFER = {"data", "out", "epochs", "max_steps", "max_minutes", "device", "amp", "restart"}
MAY_DIFFER |= {"compile", "save_every", "sample_every", "allow_changes", "changes"}
IGNORED = SYSTEM + r"|.*\.(txt|log|out|err|sh|[oe]\d+)|logs|old-\d+"  # in no run's way, and stays
SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


def contents(out: Path) -> list[Path]:
    """What lies in a run's folder, but IGNORED; what makes it a run comes last."""
    found = [path for path in out.iterdir() if not re.fullmatch(IGNORED, path.name)]
    return sorted(found, key=lambda path: path.name in ("last.pt", "args.json"))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A run's folder, made if missing, for this process alone: the lock ends with the process."""
    found = contents(out) if out.is_dir() else [out] * out.exists()
    if found and not any(any(out.glob(k)) for k in ("args.json", "last.pt", "epoch_*.pt")):
        raise UserError(f"--out {out}: has {found[0].name} but no run in it; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    pid = out / ".pid"
    with open(out / ".lock", "ab") as file:
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink == 0:  # a run that has just ended removed it
                    raise BlockingIOError
            else:
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except (BlockingIOError, PermissionError):
            holder = pid.read_text() if pid.exists() else "of another program"
            raise UserError(f"--out {out}: process {holder} is training there") from None
        except OSError as error:  # some network drives have no locks
            print(f"{out}: cannot be locked ({error.strerror}); start no second run there")
        with suppress(OSError):
            pid.write_text(str(os.getpid()))
        for part in [*out.glob(".*.part"), *out.glob("samples/.*.part")]:
            part.unlink()  # from a process that was killed while it wrote
        try:
            yield
        finally:
            with suppress(OSError):
                pid.unlink(missing_ok=True)
                Path(file.name).unlink()
                out.rmdir()  # only if it is empty: a start that failed


def move_aside(out: Path) -> None:
    """The old run becomes OUT.old-1; out itself, perhaps a link or a mounted volume, stays."""
    aside = next(p for i in count(1) if not (p := out / f"old-{i}").exists())
    aside.mkdir()
    for path in contents(out):
        path.rename(aside / path.name)
    beside = next(p for i in count(1) if not (p := Path(f"{out.resolve()}.old-{i}")).exists())
    with suppress(OSError):  # another file system, or a folder of somebody else: OUT/old-1
        aside = aside.rename(beside)
    print(f"the old run is now {aside}")


def differences(args: Namespace, then: dict, names: Collection[str]) -> list[str]:
    """ "--r1 0.3, not 1.0" for each flag that is not as it was then."""
    changed = [(k, now) for k, now in vars(args).items() if k in names and then.get(k, now) != now]
    return [f"--{name.replace('_', '-')} {then[name]}, not {now}" for name, now in changed]


def check_changes(args: Namespace, ckpt: dict, changes: list[str]) -> None:
    """Tells and keeps what is not as in the run so far; without --allow-changes it is an error."""
    if changes and not args.allow_changes:
        why = f"{args.out} was started with {', '.join(changes)}"
        raise UserError(f"{why}; --allow-changes goes on all the same, {NEW_RUN}")
    for change in changes:
        args.changes.append(f"until step {ckpt['step']}: {change}")
        print(args.changes[-1])
    if changes and "since" in ckpt:  # an epoch begins, perhaps of another length
        ckpt["since"] = ckpt["step"]


def find_checkpoint(args: Namespace) -> dict | None:
    """last.pt, else the newest that can be read, if the run was started with the same flags."""
    out = Path(args.out)
    kept = sorted(out.glob("epoch_*.pt"), key=lambda p: (len(p.name), p.name), reverse=True)
    found = [path for path in [out / "last.pt", *kept] if path.exists()]
    for path in found:
        try:
            ckpt = load_checkpoint(path)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        then = ckpt["args"]
        args.channels, args.init = args.channels or then["channels"], args.init or then["init"]
        if fixed := differences(args, then, (*SHAPE, "init")):  # not even with --allow-changes
            raise UserError(f"{out} was started with {fixed[0]}; {NEW_RUN}")
        if then["lam_identity"] == 0 != args.lam_identity and not args.allow_changes:
            args.lam_identity = 0.0
            print("--lam-identity 0.0: as this run was started")
        args.changes = then["changes"]
        check_changes(args, ckpt, differences(args, then, vars(args).keys() - MAY_DIFFER))
        print(f"resuming from {path}, step {ckpt['step']:,}")
        return ckpt
    if found:
        raise UserError(f"{out}: none of its checkpoints can be read; {NEW_RUN}")
    return None


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects signals that ask a run to stop; a second INT, TERM or HUP stops it at once."""
    caught, before = [], {}

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        # XCPU comes every second, and torchrun repeats what its processes may have got themselves
        if number in SIGNALS[:3] and rank_and_world()[1] == 1:
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
        grid = Image.open(path).convert("RGB")
        grid = grid.reduce(-(-grid.width // 800))  # from 128x128 on
        grid = ImageOps.scale(grid, max(1, round(500 / grid.width)), Image.Resampling.NEAREST)
        frame, font = ImageOps.expand(grid, (0, 28, 0, 0), "white"), ImageFont.load_default(16)
        ImageDraw.Draw(frame).text((6, 4), f"epoch {epoch}", "black", font)
        palette = frame.reduce(4).quantize(128)  # ten times as fast as from all pixels, as good
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    if len(frames) > 1:
        how = {"duration": [250] * (len(frames) - 1) + [2000], "loop": 0, "save_all": True}
        save_picture(out / "training.gif", frames[0], append_images=frames[1:], **how)


@torch.no_grad()
def strongest_codes(G: Generator, spec: CodeSpec, codes: Codes) -> Tensor:
    """A grid of one latent along each of the eight codes that change the picture most."""
    rows, smooth = [], torch.linspace(-1, 1, 8).tolist()
    for name in spec.names:
        values = [k % spec.cat_dim for k in range(8)] if name.startswith("cat") else smooth
        rows.append(G(spec.join(spec.traverse(codes, name, values))))
    rows.sort(key=lambda x: -x.var(0).sum().item())
    return make_grid(torch.cat(rows[:8]))


class Log:
    """log.csv, curves.png and TensorBoard's events of a run; rows after `step` are removed."""

    def __init__(self, out: Path, spec: CodeSpec, step: int):
        self.path, self.spec, self.told, self.unwritten = out / "log.csv", spec, set(), []
        self.rows = [["step", "epoch", "minutes", *spec.metrics]]
        self.attempt("log.csv", self.take_over, step)
        tb = self.attempt("TensorBoard", import_module, "torch.utils.tensorboard")  # takes a second
        self.board = tb and self.attempt("TensorBoard", tb.SummaryWriter, str(out), "", step + 1)

    def attempt(self, what: str, job: Callable, *args: object) -> object:
        """What job returns. A failure is told once, and training goes on, which is worth more."""
        try:
            return job(*args)
        except Exception as error:  # viewers, full disks, edited files, old packages raise anything
            where, why = (getattr(error, name, None) for name in ("filename", "strerror"))
            if what not in self.told:
                tqdm.write(f"{where or what}: {why or error}; training goes on", sys.stderr)
            self.told.add(what)

    def take_over(self, step: int) -> None:
        """The rows of an earlier start, up to step; a file that someone edited is kept aside."""
        head, rows = ",".join(self.rows[0]), {}
        raw = self.path.read_bytes() if self.path.exists() else head.encode()
        first, *lines = raw.decode("utf-8-sig", "replace").replace(";", ",").splitlines() or [""]
        for row in (line.split(",") for line in lines if first == head):
            with suppress(ValueError):
                if len(row) == len(self.rows[0]) and all(abs(float(v)) < 1e12 for v in row):
                    rows[int(float(row[0]))] = row
        if first != head or len(rows) < len(lines):
            aside = next(p for i in count(1) if not (p := Path(f"{self.path}.old-{i}")).exists())
            aside.write_bytes(raw)
            print(f"{self.path}: has other lines than a run's; as it was it is now {aside}")
        self.rows += [row for key, row in sorted(rows.items()) if key <= step]
        with replacing(self.path) as file:
            file.writelines(f"{','.join(row)}\n".encode() for row in self.rows)

    def add(self, step: int, epoch: float, minutes: float, values: list[float]) -> None:
        row = [str(step), f"{epoch:.4f}", f"{minutes:.3f}", *(f"{v:.5f}" for v in values)]
        self.rows.append(row)
        self.unwritten.append(",".join(row) + "\n")
        self.attempt("log.csv", self.write)
        for name, value in zip(self.spec.metrics, values, strict=True) if self.board else ():
            group = "L_I" if name in self.spec.names else "GAN"
            self.attempt("TensorBoard", self.board.add_scalar, f"{group}/{name}", value, step)

    def write(self) -> None:
        with open(self.path, "a") as file:
            file.writelines(self.unwritten)
        self.unwritten.clear()

    def add_grid(self, name: str, x: Tensor, epoch: int) -> None:
        x = x.cpu().add(1).div(2).clamp(0, 1)
        self.board and self.attempt("TensorBoard", self.board.add_image, name, x, epoch)

    def draw(self) -> None:
        """curves.png: losses, D's mean probabilities, and each code's L_I below its ceiling."""
        if len(self.rows) < 3:
            return
        columns = {name: [*map(float, v)] for name, *v in zip(*self.rows, strict=True)}
        panels = [("losses of D (blue) and G (red)", ["loss_D", "loss_G"], 0.0)]
        panels += [("D(x) (blue) and D(G(z, c)) (red)", ["D_real", "D_fake"], 1.0)]
        for kind, part in self.spec.kinds.items():
            top = self.spec.ceilings[part][0]
            panels.append((f"L_I of {kind}, nats, at most {top:.2f}", self.spec.names[part], top))
        page = Image.new("RGB", (640, 200 * len(panels)), "white")
        for i, (title, names, top) in enumerate(panels):
            lines = [columns[name] for name in names]
            page.paste(draw_panel(title, columns["epoch"], lines, top), (0, 200 * i))
        self.attempt("curves.png", save_picture, self.path.with_name("curves.png"), page)


def draw_panel(title: str, x: list[float], lines: list[list[float]], top: float) -> Image.Image:
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


def describe(spec: CodeSpec, values: list[float]) -> str:
    """For the progress line: losses, and the mean L_I of each kind of code beside its ceiling."""
    text = f"  D {values[0]:.2f}  G {values[1]:.2f}" if values else ""
    for kind, place in spec.kinds.items() if values else ():
        L_I = values[-len(spec.names) :][place]
        text += f"  L_I {kind} {sum(L_I) / len(L_I):.2f}/{spec.ceilings[place][0]:.2f}"
    return text


# processes ----------------------------------------------------------------------------------------
# Each draws the same random numbers for the whole batch and works on its own rows of it, so a run
# does not depend on how many there are, and may resume with another number.


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this is rank 0, which alone writes files and prints."""
    return rank_and_world()[0] == 0


def my_rows(batch: Tensor) -> Tensor:
    """This process's rows of what was drawn for the whole batch."""
    rank, world = rank_and_world()
    return batch.unflatten(0, (world, -1))[rank]


def all_max(*values: int) -> list[int]:
    """The largest of each value over all processes, so that all act alike at the same step."""
    whole = torch.tensor(values)  # between the CPUs: it waits for no GPU
    if rank_and_world()[1] > 1:
        dist.all_reduce(whole, dist.ReduceOp.MAX)
    return whole.tolist()


def all_mean_(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, in one message."""
    if (world := rank_and_world()[1]) > 1:
        whole = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(whole)
        parts = whole.div_(world).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


@contextmanager
def rank_0_first() -> Iterator[None]:
    """The others wait until rank 0 is done; where it fails they stop, and it alone says why."""
    if not is_main() and all_max(0)[0]:
        raise UserError("process 0 has failed")
    failed = 1
    try:
        yield
        failed = 0
    finally:
        if is_main():
            all_max(failed)


# loop ---------------------------------------------------------------------------------------------

LOG_EVERY = 16  # steps between two rows of log.csv, and between two waits for the device
SAVE_SECONDS, SAVE_STEPS = 600.0, 100  # at most, and at least, between two saves of last.pt


def pick_device(name: str) -> torch.device:
    """The fastest device for "auto". Raises UserError when the one asked for is missing."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cuda", *(f"cuda:{i}" for i in range(n_cuda))] if n_cuda else []
    there += ["mps", "mps:0"] * torch.backends.mps.is_available() + ["cpu", "cpu:0"]
    if name not in ["auto", *there]:
        raise UserError(f"--device {name}: not available here; use --device auto")
    name = there[0] if name == "auto" else name
    if name == "cuda" and rank_and_world()[1] > 1:
        name += ":" + os.environ["LOCAL_RANK"]
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


def schedule(state: State, args: Namespace, n: int) -> tuple[int, int, int]:
    """Pictures in a step, steps in an epoch, and steps in all, for n pictures."""
    B, world = min(args.batch_size, n), rank_and_world()[1]
    if B % world or B // world < 2:
        raise UserError(f"--batch-size {B}: must be a multiple of {world} processes, 2 for each")
    last = state.since + (args.epochs - state.epoch) * (n // B)
    return B, n // B, min(last, args.max_steps or sys.maxsize)


def batches(state: State, args: Namespace, pictures: Pictures) -> Iterator[tuple[Tensor, Codes]]:
    """Endless batches, and codes to draw as many; sets each epoch's epoch_seed."""
    x, device = pictures.x, next(state.G.parameters()).device
    B, per_epoch, _ = schedule(state, args, len(x))
    while True:
        if (done := (state.step - state.since) % per_epoch) == 0:
            state.epoch_seed = int(torch.randint(2**62, (), generator=state.rng))
        rng = torch.Generator().manual_seed(state.epoch_seed)
        order = pictures.order[torch.randperm(len(x), generator=rng)]
        for i in range(done, per_epoch):
            some = x.index_select(0, my_rows(order[i * B : (i + 1) * B]).to(x.device))
            real = make_batch(some, args.flip, state.rng, device)
            codes = state.spec.sample(B, state.rng)
            codes = Codes(*(my_rows(c).to(device, non_blocking=True) for c in codes))
            u = torch.rand(B, 22, generator=state.rng)
            yield Batch(
                real,
                pair(codes) if args.lam_identity else codes,
                my_rows(u).to(device),
                torch.full((), float(reach_at(state, args)), device=device),
                torch.full((), beta_at(state, args), device=device),
            )


def train(args: Namespace) -> int:
    """Trains until --epochs, --max-steps, --max-minutes or a signal; returns the exit code."""
    end = time.monotonic() + 60 * (args.max_minutes or math.inf)
    device, out = pick_device(args.device), Path(args.out)
    fast = speed_up(device)
    args.amp = fast if args.amp is None else args.amp
    with ExitStack() as held:
        with rank_0_first():
            if is_main():
                held.enter_context(locked(out))
            ckpt = None if args.restart else find_checkpoint(args)
            init = load_checkpoint(args.init) if args.init and not ckpt else None
            seen = ckpt and ckpt.get("fingerprint")
            pictures = load_pictures(args.data, args.image_size, args.channels, seen=seen)
            if seen and seen != pictures.fingerprint:
                check_changes(args, ckpt, ["other pictures"])
        args.channels, n = pictures.x.shape[3], len(pictures.x)
        state = new_state(args, device)
        if start := ckpt or init:
            restore(state, start, Path(args.init) if init else out, weights_only=bool(init))

        B, per_epoch, total = schedule(state, args, n)
        if state.step >= total:
            print(f"{out} is finished, {state.step:,} steps; raise --epochs or --max-steps")
            return 0
        if args.recipe == "notebook":
            print("--recipe notebook: the notebook's settings and its defects, to compare with")
        if total < 1000:
            print(f"{total} steps are too few to learn from; raise --epochs or --max-steps")
        if args.batch_size > B:
            print(f"--batch-size {args.batch_size}: there are only {n} pictures, so a batch is {B}")
        all_max(0)  # all have read --init, which may lie in the run that is moved
        if is_main():
            if args.restart and contents(out):
                move_aside(out)
            (out / "samples").mkdir(exist_ok=True)
            with replacing(out / "args.json") as file:
                file.write(json.dumps(vars(args), indent=2).encode() + b"\n")
        stopped_by = loop(state, args, pictures, end)

    why, then = "time is up", "the same command resumes"
    if state.step >= total:
        why, then = "finished", f"see python generate.py --ckpt {out / 'last.pt'}"
    elif stopped_by:
        why = signal.Signals(stopped_by).name
    epochs = state.epoch + (state.step - state.since) / per_epoch
    done = f"{state.step:,} steps, {epochs:.1f} epochs, {state.minutes:.1f} minutes"
    print(f"{why}: {done} in all. {out / 'last.pt'} is saved; {then}")
    return 128 + stopped_by if stopped_by else 0


def loop(state: State, args: Namespace, pictures: Pictures, end: float) -> int:
    """Steps, logs, saves until the last step, the time `end` or a signal, which it returns."""
    out, device, spec, n = (
        Path(args.out),
        next(state.G.parameters()).device,
        state.spec,
        len(pictures.x),
    )
    B, per_epoch, total = schedule(state, args, n)
    state.per_epoch = per_epoch
    rng = torch.Generator().manual_seed(args.seed)  # the same pictures and z at each start
    some = pictures.x[pictures.order[torch.randperm(n, generator=rng)[:64]]]
    latents = Codes(*(c.to(device) for c in spec.sample(64, rng)))
    log = Log(out, spec, state.step) if is_main() else None

    def save_samples(name: str, x: Tensor | None = None) -> Tensor:
        grid = make_grid(state.G_ema(spec.join(latents)) if x is None else x)
        log.attempt("samples", save_picture, out / f"samples/{name}.png", to_image(grid))
        return grid

    def finish() -> None:
        save_samples("last")
        log.attempt("training.gif", save_animation, out)
        log.draw()
        log.attempt("log.csv", log.write)
        log.board and log.attempt("TensorBoard", log.board.close)

    if log:
        save_samples("real", make_batch(some, False, rng, device))
        if state.step == 0:
            save_samples("epoch_0000")
    first, began, values = state.step, time.monotonic(), []
    start, saved = began - 60 * state.minutes, began
    # epochs between saves, grids, checkpoints to keep: those of few steps count together
    together = -(-SAVE_STEPS // per_epoch)
    every = (together, args.sample_every or 5 * together, args.save_every or 25 * together)
    line = {"bar_format": "{desc}{rate_fmt}{postfix}", "unit": "img", "unit_scale": True}
    line["mininterval"] = 0.5 if sys.stderr.isatty() else 30.0
    pictures = pictures._replace(x=to_device_if_it_fits(pictures.x, device))
    with caught_signals() as caught, tqdm(total=total * B, initial=first * B, **line) as bar:
        for batch in batches(state, args, pictures):
            metrics = train_step(state, args, batch)
            state.step += 1
            state.sums = {k: v + state.sums.get(k, 0.0) for k, v in metrics.items()}
            now = time.monotonic()
            state.minutes = (now - start) / 60
            stopped_by, late, due = all_max(sum(caught[:1]), now > end, now > saved + SAVE_SECONDS)
            epoch, rest = divmod(state.epoch * per_epoch + state.step - state.since, per_epoch)
            done = state.step == total
            save, draw, keep = (rest == 0 and epoch % epochs == 0 for epochs in every)
            if state.step % LOG_EVERY == 0:
                all_mean_([*state.sums.values()])
                values = {
                    k: v / LOG_EVERY
                    for k, v in zip(state.sums, torch.stack([*state.sums.values()]).tolist())
                }
                check_finite(state, values)
                if log:
                    log.add(state.step, epoch + rest / per_epoch, state.minutes, [*values.values()])
                values = [*values.values()]
                state.sums = {}
            left = min((total - state.step) * (now - began) / (state.step - first), end - now)
            at = f"epoch {epoch + rest / per_epoch:.1f}/{args.epochs}{describe(spec, values)}  "
            bar.set_description_str(at, refresh=False)
            bar.set_postfix_str(f"eta {bar.format_interval(max(0, left))}", refresh=False)
            bar.update(B)

            if log and draw:
                log.add_grid("samples", save_samples(f"epoch_{epoch:04d}"), epoch)
                if spec.names:
                    one = Codes(*(c[:1] for c in latents))
                    log.add_grid("strongest codes", strongest_codes(state.G_ema, spec, one), epoch)
                log.draw()
            if log and done:  # before last.pt, so that a finished run is complete
                finish()
            if save or draw or keep or due or stopped_by or late or done:
                state.epoch, state.since = epoch, state.step - rest
                ckpt, saved = gather_checkpoint(state, args, pictures.fingerprint), now
                names = [f"epoch_{epoch:04d}.pt"] * keep + ["last.pt"]
                for name in names if log else ():
                    save_file(out / name, ckpt)
            if stopped_by or late or done:
                break
        if log and not done:  # after last.pt: who asked to stop may not wait
            finish()
    return stopped_by


# flags --------------------------------------------------------------------------------------------

# fmt: off
FLAGS = {  # by group: flag, default (None: parse_args sets it), limits or choices or kind, meaning
"pictures": [
    ("--data", "data/anime", "FOLDER", f"a folder, or {', '.join(NAMED_SETS)}"),
    ("--image-size", None, (16, 256), "16, 32, 64, 128 or 256 (default 64; named sets 32)"),
    ("--channels", None, (1, 3), "1 grey, 3 colour (default: what the set has)"),
    ("--flip", None, bool, "mirror half of them (default on; digits and clothes off)"),
], "codes": [
    ("--n-cat", 1, (0, 64), "categorical codes, 0 to 64"),
    ("--cat-dim", 10, (2, 1000), "categories of each, 2 to 1000"),
    ("--n-cont", 2, (0, 256), "continuous codes in [-1, 1], 0 to 256"),
    ("--z-dim", None, (0, 10_000), "noise, 0 to 10000 (default 100; mnist 16)"),
], "networks and objective": [
    ("--width", None, (1, 1024), "channels of D's first and G's last layer (default 64; mnist 32)"),
    ("--recipe", "default", ["default", "notebook"], "notebook: its settings and faults"),
    ("--lam-cat", None, (0.0, 1000.0), "lambda of each categorical code's L_I (default 1)"),
    ("--lam-cont", None, (0.0, 1000.0), "of each continuous code's (default 3 / n_cont, max 0.3)"),
    ("--cap-cont", None, (0.0, 3.0), "G is rewarded for a continuous code's L_I up to X nats"
     " (default 1.4; with up to 5 codes 3, which is no limit)"),
    ("--lam-identity", None, (0.0, 1000.0), "of the identity loss: pictures of the same categories"
     " must have the same colours in the same places (default 2; mnist 0)"),
    ("--upsample", None, ["nearest", "transposed"], "G's layers (default nearest; notebook, mnist transposed)"),
    ("--shift", None, (0.0, 0.5), "D sees pictures moved by up to this share of their width (default 0.125)"),
    ("--info-to", None, ["trunk", "head"], "L_I trains Q with D's trunk, or Q's head (notebook)"),
    ("--q-augment", None, (0.0, 3.0), "how strongly pictures are moved, turned, blurred and"
     " relit before Q reads categorical codes (default 1 with up to 5 codes, else 0)"),
    ("--r1", None, (0.0, 1e3), "D's gradient penalty (default 0.3; below 64 pixels 0; mnist 0.1)"),
    ("--ema", None, (0.0, 1.0), "half-life of G's average, as a share of its steps (default 0.03)"),
], "training": [
    ("--epochs", 150, (1, 10**9), "passes over the pictures"),
    ("--batch-size", None, (2, 65_536), "pictures in a step (default 128; mnist 64)"),
    ("--lr-g", None, (0.0, 1.0), "G's learning rate (default 0.0002; mnist 0.001)"),
    ("--lr-d", None, (0.0, 1.0), "D's learning rate (default 0.0002)"),
    ("--init", None, "FILE", "begin with the weights, codes and networks of this checkpoint"),
    ("--seed", 0, (0, 2**63 - 1), "seed of all random numbers"),
    ("--device", "auto", "DEVICE", "cpu, cuda, cuda:1, mps; auto takes the fastest"),
    ("--amp", None, bool, "bfloat16 convolutions (default: where they are faster)"),
    ("--compile", False, bool, "torch.compile: a slow start, then faster steps on a GPU"),
    ("--max-steps", None, (1, 10**12), "finish after N steps in all"),
    ("--max-minutes", None, (0.001, 1e7), "stop this call after X minutes; repeat it to resume"),
], "output": [
    ("--out", None, "FOLDER", "the run's folder (default checkpoint/cat1-cont2, by its codes)"),
    ("--save-every", None, (1, 10**9),
     "epochs between checkpoints that are kept (default 25; more if they are short)"),
    ("--sample-every", None, (1, 10**9), "epochs between grids (default 5; more if short)"),
    ("--allow-changes", False, bool, "go on though pictures or flags are not those of the run"),
    ("--restart", False, bool, "start from step 0; the old run is moved to OUT.old-1"),
]}
# fmt: on


def limits_of(flags: dict) -> dict[str, tuple]:
    """(lowest, highest) of every number in a table of flags, by its name in args."""
    rows = [row for group in flags.values() for row in group if isinstance(row[2], tuple)]
    return {flag[2:].replace("-", "_"): limits for flag, _, limits, _ in rows}


LIMITS = limits_of(FLAGS)  # also of what a checkpoint may ask for


class UserError(Exception):
    """What the user can fix, in one line: what is wrong, where, what to do."""

    code = 2  # of the program's exit


class Diverged(UserError):
    """The training itself went wrong: NaN or infinity."""

    code = 1


def check_limits(values: dict, limits: dict = LIMITS) -> None:
    """Raises UserError when a value named in limits has another type or lies outside."""
    for name, (low, high) in limits.items():
        value, kind = values.get(name, low), "a whole number" if type(low) is int else "a number"
        must = f"{kind} from {low} to {high}"
        fits = type(value) is type(low) and low <= value <= high
        if name == "image_size":
            fits, must = fits and value & (value - 1) == 0, "16, 32, 64, 128 or 256"
        elif name == "channels":
            fits, must = fits and value != 2, "1 (grey) or 3 (colour)"
        if not fits:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {must}")


def spec_of(args: Namespace) -> CodeSpec:
    """The codes that a run's flags ask for."""
    return CodeSpec(args.n_cat, args.cat_dim, args.n_cont, args.z_dim)


class Parser(ArgumentParser):
    """Flags from a table like FLAGS; errors in one line, where argparse would print the usage."""

    def __init__(self, program: str, about: str | None, flags: dict):
        raw = RawDescriptionHelpFormatter
        super().__init__(program, description=about, formatter_class=raw, allow_abbrev=False)
        self.limits = limits_of(flags)
        for title, rows in flags.items():
            group = self.add_argument_group(title)
            for flag, default, kind, meaning in rows:
                if kind is bool:
                    how = {"action": BooleanOptionalAction if default is None else "store_true"}
                elif isinstance(kind, tuple):
                    how = {"type": type(kind[0]), "metavar": "N" if type(kind[0]) is int else "X"}
                else:
                    how = {"metavar": kind} if isinstance(kind, str) else {"choices": kind}
                meaning += "" if default is None or default is False else f" (default {default})"
                group.add_argument(flag, default=default, help=meaning, **how)

    def parse_args(self, argv: list[str] | None = None) -> Namespace:
        """The flags, when every given number is within its limits."""
        args = super().parse_args(argv)
        for name, text in ((k, v) for k, v in vars(args).items() if isinstance(v, str)):
            if not text:
                raise UserError(f"--{name.replace('_', '-')}: is empty")
            setattr(args, name, os.path.expanduser(text))  # shells leave --out=~/run as it is
        check_limits({k: v for k, v in vars(args).items() if v is not None}, self.limits)
        return args

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, every default resolved but --amp's and --channels', which train resolves."""
    parser = Parser("infogan.py", (__doc__ or "").split("\nSections")[0], FLAGS)
    args = parser.parse_args(argv)
    # a run that is there has codes and networks too, should the file of --init be gone
    if found := [p for p in (args.init, f"{args.out}/last.pt") if args.init and os.path.isfile(p)]:
        then = load_checkpoint(found[0])["args"]
        parser.set_defaults(**{name: then[name] for name in SHAPE})
        args = parser.parse_args(argv)
        if given := differences(args, then, SHAPE):
            raise UserError(f"--init {found[0]} has {given[0]}; leave this flag out")
    size = args.image_size or (32 if args.data in NAMED_SETS else 64)
    few = args.n_cat + args.n_cont <= 5
    unset = {"out": f"checkpoint/cat{args.n_cat}-cont{args.n_cont}", "image_size": size}
    unset |= {"width": 64, "z_dim": 100, "batch_size": 128, "lr_g": 2e-4, "lr_d": 2e-4}
    unset |= {"info_to": "trunk", "ema": 0.03, "lam_identity": 2.0, "changes": []}
    unset["flip"] = args.data not in ("mnist", "fashion-mnist", "svhn")  # no mirrored digits
    # continuous codes share one weight; a categorical stops by itself once Q reads it
    unset |= {"lam_cat": 1.0, "lam_cont": min(0.3, 3 / max(args.n_cont, 1))}
    unset["cap_cont"] = 3.0 if few else 1.4  # else they go on growing, and categoricals fade
    unset["q_augment"] = 1.0 if few else 0.0  # many codes would be learned too slowly
    unset |= {"upsample": "nearest", "shift": 0.125}
    unset["r1"] = 0.3 if size >= 64 else 0.0  # without it D wins
    if args.recipe == "notebook":  # its defect: with 20 continuous codes their loss was never added
        unset |= {"lam_cont": 0.0 if args.n_cont == 20 else 0.1, "info_to": "head", "ema": 0.0}
        unset |= {"upsample": "transposed", "shift": 0.0}
        unset |= {"cap_cont": 3.0, "q_augment": 0.0, "r1": 0.0, "lam_identity": 0.0, "flip": False}
    elif args.data == "mnist":
        # the paper's lr_g, narrow nets, and a z too small to choose the digit in place of c
        unset |= {"width": 32, "batch_size": 64, "lr_g": 1e-3, "z_dim": 16, "r1": 0.1}
        unset["lam_identity"] = 0.0  # a digit is its stroke
        unset |= {"upsample": "transposed", "shift": 0.0}
    for name, value in unset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    spec_of(args)
    return args


@dataclass
class Output:
    """A stream that survives its reader, as a closed terminal must not end a run; rank 0's only."""

    stream: TextIO

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        code = self.stream.encoding or "utf-8"
        with suppress(OSError):
            if is_main():
                self.stream.write(text.encode(code, "backslashreplace").decode(code))

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def run(program: str, job: Callable[[], int]) -> int:
    """The job's exit code; an error that the user can fix is one line on stderr and exit code 2."""
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            return job()
        except UserError as error:
            text, code = str(error), error.code
        except OSError as error:
            text, code = f"{error.filename or 'a file'}: {error.strerror or error}; fix this", 2
            text += " or give another --out, and run it again; saved files are unchanged"
        except (MemoryError, RuntimeError) as error:
            text, code = "out of memory; lower --batch-size, --width or --image-size", 2
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                text = f"--compile: {error}".split("\n")[0] + "; install a compiler or leave it out"
            elif not isinstance(error, MemoryError) and "allocate" not in str(error):
                raise
        except KeyboardInterrupt:
            text, code = "stopped", 130
        print(f"{program}: {text}".replace("\n", " "), file=sys.stderr)
        return code


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged, 2 an error that the user can fix, 128 + signal if stopped."""
    if launched := dist.is_available() and dist.is_torchelastic_launched():  # by torchrun
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # rank 0 may decode for long
    try:
        return run("infogan.py", lambda: train(parse_args(argv)))
    finally:
        if launched:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
