"""A sample makes the same gradient, whatever the number of rows that it is written in.

The loss is a function of tokens with their contexts, and of which sample they are of; each sampled token is in it once.
So a row may be cut after any answer, when what follows repeats it as context.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.batches import actor_config, make
from transformers import AutoModelForCausalLM

from arealite.api.cli_args import NormConfig, OptimizerConfig
from arealite.api.types import Batch, Completion, Group, Task, Trajectory
from arealite.engine.micro_batch import columns_of, count_loss, cut
from arealite.engine.ppo.actor import FSDPPPOActor
from arealite.gateway.asks import Ask
from arealite.gateway.forest import Turn, returns_of, rows_of
from arealite.prove.step import distances, take_step

CPU = torch.device("cpu")
BUDGET = 4096
COLUMNS = ("logprobs", "prox_logp", "ref_logp")


def sample(rng, member, prompt, kinds, **changes):
    """A sample of the rows `kinds`: of each its turns, "s" sampled and "c" known to the rows before, with words of the
    environment after each."""
    tokens, mask, lengths, known = [], [], [], {}
    for kind in kinds:
        row, is_sampled = list(prompt), [False] * len(prompt)
        for turn, how in enumerate(kind):
            answer = known.setdefault(turn, rng.integers(0, 256, 3).tolist()) if how == "c" or turn == 0 else None
            answer = rng.integers(0, 256, rng.integers(1, 5)).tolist() if answer is None else answer
            words = rng.integers(0, 256, rng.integers(1, 4)).tolist() if turn + 1 < len(kind) else []
            row += answer + words
            is_sampled += [how == "s"] * len(answer) + [False] * len(words)
        tokens, mask, lengths = tokens + row, mask + is_sampled, [*lengths, len(row)]
    versions = [0 if sampled else -1 for sampled in mask]
    made = Trajectory("t", member, tokens, mask, [0.0] * len(mask), versions, 0.0, "stop", row_lengths=lengths)
    return replace(made, **changes)


def with_turn_returns(made, rng):
    """A return for each answer."""
    steps = np.diff(np.concatenate([[0], made.loss_mask])) > 0
    values = rng.normal(size=steps.sum() + 1)[np.cumsum(steps)]
    return replace(made, returns=np.where(made.loss_mask, values, 0).tolist())


def groups_of(rng, has_returns=True):
    """Samples of one to three rows; one is cut off, one has no other in its group, two are alike."""
    found = []
    for number, size in enumerate((4, 2, 1)):
        prompt, members = rng.integers(0, 256, 4 + number).tolist(), []
        for member in range(size):
            kinds = (["sss"], ["ss", "cs", "css"], ["s"], ["ss", "css"])[member]
            made = sample(rng, member, prompt, kinds, reward=float(rng.normal()))
            members.append(with_turn_returns(made, rng) if has_returns and member % 2 else made)
        found.append(Group(Task("t"), number, members))
    first, second = found[1].trajectories
    found[1].trajectories[:] = [replace(first, finish_reason="length"), replace(second, reward=first.reward)]
    return found


def in_more_rows(made: Trajectory, most: int) -> Trajectory:
    """The sample with each row cut into up to `most`, after answers; each repeats what stands before it."""
    columns = {name: [] for name in ("tokens", "loss_mask", "logprobs", "versions", "returns")}
    lengths, begin = [], 0
    for length in made.row_lengths:
        mask = np.asarray(made.loss_mask[begin : begin + length])
        ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
        done = 0
        for end in [*ends[:-1][: most - 1], ends[-1]]:
            lengths.append(int(end))
            for name, column in columns.items():
                values = getattr(made, name)[begin : begin + end] if getattr(made, name) else []
                blank = {"tokens": None, "loss_mask": False, "versions": -1}.get(name, 0.0)
                column += values if blank is None else [blank] * min(done, len(values)) + values[done:]
            done = end
        begin += length
    return replace(made, row_lengths=lengths, **columns)


def forms(groups):
    """name -> batch, and how it is computed: rows as few as can be, and more of them; as trees, and each by itself; in
    micro-batches; in another order."""
    few, two, many = (
        Batch.pack([replace(g, trajectories=[in_more_rows(t, most) for t in g.trajectories]) for g in groups])
        for most in (1, 2, 9)
    )
    assert few.num_sequences < two.num_sequences < many.num_sequences
    # Samples by turns; the rows of each in their order, which is that of time.
    by_turns = np.lexsort((many.sample_ids, [(many.sample_ids[:i] == s).sum() for i, s in enumerate(many.sample_ids)]))
    return {
        "few": (few, BUDGET, True),
        "two": (two, BUDGET, False),
        "in parts": (many, 16, False),
        "tree": (many, BUDGET, True),
        "by turns": (many.select(by_turns), 25, True),
    }


def in_time(batch):
    """Where the tokens in the loss are: by samples, their rows, and places in these."""
    return np.asarray(
        [
            t
            for one in np.unique(batch.sample_ids)
            for i in np.flatnonzero(batch.sample_ids == one)
            for t in range(*batch.cu_seqlens[i : i + 2])
            if batch.loss_mask[t]
        ]
    )


def given(batch, **values):
    """The batch with these numbers at its loss tokens, in the order of time."""
    columns = {}
    for name, numbers in values.items():
        columns[name] = np.zeros(len(batch.tokens), np.float32)
        columns[name][in_time(batch)] = numbers
    return replace(batch, **columns)


def reference_scores(model, batch):
    """[T] logprobs and entropies with gradient, in float64. Padding stands to the right, where no token looks."""
    longest = max(batch.lengths)
    rows = [batch.tokens[a:b] for a, b in itertools.pairwise(batch.cu_seqlens)]
    ids = torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))
    logp = model(ids).logits.log_softmax(-1)[:, :-1]
    entropy = -(logp.exp() * logp).sum(-1)
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    first = logp.new_zeros(1)
    return (
        torch.cat([torch.cat([first, x[i, : len(row) - 1]]) for i, row in enumerate(rows)]) for x in (logp, entropy)
    )


@pytest.fixture(scope="module")
def written(folder):
    """The forms of one batch, with the same older logprobs at the same tokens; their scores; the model's parameters; an
    actor."""
    rng = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    found = forms(groups_of(rng))
    few = found["few"][0]
    near = next(reference_scores(model, few))[in_time(few)].detach().numpy()
    older = {name: near + rng.normal(size=len(near)) * 0.2 for name in COLUMNS}
    actor = make(folder)
    cases = {
        name: (mine := given(batch, **older), *how, *reference_scores(model, mine))
        for name, (batch, *how) in found.items()
    }
    yield cases, list(model.parameters()), actor
    actor.destroy()


def gradient(actor, batch, capacity, share, logp, entropy, parameters):
    """The actor's objective, and its gradient: by token, in the order of time, and by parameter."""
    mine = replace(batch)
    actor.compute_advantages(mine)
    whole = replace(mine, loss_mask=actor._in_loss(mine))
    over, total = count_loss(whole, actor.ranks), torch.zeros((), dtype=torch.float64)
    uncut = FSDPPPOActor(actor.config)._uncut
    for micro in cut(whole, capacity, CPU, share, uncut):
        columns = columns_of(whole, ("advantages", *COLUMNS), micro, CPU)
        total = total + actor._loss(micro, logp[micro.at], entropy[micro.at], over=over, **columns)[0]
    by_token = torch.autograd.grad(total, (logp, entropy), retain_graph=True, allow_unused=True)
    by_token = [x[in_time(batch)] for x in by_token if x is not None]
    by_parameter = torch.autograd.grad(total, parameters, retain_graph=True) if parameters else ()
    return total.item(), *by_token, *by_parameter


def check(written, folder, is_whole=True, **changes):
    """`is_whole`: of all forms and through the model; else of the two that differ most, up to the scores of tokens."""
    cases, parameters, actor = written
    if not is_whole:
        cases, parameters = {name: cases[name] for name in ("few", "by turns")}, []
    actor.config = actor_config(folder, max_new_tokens=9, temperature=1.0, **changes)
    (loss, *few), *others = (gradient(actor, *case, parameters) for case in cases.values())
    assert all(float(x.abs().max()) > 0 for x in few)
    for its_loss, *found in others:
        assert its_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
        for one, other in zip(few, found, strict=True):
            assert float((one - other).norm() / one.norm()) < 1e-6


KL = [{}] + [
    {"kl_weight": 0.3, "kl_in": where, "kl_estimator": kind, "gamma": 0.9}
    for where in ("loss", "reward")
    for kind in ("k1", "k2", "k3")
]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("correction", ["none", "mask", "truncate"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_every_loss_is_the_same_in_all_forms(written, folder, aggregation, level, correction, decoupled):
    choice = {"behav_imp_correction": correction, "behav_imp_weight_cap": 1.1, "entropy_weight": 0.01, "c_clip": 1.2}
    choice |= {"importance_sampling_level": level, "loss_aggregation": aggregation, "use_decoupled_loss": decoupled}
    for kl in KL:
        check(written, folder, not kl, **choice, **kl)


LEVELS = ("group", "batch", "none")
NORMS = [NormConfig(*levels) for levels in itertools.product(LEVELS, LEVELS, (False, True))]


@pytest.mark.parametrize("adv_norm", [None, NormConfig("batch", "batch"), NormConfig("group", "none")])
@pytest.mark.parametrize("mean", LEVELS)
def test_every_norm_is_the_same_in_all_forms(written, folder, mean, adv_norm):
    for norm in (norm for norm in NORMS if norm.mean == mean):
        check(written, folder, norm.leave_one_out, reward_norm=norm, adv_norm=adv_norm)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_truncated": True, "loss_aggregation": "seq-mean-token-mean"},
        {"overlong_tokens": 5, "overlong_penalty_factor": 0.7},
        {"reward_bias": -0.5, "reward_scaling": 2.0, "reward_clip": 1.0, "eps_clip_higher": 0.3},
    ],
)
def test_rewards_are_shaped_alike_in_all_forms(written, folder, changes):
    check(written, folder, **changes)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_a_critic_sees_one_episode_in_all_forms(written, folder, gamma, gae_lambda):
    """Time goes on from row to row."""
    cases, _, actor = written
    actor.config = actor_config(folder, gamma=gamma, gae_lambda=gae_lambda, kl_in="reward", kl_weight=0.2)
    found, rng = [], np.random.default_rng(2)
    values = rng.normal(size=cases["few"][0].loss_mask.sum())
    for batch, *_ in cases.values():
        mine = given(batch, values=values)
        actor.compute_advantages(mine)
        found.append(np.stack([mine.advantages, mine.returns])[:, in_time(mine)])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance_sampling_level": "sequence", "loss_aggregation": "seq-mean-token-mean"},
        {"kl_weight": 0.2, "loss_aggregation": "seq-mean-token-sum-norm", "mask_truncated": True},
    ],
)
def test_the_engine_computes_all_forms_alike(written, folder, changes):
    """The packed forward and backward pass in float32."""
    cases, _, _ = written
    actor = make(folder, max_new_tokens=9, optimizer=OptimizerConfig(lr=0.0), **changes)
    reference = None
    for batch, budget, share, *_ in cases.values():
        actor.config = replace(actor.config, max_tokens_per_mb=budget, share_prompts=share)
        step = take_step(actor, batch, reference)
        logp = step.logp[in_time(batch)]
        if reference is None:
            reference, known = step, logp
            continue
        np.testing.assert_allclose(logp, known, atol=1e-4)
        apart = distances(replace(step, logp=reference.logp), reference)
        assert max(relative for _, relative in apart.values()) < 1e-4, apart
    assert reference.grad_norm > 0


@pytest.mark.parametrize("with_values", [False, True])
def test_equal_returns_are_the_reward(written, folder, with_values):
    """Turns that all return the reward of their sample have the advantages of samples without returns."""
    rng = np.random.default_rng(1)
    groups = groups_of(rng, has_returns=False)
    plain = Batch.pack(groups)
    assert plain.turn_returns is None
    for group in groups:
        group.trajectories[:1] = [replace(t, returns=[t.reward] * len(t.tokens)) for t in group.trajectories[:1]]
    returned = Batch.pack(groups)
    assert np.array_equal(returned.turn_returns, returned.rewards[returned.owners])
    actor = written[2]
    actor.config = actor_config(folder, gamma=0.9, gae_lambda=0.7, reward_bias=0.3, reward_clip=1.0)
    for batch in (plain, returned):
        batch.values = np.sin(np.arange(len(batch.tokens))).astype(np.float32) if with_values else None
        actor.compute_advantages(batch)
    assert np.array_equal(plain.advantages, returned.advantages) and plain.advantages.any()
    assert not with_values or np.array_equal(plain.returns, returned.returns)


def test_rows_of_a_session_come_in_the_order_of_time():
    """The turn that two others go on from is in the loss of the second one's row, which therefore comes first."""
    ask = Ask()
    turns = {
        id: Turn(id, parent, added, ask, "first", Completion([sampled], [-0.5], [0], "stop"))
        for id, parent, added, sampled in ((0, None, [1, 2], 3), (1, 0, [9], 4), (2, 0, [5], 6))
    }
    rows = rows_of(turns)
    assert [row.tokens for row in rows] == [[1, 2, 3, 5, 6], [1, 2, 3, 9, 4]]
    assert [row.turn_of for row in rows] == [[-1, -1, 0, -1, 2], [-1, -1, -1, -1, 1]]
    assert returns_of(rows, {1: 0.5}, 1.0, 0.9) == [0, 0, 0.9, 0, 1.0, 0, 0, 0, 0, 1.5]


def test_samples_are_packed_row_by_row():
    made = Trajectory(
        "t", 0, [1, 2, 3, 1, 9, 4, 5], [n in (1, 2, 6) for n in range(7)], [0.0] * 7, [0] * 7, 2.0, "length",
        row_lengths=[3, 2, 2], returns=[0, 1.0, 1.0, 0, 0, 0, 2.0],
    )  # fmt: skip
    other = Trajectory("u", 0, [7, 8], [False, True], [0.0, -1.0], [-1, 0], 0.5, "stop")
    failed = replace(other, status="failed", reward=None)
    batch = Batch.pack([Group(Task("t"), 0, [made, failed]), Group(Task("u"), 1, [other])])
    # The second row has nothing that was sampled.
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 7, 8] and batch.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert batch.sample_ids.tolist() == [0, 0, 1] and batch.group_ids.tolist() == [0, 0, 1]
    assert batch.rewards.tolist() == [2.0, 2.0, 0.5] and batch.truncated.tolist() == [True, True, False]
    assert batch.task_ids == ["t", "t", "u"]
    assert batch.turn_returns.tolist() == [0, 1, 1, 0, 2, 0.5, 0.5]
    again = Batch.join([batch.select([2]), batch.select([0, 1])])
    assert again.sample_ids.tolist() == [1, 0, 0] and again.turn_returns.tolist() == [0.5, 0.5, 0, 1, 1, 0, 2]
    first, sample_of = again.samples
    assert first.tolist() == [1, 0] and sample_of.tolist() == [1, 0, 0]
    empty = Batch.pack([])
    assert empty.num_sequences == 0 and empty.samples[0].tolist() == []
