"""Proof that README, the Makefile and every --help say what is there."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest

from test_infogan import HERE, Run  # isort: skip (it settles the threads before torch is loaded)

import measure

import generate
import infogan

# scripts ------------------------------------------------------------------------------------------

SCRIPTS = [
    path.relative_to(HERE).as_posix()
    for path in (*HERE.glob("*.py"), *HERE.glob("data/*.py"))
    if not path.name.startswith("test_")
]


def ask_for_help(name: str) -> None:
    """Runs a script from another folder, in a process that has to find the project by itself."""
    os.chdir("/")
    known = {str(HERE), str(HERE / "data")}
    sys.path[:] = [str((HERE / name).parent), *(path for path in sys.path if path not in known)]
    for script in SCRIPTS:
        sys.modules.pop(Path(script).stem, None)
    sys.argv = [name, "--help"]
    runpy.run_path(str(HERE / name), run_name="__main__")


@pytest.fixture(scope="module")
def helped(tmp_path_factory) -> dict[str, str]:
    """What each script says to --help."""
    said, helped = tmp_path_factory.mktemp("help") / "said", {}
    for name in SCRIPTS:
        code, helped[name] = Run([], said, partial(ask_for_help, name)).end()
        assert code == 0, helped[name]
    return helped


def test_every_script_tells_its_flags(helped):
    assert all("\n  --" in said for said in helped.values())


def test_importing_generate_is_light():
    """As it imports infogan, so is that. torchvision costs as much as torch itself."""
    command = [sys.executable, "-X", "importtime", str(HERE / "generate.py"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    imported = set(re.findall(r"\| +(\S+)$", told, re.M))
    heavy = {"torchvision", "torch._dynamo", "tensorboard", "networkx", "onnx"}
    assert "infogan" in imported and not imported & heavy


# pages, Makefile ----------------------------------------------------------------------------------

PAGES = [HERE / "README.md", HERE / "checkpoint/README.md"]
PARSERS = {"infogan.py": infogan.parse_args, "generate.py": generate.parse_args}
PARSERS["data/measure.py"] = measure.parse_args


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, and what its text names as `python …` or `make …`."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.S | re.M)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return "".join(blocks).splitlines() + re.findall(r"`((?:python|make) [^`]+)`", text)


def dry_run(line: str) -> list[str]:
    """The commands that a line of make would run."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    more = {"cwd": HERE, "capture_output": True, "text": True, "check": True}
    more["env"] = {"PATH": os.environ["PATH"]}  # without the variables of this `make test`
    done = subprocess.run([*shlex.split(line, comments=True), "-n"], **more)
    return done.stdout.replace("\\\n", " ").splitlines()


PLACES = {str(page.relative_to(HERE)): commands_of(page) for page in PAGES}
targets = re.findall(r"^([a-z0-9-]+):", (HERE / "Makefile").read_text(), re.M)
PLACES["Makefile"] = [f"make {target}" for target in targets]


@pytest.mark.parametrize("place", PLACES)
def test_every_command_is_one_that_its_script_takes(helped, place):
    ran = set()
    for line in PLACES[place]:
        for command in dry_run(line) if line.startswith("make ") else [line]:
            for name, rest in re.findall(r"python\S* (\S+\.py)([^;&|#]*)", command):
                ran.add(name)
                flags = shlex.split(rest)
                if name in PARSERS:
                    PARSERS[name](flags)
                known = re.findall(r"--[\w-]+", helped[name])
                assert {flag for flag in flags if flag.startswith("--")} <= {*known}, command
    assert ran >= {"infogan.py", "generate.py"}


def test_the_readme_has_the_commands_of_make_demo():
    made = [line.split()[1:] for line in dry_run("make demo") if ".py --" in line]
    shown = [line.split()[1:] for line in commands_of(PAGES[0])]
    assert len(made) == 2 and all(words in shown for words in made)


def headings_of(page: Path) -> set[str]:
    """As GitHub links to them."""
    titles = re.findall(r"^#+ +(.*?) *$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def files_in_git() -> set[Path]:
    """All that is in git, with the folders; where this is no checkout, all that is there."""
    names = HERE.rglob("*")
    if (HERE / ".git").exists():
        names = subprocess.check_output(["git", "ls-files"], cwd=HERE, text=True).splitlines()
    files = [HERE / name for name in names]
    return {each for path in files if path.exists() for each in (path, *path.parents)}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_and_links_to_is_there_and_in_git(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    links = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"^\[[^]]+\]:\s*(\S+)", text, re.M)
    links += re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    links = [link for link in links if not re.match(r"[A-Za-z][\w+.-]*:|//", link)]
    there = files_in_git()
    for link in links:
        name, _, heading = unquote(link).partition("#")
        path = Path(os.path.normpath(page.parent / name)) if name else page
        assert path in there, link
        assert not heading or heading in headings_of(path), link
    assert links


def test_the_readmes_python_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    names = {}
    exec(block, names)
    assert names["x"].shape == (16, 3, 64, 64)
