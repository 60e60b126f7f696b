"""Proof that generate.py and the explorer's page do what they say: on the CPU, with no network.

python -m pytest -q data/test_generate.py    in a browser too where there is a Chromium
"""

# ruff: noqa: F811 (a fixture that is imported, and the argument of a test that takes it)
from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_infogan import (  # noqa: F401, I001 (it settles the threads before torch is loaded)
    CPU, HERE, TINY, cache, ckpt, faces, few_pictures, free_port, kill, said_one_line, seeded,
    stopped_tests_clean_up, tiny, wait_until,
)  # fmt: skip

import generate
import infogan
from infogan import Codes, CodeSpec, Generator

generate.N_MEASURED, generate.N_MOVED = 64, 16  # figures need no more here

# generate.py --------------------------------------------------------------------------------------

SEVERAL = ["characters", "overview", "samples"]
SHEETS = ("--rows", "3", "--steps", "5", "--gif")
FEW = ("--rows", "1", "--steps", "2")


def run(*argv: object) -> None:
    """A call of generate.py that ends well."""
    assert generate.main([*map(str, argv)]) == 0


def draws(argv: list[object], out: Path) -> dict[str, bytes]:
    """What generate.py leaves in out, by name."""
    run(*argv, "--out", out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def refused(capsys, argv: list[object], *words: str) -> str:
    """What generate.py says of a command that it refuses: one line with these words."""
    capsys.readouterr()
    assert generate.main([*map(str, argv)]) == 2, argv
    return said_one_line(capsys, *words)


@pytest.fixture(scope="session")
def sheets(ckpt, tmp_path_factory) -> Path:
    """What generate.py leaves of ckpt."""
    out = tmp_path_factory.mktemp("sheets")
    draws(["--ckpt", ckpt, *SHEETS], out)
    return out


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """G's inputs, each time that something is drawn."""
    drawn, real = [], generate.in_parts

    def note(model: generate.Model, net: Callable, x: torch.Tensor) -> object:
        if net is model.G:
            drawn.append(x)
        return real(model, net, x)

    monkeypatch.setattr(generate, "in_parts", note)
    return drawn


def lively(path: Path, *flags: str) -> generate.Model:
    """A checkpoint whose codes change pictures, with no batch statistic as at its start."""
    args = infogan.parse_args(["--channels", "3", *flags])
    state = infogan.new_state(args, CPU)
    for t in (p for p in state.G_ema.state_dict().values() if p.is_floating_point()):
        t.add_(0.05 * torch.randn(t.shape, generator=seeded()))
    torch.save(infogan.gather_checkpoint(state, args, ""), path)
    return generate.Model(str(path), CPU)


def table_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_code_has_a_sheet_and_a_loop_the_same_each_time(ckpt, sheets, tmp_path):
    made = draws(["--ckpt", ckpt, *SHEETS], tmp_path)
    names = ["cat0", "cat1", "cont0", "cont1", "cont2"]
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "gif")}
    expected |= {f"{name}.png" for name in SEVERAL}
    assert made.keys() == expected | {"table.csv", infogan.MARK}
    sheet = Image.open(sheets / "cont0.png")
    assert sheet.width >= 5 * 64 and sheet.height >= 3 * 64
    assert made == {path.name: path.read_bytes() for path in sheets.iterdir()}


def test_the_table_has_the_strongest_codes_first_and_the_tint_of_codes_alone(sheets):
    groups, codes = (rows := table_of(sheets / "table.csv"))[:3], rows[3:]
    assert [(r["code"], r["tint"]) for r in groups] == [("z", ""), ("cat", ""), ("cont", "")]
    assert sorted(r["code"] for r in codes) == ["cat0", "cat1", "cont0", "cont1", "cont2"]
    assert all(0 <= float(r["tint"]) <= 1 for r in codes)
    strengths = [float(r["effect"]) for r in codes]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] > 0


def no_measuring(model: generate.Model) -> None:
    raise AssertionError("measured again")


def test_a_table_is_used_again_by_all_modes_for_this_checkpoint_alone(
    ckpt, sheets, tmp_path, monkeypatch, capsys
):
    """Whatever the seed and the checkpoint's path are; names are those of today."""
    first, out, before = tmp_path / "a.pt", tmp_path / "out", (sheets / "table.csv").read_bytes()
    shutil.copy(ckpt, first)
    shutil.copytree(sheets, out)
    (tmp_path / "names.json").write_text('{"cont1": "tilt"}')
    with monkeypatch.context() as patch:
        patch.setattr(generate, "measure", no_measuring)
        for flags in (["--explorer"], [*FEW, "--codes", "cat0", "--seed", 5]):
            draws(["--ckpt", first, *flags], out)
            told = capsys.readouterr().out
            assert f"figures from {out / 'table.csv'}\n" in told and " tilt\n" in told
    lively(tmp_path / "b.pt", *TINY, "--n-cont", "3")
    made = draws(["--ckpt", tmp_path / "b.pt", "--versus", first], out)  # each of another
    assert "figures" not in capsys.readouterr().out and made["table.csv"] != before
    assert made[f"table-{tmp_path.name}-a.csv"].replace(b"tilt", b"") == before


MODES = {  # the flags of each that writes into --out
    "sheets": ["--gif", *FEW],
    "--explorer": ["--explorer"],
    "--walk": ["--walk"],
    "--samples": ["--samples", 3, "--data", "few"],
    "--read": ["--read", "few/0.png"],
    "--sort": ["--sort", "few"],
    "--versus": ["--versus", "last.pt"],
    "--onnx": ["--onnx"],
}


@pytest.fixture
def here(ckpt, tmp_path, monkeypatch) -> Path:
    """The folder that a test is in, with last.pt and a folder of five pictures, few."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ckpt, "last.pt")
    few_pictures(tmp_path / "few")
    assert MODES.keys() | {"--shrink"} == generate.MODES.keys()
    return tmp_path


def command(mode: str, out: str) -> list[object]:
    """Of a mode of MODES that writes into a folder."""
    film = "/film.gif" if mode == "--walk" else ""
    return ["--ckpt", "last.pt", *MODES[mode], "--out", f"{out}{film}"]


def test_no_call_writes_over_the_sheets_of_another_that_shows_something_else(here):
    """What is unusual is in the names; size is not. --codes writes sheets of these codes alone."""
    run(*command("--read", "read"))
    Path("read/codes-0.csv").rename("my codes.csv")
    head, out = ["--ckpt", "last.pt", "--steps", 2], Path("out")
    before = draws([*head, "--rows", 1], out)
    of_all = [f"{name}-seed-7-set-cat0=1.png" for name in before if name.endswith(".png")]
    for flags, names in {
        "--codes cont0,cat1 --gif": ["cont0.gif", "cat1.gif"],
        "--codes cont0,cat1": [],
        "--codes cont0 --zoom 2 --range -3 2": ["cont0-range--3-2.png"],
        "--codes cont0 --range -1.5 1.5 --seed 0": [],
        "--codes cont0 --set cat0=2,cont1=-.50": ["cont0-set-cat0=2,cont1=-0.5.png"],
        "--seed 7 --set cat0=1": [name.replace(".png-", "-") for name in of_all],
    }.items():
        made = draws([*head, "--rows", 1, *flags.split()], out)
        assert sorted(made.keys() - before.keys()) == sorted(names), flags
        assert all(made[name] == raw for name, raw in before.items())
        before = made
    seeds = ",".join(map(str, range(30, 70)))
    few = [["--seeds", "3, 17"], ["--seeds", seeds], ["--seeds", seeds[:-2] + "80"]]
    few += [["--start", "my codes.csv"], ["--start", "my codes.csv", "--set", "cat0=1"]]
    for flags in few:
        made = draws([*head, *flags, "--codes", "cont0"], out)
        (new,) = made.keys() - before.keys()
        assert re.fullmatch(r"[\w.,=-]{10,90}", new) and flags[0][2:] in new
        before = made
    assert "cont0-seeds-3,17.png" in before


DAMAGES = {
    "no rows": lambda text: text.splitlines()[0],
    "a row lost": lambda text: re.sub("cont1,.*\n", "", text),
    "no number": lambda text: text.replace("cat0,", "cat0,x"),
    "no text": lambda text: "\0\udcff",
    "more samples": lambda text: text.replace(f"{generate.N_MEASURED} samples", "900 samples"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_table_is_measured_anew(sheets, ckpt, tmp_path, monkeypatch, damage):
    model, path = generate.Model(ckpt, CPU), tmp_path / "table.csv"
    text = (sheets / "table.csv").read_text()
    (tmp_path / infogan.MARK).touch()
    path.write_text(damage(text), errors="surrogateescape")
    rows = [generate.Row("z", *[math.nan] * 5)]
    monkeypatch.setattr(generate, "measure", lambda model: rows)
    generate.figures(model, path)
    assert [row["code"] for row in table_of(path)] == ["z"]


def test_low_and_high_differ_in_one_code():
    spec = CodeSpec(2, 3, 2, 1)
    codes = spec.sample(50, seeded())
    for name in ("cat0", "cont1"):
        ends = generate.low_high(spec, codes, name, seeded(1))
        assert all(spec.join(spec.replace(x, name, codes)).equal(spec.join(codes)) for x in ends)
        change = spec.join(ends[1]) - spec.join(ends[0])
        assert change.any(1).all() and (name == "cat0" or change[:, -1].unique() == 1.6)


LIVELY = ["--image-size", "16", "--width", "8"]


def test_loops_run_forth_and_back(tmp_path):
    lively(tmp_path / "last.pt", *LIVELY, "--cat-dim", "4")
    draws(["--ckpt", tmp_path, *SHEETS], tmp_path / "out")
    for code, order, duration in (("cat0", "012321", 500), ("cont1", "01234321", 100)):
        loop, shown = Image.open(tmp_path / f"out/{code}.gif"), {}
        assert loop.n_frames == len(order) and loop.info["loop"] == 0
        for i, column in enumerate(order):
            loop.seek(i)
            assert loop.info["duration"] == duration
            first = shown.setdefault(column, loop.convert("RGB"))
            assert ImageStat.Stat(ImageChops.difference(loop.convert("RGB"), first)).mean[0] < 1


def test_values_of_training_are_marked_below_their_numbers():
    """-1 to 1, of a continuous code: floats."""
    rows, bar = torch.zeros(1, 3, 3, 64, 64), (0x2F, 0x62, 0xC9)
    for above, marked in (([-2.0, -1.0, 1.0], 2), ([-2, -1, 1], 0)):
        page = generate.sheet("", [""], rows, above, 1)
        pixels = [x for x in range(page.width) if page.getpixel((x, 54 - 3)) == bar]
        assert len(pixels) == marked * 66 + (marked > 0) and min(pixels, default=78) == 78


def test_overview_has_each_code_on_the_face_that_it_changes_most(tmp_path, monkeypatch):
    """Categorical codes above, continuous ones below, each with a header of its own."""
    calls, real = [], generate.sheet
    monkeypatch.setattr(generate, "sheet", lambda *args: (calls.append(args), real(*args))[1])
    lively(tmp_path / "last.pt", *LIVELY, "--n-cont", "3", "--n-cat", "2", "--cat-dim", "7")
    draws(["--ckpt", tmp_path, "--rows", 3, "--steps", 5], tmp_path / "out")
    codes = [r["code"] for r in table_of(tmp_path / "out/table.csv") if r["tint"]]
    sheets = dict(zip(codes, calls, strict=False))
    for kind, (title, labels, rows, above, _) in zip(("cat", "cont"), calls[5:], strict=False):
        expected = [code for code in codes if code.startswith(kind)]
        assert [label.split("\n")[0] for label in labels] == expected and "strongest" in title
        for code, row in zip(expected, rows, strict=True):
            _, _, faces, columns, _ = sheets[code]
            assert row.equal(max(faces, key=lambda face: face.var(0).sum())) and above == columns
    overview = Image.open(tmp_path / "out/overview.png")
    assert overview.height == 2 * (54 + 12) + 5 * 66


@pytest.mark.parametrize("title, left, above", [
    ("t", ["one\ntwo", "a long label"], ["a", -3.0, 3.0]), ("t" * 90, ["", ""], [""] * 3),
])  # fmt: skip
def test_zoom_enlarges_whole_sheets_and_labels_fit(title, left, above):
    rows = torch.rand(2, 3, 3, 32, 32, generator=seeded()) - 0.5
    small, large = (generate.sheet(title, left, rows, above, zoom) for zoom in (1, 2))
    assert abs(large.width - 2 * small.width) < 5 and large.height == 2 * small.height
    for page in (small, large):  # nothing touches the edge, so nothing is cut
        white = Image.new("RGB", page.size, "white")
        ink = ImageChops.difference(page, white).getbbox()
        assert min(*ink[:2], page.width - ink[2], page.height - ink[3]) >= 8


def test_names_of_codes_are_told_in_the_table_and_on_sheets(here, sheets, capsys):
    """A file of names may serve two checkpoints, and may have a byte-order mark."""
    table = b'\xef\xbb\xbf{"cont1": "tilt", "cont77": "of the other run"}'
    Path("names.json").write_bytes(table)
    named = draws(["--ckpt", "last.pt", *SHEETS, "--codes", "cat0, cont1"], Path("out"))
    assert re.search("cont1 .* tilt\n", capsys.readouterr().out)
    names = {r["code"]: r["name"] for r in table_of(Path("out/table.csv"))}
    assert names["cont1"] == "tilt" and names["cat0"] == ""
    assert named["cont1.png"] != (sheets / "cont1.png").read_bytes()
    assert named["cat0.png"] == (sheets / "cat0.png").read_bytes()
    assert len(named) == 2 * 2 + 2, "sheets and loops of these codes alone, the table, our mark"


def test_names_go_with_a_shrunken_checkpoint_into_the_explorer(ckpt, tmp_path):
    (tmp_path / "names.json").write_text('{"cont1": "tilt", "cat0": "</script>"}')
    run("--ckpt", ckpt, "--names", tmp_path / "names.json", "--shrink", tmp_path / "small.pt")
    (tmp_path / "names.json").unlink()
    run("--ckpt", tmp_path / "small.pt", "--explorer")
    page = (tmp_path / "small-traversals/explorer.html").read_text()
    assert '"name": "tilt"' in page and page.count("</script>") == 1


def test_names_in_other_scripts_take_the_first_font_that_has_their_letters(monkeypatch):
    class Font:
        def __init__(self, letters: str, *_, **__):
            self.letters = letters

        def getmask(self, letter: str) -> bytes:
            return letter.encode() if letter in self.letters else b"a box"

    monkeypatch.setattr(generate, "FONTS", ["latin", "cat0 髪の色"])
    monkeypatch.setattr(generate.ImageFont, "truetype", Font)
    generate.font_for.cache_clear()
    assert generate.font_for("cat0\n髪の", 12).letters == "cat0 髪の色"
    assert generate.font_for("cat0 한", 12).letters not in generate.FONTS, "boxes, if none has them"
    generate.font_for.cache_clear()


def test_a_code_may_be_called_by_its_name(tmp_path, capsys):
    """In any case; of a name that two codes have --codes shows both, and --set asks which."""
    lively(tmp_path / "last.pt", *TINY, "--n-cont", "5")
    names = {"cont1": "Eyes, closing", "cat1": "hair", "cont3": "smile", "cont4": "SMILE"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    head, out = ["--ckpt", tmp_path, *FEW], tmp_path / "out"
    made = draws([*head, "--codes", "eyes, CLOSING,Smile,cat0"], out)
    codes = {"cat0", "cont1", "cont3", "cont4"}
    assert {name.removesuffix(".png") for name in made} == {infogan.MARK, "table.csv"} | codes
    capsys.readouterr()
    made = draws([*head, "--codes", "cont0", "--set", "Hair=2, eyes, closing=-.5,cont2=9"], out)
    assert "cont0-set-cat1=2,cont1=-0.5,cont2=9.png" in made
    said = capsys.readouterr().out
    assert "\n--set cont2=9: training has seen -1 to 1 only" in f"\n{said}"
    assert said.count("training has seen") == 1
    for flag, unknown in (("--codes", "smil"), ("--set", "=1"), ("--codes", "cat0=1")):
        refused(capsys, [*head, flag, unknown], flag, unknown, "cont3 (smile), cont4 (SMILE)")
    refused(capsys, [*head, "--set", "Smile=1"], "--set smile=1: cont3 and cont4 have this name")
    (tmp_path / "names.json").write_text(json.dumps(dict.fromkeys(["cont1", "cont2"], "a, b")))
    refused(capsys, [*head, "--set", "A, b=1"], "--set a, b=1: cont1 and cont2 have this name")


@pytest.mark.parametrize("width", [None, 30])
def test_a_table_is_cut_at_the_end_of_a_terminals_lines(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: width is not None)
    generate.print_table([["code", "L_I", "name"], ["cont10", "-1.5", "a name of over 30 letters"]])
    lines = ["code     L_I  name", "cont10  -1.5  a name of over 30 letters"]
    assert capsys.readouterr().out.splitlines() == [line[:width] for line in lines]


BAD_NAMES = {
    "no such file": None,
    "not json": "{cont1",
    "list": "[]",
    "empty": '{"cont1": ""}',
    "lines": '{"cont1": "a\\nb"}',
    "deep": "[" * 10**5,
    "typing error": '{"kont1": "tilt"}',
}


@pytest.mark.parametrize("text", BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_names_are_one_line(ckpt, tmp_path, capsys, text):
    given = tmp_path / "given.json"
    if text:
        given.write_text(text)
    refused(capsys, ["--ckpt", ckpt, "--names", given], "given.json")


def test_a_shrunken_checkpoint_is_a_quarter_and_draws_and_reads_as_before(ckpt, tmp_path):
    small = tmp_path / "small.pt"
    run("--ckpt", ckpt, "--shrink", small)
    assert small.stat().st_size < ckpt.stat().st_size / 4
    args = infogan.load_checkpoint(small)["args"]
    assert args["data"] == args["out"] == "" and args["image_size"] == 16, "no folder of its maker"
    models = [generate.Model(path, CPU) for path in (ckpt, small)]
    variances = [m.D.trunk[3].running_var for m in models]
    assert variances[0].equal(variances[1]), "too small for half precision"
    codes = models[0].spec.sample(20, seeded())
    x = generate.draw(models[0], codes)
    assert generate.draw(models[1], codes).allclose(x, atol=0.01)
    outputs = [model.D.read(x) for model in models]
    assert all(a.allclose(b, atol=0.01) for a, b in zip(*outputs, strict=True))


def test_no_run_goes_on_from_a_shrunken_checkpoint(ckpt, faces, tmp_path, capsys):
    last = tmp_path / "last.pt"
    run("--ckpt", ckpt, "--shrink", last)
    refused(capsys, ["--ckpt", ckpt, "--shrink", last], "last.pt", "exists")
    assert infogan.main(tiny(faces, tmp_path, "--max-steps", 4, "--n-cont", 3)) == 2
    said_one_line(capsys, "training cannot go on from it", "another --out")


def test_codes_of_pictures_that_are_there_are_kept(here, capsys):
    run(*command("--samples", "s"))
    before = Path("s/codes.csv").read_bytes()
    read, left = ["--ckpt", "last.pt", "--out", "s", "--read"], {*os.listdir("s")}
    for more in (["few/0.png"], ["few/1.png", "few/0.png"], ["few/0.png", "--set", "cat0=1"]):
        run(*read, *more)
    names = ["0", "1,0", "0-set-cat0=1"]
    made = {f for name in names for f in (f"codes-{name}.csv", f"read-{name}.png")}
    assert {*os.listdir("s")} == left | made
    run(*read, "few/1.png", "few/0.png")  # the same ones again
    assert {*os.listdir("s")} == left | made
    start = ["--ckpt", "last.pt", "--samples", "--start", "./s/codes.csv:1", "--out", "s"]
    refused(capsys, start, "--start ./s/codes.csv:1: --samples would write over it")
    assert Path("s/codes.csv").read_bytes() == before


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_of_others_gets_at_most_one_new_file(here, capsys, mode):
    """A later training would take pictures there for theirs."""
    Path("mine").mkdir()
    Path("mine/photo.jpg").write_bytes(b"mine")
    file = {"--explorer": "explorer.html", "--walk": "film.gif", "--onnx": "generator.onnx"}.get(
        mode
    )
    if file == "generator.onnx":
        pytest.importorskip("onnxscript")
    if file:
        run(*command(mode, "mine"))
    refused(capsys, command(mode, "mine"), f"mine{'/' * bool(file)}{file or ''}: ", "own")
    assert {path.name for path in Path("mine").iterdir()} == {"photo.jpg", file or "photo.jpg"}
    assert Path("mine/photo.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("mode", MODES.keys() - {"--onnx", "--read"})
def test_what_is_ours_is_written_again_and_never_trained_on(here, mode):
    before, left = infogan.find_pictures(here / "few"), []
    for _ in range(2):
        run(*command(mode, "few/ours"))
        left.append({path.name: path.read_bytes() for path in Path("few/ours").iterdir()})
    assert left[0] == left[1] and len(left[0]) > 1
    if mode == "--samples":
        assert Path("few/ours-real/000001.png").exists()
        Path("few/ours/000001.png").write_bytes(b"")  # by a call that was killed
        run(*command(mode, "few/ours"))
    assert infogan.find_pictures(here / "few") == before


@pytest.mark.parametrize("name, n_cat, n_cont, most", [("v3", 10, 20, 12e6), ("v1", 1, 2, 5e6)])
def test_the_included_models_are_small_and_Q_reads_what_G_was_told(name, n_cat, n_cont, most):
    path = HERE / f"checkpoint/animefaces-{name}.pt"
    assert path.stat().st_size < most
    (G, spec), D = infogan.load_generator(path), infogan.load_net(path, "D", "cpu")
    assert spec == CodeSpec(n_cat, 10, n_cont, spec.z_dim)
    ckpt = infogan.load_checkpoint(path)
    assert {*ckpt["names"]} <= {*spec.names} and ckpt["args"]["data"] == ckpt["args"]["out"] == ""
    codes = spec.sample(100, seeded())
    x = G(spec.join(codes))
    assert x.shape == (100, 3, 64, 64)
    L_I = infogan.mutual_information(spec, D(x)[1], codes)
    assert L_I[:n_cat].min() > 2 and L_I[n_cat:].mean() > 1


@pytest.mark.parametrize("categories, labels, error, nmi", [
    ([2, 2, 0, 0, 7, 7], "aabbcc", 0, 1),
    ([0] * 6, "aabbcc", 2 / 3, 0),
    ([0, 0, 1, 1], "aaaa", 0.5, 0),
    ([0, 1] * 300, "aabbcc" * 100, 2 / 3, 0),
    ([0, 0, 1, 2], "aabb", 0.25, 0.8),  # a half of b has no match left
])  # fmt: skip
def test_agreement_with_labels_has_its_closed_forms(categories, labels, error, nmi):
    labels = [*labels, ""]  # one without a label does not count
    assert generate.agreement([*categories, 5], labels) == pytest.approx((error, nmi))


SORT = ("--steps", "5", "--sort")


def test_real_pictures_are_sorted_by_what_Q_reads(ckpt, faces, tmp_path, capsys):
    """A label is the folder of a picture; one of these is there twice, and one has no label."""
    sets, out = tmp_path / "sets", tmp_path / "sorted"
    for i in range(40):
        folder = sets / ("train", "test")[i // 30] / ("red", "blue")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(faces / f"{i:06d}.png", folder / f"{i}, a.png")
    shutil.copy(faces / "000000.png", folder)
    shutil.copy(faces / "000099.png", sets)
    made = draws(["--ckpt", ckpt, *SORT, sets], out)
    told = capsys.readouterr().out
    assert told.count("NMI") == 2 and "exact copies dropped: 1" in told
    assert "labels: 2, 1 pictures without one left out" in told
    names = ["cat0", "cat1", "cont0", "cont1", "cont2"]
    assert made.keys() == {"codes.csv", infogan.MARK, *(f"{name}.png" for name in names)}
    rows = table_of(out / "codes.csv")
    assert len(rows) == 41 and [*rows[0]][:6] == ["file", *names]
    for row in rows[::9]:
        p, mu, sigma = read_by_Q(ckpt, sets / row["file"])
        assert int(row["cat1"]) == p[1].argmax()
        for name, v in {"cat1_p": p[1].max(), "cont2": mu[2], "cont2_sigma": sigma[2]}.items():
            assert float(row[name]) == pytest.approx(v.item(), abs=1e-3)


def read_by_Q(ckpt: Path, picture: Path) -> list[torch.Tensor]:
    """c_cat's probabilities, c_cont's means and sigmas of a picture."""
    x = torch.frombuffer(bytearray(infogan.read_picture(picture, 16, 3).pixels), dtype=torch.uint8)
    x = generate.to_floats(x.view(1, 16, 16, 3))
    return [part[0] for part in infogan.load_encoder(ckpt)[0](x)]


def test_sorting_takes_as_floats_a_batch_at_a_time(ckpt, faces, tmp_path, monkeypatch, capsys):
    """At 65 kB a picture, CelebA would not fit into memory. Here no picture has a label."""
    sizes, real = [], generate.to_floats
    monkeypatch.setattr(generate, "to_floats", lambda x: (sizes.append(len(x)), real(x))[1])
    draws(["--ckpt", ckpt, "--codes", "cat0,cont1", "--rows", 2, *SORT, faces], tmp_path / "out")
    assert sizes.count(generate.AT_ONCE) >= 18 and max(sizes) == generate.AT_ONCE
    said = capsys.readouterr().out
    assert "NMI" not in said and "no labels: to see" in said
    sort = ["--ckpt", ckpt, *SORT, tmp_path / "none"]
    refused(capsys, sort, "none: no such folder")


def test_a_named_set_has_labels_of_its_own(ckpt, faces, tmp_path, monkeypatch, capsys):
    pictures = infogan.load_pictures(str(faces), 16, 3)
    pictures.names = [str(i) for i in range(len(pictures.x))]
    monkeypatch.setattr(generate, "load_pictures", lambda *_, **__: pictures)
    labels = [("picture", i % 3) for i in range(len(pictures.x))]
    monkeypatch.setattr(infogan, "open_named_set", lambda name: labels)
    draws(["--ckpt", ckpt, *SORT, "mnist"], tmp_path / "out")
    assert "labels: 3, 0 pictures" in (said := capsys.readouterr().out) and said.count("NMI") == 2


HAS_ONNX = importlib.util.find_spec("onnxscript") is not None


@pytest.mark.skipif(HAS_ONNX, reason="onnxscript is here")
def test_onnx_without_its_packages_is_one_line(ckpt, tmp_path, capsys):
    refused(capsys, ["--ckpt", ckpt, "--out", tmp_path, "--onnx"], "pip install onnx onnxscript")


def test_onnx_draws_the_same(ckpt, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for _ in range(2):
        draws(["--ckpt", ckpt, "--onnx"], tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "generator.onnx")
    G, spec = infogan.load_generator(ckpt)
    for n in (1, 5):
        codes = spec.join(spec.sample(n, seeded()))
        (x,) = session.run(["x"], {"codes": codes.numpy()})
        assert G(codes).allclose(torch.from_numpy(x), atol=1e-4)
    assert "z (100), 2 categoricals" in session.get_modelmeta().description


@pytest.mark.parametrize("n_cat", [1, 2])
def test_characters_are_settings_of_all_categorical_codes_in_the_poses_of_the_rows(
    tmp_path, drawn, n_cat
):
    model = lively(tmp_path / "last.pt", *TINY, "--n-cat", str(n_cat))
    base, held = model.spec.sample(4, seeded(5)), {"cat0": 2}
    shown = generate.characters(model, base, held)
    expected = generate.sample_seeds(model.spec, range(10), held).c_cat
    expected = torch.arange(3)[:, None] if n_cat == 1 else expected
    assert shown.shape == (4, len(expected), 3, 16, 16)
    x = drawn[0].view(4, len(expected), -1)
    for k in range(len(expected)):
        assert x[:, k].equal(model.spec.join(base._replace(c_cat=expected[[k] * 4])))
    assert shown.flatten(0, 1).equal(generate.in_parts(model, model.G, drawn[0]))
    made = draws(["--ckpt", tmp_path, *FEW], tmp_path / "out")
    assert ("characters.png" in made) == (n_cat > 1), "with one code it would be cat0.png"


@pytest.mark.parametrize("name, columns", [("cat1", [5]), ("cont0", [6]), ("cat", [4, 5])])
def test_traversals_move_one_code_and_nothing_else(name, columns):
    spec = CodeSpec(2, 3, 2, 4)
    base = spec.sample(2, seeded())
    expected = torch.cat(base, 1)[:, None].repeat(1, 3, 1)  # z, c_cat, c_cont; three of each
    expected[:, :, columns] = torch.arange(3.0)[:, None]
    assert torch.cat(spec.traverse(base, name, [0, 1, 2]), 1).equal(expected.flatten(0, 1))


def test_effect_has_its_closed_form():
    """A picture that is the sum of independent parts: a part's effect is its share of variance."""
    a, b, b2 = (torch.randn(20_000, 1, 1, 1, generator=seeded(s)) for s in (1, 2, 3))
    assert generate.effect(3 * a + b, 3 * a + b2) == pytest.approx(0.1, abs=0.01)
    assert generate.effect(a, a) == 0


def test_a_flat_picture_has_no_edges():
    edges = generate.edge_map(torch.rand(4, 3, 8, 8, generator=seeded()))
    assert edges.shape == (4, 1, 6, 6) and edges.max() > 0.1
    assert generate.edge_map(torch.ones(1, 3, 8, 8)).max() < 1e-3


def test_nearest_neighbours_tell_apart_what_differs():
    x, y = (torch.rand(200, 3, 32, 32, generator=seeded(s)) for s in (0, 1))
    assert infogan.tell_apart(x, y) == pytest.approx(0.5, abs=0.1)
    assert infogan.tell_apart(x, 0.2 * y) > 0.95
    collapsed = y[:10].repeat(20, 1, 1, 1)
    assert infogan.tell_apart(x, collapsed) > 0.7


def test_two_runs_are_compared_in_a_table_and_a_picture(faces, tmp_path, capsys):
    a, b = (tmp_path / name / "last.pt" for name in "ab")
    for path, recipe in ((a, "default"), (b, "notebook")):
        path.parent.mkdir()
        lively(path, *TINY, "--recipe", recipe)
    made = draws(["--ckpt", a, "--versus", b, "--data", faces], tmp_path / "out")
    told = capsys.readouterr().out
    assert all(str(words) in told for words in (a, b, "z  ", "cat1", "L_I", "nearest neighbour"))
    assert made.keys() == {"comparison-b-last.png", "table.csv", "table-b-last.csv", infogan.MARK}
    assert made["table.csv"] != made["table-b-last.csv"]
    assert Image.open(tmp_path / "out/comparison-b-last.png").height > 64 * 2 * (1 + 2 * 8)
    lively(tmp_path / "last.pt", *TINY, "--z-dim", "7")
    versus = ["--ckpt", a, "--versus", tmp_path]
    said = refused(capsys, versus, "--versus", "other codes", "--z-dim 7, not --z-dim 100")
    assert "--n-c" not in said


def test_runs_without_codes_are_sorted_and_compared_too(faces, tmp_path):
    lively(tmp_path / "last.pt", *TINY, "--n-cat", "0", "--n-cont", "0")
    for mode in (["--versus", tmp_path], [*SORT, faces]):
        command, out = ["--ckpt", tmp_path, *mode], tmp_path / mode[0]
        assert draws(command, out) == draws(command, out)


def test_a_seed_is_the_same_picture_whatever_comes_with_it(tmp_path):
    path, sizes = HERE / "checkpoint/animefaces-v3.pt", set()
    model, draw = generate.Model(path, CPU), ["--ckpt", path, "--samples"]
    model.G.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    generate.draw(model, model.spec.sample(40, seeded()))
    assert sizes == {generate.AT_ONCE}, "rounding depends on how many are drawn at once"
    many = draws([*draw, 40], tmp_path / "many")
    lines = many.pop("codes.csv").splitlines()
    assert len(lines) == 41 and lines[40].startswith(b"000039.png,")
    for name, n, flags in (("few", 30, [30, "--seed", 2]), ("some", 5, ["--seeds", "7, 39,3-5"])):
        made = draws([*draw, *flags], tmp_path / name)
        rows = made.pop("codes.csv").splitlines()
        assert {*rows} <= {*lines} and len(rows) == n + 1
        listed = made.pop(infogan.MARK).decode().split()
        assert sorted(listed) == sorted(made), "of what may be replaced"
        assert made.items() <= many.items() and len(made) == n


def test_seeds_have_the_distribution_of_z_and_codes():
    every = torch.cat(generate.sample_seeds(CodeSpec(2, 4, 3, 5), range(4000), {}), 1)
    for columns, mean, std in ((slice(5), 0, 1), ([5, 6], 1.5, 1.25**0.5), ([7, 8, 9], 0, 3**-0.5)):
        assert every[:, columns].mean(0).sub(mean).abs().max() < 0.07
        assert every[:, columns].std(0).sub(std).abs().max() < 0.05
    neighbours = torch.cat([every[:-1], every[1:]], 1)
    assert (torch.corrcoef(neighbours.T) - torch.eye(20)).abs().max() < 0.09


@pytest.mark.parametrize("mode", ["--samples", "--read", "--walk", "sheets"])
def test_codes_that_are_set_are_held_wherever_something_is_drawn(here, drawn, monkeypatch, mode):
    """But where a sheet moves them."""
    codes = "z", "cat", "cont", "cat1", "cont0"
    table = [generate.Row(code, *[0.5] * 5) for code in codes]
    monkeypatch.setattr(generate, "measure", lambda model: table)
    run(*command(mode, "out"), "--set", "cat0=2, cont1=-0.5", "--seed", 3)
    for x in drawn:
        _, c_cat, c_cont = x.split([100, 6, 3], 1)
        cat0, cat1 = c_cat.unflatten(1, (2, 3)).argmax(2).T
        assert (cat0 == 2).all() and (c_cont[:, 1] == -0.5).all()
        if mode == "sheets" and len(x) == 3:  # a sheet of one row
            assert cat1.tolist() == [0, 1, 2], "the other categorical moves alone"
    assert drawn


def page_of(argv: list[object], out: Path) -> dict:
    """What generate.py writes into the explorer's page."""
    (page,) = (raw for name, raw in draws(argv, out).items() if name.endswith(".html"))
    return json.loads(re.search("data = (.*);", page.decode())[1])


def test_typical_pictures_are_near_to_others(monkeypatch):
    features = torch.randn(60, 8, 2, 2, generator=seeded())
    features[5::4] *= 0.1  # 14 alike, and none of the others
    monkeypatch.setattr(generate, "draw", lambda model, x: features)
    model = Namespace(D=Namespace(trunk=lambda x: x), spec=CodeSpec(1, 3, 2, 4), device=CPU)
    best = generate.typical(model, model.spec.sample(60, seeded()))
    assert len({*best}) == 10 and all(k % 4 == 1 for k in best)


def test_the_page_opens_on_the_most_typical_of_64_seeds_or_those_given(tmp_path, monkeypatch):
    table = [generate.Row("cat0", *[0.5] * 5)] * 4
    monkeypatch.setattr(generate, "measure", lambda model: table)
    ckpt = HERE / "checkpoint/animefaces-v3.pt"
    model, head = generate.Model(ckpt, CPU), ["--ckpt", ckpt, "--explorer", "--device", "cpu"]
    first = page_of(head, tmp_path / "a")
    assert (tmp_path / "a/explorer.html").stat().st_size < 9e6
    given = page_of([*head, "--seeds", "6,2"], tmp_path / "b")
    assert (first["tried"], given["tried"]) == (64, 0)
    tried = generate.sample_seeds(model.spec, range(64), {})
    for seeds, page in ((generate.typical(model, tried), first), ([6, 2], given)):
        codes = generate.sample_seeds(model.spec, seeds, {})
        assert page["seeds"] == seeds and torch.tensor(page["z"]).equal(codes.z)
        values = [[*face.values()] for face in page["faces"]]
        assert torch.tensor(values).equal(torch.cat(codes[1:], 1))


def test_a_walk_is_closed_and_its_z_keeps_its_length(tmp_path, drawn):
    ckpt = HERE / "checkpoint/animefaces-v3.pt"  # equal frames would be saved as one
    for suffix in ("gif", "webp"):
        path = tmp_path / f"films/w.{suffix}"
        run("--ckpt", ckpt, "--walk", "--seeds", "4,9,2", "--steps", 6, "--out", path)
        film = Image.open(path)
        assert (film.format, film.n_frames, film.width) == (suffix.upper(), 18, 128)
        assert film.info["loop"] == 0 and path.stat().st_size < 5e5
    spec, x = infogan.load_generator(ckpt)[1], drawn[-1]
    assert x[::6].allclose(spec.join(generate.sample_seeds(spec, [4, 9, 2], {})), atol=1e-6)
    z, codes = x.split([spec.z_dim, spec.dim - spec.z_dim], 1)
    assert (z.norm(dim=1) / spec.z_dim**0.5 - 1).abs().max() < 0.3
    assert codes[3].allclose((codes[0] + codes[6]) / 2, atol=1e-6)
    assert codes[-1].allclose(codes[12].lerp(codes[0], 5 / 6), atol=1e-6), "back to the first"


def test_samples_that_are_stopped_leave_the_codes_of_what_is_there(ckpt, tmp_path, monkeypatch):
    samples, out, saved = ["--ckpt", ckpt, "--samples", 70], tmp_path / "out", []
    before, real = draws(samples, out), Image.Image.save

    def save(image: Image.Image, path: Path, **how: object) -> None:
        path.write_bytes(b"half of it")
        if len(saved) == 40:
            raise KeyboardInterrupt
        saved.append(path.name)
        real(image, path, **how)

    monkeypatch.setattr(Image.Image, "save", save)
    assert generate.main([*map(str, samples), "--out", str(out), "--set", "cat0=1"]) == 130
    rows = table_of(out / "codes.csv")
    assert [row["file"] for row in rows] == saved and {row["cat0"] for row in rows} == {"1"}
    assert sorted(path.name for path in out.glob("*.png")) == saved and len(before) == 72


def test_samples_with_data_leave_the_whole_set_as_the_run_sees_it(here):
    Image.new("RGB", (30, 20), "red").save("few/wide.webp")
    run(*command("--samples", "fake"))
    real = [Image.open(path) for path in Path("fake-real").glob("*.png")]
    assert len(real) == len(infogan.load_pictures("few", 16, 3).x) == 6
    assert {image.size for image in real} == {(16, 16)}


def test_Q_reads_a_picture_of_one_s_own_and_G_draws_it_again(ckpt, tmp_path, capsys):
    mine = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, colour in zip(mine, ("red", "blue"), strict=True):
        Image.new("RGB", (50, 40), colour).save(path)
    (tmp_path / "names.json").write_text('{"cont1": "tilt"}')
    read = ["--ckpt", ckpt, "--names", tmp_path / "names.json", "--seeds", "5,6,8", "--read"]
    draws([*read, *mine], tmp_path / "out")
    told = capsys.readouterr().out
    for path in mine:
        p, mu, sigma = read_by_Q(ckpt, path)
        assert f"{mu[1]:+.2f} ± {sigma[1]:.2f}" in told.split("cont1 (tilt)")[1]
        assert f"{p[1].argmax()} ({p[1].max():.0%})" in told.split("cat1")[1]
    assert "a.png" in told and Image.open(tmp_path / "out/read-a,b-seeds-5,6,8.png").width > 4 * 64
    for bad in (HERE / "README.md", tmp_path / "none.png", tmp_path):
        refused(capsys, [*read, mine[0], bad], "--read", str(bad))


SHAPES_READ = [
    ["--n-cat", "2", "--cat-dim", "4", "--n-cont", "3"],
    ["--n-cat", "0", "--n-cont", "2", "--channels", "1"],
    ["--n-cont", "0", "--z-dim", "6"],
    ["--n-cont", "2", "--z-dim", "0", "--cont-at", "4"],
    ["--n-cat", "2", "--n-cont", "0", "--z-dim", "0"],
]


@pytest.mark.parametrize("shape", SHAPES_READ, ids=" ".join)
def test_pictures_that_G_drew_are_found_again_better_than_by_Q(tmp_path, shape):
    model = lively(tmp_path / "last.pt", *LIVELY, *shape)
    spec, guess = model.spec, model.spec.sample(4, seeded(8))
    x = generate.draw(model, spec.sample(4, seeded(7)))
    q = model.D(x)[1]
    by_Q = guess._replace(c_cat=q.q_logits.argmax(2), c_cont=q.q_mu)
    before = spec.join(by_Q)
    found = generate.find_codes(model, x, by_Q)
    assert spec.join(by_Q).equal(before), "its guess stays"
    left, left_by_Q = ((generate.draw(model, codes) - x).square().mean() for codes in (found, by_Q))
    assert left < 0.5 * left_by_Q or left == left_by_Q == 0
    assert (found.z.norm(dim=1) <= 1.001 * spec.z_dim**0.5).all()
    assert (found.c_cont.abs() <= 1).all() and (found.c_cat < spec.cat_dim).all()


def test_a_face_that_was_found_begins_every_mode(tmp_path, drawn):
    """A grey picture, one with alpha, one of G's: their codes draw them as the sheet has them."""
    spec = lively(tmp_path / "last.pt", *LIVELY, "--n-cat", "2").spec
    head, mine = ["--ckpt", tmp_path], [tmp_path / f"{name}.png" for name in ("a, b", "c", "d")]
    for path, mode in zip(mine, ("L", "RGBA", "RGB"), strict=True):
        noise = random.Random(mode).randbytes(16 * 16 * len(mode.replace("L", "1")))
        Image.frombytes(mode, (16, 16), noise).save(path)
    draws([*head, "--read", *mine], tmp_path / "read")
    found, table = drawn[1], tmp_path / "read/codes-a, b,c,d.csv"
    rows = table_of(table)
    assert [row["file"] for row in rows] == [path.name for path in mine]

    def begin(start: object, *flags: object) -> dict[str, bytes]:
        """What a call with --start leaves in a new folder; drawn then has its inputs."""
        drawn.clear()
        return draws([*head, "--start", start, *flags], tmp_path / str(random.random()))

    made = begin(table, "--samples")
    assert drawn[0].equal(found), "bit for bit"
    some = begin(f"{table}:2,0", "--samples")
    assert drawn[0].equal(found[[2, 0]]) and some["000000.png"] == made["000002.png"]
    (tmp_path / "codes.csv").write_bytes(made["codes.csv"])
    begin(f"{tmp_path / 'codes.csv'}:1", "--codes", "cont0", "--steps", 2)
    assert any(len(x) == 2 and x[:, :-2].equal(found[[1, 1], :-2]) for x in drawn)
    run(*head, "--walk", "--steps", "4", "--start", f"{table}:1-2", "--set", "cat1=3")
    ends, held = drawn[-1][::4], spec.z_dim + spec.cat_dim
    assert ends[:, :held].allclose(found[1:, :held], atol=1e-6)
    assert (ends[:, held + 3] == 1).all()
    page = page_of([*head, "--explorer", "--start", f"{table}:1"], tmp_path / "e")
    assert page["faces"] == [{name: pytest.approx(float(rows[1][name])) for name in spec.names}]
    assert page["z"][0] == pytest.approx([float(rows[1][f"z{i}"]) for i in range(spec.z_dim)])
    assert page["seeds"] == []


def test_a_start_that_is_none_is_one_line(here, capsys):
    run(*command("--read", "o"))
    good = Path("o/codes-0.csv").read_text()
    head, row = good.splitlines()
    bad = {"none": None, "empty": "", "head": head, "other": good.replace("cont2", "cont9")}
    bad |= {"short": good[:-9], "nan": re.sub(",[^,]*$", ",nan", good), "text": good + "\0"}
    for value in (0.5, 3):  # of a code with three categories
        bad[f"category {value}"] = f"{head}\n{re.sub(',[0-9]+', f',{value}', row, count=1)}\n"
    for name, text in bad.items():
        if text is not None:
            Path(name).write_text(text)
        refused(capsys, ["--ckpt", "last.pt", "--start", name], f"--start {name}: must be")
    start = ["--ckpt", "last.pt", "--start", "o/codes-0.csv"]
    refused(capsys, [*start[:-1], "o/codes-0.csv:1"], "--start", "rows from 0")
    refused(capsys, [*start, "--walk"], "--walk", "2 to 100 faces, not 1")
    for more in (["--rows", 3], ["--seeds", "1,2"], ["--samples", 3]):
        refused(capsys, [*start, *more], "--start", "leave out")


def test_any_terminal_can_be_written_to(here):
    """As ASCII it has no ±, and no letters of a name."""
    Path("names.json").write_text('{"cont1": "髪の色"}', encoding="utf-8")
    more = {"capture_output": True, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    done = subprocess.run([sys.executable, HERE / "generate.py", *command("--read", "o")], **more)
    assert done.returncode == 0 and b"cont1 (\\u9aea" in done.stdout, done


def test_a_seed_is_one_file_on_one_device_and_memory_that_runs_out_is_one_line(
    here, monkeypatch, capsys
):
    def write(*_):
        cudnn = torch.backends.cudnn
        assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
        assert torch.get_float32_matmul_precision() == "highest"
        raise MemoryError

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as training leaves it
    torch.set_float32_matmul_precision("high")
    monkeypatch.setitem(generate.MODES, "--onnx", (write, "traversals", "out"))
    told = refused(capsys, command("--onnx", "o"), "out of memory")
    flags = re.findall("--[a-z-]+", told)
    assert flags and {*flags} <= {row[0] for rows in generate.FLAGS.values() for row in rows}
    assert torch.backends.cudnn.benchmark, "is as it was"


def test_a_folder_of_a_run_is_its_last_checkpoint(here, capsys):
    run("--ckpt", here, "--samples", 1)
    assert Path("generated/000000.png").exists()
    Path("last.pt").unlink()
    refused(capsys, ["--ckpt", here, "--samples", 1], "last.pt: no such checkpoint")


def test_samples_come_with_their_codes_and_mix_with_no_others(ckpt, tmp_path, capsys):
    samples = ["--ckpt", ckpt, "--samples"]
    draws([*samples, 7], tmp_path)
    rows = table_of(tmp_path / "codes.csv")
    assert [*rows[0]][:7] == ["file", "cat0", "cat1", "cont0", "cont1", "cont2", "z0"]
    assert [row["file"] for row in rows] == sorted(path.name for path in tmp_path.glob("*.png"))
    made = draws([*samples, 3], tmp_path)
    assert made.keys() == {infogan.MARK, "codes.csv", *(f"{i:06d}.png" for i in range(3))}
    for mine in ("mine.png", "000777.png"):
        (tmp_path / mine).write_bytes(b"mine")
        refused(capsys, [*samples, 2, "--out", tmp_path], "1 other pictures")
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert left == made | {mine: b"mine"}
        (tmp_path / mine).unlink()


# the explorer in a browser ------------------------------------------------------------------------


class Browser:
    """Headless Chromium, by the few lines of WebDriver that a test needs."""

    def __init__(self, port: int, chromium: str):
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        wanted = {"goog:chromeOptions": {"binary": chromium, "args": quiet}}
        wanted |= {"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.at = f"http://127.0.0.1:{port}/session"
        try:
            self.at += "/" + self.ask("", capabilities={"alwaysMatch": wanted})["sessionId"]
        except OSError as error:
            pytest.skip(
                f"chromium does not start here, or is not of chromedriver's version: {error}"
            )

    def ask(self, what: str, **body: object) -> object:
        request = urllib.request.Request(self.at + what, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *args: object) -> object:
        """What the script returns in the page, once two frames have been drawn."""
        waiting = "const done = arguments[arguments.length - 1], given = arguments;"
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => "
        job = f"{waiting} {frames} done((() => {{ {script} }})())))"
        return self.ask("/execute/async", script=job, args=args)

    def address(self) -> str:
        """What follows # in the page's address, once nothing has moved for a while."""
        self.ask("/execute/async", script="setTimeout(arguments[0], 400, 0)", args=[])
        return self.run("return location.hash")

    def state(self, script: str = "") -> dict[str, float]:
        """z and the codes after the script."""
        return dict(self.run(f"{script} return Object.entries(state)"))

    def face(self) -> torch.Tensor:
        """The drawn picture, (3, size, size) from 0 to 255."""
        pixels = self.run(
            "const face = document.getElementById('face');"
            "return [...face.getContext('2d').getImageData(0, 0, face.width, face.height).data]"
        )
        size = math.isqrt(len(pixels) // 4)
        return torch.tensor(pixels).view(size, size, 4)[:, :, :3].permute(2, 0, 1)

    def quit(self) -> None:
        with suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(self.at, method="DELETE"), timeout=60)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("no chromium and chromedriver here; make test-browser installs Debian's")
    port, leaves = free_port(), {"TMPDIR": str(tmp_path_factory.mktemp("chromium"))}
    more = {"stdout": subprocess.DEVNULL, "env": os.environ | leaves}
    process = subprocess.Popen([driver, f"--port={port}"], **more)
    try:
        wait_until(partial(listens, port), lambda: process.poll() is None, lambda: driver)
        browser = Browser(port, chromium)
        yield browser
        browser.quit()
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        kill(process)


SHAPES = ["2,3,3,--image-size,64", "1,10,0,--channels,1", "0,2,2,--recipe,notebook", "0,2,0"]


@pytest.fixture(scope="session", params=SHAPES)
def page(browser, tmp_path_factory, request) -> tuple[Path, Path]:
    """A checkpoint and its explorer, for n_cat, cat_dim, n_cont and other flags."""
    n_cat, cat_dim, n_cont, *more = request.param.split(",")
    flags = ["--image-size", "32", "--width", "8", "--n-cat", n_cat, "--cat-dim", cat_dim]
    path = tmp_path_factory.mktemp("explorer") / "run #1/last.pt"
    path.parent.mkdir()
    lively(path, *flags, "--n-cont", n_cont, *more)
    run("--ckpt", path, "--explorer")
    return path, path.parent / "traversals/explorer.html"


@pytest.fixture
def explorer(browser, page) -> tuple[Generator, CodeSpec]:
    """A generator and its codes, whose explorer the browser has just opened.

    It must ask for nothing in the network, and report no error.
    """
    address = page[1].as_uri()
    browser.ask("/url", url="about:blank")
    for kind in ("browser", "performance"):
        browser.ask("/se/log", type=kind)  # what earlier pages left there
    browser.ask("/url", url=address)
    yield infogan.load_generator(page[0])
    logs = browser.ask("/se/log", type="browser")
    assert not [entry for entry in logs if entry["level"] == "SEVERE"], logs
    logs = [json.loads(entry["message"]) for entry in browser.ask("/se/log", type="performance")]
    events = [log["message"] for log in logs]
    asked = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    folder = page[1].parents[1].as_uri()
    assert asked and all(url.startswith((folder, "data:", "about:")) for url in asked), asked


def test_the_explorer_draws_what_python_draws(browser, explorer):
    (G, spec), rng, seen = explorer, random.Random(0), []
    z = generate.sample_seeds(spec, browser.run("return data.seeds"), {}).z
    for k in (0, 3, 7):
        values = {f"cat{i}": rng.randrange(spec.cat_dim) for i in range(spec.n_cat)}
        values |= {f"cont{i}": round(rng.uniform(-1, 1), 2) for i in range(spec.n_cont)}
        link = "&".join(f"{name}={value}" for name, value in {"z": k, **values}.items())
        browser.run("location.hash = given[0]", link)
        c_cat, c_cont = torch.tensor([*values.values()]).split([spec.n_cat, spec.n_cont])
        x = G(spec.join(Codes(z[k : k + 1], c_cat.long()[None], c_cont[None])))[0]
        seen.append(browser.face())
        assert (seen[-1] - (x + 1) * 127.5).abs().max() <= 2, link
    assert not seen[0].equal(seen[1])


def test_the_explorer_opens_with_the_codes_that_are_set(browser, explorer, page):
    G, spec = explorer
    held = {c: v for c, v in {"cat0": 1, "cont0": -1.5}.items() if c in spec.names}
    of_codes = ["--set", ",".join(f"{code}={v}" for code, v in held.items())] if held else []
    out = page[0].parent / "out"
    draws(["--ckpt", page[0], "--explorer", "--seeds", "6,2", *of_codes], out)
    browser.ask("/url", url=next(out.glob("explorer-*.html")).as_uri())
    codes = generate.sample_seeds(spec, [6], held)
    assert (browser.face() - (G(spec.join(codes))[0] + 1) * 127.5).abs().max() <= 2
    thumbs = "return [...document.querySelectorAll('.one')].slice(0, 3).map(b => b.title)"
    assert browser.run(thumbs) == ["seed 6", "seed 2", "face 2"]


def test_the_explorer_has_a_control_for_each_code_and_they_move_the_picture(browser, explorer):
    spec, seen = explorer[1], [browser.face()]
    count = "return document.querySelectorAll(`input[type=${given[0]}]`).length"
    assert browser.run(count, "range") == spec.n_cont
    assert browser.run(count, "radio") == spec.n_cat * spec.cat_dim
    if spec.n_cat:
        browser.run("document.querySelector('input[type=radio]:not(:checked)').click()")
        seen.append(browser.face())
        assert not seen[-1].equal(seen[-2])
    if spec.n_cont:
        slide = "const s = document.querySelector('input[type=range]'); s.value = given[0];"
        for value in (-1, 1):
            browser.run(slide + "s.dispatchEvent(new Event('input'));", value)
            seen.append(browser.face())
        assert not seen[-1].equal(seen[-2])
        assert re.search(r"&cont\d=1(&|$)", browser.address())


def test_the_address_is_written_when_a_slider_rests_and_may_be_refused(browser, explorer):
    """WebKit takes a hundred addresses in half a minute; the face must follow all the same."""
    if not explorer[1].n_cont:
        pytest.skip("no slider")
    browser.run("history.replaceState = () => { window.asked = (window.asked || 0) + 1; throw 1; }")
    before, slide = browser.face(), "const s = document.querySelector('input[type=range]');"
    slide += "for (let k = 0; k < 50; k++) { s.value = k / 50; s.oninput(); }"
    browser.run(slide)
    assert not browser.face().equal(before)
    assert browser.address() == "" and browser.run("return window.asked") == 1
    browser.run("$('undo').click()")
    assert browser.face().equal(before), "a movement is one step"


def test_the_explorer_draws_the_same_without_webassembly(browser, explorer, page):
    face, html = browser.face(), page[1].read_text(encoding="utf-8")
    without = page[1].with_name("without.html")
    without.write_text(html.replace(" 'wasm-unsafe-eval'", ""), encoding="utf-8")
    browser.ask("/url", url=without.as_uri())
    assert (browser.face() - face).abs().max() <= 1


def test_the_explorer_draws_in_a_frame_without_an_address(browser, explorer, page):
    """As notebooks and Streamlit show pages."""
    frame = "const f = document.createElement('iframe'); f.id = 'f'; f.srcdoc = given[0];"
    browser.run(frame + "document.body.prepend(f)", page[1].read_text(encoding="utf-8"))
    inside = "const w = document.getElementById('f').contentWindow;"
    drawn = "const d = w.document, told = d && d.getElementById('told');"
    drawn += "return !!told && told.textContent.includes(' ms')"
    wait_until(lambda: browser.run(inside + drawn), lambda: True, lambda: "no face")
    pixels = "const s = d => d.getElementById('face').toDataURL();"
    assert browser.run(inside + pixels + "return s(w.document) === s(document)")
    browser.run(inside + "w.document.getElementById('any').click()")
    browser.address()  # what would be written by now
    assert not browser.run(inside + pixels + "return s(w.document) === s(document)")


def test_a_thumbnail_of_a_category_is_the_face_of_that_category(browser, explorer):
    """As are those of faces, and the first of these is the one that the page opens with."""
    seen = "const a = given[0], s = c => c.getContext('2d').getImageData(0, 0, c.width, c.height);"
    seen += "const [x, y] = [a, '#face'].map(q => s(document.querySelector(q)).data.join());"
    for what in ["#row .one canvas", *[":checked ~ canvas"] * (explorer[1].n_cat > 0)]:
        drawn = f"return thumbs.get(document.querySelector('{what}')).drawn !== ''"
        browser.run(f"document.querySelector('{what}').scrollIntoView()")
        wait_until(partial(browser.run, drawn), lambda: True, lambda: "no thumbnail")
        assert browser.run(seen + "return x === y", what), what


def test_a_code_plays_to_and_fro_until_it_is_moved(browser, explorer):
    if not explorer[1].n_cont:
        pytest.skip("no slider")
    code = browser.run("document.querySelector('.play').click(); return playing")
    first, second = (browser.run("return state[given[0]]", code) for _ in range(2))
    assert first != second and browser.run("return playing") == code
    browser.run("document.querySelector('.value').click()")
    assert browser.run("return [playing, state[given[0]]]", code) == ["", 0]
    browser.run("$('undo').click(); $('undo').click()")
    assert browser.run("return state[given[0]] === data.faces[0][given[0]]", code)


def test_the_explorers_keys_take_another_face_and_go_back(browser, explorer):
    seen = [browser.face()]
    for key in ("r", "0"):
        browser.run("document.dispatchEvent(new KeyboardEvent('keydown', { key: given[0] }))", key)
        seen.append(browser.face())
    assert browser.address().split("&")[0] == "#z=0"
    assert not seen[1].equal(seen[0]) and seen[2].equal(seen[0])


def test_the_explorer_takes_another_character_pose_or_z_and_keeps_the_rest(browser, explorer):
    spec = explorer[1]
    buttons = {"character": ("cat", spec.n_cat), "pose": ("cont", spec.n_cont), "z": ("z", 1)}
    for button, (kind, n) in buttons.items():
        assert browser.run(f"return $('{button}').hidden") == (n == 0)
        moved, tries = set(), 9 if n else 1  # chance may take the same again
        while not moved and tries:
            before, after = browser.state(), browser.state(f"$('{button}').click();")
            moved = {re.sub("[0-9]", "", code) for code in before if before[code] != after[code]}
            tries -= 1
        assert moved == ({kind} if n else set())
    before, after = browser.state(), browser.state("$('neutral').click();")
    assert after == {c: 0 if c.startswith("cont") else v for c, v in before.items()}


def test_the_explorers_row_has_ten_faces_and_turns_to_others(browser, explorer):
    row = "return [...document.querySelectorAll('.one')].map(b => b.title)"
    first = browser.run(row)
    assert len({*first}) == 10
    pressed = "const b = document.querySelectorAll('.one')[7]; b.click(); return b.ariaPressed"
    assert browser.run(pressed) == "true"
    browser.run("document.querySelector('.turn:last-child').click()")
    assert not {*browser.run(row)} & {*first}
