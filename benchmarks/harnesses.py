"""Agents that others wrote, unchanged, each acting out sessions through the gateway; every token of them is checked.

    python benchmarks/harnesses.py [--harness NAME] [--sessions 20] [--path FOLDER:FOLDER] [--no-training]

Programs are looked for in --path, then in PATH: claude, codex, opencode, mini and smolagent; the openai-agents and
anthropic SDKs in this environment. What is not there is said. A tiny random model is served with --forced-decoding: it
says what a larger one might, and the harness runs the tools. Of every session is checked:

P1  each row is what the server was asked and what it sampled, and every turn's prompt is a beginning of its row
P2  each sampled token is trained in one place, or labelled with why it is not
P3  float32 logprobs of each trained token by Hugging Face's code are those of the server to 1e-4

and with each harness `arealite run` makes two steps. The last line is one JSON object.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HARNESS_VARIABLE = "AREALITE_BENCH_HARNESS"  # which one a trainer is to run
CONTEXT = 65536
LOGPROB_SLACK = 1e-4
TITLE = "A short title"


def call(name: str, **arguments: Any) -> str:
    """As the model of the server writes one."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def in_block(fence: str, end: str, code: str) -> str:
    return f"THOUGHT: I go on.\n\n{fence}\n{code}\n{end}"


@dataclass(frozen=True)
class Harness:
    """`steps(answer)` is what the model says, turn by turn. `program` is what to install; `words` start it, without
    them `agent` names a module of examples/arealite whose coroutine `agent` is run."""

    wire: str
    program: str
    steps: Callable[[str], list[str]]
    words: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    agent: str = ""
    has_tools: bool = True


def shell_steps(tool: str, argument: str, **more: str) -> Callable[[str], list[str]]:
    """Write the answer with a shell, look at it, and say so."""
    return lambda answer: [
        call(tool, **{argument: f"echo {answer} > answer.txt"}, **more),
        call(tool, **{argument: "cat answer.txt"}, **more),
        f"The answer is {answer}.",
    ]


def mini_steps(answer: str) -> list[str]:
    codes = (f"echo {answer} > answer.txt", "cat answer.txt", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    return [in_block("```mswea_bash_command", "```", code) for code in codes]


def smol_steps(answer: str) -> list[str]:
    return [in_block("<code>", "</code>", code) for code in (f"print({answer})", f'final_answer("{answer}")')]


def adder_steps(answer: str) -> list[str]:
    return [call("add", a=0, b=int(answer)), f"The answer is {answer}."]


CLAUDE_MODELS = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL")
OPENCODE_PROVIDER = {
    "npm": "@ai-sdk/openai-compatible",
    "options": {"baseURL": "{base_url}/v1", "apiKey": "{api_key}"},
    "models": {"policy": {}},
}
HARNESSES = {
    "claude-code": Harness(
        "messages", "claude", shell_steps("Bash", "command", description="for the task"),
        ("claude", "-p", "{prompt}", "--dangerously-skip-permissions"),
        {
            **{f"ANTHROPIC_{name}": "policy" for name in CLAUDE_MODELS},
            "CLAUDE_CODE_SUBAGENT_MODEL": "policy", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1", "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "DISABLE_AUTOUPDATER": "1", "IS_SANDBOX": "1",
        },
    ),
    "codex": Harness(
        "responses", "codex", shell_steps("exec_command", "cmd"),
        (
            "codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-m", "policy",
            "-c", 'model_provider="ours"', "-c", 'model_providers.ours.name="ours"',
            "-c", 'model_providers.ours.base_url="{base_url}/v1"', "-c", 'model_providers.ours.wire_api="responses"',
            "-c", 'model_providers.ours.env_key="OPENAI_API_KEY"', "{prompt}",
        ),
    ),
    "opencode": Harness(
        "chat", "opencode", shell_steps("bash", "command", description="for the task"),
        ("opencode", "run", "-m", "ours/policy", "{prompt}"),
        {
            "OPENCODE_CONFIG_CONTENT": json.dumps(
                {"provider": {"ours": OPENCODE_PROVIDER}, "small_model": "ours/policy", "autoupdate": False}
            ),
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
        },
    ),
    "mini-swe-agent": Harness(
        "chat", "mini", mini_steps,
        ("mini", "-y", "--exit-immediately", "-m", "openai/policy", "--model-class", "litellm_textbased",
         "-c", "mini_textbased.yaml", "-t", "{prompt}"),
        {"MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        has_tools=False,
    ),
    "smolagents": Harness(
        "chat", "smolagent", smol_steps,
        ("smolagent", "{prompt}", "--model-type", "OpenAIModel", "--model-id", "policy", "--api-base", "{base_url}/v1",
         "--api-key", "{api_key}", "--tools"),
        has_tools=False,
    ),
    "openai-agents": Harness("responses", "agents", adder_steps, agent="openai_agent"),
    "anthropic": Harness("messages", "anthropic", adder_steps, agent="anthropic_agent"),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harness", action="append", choices=list(HARNESSES), help="one of them, may be repeated")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--path", default="", help="folders of programs, before those of PATH")
    parser.add_argument("--no-training", action="store_true")
    return parser.parse_args()


def wrote(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], *, answer: str, **given: Any
) -> float:
    """Whether the last number in the file, or of what was said where there is no file, is the answer."""
    path = Path(given["workspace"] or "nowhere", "answer.txt")
    return float(re.findall(r"\d+", path.read_text() if path.exists() else completion)[-1:] == [answer])


def make_workflow(name: str, gconfig: Any, tokenizer: Any, config: Any) -> Any:
    """A workflow whose sessions act out the harness's steps; every other one says a wrong answer. Its `sessions` are
    those that it has run."""
    from arealite.workflow.agents import AgentWorkflow
    from arealite.workflow.runners import AgentCommand, AgentCoroutine

    harness = HARNESSES[name]
    if harness.agent:
        others = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]  # it has an agents.py
        sys.path[:] = [str(ROOT / "examples" / "arealite"), *others]
        runner: Any = AgentCoroutine(__import__(harness.agent).agent)
    else:
        runner = AgentCommand(harness.words, env=harness.env)

    class Acting(AgentWorkflow):
        def new_session(self, gateway: Any, task: Any, member: int) -> Any:
            session = super().new_session(gateway, task, member)
            steps = harness.steps(task.answer if member % 2 == 0 else str(int(task.answer) + 1))

            def script(ask: Any, turn: int) -> list[int]:
                said = sum(message["role"] == "assistant" for message in ask.messages)
                text = TITLE if harness.has_tools and not ask.tools else steps[min(said, len(steps) - 1)]
                return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

            session.script = script
            self.sessions[task.id, member] = session
            return session

    reward = None if harness.agent else wrote
    workflow = Acting(runner, gconfig, tokenizer, gateway=config.gateway, config=config.rollout, reward_fn=reward)
    workflow.sessions = {}
    return workflow


def check(calls: list[tuple[list[int], Any]], trajectory: Any, session: Any, model: Any) -> tuple[list[str], float]:
    """What is wrong with one session, and the largest difference of a logprob. `calls`: what the server was asked, and
    its completion."""
    import torch

    problems, worst, start, placed = [], 0.0, 0, dict[int, int]()
    for length in trajectory.row_lengths or [len(trajectory.tokens)]:
        row, mask, said = (
            column[start : start + length] for column in (trajectory.tokens, trajectory.loss_mask, trajectory.logprobs)
        )
        start += length
        inside = [
            i for i, (ids, done) in enumerate(calls) if row[: len(ids) + len(done.token_ids)] == [*ids, *done.token_ids]
        ]
        if not any(len(calls[i][0]) + len(calls[i][1].token_ids) == length for i in inside):
            problems.append("P1: a row ends where no answer of the server does")
        expected = [False] * length
        for i in inside:
            ids, done = calls[i]
            span = slice(len(ids), len(ids) + len(done.token_ids))
            if all(mask[span]):
                placed[i] = placed.get(i, 0) + 1
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
    labels = {tuple(turn["sampled_ids"]): turn["label"] for turn in session.trace()["turns"]}
    for i, (_, done) in enumerate(calls):
        is_trained = labels.get(tuple(done.token_ids)) == "agent"
        if placed.get(i, 0) != int(is_trained):
            problems.append(f"P2: {labels.get(tuple(done.token_ids))} tokens are trained in {placed.get(i, 0)} places")
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
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.1, tie_word_embeddings=True,
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

    calls: dict[str, list[tuple[list[int], Any]]] = {}

    class Recorded(RemoteNativeEngine):
        async def agenerate(self, request: Any, on_tokens: Any = None) -> Any:
            done = await super().agenerate(request, on_tokens)
            calls.setdefault(request.group_id, []).append((list(request.input_ids), done))
            return done

    config = GRPOConfig()
    config.gconfig.n_samples, config.gconfig.max_new_tokens, config.gateway.session_timeout_s = 2, 256, 180.0
    config.gateway.context_length = CONTEXT
    config.rollout.consumer_batch_size, config.rollout.max_concurrent_rollouts = 2, 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    workflow = make_workflow(name, config.gconfig, tokenizer, config)
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
        if t.status != "ok" or t.reward != float(t.member % 2 == 0):
            problems.append(f"{t.task_id}.{t.member} is {t.status}, reward {t.reward}: {t.error[-500:]}")
            continue
        session = workflow.sessions[t.task_id, t.member]
        found, difference = check(calls[session.id], t, session, model)
        problems += [f"{t.task_id}.{t.member} {problem}" for problem in found]
        worst = max(worst, difference)
    turns = [turn for session in workflow.sessions.values() for turn in session.trace()["turns"]]
    return {
        "sessions": len(trajectories),
        "turns": len(turns),
        "rows": sum(max(1, len(t.row_lengths)) for t in trajectories),
        "auxiliary": sum(turn["label"] == "auxiliary" for turn in turns),
        "discarded": sum(turn["label"] == "discarded" for turn in turns),
        "row_tokens": sum(len(t.tokens) for t in trajectories),
        "trained_tokens": sum(sum(t.loss_mask) for t in trajectories),
        "failed": len(problems),
        "problems": problems[:5],
        "logprob_difference": worst,
        "s_per_session": round(seconds / max(1, len(trajectories)), 2),
    }


def train(argv: list[str]) -> None:
    """A trainer of `arealite run`: this file is its script."""
    from arealite.api.cli_args import GRPOConfig
    from arealite.api.load_config import load_config
    from arealite.trainer import PPOTrainer

    config, name = load_config(argv, GRPOConfig), os.environ[HARNESS_VARIABLE]
    PPOTrainer(config, workflow=lambda g, tokenizer: make_workflow(name, g, tokenizer, config)).train()


def two_steps(name: str, folder: str, root: Path) -> dict[str, Any]:
    """What `arealite run` says of two steps with the harness."""
    overrides = [
        "total_train_steps=2", "train_dataset.batch_size=2", "valid_dataset=null", "gconfig.n_samples=2",
        "gconfig.max_new_tokens=256", "server.dtype=float32", f"server.context_length={CONTEXT}",
        f"server.kv_cache_tokens={2 * CONTEXT}", "server.args={forced-decoding: true}", "actor.dtype=float32",
        f"actor.path={folder}", "rollout.max_head_offpolicyness=0", "gateway.session_timeout_s=180",
        f"cluster.fileroot={root}", f"trial_name={name}", "launcher.pin_cores=false", "watchdog.stall_s=300",
    ]  # fmt: skip
    script, config = Path(__file__), ROOT / "examples/arealite/quickstart.yaml"
    words = [sys.executable, "-m", "arealite.cli", "run", str(script), "--config", str(config), *overrides]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, HARNESS_VARIABLE: name}, capture_output=True, text=True, timeout=900
    )
    summary = root / "quickstart" / name / "summary.json"
    if done.returncode or not summary.exists():
        return {"trained_steps": 0, "error": (done.stdout + done.stderr)[-2000:]}
    return {"trained_steps": json.loads(summary.read_text())["steps"]}


def missing(harness: Harness) -> str:
    """Why it cannot be run here, "" if it can."""
    if harness.words:
        return "" if shutil.which(harness.program) else f"no program {harness.program}"
    from importlib.util import find_spec

    return "" if find_spec(harness.program) else f"no module {harness.program}"


def main() -> None:
    given = arguments()
    from transformers import LlamaForCausalLM

    os.environ["PATH"] = os.pathsep.join(filter(None, [given.path, os.environ["PATH"]]))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = tiny_model(Path(root, "model"))
        model = LlamaForCausalLM.from_pretrained(folder).float().eval()
        with served(folder) as address:
            for name in given.harness or HARNESSES:
                if why := missing(HARNESSES[name]):
                    results[name] = {"missing": why}
                else:
                    results[name] = act_out(name, given.sessions, folder, address, model)
                print(f"{name:15} {HARNESSES[name].wire:10} {json.dumps(results[name])}", flush=True)
        for name in [] if given.no_training else [n for n in results if "missing" not in results[n]]:
            results[name] |= two_steps(name, folder, Path(root))
            print(
                f"{name:15} trained_steps {results[name]['trained_steps']} {results[name].get('error', '')}", flush=True
            )
    print(json.dumps({"harnesses": results}))


if __name__ == "__main__":
    train(sys.argv[1:]) if HARNESS_VARIABLE in os.environ else main()
