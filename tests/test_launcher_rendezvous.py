"""How agents find a head: the file, on folders that are slow, full, stale or not there, and the environment."""

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from arealite.launcher import rendezvous
from arealite.launcher.rendezvous import FILE, Meeting, find_head, publish, read

MEETING = Meeting("127.0.0.1", 4000, "ab" * 16, epoch=3)


def test_what_is_published_is_read_by_its_owner_alone(tmp_path):
    publish(tmp_path, Meeting("127.0.0.1", 1, "ab" * 16, epoch=2))
    publish(tmp_path, MEETING)
    assert read(tmp_path) == MEETING and [p.name for p in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_readers_never_see_a_part(tmp_path):
    publish(tmp_path, MEETING)
    stop = threading.Event()

    def write():
        while not stop.is_set():
            publish(tmp_path, MEETING)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(read(tmp_path) == MEETING for _ in range(200))
    finally:
        stop.set()
        writer.join(20)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}'])
def test_what_is_no_meeting_is_told(tmp_path, content):
    with pytest.raises(LookupError, match=f"has no {FILE} yet"):
        read(tmp_path)
    (tmp_path / FILE).write_text(content)
    with pytest.raises(LookupError, match="cannot read"):
        read(tmp_path)
    with pytest.raises(LookupError, match="cannot read"):
        read(tmp_path / "missing")


def test_an_older_epoch_is_refused(tmp_path):
    publish(tmp_path, MEETING)
    assert find_head(tmp_path, 3) == MEETING
    with pytest.raises(LookupError, match="of epoch 3, and 4 was seen already"):
        find_head(tmp_path, 4)


def test_a_folder_that_hangs_is_given_up_and_one_that_is_slow_is_waited_for(tmp_path):
    """Opening a pipe blocks in the kernel until somebody writes into it, as a network file system does."""
    slow = tmp_path / "slow"
    slow.mkdir()
    for folder in (tmp_path, slow):
        os.mkfifo(folder / FILE)
    began = time.monotonic()
    with pytest.raises(LookupError, match="takes longer than 0.2 s"):
        read(tmp_path, 0.2)
    assert time.monotonic() - began < 5
    text = json.dumps(vars(MEETING))
    late = threading.Timer(0.5, lambda: (slow / FILE).write_text(text))
    late.start()
    assert read(slow, 10) == MEETING
    late.join(20)


def test_a_full_disk_keeps_the_old_file(tmp_path):
    publish(tmp_path, MEETING)
    program = (
        "import resource, signal, sys; from pathlib import Path; from arealite.launcher.rendezvous import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))\n"
        "publish(Path(sys.argv[1]), Meeting('h', 1, 'cd' * 16, 9))"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "File too large" in ran.stderr
    assert read(tmp_path) == MEETING


class LyingFolder:
    """Operations on files, by turns slow, refused (root squash), out of room, or of a file that a cache still shows."""

    errors = (errno.EACCES, errno.ENOSPC, errno.ESTALE, errno.EIO)

    def __init__(self, monkeypatch, seed):
        self.choose, self.num_lies = random.Random(seed), 0
        for name in ("open", "replace", "listdir", "fsync"):
            monkeypatch.setattr(os, name, self.lying(getattr(os, name)))

    def lying(self, real):
        def operation(*args, **options):
            turn = self.choose.random()
            if turn < 0.2:
                self.num_lies += 1
                raise OSError(self.choose.choice(self.errors), "the file server says no", str(args[0]))
            if turn < 0.3:
                time.sleep(0.002)
            return real(*args, **options)

        return operation


@pytest.mark.parametrize("seed", range(3))
def test_a_folder_that_fails_now_and_then_never_shows_a_part_nor_an_old_head(tmp_path, monkeypatch, seed):
    """A publication that fails leaves the old place or has made the new one; who looks, looks again."""
    publish(tmp_path, MEETING)
    lies, meetings, published, seen = LyingFolder(monkeypatch, seed), [MEETING], 3, 3
    for epoch in range(4, 60):
        meetings.append(Meeting("127.0.0.1", 4000 + epoch, "ab" * 16, epoch))
        with contextlib.suppress(OSError):
            publish(tmp_path, meetings[-1])
            published = epoch
        try:
            found = find_head(tmp_path, seen)
        except LookupError as error:
            assert "cannot read" in str(error)
            continue
        assert found in meetings and found.epoch >= max(seen, published)
        seen = found.epoch
    assert lies.num_lies > 30 and seen > 40


def test_what_another_user_may_not_read_is_told(tmp_path):
    """Root squash: the file server takes root for somebody without rights."""
    tmp_path.chmod(0o711)
    publish(tmp_path, MEETING)
    program = (
        "import os, sys; from pathlib import Path; from arealite.launcher.rendezvous import *\n"
        "os.setuid(65534); folder = Path(sys.argv[1])\n"
        "try: find_head(folder, 0)\nexcept LookupError as error: print(error)\n"
        "try: publish(folder, Meeting('h', 1, 'cd' * 16, 9))\nexcept OSError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "Operation not permitted" in ran.stderr:
        pytest.skip("only root can become another user")
    assert ran.stdout.count("Permission denied") == 2 and "cannot read" in ran.stdout, ran.stdout + ran.stderr
    assert read(tmp_path) == MEETING


def test_the_environment_goes_first_and_is_checked(tmp_path, monkeypatch):
    publish(tmp_path, MEETING)
    monkeypatch.setenv("AREALITE_HEAD", "head.cluster:29400")
    monkeypatch.setenv("AREALITE_RUN_KEY", "0f" * 16)
    assert find_head(tmp_path, 0) == Meeting("head.cluster", 29400, "0f" * 16, 0)
    for name, value in (("AREALITE_RUN_KEY", "short"), ("AREALITE_HEAD", "head")):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="expected host:port, and AREALITE_RUN_KEY has"):
            find_head(tmp_path, 0)
    monkeypatch.delenv("AREALITE_HEAD")
    with pytest.raises(ValueError, match="neither --run-folder nor AREALITE_HEAD"):
        find_head(None, 0)


def test_an_agent_starts_with_the_standard_library_alone():
    root = os.path.dirname(os.path.dirname(os.path.dirname(rendezvous.__file__)))
    program = (
        "import sys; import arealite.launcher.agent\n"
        "own = {'arealite', 'arealite.launcher', 'arealite.launcher.agent', 'arealite.launcher.rendezvous'}\n"
        "names = {n for n in sys.modules if n.split('.')[0] not in sys.stdlib_module_names}\n"
        "sys.exit(sorted(names - own - {'__main__', '__mp_main__'}) or 0)"
    )
    command = [sys.executable, "-S", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert ran.returncode == 0, ran.stderr
