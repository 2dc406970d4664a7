"""Each architecture rule, applied to a small tree that breaks it: a rule that cannot fail protects nothing."""

import pytest
import test_architecture as rules

DOC = '"""A file."""\n'
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
TRY = "try:\n    pass\n"
LONG = "a sentence that stands here in full, and once more"
BROKEN = [
    ("every_part", "arealite/extras/a.py", "", "extras"),
    ("imports_go", "arealite/api/a.py", "from arealite.rollout import b", "api imports"),
    ("imports_go", "arealite/engine/a.py", "def f():\n    import arealite.rollout.b", "beside"),
    ("imports_go", "arealite/observe/a.py", "from ..engine import b", "observe imports arealite.engine"),
    ("no_import_circles", "arealite/api/a.py", "import arealite.api", "arealite.api.a -> arealite.api -> "),
    ("no_import_circles", "arealite/engine/a.py", TYPES + "    import arealite.engine", "engine.a ->"),
    ("no_torch", "arealite/api/a.py", "import torch.nn", "TORCH arealite.api.a"),
    ("no_torch", "arealite/cli.py", "import arealite.absent", "BROKEN arealite.cli"),
    ("files_and", "arealite/api/a.py", "\n" * 400, "401 lines, at most 400"),
    ("files_and", "tests/a.py", "def f():" + "\n    pass" * 60, "f has 61 lines"),
    ("no_catch_all", "arealite/api/utils.py", "", "arealite/api/utils.py"),
    ("no_guessing", "arealite/api/a.py", "hasattr(1, 'a')", "a.py:2: hasattr"),
    ("no_guessing", "arealite/api/a.py", "getattr(1, 'a', 2)", "getattr with a default"),
    ("broad_excepts", "arealite/cli.py", TRY + "except:\n    pass", "bare"),
    ("broad_excepts", "arealite/cli.py", TRY + "except (ValueError, Exception):  # noqa: BLE001, B902\n    pass",
     "cli.py:4: a broad except without its reason"),
    ("broad_excepts", "arealite/weights/a.py", TRY + "except Exception:  # user code may raise anything\n    pass",
     "where no boundary is"),
    ("names_say", "arealite/api/a.py", "def f(user_data): pass", "'user_data'"),
    ("names_say", "arealite/api/a.py", "class HTTPHandler: pass", "'HTTPHandler'"),
    ("names_say", "arealite/api/a.py", "items = []", "'items'"),
    ("names_say", "arealite/api/a.py", "self.request_timeout = 3", "seconds"),
    ("names_say", "arealite/api/a.py", "n_tokens = 3", "begin its name with num_"),
    ("names_say", "arealite/api/meta_helpers.py", "", "meta_helpers"),
    ("the_house", "arealite/engine/a.py", "x = 1\n" * 40_000, "at most"),
    ("one_name", "arealite/engine/a.py", "class A: ...\nclass A: ...\n", "class A: arealite"),
    ("no_text", "arealite/engine/a.py", f"x = {LONG!r}\ny = {LONG!r}\n", "a.py:2, arealite"),
    ("no_paths", "examples/a.yaml", "path: " + "/ho" + "me/me/model", "a.yaml:2"),
    ("every_file_says", "tests/a.py", None, "tests/a.py:1"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), BROKEN)
def test_a_broken_rule_is_reported(rule, name, text, complaint, tmp_path, monkeypatch):
    """`rule` is the beginning of its name; a text of None is a file without a docstring."""
    [check] = [test for each, test in vars(rules).items() if each.startswith(f"test_{rule}")]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x = 1\n" if text is None else DOC + text)
    if name.startswith("arealite"):
        (tmp_path / "arealite" / "__init__.py").write_text(DOC)
    if rule == "no_import_circles":
        path.with_name("__init__.py").write_text(DOC + "def f():\n    from . import a")
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    with pytest.raises(AssertionError) as raised:
        check()
    assert complaint in str(raised.value)


def test_what_is_allowed_is_not_reported(tmp_path, monkeypatch):
    text = (
        "try:\n    from typing import TYPE_CHECKING\n"
        "except Exception:  # a plug-in's import may raise anything\n    pass\n"
        "def update(meta, timeout_s, num_tokens, dataset, metadata): return [v for v in meta.items()]\n"
        "if TYPE_CHECKING:\n    import arealite.engine.b\n    import torch\n"
    )
    (tmp_path / "arealite" / "engine").mkdir(parents=True)
    (tmp_path / "arealite" / "engine" / "a.py").write_text(DOC + text)
    (tmp_path / "arealite" / "engine" / "b.py").write_text(DOC)
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    for name, rule in vars(rules).items():
        if name.startswith("test_") and "config_field" not in name:
            rule()
