"""Which causal language models of the installed transformers are trained and served: each tried as at load, on the
default configuration of its class.

    python benchmarks/architectures.py [KIND ...]

Prints a line per architecture and side: accepted, or the reason of the refusal. Anything but a ConfigError is a fault,
and ends the script with exit code 1. All of them take some minutes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import traceback

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from arealite.api.errors import ConfigError
from arealite.engine.packed_model import load_model
from arealite.inference.core.served_model import ServedModel

# What the defaults of a class lack, or leave out of what its released models have.
CHANGES = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "phimoe": {"sliding_window": 4096},
}


def trial(side: str, folder: str) -> str:
    """accepted, or why not."""
    try:
        if side == "trainer":
            load_model(folder)
        else:
            ServedModel.load(folder, torch.float32, torch.device("cpu"), None, False)
    except ConfigError as error:
        told = str(error).replace(folder, "it")
        # The server goes on to the weights, which there are none of, only where it accepts the architecture.
        return "accepted" if "cannot be loaded as a causal language model" in told else f"refused: {told}"
    return "accepted"


def main(kinds: list[str]) -> int:
    logging.disable(logging.WARNING)
    faults = 0
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                CONFIG_MAPPING[kind](**CHANGES.get(kind, {})).save_pretrained(folder)
            except ValueError as error:
                print(f"{kind}: no default configuration ({error})", flush=True)
                continue
            for side in ("trainer", "server"):
                started = time.perf_counter()
                try:
                    told = trial(side, folder)
                except Exception:  # a fault is counted, and the others are tried
                    told, faults = f"FAULT\n{traceback.format_exc()}", faults + 1
                print(f"{kind} {side} {time.perf_counter() - started:.2f} s {told}", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Try architectures as trainer and server do at load.")
    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help="model_type of a config.json; all that there are if none"
    )
    given = parser.parse_args().kinds
    if unknown := sorted({*given} - {*kinds}):
        parser.error(f"transformers has no causal language model of kind {', '.join(unknown)}")
    sys.exit(main(given or kinds))
