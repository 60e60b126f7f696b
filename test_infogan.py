"""Proof that infogan.py does what it says: on the CPU, with no network.

python -m pytest -q test_infogan.py    these tests; data/test_*.py have those of the other files
make torture                           the long ones, of data/test_torture.py
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

# before torch is loaded, and for all processes that tests start: in nets this small, threads of
# several processes on the same cores only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageColor, features
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))

import draw_faces

import generate
import infogan
from infogan import Codes, CodeSpec, Discriminator, Generator, QOutput, UserError

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Decoded pictures go here, also by the processes that tests start, not into the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp())
    return infogan.cache_folder()


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """600 drawn faces of 32x32."""
    folder = tmp_path_factory.getbasetemp() / "faces"
    if not folder.exists():  # pytest asks for what is imported again in every file
        assert draw_faces.main([str(folder), "--n", "600", "--size", "32", "--workers", "1"]) == 0
    return folder


TINY = ["--image-size", "16", "--width", "4", "--batch-size", "32", "--n-cat", "2"]
TINY += ["--cat-dim", "3", "--device", "cpu"]  # where the same command gives the same bits
EACH = ("--save-every", 1, "--sample-every", 1)


def tiny(faces: Path, out: Path, *more: object) -> list[str]:
    """A run of a few seconds: 18 steps an epoch."""
    return [*TINY, "--data", str(faces), "--out", str(out), *map(str, more)]


def train(faces: Path, out: Path, *more: object, code: int = 0) -> None:
    """A tiny run that ends with this exit code."""
    assert infogan.main(tiny(faces, out, *more)) == code


def before_steps(do, patch=setattr) -> None:
    """do(how many steps were taken) comes before each."""
    real_step = infogan.train_step
    patch(infogan, "train_step", lambda state, *a: (do(state.step), real_step(state, *a))[1])


def told_at_the_end(capsys) -> str:
    """The one line of stderr by the program itself, beside its progress."""
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("infogan.py: ")]
    assert "Traceback" not in said
    return line


def tiny_state(*flags: str) -> tuple[infogan.State, Namespace, torch.Tensor, Codes]:
    args = infogan.parse_args([*TINY, "--channels", "3", "--no-amp", *flags])
    state = infogan.new_state(args, CPU)
    x = torch.rand(8, 3, 16, 16, generator=seeded(1)) * 2 - 1
    return state, args, x, state.spec.sample(8, seeded(2))


def step_on(state: infogan.State, args: Namespace, x: torch.Tensor, codes: Codes) -> dict:
    """A step with the same chance each time."""
    u = torch.rand(len(x), infogan.N_U, generator=seeded(3))
    numbers = float(infogan.max_shift_at(state, args)), infogan.beta_at(state, args)
    return infogan.train_step(state, args, infogan.Batch(x, codes, u, *map(torch.tensor, numbers)))


def stepped(*flags: str, **begin: int) -> infogan.State:
    """A tiny state after one step; begin: what it is to have before, such as step=9."""
    state, args, x, codes = tiny_state(*flags)
    vars(state).update(begin)
    step_on(state, args, x, codes)
    return state


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def read_by(D: Discriminator, x: torch.Tensor, strength: float = 0.0, reach: float | None = None):
    """D's logits and Q's output of x, moved and augmented with the same chance each time."""
    u_shift, u = torch.rand(len(x), 10, generator=seeded(3)).split([2, 8], 1)
    shifted = x if reach is None else infogan.shift(x, u_shift, torch.tensor(reach))
    return infogan.d_and_q(D, shifted, x, u, strength)


def augmented(x: torch.Tensor, strength: float) -> torch.Tensor:
    return infogan.augment(x, torch.rand(len(x), 8, generator=seeded()), strength)


@pytest.fixture(scope="session")
def trained(faces, tmp_path_factory) -> Path:
    """A finished run of 3 epochs of 18 steps, each epoch kept and drawn. Tests copy it."""
    out = tmp_path_factory.getbasetemp() / "trained"
    if not out.exists():
        train(faces, out, *EACH, "--epochs", 3)
    return out


def copied(trained: Path, out: Path, epochs: int = 3) -> Path:
    """A copy of trained as it was after so many epochs, but for files that a resume renews."""
    shutil.copytree(trained, out, dirs_exist_ok=True)
    shutil.copy(out / f"epoch_{epochs:04d}.pt", out / "last.pt")
    return out


@pytest.fixture(scope="session")
def ckpt(faces, tmp_path_factory) -> Path:
    """Of a run of three steps with three continuous codes."""
    out = tmp_path_factory.getbasetemp() / "few steps"
    if not out.exists():
        train(faces, out, "--max-steps", 3, "--n-cont", 3)
    return out / "last.pt"


def rewritten(ckpt: Path, where: Path, change) -> Path:
    """A copy of a checkpoint after change(what it holds)."""
    held = torch.load(ckpt, weights_only=True)
    change(held)
    torch.save(held, where)
    return where


def weights(path: Path) -> dict[str, torch.Tensor]:
    ckpt = infogan.load_checkpoint(path)
    return {f"{net}.{k}": v for net in ("G", "G_ema", "D") for k, v in ckpt[net].items()}


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def step_of(out: Path) -> int:
    return infogan.load_checkpoint(out / "last.pt")["step"]


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def four_pictures(folder: Path, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + 4):
        Image.new("RGB", (9, 9), (i, 2 * i % 256, 99)).save(folder / f"{i}.png")
    return folder


def few_pictures(folder: Path, n: int = 5, mode: str = "RGB") -> Path:
    """n pictures of 16x16, one copy of the first, and a file that is none."""
    folder.mkdir(parents=True)
    for i in range(n):
        noise = random.Random(i).randbytes(16 * 16 * len(mode))
        Image.frombytes(mode, (16, 16), noise).save(folder / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "page.jpg").write_text("<html>")
    return folder


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one with every picture that is decoded."""
    calls, real = [], infogan.to_square
    monkeypatch.setattr(infogan, "to_square", lambda *a: (calls.append(1), real(*a))[1])
    return calls


def said_one_line(capsys, *words: str) -> str:
    """What stderr holds: one line, no traceback, with these words."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err
    return err


@pytest.fixture(autouse=True)
def torchs_settings_stay():
    """What speed_up turns on for a GPU is not there in the next test."""
    precision, search = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = search


# processes that tests start -----------------------------------------------------------------------

unix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, limits and locks")
PATIENCE = 300  # seconds for what takes a few, on a busy machine too
ENDLESS = ("--epochs", 10**6, "--max-minutes", 5)  # a run that is to be stopped
END = []  # what ends the processes of the test that runs now


@pytest.fixture(scope="session", autouse=True)
def stopped_tests_clean_up():
    """SIGTERM and SIGHUP end the tests as Ctrl-C does: their processes go with them."""
    before = {s: signal.getsignal(s) for s in infogan.SIGNALS}
    for number in (s for s in before if before[s] == signal.SIG_DFL):
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    multiprocessing.forkserver._forkserver._stop()  # else it ends a moment after the tests


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while END:
        END.pop()()


def usual_signals() -> None:
    """As in a terminal: jobs in the background begin with SIGINT or SIGHUP ignored."""
    for number in infogan.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def kill(process: subprocess.Popen) -> None:
    """Ends a command and all that it started, as far as /proc tells."""
    if process.poll() is not None:
        return
    below, family = {}, [process.pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parent = stat.read_text().rpartition(")")[2].split()[1]
            below.setdefault(int(parent), []).append(int(stat.parent.name))
    for pid in family:
        family += below.get(pid, [])
    process.kill()
    for pid in family[1:]:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until(true, alive, said) -> None:
    """Fails with what said() tells when the process that must make it true has ended, or hangs."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert alive() and time.monotonic() < end, said()
        time.sleep(0.02)


class Run:
    """infogan.py in a process of its own, forked from one that has torch loaded already."""

    def __init__(self, argv: list[str], said: Path, prepare=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_infogan", "torch.utils.tensorboard", "torch._dynamo"])
        self.said = said
        self.process = context.Process(target=self.train, args=(argv, said, prepare))
        self.process.start()
        END.append(self.kill)

    @staticmethod
    def train(argv: list[str], said: Path, prepare) -> None:
        with open(said, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # new ones, as the forkserver's take `said` for a file also where it is a pipe
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1) for number in (1, 2))
        usual_signals()
        torch.set_num_threads(1)
        if prepare:
            prepare()
        infogan.as_program(lambda: infogan.main(argv))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> tuple[int | None, str]:
        """The exit code, None of a process that does not end, and all that was printed."""
        self.process.join(PATIENCE)
        return self.process.exitcode, self.said.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# codes --------------------------------------------------------------------------------------------


def test_join_and_split_keep_every_code_of_any_spec():
    rng = random.Random(0)
    for _ in range(100):
        sizes = rng.choice([0, 1, 5]), rng.choice([2, 7, 30]), rng.choice([0, 1, 9])
        spec, n = CodeSpec(*sizes, z_dim=rng.choice([1, 40])), rng.randint(1, 9)
        codes = spec.sample(n, seeded(rng.randrange(99)))
        z, one_hot, cont = spec.join(codes).split([spec.z_dim, sizes[0] * sizes[1], sizes[2]], 1)
        assert z.equal(codes.z) and cont.equal(codes.c_cont) and (cont.abs() <= 1).all()
        one_hot = one_hot.reshape(n, *sizes[:2])
        assert one_hot.argmax(2).equal(codes.c_cat) and (one_hot.sum(2) == 1).all()
        q = spec.split(torch.randn(n, spec.q_dim) * 50)
        assert q.q_logits.shape == (n, *sizes[:2])
        assert q.q_mu.shape == q.q_logvar.shape == (n, sizes[2])
        sigma = (q.q_logvar / 2).exp()
        assert (sigma >= infogan.SIGMA_MIN * 0.999).all() and (sigma <= 1.001).all()


def test_sampling_is_seeded_and_has_the_right_distribution():
    spec = CodeSpec(2, 4, 3, 5)
    a, b, other = (spec.sample(4000, seeded(s)) for s in (0, 0, 1))
    assert all(x.equal(y) for x, y in zip(a, b, strict=True))
    assert not a.z.equal(other.z) and not a.c_cat.equal(other.c_cat)
    assert abs(a.z.mean()) < 0.03 and abs(a.z.std() - 1) < 0.03
    assert (F.one_hot(a.c_cat, 4).float().mean(0) - 0.25).abs().max() < 0.03
    assert a.c_cont.mean(0).abs().max() < 0.04 and (a.c_cont.var(0) - 1 / 3).abs().max() < 0.02


@pytest.mark.parametrize(
    "bad", [(65,), (1, 1), (1, 10, 257), (0, 10, 0, 0), (-1,), (1.0,), (True,)]
)
def test_specs_out_of_range_are_refused(bad):
    with pytest.raises(UserError):
        CodeSpec(*bad)


# networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("sizes, channels", [
    ((2, 5, 3), 1), ((2, 5, 3), 3), ((0, 10, 2, 0), 3), ((1, 10, 0, 4), 1), ((0, 10, 0, 4), 3),
])  # fmt: skip
def test_G_and_D_fit_pictures_of_every_size_and_any_codes(size, sizes, channels):
    """From 64x64 on G has one more layer, at full size. The last layer alone has a bias."""
    spec = CodeSpec(*sizes)
    G, D = Generator(spec, size, 4, channels), Discriminator(spec, size, 4, channels)
    x = G(spec.join(spec.sample(2, seeded())))
    assert x.shape == (2, channels, size, size) and x.abs().max() <= 1
    d, q = D(x)
    assert d.shape == (2,) and q.q_logits.shape == (2, *sizes[:2]) and q.q_mu.shape == (2, sizes[2])
    convs = [m for m in G.modules() if isinstance(m, torch.nn.Conv2d)]
    doubled = [isinstance(m, infogan.UpsampleConv2d) for m in convs]
    assert doubled == [True] * (int(math.log2(size)) - 2) + [False] * (size >= 64)
    assert [m for m in convs if m.bias is not None] == convs[-1:]
    assert (G.maps is not None) == (sizes == (2, 5, 3)), "else the first layer takes all codes"


def test_transposed_convolutions_make_the_notebooks_networks():
    spec = CodeSpec(10, 10, 20)
    G, D = Generator(spec, upsample="transposed", cont_at=4), Discriminator(spec)
    up = [m.weight.shape[:2] for m in G.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert up == [(220, 512), (512, 256), (256, 128), (128, 64), (64, 3)]
    down = [m.weight.shape[0] for m in D.trunk if isinstance(m, torch.nn.Conv2d)]
    assert down == [64, 128, 256, 512]
    assert D.d_head.weight.shape == (1, 512, 4, 4) and D.q_head[0].weight.shape == (256, 512, 4, 4)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_continuous_codes_enter_at_the_8x8_layer_and_move_no_channels_mean(size):
    spec, seen = CodeSpec(2, 5, 3, 4), []
    G, codes = Generator(spec, size, 4).eval(), spec.sample(6, seeded())
    infogan.init_weights(G, seeded())
    G.layers[4].register_forward_pre_hook(lambda _, h: seen.append(*h))
    for share in (1.0, 0.0, -2.0):
        G(spec.join(codes._replace(c_cont=share * codes.c_cont)))
    h, without, turned = seen
    assert G.layers[0].in_channels == spec.dim - 3 and h.shape == (6, G.maps.out_channels, 8, 8)
    assert ((h - without).flatten(1).std(1) > 0.01).all(), "each code changes the layer"
    assert (h - without).mean((2, 3)).abs().max() < 1e-6
    assert (turned - without).allclose(-2 * (h - without), atol=1e-5)
    assert Generator(spec, size, 4, cont_at=4).layers[0].in_channels == spec.dim


def test_a_checkpoint_from_before_the_choice_has_its_codes_at_the_first_layer(tmp_path):
    state, args, _, codes = tiny_state("--cont-at", "4")
    torch.save(infogan.gather_checkpoint(state, args, ""), tmp_path / "new.pt")
    old = rewritten(tmp_path / "new.pt", tmp_path / "old.pt", lambda c: c["args"].pop("cont_at"))
    G, spec = infogan.load_generator(old)
    assert G.maps is None and G(spec.join(codes)).equal(state.G_ema(spec.join(codes)))


def slopes(y: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of a random weighting of y."""
    weighting = torch.randn(y.shape, generator=seeded(9), dtype=y.dtype)
    return torch.autograd.grad(y, of, weighting, retain_graph=True)


def test_upsampling_is_nearest_neighbours_and_a_convolution():
    """In one transposed convolution, with the same gradients."""
    conv = infogan.UpsampleConv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 8, generator=seeded()).double().requires_grad_()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    assert conv(x).allclose(plain)
    of = x, conv.weight, conv.bias
    both = zip(slopes(conv(x), *of), slopes(plain, *of), strict=True)
    assert all(a.allclose(b) for a, b in both)


# objective ----------------------------------------------------------------------------------------


def test_L_I_reaches_its_ceiling_where_Q_is_right_and_sure():
    spec = CodeSpec(2, 10, 1)
    codes = spec.sample(5000, seeded())
    perfect = F.one_hot(codes.c_cat, 10).float() * 100
    sure = torch.full_like(codes.c_cont, 2 * math.log(infogan.SIGMA_MIN))
    L_I = infogan.mutual_information(spec, QOutput(perfect, codes.c_cont, sure), codes)
    assert L_I.tolist() == pytest.approx(spec.ceilings, abs=1e-4)
    assert spec.ceilings[0] == pytest.approx(math.log(10))


def blind_q(n: int) -> QOutput:
    """Of a Q that has seen no picture, for 2 categoricals and 1 continuous code."""
    logvar = torch.full((n, 1), math.log(1 / 3))
    return QOutput(torch.zeros(n, 2, 10), torch.zeros(n, 1), logvar)


def test_L_I_of_a_blind_Q_is_nothing():
    """A Gaussian is no uniform distribution, so a continuous code's is a little less still."""
    spec = CodeSpec(2, 10, 1)
    L_I = infogan.mutual_information(spec, blind_q(5000), spec.sample(5000, seeded()))
    assert L_I[:2].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert L_I[2] == pytest.approx(math.log(2) - 0.5 * math.log(2 * math.pi * math.e / 3), abs=0.02)


def test_log_q_of_a_continuous_code_is_a_gaussians_log_density():
    codes, q = CodeSpec(2, 10, 1).sample(100, seeded()), blind_q(100)
    normal = torch.distributions.Normal(q.q_mu, q.q_logvar.exp().sqrt())
    assert infogan.log_q(q, codes)[:, 2:].allclose(normal.log_prob(codes.c_cont), atol=1e-5)


def test_the_losses_are_those_of_the_paper():
    zero = torch.zeros(4)
    assert infogan.d_loss(zero, zero) == pytest.approx(2 * math.log(2))
    assert infogan.g_loss(torch.tensor([50.0])) == pytest.approx(0, abs=1e-6)
    real, fake = (torch.randn(9, generator=seeded(s)) for s in (0, 1))
    plain = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert infogan.d_loss(real, fake).item() == pytest.approx(plain.item(), abs=1e-5)
    assert infogan.g_loss(fake).item() == pytest.approx(-fake.sigmoid().log().mean().item())


def test_G_is_paid_for_a_continuous_code_until_Q_reads_it_well_enough():
    spec, args = CodeSpec(1, 10, 2), infogan.parse_args(["--cap-cont", "1.4"])
    L_I = torch.tensor([2.0, 1.5, 1.3], requires_grad=True)
    infogan.lambda_L_I(spec, L_I, args, args.cap_cont).backward()
    assert L_I.grad.tolist() == pytest.approx([args.lam_cat, 0, args.lam_cont])


def test_identity_loss_has_its_closed_forms():
    """0 where neighbours look alike from afar, 1 less what is free where they share nothing."""
    light_counts, colour_counts = (1 - free for free in infogan.IDENTITY_FREE)
    whole = (light_counts + colour_counts) / 2
    coarse = torch.randn(2000, 3, 4, 4, generator=seeded()).mul(0.3)
    same = coarse[::2].repeat_interleave(2, 0)
    fine = torch.randn(2000, 3, 32, 32, generator=seeded(1))
    fine -= F.interpolate(F.adaptive_avg_pool2d(fine, 4), scale_factor=8)
    large = F.interpolate(coarse, scale_factor=8)
    assert infogan.identity_loss(large).item() == pytest.approx(whole, abs=0.03)
    shared = F.interpolate(same, scale_factor=8)
    assert infogan.identity_loss(shared + fine) == 0, "fine detail is nobody's identity"
    relit = same + coarse.mean(1, keepdim=True) - same.mean(1, keepdim=True)
    half = infogan.identity_loss(F.interpolate(relit, scale_factor=8)).item()
    assert half == pytest.approx(light_counts / 2, abs=0.03), "the same colours in another light"
    grey = infogan.identity_loss(large[:, :1]).item()
    assert grey == pytest.approx(light_counts, abs=0.05)


def test_pairs_share_their_categories_and_nothing_else():
    for n in (8, 7):
        codes = CodeSpec(3, 10, 2, 4).sample(n, seeded())
        z, c_cat, c_cont = infogan.pair(codes)
        assert z.equal(codes.z) and c_cont.equal(codes.c_cont)
        assert c_cat.equal(codes.c_cat[[i - i % 2 for i in range(n)]])


def test_augmentation_moves_and_relights_each_picture_in_its_own_way():
    x = torch.full((64, 1, 32, 32), -1.0)
    x[:, :, 12:20, 12:20] = 0.5
    weak, strong = augmented(x, 1e-4), augmented(x, 1.0)
    assert weak.allclose(F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1), atol=0.02)
    assert strong.shape == x.shape and strong.abs().max() <= 1
    light = strong.amax((1, 2, 3))
    assert light.std() > 0.1
    bright = strong > (light / 2 - 0.5)[:, None, None, None]
    columns = torch.arange(32.0).expand(32, 32)
    middle = (bright * columns).sum((1, 2, 3)) / bright.sum((1, 2, 3))
    assert middle.std() > 1 and (middle.mean() - 15.5).abs() < 1
    assert bright.sum((1, 2, 3)).float().std() > 10
    x.requires_grad_()
    augmented(x, 1.0).sum().backward()
    assert (x.grad != 0).any(0).any(), "L_I must reach G through the augmentation"


def test_pictures_are_shifted_by_whole_pixels_onto_grey():
    """Every offset comes as often, and the gradient is that of slices."""
    x = torch.rand(500, 3, 8, 8, generator=seeded()).requires_grad_()
    u = torch.rand(500, 2, generator=seeded(1))
    assert infogan.shift(x, u, torch.tensor(0.0)).equal(x)
    shifted, offsets = infogan.shift(x, u, torch.tensor(2.0)), (u * 5).long()
    slices = []
    for picture, (down, right) in zip(x, offsets.tolist(), strict=True):
        slices.append(F.pad(picture, [2] * 4)[:, down : down + 8, right : right + 8])
    slices = torch.stack(slices)
    assert shifted.equal(slices) and slopes(shifted, x)[0].equal(slopes(slices, x)[0])
    assert offsets.flatten().bincount().tolist() == pytest.approx([200] * 5, rel=0.2)
    corners = infogan.shift(x, torch.tensor([[0.0, 0.9999999]]).expand(500, 2), torch.tensor(2.0))
    assert corners[:, :, 2:, :6].equal(x[:, :, :6, 2:])
    assert not corners[:, :, :2].any() and not corners[..., 6:].any()


def test_D_judges_shifted_pictures_and_Q_reads_them_as_they_are():
    state, _, x, _ = tiny_state()
    D = state.D.eval()
    clean_d, clean_q = read_by(D, x)
    d, q = read_by(D, x, reach=3.0)
    assert not d.isclose(clean_d).any() and d.equal(read_by(D, x, reach=3.0)[0])
    assert all(a.equal(b) for a, b in zip(q, clean_q, strict=True))
    assert read_by(D, x, reach=0.0)[0].equal(clean_d)


def test_Q_reads_only_categoricals_from_augmented_pictures():
    state, _, x, _ = tiny_state()
    D = state.D.eval()
    clean_d, clean_q = read_by(D, x)
    d, q = read_by(D, x, 1.0)
    assert d.equal(clean_d) and q.q_mu.equal(clean_q.q_mu) and q.q_logvar.equal(clean_q.q_logvar)
    assert q.q_logits.equal(read_by(D, x, 1.0)[1].q_logits)
    assert not q.q_logits.equal(clean_q.q_logits)


def test_whoever_reads_codes_later_reads_pictures_as_they_are():
    """Batch norm's averages are of these, not of shifted or augmented ones."""
    kept = []
    for how in ({}, {"strength": 1.0}, {"strength": 1.0, "reach": 3.0}):
        state, _, x, _ = tiny_state()
        read_by(state.D, x, **how)
        kept.append(flat(b for name, b in state.D.named_buffers() if "running" in name))
    assert kept[0].equal(kept[1]) and kept[0].equal(kept[2])


def test_shifts_grow_with_the_epochs_and_can_be_turned_off():
    state, args, *_ = tiny_state("--shift", "0.25")
    state.per_epoch, reach = 10, []
    for state.step in (0, 99, 100, 200, 399, 400, 10_000):
        reach.append(infogan.max_shift_at(state, args))
    assert infogan.SHIFT_EPOCHS == 40 and reach == [0, 0, 1, 2, 3, 4, 4]

    def D_after(step: int, *flags: str) -> torch.Tensor:
        flags = ("--r1", "0", "--lam-identity", "0", *flags)
        return flat(stepped(*flags, step=step).D.parameters())

    off = D_after(4000, "--shift", "0")
    assert D_after(0).equal(off) and not D_after(4000).equal(off)
    state, args, *_ = tiny_state("--shift", "0")
    state.step = 4000
    assert infogan.max_shift_at(state, args) == 0
    assert not infogan.variant(state, args).with_shifts


def test_beyond_their_edges_augmented_pictures_go_on(monkeypatch):
    """Bit for bit as by padding_mode="border", which not every torch has on every device."""
    x, grids = torch.rand(6, 3, 32, 32, generator=seeded()).requires_grad_(), []
    real_grid, real_sample = F.affine_grid, F.grid_sample

    def grid(*size, **how):
        grids.append(real_grid(*size, **how))
        return grids[0]

    def sample(x, where, align_corners):
        y = real_sample(x, where, align_corners=align_corners)
        by_border = real_sample(x, *grids, padding_mode="border", align_corners=align_corners)
        assert y.equal(by_border) and grids[0].abs().max() > 1
        assert slopes(y, x)[0].equal(slopes(by_border, x)[0])
        return y

    monkeypatch.setattr(F, "affine_grid", grid)
    monkeypatch.setattr(F, "grid_sample", sample)
    augmented(x, 1.0)
    assert len(grids) == 1


# step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["default", "notebook"])
@pytest.mark.parametrize("n_cont", [2, 20])
def test_every_codes_L_I_reaches_G_but_where_the_notebook_forgot_it(recipe, n_cont):
    """Of 20 continuous codes the notebook computed the loss and never added it.

    G's gradient must change when Q's reading of any one code is turned round. D does not learn
    here: what L_I teaches the trunk would reach G too.
    """
    flags = ("--recipe", recipe, "--n-cont", str(n_cont), "--lr-d", "0", "--lam-identity", "0")
    rows, gradients = [None, 0, 3, *range(6, 6 + n_cont)], []  # the first of each code in Q's head
    for row in rows:
        state, args, x, codes = tiny_state(*flags)
        if row is not None:
            state.D.q_head[3].weight.data[row] *= -1
        step_on(state, args, x, codes)
        gradients.append(flat(p.grad for p in state.G.parameters()))
    reached = [not g.equal(gradients[0]) for g in gradients[1:]]
    forgotten = n_cont == 20 and recipe == "notebook"
    assert reached == [True] * 2 + [not forgotten] * n_cont


@pytest.mark.parametrize("known", [False, True])
def test_the_identity_loss_moves_G_once_Q_reads_categories(known):
    """The less Q reads, the less it counts: before that G has nothing to tell identities by."""
    ends = []
    for lam in "05":
        state, args, x, codes = tiny_state("--lam-identity", lam)
        if known:  # Q that is sure of what G was told
            sure, real = F.one_hot(codes.c_cat, 3).float() * 50, state.D.q_output
            state.D.q_output = lambda h, sure=sure, real=real: real(h)._replace(q_logits=sure)
        step_on(state, args, x, codes)
        ends.append(flat(p.grad for p in state.G.parameters()))
    change = (ends[0] - ends[1]).norm() / ends[0].norm()
    assert (change > 0.1) == known, change


@pytest.mark.parametrize("info_to", ["trunk", "head"])
def test_a_step_moves_what_it_owns(info_to):
    """L_I moves the trunk where it should, and nowhere else."""
    state, args, x, codes = tiny_state("--info-to", info_to)
    G, D, owned, moved = state.G, state.D, [], {}
    for name, opt in (("D", state.opt_D), ("G", state.opt_G)):
        owned += [(p, name) for group in opt.param_groups for p in group["params"]]
    owners = dict(owned)
    assert len(owned) == len(owners) and owners.keys() == {*G.parameters(), *D.parameters()}
    assert {owners[p] for p in D.q_head.parameters()} == {"D" if info_to == "trunk" else "G"}
    assert {owners[p] for p in D.trunk.parameters()} == {"D"}

    before = [p.detach().clone() for p in owners]
    for name, opt in (("D", state.opt_D), ("G", state.opt_G)):

        def step(step=opt.step, name=name):
            step()
            moved[name] = [not p.equal(b) for p, b in zip(owners, before, strict=True)]

        opt.step = step
    step_on(state, args, x, codes)
    assert moved["D"] == [owner == "D" for owner in owners.values()]
    assert all(moved["G"])

    trunks = (stepped("--info-to", info_to, "--lam-cat", lam).D.trunk for lam in "01")
    without, with_L_I = (flat(trunk.parameters()) for trunk in trunks)
    assert without.equal(with_L_I) == (info_to == "head")


def test_r1_is_the_squared_slope_and_comes_lazily():
    x = torch.randn(5, 3, 4, 4, generator=seeded()).requires_grad_()
    w = torch.randn(3, 4, 4, generator=seeded(1))
    assert infogan.r1_penalty((x * w).sum((1, 2, 3)), x).allclose(w.square().sum() / 2)

    def moves_D(step: int, *flags: str) -> bool:
        states = (stepped(*r1, step=step, per_epoch=16) for r1 in (flags, ("--r1", "0")))
        with_r1, without = (flat(state.D.parameters()) for state in states)
        return not with_r1.equal(without)

    assert moves_D(0, "--r1", "5") and moves_D(infogan.R1_EVERY, "--r1", "5")
    assert not moves_D(1, "--r1", "5") and not moves_D(infogan.R1_EVERY // 2, "--r1", "5")
    assert not moves_D(0) and not moves_D(74 * 16) and moves_D(75 * 16)  # the default of 16x16
    assert not moves_D(16, "--r1", "5", "--r1-from", "2")
    assert moves_D(32, "--r1", "5", "--r1-from", "2")


def test_the_average_of_G_takes_in_its_batch_statistics():
    state, *_ = tiny_state()
    for t in state.G.state_dict().values():
        t.fill_(3)
    before = {name: t.clone() for name, t in state.G_ema.state_dict().items()}
    infogan.update_ema(state.G_ema, state.G, torch.tensor(0.9))
    for name, average in state.G_ema.state_dict().items():
        whole = name.endswith("num_batches_tracked")
        assert average.allclose(torch.tensor(3) if whole else 0.9 * before[name] + 0.3), name
    infogan.update_ema(state.G_ema, state.G, torch.tensor(0.0))
    assert all((v == 3).all() for v in state.G_ema.state_dict().values())


def test_the_average_lasts_a_share_of_the_run():
    state, args, x, codes = tiny_state("--ema", "0.5")
    old = flat(state.G_ema.parameters())
    state.step = 9  # after the tenth step the half-life is five steps
    step_on(state, args, x, codes)
    now, G = flat(state.G_ema.parameters()), flat(state.G.parameters())
    assert now.allclose(0.5**0.2 * old + (1 - 0.5**0.2) * G) and not G.allclose(old)


def test_bfloat16_is_for_convolutions_alone_and_follows_float32(monkeypatch):
    """Losses, L_I and R1 take float32, and eight steps go almost the same way."""
    layers, taken, moves = {}, {}, []

    def watch(name: str, real) -> None:
        def watched(*given):
            tensors = (t for t in tree_leaves(given) if isinstance(t, torch.Tensor))
            taken.setdefault(name, set()).update(t.dtype for t in tensors)
            return real(*given)

        monkeypatch.setattr(infogan, name, watched)

    for name in ("d_loss", "g_loss", "log_q", "identity_loss", "r1_penalty"):
        watch(name, getattr(infogan, name))
    for amp in ("--no-amp", "--amp"):
        state, args, x, _ = tiny_state("--r1", "1", amp)
        nets = torch.nn.ModuleList([state.G, state.D])
        before, seen = flat(nets.parameters()), layers.setdefault(amp, set())
        for m in nets.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                m.register_forward_hook(lambda m, x, y, seen=seen: seen.add(y.dtype))
        for i in range(8):
            step_on(state, args, x, state.spec.sample(8, seeded(i)))
        moves.append(flat(nets.parameters()) - before)
    assert layers == {"--no-amp": {torch.float32}, "--amp": {torch.bfloat16}}
    assert taken.pop("log_q") == {torch.float32, torch.int64}  # c_cat
    assert [*taken.values()] == [{torch.float32}] * 4
    assert 0.9 < F.cosine_similarity(*moves, dim=0) < 1


# pictures -----------------------------------------------------------------------------------------


RED, WHITE = (255, 0, 0), (255, 255, 255)


def put_pictures(folder: Path) -> None:
    """13 pictures of as many kinds, an exact copy, three files that are none and look like some."""
    red, deep = Image.new("RGB", (40, 30), RED), folder / "a" / "b c\u00e9"
    deep.mkdir(parents=True)
    red.save(folder / "rgb.png")
    shutil.copy(folder / "rgb.png", folder / "copy of rgb.png")
    red.save(deep / "upper.JPG", quality=95)
    red.save(deep / "w.webp", lossless=True)
    red.save(deep / "b.bmp")
    red.convert("CMYK").save(deep / "cmyk.jpeg", quality=95)
    red.quantize(4).save(deep / "palette.png")
    red.save(deep / "two.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")])
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(deep / "clear.png")
    Image.new("LA", (16, 16), (0, 0)).save(deep / "la.png")
    Image.new("I;16", (16, 16), 128 * 257).save(deep / "deep.png")
    Image.new("L", (16, 16), 77).save(deep / "grey.png")
    sides = Image.new("RGB", (64, 16), "green")
    sides.paste("black", (24, 0, 40, 16))
    sides.save(folder / "wide.png")
    turned, exif = Image.new("RGB", (20, 20)), Image.Exif()
    turned.paste(WHITE, (0, 0, 20, 10))  # white above
    exif[0x0112] = 3  # upside down
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>")
    (folder / "cut.jpg").write_bytes((deep / "upper.JPG").read_bytes()[:300])
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()


def test_every_format_and_mode_has_its_colours(tmp_path, capsys):
    """On white, upright and cropped at the centre; copies and what cannot be read are told."""
    put_pictures(tmp_path)
    pictures = infogan.load_pictures(str(tmp_path), 16)
    told = capsys.readouterr().out
    assert "13 pictures" in told and "exact copies dropped: 1, unreadable files skipped: 3" in told
    assert all(name in told for name in ("empty.png", "page.jpg", "cut.jpg")), told
    assert pictures.x.shape == (13, 16, 16, 3) and pictures.x.dtype == torch.uint8
    names = [Path(name).name for name in pictures.names]
    seen = dict(zip(names, pictures.x.int(), strict=True))
    turned, lossy = seen.pop("turned.jpg"), ("upper.JPG", "cmyk.jpeg")
    assert turned[:6].max() < 20 and turned[10:].min() > 230
    colours = {"deep.png": (128,) * 3, "grey.png": (77,) * 3, "wide.png": (0,) * 3}
    colours |= {"clear.png": WHITE, "la.png": WHITE}
    for name, x in seen.items():
        off = (x - torch.tensor(colours.get(name, RED))).abs().max()
        assert off < (6 if name in lossy else 1), name


def portraits(folder: Path, tall: int, square: int = 0) -> Path:
    """Pictures of 20x30, white in the upper third and black below, and squares."""
    folder.mkdir()
    for i in range(tall + square):
        image = Image.new("RGB", (20, 30 if i < tall else 20), (0, 0, i))
        image.paste(WHITE, (0, 0, 20, 10))
        image.save(folder / f"{i}.png")
    return folder


def test_crop_top_keeps_the_upper_part_of_tall_pictures(tmp_path):
    folder = portraits(tmp_path / "set", 3)
    wide = Image.new("RGB", (60, 20))
    wide.paste(WHITE, (20, 0, 40, 20))
    wide.save(folder / "wide.png")
    centre, top = (infogan.load_pictures(str(folder), 16, crop=crop) for crop in infogan.CROPS)
    rows = [int((pictures.x[0, :, 0, 0] > 128).sum()) for pictures in (centre, top)]
    assert rows == [4, 8]  # of 16, as 5 and 10 of 20
    assert (centre.x[-1] > 200).all() and top.x[-1].equal(centre.x[-1])
    seen = infogan.read_picture(folder / "0.png", 16, 3, "top")
    assert seen.pixels == top.x[0].numpy().tobytes()
    train(folder, tmp_path / "run", "--max-steps", 1, "--crop", "top")
    held = infogan.load_checkpoint(tmp_path / "run/last.pt")
    assert held["args"]["crop"] == "top"  # no run goes on with the other
    assert held["fingerprint"] == top.fingerprint != centre.fingerprint


@pytest.mark.parametrize(("tall", "square", "is_told"), [(2, 17, True), (2, 18, False)])
def test_that_much_is_cropped_is_told_at_each_start(tmp_path, capsys, tall, square, is_told):
    folder = portraits(tmp_path / "set", tall, square)
    shutil.copy(folder / "0.png", folder / "copy.png")
    for _ in range(2):
        infogan.load_pictures(str(folder), 16)
        said = capsys.readouterr().out
        assert ("\n2 of them lose a third" in said and "--crop top" in said) == is_told
    infogan.load_pictures(str(folder), 16, crop="top")
    assert "--crop" not in capsys.readouterr().out


def put_rubbish(folder: Path) -> int:
    """Files that are no usable pictures, one of each kind; returns how many."""
    folder.mkdir()
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    for kind in ("jpeg", "gif", "webp", "bmp", "png"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        raw = buffer.getvalue()
        (folder / f"cut.{kind}").write_bytes(raw[: len(raw) // 2])
    (folder / "new\nline.png").write_bytes(raw[:99])
    (folder / "zero.png").touch()
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    head = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    head += zlib.crc32(head).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + raw[33:])
    Image.new("L", (9460, 9460)).save(folder / "wide bomb.png")  # decodes, and is too large
    with open(folder / "vast.bmp", "wb") as file:
        file.truncate(2**29)
    if os.name == "posix":
        (folder / os.fsdecode(b"sur\xffrogate.jpg")).write_bytes(b"no")
        (folder / "broken.png").symlink_to("nowhere.png")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "round").symlink_to(".", target_is_directory=True)
        (folder / "device.jpg").symlink_to("/dev/zero")
        os.mkfifo(folder / "pipe.png")
    return sum(p.suffix != "" for p in folder.iterdir())


def test_rubbish_among_pictures_is_told_and_the_rest_trains(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data \u00e9"
    bad = put_rubbish(folder)
    train(folder, tmp_path / "run", code=2)
    said = said_one_line(capsys, "0 pictures", f"skipped: {bad} (", ", ...), at least 2")
    assert "\\u2026" not in said  # an ellipsis that was escaped like the names
    assert not (tmp_path / "run").exists()

    odd = {"a b.png": (1, 1), "tall.png": (1, 20_000), "long.png": (20_000, 1), "c\nd.png": (9, 9)}
    for i, (name, size) in enumerate(odd.items()):
        Image.new("RGB", size, (60 * i, 0, 0)).save(folder / name)
    gone, real = folder / "gone.png", infogan.find_pictures
    gone.touch()
    monkeypatch.setattr(infogan, "find_pictures", lambda *a: (real(*a), gone.unlink())[0])
    train(folder, tmp_path / "run", "--max-steps", 2)
    told = capsys.readouterr().out
    assert f"4 pictures in {folder}" in told and f"unreadable files skipped: {bad + 1} (" in told
    assert "bomb.png (DecompressionBombError)" in told and "broken.png (FileNotFoundError)" in told


@pytest.mark.parametrize("data", ["none", "one", "mnist"])
def test_what_is_wrong_with_pictures_names_the_flag_that_asked_for_them(
    tmp_path, monkeypatch, data
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: 1 / 0)
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError, match=f"^--sort {data}: "):
        infogan.load_pictures(data, 16, flag="--sort")


@unix
@pytest.mark.parametrize("low, high, told", [
    (0, 4095, "0 is black and 4095 is white"), (30_000, 31_000, "30000 is black"), (0, 65_535, ""),
])  # fmt: skip
def test_16_bits_of_a_small_range_are_seen(tmp_path, capsys, low, high, told):
    """As of X-rays, with 12 bits, and of heights."""
    for i in range(4):
        deep = torch.full((16, 16), low + (high - low) * (i + 1) // 5, dtype=torch.int32)
        deep[:4], deep[12:] = low, high
        Image.fromarray(deep.numpy().astype("uint16")).save(tmp_path / f"{i}.png")
    x = infogan.load_pictures(str(tmp_path), 16).x
    assert (x[:, 0].float().mean(), x[:, 15].float().mean()) == (0, 255)
    assert sorted(x[:, 8, 8, 0].tolist()) == pytest.approx([51, 102, 153, 204], abs=1)
    said = capsys.readouterr().out
    assert told in said and said.count("16 bits") == bool(told) and "empty" in said  # 6 levels


@pytest.mark.parametrize("kind, words", [
    ("black", "14 levels of brightness from 0 to 13"), ("white", "a standard deviation of 0."),
    ("mask", "2 levels"), ("small", "at most 16"), ("fine", ""),
])  # fmt: skip
def test_a_set_that_looks_empty_is_told(tmp_path, capsys, kind, words):
    folder, most = few_pictures(tmp_path / "few"), {"black": 14, "mask": 2}.get(kind, 256)
    for i, path in enumerate(sorted(folder.glob("?.png"))):
        noise = torch.randint(most, (16, 16), dtype=torch.uint8, generator=seeded(i))
        noise = torch.full_like(noise, 254) if kind == "white" else noise
        noise = noise * 255 if kind == "mask" else noise
        noise[0, 0] = 250 + i if kind == "white" else noise[0, 0]
        Image.fromarray(noise.numpy()).save(path)
    (folder / "copy.png").unlink()
    for _ in range(2):  # from the cache as well
        infogan.load_pictures(str(folder), 32 if kind == "small" else 16)
        told = [*capsys.readouterr().out.splitlines()[1:]]
        assert len(told) == bool(words) and all(words in line for line in told), told


@pytest.mark.parametrize("suffix, words", [
    (".zip", "python -m zipfile -e "), (".tar.gz", "python -m tarfile -e "),
    (".npz", "write each picture in "), (".parquet", "write each picture in "),
])  # fmt: skip
def test_an_archive_in_place_of_pictures_names_the_cure(tmp_path, capsys, suffix, words):
    folder = tmp_path / "my faces"
    (folder / "a").mkdir(parents=True)
    archive = folder / f"a/all{suffix}"
    archive.touch()
    for data in (folder, archive):
        train(data, tmp_path / "run", code=2)
        said = said_one_line(capsys, f"{archive}", words)
    if suffix == ".zip":  # as one pastes it
        with zipfile.ZipFile(archive, "w") as file:
            file.write(four_pictures(tmp_path / "set") / "0.png", "x.png")
        command = said.partition("unpack it: ")[2].replace("python -m", f"{sys.executable} -m")
        subprocess.run(command, shell=True, check=True)
        assert (folder / "a/all.zip-unpacked/x.png").exists()


def test_files_can_be_excluded(tmp_path, capsys):
    folder, out = four_pictures(tmp_path / "set"), tmp_path / "run"
    four_pictures(folder / "small", 4)
    shutil.copy(folder / "small/5.png", folder / "0_mask.png")
    flags = "--exclude", "*_mask.png", "--exclude", "small/*"
    train(folder, out, "--max-steps", 1, *flags)
    said = capsys.readouterr().out
    assert "4 pictures in" in said and "4 by --exclude small/*, 1 by --exclude *_mask.png" in said
    assert json.loads((out / "args.json").read_text())["exclude"] == ["*_mask.png", "small/*"]
    train(folder, out, "--max-steps", 2, code=2)
    assert "other pictures" in told_at_the_end(capsys)


def test_linked_folders_are_followed_once(tmp_path, capsys):
    real, far = four_pictures(tmp_path / "set/z"), four_pictures(tmp_path / "far/deep", 4)
    (real.parent / "a").symlink_to(real)  # twice: it keeps the name that it has without the link
    (real.parent / "b").symlink_to(far.parent)
    (far / "round").symlink_to(far.parent)
    (real / "up").symlink_to(tmp_path)  # around the set, which is not to be all of it
    four_pictures(tmp_path / "beside", 8)
    (real.parent / "unmounted").symlink_to("nowhere")
    names = infogan.load_pictures(str(real.parent), 16).names
    told = capsys.readouterr().out
    assert told.startswith("8 pictures") and "unmounted (FileNotFoundError)" in told
    folders = [f"{Path(name).relative_to(real.parent).parent}" for name in names]
    assert folders == ["b/deep"] * 4 + ["z"] * 4
    (tmp_path / "link").symlink_to(far)
    assert len(infogan.load_pictures(str(tmp_path / "link"), 16).x) == 4


def test_what_is_passed_over_is_told_with_the_reason(tmp_path, capsys):
    folder = four_pictures(tmp_path / "set")
    four_pictures(folder / ".Trash-1000/files", 4)
    four_pictures(folder / "@eaDir", 8)
    four_pictures(folder / "$Recycle.Bin/S-1", 12)
    marks = "args.json log.csv", "last.pt", infogan.MARK, "codes.csv"
    marks += ("args.json samples",)  # of a run that was killed in its first minute
    for i, names in enumerate(marks):
        ours = four_pictures(folder / f"{i}/ours", 16)
        for name in names.split():
            (ours / name).touch()
    shutil.copy(folder / "0.png", folder / "._0.png")
    for name in (".DS_Store", "a.heic", "b.HEIC", "c.txt", "nothing"):
        (folder / name).touch()
    assert len(infogan.load_pictures(str(folder), 16).x) == 4
    (line, *_) = capsys.readouterr().out.splitlines()
    assert ", 2 of .heic, " in line and "DS_Store" not in line
    assert "5 folder ours (a run, or by generate.py)" in line
    for part in ("1 of .txt", "1 of no suffix", "1 hidden", "folder .Trash-1000", "folder @eaDir"):
        assert part in line, line

    for own in (folder / ".Trash-1000", folder / "@eaDir", folder / "0/ours"):  # named: used
        assert len(infogan.load_pictures(str(own), 16).x) == 4
    assert "folder" not in capsys.readouterr().out


def test_all_that_pillow_reads_safely_are_pictures(tmp_path, capsys):
    kinds = {"jfif": "JPEG", "tif": "TIFF", "tiff": "TIFF", "jp2": "JPEG2000", "ppm": "PPM"}
    kinds |= {"tga": "TGA", "JPE": "JPEG", "jpg?w=400": "JPEG", "jpg_large": "JPEG"}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    kinds |= {"png~": "PNG", "eps": "EPS", "pdf": "PDF"}  # not these
    for i, (suffix, kind) in enumerate(kinds.items()):
        Image.new("RGB", (40, 40), (20 * i, 9, 9)).save(tmp_path / f"a.{suffix}", kind)
    shutil.copy(tmp_path / "a.eps", tmp_path / "eps.png")
    Image.new("F", (40, 40), 0.5).save(tmp_path / "float.tif")
    pictures = infogan.load_pictures(str(tmp_path), 16)
    told = capsys.readouterr().out
    assert len(pictures.x) == len(kinds) - 3 and "skipped: 2" in told
    assert "eps.png" in told and "float.tif (NotImplementedError)" in told
    assert all(f"1 of .{suffix}" in told for suffix in ("png~", "eps", "pdf"))
    for name, x in zip(pictures.names, pictures.x.int(), strict=True):
        i = [*kinds].index(name.rpartition("/a.")[2])
        assert (x - torch.tensor([20 * i, 9, 9])).abs().max() < 6, name


def test_photos_are_decoded_small_and_look_the_same(tmp_path):
    noise = Image.frombytes("RGB", (12, 8), random.Random(0).randbytes(288)).resize((1200, 800))
    file, few, seen = tmp_path / "x.jpg", 1200 * 800 // 3, []  # a quarter of both sides: 1/16
    for progressive in (False, True):  # which is decoded whole
        noise.save(file, quality=95, progressive=progressive)
        picture = infogan.read_picture(file, 64, 3)
        assert len(picture.hash) == 64 and picture.whole == (1200, 800) and not picture.error
        seen.append(torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8).int())
        too_large = infogan.read_picture(file, 64, 3, most=few)
        assert isinstance(too_large.error, Image.DecompressionBombError) == progressive
        assert bool(too_large.pixels) != progressive
    whole = infogan.to_square(Image.open(file), 64, 3, "centre", infogan.DEEP)
    whole = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).int()
    assert all((x - whole).abs().max() < 8 for x in seen) and not seen[0].equal(whole)


def test_memory_of_decoding_is_bounded(tmp_path, monkeypatch):
    for i in range(40):
        Image.new("L", (99, 99), i).save(tmp_path / f"{i}.png")
    Image.new("L", (4000, 3000)).save(tmp_path / "photo.png")  # too large for eight at once
    at_work, counts, alone, real = set(), [], [], infogan.to_square

    def slow(image: Image.Image, *how: object) -> Image.Image:
        me = threading.current_thread()
        at_work.add(me)
        counts.append(len(at_work))
        time.sleep(0.01)
        if image.width == 4000:
            alone.append(me is threading.main_thread())
        at_work.discard(me)
        return real(image, *how)

    monkeypatch.setattr(infogan, "to_square", slow)
    assert len(infogan.load_pictures(str(tmp_path), 16).x) == 41 and alone == [True]
    assert 2 < max(counts) <= infogan.DECODE_THREADS + 1


def test_a_batch_is_from_minus_one_to_one_and_flip_mirrors_half_of_it():
    x = torch.arange(200 * 2, dtype=torch.uint8).remainder(7).view(200, 1, 2, 1).mul(30)
    y = infogan.make_batch(x, True, seeded(), CPU)
    plain = infogan.make_batch(x, False, seeded(), CPU)
    assert plain.allclose(x.permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=2e-7)
    kept = (y == plain).flatten(1).all(1)
    assert y[~kept].equal(plain[~kept].flip(3)) and 70 < kept.sum() < 130


def put_mnist(raw: Path, n: int = 20) -> None:
    """The four files of a set in MNIST's format, of noise."""
    raw.mkdir(parents=True)
    for i, part in enumerate(("train", "t10k")):
        noise = random.Random(i).randbytes(n * 28 * 28)
        head = b"".join(v.to_bytes(4, "big") for v in (2051, n, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + noise)
        head = b"".join(v.to_bytes(4, "big") for v in (2049, n))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(n))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_named_set_that_is_there_is_used(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    put_mnist((infogan.DATA / infogan.NAMED_SETS[name][1]).parent)
    pictures = infogan.load_pictures(name, 28)
    assert pictures.names == [str(i) for i in range(20)]
    digits = random.Random(0).randbytes(20 * 28 * 28)
    assert pictures.x.shape == (20, 28, 28, 1) and pictures.x.numpy().tobytes() == digits


@pytest.mark.parametrize("raw", [None, b"", bytes(99), (2051).to_bytes(4, "big") * 9])
def test_a_damaged_file_of_a_named_set_is_one_line(tmp_path, monkeypatch, capsys, raw):
    monkeypatch.chdir(tmp_path)
    file = infogan.DATA / infogan.NAMED_SETS["mnist"][1]
    put_mnist(file.parent)
    if raw is None:
        (file.parent / "train-labels-idx1-ubyte").unlink()
    else:
        file.write_bytes(raw)
    assert infogan.main(["--data", "mnist", "--out", "run"]) == 2
    said_one_line(capsys, f"{file} is damaged or not all: delete it")


@pytest.mark.parametrize("name", ["fashion-mnist", "svhn"])
def test_named_sets_offline_get_a_clear_line(tmp_path, monkeypatch, capsys, name):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert infogan.main(["--data", name, "--out", "run"]) == 2
    assert f"--data {name}: torchvision cannot get it" in capsys.readouterr().err


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """The cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return infogan.cache_folder()


def test_a_second_start_decodes_nothing_and_tells_the_same(tmp_path, capsys, decoded):
    folder = few_pictures(tmp_path / "faces")
    first = infogan.load_pictures(str(folder), 16)
    told = capsys.readouterr().out
    assert len(decoded) == 6 and "copies dropped: 1, unreadable files skipped: 1" in told
    for channels in (None, 3):
        again = infogan.load_pictures(str(folder), 16, channels)
        assert again.x.equal(first.x) and again.fingerprint == first.fingerprint
        assert capsys.readouterr().out == told
    assert len(decoded) == 6
    assert infogan.load_pictures(str(folder), 32).x.shape == (5, 32, 32, 3)
    assert infogan.load_pictures(str(folder), 16, 1).x.shape == (5, 16, 16, 1)


def test_a_grey_set_is_asked_for_in_each_number_of_channels(tmp_path):
    grey = str(few_pictures(tmp_path / "grey", mode="L"))
    one, three, again = (infogan.load_pictures(grey, 16, channels).x for channels in (None, 3, 1))
    assert one.shape == (5, 16, 16, 1) and three.equal(one.expand(-1, -1, -1, 3))
    assert again.equal(one)


def test_a_changed_folder_is_decoded_again_in_the_same_place(tmp_path, own_cache):
    folder, seen = few_pictures(tmp_path / "faces"), []
    more = few_pictures(tmp_path / "more", 7)

    def later() -> None:
        shutil.copy(more / "5.png", folder / "6.png")  # as many bytes
        os.utime(folder / "6.png", (10**9, 10**9))

    for change in (
        lambda: None,
        lambda: (folder / "1.png").rename(folder / "9.png"),
        lambda: shutil.copy(more / "6.png", folder),
        later,
        (folder / "6.png").unlink,
    ):
        change()
        seen.append(infogan.load_pictures(str(folder), 16))
    assert [len(p.x) for p in seen] == [5, 5, 6, 6, 5]
    first, same_ones, *others, last = (p.fingerprint for p in seen)
    assert first == same_ones == last and len({first, *others}) == 3
    assert seen[1].x.equal(seen[4].x) and len([*own_cache.iterdir()]) == 1


DAMAGE = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "zeros": lambda raw: bytes(len(raw)),
    "text": lambda raw: b"hello world, this is no cache",
    "another version": lambda raw: raw.replace(b"fingerprint", b"printfinger"),
}


@pytest.mark.parametrize("kind", [*DAMAGE, "folder", "none"])
def test_a_damaged_cache_is_made_anew(tmp_path, own_cache, decoded, kind):
    folder = few_pictures(tmp_path / "faces")
    first = infogan.load_pictures(str(folder), 16)
    whole = first.x.clone()
    (file,) = own_cache.iterdir()
    raw = file.read_bytes()
    file.unlink()  # not written to in place: `first` is a view of it
    if kind == "folder":
        file.mkdir()
    elif kind != "none":
        file.write_bytes(DAMAGE[kind](raw))
    assert infogan.load_pictures(str(folder), 16).x.equal(whole) and len(decoded) > 6
    if kind != "folder":
        assert file.read_bytes() == raw and first.x.equal(whole)


@pytest.mark.parametrize("blocked", [True, False])
def test_training_needs_no_cache(tmp_path, monkeypatch, capsys, blocked):
    folder, file = few_pictures(tmp_path / "faces"), tmp_path / "file"
    file.touch()
    monkeypatch.chdir(tmp_path)
    if blocked:
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user
    pictures = infogan.load_pictures("faces", 16)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "not cached" in told[0] and "5 pictures" in told[1]
    assert {*tmp_path.iterdir()} == {folder, file}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert infogan.load_pictures("faces", 16).x.equal(pictures.x)


def cache_in(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)


@unix
def test_two_starts_at_once_share_a_cache(tmp_path):
    few, runs = few_pictures(tmp_path / "few", 60), []
    for name in "ab":
        argv = tiny(few, tmp_path / name, "--max-steps", 1)
        runs.append(Run(argv, tmp_path / f"said {name}", partial(cache_in, tmp_path)))
    assert [run.end()[0] for run in runs] == [0, 0]
    assert same(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    assert len([*(tmp_path / "infogan").iterdir()]) == 1


# checkpoint ---------------------------------------------------------------------------------------


def small_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


@unix
def test_a_full_disk_is_one_line_and_costs_nothing(faces, trained, tmp_path):
    out, said = copied(trained, tmp_path / "run", 1), tmp_path / "said"
    good = (out / "last.pt").read_bytes()
    assert len(good) > 40_000
    code, told = Run(tiny(faces, out, "--max-steps", 20), said, small_files).end()
    line = [t for t in told.splitlines() if t.startswith("infogan.py: ")]
    assert code == 2 and len(line) == 1 and "last.pt" in line[0] and "too large" in line[0], told
    assert "Traceback" not in told and not list(out.rglob(".*"))
    assert (out / "last.pt").read_bytes() == good
    train(faces, out, "--max-steps", 20)


def failing_saves(monkeypatch, name: str, fails) -> list[int]:
    """Saves of files called like name fail where fails(of which number) is true; their steps."""
    steps, real = [], infogan.write_file

    def write_file(path: Path, raw: bytes) -> None:
        if path.match(name):
            steps.append(torch.load(io.BytesIO(raw))["step"])
            if fails(len(steps)):
                raise OSError(errno.EIO, "I/O error", str(path))
        real(path, raw)

    monkeypatch.setattr(infogan, "write_file", write_file)
    monkeypatch.setattr(infogan, "SAVE_SECONDS", 0.0)  # after each step
    return steps


def test_a_save_that_fails_for_a_while_costs_nothing(faces, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    steps = failing_saves(monkeypatch, "last.pt", range(3, 6).__contains__)
    train(faces, out, "--max-steps", 8)
    said = capsys.readouterr().err
    assert said.count(f"{out / 'last.pt'}: I/O error; training goes on and tries again") == 3
    assert steps == [*range(1, 9)] and step_of(out) == 8


@pytest.mark.parametrize("steps", [10**6, 2])
def test_a_save_that_fails_for_too_long_ends_the_run(faces, tmp_path, monkeypatch, capsys, steps):
    """In the middle of it at the sixth failure, or at its end at once; what was saved stays."""
    out = tmp_path / "run"
    tried = failing_saves(monkeypatch, "last.pt", lambda n: n > 1)
    train(faces, out, "--max-steps", steps, code=2)
    assert f"{out / 'last.pt'}: I/O error; fix this" in told_at_the_end(capsys)
    assert tried == [*range(1, min(steps, 7) + 1)] and step_of(out) == 1


def test_a_kept_checkpoint_that_cannot_be_saved_is_told_and_training_goes_on(
    tmp_path, monkeypatch, capsys
):
    out, few = tmp_path / "run", few_pictures(tmp_path / "few")
    failing_saves(monkeypatch, "epoch_*.pt", lambda n: n != 2)
    train(few, out, "--save-every", 1, "--epochs", 3)
    said = capsys.readouterr().err
    assert f"{out / 'epoch_0001.pt'}: I/O error; training goes on" in said
    assert said.count("training goes on") == 1
    assert step_of(out) == 3 and [p.name for p in out.glob("epoch*")] == ["epoch_0002.pt"]


def test_a_folder_that_is_away_for_a_while_misses_nothing(faces, tmp_path, monkeypatch, capsys):
    """Renamed in a step before a save of log.csv and last.pt, and back three steps later."""
    out, away = tmp_path / "run", tmp_path / "away"
    moves = {14: lambda: out.rename(away), 17: lambda: away.rename(out)}
    before_steps(lambda step: moves.get(step, int)(), monkeypatch.setattr)
    failing_saves(monkeypatch, "none", bool)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its thread would complain
    train(faces, out, "--max-steps", 20, "--sample-every", 1)
    said = capsys.readouterr().err
    assert said.count("last.pt: No such file or directory; training goes on and tries again") == 3
    assert said.count(f"{out / 'log.csv'}: No such file or directory; training goes on") == 1
    rows = (out / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "16"] and step_of(out) == 20
    assert not list(out.rglob(".*")) and not away.exists()


def test_a_run_that_fails_in_its_first_minute_leaves_its_log(faces, tmp_path, monkeypatch):
    """Nothing is saved by then; log.csv and curves.png show how it came to that."""
    real, calls = infogan.d_loss, itertools.count()
    lost = lambda *d: real(*d) * (math.nan if next(calls) > 10 else 1)  # noqa: E731
    monkeypatch.setattr(infogan, "d_loss", lost)
    monkeypatch.setattr(infogan, "LOG_EVERY", 4)
    train(faces, tmp_path / "run", "--max-steps", 100, code=1)
    rows = [row.split(",") for row in (tmp_path / "run/log.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", "4", "8", "12"] and rows[3][3] == "nan"
    assert Image.open(tmp_path / "run/curves.png").width == 640
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("where, step, seen, good", [
    ("weights", 36, 36, 1), ("loss", 30, 32, 1), ("loss", 35, 36, 1), ("loss", 37, 48, 2),
])  # fmt: skip
def test_nan_stops_the_run_and_never_reaches_a_checkpoint(
    faces, trained, tmp_path, capsys, monkeypatch, where, step, seen, good
):
    """Epochs end at 18 and 36, rows of log.csv at 32 and 48: whichever comes first must see it.

    In the weights after the last step before a save, where no loss shows it; or in the loss alone.
    """
    out, real_step = copied(trained, tmp_path / "run", 1), infogan.train_step

    def poisoned(state, *rest):
        metrics = real_step(state, *rest)
        if state.step + 1 == step:
            lost = next(state.D.parameters()).data if where == "weights" else metrics["loss_D"]
            lost.fill_(math.nan)
        return metrics

    monkeypatch.setattr(infogan, "train_step", poisoned)
    train(faces, out, "--save-every", 1, code=1)
    line = told_at_the_end(capsys)
    what = "the sum of D's weights is nan" if where == "weights" else "loss_D is nan"
    assert f"step {seen}: {what}" in line and "last.pt is the last good" in line
    assert same(out / "last.pt", trained / f"epoch_000{good}.pt") and step_of(out) == 18 * good


def test_a_finished_run_that_is_far_off_says_so(faces, tmp_path, capsys):
    out = tmp_path / "run"
    train(faces, out, "--lr-g", 1, "--lr-d", 1, "--max-steps", 32, "--no-amp", code=1)
    line = told_at_the_end(capsys)
    assert re.search(r"32 steps, .*, but (loss_[DG]|cat\d|cont\d) is -?\d+: it has learned", line)
    assert "--lr-g" in line and step_of(out) == 32


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


HOSTILE = {
    "codes": lambda c: c["args"].update(n_cat=10**9),
    "text": lambda c: c["args"].update(width="64"),
    "shape": lambda c: c["args"].update(width=1024, n_cat=64, cat_dim=1000),
    "missing": lambda c: c["G_ema"].popitem(),
    "none": lambda c: c.pop("G_ema"),
    "nan": lambda c: c["G_ema"]["layers.0.weight"].fill_(math.nan),
    "newer": lambda c: c.update(format=99),
    "flags": lambda c: c.pop("args"),
    "object": lambda c: c["G_ema"].update(x=3),
    "vast": lambda c: c["G_ema"].update({"layers.0.weight": torch.zeros(1).expand(10**12)}),
    "attack": lambda c: c.update(args=Attack()),
}


@pytest.mark.parametrize("kind", [*HOSTILE, "pickle", "folder", "bomb"])
def test_hostile_checkpoints_are_one_line_and_run_nothing(
    ckpt, tmp_path, capsys, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt"
    if kind in HOSTILE:
        rewritten(ckpt, bad, HOSTILE[kind])
    elif kind == "pickle":
        bad.write_bytes(pickle.dumps(Attack()))
    elif kind == "folder":
        bad.mkdir()
    else:
        with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", bytes(10**7))
    assert generate.main(["--ckpt", str(bad)]) == 2
    said_one_line(capsys, "bad.pt")
    assert not (tmp_path / "pwned").exists()


# run folder ---------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(faces, trained, tmp_path):
    """54 steps at once are 7 + 14 + 33, over the ends of epochs; log.csv and grids too."""
    out = tmp_path / "run"
    for steps in (7, 21, 54):
        train(faces, out, *EACH, "--max-steps", steps)
    assert same(trained / "last.pt", out / "last.pt")
    logs, grids = [], []
    for run in (trained, out):
        rows = (run / "log.csv").read_text().splitlines()
        logs.append([row.split(",")[3:-1] for row in rows])  # minutes, told_apart: by the clock
        grids.append({path.name: path.read_bytes() for path in run.glob("samples/*")})
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert grids[0] == grids[1] and len(grids[0]) == 6


def test_the_same_pictures_under_other_names_go_on_bit_for_bit(faces, trained, tmp_path):
    """In other folders, in another order, one of them twice."""
    out, other = copied(trained, tmp_path / "run", 2), tmp_path / "other"
    for i, path in enumerate(sorted(faces.glob("*.png"), reverse=True)):
        (other / str(i % 3)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / str(i % 3) / f"{i}.PNG")
    shutil.copy(path, other / "copy.png")
    (out / "samples/real.png").unlink()
    train(other, out, *EACH, "--epochs", 3)
    assert same(trained / "last.pt", out / "last.pt")
    a, b = ((run / "samples/real.png").read_bytes() for run in (trained, out))
    assert a == b


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_command_gives_the_same_bytes_and_another_seed_others(faces, tmp_path, threads):
    before, grids = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            train(faces, tmp_path / name, "--max-steps", 1, "--seed", seed)
            grids.append({*files_in(tmp_path / name / "samples").values()})
    finally:
        torch.set_num_threads(before)
    assert grids[0] == grids[1] and len(grids[0]) == 3 and not grids[0] & grids[2]
    assert same(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    assert not same(tmp_path / "a/last.pt", tmp_path / "c/last.pt")


def test_a_finished_run_is_left_as_it_is(faces, trained, capsys):
    before = files_in(trained)
    train(faces, trained, *EACH, "--epochs", 3)
    assert "is finished" in capsys.readouterr().out and files_in(trained) == before


def test_a_folder_with_logs_or_a_lone_checkpoint_becomes_a_run(faces, trained, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "lost+found").mkdir(parents=True)
    for name in ("log.txt", "slurm-1.out", "job.e17", "desktop.ini", "Thumbs.db", ".DS_Store"):
        (out / name).touch()
    train(faces, out, "--max-steps", 1)
    for name in ("last.pt", "epoch_0001.pt"):
        lone = tmp_path / name / "run"
        lone.mkdir(parents=True)
        shutil.copy(trained / "epoch_0001.pt", lone / name)
        train(faces, lone, "--max-steps", 19)
        assert f"{name}, step 18" in capsys.readouterr().out
        assert step_of(lone) == 19


@pytest.mark.parametrize("name", ["a.png", "samples/real.png", "log.csv", "best.pt"])
def test_a_folder_with_anything_else_is_refused(faces, tmp_path, capsys, name):
    mine = tmp_path / "full" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    train(faces, tmp_path / "full", code=2)
    said_one_line(capsys, name.split("/")[0])
    assert files_in(tmp_path) == {mine: b"precious"}


@pytest.mark.parametrize("flags, words", [
    (("--n-cont", 3), ("--n-cont 2, not --n-cont 3",)),
    (("--width", 8), ("--width 4, not --width 8",)),
    (("--width", 8, "--allow-changes"), ("--width 4, not --width 8",)),  # for good
    (("--info-to", "head"), ("--info-to trunk, not --info-to head",)),
    (("--batch-size", 16), ("--batch-size 32, not --batch-size 16", "--allow-changes")),
    (("--data", "few", "--batch-size", 16), ("--batch-size",)),  # flags before pictures are decoded
    (("--data", "few"), ("other pictures", "--allow-changes")),
])  # fmt: skip
def test_going_on_with_another_run_is_refused(
    faces, trained, tmp_path, capsys, monkeypatch, decoded, flags, words
):
    monkeypatch.chdir(tmp_path)
    few_pictures(tmp_path / "few")
    before = files_in(trained)
    train(faces, trained, "--epochs", 4, *flags, code=2)
    said = said_one_line(capsys, *words, "another --out starts a new run")
    assert "--allow-changes takes other pictures, --crop and --batch-size" in said
    assert files_in(trained) == before and len(decoded) == (6 if flags[1:] == ("few",) else 0)


def test_changes_that_are_allowed_go_on_and_what_was_passed_counts(trained, tmp_path):
    """Other pictures, an epoch of another length, and other rates."""
    out, few = copied(trained, tmp_path / "run", 1), few_pictures(tmp_path / "few", 8)
    rewritten(out / "last.pt", out / "last.pt", lambda c: c.update(step=25))  # in epoch 1
    flags = ("--batch-size", 4, "--lr-g", 0.01, "--r1", 1, "--save-every", 1)
    first = (out / "epoch_0001.pt").read_bytes()
    train(few, out, *flags, "--allow-changes", "--epochs", 4)
    ckpt = infogan.load_checkpoint(out / "last.pt")
    assert ckpt["opt_G"]["param_groups"][0]["lr"] == 0.01 and ckpt["args"]["r1"] == 1
    assert ckpt["step"] == 29 and ckpt["changed"] == (25, 2)  # two epochs of two steps
    assert (out / "epoch_0001.pt").read_bytes() == first
    assert infogan.load_checkpoint(out / "epoch_0003.pt")["step"] == 27
    train(few, out, *flags, "--max-steps", 30, "--epochs", 9)
    assert infogan.load_checkpoint(out / "last.pt")["changed"] == (25, 2)


def test_other_flags_may_change_and_are_told_as_one_types_them(faces, trained, tmp_path, capsys):
    out = copied(trained, tmp_path / "run", 1)
    flags = ("--no-flip", "--r1", 1, "--lam-cat", 2, "--max-steps")
    train(faces, out, *flags, 20)
    said = capsys.readouterr().out.splitlines()
    then = "--flip, not --no-flip, --lam-cat 1.0, not --lam-cat 2.0, --r1 0.01, not --r1 1.0"
    assert f"until now it had {then}, --r1-from 75, not --r1-from 0" in said
    args = infogan.load_checkpoint(out / "last.pt")["args"]
    assert (args["r1"], args["lam_cat"]) == (1.0, 2.0) and step_of(out) == 20
    for steps in (20, 21):  # finished; and on
        train(faces, out, *flags, steps)
        assert "until now" not in capsys.readouterr().out


def begin(init: Path, faces: Path, *flags: object, code: int = 0) -> None:
    """A run with the weights, codes and networks of a checkpoint; no rate moves its weights."""
    argv = ["--init", init, "--data", faces, "--lr-g", 0, "--lr-d", 0, "--batch-size", 8, *flags]
    assert infogan.main([*map(str, argv)]) == code


def test_a_new_run_begins_with_another_s_weights(ckpt, faces, tmp_path, capsys, monkeypatch):
    """Codes and networks come with them, and G's average, which outlives the first step."""
    monkeypatch.chdir(tmp_path)
    before, out = Path("before.pt"), Path("checkpoint/cat2-cont3")
    rewritten(ckpt, before, lambda c: c["G_ema"]["layers.0.weight"].add_(1))
    begin(before, faces, "--n-cat", 3, code=2)
    said_one_line(capsys, "before.pt", "--n-cat 2, not --n-cat 3")
    begin(before, faces, "--max-steps", 1)
    old, new = weights(before), weights(out / "last.pt")
    assert all(old[k].equal(v) for k, v in new.items() if "weight" in k and "G_ema" not in k)
    moved = (new["G_ema.layers.0.weight"] - old["G_ema.layers.0.weight"]).abs().max()
    assert 0 < moved < 0.1
    assert json.loads((out / "args.json").read_text())["init"] == "before.pt"
    assert step_of(out) == 1

    before.unlink()  # its codes are not known now, so neither is the run's default folder
    other = ["--data", str(faces), *TINY[:4], "--batch-size", "8", "--max-steps", "1"]
    assert infogan.main(other) == 0 and step_of(Path("checkpoint/cat1-cont2")) == 1
    capsys.readouterr()
    begin(before, faces, "--max-steps", 2, code=2)
    said_one_line(capsys, "before.pt: no such checkpoint")
    begin(before, faces, "--max-steps", 2, "--out", out)
    assert step_of(out) == 2
    begin(ckpt, faces, "--max-steps", 3, "--out", out)
    assert (
        f"until now it had --init before.pt, not --init {shlex.quote(str(ckpt))}"
        in capsys.readouterr().out
    )
    begin(out / "last.pt", faces, "--max-steps", 1, "--out", "next")
    assert infogan.load_checkpoint("next/last.pt")["args"]["init"] == f"{out / 'last.pt'}"


def test_init_takes_a_folder_and_names_all_that_contradicts_it(ckpt, faces, tmp_path, capsys):
    begin(ckpt.parent, faces, "--max-steps", 1, "--out", tmp_path / "run")
    assert step_of(tmp_path / "run") == 1
    capsys.readouterr()
    begin(ckpt, faces, "--n-cat", 3, "--z-dim", 7, code=2)
    said_one_line(capsys, "--n-cat 2, not --n-cat 3", "--z-dim 100, not --z-dim 7")


def test_hints_can_be_pasted_and_few_pictures_are_told(tmp_path, capsys):
    train(few_pictures(tmp_path / "few"), tmp_path / "my run", "--max-steps", 1)
    said = capsys.readouterr().out
    assert f"--ckpt '{tmp_path}/my run/last.pt'" in said
    assert "5 pictures are few: some thousands" in said


@pytest.mark.parametrize("module, flags, words", [
    (infogan, "--epoch 3", "--epoch: did you mean --epochs?"),
    (infogan, "--batchsize=3", "--batchsize: did you mean --batch-size?"),
    (generate, "--cpkt last.pt", "--cpkt: did you mean --ckpt?"),
])  # fmt: skip
def test_a_misspelt_flag_is_named_with_the_right_one(capsys, module, flags, words):
    assert module.main(flags.split()) == 2
    said_one_line(capsys, words)


def test_an_init_may_be_shrunken_and_must_fit(ckpt, faces, tmp_path, capsys):
    small, out = tmp_path / "small.pt", tmp_path / "run"
    assert generate.main(["--ckpt", str(ckpt), "--shrink", str(small)]) == 0
    begin(small, faces, "--max-steps", 1, "--out", out)
    half, new = infogan.load_checkpoint(small)["G_ema"], weights(out / "last.pt")
    assert all(new[f"G.{k}"].equal(w.float()) for k, w in half.items() if w.dim() > 1)
    bad = rewritten(ckpt, tmp_path / "bad.pt", lambda c: c.pop("D"))
    capsys.readouterr()
    begin(bad, faces, "--out", tmp_path / "new", code=2)
    assert "--out" not in said_one_line(capsys, f"{bad}: ", "give another --init")
    assert not (tmp_path / "new").exists()


def test_a_broken_last_pt_falls_back_on_the_newest_that_loads(faces, trained, tmp_path, capsys):
    out = copied(trained, tmp_path / "run")
    good = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(good[: len(good) // 2])
    (out / "epoch_0003.pt").write_bytes(b"")
    train(faces, out, *EACH, "--epochs", 3)
    said = capsys.readouterr()
    assert "resuming from" in said.out and "epoch_0002.pt, step 36" in said.out
    assert said.err.count("broken, or not a checkpoint") == 2
    assert same(out / "last.pt", trained / "last.pt")


def test_a_run_with_other_metrics_is_refused(faces, trained, tmp_path, capsys):
    out = copied(trained, tmp_path / "run")
    rewritten(out / "last.pt", out / "last.pt", lambda c: c["sums"].pop("loss_G"))
    train(faces, out, "--epochs", 4, code=2)
    said_one_line(capsys, "training cannot go on", "METRICS has changed", "another --out")


def test_a_run_without_a_checkpoint_that_loads_is_refused(faces, tmp_path, capsys):
    mine = tmp_path / "run/last.pt"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    train(faces, mine.parent, code=2)
    assert "none of its checkpoints" in capsys.readouterr().err
    assert files_in(tmp_path) == {mine: b"precious"}


def nobody() -> None:
    os.setuid(65534)


@unix
def test_a_read_only_folder_is_one_line_and_costs_nothing(faces, trained, tmp_path):
    out, said = copied(trained, tmp_path / "run"), tmp_path / "said"
    before = files_in(out)
    if os.getuid() == 0 and not os.access(tmp_path.parent.parent, os.X_OK):
        pytest.skip("no other user may come here")
    out.chmod(0o555)
    try:
        prepare = nobody if os.getuid() == 0 else None
        code, told = Run(tiny(faces, out, "--epochs", 4), said, prepare).end()
    finally:
        out.chmod(0o755)
    assert code == 2 and "Permission denied" in told and told.count("\n") == 1, told
    assert files_in(out) == before


@unix
def test_one_run_at_a_time_in_a_folder(faces, trained, tmp_path, capsys):
    out = copied(trained, tmp_path / "run")
    with infogan.locked(out):
        train(faces, out, "--epochs", 4, code=2)
        said_one_line(capsys, f"--out {out}: another process is training there")
    train(faces, out, "--max-steps", 55)
    assert not list(out.glob(".*"))


def test_a_drive_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    def acquire(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(infogan.FileLock, "acquire", acquire)
    with infogan.locked(tmp_path / "run"):
        assert (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{tmp_path / 'run'}: cannot be locked" in said


def signals_in_a_step(number: signal.Signals, times: int, patch=setattr) -> None:
    """They come in the sixth step."""
    signals = [number] * times
    before_steps(lambda step: step == 5 and [*map(signal.raise_signal, signals)], patch)


@unix
@pytest.mark.parametrize("times, number", [
    *((1, number) for number in infogan.SIGNALS),
    *((2, number) for number in infogan.SIGNALS[3:]),  # batch systems repeat theirs
])  # fmt: skip
def test_a_signal_ends_the_step_saves_and_leaves(
    faces, tmp_path, capsys, monkeypatch, times, number
):
    out, before = tmp_path / "run", signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # else a default would end the tests
    signals_in_a_step(number, times, monkeypatch.setattr)
    try:
        train(faces, out, *ENDLESS, code=128 + number)
    finally:
        signal.signal(number, before)
    said = capsys.readouterr()
    assert f"{number.name}: 6 steps" in said.out and "the same command resumes" in said.out
    assert "Traceback" not in said.err and step_of(out) == 6 and not list(out.rglob(".*"))


@unix
def test_what_nohup_ignores_is_ignored(faces, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals_in_a_step(signal.SIGHUP, 1, monkeypatch.setattr)
    try:
        train(faces, tmp_path / "run", "--max-steps", 8)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_of_another_program_trains_and_leaves_signals_and_streams_alone(faces, tmp_path):
    def theirs() -> list:
        return [sys.stdout, sys.stderr, *map(signal.getsignal, infogan.SIGNALS)]

    before = theirs()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, faces, tmp_path / "run", "--max-steps", 2).result()
    assert theirs() == before
    train(faces, tmp_path / "run", "--max-steps", 3)
    assert theirs() == before


@unix
@pytest.mark.parametrize("number", infogan.SIGNALS[:3])
def test_a_second_signal_leaves_at_once_and_saves_nothing(faces, tmp_path, number):
    out, prepare = tmp_path / "run", partial(signals_in_a_step, number, 2)
    code, said = Run(tiny(faces, out, *ENDLESS), tmp_path / "said", prepare).end()
    assert code == (130 if number == signal.SIGINT else -number), said
    assert ("infogan.py: stopped" in said) == (number == signal.SIGINT)
    assert "is saved" not in said and not list(out.glob("*.pt"))


# display ------------------------------------------------------------------------------------------


def test_grids_are_laid_out_in_rows():
    x = torch.arange(10.0).view(10, 1, 1, 1).expand(-1, 3, 4, 4) / 10
    grid = infogan.make_grid(x)
    assert grid.shape == (3, 2 + 6 * 2, 2 + 6 * 8)
    assert grid[0, 2::6, 2::6].flatten()[:10].tolist() == pytest.approx([k / 10 for k in range(10)])
    assert (grid[:, :2] == -1).all() and (grid[:, 8:, 14:] == -1).all()
    image = infogan.to_image(torch.tensor([-1.0, 0.0, 1.0, 9.0]).expand(3, 1, 4))
    assert [image.getpixel((i, 0)) for i in range(4)] == [(v,) * 3 for v in (0, 128, 255, 255)]


@pytest.mark.parametrize("size, epochs", [
    ((274, 274), [0, 999, 9995, 10_000]), ((1042, 40), range(0, 500, 5)),
])  # fmt: skip
def test_the_animation_names_each_epoch_and_rests_on_the_last(tmp_path, size, epochs):
    """Of a long run it has 60, the first and the last among them."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/epoch_0005 copy.png").touch()
    hues = (300 * i / len(epochs) for i in range(len(epochs)))
    shades = [ImageColor.getrgb(f"hsl({hue}, 100%, 50%)") for hue in hues]
    for epoch, shade in zip(epochs, shades, strict=True):
        Image.new("RGB", size, shade).save(tmp_path / f"samples/epoch_{epoch:04d}.png")
    infogan.save_animation(tmp_path)
    loop = Image.open(tmp_path / "training.gif")
    assert loop.n_frames == min(len(epochs), 60) and loop.width == 530
    for i, duration in (0, 250), (1, 250), (-1, 2000):
        loop.seek(i % loop.n_frames)
        far = zip(loop.convert("RGB").getpixel((270, 44)), shades[i], strict=True)
        assert max(abs(a - b) for a, b in far) < 20 and loop.info["duration"] == duration
        assert ImageChops.invert(loop.crop((0, 0, 530, 28)).convert("L")).getbbox()


def test_a_run_leaves_checkpoints_grids_a_log_and_its_flags(trained):
    assert {p.name for p in trained.iterdir() if "tfevents" not in p.name} == {
        "args.json", "curves.png", "last.pt", "log.csv", "samples", "training.gif",
        *(f"epoch_000{i}.pt" for i in (1, 2, 3))}  # fmt: skip
    assert {p.name for p in (trained / "samples").iterdir()} == {
        "real.png", "last.png", *(f"epoch_000{i}.png" for i in range(4))}  # fmt: skip
    saved = json.loads((trained / "args.json").read_text())
    assert infogan.load_checkpoint(trained / "last.pt")["args"] == saved
    assert step_of(trained) == 54 and saved["image_size"] == 16
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["16", "32", "48"]
    assert {"loss_D", "D_fake", "cat1", "cont1"} <= rows[0].keys()
    G, spec = infogan.load_generator(trained / "last.pt")
    assert spec == CodeSpec(2, 3, 2) and not G.training
    assert G(torch.zeros(1, spec.dim)).shape[2] == 16


def test_training_goes_on_without_what_it_can_do_without(faces, tmp_path, monkeypatch, capsys):
    """log.csv held by Excel for a while, pictures by a viewer, no TensorBoard: each told once."""
    out, real_replace, saves = tmp_path / "run", os.replace, []

    def replace(part, path):
        is_log = Path(path).name == "log.csv"
        saves.extend([path] * is_log)
        if Path(path).suffix in (".png", ".gif") or (is_log and len(saves) in (2, 3)):
            raise PermissionError(13, "Access is denied")
        real_replace(part, path)

    failing_saves(monkeypatch, "none", bool)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(faces, out, "--max-steps", 48, "--sample-every", 1)
    said = [line for line in capsys.readouterr().err.splitlines() if "training goes on" in line]
    for words in ("TensorBoard: ", f"{out / 'log.csv'}: ", "curves.png: ", "samples/real.png: "):
        assert sum(words in line for line in said) == 1, said
    assert len(said) == 4, said  # without a grid there is no animation
    rows = (out / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "16", "32", "48"]
    assert step_of(out) == 48 and not list(out.rglob(".*"))


# loop ---------------------------------------------------------------------------------------------


def test_devices_have_numbers(monkeypatch, capsys):
    """Those that are here: data/test_device.py."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda:2", "cuda:x", "cpu:1", "auto:0", "tpu", "meta", "cud"):
        with pytest.raises(UserError, match=f"--device {name}: not available"):
            infogan.pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(infogan.pick_device("auto")) in ("cpu", "mps")
    assert infogan.main(["--device", "cuda:0"]) == 2
    said_one_line(capsys, "--device cuda:0")


def test_grids_and_kept_checkpoints_come_each_half_minute_at_most_unless_asked_for(
    tmp_path, monkeypatch, capsys
):
    """30 epochs of one step of 7 seconds."""
    few = few_pictures(tmp_path / "few")

    def written(out: Path, *flags: object) -> tuple[list[int], ...]:
        Clock(monkeypatch)
        train(few, out, "--epochs", 30, *flags)
        monkeypatch.undo()
        files = (sorted(out.glob(name)) for name in ("samples/epoch_*", "epoch_*"))
        return tuple([int(path.stem[6:]) for path in paths] for paths in files)

    early = {1, 2, 5, 10, 20}
    assert written(tmp_path / "default") == (sorted({*range(0, 31, 5)} | early), [25])
    assert Image.open(tmp_path / "default/samples/epoch_0001.png").width >= 512
    assert "30 steps are too few to learn from; raise --epochs" in capsys.readouterr().out
    asked = "--sample-every", 3, "--save-every", 10
    assert written(tmp_path / "asked", *asked) == ([*range(0, 31, 3)], [10, 20, 30])
    monkeypatch.setattr(infogan, "SHOW_SECONDS", 100.0)
    assert written(tmp_path / "slow")[0] == sorted({0, 15, 30} | early)


def test_what_one_looks_at_is_renewed_while_a_run_trains(tmp_path, monkeypatch):
    """The newest grid twice a minute, before epoch 1 ends; the film with early grids."""
    few, out, seen = few_pictures(tmp_path / "few", 200), tmp_path / "run", {}
    Clock(monkeypatch)
    real = infogan.save_picture
    monkeypatch.setattr(
        infogan,
        "save_picture",
        lambda path, *a, **k: (
            seen.setdefault(path.name, []).append(infogan.time.monotonic() / 7),
            real(path, *a, **k),
        ),
    )
    train(few, out, "--batch-size", 4, "--max-steps", 120)
    assert seen["last.png"][:3] == [5, 10, 15] and len(seen["last.png"]) == 25
    assert seen["training.gif"] == [50, 100, 120]


def test_max_minutes_end_a_start_with_a_checkpoint(faces, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(infogan, "LOG_EVERY", 1)  # so that there is something to show
    train(faces, tmp_path / "run", "--max-minutes", 0.005, "--epochs", 10**6)
    said = capsys.readouterr()
    assert "time is up" in said.out and step_of(tmp_path / "run") >= 1
    etas = re.findall(r"eta ([\d:]+)", said.err)
    assert etas and set(etas) == {"0:00:00"}, "the time ends this start long before its epochs"


def test_few_grey_pictures_and_no_codes_train_and_draw(tmp_path, capsys):
    few, out = few_pictures(tmp_path / "few", mode="L"), tmp_path / "run"
    train(few, out, "--max-steps", 33, "--n-cat", 0, "--n-cont", 0)
    assert "only 5 pictures, so a batch is 5" in capsys.readouterr().out
    assert step_of(out) == 33 and (out / "curves.png").exists()
    assert generate.main(["--ckpt", str(out / "last.pt"), "--samples", "3"]) == 0
    assert Image.open(out / "generated/000002.png").mode == "L"
    assert generate.main(["--ckpt", str(out / "last.pt")]) == 0


def test_codes_are_learned(faces, tmp_path):
    """On drawn faces Q reads new codes from new pictures, and nothing once they are shuffled."""
    out = tmp_path / "run"
    flags = ["--n-cat", 1, "--cat-dim", 4, "--n-cont", 1, "--width", 8, "--ema", 0.1]
    flags += ["--lr-g", 0.001, "--lr-d", 0.001, "--lam-cat", 1, "--lam-cont", 0.5]
    train(faces, out, "--max-steps", 150, *flags, "--q-augment", 0.5)
    G, spec = infogan.load_generator(out / "last.pt")
    codes = spec.sample(1000, seeded(1))
    with torch.no_grad():
        x = G(spec.join(codes))
        q = infogan.load_net(out / "last.pt", "D", "cpu")(x)[1]
    L_I = infogan.mutual_information(spec, q, codes)
    shuffled = Codes(*(c.roll(1, 0) for c in codes))
    control = infogan.mutual_information(spec, q, shuffled)
    assert L_I[0] > 0.7 and L_I[1] > 0.5 and (control <= 0).all(), (L_I, control)


def little_memory() -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux")
def test_too_little_memory_is_one_line(faces, tmp_path):
    flags = tiny(faces, tmp_path / "run", "--width", 512, "--n-cat", 64, "--cat-dim", 900)
    code, told = Run(flags, tmp_path / "said", little_memory).end()
    assert code == 2 and "out of memory; lower --batch-size" in told and "Traceback" not in told


@unix
def test_a_closed_terminal_costs_nothing(faces, tmp_path):
    """As with `| tee log` and Ctrl-C, which ends tee as well: the run saves all to its end."""
    out, terminal = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(terminal)
    run = Run(tiny(faces, out, "--max-steps", 60), terminal)
    with open(terminal, "rb") as said:
        assert any(b"img/s" in line for line in said)
    run.process.join(PATIENCE)
    assert step_of(out) == 60 and (out / "samples/last.png").exists()


class Clock:
    """Of a machine whose steps take 7 seconds; it stands still in between."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        before_steps(self.go_on, monkeypatch.setattr)
        monkeypatch.setattr(infogan, "time", Namespace(monotonic=lambda: self.seconds))

    def go_on(self, _step: int) -> None:
        self.seconds += 7


@pytest.mark.parametrize("columns", [None, 60, 200])
def test_progress_in_a_file_is_a_line_each_half_minute(
    faces, tmp_path, monkeypatch, capsys, columns
):
    """In a terminal it is one line, as wide as that, written over. The first comes at once."""
    Clock(monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(columns), raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    train(faces, tmp_path / "run", "--max-steps", 20)
    said = capsys.readouterr().err
    epochs = re.findall(r"epoch ([\d.]+)/1.1 ", said)
    steps = range(1, 21) if columns else [1, 5, 10, 15, 20]  # 30 seconds or more later
    assert epochs == [f"{step / 18:.1f}" for step in steps]
    assert said.count("\n") == (1 if columns else 5)
    if columns:
        assert {len(line) for line in said.strip("\r\n").split("\r")} == {columns - 1}
    assert "eta 0:00:00" in said or columns == 60


def test_a_run_logs_how_well_its_pictures_are_told_from_real_ones(faces, tmp_path, monkeypatch):
    """After 30 seconds or more, on the average of G; a row has the newest figure, at first 1."""
    seen, out = [], tmp_path / "run"

    def tell_apart(x, y):
        seen.append((x, y))
        return 0.75 - len(seen) / 8

    monkeypatch.setattr(infogan, "tell_apart", tell_apart)
    monkeypatch.setattr(infogan, "LOG_EVERY", 4)
    Clock(monkeypatch)
    for steps in (12, 16):
        train(faces, out, "--max-steps", steps)
    with open(out / "log.csv", newline="") as file:
        told = [float(row["told_apart"]) for row in csv.DictReader(file)]
    assert told == [1.0, 0.625, 0.5, 0.5]
    (real, drawn), *_ = seen
    assert real.shape == drawn.shape == (600, 3, 16, 16) and seen[1][0].equal(real)
    assert not seen[1][1].equal(drawn)


def test_an_error_has_a_line_of_its_own_in_a_terminal(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(infogan, "d_loss", lambda *d: torch.tensor(math.nan))
    train(faces, tmp_path / "run", "--max-steps", 20, "--epochs", 10**5, code=1)
    assert told_at_the_end(capsys).startswith("infogan.py: step 16: loss_D is nan")


def test_a_grid_is_drawn_in_parts_no_larger_than_a_batch(tmp_path, monkeypatch):
    at_once, real = set(), Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda G, x: (at_once.add(len(x)), real(G, x))[1])
    train(few_pictures(tmp_path / "few"), tmp_path / "run", "--max-steps", 1, "--batch-size", 3)
    assert max(at_once) == 3


class NotebookStream(io.StringIO):
    """As in a notebook: it has letters of any kind, and nothing to set."""

    reconfigure = property()


@pytest.mark.parametrize("kind", [NotebookStream, type(None), "closed"])
def test_any_streams_or_none_are_no_reason_to_stop(tmp_path, monkeypatch, kind):
    few = few_pictures(tmp_path / "few")
    for name in ("stdout", "stderr"):
        stream = io.StringIO() if kind == "closed" else kind()
        if kind == "closed":
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    flags = tiny(few, tmp_path / "run", "--max-steps", 1)
    with pytest.raises(SystemExit) as ended:
        infogan.as_program(lambda: infogan.main(flags))
    assert ended.value.code == 0 and step_of(tmp_path / "run") == 1


def test_another_program_without_streams_trains(tmp_path, monkeypatch):
    """As a service that calls main() by itself."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    train(few_pictures(tmp_path / "few"), tmp_path / "run", "--max-steps", 1)


# flags --------------------------------------------------------------------------------------------


THIRD = "--n-cat 10 --n-cont 20 --epochs 360"
DEFAULTS = [  # flags, and what args then are
    ("", {"n_cat": 1, "cat_dim": 10, "n_cont": 2, "z_dim": 100, "lam_cat": 1.0, "lam_cont": 0.3,
          "q_augment": 0.0, "lam_identity": 2.0, "data": "data/anime", "epochs": 150, "seed": 0,
          "out": "checkpoint/cat1-cont2", "lr_g": 2e-4, "lr_d": 2e-4, "upsample": "nearest",
          "shift": 0.125, "crop": "centre", "cuda_graph": "auto", "cap_cont": 3.0, "cont_at": 8}),
    (THIRD, {"out": "checkpoint/cat10-cont20", "epochs": 360, "batch_size": 128, "image_size": 64,
             "width": 64, "lam_cat": 1.0, "lam_cont": 0.15, "cap_cont": 1.4, "lam_identity": 2.0,
             "q_augment": 0.0, "r1": 0.3, "r1_from": 0, "info_to": "trunk", "ema": 0.03,
             "flip": True}),
    ("--data mnist", {"lr_g": 1e-3, "lr_d": 2e-4, "q_augment": 1.0, "width": 32, "z_dim": 16,
                      "image_size": 32, "flip": False, "lam_identity": 0.0, "r1": 0.1,
                      "r1_from": 0, "upsample": "transposed", "shift": 0.0}),
    ("--data mnist --lr-g 0.01", {"lr_g": 0.01, "width": 32}),
    ("--data svhn", {"flip": False, "image_size": 32, "width": 64, "r1": 0.01, "r1_from": 75}),
    ("--data svhn --r1 0.1", {"r1": 0.1, "r1_from": 0}),
    ("--recipe notebook", {"lam_cat": 1.0, "lam_cont": 0.1, "cap_cont": 3.0, "q_augment": 0.0,
                           "r1": 0.0, "lam_identity": 0.0, "info_to": "head", "ema": 0.0,
                           "flip": False, "upsample": "transposed", "shift": 0.0, "cont_at": 4}),
    (f"--recipe notebook {THIRD} --ema 0.5", {"lam_cont": 0.0, "r1": 0.0, "ema": 0.5}),
    ("--recipe notebook --data mnist", {"lr_g": 2e-4, "flip": False, "width": 64}),
    ("--init checkpoint/animefaces-v3.pt", {"n_cat": 10, "n_cont": 20, "width": 48,
                                            "lam_cont": 0.15, "out": "checkpoint/cat10-cont20"}),
]  # fmt: skip


@pytest.mark.parametrize("flags, values", DEFAULTS)
def test_defaults_follow_the_recipe_and_the_set_and_a_flag_wins(monkeypatch, flags, values):
    monkeypatch.chdir(HERE)
    args = vars(infogan.parse_args(flags.split()))
    assert {name: args[name] for name in values} == values


@pytest.mark.parametrize("flags, words", [
    ("--image-size 48", ("--image-size 48: must be one of", "64")),
    ("--channels 2", ("--channels 2: must be one of",)),
    ("--n-cat 0 --n-cont 0 --z-dim 0", ("--z-dim",)),
    ("--bogus", ("--bogus", "--help")),
    ("--data=", ("--data", "empty")),
    ("--data nowhere", ("nowhere", "make demo")),
    ("--data .", ("at least 2",)),
    ("--device tpu", ("--device tpu: not available",)),
    ("--device cpu --cuda-graph", ("--cuda-graph: needs", "CUDA")),
    ("--upsample bilinear", ("--upsample", "nearest", "transposed")),
    ("--init none.pt", ("none.pt: no such checkpoint",)),
    ("--out full --data .", ("full", "mine.csv", "another folder")),
])  # fmt: skip
def test_bad_flags_get_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.csv").write_text("precious")
    assert infogan.main(flags.split()) == 2
    said_one_line(capsys, *words)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.csv"]


def test_a_path_may_begin_with_the_home(tmp_path, monkeypatch):
    """Shells leave --out=~/run as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    run = infogan.parse_args(["--data=~/a", "--out=~/b"])
    sheets = generate.parse_args(["--ckpt=~/c", "--read=~/d"])
    paths = [run.data, run.out, sheets.ckpt, *sheets.read]
    assert paths == [str(tmp_path / name) for name in "abcd"]


@pytest.mark.parametrize("module", [infogan, generate])
def test_every_number_has_limits(module, capsys):
    needed = ["--ckpt", "x.pt"] if module is generate else []
    rows = [row for rows in module.FLAGS.values() for row in rows]
    limits = {row[0]: row[2] for row in rows if isinstance(row[2], tuple)}
    assert len(limits) >= 5
    for flag, (low, high) in limits.items():
        step = 1 if type(low) is int else 1e-6 * max(1, high)
        for value in (low - step, high + step, "x", "nan"):
            assert module.main([*needed, f"{flag}={value}"]) == 2
            said_one_line(capsys, flag, str(value).split(".")[0])


BAD_SEEDS = "3,3 5-3 x 1, -1 1-2-3 9999999999 0-99999999"
BAD_CODES = "cat0=3 cat0=-1 cat0=1.5 cat0 cont0=x cont0=nan cont0=1001 cat9=0 z=1 cat0=1,cat0=1"


@pytest.mark.parametrize("flags, words", [
    ("--codes cat7", ("cat7", "cat0, cat1, cont0")),
    ("--rows 0", ("--rows 0",)),
    ("--range nan 1", ("--range",)),
    ("--zoom 9", ("--zoom 9", "1 to 8")),
    ("--explorer --samples 3", ("--explorer", "--samples")),
    ("--data .", ("--data", "--versus")),
    ("--samples 3 --gif", ("--gif", "--samples", "only on sheets")),
    ("--samples 3 --rows 8", ("--rows", "--samples", "--walk")),
    ("--shrink x --codes cat0", ("--codes", "--shrink")),
    ("--explorer --steps=11", ("--steps", "--explorer")),
    ("--range 1 1", ("--range", "different")),
    ("--samples", ("--samples", "not 0")),
    ("--walk --seeds 3", ("--walk", "not 1")),
    ("--sort README.md", ("--sort", "--read takes single pictures")),
    ("--walk --out a.mp4", ("--out a.mp4", ".gif or .webp")),
    ("--seeds 1,2 --rows 3", ("--seeds", "--rows")),
    ("--samples 3 --seeds 1,2", ("--seeds", "--samples")),
    ("--seeds 1,2 --seed 0", ("--seeds", "--seed,")),
    *((f"--seeds {bad}", (f"--seeds {bad}",)) for bad in BAD_SEEDS.split()),
    *((f"--set {bad}", ("--set", re.split("[=,]", bad)[0])) for bad in BAD_CODES.split()),
])  # fmt: skip
def test_bad_flags_of_generate_get_one_line(ckpt, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(HERE)
    assert generate.main(["--ckpt", str(ckpt), *flags.split()]) == 2
    said_one_line(capsys, *words)
