"""Episodes of several turns without a server: an engine that says what a script says, in a real tokenizer's tokens."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import defaultdict

from arealite.api.cli_args import GenerationHyperparameters
from arealite.api.types import Completion, Task

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]


class ScriptedEngine:
    """Says the next of its member's texts to each request; a text may be an exception, which is raised instead."""

    context_length = None

    def __init__(self, tokenizer, *members):
        self.tokenizer, self.left = tokenizer, [list(texts) for texts in members]
        self.prompts = defaultdict(list)  # of each member, as text
        self.sampled = defaultdict(list)

    async def agenerate(self, request, on_tokens=None):
        member = int(request.group_id.rpartition(".")[2])
        self.prompts[member].append(self.tokenizer.decode(request.input_ids))
        await asyncio.sleep(0)
        said = self.left[member].pop(0)
        if isinstance(said, Exception):
            raise said
        ids = [*self.tokenizer.encode(said, add_special_tokens=False), self.tokenizer.eos_token_id]
        self.sampled[member] += ids
        return Completion(ids, [-0.25] * len(ids), [7] * len(ids), "stop", ids[-1], server_id="server-0")


def sampling(num_members, **changes):
    return GenerationHyperparameters(n_samples=num_members, **{"max_new_tokens": 64, **changes})


def episode(workflow, engine, **task):
    """The trajectories of one task."""
    return asyncio.run(workflow.arun_episode(engine, Task("e0-r5", **{"messages": CHAT, **task})))


def listening(port, limit_s=30.0):
    """Returns when a server does."""
    end = time.monotonic() + limit_s
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "no server"
            time.sleep(0.05)
