"""Compiles every Triton kernel for NVIDIA GPUs, on any machine that has triton: registers, shared memory, spills.

python benchmarks/gpu_compile.py [--targets 80 90]

Types, strides and launch options are those of the calls of a model of Qwen2.5-1.5B's shape, and of decode with heads of
64 and 256. The last line is one JSON object; the exit status is 1 if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from arealite.kernels import gpu, gpu_programs
from arealite.kernels.cpu import Scores

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1",
}  # fmt: skip


class Recorder:
    """Stands in for a program, and keeps the arguments of its calls."""

    def __init__(self, program: Any, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.program, self.calls = program, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.calls.append((self.program, args, options))


def calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What a model launches: programs with their arguments, tensors without memory."""
    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    found = {name: program for name, program in vars(gpu_programs).items() if isinstance(program, JITFunction)}
    gpu.programs = SimpleNamespace(**{name: Recorder(program, made) for name, program in found.items()})

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    lib, rows, vocab = gpu.GpuKernels(torch.device("meta")), 8192, 151936
    for x in (tensor(1, rows, 1536), tensor(1, rows, 12, 128), tensor(1, rows, 8192)):
        for plus_one in (False, True):
            weight = tensor(x.shape[-1])
            lib.rms_norm(x, weight, 1e-6, plus_one)
            lib.add_rms_norm(x, x, weight, 1e-6, plus_one)
            lib.rms_norm_grad(x, weight, x, 1e-6, plus_one)
    wide = tensor(1, rows, 8960)
    lib.silu_times(wide, wide)
    lib.silu_times_grad(wide, wide, wide)
    x, angles = tensor(1, rows, 12, 128).transpose(1, 2), tensor(1, rows, 128)
    lib.rotate(x, angles, angles, x)
    lib.rotate(x, angles, angles, x, back=True)
    numbers = tensor(rows, dtype=torch.float32)
    scores = Scores(*[tensor(rows, dtype=torch.int64)] * 2, *[numbers] * 5)
    for dtype in (torch.bfloat16, torch.float32):
        logits = tensor(1024, vocab, dtype=dtype)
        lib.score(logits, 0, scores, 1.0)
        lib.score_grad(logits, 0, scores, 1.0, tensor(1024, vocab))
        lib.sample(logits, numbers, tensor(1024, dtype=torch.float64))
    for heads, kv_heads, dim in ((12, 2, 128), (9, 3, 64), (32, 4, 96), (8, 4, 256), (32, 1, 128)):
        q, k, v = tensor(64, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
        pool, tables, lens = tensor(2, kv_heads, 9000, 16, dim), *(tensor(64, n, dtype=torch.int32) for n in (256, 1))
        for window in (0, 4096):
            lib.decode(q, k, v, pool, tables, lens[:, 0], window, 0.1, 4096)
    return made


def compiled(program: Any, args: tuple[Any, ...], options: dict[str, Any], target: int) -> dict[str, Any]:
    """The kernel that such a call would compile, by the rules by which Triton specialises on arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = dict(zip(program.arg_names, args, strict=False)) | options
    for place, parameter in enumerate(program.params):
        value = values.pop(parameter.name)
        is_special = not parameter.do_not_specialize
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is None or parameter.is_constexpr or (is_whole and value == 1 and is_special):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
        is_aligned = is_whole and value % 16 == 0 and is_special and not parameter.is_constexpr
        if isinstance(value, torch.Tensor) or is_aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(program, signature, constants, attributes), target=GPUTarget("cuda", target, 32), options=values
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return {
        "kernel": program.__name__,
        "target": target,
        "warps": built.metadata.num_warps,
        "registers": registers,
        "shared_bytes": built.metadata.shared,
        "spilled_bytes": stack + local,
        "settings": {k: v for k, v in constants.items() if k.isupper()},
        "types": sorted({kind for kind in signature.values() if kind.startswith("*")}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90], help="compute capabilities, times 10")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for program, given, options in calls():
        for target in args.targets:
            row = compiled(program, given, options, target)
            if row not in found:
                found.append(row)
                words = " ".join(f"{key}={value}" for key, value in row["settings"].items())
                print(
                    f"{row['kernel']:16} sm_{target} {row['warps']} warps {row['registers']:4} registers"
                    f" {row['shared_bytes']:7} B shared {row['spilled_bytes']:5} B spilled  {words}",
                    flush=True,
                )
    print(json.dumps({"triton": triton.__version__, "kernels": found}))
    return int(any(row["spilled_bytes"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
