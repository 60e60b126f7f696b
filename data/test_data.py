"""Proof that the scripts of data/ do what they say: with no network but this machine's own."""

import csv
import http.server
import io
import itertools
import json
import math
import random
import threading
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path

import download
import draw_faces
import measure
import torch
from PIL import Image, ImageChops
from pytest import approx, fixture, mark, raises
from torch import Tensor

from infogan import Codes, CodeSpec
from test_infogan import cache, files_in, said_one_line, seeded, train  # noqa: F401 (a fixture for all tests)

# drawn faces --------------------------------------------------------------------------------------


def draw(folder: Path, flags: str) -> list[dict[str, str]]:
    """Draws into a folder; the rows of its table."""
    assert draw_faces.main([str(folder), *flags.split()]) == 0
    with open(folder / "factors.csv", newline="") as file:
        return list(csv.DictReader(file))


def drawn(**factors: float) -> Image.Image:
    """The face with these factors, the others 0."""
    return draw_faces.draw_face(dict.fromkeys(draw_faces.FACTORS, 0) | factors)


def test_a_face_depends_on_its_seed_and_number_and_its_row_draws_it_again(tmp_path):
    rows = draw(tmp_path, "--n 30 --size 32 --seed 1")
    other, same = (draw_faces.picture(11, seed, 32, draw_faces.FACTORS)[1] for seed in (0, 1))
    assert other != same == (tmp_path / "000011.png").read_bytes()
    assert [row["file"] for row in rows] == sorted(path.name for path in tmp_path.glob("*.png"))
    for row in rows:
        file = tmp_path / row.pop("file")
        again = draw_faces.draw_face({name: float(value) for name, value in row.items()}, 32)
        assert again.tobytes() == Image.open(file).tobytes()


@mark.parametrize("factor, n", draw_faces.FACTORS.items())
def test_every_value_of_a_factor_is_sampled_and_seen(factor, n):
    sampled = [draw_faces.sample_factors(random.Random(i))[factor] for i in range(300)]
    values = {*range(n)} if n else {-1, 0, 1}
    assert {round(value) for value in sampled} == values
    assert min(values) <= min(sampled) and max(sampled) <= max(values)
    for one, two in itertools.combinations([drawn(**{factor: value}) for value in values], 2):
        changed = ImageChops.difference(one, two).convert("L").histogram()[1:]
        assert sum(changed) > 20


@mark.parametrize("factor, colours", [
    ("hair_colour", draw_faces.HAIR_COLOURS), ("eye_colour", draw_faces.EYE_COLOURS),
    ("background", draw_faces.BACKGROUNDS),
])  # fmt: skip
def test_colours_are_drawn_as_they_are_named(factor, colours):
    colours = [*colours.values()]
    for k, colour in enumerate(colours):
        seen = {each for n, each in drawn(**{factor: k}).getcolors(64 * 64) if n > 9}
        assert seen & {*colours} == {colour}


def test_no_two_hair_colours_are_close():
    """A category takes two that are close: brown and red at 79, black and brown at 98."""
    pairs = itertools.combinations(draw_faces.HAIR_COLOURS.values(), 2)
    assert min(math.dist(*pair) for pair in pairs) > 100


def test_only_lets_the_named_factors_vary(tmp_path):
    rows = draw(tmp_path / "all", "--n 40")
    varied = draw(tmp_path / "two", "--n 40 --only tilt,hair_style")
    for row, one in zip(rows, varied, strict=True):
        free = {name: row[name] for name in ("file", "tilt", "hair_style")}
        assert one == dict.fromkeys(row, "0") | free


def refused(folder, capsys, flags):
    before = files_in(folder)
    with raises(SystemExit) as stop:
        draw_faces.main([str(folder), "--size", "16", *flags.split()])
    assert stop.value.code == 2
    said_one_line(capsys, str(folder), "another folder")
    assert files_in(folder) == before


def test_another_drawing_is_left_as_it_is_and_an_interrupted_one_goes_on(tmp_path, capsys):
    draw(tmp_path, "--n 5 --size 16")
    for other in ("--n 4", "--n 5 --seed 1", "--n 5 --only tilt"):
        refused(tmp_path, capsys, other)
    whole, table = files_in(tmp_path), tmp_path / "factors.csv"
    (tmp_path / "000004.png").unlink()
    draw(tmp_path, "--n 5 --size 16")
    assert files_in(tmp_path) == whole
    table.rename(tmp_path / "factors.csv.part")
    assert len(draw(tmp_path, "--n 4 --size 16")) == len([*tmp_path.glob("*.png")]) == 4
    (tmp_path / "000003.png").rename(tmp_path / "photo.png")
    refused(tmp_path, capsys, "--n 4")


@mark.parametrize("name", ["photo.png", "000000.png", "factors.csv"])
def test_a_folder_of_other_files_is_left_as_it_is(tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    refused(tmp_path, capsys, "--n 3")


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


@fixture
def serve(monkeypatch):
    """Serve a body: only its first `cut` bytes, after `delay` s, from the start if not `ranges`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ExitStack() as servers:

        def start(body=b"", code=200, cut=None, delay=0.0, ranges=True):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    first = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
                    time.sleep(delay)
                    self.send_response(416 if first >= len(body) > 0 else 206 if first else code)
                    self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
                    self.send_header("Content-Length", str(max(0, len(body) - first)))
                    self.end_headers()
                    self.wfile.write(body[first:cut])

                def log_message(self, *args):
                    pass

            address = ("127.0.0.1", 0)
            server = servers.enter_context(http.server.ThreadingHTTPServer(address, Handler))
            server.handle_error = lambda *_: None  # a client that hangs up is part of the test
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/"

        yield start


def get(url, out, capsys, code=0):
    """What a download says that ends with this exit code."""
    assert download.main(f"--url {url} --out {out} --timeout 0.5".split()) == code
    said = capsys.readouterr()
    if code:
        assert said.err.count("\n") == 1 and download.PAGE in said.err and "make demo" in said.err
    return said.out + said.err


@mark.parametrize("cut, ranges", [(250_000, True), (250_000, False), (None, True)])
def test_a_download_goes_on_where_it_stopped(tmp_path, capsys, serve, cut, ranges):
    out, part = tmp_path / "anime", tmp_path / "anime.zip.part"
    for folder in (out, tmp_path / "anime.unpacking"):  # the second as a killed run leaves it
        folder.mkdir()
        (folder / ".gitkeep").touch()
    if cut:
        assert "stopped at 0.2/1.0 MB" in get(serve(GOOD, cut=cut), out, capsys, 2)
    else:
        part.write_bytes(GOOD)  # whole: the server answers 416
    assert part.read_bytes() == GOOD[:cut] and {*files_in(out)} == {out / ".gitkeep"}
    kept = len(GOOD[:cut]) if ranges else 0
    zeros = bytes(kept) + GOOD[kept:]  # a good zip only for who does not ask for `kept` again
    assert get(serve(zeros, ranges=ranges), out, capsys).startswith("2 pictures in ")
    assert {*files_in(tmp_path)} == {out / ".gitkeep", out / "1.png", out / "2-nul.JPG"}
    assert (out / "1.png").read_bytes() == NOISE
    assert get(NOBODY, out, capsys).startswith("2 pictures are already in ")


BAD = [(make_zip("ok.png", name), "unsafe") for name in ("../a.png", "..\\a.png", "/a.png", "C:a")]
BAD += [(b"<!doctype html>", "not a zip"), (make_zip("a.txt"), "no pictures")]
BAD += [(make_zip("a.png").replace(NOISE, NOISE[::-1]), "CRC"), (make_zip(*"abcd"), "4 entries")]


@mark.parametrize("answer, word", [
    *((dict(body=body), word) for body, word in BAD),
    (dict(code=404), "404"), (dict(delay=2), "timed out"),
])  # fmt: skip
def test_a_failed_download_leaves_nothing_and_says_why(
    tmp_path, capsys, serve, monkeypatch, answer, word
):
    monkeypatch.setattr(download, "MAX_ENTRIES", 3)
    assert word in get(serve(**answer), tmp_path / "anime", capsys, 2)
    assert list(tmp_path.iterdir()) == []


# measure.py ---------------------------------------------------------------------------------------


def blank(codes: Codes) -> Tensor:
    return torch.zeros(len(codes.z), 3, 16, 16)


def grey(codes: Codes, field: str, column: int = 0) -> Tensor:
    """One code's value as a brightness, (n, 1, 1, 1)."""
    return getattr(codes, field)[:, column, None, None, None].float()


def compare(cat: list[Tensor], cont: list[Tensor], factors: list[Tensor]) -> dict:
    """compare_factors for columns of codes and of factors."""
    columns = [torch.stack(c, 1) if c else torch.zeros(len(factors[0]), 0) for c in (cat, cont)]
    names = CodeSpec(len(cat), n_cont=len(cont)).names
    named = {f"f{i}": measure.labels_of(f.float()) for i, f in enumerate(factors)}
    return measure.compare_factors(columns[0].long(), columns[1], named, names, seeded())


# measure: effects --------------------------------------------------------------------------------


def test_effects_of_a_sum_of_parts_are_their_shares_of_the_variance():
    """z shifts the whole picture, cat0 its left half, cont0 paints stripes; cont1 does nothing."""
    spec = CodeSpec(n_cat=1, cat_dim=4, n_cont=2, z_dim=1)
    stripes = torch.tensor([1.0, 1, -1, -1]).repeat(4)

    def draw(codes: Codes) -> Tensor:
        x = blank(codes) + 0.5 * grey(codes, "z") + stripes * grey(codes, "c_cont")
        x[..., :8] += 0.5 * grey(codes, "c_cat")
        return x

    rows = measure.measure_effects(draw, spec, 8000, seeded())
    # pixels times squared size times the code's variance: 1, (4^2 - 1) / 12 and 1 / 3
    parts = {"z": 256 * 0.25, "cat0": 128 * 0.25 * 15 / 12, "cont0": 256 / 3}
    for name, part in parts.items():
        assert rows[name]["effect"] == approx(part / sum(parts.values()), abs=0.015)
    assert rows["z"]["edges"] < 1e-3 < rows["cat0"]["edges"]
    assert rows["cont0"]["coarse"] < 1e-6  # four columns, which make one coarse pixel, cancel
    assert rows["all cat"] == rows["cat0"]
    assert rows["cont1"] == {"effect": 0, "edges": 0, "coarse": 0}


def test_tint_is_1_for_a_map_of_colours_and_low_for_a_moved_shape():
    x, colours, light = (torch.rand(8, 3, n, n, generator=seeded(n)) for n in (16, 3, 1))
    mixed = torch.einsum("nij,njhw->nihw", colours[:, 0], x) + light  # each face in its own way
    assert measure.tint(x, mixed) > 0.999 and measure.tint(x, x) == 0
    here = torch.zeros(8, 1, 16, 16)
    here[..., 2:6, 2:6] = 1
    # of 256 pixels 16 are bright, before and after: the best map leaves 16 (1 - 16 / 240) of 32
    moved = measure.tint(here, here.roll(7, 3))
    assert moved == approx(1 - (1 - 16 / 240) / 2, abs=0.001)


def test_tint_of_each_code_comes_from_that_code_alone():
    """cat0 and cont0 colour the picture, cont1 moves it."""
    spec, noise = CodeSpec(1, 3, 2, 1), torch.rand(3, 16, 16, generator=seeded())

    def draw(codes: Codes) -> Tensor:
        x = torch.where(grey(codes, "c_cont", 1) > 0, noise.roll(5, 2), noise)
        return x * (1 + 0.2 * grey(codes, "c_cat")) + 0.2 * grey(codes, "c_cont")

    tints = measure.measure_tints(draw, spec, 50, seeded())
    assert tints["cat0"] > 0.99 and tints["cont0"] > 0.99 and tints["cont1"] < 0.7, tints


# measure: mutual information ---------------------------------------------------------------------


def written(codes: Codes) -> Tensor:
    """cat0 lights one of four quarters, cont0 sets the rest; cat1 and cont1 are not drawn."""
    x = blank(codes) + 0.5 * grey(codes, "c_cont")
    lit = torch.nn.functional.one_hot(codes.c_cat[:, 0], 4).view(-1, 1, 2, 2).float()
    return x + torch.nn.functional.interpolate(lit, scale_factor=8)


def test_a_new_q_reads_what_is_drawn_and_nothing_else():
    spec = CodeSpec(n_cat=2, cat_dim=4, n_cont=2, z_dim=1)
    MI, shuffled = measure.measure_MI(written, spec, 1000, 150, 0.2, seeded(), "cpu")
    assert math.log(4) - 0.1 < MI[0] <= math.log(4)
    # the best Gaussian of a code that cannot be read has the variance 1/3 of a uniform one
    unseen = math.log(2) - 0.5 * math.log(2 * math.pi * math.e / 3)
    assert MI[2] > 0.8 and abs(MI[1]) < 0.05 and MI[3] == approx(unseen, abs=0.06)
    assert shuffled[0] < -1 and shuffled[2] < -1 and (shuffled < 0.02).all(), shuffled
    MI, _ = measure.measure_MI(written, spec, 500, 40, 40.0, seeded(), "cpu")
    assert MI[0] < 0.1 and MI[2] < 0.1, "noise does not hide it"


@mark.parametrize(
    "n_cat, n_cont, size, channels", [(0, 2, 16, 1), (2, 0, 32, 3), (0, 0, 64, 3), (1, 1, 128, 3)]
)
def test_every_kind_and_size_is_measured(n_cat, n_cont, size, channels):
    spec = CodeSpec(n_cat, 3, n_cont, z_dim=2)
    kinds = [f"all {kind}" for kind in spec.kinds]

    def draw(codes):
        return torch.rand(len(codes.z), channels, size, size)

    assert [*measure.measure_effects(draw, spec, 4, seeded())] == ["z", *kinds, *spec.names]
    assert [*measure.measure_tints(draw, spec, 2, seeded())] == spec.names
    if spec.names:
        MI, _ = measure.measure_MI(draw, spec, 1, 1, 0.2, seeded(), "cpu")
        assert len(MI) == len(spec.names) and MI.isfinite().all()


# measure: factors --------------------------------------------------------------------------------


def some_factors() -> tuple[Tensor, Tensor]:
    """A factor of 4 values and a continuous one, 4,000 faces."""
    return torch.randint(4, (4000,), generator=seeded(1)), torch.rand(4000, generator=seeded(2))


def test_codes_that_are_the_factors_score_1_under_any_names_and_scale():
    kind, tilt = some_factors()
    renamed, dead = torch.tensor([2, 0, 3, 1])[kind], torch.zeros(4000)
    for cat, cont in (([kind], [tilt]), ([renamed, dead], [-100 * tilt, dead])):
        known = compare(cat, cont, [kind, tilt])
        assert known["MIG"] > 0.97 and known["FactorVAE"] == 1 and known["found"] == 2
        assert [row["code"] for row in known["factors"].values()] == ["cat0", "cont0"]
    assert compare([kind], [], [kind])["MIG"] == approx(1, abs=1e-5)  # without a rival


def test_codes_that_know_nothing_score_as_chance_and_half_a_factor_has_no_gap():
    kind, tilt = some_factors()
    known = compare([kind.roll(1)], [tilt.roll(1)], [kind, tilt])
    assert abs(known["MIG"]) < 0.02 and known["found"] == 0
    assert 0.4 < known["FactorVAE"] < 0.6  # one of two factors
    known = compare([kind % 2, kind // 2], [], [kind])
    assert abs(known["MIG"]) < 0.01 and known["found"] == 1
    assert known["factors"]["f0"]["NMI"] == approx(0.5, abs=0.01)


def test_the_votes_that_name_a_factor_are_not_those_that_are_checked(monkeypatch):
    """With two votes for each of ten codes, those that also named it would nearly all be right."""
    monkeypatch.setattr(measure, "VOTES", 20)
    draws = torch.randint(4, (20, 2000), generator=seeded())
    assert compare([*draws[:10]], [], [*draws[10:]])["FactorVAE"] < 0.4


# measure: files ----------------------------------------------------------------------------------


@fixture(scope="module")
def two_factors(tmp_path_factory) -> Path:
    """200 drawn faces, of which two factors vary."""
    folder = tmp_path_factory.mktemp("drawn")
    draw(folder, "--n 200 --size 16 --only blush,tilt --workers 1")
    return folder


@fixture(scope="module")
def small(two_factors, tmp_path_factory) -> str:
    """A checkpoint with codes of both kinds."""
    out = tmp_path_factory.mktemp("run")
    train(two_factors, out, "--max-steps 1")
    return str(out / "last.pt")


def test_the_command_prints_its_figures_and_writes_the_same(small, two_factors, tmp_path, capsys):
    capsys.readouterr()
    out, told = tmp_path / "figures.json", []
    flags = f"{small} --n 50 --steps 3 --faces {two_factors} --device cpu --json {out}"
    for seed in (1, 2):  # of PyTorch's own chance, which must not count
        torch.manual_seed(seed)
        assert measure.main(flags.split()) == 0
        told.append((capsys.readouterr().out, out.read_text()))
    (text, written), again = told
    assert again == (text, written)
    figures = json.loads(written)
    lines = {line[:8].strip(): line[8:].split() for line in text.splitlines()}
    for name, row in figures["codes"].items():
        assert lines[name] == [f"{value:.3f}" for value in row.values()]
    assert [*figures["codes"]["cat0"]] == lines["code"] and "MI" in lines["code"]
    assert {*figures["faces"]["factors"]} == {"blush", "tilt"}  # the others do not vary
    assert f"MIG {figures['faces']['MIG']:.3f}" in text


def test_faces_are_matched_by_their_names(tmp_path):
    colours = {"b.png": "white", "a.png": "black", "c.png": "#808080"}
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    rows = [f"{name},{i % 2}" for i in range(64) for name in colours]
    (tmp_path / "factors.csv").write_text("\n".join(["file,x", *rows]))
    files, factors = measure.read_factors(tmp_path)
    assert factors["x"].tolist() == [0, 0, 0, 1, 1, 1] * 32
    brightness = lambda x: (x.new_zeros(len(x), 1, 2), x.mean((1, 2, 3)), None)  # noqa: E731
    _, seen = measure.read_codes(brightness, files, 1, 16, "cpu")  # as its Q would read a code
    assert seen.tolist() == approx([1, -1, 128 / 127.5 - 1] * 64, abs=1e-5)


def test_what_a_user_can_mend_is_one_line(small, two_factors, tmp_path, capsys):
    capsys.readouterr()

    def refused(flag: str, path: Path, *words: str) -> None:
        assert measure.main(f"{small} --n 4 --steps 0 {flag} {path}".split()) == 2
        said_one_line(capsys, "measure.py", str(path), *words)

    refused("--faces", tmp_path, "factors.csv", "draw_faces.py")
    table = tmp_path / "factors.csv"
    for rows in ("", "file,x", "file,x\na.png,blue", "file,x\na.png", "file,x\na.png,1\nb.png,2"):
        table.write_text(rows)
        refused("--faces", tmp_path)
    table.write_text((two_factors / "factors.csv").read_text())
    refused("--faces", tmp_path, "000000.png", "draw the folder again")
    for path in (tmp_path, tmp_path / "gone/figures.json"):  # told before anything is measured
        refused("--json", path, "cannot be written")
