"""Servers that die, freeze, refuse and come back while requests are under way: nothing is lost, nothing comes twice."""

import asyncio
import threading
from contextlib import AsyncExitStack

import pytest
from aiohttp import web
from support.inference import wait_until
from support.rollout import Clients, FakeServer, MembersWorkflow, disk, expected_token, one

from arealite.api.errors import RequestError, ServerUnreachable, WeightSyncError
from arealite.api.types import Task
from arealite.rollout.backends.sglang import NativeBackend
from arealite.rollout.client import RemoteSGLangEngine
from arealite.rollout.counters import Counters
from arealite.rollout.generate import seed_of
from arealite.rollout.router import Limits, Router, Server

LIMIT_S = 30


@pytest.fixture
def connect():
    with Clients(server_silence_s=0.5) as connect:
        yield connect


def alive(engine):
    return engine._live.call(lambda: {s.id for s in engine._live.router.servers if s.state == "serving"}, "test")


def pending(engine):
    return engine._live.call(lambda: " ".join(engine._live.fleet.pending()), "test")


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
    a, b, engine = connect(2, consumer_batch_size=8, token_s=0.005)
    submit(engine)
    wait_until(lambda: any(len(positions) > 10 for positions in a.truth.values()))
    a.die()
    groups = engine.wait(8, timeout_s=LIMIT_S)
    stats = engine.stats()
    check_answers(engine, groups)
    assert any(len(r["input_ids"]) > 3 for r in b.requests)  # not from the start
    assert stats["num_server_failures"] == 1 and stats["num_servers_alive"] == 1
    assert stats["num_requests_moved"] == 12 and stats["num_failed"] == stats["num_retries"] == 0


def test_a_frozen_server_is_taken_out_and_what_it_says_when_it_wakes_is_not_heard(connect):
    a, _, engine = connect(2, consumer_batch_size=8, token_s=0.005)
    submit(engine)
    wait_until(lambda: any(len(positions) > 10 for positions in a.truth.values()))
    a.is_stopped = True
    wait_until(lambda: alive(engine) == {"server-1"})
    a.is_stopped = False
    groups = engine.wait(8, timeout_s=LIMIT_S)
    check_answers(engine, groups)
    wait_until(lambda: alive(engine) == {"server-0", "server-1"})
    assert engine.stats()["num_server_failures"] == 1


def test_the_last_server_is_kept_even_if_it_is_slow(connect):
    a, engine = connect(1)
    submit(engine, 1)
    a.is_stopped = True
    with pytest.raises(Exception, match=r"rollout\.wait"):
        engine.wait(1, timeout_s=1.5)
    a.is_stopped = False
    assert engine.wait(1, timeout_s=LIMIT_S)
    assert engine.stats()["num_server_failures"] == 0


def test_a_server_rejoins_with_the_weights_it_missed_and_as_paused_as_the_others(connect):
    a, b, engine = connect(2)
    engine.update_weights(disk(4))
    b.die()
    engine.pause()
    assert set(engine.update_weights(disk(5))) == {"server-0"}
    b.calls.clear()
    b.come_back(version=5)  # other weights, of before this trainer went on from a recovery point: not to be trusted
    wait_until(lambda: alive(engine) == {"server-0", "server-1"})
    assert b.version == 5 and b.pause_mode == "retract"
    engine.resume()
    assert a.pause_mode is b.pause_mode is None
    assert "/update_weights_from_disk" in b.calls
    before = len(b.requests)
    engine.run_groups([Task(f"e0-r{i}", prompt="x") for i in range(4)], MembersWorkflow())
    assert len(b.requests) > before
    assert engine.stats()["num_unexpected_versions"] == 0


def test_no_server_is_sent_weights_that_the_trainer_is_about_to_overwrite(connect):
    _, b, engine = connect(2)
    engine.update_weights(disk(4))
    b.die()
    wait_until(lambda: alive(engine) == {"server-0"})
    engine.prepare_update()
    b.come_back()
    wait_until(lambda: b.calls.count("/model_info") >= 2)
    assert b.version == 0 and alive(engine) == {"server-0"}
    assert set(engine.update_weights(disk(5))) == {"server-0", "server-1"}  # the update itself reaches it
    assert b.version == 5 and alive(engine) == {"server-0", "server-1"}


def test_an_update_goes_on_without_the_server_that_refuses_it(connect):
    a, b, engine = connect(2)
    b.refuse_update = "no room left"
    assert engine.update_weights(disk(4)) == {"server-0": {"w": 7}}
    assert engine.get_version() == 4 and alive(engine) == {"server-0"}
    assert "no room left" in pending(engine)
    assert engine.stats()["num_server_failures"] == 1
    b.refuse_update = ""
    wait_until(lambda: b.version == 4 and alive(engine) == {"server-0", "server-1"})
    a.refuse_update = b.refuse_update = "no room left"
    with pytest.raises(WeightSyncError, match=r"version 5.*server-\d.*no room left"):
        engine.update_weights(disk(5))
    assert engine.get_version() == 4


def test_a_server_that_took_other_weights_than_it_was_sent_does_not_rejoin(connect):
    _, b, engine = connect(2)
    engine.update_weights(disk(4))
    b.die()
    wait_until(lambda: alive(engine) == {"server-0"})
    b.checksums = {"w": 8}
    b.come_back()
    wait_until(lambda: "other weights than it was sent: w" in pending(engine))
    assert alive(engine) == {"server-0"}


def test_a_server_that_cannot_be_paused_when_it_is_back_does_not_end_the_update_of_the_others(connect):
    _, b, engine = connect(2)
    b.refuse_update = "no room left"
    engine.update_weights(disk(4))
    engine.prepare_update()  # so that it gets its weights by the next update only
    b.refuse_update, b.refuse_pause = "", 500
    back = engine._live.router.servers[1]
    wait_until(lambda: back.state == "updating")
    assert engine.update_weights(disk(5)) == {"server-0": {"w": 7}}
    b.refuse_pause = 0
    wait_until(lambda: b.version == 5 and alive(engine) == {"server-0", "server-1"})


def test_a_server_that_freezes_while_it_comes_back_holds_up_nobody(connect):
    _, b, engine = connect(2, setup_timeout_s=300.0)
    engine.update_weights(disk(4))
    b.die()
    wait_until(lambda: alive(engine) == {"server-0"})
    b.calls.clear()
    b.is_frozen = True
    b.come_back()
    wait_until(lambda: "/pause_generation" in b.calls)
    b.is_stopped = True
    thread = threading.Thread(target=engine.prepare_update, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive() and alive(engine) == {"server-0"}
    b.is_stopped = b.is_frozen = False


def test_an_update_waits_for_a_server_when_all_are_gone(connect):
    a, engine = connect(1)
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
    a, b, engine = connect(2, setup_timeout_s=1.0)
    a.die()
    b.die()
    with pytest.raises(ServerUnreachable, match=r"no server .* for 1 s .*server-0 .*reached.*server-1 .*reached"):
        one(engine)
    b.come_back()
    wait_until(lambda: alive(engine))
    assert one(engine).server_id == "server-1"
    a.die()
    b.die()
    with pytest.raises(WeightSyncError, match=r"version 1 reached no server within 1 s.*server-1"):
        engine.update_weights(disk(1))


def test_a_server_that_fails_is_out_until_a_probe_and_on_trial_until_an_answer():
    """What fails or answers during its back-off began before it."""
    counters = Counters()
    router = Router(counters, 1.0, Limits(first_backoff_s=0.05))
    server = Server("server-0", "http://x", NativeBackend(), "serving")
    router.servers.append(server)
    router.fail(server, "refused")
    assert server.state == "out" and server.wait_s > 0
    router.fail(server, "another request on the same server")
    assert server.num_failures == 1 and server.why == "refused"
    router.heard(server)
    assert server.state == "out" and server.num_failures == 1
    wait_until(lambda: not server.wait_s)
    router.fail(server, "the probe")
    assert server.num_failures == 2
    router.move(server, "serving", "it answers")
    router.fail(server, "the first request")
    assert server.state == "out" and server.num_failures == 3 and counters.drain()["num_server_failures"] == 2
    router.move(server, "serving", "it answers")
    router.heard(server)
    assert server.state == "serving" and server.num_failures == 0


def test_a_server_that_failed_is_tried_by_one_request_first():
    router = Router(Counters(), 1.0, Limits())
    router.servers += [Server(f"server-{i}", "http://x", NativeBackend(), "serving") for i in range(2)]
    router.servers[0].num_failures = 1

    held = AsyncExitStack()

    async def homes():
        return [await held.enter_async_context(router.server_for(f"group {i}", 10)) for i in range(3)]

    assert sorted(server.id for server in asyncio.run(homes())) == ["server-0", "server-1", "server-1"]
    router.servers[1].num_failures = 1
    assert "server-0" in [server.id for server in asyncio.run(homes())]  # nobody else is left


def test_groups_keep_their_server_until_servers_come_or_go(connect):
    with FakeServer() as c:
        _, _, engine = connect(2)
        router, held = engine._live.router, AsyncExitStack()

        def homes(groups):
            async def acquire():
                return [await held.enter_async_context(router.server_for(group, 10)) for group in groups]

            return [server.id for server in engine._live.run(acquire(), "test")]

        assert homes("xyxyxx") == ["server-0", "server-1", "server-0", "server-1", "server-0", "server-0"]
        engine.add_server(c.address)
        wait_until(lambda: len(alive(engine)) == 3)
        assert homes("xx") == ["server-2", "server-2"]  # the idle one
        c.die()
        one(engine, rid="z", group_id="z")
        wait_until(lambda: len(alive(engine)) == 2)
        assert homes("xx") == ["server-1", "server-1"]


def test_the_servers_file_adds_replaces_and_drains(connect, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AREALITE_RUN_DIR", str(tmp_path))
    listed = tmp_path / "servers"
    with FakeServer(token_s=0.005) as a, FakeServer() as b, FakeServer() as c:
        engine = connect.to([a, b])
        engine.update_weights(disk(3))
        submit(engine, 4)
        wait_until(lambda: a.requests and b.requests)
        b.die()
        wait_until(lambda: alive(engine) == {"server-0"})
        listed.write_text(f"{a.address}\n{c.address}\n")  # the launcher has replaced server-1
        wait_until(lambda: c.version == 3 and alive(engine) == {"server-0", "server-1"})
        check_answers(engine, engine.wait(4, timeout_s=LIMIT_S), 4)
        assert alive(engine) == {"server-0", "server-1"}
        submit(engine, 4)
        wait_until(lambda: c.requests)
        wait_until(lambda: any(len(positions) > 10 for positions in a.truth.values()))
        listed.write_text(f"{c.address}\n")
        wait_until(lambda: [s.id for s in engine._live.call(engine._live.router.servers.copy, "test")] == ["server-1"])
        assert engine.stats()["num_server_failures"] == 1  # to be drained is none
        assert {g.trajectories[0].status for g in engine.wait(4, timeout_s=LIMIT_S)} == {"ok"}
        wait_until(lambda: len(engine._live.watch.loops) == 2)  # of the one server, and of the file
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_server_that_is_replaced_before_it_was_reached_costs_only_time(connect, tmp_path, monkeypatch):
    monkeypatch.setenv("AREALITE_RUN_DIR", str(tmp_path))
    with FakeServer() as a, FakeServer() as b, FakeServer() as c:
        b.die()
        (tmp_path / "servers").write_text(f"{a.address}\n{c.address}\n")
        engine = connect.to([a, b], setup_timeout_s=3.0)
        wait_until(lambda: alive(engine) == {"server-0", "server-1"})
        engine.run_groups([Task(f"e0-r{i}", prompt="x") for i in range(4)], MembersWorkflow())
        assert a.requests and c.requests


def test_a_paused_server_whose_health_check_samples_can_come_back(connect):
    _, b, engine = connect(2, kind=RemoteSGLangEngine)
    engine.pause()
    b.health = 503  # until it is resumed
    engine._live.call(lambda: engine._live.router.fail(engine._live.router.servers[1], "test"), "test")
    wait_until(lambda: alive(engine) == {"server-0", "server-1"})
    engine.resume()
    assert b.pause_mode is None


def test_a_health_check_that_samples_is_not_made_while_paused(connect):
    a, b, engine = connect(2, kind=RemoteSGLangEngine)
    wait_until(lambda: a.calls.count("/health") >= 3)
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
    server, engine = connect(1)
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
    a, b, engine = connect(2)
    engine.load_adapter("poet", "/poet")
    assert a.adapters == b.adapters == {"poet": "/poet"}
    with pytest.raises(RequestError, match="not so: poet"):
        engine.load_adapter("poet", "/other")
    b.die()
    wait_until(lambda: alive(engine) == {"server-0"})
    b.come_back()
    wait_until(lambda: alive(engine) == {"server-0", "server-1"})
    assert b.adapters == {"poet": "/poet"} and engine.stats()["num_server_failures"] == 1
    engine.unload_adapter("poet")
    assert a.adapters == b.adapters == {}


def test_scores_are_asked_again_elsewhere(connect):
    a, b, engine = connect(2)
    a.num_drops = 1
    b.die()
    assert engine.score([[5, 1], [5, 2, 3]]) == [[0.0, -0.1], [0.0, -0.2, -0.3]]
