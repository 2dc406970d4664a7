"""`arealite serve` and `python -m arealite.inference.serve`: load, listen, serve until a signal or a failure."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import torch
from aiohttp import web

from arealite import devices
from arealite.api.errors import ConfigError
from arealite.api.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, Keys, keys_to_env
from arealite.inference.core.batcher import Batcher
from arealite.inference.core.engine import MAX_QUEUED, Engine
from arealite.inference.core.served_model import ServedModel
from arealite.inference.http.routes import ServerSettings, build_app
from arealite.inference.openai.tools import PARSERS
from arealite.inference.reward_server import RewardServer, is_reward_model
from arealite.observe import waits

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
MAX_RUNNING, MAX_RUNNING_GPU = 64, 256
# Of a card's free memory: what the KV cache takes, besides what a step works with; and of that, beside a trainer.
FREE_SHARE, STEP_BYTES, COLOCATED_SHARE = 0.85, 3 << 30, 0.45
DEFAULT_TOKENS_PER_REQUEST = 2048  # sizes the KV cache when --kv-cache-tokens is not given
STOP_LIMIT_S = 5.0  # for the current step to end, and for answers to reach their clients
POLL_S = 0.2  # how often the engine's end is looked for


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; expected at least 1")
    return int(text)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="arealite serve", description="Serve a Hugging Face model to RL clients.")
    add = parser.add_argument
    kv_help = f"tokens of the KV cache; default: {DEFAULT_TOKENS_PER_REQUEST} per sequence, on a GPU what is free"
    prefill_help = "tokens of prompts computed in one step beside running requests; default: 512, on a GPU 8192"
    defaults_help = "what OpenAI calls leave out: from the model's generation_config.json, or OpenAI's values"
    add("--model", required=True, help="a Hugging Face folder or hub id")
    add("--tokenizer-path", help="another folder or hub id, whose tokenizer, template and end token are taken")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=30000, help="port to listen on; 0 takes a free one and prints it")
    add("--dtype", default="bfloat16", choices=sorted(DTYPES), help="compute type")
    add("--context-length", type=count, help="tokens of prompt and answer at most; default: the model's")
    add("--max-running-requests", type=count, help="sequences decoded together; default: 64, on a GPU 256")
    add("--kv-cache-tokens", type=count, help=kv_help)
    add("--chunked-prefill-tokens", type=count, help=prefill_help)
    add("--max-queued-requests", type=count, default=MAX_QUEUED, help="requests that wait; more are refused with 503")
    add("--deterministic", action="store_true", help="results independent of the batch (slower)")
    add("--weight-version", default="0", help="version of the weights loaded at start")
    add("--seed", type=int, default=0, help="seed of requests that bring none")
    add("--served-model-name", help="name in /v1/models; default: --model")
    add("--hold-limit-s", type=float, default=600.0, help="longest hold of a request while paused")
    add("--sampling-defaults", default="model", choices=["model", "openai"], help=defaults_help)
    add("--tool-call-parser", default="auto", choices=PARSERS, help="how the model writes tool calls")
    add("--incremental-streaming-output", action="store_true", help="/generate streams what is new")
    add("--forced-decoding", action="store_true", help="requests may bring the tokens (sampling_params.forced_ids)")
    add("--device", help="cpu, or another kind that PyTorch knows; default: an accelerator where there is one")
    add("--api-key", metavar="KEY", help=f"what requests must show; better by {API_KEY_VARIABLE}")
    add("--admin-api-key", metavar="KEY", help=f"what control calls must show; better by {ADMIN_KEY_VARIABLE}")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; expected 0 to 65535")
    if not 0 < args.hold_limit_s < math.inf:
        parser.error(f"--hold-limit-s is {args.hold_limit_s}; expected a finite number above 0")
    return args


def build_engine(args: argparse.Namespace) -> Engine:
    """The engine, loaded and checked, not started.

    From here on the calling thread computes alone: OpenMP keeps a pool of threads for each thread that ever used one,
    and stops spinning between regions once the pools together have more threads than there are cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = devices.device_of(args.device)
    devices.use(device)
    model = ServedModel.load(
        args.model, DTYPES[args.dtype], device, args.context_length, args.deterministic, args.tokenizer_path
    )
    max_running = args.max_running_requests = args.max_running_requests or (
        MAX_RUNNING_GPU if devices.is_gpu(device) else MAX_RUNNING
    )
    kv_tokens = args.kv_cache_tokens or _kv_cache_tokens(model, max_running)
    try:
        batcher = Batcher(model, max_running, kv_tokens, args.weight_version, args.chunked_prefill_tokens)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"no memory for a KV cache of {kv_tokens} tokens ({error}); lower it by --kv-cache-tokens"
        ) from error
    return Engine(batcher, args.seed, args.max_queued_requests, num_threads)


def _kv_cache_tokens(model: ServedModel, max_running: int) -> int:
    """What the KV cache holds when nobody says. Raises ConfigError: the card has too little free."""
    per_request = min(model.context_length, DEFAULT_TOKENS_PER_REQUEST)
    if model.device.type == "cpu":
        return max(max_running * per_request, model.context_length)
    free = devices.free_bytes(model.device)
    share = COLOCATED_SHARE if os.environ.get("AREALITE_COLOCATED") == "1" else 1.0
    tokens = int((free * FREE_SHARE - STEP_BYTES) * share) // model.kv_bytes_per_token
    if tokens < per_request:
        raise ConfigError(
            f"{free / 2**30:.1f} GiB are free on {model.device} beside the model; {STEP_BYTES >> 30} GiB go to the work"
            f" of a step, and what is left holds {max(0, tokens)} tokens of keys and values: stop what else runs there,"
            " or set --kv-cache-tokens and --chunked-prefill-tokens"
        )
    return min(tokens, max_running * model.context_length)  # of which no more can be used at once


async def listen(
    app: web.Application, host: str, port: int, is_over: Callable[[], bool], stop: Callable[[], None]
) -> None:
    """Serve until SIGTERM, SIGINT or `is_over`; then `stop`, in a thread, and let the last answers out.

    Consumes: signals, the end of what is served.
    Waits for: either of them, looking every POLL_S.
    Unblocked by: the operating system's signal, or `is_over`.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=STOP_LIMIT_S)
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=1024)
    try:
        await site.start()
    except OSError as error:
        stop()
        await runner.cleanup()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another --port, or 0 for a free one"
        ) from error
    bound_host, bound_port = runner.addresses[0][:2]
    print(f"listening on http://{f'[{bound_host}]' if ':' in bound_host else bound_host}:{bound_port}", flush=True)
    while not stopping.is_set() and not is_over():
        await asyncio.sleep(POLL_S)
    await asyncio.to_thread(stop)
    await runner.cleanup()  # lets the answers of ended requests out


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 after a signal, 1 after a failure, 2 for a model, a port or keys that cannot be
    served."""
    args = parse_arguments(keys_to_env(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    waits.configure_from_env()
    try:
        keys = Keys.for_host(args.host)
        if is_reward_model(args.model):
            place = DTYPES[args.dtype], devices.device_of(args.device)
            app = RewardServer(args.model, *place, args.context_length, args.tokenizer_path, keys).app()
            asyncio.run(listen(app, args.host, args.port, lambda: False, lambda: None))
            return 0
        engine = build_engine(args)
        engine.start()
        settings = ServerSettings(
            args.served_model_name or args.model,
            vars(args),
            hold_limit_s=args.hold_limit_s,
            incremental_streaming=args.incremental_streaming_output,
            tool_call_parser=args.tool_call_parser,
            model_defaults=args.sampling_defaults == "model",
            keys=keys,
            forced_decoding=args.forced_decoding,
        )
        app = build_app(engine, settings)
        asyncio.run(listen(app, args.host, args.port, engine.stopped.is_set, partial(engine.stop, STOP_LIMIT_S)))
        return 1 if engine.failure else 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        waits.shut_down()


if __name__ == "__main__":
    sys.exit(main())
