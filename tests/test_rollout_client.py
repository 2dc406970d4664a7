"""The client against servers on real sockets that interrupt, hang, drop connections, refuse and die."""

import asyncio
import itertools
import json
import re
import threading
import time

import pytest
from aiohttp import web
from support.inference import wait_until
from support.rollout import Clients, FakeServer, MembersWorkflow, disk, expected_token, one, quick_config

from arealite.api.errors import (
    ConfigError,
    RequestError,
    ServerUnreachable,
    WaitTimeout,
    WeightSyncError,
    WorkflowError,
)
from arealite.api.types import Task, WeightUpdateMeta
from arealite.observe import waits
from arealite.rollout.client import RemoteNativeEngine, RemoteSGLangEngine
from arealite.rollout.generate import seed_of
from arealite.rollout.router import addresses_of


def expected(engine, rid, num_prompt, num_tokens):
    seed = seed_of(engine.seed, rid)
    return [expected_token(seed, num_prompt + i) for i in range(num_tokens)]


@pytest.fixture
def connect():
    with Clients() as connect:
        yield connect


@pytest.mark.parametrize("pause_mode", ["abort", "retract"])
def test_every_token_keeps_the_version_that_produced_it(connect, pause_mode):
    a, b, engine = connect(2, pause_mode=pause_mode, max_head_offpolicyness=8, consumer_batch_size=4)
    a.interrupt_share = b.interrupt_share = 0.05
    workflow = MembersWorkflow(num_members=3, max_new_tokens=60)
    for i in range(8):
        engine.submit(Task(f"e0-r{i}", prompt="x"), workflow)
    for version in range(1, 6):
        engine.pause()
        engine.update_weights(disk(version))
        engine.resume()
    groups = engine.wait(8, timeout_s=60)
    stats = engine.stats()
    truth = {}
    for server in (a, b):
        for rid, positions in server.truth.items():
            truth.setdefault(rid, {}).update(positions)
    assert [g.ordinal for g in groups] == list(range(8))
    versions_seen = set()
    for group in groups:
        for t in group.trajectories:
            rid = f"{group.task.id}.{t.member}"
            assert t.tokens[3:] == expected(engine, rid, 3, 60)
            assert t.logprobs[3:] == [-token / 1000 for token in t.tokens[3:]]
            assert t.versions[3:] == [truth[rid][3 + i] for i in range(60)]
            versions_seen |= set(t.versions[3:])
    assert len(versions_seen) > 1
    assert stats["num_interruptions"] > 0
    assert stats["num_unexpected_versions"] == 0


def test_tokens_are_told_as_they_come_and_through_interruptions(connect):
    server, engine = connect(1)
    server.interrupt_share = 0.1
    told: list[list[int]] = []
    done = one(engine, told.append, max_new_tokens=60)
    assert done.num_interruptions > 0 and told[-1] == done.token_ids == expected(engine, "t.0", 3, 60)
    assert len(told) == 60 and all(later[:-1] == earlier for earlier, later in itertools.pairwise(told))
    assert all(r["sampling_params"]["stream_interval"] == 1 for r in server.requests)


@pytest.mark.parametrize(("again", "told"), [([1, 2, 3], [[1, 2], [1, 2, 3]]), ([1, 7, 8], [[1, 2]])])
def test_what_was_told_and_lost_is_not_told_otherwise(connect, again, told):
    server, engine = connect(1)
    parts = iter([([1, 2], "ab", "abort"), (again, "axyz", "length")])  # "b" may begin the stop string

    def answer():
        tokens, text, reason = next(parts)
        event = {**server._answer(tokens, [0] * len(tokens), reason), "text": text}
        return web.Response(text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    server.answer_with = answer
    calls: list[list[int]] = []
    assert one(engine, calls.append, stop=("bc",)).token_ids == again
    assert calls == told


def test_a_server_with_the_wrong_version_is_counted(connect):
    server, engine = connect(1)
    server.version = 9
    assert one(engine).versions == [9] * 20
    assert engine.stats()["num_unexpected_versions"] == 20


def test_budget_used_up_by_an_interruption_is_length(connect):
    server, engine = connect(1)
    server.answer_with = lambda: web.json_response(server._answer([1, 2], [0, 0], "abort"))
    assert one(engine, max_new_tokens=2).finish_reason == "length"


def test_lost_connections_are_tried_again_elsewhere(connect):
    a, b, engine = connect(2)
    a.num_drops = b.num_drops = 1
    done = one(engine)
    assert done.token_ids == expected(engine, "t.0", 3, 20)
    assert len(a.requests) + len(b.requests) == 3
    assert a.requests and b.requests
    assert engine.stats()["num_request_failures"] == 2


def test_a_dead_server_costs_nothing_while_another_lives(connect):
    a, _, engine = connect(2)
    a.die()
    results = [one(engine, rid=f"{i}.0", group_id=str(i)) for i in range(4)]
    assert all(r.server_id == "server-1" for r in results)


def test_endless_failure_ends_with_the_servers_words(connect):
    server, engine = connect(1, request_retries=2)
    server.answer_with = lambda: web.Response(status=503, text="queue full")
    with pytest.raises(ServerUnreachable, match=r"t\.0 got no token in 3 sendings.*server-0.*503.*queue full"):
        one(engine)
    assert len(server.requests) == 3


def test_a_refused_request_is_not_sent_again(connect):
    server, engine = connect(1)
    server.answer_with = lambda: web.json_response({"error": {"message": "too long"}}, status=400)
    with pytest.raises(RequestError, match=r"server-0.*400.*too long"):
        one(engine)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_ids": [1, 2]}, "2 tokens and 1 logprobs that belong to them"),
        ({"output_ids": None}, "without"),
        ({"meta_info": {}}, "without"),
    ],
)
def test_an_answer_outside_the_protocol_is_refused(connect, change, message):
    server, engine = connect(1)
    answer = {**server._answer([1], [0], "length"), **change}
    server.answer_with = lambda: web.json_response(answer)
    with pytest.raises(RequestError, match=message):
        one(engine)


def test_a_logprob_that_is_nan_is_refused(connect):
    server, engine = connect(1)
    answer = server._answer([1], [0], "length", {"input_token_logprobs": [[None, 5, None], [None, 1, None]]})
    answer["meta_info"]["output_token_logprobs"][0][0] = None
    server.answer_with = lambda: web.json_response(answer)
    for act in (lambda: one(engine), lambda: engine.score([[5, 1]])):
        with pytest.raises(RequestError, match="not a finite number"):
            act()


@pytest.mark.parametrize("tokens", [[], [1]])
def test_a_servers_own_error_is_not_taken_for_an_interruption(connect, tokens):
    """The built-in server ends a request whose logits are NaN so, with HTTP 200; going on would end the same way."""
    server, engine = connect(1)
    answer = server._answer(tokens, [0] * len(tokens), "abort")
    answer["meta_info"]["finish_reason"] |= {"message": "the logits were not finite", "err_type": "NumericalError"}
    server.answer_with = lambda: web.json_response(answer)
    with pytest.raises(RequestError, match=r"server-0.*NumericalError: the logits were not finite"):
        one(engine)
    assert len(server.requests) == 1
    with pytest.raises(RequestError, match="the logits were not finite"):
        engine.score([[5, 1]])


def test_a_slow_request_is_aborted_and_goes_on_with_its_tokens(connect):
    """The server samples one token a sending and then falls silent: every sending must keep what came before."""
    server, engine = connect(1, request_timeout_s=0.1, request_retries=0)
    server.is_silent = True
    done = one(engine, max_new_tokens=4)
    assert done.token_ids == expected(engine, "t.0", 3, 4)
    assert [len(r["input_ids"]) for r in server.requests] == [3, 4, 5, 6]
    assert [r["sampling_params"]["max_new_tokens"] for r in server.requests] == [4, 3, 2, 1]
    assert len({r["sampling_params"]["sampling_seed"] for r in server.requests}) == 1
    assert engine.stats()["num_request_timeouts"] == 3


def test_a_server_that_never_answers_ends_in_an_error(connect):
    server, engine = connect(1, request_timeout_s=0.1, request_retries=1)
    server.is_deaf = True
    with pytest.raises(ServerUnreachable, match=r"server-0 .* within 0.1 s"):
        one(engine)
    assert server.calls.count("/abort_request") >= 2


def test_time_spent_paused_does_not_count(connect):
    _, engine = connect(1, request_timeout_s=0.5, pause_mode="retract", request_retries=0, token_s=0.002)
    engine.submit(Task("e0-r0", prompt="x"), MembersWorkflow(max_new_tokens=20))
    engine.pause()
    engine.pause()
    with pytest.raises(WaitTimeout):
        engine._live.run(asyncio.Event().wait(), "test.pause", 1.0)
    engine.resume()
    assert engine.wait(1, timeout_s=30)[0].trajectories[0].status == "ok"
    assert engine.stats()["num_request_timeouts"] == 0


def test_a_waiting_caller_names_what_it_waits_for(connect):
    server, engine = connect(1)
    server.is_deaf = True
    engine.submit(Task("e0-r3", prompt="x"), MembersWorkflow(num_members=3))
    with pytest.raises(WaitTimeout) as stall:
        engine.wait(1, timeout_s=0.5)
    line = str(stall.value)
    assert "waits for server-0: rollout.wait" in line
    assert "task e0-r3 (group 0)" in line
    assert "task e0-r3 member 2 on server-0, 0 tokens, last answer 0." in line


def test_a_groups_members_share_a_server_and_groups_spread(connect):
    a, b, engine = connect(2)
    workflow = MembersWorkflow(num_members=4)
    engine.run_groups([Task(f"e0-r{i}", prompt="x") for i in range(8)], workflow)
    homes = [{r["routing_key"] for r in s.requests} for s in (a, b)]
    assert not homes[0] & homes[1]
    assert len(homes[0]) == len(homes[1]) == 4


def test_weights_reach_all_servers_and_are_confirmed(connect):
    a, b, engine = connect(2)
    b.checksums = {"w": 8}
    receipts = engine.update_weights(WeightUpdateMeta("shm", 3, "/proc/1/fd/9", checksums={"w": 7}))
    assert receipts == {"server-0": {"w": 7}, "server-1": {"w": 8}}
    assert engine.get_version() == a.version == b.version == 3
    assert "/update_weights_from_shm" in a.calls


def test_weights_go_to_all_servers_at_once(connect):
    *servers, engine = connect(4)
    for server in servers:
        server.update_s = 0.2
    began = time.monotonic()
    engine.update_weights(disk(7))
    assert {server.version for server in servers} == {7}
    assert time.monotonic() - began < 4 * 3 * 0.2 / 2  # of three calls to each, one after the other


def test_sglang_takes_weights_from_disk_only(connect):
    _, engine = connect(1, kind=RemoteSGLangEngine)
    assert engine.update_weights(disk(1)) == {}  # it cannot confirm single tensors
    with pytest.raises(ConfigError, match="weight_update=disk"):
        engine.update_weights(WeightUpdateMeta("shm", 2, "/x"))


def test_score_keeps_order_and_starts_with_zero(connect):
    _, _, engine = connect(2)
    assert engine.score([[5, 1], [5, 2, 3], [9]]) == [[0.0, -0.1], [0.0, -0.2, -0.3], [0.0]]


def test_servers_that_do_not_come_up_are_named(connect):
    with FakeServer() as a, FakeServer() as b:
        b.health = 503
        with pytest.raises(ServerUnreachable, match=r"server-1 \(http://.*/health\) failed with HTTP 503"):
            connect.to([a, b], setup_timeout_s=0.5)
    assert not [t for t in threading.enumerate() if t.name == "rollout"]


def test_no_address_is_a_clear_error(monkeypatch):
    monkeypatch.delenv("AREAL_LLM_SERVER_ADDRS", raising=False)
    with pytest.raises(ConfigError, match="AREAL_LLM_SERVER_ADDRS"):
        RemoteNativeEngine(quick_config()).initialize()
    with pytest.raises(WorkflowError, match="initialize"):
        RemoteNativeEngine(quick_config()).pause()


UNUSABLE = ["::1:30000", "http://::1:30000", "host", "host:port", "host:70000", "[::1:30000", "ftp://host:1", "a b:1"]


@pytest.mark.parametrize("address", [*UNUSABLE, "http://", "tcp:1:2"])
def test_an_address_that_cannot_be_used_is_refused_at_once(address):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"server address {re.escape(repr(address))} is not one"):
        RemoteNativeEngine(quick_config()).initialize(addresses=["127.0.0.1:1", address])
    assert time.monotonic() - started < 1


def test_addresses_as_servers_print_them():
    given = ["host:1", "http://[::1]:2/", " [::1]:3 ", "https://user:word@proxy/base"]
    urls = ["http://host:1", "http://[::1]:2", "http://[::1]:3", "https://user:word@proxy/base"]
    assert [server.url for server in addresses_of(given)] == urls


def test_a_frozen_server_is_named_while_weights_are_sent(connect):
    """Not the request that hangs on another server, nor resume(), which would be called only afterwards."""
    a, b, engine = connect(2)
    a.is_deaf = True
    engine.submit(Task("e0-r0", prompt="x"), MembersWorkflow())
    b.is_frozen = True
    thread = threading.Thread(target=engine.pause)
    thread.start()
    try:
        wait_until(lambda: "waits for server-1: rollout.pause" in _open_waits())
        assert thread.is_alive()
        assert f"server-1: http://{b.address}/pause_generation not answered yet" in _open_waits()
    finally:
        b.is_frozen = False
        thread.join(20)


def test_a_result_that_comes_at_the_last_moment_is_not_lost(connect):
    """What a timed-out wait was about to hand over has been taken from the head already."""

    async def finishes_when_cancelled():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "groups"

    _, engine = connect(1)
    assert engine._live.run(finishes_when_cancelled(), "test", 0.1) == "groups"


def test_destroy_leaves_no_server_paused(connect):
    """As after an exception between pause and resume."""
    a, b, engine = connect(2)
    engine.pause()
    assert a.pause_mode == b.pause_mode == "retract"
    b.die()
    engine.destroy()
    assert a.pause_mode is None


def test_a_failed_update_leaves_generation_as_it_was(connect):
    server, engine = connect(1, kind=RemoteSGLangEngine)  # its updates need a pause
    server.refuse_update = "no room left"
    with pytest.raises(WeightSyncError, match="no room left"):
        engine.update_weights(disk(1))
    assert engine._live.gate.is_open and engine.get_version() == 0
    wait_until(lambda: server.pause_mode is None)
    assert one(engine).versions == [0] * 20


def test_a_server_that_was_left_paused_is_taken_over(connect):
    """The trainer before was killed between pause and resume."""
    with FakeServer() as server:
        server.pause_mode = "retract"
        assert one(connect.to([server])).token_ids


def test_destroy_tells_the_servers_what_is_given_up(connect):
    server, engine = connect(1)
    server.is_silent = True
    engine.submit(Task("e0-r0", prompt="x"), MembersWorkflow())
    wait_until(lambda: server.requests)
    engine.destroy()
    assert "/abort_request" in server.calls


def test_destroy_ends_a_wait_of_another_thread(connect):
    server, engine = connect(1)
    server.is_deaf = True
    engine.submit(Task("e0-r0", prompt="x"), MembersWorkflow())
    raised = []

    def waiter():
        try:
            engine.wait(1)
        except WorkflowError as error:
            raised.append(str(error))

    thread = threading.Thread(target=waiter)
    thread.start()
    wait_until(lambda: "rollout.wait" in _open_waits())
    engine.destroy()
    thread.join(20)
    assert not thread.is_alive()
    assert raised and "the run ended" in raised[0]


def _open_waits() -> str:
    return " ".join(waits.lines())
