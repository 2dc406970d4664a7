"""Servers that die, freeze, refuse and come back while requests are under way: nothing is lost, nothing comes twice."""

import asyncio
import threading
import time

import pytest
from aiohttp import web
from support.rollout import FakeServer, MembersWorkflow, expected_token, quick_config

from arealite.api.errors import RequestError, ServerUnreachable, WeightSyncError
from arealite.api.types import GenerationRequest, Task, WeightUpdateMeta
from arealite.rollout import generate as generate_module
from arealite.rollout import health, watch
from arealite.rollout.client import RemoteNativeEngine, RemoteSGLangEngine
from arealite.rollout.generate import seed_of
from arealite.rollout.health import Breaker

LIMIT_S = 30


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(generate_module, "ABORT_GRACE_S", 0.3)
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(health, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(watch, "PROBE_S", 0.05)
    monkeypatch.setattr(watch, "FILE_S", 0.02)


@pytest.fixture
def connect():
    engines = []

    def connect(servers, kind=RemoteNativeEngine, **changes):
        engine = kind(quick_config(**{"server_silence_s": 0.5, **changes}))
        engines.append(engine)
        engine.initialize(addresses=[s.address for s in servers])
        return engine

    yield connect
    for engine in engines:
        engine.destroy()


def until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.005)


def alive(engine):
    return {m.id for m in list(engine._live.router.members) if m.is_alive}


def disk(version):
    return WeightUpdateMeta("disk", version, "/weights", checksums={"w": 7})


def one(engine, rid="t.0", num_tokens=20, **changes):
    request = GenerationRequest(rid, [1, 2, 3], num_tokens, group_id=rid, **changes)
    return engine._live.run(engine.agenerate(request), "test")


def submit(engine, num_tasks=8, num_tokens=60):
    for i in range(num_tasks):
        engine.submit(Task(f"e0-r{i}", prompt="x"), MembersWorkflow(num_members=3, max_new_tokens=num_tokens))


def check_answers(engine, groups, num_tasks=8, num_tokens=60):
    """Each asked once, answered once, with the tokens of an undisturbed server."""
    assert [g.ordinal for g in groups] == list(range(num_tasks))
    for group in groups:
        assert [t.member for t in group.trajectories] == [0, 1, 2]
        for t in group.trajectories:
            seed = seed_of(engine.seed, f"{group.task.id}.{t.member}")
            assert t.tokens[3:] == [expected_token(seed, 3 + i) for i in range(num_tokens)]
            assert t.logprobs[3:] == [-token / 1000 for token in t.tokens[3:]]


def test_a_server_that_dies_hands_over_its_requests_with_the_tokens_they_have(connect):
    with FakeServer(token_s=0.005) as a, FakeServer(token_s=0.005) as b:
        engine = connect([a, b], consumer_batch_size=8)
        submit(engine)
        until(lambda: any(len(positions) > 10 for positions in a.truth.values()))
        a.die()
        groups = engine.wait(8, timeout_s=LIMIT_S)
        stats = engine.stats()
        check_answers(engine, groups)
        assert any(len(r["input_ids"]) > 3 for r in b.requests)  # not from the start
        assert stats["num_server_failures"] == 1 and stats["num_servers_alive"] == 1
        assert stats["num_requests_moved"] == 12 and stats["num_failed"] == stats["num_retries"] == 0


def test_a_frozen_server_is_taken_out_and_what_it_says_when_it_wakes_is_not_heard(connect):
    with FakeServer(token_s=0.005) as a, FakeServer(token_s=0.005) as b:
        engine = connect([a, b], consumer_batch_size=8)
        submit(engine)
        until(lambda: any(len(positions) > 10 for positions in a.truth.values()))
        a.is_stopped = True
        until(lambda: alive(engine) == {"server-1"})
        a.is_stopped = False
        groups = engine.wait(8, timeout_s=LIMIT_S)
        check_answers(engine, groups)
        until(lambda: alive(engine) == {"server-0", "server-1"})
        assert engine.stats()["num_server_failures"] == 1


def test_the_last_server_is_kept_even_if_it_is_slow(connect):
    with FakeServer() as a:
        engine = connect([a])
        submit(engine, 1)
        a.is_stopped = True
        with pytest.raises(Exception, match=r"rollout\.wait"):
            engine.wait(1, timeout_s=1.5)
        a.is_stopped = False
        assert engine.wait(1, timeout_s=LIMIT_S)
        assert engine.stats()["num_server_failures"] == 0


def test_a_server_rejoins_with_the_weights_it_missed_and_as_paused_as_the_others(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        engine.update_weights(disk(4))
        b.die()
        engine.pause()
        assert set(engine.update_weights(disk(5))) == {"server-0"}
        b.calls.clear()
        b.come_back(version=5)  # other weights, of before this trainer went on from a recovery point: not to be trusted
        until(lambda: alive(engine) == {"server-0", "server-1"})
        assert b.version == 5 and b.pause_mode == "retract"
        engine.resume()
        assert a.pause_mode is b.pause_mode is None
        assert "/update_weights_from_disk" in b.calls
        before = len(b.requests)
        engine.run_groups([Task(f"e0-r{i}", prompt="x") for i in range(4)], MembersWorkflow())
        assert len(b.requests) > before
        assert engine.stats()["num_unexpected_versions"] == 0


def test_no_server_is_sent_weights_that_the_trainer_is_about_to_overwrite(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        engine.update_weights(disk(4))
        b.die()
        until(lambda: alive(engine) == {"server-0"})
        engine.prepare_update()
        b.come_back()
        until(lambda: b.calls.count("/model_info") >= 2)
        assert b.version == 0 and alive(engine) == {"server-0"}
        assert set(engine.update_weights(disk(5))) == {"server-0", "server-1"}  # the update itself reaches it
        assert b.version == 5 and alive(engine) == {"server-0", "server-1"}


def test_an_update_goes_on_without_the_server_that_refuses_it(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        b.refuse_update = "no room left"
        assert engine.update_weights(disk(4)) == {"server-0": {"w": 7}}
        assert engine.get_version() == 4 and alive(engine) == {"server-0"}
        assert "no room left" in " ".join(engine._live.pending())
        assert engine.stats()["num_server_failures"] == 1
        b.refuse_update = ""
        until(lambda: b.version == 4 and alive(engine) == {"server-0", "server-1"})
        a.refuse_update = b.refuse_update = "no room left"
        with pytest.raises(WeightSyncError, match=r"version 5.*server-\d.*no room left"):
            engine.update_weights(disk(5))
        assert engine.get_version() == 4


def test_a_server_that_took_other_weights_than_it_was_sent_does_not_rejoin(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        engine.update_weights(disk(4))
        b.die()
        until(lambda: alive(engine) == {"server-0"})
        b.checksums = {"w": 8}
        b.come_back()
        until(lambda: "other weights than it was sent: w" in " ".join(engine._live.pending()))
        assert alive(engine) == {"server-0"}


def test_a_server_that_cannot_be_paused_when_it_is_back_does_not_end_the_update_of_the_others(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        b.refuse_update = "no room left"
        engine.update_weights(disk(4))
        engine.prepare_update()  # so that it gets its weights by the next update only
        b.refuse_update, b.refuse_pause = "", 500
        back = engine._live.router.members[1]
        until(lambda: back.breaker.state == "half_open")
        assert engine.update_weights(disk(5)) == {"server-0": {"w": 7}}
        b.refuse_pause = 0
        until(lambda: b.version == 5 and alive(engine) == {"server-0", "server-1"})


def test_a_server_that_freezes_while_it_comes_back_holds_up_nobody(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b], setup_timeout_s=300.0)
        engine.update_weights(disk(4))
        b.die()
        until(lambda: alive(engine) == {"server-0"})
        b.calls.clear()
        b.is_frozen = True
        b.come_back()
        until(lambda: "/pause_generation" in b.calls)
        b.is_stopped = True
        thread = threading.Thread(target=engine.prepare_update, daemon=True)
        thread.start()
        thread.join(LIMIT_S)
        assert not thread.is_alive() and alive(engine) == {"server-0"}
        b.is_stopped = b.is_frozen = False


def test_an_update_waits_for_a_server_when_all_are_gone(connect):
    with FakeServer() as a:
        engine = connect([a])
        a.die()
        engine.pause()
        thread = threading.Thread(target=engine.update_weights, args=(disk(4),))
        thread.start()
        a.come_back()
        thread.join(LIMIT_S)
        assert not thread.is_alive() and a.version == 4
        engine.resume()
        assert one(engine).versions == [4] * 20


def test_when_all_servers_are_gone_requests_wait_and_then_name_them(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b], setup_timeout_s=1.0)
        a.die()
        b.die()
        with pytest.raises(ServerUnreachable, match=r"no server .* for 1 s .*server-0 .*reached.*server-1 .*reached"):
            one(engine)
        b.come_back()
        until(lambda: alive(engine))
        assert one(engine).server_id == "server-1"
        a.die()
        b.die()
        with pytest.raises(WeightSyncError, match=r"version 1 reached no server within 1 s.*server-1"):
            engine.update_weights(disk(1))


def test_breaker():
    breaker = Breaker()
    assert breaker.failed("refused") and breaker.state == "open" and breaker.wait_s > 0
    assert not breaker.failed("another request on the same server") and breaker.num_failures == 1
    assert not breaker.succeeded() and breaker.state == "open"  # an answer from before; only a probe ends this
    until(lambda: not breaker.wait_s)
    assert not breaker.failed("the probe") and breaker.num_failures == 2
    breaker.answers()
    assert breaker.state == "half_open"
    assert breaker.failed("the first request") and breaker.num_failures == 3
    breaker.answers()
    assert breaker.succeeded() and breaker.state == "closed" and breaker.num_failures == 0


def test_a_server_that_failed_is_tried_by_one_request_first(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        router = engine._live.router
        first = router.members[0]
        first.breaker.state = "half_open"

        async def homes():
            return [(await router.acquire(f"group {i}", 10)).id for i in range(3)]

        assert sorted(engine._live.run(homes(), "test")) == ["server-0", "server-1", "server-1"]
        router.members[1].breaker.state = "half_open"
        assert "server-0" in engine._live.run(homes(), "test")  # nobody else is left


def test_groups_keep_their_server_until_servers_come_or_go(connect):
    with FakeServer() as a, FakeServer() as b, FakeServer() as c:
        engine = connect([a, b])
        router = engine._live.router

        def homes(groups):
            async def acquire():
                return [await router.acquire(group, 10) for group in groups]

            return [m.id for m in engine._live.run(acquire(), "test")]

        assert homes("xyxyxx") == ["server-0", "server-1", "server-0", "server-1", "server-0", "server-0"]
        engine.add_server(c.address)
        until(lambda: len(alive(engine)) == 3)
        assert homes("xx") == ["server-2", "server-2"]  # the idle one
        c.die()
        one(engine, rid="z")
        until(lambda: len(alive(engine)) == 2)
        assert homes("xx") == ["server-1", "server-1"]


def test_the_servers_file_adds_replaces_and_drains(connect, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AREALITE_RUN_DIR", str(tmp_path))
    listed = tmp_path / "servers"
    with FakeServer(token_s=0.005) as a, FakeServer() as b, FakeServer() as c:
        engine = connect([a, b])
        engine.update_weights(disk(3))
        submit(engine, 4)
        until(lambda: a.requests and b.requests)
        b.die()
        listed.write_text(f"{a.address}\n{c.address}\n")  # the launcher has replaced server-1
        until(lambda: c.version == 3 and alive(engine) == {"server-0", "server-1"})
        check_answers(engine, engine.wait(4, timeout_s=LIMIT_S), 4)
        assert alive(engine) == {"server-0", "server-1"}
        submit(engine, 4)
        until(lambda: c.requests)
        until(lambda: any(len(positions) > 10 for positions in a.truth.values()))
        listed.write_text(f"{c.address}\n")
        until(lambda: {m.id for m in list(engine._live.router.members)} == {"server-1"})
        assert engine.stats()["num_server_failures"] == 1  # to be drained is none
        assert {g.trajectories[0].status for g in engine.wait(4, timeout_s=LIMIT_S)} == {"ok"}
        until(lambda: len(engine._live.watch._loops) == 2)  # of the one server, and of the file
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_server_that_is_replaced_before_it_was_reached_costs_only_time(connect, tmp_path, monkeypatch):
    monkeypatch.setenv("AREALITE_RUN_DIR", str(tmp_path))
    with FakeServer() as a, FakeServer() as b, FakeServer() as c:
        b.die()
        (tmp_path / "servers").write_text(f"{a.address}\n{c.address}\n")
        engine = connect([a, b], setup_timeout_s=3.0)
        until(lambda: alive(engine) == {"server-0", "server-1"})
        engine.run_groups([Task(f"e0-r{i}", prompt="x") for i in range(4)], MembersWorkflow())
        assert a.requests and c.requests


def test_a_paused_server_whose_health_check_samples_can_come_back(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b], kind=RemoteSGLangEngine)
        engine.pause()
        b.health = 503  # until it is resumed
        engine._live.call(lambda: engine._live.router.fail(engine._live.router.members[1], "test"), "test")
        until(lambda: alive(engine) == {"server-0", "server-1"})
        engine.resume()
        assert b.pause_mode is None


def test_a_health_check_that_samples_is_not_made_while_paused(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b], kind=RemoteSGLangEngine)
        until(lambda: a.calls.count("/health") >= 3)
        engine.pause()
        a.health = b.health = 503  # what SGLang says after 20 s of pause
        before = a.calls.count("/health")
        with pytest.raises(Exception, match="test"):
            engine._live.run(asyncio.Event().wait(), "test", 1.0)
        assert a.calls.count("/health") <= before + 1 and len(alive(engine)) == 2
        a.health = b.health = 200
        engine.resume()
        assert one(engine).token_ids


def test_a_part_that_may_end_within_a_stop_string_is_sampled_again(connect):
    """The server that goes on looks for stop strings in its own tokens only."""
    with FakeServer() as server:
        engine = connect([server])
        texts = iter(["ab", "ax", "abc"])

        def answer():
            text = next(texts)
            answer = server._answer([1, 2], [0, 0], "stop" if text == "abc" else "abort")
            return web.json_response({**answer, "text": text})

        server.answer_with = answer
        done = one(engine, stop=("bc",))
        assert [len(r["input_ids"]) for r in server.requests] == [3, 3, 5]
        assert done.text == "axabc" and done.finish_reason == "stop"


def test_adapters_are_on_all_servers_and_on_those_that_come_back(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        engine.load_adapter("poet", "/poet")
        assert a.adapters == b.adapters == {"poet": "/poet"}
        with pytest.raises(RequestError, match="not so: poet"):
            engine.load_adapter("poet", "/other")
        b.die()
        until(lambda: alive(engine) == {"server-0"})
        b.come_back()
        until(lambda: alive(engine) == {"server-0", "server-1"})
        assert b.adapters == {"poet": "/poet"} and engine.stats()["num_server_failures"] == 1
        engine.unload_adapter("poet")
        assert a.adapters == b.adapters == {}


def test_scores_are_asked_again_elsewhere(connect):
    with FakeServer() as a, FakeServer() as b:
        engine = connect([a, b])
        a.num_drops = 1
        b.die()
        assert engine.score([[5, 1], [5, 2, 3]]) == [[0.0, -0.1], [0.0, -0.2, -0.3]]
