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
from PIL import Image, ImageChops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import download
import draw_faces

from test_infogan import said_one_line

# drawn faces --------------------------------------------------------------------------------------


def read_table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "factors.csv", newline="") as file:
        return list(csv.DictReader(file))


def drawn(**factors: float) -> Image.Image:
    """The face with these factors, the others 0."""
    return draw_faces.draw_face(dict.fromkeys(draw_faces.FACTORS, 0) | factors)


def test_a_face_depends_on_nothing_but_the_seed_and_its_number(tmp_path):
    folders = [tmp_path / name for name in ("many", "few", "other seed")]
    for folder, n, seed in zip(folders, ("30", "12", "12"), ("0", "0", "1"), strict=True):
        assert draw_faces.main([str(folder), "--n", n, "--size", "32", "--seed", seed]) == 0
    assert len(list(folders[0].glob("*.png"))) == 30
    many, few, other = ((folder / "000011.png").read_bytes() for folder in folders)
    assert many == few != other


def test_each_row_of_the_table_draws_its_picture_again(tmp_path):
    assert draw_faces.main([str(tmp_path), "--n", "9"]) == 0
    rows = read_table(tmp_path)
    assert [row["file"] for row in rows] == [f"{i:06d}.png" for i in range(9)]
    for row in rows:
        again = draw_faces.draw_face({name: float(row[name]) for name in draw_faces.FACTORS})
        assert again.tobytes() == Image.open(tmp_path / row["file"]).tobytes()


CATEGORIES = {"hair_colour": 10, "hair_style": 6, "eye_colour": 10, "background": 6, "blush": 2}


@pytest.mark.parametrize("factor, n", CATEGORIES.items())
def test_every_category_is_sampled_and_looks_its_own_way(factor, n):
    sampled = {draw_faces.sample_factors(random.Random(i))[factor] for i in range(300)}
    assert sampled == {*range(n)}
    assert len({drawn(**{factor: k}).tobytes() for k in range(n)}) == n


@pytest.mark.parametrize("factor", ["hair_colour", "eye_colour", "background"])
def test_colours_are_drawn_as_they_are_named(factor):
    table = {
        "hair_colour": draw_faces.HAIR_COLOURS,
        "eye_colour": draw_faces.EYE_COLOURS,
        "background": draw_faces.BACKGROUNDS,
    }[factor]
    for k, (name, colour) in enumerate(table.items()):
        seen = {each for n, each in drawn(**{factor: k}).getcolors(64 * 64) if n > 9}
        assert seen & {*table.values()} == {colour}, name
        if name in ("red", "green", "blue"):
            assert colour[("red", "green", "blue").index(name)] == max(colour), name


@pytest.mark.parametrize("factor", [f for f in draw_faces.FACTORS if f not in CATEGORIES])
def test_every_continuous_factor_is_sampled_over_its_range_and_seen(factor):
    sampled = [draw_faces.sample_factors(random.Random(i))[factor] for i in range(300)]
    assert -1 <= min(sampled) < -0.9 and 0.9 < max(sampled) <= 1
    left, middle, right = (drawn(**{factor: value}) for value in (-1, 0, 1))
    for a, b in ((left, middle), (middle, right), (left, right)):
        changed = ImageChops.difference(a, b).convert("L").point(bool).histogram()[1]
        assert changed > 20, changed


def test_only_lets_the_named_factors_vary(tmp_path, capsys):
    for flags in ([], ["--only", "tilt,hair_style"]):
        assert draw_faces.main([str(tmp_path / str(len(flags))), "--n", "40", *flags]) == 0
    rows, varied = (read_table(tmp_path / name) for name in "02")
    for name in draw_faces.FACTORS:
        values = [row[name] for row in varied]
        free = name in ("tilt", "hair_style")
        assert values == ([row[name] for row in rows] if free else ["0"] * 40), name
    with pytest.raises(SystemExit) as stop:
        draw_faces.main([str(tmp_path), "--only", "nose"])
    assert stop.value.code == 2 and "nose" in capsys.readouterr().err


def test_a_smaller_drawing_replaces_a_larger_one(tmp_path):
    for n in (7, 5):
        assert draw_faces.main([str(tmp_path), "--n", str(n), "--size", "16"]) == 0
    assert len(list(tmp_path.glob("*.png"))) == len(read_table(tmp_path)) == 5


def test_a_folder_of_other_files_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "photo.png").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        draw_faces.main([str(tmp_path), "--n", "3"])
    assert stop.value.code == 2 and (tmp_path / "photo.png").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1
    said_one_line(capsys, str(tmp_path))


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
def test_a_download_goes_on_where_it_stopped(tmp_path, capsys, serve, cut, ranges):
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
def test_a_failed_download_leaves_nothing_and_says_why(
    tmp_path, capsys, serve, monkeypatch, answer, word
):
    monkeypatch.setattr(download, "MAX_ENTRIES", 3)
    code, said = get(serve(**answer), tmp_path / "anime", capsys)
    assert code == 2 and word in said and list(tmp_path.iterdir()) == []


def torture_a_zip_of_a_million_entries_is_refused(tmp_path, capsys, serve):
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
