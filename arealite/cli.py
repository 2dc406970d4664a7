"""The `arealite` command: run, serve, check, prove, fetch, bench. Starts in well under a second, importing
nothing heavy.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from arealite.api.errors import ArealiteError

EXIT_REFUSED = 2

RUN_EXAMPLES = """examples:
  arealite run examples/arealite/quickstart.py --config examples/arealite/quickstart.yaml
  arealite run train.py --config run.yaml rollout.max_head_offpolicyness=0       synchronous
  arealite run train.py --config run.yaml 'allocation_mode=native:d1|fsdp:d1'    server and trainer take turns
  arealite run train.py --config run.yaml allocation_mode=sglang:d4+fsdp:d4      eight GPUs

exit codes: 0 done; 1 a process failed (its first error is printed); 2 refused before anything started;
            130, 143 stopped by Ctrl-C or SIGTERM. After a stop or a kill the same command goes on from the last
            recovery point (recover.mode=auto)."""

CHECK_EXAMPLES = """examples:
  arealite check examples/arealite/quickstart.yaml
  arealite check run.yaml allocation_mode=sglang:d4+fsdp:d4 cluster.num_gpus_per_node=8
  arealite check run.yaml --explain     every field with its value and what it means"""

SERVE_EXAMPLES = """examples:
  arealite serve --model smollm2-135m --port 8000
  arealite serve --help                 all options of the server"""

PROVE_EXAMPLES = """examples:
  arealite prove examples/arealite/quickstart.yaml
  arealite prove run.yaml actor.path=smollm2-135m --quick      float32 only, fewer variants, no server
  arealite prove run.yaml allocation_mode=native:d1+fsdp:d2t2 --ranks 4

Exit codes: 0 nothing failed; 1 a check failed; 2 the configuration was refused."""

FETCH_EXAMPLES = """examples:
  arealite fetch smollm2-135m"""

BENCH_EXAMPLES = """examples:
  arealite bench serve --address 127.0.0.1:30000 --concurrency 64 --output-tokens 16-512
  arealite bench serve --help           all options"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Errors that are meant for the user are one block on stderr, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["serve"]:  # the server has options of its own
            return serve(words[1:])
        if words[:2] == ["bench", "serve"]:  # so has the load generator
            from arealite.evaluation.serve_bench import main as bench_serve

            return bench_serve(words[2:])
        arguments = parse(words)
        if arguments.command == "run":
            from arealite.launcher.local import run

            return run(arguments.script, arguments.config, arguments.overrides)
        if arguments.command == "check":
            from arealite.launcher.describe import check

            print(check(arguments.config, arguments.overrides, arguments.explain), flush=True)
            return 0
        if arguments.command == "prove":
            from arealite.evaluation.prove import prove

            return prove(arguments.config, arguments.overrides, arguments.quick, arguments.ranks, arguments.json)
        from arealite.dataset.fetch import fetch

        print(fetch(arguments.model), flush=True)
        return 0
    except ArealiteError as error:
        print(f"arealite: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `arealite check ... | head`; what is left in the buffer goes nowhere, and quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def serve(words: list[str]) -> int:
    """Hand everything to the built-in server; a fetched model may be given by its name."""
    from arealite.dataset.fetch import resolve_model
    from arealite.inference.serve import main as serve_main

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--model", type=resolve_model)
    given, rest = options.parse_known_args(words)
    return serve_main([*rest, "--model", given.model] if given.model else rest)


def parse(words: list[str]) -> argparse.Namespace:
    """The parsed command line; overrides may stand before and after options."""
    top = parser()
    arguments, rest = top.parse_known_args(words)
    takes_overrides = arguments.command in ("run", "check", "prove")
    wrong = [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]
    if wrong:
        top.error(f"{arguments.command} does not know {' '.join(wrong)}; overrides are key=value")
    if takes_overrides:
        arguments.overrides += rest
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="arealite",
        description="Reinforcement learning from verifiable rewards for language models.",
        epilog="`arealite COMMAND --help` shows examples.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=what, description=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def add_overrides(command: argparse.ArgumentParser) -> None:
        what = "overrides, such as actor.optimizer.lr=1e-5"
        command.add_argument("overrides", nargs="*", metavar="key=value", help=what)

    command = add("run", "start servers and trainers, watch them, stop them", RUN_EXAMPLES)
    command.add_argument("script", help="the training script")
    command.add_argument("--config", required=True, metavar="YAML", help="the configuration")
    add_overrides(command)
    add("serve", "serve a model over HTTP with the built-in server", SERVE_EXAMPLES)
    command = add("check", "show configuration, processes and memory; start nothing", CHECK_EXAMPLES)
    command.add_argument("config", metavar="YAML", help="the configuration")
    add_overrides(command)
    command.add_argument("--explain", action="store_true", help="document every field")
    command = add("prove", "prove that a training step does not depend on how it is computed", PROVE_EXAMPLES)
    command.add_argument("config", metavar="YAML", help="the configuration")
    add_overrides(command)
    command.add_argument("--ranks", type=int, metavar="N", help="processes for layouts; default: the GPUs, or 2")
    command.add_argument("--quick", action="store_true", help="float32 only, fewer variants, no server")
    command.add_argument("--json", metavar="FILE", help="where the findings go; default: the run folder")
    command = add("fetch", "make a small pretrained model available locally", FETCH_EXAMPLES)
    command.add_argument("model", help="its name, such as smollm2-135m")
    command = add("bench", "measure throughput and latency of running servers", BENCH_EXAMPLES)
    command.add_argument("what", choices=["serve"], help="what to measure")
    return top


if __name__ == "__main__":
    sys.exit(main())
