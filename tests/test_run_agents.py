"""A run of hostile black-box agents, killed in turn: an agent, the server, the trainer and with it the gateway."""

import os
import random
import signal

from support.agent_run import daemons, programs, wrong_rewards
from support.runs import Run

from arealite.rollout.ledger import audit

NUM_STEPS = 6


class AgentRun(Run):
    example, name = "black_box_agent", "agents/black_box"

    def __init__(self, root, model, *overrides):
        super().__init__(root, model, *overrides)
        self.command[4] = "tests/support/agent_run.py"
        self.root = root

    def kill(self, victim, num_steps):
        """At a moment when agents run."""
        self.until(lambda: len(self.steps()) >= num_steps and self.has_killed(victim), f"{victim} to kill")

    def has_killed(self, victim):
        agents = self.agents()
        if not agents:
            return False
        try:
            os.kill(random.Random(0).choice(agents) if victim == "agent" else self.pids()[victim], signal.SIGKILL)
        except (KeyError, ProcessLookupError):
            return False
        return True

    def agents(self):
        trainer = self.pids().get("trainer-0")
        return [] if trainer is None else programs(trainer)


def test_kills_of_all_that_agents_need_leave_an_exact_ledger_and_no_process(tmp_path, tiny_llama):
    limits = ["server.context_length=512", "gateway.session_timeout_s=60", f"total_train_steps={NUM_STEPS}"]
    with AgentRun(tmp_path, tiny_llama, "valid_dataset=null", "evaluator.freq_steps=null", *limits) as run:
        run.kill("agent", 1)
        run.kill("server-0", 2)
        run.kill("trainer-0", 3)
        left = set(daemons(str(run.root)))  # of the life that has ended: gone before the next has begun
        run.until(lambda: not left & set(daemons(str(run.root))), "end of the killed trainer's agents", 20.0)
        run.succeed()
        num_failed, num_wrong = wrong_rewards(run.folder)
    assert num_failed > 0 and num_wrong == 0
    report = audit(run.folder / "ledger.jsonl")
    assert not report.violations
    assert sum(state == "trained" for state in report.states.values()) == NUM_STEPS * 4
    assert run.pids() == {} and not daemons(str(run.root)) and not list((run.folder / "agents").iterdir())
