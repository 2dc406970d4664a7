"""What each backend says on the wire and how it reads answers, by server and version; no server is needed for that."""

import json

import pytest

from arealite.api.errors import ConfigError, RequestError, WeightSyncError
from arealite.api.types import GenerationRequest, TensorSlot, WeightUpdateMeta
from arealite.rollout.backends.protocol import context_length_of
from arealite.rollout.backends.sglang import NativeBackend, SGLangBackend
from arealite.rollout.backends.vllm import (
    GENERATE,
    ROUTES,
    SETTINGS,
    VERSION,
    WEIGHTS,
    VLLMBackend,
    VLLMCompletionsBackend,
)

SLOTS = (
    TensorSlot("a", "bfloat16", (2, 3), 0, 12),
    TensorSlot("b", "bfloat16", (4,), 12, 8),
    TensorSlot("c", "float32", (1,), 0, 4),
)

ADAPTER = WeightUpdateMeta("lora", 5, "folder", checksums={"a": 1}, adapter="policy")


def meta(kind, version=5, **changes):
    fields = {"slots": SLOTS, "buckets": ((0, 2), (2, 3)), "group": "g", "checksums": {"b": 1}}
    return WeightUpdateMeta(kind, version, "/w", **{**fields, **changes})


def request(**changes):
    return GenerationRequest(**{"rid": "r", "input_ids": [1, 2], "max_new_tokens": 10, "seed": 7, **changes})


def sglang(version, **facts):
    return SGLangBackend().detect({"/server_info": {"version": version, **facts}}, "server-0")


def paths(plan):
    return [[call.path.split("?")[0] for call in calls] for calls in (plan.before, plan.buckets, plan.after)]


def settings(
    mode="processed_logprobs", extension="arealite.weights.vllm_worker.WeightReceiver", ranks=2, device="cuda"
):
    parallel = {"world_size": ranks, "worker_extension_cls": extension}
    config = {"model_config": {"logprobs_mode": mode}, "parallel_config": parallel}
    return {"vllm_config": {**config, "device_config": {"device": device}}}


def vllm(routes=(GENERATE,), **changes):
    facts = {VERSION: {"version": "0.32.0"}, WEIGHTS: {"weight_version": "4"}, SETTINGS: settings(**changes)}
    return VLLMBackend().detect({**facts, ROUTES: {"paths": {path: {} for path in routes}}}, "server-0")


def choice(**changes):
    logprobs = {"content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 6, "logprob": -1.5}]}
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}]
    fields = {"token_ids": [5, 6], "logprobs": logprobs, "finish_reason": "stop", "stop_reason": None}
    return {"choices": [{**fields, "weight_versions": spans, **changes}]}


@pytest.mark.parametrize(("version", "in_session"), [("0.5.20", False), ("0.5.21", True), ("0.5.23.post1", True)])
def test_sglang_updates_are_in_a_session_where_the_version_wants_one(version, in_session):
    before, buckets, after = paths(sglang(version).update_plan(meta("distributed"), "retract"))
    assert buckets == ["/update_weights_from_distributed"] * 2
    assert (before, after) == ((["/begin_weight_update"], ["/end_weight_update"]) if in_session else ([], []))
    assert paths(sglang(version).update_plan(meta("disk"), "retract"))[2] == ["/update_weights_from_disk"]


def test_sglang_buckets_are_named_and_only_the_last_flushes_and_stamps():
    plan = sglang("0.5.23").update_plan(meta("distributed"), "retract")
    first, last = (call.body for call in plan.buckets)
    assert first["names"] == ["a", "b"] and first["dtypes"] == ["bfloat16"] * 2 and first["shapes"] == [[2, 3], [4]]
    assert first["load_format"] == "flattened_bucket" and first["group_name"] == "g" and not first["flush_cache"]
    assert "weight_version" not in first and last["weight_version"] == "5" and last["flush_cache"] is True
    # In place, requests keep their cache: SGLang refuses to flush then.
    assert not sglang("0.5.23").update_plan(meta("distributed"), "in_place").buckets[-1].body["flush_cache"]
    assert not sglang("0.5.23").update_plan(meta("disk"), "in_place").after[0].body["flush_cache"]


def test_sglang_says_what_its_layout_cannot_read():
    backend = sglang("0.5.23", tp_size=3)
    assert backend.num_ranks == 3
    with pytest.raises(ConfigError, match="pp_size 2 reads new weights only from disk"):
        sglang("0.5.23", pp_size=2).update_plan(meta("distributed"), "retract")
    with pytest.raises(ConfigError, match="SGLang cannot read"):
        backend.update_plan(meta("shm"), "retract")


def test_sglang_without_version_spans_may_only_abort():
    assert sglang("0.5.19").pause_call("abort").body == {"mode": "abort"}
    with pytest.raises(ConfigError, match="pause_mode=abort"):
        sglang("0.5.19").pause_call("retract")
    assert sglang("0.5.20").pause_call("retract").body == {"mode": "retract"}


def test_sglang_of_unknown_version_is_taken_for_the_newest_known():
    for facts in ({}, {"/server_info": {}}, {"/get_server_info": {"version": "main"}}):
        assert SGLangBackend().detect(facts, "server-0").version == SGLangBackend().version
    assert SGLangBackend().detect({"/get_server_info": {"version": "0.5.10.post1"}}, "s").version == (0, 5, 10)


def test_the_context_of_a_server_is_what_its_card_says():
    for card, length in (({"id": "x", "max_model_len": 4096}, 4096), ({"id": "x", "max_model_len": None}, None)):
        assert context_length_of({"object": "list", "data": [card, {**card, "id": "adapter"}]}) == length
    assert context_length_of(None) is context_length_of({"data": []}) is None


def test_sglang_quirks_of_answers():
    finish = {"type": "abort", "message": "Abort in waiting queue"}
    # Aborted in the queue: no count of prompt tokens. Nothing to generate: a logprob without a token.
    for notes in ({"finish_reason": finish, "id": "x"}, {"finish_reason": {"type": "length", "length": 0}}):
        notes["output_token_logprobs"] = [[-0.1, 9, None]]
        part = SGLangBackend().parse_part({"text": "", "output_ids": [], "meta_info": notes}, "server-0")
        assert (part.token_ids, part.logprobs, part.versions) == ([], [], [])


def test_native_confirms_what_came_by_every_link():
    for kind in ("disk", "shm", "distributed"):
        assert NativeBackend().update_plan(meta(kind), "retract").after[-1].body["checksum_names"] == ["b"]
    answers = [{"success": True}, {"success": True, "checksums": {"b": 3}}]
    assert NativeBackend().parse_receipt(answers, meta("distributed"), "server-0") == {"b": 3}


@pytest.mark.parametrize("backend", [SGLangBackend(), VLLMBackend()], ids=lambda b: b.name)
def test_an_adapter_is_replaced_while_no_request_uses_it(backend):
    plan = backend.update_plan(ADAPTER, "abort")
    unload, load = plan.after[:2]
    assert not plan.before and not plan.buckets and not plan.is_staged
    assert unload.path.endswith("/unload_lora_adapter") and unload.may_be_refused
    assert load.path.endswith("/load_lora_adapter") and not load.may_be_refused
    assert load.body == {"lora_name": "policy", "lora_path": "folder"}
    stamp = plan.after[-1]
    assert stamp.path == "/update_weight_version" and stamp.body["new_version"] == "5"
    for mode in ("retract", "in_place"):
        with pytest.raises(ConfigError, match="rollout.pause_mode=abort"):
            backend.update_plan(ADAPTER, mode)
    assert "policy" in backend.score_call([1, 2], "w", "policy").body.values()
    assert "policy" not in backend.score_call([1, 2], "w", None).body.values()


def test_vllm_forgets_what_the_old_adapter_computed():
    paths_after = [call.path for call in VLLMBackend().update_plan(ADAPTER, "abort").after]
    assert paths_after[2:4] == ["/abort_requests", "/reset_prefix_cache?reset_running_requests=true"]
    assert VLLMBackend().parse_receipt(["Success", {"status": "aborted"}], ADAPTER, "server-0") is None


def test_native_swaps_an_adapter_at_one_stroke():
    for mode in ("abort", "retract", "in_place"):
        plan = NativeBackend().update_plan(ADAPTER, mode)
        (call,) = plan.after
        assert plan.is_staged and call.path == "/load_lora_adapter"
        assert call.body["load_inplace"] and call.body["weight_version"] == "5"


def test_vllm_parameters_and_the_seed_of_a_resumed_request():
    backend = VLLMBackend()
    call = backend.generate_call(request(min_new_tokens=4, stop=("x",), lora="poet"), "wire", [])
    assert call.path == GENERATE and call.body["model"] == "poet" and call.body["request_id"] == "wire"
    sampling = call.body["sampling_params"]
    assert (sampling["max_tokens"], sampling["min_tokens"], sampling["top_k"], sampling["logprobs"]) == (10, 4, 0, 0)
    assert sampling["seed"] == 7 and sampling["stop"] == ["x"]
    resumed = backend.generate_call(request(min_new_tokens=4), "wire", [8, 9]).body
    assert resumed["token_ids"] == [1, 2, 8, 9] and resumed["sampling_params"]["max_tokens"] == 8
    # With the same seed the server would draw its first numbers again.
    bodies = [backend.generate_call(request(), "wire", [8] * n).body for n in range(4)]
    assert len({body["sampling_params"]["seed"] for body in bodies}) == 4
    assert "seed" not in backend.generate_call(request(seed=None), "wire", []).body["sampling_params"]
    assert backend.abort_call("wire").body == {"request_ids": ["generate-tokens-wire"]}


@pytest.mark.parametrize("routes", [(GENERATE,), ()])
def test_vllm_gets_a_seed_only_where_it_survives_one(routes):
    asked = {}
    for device in ("cuda", "cpu"):
        body = vllm(routes, device=device).generate_call(request(), "wire", []).body
        asked[device] = body.get("sampling_params", body)
    assert asked["cuda"].pop("seed") == 7 and asked["cuda"] == asked["cpu"]


def test_vllm_streams_are_joined_from_what_is_new():
    backend = VLLMBackend(version=3)
    assert "stream" not in backend.generate_call(request(), "wire", []).body
    assert backend.generate_call(request(), "wire", [], is_followed=True).body["stream"] is True
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 7}}  # null unless it was started so

    def followed(*choices):
        answer, ids = None, []
        for new in choices:
            answer, ids = backend.follow(answer, json.dumps({"choices": [new]}).encode(), "server-0")
        return backend.parse_part(answer, "server-0"), ids

    events = [{"token_ids": [t], "logprobs": {"content": [{"logprob": -t / 2}]}, "finish_reason": None} for t in (5, 6)]
    part, ids = followed(*events)  # an end without tokens is not told by all versions: it was aborted
    assert ids == part.token_ids == [5, 6] and part.logprobs == [-2.5, -3.0]
    assert (part.finish_reason, part.versions) == ("abort", [3, 3])
    part, _ = followed(*events, choice(logprobs={"content": [{"logprob": 0}] * 2})["choices"][0])
    assert (part.token_ids, part.finish_reason, part.versions) == ([5, 6, 5, 6], "stop", [0, 3, 3, 3])
    assert part.num_cached == 0
    answer = None
    for event in ({"choices": [events[0]], "usage": None}, choice(), {"choices": [], "usage": usage}):
        answer, ids = backend.follow(answer, json.dumps(event).encode(), "server-0")
    assert backend.parse_part(answer, "server-0").num_cached == 7 and ids == [5, 5, 6]
    for told, num in ((usage, 7), ({**usage, "prompt_tokens_details": None}, 0), (None, 0)):
        assert backend.parse_part({**choice(), "usage": told}, "server-0").num_cached == num
    with pytest.raises(RequestError, match="server-0 streamed an event without 'choices'"):
        backend.follow(None, b"{}", "server-0")


def test_vllm_answers_are_read_or_refused():
    part = VLLMBackend().parse_part(choice(), "server-0")
    assert (part.token_ids, part.logprobs, part.versions) == ([5, 6], [-0.5, -1.5], [0, 3])
    assert part.matched == 6 and VLLMBackend().parse_part(choice(stop_reason="\n"), "server-0").matched == "\n"
    floor = {"content": [{"token_id": 5, "logprob": -9999.0}] * 2}
    for changes, said in (
        ({"logprobs": floor}, "not a finite number"),
        ({"logprobs": {"content": []}}, "2 tokens and 0 logprobs"),
        ({"logprobs": None}, "expected choices"),
        ({"finish_reason": "repetition"}, "repetition"),
        ({"weight_versions": [{"version": "x", "start": 0, "end": 2}]}, "weight version 'x'"),
    ):
        with pytest.raises(RequestError, match=said):
            VLLMBackend().parse_part(choice(**changes), "server-0")


def test_vllm_is_refused_when_it_was_started_in_a_way_that_cannot_work():
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        vllm(mode="raw_logprobs")
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        VLLMBackend().detect({VERSION: {"version": "0.32.0"}}, "server-0")
    plain = vllm(extension="")
    assert paths(plain.update_plan(meta("disk"), "retract"))[2][0] == "/collective_rpc"
    for kind in ("shm", "distributed"):
        with pytest.raises(ConfigError, match="--worker-extension-cls arealite"):
            plain.update_plan(meta(kind), "retract")
        assert vllm().update_plan(meta(kind), "retract").after


def test_vllm_without_the_scale_out_route_aborts_and_counts_versions_itself():
    backend = vllm(routes=())
    assert isinstance(backend, VLLMCompletionsBackend) and type(vllm()) is VLLMBackend and vllm().num_ranks == 2
    answer = choice(logprobs={"token_logprobs": [-0.5, -1.5]})
    assert backend.parse_part(answer, "server-0").versions == [4, 4]
    backend.parse_receipt([{"results": [None]}, {"success": True}], meta("disk"), "server-0")
    assert backend.parse_part(answer, "server-0").versions == [5, 5]
    assert "mode=abort" in backend.pause_call("abort").path
    with pytest.raises(ConfigError, match="--enable-scale-out"):
        backend.pause_call("retract")


def test_vllm_updates_flush_unless_in_place_and_their_receipts_are_checked():
    before, buckets, after = paths(VLLMBackend().update_plan(meta("distributed"), "retract"))
    assert (len(before), len(buckets), after[1:]) == (1, 2, ["/reset_prefix_cache", "/update_weight_version"])
    assert "/reset_prefix_cache" not in paths(VLLMBackend().update_plan(meta("disk"), "in_place"))[2]
    taken = {"results": [{"checksums": {"b": 9}, "absent": []}]}
    assert VLLMBackend().parse_receipt([taken, {"success": True}], meta("disk"), "server-0") == {"b": 9}
    for answer, said in (
        ({"results": [{"checksums": {}, "absent": ["lm_head.weight"]}]}, "no weights of version 5 for lm_head.weight"),
        ({"success": False}, "did not take the weights of version 5"),
        (None, "did not take"),
    ):
        with pytest.raises(WeightSyncError, match=said):
            VLLMBackend().parse_receipt([answer], meta("disk"), "server-0")
