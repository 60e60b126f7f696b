"""Proof that infogan.py does what it says: on the CPU, with no network.

python -m pytest -q test_infogan.py    these tests; data/test_*.py have those of the other files
make torture                           the long ones, of data/test_torture.py
"""

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
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

# before torch is loaded, and for all processes that tests start: in nets this small, threads of
# several processes on the same cores only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import draw_faces
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageColor, ImageOps, features
from pytest import approx, fixture, mark, raises, skip
from torch.utils._pytree import tree_map

import generate
import infogan
from infogan import Codes, CodeSpec, Discriminator, Generator, QOutput, UserError, load_checkpoint

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Decoded pictures go here, also by the processes that tests start, not into the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp())
    return tmp_path_factory.getbasetemp() / "infogan"


@fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """600 drawn faces of 32x32."""
    folder = tmp_path_factory.getbasetemp() / "faces"
    if not folder.exists():  # pytest asks for what is imported again in every file
        assert draw_faces.main([str(folder), "--n", "600", "--size", "32", "--workers", "1"]) == 0
    return folder


TINY = ["--image-size", "16", "--width", "4", "--batch-size", "32", "--n-cat", "2"]
TINY += ["--cat-dim", "3", "--device", "cpu"]  # where the same command gives the same bits
EACH = "--save-every 1 --sample-every 1"


def tiny(faces: Path, out: Path, *more: object) -> list[str]:
    """A run of a few seconds: 18 steps an epoch. What begins with -- may be several flags."""
    flags = [flag.split() if flag.startswith("--") else [flag] for flag in map(str, more)]
    return [*TINY, "--data", str(faces), "--out", str(out), *sum(flags, [])]


def train(faces: Path, out: Path, *more: object, code: int = 0) -> None:
    """A tiny run that ends with this exit code."""
    ended = infogan.main(tiny(faces, out, *more))
    if ended > max(code, 128):  # by a signal that was for the tests
        raise KeyboardInterrupt
    assert ended == code


@fixture
def run_to(faces, out):
    """Trains up to this step in the test's folder, where a later call goes on."""
    return lambda step, *more, **how: train(faces, out, "--max-steps", step, *more, **how)


change_for_good = partial(setattr, infogan)  # in a process of its own


def before_steps(do, change=change_for_good) -> None:
    """do(how many steps were taken) comes before each."""
    real_step = infogan.train_step
    change("train_step", lambda state, *a: (do(state.step), real_step(state, *a))[1])


def told_at_the_end(capsys) -> str:
    """The one line of stderr by the program itself, beside its progress."""
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("infogan.py: ")]
    assert "Traceback" not in said
    return line


def tiny_state(*flags: str, device: str = "cpu") -> tuple[infogan.State, Namespace]:
    args = infogan.parse_args([*TINY, "--channels", "3", "--no-amp", *" ".join(flags).split()])
    return infogan.new_state(args, torch.device(device)), args


def tiny_batch(state: infogan.State, args: Namespace, seed: int = 1) -> infogan.Batch:
    """Noise for the state's step, on its device."""
    rng = seeded(seed)
    x, codes = torch.rand(8, 3, 16, 16, generator=rng) * 2 - 1, state.spec.sample(8, rng)
    u = torch.rand(8, infogan.N_U, generator=rng)
    numbers = float(infogan.max_shift_at(state, args)), infogan.beta_at(state, args)
    batch = infogan.Batch(x, codes, u, *map(torch.tensor, numbers))
    return tree_map(lambda t: t.to(state.device), batch)


def step_on(state: infogan.State, args: Namespace, seed: int = 1) -> dict:
    return infogan.train_step(state, args, tiny_batch(state, args, seed))


def stepped(*flags: str, **begin: int) -> infogan.State:
    """A tiny state after one step; begin: what it is to have before, such as step=9."""
    state, args = tiny_state(*flags)
    vars(state).update(begin)
    step_on(state, args)
    return state


@fixture
def printed(capsys):
    """printed() is what was printed since it was called last, but for stderr."""
    return lambda: capsys.readouterr().out


@fixture
def change(monkeypatch):
    """change(name, value) changes something of infogan until the test ends."""
    return partial(monkeypatch.setattr, infogan)


@fixture
def out(tmp_path) -> Path:
    """The folder of a run, which is not there yet."""
    return tmp_path / "run"


def load(folder: object, size: int = 16, *more: int, **how: object) -> infogan.Pictures:
    return infogan.load_pictures(str(folder), size, *more, **how)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def augmented(x: torch.Tensor, strength: float) -> torch.Tensor:
    return infogan.augment(x, torch.rand(len(x), 8, generator=seeded()), strength)


@fixture(scope="session")
def trained(faces, tmp_path_factory) -> Path:
    """A finished run of 3 epochs of 18 steps, each epoch kept and drawn. Tests copy it."""
    out = tmp_path_factory.getbasetemp() / "trained"
    if not out.exists():
        train(faces, out, EACH, "--epochs 3")
    return out


def copied(trained: Path, out: Path, epochs: int = 3) -> Path:
    """A copy of trained as it was after so many epochs, but for files that a resume renews."""
    shutil.copytree(trained, out, dirs_exist_ok=True)
    shutil.copy(out / f"epoch_{epochs:04d}.pt", out / "last.pt")
    return out


@fixture(scope="session")
def ckpt(faces, tmp_path_factory) -> Path:
    """Of a run of three steps with three continuous codes."""
    out = tmp_path_factory.getbasetemp() / "few steps"
    if not out.exists():
        train(faces, out, "--max-steps 3 --n-cont 3")
    return out / "last.pt"


def rewritten(ckpt: Path, where: Path, change) -> Path:
    """A copy of a checkpoint after change(what it holds)."""
    held = torch.load(ckpt, weights_only=True)
    change(held)
    torch.save(held, where)
    return where


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint or a run."""
    ckpt = load_checkpoint(path)
    return {f"{net}.{k}": v for net in ("G", "G_ema", "D") for k, v in ckpt[net].items()}


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def logged(out: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv."""
    return [*csv.DictReader((out / "log.csv").read_text().splitlines())]


def unchanged(whole: Path, other: Path) -> None:
    """Two runs leave the same.

    The weights bit for bit, each logged step once and in order, every grid, no temporary file.
    """
    assert same(whole, other)

    def left(out: Path) -> tuple:
        rows = [{**row, "minutes": ""} for row in logged(out)]
        files = {p.relative_to(out) for p in out.rglob("*") if "tfevents" not in p.name}
        grids = sorted(out.glob("samples/[er]*.png"))  # not last.png: it tells the minutes
        return rows, files, [path.read_bytes() for path in grids]

    assert left(whole) == left(other)


def step_of(out: Path) -> int:
    return load_checkpoint(out)["step"]


def table(text: str) -> list[list[str]]:
    """Its rows, a line each, with | between the columns."""
    return [line.strip().split(" | ") for line in text.strip().splitlines()]


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def four_pictures(folder: Path, start: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(start, start + 4):
        Image.new("RGB", (9, 9), (i, i, 99)).save(folder / f"{i}.png")
    return folder


@fixture(autouse=True)
def settings_stay():
    """What a test changes in this process is not there in the next."""
    precision, search = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    threads, handlers = torch.get_num_threads(), [*map(signal.getsignal, infogan.SIGNALS)]
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = search
    torch.set_num_threads(threads)
    for number, handler in zip(infogan.SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def few_pictures(folder: Path, n: int = 5, mode: str = "RGB") -> Path:
    """n pictures of 16x16, one copy of the first, and a file that is none."""
    folder.mkdir(parents=True)
    for i in range(n):
        noise = random.Random(i).randbytes(16 * 16 * len(mode))
        Image.frombytes(mode, (16, 16), noise).save(folder / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "page.jpg").write_text("<html>")
    return folder


@fixture
def few(tmp_path) -> Path:
    return few_pictures(tmp_path / "few")


@fixture
def decoded(monkeypatch) -> Mock:
    """It is called for every picture that is decoded."""
    monkeypatch.setattr(infogan, "to_square", Mock(wraps=infogan.to_square))
    return infogan.to_square


def encoded(image: Image.Image) -> dict[str, bytes]:
    """The files of a picture, by their endings."""
    files = {}
    for kind in ("jpeg", "gif", "webp", "bmp", "png"):
        image.save(buffer := io.BytesIO(), kind)
        files[kind] = buffer.getvalue()
    return files


def said_one_line(capsys, *words: str) -> str:
    """What stderr holds: one line, no traceback, with these words."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err
    return err


# processes that tests start -----------------------------------------------------------------------

unix = mark.skipif(os.name != "posix", reason="POSIX signals, limits and locks")
PATIENCE = 300  # seconds for what takes a few, on a busy machine too
ENDLESS = "--epochs 1000000 --max-minutes 5"  # a run that is to be stopped
END = []  # what ends the processes of the test that runs now


@fixture(scope="session", autouse=True)
def stopped_tests_clean_up(request):
    """SIGTERM and SIGHUP end the tests as Ctrl-C does: their processes go with them."""

    def stop(*_) -> None:
        request.session.shouldstop = "stopped"  # also where what is tested takes it for its own
        raise KeyboardInterrupt

    for number in infogan.SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    yield
    multiprocessing.forkserver._forkserver._stop()  # else it ends a moment after the tests


@fixture(autouse=True)
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
    family = [process.pid]
    for pid in family:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # it has ended meanwhile
                family += map(int, children.read_text().split())
    for pid in family:
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
        context.set_forkserver_preload(["torch.utils.tensorboard", "torch._dynamo", "test_infogan"])
        self.said = said
        self.process = context.Process(target=self.train, args=(argv, said, prepare))
        # the forkserver, which the first starts, finds what it is to load by this alone
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
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


@mark.parametrize("sizes", [(2, 5, 3, 40), (5, 30, 0, 1), (0, 2, 9, 4), (1, 7, 1, 0)])
def test_join_and_split_keep_every_code_of_any_spec(sizes):
    spec = CodeSpec(*sizes)
    codes = spec.sample(9, seeded())
    n_cat, cat_dim, n_cont, z_dim = sizes
    z, one_hot, cont = spec.join(codes).split([z_dim, n_cat * cat_dim, n_cont], 1)
    assert z.equal(codes.z) and cont.equal(codes.c_cont)
    one_hot = one_hot.reshape(9, n_cat, cat_dim)
    assert one_hot.argmax(2).equal(codes.c_cat) and (one_hot.sum(2) == 1).all()
    sigma = (spec.split(torch.randn(9, spec.q_dim) * 50).q_logvar / 2).exp()
    assert (sigma >= infogan.SIGMA_MIN * 0.999).all() and (sigma <= 1.001).all()


def test_codes_have_the_distributions_of_the_paper():
    z, c_cat, c_cont = CodeSpec(2, 4, 3, 5).sample(4000, seeded())
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert (F.one_hot(c_cat, 4).float().mean(0) - 0.25).abs().max() < 0.03
    assert c_cont.abs().max() <= 1 and c_cont.mean(0).abs().max() < 0.04
    assert (c_cont.var(0) - 1 / 3).abs().max() < 0.02


@mark.parametrize("bad", [(65,), (1, 1), (1, 10, 257), (0, 10, 0, 0), (-1,), (1.0,), (True,)])
def test_specs_out_of_range_are_refused(bad):
    with raises(UserError):
        CodeSpec(*bad)


# networks -----------------------------------------------------------------------------------------


@mark.parametrize("size", [16, 32, 64, 128, 256])
@mark.parametrize("sizes, channels", [
    ((2, 5, 3), 1), ((0, 10, 2, 0), 3), ((1, 10, 0, 4), 3),
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
    assert len(convs) == math.log2(size) - 2 + (size >= 64)
    assert [m for m in convs if m.bias is not None] == convs[-1:]
    assert (G.maps is not None) == (sizes == (2, 5, 3)), "else the first layer takes all codes"


def test_transposed_convolutions_make_the_notebooks_networks():
    """By the first size of each convolution's weights: what one of G takes and one of D gives."""
    spec = CodeSpec(10, 10, 20)
    nets = Generator(spec, upsample="transposed", cont_at=4), Discriminator(spec)
    G, D = ([p.shape[0] for p in net.parameters() if p.dim() == 4] for net in nets)
    assert G == [220, 512, 256, 128, 64] and D == [64, 128, 256, 512, 1, 256, 140]


@mark.parametrize("size", [16, 32, 64])
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


def test_upsampling_is_nearest_neighbours_and_a_convolution():
    """In one transposed convolution."""
    conv = infogan.UpsampleConv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 8, generator=seeded()).double()
    plain = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    assert conv(x).allclose(plain)


def test_L_I_is_log_Q_and_the_entropy_of_each_code():
    """Its ceiling where Q is right and sure. Of a Q that has seen no picture it is nothing.

    A Gaussian is no uniform distribution, so a continuous code's is a little less still.
    """
    spec, of_each = CodeSpec(2, 10, 1), torch.ones(5000, 1)
    codes = spec.sample(5000, seeded())
    right = 100.0 * F.one_hot(codes.c_cat, 10)
    sure = QOutput(right, codes.c_cont, 2 * math.log(infogan.SIGMA_MIN) * of_each)
    blind = QOutput(0 * right, 0 * of_each, math.log(1 / 3) * of_each)
    of_sure, of_blind = (infogan.mutual_information(spec, q, codes).tolist() for q in (sure, blind))
    assert of_sure == approx(spec.ceilings, abs=1e-4)
    assert spec.ceilings[0] == approx(math.log(10))
    gaussian = torch.distributions.Normal(0, math.sqrt(1 / 3)).log_prob(codes.c_cont).mean()
    assert of_blind == approx([0, 0, gaussian.item() + math.log(2)], abs=1e-5)


# objective ----------------------------------------------------------------------------------------


def test_the_losses_are_those_of_the_paper():
    real, fake = (torch.randn(9, generator=seeded(s)) for s in (0, 1))
    plain = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert infogan.d_loss(real, fake).item() == approx(plain.item(), abs=1e-5)
    assert infogan.g_loss(fake).item() == approx(-fake.sigmoid().log().mean().item())


def test_G_is_paid_for_a_continuous_code_until_Q_reads_it_well_enough():
    spec, args = CodeSpec(1, 10, 2), infogan.parse_args(["--cap-cont", "1.4"])
    L_I = torch.tensor([2.0, 1.5, 1.3], requires_grad=True)
    infogan.lambda_L_I(spec, L_I, args, args.cap_cont).backward()
    assert L_I.grad.tolist() == approx([args.lam_cat, 0, args.lam_cont])


def test_identity_loss_has_its_closed_forms():
    """0 where neighbours look alike from afar, 1 less what is free where they share nothing."""
    light, colour = (1 - free for free in infogan.IDENTITY_FREE)
    apart = torch.randn(2000, 3, 4, 4, generator=seeded()).mul(0.3)
    alike = apart[::2].repeat_interleave(2, 0)
    relit = alike + apart.mean(1, keepdim=True) - alike.mean(1, keepdim=True)
    grey, expected = apart[:, :1], [(light + colour) / 2, light / 2, light]
    losses = [infogan.identity_loss(x).item() for x in (apart, relit, grey)]
    assert losses == approx(expected, abs=0.05)
    fine = torch.randn(2000, 3, 32, 32, generator=seeded(1))
    fine -= F.interpolate(F.adaptive_avg_pool2d(fine, 4), scale_factor=8)
    alike = F.interpolate(alike, scale_factor=8)
    assert infogan.identity_loss(alike + fine) == 0, "fine detail is nobody's identity"


def test_pairs_share_their_categories_and_nothing_else():
    for n in (8, 7):
        codes = CodeSpec(3, 10, 2, 4).sample(n, seeded())
        z, c_cat, c_cont = infogan.pair(codes)
        assert z.equal(codes.z) and c_cont.equal(codes.c_cont)
        assert c_cat.equal(codes.c_cat[[i - i % 2 for i in range(n)]])


def test_local_loss_is_the_share_of_the_picture_that_changes():
    x = torch.zeros(3, 3, 32, 32)
    for share, place in ((1, (0, 0)), (1 / 4, (16, 16)), (1 / 256, (30, 30))):
        y = x.clone()
        y[:, :, place[0] :, place[1] :] = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)
        assert infogan.local_loss(x, y).item() == approx(share, rel=0.1), "however strong"


def test_the_last_quarter_is_the_first_with_one_code_changed():
    for n, n_codes in ((3, 5), (1000, 5), (1000, 2)):
        codes = CodeSpec(2, 50, 3, 4).sample(n, seeded())
        varied = infogan.vary(codes, n_codes, seeded(1))
        old, new = (torch.cat([c.c_cat, c.c_cont], 1) for c in (codes, varied))
        first, rest, last = slice(n // 4), slice(n - n // 4), slice(n - n // 4, None)
        assert varied.z[last].equal(codes.z[first]) and new[rest].equal(old[rest])
        changed = new[last] != old[first]
        assert (changed.sum(1) <= 1).all() and new[last][changed].equal(old[last][changed])
        share = n / 4 / n_codes
        assert changed.sum(0).tolist() == approx([share] * n_codes + [0] * (5 - n_codes), abs=25)


def test_augmentation_moves_and_relights_each_picture_in_its_own_way():
    x = torch.full((64, 1, 32, 32), -1.0)
    x[:, :, 12:20, 12:20] = 0.5
    weak, strong = augmented(x, 1e-4), augmented(x, 1.0)
    assert weak.allclose(F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1), atol=0.02)
    assert strong.shape == x.shape and strong.abs().max() <= 1
    light = strong.amax((1, 2, 3))
    assert light.std() > 0.1
    bright = (strong > (light / 2 - 0.5)[:, None, None, None]).float()
    area = bright.sum((1, 2, 3))
    middle = (bright * torch.arange(32)).sum((1, 2, 3)) / area
    assert middle.std() > 1 and (middle.mean() - 15.5).abs() < 1 and area.std() > 10
    x.requires_grad_()
    augmented(x, 1.0).sum().backward()
    assert (x.grad != 0).any(0).any(), "L_I must reach G through the augmentation"


def test_pictures_are_shifted_by_whole_pixels_onto_grey():
    """The gradient is that of slices."""
    x = torch.rand(500, 3, 8, 8, generator=seeded()).requires_grad_()
    u = torch.rand(500, 2, generator=seeded(1))
    places, slices = (5 * u).long().tolist(), []
    for picture, (down, right) in zip(F.pad(x, [2] * 4), places, strict=True):
        slices.append(picture[:, down : down + 8, right : right + 8])
    both = infogan.shift(x, u, torch.tensor(2.0)), torch.stack(slices)
    assert both[0].equal(both[1])
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in both]
    assert gradients[0].equal(gradients[1])


def test_D_judges_shifted_pictures_and_Q_reads_categoricals_from_augmented_ones():
    """Whoever reads codes later reads pictures as they are: batch norm's averages are of these."""
    u_shift, u = torch.rand(8, 10, generator=seeded(3)).split([2, 8], 1)
    readings = []
    for strength, reach in ((0, 0.0), (0, 3.0), (1, 3.0)):
        state, args = tiny_state()
        x = tiny_batch(state, args).x
        shifted = infogan.shift(x, u_shift, torch.tensor(reach))
        d, (logits, *cont) = infogan.d_and_q(state.D, shifted, x, u, strength)
        averages = flat(b for name, b in state.D.named_buffers() if "running" in name)
        readings.append((d, logits, flat(cont), averages))
    plain, shifted, both = readings
    assert [*map(torch.equal, plain, shifted)] == [False, True, True, True]
    assert [*map(torch.equal, shifted, both)] == [True, False, True, True]


def test_shifts_grow_with_the_epochs_and_can_be_turned_off():
    reach = []
    for shift in ("0.25", "0"):
        state, args = tiny_state("--shift", shift)
        state.per_epoch = 10
        for state.step in (0, 99, 100, 200, 399, 400, 10_000):
            reach.append(infogan.max_shift_at(state, args))
    assert reach == [0, 0, 1, 2, 3, 4, 4, *[0] * 7]
    flags, ends = "--r1 0 --lam-identity 0 --shift", []
    for step, shift in ((0, "0.25"), (4000, "0.25"), (4000, "0")):
        ends.append(flat(stepped(flags, shift, step=step).D.parameters()))
    assert ends[0].equal(ends[2]) and not ends[1].equal(ends[2])


def test_beyond_their_edges_augmented_pictures_go_on():
    """What is of one colour stays so. bfloat16 is too coarse for places, so they are float32."""
    x = torch.rand(6, 3, 32, 32, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        coarse = augmented(x, 1.0)
    assert coarse.equal(augmented(x, 1.0))
    plain = augmented(x[..., :1, :1].expand_as(x), 1.0)
    assert plain.allclose(plain[..., :1, :1], atol=1e-5)


# step ---------------------------------------------------------------------------------------------


@mark.parametrize("recipe", ["default", "notebook"])
@mark.parametrize("n_cont", [2, 20])
def test_every_codes_L_I_reaches_G_but_where_the_notebook_forgot_it(recipe, n_cont):
    """Of 20 continuous codes the notebook computed the loss and never added it.

    G's gradient must change when Q's reading of any one code is turned round. D does not learn
    here: what L_I teaches the trunk would reach G too.
    """
    flags = f"--recipe {recipe} --n-cont {n_cont} --lr-d 0 --lam-identity 0"
    rows, gradients = [None, 0, 3, *range(6, 6 + n_cont)], []  # the first of each code in Q's head
    for row in rows:
        state, args = tiny_state(flags)
        if row is not None:
            state.D.q_head[3].weight.data[row] *= -1
        step_on(state, args)
        gradients.append(flat(p.grad for p in state.G.parameters()))
    reached = [not g.equal(gradients[0]) for g in gradients[1:]]
    forgotten = n_cont == 20 and recipe == "notebook"
    assert reached == [True] * 2 + [not forgotten] * n_cont


def test_real_pictures_keep_their_categories():
    """All is kept where Q is sure of each picture and its copy, nothing where it knows nothing."""
    sure = 100.0 * F.one_hot(torch.arange(20).view(10, 2) % 4, 4)
    for logits, kept in ((sure, 2 * math.log(2)), (0 * sure, 0.0)):
        assert infogan.kept_categories(logits, logits).item() == approx(kept, abs=1e-3)
    forgotten = sure[torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 0, 1])]  # of half of the pictures
    assert infogan.kept_categories(sure, forgotten).item() < 0.1


def test_keeping_real_categories_trains_Q_on_real_pictures_alone():
    """L_I left out, Q learns nothing but this: its head moves, and only with the weight."""
    moved = []
    for weight in ("0", "1"):
        state, args = tiny_state("--lam-cat 0 --lam-cont 0 --lam-real", weight)
        before = state.D.q_head[0].weight.detach().clone()
        step_on(state, args)
        moved.append(not state.D.q_head[0].weight.equal(before))
    assert moved == [False, True]


@mark.parametrize("flag", ["--lam-identity", "--lam-local", "--local-to cat --lam-local"])
@mark.parametrize("known", [False, True])
def test_losses_of_what_changes_move_G_once_Q_reads_categories(known, flag):
    """The less Q reads, the less they count: before that G has nothing to tell identities by."""
    ends = []
    for lam in "05":
        state, args = tiny_state(*flag.split(), lam)
        if known:  # Q that is sure of what G was told
            c_cat, real = tiny_batch(state, args).codes.c_cat, state.D.q_output
            sure = F.one_hot(c_cat, 3).float() * 50
            state.D.q_output = lambda h, sure=sure, real=real: real(h)._replace(q_logits=sure)
        step_on(state, args)
        ends.append(flat(p.grad for p in state.G.parameters()))
    change = (ends[0] - ends[1]).norm() / ends[0].norm()
    assert (change > 0.1) == known, change


@mark.parametrize("info_to", ["trunk", "head"])
def test_a_step_moves_what_it_owns(info_to):
    """Q's head learns at the rate of what L_I is to move: the trunk, which is D's, or G alone."""
    state, args = tiny_state("--info-to", info_to)
    parameters = [*state.G.parameters(), *state.D.parameters()]
    before = [p.detach().clone() for p in parameters]
    step_on(state, args)
    assert not any(map(torch.equal, parameters, before))

    def ends(net: str, flag: str) -> list[torch.Tensor]:
        states = (stepped("--info-to", info_to, flag, value) for value in "01")
        return [flat(getattr(state.D, net).parameters()) for state in states]

    assert torch.equal(*ends("trunk", "--lam-cat")) == (info_to == "head")
    assert torch.equal(*ends("q_head", "--lr-g")) == (info_to == "trunk")


def test_r1_is_the_squared_slope_and_comes_lazily():
    x = torch.randn(5, 3, 4, 4, generator=seeded()).requires_grad_()
    w = torch.randn(3, 4, 4, generator=seeded(1))
    assert infogan.r1_penalty((x * w).sum((1, 2, 3)), x).allclose(w.square().sum() / 2)
    ends = [flat(stepped("--r1", r1).D.parameters()) for r1 in "05"]
    assert not ends[0].equal(ends[1])

    comes = []
    for flags, steps in (
        ("--r1 5", (0, 1, 8, 16)),
        ("", (0, 74 * 16, 75 * 16)),  # the default of 16x16
        ("--r1 5 --r1-from 2", (16, 32)),
    ):
        state, args = tiny_state(flags)
        state.per_epoch = 16
        for state.step in steps:
            comes.append(int(infogan.variant(state, args)[0]))
    assert comes == [1, 0, 0, 1, 0, 0, 1, 0, 1]


def test_the_average_of_G_takes_in_its_batch_statistics():
    state, _ = tiny_state()
    for t in state.G.state_dict().values():
        t.fill_(3)
    before = {name: t.clone() for name, t in state.G_ema.state_dict().items()}
    infogan.update_ema(state.G_ema, state.G, torch.tensor(0.9))
    for name, average in state.G_ema.state_dict().items():
        whole = name.endswith("num_batches_tracked")
        assert average.allclose(torch.tensor(3) if whole else 0.9 * before[name] + 0.3), name


def test_the_average_lasts_a_share_of_the_run():
    state, args = tiny_state("--ema 0.5")
    old = flat(state.G_ema.parameters())
    state.step = 9  # after the tenth step the half-life is five steps
    step_on(state, args)
    now, G = flat(state.G_ema.parameters()), flat(state.G.parameters())
    assert now.allclose(0.5**0.2 * old + (1 - 0.5**0.2) * G) and not G.allclose(old)


def test_bfloat16_is_for_convolutions_alone_and_follows_float32():
    """Losses, L_I and R1 are float32, and eight steps go almost the same way."""
    layers, moves = {}, []
    for amp in ("--no-amp", "--amp"):
        state, args = tiny_state("--r1 1", amp)
        nets = torch.nn.ModuleList([state.G, state.D])
        before, seen = flat(nets.parameters()), layers.setdefault(amp, set())
        for m in nets.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                m.register_forward_hook(lambda m, x, y, seen=seen: seen.add(y.dtype))
        for i in range(8):
            metrics = step_on(state, args, i)
            assert {value.dtype for value in metrics.values()} == {torch.float32}
        moves.append(flat(nets.parameters()) - before)
    assert layers == {"--no-amp": {torch.float32}, "--amp": {torch.bfloat16}}
    assert 0.9 < F.cosine_similarity(*moves, dim=0) < 1


# pictures -----------------------------------------------------------------------------------------


WIDE = ImageOps.expand(Image.new("RGB", (16, 16), "blue"), (24, 0), "green")


RED = Image.new("RGB", (40, 30), "red")


CLEAR = (0, 0, 0, 0)


@mark.parametrize("image, colour", [
    (RED, "red"), (RED.convert("CMYK"), "red"), (RED.quantize(4), "red"), (WIDE, "blue"),
    (Image.new("RGBA", (16, 16), CLEAR), "white"), (Image.new("LA", (16, 16), CLEAR[:2]), "white"),
    (Image.new("I;16", (16, 16), 128 * 257), "#808080"), (Image.new("L", (16, 16), 77), "#4d4d4d"),
])  # fmt: skip
def test_every_mode_has_its_colours_on_white_and_cropped_at_the_centre(image, colour):
    seen = infogan.to_square(image, 16, 3, "centre")
    assert seen.size == (16, 16) and seen.getcolors() == [(256, ImageColor.getrgb(colour))]


def portraits(folder: Path, tall: int, square: int = 0) -> Path:
    """Pictures of 20x30, white in the upper third and black below, and squares."""
    folder.mkdir()
    for i in range(tall + square):
        image = Image.new("RGB", (20, 30 if i < tall else 20), (0, 0, i))
        image.paste("white", (0, 0, 20, 10))
        image.save(folder / f"{i}.png")
    return folder


def test_crop_top_keeps_the_upper_part_of_tall_pictures(tmp_path, out):
    folder = portraits(tmp_path / "set", 3)
    WIDE.save(folder / "wide.png")
    centre, top = (load(folder, crop=crop) for crop in infogan.CROPS)
    rows = [int((pictures.x[0, :, 0, 0] > 128).sum()) for pictures in (centre, top)]
    assert rows == [4, 8]  # of 16, as 5 and 10 of 20
    assert top.x[-1].equal(centre.x[-1])
    turned = Image.open(folder / "0.png").rotate(180)
    turned.getexif()[0x0112] = 3  # upside down
    assert infogan.to_square(turned, 16, 3, "top").tobytes() == bytes(top.x[0].flatten())
    train(folder, out, "--max-steps 1 --crop top")
    held = load_checkpoint(out)
    assert held["fingerprint"] == top.fingerprint != centre.fingerprint


@mark.parametrize(("tall", "square", "is_told"), [(2, 17, True), (2, 18, False)])
def test_that_much_is_cropped_is_told_at_each_start(tmp_path, printed, tall, square, is_told):
    folder = portraits(tmp_path / "set", tall, square)
    shutil.copy(folder / "0.png", folder / "copy.png")
    for crop in ("centre", "centre", "top"):
        load(folder, crop=crop)
        said = printed()
        told = "\n2 of them lose a third" in said and "--crop top" in said
        assert told == (is_told and crop == "centre")


def put_rubbish(folder: Path) -> int:
    """Files that are no usable pictures, one of each kind; returns how many."""
    folder.mkdir()
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    for kind, raw in encoded(noise).items():
        (folder / f"cut.{kind}").write_bytes(raw[: len(raw) // 2])
    (folder / "new\nline.png").write_bytes(raw[:99])
    (folder / "zero.png").touch()
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    Image.new("L", (9460, 9460)).save(folder / "bomb.png")  # decodes, and is too large
    if os.name == "posix":
        (folder / os.fsdecode(b"sur\xffrogate.jpg")).write_bytes(b"no")
        for link, target in table("""
            broken.png | nowhere.png
            loop.png | loop.png
            round | .
            device.jpg | /dev/zero"""):  # fmt: skip
            (folder / link).symlink_to(target)
        os.mkfifo(folder / "pipe.png")
    return sum(p.suffix != "" for p in folder.iterdir())


def test_rubbish_among_pictures_is_told_and_the_rest_trains(tmp_path, out, capsys, change):
    folder = tmp_path / "data \u00e9"
    bad = put_rubbish(folder)
    train(folder, out, code=2)
    said_one_line(capsys, "0 pictures", f"skipped: {bad} (", ", ...), at least 2")
    assert not out.exists()

    odd = {"a b.png": (1, 1), "tall.png": (1, 20_000), "long.png": (20_000, 1), "c\nd.png": (9, 9)}
    for i, (name, size) in enumerate(odd.items()):
        Image.new("RGB", size, (60 * i, 0, 0)).save(folder / name)
    gone, real = folder / "gone.png", infogan.find_pictures
    gone.touch()
    change("find_pictures", lambda *a: (real(*a), gone.unlink())[0])
    train(folder, out, "--max-steps 2")
    told = capsys.readouterr().out
    assert f"4 pictures in {folder}" in told and f"unreadable files skipped: {bad + 1} (" in told
    assert (
        "bomb.png (DecompressionBombWarning)" in told and "broken.png (FileNotFoundError)" in told
    )


@mark.parametrize("data, words", table("""
    none | no such folder
    one | 0 pictures
    mnist | torchvision cannot get it
    fashion-mnist | torchvision cannot get it
    svhn | torchvision cannot get it"""))  # fmt: skip
def test_what_is_wrong_with_pictures_names_the_set(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: 1 / 0)
    (tmp_path / "one").mkdir()
    with raises(UserError, match=f"{data}: {words}"):
        load(data)


@mark.parametrize("levels, size, words", [
    (range(14), 16, "14 levels of brightness"), (range(256), 16, ""),
    ([254], 16, "a standard deviation of 0."), ([0, 255], 16, "2 levels"),
    (range(256), 32, "at most 16"),
])  # fmt: skip
def test_a_set_that_looks_empty_is_told(tmp_path, printed, levels, size, words):
    for i in range(4):
        shape = 16, 16 + 2 * i  # as no two files may be the same
        pixels = random.Random(i).choices(levels, k=math.prod(shape))
        Image.frombytes("L", shape, bytes(pixels)).save(tmp_path / f"{i}.png")
    for _ in range(2):  # from the cache as well
        load(tmp_path, size)
        told = printed().splitlines()[1:]
        assert len(told) == bool(words) and all(words in line for line in told), told


@mark.parametrize("suffix, words", table("""
    .zip | python -m zipfile -e
    .tar.gz | python -m tarfile -e
    .npz | write each picture in
    .parquet | write each picture in"""))  # fmt: skip
def test_an_archive_in_place_of_pictures_names_the_cure(tmp_path, out, capsys, suffix, words):
    folder = tmp_path / "my faces"
    (folder / "a").mkdir(parents=True)
    archive = folder / f"a/all{suffix}"
    archive.touch()
    for data in (folder, archive):
        train(data, out, code=2)
        said = said_one_line(capsys, f"{archive}", words)
    if suffix == ".zip":  # as one pastes it
        with zipfile.ZipFile(archive, "w") as file:
            file.write(four_pictures(tmp_path / "set") / "0.png", "x.png")
        command = said.partition("unpack it: ")[2].replace("python -m", f"{sys.executable} -m")
        subprocess.run(command, shell=True, check=True)
        assert (folder / "a/all.zip-unpacked/x.png").exists()


def test_files_can_be_excluded(tmp_path, out, capsys):
    folder = four_pictures(tmp_path / "set")
    four_pictures(folder / "small", 4)
    shutil.copy(folder / "small/5.png", folder / "0_mask.png")
    train(folder, out, "--max-steps 1 --exclude *_mask.png --exclude small/*")
    said = capsys.readouterr().out
    assert "4 pictures in" in said and "4 by --exclude small/*, 1 by --exclude *_mask.png" in said
    train(folder, out, "--max-steps 2", code=2)
    assert "other pictures" in told_at_the_end(capsys)


def test_linked_folders_are_followed_once(tmp_path, printed):
    real, far = four_pictures(tmp_path / "set/z"), four_pictures(tmp_path / "far/deep", 4)
    (real.parent / "z twice").symlink_to(real)
    (real.parent / "b.png").symlink_to(far.parent)
    (far / "round").symlink_to(far.parent)
    (real / "up").symlink_to(tmp_path)  # around the set, which is not to be all of it
    four_pictures(tmp_path / "beside", 8)
    (real.parent / "unmounted").symlink_to("nowhere")
    names = load(real.parent).names
    assert "1 of no suffix\n8 pictures" in printed()
    folders = [f"{Path(name).relative_to(real.parent).parent}" for name in names]
    assert folders == ["b.png/deep"] * 4 + ["z"] * 4
    (tmp_path / "link").symlink_to(far)
    assert len(load(tmp_path / "link").x) == 4


def test_what_is_passed_over_is_told_with_the_reason(tmp_path, printed):
    folder = four_pictures(tmp_path / "set")
    hidden = [".Trash-1000", "@eaDir", "$Recycle.Bin"]
    # the last: of a run that was killed in its first minute
    marks = f"args.json log.csv, last.pt, {infogan.MARK}, codes.csv, args.json samples"
    for i, names in enumerate(marks.split(", ")):
        ours = four_pictures(folder / f"{i}/ours", 4)
        for name in names.split():
            (ours / name).touch()
    for name in hidden:
        four_pictures(folder / name, 4)
    shutil.copy(folder / "0.png", folder / "._0.png")
    for name in (".DS_Store", "a.heic", "b.HEIC", "c.txt", "nothing"):
        (folder / name).touch()
    assert len(load(folder).x) == 4
    (line, *_) = printed().splitlines()
    assert ", 2 of .heic, " in line and "DS_Store" not in line
    told = [f"folder {name}" for name in hidden] + ["1 of .txt", "1 of no suffix", "2 hidden"]
    for part in (*told, "5 folder ours (a run, or by generate.py)"):
        assert part in line, line

    for name in (*hidden, "0/ours"):  # named: used
        assert len(load(folder / name).x) == 4
    assert "folder" not in printed()


def test_all_that_pillow_reads_safely_are_pictures(tmp_path, printed):
    safe = (
        "JPEG.jfif JPEG.JPE JPEG.JPG JPEG.jpg?w=400 JPEG.jpg_large JPEG2000.jp2 TIFF.tif TIFF.tiff"
    )
    safe += " PPM.ppm TGA.tga GIF.gif WEBP.webp BMP.bmp PNG.png"
    safe += " AVIF.avif" if features.check("avif") else ""
    for i, name in enumerate(f"{safe} PNG.png~ EPS.eps PDF.pdf".split()):
        kind = name.partition(".")[0]
        Image.new("RGB", (40, 40), (9 * i, 9, 9)).save(tmp_path / f"{i}-{name}", kind)
    shutil.copy(tmp_path / f"{i - 1}-EPS.eps", tmp_path / "eps.png")
    pictures, told = load(tmp_path), printed()
    for part in ("skipped: 1", "eps.png", "1 of .png~", "1 of .eps", "1 of .pdf"):
        assert part in told, told
    for name, x in zip(pictures.names, pictures.x.int(), strict=True):
        red = 9 * int(Path(name).name.partition("-")[0])
        assert (x - torch.tensor([red, 9, 9])).abs().max() < 6, name
    assert len(pictures.names) == len(safe.split())


def test_photos_are_decoded_small_and_look_the_same(tmp_path):
    noise = Image.frombytes("RGB", (12, 8), random.Random(0).randbytes(288)).resize((1200, 800))
    noise.save(tmp_path / "x.jpg", quality=95)
    picture = infogan.read_picture(tmp_path / "x.jpg", 64, 3)
    assert picture.whole == (1200, 800) and not picture.error
    small, whole = Image.frombytes("RGB", (64, 64), picture.pixels), Image.open(tmp_path / "x.jpg")
    difference = ImageChops.difference(small, infogan.to_square(whole, 64, 3, "centre"))
    assert max(high for _, high in difference.getextrema()) < 8


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
        pictures = struct.pack(">4I", 2051, n, 28, 28) + random.Random(i).randbytes(n * 28 * 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pictures)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, n) + bytes(n))


@mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_a_named_set_that_is_there_is_used(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    put_mnist((infogan.DATA / infogan.NAMED_SETS[name][1]).parent)
    pictures = load(name, 28)
    assert pictures.names == [str(i) for i in range(20)]
    digits = random.Random(0).randbytes(20 * 28 * 28)
    assert pictures.x.shape == (20, 28, 28, 1) and pictures.x.numpy().tobytes() == digits


@mark.parametrize("raw", [None, b"", bytes(99), (2051).to_bytes(4, "big") * 9])
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


@fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """The cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/infogan"


@mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_a_second_start_decodes_nothing_and_tells_the_same(
    tmp_path, printed, decoded, mode, channels
):
    """Nor does one that asks for colour, also of a grey set."""
    folder = few_pictures(tmp_path / "faces", mode=mode)
    first, told = load(folder), printed()
    assert first.x.shape == (5, 16, 16, channels) and decoded.call_count == 6
    assert "copies dropped: 1, unreadable files skipped: 1" in told
    for asked, seen in ((None, channels), (3, 3)):
        again = load(folder, 16, asked)
        assert again.x.equal(first.x.expand(-1, -1, -1, seen))
        assert again.fingerprint == first.fingerprint and printed() == told
    assert decoded.call_count == 6
    assert load(folder, 32).x.shape == (5, 32, 32, channels)
    grey = load(folder, 16, 1).x
    assert grey.shape == (5, 16, 16, 1) and (mode == "RGB" or grey.equal(first.x))


def test_a_changed_folder_is_decoded_again_in_the_same_place(tmp_path, own_cache):
    folder, more = few_pictures(tmp_path / "faces"), few_pictures(tmp_path / "more", 7)
    seen = [load(folder)]
    (folder / "1.png").rename(folder / "9.png")
    seen.append(load(folder))
    shutil.copy(more / "6.png", folder)
    seen.append(load(folder))
    shutil.copy(more / "5.png", folder / "6.png")  # as many bytes
    os.utime(folder / "6.png", (10**9, 10**9))
    seen.append(load(folder))
    (folder / "6.png").unlink()
    seen.append(load(folder))
    assert [len(p.x) for p in seen] == [5, 5, 6, 6, 5]
    first, same_ones, *others, last = (p.fingerprint for p in seen)
    assert first == same_ones == last and len({first, *others}) == 3
    assert seen[1].x.equal(seen[4].x) and len([*own_cache.iterdir()]) == 1


DAMAGE = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "text": lambda raw: b"hello world, this is no cache",
    "another version": lambda raw: raw.replace(b"fingerprint", b"printfinger"),
}


@mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_made_anew(few, own_cache, decoded, kind):
    first = load(few)
    whole = first.x.clone()
    (file,) = own_cache.iterdir()
    raw = file.read_bytes()
    file.unlink()  # not written to in place: `first` is a view of it
    file.write_bytes(DAMAGE[kind](raw))
    assert load(few).x.equal(whole) and decoded.call_count > 6
    assert file.read_bytes() == raw and first.x.equal(whole)


def test_where_no_cache_can_be_written_one_line_names_the_cure(few, tmp_path, out, capsys, change):
    """Nothing is left, also of a disk that fills while pixels are written."""

    def decode(*args):
        args[-1](b"half a picture")
        raise OSError(errno.ENOSPC, "No space left")

    (tmp_path / "file").touch()
    for where, why in (("file", "Not a directory"), ("cache", "No space left")):
        with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path / where)):
            train(few, out, code=2)
        told = told_at_the_end(capsys)
        assert why in told and "decoded pictures must go somewhere" in told
        change("decode", decode)
    assert not out.exists() and not files_in(tmp_path / "cache")


def test_what_a_killed_start_left_in_the_cache_is_removed(few, own_cache):
    own_cache.mkdir(parents=True)
    old, new = (own_cache / f".{age}.pixels.1.part" for age in ("old", "new"))
    for part in (old, new):
        part.touch()
    os.utime(old, (10**9, 10**9))
    load(few)
    assert not old.exists() and new.exists()  # another start may be writing it


def test_a_drive_that_maps_no_files_into_memory_is_one_line(few, out, capsys, change):
    change("DECODER_VERSION", 0)  # a place of its own
    change("read_cache", lambda *_: None)
    train(few, out, code=2)
    said_one_line(capsys, ".pixels: cannot be read as it was written", "XDG_CACHE_HOME")


def cache_in(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)


@unix
def test_two_starts_at_once_share_a_cache(tmp_path):
    few, runs = few_pictures(tmp_path / "few", 60), []
    for name in "ab":
        argv = tiny(few, tmp_path / name, "--max-steps 1")
        runs.append(Run(argv, tmp_path / f"said {name}", partial(cache_in, tmp_path)))
    assert [run.end()[0] for run in runs] == [0, 0]
    assert same(tmp_path / "a", tmp_path / "b")
    assert len([*(tmp_path / "infogan").iterdir()]) == 1


# checkpoint ---------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_costs_nothing(run_to, trained, out, monkeypatch, capsys):
    last, real = copied(trained, out, 1) / "last.pt", os.fsync
    good = last.read_bytes()

    def fsync(number):
        if os.fstat(number).st_size > len(good) // 2:
            raise OSError(errno.ENOSPC, "No space left")  # which names no file
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    run_to(20, code=2)
    assert f"{last}: No space left; fix this" in told_at_the_end(capsys)
    assert last.read_bytes() == good and not list(out.rglob(".*"))


def test_a_save_that_fails_for_too_long_ends_the_run(run_to, out, change, capsys):
    """In the middle of it, at the sixth failure; what was saved stays."""
    tried, real = [], infogan.write_file

    def write_file(path, raw):
        if path.name == "last.pt":
            tried.append(path)
            if len(tried) > 1:
                raise OSError(errno.EIO, "I/O error", str(path))
        real(path, raw)

    change("write_file", write_file)
    change("SAVE_SECONDS", 0.0)  # after each step
    run_to(10**6, code=2)
    assert f"{out / 'last.pt'}: I/O error; fix this" in told_at_the_end(capsys)
    assert len(tried) == 7 and step_of(out) == 1


def test_a_folder_that_is_away_for_a_while_misses_nothing(
    run_to, tmp_path, out, monkeypatch, change, capsys
):
    """Renamed in a step before a save of log.csv and last.pt, and back three steps later."""
    away = tmp_path / "away"
    moves = {14: lambda: out.rename(away), 17: lambda: away.rename(out)}
    before_steps(lambda step: moves.get(step, int)(), change)
    change("SAVE_SECONDS", 0.0)  # after each step
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its thread would complain
    run_to(20, "--sample-every 1")
    said = capsys.readouterr().err
    assert said.count("last.pt: No such file or directory; training goes on and tries again") == 3
    assert said.count(f"No such file or directory: '{out / 'log.csv'}'; training goes on") == 1
    assert [row["step"] for row in logged(out)] == ["16"] and step_of(out) == 20
    assert not list(out.rglob(".*")) and not away.exists()


def test_a_run_that_fails_in_its_first_minute_leaves_its_log(
    run_to, out, monkeypatch, change, capsys
):
    """Nothing is saved by then; log.csv and curves.png show how it came to that.

    In a terminal the error has a line of its own.
    """
    real, calls = infogan.d_loss, itertools.count()
    lost = lambda *d: real(*d) * (math.nan if next(calls) > 10 else 1)  # noqa: E731
    change("d_loss", lost)
    change("LOG_EVERY", 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run_to(100, code=1)
    assert told_at_the_end(capsys).startswith("infogan.py: step 12: loss_D is nan")
    *_, last = rows = logged(out)
    assert [row["step"] for row in rows] == ["4", "8", "12"] and last["loss_D"] == "nan"
    assert Image.open(out / "curves.png").width == 640
    assert not (out / "last.pt").exists()


def test_the_same_command_gives_the_same_bits_and_another_seed_others(faces, tmp_path):
    """On two threads, too."""
    torch.set_num_threads(2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(faces, tmp_path / name, "--max-steps 1 --seed", seed)
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


@mark.parametrize("where, step, seen, good", [
    ("weights", 36, 36, 1), ("loss", 30, 32, 1), ("loss", 35, 36, 1), ("loss", 37, 48, 2),
])  # fmt: skip
def test_nan_stops_the_run_and_never_reaches_a_checkpoint(
    faces, trained, out, capsys, change, where, step, seen, good
):
    """Epochs end at 18 and 36, rows of log.csv at 32 and 48: whichever comes first must see it.

    In the weights after the last step before a save, where no loss shows it; or in the loss alone.
    """
    copied(trained, out, 1)
    real_step = infogan.train_step

    def poisoned(state, *rest):
        metrics = real_step(state, *rest)
        if state.step + 1 == step:
            lost = next(state.D.parameters()).data if where == "weights" else metrics["loss_D"]
            lost.fill_(math.nan)
        return metrics

    change("train_step", poisoned)
    train(faces, out, "--save-every 1", code=1)
    line = told_at_the_end(capsys)
    what = "the sum of D's weights is nan" if where == "weights" else "loss_D is nan"
    assert f"step {seen}: {what}" in line and "last.pt is the last good" in line
    assert same(out, trained / f"epoch_000{good}.pt")


def test_a_finished_run_that_is_far_off_says_so(run_to, out, capsys):
    run_to(32, "--lr-g 1 --lr-d 1 --no-amp", code=1)
    line = told_at_the_end(capsys)
    assert re.search(r"step 32: (loss_[DG]|cat\d|cont\d) is -?\d+: it has learned", line)
    assert "--lr-g" in line and step_of(out) == 32


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


HOSTILE = {
    "codes": lambda c: c["args"].update(n_cat=10**9),
    "shape": lambda c: c["args"].update(width=1024, n_cat=64, cat_dim=1000),
    "missing": lambda c: c["G_ema"].popitem(),
    "none": lambda c: c.pop("G_ema"),
    "newer": lambda c: c.update(format=99),
    "flags": lambda c: c.pop("args"),
    "object": lambda c: c["G_ema"].update(x=3),
    "vast": lambda c: c["G_ema"].update({"layers.0.weight": torch.zeros(1).expand(10**12)}),
    "attack": lambda c: c.update(args=Attack()),
}


@mark.parametrize("kind", [*HOSTILE, "pickle", "folder", "bomb"])
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


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(run_to, trained, out):
    """54 steps at once are 7 + 14 + 33, over the ends of epochs; log.csv and grids too."""
    for steps in (7, 21, 54):
        run_to(steps, EACH)
    unchanged(trained, out)


def test_the_same_pictures_under_other_names_go_on_bit_for_bit(faces, trained, tmp_path, out):
    """In other folders, in another order, one of them twice."""
    copied(trained, out, 2)
    other = tmp_path / "other"
    for i, path in enumerate(sorted(faces.glob("*.png"), reverse=True)):
        (other / str(i % 3)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / str(i % 3) / f"{i}.PNG")
    shutil.copy(path, other / "copy.png")
    (out / "samples/real.png").unlink()
    train(other, out, EACH, "--epochs 3")
    unchanged(trained, out)


def test_a_finished_run_is_left_as_it_is(faces, trained, printed):
    before = files_in(trained)
    train(faces, trained, EACH, "--epochs 3")
    assert "is finished" in printed() and files_in(trained) == before


def test_a_folder_with_logs_or_a_lone_checkpoint_becomes_a_run(run_to, trained, out, printed):
    (out / "lost+found").mkdir(parents=True)
    for name in ("log.txt", "slurm-1.out", "job.e17", "desktop.ini", "Thumbs.db", ".DS_Store"):
        (out / name).touch()
    shutil.copy(trained / "epoch_0001.pt", out / "last.pt")
    run_to(19)
    assert "last.pt, step 18" in printed() and step_of(out) == 19


@mark.parametrize("name, words", table("""
    a.png | a.png
    samples/real.png | samples
    log.csv | log.csv
    best.pt | best.pt
    last.pt | broken"""))  # fmt: skip
def test_a_folder_with_anything_else_is_refused(faces, out, capsys, name, words):
    mine = out / name
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    train(faces, out, code=2)
    assert words in told_at_the_end(capsys)
    assert files_in(out) == {mine: b"precious"}


@mark.parametrize("flags, words", table("""
    --n-cont 3 | --n-cont 2, not --n-cont 3
    --width 8 | --width 4, not --width 8
    --width 8 --allow-changes | --width 4, not --width 8
    --info-to head | --info-to trunk, not --info-to head
    --batch-size 16 | --batch-size 32, not --batch-size 16
    --data few --batch-size 16 | --batch-size
    --data few | other pictures"""))  # fmt: skip
def test_going_on_with_another_run_is_refused(
    faces, trained, few, capsys, monkeypatch, decoded, flags, words
):
    """Because of its flags before any picture is decoded."""
    monkeypatch.chdir(few.parent)
    before = files_in(trained)
    train(faces, trained, "--epochs 4", flags, code=2)
    said = said_one_line(capsys, words, "another --out starts a new run")
    assert "--allow-changes permits other pictures, --crop and --batch-size" in said
    assert files_in(trained) == before and decoded.call_count == 6 * (flags == "--data few")


def test_changes_that_are_allowed_go_on_and_what_was_passed_counts(trained, tmp_path, out):
    """Other pictures, an epoch of another length, and other rates."""
    few, last = few_pictures(tmp_path / "few", 8), copied(trained, out, 1) / "last.pt"
    rewritten(last, last, lambda c: c.update(step=25))  # in epoch 1
    flags = "--batch-size 4 --lr-g 0.01 --r1 1 --save-every 1"
    first = (out / "epoch_0001.pt").read_bytes()
    train(few, out, flags, "--allow-changes --epochs 4")
    ckpt = load_checkpoint(last)
    assert ckpt["opt_G"]["param_groups"][0]["lr"] == 0.01
    assert ckpt["step"] == 29 and ckpt["changed"] == (25, 2)  # two epochs of two steps
    assert (out / "epoch_0001.pt").read_bytes() == first
    assert load_checkpoint(out / "epoch_0003.pt")["step"] == 27
    train(few, out, flags, "--max-steps 30 --epochs 9")
    assert load_checkpoint(last)["changed"] == (25, 2)


def test_other_flags_may_change_and_are_told_as_one_types_them(run_to, trained, out, printed):
    """Not those that there were not yet when the run began."""
    last = copied(trained, out, 1) / "last.pt"
    rewritten(last, last, lambda c: c["args"].pop("lam_real"))
    flags = "--no-flip --r1 1 --lam-cat 2"
    run_to(20, flags)
    said = printed().splitlines()
    then = "--flip, not --no-flip, --lam-cat 1.0, not --lam-cat 2.0, --r1 0.01, not --r1 1.0"
    assert f"until now it had {then}, --r1-from 75, not --r1-from 0" in said
    args = load_checkpoint(out)["args"]
    assert (args["r1"], args["lam_cat"]) == (1.0, 2.0)
    for step in (20, 21):  # finished; and on
        run_to(step, flags)
        assert "until now" not in printed()


def begin(init: Path, faces: Path, *flags: object, code: int = 0) -> None:
    """A run with the weights, codes and networks of a checkpoint; no rate moves its weights."""
    argv = ["--init", init, "--data", faces, "--lr-g", 0, "--lr-d", 0, "--batch-size", 8, *flags]
    assert infogan.main([*map(str, argv)]) == code


def test_a_new_run_begins_with_another_s_weights(ckpt, faces, tmp_path, capsys, monkeypatch):
    """Codes and networks come with them, and G's average, which outlives the first step."""
    monkeypatch.chdir(tmp_path)
    before, out = Path("before"), Path("checkpoint/cat2-cont3")
    before.mkdir()
    rewritten(ckpt, before / "last.pt", lambda c: c["G_ema"]["layers.0.weight"].add_(1))
    begin(before, faces, "--n-cat", 3, "--z-dim", 7, code=2)
    said_one_line(capsys, "before", "--n-cat 2, not --n-cat 3", "--z-dim 100, not --z-dim 7")
    begin(before, faces, "--max-steps", 1)
    old, new = weights(before), weights(out)
    assert all(old[k].equal(v) for k, v in new.items() if "weight" in k and "G_ema" not in k)
    moved = (new["G_ema.layers.0.weight"] - old["G_ema.layers.0.weight"]).abs().max()
    assert 0 < moved < 0.1
    assert json.loads((out / "args.json").read_text())["init"] == "before"
    assert step_of(out) == 1

    capsys.readouterr()
    begin(ckpt, faces, "--max-steps", 3, "--out", out, code=2)  # its weights would not be taken
    said_one_line(capsys, "was trained with --init before, not --init", "another --out")
    shutil.rmtree(before)  # its codes are not known now, so neither is the run's default folder
    begin(before, faces, "--max-steps", 2, code=2)
    said_one_line(capsys, "before: no such checkpoint")
    begin(before, faces, "--max-steps", 2, "--out", out)
    assert step_of(out) == 2


def test_an_init_may_be_shrunken_and_must_fit(ckpt, faces, tmp_path, out, capsys):
    small = tmp_path / "small.pt"
    assert generate.main(["--ckpt", str(ckpt), "--shrink", str(small)]) == 0
    begin(small, faces, "--max-steps", 1, "--out", out)
    half, new = load_checkpoint(small)["G_ema"], weights(out)
    assert all(new[f"G.{k}"].equal(w.float()) for k, w in half.items() if w.dim() > 1)
    bad = rewritten(ckpt, tmp_path / "bad.pt", lambda c: c.pop("D"))
    capsys.readouterr()
    begin(bad, faces, "--out", tmp_path / "new", code=2)
    assert "--out" not in said_one_line(capsys, f"{bad}: ", "give another --init")
    assert not (tmp_path / "new").exists()


def test_a_kept_checkpoint_takes_the_place_of_a_broken_last_pt(run_to, trained, out, capsys):
    last = copied(trained, out) / "last.pt"
    last.write_bytes(last.read_bytes()[:9999])
    run_to(54, EACH, code=2)
    said_one_line(capsys, "broken, or not a checkpoint", "a copy of epoch_*.pt can take its place")
    shutil.copy(out / "epoch_0002.pt", last)
    run_to(54, EACH)
    unchanged(trained, out)
    last.unlink()  # as of a run that was killed before its first; the newest by number
    (out / "epoch_0002.pt").rename(out / "epoch_10000.pt")
    (out / "epoch_0003.pt").rename(out / "epoch_9999.pt")
    run_to(54, EACH)
    assert "epoch_10000.pt, step 36" in capsys.readouterr().out and same(out, trained)


def test_a_run_with_other_metrics_is_refused(faces, trained, out, capsys):
    last = copied(trained, out) / "last.pt"
    rewritten(last, last, lambda c: c.update(rows=torch.ones(2, 9)))
    train(faces, out, "--epochs 4", code=2)
    said_one_line(capsys, "training cannot go on", "another --out")


def nobody() -> None:
    os.setuid(65534)


@unix
def test_a_read_only_folder_is_one_line_and_costs_nothing(faces, trained, tmp_path, out):
    before, is_root = files_in(copied(trained, out)), os.getuid() == 0
    if is_root and not os.access(tmp_path.parent.parent, os.X_OK):
        skip("no other user may come here")
    out.chmod(0o555)
    argv, prepare = tiny(faces, out, "--epochs 4"), nobody if is_root else None
    code, told = Run(argv, tmp_path / "said", prepare).end()
    out.chmod(0o755)
    assert code == 2 and "Permission denied" in told and told.count("\n") == 1, told
    assert files_in(out) == before


@unix
def test_one_run_at_a_time_in_a_folder(run_to, trained, out, capsys):
    copied(trained, out)
    with infogan.locked(out):
        run_to(55, code=2)
        said_one_line(capsys, f"--out {out}: another process is training there")
    run_to(55)
    assert not list(out.glob(".*"))


def test_a_drive_without_locks_is_told_and_used(out, monkeypatch, printed):
    no_locks = Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    monkeypatch.setattr(infogan.FileLock, "acquire", no_locks)
    with infogan.locked(out):
        assert out.exists()
    said = printed()
    assert said.count("\n") == 1 and f"{out}: cannot be locked" in said


def signals_in_a_step(number: signal.Signals, times: int, *change) -> None:
    """They come in the sixth step."""
    signals = [number] * times
    before_steps(lambda step: step == 5 and [*map(signal.raise_signal, signals)], *change)


@unix
@mark.parametrize("times, number", [
    *((1, number) for number in infogan.SIGNALS),
    *((2, number) for number in infogan.SIGNALS[3:]),  # batch systems repeat theirs
])  # fmt: skip
def test_a_signal_ends_the_step_saves_and_leaves(faces, out, capsys, change, times, number):
    signal.signal(number, signal.default_int_handler)  # where it is ignored, as in the background
    signals_in_a_step(number, times, change)
    train(faces, out, ENDLESS, code=128 + number)
    said = capsys.readouterr()
    assert f"{number.name}: 6 steps" in said.out and "the same command resumes" in said.out
    assert "Traceback" not in said.err and step_of(out) == 6 and not list(out.rglob(".*"))


@unix
def test_what_nohup_ignores_is_ignored(run_to, change):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals_in_a_step(signal.SIGHUP, 1, change)
    run_to(8)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_thread_of_another_program_trains_and_leaves_signals_and_streams_alone(run_to):
    def theirs() -> list:
        return [sys.stdout, sys.stderr, *map(signal.getsignal, infogan.SIGNALS)]

    before = theirs()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run_to, 2).result()
    assert theirs() == before
    run_to(3)
    assert theirs() == before


@unix
@mark.parametrize("number", infogan.SIGNALS[:3])
def test_a_second_signal_leaves_at_once_and_saves_nothing(faces, tmp_path, out, number):
    prepare = partial(signals_in_a_step, number, 2)
    code, said = Run(tiny(faces, out, ENDLESS), tmp_path / "said", prepare).end()
    assert code == (130 if number == signal.SIGINT else -number), said
    assert ("infogan.py: stopped" in said) == (number == signal.SIGINT)
    assert "is saved" not in said and not list(out.glob("*.pt"))


# display ------------------------------------------------------------------------------------------


def test_grids_are_laid_out_in_rows():
    x = torch.randint(256, (10, 3, 4, 4), generator=seeded()) / 127.5 - 1
    expected = torch.full((3, 14, 50), -1.0)
    for i, picture in enumerate(x):
        top, left = 2 + 6 * (i // 8), 2 + 6 * (i % 8)
        expected[:, top : top + 4, left : left + 4] = picture
    assert infogan.make_grid(x).tobytes() == infogan.to_image(expected).tobytes()
    image = infogan.to_image(torch.tensor([-1.0, 0.0, 1.0, 9.0]).expand(3, 1, 4))
    assert [image.getpixel((i, 0)) for i in range(4)] == [(v,) * 3 for v in (0, 128, 255, 255)]


@mark.parametrize("size, epochs", [
    ((274, 274), [0, 999, 9995, 10_000]), ((1042, 40), range(0, 500, 5)),
])  # fmt: skip
def test_the_animation_names_each_epoch_and_rests_on_the_last(out, size, epochs):
    """Of a long run it has 60, the first and the last among them."""
    (out / "samples").mkdir(parents=True)
    shades = [240 * i // len(epochs) for i in range(len(epochs))]
    for epoch, shade in zip(epochs, shades, strict=True):
        Image.new("L", size, shade).save(out / f"samples/epoch_{epoch:04d}.png")
    infogan.save_animation(out)
    loop = Image.open(out / "training.gif")
    assert loop.n_frames == min(len(epochs), 60) and loop.width == 530
    for i, duration in (0, 250), (1, 250), (-1, 2000):
        loop.seek(i % loop.n_frames)
        shown = loop.convert("L")
        assert shown.getpixel((270, 44)) == approx(shades[i], abs=3)
        assert loop.info["duration"] == duration
        assert ImageChops.invert(shown.crop((0, 0, 530, 28))).getbbox()


def test_a_run_leaves_checkpoints_grids_a_log_and_its_flags(trained):
    assert {p.name for p in trained.iterdir() if "tfevents" not in p.name} == {
        "args.json", "curves.png", "last.pt", "log.csv", "samples", "training.gif",
        *(f"epoch_000{i}.pt" for i in (1, 2, 3))}  # fmt: skip
    assert {p.name for p in (trained / "samples").iterdir()} == {
        "real.png", "last.png", *(f"epoch_000{i}.png" for i in range(4))}  # fmt: skip
    ckpt, rows = load_checkpoint(trained), logged(trained)
    assert ckpt["step"] == 54 and ckpt["args"] == json.loads((trained / "args.json").read_text())
    assert [row["step"] for row in rows] == ["16", "32", "48"]
    assert {"loss_D", "D_fake", "cat1", "cont1"} <= rows[0].keys()


def test_training_goes_on_without_what_it_can_do_without(run_to, out, monkeypatch, change, capsys):
    """Each is told once.

    log.csv and the first kept checkpoint, held by a program for a while; pictures; TensorBoard.
    """
    real_replace, saves = os.replace, []

    def replace(part, path):
        is_log = path.name == "log.csv"
        saves.extend([path] * is_log)
        held = is_log and len(saves) in (2, 3) or path.name == "epoch_0001.pt"
        if held or path.suffix in (".png", ".gif"):
            raise PermissionError(13, "Access is denied")
        real_replace(part, path)

    change("SAVE_SECONDS", 0.0)  # after each step
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run_to(48, EACH)
    said = [line for line in capsys.readouterr().err.splitlines() if "training goes on" in line]
    names = "log.csv", "epoch_0001.pt", "curves.png", "samples/real.png"
    for words in ("TensorBoard: ", *(f"denied: '{out / name}'" for name in names)):
        assert sum(words in line for line in said) == 1, said
    assert len(said) == 5, said  # without a grid there is no animation
    assert [row["step"] for row in logged(out)] == ["16", "32", "48"]
    assert step_of(out) == 48 and not list(out.rglob(".*"))
    assert [path.name for path in out.glob("epoch*")] == ["epoch_0002.pt"]


# loop ---------------------------------------------------------------------------------------------


def test_devices_that_are_not_here_are_refused(monkeypatch):
    """Those that are here: data/test_device.py."""
    for name in ("cuda:99", "cuda:x", "auto:0", "tpu", "meta", "cud"):
        with raises(UserError, match=f"--device {name}: .*; use --device cpu"):
            infogan.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert infogan.pick_device("auto").type in ("cpu", "mps")


def test_what_one_looks_at_is_renewed_while_a_run_trains(tmp_path, out, change, printed):
    """30 epochs of two steps of 7 seconds, with 100 seconds between two grids at least.

    Grids come each five epochs then, and at early ones; the newest one within an epoch too.
    """
    clock, seen, real = Clock(change), {}, infogan.save_picture

    def save_picture(path, *how, **options):
        seen.setdefault(path.name, []).append(clock.seconds / 7)
        real(path, *how, **options)

    change("save_picture", save_picture)
    change("SHOW_SECONDS", 100.0)
    train(few_pictures(tmp_path / "few", 8), out, "--batch-size 4 --epochs 30")
    grids = {int(path.stem[6:]) for path in out.glob("samples/epoch_*")}
    assert grids == {0, 1, 2, 5, 10, 20, 30}
    assert [path.name for path in out.glob("epoch_*")] == ["epoch_0025.pt"]
    assert seen["training.gif"] == [60] and len(seen["last.png"]) > 5
    assert Image.open(out / "samples/epoch_0001.png").width >= 512
    assert "60 steps are too few to learn from; raise --epochs" in printed()


def test_max_minutes_end_a_start_with_a_checkpoint(faces, out, capsys, change):
    change("LOG_EVERY", 1)  # so that there is something to show
    train(faces, out, "--max-minutes 0.005 --epochs", 10**6)
    said = capsys.readouterr()
    assert "time is up" in said.out and step_of(out) >= 1
    etas = re.findall(r"eta ([\d:]+)", said.err)
    assert etas and set(etas) == {"0:00:00"}, "the time ends this start long before its epochs"


def test_few_grey_pictures_and_no_codes_train_and_draw(tmp_path, printed):
    few, out = few_pictures(tmp_path / "few", mode="L"), tmp_path / "my run"
    train(few, out, "--max-steps 33 --n-cat 0 --n-cont 0")
    said = printed()
    assert "5 pictures are few: some thousands" in said
    assert "1 steps an epoch, of 5 pictures each" in said
    assert f"--ckpt '{out}/last.pt'" in said  # can be pasted
    assert step_of(out) == 33 and (out / "curves.png").exists()
    assert generate.main(["--ckpt", str(out), "--samples", "3"]) == 0
    assert Image.open(out / "generated/000002.png").mode == "L"
    assert generate.main(["--ckpt", str(out)]) == 0


def test_codes_are_learned(run_to, out):
    """On drawn faces Q reads new codes from new pictures, and nothing once they are shuffled."""
    flags = "--n-cat 1 --cat-dim 4 --n-cont 1 --width 8 --ema 0.1 --lr-g 0.001 --lr-d 0.001"
    run_to(150, f"{flags} --lam-cat 1 --lam-cont 0.5 --q-augment 0.5")
    G, spec = infogan.load_generator(out)
    codes = spec.sample(1000, seeded(1))
    with torch.no_grad():
        q = infogan.load_net(out, "D", "cpu")(G(spec.join(codes)))[1]
    L_I = infogan.mutual_information(spec, q, codes)
    shuffled = Codes(*(c.roll(1, 0) for c in codes))
    control = infogan.mutual_information(spec, q, shuffled)
    assert L_I[0] > 0.7 and L_I[1] > 0.5 and (control <= 0).all(), (L_I, control)


@unix
def test_a_closed_terminal_costs_nothing(faces, tmp_path, out):
    """As with `| tee log` and Ctrl-C, which ends tee as well: the run saves all to its end."""
    terminal = tmp_path / "pipe"
    os.mkfifo(terminal)
    run = Run(tiny(faces, out, "--max-steps 60"), terminal)
    with open(terminal, "rb") as said:
        assert any(b"img/s" in line for line in said)
    run.process.join(PATIENCE)
    assert step_of(out) == 60 and (out / "samples/last.png").exists()


class Clock:
    """Of a machine whose steps take 7 seconds; it stands still in between."""

    def __init__(self, change):
        self.seconds = 0.0
        before_steps(self.go_on, change)
        change("time", Namespace(monotonic=lambda: self.seconds))

    def go_on(self, _step: int) -> None:
        self.seconds += 7


@mark.parametrize("columns", [None, 60, 200])
def test_progress_in_a_file_is_a_line_each_half_minute(
    run_to, monkeypatch, change, capsys, columns
):
    """In a terminal it is one line, as wide as that, written over. The first comes at once."""
    Clock(change)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(columns), raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    run_to(20)
    said = capsys.readouterr().err
    epochs = re.findall(r"epoch ([\d.]+)/1.1 ", said)
    steps = range(1, 21) if columns else [1, 6, 11, 16, 20]  # 30 seconds or more later
    assert epochs == [f"{step / 18:.1f}" for step in steps]
    assert said.count("\n") == (1 if columns else 5)
    if columns:
        assert {len(line) for line in said.strip("\r\n").split("\r")} == {columns - 1}
    assert "eta 0:00:00" in said


def test_a_run_logs_how_well_its_pictures_are_told_from_real_ones(run_to, out, change):
    """After 30 seconds or more, on the average of G; a row has the newest figure, at first 1."""
    seen = []

    def tell_apart(x, y):
        seen.append((x, y))
        return 0.75 - len(seen) / 8

    change("tell_apart", tell_apart)
    change("LOG_EVERY", 4)
    Clock(change)
    for steps in (12, 16):
        run_to(steps)
    with open(out / "log.csv", newline="") as file:
        told = [float(row["told_apart"]) for row in csv.DictReader(file)]
    assert told == [1.0, 0.625, 0.5, 0.5]
    (real, drawn), *_ = seen
    assert real.shape == drawn.shape == (600, 3, 16, 16) and seen[1][0].equal(real)
    assert not seen[1][1].equal(drawn)


def test_a_grid_is_drawn_in_parts_no_larger_than_a_batch(few, out, monkeypatch):
    at_once, real = set(), Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda G, x: (at_once.add(len(x)), real(G, x))[1])
    train(few, out, "--max-steps 1 --batch-size 3")
    assert max(at_once) == 3


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class NotebookStream(io.StringIO):
    """As in a notebook: it has letters of any kind, and nothing to set."""

    reconfigure = property()


@mark.parametrize("kind, as_program", [
    (NotebookStream, True), (closed_stream, True), (type(None), True), (type(None), False),
])  # fmt: skip
def test_any_streams_or_none_are_no_reason_to_stop(few, out, monkeypatch, kind, as_program):
    """Where there are none also in another program, as in a service that calls main() by itself."""
    argv = tiny(few, out, "--max-steps 1")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, kind())
    if as_program:
        with raises(SystemExit, match="^0$"):
            infogan.as_program(lambda: infogan.main(argv))
    else:
        assert infogan.main(argv) == 0
    assert step_of(out) == 1


# flags --------------------------------------------------------------------------------------------


THIRD = "--n-cat 10 --n-cont 20 --epochs 360"
DEFAULTS = [  # flags, and what args then are
    (
        "",
        "n_cat=1 cat_dim=10 n_cont=2 z_dim=100 lam_cat=1.0 lam_cont=0.3 q_augment=0.0 seed=0 "
        "lam_identity=2.0 data=data/anime epochs=150 out=checkpoint/cat1-cont2 lr_g=0.0002 "
        "lr_d=0.0002 upsample=nearest shift=0.125 crop=centre cuda_graph=auto cap_cont=3.0 "
        "cont_at=8 lam_local=0.0",
    ),
    (
        THIRD,
        "out=checkpoint/cat10-cont20 epochs=360 batch_size=128 image_size=64 width=64 "
        "lam_cat=1.0 lam_cont=0.15 cap_cont=1.4 lam_identity=2.0 q_augment=0.0 r1=0.3 "
        "r1_from=0 info_to=trunk ema=0.03 flip=True",
    ),
    (
        "--data mnist",
        "lr_g=0.001 lr_d=0.0002 q_augment=1.0 lam_real=1.0 width=32 z_dim=16 flip=False "
        "image_size=32 lam_identity=0.0 r1=0.1 r1_from=0 upsample=transposed shift=0.0",
    ),
    ("--data svhn", "flip=False image_size=32 width=64 r1=0.01 r1_from=75"),
    ("--data svhn --r1 0.1", "r1=0.1 r1_from=0"),
    (
        "--recipe notebook",
        "lam_cat=1.0 lam_cont=0.1 cap_cont=3.0 q_augment=0.0 r1=0.0 ema=0.0 "
        "lam_identity=0.0 info_to=head flip=False upsample=transposed shift=0.0 "
        "cont_at=4",
    ),
    (f"--recipe notebook {THIRD} --ema 0.5", "lam_cont=0.0 r1=0.0 ema=0.5"),
    ("--recipe notebook --data mnist", "lr_g=0.0002 flip=False width=64"),
    (
        "--init checkpoint/animefaces-v3.pt",
        "n_cat=10 n_cont=20 width=48 lam_cont=0.15 out=checkpoint/cat10-cont20",
    ),
]


@mark.parametrize("flags, values", DEFAULTS)
def test_defaults_follow_the_recipe_and_the_set_and_a_flag_wins(monkeypatch, flags, values):
    monkeypatch.chdir(HERE)
    args = vars(infogan.parse_args(flags.split()))
    assert {*values.split()} <= {f"{name}={value}" for name, value in args.items()}


@mark.parametrize("flags, words", table("""
    --image-size 48 | --image-size 48: must be one of 64
    --bogus | --bogus --help
    --epoch 3 | unrecognized arguments: --epoch 3; see --help
    --batchsize=3 | unrecognized arguments: --batchsize=3; see --help
    --data= | --data empty
    --n-cat 0 --lam-local 4 --local-to cat | --local-to cat: there are no categorical codes
    --n-cat 0 --n-cont 0 --z-dim 0 --data . | --z-dim
    --data nowhere | nowhere: make demo
    --data . | at least 2
    --device tpu | --device tpu: use --device cpu
    --device cpu --cuda-graph | --cuda-graph: needs CUDA
    --upsample bilinear | --upsample nearest transposed"""))  # fmt: skip
def test_bad_flags_get_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert infogan.main(flags.split()) == 2
    said_one_line(capsys, *words.split())
    assert not files_in(tmp_path)


def test_a_path_may_begin_with_the_home(tmp_path, monkeypatch):
    """Shells leave --out=~/run as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    run = infogan.parse_args(["--data=~/a", "--out=~/b"])
    sheets = generate.parse_args(["--ckpt=~/c", "--read=~/d"])
    paths = [run.data, run.out, sheets.ckpt, *sheets.read]
    assert paths == [str(tmp_path / name) for name in "abcd"]


@mark.parametrize("module", [infogan, generate])
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


@mark.parametrize("flags, words", [
    *table("""
        --codes cat7 | cat7 cat0, cat1, cont0
        --cpkt last.pt | unrecognized arguments: --cpkt last.pt; see --help
        --range nan 1 | --range
        --zoom 9 | --zoom 9: from 1 to 8
        --explorer --samples 3 | --explorer and --samples: only one at a time
        --read x.png --samples 5 | --samples and --read: only one at a time
        --walk --rows 3 --onnx | --walk and --onnx: only one at a time
        --data . | --data --versus
        --samples 3 --gif | --gif --samples only on sheets
        --samples 3 --rows 8 | --rows --samples --walk
        --shrink x --codes cat0 | --codes --shrink
        --explorer --steps=11 | --steps --explorer
        --range 1 1 | --range different
        --samples | --samples not 0
        --walk --seeds 3 | --walk not 1
        --sort README.md | --sort --read takes single pictures
        --walk --out a.mp4 | --out a.mp4 .gif or .webp
        --seeds 1,2 --rows 3 | --seeds --rows
        --samples 3 --seeds 1,2 | --seeds --samples
        --seeds 1,2 --seed 0 | --seeds --seed,"""),
    *((f"--seeds {bad}", f"--seeds {bad}") for bad in BAD_SEEDS.split()),
    *((f"--set {bad}", f"--set {re.split('[=,]', bad)[0]}") for bad in BAD_CODES.split()),
])  # fmt: skip
def test_bad_flags_of_generate_get_one_line(ckpt, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(HERE)
    assert generate.main(["--ckpt", str(ckpt), *flags.split()]) == 2
    said_one_line(capsys, *words.split())
