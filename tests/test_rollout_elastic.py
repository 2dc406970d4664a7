"""Servers that are asked to join and to leave while a run goes on, by `arealite servers`."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import forks
from support.inference import fetch, wait_until
from support.rollout import QUICK, Clients, FakeServer, MembersWorkflow, Source, disk, quick_config
from test_rollout_faults import alive, check_answers, submit
from test_rollout_updates import held, versions_of_weights

from arealite.api.errors import ConfigError
from arealite.cli import main
from arealite.observe.run_folder import RunFolder
from arealite.rollout.client import RemoteNativeEngine
from arealite.rollout.ledger import audit
from arealite.rollout.roster import read_asked
from arealite.weights.link import WeightLink, verify

LIMIT_S = 60


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("AREALITE_RUN_DIR", str(tmp_path))
    (tmp_path / "config.yaml").touch()
    return tmp_path


@pytest.fixture
def connect():
    with Clients(server_silence_s=0.5) as connect:
        yield connect


class Command:
    """`arealite servers`, beside what the test does."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(["servers", str(folder), *words],), daemon=True)
        self._thread.start()

    def _run(self, words: list[str]) -> None:
        self.code = main(words)

    def end(self) -> int | None:
        self._thread.join(LIMIT_S)
        return self.code


def rows(folder: Path) -> dict[str, dict]:
    """Of the roster, by address."""
    path = folder / "servers.json"
    told = json.loads(path.read_text()) if path.exists() else {"servers": []}
    return {row["url"].removeprefix("http://"): row for row in told["servers"]}


def serving(folder: Path) -> set[str]:
    return {address for address, row in rows(folder).items() if row["state"] == "serving"}


def num_tokens(address: str) -> int:
    return fetch(f"http://{address}/server_info", None)[1]["internal_states"][0]["num_generated_tokens"]


@pytest.mark.process
@pytest.mark.parametrize("kind", ["disk", "distributed", "shm"])
def test_work_follows_the_servers_that_there_are(kind, tiny_llama, run_dir):
    """Three real servers, of which the run begins with one: two join, the first leaves; every step trains on a full
    batch, each sample once, and every server holds the trainer's weights whenever it is given work."""
    flags = ["--context-length", "256", "--max-running-requests", "4"]
    with forks.servers(3, tiny_llama, *flags) as servers:
        first, *others = (address for _, address in servers)
        link, weights = WeightLink(kind, run_dir / "weights"), versions_of_weights(tiny_llama)
        engine = RemoteNativeEngine(quick_config(), limits=QUICK)
        source, workflow, shares = Source(), MembersWorkflow(num_members=4), []

        def steps(num: int) -> None:
            for _ in range(num):
                version, before = len(shares) + 1, [num_tokens(address) for _, address in servers]
                batch = engine.prepare_batch(source, workflow)
                assert batch.num_sequences == 16 and {g.task.id for g in engine.last_groups} & seen == set()
                seen.update(g.task.id for g in engine.last_groups)
                engine.mark_trained(version - 1)
                meta = link.publish(next(weights), version)
                receipts = engine.update_weights(meta, link)
                verify(meta, receipts)
                shares.append([num_tokens(address) - n for (_, address), n in zip(servers, before, strict=True)])

        seen: set[str] = set()
        try:
            engine.initialize(addresses=[first])
            steps(3)
            assert all(share[1:] == [0, 0] for share in shares)
            adding = [Command(run_dir, "add", address) for address in others]
            assert [command.end() for command in adding] == [0, 0]  # while no step is made: the last weights are there
            assert {row["weights"] for row in rows(run_dir).values()} == {"version 3, verified"}
            states = [held(address, ["model.norm.weight"]) for _, address in servers]
            assert states[0] == states[1] == states[2] and states[0][0] == "3"
            steps(4)
            joint = [sum(share[i] for share in shares[-3:]) for i in range(3)]
            assert min(joint) > sum(joint) / 6, joint  # a third each, about
            leaving = Command(run_dir, "drain", first, "--limit-s", "30")
            while leaving.code is None:
                steps(1)
            assert leaving.end() == 0 and set(rows(run_dir)) == set(others)
            steps(3)
            assert all(share[0] == 0 and min(share[1:]) > 0 for share in shares[-2:]), shares
            stats = engine.stats()
            assert stats["num_servers_joined"] == 3 and stats["num_servers_drained"] == 1
            assert stats["num_servers_alive"] == 2 and not stats["num_server_failures"] + stats["num_failed"]
        finally:
            engine.destroy()
            link.close()
    report = audit(run_dir / "ledger.jsonl")
    assert not report.violations and sum(s == "trained" for s in report.states.values()) == 4 * len(shares)


def test_a_drained_server_has_its_time_and_its_requests_go_on_elsewhere(connect, run_dir, capsys):
    with FakeServer(token_s=0.02) as a, FakeServer() as b:
        engine = connect.to([a, b], consumer_batch_size=8)
        engine.update_weights(disk(1))
        submit(engine)
        wait_until(lambda: any(len(positions) > 5 for positions in a.truth.values()) and len(serving(run_dir)) == 2)
        assert main(["servers", str(run_dir), "drain", a.address, "--limit-s", "0.2"]) == 0
        check_answers(engine, engine.wait(8, timeout_s=LIMIT_S))
        told = capsys.readouterr().out
        assert "draining" in told and "its time is over" in told and alive(engine) == {"server-1"}
        assert engine.stats()["num_servers_drained"] == 1
        asked = len(a.requests)
        submit(engine)
        engine.wait(8, timeout_s=LIMIT_S)
        assert len(a.requests) == asked
        assert main(["servers", str(run_dir), "add", a.address]) == 0  # it may come back
        wait_until(lambda: len(alive(engine)) == 2)


def test_a_server_with_other_weights_is_given_no_work(connect, run_dir, capsys):
    with FakeServer() as a, FakeServer() as b:
        engine = connect.to([a])
        b.checksums = {"w": 8}
        command = Command(run_dir, "add", b.address, "--limit-s", "3")
        wait_until(lambda: b.address in rows(run_dir))
        assert alive(engine) == {"server-0"}  # nobody can say yet what it should hold
        engine.update_weights(disk(1))
        assert command.end() == 1
        told = capsys.readouterr().out
        assert "holds other weights than it was sent: w" in told and "not within 3 s" in told
        assert alive(engine) == {"server-0"} and not b.requests
        b.checksums = {"w": 7}
        assert main(["servers", str(run_dir), "add", b.address]) == 0
        assert rows(run_dir)[b.address]["weights"] == "version 1, verified"


def test_before_the_first_update_a_server_that_joins_waits_for_it(connect, run_dir):
    with FakeServer() as a, FakeServer() as b:
        engine = connect.to([a])
        command = Command(run_dir, "add", b.address)
        wait_until(lambda: b.address in rows(run_dir) and rows(run_dir)[b.address]["state"] == "updating")
        time.sleep(0.3)
        assert command.code is None and alive(engine) == {"server-0"}
        engine.update_weights(disk(1))
        assert command.end() == 0 and b.version == 1


def test_the_last_server_stays_until_another_serves(connect, run_dir, capsys):
    with FakeServer() as a, FakeServer() as b:
        engine = connect.to([a, b])
        engine.update_weights(disk(1))
        b.die()
        wait_until(lambda: serving(run_dir) == {a.address})
        with pytest.raises(ConfigError, match="add one first"):
            call(run_dir, "drain", a.address)
        (run_dir / "servers_asked").write_text(f"drain http://{a.address} 1\n")
        wait_until(lambda: "takes requests until another one does" in rows(run_dir)[a.address]["why"])
        assert alive(engine) == {"server-0"}
        b.come_back()
        wait_until(lambda: alive(engine) == {"server-1"})


def test_what_was_asked_holds_in_the_next_life_of_the_trainer(connect, run_dir):
    with FakeServer() as a, FakeServer() as b, FakeServer() as c:
        engine = connect.to([a, b])
        engine.update_weights(disk(1))
        assert main(["servers", str(run_dir), "add", c.address]) == 0
        wait_until(lambda: len(serving(run_dir)) == 3)
        assert main(["servers", str(run_dir), "drain", a.address]) == 0
        engine.destroy()
        (run_dir / "servers.json").unlink()
        engine = connect.to([a, b])
        engine.update_weights(disk(5))
        wait_until(lambda: set(rows(run_dir)) == {b.address, c.address} and c.version == 5)
        assert alive(engine) == {"server-1", "server-2"}


def call(*words: object) -> int:
    from arealite.cli import dispatch

    return dispatch(["servers", *map(str, words)])


def test_what_cannot_be_asked_is_refused(connect, run_dir, tmp_path_factory, capsys):
    with pytest.raises(ConfigError, match="no run folder"):
        call(tmp_path_factory.mktemp("another"))
    assert call(run_dir) == 0 and "no servers are known" in capsys.readouterr().out
    with FakeServer() as a, FakeServer() as b:
        connect.to([a, b])
        wait_until(lambda: len(serving(run_dir)) == 2)
        assert call(run_dir) == 0
        told = capsys.readouterr().out.splitlines()
        assert len(told) == 3 and told[1].split()[:3] == ["server-0", f"http://{a.address}", "serving"]
        for words, sentence in (
            (("add",), "HOST:PORT"),
            (("add", "127.0.0.1"), "is not one"),
            (("add", a.address.replace("127.0.0.1", "localhost")), "is server-0, which this run knows as"),
            (("drain", "127.0.0.1:9"), "is no server of this run"),
        ):
            with pytest.raises(ConfigError, match=sentence):
                call(run_dir, *words)
        with pytest.raises(SystemExit):
            call(run_dir, "remove", a.address)
        assert not (run_dir / "servers_asked").exists()


def test_without_a_trainer_the_wish_stays_and_that_is_said(run_dir, capsys):
    assert call(run_dir, "add", "127.0.0.1:9", "--limit-s", "0.3") == 1
    assert "nobody has seen the wish" in capsys.readouterr().out
    assert [each.url for each in read_asked(RunFolder(run_dir))] == ["http://127.0.0.1:9"]


def test_a_file_that_nobody_can_read_leaves_the_servers_as_they_are(connect, run_dir, caplog):
    with FakeServer() as a:
        engine = connect.to([a])
        (run_dir / "servers_asked").write_text("remove everything\n")
        wait_until(lambda: "servers_asked, line 1: expected add or drain" in caplog.text)
        time.sleep(0.2)
        assert caplog.text.count("expected add or drain") == 1 and alive(engine) == {"server-0"}


@pytest.mark.process
def test_two_commands_at_once_lose_no_wish(run_dir):
    words = [sys.executable, "-m", "arealite.cli", "servers", str(run_dir), "add"]
    asking = [subprocess.Popen([*words, f"127.0.0.1:{port}", "--limit-s", "0.1"]) for port in range(1, 6)]
    assert [process.wait(LIMIT_S) for process in asking] == [1] * 5
    asked = read_asked(RunFolder(run_dir))
    assert sorted(each.number for each in asked) == [1, 2, 3, 4, 5] and len({each.url for each in asked}) == 5
