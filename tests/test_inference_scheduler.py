"""Whatever comes, goes, pauses or runs out of pages: every request is answered once, with what it gives alone."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from support.inference import plain_logprobs, save_tiny_llama, served
from transformers import AutoModelForCausalLM

from arealite.inference.core.batcher import Batcher
from arealite.inference.core.cache import PAGE_TOKENS, PagePool
from arealite.inference.core.engine import Engine, PauseMode, QueueFull
from arealite.inference.core.requests import GenerateRequest, SamplingParams, UpdateOptions
from arealite.inference.core.scheduler import JOINING_LIMIT_S, Scheduler
from arealite.inference.core.sequence import Sequence
from arealite.inference.core.weight_updates import make_live

MAX_NEW = 12
MAX_STEPS = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), tied=False)


@pytest.fixture(scope="module")
def model(folder):
    return served(folder)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


class Alone:
    """Greedy continuations by the plain Hugging Face pass, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._known: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def greedy(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """MAX_NEW tokens, and by how much each was the best."""
        if tuple(prompt) not in self._known:
            tokens, gaps = list(prompt), []
            for _ in range(MAX_NEW):
                best = self._model(input_ids=torch.tensor([tokens])).logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
            self._known[tuple(prompt)] = tokens[len(prompt) :], gaps
        return self._known[tuple(prompt)]

    def check(self, sequence: Sequence) -> None:
        wanted, gaps = self.greedy(sequence.request.prompt_ids)
        for found, token, gap in zip(sequence.output_ids, wanted, gaps, strict=False):
            if found != token:
                assert gap < 1e-3, "only a tie may be broken in another way"
                return

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        return plain_logprobs(self._model, prompt).tolist()


@pytest.fixture(scope="module")
def alone(folder):
    return Alone(folder)


def greedy_request(rid: str, prompt: list[int], num: int, **more: object) -> Sequence:
    params = SamplingParams(num, temperature=0.0, ignore_eos=True)
    return Sequence(GenerateRequest(rid, prompt, params, **more))  # type: ignore[arg-type]


def check_pages(batcher: Batcher) -> None:
    """Every page is free, held by exactly those who list it, or kept by as many entries as name it."""
    pool, prefix = batcher.scheduler.pool, batcher.scheduler.prefix
    held = Counter(page for s in batcher.scheduler.running for page in s.pages)
    kept = Counter(node.page for node in prefix._nodes)
    pages = range(1, pool.num_pages + 1)
    assert [pool._holders[page] for page in pages] == [held[page] for page in pages]
    assert [pool._keepers[page] for page in pages] == [kept[page] for page in pages]
    assert sorted(pool._free) == [page for page in pages if not held[page] and not kept[page]]
    assert pool.num_idle == sum(not held[page] for page in kept)
    for node in prefix._nodes:
        assert node.parent is not None and node.parent.children[node.key] is node
        assert not held[node.page] or node.parent not in prefix._nodes or held[node.parent.page]


def random_request(rng: random.Random, i: int, kv_tokens: int) -> Sequence:
    """Prompts that share beginnings of all lengths."""
    stem = [rng.choice((7, 70)) for _ in range(4)] * 30 if rng.random() < 0.3 else [5, 6, 7, 8, 9] * 24
    num = rng.randint(1, MAX_NEW)
    prompt = stem[: rng.randint(1, kv_tokens - num - 3)] + [rng.randrange(250) for _ in range(rng.randint(0, 3))]
    scored = rng.random() < 0.2
    return greedy_request(
        f"{'ab'[i % 2]}{i}",
        prompt,
        num,
        return_logprob=True,
        logprob_start=rng.randrange(len(prompt)) if scored else None,
    )


def disturb(rng: random.Random, engine: Engine, paused: PauseMode | None) -> PauseMode | None:
    """One thing that may happen between two steps; returns the pause that is in force."""
    event = rng.randrange(6)
    if event == 0:
        victim = rng.choice(("a1", "b", "a2", "b3"))
        engine.abort(lambda s: s.request.rid.startswith(victim))
    elif event == 1:
        engine.pause(rng.choice(("abort", "retract", "in_place")))
        return engine.paused
    elif event == 2 and paused != "in_place":
        options = UpdateOptions(weight_version=str(rng.random()), abort_all_requests=rng.random() < 0.2)
        make_live(engine, {}, options)
    elif event == 3:
        engine.flush_cache()
    elif event == 4:
        engine.resume()
        return None
    return paused


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_is_answered_once_and_as_if_alone(model, alone, seed):
    rng = random.Random(seed)
    kv_tokens = rng.choice((48, 112, 160, 600))
    batcher = Batcher(model, rng.randint(1, 7), kv_tokens, "0", rng.choice((16, 33, 64, 512)))
    engine = Engine(batcher, seed=0)
    arrivals = [random_request(rng, i, min(kv_tokens, 123)) for i in range(30)]
    calm = seed % 4 == 0
    sequences = list(arrivals)
    for _ in range(MAX_STEPS):
        for _ in range(rng.choice((0, 0, 1, 6))):
            if arrivals and engine.paused is None:
                batcher.add(arrivals.pop())
        if not calm and rng.random() < 0.15:
            disturb(rng, engine, engine.paused)
        if engine.paused is None and batcher.has_work:
            batcher.step()
        elif not arrivals and not batcher.has_work:
            break
        elif engine.paused and rng.random() < 0.3:
            engine.resume()
        check_pages(batcher)
    for sequence in sequences:
        reason = sequence.future.result(0).finish_reason
        assert reason is not None and reason["type"] in (("length",) if calm else ("length", "abort"))
        if reason["type"] == "length":
            assert sequence.num_output == sequence.request.params.max_new_tokens
        assert len(sequence.logprobs) == len(sequence.versions) == sequence.num_output
        alone.check(sequence)
        start = sequence.request.logprob_start
        if start is not None and sequence.num_output:
            wanted = alone.prompt_logprobs(sequence.request.prompt_ids)[start:]
            assert sequence.input_logprobs[0] is None
            assert sequence.input_logprobs[1:] == pytest.approx(wanted, abs=1e-3)
    assert engine.flush_cache()
    assert batcher.scheduler.pool.num_free == batcher.scheduler.pool.num_pages
    assert batcher.scheduler.num_used_tokens == 0


def scheduler_of(num_pages, *names, length=10, max_running=8, step_tokens=512, joining_share=None) -> Scheduler:
    """Without a model; requests wait in it whose prompts begin with their names' letters."""
    pool = PagePool(1, 1, 1, num_pages * PAGE_TOKENS, torch.float32, torch.device("cpu"))
    scheduler = Scheduler(pool, max_running, step_tokens, False, joining_share)
    scheduler.waiting += [greedy_request(name, [ord(name[0])] * length, 50) for name in names]
    return scheduler


def advance(scheduler: Scheduler) -> int:
    """One step, in which every token is computed that is planned; returns how many these are."""
    scheduler.admit()
    spans = [span for one_pass in scheduler.plan() for span in one_pass]
    for span in spans:
        span.sequence.num_computed = span.end
        scheduler.share(span.sequence)
        if not span.sequence.num_missing:
            span.sequence.tokens.append(span.end)
    return sum(span.count for span in spans)


def names(sequences: Iterable[Sequence]) -> str:
    return " ".join(s.request.rid for s in sequences)


def converse(scheduler: Scheduler, num_sessions: int, num_turns: int) -> tuple[int, list[str]]:
    """Sessions of turns of a page, half prompt and half answer, each asked for as soon as the one before has ended.
    Returns how many tokens were computed, and the turns in the order of their ends."""
    rng = random.Random(0)
    half = PAGE_TOKENS // 2

    def ask(name: str, tokens: list[int], turn: int) -> None:
        prompt = [*tokens, *(rng.randrange(100) for _ in range(half))]
        params = SamplingParams(half, temperature=0.0, ignore_eos=True)
        scheduler.queue(Sequence(GenerateRequest(f"{name}.{turn}", prompt, params)))

    for i in range(num_sessions):
        ask(str(i), [], 0)
    num_computed, ended = 0, []
    while scheduler.running or scheduler.waiting:
        num_computed += advance(scheduler)
        for sequence in [s for s in scheduler.running if s.num_output == half]:
            scheduler.remove(sequence)
            name, turn = sequence.request.rid.split(".")
            ended.append(sequence.request.rid)
            if int(turn) + 1 < num_turns:
                ask(name, sequence.tokens, int(turn) + 1)
    return num_computed, ended


def test_a_burst_of_conversations_uses_what_is_cached_and_leaves_nobody_waiting():
    """A hundred sessions of 8 pages, and a cache of 80 pages."""
    num_computed, ended = converse(scheduler_of(80, max_running=4), 100, 8)
    assert Counter(name.split(".")[0] for name in ended) == {str(i): 8 for i in range(100)}
    assert num_computed < 1.2 * 100 * 8 * PAGE_TOKENS  # each token once, but for what is evicted
    first = [int(name.split(".")[0]) for name in ended if name.endswith(".0")]
    assert first == sorted(first)
    ends = [i for i, name in enumerate(ended) if name.endswith(".0")]
    assert max(b - a for a, b in itertools.pairwise(ends)) <= 12, "a new session waits for few turns of others"


def test_a_long_conversation_leaves_others_their_pages():
    scheduler = scheduler_of(80, max_running=4)
    num_computed, _ = converse(scheduler, 2, 38)  # 76 pages
    assert num_computed < 1.05 * 2 * 38 * PAGE_TOKENS


def test_the_queue_keeps_its_order_and_counts_what_is_held():
    scheduler = scheduler_of(64, "a", "b", "c", "d", "e", max_running=3)
    for _ in range(2):
        advance(scheduler)
        assert (names(scheduler.running), names(scheduler.waiting)) == ("a b c", "d e")
        assert scheduler.num_used_tokens == 3 * PAGE_TOKENS
        held = list(scheduler.running)
        scheduler.retract_all()
        assert names(scheduler.waiting) == "a b c d e"
        assert scheduler.num_used_tokens == 0, "what is only cached is not used"
    assert [s.num_cached for s in held] == [0] * 3, "what a sequence computed itself was not found"


def test_the_last_admitted_gives_way_when_pages_run_out():
    scheduler = scheduler_of(5, "a", "b", length=30)
    while not scheduler.num_retractions:
        advance(scheduler)
    assert (names(scheduler.running), names(scheduler.waiting)) == ("a", "b")
    assert len(scheduler.running[0].tokens) > 2 * PAGE_TOKENS
    small = scheduler_of(4, "a", "b", length=30)
    advance(small)
    assert names(small.running) == "a", "one that runs has a page to grow into"


def test_prompts_in_progress_are_waited_for_while_others_go_first():
    scheduler = scheduler_of(64, "a", length=100, step_tokens=40)
    advance(scheduler)
    scheduler.waiting += [greedy_request(name, [ord("a")] * 100 + [1], 50) for name in ("a1", "a2")]
    scheduler.waiting += [greedy_request(name, [ord(name)] * 10, 50) for name in "bcd"]
    assert advance(scheduler) == 40 and names(scheduler.running) == "a"
    assert advance(scheduler) == 40, "the last 20 tokens of a, then as far as there is room"
    assert (names(scheduler.running), names(scheduler.waiting)) == ("a b c", "a1 a2 d")
    while scheduler.waiting:
        assert advance(scheduler) <= 40
    assert [s.num_cached for s in scheduler.running if s.request.rid in ("a1", "a2")] == [100, 100]
    scheduler.waiting.append(greedy_request("z", [9] * 100, 50))
    assert advance(scheduler) == 40, "running requests take theirs first"


def test_a_long_prompt_holds_nobody_up(model, alone):
    batcher = Batcher(model, 4, 1024, "0", step_tokens=32)
    running = greedy_request("running", [1, 2, 3], 50)
    batcher.add(running)
    batcher.step()
    long = greedy_request("long", [7, 8, 9, 10] * 75, 5)
    after = greedy_request("after", [4] * 40, 5)
    batcher.add(long)
    batcher.add(after)
    for _ in range(20):
        before, computed = running.num_output, batcher.counters.num_prefill_tokens
        batcher.step()
        assert running.num_output == before + 1
        assert batcher.counters.num_prefill_tokens - computed <= 31
        assert not after.num_computed or long.num_output, "first come, first served"
    while not after.future.done():
        batcher.step()
    for sequence in (running, long, after):
        alone.check(sequence)


def test_a_request_that_fills_the_pool_is_served_although_its_last_page_is_cached(model):
    """A copy of the page would need one page more than there are."""
    batcher = Batcher(model, 2, 64, "0")
    for _ in range(2):
        sequence = greedy_request("r", [9] * 60, 4)
        batcher.add(sequence)
        for _ in range(10):
            batcher.step()
        assert sequence.future.result(0).num_output == 4


def test_pausing_in_the_middle_of_a_prompt_keeps_or_drops_its_pages(model, alone):
    for mode, left in (("in_place", 32), ("retract", 0)):
        batcher = Batcher(model, 2, 512, "0", step_tokens=16)
        engine = Engine(batcher, seed=0)
        sequence = greedy_request("r", [3, 1, 4, 1, 5] * 20, 6, return_logprob=True, logprob_start=10)
        batcher.add(sequence)
        batcher.step()
        batcher.step()
        engine.pause(mode)  # type: ignore[arg-type]
        assert sequence.num_computed == left
        engine.resume()
        while not sequence.future.done():
            batcher.step()
        alone.check(sequence)
        wanted = alone.prompt_logprobs(sequence.request.prompt_ids)[10:]
        assert sequence.input_logprobs[1:] == pytest.approx(wanted, abs=1e-3)


def test_abort_in_the_middle_of_a_prompt_answers_with_nothing_yet(model):
    batcher = Batcher(model, 2, 512, "0", step_tokens=16)
    sequence = greedy_request("r", [3] * 100, 6)
    batcher.add(sequence)
    batcher.step()
    Engine(batcher, seed=0).abort(lambda _: True)
    assert sequence.future.result(0).output_ids == [] and sequence.finish_reason == {
        "type": "abort", "message": "Aborted", "status_code": None, "err_type": None
    }  # fmt: skip
    check_pages(batcher)


def test_a_full_queue_takes_all_of_a_call_or_nothing(model):
    engine = Engine(Batcher(model, 1, 64, "0"), seed=0, max_queued=3)
    requests = [GenerateRequest(str(i), [1], SamplingParams(2)) for i in range(4)]
    with pytest.raises(QueueFull, match="4 more"):
        engine.submit_all(requests)
    engine.submit_all(requests[:2])
    with pytest.raises(QueueFull, match="2 requests wait"):
        engine.submit_all(requests[:2])
    engine.submit_all([requests[3]])
    engine.start()
    engine.stop(60)
    assert engine.failure == ""


def test_on_a_gpu_several_join_at_a_time():
    """While too few places are free, nobody is asked for, unless nobody has joined for some time."""
    scheduler = scheduler_of(64, *"abcdefgh", max_running=4, joining_share=2)
    assert names(scheduler.admit()) == "a b c d"
    scheduler.remove(scheduler.running[0])
    assert not scheduler.may_admit and not scheduler.admit()
    scheduler.remove(scheduler.running[0])
    assert names(scheduler.admit()) == "e f"
    scheduler.remove(scheduler.running[0])
    assert not scheduler.may_admit
    scheduler._admitted_at -= JOINING_LIMIT_S
    assert names(scheduler.admit()) == "g"


def test_who_lacks_pages_is_asked_again_when_some_come_back():
    scheduler = scheduler_of(2, "a", "b", length=20)
    (first,) = scheduler.admit()
    assert not scheduler.may_admit and names(scheduler.waiting) == "b"
    scheduler.remove(first)
    assert scheduler.may_admit and names(scheduler.admit()) == "b"
