"""The server on a GPU itself: one arithmetic in prompts, decode, graphs and trainer; graphs outlive updates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.inference import LocalServer, output_logprobs, save_random
from test_inference_spans import tokens_of
from transformers import AutoModelForCausalLM, Qwen2Config

from arealite.inference.core.served_model import ServedModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # of mean differences of logprobs
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
BODIES = [
    {
        "input_ids": tokens_of(i, 17 + 60 * i),
        "sampling_params": {"max_new_tokens": 40 + 8 * i, "ignore_eos": True, "sampling_seed": i, "temperature": 1.0},
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("gpu"), 0)


def save(folder: Path, seed: int) -> Path:
    config = Qwen2Config(vocab_size=512, num_key_value_heads=2, max_position_embeddings=2048, **SIZES)
    return save_random(config, folder, 2, seed)


def load(folder: Path, dtype: torch.dtype) -> ServedModel:
    return ServedModel.load(str(folder), dtype, torch.device("cuda", 0), None, deterministic=False)


def trainer_logprobs(folder: Path, row: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Of all tokens but the first, by the trainer's modules and attention."""
    from arealite.algorithm.packing import prefix_tree
    from arealite.engine.attention import ATTENTION, Layout
    from arealite.kernels import functions
    from arealite.kernels.modules import fuse

    device = torch.device("cuda", 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION).to(device)
    kernels = functions.for_device(device)
    if kernels is not None:
        fuse(model, kernels)
    ids = torch.tensor([row], device=device)
    where = Layout(prefix_tree([np.asarray(row)]), device)
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids, use_cache=False, tree_layout=where).last_hidden_state[0]
        logits = functions.head_product(hidden, model.lm_head.weight).float()
    return torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0].cpu()


def prompt_logprobs(server: LocalServer, row: list[int]) -> list[float]:
    answer = server.generate(row, top={"logprob_start_len": 0}, max_new_tokens=0)
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_decode_prefill_and_trainer_agree(dtype, has_graphs, folder, monkeypatch):
    monkeypatch.setenv("AREALITE_GRAPHS", str(int(has_graphs)))
    gaps: dict[str, list[float]] = {"prefill": [], "trainer": []}
    with LocalServer(load(folder, dtype), max_running=4, kv_tokens=4096) as server:
        answers = server.generate_many(BODIES)
        captured = server.batcher._graphs and server.batcher._graphs._graphs
        assert bool(captured) == has_graphs, "graphs were given up, the log says why"
        for body, answer in zip(BODIES, answers, strict=True):
            row = body["input_ids"] + answer["output_ids"]
            drawn = np.array(output_logprobs(answer))
            gaps["prefill"] += np.abs(np.array(prompt_logprobs(server, row))[-len(drawn) :] - drawn).tolist()
            gaps["trainer"] += np.abs(trainer_logprobs(folder, row, dtype)[-len(drawn) :].numpy() - drawn).tolist()
    means = {name: float(np.mean(gap)) for name, gap in gaps.items()}
    assert all(mean < TOLERANCES[dtype] for mean in means.values()), means


def test_graphs_draw_what_single_passes_draw(folder, monkeypatch):
    """In float32, where no rounding decides between two tokens."""
    found: list[Any] = []
    for switch in ("1", "0"):
        monkeypatch.setenv("AREALITE_GRAPHS", switch)
        with LocalServer(load(folder, torch.float32), max_running=4, kv_tokens=4096) as server:
            found.append([answer["output_ids"] for answer in server.generate_many(BODIES)])
    assert found[0] == found[1]


def test_graphs_outlive_updates_and_a_cache_that_was_given_up(folder, tmp_path):
    other = save(tmp_path, 1)
    greedy = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    with LocalServer(load(other, torch.bfloat16)) as server:
        wanted = server.generate(BODIES[1]["input_ids"], **greedy)
    with LocalServer(load(folder, torch.bfloat16)) as server:
        before = server.generate(BODIES[1]["input_ids"], **greedy)["output_ids"]
        held = torch.cuda.memory_allocated()
        assert server.post("/release_memory_occupation", {})[0] == 200
        assert torch.cuda.memory_allocated() < held
        assert server.post("/resume_memory_occupation", {})[0] == 200
        assert server.generate(BODIES[1]["input_ids"], **greedy)["output_ids"] == before
        update = {"model_path": str(other), "weight_version": "1", "checksum_names": ["model.norm.weight"]}
        status, answer = server.post("/update_weights_from_disk", update)
        assert status == 200 and list(answer["checksums"]) == ["model.norm.weight"]
        after = server.generate(BODIES[1]["input_ids"], **greedy)
    assert after["output_ids"] == wanted["output_ids"] != before
    assert output_logprobs(after) == pytest.approx(output_logprobs(wanted), abs=1e-3)


def test_restricted_and_penalised_rows_run_beside_plain_ones(folder):
    kinds = [{}, {"top_p": 0.5}, {"top_k": 1}, {"frequency_penalty": 1.0}, {"min_p": 0.2}]
    bodies = [
        {**body, "sampling_params": {**body["sampling_params"], **kind}}
        for body, kind in zip(BODIES, kinds, strict=False)
    ]
    with LocalServer(load(folder, torch.float32), max_running=6, kv_tokens=4096) as server:
        answers = server.generate_many(bodies)
        row = bodies[2]["input_ids"] + answers[2]["output_ids"]
    best = best_tokens(folder, row)[len(bodies[2]["input_ids"]) - 1 : -1]
    assert answers[2]["output_ids"] == best, "top_k 1 is greedy"
    assert [len(a["output_ids"]) for a in answers] == [b["sampling_params"]["max_new_tokens"] for b in bodies]


def best_tokens(folder: Path, row: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    with torch.inference_mode():
        best: list[int] = model(torch.tensor([row], device="cuda")).logits[0].argmax(-1).tolist()
    return best
