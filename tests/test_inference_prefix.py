"""What is known to be computed is not computed again, and never stands for anything else."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import LocalServer, output_logprobs, save_tiny_llama, served, wait_until

from arealite.inference.core.cache import PagePool, PrefixCache, pages_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [save_tiny_llama(tmp_path_factory.mktemp(f"llama{seed}"), seed=seed, tied=False) for seed in (0, 1)]


def pool_of(num_pages: int) -> PagePool:
    return PagePool(1, 1, 1, num_pages * 16, torch.float32, torch.device("cpu"))


def key(tokens: list[int]) -> bytes:
    return torch.tensor(tokens, dtype=torch.int32).numpy().tobytes()


def remember(cache: PrefixCache, pool: PagePool, tokens: list[int], adapter: str | None = None) -> list[int]:
    """As a sequence does that has computed these tokens and ends."""
    pages = pool.take(pages_for(len(tokens)))
    cache.insert(adapter, key(tokens), pages, with_tail=True)
    pool.drop(pages)
    return pages


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_is_found_is_a_true_prefix_and_misses_at_most_a_page(seed):
    rng = random.Random(seed)
    pool = pool_of(400)
    cache = PrefixCache(pool)
    sayings = [[rng.randrange(2) for _ in range(rng.randint(1, 70))] for _ in range(12)]
    where: dict[int, list[int]] = {}  # a page, and the tokens up to its end as it was first remembered
    for tokens in sayings:
        for i, page in enumerate(remember(cache, pool, tokens)):
            if page not in pool._free:
                where.setdefault(page, tokens[: 16 * (i + 1)])
    for _ in range(20):
        asked = (rng.choice(sayings) + [rng.randrange(2) for _ in range(20)])[: rng.randint(1, 90)]
        pages, num = cache.match(None, key(asked))
        assert num >= max(common(asked, said) for said in sayings) // 16 * 16
        assert num >= max((len(said) for said in sayings if asked[: len(said)] == said), default=0)
        assert len(pages) == pages_for(num)
        for i, page in enumerate(pages):
            end = min(num, 16 * (i + 1))
            assert where[page][:end] == asked[:end]
    cache.clear()
    assert pool.num_free == 400 and pool.num_idle == 0 and len(cache) == 0


def test_the_oldest_goes_first_and_never_what_others_build_on():
    pool = pool_of(6)
    cache = PrefixCache(pool)
    first, second = [1] * 32, [2] * 32
    remember(cache, pool, first)
    remember(cache, pool, second)
    cache.match(None, key(first))
    assert cache.make_room(3)
    assert cache.match(None, key(second))[1] == 16 and cache.match(None, key(first))[1] == 32
    held, _ = cache.match(None, key(first))
    pool.hold(held)
    assert not cache.make_room(5), "what somebody holds stays"
    assert cache.match(None, key(second))[1] == 16, "nothing is evicted in vain"
    assert cache.make_room(4) and cache.match(None, key(second))[1] == 0
    assert cache.match(None, key(first))[1] == 32


def test_a_long_prefix_can_be_evicted_whole():
    pool = pool_of(4)
    cache = PrefixCache(pool)
    remember(cache, pool, [1] * 64)
    assert cache.make_room(4) and pool.num_free == 4


def test_pages_that_are_known_take_the_place_of_a_sequences_own():
    pool = pool_of(8)
    cache = PrefixCache(pool)
    pages, own = pool.take(2), pool.take(3)
    cache.insert(None, key([1] * 32), pages, with_tail=False)
    cache.insert(None, key([1] * 32 + [2] * 16), own, with_tail=False)
    assert own[:2] == pages and pool.num_free == 5


def test_adapters_do_not_share():
    pool = pool_of(8)
    cache = PrefixCache(pool)
    remember(cache, pool, [1] * 40, "poet")
    assert cache.match(None, key([1] * 40))[1] == 0 and cache.match("judge", key([1] * 40))[1] == 0
    assert cache.match("poet", key([1] * 40))[1] == 40


def cached(answer: Any) -> int:
    return int(answer["meta_info"]["cached_tokens"])


def test_conversations_and_resumed_requests_compute_only_what_is_new(folders):
    params = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    prompt = list(range(45))
    with LocalServer(served(folders[0])) as server:
        first = server.generate(prompt, **params)
        assert cached(first) == 0
        whole = prompt + first["output_ids"]
        second = server.generate([*whole, 9, 8, 7], **params)
        assert cached(second) == len(whole) - 1, "the last token of an answer has not been computed"
        scored = server.generate(whole, top={"logprob_start_len": 20}, **params)
        assert cached(scored) == 20, "what is to be scored is computed"
        assert cached(server.generate(whole, top={"logprob_start_len": len(whole) - 1}, **params)) == len(whole) - 1
        future = server.pool.submit(server.post, "/generate", {"rid": "r", "input_ids": [3] * 5, "sampling_params": {
            **params, "max_new_tokens": 400}})  # fmt: skip
        server.step_delay_s = 0.01
        wait_until(lambda: server.batcher.scheduler.running and server.batcher.scheduler.running[0].num_output > 20)
        server.post("/abort_request", {"rid": "r"})
        server.step_delay_s = 0.0
        status, head = future.result()
        assert status == 200
        so_far = [3] * 5 + head["output_ids"]
        tail = server.generate(so_far, **params)
        assert cached(tail) == len(so_far) - 1
        server.post("/flush_cache", {})
        fresh = [server.generate(ids, **params) for ids in ([*whole, 9, 8, 7], so_far)]
    for answer, wanted in zip((second, tail), fresh, strict=True):
        assert answer["output_ids"] == wanted["output_ids"]
        assert output_logprobs(answer) == pytest.approx(output_logprobs(wanted), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_results_are_the_same_bit_for_bit_with_and_without_the_cache(folders, dtype):
    rng = random.Random(4)
    stem = [rng.randrange(256) for _ in range(150)]
    asked = [stem[:n] + [rng.randrange(256) for _ in range(rng.randint(0, 40))] for n in (150, 140, 129, 64, 65, 10)]
    params = {"max_new_tokens": 8, "sampling_seed": 3, "ignore_eos": True}
    with LocalServer(served(folders[0], dtype, deterministic=True)) as server:

        def afresh(prompts):
            return [(server.post("/flush_cache", {}), server.generate(prompt, **params))[1] for prompt in prompts]

        alone = afresh(asked)
        resumed = [ids + answer["output_ids"][:5] for ids, answer in zip(asked, alone, strict=True)]
        alone_resumed = afresh(resumed)
        server.post("/flush_cache", {})
        shared = [server.generate(prompt, **params) for prompt in asked + resumed]
        batch = server.generate([*asked, *asked[::-1]], **params)
    assert sum(map(cached, shared)) > 500 and sum(map(cached, alone)) == 0
    wanted = [(a["output_ids"], output_logprobs(a)) for a in [*alone, *alone_resumed]]
    assert [(a["output_ids"], output_logprobs(a)) for a in shared] == wanted
    wanted = wanted[: len(asked)]
    assert [(a["output_ids"], output_logprobs(a)) for a in batch] == wanted + wanted[::-1]


def test_what_a_request_computed_across_an_update_is_not_shared(folders):
    """Paused in place, it ends with keys and values of both weights."""
    params = {"max_new_tokens": 60, "temperature": 0, "ignore_eos": True}
    body = {"model_path": str(folders[1]), "flush_cache": False}
    prompt = list(range(40))
    with LocalServer(served(folders[0])) as server:
        server.step_delay_s = 0.01
        future = server.pool.submit(server.generate, prompt, **params)
        wait_until(lambda: server.batcher.scheduler.running and server.batcher.scheduler.running[0].num_output > 3)
        server.post("/pause_generation", {"mode": "in_place"})
        assert server.post("/update_weights_from_disk", body)[0] == 200
        server.post("/continue_generation", {})
        future.result()
        server.step_delay_s = 0.0
        answer = server.generate(prompt, **params)
    assert cached(answer) == 0
    with LocalServer(served(folders[1])) as fresh:
        assert answer["output_ids"] == fresh.generate(prompt, **params)["output_ids"]
