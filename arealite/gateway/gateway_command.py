"""`arealite gateway`: a gateway of its own in front of servers, which records its sessions. Called by cli.py."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
import threading
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arealite.api.cli_args import GatewayConfig, GenerationHyperparameters, InferenceEngineConfig
from arealite.api.errors import ConfigError
from arealite.api.keys import ADMIN_KEY_VARIABLE, Keys, is_exposed
from arealite.gateway.open_session import OpenSession, RecordedSession
from arealite.gateway.server import MAX_ENDED_KEYS, MAX_ENDED_SESSIONS, AnySession, Gateway
from arealite.models.fetch import resolve_model
from arealite.models.folder import open_tokenizer
from arealite.rollout.client import ENGINES

START_LIMIT_S = 60.0
LOG_NAME, KEY_NAME = "sessions.jsonl", "admin_key"


class SessionLog:
    """The file sessions.jsonl of a folder: a line when a session is opened, its whole record when it has ended, and a
    line for each reward that comes later.

    Each is one write, so a kill leaves at most one torn line, which is removed at the next start; what was open then
    has ended as aborted. `ended` are the newest that had ended, or were lost, with their late rewards, and
    `key_digests` those of their keys. One gateway at a time may write.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError: another gateway writes there."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "gateway.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"--folder {folder}: another gateway records there; give each its own") from error
        path = folder / LOG_NAME
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.ended: OrderedDict[str, RecordedSession] = OrderedDict()
        self.key_digests: deque[bytes] = deque(maxlen=MAX_ENDED_KEYS)
        lost, num_bytes = dict[tuple[str, float], dict[str, Any]](), 0
        with open(path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    self._read(json.loads(line), lost)
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(f"{path}: no record of a session from byte {num_bytes} on: {error!r}") from error
                num_bytes += len(line)
        os.ftruncate(self._file, num_bytes)
        for record in lost.values():
            aborted = {**record, "state": "aborted", "error": "the gateway was killed"}
            self._write(aborted)
            self._keep(aborted)
        self.num_lost = len(lost)

    def _read(self, record: dict[str, Any], still_open: dict[tuple[str, float], dict[str, Any]]) -> None:
        place = record["id"], record["started_at"]
        if record["state"] == "open":
            still_open[place] = record
            self.key_digests.append(bytes.fromhex(record["key_sha256"]))
        elif "reward" not in record:
            still_open.pop(place, None)
            self._keep(record)
        elif (session := self.ended.get(record["id"])) and session.started_at == record["started_at"]:
            session.reward(**record["reward"])

    def _keep(self, record: dict[str, Any]) -> None:
        self.ended[record["id"]] = RecordedSession(record)
        self.ended.move_to_end(record["id"])
        if len(self.ended) > MAX_ENDED_SESSIONS:
            self.ended.popitem(last=False)

    def note(self, session: OpenSession) -> None:
        opened = {"state": "open", "started_at": session.started_at, "key_sha256": session.key_digest.hex()}
        self._write({"id": session.id, **opened} if session.state == "open" else session.trace())

    def note_late(self, session: AnySession, reward: dict[str, Any]) -> None:
        of = {"id": session.id, "started_at": session.started_at, "state": session.state}
        self._write({**of, "reward": reward})

    def close(self) -> None:
        os.close(self._file)
        self._lock.release()

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        if os.write(self._file, line) < len(line):
            raise OSError(f"{LOG_NAME}: the line of session {record['id']} was cut off: is the disk full?")


def _drawn_key(folder: Path) -> str:
    """A key for control calls, which only this user can read, in the folder."""
    key, path = secrets.token_hex(), folder / KEY_NAME
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key)
    return key


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="arealite gateway",
        description="Let agents that speak OpenAI's or Anthropic's format sample from servers; each has a session.",
        epilog=f"Control calls need the key of {ADMIN_KEY_VARIABLE}; without it one is drawn, in FOLDER/{KEY_NAME}.",
    )
    add, default = parser.add_argument, GatewayConfig()
    add("--servers", required=True, metavar="HOST:PORT,...", help="the inference servers")
    add("--backend", default="native", choices=sorted(ENGINES), help="their kind")
    add("--model", required=True, type=resolve_model, help="folder or name of their model: tokenizer, chat template")
    add("--folder", type=Path, required=True, help="where sessions are recorded")
    add("--host", default=default.host, help="address to listen on")
    add("--advertised-host", default="", help="the address that agents are told, where it is another one")
    add("--port", type=int, default=default.port, help="port; 0 takes a free one and prints it")
    add("--history", default=default.history, choices=["keep", "template"], help="what becomes of earlier thoughts")
    add("--context-length", type=int, help="tokens of a prompt and its answer; default: the servers'")
    add("--max-new-tokens", type=int, default=2048, help="tokens of an answer at most")
    add("--temperature", type=float, default=1.0, help="of all sampling, whatever agents ask for")
    add("--session-timeout-s", type=float, default=default.session_timeout_s, help="longest life of a session")
    add("--idle-timeout-s", type=float, default=default.idle_timeout_s, help="longest silence of a session")
    args = parser.parse_args(argv)
    for name, low in (("max_new_tokens", 1), ("temperature", 0), ("session_timeout_s", 0.1), ("idle_timeout_s", 0.1)):
        if not low <= vars(args)[name] < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {vars(args)[name]}; expected at least {low}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; expected 0 to 65535")
    return args


def main(argv: list[str]) -> int:
    """Serves until SIGTERM or Ctrl-C. Raises ConfigError, ServerUnreachable: it cannot start."""
    args = parse_arguments(argv)
    keys = Keys.from_env()
    if is_exposed(args.host) and not keys.admin:
        raise ConfigError(
            f"--host {args.host}: other machines can reach it; set {ADMIN_KEY_VARIABLE} for control calls"
        )
    config = GatewayConfig(
        host=args.host, advertised_host=args.advertised_host, port=args.port, history=args.history,
        session_timeout_s=args.session_timeout_s, idle_timeout_s=args.idle_timeout_s,
    )  # fmt: skip
    config.context_length = args.context_length
    sampling = GenerationHyperparameters(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    log = SessionLog(args.folder)
    engine = ENGINES[args.backend](InferenceEngineConfig())
    stopping, stops = threading.Event(), (signal.SIGTERM, signal.SIGINT)
    try:
        for number in stops:  # servers may be long in coming
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        engine.initialize(addresses=args.servers.split(","))
        tokenizer, admin_key = open_tokenizer(args.model), keys.admin or _drawn_key(args.folder)
        gateway = Gateway(
            engine, tokenizer, config, sampling, admin_key=admin_key, on_change=log.note, on_late_reward=log.note_late
        )
        gateway.remember(log.ended.values(), log.key_digests)
        for number in stops:
            signal.signal(number, lambda *_: stopping.set())
        engine.loop.run(gateway.start(), "gateway.start", START_LIMIT_S)
        lost = f"; {log.num_lost} sessions of a killed one are aborted" if log.num_lost else ""
        print(f"listening on {gateway.address}, sessions in {args.folder / LOG_NAME}{lost}", flush=True)
        stopping.wait()
        engine.loop.run(gateway.close(), "gateway.close", START_LIMIT_S)
    finally:
        engine.destroy()
        log.close()
    return 0
