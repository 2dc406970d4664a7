"""The `arealite` command: run, servers, serve, gateway, eval, check, prove, fetch, bench, reward, init. Starts in well
under a second: nothing heavy is imported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from arealite import __version__
from arealite.api.errors import SENTENCE, ArealiteError, ConfigError
from arealite.api.keys import keys_to_env
from arealite.api.paths import expand

EXIT_REFUSED = 2
EXAMPLE = """  arealite run examples/arealite/quickstart.py \\
    --config examples/arealite/quickstart.yaml"""
# Of each command: what it does, and the end of its help.
COMMANDS = {
    "run": ("start servers and trainers, watch them, stop them", f"""examples:
{EXAMPLE}
  arealite run train.py --config run.yaml rollout.max_head_offpolicyness=0
    synchronous
  arealite run train.py --config run.yaml 'allocation_mode=native:d1|fsdp:d1'
    server and trainer take turns
  arealite run train.py --config run.yaml allocation_mode=sglang:d4+fsdp:d4
    eight GPUs
  arealite run train.py --config run.yaml --dry-run
    which processes would lie on which node, and why; start nothing

exit codes:
  0  done
  1  a process failed (its first error is printed)
  2  refused before anything started
  130, 143  stopped by Ctrl-C or SIGTERM
After a stop or a kill the same command goes on from the last recovery point
(recover.mode=auto)."""),
    "servers": ("list the servers of a run, add one, or let one leave", """examples:
  arealite servers runs/quickstart/addition
  arealite servers runs/quickstart/addition add 10.0.0.7:30000
    a server of the same model, started by `arealite serve`: it gets the
    current weights, and requests once their checksums are right
  arealite servers runs/quickstart/addition drain 10.0.0.7:30000
    no new requests; it leaves when its last one has ended, or --limit-s

exit codes: 0 it is so; 1 not within --limit-s (the wish stays); 2 refused"""),
    "serve": ("serve a model over HTTP with the built-in server", """examples:
  arealite serve --model smollm2-135m --port 8000
  arealite serve --help
    all options of the server"""),
    "gateway": ("let agents sample from servers, and record them", """examples:
  arealite gateway --servers 127.0.0.1:30000 --model smollm2-135m --folder sessions
  arealite gateway --help
    all options"""),
    "check": ("show configuration, processes and memory; start nothing", """examples:
  arealite check examples/arealite/quickstart.yaml
  arealite check examples/arealite/quickstart.yaml --explain
    every field with its value and what it means
  arealite check examples/arealite/quickstart.yaml \\
    allocation_mode=sglang:d4+fsdp:d4 cluster.num_gpus_per_node=8
    the plan for another machine than this one
  arealite check run.yaml --dry-run actor.path=Qwen/Qwen2.5-32B \\
    allocation_mode=sglang:d16t4+fsdp:d4p4t4
    builds, cuts and trains the model as those ranks would, on tensors that
    have shapes and no numbers: what does not divide, memory of a rank"""),
    "eval": ("measure a model on data sets, or which of two is better", """examples:
  arealite eval smollm2-135m --tasks test.jsonl --reward rewards.py:mine --n 8
  arealite eval --help
    all options"""),
    "prove": ("prove that a training step does not depend on how it is computed", """examples:
  arealite prove examples/arealite/quickstart.yaml
  arealite prove run.yaml actor.path=smollm2-135m --quick
    float32 only, fewer variants, no server
  arealite prove run.yaml allocation_mode=native:d1+fsdp:d2t2 --ranks 4

exit codes: 0 nothing failed; 1 a check failed; 2 the configuration was refused"""),
    "fetch": ("make a small pretrained model available locally", "examples:\n  arealite fetch smollm2-135m"),
    "bench": ("measure throughput and latency of running servers", """examples:
  arealite bench serve --address 127.0.0.1:30000 --concurrency 64 \\
    --output-tokens 16-512
  arealite bench serve --help
    all options"""),
    "reward": ("try a reward function on rows before a run", """examples:
  arealite reward test my_rewards.py:reward --data rows.jsonl
  arealite reward test arealite.reward.math:gsm8k_reward \\
    --data examples/arealite/gsm8k_small/train.jsonl

exit codes: 0 nothing looks wrong; 1 calls failed, or warnings"""),
    "init": ("write the examples and their configurations here", f"examples:\n  arealite init\n{EXAMPLE}"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Errors that are meant for the user are one block on stderr, without a traceback."""
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except ArealiteError as error:
        told = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `arealite check ... | head`; what is left in the buffer goes nowhere, and quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk, a file that is a folder
        place = f"{error.filename}: " if error.filename else ""
        told = f"{place}{error.strerror or error}; see cluster.fileroot, HOME, AREALITE_CACHE"
    print(f"{SENTENCE}{told}", file=sys.stderr)
    return EXIT_REFUSED


def dispatch(words: list[str]) -> int:
    if words[:1] == ["serve"]:  # the server has options of its own
        return serve(words[1:])
    if words[:2] == ["bench", "serve"]:  # so has the load generator
        from arealite.rollout.bench import main as bench_serve

        return bench_serve(words[2:])
    if words[:1] == ["gateway"]:
        from arealite.gateway.gateway_command import main as gateway

        return gateway(words[1:])
    if words[:1] == ["eval"]:
        from arealite.evaluation.eval_command import main as evaluate
        from arealite.workflow.rlvr import RLVRWorkflow

        return evaluate(words[1:], RLVRWorkflow)
    given = parse(words)
    if given.command == "run" and not given.dry_run:
        from arealite.launcher.local import run

        return run(given.script, given.config, given.overrides)
    if given.command == "servers":
        from arealite.observe.run_folder import RunFolder
        from arealite.rollout.roster import servers_command

        return servers_command(RunFolder(Path(given.folder)), given.act, given.address, given.limit_s)
    if given.command == "prove":
        from arealite.prove.command import prove

        return prove(given.config, given.overrides, given.quick, given.ranks, given.json)
    if given.command == "reward":
        from arealite.reward.audit import report
        from arealite.reward.named import find_reward

        return report(find_reward(given.function), given.rows, given.num_rows, given.limit_s, given.json)
    if given.command in ("check", "run"):
        from arealite.launcher.check import check

        is_check = given.command == "check"
        answer = check(given.config, given.overrides, is_check and given.explain, *([] if is_check else [given.script]))
    elif given.command == "init":
        answer = init(Path(given.folder))
    else:
        from arealite.models.fetch import fetch

        answer = str(fetch(given.model))
    print(answer, flush=True)
    if given.command == "check" and given.dry_run:
        from arealite.prove.dry_run import dry_run

        print(f"\n{dry_run(given.config, given.overrides)}", flush=True)
    return 0


def init(folder: Path) -> str:
    """Write the examples with their configurations and data under `folder`, where documents name them; returns where.
    Raises ConfigError when they are there."""
    package = Path(__file__).parent
    source = next(p for p in (package / "examples", package.parent / "examples" / "arealite") if p.is_dir())
    target = folder / "examples" / "arealite"
    if target.exists():
        raise ConfigError(f"{target} exists already: remove it, or name another folder, `arealite init FOLDER`")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return str(target)


def serve(words: list[str]) -> int:
    """Hand everything to the built-in server; a fetched model may be given by its name."""
    words = keys_to_env(words)  # before seconds of imports, in which `ps` would show them
    from arealite.inference.serve import main as serve_main
    from arealite.models.fetch import resolve_model

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--model", type=resolve_model)
    given, rest = options.parse_known_args(words)
    return serve_main([*rest, "--model", given.model] if given.model else rest)


def parse(words: list[str]) -> argparse.Namespace:
    """The parsed command line; overrides may stand before and after options."""
    top = argparse.ArgumentParser(
        prog="arealite",
        description="Reinforcement learning from verifiable rewards for language models.",
        epilog="`arealite COMMAND --help` shows examples.",
    )
    top.add_argument("--version", action="version", version=f"arealite {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    style = argparse.RawDescriptionHelpFormatter
    add = {
        name: commands.add_parser(name, help=what, description=what, epilog=end, formatter_class=style).add_argument
        for name, (what, end) in COMMANDS.items()
    }
    add["run"]("script", type=expand, help="the training script")
    add["run"]("--dry-run", action="store_true", help="show what `arealite check` shows, and start nothing")
    add["run"]("--config", type=expand, required=True, metavar="YAML", help="the configuration")
    add["check"]("config", type=expand, metavar="YAML", help="the configuration")
    add["check"]("--explain", action="store_true", help="document every field")
    add["check"]("--dry-run", action="store_true", help="also a step of the trainer's ranks, without numbers")
    add["prove"]("config", type=expand, metavar="YAML", help="the configuration")
    add["prove"]("--ranks", type=int, metavar="N", help="processes for layouts; default: the GPUs, or 2")
    add["prove"]("--quick", action="store_true", help="float32 only, fewer variants, no server")
    add["prove"]("--json", type=expand, metavar="FILE", help="where the findings go; default: the run folder")
    for name in ("run", "check", "prove"):
        add[name]("overrides", nargs="*", metavar="key=value", help="overrides, such as actor.optimizer.lr=1e-5")
    add["servers"]("folder", type=expand, metavar="RUN_FOLDER", help="of the run, as `arealite run` prints it")
    add["servers"]("act", nargs="?", choices=["add", "drain"], help="default: list them")
    add["servers"]("address", nargs="?", default="", metavar="HOST:PORT", help="the server")
    add["servers"](
        "--limit-s", type=float, default=60.0, metavar="S", help="longest wait; drain: how long its requests may go on"
    )
    add["fetch"]("model", help="its name, such as smollm2-135m")
    add["bench"]("what", choices=["serve"], help="what to measure")
    add["reward"]("what", choices=["test"], help="what to do")
    add["reward"]("function", metavar="FILE.py:FUNCTION", help="or package.module:FUNCTION")
    add["reward"](
        "--data", dest="rows", type=expand, required=True, metavar="ROWS", help="a data set, as train_dataset.path"
    )
    add["reward"]("--num-rows", type=int, metavar="N", help="use the first rows only")
    add["reward"]("--limit-s", type=float, default=15.0, metavar="S", help="longest time of a call")
    add["reward"]("--json", type=expand, metavar="FILE", help="also write the findings there")
    add["init"]("folder", nargs="?", type=expand, default=".", help="default: the current one")
    given, rest = top.parse_known_args(words)
    takes_overrides = given.command in ("run", "check", "prove")
    wrong = [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]
    if wrong:
        top.error(f"{given.command} does not know {' '.join(wrong)}; overrides are key=value")
    if takes_overrides:
        given.overrides += rest
    return given


if __name__ == "__main__":
    sys.exit(main())
