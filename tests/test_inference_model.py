"""What the server returns is what the Hugging Face model computes; what it cannot serve faithfully it refuses."""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.inference import SMALL, LocalServer, output_logprobs, plain_logprobs, served
from support.kernels import needs_kernels
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2MoeConfig

from arealite.api.errors import ConfigError
from arealite.inference.core.layout import bucket_pages
from arealite.inference.core.served_model import ServedModel
from arealite.kernels import cpu


@lru_cache(2)
def plain_model(folder: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def prompts(num: int, vocab: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, longest))] for _ in range(num)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_fp32_logprobs_are_those_of_the_plain_pass(folder, deterministic):
    asked = prompts(12, 256)
    with LocalServer(served(folder, deterministic=deterministic)) as server:
        params = {"temperature": 0.8, "ignore_eos": True}
        bodies = [{"input_ids": ids, "sampling_params": params | {"max_new_tokens": 5 * i + 1},
                   "logprob_start_len": i % 3} for i, ids in enumerate(asked)]  # fmt: skip
        answers = server.generate_many(bodies)
    for i, (ids, answer) in enumerate(zip(asked, answers, strict=True)):
        tokens = ids + answer["output_ids"]
        assert len(answer["output_ids"]) == 5 * i + 1
        wanted = plain_logprobs(plain_model(folder), tokens, 0.8)[len(ids) - 1 :]
        assert output_logprobs(answer) == pytest.approx(wanted.tolist(), abs=1e-4)
        scored = answer["meta_info"]["input_token_logprobs"]
        if i % 3 < len(ids):
            assert [entry[1] for entry in scored] == ids[i % 3 :] and scored[0][0] is None
            wanted = plain_logprobs(plain_model(folder), tokens)[i % 3 : len(ids) - 1]
            assert [entry[0] for entry in scored[1:]] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_greedy_equals_generate_on_the_real_model(smollm2):
    model = served(Path(smollm2), torch.float32)
    texts = ["What is 3 + 4?", "Name a colour.", "The capital of France is"]
    ids = [model.tokenizer(text).input_ids for text in texts]
    with LocalServer(model) as server:
        answers = server.generate(ids, max_new_tokens=12, temperature=0)
    plain = plain_model(smollm2, torch.float32, "eager")
    for prompt, answer in zip(ids, answers, strict=True):
        whole = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
        assert answer["output_ids"] == whole[len(prompt) :]


def test_bf16_logprobs_are_those_of_one_pass_over_the_whole_sequence(smollm2):
    """With the compiled kernels decode and a packed pass have the same bits. In bf16 any other order of operations
    moves these logprobs by about 0.04: PyTorch's plain pass is as far from the float32 one as ours."""
    model = served(Path(smollm2), torch.bfloat16)
    texts = ["What is 3 + 4?", "def add(a, b):", "Once upon a time"]
    ids = [model.tokenizer(text).input_ids for text in texts]
    with LocalServer(model) as server:
        answers = server.generate(ids, max_new_tokens=24, sampling_seed=5, ignore_eos=True)
        whole = [prompt + answer["output_ids"] for prompt, answer in zip(ids, answers, strict=True)]
        scored = server.generate(whole, max_new_tokens=0, top={"logprob_start_len": 0})
    to_own_pass, to_exact, plain_to_exact = [], [], []
    for prompt, tokens, answer, score in zip(ids, whole, answers, scored, strict=True):
        logprobs = torch.tensor(output_logprobs(answer))
        own = torch.tensor([entry[0] for entry in score["meta_info"]["input_token_logprobs"][len(prompt) :]])
        plain, exact = (
            plain_logprobs(plain_model(smollm2, dtype, "eager"), tokens)[len(prompt) - 1 :]
            for dtype in (torch.bfloat16, torch.float32)
        )
        to_own_pass.append((logprobs - own).abs())
        to_exact.append((logprobs - exact).abs())
        plain_to_exact.append((plain - exact).abs())
    assert float(torch.cat(to_own_pass).mean()) < (1e-5 if cpu.load() else 0.05)
    assert float(torch.cat(to_exact).mean()) < 1.5 * float(torch.cat(plain_to_exact).mean())


def test_a_window_longer_than_the_context_is_no_window(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        MistralConfig(**SMALL, max_position_embeddings=256, sliding_window=300)
    ).save_pretrained(tmp_path)
    with LocalServer(served(tmp_path)) as server:
        answer = server.generate([1, 2, 3], max_new_tokens=30, ignore_eos=True)
    wanted = plain_logprobs(plain_model(tmp_path), [1, 2, 3, *answer["output_ids"]])[2:]
    assert output_logprobs(answer) == pytest.approx(wanted.tolist(), abs=1e-4)


def test_in_bf16_attention_that_calls_its_sizes_otherwise_is_served(tmp_path):
    """GPT-NeoX has no `head_dim`, at which the kernels would look."""
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL)).save_pretrained(tmp_path)
    assert served(tmp_path, torch.bfloat16).kv_shape[1] == SMALL["num_attention_heads"]


@needs_kernels
@pytest.mark.parametrize(("width", "is_direct"), [(96, True), (72, False)])
def test_layers_are_kernel_calls_where_the_kernels_can_read_their_widths(tmp_path, width, is_direct):
    config = LlamaConfig(**SMALL | {"head_dim": cpu.DIM_STEP, "intermediate_size": width})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = ServedModel.load(str(tmp_path), torch.bfloat16, torch.device("cpu"), None, False)
    assert ["forward" in vars(layer) for layer in model.module.model.layers] == [is_direct] * 2


def test_deterministic_mixture_of_experts_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(Qwen2MoeConfig(**SMALL, num_experts=4)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="deterministic"):
        served(tmp_path, deterministic=True)


def test_buckets_mask_at_most_a_third_and_grow_with_the_length():
    for length in range(1, 3000):
        pages = bucket_pages(length)
        needed = -(-length // 16)
        assert needed <= pages <= max(needed * 1.5, needed + 1)
        assert pages <= bucket_pages(length + 1)


def test_pages_are_counted_and_copied(folder):
    pool = served(folder).make_pool(64)
    pages = pool.take(3)
    assert pool.num_free == 1
    pool.hold(pages[:1])
    pool.drop(pages)
    assert pool.num_free == 3, "one page has another holder"
    pool.tensor[:, :, :, pages[0]] = 7
    pool.copy_page(pages[0], pages[1])
    assert bool((pool.tensor[:, :, :, pages[1]] == 7).all()) and not bool((pool.tensor[:, :, :, pages[2]] == 7).any())
    pool.drop(pages[:1])
    assert pool.num_free == 4
