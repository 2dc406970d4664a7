"""A model on several pipeline stages makes the steps that it makes on one rank, and its ranks agree on everything."""

import time

import numpy as np
import pytest
import torch
from support.batches import make, random_batch, share, started, train_one_step
from support.layouts import on_ranks
from test_engine_layouts import VOCABULARY, save_model

from arealite.api.errors import ConfigError, NumericalError, WaitTimeout
from arealite.api.types import Dims
from arealite.engine.parallel import pipeline
from arealite.engine.parallel.pipeline import stage_starts

# kind, tokens per micro-batch (1 makes one of every sequence), changes of the model
MODELS = {
    "llama tied": ("llama", 24, {}),
    "llama": ("llama", 40, {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", 1, {}),
    "gemma3": ("gemma3_text", 4096, {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: save_model(kind, tmp_path_factory.mktemp("model"), num_hidden_layers=5, **changes)
        for name, (kind, _, changes) in MODELS.items()
    }


def share_of(actor, **options):
    return share(random_batch(vocabulary=VOCABULARY, **options), actor.mesh.share, actor.collective.num_shares)


def numbers(stats):
    return {key: stats[key] for key in ("loss", "grad_norm", "entropy", "num_tokens", "importance_weight_max")}


def weights(actor):
    return {name: tensor.numpy() for name, tensor in actor.named_full_tensors(torch.float32)}


def close(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(got[name], tensor, rtol=0, atol=1e-5 * np.abs(tensor).max(), err_msg=name)


def steps(rank, folders, dims, micro_batches_per_stage):
    """Of each model: logprobs, statistics of two steps, weights after them."""
    pipeline.MICRO_BATCHES_PER_STAGE = micro_batches_per_stage
    found = {}
    for name, folder in folders.items():
        actor = make(folder, dims, max_tokens_per_mb=MODELS[name][1])
        mine = share_of(actor)
        logp = actor.compute_logp(mine)
        found[name] = logp, [numbers(train_one_step(actor, mine)) for _ in range(2)], weights(actor)
    return found


@pytest.fixture(scope="module")
def alone(folders):
    return on_ranks(1, steps, folders, Dims(), 8)[0]


@pytest.mark.parametrize("dims, micro_batches_per_stage", [(Dims(p=4), 8), (Dims(p=2), 1)], ids=str)
def test_stages_make_the_steps_of_one_rank(folders, alone, dims, micro_batches_per_stage):
    for rank in on_ranks(dims.p, steps, folders, dims, micro_batches_per_stage):
        for name, (logp, stats, after) in alone.items():
            got = rank[name]
            np.testing.assert_allclose(got[0], logp, rtol=1e-5, atol=1e-6)
            for mine, theirs in zip(got[1], stats, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7), name
            close(got[2], after)


def values(rank, folder, dims):
    """A critic's values before and after two updates that change its head and its layers."""
    from arealite.api.cli_args import OptimizerConfig, PPOCriticConfig
    from arealite.engine.ppo.critic import FSDPPPOCritic

    optimizer = OptimizerConfig(lr=1e-2, eps=1e-3)
    settings = PPOCriticConfig(path=folder, dtype="float32", optimizer=optimizer, max_tokens_per_mb=24)
    critic = started(FSDPPPOCritic(settings, dims))
    mine = share_of(critic)
    mine.returns = np.linspace(-1, 1, len(mine.tokens), dtype=np.float32) * mine.loss_mask
    found = []
    for _ in range(2):
        mine.values = critic.compute_values(mine)
        stats = critic.ppo_update(mine)
        found.append((mine.values, [stats[key] for key in ("loss", "grad_norm", "explained_variance")]))
    return found, weights(critic)


def test_a_critic_on_stages_learns_as_on_one_rank(folders):
    expected, after = on_ranks(1, values, folders["llama tied"], Dims())[0]
    for found, own in on_ranks(2, values, folders["llama tied"], Dims(p=2)):
        for (got, stats), (wanted, theirs) in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
            assert stats == pytest.approx(theirs, rel=1e-5)
        close(own, after)
    assert np.abs(expected[1][0]).max() > 0.01


def states(rank, folder, dims, path):
    """A step from the state under `path`, if it is there already; else a step to it and one from it."""
    actor = make(folder, dims, max_tokens_per_mb=24)
    mine = share_of(actor)
    if not path.exists():
        train_one_step(actor, mine)
        actor.save_state(str(path))
    else:
        actor.load_state(str(path))
    return numbers(train_one_step(actor, mine)), weights(actor)


def test_states_are_read_by_other_layouts(folders, tmp_path):
    layouts = [Dims(p=2), Dims()]
    for first, second in (layouts, layouts[::-1]):
        path = tmp_path / str(first)
        expected = on_ranks(first.p, states, folders["llama tied"], first, path)[0]
        for got in on_ranks(second.p, states, folders["llama tied"], second, path):
            assert got[0] == pytest.approx(expected[0], rel=1e-5)
            close(got[1], expected[1])


def outcomes(rank, folder, path):
    """What two stages make of logprobs that are no numbers, of weights on their way to servers, and of a folder."""
    from test_engine_weights import Servers
    from transformers import AutoModelForCausalLM

    from arealite.weights.link import WeightLink

    actor = make(folder, Dims(p=2), max_bad_steps=2, max_tokens_per_mb=24)
    servers = Servers()
    servers.set_version = lambda version: None
    actor.connect_engine(servers, WeightLink("disk", path / "updates"))
    mine = share_of(actor)
    train_one_step(actor, mine)
    version = actor.upload_weights()
    live, own = servers.live["server-1"], weights(actor)
    arrived = rank != 0 or all(torch.equal(live[n].float(), torch.from_numpy(t)) for n, t in own.items())
    actor.save(str(path / "folder"))
    actor.collective.barrier("saved")
    loaded = AutoModelForCausalLM.from_pretrained(path / "folder").state_dict()
    saved = all(torch.equal(loaded[name], torch.from_numpy(tensor)) for name, tensor in own.items())
    mine.logprobs = np.full_like(mine.logprobs, np.nan)
    skipped = train_one_step(actor, mine)["skipped"]
    with pytest.raises(NumericalError) as raised:
        train_one_step(actor, mine)
    unchanged = all(np.array_equal(tensor, own[name]) for name, tensor in weights(actor).items())
    return version, arrived, saved, skipped, unchanged, str(raised.value)


def test_stages_agree_on_what_leaves_them(tiny_llama, tmp_path):
    for version, arrived, saved, skipped, unchanged, error in on_ranks(2, outcomes, tiny_llama, tmp_path):
        assert version == 1 and arrived and saved and skipped == 1 and unchanged
        assert "rank 1: loss of micro-batch 0" in error and "rank 0: loss" not in error


def stall(rank, folder, kind):
    """Seconds until a stage that waits for a frozen one, or for one that has failed, says so."""
    actor = make(folder, Dims(p=2), collective_timeout_s=3.0)
    mine = share_of(actor)

    def loss_fn(micro, logp, entropy, over):
        if kind == "fails":
            raise ConfigError("no such loss")
        time.sleep(5)
        return logp.sum(), {}

    started = time.monotonic()
    try:
        actor.update(mine, loss_fn)
    except (WaitTimeout, ConfigError) as error:
        took_s = time.monotonic() - started
        time.sleep(5 if kind == "fails" and rank == 1 else 0)  # a rank that ends would be noticed at once
        return took_s, type(error), str(error)
    except RuntimeError:  # the other one is gone when this one wakes
        return 0.0, None, ""


@pytest.mark.parametrize("kind", ["freezes", "fails"])
def test_a_stage_does_not_wait_for_ever(folders, kind):
    (took_s, error, text), last = on_ranks(2, stall, folders["llama"], kind)
    assert error is WaitTimeout and took_s < 60
    assert "gradients of the other ranks in update" in text and "rank 1" in text
    if kind == "fails":
        assert last[1] is ConfigError and last[2] == "no such loss"


def test_stages_have_about_equal_work():
    assert stage_starts([1.0] * 4, 0.0, 2) == [0, 2, 4]
    assert stage_starts([1.0] * 30, 8.0, 2) == [0, 19, 30]
    assert stage_starts([1.0] * 4, 90.0, 4) == [0, 1, 2, 3, 4]
    assert stage_starts([5.0, 1.0, 1.0, 1.0], 1.0, 2) == [0, 1, 4]


def refusal(rank, folder):
    with pytest.raises(ConfigError) as raised:
        make(folder, Dims(p=4))
    return str(raised.value)


def test_more_stages_than_layers_are_refused(tiny_llama):
    assert "2 layers" in on_ranks(4, refusal, tiny_llama)[0]
