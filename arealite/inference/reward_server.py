"""Serves a reward model: POST /classify gives the score of each text. `arealite serve` comes here when the model folder
has such a model (one label at the end of a sequence), and so reward/judges.py gets its numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch
from aiohttp import web
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from arealite.api.errors import ConfigError, RequestError
from arealite.api.keys import Keys
from arealite.inference.core.engine import EngineFailure
from arealite.inference.http.bodies import read_json
from arealite.inference.http.routes import Access, answer_errors
from arealite.models.folder import open_config, open_tokenizer

MAX_BODY_BYTES = 64 << 20
MAX_BATCH_TOKENS = 8192  # of one forward pass, padding included


def is_reward_model(path: str) -> bool:
    """Whether the folder has a model with one label per sequence. Raises ConfigError: it has several, or is none."""
    config = open_config(path)
    if not any(str(name).endswith("ForSequenceClassification") for name in config.architectures or []):
        return False
    if config.num_labels != 1:
        raise ConfigError(f"{path} has {config.num_labels} labels; a reward model that can be served has one")
    return True


@dataclass(frozen=True)
class Scored:
    """A sequence that waits for its score."""

    tokens: list[int]
    result: asyncio.Future[float]


class RewardServer:
    """Owns the model; one forward pass at a time over whatever waits, the shortest sequences together."""

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        device: torch.device,
        context_length: int | None,
        tokenizer_path: str | None,
        keys: Keys,
    ) -> None:
        self.name, self.tokenizer = path, open_tokenizer(tokenizer_path or path)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
        self._model = model.to(device).eval()
        self._max_tokens = min(
            context_length or model.config.max_position_embeddings, model.config.max_position_embeddings
        )
        self._waiting: list[Scored] = []
        self._arrived = asyncio.Event()
        self._num_scored, self._started = 0, time.time()
        self._access = Access(keys)
        self.failure = ""

    def app(self) -> web.Application:
        middlewares = [answer_errors, self._access.check]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)  # type: ignore[arg-type]
        app.cleanup_ctx.append(self._scoring)
        app.add_routes([
            web.post("/classify", self.classify), web.get("/health", self.health), web.get("/model_info", self.about)
        ])  # fmt: skip
        return app

    async def classify(self, request: web.Request) -> web.Response:
        """{"input": text | [text] | [ids] | [[ids]]} -> {"data": [{"index", "probs": [score]}]}: the score as it is."""
        rows = self._rows((await read_json(request)).get("input"))
        loop = asyncio.get_running_loop()
        waiting = [Scored(tokens, loop.create_future()) for tokens in rows]
        self._waiting += waiting
        self._arrived.set()
        scores = await asyncio.gather(*(row.result for row in waiting))
        entries = [
            {"index": i, "label": "LABEL_0", "probs": [score], "num_classes": 1} for i, score in enumerate(scores)
        ]
        return web.json_response({"object": "list", "model": self.name, "data": entries})

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"failure": self.failure}, status=503 if self.failure else 200)

    async def about(self, request: web.Request) -> web.Response:
        return web.json_response({
            "model_path": self.name, "is_generation": False, "max_tokens": self._max_tokens,
            "num_scored": self._num_scored, "num_waiting": len(self._waiting), "up_s": time.time() - self._started,
            "num_unauthorized": self._access.num_refused,
        })  # fmt: skip

    def _rows(self, given: Any) -> list[list[int]]:
        """Token ids of each sequence of a request. Raises RequestError."""
        is_one = isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int)
        rows = [given] if is_one else given
        if not isinstance(rows, list) or not rows:
            raise RequestError("input: expected a text, a list of token ids, or a list of these")
        size = self._model.config.vocab_size
        tokenised = []
        for i, row in enumerate(rows):
            # As the trainer does it: a rendered conversation brings its special tokens along.
            tokens = self.tokenizer(row, add_special_tokens=False)["input_ids"] if isinstance(row, str) else row
            if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < size for t in tokens):
                raise RequestError(f"input[{i}]: expected a text, or token ids from 0 to {size - 1}")
            if not 0 < len(tokens) <= self._max_tokens:
                raise RequestError(f"input[{i}] has {len(tokens)} tokens; expected 1 to {self._max_tokens}")
            tokenised.append(tokens)
        return tokenised

    async def _scoring(self, app: web.Application) -> AsyncIterator[None]:
        worker = asyncio.create_task(self._score_all())
        yield
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    async def _score_all(self) -> None:
        """Waits for: sequences. Unblocked by: `classify`, or the end of the server."""
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                scores = await asyncio.to_thread(self._scores, [row.tokens for row in batch])
            except Exception as error:  # out of memory, say: the callers hear of it, and /health tells
                self.failure = f"{type(error).__name__}: {error}"
                for row in batch:
                    if not row.result.done():  # its client may have gone
                        row.result.set_exception(EngineFailure(self.failure))
                continue
            for row, score in zip(batch, scores, strict=True):
                if not row.result.done():
                    row.result.set_result(score)
            self.failure, self._num_scored = "", self._num_scored + len(scores)

    def _next_batch(self) -> list[Scored]:
        """The oldest sequence, and those nearest to it in length that fit beside it."""
        self._waiting = [row for row in self._waiting if not row.result.done()]
        if not self._waiting:
            return []
        first = len(self._waiting[0].tokens)
        batch: list[Scored] = []
        for row in sorted(self._waiting, key=lambda row: abs(len(row.tokens) - first)):
            longest = max(len(r.tokens) for r in [*batch, row])
            if batch and longest * (len(batch) + 1) > MAX_BATCH_TOKENS:
                break
            batch.append(row)
        chosen = set(map(id, batch))
        self._waiting = [row for row in self._waiting if id(row) not in chosen]
        return batch

    @torch.inference_mode()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        """The last token's value of each row, in float32 as the trainer's (engine/packed_model.py)."""
        longest = max(map(len, rows))
        device = self._model.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        hidden = self._model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), lengths - 1].float()
        head = self._model.score
        scores: list[float] = functional.linear(last, head.weight.float(), head.bias)[:, 0].tolist()
        if not all(score == score and abs(score) < float("inf") for score in scores):
            raise FloatingPointError(f"the model's scores are not finite: {scores[:8]}")
        return scores
