"""A run of black-box agents that are hard to be rid of: each asks twice over the gateway, leaves a daemon that ignores
signals and shows nothing of its run, and says what it is worth, which is never 0; one in eight fails.

Run as a script by test_run_agents.py and benchmarks/chaos.py, with examples/arealite/black_box_agent.yaml.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.trainer import PPOTrainer, agent_workflow
from arealite.workflow.runners import AgentCommand

DAEMON_NAME = "arealite-chaos-daemon"
AGENT = """
import json, os, signal, sys, urllib.request
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(0, 3)
        words = [DAEMON, "-I", "-S", "-c", "import sys, time; time.sleep(600)", sys.argv[2]]
        os.execve(sys.executable, words, {})
    os._exit(0)
messages = [{"role": "user", "content": sys.argv[1]}]
for _ in range(2):
    body = json.dumps({"model": "policy", "messages": messages}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    message = json.loads(urllib.request.urlopen(request, timeout=100).read())["choices"][0]["message"]
    messages += [message, {"role": "user", "content": "Sure?"}]
if sum(map(ord, message["content"])) % 8 == 0:
    sys.exit("bad luck")
print(1 + sum(map(ord, message["content"])) % 5)
""".replace("DAEMON", repr(DAEMON_NAME))


def daemons(run_dir: str) -> list[int]:
    """Those that agents of this run have left and that live."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words[:1] == [DAEMON_NAME] and words[-1] == run_dir and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def programs(trainer: int) -> list[int]:
    """Agents that run now, by the trainer's process."""
    with suppress(psutil.NoSuchProcess):  # they come and go
        wardens = [p for p in psutil.Process(trainer).children() if any("warden.py" in word for word in p.cmdline())]
        return [
            child.pid for warden in wardens for child in warden.children(recursive=True) if AGENT in child.cmdline()
        ]
    return []


def wrong_rewards(run_dir: Path) -> tuple[int, int]:
    """Sessions that failed, and rows whose reward is none that an agent has said, as a failure's is None."""
    num_failed = num_wrong = 0
    for path in (run_dir / "rollouts").glob("step_*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            num_failed += row["status"] == "failed"
            num_wrong += row["reward"] not in ((1, 2, 3, 4, 5) if row["status"] == "ok" else (None,))
    return num_failed, num_wrong


def main(argv: list[str]) -> None:
    config = load_config(argv, GRPOConfig)
    words = [sys.executable, "-I", "-S", "-c", AGENT, "{prompt}", config.cluster.fileroot]
    PPOTrainer(config, workflow=agent_workflow(config, AgentCommand(words, reward="last_line"))).train()


if __name__ == "__main__":
    main(sys.argv[1:])
