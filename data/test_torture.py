"""What a run survives: kills at any moment, garbled files, large pictures.

python -m pytest -q data/test_torture.py        half a minute
make torture                                    the same for longer: several minutes
"""

# ruff: noqa: F811, I001 (a fixture that is imported, and the argument of a test that takes it)
import io
import itertools
import os
import random
import re
import signal
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from test_infogan import (  # noqa: F401 (it settles the threads before torch is loaded)
    CPU, EACH, Run, cache, ckpt, encoded, faces, load, no_process_outlives_its_test, out,
    stopped_tests_clean_up, tiny, train, trained, unchanged, unix,
)  # fmt: skip

import download
from PIL import Image

import infogan
from infogan import UserError

torture = pytest.mark.skipif("TORTURE" not in os.environ, reason="takes minutes: make torture")
few_and_many = pytest.mark.parametrize("n", [100, pytest.param(10_000, marks=torture)])

# kills --------------------------------------------------------------------------------------------


def killed_before(name: str, n: int) -> None:
    """A process is killed when it is about to put the n-th file of this name into its place."""
    real, calls = os.replace, itertools.count(1)

    def replace(source, target):
        if Path(target).name == name and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = replace


@unix
def test_kills_leave_no_trace(faces, trained, out, tmp_path):
    flags, said = tiny(faces, out, EACH, "--epochs 3"), tmp_path / "said"
    for moment in (("epoch_0001.png", 1), ("last.pt", 1),
                   ("epoch_0002.png", 1), ("epoch_0002.pt", 1), ("last.pt", 2)):  # fmt: skip
        code, text = Run(flags, said, partial(killed_before, *moment)).end()
        assert code == -signal.SIGKILL, text
    train(faces, out, EACH, "--epochs 3")
    unchanged(trained, out)


@unix
@torture
def test_fifty_kills_leave_no_trace(faces, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags, rng, kills = f"{EACH} --epochs 60", random.Random(0), 0
    train(faces, whole, flags)
    for _ in range(50):
        run = Run(tiny(faces, killed, flags), tmp_path / "said")
        run.process.join(rng.uniform(0.02, 2.0))
        kills += run.process.is_alive()
        run.kill()
    train(faces, killed, flags)
    unchanged(whole, killed)
    print(f"{kills} kills survived, bit for bit")


# garbled files ------------------------------------------------------------------------------------


def garble(raw: bytes, rng: random.Random) -> bytes:
    """A copy with some bytes changed, cut, doubled or appended."""
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        i = rng.randrange(len(raw) + 1)
        j = min(i + rng.randrange(100), len(raw))
        changed = raw[:i] + rng.randbytes(1) + raw[i + 1 :]
        kinds = [raw[:i], raw[:i] + raw[j:], raw[:j] + raw[i:], raw + rng.randbytes(9)]
        raw = rng.choice([*kinds, changed, changed])
    return raw


def garble_inside(raw: bytes, rng: random.Random) -> bytes:
    """A copy whose checksums are right though what they cover is garbled: the pickle, mostly."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(packed, "w") as new:
        for entry in old.infolist():
            hit = entry.filename.endswith("data.pkl") or rng.random() < 0.01
            new.writestr(entry.filename, garble(old.read(entry), rng) if hit else old.read(entry))
    return packed.getvalue()


@few_and_many
def test_of_garbled_checkpoints_only_the_harmless_ones_load(ckpt, tmp_path, n):
    """As generate.py and a resumed run load them: nothing but UserError may be raised.

    About a tenth passes: what is appended, or hits nothing that is read, does no harm. One that
    loads with a checksum unchanged must be equal.
    """
    rng, raw, bad, loaded = random.Random(0), ckpt.read_bytes(), tmp_path / "bad.pt", 0
    whole = infogan.load_checkpoint(ckpt)
    state = infogan.new_state(Namespace(**whole["args"]), CPU)
    for i in range(n):
        bad.write_bytes((garble, garble_inside)[i % 2](raw, rng))
        try:
            got = infogan.load_checkpoint(bad)
            if i % 2 == 0:
                assert all(got["G"][k].equal(v) for k, v in whole["G"].items()), i
            infogan.load_generator(bad)
            infogan.load_net(bad, "D", "cpu")
            infogan.restore(state, got, tmp_path)
            loaded += 1
        except UserError:
            continue
    assert n / 50 < loaded < n / 5, loaded
    print(f"{n:,} garbled checkpoints: {loaded:,} loaded, the others refused; no error")


@few_and_many
def test_of_garbled_pictures_those_that_decode_are_used(tmp_path, n):
    """About a third: where one byte of the pixels has changed, a decoder sees nothing wrong."""
    rng = random.Random(0)
    files = encoded(Image.frombytes("RGB", (40, 30), rng.randbytes(3600)))
    for i, (kind, raw) in zip(range(n), itertools.cycle(files.items())):
        (tmp_path / f"{i}.{kind}").write_bytes(garble(raw, rng))
    read = len(load(tmp_path).x)
    assert n / 5 < read < n / 2, read
    print(f"{n:,} garbled pictures: {read:,} could be read all the same; no error")


# memory -------------------------------------------------------------------------------------------

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOLD = os.access(FORGET, os.W_OK) and "VmHWM" in STATUS.read_text()
linux = pytest.mark.skipif(not TOLD, reason="Linux tells a process's memory")


@contextmanager
def memory_taken() -> Iterator[dict[str, float]]:
    """The MB that a block takes: private memory that it still has in the end, and at its peak."""

    def memory(kind: str) -> float:
        return int(re.search(rf"{kind}:\s+(\d+)", STATUS.read_text())[1]) / 1024

    FORGET.write_text("5")  # the peak so far
    private, now, taken = memory("RssAnon"), memory("VmRSS"), {}
    yield taken
    taken |= {"private": memory("RssAnon") - private, "peak": memory("VmHWM") - now}


@linux
def test_private_memory_does_not_grow_with_the_set(tmp_path):
    for i in range(500):
        Image.new("RGB", (1, 1), (i % 256, i // 256, 0)).save(tmp_path / f"{i}.bmp")
    for start in ("first", "later"):
        with memory_taken() as taken:
            x = load(tmp_path, 256, 3).x
            assert x.float().sum() > 0  # read all of it
        assert x.nbytes > 90 * 2**20 and taken["private"] < 80, (start, taken)


@linux
@torture
def test_a_zip_of_a_million_entries_is_refused(tmp_path):
    """Its one entry is listed a million times: to pack them takes minutes."""
    packed = tmp_path / "anime.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.png", b"")
    raw, start = packed.read_bytes(), archive.start_dir
    local, entries, end = raw[:start], raw[start:-22] * 10**6, raw[-22:]
    size = len(entries).to_bytes(4, "little")  # zipfile reads so many bytes of entries
    packed.write_bytes(local + entries + end[:12] + size + end[16:])
    with memory_taken() as taken, pytest.raises(download.WrongContent, match="1000000 entries"):
        download.unpack(packed, tmp_path / "anime")
    assert [*tmp_path.iterdir()] == [packed]
    print(f"a zip of a million entries: refused, {taken['peak']:,.0f} MB more")
