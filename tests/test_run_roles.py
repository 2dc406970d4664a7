"""A run whose critic and reference have ranks of their own: its records, recovery and errors, and its timeline held
against the table of what waits for what."""

import json
import os
import signal

from support.runs import TINY, Run
from transformers import AutoConfig, AutoModelForCausalLM

from arealite.api.cli_args import GRPOConfig, PPOCriticConfig, TrainEngineConfig
from arealite.launcher.dataflow import ancestors, parts_of

ROLES = "allocation_mode=native:d1+fsdp:d1+fsdp[critic]:d1+fsdp[ref]:d1"
KL = ["actor.kl_weight=0.01", "actor.kl_in=reward", "actor.entropy_weight=0.1"]  # so that there is something to learn


class RolesRun(Run):
    tiny = (
        *TINY, *KL, ROLES, "actor.path={model}", "critic.path={model}", "critic.dtype=float32", "ref.path={model}",
        "ref.dtype=float32", "critic.optimizer.lr=1e-3", "stats_logger.timeline=1", "rollout.max_head_offpolicyness=0",
    )  # fmt: skip


SPANS = {  # (rank, span of the timeline) -> part of a step
    (0, "micro-batch of compute_logp"): "actor_inf",
    (0, "micro-batch of update"): "actor_train",
    (1, "micro-batch of compute_values"): "critic_inf",
    (1, "micro-batch of update"): "critic_train",
    (2, "micro-batch of compute_logp"): "ref_inf",
    (0, "sync"): "upload",
}


def parts_by_step(run: Run) -> list[dict[str, tuple[float, float]]]:
    """When each part of each step began and ended, in microseconds."""
    steps: dict[int, dict[str, tuple[float, float]]] = {}
    for rank in range(3):
        text = (run.folder / "timeline" / f"rank-{rank}.json").read_text()
        step, open_spans = -1, {}
        for event in json.loads(text.rstrip().rstrip(",") + "]"):
            name = event["name"]
            if event["ph"] == "i":
                step = int(name.split()[1])
            elif event["ph"] == "B":
                open_spans[name] = event["ts"]
            elif event["ph"] == "E" and (part := SPANS.get((rank, name))):
                begin, end = steps.setdefault(step, {}).get(part, (open_spans[name], 0.0))
                steps[step][part] = (min(begin, open_spans[name]), max(end, event["ts"]))
    return [steps[step] for step in sorted(steps)]


def test_a_step_keeps_to_the_dataflow_and_overlaps_what_it_may(tmp_path, tiny_llama):
    with RolesRun(tmp_path, tiny_llama, "stats_logger.probe_every_steps=0") as run:
        run.succeed()
    config = GRPOConfig(critic=PPOCriticConfig(), ref=TrainEngineConfig())
    config.actor.kl_in, config.actor.kl_weight = "reward", 0.01
    parts, steps = parts_of(config), parts_by_step(run)
    assert len(steps) == 4 and all(step.keys() == set(SPANS.values()) for step in steps)
    for step in steps:
        for name, (begin, _) in step.items():
            for before in ancestors(name, parts) & step.keys():
                assert step[before][1] <= begin, f"{name} began before the end of {before}"
    together = [("actor_train", "critic_train"), ("ref_inf", "critic_inf"), ("actor_inf", "ref_inf")]
    for one, other in together:  # a part is milliseconds here: in some step they meet
        assert any(s[one][0] < s[other][1] and s[other][0] < s[one][1] for s in steps), (one, other)


def test_a_kill_of_a_role_costs_no_sample(tmp_path, tiny_llama):
    with RolesRun(tmp_path, tiny_llama) as run:
        run.until(lambda: len(run.steps()) >= 2 and "trainer-1" in run.pids(), "two steps")
        os.kill(run.pids()["trainer-1"], signal.SIGKILL)
        run.check_records(run.succeed(), num_steps=4, staleness_max=0)
    assert "trainer-1 (pid" in run.text()
    steps = run.steps()
    assert all(line["critic_skipped"] == 0 and line["kl"] >= 0 for line in steps)
    assert steps[-1]["critic_loss"] > 0
    saved = {path.name for path in (run.folder / "checkpoints/step_000004/critic").iterdir()}
    assert saved >= {"model.safetensors", "tokenizer.json"}
    assert (run.folder / "recover/point_000004/actor/critic/counters.json").exists()


def test_the_error_of_a_role_ends_the_run_with_its_sentence(tmp_path, tiny_llama):
    config = AutoConfig.from_pretrained(tiny_llama)
    config.vocab_size = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    with RolesRun(tmp_path, tiny_llama, f"critic.path={tmp_path / 'small'}") as run:
        assert run.wait() != 0
    told = run.text()[run.text().rindex("arealite: ") :]
    assert "trainer-1 (pid" in told and "only 100 embedding rows" in told
