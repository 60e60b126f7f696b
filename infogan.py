"""InfoGAN in one file: a GAN whose codes mean something, learned without labels.

Chen et al. 2016, arXiv:1606.03657. The generator G draws a picture x = G(z, c) from noise z and a
code c, the discriminator D tells it from real pictures, and a head Q on D's trunk must read c back
from x. With L_I, a lower bound of the mutual information I(c; x) (Eqs. 5 and 6):

    min over G and Q, max over D:  V(D, G) - lambda L_I(G, Q),   L_I(G, Q) = E[log Q(c|x)] + H(c)

    python infogan.py --data ~/faces                         train; the same command again goes on
    python infogan.py --n-cat 10 --n-cont 20 --epochs 360    10 categorical and 20 continuous codes
    python generate.py --ckpt checkpoint/cat1-cont2/last.pt  look at what each code does

Left out on purpose: labels, learning-rate schedules, growing networks, loader processes, configs.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

try:
    import fcntl
except ImportError:  # Windows: nothing there stops a second run in the same folder
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

LIMITS = {  # of every number that a flag or a checkpoint may ask for
    "n_cat": (0, 64),
    "cat_dim": (2, 1000),
    "n_cont": (0, 256),
    "z_dim": (0, 10_000),
    "image_size": (16, 256),
    "width": (1, 1024),
    "channels": (1, 3),
    "lam_cat": (0.0, 1000.0),
    "lam_cont": (0.0, 1000.0),
    "enough": (0.0, 3.0),
    "q_view": (0.0, 3.0),
    "r1": (0.0, 1000.0),
    "ema": (0.0, 1.0),
    "epochs": (1, 10**9),
    "batch_size": (2, 65_536),
    "lr_g": (0.0, 1.0),
    "lr_d": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
    "max_steps": (1, 10**12),
    "max_minutes": (0.001, 1e7),
    "save_every": (1, 10**9),
    "sample_every": (1, 10**9),
}
SHAPE = ("n_cat", "cat_dim", "n_cont", "z_dim", "image_size", "width", "channels")


class Problem(Exception):
    """What a user can mend, in one line: what is wrong, where, what to do. Becomes exit code 2."""

    code = 2


class Diverged(Problem):
    """The training itself went wrong: NaN or infinity. Becomes exit code 1."""

    code = 1


def check_limits(values: dict, limits: dict = LIMITS) -> None:
    """Raises Problem when a value named in limits has another type or lies outside."""
    for name, (low, high) in limits.items():
        if name not in values:
            continue
        value, flag = values[name], "--" + name.replace("_", "-")
        if type(value) is not type(low) or not low <= value <= high:
            kind = "a whole number" if type(low) is int else "a number"
            raise Problem(f"{flag} {value}: must be {kind} from {low} to {high}")
        if name == "image_size" and value & (value - 1):
            raise Problem(f"{flag} {value}: must be 16, 32, 64, 128 or 256")
        if name == "channels" and value == 2:
            raise Problem(f"{flag} {value}: must be 1 (grey) or 3 (colour)")


# codes --------------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """What G draws n pictures from."""

    z: Tensor  # (n, z_dim), N(0, 1): what no code has to explain
    c_cat: Tensor  # (n, n_cat), whole numbers from 0 to cat_dim - 1
    c_cont: Tensor  # (n, n_cont), uniform in [-1, 1]


class QOutput(NamedTuple):
    """Q(c|x) for n pictures: a distribution over each code."""

    q_logits: Tensor  # (n, n_cat, cat_dim)
    q_mu: Tensor  # (n, n_cont)
    q_logvar: Tensor  # (n, n_cont)


SIGMA_MIN = 0.1  # of Q's Gaussian: without a floor it pays for precision that nobody sees


@dataclass(frozen=True)
class CodeSpec:
    """How many codes of which kind (paper, section 4). Raises Problem outside LIMITS."""

    n_cat: int = 1
    cat_dim: int = 10
    n_cont: int = 2
    z_dim: int = 100

    def __post_init__(self) -> None:
        check_limits(asdict(self))
        if not self.dim:
            raise Problem("--z-dim 0: without codes G needs noise, give --z-dim 100")

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

    def join(self, codes: Codes) -> Tensor:
        """(n, dim), what G takes: z, the categoricals one-hot, the continuous codes."""
        one_hot = F.one_hot(codes.c_cat, self.cat_dim).flatten(1)
        return torch.cat([codes.z, one_hot, codes.c_cont], 1)

    def split(self, q: Tensor) -> QOutput:
        """Q's raw output (n, q_dim) as a distribution, sigma between SIGMA_MIN and 1."""
        logits, mu, raw = q.split([self.n_cat * self.cat_dim, self.n_cont, self.n_cont], 1)
        variance = SIGMA_MIN**2 + (1 - SIGMA_MIN**2) * raw.sigmoid()
        return QOutput(logits.unflatten(1, (self.n_cat, self.cat_dim)), mu, variance.log())


# processes ----------------------------------------------------------------------------------------
# All draw the same chances for the whole batch and each works on its own rows of it, so a run does
# not depend on how many there are, and may go on with another number.


@contextmanager
def joined_processes() -> Iterator[None]:
    """Joins what torchrun started together; one process alone has nothing to join."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))  # while process 0 decodes a set
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's number, and how many there are. Number 0 alone writes and talks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mine(whole: Tensor) -> Tensor:
    """This process's rows of what was drawn for the whole batch."""
    rank, ranks = place()
    return whole.unflatten(0, (ranks, -1))[rank]


def agree(*flags: int) -> list[int]:
    """The largest of each flag over all processes: they do the same things at the same step."""
    if place()[1] == 1:
        return [*flags]
    whole = torch.tensor(flags)
    dist.all_reduce(whole, dist.ReduceOp.MAX)  # of the CPUs: no GPU is waited for
    return whole.tolist()


def average(tensors: list[Tensor]) -> None:
    """Makes each tensor its mean over all processes, in one message."""
    if (ranks := place()[1]) > 1:
        whole = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(whole)
        parts = whole.div_(ranks).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


@contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 goes first; where it fails, the others stop without a word of their own."""
    rank, failed = place()[0], 1
    if rank and agree(0)[0]:
        raise Problem("process 0 has failed")
    try:
        yield
        failed = 0
    finally:
        if not rank:
            agree(failed)


# pictures -----------------------------------------------------------------------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # Pillow knows some that start a program
MOST_PIXELS, MOST_BYTES = 2**25, 2**28  # of one file: what decoding may take is bounded
DATA = Path("data")  # where torchvision keeps the named sets
HOW = "give a folder of pictures, or `make data` gets faces, or `make demo` draws some"
NAMED_SETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "svhn": "SVHN", "celeba": "CelebA"}


class Pictures(NamedTuple):
    """A training set, decoded once."""

    x: Tensor  # uint8 (N, channels, size, size), channels_last, in a file that is read as needed
    fingerprint: str  # of its contents: a run goes on only with the pictures it began with
    names: list[str]  # paths, or numbers in a named set


def open_picture(raw: bytes) -> Image.Image:
    """The picture in a file's bytes, not yet decoded. Raises Pillow's errors."""
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    return image


def to_square(image: Image.Image, size: int, channels: int) -> Tensor:
    """uint8 (channels, size, size) of any picture: upright, on white, scaled, centre cropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit, which convert() would clip instead of scale
        image = image.convert("I").point(lambda v: v * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def find_pictures(folder: Path) -> list[Path]:
    """All picture files below a folder, in an order that only their names decide.

    A folder that cannot be looked into is among them, so that it is told like an unreadable file.
    """
    closed: list[Path] = []
    walk = os.walk(folder, onerror=lambda error: closed.append(Path(error.filename)))
    found = [Path(at, name) for at, _, names in walk for name in names]
    found = [p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    return sorted(found + closed)


def read_file(path: Path) -> bytes:
    """What a file of bounded size holds. Raises OSError; a pipe could be read for ever."""
    if not path.is_file():
        raise FileNotFoundError
    if path.stat().st_size > MOST_BYTES:
        raise Image.DecompressionBombError
    return path.read_bytes()


@contextmanager
def by_torchvision(name: str) -> Iterator[None]:
    """Raises Problem offline, or when torchvision wants a package for the set that is missing."""
    try:
        yield
    except (RuntimeError, OSError, ImportError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        wants = {
            "svhn": "; it wants `pip install scipy`",
            "celeba": "; it wants `pip install gdown`",
        }
        why += wants.get(name, "")
        raise Problem(f"--data {name}: torchvision could not get it into {DATA}/: {why}") from error


def get_named_set(name: str) -> Path:
    """The file or folder of a set below data/, which torchvision downloads where it is not yet."""
    from torchvision import datasets

    here = DATA / {"celeba": "celeba/img_align_celeba", "svhn": "train_32x32.mat"}.get(
        name, f"{NAMED_SETS[name]}/raw/train-images-idx3-ubyte"
    )
    with by_torchvision(name):
        if not here.exists():
            getattr(datasets, NAMED_SETS[name])(DATA, download=True)
    return here


def open_named_set(name: str, file: Path) -> list[Image.Image]:
    """The pictures of a set that is one file."""
    from torchvision import datasets

    with by_torchvision(name):
        if name == "svhn":
            return [*map(Image.fromarray, datasets.SVHN(DATA).data.transpose(0, 2, 3, 1))]
        return [*map(Image.fromarray, datasets.mnist.read_image_file(str(file)).numpy())]


DECODED_AT_ONCE = 512  # so memory stays flat however large a set is
DECODER = 1  # counts up whenever to_square makes something else of a picture


def decode(
    data: str, items: list[Path] | list[Image.Image], size: int, channels: int, file: BinaryIO
) -> dict[str, object]:
    """Writes pictures to file, (size, size, channels) bytes each; returns what is known of them.

    Exact copies and unreadable files are left out. Raises Problem when fewer than two remain.
    """

    def read(item: Path | Image.Image) -> tuple[str, Tensor | None]:
        try:
            raw = read_file(item) if isinstance(item, Path) else item.tobytes()
            image = open_picture(raw) if isinstance(item, Path) else item
            return hashlib.sha256(raw).hexdigest(), to_square(image, size, channels)
        except Exception as error:  # decoders raise whatever they like; it is told below
            return f"{item} ({type(error).__name__})", None

    kept, skipped, checksum, grey = {}, [], 0, True
    Image.init()  # loads Pillow's formats, for which threads would race
    bar = tqdm(desc="pictures", total=len(items), leave=False, disable=None)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        warnings.simplefilter("ignore")  # of Pillow's about files that it reads all the same
        for start in range(0, len(items), DECODED_AT_ONCE):
            part = items[start : start + DECODED_AT_ONCE]
            for i, (key, x) in enumerate(pool.map(read, part), start):  # decoders run unlocked
                bar.update()
                if x is None:
                    skipped.append(key)
                elif key not in kept:
                    kept[key] = str(items[i]) if isinstance(items[i], Path) else str(i)
                    raw = x.permute(1, 2, 0).numpy().tobytes()
                    file.write(raw)
                    checksum, grey = zlib.crc32(raw, checksum), grey and bool((x == x[:1]).all())
    told = f"{len(kept):,} pictures in {data}"
    if copies := len(items) - len(skipped) - len(kept):
        told += f", {copies:,} exact copies dropped"
    if skipped:
        named = ", ".join(skipped[:10]) + (", …" if len(skipped) > 10 else "")
        told += f", {len(skipped):,} unreadable files skipped: {ascii(named)}"
    if len(kept) < 2:
        raise Problem(f"--data {data}: {told}, at least 2 are needed; {HOW}")
    fingerprint = hashlib.sha256("".join(kept).encode()).hexdigest()[:16]
    known = {"n": len(kept), "told": told, "fingerprint": fingerprint, "checksum": checksum}
    return known | {"grey": grey, "names": "\0".join(kept.values())}


class Cache(NamedTuple):
    """Where a decoded set is kept: its bytes, then what is known of it as JSON, then its length."""

    path: Path
    key: str  # changes with every name, size and time of the files, and with the decoder
    shape: tuple[int, int, int]  # of a picture: size, size, channels

    def read(self) -> tuple[Tensor, dict] | None:
        """(N, *shape), mapped into memory, and what is known; None where it is not as written."""
        try:
            with open(self.path, "rb") as file:
                file.seek(-8, os.SEEK_END)
                length = int.from_bytes(file.read(), "little")
                size = file.seek(-8 - length, os.SEEK_END)
                known = json.loads(file.read(length))
            if known["key"] != self.key or size != known["n"] * math.prod(self.shape):
                return None
            x = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
            whole = zlib.crc32(x.numpy()) == known["checksum"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return None
        return (x.view(-1, *self.shape), known) if whole else None

    def write(self, data: str, items: list[Path] | list[Image.Image]) -> tuple[Tensor, dict]:
        """Decodes items. Where the cache cannot be written they stay in memory, which is told."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                known = decode(data, items, *self.shape[1:], file)
                tail = json.dumps(known | {"key": self.key}).encode()
                file.write(tail + len(tail).to_bytes(8, "little"))
            if written := self.read():
                return written
            why = "damaged as soon as it was written"
        except OSError as error:
            why = error.strerror or str(error)
        print(f"{self.path}: {why}; pictures are not cached, each start decodes them")
        memory = io.BytesIO()
        known = decode(data, items, *self.shape[1:], memory)
        return torch.frombuffer(memory.getbuffer(), dtype=torch.uint8).view(-1, *self.shape), known


def cache_folder() -> Path:
    """The user's own: a folder of pictures may be read-only, or shared, or walked by others."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "infogan"


def cache_of(sources: list[Path], folder: Path, size: int, channels: int) -> Cache:
    """One file for each folder and way to decode it, so what a changed set leaves is replaced."""
    key = hashlib.sha256(str(DECODER).encode())
    for path in sources:
        key.update(os.fsencode(path))
        with suppress(OSError):  # an unreadable one counts by its name
            now = path.stat()
            key.update(f" {now.st_size} {now.st_mtime_ns}\0".encode())
    where = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    name = f"{where}-{size}x{size}x{channels}"
    return Cache(cache_folder() / name, key.hexdigest(), (size, size, channels))


def load_pictures(data: str, size: int, channels: int | None = None) -> Pictures:
    """A folder or a named set, decoded once: later starts map the cache's file into memory.

    channels None takes what the set has: 1 when every picture is grey, else 3. Exact copies and
    unreadable files are left out, and told. Raises Problem when fewer than two pictures remain.
    """
    folder = get_named_set(data) if data in NAMED_SETS else Path(data).expanduser()
    if data not in NAMED_SETS and not folder.is_dir():
        raise Problem(f"--data {data}: no such folder; {HOW}")
    folder = folder.resolve()  # one set, however its path is written
    sources = find_pictures(folder) if folder.is_dir() else [folder]
    cache = cache_of(sources, folder, size, 3)
    found = cache.read()
    if channels == 1 and not (found and found[1]["grey"]):
        cache = cache_of(sources, folder, size, 1)
        found = cache.read()
    if not found:
        items = sources if folder.is_dir() else open_named_set(data, folder)
        found = cache.write(data, items)
    x, known = found
    print(known["told"])
    x = x.permute(0, 3, 1, 2)
    x = x[:, :1] if known["grey"] and channels != 3 else x
    return Pictures(x, known["fingerprint"], known["names"].split("\0"))


def pick(x: Tensor, which: Tensor) -> Tensor:
    """Some of many pictures, in their own layout: rows are copied whole, where [] goes by bytes."""
    return x.permute(0, 2, 3, 1).index_select(0, which.to(x.device)).permute(0, 3, 1, 2)


def nearest(x: Tensor, device: torch.device) -> Tensor:
    """The set on a GPU where it takes less than half of what is free there, else as it is."""
    fits = device.type == "cuda" and x.nbytes < torch.cuda.mem_get_info(device)[0] // 2
    return x.to(device) if fits else x


def make_batch(x: Tensor, flip: bool, rng: torch.Generator, device: torch.device) -> Tensor:
    """uint8 pictures as floats in [-1, 1] on the device; flip mirrors half of them."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # so that copying does not wait for what the device still computes
    x = x.to(device, non_blocking=True)
    if flip:
        mirrored = mine(torch.rand(len(x) * place()[1], 1, 1, 1, generator=rng) < 0.5)
        x = torch.where(mirrored.to(device, non_blocking=True), x.flip(3), x)
    x = x.contiguous(memory_format=torch.channels_last).float()  # moved as bytes, a quarter
    return torch.add(x.new_full((), -1.0), x, alpha=1 / 127.5, out=x)  # x / 127.5 - 1 in one pass


# networks -----------------------------------------------------------------------------------------

Q_HIDDEN = 256


def layer_widths(image_size: int, width: int) -> list[int]:
    """Maps after each halving of image_size down to 4; at 64 and width 64: 64, 128, 256, 512."""
    return [width * min(2**i, 8) for i in range(int(math.log2(image_size)) - 2)]


def flat(x: Tensor) -> Tensor:
    """(n, maps, h, w) as (n, h w maps): a view where the layout is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1)


class ToPoint(nn.Conv2d):
    """A convolution as large as its input: a matrix product, ten times as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(flat(x), flat(self.weight), self.bias)[:, :, None, None]


class FromPoint(nn.ConvTranspose2d):
    """The same from a single pixel (n, maps, 1, 1) to the kernel's size."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) @ flat(self.weight)
        return y.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)


class Generator(nn.Module):
    """x = G(z, c): (n, spec.dim) to (n, channels, size, size) in [-1, 1] (DCGAN, 1511.06434)."""

    def __init__(self, spec: CodeSpec, image_size: int = 64, width: int = 64, channels: int = 3):
        super().__init__()
        check_limits({"image_size": image_size, "width": width, "channels": channels})
        widths = layer_widths(image_size, width)[::-1]
        layers = [FromPoint(spec.dim, widths[0], 4, bias=False)]
        for now, then in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.BatchNorm2d(now), nn.ReLU(True)]
            layers += [nn.ConvTranspose2d(now, then, 4, 2, 1, bias=then == channels)]
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
        self.d_head = ToPoint(widths[-1], 1, 4)
        self.q_head = nn.Sequential(
            ToPoint(widths[-1], Q_HIDDEN, 4, bias=False),
            nn.BatchNorm2d(Q_HIDDEN),
            nn.LeakyReLU(0.1, True),
            ToPoint(Q_HIDDEN, max(spec.q_dim, 1), 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, QOutput]:
        """D's logits (n,) and Q(c|x) of pictures in [-1, 1], in one pass of the trunk."""
        h = self.trunk(x)  # (n, 8 width, 4, 4)
        return self.judge(h), self.read(h)

    def judge(self, h: Tensor) -> Tensor:
        """D's logits, from the trunk's output."""
        return self.d_head(h).flatten().float()

    def read(self, h: Tensor) -> QOutput:
        """Q(c|x), from the trunk's output."""
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


R1_EVERY = 16  # steps; a lazy R1 costs a sixteenth and does the same (1912.04958, appendix B)


def r1_penalty(d_real: Tensor, x: Tensor) -> Tensor:
    """R1 = E[|dD(x)/dx|^2] / 2 on real pictures: keeps D from winning (1801.04406, Eq. 9)."""
    (slope,) = torch.autograd.grad(d_real.sum(), x, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean() / 2


def log_q(q: QOutput, codes: Codes) -> Tensor:
    """log Q(c|x) of each code in nats, (n, n_cat + n_cont)."""
    cat = q.q_logits.log_softmax(2).gather(2, codes.c_cat[:, :, None])[:, :, 0]
    square = (codes.c_cont - q.q_mu) ** 2 / q.q_logvar.exp()
    return torch.cat([cat, -0.5 * (math.log(2 * math.pi) + q.q_logvar + square)], 1)


def mutual_information(spec: CodeSpec, q: QOutput, codes: Codes) -> Tensor:
    """L_I = E[log Q(c|x)] + H(c) of each code in nats (paper, Eq. 5), (n_cat + n_cont,)."""
    return log_q(q, codes).mean(0) + torch.tensor(spec.entropies, device=q.q_mu.device)


def weigh(spec: CodeSpec, L_I: Tensor, args: argparse.Namespace) -> Tensor:
    """lambda L_I, with one lambda for each kind of code (paper, section 7.2)."""
    return args.lam_cat * L_I[: spec.n_cat].sum() + args.lam_cont * L_I[spec.n_cat :].sum()


def enough(spec: CodeSpec, L_I: Tensor, args: argparse.Namespace) -> Tensor:
    """L_I as G is paid for it: a continuous code that Q reads well need not take more of x."""
    cat, cont = L_I.split([spec.n_cat, spec.n_cont])
    return torch.cat([cat, cont.clamp(max=args.enough)])


# step ---------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that training changes, and so all that a checkpoint holds."""

    spec: CodeSpec
    G: Generator
    G_ema: Generator  # the average of G, which is shown and used
    D: Discriminator
    opt_G: torch.optim.Optimizer
    opt_D: torch.optim.Optimizer
    rng: torch.Generator  # the run's only source of chance; on the CPU, so a run can change devices
    sums: Tensor  # metrics added up since the last logged step
    epoch_seed: int = 0  # draws the order of this epoch's pictures, also after a restart
    step: int = 0
    minutes: float = 0.0  # of training, over all starts
    order: Tensor | None = None  # drawn from epoch_seed, so never saved


COMPILE = {"mode": "reduce-overhead"}  # CUDA graphs: no kernel waits for Python


def compile_nets(state: State) -> None:
    """By torch.compile, at the first step; what checkpoints hold stays as it is."""
    for net in (state.G.layers, state.D.trunk, state.D.q_head):
        net.compile(**COMPILE)


def metric_names(spec: CodeSpec) -> list[str]:
    """The figures of a step, in train_step's order."""
    return ["loss_D", "loss_G", "D_real", "D_fake", *spec.names]


def spec_of(args: argparse.Namespace) -> CodeSpec:
    """The codes that a run's flags ask for."""
    return CodeSpec(args.n_cat, args.cat_dim, args.n_cont, args.z_dim)


def new_state(args: argparse.Namespace, device: torch.device) -> State:
    """Networks and optimisers at step 0; every random number comes from args.seed."""
    spec, rng = spec_of(args), torch.Generator().manual_seed(args.seed)
    shape = (spec, args.image_size, args.width, args.channels)
    G, D = Generator(*shape), Discriminator(*shape)
    for net in (G, D):
        init_weights(net, rng)
        net.to(device, memory_format=torch.channels_last)
    if device.type == "cuda" and place()[1] > 1:  # gloo has none; R1 could not go through it
        G = nn.SyncBatchNorm.convert_sync_batchnorm(G)
        D = D if args.r1 else nn.SyncBatchNorm.convert_sync_batchnorm(D)
    heads = {"trunk": [D.trunk, D.d_head, D.q_head], "head": [D.trunk, D.d_head]}[args.info_to]
    with_D = [p for part in heads for p in part.parameters()]
    with_G = [*G.parameters(), *(D.q_head.parameters() if args.info_to == "head" else ())]
    adam = {"betas": (0.5, 0.999), "fused": device.type in ("cpu", "cuda")}
    opt_G = torch.optim.Adam(with_G, args.lr_g, **adam)
    opt_D = torch.optim.Adam(with_D, args.lr_d, **adam)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    sums = torch.zeros(len(metric_names(spec)), device=device)
    return State(spec, G, G_ema, D, opt_G, opt_D, rng, sums)


def next_batch(state: State, n: int, batch_size: int) -> Tensor:
    """Which of n pictures come next: each epoch in a new order, without the rest below a batch."""
    place = state.step % (n // batch_size)
    if place == 0:
        state.epoch_seed = int(torch.randint(2**62, (), generator=state.rng))
    if place == 0 or state.order is None:
        state.order = torch.randperm(n, generator=torch.Generator().manual_seed(state.epoch_seed))
    return state.order[place * batch_size : (place + 1) * batch_size]


def view(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Pictures turned, sheared, scaled, moved, out of focus and in another light, each its own way.

    At strength 1 up to 17 degrees, 30% in size, 15% of the width to a side and half of the light.
    """
    seed = int(torch.randint(2**62, (), generator=rng))  # drawn here, so the rest can be there
    at = {"generator": torch.Generator(x.device).manual_seed(seed), "device": x.device}
    n = len(x) * place()[1]
    warp = 0.3 * strength * (2 * mine(torch.rand(n, 2, 3, **at)) - 1)
    where = F.affine_grid(torch.eye(2, 3, device=x.device) + warp, x.shape, align_corners=False)
    y = F.grid_sample(x, where, padding_mode="border", align_corners=False)
    y = F.avg_pool2d(F.pad(y, [1] * 4, mode="replicate"), 3, 1)
    light = torch.rand(2, n, 1, 1, 1, **at).transpose(0, 1)
    gain, shift = 0.5 * strength * (2 * mine(light).transpose(0, 1) - 1)
    y = (gain.exp() * (y + shift)).clamp(-1, 1)
    return y.contiguous(memory_format=torch.channels_last)


@contextmanager
def unrecorded(net: nn.Module) -> Iterator[None]:
    """Batch norm normalises as it would, but its running statistics learn nothing."""
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    before = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    yield
    for m, momentum in zip(norms, before, strict=True):
        m.momentum = momentum


def judge_and_read(
    D: Discriminator, x: Tensor, strength: float, rng: torch.Generator
) -> tuple[Tensor, QOutput]:
    """D's logits of x and Q(c|x); with a strength Q reads the categoricals from views of x.

    What a category is must then survive the view, so it is neither pose nor thickness nor light.
    """
    d, q = D(x)
    if strength and D.spec.n_cat:
        with unrecorded(D):  # whoever reads codes later reads pictures as they are
            q = q._replace(q_logits=D.read(D.trunk(view(x, strength, rng))).q_logits)
    return d, q


def descend(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of opt against loss, on the whole batch's gradient."""
    opt.zero_grad()
    loss.backward()
    mean = [p.grad for group in opt.param_groups for p in group["params"]]
    average([g for g in mean if g is not None])
    opt.step()


def train_step(state: State, args: argparse.Namespace, x: Tensor, codes: Codes) -> Tensor:
    """One step of D, then of G, on n real pictures and n drawn codes; returns the metrics.

    L_I always trains G. It trains Q together with D's trunk in D's step (args.info_to "trunk", as
    the paper's own code does), or Q's head alone in G's step ("head", the notebook).
    """
    spec, G, D, to_trunk = state.spec, state.G, state.D, args.info_to == "trunk"
    mixed = torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)
    lazily = args.r1 > 0 and state.step % R1_EVERY == 0
    x = x.detach().requires_grad_(lazily)

    if args.compile:
        torch.compiler.cudagraph_mark_step_begin()
    D.requires_grad_(True)
    with mixed:
        x_fake = G(spec.join(codes))  # drawn once, judged twice
        trunk = D.trunk.forward if lazily else D.trunk  # nobody compiles a gradient's gradient
        d_real = D.judge(trunk(x))  # Q's batch norm sees generated pictures only
        d_fake, q = judge_and_read(D, x_fake.detach(), args.q_view, state.rng)
    loss_D = loss = d_loss(d_real, d_fake)
    if to_trunk:
        loss = loss - weigh(spec, mutual_information(spec, q, codes), args)  # -V - lambda L_I
    if lazily:
        loss = loss + R1_EVERY * args.r1 * r1_penalty(d_real, x)
    descend(state.opt_D, loss)

    D.requires_grad_(False)  # G's step needs no gradient of D's weights
    D.q_head.requires_grad_(not to_trunk)
    with mixed:
        d_fake_G, q = judge_and_read(D, x_fake, args.q_view, state.rng)
    loss_G = g_loss(d_fake_G)
    L_I = mutual_information(spec, q, codes)
    # V - lambda L_I (Eq. 6)
    descend(state.opt_G, loss_G - weigh(spec, enough(spec, L_I, args), args))

    state.step += 1
    # a half-life that grows with training fits a run of any length (2312.02696, section 3.1)
    update_ema(state.G_ema, G, 0.5 ** (1 / (args.ema * state.step)) if args.ema else 0.0)
    opinions = [d_real.sigmoid().mean(), d_fake.sigmoid().mean()]
    return torch.cat([torch.stack([loss_D, loss_G, *opinions]), L_I]).detach()


@torch.no_grad()
def update_ema(G_ema: nn.Module, G: nn.Module, beta: float) -> None:
    """G_ema = beta G_ema + (1 - beta) G, batch norm's statistics included."""
    pairs = list(zip(G_ema.state_dict().values(), G.state_dict().values(), strict=True))
    floats = [(e, g) for e, g in pairs if e.is_floating_point()]
    torch._foreach_lerp_([e for e, _ in floats], [g for _, g in floats], 1 - beta)
    for e, g in pairs:
        if not e.is_floating_point():
            e.copy_(g)


# checkpoint ---------------------------------------------------------------------------------------

FORMAT = 1
BROKEN = (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError)  # by a damaged file
NEW_RUN = "--restart moves the old run aside, another --out starts beside it"
MAY_DIFFER = ("data", "out", "epochs", "max_steps", "max_minutes", "device", "amp", "restart")
MAY_DIFFER += ("compile", "save_every", "sample_every")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole under its name or not at all, whatever happens meanwhile."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two may write at once
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def check_finite(state: State, metrics: list[float]) -> None:
    """Raises Diverged that names the first metric which is NaN or infinite."""
    for name, value in zip(metric_names(state.spec), metrics, strict=True):
        if not math.isfinite(value):
            raise Diverged(f"step {state.step}: {name} is {value}")


def save_checkpoint(path: Path, state: State, args: argparse.Namespace, pictures: Pictures) -> None:
    """All a run needs to go on bit for bit, plain values only. Raises Diverged on NaN.

    Every process calls it, number 0 writes.
    """
    average([state.sums])
    check_finite(state, state.sums.tolist())
    kept = {name: getattr(state, name).state_dict() for name in ("G", "G_ema", "D")}
    for name, weights in kept.items():
        if not all(w.isfinite().all() for w in weights.values()):
            raise Diverged(f"step {state.step}: {name} has weights that are not finite")
    kept |= {name: getattr(state, name).state_dict() for name in ("opt_G", "opt_D")}
    kept |= {name: getattr(state, name) for name in ("sums", "epoch_seed", "step", "minutes")}
    kept |= {"format": FORMAT, "spec": asdict(state.spec), "args": vars(args)}
    kept |= {"rng": state.rng.get_state(), "fingerprint": pictures.fingerprint}
    if place()[0] == 0:
        pack(path, kept)


def pack(path: Path, contents: dict) -> None:
    """A file for unpack, whole or not at all."""
    packed = io.BytesIO()  # torch would call a full disk an internal error
    torch.save(contents, packed)
    with replacing(path) as file:
        file.write(packed.getbuffer())


PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
PICKLED |= {f"torch {kind}Storage" for kind in ("Float", "Half", "Long", "Byte")}


def claimed_bytes(value: object) -> int:
    """What copies of all tensors in nested dicts and lists would take."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(map(claimed_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def unpack(path: Path) -> object:
    """What torch.save put into a file; runs nothing, takes no more memory than the file has bytes.

    Raises whatever zipfile, pickle and torch do: torch alone would verify no checksum.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as packed:
        entries = packed.infolist()
        if sum(entry.file_size for entry in entries) > size or packed.testzip():
            raise zipfile.BadZipFile
        pickles = [packed.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
    ops = (op for raw in pickles for op in pickletools.genops(raw))
    if not {name for op, name, _ in ops if op.name.endswith("GLOBAL")} <= PICKLED:
        raise pickle.UnpicklingError
    contents = torch.load(path, map_location="cpu", weights_only=True)
    if claimed_bytes(contents) > size:  # one number stretched over a huge shape
        raise pickle.UnpicklingError
    return contents


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint's contents on the CPU: "args" (a dict of the flags), "spec", "step", "G_ema", …

    Runs nothing that the file holds. Raises Problem for whatever is no checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem(f"{path}: no such checkpoint; infogan.py leaves last.pt in a run's folder")
    try:
        ckpt = unpack(path)
    except Exception as error:  # they raise whatever they like, the file is at fault
        kind = type(error).__name__
        raise Problem(f"{path}: broken, or no checkpoint of infogan.py ({kind})") from error
    if not isinstance(ckpt, dict) or not isinstance(ckpt.get("args"), dict):
        raise Problem(f"{path}: no checkpoint of infogan.py")
    written = ckpt.get("format")
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise Problem(f"{path}: format {written}, but this infogan.py knows 1 to {FORMAT} only")
    try:
        check_limits({name: ckpt["args"].get(name) for name in SHAPE})
    except Problem as problem:
        raise Problem(f"{path}: {problem}") from None
    return ckpt


def load_net(path: str | Path, kind: type, key: str, device: str) -> nn.Module:
    """The weights under key in the architecture that the checkpoint names: float32, frozen."""
    ckpt = load_checkpoint(path)
    args, weights = argparse.Namespace(**ckpt["args"]), ckpt.get(key)
    with torch.device("meta"):  # takes no memory before the shapes are known to fit
        net = kind(spec_of(args), args.image_size, args.width, args.channels)
    try:
        weights = {k: w.float() if w.is_floating_point() else w for k, w in weights.items()}
        net.load_state_dict(weights, assign=True)
    except (RuntimeError, *BROKEN) as error:
        raise Problem(f"{path}: its {key} does not fit the flags that it names") from error
    if not all(w.isfinite().all() for w in weights.values()):
        raise Problem(f"{path}: its {key} has weights that are not finite")
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


def go_on(state: State, args: argparse.Namespace, ckpt: dict, pictures: Pictures) -> None:
    """Puts a checkpoint's contents into state. Raises Problem where the run was another."""
    if "opt_G" not in ckpt:
        raise Problem(f"{args.out}: its checkpoint has weights only, made to look at; {NEW_RUN}")
    for name, now in vars(args).items():
        then = ckpt["args"].get(name)
        if name in ckpt["args"] and name not in MAY_DIFFER and then != now:
            flag = "--" + name.replace("_", "-")
            raise Problem(f"{args.out} was begun with {flag} {then}, not {now}; {NEW_RUN}")
    if ckpt.get("fingerprint") != pictures.fingerprint:
        raise Problem(f"{args.out} was begun with other pictures than {args.data}; {NEW_RUN}")
    try:
        for name in ("G", "G_ema", "D", "opt_G", "opt_D"):
            getattr(state, name).load_state_dict(ckpt[name])
        moments = [*state.opt_G.state.items(), *state.opt_D.state.items()]
        if any(v.dim() and v.shape != p.shape for p, kept in moments for v in kept.values()):
            raise ValueError
        for name, kind in (("epoch_seed", int), ("step", int), ("minutes", float)):
            setattr(state, name, kind(ckpt[name]))
        state.sums.copy_(ckpt["sums"])
        state.rng.set_state(ckpt["rng"])
    except (RuntimeError, *BROKEN) as error:
        raise Problem(f"{args.out}: its checkpoint cannot be gone on from; {NEW_RUN}") from error


# loop ---------------------------------------------------------------------------------------------

LOG_EVERY = 20  # steps between two rows of log.csv, and between two waits for the device
SAVE_MINUTES = 10.0
SIGNALS = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]


@contextmanager
def listening() -> Iterator[list[int]]:
    """Collects signals that ask a run to stop; a second one of the same kind stops it at once."""
    heard, before = [], {}
    ignored = signal.SIG_IGN  # by nohup, or by a shell for what runs in the background

    def note(number: int, _frame: object) -> None:
        heard.append(number)
        signal.signal(number, before[number])

    for number in [s for s in SIGNALS if signal.getsignal(s) != ignored]:
        before[number] = signal.signal(number, note)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_picture(path: Path, image: Image.Image) -> None:
    """A PNG, whole or not at all."""
    with replacing(path) as file:
        image.save(file, "png")


def save_table(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """A CSV, whole or not at all."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        csv.writer(text, lineterminator="\n").writerows(lines)
        text.detach()  # `replacing` flushes and closes the file itself


def save_grid(path: Path, x: Tensor) -> None:
    """Pictures in [-1, 1] as one PNG, eight in a row."""
    grid = make_grid(x.cpu(), 8, normalize=True, value_range=(-1, 1))
    save_picture(path, to_pil_image(grid))


def save_animation(out: Path) -> None:
    """training.gif: the run's grids one after the other, the epoch above each; the last rests."""
    frames = []
    for path in sorted(out.glob("samples/epoch_*.png"), key=lambda p: int(p.stem[6:])):
        grid = Image.open(path).convert("RGB")
        grid = ImageOps.scale(grid, max(1, round(500 / grid.width)), Image.Resampling.NEAREST)
        frame, font = ImageOps.expand(grid, (0, 28, 0, 0), "white"), ImageFont.load_default(16)
        ImageDraw.Draw(frame).text((6, 4), f"epoch {int(path.stem[6:])}", "black", font)
        frames.append(frame.quantize(128))
    if len(frames) > 1:
        with replacing(out / "training.gif") as file:
            rest = {"duration": [250] * (len(frames) - 1) + [2000], "loop": 0}
            frames[0].save(file, "gif", save_all=True, append_images=frames[1:], **rest)


@torch.no_grad()
def strongest_codes(G: Generator, spec: CodeSpec, joined: Tensor) -> Tensor:
    """A grid (3, H, W) from 0 to 1: one latent (1, spec.dim) along the codes that change it most.

    A row for each of the eight strongest: its categories in turn, or its values from -1 to 1.
    """
    rows, n_hot = [], spec.n_cat * spec.cat_dim
    for k in range(spec.n_cat):
        row = joined.repeat(8, 1)
        each = torch.arange(8, device=row.device) % spec.cat_dim
        one_hot = row[:, spec.z_dim : spec.z_dim + n_hot].unflatten(1, (spec.n_cat, -1))
        one_hot[:, k] = F.one_hot(each, spec.cat_dim).to(row)
        rows.append(G(row))
    for j in range(spec.n_cont):
        row = joined.repeat(8, 1)
        row[:, spec.z_dim + n_hot + j] = torch.linspace(-1, 1, 8)
        rows.append(G(row))
    rows.sort(key=lambda x: -x.var(0).sum().item())
    return make_grid(torch.cat(rows[:8]).cpu(), 8, normalize=True, value_range=(-1, 1))


class Log:
    """log.csv, curves.png and TensorBoard's events of a run; rows past `step` are cut."""

    def __init__(self, out: Path, spec: CodeSpec, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.spec = out / "log.csv", spec
        self.head = ["step", "epoch", "minutes", *metric_names(spec)]
        old = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        rows = [line.split(",") for line in old if line.count(",") == len(self.head) - 1]
        self.rows = [[float(v) for v in row] for row in rows if int(row[0]) <= step]
        save_table(self.path, [self.head, *rows[: len(self.rows)]])
        self.board = SummaryWriter(str(out), purge_step=step + 1)

    def add(self, step: int, epoch: float, minutes: float, values: list[float]) -> None:
        figures = [f"{epoch:.4f}", f"{minutes:.3f}", *(f"{v:.5f}" for v in values)]
        with open(self.path, "a") as file:
            file.write(",".join([str(step), *figures]) + "\n")
        self.rows.append([step, *map(float, figures)])
        for name, value in zip(metric_names(self.spec), values, strict=True):
            group = "L_I" if name in self.spec.names else "GAN"
            self.board.add_scalar(f"{group}/{name}", value, step)

    def draw(self) -> None:
        """curves.png: losses, D's opinions, and each code's L_I below its ceiling, over epochs."""
        if len(self.rows) < 2:
            return
        panels = {"losses of D (blue) and G (red)": (["loss_D", "loss_G"], 0.0)}
        panels["D(x) (blue) and D(G(z, c)) (red)"] = (["D_real", "D_fake"], 1.0)
        for kind in ("cat", "cont"):
            most = dict(zip(self.spec.names, self.spec.ceilings, strict=True))
            if names := [name for name in most if name.startswith(kind)]:
                top = most[names[0]]
                panels[f"L_I of {kind}, nats, at most {top:.2f}"] = (names, top)
        page = Image.new("RGB", (640, 200 * len(panels)), "white")
        for i, (title, (names, most)) in enumerate(panels.items()):
            x = [row[1] for row in self.rows]
            lines = [[row[self.head.index(name)] for row in self.rows] for name in names]
            page.paste(draw_panel(title, x, lines, most), (0, 200 * i))
        save_picture(self.path.with_name("curves.png"), page)


def draw_panel(title: str, x: list[float], lines: list[list[float]], most: float) -> Image.Image:
    """A chart of 640x200 that shows zero, `most` and all but the wildest 2% of the values."""
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2")
    values = sorted(v for line in lines for v in line)
    low, high = min(0.0, values[len(values) // 50]), max(most, values[-1 - len(values) // 50])
    panel, font = Image.new("RGB", (640, 200), "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(panel)

    def at(u: float, v: float) -> tuple[float, float]:
        share = (min(max(v, low), high) - low) / ((high - low) or 1)
        return 50 + 570 * (u - x[0]) / (x[-1] - x[0]), 175 - 145 * share

    for v in {0.0, high, low if low < -0.08 * high else 0.0}:  # labels that do not overlap
        pen.line([at(x[0], v), at(x[-1], v)], "#dddddd")
        pen.text((44, at(x[0], v)[1]), f"{v:.2f}", "black", font, anchor="rm")
    for i, line in enumerate(lines):
        pen.line([at(*point) for point in zip(x, line, strict=True)], colours[i % len(colours)], 2)
    for place, text in ((50, 8), title), ((50, 180), f"epoch {x[0]:.1f} to {x[-1]:.1f}"):
        pen.text(place, text, "black", font)
    return panel


def describe(spec: CodeSpec, values: list[float]) -> str:
    """The progress line: losses, and the mean L_I of each kind of code beside its ceiling."""
    told, L_I = f"D {values[0]:.2f}  G {values[1]:.2f}", values[len(values) - len(spec.names) :]
    for name, part in ("  L_I cat", slice(spec.n_cat)), ("  L_I cont", slice(spec.n_cat, None)):
        if some := L_I[part]:
            told += f"{name} {sum(some) / len(some):.2f}/{spec.ceilings[part][0]:.2f}"
    return told


def find_run(out: Path) -> dict | None:
    """The checkpoint that the run in a folder goes on from, or None where one begins.

    A broken last.pt falls back on the newest checkpoint that can be read, and says so. Raises
    Problem where there are some and none can be.
    """
    kept = sorted(out.glob("epoch_*.pt"), key=lambda p: (len(p.name), p.name), reverse=True)
    found = [path for path in [out / "last.pt", *kept] if path.exists()]
    for path in found:
        try:
            ckpt = load_checkpoint(path)
            print(f"going on from {path}, step {ckpt['step']:,}")
            return ckpt
        except Problem as problem:
            print(problem, file=sys.stderr)
    if found:
        raise Problem(f"{out}: none of its checkpoints can be read; {NEW_RUN}")
    return None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """A run's folder, made where there is none, for this process alone.

    Raises Problem for a folder that is no run's, and while another process trains there; the
    system drops the lock with the process, however that ends.
    """
    ours = not out.exists() or (out / "args.json").exists()
    if not ours and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir())):
        raise Problem(f"--out {out}: is no run of infogan.py, and not empty; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = out / ".lock"
    with open(lock, "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Problem(f"--out {out}: process {file.read()} trains there now") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for part in [*out.glob(".*.part"), *out.glob("samples/.*.part")]:
            part.unlink()  # by a process that was killed while it wrote
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
                out.rmdir()  # only an empty one goes: a start that came to nothing


def move_aside(out: Path) -> None:
    """Gives a folder the first free name of out.old-1, out.old-2, …"""
    numbered = (out.with_name(f"{out.name}.old-{i}") for i in range(1, 10**6))
    aside = next(path for path in numbered if not path.exists())
    out.rename(aside)
    (aside / ".lock").unlink()
    print(f"the old run is now {aside}")


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """The fastest device for "auto". Raises Problem when the one asked for is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind in there if there[kind]), "cpu")
    elif not there.get(name, True):
        raise Problem(f"--device {name}: not available here; use --device auto")
    own = name == "cuda" and place()[1] > 1
    return torch.device(name, int(os.environ["LOCAL_RANK"])) if own else torch.device(name)


def tune(device: torch.device) -> None:
    """Switches of the whole process that make a GPU faster: TF32, and kernels chosen by trial."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster there: CUDA since Ampere, x86 with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def plan(args: argparse.Namespace, n: int) -> tuple[int, int, int]:
    """Pictures in a step, steps in an epoch, and steps in all, for n pictures."""
    B = min(args.batch_size, n)
    return B, n // B, min(args.epochs * (n // B), args.max_steps or sys.maxsize)


def train(args: argparse.Namespace) -> int:
    """Trains until --epochs, --max-steps, --max-minutes or a signal, from where args.out stopped.

    Returns the exit code: 0, or 128 + the signal's number. Raises Problem and Diverged.
    """
    end = time.monotonic() + 60 * (args.max_minutes or math.inf)
    device, out = pick_device(args.device), Path(args.out)
    if args.recipe == "notebook":
        print("--recipe notebook: the notebook's settings, its defects included, to compare with")
    args.amp = has_bfloat16(device) if args.amp is None else args.amp
    tune(device)
    with ExitStack() as held:
        with in_turn():
            first = not place()[0]
            if first:
                held.enter_context(locked(out))
            ckpt = None if args.restart else find_run(out)
            args.channels = args.channels or (ckpt["args"]["channels"] if ckpt else None)
            pictures = load_pictures(args.data, args.image_size, args.channels)
            if first and args.restart and (out / "args.json").exists():
                move_aside(out)
                held.enter_context(locked(out))
        args.channels = pictures.x.shape[1]
        pictures = pictures._replace(x=nearest(pictures.x, device))
        state = new_state(args, device)
        if ckpt:
            go_on(state, args, ckpt, pictures)
        if args.compile:
            compile_nets(state)
        return begin(state, args, pictures, end)


def begin(state: State, args: argparse.Namespace, pictures: Pictures, end: float) -> int:
    """Prepares the run's folder, goes through the loop and says how it ended."""
    out, n, device = Path(args.out), len(pictures.x), state.sums.device
    B, per_epoch, total = plan(args, n)
    rank, ranks = place()
    if B % ranks or B // ranks < 2:
        raise Problem(f"--batch-size {B}: must be a multiple of {ranks} processes, and 2 for each")
    if args.batch_size > B:
        print(f"--batch-size {args.batch_size}: there are only {n} pictures, so a batch is {B}")
    if state.step >= total:
        print(f"{out} is finished, {state.step:,} steps; more --epochs or --max-steps go on")
        return 0

    beside = torch.Generator().manual_seed(args.seed)  # the same pictures and latents at each start
    some = pick(pictures.x, torch.randperm(n, generator=beside)[:64])
    fixed = state.spec.join(state.spec.sample(64, beside)).to(device)
    if rank == 0:
        with replacing(out / "args.json") as file:
            file.write(json.dumps(vars(args), indent=2).encode() + b"\n")
        (out / "samples").mkdir(exist_ok=True)
        save_grid(out / "samples/real.png", make_batch(some, False, beside, device))
        if state.step == 0:
            save_grid(out / "samples/epoch_0000.png", state.G_ema(fixed))
    try:
        why = loop(state, args, pictures, fixed, end)
    except Diverged as problem:
        good = out / "last.pt"
        good = f"{good} is the last good checkpoint" if good.exists() else "nothing was saved yet"
        raise Diverged(f"{problem}; {good}. Lower --lr-g and --lr-d") from None
    done = f"{state.step:,} steps, {state.step / per_epoch:.1f} epochs, {state.minutes:.1f} minutes"
    print(f"{why}: {done} in all. {out / 'last.pt'} is saved; ", end="")
    going = "the same command goes on"
    print(f"see python generate.py --ckpt {out / 'last.pt'}" if state.step >= total else going)
    return 128 + signal.Signals[why] if why in signal.Signals.__members__ else 0


def loop(
    state: State, args: argparse.Namespace, pictures: Pictures, fixed: Tensor, end: float
) -> str:
    """Steps, logs, saves until the last step, the time `end` or a signal; returns which it was.

    With several processes a signal to any of them stops all.
    """
    out, device, (B, per_epoch, total) = Path(args.out), fixed.device, plan(args, len(pictures.x))
    log, told = Log(out, state.spec, state.step) if not place()[0] else None, ""
    begun, saved = time.monotonic() - 60 * state.minutes, time.monotonic()
    shape = {"bar_format": "epoch {desc}{rate_fmt}  eta {remaining}", "unit": "img"}
    shape |= {"mininterval": 0.5 if sys.stderr.isatty() else 30.0, "unit_scale": True}
    bar = tqdm(total=total * B, initial=state.step * B, **shape)
    why = "finished"
    with listening() as heard, bar:
        while state.step < total:
            x = pick(pictures.x, mine(next_batch(state, len(pictures.x), B)))
            x = make_batch(x, args.flip, state.rng, device)
            codes = state.spec.sample(B, state.rng)
            codes = Codes(*(mine(c).to(device, non_blocking=True) for c in codes))
            state.sums += train_step(state, args, x, codes)
            now = time.monotonic()
            state.minutes = (now - begun) / 60
            number, late, due = agree(*heard[:1] or [0], now > end, now - saved > 60 * SAVE_MINUTES)
            epoch, at_end = state.step // per_epoch, state.step % per_epoch == 0

            if state.step % LOG_EVERY == 0:
                average([state.sums])
                values = (state.sums / LOG_EVERY).tolist()
                check_finite(state, values)
                if log:
                    log.add(state.step, state.step / per_epoch, state.minutes, values)
                told = describe(state.spec, values)
                state.sums.zero_()
            at = f"{state.step / per_epoch:.1f}/{args.epochs}  {told}  "
            bar.set_description_str(at, refresh=False)
            bar.update(B)

            if log and at_end and epoch % args.sample_every == 0:
                path = out / f"samples/epoch_{epoch:04d}.png"
                save_grid(path, state.G_ema(fixed))
                log.board.add_image("samples", pil_to_tensor(Image.open(path)), epoch)
                if state.spec.names:
                    moved = strongest_codes(state.G_ema, state.spec, fixed[:1])
                    log.board.add_image("strongest codes", moved, epoch)
                log.draw()
            if at_end and epoch % args.save_every == 0:
                save_checkpoint(out / f"epoch_{epoch:04d}.pt", state, args, pictures)
            if state.step < total and (at_end or due):
                save_checkpoint(out / "last.pt", state, args, pictures)
                saved = now
            if number:
                why = signal.Signals(number).name
                break
            if late:
                why = "time is up"
                break
        if state.step < total:  # whoever asked to stop may not wait
            save_checkpoint(out / "last.pt", state, args, pictures)
        if log:
            save_grid(out / "samples/last.png", state.G_ema(fixed))
            save_animation(out)
            log.draw()
        if state.step == total:  # last, so that a finished run has everything
            save_checkpoint(out / "last.pt", state, args, pictures)
    if log:
        log.board.close()
    return why


# flags --------------------------------------------------------------------------------------------

RECIPES = ("default", "notebook")
# the paper's lr_g, narrow nets, and a z too small to choose the digit in c's place
DIGITS = {"width": 32, "batch_size": 64, "lr_g": 1e-3, "z_dim": 16, "r1": 0.1}


def recipe_of(args: argparse.Namespace) -> dict:
    """What the recipe and the kind of pictures set where no flag does."""
    plain = {"width": 64, "batch_size": 128, "lr_g": 2e-4, "lr_d": 2e-4, "z_dim": 100}
    plain |= {"enough": 3.0, "q_view": 0.0, "r1": 0.0}  # 3 nats: more than there are
    plain["flip"] = args.data not in ("mnist", "fashion-mnist", "svhn")  # no mirrored digits
    if args.recipe == "notebook":  # its defect: with 20 continuous codes their loss was never added
        lambdas = {"lam_cat": 1.0, "lam_cont": 0.0 if args.n_cont == 20 else 0.1}
        return plain | lambdas | {"info_to": "head", "ema": 0.0, "flip": False}
    # continuous codes divide a share of G's attention; a category saturates and needs no such care
    ours = {"lam_cat": 1.0, "lam_cont": min(0.3, 3 / max(args.n_cont, 1))}
    if args.n_cat + args.n_cont <= 5:
        ours["q_view"] = 1.0  # few codes have room to be large; thirty would wait too long
    else:
        ours["enough"] = 1.4  # or the continuous ones go on growing, and take from the categoricals
    if args.image_size >= 64:
        ours["r1"] = 0.3  # where D would win without it
    if args.data == "mnist":
        ours |= DIGITS
    return plain | ours | {"info_to": "trunk", "ema": 0.03}


EXAMPLES = """examples:
  python infogan.py --data ~/faces
      any folder of pictures; 1 categorical and 2 continuous codes
  python infogan.py --n-cat 10 --n-cont 20 --epochs 360
      the third version, on data/anime
  python infogan.py --data ~/faces --image-size 32 --width 32 --max-minutes 20
      a quick look on a laptop
  python infogan.py --data mnist --n-cat 1 --n-cont 2
      digits, by torchvision
  python infogan.py --recipe notebook --out checkpoint/notebook
      what the notebook did, to compare with
The same command given again goes on where the run stopped.
"""


class Parser(argparse.ArgumentParser):
    """Flags with limits; says what is wrong in one line, where argparse would print the usage."""

    def __init__(self, program: str, limits: dict, description: str, epilog: str = ""):
        shown = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": epilog}
        super().__init__(program, description=description, allow_abbrev=False, **shown)
        self.limits, self.group = limits, self

    def add(self, flag: str, default: object, meaning: str, **more: object) -> None:
        """A flag of the current group; its type is that of its limits, else text."""
        kind = type(self.limits.get(flag[2:].replace("-", "_"), ("",))[0])
        if not more.keys() & {"action", "choices"}:
            more = {"type": kind, "metavar": "N" if kind is int else "X"} | more
        meaning += "" if default is None or default is False else f" (default {default})"
        self.group.add_argument(flag, default=default, help=meaning, **more)

    def check(self, args: argparse.Namespace) -> argparse.Namespace:
        """args, when every given number is within its limits."""
        given = {name: value for name, value in vars(args).items() if value is not None}
        check_limits(given, self.limits)
        return args

    def error(self, message: str) -> None:
        raise Problem(f"{message}; see --help")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, every default resolved. Raises Problem in one line for what is out of range."""
    about = "Train an InfoGAN: a GAN that learns without labels what its codes mean."
    p = Parser("infogan.py", LIMITS, about, EXAMPLES)
    on_off = argparse.BooleanOptionalAction
    p.group = p.add_argument_group("pictures")
    p.add("--data", "data/anime", f"a folder, or {', '.join(NAMED_SETS)}", metavar="FOLDER")
    p.add("--image-size", None, "16, 32, 64, 128 or 256 pixels (default 64; the named sets 32)")
    p.add("--channels", None, "1 grey, 3 colour (default: what the set has)")
    p.add("--flip", None, "mirror half of them (default on; digits, clothes off)", action=on_off)
    p.group = p.add_argument_group("codes")
    p.add("--n-cat", 1, "categorical codes, 0 to 64")
    p.add("--cat-dim", 10, "categories of each, 2 to 1000")
    p.add("--n-cont", 2, "continuous codes in [-1, 1], 0 to 256")
    p.add("--z-dim", None, "noise, 0 to 10000 (default 100; mnist 16)")
    p.group = p.add_argument_group("networks and objective")
    p.add("--width", None, "maps next to the picture (default 64; mnist 32, three times as fast)")
    p.add("--recipe", "default", "notebook: its settings and defects, to compare", choices=RECIPES)
    p.add("--lam-cat", None, "weight of a categorical's L_I (default 1)")
    p.add("--lam-cont", None, "of a continuous code's L_I (default 3 / n_cont, at most 0.3)")
    p.add(
        "--enough",
        None,
        "nats of a continuous code's L_I past which G is paid no more (default 1.4; 3, which is"
        " never, for up to 5 codes)",
    )
    p.add("--info-to", None, "L_I trains Q with D's trunk (default), or Q's head with G (notebook)",
        choices=("trunk", "head"))  # fmt: skip
    p.add(
        "--q-view",
        None,
        "how far pictures move before Q reads a category (default 1; 0 for over 5 codes)",
    )
    p.add("--r1", None, "of D's gradient penalty (default 0.3; 0 below 64 pixels; mnist 0.1)")
    p.add(
        "--ema",
        None,
        "half-life of G's average, as a share of the steps so far (default 0.03; 0: none)",
    )
    p.group = p.add_argument_group("training")
    p.add("--epochs", 150, "passes over the pictures")
    p.add("--batch-size", None, "pictures in a step (default 128; mnist 64)")
    p.add("--lr-g", None, "G's learning rate (default 0.0002; mnist 0.001)")
    p.add("--lr-d", None, "D's learning rate (default 0.0002)")
    p.add("--seed", 0, "of all chance")
    p.add("--device", "auto", "auto takes the fastest", choices=DEVICES)
    p.add("--amp", None, "bfloat16 convolutions (default: where they are faster)", action=on_off)
    p.add("--compile", False, "by torch.compile: a slow start, then faster", action="store_true")
    p.add("--max-steps", None, "finish after N steps in all")
    p.add("--max-minutes", None, "stop this start after X minutes; the same command goes on")
    p.group = p.add_argument_group("output")
    p.add("--out", None, "the run (default checkpoint/cat1-cont2, by its codes)", metavar="FOLDER")
    p.add("--save-every", 25, "epochs between checkpoints that stay; last.pt follows each")
    p.add("--sample-every", 5, "epochs between grids of samples")
    p.add("--restart", False, "begin anew; the old run is moved aside", action="store_true")

    args = p.parse_args(argv)
    args.image_size = args.image_size or (32 if args.data in NAMED_SETS else 64)
    defaults = recipe_of(args)
    defaults["out"] = f"checkpoint/cat{args.n_cat}-cont{args.n_cont}"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    spec_of(p.check(args))
    return args


class Patient:
    """A stream that outlives its reader: a closed terminal or a dead pipe must not end a run."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        code = self.stream.encoding or "utf-8"
        with suppress(OSError):
            self.stream.write(text.encode(code, "backslashreplace").decode(code))

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def run(program: str, job: Callable[[], int]) -> int:
    """The job's exit code; what a user can mend becomes one line on stderr and exit code 2."""
    with ExitStack() as held:
        out, err = sys.stdout, sys.stderr
        if place()[0]:  # process 0 says it for all
            out = err = held.enter_context(open(os.devnull, "w"))
        held.enter_context(redirect_stdout(Patient(out)))
        held.enter_context(redirect_stderr(Patient(err)))
        try:
            return job()
        except Problem as problem:
            told, code = str(problem), problem.code
        except OSError as error:
            told, code = f"{error.filename or ''}: {error.strerror or error}; mend that", 2
            told += " and give the same command again, what was saved is untouched"
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):
                raise
            told, code = "out of memory; lower --batch-size, --width or --image-size", 2
        except KeyboardInterrupt:
            told, code = "stopped", 130
        print(f"{program}: {told}".replace("\n", " "), file=sys.stderr)
        return code


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged, 2 something to mend, 128 + signal when stopped."""
    with joined_processes():
        return run("infogan.py", lambda: train(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
