"""Proof that the scripts of data/ do what they say: with no network but this machine's own."""

from __future__ import annotations

import csv
import http.server
import io
import random
import struct
import sys
import threading
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import download
import draw_faces

from test_infogan import said_one_line

# drawn faces --------------------------------------------------------------------------------------


def test_drawn_faces(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, n in ((a, 30), (b, 12)):
        assert draw_faces.main([str(folder), "--n", str(n), "--size", "32"]) == 0
    with open(a / "factors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and rows[3]["file"] == "000003.png"
    assert (a / "000011.png").read_bytes() == (b / "000011.png").read_bytes()
    assert draw_faces.FACTORS["hair_colour"] == draw_faces.FACTORS["eye_colour"] == 10
    assert draw_faces.FACTORS["hair_style"] >= 5
    assert sum(v is None for v in draw_faces.FACTORS.values()) >= 5
    base = draw_faces.sample_factors(random.Random(0))
    low = [
        draw_faces.draw_face({**base, name: 0 if n else -1.0})
        for name, n in draw_faces.FACTORS.items()
    ]
    high = [
        draw_faces.draw_face({**base, name: 1 if n else 1.0})
        for name, n in draw_faces.FACTORS.items()
    ]
    for x, y, name in zip(low, high, draw_faces.FACTORS, strict=True):
        changed = sum(p != q for p, q in zip(x.tobytes(), y.tobytes(), strict=True))
        assert changed > 60, name
    assert draw_faces.main([str(a), "--n", "5", "--only", "tilt,hair_style"]) == 0
    with open(a / "factors.csv", newline="") as file:
        varied = list(csv.DictReader(file))
    assert [row["tilt"] for row in varied] == [row["tilt"] for row in rows[:5]]
    assert {row["mouth"] for row in varied} == {"0"} and len(list(a.glob("*.png"))) == 5
    with pytest.raises(SystemExit):
        draw_faces.main([str(a), "--only", "nose"])
    assert "nose" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_text("precious")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        draw_faces.main([str(tmp_path / "mine"), "--n", "3"])
    assert stop.value.code == 2 and (tmp_path / "mine/photo.png").read_text() == "precious"
    said_one_line(capsys, "mine")


# the download -----------------------------------------------------------------------------------

NOISE = random.Random(0).randbytes(200_000)
NOBODY = "http://127.0.0.1:1/"  # nothing listens there


def make_zip(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, NOISE)
    return buffer.getvalue()


GOOD = make_zip("data/1.png", "data/data/1.png", "data/nul.JPG", "data/._1.png", "note.txt")


@pytest.fixture
def serve(monkeypatch):
    """Serve a body: only its first `cut` bytes, never if `hang`, from the start if not `ranges`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers, release = [], threading.Event()

    def start(body=b"", code=200, cut=None, hang=False, ranges=True):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                first = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
                if hang:
                    release.wait(5)
                self.send_response(416 if first >= len(body) > 0 else 206 if first else code)
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(max(0, len(body) - first)))
                self.end_headers()
                self.wfile.write(body[first:cut])

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        servers[-1].handle_error = lambda *_: None  # a client that hangs up is part of the test
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    release.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def get(url, out, capsys):
    code = download.main(["--url", url, "--out", str(out), "--timeout", "0.5"])
    said = capsys.readouterr()
    if code:
        assert said.err.count("\n") == 1 and download.PAGE in said.err and "make demo" in said.err
    return code, said.out + said.err


def left(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("cut, ranges", [(250_000, True), (250_000, False), (None, True)])
def test_download(tmp_path, capsys, serve, cut, ranges):
    out, part = tmp_path / "anime", tmp_path / "anime.zip.part"
    for folder in (out, tmp_path / "anime.unpacking"):  # the second as a killed run leaves it
        folder.mkdir()
        (folder / ".gitkeep").touch()
    if cut:
        code, said = get(serve(GOOD, cut=cut), out, capsys)
        assert code == 2 and "stopped at 0.2/1.0 MB" in said
    else:
        part.write_bytes(GOOD)  # whole: the server answers 416
    assert part.read_bytes() == GOOD[:cut] and left(out) == [".gitkeep"]
    kept = len(GOOD[:cut]) if ranges else 0
    zeros = bytes(kept) + GOOD[kept:]  # a good zip only for who does not ask for `kept` again
    code, said = get(serve(zeros, ranges=ranges), out, capsys)
    assert code == 0 and said.startswith("2 pictures in ") and (out / "1.png").read_bytes() == NOISE
    assert left(tmp_path) == ["anime/.gitkeep", "anime/1.png", "anime/2-nul.JPG"]
    code, said = get(NOBODY, out, capsys)
    assert code == 0 and said.startswith("2 pictures are already in ")


BAD = [(make_zip("ok.png", name), "unsafe") for name in ("../a.png", "..\\a.png", "/a.png", "C:a")]
BAD += [(b"<!doctype html>", "not a zip"), (make_zip("a.txt"), "no pictures")]
BAD += [(make_zip("a.png").replace(NOISE, NOISE[::-1]), "CRC"), (make_zip(*"abcd"), "4 entries")]


@pytest.mark.parametrize("answer, word", [
    *((dict(body=body), word) for body, word in BAD),
    (dict(code=404), "404"), (dict(hang=True), "timed out"),
])  # fmt: skip
def test_download_failures(tmp_path, capsys, serve, monkeypatch, answer, word):
    monkeypatch.setattr(download, "MAX_ENTRIES", 3)
    code, said = get(serve(**answer), tmp_path / "anime", capsys)
    assert code == 2 and word in said and list(tmp_path.iterdir()) == []


def torture_a_million_entries(tmp_path, capsys, serve):
    """Packed by hand: zipfile would take minutes for it."""
    import resource

    n, name = 10**6, b"a.png"
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *[0] * 4, *[0] * 3, len(name), *[0] * 6)
    where, size = len(local), n * len(entry + name)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, where)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, where + size, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, size, where, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, said = get(serve(local + (entry + name) * n + end), tmp_path / "anime", capsys)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert code == 2 and "1000000 entries" in said and list(tmp_path.iterdir()) == []
    with capsys.disabled():
        print(f"\na zip of a million entries: refused, {more:,.0f} MB more")
