"""Each architecture rule, applied to a small tree that breaks it: a rule that cannot fail protects nothing."""

from __future__ import annotations

import pytest
import test_architecture as rules

DOC = '"""A file."""\n'
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
LONG = "a sentence that stands here in full, and once more"
BROKEN = [
    (rules.test_every_part_has_a_level, "arealite/extras/a.py", "", "extras"),
    (rules.test_imports_go_down_only, "arealite/api/a.py", "from arealite.rollout import b", "api imports"),
    (rules.test_imports_go_down_only, "arealite/engine/a.py", "def f():\n    import arealite.rollout.b", "beside"),
    (
        rules.test_imports_go_down_only,
        "arealite/observe/a.py",
        "from ..engine import b",
        "observe imports arealite.engine",
    ),
    (rules.test_no_import_circles, "arealite/api/a.py", "import arealite.api", "arealite.api.a -> arealite.api -> "),
    (rules.test_no_torch_at_import, "arealite/api/a.py", "import torch.nn", "TORCH arealite.api.a"),
    (rules.test_no_torch_at_import, "arealite/cli.py", "import arealite.absent", "BROKEN arealite.cli"),
    (rules.test_files_and_functions_are_short, "arealite/api/a.py", "\n" * 400, "401 lines, at most 400"),
    (rules.test_files_and_functions_are_short, "tests/a.py", "def f():" + "\n    pass" * 60, "f has 61 lines"),
    (rules.test_no_catch_all_folders, "arealite/api/utils.py", "", "arealite/api/utils.py"),
    (rules.test_no_guessing_at_attributes, "arealite/api/a.py", "hasattr(1, 'a')", "a.py:2: hasattr"),
    (rules.test_no_guessing_at_attributes, "arealite/api/a.py", "getattr(1, 'a', 2)", "getattr with a default"),
    (
        rules.test_broad_excepts_stand_at_boundaries_with_their_reason,
        "arealite/cli.py",
        "try:\n    pass\nexcept:\n    pass",
        "bare",
    ),
    (
        rules.test_broad_excepts_stand_at_boundaries_with_their_reason,
        "arealite/cli.py",
        "try:\n    pass\nexcept (ValueError, Exception):  # noqa: BLE001, B902\n    pass",
        "cli.py:4: a broad except without its reason",
    ),
    (
        rules.test_broad_excepts_stand_at_boundaries_with_their_reason,
        "arealite/weights/a.py",
        "try:\n    pass\nexcept Exception:  # user code may raise anything\n    pass",
        "where no boundary is",
    ),
    (rules.test_names_say_what_they_are, "arealite/api/a.py", "def f(user_data): pass", "'user_data'"),
    (rules.test_names_say_what_they_are, "arealite/api/a.py", "class HTTPHandler: pass", "'HTTPHandler'"),
    (rules.test_names_say_what_they_are, "arealite/api/a.py", "items = []", "'items'"),
    (rules.test_names_say_what_they_are, "arealite/api/a.py", "self.request_timeout = 3", "seconds"),
    (rules.test_names_say_what_they_are, "arealite/api/a.py", "n_tokens = 3", "begin its name with num_"),
    (rules.test_names_say_what_they_are, "arealite/api/meta_helpers.py", "", "meta_helpers"),
    (
        rules.test_no_import_circles,
        "arealite/engine/a.py",
        TYPES + "    import arealite.engine",
        "engine.a ->",
    ),
    (rules.test_the_house_does_not_grow_by_itself, "arealite/engine/a.py", "x = 1\n" * 30_000, "at most"),
    (
        rules.test_one_name_is_one_thing,
        "arealite/engine/a.py",
        "class A: ...\nclass A: ...\n",
        "class A: arealite",
    ),
    (
        rules.test_no_text_stands_twice,
        "arealite/engine/a.py",
        f"x = {LONG!r}\ny = {LONG!r}\n",
        "a.py:2, arealite",
    ),
    (rules.test_no_paths_of_one_machine, "examples/a.yaml", "path: " + "/ho" + "me/me/model", "a.yaml:2"),
]


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), BROKEN)
def test_a_broken_rule_is_reported(rule, name, text, complaint, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(DOC + text)
    if name.startswith("arealite"):
        (tmp_path / "arealite" / "__init__.py").write_text(DOC)
    if rule is rules.test_no_import_circles:
        path.with_name("__init__.py").write_text(DOC + "def f():\n    from . import a")
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    with pytest.raises(AssertionError) as raised:
        rule()
    assert complaint in str(raised.value)


def test_a_file_without_docstring_is_reported(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(rules, "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="tests/a.py:1"):
        rules.test_every_file_says_what_it_is_for()


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
