"""What a run survives: kills at any moment, garbled files, large pictures.

python -m pytest -q data/test_torture.py                                        half a minute
python -m pytest -q data/test_torture.py -o "python_functions=torture_*"        several minutes
"""

# ruff: noqa: F811 (a fixture that is imported, and the argument of a test that takes it)
from __future__ import annotations

import io
import itertools
import os
import random
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_infogan import (  # noqa: F401, I001 (it settles the threads before torch is loaded)
    CPU, EACH, HERE, PATIENCE, Run, cache, ckpt, faces, no_process_outlives_its_test, same,
    stopped_tests_clean_up, tiny, trained, unix,
)  # fmt: skip

from PIL import Image

import infogan
from infogan import UserError

# kills --------------------------------------------------------------------------------------------


def unchanged(whole: Path, killed: Path, epochs: int) -> None:
    """What a killed run leaves is what an undisturbed one leaves.

    The weights bit for bit, each logged step once and in order, every grid, no temporary file.
    """
    assert same(whole / "last.pt", killed / "last.pt")
    logs = [
        [row.split(",")[:2] + row.split(",")[3:] for row in (out / "log.csv").read_text().split()]
        for out in (whole, killed)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == epochs * 18 // 16 + 1
    for out in (whole, killed):
        left = {p.relative_to(out).as_posix() for p in out.rglob("*") if "tfevents" not in p.name}
        assert left == {"args.json", "curves.png", "last.pt", "log.csv", "training.gif",
            "samples", "samples/real.png", "samples/last.png",
            *(f"epoch_{e:04d}.pt" for e in range(1, epochs + 1)),
            *(f"samples/epoch_{e:04d}.png" for e in range(epochs + 1))}  # fmt: skip
    for path in whole.glob("samples/*.png"):
        assert path.read_bytes() == (killed / "samples" / path.name).read_bytes()


def killed_at(moment: str, n: int) -> None:
    """A process is killed in its n-th train_step, or before the n-th file of a name has it."""
    calls = itertools.count(1)
    module, name = (infogan, moment) if moment == "train_step" else (os, "replace")
    real = getattr(module, name)

    def call(*given):
        if (name == "train_step" or Path(given[1]).name == moment) and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    setattr(module, name, call)


@unix
def test_kills_leave_no_trace(faces, trained, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    flags = tiny(faces, out, *EACH, "--epochs", 3)
    for moment in (("train_step", 7), ("last.pt", 1), ("train_step", 12), ("log.csv", 1),
                   ("epoch_0002.png", 1), ("epoch_0002.pt", 1), ("last.pt", 2)):  # fmt: skip
        code, text = Run(flags, said, partial(killed_at, *moment)).end()
        assert code == -signal.SIGKILL, (moment, text)
    code, text = Run(flags, said).end()
    assert code == 0, text
    unchanged(trained, out, 3)


@unix
def torture_fifty_kills_leave_no_trace(faces, tmp_path, capsys):
    whole, killed, said, rng = (
        *map(tmp_path.joinpath, ("whole", "killed", "said")),
        random.Random(0),
    )
    flags, kills = (*EACH, "--epochs", 60), 0
    assert Run(tiny(faces, whole, *flags), said).end()[0] == 0
    for _ in range(50):
        run = Run(tiny(faces, killed, *flags), said)
        run.process.join(rng.uniform(0.02, 2.0))
        kills += run.process.is_alive()
        run.kill()
    code, text = Run(tiny(faces, killed, *flags), said).end()
    assert code == 0, text
    unchanged(whole, killed, 60)
    with capsys.disabled():
        print(f"\n{kills} kills survived, bit for bit")


# garbled files ------------------------------------------------------------------------------------


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


def test_of_garbled_checkpoints_only_the_harmless_ones_load(ckpt, tmp_path):
    fuzz_checkpoints(ckpt, tmp_path, 100)


def test_of_garbled_pictures_those_that_decode_are_used(tmp_path):
    fuzz_pictures(tmp_path, 200)


def torture_ten_thousand_garbled_files_raise_no_error(ckpt, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    read = fuzz_pictures(tmp_path / "pictures", 10_000)
    loaded = fuzz_checkpoints(ckpt, tmp_path, 10_000)
    with capsys.disabled():
        print(f"\n10,000 garbled pictures: {read:,} could be read all the same; no error")
        print(f"10,000 garbled checkpoints: {loaded:,} loaded, the others refused; no error")


# memory -------------------------------------------------------------------------------------------


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
