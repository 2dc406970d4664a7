"""What the launcher says about a dead process: its exit in words, and the one error that matters from its log."""

import sys

import pytest

from arealite.launcher.child import Child, describe_exit, first_error
from arealite.launcher.plan import ProcessPlan
from arealite.observe.run_folder import RunFolder

CRASH = """hello
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    first()
KeyError: 'an earlier one, handled'
step 3
Traceback (most recent call last):
  File "train.py", line 22, in <module>
    main()
  File "engine.py", line 5, in step
    raise ValueError("bad")
ValueError: bad
  with a second line
"""


@pytest.mark.parametrize(
    ("returncode", "said"),
    [
        (1, "exit code 1"),
        (-9, "SIGKILL (kill -9, or the kernel"),
        (-11, "SIGSEGV"),
        (-6, "SIGABRT (on GPUs"),
        (-63, "63"),
        (0, "exit code 0"),
    ],
)
def test_exits_in_words(returncode, said):
    assert said in describe_exit(returncode)


def test_the_last_traceback_is_the_error():
    found = first_error(CRASH)
    assert found.startswith("Traceback") and found.endswith("ValueError: bad\n  with a second line")
    assert "handled" not in found
    assert first_error(CRASH, brief=True) == "ValueError: bad\n  with a second line"


def test_prefixes_of_ranks_are_taken_off():
    prefixed = "\n".join(f"[rank3]: {line}" for line in CRASH.splitlines())
    assert first_error(prefixed) == first_error(CRASH)


@pytest.mark.parametrize("prefix", ["", "[rank0]: "])
def test_errors_written_for_people_lose_their_traceback(prefix):
    log = (
        "Traceback (most recent call last):\n"
        '  File "train.py", line 22, in <module>\n'
        "    main()\n"
        "arealite.api.errors.WeightSyncError: server-0 holds other weights\n"
        "tensor lm_head.weight\n"
    )
    log = "".join(f"{prefix}{line}\n" for line in log.splitlines())
    assert first_error(log) == "WeightSyncError: server-0 holds other weights\ntensor lm_head.weight"


def test_without_a_traceback_the_end_of_the_log_is_shown():
    assert first_error("".join(f"line {i}\n" for i in range(100))).splitlines() == [f"line {i}" for i in range(80, 100)]
    assert first_error("\n\n") == "(the log is empty)"


def test_endless_tracebacks_are_cut_in_the_middle():
    log = "Traceback (most recent call last):\n" + "    frame\n" * 5000 + "RecursionError: too deep\n"
    lines = first_error(log).splitlines()
    assert len(lines) < 70 and lines[-1] == "RecursionError: too deep" and any("more lines" in line for line in lines)


def test_only_what_this_start_wrote_counts(tmp_path, capfd):
    folder = RunFolder(tmp_path)
    plan = ProcessPlan("trainer", 0, (sys.executable, "-c", "print('second start')"))
    folder.logs_dir.mkdir()
    (folder.logs_dir / "trainer-0.log").write_text(CRASH)
    child = Child.start(plan, folder)
    child.process.wait(20)
    (folder.logs_dir / "trainer-0.log").unlink()  # it stays open
    child.echo()
    assert child.output() == capfd.readouterr().out == "second start\n"
    assert "ended with exit code 0" in child.obituary() and child.obituary().endswith("says:\n  second start")
    child.log.close()
