"""`arealite servers`: which servers a run uses, one more of them, one less. Two files of the run folder: what was asked
for (servers_asked, a line each), and what the client on trainer rank 0 has made of it (servers.json).

The command is called by cli.py; membership.py reads the one file and writes the other. They may be on a shared disk.
"""

from __future__ import annotations

import json
import math
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from arealite.api.errors import ConfigError, WaitTimeout
from arealite.observe.run_folder import RunFolder
from arealite.observe.waits import waiting
from arealite.rollout.router import Server, addresses_of

LOOK_S = 0.2  # how often the command looks for what has become of it
FRESH_S = 10.0  # the client writes servers.json at least so often
OLD_S = 30.0
COLUMNS = "{id:12} {url:28} {state:9} {num_running:>8}  {weights:20} {why}"
HEADING = COLUMNS.format(
    id="server", url="address", state="state", num_running="requests", weights="weights", why="why"
)


@dataclass(frozen=True)
class Asked:
    """What was asked last of the server at `url`, in line `number`. `limit_s`: how long requests may go on there while
    it is drained."""

    number: int
    act: str
    url: str
    limit_s: float


def read_asked(folder: RunFolder) -> list[Asked]:
    """What was asked last of each server. Raises ConfigError when the file cannot be read as such."""
    last: dict[str, Asked] = {}
    with suppress(FileNotFoundError):
        for number, line in enumerate(folder.servers_asked.read_text().splitlines(), 1):
            try:
                act, url, limit_s = line.split()
                last[url] = Asked(number, act, url, float(limit_s))
            except ValueError:
                raise ConfigError(
                    f"{folder.servers_asked}, line {number}: expected add or drain, a URL and seconds, found {line!r}"
                ) from None
    return list(last.values())


def roster_of(servers: list[Server], asked: list[Asked], left: dict[str, str]) -> dict[str, Any]:
    """The content of servers.json. `followed`: the newest wish that is in it; `left`: {url: how} of those drained."""
    rows = []
    for s in servers:
        weights = "as at its start" if s.update is None else f"version {s.update.version}{', verified' * s.is_verified}"
        rows.append({key: vars(s)[key] for key in ("id", "url", "state", "num_running", "why")} | {"weights": weights})
    return {"followed": max((each.number for each in asked), default=0), "servers": rows, "left": dict(left)}


def servers_command(folder: RunFolder, act: str | None, address: str, limit_s: float) -> int:
    """Print the servers of a run; or have it use one more, or one less, and wait until that is so, `limit_s`. Returns
    the exit code: 1 when it is not so yet. Raises ConfigError: no run folder, no such server, one that cannot leave."""
    if not folder.config_yaml.exists():
        raise ConfigError(f"{folder.root} is no run folder: there is no {folder.config_yaml.name} in it")
    if not 0 < limit_s < math.inf:
        raise ConfigError(f"--limit-s is {limit_s}; expected a finite number above 0")
    rows = _read(folder)["servers"]
    if act is None:
        print(_table(folder, rows))
        return 0
    url = next((place.url for place in addresses_of([address])), "")
    if not url:
        raise ConfigError(f"which server? arealite servers {folder.root} {act} HOST:PORT")
    if same := [row for row in rows if row["url"] != url and _places(row["url"]) & _places(url)]:
        raise ConfigError(f"{url} is {same[0]['id']}, which this run knows as {same[0]['url']}: say that")
    if act == "drain" and all(row["url"] != url for row in rows):
        raise ConfigError(f"{url} is no server of this run:\n{_table(folder, rows)}")
    if act == "drain" and not any(row["state"] == "serving" and row["url"] != url for row in rows):
        raise ConfigError(f"no other server than {url} takes requests: add one first")
    with open(folder.servers_asked, "a") as file:
        file.write(f"{act} {url} {limit_s:g}\n")
    return _wait(folder, next(each for each in read_asked(folder) if each.url == url))


def _wait(folder: RunFolder, asked: Asked) -> int:
    told, is_drain = "nobody has seen the wish", asked.act == "drain"
    with waiting(f"{asked.act} {asked.url}", "trainer rank 0", asked.limit_s + is_drain * OLD_S) as wait:
        while True:
            roster = _read(folder)
            if roster["followed"] >= asked.number:
                row = next((row for row in roster["servers"] if row["url"] == asked.url), None)
                line = COLUMNS.format(**row) if row else f"{asked.url}: {roster['left'].get(asked.url, 'it has left')}"
                if line != told:
                    print(line, flush=True)
                told = line
                if row is None if is_drain else row is not None and row["state"] == "serving":
                    return 0
            try:
                wait.check()
            except WaitTimeout:
                print(f"not within {wait.limit_s:g} s; {told}. {folder.servers_asked} keeps the wish until it is so")
                return 1
            time.sleep(LOOK_S)


def _read(folder: RunFolder) -> Any:
    try:
        return json.loads(folder.servers_json.read_text())
    except FileNotFoundError:
        return roster_of([], [], {})


def _table(folder: RunFolder, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no servers are known: the trainer has not connected to any yet"
    age_s = time.time() - folder.servers_json.stat().st_mtime
    old = [f"as of {age_s:.0f} s ago: no trainer tells more now"] if age_s > OLD_S else []
    return "\n".join([HEADING, *(COLUMNS.format(**row) for row in rows), *old])


def _places(url: str) -> set[Any]:
    """Where it is, by whatever name: (address, port)s."""
    parts = urlsplit(url)
    with suppress(OSError):
        return {found[4][:2] for found in socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)}
    return set()
