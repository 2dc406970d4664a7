"""Every snippet of the README and of docs/ runs, and every file or folder they name exists."""

import ast
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forks import in_process

from arealite.models.folder import TESTED

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
DOCUMENTED_ADDRESS = "127.0.0.1:30000"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list:
    found = []
    for page in PAGES:
        for number, (kind, text) in enumerate(FENCE.findall(page.read_text())):
            if kind == language:
                found.append(pytest.param(text, id=f"{page.name}-{number}"))
    return found


@functools.cache
def help_of(script: Path) -> str:
    """What it says to --help, as a program in a process of its own."""
    if re.search(r"^(import|from) triton", script.read_text(), re.MULTILINE):
        pytest.importorskip("triton")
    return in_process(_help, script)


def _help(script: Path) -> str:
    sys.argv, sys.path[0], said = [str(script), "--help"], str(script.parent), io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code, ended.value.code
    return said.getvalue()


@pytest.fixture(scope="module")
def served_address(smollm2):
    """A server on a free port, in place of the one that the snippets name."""
    command = [sys.executable, "-m", "arealite.cli", "serve", "--model", str(smollm2), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield re.search(r"http://(\S+)", server.stdout.readline())[1]
        finally:
            server.terminate()


@pytest.mark.parametrize("text", snippets("python"))
def test_python_snippet_runs(text, tmp_path, request):
    if DOCUMENTED_ADDRESS in text:
        text = text.replace(DOCUMENTED_ADDRESS, request.getfixturevalue("served_address"))
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", snippets("bash"))
def test_shell_snippet_is_valid(text, smollm2):
    """`make` targets exist, `arealite run` becomes `arealite check` of the same arguments, scripts answer --help."""
    makefile = (ROOT / "Makefile").read_text()
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        elif words[:2] in (["arealite", "run"], ["arealite", "check"]):
            arguments = words[words.index("--config") + 1 :] if words[1] == "run" else words[2:]
            if words[1] == "run":
                assert (ROOT / words[2]).is_file(), line
            command = [sys.executable, "-m", "arealite.cli", "check", *arguments]
            env = {"AREALITE_VLLM_PYTHON": sys.executable, **os.environ}  # nothing is started, so any will do
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=env)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        elif words[0] == "arealite":
            command = [sys.executable, "-m", "arealite.cli", words[1], "--help"]
            assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False).returncode == 0, (
                line
            )
        elif words[0] == "python":
            usage = help_of(ROOT / words[1]).partition("\n\n")[0]
            needed = re.findall(r"--[\w-]+", re.sub(r"\[[^][]*\]", "", usage))
            assert set(needed) <= set(words), f"{line} lacks {needed}"
        else:
            assert words[0] in ("git", "cd", "pip", "source"), f"no check for: {line}"


PROGRAMS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.stem)
def test_every_benchmark_says_how_it_is_called(script):
    assert help_of(script).startswith(f"usage: {script.name}")


def test_the_documents_list_the_models_that_are_trained():
    trained = (ROOT / "docs" / "training.md").read_text().partition("Tests train ")[2].partition("(`model_type`")[0]
    assert re.findall(r"`(\w+)`", trained) == list(TESTED)


def test_named_paths_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:arealite|examples|benchmarks|tests|docs)/[\w./-]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


def walks() -> dict[str, list[tuple[str, list[str]]]]:
    """Of docs/architecture.md: heading -> its rows, each a file and what is named in it."""
    found = {}
    for section in (ROOT / "docs" / "architecture.md").read_text().split("\n## ")[1:]:
        rows = re.findall(r"^\| `(arealite/\S+\.py)` \| ([^|]*) \|", section, re.MULTILINE)
        found[section.partition("\n")[0]] = [(path, re.findall(r"`([\w.]+)`", names)) for path, names in rows]
    return found


MOST_FILES = (
    ("A sample", 12),
    ("A weight update", 10),
    ("A request", 10),
    ("A call of an agent", 9),
    ("A configuration field", 4),
)


@pytest.mark.parametrize(("heading", "most"), MOST_FILES)
def test_a_walk_names_what_exists_and_is_short(heading, most):
    ((_, rows),) = [(title, rows) for title, rows in walks().items() if title.startswith(heading)]
    files = [path for path, _ in rows]
    assert 2 < len(files) <= most and len(set(files)) == len(files), "each file once, and few of them"
    for path, names in rows:
        defined = set(qualified_names(ast.parse((ROOT / path).read_text())))
        assert names and set(names) <= defined, f"{path} has no {set(names) - defined}"


def qualified_names(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from qualified_names(node, f"{prefix}{node.name}.")
