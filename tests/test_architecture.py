"""The rules that keep the code small and its parts apart, each checked on the sources themselves.

A failure names file and line, what stands there, and what to do instead. A broad `except` is allowed where a boundary
is and its line says why, as a comment; public names that the field already knows are listed in KNOWN_NAMES.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LEVELS = [
    {"api"},
    {"models", "observe", "devices"},
    {"algorithm", "dataset", "kernels", "weights"},
    {"reward", "rollout", "inference", "engine", "launcher"},
    {"gateway"},
    {"workflow", "evaluation", "prove"},
    {"run"},
    {"cli", "trainer", "supervised"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
NO_TORCH = ("api", "launcher", "rollout", "gateway", "workflow", "reward", "cli")
NO_BOUNDARY = ("api", "algorithm", "weights", "dataset")  # no user code, HTTP route or supervisor lives here
MAX_FILE_LINES = 400
MAX_LINES = {"arealite": 39233, "tests": 29833}  # of all files; raised only for a new capability
MAX_FUNCTION_LINES = 60
MAX_CONFIG_FIELDS = 175
BANNED_FOLDERS = ("utils", "util", "experimental", "helpers", "common", "misc")

BANNED_PARTS = {"data", "info", "item", "meta", "manager", "handler", "helper", "util"}
KNOWN_NAMES = {
    "WeightUpdateMeta",  # name of the weight version record throughout the field
    "meta",  # a WeightUpdateMeta
    "StalenessManager",
    "RecoverHandler",
    "StatefulDataLoader",
    "DataSource",  # the protocol of StatefulDataLoader
    "meta_info",  # field of SGLang's wire format
    "return_meta_info",
    "model_info",  # route of SGLang's wire format
    "server_info",
    "n_samples",  # configuration names of the field
    "ppo_n_minibatches",
    "id2info",  # of code_verify
}
SECONDS_WITHOUT_UNIT = re.compile(r"(^|_)timeout$|_(seconds?|secs?|millis|ms)$")
COUNT_WITHOUT_PREFIX = re.compile(r"^n_|[^_]_count$")

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ABSOLUTE_PATH = re.compile(r"(?<![\w.~/}])/(home|root|work|mnt|Users|opt|tmp|srv)/[\w.]")
REASON = re.compile(r"#\s*(?!noqa|type:|pragma)\w.{9,}")


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def sources() -> list[Path]:
    return python_files("arealite")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def at(path: Path, node: ast.AST | int) -> str:
    line = node if isinstance(node, int) else node.lineno  # type: ignore[attr-defined]
    return f"{path.relative_to(ROOT)}:{line}"


def report(violations: list[str], remedy: str) -> None:
    assert not violations, f"{len(violations)} violation(s); {remedy}\n  " + "\n  ".join(violations)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The folder (or top-level module) of arealite that a dotted name belongs to; "" for arealite itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else ""


def imports_of(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every module of arealite that `path` imports, at any depth, those under TYPE_CHECKING too."""
    modules = {module_name(p) for p in sources()}
    pending: list[ast.AST] = [tree_of(path)]
    while pending:
        node = pending.pop()
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names if alias.name.split(".")[0] == "arealite")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (
                    module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
                )
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base.split(".")[0] == "arealite":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield node, inner if inner in modules else base


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_part_has_a_level():
    parts = {p.name if p.is_dir() else p.stem for p in (ROOT / "arealite").iterdir() if p.is_dir() or p.suffix == ".py"}
    unknown = parts - set(LEVEL_OF) - {"__init__", "__main__", "__pycache__"}
    report(sorted(unknown), "put the code into a folder of the design; arealite/ holds no other")


def test_imports_go_down_only():
    violations = []
    for path in sources():
        part = part_of(module_name(path))
        for node, imported in imports_of(path):
            other = part_of(imported)
            if not (part and other) or other == part or LEVEL_OF[other] < LEVEL_OF[part]:
                continue
            side = "beside" if LEVEL_OF[other] == LEVEL_OF[part] else "above"
            violations.append(f"{at(path, node)}: {part} imports {imported}, which is {side} it")
    order = " < ".join(",".join(sorted(level)) for level in LEVELS)
    report(violations, f"imports go down only ({order}): move the shared piece down or pass it in")


def test_no_import_circles():
    # A module that is run with -m may import itself, to be the same module for pickle in all processes.
    graph = {module_name(p): {m for _, m in imports_of(p)} - {module_name(p)} for p in sources()}
    done: set[str] = set()

    def circle_from(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return None
        for imported in sorted(graph.get(module, ())):
            if found := circle_from(imported, [*trail, module]):
                return found
        done.add(module)
        return None

    circles = [found for module in sorted(graph) if (found := circle_from(module, []))]
    distinct = {frozenset(circle): " -> ".join(circle) for circle in circles}
    report(list(distinct.values()), "break the circle: one of the two must not know the other")


PROBE = """
import importlib, importlib.abc, importlib.machinery, sys, traceback
class Guard(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        frames = [f for f in traceback.extract_stack() if "importlib" not in f.filename and f.filename != "<string>"]
        print("TORCH", module, "through", f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?")
        raise ImportError("torch is not allowed here")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Guard())
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        if "torch is not allowed" not in str(error):
            print("BROKEN", module, error)
"""


def test_no_torch_at_import():
    modules = [m for m in map(module_name, sources()) if part_of(m) in NO_TORCH]
    ran = subprocess.run([sys.executable, "-c", PROBE, *modules], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    report(ran.stdout.splitlines(), "import torch inside the function that needs it, or move the code")


def test_files_and_functions_are_short():
    violations = []
    for path in python_files("arealite", "examples", "benchmarks", "tests"):
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            violations.append(f"{at(path, 1)}: {lines} lines, at most {MAX_FILE_LINES}")
        for node in functions(tree_of(path)):
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES:
                violations.append(f"{at(path, node)}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    report(violations, "split by meaning")


def test_the_house_does_not_grow_by_itself():
    for folder, most in MAX_LINES.items():
        lines = sum(len(p.read_text().splitlines()) for p in python_files(folder))
        assert lines <= most, (
            f"{folder}/ has {lines} lines of Python, at most {most}: restructure, or raise it with why"
        )


def test_one_name_is_one_thing():
    """Of all modules, and of all classes, private ones too."""
    places: dict[str, list[str]] = {}
    for path in sources():
        if path.stem != "__init__":
            places.setdefault(f"module {path.stem}", []).append(at(path, 1))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(f"class {node.name}", []).append(at(path, node))
    twins = [f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]
    report(twins, "two things of one name: name each for what it is")


def test_no_text_stands_twice():
    """A sentence that stands in two places drifts apart: fixed texts of some length are a constant."""
    places: dict[str, list[str]] = {}
    for path in sources():
        inner = {id(v) for node in ast.walk(tree_of(path)) if isinstance(node, ast.JoinedStr) for v in node.values}
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.strip()) > 40:
                kind = "part" if id(node) in inner else "text"
                places.setdefault(f"{kind} {node.value.strip()!r}", []).append(at(path, node))
    report(
        [f"{', '.join(found)}: {text[:90]}" for text, found in places.items() if len(found) > 1], "say it in one place"
    )


def test_no_catch_all_folders():
    found = [at(p, 1) for p in sources() if set(p.relative_to(ROOT).with_suffix("").parts) & set(BANNED_FOLDERS)]
    report(found, "put each function beside the concept it serves")


def test_every_file_says_what_it_is_for():
    files = python_files("arealite", "examples", "benchmarks", "tests")
    report([at(p, 1) for p in files if not ast.get_docstring(tree_of(p))], "begin with a docstring: purpose, callers")


def test_no_guessing_at_attributes():
    violations = []
    for path in sources():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "hasattr":
                    violations.append(f"{at(path, node)}: hasattr")
                elif node.func.id == "getattr" and (len(node.args) > 2 or node.keywords):
                    violations.append(f"{at(path, node)}: getattr with a default")
    report(violations, "give the object one type, or ask for the type")


def is_broad(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Tuple):
        return any(is_broad(e) for e in node.elts)
    return isinstance(node, ast.Name) and node.id in ("Exception", "BaseException")


def test_broad_excepts_stand_at_boundaries_with_their_reason():
    violations = []
    for path in sources():
        lines = path.read_text().splitlines()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                violations.append(f"{at(path, node)}: bare except")
                continue
            caught = isinstance(node, ast.ExceptHandler) and is_broad(node.type)
            swallowed = (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("suppress")
                and any(map(is_broad, node.args))
            )
            if not (caught or swallowed):
                continue
            if part_of(module_name(path)) in NO_BOUNDARY:
                violations.append(f"{at(path, node)}: a broad except where no boundary is")
            elif not REASON.search(lines[node.lineno - 1]):  # type: ignore[attr-defined]
                violations.append(f"{at(path, node)}: a broad except without its reason")
    report(violations, "catch the exceptions you expect, or write the reason as a comment on that line")


def config_classes() -> list[type]:
    from arealite.api import cli_args, run_args

    known = {**vars(run_args), **vars(cli_args)}
    return [c for c in known.values() if dataclasses.is_dataclass(c) and isinstance(c, type)]


def own_fields(cls: type) -> list[dataclasses.Field]:
    """Those that a file can give, declared in `cls` itself."""
    return [f for f in dataclasses.fields(cls) if f.name in cls.__annotations__ and "is_derived" not in f.metadata]


def test_every_config_field_is_documented_and_they_are_few():
    fields = [(c, f) for c in config_classes() for f in own_fields(c)]
    undocumented = [f"{c.__name__}.{f.name}" for c, f in fields if len(f.metadata.get("description", "")) < 4]
    report(undocumented, "declare it with setting(default, doc)")
    report(
        [c.__name__ for c in config_classes() if not c.__doc__ or c.__doc__.startswith(c.__name__)],
        "document the class",
    )
    assert len(fields) <= MAX_CONFIG_FIELDS, f"{len(fields)} config fields, at most {MAX_CONFIG_FIELDS}: remove some"


def test_every_config_field_is_used():
    used = {
        node.attr
        for path in sources()
        if path.name not in ("cli_args.py", "run_args.py", "load_config.py", "config_keys.py", "config_rules.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
    }
    unused = [f"{c.__name__}.{f.name}" for c in config_classes() for f in own_fields(c) if f.name not in used]
    report(unused, "nothing reads these fields: use them or remove them")


def defined_names(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Names that the code chooses itself: functions, classes, arguments, variables, attributes set on an object."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node, node.asname


def words(name: str) -> list[str]:
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def fault_of(name: str) -> str | None:
    if name in KNOWN_NAMES:
        return None
    if banned := [w for w in words(name) if w in BANNED_PARTS or w.removesuffix("s") in BANNED_PARTS]:
        return f"{name!r} says nothing with {banned[0]!r}"
    if SECONDS_WITHOUT_UNIT.search(name.lower()):
        return f"{name!r} is a time: give it in seconds and end its name in _s"
    if COUNT_WITHOUT_PREFIX.search(name.lower()):
        return f"{name!r} is a count: begin its name with num_ or max_"
    return None


# Who may name a vendor's kind of device: all others ask these.
KNOW_DEVICES = {"devices.py", "machine.py", "gpu.py", "gpu_programs.py"}


def test_one_file_knows_devices():
    """No other module of the package names CUDA, in an attribute, an argument or a text of the program."""
    violations = []
    for path in sources():
        documented = (n for n in ast.walk(tree_of(path)) if isinstance(n, DOCUMENTED) and ast.get_docstring(n))
        docstrings = {id(n.body[0].value) for n in documented}  # type: ignore[attr-defined]
        for node in ast.walk(tree_of(path)):
            named = [v for field in ("attr", "id", "arg", "value") if isinstance(v := vars(node).get(field), str)]
            if path.name not in KNOW_DEVICES and id(node) not in docstrings and "cuda" in "".join(named).lower():
                violations.append(f"{at(path, node)}: {named}")
    report(violations, "ask arealite/devices.py; before torch is there, launcher/machine.py")


def test_names_say_what_they_are():
    violations = []
    for path in sources():
        named = [(1, path.stem), *defined_names(tree_of(path))]
        violations += [f"{at(path, node)}: {fault}" for node, name in named if (fault := fault_of(name))]
    report(violations, "name the thing itself; a public name that the field knows goes into KNOWN_NAMES")


def test_no_paths_of_one_machine():
    patterns = ("*.py", "*.yaml", "*.yml", "*.md", "*.toml", "Makefile", "run")
    folders = [ROOT / f for f in ("arealite", "examples", "benchmarks", "tests", "docs", ".ci")]
    files = [p for folder in folders for pattern in patterns for p in folder.rglob(pattern) if p.is_file()]
    files += [p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()]
    violations = [
        f"{at(path, number)}: {line.strip()[:100]}"
        for path in sorted(set(files) - {Path(__file__).resolve()})
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ABSOLUTE_PATH.search(line)
    ]
    report(violations, "no absolute paths: use arguments, the configuration, or a temporary folder")
