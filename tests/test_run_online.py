"""A run whose rewards come later over the control call: some sessions end by being idle, and some rewards come when
the trainer was killed and is there again."""

import json
import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.dummies import is_alive
from support.gateway import ADMIN, call
from support.runs import Run

from arealite.api.keys import ADMIN_KEY_VARIABLE
from arealite.rollout.ledger import audit

NUM_STEPS, IDLE_S = 4, 6.0
NO_EVALUATION = ["valid_dataset=null", "evaluator.freq_steps=null"]
HELD = 1000.0  # what the rewards of sessions of the killed trainer are above
PROGRAM = """
import sys
from arealite.api.cli_args import GRPOConfig
from arealite.api.load_config import load_config
from arealite.trainer import PPOTrainer
from arealite.workflow.agents import AgentWorkflow
from arealite.workflow.runners import AgentService

if __name__ == "__main__":
    config = load_config(sys.argv[1:], GRPOConfig)
    def workflow(gconfig, tokenizer):
        service = AgentService("SERVICE")
        return AgentWorkflow(service, gconfig, tokenizer, gateway=config.gateway, config=config.rollout)
    PPOTrainer(config, workflow=workflow).train()
"""


class People:
    """A service that answers 202 when it has asked the model, and rewards the session a little later, each otherwise;
    every fourth is not finished, and ends by being idle. While `holds` is set, sessions are kept, unrewarded."""

    def __init__(self):
        self.holds, self.held = False, []
        self.told, self.refused = {}, []  # rewards that were taken, by session; status of the others
        self.num_asked = 0
        self._lock = threading.Lock()

    def meet(self, told):
        url, body = told["base_url"] + "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}
        assert call(url, body, told["api_key"])[0] == 200
        with self._lock:
            self.num_asked += 1
            number = self.num_asked
            if self.holds:
                self.held.append(told)
                return
        threading.Timer(0.3, self.reward, (told, number / 1000, number % 4 != 0)).start()

    def reward(self, told, value, is_finished):
        control = f"{told['base_url'].partition('/s/')[0]}/sessions/{told['session_id']}"
        try:
            status, _ = call(f"{control}/reward", {"value": value}, ADMIN)
            if status == 200:
                self.told[told["session_id"]] = value
                if is_finished:
                    call(f"{control}/finish", {}, ADMIN)
            else:
                self.refused.append(status)
        except OSError:  # the gateway is gone with its trainer
            self.refused.append(0)


def serve(people):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                people.meet(told)
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except OSError:  # whoever asked was killed
                self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


class OnlineRun(Run):
    example, name = "black_box_agent", "agents/black_box"


def test_a_reward_that_comes_after_a_kill_of_the_trainer_is_refused_and_the_ledger_is_exact(
    tmp_path, tiny_llama, free_port, monkeypatch
):
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, ADMIN)
    people = People()
    service = serve(people)
    program = tmp_path / "online.py"
    program.write_text(PROGRAM.replace("SERVICE", f"http://127.0.0.1:{service.server_address[1]}/"))
    words = [f"total_train_steps={NUM_STEPS}", f"gateway.port={free_port}", f"gateway.idle_timeout_s={IDLE_S}"]
    run = OnlineRun(tmp_path, tiny_llama, *words, "gateway.session_timeout_s=60", *NO_EVALUATION)
    run.command[4] = str(program)
    try:
        with run:
            run.until(lambda: run.steps(), "a step")
            people.holds = True
            run.until(lambda: len(people.held) >= 4, "sessions that wait for their reward")
            killed = run.pids()["trainer-0"]
            os.kill(killed, signal.SIGKILL)
            run.until(lambda: not is_alive(killed), "end of the trainer and of its gateway")
            people.holds, held = False, list(people.held)
            run.until(lambda: is_listening(free_port), "the gateway of the new trainer")
            num_asked = people.num_asked
            run.until(lambda: people.num_asked > num_asked, "an agent of the new trainer")
            before = len(people.refused)
            for i, told in enumerate(held):
                people.reward(told, HELD + i, True)
            assert people.refused[before:] == [404] * len(held)
            run.succeed()
    finally:
        service.shutdown()
    texts = [path.read_text() for path in (run.folder / "rollouts").glob("*.jsonl")]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    rewards = [row["reward"] for row in rows if row["status"] == "ok"]
    assert len(rewards) == len(set(rewards)) and set(rewards) <= set(people.told.values()) and max(rewards) < HELD
    assert any(round(1000 * reward) % 4 == 0 for reward in rewards), "of sessions that ended by being idle"
    report = audit(run.folder / "ledger.jsonl")
    assert not report.violations and run.pids() == {}
    assert sum(state == "trained" for state in report.states.values()) == NUM_STEPS * 4
