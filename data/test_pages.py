"""Proof that README, the Makefile and every --help say what is there."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_infogan import HERE, PATIENCE  # isort: skip (it settles the threads before torch is loaded)

import generate
import infogan

# scripts ------------------------------------------------------------------------------------------


SCRIPTS = {  # and what each must name in its --help
    "infogan.py": ("--data", "--n-cat", "--out"),
    "generate.py": ("--ckpt", "--explorer"),
    "data/bench.py": ("--device",),
    "data/download.py": ("--url", "--out"),
    "data/draw_faces.py": ("--size", "--only"),
    "data/measure.py": ("--faces",),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_every_script_names_its_flags(name, tmp_path):
    """From another folder: a script finds the project by itself."""
    more = {"capture_output": True, "text": True, "timeout": PATIENCE}
    said = subprocess.run([sys.executable, str(HERE / name), "--help"], cwd=tmp_path, **more)
    assert said.returncode == 0 and "Traceback" not in said.stderr, said.stderr
    assert all(f"  {flag}" in said.stdout for flag in SCRIPTS[name]), said.stdout


def test_importing_the_programs_is_light():
    """torchvision's import costs as much as torch's own, and only the named sets need it."""
    look = "import sys, generate; print([m for m in sys.modules if m in %r])"
    heavy = ["torchvision", "torch._dynamo", "tensorboard", "networkx", "onnx"]
    done = subprocess.run([sys.executable, "-c", look % heavy], cwd=HERE, capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == b"[]", done


def test_every_script_of_data_is_asked_for_help():
    scripts = [*HERE.glob("*.py"), *HERE.glob("data/*.py")]
    names = {p.relative_to(HERE).as_posix() for p in scripts if not p.name.startswith("test_")}
    assert names == {*SCRIPTS}


# pages, Makefile ----------------------------------------------------------------------------------

PAGES = [HERE / "README.md", HERE / "checkpoint/README.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=["README", "checkpoint/README"])
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
    """How many of our scripts a line runs; they must exist, and their flags must parse."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, n = True, 0
    words = list(lexer)
    for i, word in enumerate(words):
        before = [Path(w).name for w in words[:i]]
        if word.endswith(".py") and any(w.startswith("python") for w in before):
            assert (HERE / word).exists(), line
            argv = list(itertools.takewhile(lambda w: not set(w) <= set("();<>|&"), words[i + 1 :]))
            if word in SCRIPTS:
                check_flags(HERE / word, argv)
                n += 1
    return n


def check_flags(path: Path, argv: list[str]) -> None:
    """Raises where a script does not take these flags."""
    if "--help" in argv:  # which another test runs
        return
    if path.parent == HERE:
        if path.name == "generate.py":
            generate.parse_args(argv)
        else:  # whatever --init names: a run makes it first
            given = infogan.Parser("infogan.py", None, infogan.FLAGS).given(argv)
            infogan.spec_of(infogan.resolve(given, {}))
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


def test_the_readme_has_the_commands_of_make_demo():
    made = [line.split()[1:] for line in dry_run("make demo")]
    made = [words for words in made if words and words[0] in ("infogan.py", "generate.py")]
    shown = [line.split()[1:] for line in commands_of(PAGES[0])]
    assert len(made) == 2 and all(words in shown for words in made)


def links_of(page: Path) -> list[tuple[str, Path, str]]:
    """Each link and picture of a page that is no web address: as written, the file, the heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    links = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    links += re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    parts = [(link, *unquote(link).partition("#")[::2]) for link in links]
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
    files |= {folder for path in files for folder in path.parents}
    assert not [link for link, path, _ in links_of(page) if path not in files]


def test_the_readmes_python_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {}
    exec(block, names)
    assert names["x"].shape == (16, 3, 64, 64)
