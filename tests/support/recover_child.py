"""Saves recovery points in a loop until it is killed. Run by test_recover_points.py as a process of its own.

argv: run folder. Prints a line after each finished step.
"""

import sys
from pathlib import Path

from test_recover_points import Counter, FakeActor, run_config

from arealite.api.run_args import RecoverConfig
from arealite.engine.recover import RecoverHandler
from arealite.observe.run_folder import RunFolder
from support.ranks import Alone


def main(root: str) -> None:
    config = run_config()
    actor, rollout, dataloader = FakeActor(Alone(), num_bytes=200_000, pause_s=0.003), Counter(), Counter()
    config.recover = RecoverConfig(freq_steps=1, num_kept=2)
    recover = RecoverHandler(config, RunFolder(Path(root)), actor, rollout, dataloader)
    step = recover.load()
    print(f"loaded {step} {actor.value} {rollout.value} {dataloader.value}", flush=True)
    while True:
        step += 1
        actor.value = rollout.value = dataloader.value = step
        recover.maybe_save(step, 0)
        print(f"finished {step}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
