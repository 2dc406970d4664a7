"""A recovery point of one layout of the ranks goes on in another as in its own; optimizers, offload, sleep."""

from typing import Any

import numpy as np
import pytest
import test_engine_layouts
from support.batches import actor_config, make, random_batch, share, train_one_step
from support.layouts import on_ranks
from test_engine_layouts import TOLERANCE, VOCABULARY, save_model

from arealite.api.cli_args import OptimizerConfig
from arealite.api.types import Dims

LAYOUTS = {"d1": Dims(), **test_engine_layouts.LAYOUTS}
KINDS = ("adamw", "adafactor")
# (layout that goes on, layout whose point it reads); None: it begins, writes the point, and goes on itself.
FIRST = {1: [("d1", None)], 4: [("d2t2", None)], 2: [("d2", None), ("t2", None), ("p2", None)]}
THEN = {
    2: [("d2", "d1"), ("t2", "d2"), ("p2", "d2"), ("d2", "p2")],
    1: [("d1", "d2"), ("d1", "t2"), ("d1", "d2t2")],
    4: [("d2t2", "t2")],
}
# The same with experts.
EXPERTS_FIRST = {1: [("d1", None)], 2: [("d2e2", None)], 4: [("d4e2", None)]}
EXPERTS_THEN = {1: [("d1", "d2e2"), ("d1", "d4e2")], 2: [("d2e2", "d1"), ("t2e2", "d2e2")]}


def engine(model: str, dims: Dims | None = None, **changes: Any):
    optimizer = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1, "lr_scheduler": "linear", "warmup_steps": 2}
    optimizer |= changes.pop("optimizer", {})
    actor = make(model, dims, optimizer=OptimizerConfig(**optimizer), **changes)
    actor.plan_steps(5)
    return actor


def step(actor, number: int) -> dict[str, float]:
    """Statistics of the step on batch `number`; every layout trains on the same whole batch."""
    whole = random_batch(vocabulary=VOCABULARY, seed=number)
    stats = train_one_step(actor, share(whole, actor.mesh.share, actor.mesh.dims.d))
    return {key: stats[key] for key in ("loss", "grad_norm", "lr")}


def weights(actor) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in actor.named_full_tensors()}


def lives(rank: int, model: str, folder: str, pairs: list[tuple[str, str | None]]) -> dict[Any, Any]:
    """What each life makes of the third step: its statistics and all weights after it."""
    found = {}
    for kind in KINDS:
        for layout, source in pairs:
            actor = engine(model, LAYOUTS[layout], optimizer={"kind": kind})
            if source is None:
                for number in range(2):
                    step(actor, number)
                actor.save_state(f"{folder}/{kind}-{layout}")
            else:
                actor.load_state(f"{folder}/{kind}-{source}")
                assert actor.num_updates == 2
            stats, after = step(actor, 2), weights(actor)
            found[kind, layout, source] = stats, after if rank == 0 else {}
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    return all_lives(model, str(tmp_path_factory.mktemp("points")), FIRST, THEN)


def all_lives(model: str, folder: str, *rounds: dict[int, Any]) -> dict[Any, Any]:
    """Outcomes of all lives, by kind, layout and source."""
    outcomes: dict[Any, Any] = {}
    for each in rounds:
        for world_size, pairs in each.items():
            outcomes |= on_ranks(world_size, lives, model, folder, pairs)[0]
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [p for r in (FIRST, THEN) for pairs in r.values() for p in pairs], ids=str)
def test_every_layout_goes_on_as_one_process_does(found, kind, pair):
    assert_same_life(found, kind, pair)


def test_experts_go_on_in_every_layout(tmp_path):
    found = all_lives(save_model("qwen3_moe", tmp_path), str(tmp_path), EXPERTS_FIRST, EXPERTS_THEN)
    for kind, *pair in found:
        assert_same_life(found, kind, pair)


def assert_same_life(found: dict[Any, Any], kind: str, pair: Any) -> None:
    stats, after = found[kind, *pair]
    expected_stats, expected = found[kind, "d1", None]
    assert stats == pytest.approx(expected_stats, rel=TOLERANCE)
    assert after.keys() == expected.keys()
    for name, weight in expected.items():
        limit = TOLERANCE * np.abs(weight).max()
        np.testing.assert_allclose(after[name], weight, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("offload", ["optimizer", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_offload_changes_nothing(model, kind, offload):
    plain, offloaded = (engine(model, optimizer={"kind": kind}, offload=o) for o in ("none", offload))
    for number in range(2):
        assert step(offloaded, number) == step(plain, number)
    after = weights(offloaded)
    for name, weight in weights(plain).items():
        assert np.array_equal(after[name], weight), name


def asleep(rank: int, model: str, folder: str) -> list[Any]:
    """Two steps of an engine that never sleeps, of one that does, and of one whose tensors are others after every
    move, as on an accelerator."""
    from arealite.engine import memory

    num_moved = 0

    def elsewhere(tensor, device):
        nonlocal num_moved
        num_moved += tensor.numel()
        return tensor.clone()

    found = []
    for sleeps, moves in ((False, False), (True, False), (True, True)):
        actor = engine(model, Dims(d=2))
        shards = [p.to_local().data_ptr() for p in actor.sharded.parameters.values()]
        if moves:
            memory.moved = elsewhere
        for number in range(2):
            if sleeps:
                actor.sleep()
                assert all(m._get_fsdp_state()._fsdp_param_group.is_sharded for m in actor.sharded.modules)
                actor.save_state(folder)  # a point may fall into the sleep
                actor.wake()
            stats = step(actor, number)
        assert moves != (shards == [p.to_local().data_ptr() for p in actor.sharded.parameters.values()])
        found.append((stats, weights(actor)))
    assert num_moved > 4 * 3 * sum(
        p.to_local().numel() for p in actor.sharded.parameters.values()
    )  # with two moments each
    return found


def test_training_goes_on_bit_for_bit_after_a_sleep(model, tmp_path):
    for straight, *others in on_ranks(2, asleep, model, str(tmp_path)):
        for slept in others:
            assert slept[0] == straight[0]
            for name, weight in straight[1].items():
                assert np.array_equal(slept[1][name], weight), name


def test_a_frozen_engine_has_weights_in_the_compute_dtype_and_the_same_logprobs(model):
    from arealite.engine.fsdp_engine import FSDPEngine

    batch = random_batch(vocabulary=VOCABULARY)
    trained, frozen = (FSDPEngine(actor_config(model, dtype="bfloat16"), trainable=t) for t in (True, False))
    logps = []
    for each in (trained, frozen):
        each.initialize()
        logps.append(each.compute_logp(batch))
    assert np.array_equal(*logps)
    num_bytes = [
        sum(p.numel() * p.element_size() for p in each.sharded.parameters.values()) for each in (trained, frozen)
    ]
    assert num_bytes[0] == 2 * num_bytes[1]


def test_adafactor_remembers_next_to_nothing(model):
    from arealite.engine.optim import moments

    sizes = {}
    for kind in KINDS:
        actor = engine(model, optimizer={"kind": kind})
        parameters = actor.sharded.parameters.values()
        states = [m for p in parameters for m in moments(actor.sharded.optimizer, p).values()]
        sizes[kind] = sum(m.nbytes for m in states) / sum(p.nbytes for p in parameters)
    assert sizes["adamw"] == 2
    assert sizes["adafactor"] < 0.05
