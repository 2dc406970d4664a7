"""Critic, reward model and supervised fine-tuning against plain Hugging Face models on single sequences; and that no
result depends on budgets, order, or the layout of the ranks."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.batches import random_batch, share, started
from support.layouts import on_ranks
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForTokenClassification,
)

from arealite.algorithm.losses import Denominators, clipped_value_loss
from arealite.api.cli_args import LoRAConfig, OptimizerConfig, PPOActorConfig, PPOCriticConfig, TrainEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.types import Batch, Dims
from arealite.engine.checkpoint import attempt_on_ranks
from arealite.engine.fsdp_engine import FSDPEngine
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.engine.ppo.critic import FSDPPPOCritic
from arealite.engine.roles import OtherShares, TrainedTogether, Turns
from arealite.engine.rw import FSDPRWEngine, rw_loss
from arealite.engine.sft import FSDPLMEngine

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="session")
def value_model(tiny_llama, tmp_path_factory):
    """A folder with a value head that is not zero, and tokenizer files."""
    folder = tmp_path_factory.mktemp("value_model")
    model = LlamaForTokenClassification.from_pretrained(tiny_llama, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(3)) / 8)
        model.score.bias.fill_(0.25)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(Path(tiny_llama, name).read_bytes())
    return str(folder)


def settings(path, **changes):
    return {"path": path, "dtype": "float32", "optimizer": OptimizerConfig(lr=1e-3, eps=1e-3), **changes}


def learning_batch(**changes) -> Batch:
    """Values and returns of no meaning; values are so close to the model's that some are clipped and some are not."""
    batch = random_batch(**changes)
    rng = np.random.default_rng(5)
    values, returns = rng.normal(size=(2, len(batch.tokens))).astype(np.float32) * batch.loss_mask
    return replace(batch, values=values, returns=returns)


def preference_batch(num_pairs=5) -> Batch:
    """Pairs of unequal lengths with a common beginning; the last token of each is what follows it."""
    batch = random_batch(num_groups=num_pairs, size=2)
    mask = np.zeros(len(batch.tokens), bool)
    mask[batch.cu_seqlens[1:] - 1] = True
    batch.tokens[batch.cu_seqlens[4] - 2] += 1  # no pair of equal answers, whose order rounding would decide
    return replace(batch, loss_mask=mask, rewards=np.tile([1.0, 0.0], num_pairs))


def plain_values(model, batch):
    """float32 tensor [T] with gradients: the value at the token before each."""
    rows = []
    for i in range(batch.num_sequences):
        ids = torch.from_numpy(batch.tokens[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]])[None]
        values = model.score(model.model(ids).last_hidden_state)[0, :, 0]
        rows.append(torch.cat([values.new_zeros(1), values[:-1]]))
    return torch.cat(rows)


def norm_of(model):
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def test_values_and_the_critics_update_equal_transformers(value_model):
    batch = learning_batch()
    model = AutoModelForTokenClassification.from_pretrained(value_model, dtype=torch.float32).eval()
    expected = plain_values(model, batch)
    critic = started(FSDPPPOCritic(PPOCriticConfig(**settings(value_model, max_tokens_per_mb=40))))
    mask = batch.loss_mask
    found = critic.compute_values(batch)
    assert found.dtype == np.float32 and not found[~mask].any()
    np.testing.assert_allclose(found[mask], expected.detach()[mask].numpy(), atol=1e-5)
    old, returns = (torch.from_numpy(x[mask]) for x in (batch.values, batch.returns))
    loss, is_clipped = clipped_value_loss(expected[mask], old, returns, 0.5)
    loss.mean().backward()
    stats = critic.ppo_update(batch)
    assert stats["loss"] == pytest.approx(float(loss.detach().mean()), rel=1e-5)
    assert stats["grad_norm"] == pytest.approx(norm_of(model), rel=1e-4)
    assert 0 < stats["clip_ratio"] < 1 and stats["clip_ratio"] == pytest.approx(float(is_clipped.float().mean()))
    variance = 1 - np.var(batch.returns[mask] - batch.values[mask]) / np.var(batch.returns[mask])
    assert stats["explained_variance"] == pytest.approx(variance, rel=1e-5)


def test_a_new_value_head_is_zero_and_a_saved_one_comes_back(tiny_llama, tmp_path):
    batch = random_batch()
    critic = started(FSDPPPOCritic(PPOCriticConfig(**settings(tiny_llama, ppo_n_minibatches=2))))
    batch.values = critic.compute_values(batch)
    assert not batch.values.any()
    actor = started(FSDPPPOActor(PPOActorConfig(**settings(tiny_llama), gae_lambda=0.9)))
    actor.compute_advantages(batch)
    firsts = [critic.ppo_update(batch)["loss"] for _ in range(3)]
    assert firsts[2] < firsts[0]
    critic.save(str(tmp_path / "critic"))
    again = started(FSDPPPOCritic(PPOCriticConfig(**settings(str(tmp_path / "critic")))))
    np.testing.assert_array_equal(again.compute_values(batch), critic.compute_values(batch))
    assert again.compute_values(batch).any()


def test_what_a_value_model_cannot_be(tiny_llama):
    with pytest.raises(ConfigError, match="lora is given for a model with a value head"):
        FSDPRWEngine(TrainEngineConfig(**settings(tiny_llama, lora=LoRAConfig())))
    critic = started(FSDPPPOCritic(PPOCriticConfig(**settings(tiny_llama))))
    with pytest.raises(ConfigError, match="compute_values"):
        critic.ppo_update(random_batch())


def test_supervised_loss_equals_padded_transformers(tiny_llama):
    batch = random_batch()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    longest = int(batch.lengths.max())
    ids, labels, seen = (torch.full((batch.num_sequences, longest), fill) for fill in (0, -100, 0))
    for i in range(batch.num_sequences):
        span, n = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]), int(batch.lengths[i])
        ids[i, :n], seen[i, :n] = torch.from_numpy(batch.tokens[span]), 1
        labels[i, :n] = torch.from_numpy(np.where(batch.loss_mask[span], batch.tokens[span], -100))
    loss = model(ids, attention_mask=seen, labels=labels).loss
    loss.backward()
    expected = loss.detach()
    engine = started(FSDPLMEngine(TrainEngineConfig(**settings(tiny_llama, max_tokens_per_mb=40))))
    measured = engine.evaluate_lm(batch)
    stats = engine.train_lm(batch)
    for found in (stats, measured):
        assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert found["ppl"] == pytest.approx(float(expected.exp()), rel=1e-4)
        assert found["num_tokens"] == batch.loss_mask.sum()
    assert stats["grad_norm"] == pytest.approx(norm_of(model), rel=1e-4)
    assert engine.evaluate_lm(batch)["loss"] < measured["loss"] and engine.version == 1


def test_preferences_equal_transformers(value_model, tmp_path):
    batch = preference_batch()
    model = AutoModelForSequenceClassification.from_pretrained(value_model, num_labels=1, dtype=torch.float32).eval()
    engine = started(FSDPRWEngine(TrainEngineConfig(**settings(value_model, max_tokens_per_mb=1))))
    scores = []
    for i in range(batch.num_sequences):
        ids = torch.from_numpy(batch.tokens[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1] - 1])[None]
        scores.append(model(ids).logits[0, 0])
    chosen, rejected = torch.stack(scores).view(-1, 2).unbind(1)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    loss.backward()
    expected, chosen, rejected = (x.detach() for x in (loss, chosen, rejected))
    measured = engine.evaluate_rw(batch)
    stats = engine.train_rw(batch)
    for found in (stats, measured):
        assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert found["accuracy"] == pytest.approx(float(((chosen - rejected).sign() + 1).mean() / 2))
        assert found["margin"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(norm_of(model), rel=1e-4)
    pairs = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 3.0, 0.0])
    places = {"group_ids": torch.arange(4.0).repeat_interleave(2), "rewards": torch.tensor([1.0, 0.0]).repeat(4)}
    _, ties = rw_loss(None, pairs, over=Denominators(8, 8), **places)
    assert float(ties["accuracy"]) == 2.5 / 4  # a model that prefers nothing is right by chance
    engine.save(str(tmp_path / "reward"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
    now = engine.compute_values(batch)[batch.cu_seqlens[1] - 1]
    ids = torch.from_numpy(batch.tokens[: batch.cu_seqlens[1] - 1])[None]
    assert float(saved(ids).logits) == pytest.approx(float(now), abs=1e-5)


def outcomes(path, value_path, dims=None, place=(0, 1), order=None, **changes) -> dict[str, list[float]]:
    """One update of each kind of engine on this rank's share, and a few numbers of the weights after it."""
    found = {}
    for name, engine, batch in (
        ("critic", FSDPPPOCritic(PPOCriticConfig(**settings(value_path, **changes)), dims), learning_batch()),
        ("rw", FSDPRWEngine(TrainEngineConfig(**settings(value_path, **changes)), dims=dims), preference_batch()),
        ("sft", FSDPLMEngine(TrainEngineConfig(**settings(path, **changes)), dims=dims), random_batch()),
    ):
        started(engine)
        mine = share(batch if order is None else batch.select(order(batch)), *place)
        stats = {"critic": "ppo_update", "rw": "train_rw", "sft": "train_lm"}[name]
        stats = getattr(engine, stats)(mine)
        sums = [float(t.double().square().sum()) for _, t in engine.named_full_tensors()]
        kept = {k: v for k, v in stats.items() if k in ("loss", "grad_norm", "clip_ratio", "accuracy", "margin")}
        found[name] = [*kept.values(), *sums]
    return found


def test_the_critics_statistics_are_means_over_the_tokens_of_updates_that_were_applied(value_model):
    still = settings(value_model, optimizer=OptimizerConfig(lr=0.0))
    critic = started(FSDPPPOCritic(PPOCriticConfig(**still, ppo_n_minibatches=2)))
    batch = learning_batch(num_groups=3)  # two groups in the first mini-batch, one in the last
    values = critic.compute_values(batch)
    for num_applied in (2, 1):
        if num_applied == 1:
            batch.returns[batch.cu_seqlens[-2] :] = np.nan
        at = batch.loss_mask & np.repeat(batch.group_ids < num_applied + 1, batch.lengths)
        _, is_clipped = clipped_value_loss(
            *(torch.from_numpy(x[at]) for x in (values, batch.values, batch.returns)), 0.5
        )
        found = critic.ppo_update(batch)
        assert found["num_skipped_updates"] == 2 - num_applied and np.isfinite(found["loss"])
        assert found["value_mean"] == pytest.approx(values[at].mean(), rel=1e-5)
        assert found["clip_ratio"] == pytest.approx(float(is_clipped.float().mean()))


def test_a_batch_without_loss_tokens_has_no_gradient(tiny_llama, value_model):
    none = replace(random_batch(), loss_mask=np.zeros(len(random_batch().tokens), bool))
    language, reward = (
        started(kind(TrainEngineConfig(**settings(path))))
        for kind, path in ((FSDPLMEngine, tiny_llama), (FSDPRWEngine, value_model))
    )
    assert language.train_lm(none)["loss"] == 0 and language.evaluate_lm(none)["loss"] == 0
    assert reward.train_rw(none)["grad_norm"] == 0


def assert_same(one, other):
    for name, numbers in one.items():
        assert other[name] == pytest.approx(numbers, rel=2e-5, abs=1e-7), name


def test_no_result_depends_on_budget_or_order(tiny_llama, value_model):
    whole = outcomes(tiny_llama, value_model)
    assert_same(whole, outcomes(tiny_llama, value_model, max_tokens_per_mb=20))
    assert_same(whole, outcomes(tiny_llama, value_model, max_tokens_per_mb=1, share_prompts=False))

    def shuffled(batch):
        return np.random.default_rng(1).permutation(batch.num_sequences)

    assert_same(whole, outcomes(tiny_llama, value_model, order=shuffled, max_tokens_per_mb=30))


class Told:
    """An engine or the servers' client: notes what it is told."""

    def __init__(self, told: list[str]) -> None:
        self.mesh = SimpleNamespace(device=torch.device("cpu"))
        self.sleep, self.wake, self.pause, self.resume = (
            lambda word=word: told.append(word) for word in ("sleep", "wake", "pause", "resume")
        )


@pytest.mark.parametrize("colocated", [True, False])
def test_servers_and_trainer_take_turns_on_shared_devices(monkeypatch, colocated):
    if colocated:
        monkeypatch.setenv("AREALITE_COLOCATED", "1")
    else:
        monkeypatch.delenv("AREALITE_COLOCATED", raising=False)
    told: list[str] = []
    turns = Turns(Told(told), Told(told))
    with turns.of_servers():
        told.append("generate")
    with turns.of_trainer():
        told.append("train")
    everything = ["sleep", "generate", "wake", "pause", "train", "resume"]
    assert told == (everything if colocated else ["generate", "train"])


def on_two(rank: int, path: str, value_path: str, folder: str) -> dict:
    by_data = outcomes(path, value_path, Dims(d=2), (rank, 2))
    by_tensor = outcomes(path, value_path, Dims(t=2))
    by_stage = outcomes(path, value_path, Dims(p=2), max_tokens_per_mb=40)
    actor = started(FSDPPPOActor(PPOActorConfig(**settings(path)), Dims(d=2)))
    critic = started(FSDPPPOCritic(PPOCriticConfig(**settings(value_path)), Dims(t=2)))
    ref = started(FSDPEngine(TrainEngineConfig(**settings(path)), trainable=False, dims=Dims(t=2)))
    back = started(FSDPPPOCritic(PPOCriticConfig(**settings(value_path)), Dims(d=2)))
    mine = share(learning_batch(), rank, 2, lopsided=True)
    values = OtherShares(actor, critic).score(mine, critic.compute_values)
    logp = OtherShares(actor, ref).score(share(learning_batch(), rank, 2), ref.compute_logp)
    # from one share to two, so that ranks of the role have what none of the actor's shares has alone
    whole = learning_batch()
    spread = OtherShares(critic, back)
    halves = spread.batch(whole).num_sequences
    also = spread.score(whole, back.compute_values)
    stats = critic.ppo_update(OtherShares(actor, critic).batch(mine))
    both = TrainedTogether(actor, critic)
    both.stage_state(folder)()
    before = critic.compute_values(whole)
    critic.ppo_update(whole)
    both.load_state(folder)
    return {
        "by_data": by_data, "by_tensor": by_tensor, "by_stage": by_stage, "values": values, "logp": logp,
        "also": also, "halves": halves,
        "stats": stats, "restored": bool((critic.compute_values(whole) == before).all()),
    }  # fmt: skip


def on_a_full_disk(rank: int, path: str, folder: Path) -> tuple[bool, bool]:
    """Whether this rank hears of it, and whether anything of the critic was begun."""
    both = TrainedTogether(
        started(FSDPPPOActor(PPOActorConfig(**settings(path)))),
        started(FSDPPPOCritic(PPOCriticConfig(**settings(path)))),
    )
    if rank == 0:
        (folder / ".partial-step").touch()  # a file where the folder would be built
    told = attempt_on_ranks(both.collective, both.save, str(folder / "step"))
    return "exists" in told, (folder / "step").exists()


def test_an_actor_that_cannot_be_written_leaves_no_rank_waiting(tiny_llama, tmp_path):
    assert on_ranks(2, on_a_full_disk, tiny_llama, tmp_path) == [(True, False)] * 2


def test_layouts_of_ranks_and_roles(tiny_llama, value_model, tmp_path):
    first, second = on_ranks(2, on_two, tiny_llama, value_model, str(tmp_path / "state"))
    batch = learning_batch()
    whole = outcomes(tiny_llama, value_model)
    critic = started(FSDPPPOCritic(PPOCriticConfig(**settings(value_model))))
    expected = critic.compute_values(batch)
    for found in (first, second):
        for layout in ("by_data", "by_tensor", "by_stage"):
            assert_same(whole, found[layout])
        np.testing.assert_allclose(found["also"], expected, atol=1e-5)
        assert found["stats"]["loss"] == pytest.approx(whole["critic"][0], rel=1e-5)
        assert found["restored"]
    assert first["halves"] + second["halves"] == batch.num_sequences and first["halves"] and second["halves"]
    np.testing.assert_allclose(np.concatenate([first["values"], second["values"]]), expected, atol=1e-5)
    assert len(second["values"]) == 0  # that rank had no share of the actor's batch, and worked for the critic's
    plain = started(FSDPEngine(TrainEngineConfig(**settings(tiny_llama)), trainable=False))
    for rank, found in enumerate((first, second)):
        np.testing.assert_allclose(found["logp"], plain.compute_logp(share(batch, rank, 2)), atol=1e-5)
