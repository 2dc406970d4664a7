"""What the tests of the inference server share: tiny models, a byte tokenizer, a server on a real socket, a client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from arealite.inference.core.batcher import Batcher
from arealite.inference.core.engine import Engine
from arealite.inference.core.served_model import ServedModel
from arealite.inference.http.routes import ServerSettings, build_app

VOCAB = 260  # 256 bytes, then pad, bos, eos and one unused
EOS = 258
WAIT_S = 60


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None,
}  # fmt: skip


def save_random(config: Any, folder: Path, factor: float = 4, seed: int = 0) -> Path:
    """A random model with so much larger matrices, so that logits differ and attention looks at few tokens."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path, seed: int = 0, tied: bool = True, context: int = 512, **changes: Any) -> Path:
    """A random two-layer Llama over bytes, with its tokenizer."""
    special = {"pad_token_id": 256, "bos_token_id": 257, "max_position_embeddings": context}
    save_random(LlamaConfig(**SMALL | special | {"tie_word_embeddings": tied} | changes), folder, 5, seed)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i of the byte-level alphabet, in sorted order; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: i for i, symbol in enumerate(alphabet)}
    words.update({"<pad>": 256, "<bos>": 257, "<eos>": EOS})
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def served(folder: Path, dtype: torch.dtype = torch.float32, deterministic: bool = False) -> ServedModel:
    return ServedModel.load(str(folder), dtype, torch.device("cpu"), None, deterministic)


def plain_logprobs(model: Any, tokens: Any, temperature: float = 1.0) -> torch.Tensor:
    """float32 [n - 1]: log p(token t | tokens < t) for t >= 1, by one pass of a Hugging Face model over the whole."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens)[None]).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.as_tensor(tokens)[1:, None])[:, 0]


class LocalServer:
    """The server in this process, on a real socket, its event loop in a thread of its own."""

    def __init__(self, model: ServedModel, max_running=8, kv_tokens=2048, hold_limit_s=WAIT_S, **settings) -> None:
        self.engine = Engine(Batcher(model, max_running, kv_tokens, "0"), seed=0)
        self.batcher = self.engine.batcher
        self.step_delay_s = 0.0  # a test that acts on a running request slows the engine down meanwhile
        self._plain_step = self.batcher.step
        self.batcher.step = self._slow_step  # type: ignore[method-assign]
        self._settings = ServerSettings("tiny", {}, hold_limit_s=hold_limit_s, **settings)
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.pool = ThreadPoolExecutor(32)
        self.engine.start()
        self._thread.start()
        assert self._ready.wait(WAIT_S)

    def _slow_step(self) -> None:
        time.sleep(self.step_delay_s)
        self._plain_step()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            self._runner = web.AppRunner(
                build_app(self.engine, self._settings), handler_cancellation=True, shutdown_timeout=1.0
            )
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    def close(self) -> None:
        self.engine.stop(WAIT_S)
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()
        self.pool.shutdown()

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str) -> tuple[int, Any]:
        return fetch(self.url + path, None)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return fetch(self.url + path, body)

    def generate(self, input_ids: Any, logprobs: bool = True, top: dict[str, Any] | None = None, **params: Any) -> Any:
        """One request that must succeed; keyword arguments are sampling parameters."""
        body = {"input_ids": input_ids, "sampling_params": params, "return_logprob": logprobs, **(top or {})}
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        return answer

    def generate_batch(self, bodies: list[dict[str, Any]]) -> Any:
        """The same in one call, so that all requests reach the engine together."""
        prompts, params = zip(*((body["input_ids"], body["sampling_params"]) for body in bodies), strict=True)
        status, answers = self.post(
            "/generate", {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
        )
        assert status == 200, answers
        return answers

    def generate_many(self, bodies: list[dict[str, Any]]) -> list[Any]:
        """All at once, each over its own connection; answers in order."""
        futures = [self.pool.submit(self.post, "/generate", {"return_logprob": True, **body}) for body in bodies]
        answers = [future.result(WAIT_S) for future in futures]
        assert all(status == 200 for status, _ in answers), answers
        return [answer for _, answer in answers]


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.002)


def fetch(url: str, body: Any) -> tuple[int, Any]:
    """Status and parsed body; `body` None is GET, bytes are sent as they are, anything else as JSON."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=raw, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content) if content else None
    except ValueError:
        return status, content.decode()


def output_logprobs(answer: Any) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def greedy(server: LocalServer, num_tokens: int = 10) -> tuple[list[int], list[float]]:
    """Tokens and logprobs that follow a fixed prompt."""
    answer = server.generate(list(range(20)), max_new_tokens=num_tokens, temperature=0)
    return answer["output_ids"], output_logprobs(answer)


def version(server: LocalServer) -> str:
    return str(server.get("/model_info")[1]["weight_version"])
