"""Proof that infogan.py and generate.py do what they say: on the CPU, with no network.

python -m pytest -q test_infogan.py    these tests; data/test_data.py has those of data/*.py
make torture                           the same questions asked for longer: torture_*
"""

from __future__ import annotations

import argparse
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import random
import re
import runpy
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
from urllib.parse import unquote

# before torch is loaded, and for all processes that tests start: in nets this small, threads of
# several processes on the same cores only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageColor, features

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
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return infogan.cache_folder()


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """600 drawn faces of 32x32."""
    folder = tmp_path_factory.mktemp("faces")
    assert draw_faces.main([str(folder), "--n", "600", "--size", "32", "--workers", "1"]) == 0
    return folder


TINY = [
    "--image-size",
    "16",
    "--width",
    "4",
    "--batch-size",
    "32",
    "--n-cat",
    "2",
    "--cat-dim",
    "3",
]


def tiny(faces: Path, out: Path, *more: object) -> list[str]:
    """A run of a few seconds: 18 steps an epoch."""
    return [*TINY, "--data", str(faces), "--out", str(out), *map(str, more)]


def tiny_state(*flags: str) -> tuple[infogan.State, Namespace, torch.Tensor, Codes]:
    args = infogan.parse_args([*TINY, "--channels", "3", "--no-amp", *flags])
    state = infogan.new_state(args, CPU)
    x = torch.rand(8, 3, 16, 16, generator=seeded(1)) * 2 - 1
    return state, args, x, state.spec.sample(8, seeded(2))


def said_one_line(capsys, *words: str) -> str:
    """What stderr holds: one line, no traceback, with these words."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), err
    return err


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


def start(*command: object, **more: object) -> subprocess.Popen:
    """A command that ends with the test."""
    more |= {"preexec_fn": usual_signals} if os.name == "posix" else {}
    process = subprocess.Popen([*map(str, command)], cwd=HERE, **more)
    END.append(partial(kill, process))
    return process


def torchrun(script: Path, *flags: object) -> subprocess.CompletedProcess:
    """Two processes of a script."""
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start(sys.executable, *how, script, *flags, **pipes)
    said = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def wait_until(true, alive, said) -> None:
    """Fails with what said() tells when the process that must make it true has ended, or hangs."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert alive() and time.monotonic() < end, said()
        time.sleep(0.02)


def rows_of_log(out: Path) -> int:
    log = out / "log.csv"
    return len(log.read_text().splitlines()) if log.exists() else 0


class Run:
    """infogan.py in a process of its own, forked from one that has torch loaded already."""

    def __init__(self, argv: list[str], said: Path, prepare=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["infogan", "torch.utils.tensorboard"])
        self.said = said
        self.process = context.Process(target=self.train, args=(argv, said, prepare))
        self.process.start()
        END.append(self.kill)

    @staticmethod
    def train(argv: list[str], said: Path, prepare) -> None:
        with open(said, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        usual_signals()
        torch.set_num_threads(1)
        if prepare:
            prepare()
        sys.exit(infogan.main(argv))

    def wait_for(self, out: Path, rows: int = 2) -> None:
        """Until log.csv has more rows than that."""
        wait_until(lambda: rows_of_log(out) > rows, self.process.is_alive, self.said.read_text)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> tuple[int | None, str]:
        """The exit code, None of a process that does not end, and all that was printed."""
        self.process.join(PATIENCE)
        return self.process.exitcode, self.said.read_text(errors="replace")


def as_one_of_two(rank: int, port: int) -> None:
    """What torchrun tells each of its processes."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    known |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in known.items()})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_both(argv: list[str], folder: Path) -> list[Run]:
    """Two processes that train together."""
    port = free_port()
    return [Run(argv, folder / f"said {i}", partial(as_one_of_two, i, port)) for i in (0, 1)]


# codes --------------------------------------------------------------------------------------------


def test_join_and_split_keep_every_code_of_any_spec():
    rng = random.Random(0)
    for _ in range(100):
        sizes = rng.choice([0, 1, 5]), rng.choice([2, 7, 30]), rng.choice([0, 1, 9])
        spec = CodeSpec(*sizes, z_dim=rng.choice([1, 40]))
        n = rng.randint(1, 9)
        codes = spec.sample(n, seeded(rng.randrange(99)))
        joined = spec.join(codes)
        assert joined.shape == (n, spec.dim)
        z, one_hot, cont = joined.split([spec.z_dim, spec.n_cat * spec.cat_dim, spec.n_cont], 1)
        assert z.equal(codes.z) and cont.equal(codes.c_cont) and (cont.abs() <= 1).all()
        if spec.n_cat:
            one_hot = one_hot.unflatten(1, (spec.n_cat, spec.cat_dim))
            assert one_hot.argmax(2).equal(codes.c_cat) and (one_hot.sum(2) == 1).all()
        q = spec.split(torch.randn(n, spec.q_dim) * 50)
        assert q.q_logits.shape == (n, spec.n_cat, spec.cat_dim)
        assert q.q_mu.shape == q.q_logvar.shape == (n, spec.n_cont)
        sigma = (q.q_logvar / 2).exp()
        assert (sigma >= infogan.SIGMA_MIN * 0.999).all() and (sigma <= 1.001).all()
        assert len(spec.names) == len(spec.ceilings) == spec.n_cat + spec.n_cont
        assert infogan.mutual_information(spec, q, codes).shape == (len(spec.names),)


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
@pytest.mark.parametrize("channels", [1, 3])
def test_G_and_D_fit_pictures_of_every_size(size, channels):
    spec = CodeSpec(2, 5, 3)
    G, D = Generator(spec, size, 4, channels), Discriminator(spec, size, 4, channels)
    x = G(spec.join(spec.sample(2, seeded())))
    assert x.shape == (2, channels, size, size) and x.abs().max() <= 1
    d, q = D(x)
    assert d.shape == (2,) and q.q_logits.shape == (2, 2, 5) and q.q_mu.shape == (2, 3)


def test_the_default_networks_have_the_notebooks_layers():
    spec = CodeSpec(10, 10, 20)
    G, D = Generator(spec), Discriminator(spec)
    up = [m.weight.shape[:2] for m in G.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert up == [(220, 512), (512, 256), (256, 128), (128, 64), (64, 3)]
    down = [m.weight.shape[0] for m in D.trunk if isinstance(m, torch.nn.Conv2d)]
    assert down == [64, 128, 256, 512]
    assert D.d_head.weight.shape == (1, 512, 4, 4) and D.q_head[0].weight.shape == (256, 512, 4, 4)


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


@pytest.mark.parametrize("recipe", ["default", "notebook"])
def test_every_codes_loss_reaches_G(recipe):
    """The notebook computed the continuous loss and never added it: no code may be left out."""
    state, args, x, codes = tiny_state("--n-cont", "4", "--recipe", recipe)
    spec, G = state.spec, state.G
    for k, name in enumerate(spec.names):
        L_I = infogan.mutual_information(spec, state.D(G(spec.join(codes)))[1], codes)
        alone = torch.zeros_like(L_I)
        alone[k] = 1
        loss = infogan.lambda_L_I(spec, L_I * alone, args)
        grads = torch.autograd.grad(loss, [*G.parameters()])
        assert sum(g.abs().sum() for g in grads) > 0, name


@pytest.mark.parametrize("recipe", ["default", "notebook"])
def test_a_code_that_Q_misreads_changes_G_s_step(recipe):
    """train_step itself: G ends elsewhere when Q's reading of any one code is turned round."""
    ends = []
    for k in [None, *range(2 * 3 + 2 * 4)]:
        state, args, x, codes = tiny_state("--n-cont", "4", "--recipe", recipe)
        if k is not None:
            with torch.no_grad():
                state.D.q_head[3].weight[k] *= -1
        infogan.train_step(state, args, x, codes)
        ends.append(torch.cat([p.detach().flatten() for p in state.G.parameters()]))
    assert all(not end.equal(ends[0]) for end in ends[1:])


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
    spec = CodeSpec(3, 10, 2, 4)
    for n in (8, 7):
        codes = spec.sample(n, seeded())
        paired = infogan.pair(codes)
        assert paired.z.equal(codes.z) and paired.c_cont.equal(codes.c_cont)
        assert paired.c_cat.shape == codes.c_cat.shape
        for i in range(0, n - 1, 2):
            assert paired.c_cat[i].equal(paired.c_cat[i + 1])
        assert not paired.c_cat[0].equal(paired.c_cat[2])


def test_the_identity_loss_moves_G_once_Q_reads_categories():
    """The less Q reads, the less it counts: before that G has nothing to tell identities by."""
    ends = {}
    for lam in ("0", "5"):
        for known in (False, True):
            state, args, x, codes = tiny_state("--lam-identity", lam)
            if known:  # Q that is sure of what G was told
                sure = F.one_hot(codes.c_cat, 3).float() * 50
                state.D.q_output = lambda h, D=state.D, sure=sure: D.spec.split(
                    D.q_head(h)[:, : D.spec.q_dim, 0, 0].float()
                )._replace(q_logits=sure)
            infogan.train_step(state, args, x, codes)
            ends[lam, known] = torch.cat([p.detach().flatten() for p in state.G.parameters()])
    assert not ends["0", True].equal(ends["5", True])
    assert (ends["0", False] - ends["5", False]).abs().max() < 1e-5


@pytest.mark.parametrize("info_to", ["trunk", "head"])
def test_a_step_moves_what_it_owns(info_to):
    state, args, x, codes = tiny_state("--info-to", info_to)
    owners = {p: "D" for g in state.opt_D.param_groups for p in g["params"]}
    for p in (p for g in state.opt_G.param_groups for p in g["params"]):
        assert p not in owners
        owners[p] = "G"
    assert set(owners) == {*state.G.parameters(), *state.D.parameters()}
    assert {owners[p] for p in state.D.q_head.parameters()} == {"D" if info_to == "trunk" else "G"}
    assert {owners[p] for p in state.D.trunk.parameters()} == {"D"}

    before = [p.detach().clone() for p in owners]
    moved = {}
    for name, opt in (("D", state.opt_D), ("G", state.opt_G)):

        def stepped(step=opt.step, name=name):
            step()
            moved[name] = [not p.equal(b) for p, b in zip(owners, before, strict=True)]

        opt.step = stepped
    infogan.train_step(state, args, x, codes)
    assert moved["D"] == [owner == "D" for owner in owners.values()]
    assert all(moved["G"])


def test_L_I_trains_the_trunk_only_where_it_should():
    """With D's own loss taken away, the trunk moves by L_I alone, or not at all."""
    for info_to in ("trunk", "head"):
        ends = []
        for lam in ("0", "1"):
            state, args, x, codes = tiny_state("--info-to", info_to, "--lam-cat", lam)
            infogan.train_step(state, args, x, codes)
            ends.append(torch.cat([p.detach().flatten() for p in state.D.trunk.parameters()]))
        assert ends[0].equal(ends[1]) == (info_to == "head")


def test_Q_reads_only_categoricals_from_augmented_pictures():
    state, _, x, _ = tiny_state()
    D = state.D.eval()
    clean_d, clean_q = infogan.d_and_q(D, x, 0.0, seeded())
    d, q = infogan.d_and_q(D, x, 1.0, seeded())
    again = infogan.d_and_q(D, x, 1.0, seeded())[1]
    assert d.equal(clean_d) and q.q_mu.equal(clean_q.q_mu) and q.q_logvar.equal(clean_q.q_logvar)
    assert q.q_logits.equal(again.q_logits) and not q.q_logits.equal(clean_q.q_logits)
    kept = []
    for strength in (0.0, 1.0):  # whoever reads codes later reads pictures as they are
        state, _, x, _ = tiny_state()
        infogan.d_and_q(state.D, x, strength, seeded())
        kept.append(torch.cat([b for n, b in state.D.named_buffers() if "running" in n]))
    assert kept[0].equal(kept[1])


def test_augmentation_moves_and_relights_each_picture_in_its_own_way():
    x = torch.full((64, 1, 32, 32), -1.0)
    x[:, :, 12:20, 12:20] = 0.5
    weak, strong = infogan.augment(x, 1e-4, seeded()), infogan.augment(x, 1.0, seeded())
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
    infogan.augment(x, 1.0, seeded()).sum().backward()
    assert (x.grad != 0).any(0).any(), "L_I must reach G through the augmentation"


def test_beyond_their_edges_augmented_pictures_go_on(monkeypatch):
    """Bit for bit as by padding_mode="border", which not every torch has on every device."""
    x, grids = torch.rand(6, 3, 32, 32, generator=seeded()).requires_grad_(), []
    real_grid, real_sample = F.affine_grid, F.grid_sample
    monkeypatch.setattr(
        F, "affine_grid", lambda *a, **k: grids.append(real_grid(*a, **k)) or grids[0]
    )

    def sample(x, where, align_corners):
        y = real_sample(x, where, align_corners=align_corners)
        by_border = real_sample(x, grids[0], padding_mode="border", align_corners=align_corners)
        assert y.equal(by_border) and grids[0].abs().max() > 1
        some = torch.randn(y.shape, generator=seeded(1))
        slopes = [torch.autograd.grad(z, x, some, retain_graph=True)[0] for z in (y, by_border)]
        assert slopes[0].equal(slopes[1])
        return y

    monkeypatch.setattr(F, "grid_sample", sample)
    infogan.augment(x, 1.0, seeded())
    assert len(grids) == 1


def test_r1_is_the_squared_slope_and_comes_lazily():
    x = torch.randn(5, 3, 4, 4, generator=seeded()).requires_grad_()
    w = torch.randn(3, 4, 4, generator=seeded(1))
    assert infogan.r1_penalty((x * w).sum((1, 2, 3)), x).allclose(w.square().sum() / 2)
    ends = {}
    for step in (0, 1, infogan.R1_EVERY):
        for r1 in ("0", "5"):
            state, args, x, codes = tiny_state("--r1", r1)
            state.step = step
            infogan.train_step(state, args, x, codes)
            ends[step, r1] = torch.cat([p.detach().flatten() for p in state.D.parameters()])
    assert not ends[0, "0"].equal(ends[0, "5"]) and ends[1, "0"].equal(ends[1, "5"])
    assert not ends[infogan.R1_EVERY, "0"].equal(ends[infogan.R1_EVERY, "5"])


def test_the_average_of_G_takes_in_its_batch_statistics():
    state, *_ = tiny_state()
    with torch.no_grad():
        for t in (*state.G.parameters(), *state.G.buffers()):
            t.copy_(torch.full_like(t, 3))
        before = {k: v.clone() for k, v in state.G_ema.state_dict().items()}
    infogan.update_ema(state.G_ema, state.G, 0.9)
    for name, now in state.G_ema.state_dict().items():
        whole = name.endswith("num_batches_tracked")
        assert now.allclose(torch.tensor(3) if whole else 0.9 * before[name] + 0.3), name
    infogan.update_ema(state.G_ema, state.G, 0.0)
    assert all((v == 3).all() for v in state.G_ema.state_dict().values())


def test_the_average_lasts_a_share_of_the_run():
    state, args, x, codes = tiny_state("--ema", "0.5")
    old = {k: v.clone() for k, v in state.G_ema.named_parameters()}
    state.step = 9  # after the tenth step the half-life is five steps
    infogan.train_step(state, args, x, codes)
    now, G = dict(state.G_ema.named_parameters()), dict(state.G.named_parameters())
    assert all(now[k].allclose(0.5**0.2 * old[k] + (1 - 0.5**0.2) * G[k]) for k in old)
    assert any(not G[k].allclose(old[k]) for k in old)


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
    blue = Image.new("RGB", (40, 30), (0, 0, 255))
    red.save(deep / "two.gif", save_all=True, append_images=[blue])
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(deep / "clear.png")
    Image.new("LA", (16, 16), (0, 0)).save(deep / "la.png")
    Image.new("I;16", (16, 16), 128 * 257).save(deep / "deep.png")
    Image.new("L", (16, 16), 77).save(deep / "grey.png")
    sides = Image.new("RGB", (64, 16), (0, 255, 0))
    sides.paste((0, 0, 0), (24, 0, 40, 16))
    sides.save(folder / "wide.png")
    turned = Image.new("RGB", (20, 20), (0, 0, 0))
    turned.paste(WHITE, (0, 0, 20, 10))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<html>")
    (folder / "cut.jpg").write_bytes((deep / "upper.JPG").read_bytes()[:300])
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()


@pytest.fixture
def decoded_16(tmp_path) -> dict[str, torch.Tensor]:
    """put_pictures at 16x16: int (16, 16, 3) by file name."""
    put_pictures(tmp_path)
    pictures = infogan.load_pictures(str(tmp_path), 16)
    names = [Path(name).name for name in pictures.names]
    return dict(zip(names, pictures.x.int(), strict=True))


def test_every_format_and_mode_has_its_colours(decoded_16):
    colours = dict.fromkeys(("copy of rgb.png", "upper.JPG", "w.webp", "b.bmp"), RED)
    colours |= dict.fromkeys(("cmyk.jpeg", "palette.png", "two.gif"), RED)
    colours |= {"deep.png": (128,) * 3, "grey.png": (77,) * 3}
    for name, colour in colours.items():
        off = decoded_16[name] - torch.tensor(colour)
        assert off.abs().max() < (6 if Path(name).suffix in (".JPG", ".jpeg") else 2), name


def test_transparent_pixels_are_white(decoded_16):
    assert (decoded_16["clear.png"] == 255).all() and (decoded_16["la.png"] == 255).all()


def test_photos_are_upright_and_cropped_at_the_centre(decoded_16):
    assert (decoded_16["wide.png"] == 0).all()
    turned = decoded_16["turned.jpg"]
    assert turned[:6].max() < 20 and turned[10:].min() > 230


def test_copies_and_unreadable_files_are_left_out_and_told(tmp_path, capsys):
    put_pictures(tmp_path)
    pictures = infogan.load_pictures(str(tmp_path), 16)
    told = capsys.readouterr().out
    assert "13 pictures" in told and "1 exact copy" in told and "3 unreadable files" in told
    assert all(name in told for name in ("empty.png", "page.jpg", "cut.jpg")), told
    assert pictures.x.shape == (13, 16, 16, 3) and pictures.x.dtype == torch.uint8
    assert len({*pictures.names}) == 13 and all(Path(name).is_file() for name in pictures.names)


def put_rubbish(folder: Path) -> int:
    """Files that are no usable pictures, one of each kind; returns how many."""
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    whole = {}
    for kind in ("jpg", "png", "gif", "webp", "bmp"):
        buffer = io.BytesIO()
        noise.save(buffer, {"jpg": "jpeg"}.get(kind, kind))
        whole[kind] = buffer.getvalue()
        (folder / f"cut.{kind}").write_bytes(whole[kind][: len(whole[kind]) // 2])
    (folder / "zero.png").touch()
    (folder / "page.jpg").write_text("<!doctype html><title>404</title>")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "zip.webp").write_bytes(b"PK\3\4" + bytes(99))
    (folder / "new\nline.png").write_bytes(whole["png"][:99])
    head = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    sure = zlib.crc32(head).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + sure + whole["png"][33:]
    )
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


def test_rubbish_among_pictures_is_told_and_the_rest_trains(faces, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data \u00e9"
    folder.mkdir()
    bad = put_rubbish(folder)
    odd = {"a b.png": (1, 1), "tall.png": (1, 20_000), "long.png": (20_000, 1), "c\nd.png": (9, 9)}
    for i, (name, size) in enumerate(odd.items()):
        Image.new("RGB", size, (60 * i, 0, 0)).save(folder / name)
    gone, real = folder / "gone.png", infogan.find_pictures
    gone.touch()
    monkeypatch.setattr(
        infogan, "find_pictures", lambda f: (real(f), gone.unlink(missing_ok=True))[0]
    )
    for path in sorted(faces.glob("*.png"))[:36]:
        shutil.copy(path, folder)
    assert infogan.main(tiny(folder, tmp_path / "run", "--max-steps", 2)) == 0
    told = capsys.readouterr().out
    assert f"40 pictures in {folder}" in told and f"{bad + 1} unreadable files skipped" in told
    assert "bomb.png (DecompressionBombError)" in told and "broken.png (FileNotFoundError)" in told


def test_a_folder_of_rubbish_alone_is_one_line(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    bad = put_rubbish(folder)
    assert infogan.main(tiny(folder, tmp_path / "run")) == 2
    said = said_one_line(capsys, "0 pictures", f"{bad} unreadable", ", ...'", "at least 2")
    assert "\\u2026" not in said  # an ellipsis that was escaped like the names
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["none", "one", "mnist"])
def test_what_is_wrong_with_pictures_names_the_flag_that_asked_for_them(
    tmp_path, monkeypatch, data
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: 1 / 0)
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError, match=f"^--sort {data}: "):
        infogan.load_pictures(data, 16, flag="--sort")


def four_pictures(folder: Path, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + 4):
        Image.new("RGB", (9, 9), (i, 2 * i % 256, 99)).save(folder / f"{i}.png")
    return folder


@unix
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


def test_what_is_passed_over_is_told_with_the_reason(ckpt, tmp_path, capsys):
    folder = four_pictures(tmp_path / "set")
    four_pictures(folder / ".Trash-1000/files", 4)
    four_pictures(folder / "@eaDir", 8)
    four_pictures(folder / "$Recycle.Bin/S-1", 12)
    shutil.copy(folder / "0.png", folder / "._0.png")
    for name in (".DS_Store", "a.heic", "b.HEIC", "c.txt", "nothing"):
        (folder / name).touch()
    run = ["--max-steps", 1, "--batch-size", 4]
    assert infogan.main(tiny(folder, folder / "run", *run)) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "passed over" in line]
    for part in ("2 of .heic, ", "1 of .txt", "1 of no suffix", "1 hidden", "1 folder .Trash-1000"):
        assert part in line, line
    assert "1 folder @eaDir" in line and "1 folder $Recycle.Bin" in line and "DS_Store" not in line
    assert "4 pictures" in said

    for mode, out in ((["--samples", "3"], "samples"), (["--codes", "cat0"], "sheets")):
        out = ["--out", str(folder / out)]
        assert generate.main(["--ckpt", str(ckpt), *out, *mode]) == 0
    capsys.readouterr()
    assert infogan.main(tiny(folder, folder / "run", "--max-steps", 2, *run[2:])) == 0
    said = capsys.readouterr().out
    for name in ("run", "samples", "sheets"):
        assert f"1 folder {name} (a run, or by generate.py)" in said
    assert "4 pictures" in said

    for own in (folder / ".Trash-1000", folder / "@eaDir", folder / "samples"):  # named: used
        assert len(infogan.load_pictures(str(own), 16).x) == (3 if own.name == "samples" else 4)
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
    assert len(pictures.x) == len(kinds) - 3 and "2 unreadable" in told
    assert "eps.png" in told and "float.tif (NotImplementedError)" in told
    assert all(f"1 of .{suffix}" in told for suffix in ("png~", "eps", "pdf"))
    for name, x in zip(pictures.names, pictures.x.int(), strict=True):
        i = [*kinds].index(name.rpartition("/a.")[2])
        assert (x - torch.tensor([20 * i, 9, 9])).abs().max() < 6, name


def test_photos_are_decoded_small_and_look_the_same(tmp_path):
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (12, 8), rng.randbytes(288)).resize((1200, 800))
    seen = []
    for how in ({}, {"progressive": True}):
        noise.save(tmp_path / "x.jpg", quality=95, **how)
        key, x = infogan.read_picture(tmp_path / "x.jpg", 64, 3)
        assert len(key) == 64
        seen.append(torch.frombuffer(bytearray(x), dtype=torch.uint8).int())
    whole = infogan.to_square(Image.open(tmp_path / "x.jpg"), 64, 3)
    whole = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).int()
    assert all((x - whole).abs().max() < 8 for x in seen) and not seen[0].equal(whole)
    few = 1200 * 800 // 3  # at a quarter of both sides it has a sixteenth
    assert infogan.read_picture(tmp_path / "x.jpg", 64, 3, few)[1] is None  # is progressive
    noise.save(tmp_path / "x.jpg")
    assert infogan.read_picture(tmp_path / "x.jpg", 64, 3, few)[1]


@pytest.mark.parametrize("cores", [1, 64])
def test_memory_of_decoding_is_bounded_on_any_number_of_cores(tmp_path, monkeypatch, cores):
    for i in range(40):
        Image.new("L", (99, 99), i).save(tmp_path / f"{i}.png")
    Image.new("L", (4000, 3000)).save(tmp_path / "photo.png")  # too large for eight at once
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    now, most, alone, real = set(), [], [], infogan.to_square

    def slow(image: Image.Image, *how: int) -> Image.Image:
        me = threading.get_ident()
        now.add(me)
        most.append(len(now))
        time.sleep(0.01)
        if image.width == 4000:
            alone.append(threading.current_thread() is threading.main_thread())
        now.discard(me)
        return real(image, *how)

    monkeypatch.setattr(infogan, "to_square", slow)
    assert len(infogan.load_pictures(str(tmp_path), 16).x) == 41 and alone == [True]
    assert max(most) <= (2 if cores == 1 else infogan.DECODERS + 1) and (max(most) > 2) == (
        cores > 2
    )


def test_grey_sets_have_one_channel_unless_three_are_asked_for(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    assert infogan.load_pictures(str(tmp_path), 16).x.shape == (3, 16, 16, 1)
    assert infogan.load_pictures(str(tmp_path), 16, 3).x.shape == (3, 16, 16, 3)


def test_a_batch_is_from_minus_one_to_one_and_flip_mirrors_half_of_it():
    x = torch.arange(200 * 2, dtype=torch.uint8).remainder(7).view(200, 1, 2, 1).mul(30)
    y = infogan.make_batch(x, True, seeded(), CPU)
    plain = infogan.make_batch(x, False, seeded(), CPU)
    assert plain.allclose(x.permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=2e-7)
    kept = (y == plain).flatten(1).all(1)
    assert y[~kept].equal(plain[~kept].flip(3)) and 70 < kept.sum() < 130


def test_mnist_files_that_are_there_are_used(tmp_path, monkeypatch):
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    digits = bytes(random.Random(0).randbytes(20 * 28 * 28))
    head = b"".join(v.to_bytes(4, "big") for v in (2051, 20, 28, 28))
    (raw / "train-images-idx3-ubyte").write_bytes(head + digits)
    monkeypatch.chdir(tmp_path)
    assert infogan.load_pictures("mnist", 32).x.shape == (20, 32, 32, 1)


@pytest.mark.parametrize("raw", [b"", b"\0", bytes(99), b"<html>", (2051).to_bytes(4, "big") * 9])
def test_a_damaged_file_of_a_named_set_is_one_line(tmp_path, monkeypatch, capsys, raw):
    file = tmp_path / "data/MNIST/raw/train-images-idx3-ubyte"
    file.parent.mkdir(parents=True)
    file.write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    assert infogan.main(["--data", "mnist", "--out", "run"]) == 2
    said_one_line(capsys, str(file.relative_to(tmp_path)), "is damaged: delete it")


@pytest.mark.parametrize("n", [0, 4])
def test_a_half_unpacked_celeba_is_one_line(tmp_path, monkeypatch, capsys, n):
    folder = tmp_path / "data/celeba/img_align_celeba"
    folder.mkdir(parents=True)
    if n:
        four_pictures(folder)
    monkeypatch.chdir(tmp_path)
    assert infogan.main(["--data", "celeba", "--out", "run"]) == 2
    said_one_line(capsys, f"{n} of 202,599", "delete it", f"--data {folder}")


def test_an_own_folder_called_like_a_named_set_is_told(tmp_path, monkeypatch, capsys):
    four_pictures(tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: 1 / 0)
    assert infogan.main(["--data", "mnist", "--out", "run"]) == 2
    said_one_line(capsys, "give --data ./mnist")
    assert len(infogan.load_pictures("./mnist", 16).x) == 4
    (tmp_path / "mnist/log.csv").touch()  # a run
    assert infogan.main(["--data", "mnist", "--out", "run"]) == 2
    said_one_line(capsys, "torchvision cannot get it")


@pytest.mark.parametrize("name", ["fashion-mnist", "svhn", "celeba"])
def test_named_sets_offline_get_a_clear_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("offline"))
    )
    assert infogan.main(["--data", name, "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert f"--data {name}: torchvision cannot get it" in said
    assert {"svhn": "scipy", "celeba": "gdown"}.get(name, "offline") in said


# the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one with every picture that is decoded."""
    calls, real = [], infogan.to_square
    monkeypatch.setattr(infogan, "to_square", lambda *a: (calls.append(1), real(*a))[1])
    return calls


def few_pictures(folder: Path, n: int = 5, mode: str = "RGB") -> Path:
    """n pictures of 16x16, one copy of the first, and a file that is none."""
    folder.mkdir(parents=True)
    for i in range(n):
        noise = random.Random(i).randbytes(16 * 16 * len(mode))
        Image.frombytes(mode, (16, 16), noise).save(folder / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "page.jpg").write_text("<html>")
    return folder


def test_a_second_start_decodes_nothing_and_tells_the_same(tmp_path, capsys, decoded):
    folder = few_pictures(tmp_path / "faces")
    first = infogan.load_pictures(str(folder), 16)
    told = capsys.readouterr().out
    assert len(decoded) == 6 and "1 exact copy dropped, 1 unreadable file skipped" in told
    for channels in (None, 3):
        again = infogan.load_pictures(str(folder), 16, channels)
        assert again.x.equal(first.x) and again.fingerprint == first.fingerprint
        assert capsys.readouterr().out == told
    assert len(decoded) == 6
    assert infogan.load_pictures(str(folder), 32).x.shape == (5, 32, 32, 3)
    assert infogan.load_pictures(str(folder), 16, 1).x.shape == (5, 16, 16, 1)


def test_a_run_on_grey_pictures_goes_on_without_decoding(tmp_path, decoded):
    grey = few_pictures(tmp_path / "grey", mode="L")
    first = infogan.load_pictures(str(grey), 16)
    assert first.x.shape == (5, 16, 16, 1) and len(decoded) == 6
    assert infogan.load_pictures(str(grey), 16, 1).x.equal(first.x) and len(decoded) == 6


def test_a_changed_folder_is_decoded_again_in_the_same_place(tmp_path, cache):
    folder, files = few_pictures(tmp_path / "faces"), set(cache.iterdir())
    seen = [infogan.load_pictures(str(folder), 16)]
    (folder / "1.png").rename(folder / "9.png")
    seen.append(infogan.load_pictures(str(folder), 16))
    assert seen[0].fingerprint == seen[1].fingerprint  # the same pictures
    few_pictures(tmp_path / "more", 7)
    shutil.copy(tmp_path / "more/6.png", folder)
    seen.append(infogan.load_pictures(str(folder), 16))
    shutil.copy(tmp_path / "more/5.png", folder / "6.png")  # as many bytes, later
    os.utime(folder / "6.png", (10**9, 10**9))
    seen.append(infogan.load_pictures(str(folder), 16))
    (folder / "6.png").unlink()
    seen.append(infogan.load_pictures(str(folder), 16))
    assert [len(p.x) for p in seen] == [5, 5, 6, 6, 5]
    assert len({p.fingerprint for p in seen}) == 3  # the last is the first again
    assert seen[1].x.equal(seen[4].x) and len(set(cache.iterdir()) - files) == 1


@unix
def test_what_a_killed_decoder_left_in_the_cache_is_removed(tmp_path, cache):
    cache.mkdir(exist_ok=True)
    left, used = cache / ".a-16x16x3.123.part", cache / ".b-16x16x3.456.part"
    left.touch()
    code = "import os, sys; f = open(sys.argv[1], 'wb'); os.lockf(f.fileno(), os.F_TLOCK, 0);"
    script = [sys.executable, "-c", code + "print(flush=True); sys.stdin.read()", str(used)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        infogan.load_pictures(str(four_pictures(tmp_path / "set")), 16)
        assert used.exists() and not left.exists()
        other.stdin.close()
    infogan.load_pictures(str(four_pictures(tmp_path / "set", 4)), 16)
    assert not used.exists()


DAMAGE = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) // 2],
    "longer": lambda raw: raw + b"\0",
    "a bit": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "zeros": lambda raw: bytes(len(raw)),
    "text": lambda raw: b"hello world, this is no cache",
    "list": lambda raw: raw[:-8] + b"[1]" + (3).to_bytes(8, "little"),
    "names": lambda raw: raw.replace(b'"n": 5', b'"n": 6'),
}


@pytest.mark.parametrize("kind", [*DAMAGE, "folder"])
def test_a_damaged_cache_is_made_anew(tmp_path, cache, monkeypatch, decoded, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = few_pictures(tmp_path / "faces")
    first = infogan.load_pictures(str(folder), 16)
    whole = first.x.clone()
    (file,) = infogan.cache_folder().iterdir()
    raw = file.read_bytes()
    file.unlink()  # not written to in place: `first` is a view of it
    file.mkdir() if kind == "folder" else file.write_bytes(DAMAGE[kind](raw))
    assert infogan.load_pictures(str(folder), 16).x.equal(whole) and len(decoded) > 6
    if kind != "folder":
        assert file.read_bytes() == raw and first.x.equal(whole)


def test_training_needs_no_cache(tmp_path, monkeypatch, capsys):
    folder, blocked = few_pictures(tmp_path / "faces"), tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    pictures = infogan.load_pictures(str(folder), 16)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "not cached" in told[0] and "5 pictures" in told[1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert infogan.load_pictures(str(folder), 16).x.equal(pictures.x)


MEMORY = """
import contextlib, os, sys, infogan
if sys.argv[3:]:
    os.cpu_count = lambda: int(sys.argv[3])
def memory(kind):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(kind)).split()[1]) / 1024
with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
private, now = memory("RssAnon"), memory("VmRSS")
x = infogan.load_pictures(sys.argv[1], int(sys.argv[2]), 3).x
peak = memory("VmHWM") - now
print(sum(int(x.index_select(0, i).sum()) for i in infogan.torch.arange(len(x)).split(100)))
print(len(x), x.nbytes / 2**20, memory("RssAnon") - private, peak)
"""


def memory(folder: Path, size: int, *decoders: int) -> tuple[float, float, float, float]:
    """How many pictures a folder has, and the MB that loading it takes in a process of its own.

    Those of the decoded set; of private memory, once all of it was read; and at the peak.
    """
    script = [sys.executable, "-c", MEMORY, *map(str, (folder, size, *decoders))]
    more = {"capture_output": True, "text": True, "check": True, "timeout": PATIENCE}
    said = subprocess.run(script, cwd=HERE, **more)
    return tuple(map(float, said.stdout.split()[-4:]))


STATUS = Path("/proc/self/status")
LINUX = STATUS.exists() and "VmHWM" in STATUS.read_text()
linux = pytest.mark.skipif(not LINUX, reason="Linux tells a process's memory")


@linux
def test_private_memory_does_not_grow_with_the_set(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(2000):
        Image.new("RGB", (1, 1), (i % 256, i // 256, 0)).save(folder / f"{i}.bmp")
    cold, warm = (memory(folder, 128) for _ in range(2))
    assert cold[1] == warm[1] > 90 and cold[2] < 60 and warm[2] < 40, (cold, warm)


# training -----------------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, torch.Tensor]:
    ckpt = infogan.load_checkpoint(path)
    return {f"{net}.{k}": v for net in ("G", "G_ema", "D") for k, v in ckpt[net].items()}


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(faces, tmp_path):
    """25 steps at once are 7 + 14 + 4, over the end of an epoch, log.csv too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert infogan.main(tiny(faces, whole, "--max-steps", 25)) == 0
    for steps in (7, 21, 25):
        assert infogan.main(tiny(faces, parts, "--max-steps", steps)) == 0
    assert same(whole / "last.pt", parts / "last.pt")
    logs = [
        [row.split(",")[3:] for row in (out / "log.csv").read_text().splitlines()]
        for out in (whole, parts)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_another_seed_gives_other_weights_from_the_start(faces, tmp_path):
    ends = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(ends))
        assert infogan.main(tiny(faces, out, "--max-steps", 1, "--seed", seed)) == 0
        ends.append(out / "last.pt")
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(faces, tmp_path, capsys):
    out = tmp_path / "run"
    assert infogan.main(tiny(faces, out, "--max-steps", 2)) == 0
    before = contents(out)
    capsys.readouterr()
    assert infogan.main(tiny(faces, out, "--max-steps", 2)) == 0
    assert "is finished" in capsys.readouterr().out and contents(out) == before


def test_a_run_leaves_checkpoints_grids_a_log_and_its_flags(faces, tmp_path):
    out = tmp_path / "run"
    flags = ("--epochs", 3, "--sample-every", 1, "--save-every", 2)
    assert infogan.main(tiny(faces, out, *flags)) == 0
    assert {p.name for p in out.iterdir() if "tfevents" not in p.name} == {
        "args.json", "curves.png", "epoch_0002.pt", "last.pt", "log.csv",
        "samples", "training.gif"}  # fmt: skip
    assert {p.name for p in (out / "samples").iterdir()} == {
        "real.png", "last.png", *(f"epoch_000{i}.png" for i in range(4))}  # fmt: skip
    ckpt, saved = (
        infogan.load_checkpoint(out / "last.pt"),
        json.loads((out / "args.json").read_text()),
    )
    assert ckpt["args"] == saved and ckpt["step"] == 54 and saved["image_size"] == 16
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["20", "40"] and {
        "loss_D",
        "D_fake",
        "cat1",
        "cont1",
    } <= rows[0].keys()
    G, spec = infogan.load_generator(out / "last.pt")
    assert (
        spec == CodeSpec(2, 3, 2) and not G.training and G(torch.zeros(1, spec.dim)).shape[2] == 16
    )


def test_the_animation_names_each_epoch_and_rests_on_the_last(tmp_path):
    (tmp_path / "samples").mkdir()
    shades = {0: "black", 999: "red", 9995: "green", 10_000: "blue"}
    for epoch, shade in shades.items():
        Image.new("RGB", (274, 274), shade).save(tmp_path / f"samples/epoch_{epoch:04d}.png")
    infogan.save_animation(tmp_path)
    loop = Image.open(tmp_path / "training.gif")
    assert loop.n_frames == 4 and loop.width == 548
    for i, shade in enumerate(shades.values()):
        loop.seek(i)
        frame = loop.convert("RGB")
        far = zip(frame.getpixel((270, 300)), ImageColor.getrgb(shade), strict=True)
        assert max(abs(a - b) for a, b in far) < 20
        assert ImageChops.invert(frame.crop((0, 0, 548, 28)).convert("L")).getbbox()
        assert loop.info["duration"] == (2000 if i == 3 else 250)


def test_the_animation_of_a_long_run_is_short_and_small(tmp_path):
    (tmp_path / "samples").mkdir()
    for i in range(100):
        shade = ImageColor.getrgb(f"hsl({i * 3}, 100%, 50%)")
        Image.new("RGB", (1042, 40), shade).save(tmp_path / f"samples/epoch_{i * 5:04d}.png")
    (tmp_path / "samples/epoch_0005 copy.png").touch()
    infogan.save_animation(tmp_path)
    loop = Image.open(tmp_path / "training.gif")
    assert loop.n_frames == 60 and loop.width == 521
    for i, shade in ((0, "hsl(0, 100%, 50%)"), (59, "hsl(297, 100%, 50%)")):
        loop.seek(i)
        far = zip(loop.convert("RGB").getpixel((500, 44)), ImageColor.getrgb(shade), strict=True)
        assert max(abs(a - b) for a, b in far) < 20


def test_epochs_of_few_steps_are_saved_and_drawn_together_unless_asked_for(
    tmp_path, monkeypatch, capsys
):
    """60 epochs of one step."""
    few, saved = few_pictures(tmp_path / "few"), []
    monkeypatch.setattr(infogan, "save_file", lambda path, ckpt: saved.append(ckpt["step"]))
    monkeypatch.setattr(infogan, "SAVE_STEPS", 10)

    def grids(out, *flags):
        saved.clear()
        assert infogan.main(tiny(few, tmp_path / out, "--epochs", 60, *flags)) == 0
        return [int(path.stem[6:]) for path in sorted(tmp_path.glob(f"{out}/samples/epoch_*"))]

    assert grids("default") == [0, 50] and saved == [10, 20, 30, 40, 50, 60]
    assert "60 steps are too few to learn from; raise --epochs" in capsys.readouterr().out
    asked = ("--sample-every", 20, "--save-every", 25)
    assert grids("asked", *asked) == [0, 20, 40, 60]
    assert saved == [10, 20, 25, 25, 30, 40, 50, 50, 60]


def test_grids_are_laid_out_in_rows():
    x = torch.arange(10.0).view(10, 1, 1, 1).expand(-1, 3, 4, 4) / 10
    grid = infogan.make_grid(x, columns=4, gap=2)
    assert grid.shape == (3, 2 + 6 * 3, 2 + 6 * 4)
    assert grid[0, 2::6, 2::6][:2].flatten().tolist() == pytest.approx([k / 10 for k in range(8)])
    assert (grid[:, :2] == -1).all() and (grid[:, 14:, 14:] == -1).all()
    image = infogan.to_image(torch.tensor([-1.0, 0.0, 1.0, 9.0]).expand(3, 1, 4))
    assert [image.getpixel((i, 0)) for i in range(4)] == [(v,) * 3 for v in (0, 128, 255, 255)]


@pytest.mark.parametrize("sizes", [(2, 3, 3), (0, 2, 1), (1, 20, 0)])
def test_the_strongest_codes_come_first_and_move_alone(sizes):
    """Rows come by how much they change, and nothing but their code changes within them."""
    spec, seen = CodeSpec(*sizes, z_dim=4), []
    weights, width = torch.randn(spec.dim, generator=seeded()), spec.n_cat * spec.cat_dim

    def G(joined):
        seen.append(joined)
        return (joined @ weights / 20)[:, None, None, None].expand(-1, 3, 16, 16)

    codes = spec.sample(1, seeded())
    joined, page = spec.join(codes), infogan.strongest_codes(G, spec, codes)
    assert page.shape == (3, 2 + 18 * len(spec.names), 2 + 18 * 8)
    spread = page[0, 2::18, 2::18].var(1).tolist()
    assert spread == sorted(spread, reverse=True) and spread[0] > 0
    for k, rows in enumerate(seen):
        moved = (rows != joined).any(0).nonzero().flatten() - 4
        one = range(k * spec.cat_dim, (k + 1) * spec.cat_dim)
        one = one if k < spec.n_cat else [width + k - spec.n_cat]
        assert len(moved) and set(moved.tolist()) <= set(one)
        assert k >= spec.n_cat or (rows[:, 4:][:, list(one)].sum(1) == 1).all()


def test_restart_moves_the_old_run_aside(faces, tmp_path):
    out = tmp_path / "run"
    for flags in ((), ("--restart", "--seed", 5), ("--restart", "--seed", 6)):
        assert infogan.main(tiny(faces, out, "--max-steps", 2, *flags)) == 0
    seeds = [
        json.loads((tmp_path / name / "args.json").read_text())["seed"]
        for name in ("run.old-1", "run.old-2", "run")
    ]
    assert seeds == [0, 5, 6]


def test_a_restart_that_fails_leaves_the_old_run_in_place(faces, tmp_path):
    out = tmp_path / "run"
    assert infogan.main(tiny(faces, out, "--max-steps", 2)) == 0
    assert infogan.main(["--data", str(tmp_path / "gone"), "--out", str(out), "--restart"]) == 2
    assert (out / "last.pt").exists() and not list(tmp_path.glob("run.*"))


@pytest.mark.parametrize("kind", ["link", "volume", "killed"])
def test_restart_moves_what_lies_in_a_folder(faces, tmp_path, monkeypatch, kind):
    """The folder itself stays: a link, or a volume that nothing can be moved out of."""
    out, disk, rename, n = tmp_path / "run", tmp_path / "disk", Path.rename, itertools.count()
    disk.mkdir()
    out.symlink_to(disk, target_is_directory=True) if kind == "link" else disk.replace(out)
    (out / "slurm-1.out").touch()
    assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0
    old = {p.name: p.read_bytes() for p in contents(out) if p.name != "slurm-1.out"}

    def refuse(path: Path, to: Path) -> Path:
        if kind == "volume" and out not in Path(to).parents:
            raise OSError(18, "Invalid cross-device link")
        if kind == "killed" and next(n) == 3:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    restart = tiny(faces, out, "--max-steps", 2, "--restart")
    assert infogan.main(restart) == (130 if kind == "killed" else 0)
    if kind == "killed":
        assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0, "the old run, finished"
        assert infogan.load_checkpoint(out / "last.pt")["step"] == 1
        assert infogan.main(restart) == 0
    asides = {"link": ["disk.old-1"], "volume": ["run/old-1"], "killed": ["run/old-1", "run.old-1"]}
    moved = [p for name in asides[kind] for p in contents(tmp_path / name).items()]
    assert {path.name: raw for path, raw in moved} == old and len(moved) == len(old)
    assert out.is_symlink() == (kind == "link") and (out / "slurm-1.out").exists()
    assert infogan.load_checkpoint(out / "last.pt")["step"] == 2


def test_a_folder_with_logs_or_a_lone_checkpoint_becomes_a_run(faces, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "lost+found").mkdir(parents=True)
    for name in ("log.txt", "slurm-1.out", "job.e17", "desktop.ini", "Thumbs.db", ".DS_Store"):
        (out / name).touch()
    assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0
    for name in ("last.pt", "epoch_0001.pt"):
        lone = tmp_path / name / "run"
        lone.mkdir(parents=True)
        shutil.copy(out / "last.pt", lone / name)
        assert infogan.main(tiny(faces, lone, "--max-steps", 2)) == 0
        assert f"{name}, step 1" in capsys.readouterr().out
        assert infogan.load_checkpoint(lone / "last.pt")["step"] == 2


@pytest.mark.parametrize("name", ["a.png", "samples/real.png", "log.csv", "best.pt", "last.pt"])
def test_a_folder_with_anything_else_is_refused(faces, tmp_path, capsys, name):
    mine = tmp_path / "full" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    for more in ([], ["--restart"] * (name != "last.pt")):
        assert infogan.main([*tiny(faces, tmp_path / "full"), *more]) == 2
        assert name.split("/")[0] in capsys.readouterr().err
    assert contents(tmp_path) == {mine: b"precious"}


@pytest.mark.parametrize(
    "flags", [("--n-cont", 3), ("--width", 8), ("--lam-cat", 0.2), ("--seed", 9)]
)
def test_going_on_with_other_flags_is_refused(faces, tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0
    capsys.readouterr()
    assert infogan.main(tiny(faces, out, "--max-steps", 2, *flags)) == 2
    said_one_line(capsys, str(flags[0]), str(flags[1]), "--restart")
    if flags[0] in ("--n-cont", "--width"):  # for good
        assert infogan.main(tiny(faces, out, "--max-steps", 2, *flags, "--allow-changes")) == 2
        said_one_line(capsys, str(flags[0]), str(flags[1]), "--restart")


def test_going_on_with_other_pictures_is_refused(faces, tmp_path, capsys):
    out, changed = tmp_path / "run", tmp_path / "other"
    assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0
    draw_faces.main([str(changed), "--n", "40", "--size", "16", "--seed", "3"])
    capsys.readouterr()
    assert infogan.main(tiny(changed, out, "--max-steps", 2)) == 2
    said_one_line(capsys, "other pictures", "--allow-changes", "--restart")


def test_changes_that_are_allowed_are_told_and_kept(faces, tmp_path, capsys):
    """20 steps of 18 an epoch, then of 5 an epoch: the second begins anew, with its number."""
    out, few = tmp_path / "run", tmp_path / "few"
    each = ("--save-every", 1, "--sample-every", 1)
    assert infogan.main(tiny(faces, out, *each, "--max-steps", 20)) == 0
    draw_faces.main([str(few), "--n", "40", "--size", "16", "--seed", "3"])
    first = (out / "epoch_0001.pt").read_bytes()
    other = [*each, "--batch-size", 8, "--lr-g", 0.01, "--r1", 1]
    capsys.readouterr()
    assert infogan.main(tiny(few, out, *other, "--max-steps", 27, "--allow-changes")) == 0
    said, saved = capsys.readouterr().out, json.loads((out / "args.json").read_text())
    ckpt = infogan.load_checkpoint(out / "last.pt")
    assert ckpt["args"] == saved and saved["r1"] == 1.0
    for change in ("--batch-size 32, not 8", "--r1 0.0, not 1.0", "other pictures"):
        assert f"until step 20: {change}" in saved["changes"] and change in said
    assert ckpt["opt_G"]["param_groups"][0]["lr"] == 0.01 and ckpt["step"] == 27
    assert "27 steps, 2.4 epochs" in said and first == (out / "epoch_0001.pt").read_bytes()
    assert (out / "epoch_0002.pt").exists() and not (out / "epoch_0003.pt").exists()
    assert infogan.main(tiny(few, out, *other, "--epochs", 4)) == 0, "they are the run's flags now"
    ckpt = infogan.load_checkpoint(out / "last.pt")
    assert ckpt["step"] == 35 and ckpt["args"]["changes"] == saved["changes"]
    more = ("--epochs", 5, "--recipe", "notebook", "--allow-changes")
    assert infogan.main(tiny(few, out, *other, *more)) == 0, "with optimisers of other weights"
    assert "until step 35: --info-to trunk, not head" in capsys.readouterr().out


def test_the_same_pictures_under_other_names_go_on_bit_for_bit(faces, tmp_path):
    """In other folders, in another order, one of them twice."""
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    for i, path in enumerate(sorted(faces.glob("*.png"), reverse=True)):
        (other / str(i % 3)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / str(i % 3) / f"{i}.PNG")
    shutil.copy(path, other / "copy.png")
    assert infogan.main(tiny(faces, whole, "--max-steps", 25)) == 0
    for data, steps in ((faces, 7), (other, 21), (other, 25)):
        assert infogan.main(tiny(data, parts, "--max-steps", steps)) == 0
    assert same(whole / "last.pt", parts / "last.pt")
    a, b = ((out / "samples/real.png").read_bytes() for out in (whole, parts))
    assert a == b


def test_a_run_from_when_names_counted_goes_on_bit_for_bit(faces, tmp_path, monkeypatch, capsys):
    keys = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(faces.glob("*.png"))]
    old, real = hashlib.sha256("".join(keys).encode()).hexdigest()[:16], infogan.load_pictures
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as then:
        then.setattr(
            infogan,
            "load_pictures",
            lambda *a, **k: real(*a)._replace(fingerprint=old, order=torch.arange(600)),
        )
        assert infogan.main(tiny(faces, whole, "--max-steps", 6)) == 0
        assert infogan.main(tiny(faces, parts, "--max-steps", 2)) == 0
    for steps in (4, 6):
        assert infogan.main(tiny(faces, parts, "--max-steps", steps)) == 0
    assert same(whole / "last.pt", parts / "last.pt")
    assert infogan.load_checkpoint(parts / "last.pt")["fingerprint"] == old
    new = tmp_path / "new"
    assert infogan.main(tiny(faces, new, "--max-steps", 6)) == 0
    assert not same(whole / "last.pt", new / "last.pt")  # which takes them in another order


def test_a_new_run_begins_with_another_s_weights(ckpt, faces, tmp_path, capsys, monkeypatch):
    """Codes and networks come with them, and G's average, which outlives the first step."""
    monkeypatch.chdir(tmp_path)
    before = Path("before.pt")
    rewritten(ckpt, before, lambda c: c["G_ema"]["layers.0.weight"].add_(1))
    still = ["--data", str(faces), "--lr-g", "0", "--lr-d", "0", "--batch-size", "8"]
    begin = [*still, "--init", "before.pt"]
    assert infogan.main([*begin, "--n-cat", "3", "--max-steps", "1"]) == 2
    said_one_line(capsys, "before.pt", "--n-cat 2, not 3")
    assert infogan.main([*begin, "--max-steps", "1"]) == 0
    out = Path("checkpoint/cat2-cont3")
    old, new = weights(before), weights(out / "last.pt")
    assert all(old[k].equal(v) for k, v in new.items() if "weight" in k and "G_ema" not in k)
    moved = (new["G_ema.layers.0.weight"] - old["G_ema.layers.0.weight"]).abs().max()
    assert 0 < moved < 0.1
    assert json.loads((out / "args.json").read_text())["init"] == "before.pt"
    assert infogan.load_checkpoint(out / "last.pt")["step"] == 1

    before.unlink()
    capsys.readouterr()
    assert infogan.main([*begin, "--max-steps", "2"]) == 2
    said_one_line(capsys, "before.pt: no such checkpoint")
    assert infogan.main([*begin, "--max-steps", "2", "--out", str(out)]) == 0
    assert infogan.load_checkpoint(out / "last.pt")["step"] == 2
    capsys.readouterr()
    again = [*still, "--init", str(ckpt), "--out", str(out), "--max-steps", "3"]
    assert infogan.main(again) == 2
    said_one_line(capsys, "--init before.pt, not", "another --out")


def test_an_init_whose_weights_do_not_fit_is_one_line(ckpt, faces, tmp_path, capsys):
    bad, out = tmp_path / "bad.pt", tmp_path / "run"
    rewritten(ckpt, bad, lambda c: c.pop("D"))
    assert infogan.main(["--data", str(faces), "--out", str(out), "--init", str(bad)]) == 2
    assert "--restart" not in said_one_line(capsys, f"{bad}: ", "give another --init")
    assert not out.exists()


def test_a_shrunken_checkpoint_and_a_run_s_own_begin_a_run(ckpt, faces, tmp_path):
    small, out = tmp_path / "small.pt", tmp_path / "run"
    assert generate.main(["--ckpt", str(ckpt), "--shrink", str(small)]) == 0
    begin = ["--data", str(faces), "--out", str(out), "--max-steps", "1", "--lr-g", "0"]
    assert infogan.main([*begin, "--init", str(small)]) == 0
    half, new = infogan.load_checkpoint(small)["G_ema"], weights(out / "last.pt")
    assert all(new[f"G.{k}"].equal(w.float()) for k, w in half.items() if w.dim() > 1)
    assert infogan.main([*begin, "--init", str(out / "last.pt"), "--restart"]) == 0
    assert (tmp_path / "run.old-1/last.pt").exists()
    assert infogan.load_checkpoint(out / "last.pt")["args"]["init"] == str(out / "last.pt")
    args = infogan.parse_args(["--init", str(HERE / "checkpoint/animefaces-v3.pt")])
    assert (args.n_cat, args.n_cont, args.width) == (10, 20, 32) and args.lam_cont == 0.15
    assert args.out == "checkpoint/cat10-cont20"


def test_a_run_without_max_steps_ends_at_those_of_its_resume(faces, tmp_path, capsys):
    out = tmp_path / "run"
    assert infogan.main(tiny(faces, out, "--max-minutes", 0.001)) == 0
    done = infogan.load_checkpoint(out / "last.pt")["step"]
    capsys.readouterr()
    assert infogan.main(tiny(faces, out, "--max-steps", done + 2)) == 0
    assert "as this run was started" not in capsys.readouterr().out
    assert infogan.load_checkpoint(out / "last.pt")["step"] == done + 2


def test_flags_are_compared_before_pictures_are_decoded(faces, tmp_path, decoded, capsys):
    out, other = tmp_path / "run", few_pictures(tmp_path / "other")
    assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0
    before = len(decoded)
    capsys.readouterr()
    assert infogan.main(tiny(other, out, "--max-steps", 2, "--seed", 9)) == 2
    said_one_line(capsys, "--seed 0, not 9", "--restart")
    assert len(decoded) == before


def test_a_broken_last_pt_falls_back_on_the_newest_that_loads(faces, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--save-every", 1, "--epochs", 2)
    assert infogan.main(tiny(faces, out, *flags)) == 0
    good = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(good[: len(good) // 2])
    (out / "epoch_0002.pt").write_bytes(b"")
    assert infogan.main(tiny(faces, out, *flags)) == 0
    said = capsys.readouterr()
    assert "resuming from" in said.out and "epoch_0001.pt, step 18" in said.out
    assert said.err.count("broken, or not a checkpoint") == 2
    assert same(out / "last.pt", out / "epoch_0002.pt")


def test_a_run_without_a_checkpoint_that_loads_is_refused(faces, tmp_path, capsys):
    out = tmp_path / "run"
    assert infogan.main(tiny(faces, out, "--max-steps", 1)) == 0
    (out / "last.pt").write_bytes(b"")
    assert infogan.main(tiny(faces, out, "--max-steps", 2)) == 2
    assert "none of its checkpoints" in capsys.readouterr().err
    assert (out / "last.pt").read_bytes() == b""


def test_max_minutes_end_a_start_with_a_checkpoint(faces, tmp_path, capsys):
    out = tmp_path / "run"
    assert infogan.main(tiny(faces, out, "--max-minutes", 0.005, "--epochs", 10**6)) == 0
    said = capsys.readouterr()
    assert "time is up" in said.out
    assert infogan.load_checkpoint(out / "last.pt")["step"] >= 1
    etas = re.findall(r"eta ([\d:]+)", said.err)
    assert etas and set(etas) == {"00:00"}, "the time ends this start long before its epochs"


def test_a_set_smaller_than_a_batch_trains_and_it_is_told(faces, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(5):
        shutil.copy(faces / f"{i:06d}.png", few)
    assert infogan.main(tiny(few, tmp_path / "run", "--max-steps", 3)) == 0
    assert "only 5 pictures, so a batch is 5" in capsys.readouterr().out
    assert infogan.load_checkpoint(tmp_path / "run/last.pt")["step"] == 3


@pytest.mark.parametrize("where, step", [("weights", 30), ("loss", 30), ("loss", 37)])
def test_nan_stops_the_run_and_never_reaches_a_checkpoint(
    faces, tmp_path, capsys, monkeypatch, where, step
):
    """Epochs end at 18 and 36, rows of log.csv at 20 and 40: whichever comes first must see it."""
    out, real_step = tmp_path / "run", infogan.train_step
    assert infogan.main(tiny(faces, out, "--max-steps", 18)) == 0
    good = (out / "last.pt").read_bytes()

    def poisoned(state, *rest):
        metrics = real_step(state, *rest)
        if state.step == step and where == "weights":
            with torch.no_grad():
                next(state.D.parameters()).fill_(math.nan)
        return metrics * (math.nan if state.step == step and where == "loss" else 1)

    monkeypatch.setattr(infogan, "train_step", poisoned)
    capsys.readouterr()
    assert infogan.main(tiny(faces, out, "--save-every", 1)) == 1
    line = [t for t in capsys.readouterr().err.splitlines() if t.startswith("infogan.py")]
    seen = 36 if step < 36 else 40
    assert len(line) == 1 and f"step {seen}: loss_D is nan" in line[0]
    assert "last.pt is the last good" in line[0]
    assert infogan.load_checkpoint(out / "last.pt")["step"] == (18 if step < 36 else 36)
    assert step > 36 or (out / "last.pt").read_bytes() == good


def test_a_run_without_codes_on_grey_pictures_trains_and_draws(tmp_path):
    for i in range(40):
        noise = random.Random(i).randbytes(16 * 16)
        Image.frombytes("L", (16, 16), noise).save(tmp_path / f"{i}.png")
    out = tmp_path / "run"
    flags = tiny(tmp_path, out, "--max-steps", 21, "--n-cat", 0, "--n-cont", 0)
    assert infogan.main(flags) == 0
    assert generate.main(["--ckpt", str(out / "last.pt"), "--samples", "3"]) == 0
    assert Image.open(out / "generated/000002.png").mode == "L"
    assert generate.main(["--ckpt", str(out / "last.pt")]) == 0


def test_bfloat16_steps_follow_float32():
    ends = []
    for amp in ("--no-amp", "--amp"):
        state, _, x, codes = tiny_state()
        args = infogan.parse_args([*TINY, "--channels", "3", amp])
        ends.append(infogan.train_step(state, args, x, codes))
    assert ends[0].allclose(ends[1], atol=0.05) and not ends[0].equal(ends[1])


def test_codes_are_learned(faces, tmp_path):
    """On drawn faces Q reads new codes from new pictures, and nothing once they are shuffled."""
    out = tmp_path / "run"
    flags = ["--n-cat", "1", "--cat-dim", "4", "--n-cont", "1", "--width", "16", "--ema", "0.1"]
    flags += ["--lr-g", "0.001", "--lr-d", "0.001", "--lam-cat", "1", "--lam-cont", "0.5"]
    flags += ["--q-augment", "0.5"]
    assert infogan.main([*tiny(faces, out, "--max-steps", 300), *flags]) == 0
    (G, spec), (Q, _) = (
        infogan.load_generator(out / "last.pt"),
        infogan.load_encoder(out / "last.pt"),
    )
    codes = spec.sample(1000, seeded(1))
    with torch.no_grad():
        q = Q.D(G(spec.join(codes)))[1]
    known = infogan.mutual_information(spec, q, codes)
    shuffled = Codes(*(c.roll(1, 0) for c in codes))
    control = infogan.mutual_information(spec, q, shuffled)
    print("L_I", known.tolist(), "shuffled", control.tolist())
    assert known[0] > 0.7 and known[1] > 0.5 and (control <= 0).all()


# many processes, compiled networks ----------------------------------------------------------------


def by_running_statistics(m: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Batch norm that looks at no batch, so that how a batch is shared makes no difference."""
    return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias)


def test_two_processes_train_as_one_and_resume_as_one(faces, tmp_path, monkeypatch):
    """Over the end of an epoch, with R1, augmentation and flips: as far as rounding and Adam allow.

    Adam takes a whole step where a gradient is nearly nothing, so single weights differ by more.
    """
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", by_running_statistics)
    one, both, script = tmp_path / "one", tmp_path / "both", tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import infogan, test_infogan as t\n"
        "t.torch.nn.BatchNorm2d.forward = t.by_running_statistics\n"
        "sys.exit(infogan.main(sys.argv[1:]))\n"
    )
    flags = ("--no-amp", "--q-augment", 1, "--r1", 1, "--max-steps")
    assert infogan.main(tiny(faces, one, *flags, 21)) == 0
    assert infogan.main(tiny(faces, both, *flags, 3)) == 0
    done = torchrun(script, *tiny(faces, both, *flags, 20))
    assert done.returncode == 0 and done.stdout.count("finished: ") == 1, done.stderr
    assert infogan.main(tiny(faces, both, *flags, 21)) == 0

    a, b = (infogan.load_checkpoint(out / "last.pt") for out in (one, both))
    assert a["rng"].equal(b["rng"]) and a["epoch_seed"] == b["epoch_seed"]
    a, b = weights(one / "last.pt"), weights(both / "last.pt")
    off = torch.cat([(a[k] - b[k]).float().flatten().abs() for k in a])
    assert off.mean() < 2e-6 and off.max() < 4e-4, (off.mean(), off.max())
    logs = [(out / "log.csv").read_text().splitlines()[1].split(",") for out in (one, both)]
    rows = [[float(v) for v in log[:2] + log[3:]] for log in logs]
    assert rows[0] == pytest.approx(rows[1], abs=2e-4)


@unix
def test_two_processes_fail_in_one_line(tmp_path):
    both = run_both(["--data", str(tmp_path / "gone"), "--out", str(tmp_path / "run")], tmp_path)
    (code, said), other = (run.end() for run in both)
    assert code == 2 and other == (2, "") and said.count("\n") == 1, (said, other)
    assert said.startswith("infogan.py: ") and "no such folder" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("amp", ["--amp", "--no-amp"])
def test_compiled_networks_make_the_same_step(monkeypatch, amp):
    """By the eager backend: what is traced is right; the kernels are torch's."""
    monkeypatch.setattr(infogan, "COMPILE", {"backend": "eager"})
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    ends = []
    for flags in ((), ("--compile",)):
        state, args, x, codes = tiny_state(amp, "--r1", "1", *flags)
        metrics = [infogan.train_step(state, args, x, codes) for _ in range(2)]
        ends.append(torch.cat([*metrics, *(p.detach().flatten() for p in state.G.parameters())]))
        assert set(state.D.state_dict()) == set(Discriminator(state.spec, 16, 4, 3).state_dict())
    assert ends[0].equal(ends[1])


# nothing lost -------------------------------------------------------------------------------------


def survive(faces: Path, folder: Path, kills: int, epochs: int, longest: float) -> int:
    """Kills a run at random moments, going on each time; returns how often it was alive to kill.

    What it leaves must be what an undisturbed run leaves: the weights bit for bit, each logged
    step once and in order, every grid, no temporary file.
    """
    whole, killed, rng = folder / "whole", folder / "killed", random.Random(0)
    flags = ("--epochs", epochs, "--sample-every", 1, "--save-every", 2)
    assert Run(tiny(faces, whole, *flags), folder / "said").end()[0] == 0
    died = 0
    for _ in range(kills):
        run = Run(tiny(faces, killed, *flags), folder / "said")
        run.process.join(rng.uniform(0.02, longest))
        died += run.process.is_alive()
        run.kill()
    code, said = Run(tiny(faces, killed, *flags), folder / "said").end()
    assert code == 0, said
    assert same(whole / "last.pt", killed / "last.pt")
    whole_log, log = (
        [row.split(",")[:2] + row.split(",")[3:] for row in (out / "log.csv").read_text().split()]
        for out in (whole, killed)
    )
    assert log == whole_log and len(log) == epochs * 18 // 20 + 1
    for out in (whole, killed):
        left = {p.relative_to(out).as_posix() for p in out.rglob("*") if "tfevents" not in p.name}
        assert left == {"args.json", "curves.png", "last.pt", "log.csv", "training.gif",
            "samples", "samples/real.png", "samples/last.png",
            *(f"epoch_{e:04d}.pt" for e in range(2, epochs + 1, 2)),
            *(f"samples/epoch_{e:04d}.png" for e in range(epochs + 1))}  # fmt: skip
    for path in whole.glob("samples/*.png"):
        assert path.read_bytes() == (killed / "samples" / path.name).read_bytes()
    return died


@unix
def test_kills_leave_no_trace(faces, tmp_path):
    survive(faces, tmp_path, kills=5, epochs=6, longest=1.5)


@unix
def torture_fifty_kills_leave_no_trace(faces, tmp_path, capsys):
    kills = survive(faces, tmp_path, 50, 60, 2.0)
    with capsys.disabled():
        print(f"\n{kills} kills survived, bit for bit")


@unix
@pytest.mark.parametrize("number", infogan.SIGNALS[:3])
def test_a_signal_saves_and_leaves(faces, tmp_path, number):
    out = tmp_path / "run"
    run = Run(tiny(faces, out, *ENDLESS), tmp_path / "said")
    run.wait_for(out)
    os.kill(run.process.pid, number)
    code, said = run.end()
    assert code == 128 + number and "Traceback" not in said
    assert number.name in said and "the same command resumes" in said
    assert infogan.load_checkpoint(out / "last.pt")["step"] >= 40
    assert not list(out.rglob(".*"))


def no_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@unix
def test_what_nohup_ignores_is_ignored(faces, tmp_path):
    out = tmp_path / "run"
    run = Run(tiny(faces, out, *ENDLESS), tmp_path / "said", no_hangups)
    run.wait_for(out)
    os.kill(run.process.pid, signal.SIGHUP)
    run.wait_for(out, rows_of_log(out) + 2)
    os.kill(run.process.pid, signal.SIGTERM)
    code, said = run.end()
    assert code == 128 + signal.SIGTERM and "SIGHUP" not in said


def signals_in_a_step(number: signal.Signals, times: int, patch=setattr) -> None:
    real_step = infogan.train_step

    def step(state, *rest):
        for _ in range(times if state.step == 5 else 0):
            signal.raise_signal(number)
        return real_step(state, *rest)

    patch(infogan, "train_step", step)


@unix
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_batch_systems_send_saves_however_often_it_comes(faces, tmp_path, monkeypatch, name):
    out, number = tmp_path / "run", getattr(signal, name)
    signal.signal(number, signal.default_int_handler)  # else the default would end the tests
    signals_in_a_step(number, 2, monkeypatch.setattr)
    assert infogan.main(tiny(faces, out, *ENDLESS)) == 128 + number
    assert infogan.load_checkpoint(out / "last.pt")["step"] == 6


def test_a_thread_of_another_program_trains_and_leaves_its_signals_alone(faces, tmp_path):
    before, argv = [signal.getsignal(s) for s in infogan.SIGNALS], tiny(faces, tmp_path / "run")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(infogan.main, [*argv, "--max-steps", "2"]).result() == 0
    assert [signal.getsignal(s) for s in infogan.SIGNALS] == before


@unix
@pytest.mark.parametrize("number", infogan.SIGNALS[:3])
def test_a_second_signal_leaves_at_once_and_saves_nothing(faces, tmp_path, number):
    """In the middle of a step: after a first one alone the step ends, and is saved."""
    once, twice = (
        Run(
            tiny(faces, tmp_path / f"run {times}", *ENDLESS),
            tmp_path / f"said {times}",
            partial(signals_in_a_step, number, times),
        )
        for times in (1, 2)
    )
    code, said = once.end()
    assert code == 128 + number and f"{number.name}: 6 steps" in said, said
    assert infogan.load_checkpoint(tmp_path / "run 1/last.pt")["step"] == 6
    code, said = twice.end()
    assert code == (130 if number == signal.SIGINT else -number), said
    assert ("infogan.py: stopped" in said) == (number == signal.SIGINT)
    assert "is saved" not in said and not list((tmp_path / "run 2").glob("*.pt"))


@unix
def test_a_closed_terminal_costs_nothing(faces, tmp_path):
    """As with `| tee log` and Ctrl-C, which ends tee as well."""
    out, command = tmp_path / "run", [sys.executable, "infogan.py"]
    command += tiny(faces, out, *ENDLESS)
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: rows_of_log(out) > 1, lambda: process.poll() is None, lambda: out)
    process.stdout.close()
    rows = rows_of_log(out)
    wait_until(lambda: rows_of_log(out) > rows, lambda: process.poll() is None, lambda: out)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert infogan.load_checkpoint(out / "last.pt")["step"] > 0


@unix
def test_one_run_at_a_time_in_a_folder(faces, tmp_path, capsys):
    out = tmp_path / "run"
    run = Run(tiny(faces, out, *ENDLESS), tmp_path / "said")
    run.wait_for(out)
    for more in ([], ["--restart"]):
        assert infogan.main([*tiny(faces, out, *ENDLESS), *more]) == 2
        said_one_line(capsys, f"process {run.process.pid} is training there")
    run.kill()
    assert (out / ".pid").read_text() == str(run.process.pid)  # stale, and in nobody's way
    assert infogan.main(tiny(faces, out, "--max-steps", 60)) == 0
    assert not (out / ".lock").exists()


@unix
def test_a_lock_that_an_ending_run_removes_protects_nothing(tmp_path, monkeypatch):
    """Opened before that, locked after it: a third start would lock a new file."""
    import fcntl

    real = fcntl.flock
    monkeypatch.setattr("fcntl.flock", lambda f, how: (Path(f.name).unlink(), real(f, how))[1])
    with pytest.raises(UserError, match="is training there"), infogan.locked(tmp_path / "run"):
        pass


def small_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def little_memory() -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)


def nobody() -> None:
    os.setuid(65534)


@unix
def test_a_full_disk_is_one_line_and_costs_nothing(faces, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    assert infogan.main(tiny(faces, out, "--max-steps", 18)) == 0
    good = (out / "last.pt").read_bytes()
    assert len(good) > 40_000
    code, told = Run(tiny(faces, out, "--max-steps", 36), said, small_files).end()
    line = [t for t in told.splitlines() if t.startswith("infogan.py: ")]
    assert code == 2 and len(line) == 1 and "last.pt" in line[0] and "too large" in line[0], told
    assert "Traceback" not in told and not list(out.rglob(".*"))
    assert (out / "last.pt").read_bytes() == good
    assert infogan.main(tiny(faces, out, "--max-steps", 36)) == 0


@unix
def test_a_read_only_folder_is_one_line_and_costs_nothing(faces, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    assert infogan.main(tiny(faces, out, "--max-steps", 2)) == 0
    if os.getuid() == 0 and not os.access(tmp_path.parent.parent, os.X_OK):
        pytest.skip("no other user may come here")
    out.chmod(0o555)
    try:
        prepare = nobody if os.getuid() == 0 else None
        code, told = Run(tiny(faces, out, "--max-steps", 50), said, prepare).end()
    finally:
        out.chmod(0o755)
    assert code == 2 and "Permission denied" in told and told.count("\n") == 1, told
    assert infogan.load_checkpoint(out / "last.pt")["step"] == 2


@unix
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_drive_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with infogan.locked(tmp_path / "run"):
        assert (tmp_path / "run/.pid").exists()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{tmp_path / 'run'}: cannot be locked" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("refusal", [OSError(errno.EIO, "I/O error"), NotImplementedError()])
def test_what_guards_files_is_no_reason_not_to_write_them(tmp_path, monkeypatch, refusal):
    """A folder that cannot be synced; a rename that is refused for a moment."""
    path, real_sync, real_replace = tmp_path / "last.pt", os.fsync, os.replace
    refused, slept = [PermissionError(13, "Access is denied")] * 3, []

    def sync(file):
        if Path(f"/proc/self/fd/{file}").resolve() == tmp_path:
            raise refusal
        real_sync(file)

    def replace(*names):
        if refused:
            raise refused.pop()
        real_replace(*names)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", slept.append)
    infogan.save_file(path, {"step": 1})
    assert torch.load(path) == {"step": 1} and 0 < sum(slept) < 1
    refused += [PermissionError(13, "Access is denied")] * 99
    with pytest.raises(PermissionError, match=re.escape(str(path))):
        infogan.save_file(path, {"step": 2})
    assert torch.load(path) == {"step": 1} and 2 < sum(slept) < 10
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_training_goes_on_without_what_it_can_do_without(faces, tmp_path, monkeypatch, capsys):
    """log.csv held by Excel for a while, pictures by a viewer, no TensorBoard: each told once."""
    out, real_replace, held = tmp_path / "run", os.replace, [0]

    def opened(path, *how):
        held[0] += Path(path).name == "log.csv"
        if Path(path).name == "log.csv" and held[0] in (2, 3):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *how)

    def replace(part, path):
        if Path(path).suffix in (".png", ".gif"):
            raise PermissionError(13, "Access is denied")
        real_replace(part, path)

    monkeypatch.setattr(infogan, "open", opened, raising=False)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ("--max-steps", 100, "--sample-every", 1)
    assert infogan.main(tiny(faces, out, *flags)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "training goes on" in line]
    for words in ("TensorBoard: ", f"{out / 'log.csv'}: ", "curves.png: ", "samples/real.png: "):
        assert sum(words in line for line in said) == 1, said
    assert len(said) == 4, said  # without a grid there is no animation
    rows = (out / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["20", "40", "60", "80", "100"]
    assert infogan.load_checkpoint(out / "last.pt")["step"] == 100 and not list(out.rglob(".*"))


LOG = b"step,epoch,minutes,loss_D,loss_G,D_real,D_fake,cat0\n" + b"".join(
    b"%d,1.5,0.1,1.00000,1.0,0.5,0.5,0.2\n" % step for step in (20, 40, 60)
)
EDITED = {  # what somebody made of LOG, and the steps that can still be read
    "as it was": (LOG, [20, 40]),
    "by Excel": (b"\xef\xbb\xbf" + LOG.replace(b",", b";").replace(b"\n", b"\r\n"), [20, 40]),
    "numbers": (LOG.replace(b"\n20,", b"\n20.0,"), [20, 40]),
    "sorted": (b"\n".join([LOG.split(b"\n")[i] for i in (0, 3, 1, 2)]), [20, 40]),
    "not finite": (LOG.replace(b"\n40,1.5", b"\n40,nan"), [20]),
    "letters": (LOG.replace(b"\n20,", b"\nx,"), [40]),
    "latin-1": (LOG + b"notes: sch\xf6n\n", [20, 40]),
    "a power cut": (LOG[:-60] + bytes(60), [20]),
    "a column less": (LOG.replace(b",0.2\n", b"\n").replace(b",cat0", b""), []),
    "other columns": (LOG.replace(b"D_real,D_fake", b"D_fake,D_real"), []),
    "no heading": (LOG.split(b"\n", 1)[1], []),
    "commas as points": (LOG.replace(b",", b";").replace(b".", b","), []),
    "empty": (b"", []),
}


@pytest.mark.parametrize("kind", EDITED)
def test_a_log_that_was_edited_stops_nothing_and_loses_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    path, (raw, steps) = tmp_path / "log.csv", EDITED[kind]
    path.write_bytes(raw)
    log = infogan.Log(tmp_path, CodeSpec(1, 2, 0), 40)
    log.add(60, 2.0, 0.2, [1.0] * 5)
    log.add(80, 2.0, 0.2, [1.0] * 5)
    log.draw()
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert [float(row[0]) for row in rows[1:]] == [*steps, 60, 80] and log.told == {"TensorBoard"}
    assert ",".join(rows[0]) == LOG.split(b"\n")[0].decode() and {len(row) for row in rows} == {8}
    kept = [p.read_bytes() for p in tmp_path.glob("log.csv.old-*")]
    assert kept == ([raw] if len(steps) < 2 or kind == "latin-1" else [])
    infogan.Log(tmp_path, CodeSpec(1, 2, 0), 80)
    assert len([*tmp_path.glob("log.csv*")]) == 1 + len(kept)


def test_a_folder_that_vanishes_is_one_line(faces, tmp_path, capsys, monkeypatch):
    out, real_step = tmp_path / "run", infogan.train_step

    def gone(state, *rest):
        if state.step == 10:
            shutil.rmtree(out)
        return real_step(state, *rest)

    monkeypatch.setattr(infogan, "train_step", gone)
    assert infogan.main(tiny(faces, out)) == 2
    said = capsys.readouterr().err
    assert "No such file" in said and str(out) in said and "Traceback" not in said


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux")
def test_too_little_memory_is_one_line(faces, tmp_path):
    flags = tiny(faces, tmp_path / "run", "--width", 512, "--n-cat", 64, "--cat-dim", 900)
    code, told = Run(flags, tmp_path / "said", little_memory).end()
    assert code == 2 and "out of memory; lower --batch-size" in told and "Traceback" not in told


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_command_gives_the_same_bytes(faces, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("a", "b"):
            assert infogan.main(tiny(faces, tmp_path / name, "--max-steps", 4)) == 0
            command = ["--ckpt", str(tmp_path / name / "last.pt"), "--samples", "8"]
            assert generate.main(command) == 0
    finally:
        torch.set_num_threads(before)
    assert same(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    pictures = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png")]
    assert len(pictures) > 8
    for path in set(pictures) - {Path("curves.png")}:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_every_format_that_ever_was_still_loads(tmp_path):
    """data/format-N.pt are last.pt of tiny runs, written by the infogan.py of that format."""
    for number in range(1, infogan.FORMAT + 1):
        path = HERE / f"data/format-{number}.pt"
        ckpt = infogan.load_checkpoint(path)
        assert ckpt["format"] == number and ckpt["step"] == 4
        (G, spec), (Q, _) = infogan.load_generator(path), infogan.load_encoder(path)
        p, mu, _ = Q(G(spec.join(spec.sample(3, seeded()))))
        assert p.shape == (3, 1, 2) and mu.shape == (3, 1) and mu.isfinite().all()
        state = infogan.new_state(Namespace(**ckpt["args"]), CPU)
        infogan.restore(state, ckpt, Path("run"))
        assert state.step == 4 and len(state.opt_G.state) == len([*state.G.parameters()])


def test_a_run_of_older_flag_names_resumes(faces, tmp_path, capsys):
    """data/format-1-renamed.pt has --enough and --q-view, now --cap-cont and --q-augment."""
    out, few = tmp_path / "run", tmp_path / "few"
    few.mkdir()
    for path in sorted(faces.glob("*.png"))[:6]:
        shutil.copy(path, few)
    old = HERE / "data/format-1-renamed.pt"
    seen = infogan.load_pictures(str(few), 16).fingerprint
    out.mkdir()
    (out / "args.json").touch()
    rewritten(old, out / "last.pt", lambda c: c.update(fingerprint=seen))
    flags = ["--data", few, "--out", out, "--image-size", 16, "--width", 1, "--batch-size", 2]
    flags += ["--n-cat", 1, "--cat-dim", 2, "--n-cont", 1, "--z-dim", 3, "--max-steps", 6]
    flags = [*map(str, flags)]
    capsys.readouterr()
    assert infogan.main([*flags, "--cap-cont", "1.3", "--q-augment", "0.5"]) == 2
    said_one_line(capsys, "--cap-cont 1.2, not 1.3")
    assert infogan.main([*flags, "--cap-cont", "1.2", "--q-augment", "0.5"]) == 0
    ckpt = infogan.load_checkpoint(out / "last.pt")
    assert ckpt["step"] == 6 and ckpt["args"]["q_augment"] == 0.5 and "enough" not in ckpt["args"]


def cache_in(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)


@unix
def test_two_starts_at_once_share_a_cache(faces, tmp_path):
    runs = [
        Run(
            tiny(faces, tmp_path / k, "--max-steps", 1),
            tmp_path / f"said {k}",
            partial(cache_in, tmp_path),
        )
        for k in "ab"
    ]
    assert [run.end()[0] for run in runs] == [0, 0]
    assert same(tmp_path / "a/last.pt", tmp_path / "b/last.pt")
    assert len([*(tmp_path / "infogan").iterdir()]) == 1


@unix
def test_a_signal_to_one_process_stops_both_at_the_same_step(faces, tmp_path):
    out = tmp_path / "run"
    both = run_both(tiny(faces, out, *ENDLESS), tmp_path)
    both[0].wait_for(out)
    for _ in range(3):  # by the batch system and by torchrun, which passes it on
        os.kill(both[1].process.pid, signal.SIGTERM)
        time.sleep(0.01)
    (code, said), other = (run.end() for run in both)
    assert code == 128 + signal.SIGTERM and other == (code, "")
    assert "SIGTERM: " in said and "Traceback" not in said
    assert infogan.load_checkpoint(out / "last.pt")["step"] >= 40


# checkpoints from strangers -----------------------------------------------------------------------


class Attack:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="session")
def ckpt(faces, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert infogan.main(tiny(faces, out, "--max-steps", 3, "--n-cont", 3)) == 0
    return out / "last.pt"


def garble(raw: bytes, rng: random.Random) -> bytes:
    """A copy with some bytes changed, cut, doubled, moved or appended."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0:
            del raw[i:]
        elif kind == 1:
            del raw[i : min(j, i + 99)]
        elif kind == 2:
            raw[i:i] = raw[i : min(j, i + 99)]
        elif kind == 3:
            raw += rng.randbytes(9)
        else:
            raw[i : i + 1] = rng.randbytes(1)
        raw = raw or bytearray(b"x")
    return bytes(raw)


def garble_inside(raw: bytes, rng: random.Random) -> bytes:
    """A copy whose checksums are right though what they cover is garbled: the pickle, mostly."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            hit = entry.filename.endswith("data.pkl") or rng.random() < 0.01
            new.writestr(entry.filename, garble(old.read(entry), rng) if hit else old.read(entry))
    return packed.getvalue()


def fuzz_checkpoints(ckpt: Path, folder: Path, n: int) -> int:
    """Loads n garbled checkpoints as generate.py and a resumed run do; returns how many passed.

    None may raise anything but UserError; one that loads with a checksum unchanged must be equal.
    About a tenth passes: what is appended, or hits nothing that is read, does no harm.
    """
    rng, raw, bad, loaded = random.Random(0), ckpt.read_bytes(), folder / "bad.pt", 0
    whole = infogan.load_checkpoint(ckpt)
    args = Namespace(**whole["args"])
    state = infogan.new_state(args, CPU)
    for i in range(n):
        bad.write_bytes((garble, garble_inside)[i % 2](raw, rng))
        try:
            got = infogan.load_checkpoint(bad)
            if i % 2 == 0:
                assert all(got["G"][k].equal(v) for k, v in whole["G"].items()), i
            infogan.load_generator(bad)
            infogan.load_encoder(bad)
            infogan.restore(state, got, folder)
            loaded += 1
        except UserError:
            continue
    assert n / 50 < loaded < n / 5, loaded
    return loaded


def fuzz_pictures(folder: Path, n: int) -> int:
    """Decodes n garbled pictures of all formats; returns how many could be read all the same.

    About a third: where one byte of the pixels has changed, a decoder sees nothing wrong.
    """
    rng, kinds = random.Random(0), ("png", "jpeg", "gif", "webp", "bmp")
    noise, raws = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)), []
    for kind in kinds:
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        raws.append(buffer.getvalue())
    for i in range(n):
        path = folder / f"{i}.{kinds[i % len(kinds)]}"
        path.write_bytes(garble(raws[i % len(kinds)], rng))
    read = len(infogan.load_pictures(str(folder), 16).x)
    assert n / 5 < read < n / 2, read
    return read


def test_of_garbled_checkpoints_only_the_harmless_ones_load(tmp_path):
    fuzz_checkpoints(HERE / "data/format-1.pt", tmp_path, 100)


def test_of_garbled_pictures_those_that_decode_are_used(tmp_path):
    fuzz_pictures(tmp_path, 200)


def torture_ten_thousand_garbled_files_raise_no_error(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    read = fuzz_pictures(tmp_path / "pictures", 10_000)
    loaded = fuzz_checkpoints(HERE / "data/format-1.pt", tmp_path, 10_000)
    with capsys.disabled():
        print(f"\n10,000 garbled pictures: {read:,} could be read all the same; no error")
        print(f"10,000 garbled checkpoints: {loaded:,} loaded, the others refused; no error")


@linux
def torture_large_pictures_and_bombs_take_the_memory_of_one_picture(tmp_path, capsys):
    """At its peak, decoding one after the other: at most 24 bytes for each pixel of the largest."""
    for i in range(20):
        Image.new("RGBA", (8192, 4096), (i, 0, 0, 9)).save(tmp_path / f"{i}.png")
        (tmp_path / f"bomb{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:30] + b"x")
    n, _, _, peak = memory(tmp_path, 16, 1)
    assert n == 20 and peak < 24 * 8192 * 4096 / 2**20, peak
    with capsys.disabled():
        print(f"\n20 pictures of 8192x4096 and 20 bombs took {peak:,.0f} MB more")


def rewritten(ckpt: Path, where: Path, change) -> Path:
    """A copy of a checkpoint after change(contents)."""
    contents = torch.load(ckpt, weights_only=True)
    change(contents)
    torch.save(contents, where)
    return where


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
    "other": lambda c: c["args"].update(x=torch.zeros(2, dtype=torch.complex64)),
}


@pytest.mark.parametrize(
    "kind", [*HOSTILE, "pickle", "torch", "cut", "text file", "folder", "bomb"]
)
def test_hostile_checkpoints_are_one_line_and_run_nothing(
    ckpt, tmp_path, capsys, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt"
    if kind in HOSTILE:
        rewritten(ckpt, bad, HOSTILE[kind])
    elif kind == "pickle":
        bad.write_bytes(pickle.dumps(Attack()))
    elif kind == "torch":
        torch.save({"format": 1, "args": Attack()}, bad)
    elif kind == "cut":
        bad.write_bytes(ckpt.read_bytes()[:20_000])
    elif kind == "text file":
        bad.write_text("hello")
    elif kind == "folder":
        bad.mkdir()
    else:
        with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", bytes(10**7))
    assert generate.main(["--ckpt", str(bad)]) == 2
    said_one_line(capsys, "bad.pt")
    assert not (tmp_path / "pwned").exists()


# flags --------------------------------------------------------------------------------------------


def test_defaults_of_the_third_version():
    args = infogan.parse_args(["--n-cat", "10", "--n-cont", "20", "--epochs", "360"])
    shown = {"data": "data/anime", "out": "checkpoint/cat10-cont20", "epochs": 360, "seed": 0,
             "cat_dim": 10, "z_dim": 100, "batch_size": 128, "image_size": 64, "width": 64,
             "save_every": None, "sample_every": None, "lam_cat": 1.0, "lam_cont": 0.15,
             "cap_cont": 1.4, "lam_identity": 2.0, "q_augment": 0.0, "r1": 0.3, "info_to": "trunk",
             "ema": 0.03, "flip": True}  # fmt: skip
    assert {name: getattr(args, name) for name in shown} == shown


def test_defaults_are_those_of_the_first_version():
    args = infogan.parse_args([])
    assert (args.n_cat, args.n_cont, args.epochs, args.out) == (1, 2, 150, "checkpoint/cat1-cont2")
    assert (args.lam_cat, args.lam_cont, args.q_augment, args.lr_g) == (1.0, 0.3, 1.0, 2e-4)
    assert args.lam_identity == 2.0


def test_digits_have_defaults_of_their_own_and_a_flag_wins():
    args = infogan.parse_args(["--data", "mnist", "--lr-g", "0.01"])
    assert (args.lr_g, args.lr_d, args.q_augment, args.width) == (0.01, 2e-4, 1.0, 32)
    assert (args.image_size, args.flip, args.lam_identity) == (32, False, 0.0)
    assert infogan.parse_args(["--data", "celeba"]).flip is True


def test_the_notebooks_recipe_has_its_settings_and_a_flag_wins():
    args = infogan.parse_args(["--data", "mnist", "--recipe", "notebook"])
    assert (args.lr_g, args.q_augment, args.flip, args.width) == (2e-4, 0.0, False, 64)
    for n_cont, lam in (("20", 0.0), ("2", 0.1)):
        args = infogan.parse_args(["--recipe", "notebook", "--n-cont", n_cont])
        assert (args.lam_cat, args.lam_cont, args.q_augment, args.r1) == (1.0, lam, 0.0, 0.0)
        assert (args.cap_cont, args.lam_identity) == (3.0, 0.0)
        assert (args.info_to, args.ema, args.flip) == ("head", 0.0, False)
    assert infogan.parse_args(["--recipe", "notebook", "--ema", "0.5"]).ema == 0.5


@pytest.mark.parametrize("flags, words", [
    (["--n-cat", "65"], ("--n-cat 65", "0 to 64")),
    (["--n-cat", "two"], ("--n-cat", "two")),
    (["--image-size", "48"], ("--image-size 48", "64")),
    (["--channels", "2"], ("--channels 2",)),
    (["--lr-g", "nan"], ("--lr-g nan",)),
    (["--epochs", "0"], ("--epochs 0",)),
    (["--n-cat", "0", "--n-cont", "0", "--z-dim", "0"], ("--z-dim",)),
    (["--bogus"], ("--bogus", "--help")),
    (["--data", ""], ("--data", "empty")),
    (["--data", "no such folder"], ("no such folder", "make demo")),
    (["--data", "."], ("at least 2",)),
    (["--device", "cuda"], ("cuda",)),
    (["--out", "full", "--data", "."], ("full", "mine.csv", "another folder")),
])  # fmt: skip
def test_bad_flags_get_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.csv").write_text("precious")
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert infogan.main(flags) == 2
    said_one_line(capsys, *words)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.csv"]


def test_devices_have_numbers(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    named = {"auto": "cuda", "cuda": "cuda", "cuda:1": "cuda:1", "cpu": "cpu", "cpu:0": "cpu:0"}
    assert {name: str(infogan.pick_device(name)) for name in named} == named
    for name in ("cuda:2", "cuda:x", "cpu:1", "auto:0", "tpu", "meta"):
        with pytest.raises(UserError, match=f"--device {name}: not available"):
            infogan.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(infogan.pick_device("auto")) in ("cpu", "mps")
    assert infogan.main(["--device", "cuda:0"]) == 2
    said_one_line(capsys, "--device cuda:0")


def test_every_path_may_begin_with_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for module, needed in ((infogan, []), (generate, ["--ckpt=~/a.pt"])):
        rows = [
            row for rows in module.FLAGS.values() for row in rows if row[2] in ("FOLDER", "FILE")
        ]
        for flag in (row[0] for row in rows):
            if flag not in ("--data",) or module is infogan:
                args = vars(module.parse_args([*needed, f"{flag}=~/a.pt"]))
                assert args[flag[2:]] == str(tmp_path / "a.pt"), flag


def test_without_a_home_pictures_are_not_cached(tmp_path, monkeypatch, capsys):
    folder = few_pictures(tmp_path / "few")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user
    assert len(infogan.load_pictures(str(folder), 16).x) == 5
    assert "not cached" in capsys.readouterr().out and [*tmp_path.iterdir()] == [folder]


def test_what_the_machine_lacks_is_a_line_with_the_cure(capsys):
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    lacks = {
        InductorError("InvalidCxxCompiler: none found\n\nSet TORCHDYNAMO_VERBOSE=1"): "--compile: "
        "InvalidCxxCompiler: none found; install a compiler or leave it out",
        PermissionError(13, "Permission denied", "shared/traversals"): "shared/traversals: "
        "Permission denied; fix this or give another --out",
        OSError(28, "No space left on device"): "No space left on device; fix this",
    }
    for error, words in lacks.items():

        def fail(error=error):
            raise error

        assert infogan.run("infogan.py", fail) == 2
        said_one_line(capsys, words)


@pytest.mark.parametrize("module", [infogan, generate])
def test_every_number_has_limits(module, capsys):
    needed = ["--ckpt", "x.pt"] if module is generate else []
    for name, (low, high) in module.LIMITS.items():
        flag, step = "--" + name.replace("_", "-"), 1 if type(low) is int else 1e-6
        for value in (
            low - step,
            high + max(step, high * 1e-6 * (type(high) is float)),
            "x",
            "nan",
        ):
            assert module.main([*needed, f"{flag}={value}"]) == 2
            said_one_line(capsys, flag, str(value).split(".")[0])


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "none.pt"], ("none.pt", "no such checkpoint")),
    ([], ("--ckpt",)),
    (["--ckpt", "CKPT", "--codes", "cat7"], ("cat7", "cat0, cat1, cont0")),
    (["--ckpt", "CKPT", "--rows", "0"], ("--rows 0",)),
    (["--ckpt", "CKPT", "--range", "nan", "1"], ("--range",)),
    (["--ckpt", "CKPT", "--zoom", "9"], ("--zoom 9", "1 to 8")),
    (["--ckpt", "CKPT", "--explorer", "--samples", "3"], ("--explorer", "--samples")),
    (["--ckpt", "CKPT", "--data", "."], ("--data", "--versus")),
    (["--ckpt", "CKPT", "--samples", "3", "--gif"], ("--gif", "--samples", "only on sheets")),
    (["--ckpt", "CKPT", "--samples", "3", "--rows", "8"], ("--rows", "--samples", "--walk")),
    (["--ckpt", "CKPT", "--shrink", "x", "--codes", "cat0"], ("--codes", "--shrink")),
    (["--ckpt", "CKPT", "--explorer", "--steps=11"], ("--steps", "--explorer")),
    (["--ckpt", "CKPT", "--range", "1", "1"], ("--range", "different")),
    (["--ckpt", "CKPT", "--samples"], ("--samples", "not 0")),
    (["--ckpt", "CKPT", "--walk", "--seeds", "3"], ("--walk", "not 1")),
    (["--ckpt", "CKPT", "--sort", __file__], ("--sort", "--read takes single pictures")),
    (["--ckpt", "CKPT", "--walk", "--out", "a.mp4"], ("--out a.mp4", ".gif or .webp")),
    (["--ckpt", "CKPT", "--seeds", "1,2", "--rows", "3"], ("--seeds", "--rows")),
    (["--ckpt", "CKPT", "--samples", "3", "--seeds", "1,2"], ("--seeds", "--samples")),
    (["--ckpt", "CKPT", "--seeds", "1,2", "--seed", "0"], ("--seeds", "--seed,")),
    *((["--ckpt", "CKPT", "--seeds", bad], (f"--seeds {bad}",))
      for bad in ("3,3", "5-3", "x", "1,", "-1", "1-2-3", "9999999999", "0-99999999")),
    *((["--ckpt", "CKPT", "--set", bad], ("--set", bad.partition(",")[0].partition("=")[0]))
      for bad in ("cat0=3", "cat0=-1", "cat0=1.5", "cat0", "cont0=x", "cont0=nan", "cont0=1001",
                  "cat9=0", "z=1", "cat0=1,cat0=1")),
])  # fmt: skip
def test_bad_flags_of_generate_get_one_line(ckpt, capsys, flags, words):
    assert generate.main([str(ckpt) if f == "CKPT" else f for f in flags]) == 2
    said_one_line(capsys, *words)


# what each script must name in its --help
FLAGS = {
    "infogan.py": ("--data", "--n-cat", "--out"),
    "generate.py": ("--ckpt", "--explorer"),
    "data/bench.py": ("--device",),
    "data/download.py": ("--url", "--out"),
    "data/draw_faces.py": ("--size", "--only"),
    "data/measure.py": ("--faces",),
}
SCRIPTS = [path for path in (HERE / name for name in FLAGS) if path.exists()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_of_every_script_names_its_flags(path, tmp_path):
    """From another folder: a script finds the project by itself."""
    more = {"capture_output": True, "text": True, "timeout": PATIENCE}
    said = subprocess.run([sys.executable, str(path), "--help"], cwd=tmp_path, **more)
    assert said.returncode == 0 and "Traceback" not in said.stderr, said.stderr
    flags = FLAGS[path.relative_to(HERE).as_posix()]
    assert all(f"  {flag}" in said.stdout for flag in flags), said.stdout


def test_importing_the_programs_is_light():
    """torchvision's import costs as much as torch's own, and only the named sets need it."""
    look = "import sys, generate; print([m for m in sys.modules if m in %r])"
    heavy = ["torchvision", "torch._dynamo", "tensorboard", "networkx", "onnx"]
    done = subprocess.run([sys.executable, "-c", look % heavy], cwd=HERE, capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == b"[]", done


def test_every_script_of_data_is_asked_for_help():
    scripts = {path.name for path in (HERE / "data").glob("*.py")} - {
        "test_data.py",
        "test_generate.py",
    }
    assert scripts <= {Path(name).name for name in FLAGS}


# pages, Makefile ----------------------------------------------------------------------------------

PAGES = [path for path in (HERE / "README.md", HERE / "checkpoint/README.md") if path.exists()]
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(HERE).as_posix()
)
MAKEFILE = (HERE / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.M)
GIVEN = {"MAKEFLAGS", "MFLAGS", *re.findall(r"^(\w+) *\?=", MAKEFILE, re.M)}  # to this make test


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, and what its text names as `python …` or `make …`."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line.strip()
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.S | re.M)
        for line in block.splitlines()
    ]
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [line for line in lines if line] + re.findall(r"`((?:python|make) [^`]+)`", text)


class Parsed(Exception):
    """A script has taken its flags, and need do no more."""


def check_commands(line: str) -> int:
    """How many of our scripts a line runs; their flags must parse."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, found = True, 0
    words, scripts = list(lexer), {path.name: path for path in SCRIPTS}
    for i, word in enumerate(words):
        name, before = Path(word).name, [Path(w).name for w in words[:i]]
        if name in scripts and any(re.match("python|torchrun", w) for w in before):
            found += 1
            argv = list(itertools.takewhile(lambda w: not set(w) <= set("();<>|&"), words[i + 1 :]))
            check_flags(scripts[name], argv)
    return found


def check_flags(path: Path, argv: list[str]) -> None:
    if "--help" in argv:  # which another test runs
        return
    if path.parent == HERE:
        {"infogan.py": infogan, "generate.py": generate}[path.name].parse_args(argv)
        return
    real = argparse.ArgumentParser.parse_args

    def only_parse(self, *given):
        real(self, *given)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        patch.setattr(sys, "argv", [str(path), *argv])
        runpy.run_path(str(path), run_name="__main__")


def dry_run(line: str) -> list[str]:
    """The commands that a line of make would run."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    plain = {name: value for name, value in os.environ.items() if name not in GIVEN}
    more = {"capture_output": True, "text": True, "timeout": PATIENCE, "env": plain}
    done = subprocess.run([*shlex.split(line, comments=True), "-n"], cwd=HERE, **more)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout.replace("\\\n", " ").splitlines()


@each_page
def test_every_command_of_a_page_parses(page):
    assert sum(map(check_commands, commands_of(page))) >= (8 if page.parent == HERE else 1)


@each_page
def test_every_make_command_of_a_page_would_run(page):
    lines = [line for line in commands_of(page) if line.startswith("make ")]
    named = {shlex.split(line)[1] for line in lines}
    main = {"demo", "test", "train-v1", "train-v2", "train-v3"} if page.parent == HERE else set()
    assert main <= named <= {*TARGETS}
    for line in lines:
        for command in dry_run(line):
            check_commands(command)


def test_every_command_of_the_makefile_parses():
    assert sum(check_commands(line) for name in TARGETS for line in dry_run(f"make {name}")) >= 12


def links_of(page: Path) -> list[tuple[str, Path, str]]:
    """Each link and picture of a page that is no web address: as written, the file, the heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    found += re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    parts = [(link, *unquote(link).partition("#")[::2]) for link in found]
    return [
        (link, Path(os.path.normpath(page.parent / name)) if name else page, heading)
        for link, name, heading in parts
        if not re.match(r"[A-Za-z][\w+.-]*:|//", link)
    ]


def headings_of(page: Path) -> set[str]:
    """As GitHub links to them."""
    titles = re.findall(r"^#+ +(.*?) *$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_every_picture_and_link_of_a_page_exists(page):
    links = links_of(page)
    assert links and not [link for link, path, _ in links if not path.exists()]
    assert not [
        link for link, path, heading in links if heading and heading not in headings_of(path)
    ]


@each_page
def test_every_picture_and_link_of_a_page_is_in_git(page):
    if not (HERE / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    more = {"capture_output": True, "text": True, "timeout": PATIENCE}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, **more)
    if listed.returncode:
        pytest.skip(f"git lists no files: {listed.stderr}")
    files = {HERE / name for name in listed.stdout.split("\0") if name}
    known = files | {folder for path in files for folder in path.parents}
    assert not [link for link, path, _ in links_of(page) if path not in known]


def test_the_readmes_python_runs(ckpt):
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {}
    exec(re.sub(r"[\w./-]+\.pt\b", str(ckpt), block), names)
    assert names["x"].shape == (16, 3, 16, 16)
