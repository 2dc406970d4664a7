"""The keys of inference servers: which one a call must show, and how a client shows it. Both ends read them from the
environment, which no other user of the machine can read, as the command line can be.

Used by inference/http/routes.py and serve.py on the server, by rollout/router.py in the client, and by
launcher/keeper.py for both.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path

from arealite.api.errors import ConfigError

API_KEY_VARIABLE = "AREALITE_API_KEY"
ADMIN_KEY_VARIABLE = "AREALITE_ADMIN_API_KEY"


@dataclass(frozen=True)
class Keys:
    """`api` opens requests; `admin` opens everything, and alone what changes what is served (control). Empty: there is
    none of this kind. Without either, everything is open; without `admin`, control is open to `api`."""

    api: str = field(default="", repr=False)
    admin: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name, key in ((API_KEY_VARIABLE, self.api), (ADMIN_KEY_VARIABLE, self.admin)):
            if not re.fullmatch(r"[!-~]*", key):
                raise ConfigError(f"{name} cannot be sent: expected printable ASCII without spaces and line ends")

    @classmethod
    def from_env(cls) -> Keys:
        """Raises ConfigError for a key that no header can hold."""
        return cls(os.environ.get(API_KEY_VARIABLE, ""), os.environ.get(ADMIN_KEY_VARIABLE, ""))

    @classmethod
    def for_host(cls, host: str) -> Keys:
        """Those of a server that is to listen on `host`; where other machines can reach it, control without an admin
        key is closed to all. Raises ConfigError: they can, and it has none; also as `from_env`."""
        keys = cls.from_env()
        if not is_exposed(host):
            return keys
        if not (keys.api or keys.admin):
            raise ConfigError(
                f"--host {host}: other machines can reach this address, and the server has no key. Set"
                f" {API_KEY_VARIABLE} (requests) and {ADMIN_KEY_VARIABLE} (weight updates, pauses, adapters) for it and"
                " for its clients, or listen on --host 127.0.0.1"
            )
        return cls(keys.api, keys.admin or secrets.token_hex())

    def headers(self, is_control: bool) -> dict[str, str]:
        """What a client adds to a call. To control it shows the admin key, otherwise the other one, where it has it."""
        key = (self.admin or self.api) if is_control else (self.api or self.admin)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def allow(self, authorization: str, is_control: bool) -> bool:
        """Whether a server answers a call with this Authorization header."""
        scheme, _, key = authorization.partition(" ")
        opening = [self.admin] if is_control and self.admin else [k for k in (self.api, self.admin) if k]
        shown = key.strip().encode()
        return not opening or (scheme.lower() == "bearer" and any(compare_digest(shown, k.encode()) for k in opening))


def keys_to_env(words: list[str]) -> list[str]:
    """Move the keys of a command line into the environment, and hide them from `ps`; returns the other words. Exits as
    argparse does when a flag has no value."""
    parser = argparse.ArgumentParser(prog="arealite serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--api-key", dest=API_KEY_VARIABLE)
    parser.add_argument("--admin-api-key", dest=ADMIN_KEY_VARIABLE)
    given, others = parser.parse_known_args(words)
    for variable, key in vars(given).items():
        if key:
            os.environ[variable] = key
            _hide(key)
    return others


def _hide(secret: str) -> None:
    """Overwrite `secret` where the kernel shows this process's command line; fields 48 and 49 of proc(5)'s stat say
    where that lies. Nothing happens where there is no such file."""
    with suppress(OSError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        shown = ctypes.string_at(start, end - start)
        for found in re.finditer(re.escape(secret.encode()), shown):
            ctypes.memset(start + found.start(), ord("*"), len(secret))


def is_exposed(host: str) -> bool:
    """Whether other machines may reach who listens on `host`; they may where its name is not found."""
    try:
        places = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return True
    return not all(ipaddress.ip_address(place[4][0]).is_loopback for place in places)
