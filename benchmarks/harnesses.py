"""Agents that others wrote, unchanged, each acting out sessions through the gateway; every token of them is checked.

    python benchmarks/harnesses.py [--harness NAME] [--sessions 20] [--path FOLDER:FOLDER] [key=value ...]

recordings/harnesses.yaml says how each is started and what the model says. Programs are looked for in --path,
then in PATH, packages in this environment; what is not there is said. A tiny random model is served with
--forced-decoding: it says what a larger one might, and the harness runs the tools. Of every session is checked:

P1  each row is what the server was asked and what it sampled, and every turn's prompt is a beginning of its row
P2  each sampled token is trained in one place, or labelled with why it is not
P3  float32 logprobs of each trained token by Hugging Face's code are those of the server to 1e-4

and that each answer of the recordings was given, and that a session's reward is what its last file or words are worth.
With each harness `arealite run` makes two steps. Each harness is one JSON line of the output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from surroundings import surroundings

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS = ROOT / "benchmarks" / "recordings"
HARNESS_VARIABLE = "AREALITE_BENCH_HARNESS"  # which one a trainer is to run
CONTEXT = 40960
LOGPROB_SLACK = 1e-4
WORKSPACE = re.compile(r"/[^\s<>\"']*arealite-agent-\w+/work")  # as harnesses tell it to the model


@dataclass(frozen=True)
class Harness:
    """See harnesses.yaml. A program is started by `words`; else `agent` is a coroutine of examples/arealite or of
    benchmarks/recordings. `package` is what to install, where that is not told by the program."""

    wire: str
    sessions: list[list[Any]]
    asides: dict[str, list[Any]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    agent: str = ""
    package: str = ""

    def version(self) -> str:
        """Empty: it is not here."""
        if not self.words:
            try:
                return version(self.package)
            except PackageNotFoundError:
                return ""
        if (program := shutil.which(self.words[0])) is None:
            return ""
        words = [program, "--version"]
        if self.package:  # the interpreter that it belongs to knows
            code = f"from importlib.metadata import version; print(version({self.package!r}))"
            words = [str(Path(program).parent / "python"), "-c", code]
        told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
        return next(iter(re.findall(r"\d+(?:\.\d+)+", told)), "?")

    def lines(self, ask: Any, answer: str) -> tuple[str, list[Any]]:
        """What the model says one after the other to requests of this kind, and a name for it."""
        texts = [message["content"] for message in ask.messages if message["role"] == "user"]
        for mark in self.asides:
            if any(mark in text for text in texts):
                return mark, self.asides[mark]
        number = int(answer) % len(self.sessions)
        return f"session {number}", self.sessions[number]


def as_text(line: Any) -> str:
    """As the model of the server writes texts and calls."""
    if isinstance(line, str):
        return line
    if isinstance(line, list):
        return "\n".join(map(as_text, line))
    ((name, arguments),) = line.items()
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def load_harnesses() -> dict[str, Harness]:
    found = yaml.safe_load((RECORDINGS / "harnesses.yaml").read_text())
    return {name: Harness(**fields) for name, fields in found.items()}


HARNESSES = load_harnesses()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", action="append", choices=list(HARNESSES), help="one of them, may be repeated")
    parser.add_argument("--sessions", type=int, default=20, help="0: training alone")
    parser.add_argument("--path", default="", help="folders of programs, before those of PATH")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration of the training run")
    return parser.parse_args()


def wrote(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **given: Any
) -> float:
    """Whether the last number in the file, or of what was said where there is no file, is the answer."""
    path = Path(given["workspace"] or "nowhere", "answer.txt")
    return float(re.findall(r"\d+", path.read_text() if path.exists() else completion)[-1:] == [answer])


def make_workflow(name: str, gconfig: Any, tokenizer: Any, config: Any) -> Any:
    """A workflow whose sessions act out the harness's recordings; every other one says a wrong answer. Its `sessions`
    are those that it has run, `told` the places of what was said."""
    from arealite.workflow.agents import AgentWorkflow
    from arealite.workflow.runners import AgentCommand, AgentCoroutine

    harness = HARNESSES[name]
    if not harness.agent:
        runner: Any = AgentCommand(harness.words, env=harness.env)
    else:
        others = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]  # it has an agents.py
        sys.path[:] = [str(ROOT / "examples" / "arealite"), str(RECORDINGS), *others]
        module, _, coroutine = harness.agent.partition(".")
        runner = AgentCoroutine(vars(__import__(module))[coroutine])

    class Acting(AgentWorkflow):
        def new_session(self, gateway: Any, task: Any, member: int) -> Any:
            session = super().new_session(gateway, task, member)
            said = task.answer if member % 2 == 0 else str(int(task.answer) + 1)
            told = Counter[str]()

            def script(ask: Any, turn: int) -> list[int]:
                name, lines = harness.lines(ask, task.answer)
                place = min(told[name], len(lines) - 1)
                told[name] += 1
                self.told[name, place] += 1
                workspace = WORKSPACE.search(json.dumps(ask.messages, ensure_ascii=False))
                text = as_text(lines[place]).replace("{answer}", said)
                text = text.replace("{workspace}", workspace[0] if workspace else "no workspace")
                return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

            session.script = script
            self.sessions[task.id, member] = session
            return session

    reward = None if harness.agent else wrote
    workflow = Acting(runner, gconfig, tokenizer, gateway=config.gateway, config=config.rollout, reward_fn=reward)
    workflow.sessions, workflow.told = {}, Counter()
    return workflow


Calls = dict[int, tuple[list[int], Any]]  # by turn: what the server was asked, and its completion


def check(calls: Calls, trajectory: Any, session: Any, model: Any) -> tuple[list[str], float]:
    """What is wrong with one session, and the largest difference of a logprob."""
    import torch

    problems, worst, start, placed = [], 0.0, 0, Counter[int]()
    for length in trajectory.row_lengths or [len(trajectory.tokens)]:
        row, mask, said = (
            column[start : start + length] for column in (trajectory.tokens, trajectory.loss_mask, trajectory.logprobs)
        )
        start += length
        inside = [
            rid
            for rid, (ids, done) in calls.items()
            if row[: len(ids) + len(done.token_ids)] == [*ids, *done.token_ids]
        ]
        if not any(len(calls[rid][0]) + len(calls[rid][1].token_ids) == length for rid in inside):
            problems.append("P1: a row ends where no answer of the server does")
        expected = [False] * length
        for rid in inside:
            ids, done = calls[rid]
            span = slice(len(ids), len(ids) + len(done.token_ids))
            if all(mask[span]):
                placed[rid] += 1
                expected[span] = mask[span]
                if said[span] != list(done.logprobs):
                    problems.append("P1: logprobs are not the server's")
        if expected != list(mask):
            problems.append("P1: something is trained that the server did not sample there")
        at = torch.tensor([i for i, is_own in enumerate(mask) if is_own])
        with torch.inference_mode():
            hidden = model.model(torch.tensor([row])).last_hidden_state[0, at - 1]
            found = model.lm_head(hidden).log_softmax(-1).gather(1, torch.tensor(row)[at, None])[:, 0]
        worst = max(worst, float((found - torch.tensor(said)[at]).abs().max()))
    labels = {turn["id"]: turn["label"] for turn in session.trace()["turns"]}
    for rid in calls:
        if placed[rid] != int(labels.get(rid) == "agent"):
            problems.append(f"P2: {labels.get(rid)} tokens are trained in {placed[rid]} places")
    if worst > LOGPROB_SLACK:
        problems.append(f"P3: logprobs differ by {worst:.1e}")
    return problems, worst


def tiny_model(folder: Path) -> str:
    """A random float32 Llama with SmolLM2's tokenizer and a long context."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from arealite.models.fetch import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m"), model_max_length=CONTEXT)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, initializer_range=0.1, tie_word_embeddings=True,
        **special,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def served(model: str) -> Iterator[str]:
    words = [sys.executable, "-m", "arealite.inference.serve", "--model", model, "--dtype", "float32", "--port", "0"]
    words += ["--forced-decoding", "--kv-cache-tokens", str(4 * CONTEXT), "--chunked-prefill-tokens", "2048"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://(\S+)", server.stdout.readline())
            assert found is not None, "the server has not said where it listens"
            yield found[1]
        finally:
            server.terminate()


def act_out(name: str, num_sessions: int, folder: str, address: str, model: Any) -> dict[str, Any]:
    """Run the sessions of one harness, and check each."""
    from transformers import AutoTokenizer

    from arealite.api.cli_args import GRPOConfig
    from arealite.api.types import Task
    from arealite.rollout.client import RemoteNativeEngine

    calls: dict[str, Calls] = {}

    class Recorded(RemoteNativeEngine):
        async def agenerate(self, request: Any, on_tokens: Any = None) -> Any:
            done = await super().agenerate(request, on_tokens)
            calls.setdefault(request.group_id, {})[int(request.rid.rpartition(".")[2])] = (
                list(request.input_ids),
                done,
            )
            return done

    config = GRPOConfig()
    config.gconfig.n_samples, config.gconfig.max_new_tokens, config.gateway.session_timeout_s = 2, 256, 600.0
    config.gateway.context_length, config.gateway.max_turns = CONTEXT, 16
    config.rollout.consumer_batch_size = config.rollout.max_concurrent_rollouts = 1
    workflow = make_workflow(name, config.gconfig, AutoTokenizer.from_pretrained(folder), config)
    tasks = [
        Task(f"{name}-{i}", messages=[{"role": "user", "content": f"Write the sum of 0 and {i}."}], answer=str(i))
        for i in range(1, num_sessions // 2 + 1)
    ]
    engine, started = Recorded(config.rollout), time.monotonic()
    engine.initialize(None, addresses=[address])
    try:
        trajectories = [t for group in engine.run_groups(tasks, workflow) for t in group.trajectories]
    finally:
        workflow.close()
        engine.destroy()
    seconds, problems, worst = time.monotonic() - started, list[str](), 0.0
    for t in trajectories:
        session = workflow.sessions[t.task_id, t.member]
        if t.status != "ok" or t.reward != float(t.member % 2 == 0):
            problems.append(f"{t.task_id}.{t.member} is {t.status}, reward {t.reward}: {t.error[-500:]}")
            continue
        found, difference = check(calls[session.id], t, session, model)
        problems += [f"{t.task_id}.{t.member} {problem}" for problem in found]
        worst = max(worst, difference)
    problems += [f"never said: {place}" for place in unsaid(HARNESSES[name], tasks, workflow.told)]
    if len(trajectories) != 2 * len(tasks):
        problems.append(f"{len(trajectories)} sessions of {2 * len(tasks)} have ended")
    return {
        **figures(trajectories, [session.trace() for session in workflow.sessions.values()]),
        "failed": len(problems),
        "problems": problems[:5],
        "logprob_difference": worst,
        "s_per_session": round(seconds / max(1, len(trajectories)), 2),
    }


def unsaid(harness: Harness, tasks: list[Any], told: Counter[tuple[str, int]]) -> list[tuple[str, int]]:
    """Places of the recordings, those that some task acts out, at which the model was never asked."""
    numbers = {int(task.answer) % len(harness.sessions) for task in tasks}
    lines = {f"session {number}": harness.sessions[number] for number in numbers} | harness.asides
    return [(name, i) for name in lines for i in range(len(lines[name])) if not told[name, i]]


def figures(trajectories: list[Any], traces: list[dict[str, Any]]) -> dict[str, Any]:
    """What there was of sessions, turns and tokens; sampled ones are trained, or have a label."""
    turns = [turn for trace in traces for turn in trace["turns"]]
    splits, tokens = Counter[str](), Counter[str]()
    for trace in traces:
        splits.update(trace["splits"])
        tokens.update(trace["tokens"])
    return {
        "sessions": len(trajectories),
        "turns": len(turns),
        "tool_calls": sum(len(turn["answer"].get("tool_calls", [])) for turn in turns),
        "labels": dict(Counter(turn["label"] for turn in turns)),
        "rows": sum(max(1, len(t.row_lengths)) for t in trajectories),
        "splits": dict(splits),
        "row_tokens": sum(len(t.tokens) for t in trajectories),
        "tokens": dict(tokens),
    }


def train(argv: list[str]) -> None:
    """A trainer of `arealite run`: this file is its script."""
    from arealite.api.cli_args import GRPOConfig
    from arealite.api.load_config import load_config
    from arealite.trainer import PPOTrainer

    config, name = load_config(argv, GRPOConfig), os.environ[HARNESS_VARIABLE]
    PPOTrainer(config, workflow=lambda g, tokenizer: make_workflow(name, g, tokenizer, config)).train()


def two_steps(name: str, overrides: list[str], folder: str, root: Path) -> dict[str, Any]:
    """What `arealite run` says of two steps with the harness."""
    overrides = [
        "total_train_steps=2", "train_dataset.batch_size=2", "valid_dataset=null", "gconfig.n_samples=2",
        "evaluator.freq_steps=null", "stats_logger.probe_every_steps=0",
        "gconfig.max_new_tokens=256", "server.dtype=float32", f"server.context_length={CONTEXT}",
        f"server.kv_cache_tokens={2 * CONTEXT}", "server.args={forced-decoding: true}", "actor.dtype=float32",
        f"actor.path={folder}", "rollout.max_head_offpolicyness=0", "rollout.max_concurrent_rollouts=1",
        "gateway.session_timeout_s=600",
        f"cluster.fileroot={root}", f"trial_name={name}", "launcher.pin_cores=false", "watchdog.stall_s=300",
        *overrides,
    ]  # fmt: skip
    script, config = Path(__file__), ROOT / "examples/arealite/quickstart.yaml"
    words = [sys.executable, "-m", "arealite.cli", "run", str(script), "--config", str(config), *overrides]
    started = time.monotonic()
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, HARNESS_VARIABLE: name}, capture_output=True, text=True, timeout=1800
    )
    seconds, run = time.monotonic() - started, root / "quickstart" / name
    if done.returncode or not (run / "summary.json").exists():
        return {"trained_steps": 0, "error": (done.stdout + done.stderr)[-2000:]}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "trained_steps": json.loads((run / "summary.json").read_text())["steps"],
        "trained_rewards": [step["reward_mean"] for step in steps],
        "train_s": round(seconds, 1),
        "trained_sessions": sum(step["num_samples"] - step["num_samples_failed"] for step in steps),
        "grad_norms": [round(step["grad_norm"], 4) for step in steps],
    }


def main() -> None:
    given = arguments()
    from transformers import LlamaForCausalLM

    os.environ["PATH"] = os.pathsep.join(filter(None, [given.path, os.environ["PATH"]]))
    num_failed = 0
    with tempfile.TemporaryDirectory() as root:
        folder = tiny_model(Path(root, "model"))
        model = LlamaForCausalLM.from_pretrained(folder).float().eval()
        for name in given.harness or HARNESSES:
            harness = HARNESSES[name]
            result: dict[str, Any] = {"harness": name, "version": harness.version(), "wire": harness.wire}
            if not result["version"]:
                result["missing"] = f"neither a program nor a package {harness.package or harness.words[0]}"
            else:
                if given.sessions:
                    with served(folder) as address:
                        result |= act_out(name, given.sessions, folder, address, model)
                if not given.no_training:
                    result |= two_steps(name, given.overrides, folder, Path(root))
                    result["failed"] = result.get("failed", 0) + (result["trained_steps"] != 2)
            num_failed += result.get("failed", 0)
            print(json.dumps(result | surroundings()), flush=True)
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    train(sys.argv[1:]) if HARNESS_VARIABLE in os.environ else main()
