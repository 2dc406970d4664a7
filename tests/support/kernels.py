"""The compiled kernels for every instruction set: native where this CPU has it, else emulated in plain C."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from arealite.kernels import build, cpu
from arealite.kernels.cpu import Kernels

KINDS = list(build.INSTRUCTION_SETS)
EMULATED = {"avx512": [], "avx512_bf16": ["-DEMULATE_BF16"], "amx": ["-DEMULATE_BF16", "-DEMULATE_AMX"]}

needs_kernels = pytest.mark.skipif(cpu.load() is None, reason=f"no compiled kernels here: {build.description()}")


def each_kind(test: Any, kinds: list[str] = KINDS) -> Any:
    """The test with the kernels of each instruction set, which it compiles; a lesser CPU has the plain ones alone."""
    marked = [pytest.param(kind, marks=[] if kind == "plain" else pytest.mark.any_cpu) for kind in kinds]
    return pytest.mark.parametrize("lib", marked, indirect=True)(test)


def each_vector_kind(test: Any) -> Any:
    return each_kind(test, [kind for kind in KINDS if kind != "amx"])  # which has tiles


def kernels_for(kind: str | None) -> Kernels:
    """Those of an instruction set, or those that this process uses; skips the test where they cannot be had."""
    found = cpu.load() if kind is None else _kernels(kind)
    if found is None:
        pytest.skip(f"{kind or 'kernels'} not tested: no compiler for it here")
    return found


@functools.cache
def _kernels(kind: str) -> Kernels | None:
    compiler = shutil.which("gcc") if kind in EMULATED and kind not in build.available() else shutil.which("cc")
    if compiler is None:
        return None
    flags = [*build.FLAGS, *build.INSTRUCTION_SETS[kind][1]]
    if kind not in build.available():
        header = str(Path(__file__).with_name("emulated_cpu.h"))
        flags = [*build.FLAGS, "-O1", "-mno-avx512f", "-w", "-include", header, *EMULATED[kind]]
    target = Path(tempfile.mkdtemp(prefix="kernels")) / f"{kind}.so"
    try:
        build.compile_library(compiler, flags, target)
        return Kernels(target, kind)
    except OSError:
        return None
    finally:
        shutil.rmtree(target.parent)


def model_of(config: Any, num_layers: int = 2, heads: int = 4, **options: Any) -> Any:
    """A small random model, always the same; `config`: the class of its configuration."""
    sizes = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    sizes |= {"num_hidden_layers": num_layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**sizes), **options)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
