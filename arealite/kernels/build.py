"""Which instruction set this machine's CPU kernels use, and the library compiled for it. No torch: for commands too.

Called by cpu.py, and by whoever says what a run will compute with. The library is compiled at its first use, once per
machine; where there is no compiler, PyTorch computes instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from arealite.api.errors import ConfigError
from arealite.api.paths import cache_root

SOURCE = Path(__file__).with_name("cpu.c")
VARIABLE = "AREALITE_KERNELS"
OFF = "off"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
COMPILE_LIMIT_S = 120.0
_X86 = ("x86_64", "AMD64")
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_NO_AMX, _NO_BF16 = "-U__AMX_BF16__", "-U__AVX512BF16__"
# The fastest first: what the CPU must have (by the names of /proc/cpuinfo), and what the compiler is told.
INSTRUCTION_SETS: dict[str, tuple[set[str], list[str]]] = {
    "amx": ({*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"}, ["-mamx-tile", "-mamx-bf16"]),
    "avx512_bf16": ({*_AVX512, "avx512_bf16"}, [_NO_AMX]),
    "avx512": (_AVX512, [_NO_AMX, _NO_BF16]),
    "plain": (set(), [_NO_AMX, _NO_BF16, *(["-mno-avx512f"] if platform.machine() in _X86 else [])]),
}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU says that it has; nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def available() -> list[str]:
    """Instruction sets of this CPU, the fastest first."""
    return [name for name, (needed, _) in INSTRUCTION_SETS.items() if needed <= cpu_flags()]


def wanted() -> list[str]:
    """What to try, in this order; AREALITE_KERNELS names one, or is `off`.

    Raises:
        ConfigError: it names none, or one that this CPU lacks.
    """
    word = os.environ.get(VARIABLE, "")
    if not word:
        return available()
    if word == OFF:
        return []
    if word not in available():
        kind = "this CPU does not have it" if word in INSTRUCTION_SETS else "there is no such instruction set"
        raise ConfigError(f"{VARIABLE}={word}: {kind}; here it may be {', '.join([*available(), OFF])}")
    return [word]


def has_bf16_products() -> bool:
    """Whether PyTorch multiplies bf16 on this CPU by instructions for it, and not element by element."""
    limits = {os.environ.get(name, "").upper() for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")}
    return "avx512_bf16" in cpu_flags() and not limits & _WITHOUT_BF16


@functools.cache
def library() -> tuple[str, Path | None, str]:
    """Instruction set, its compiled library, and why it is not a faster one; `off` and None where PyTorch computes.

    Raises:
        ConfigError: as `wanted`.
    """
    names = wanted()
    reasons = [] if names else [f"{VARIABLE}={OFF}"]
    for name in names:
        try:
            path = _compiled(name)
            if not ctypes.CDLL(str(path)).is_allowed():
                raise OSError("the operating system does not let processes use it")
            return name, path, "; ".join(reasons)
        except (OSError, subprocess.SubprocessError) as error:  # also where the cache's libraries may not be loaded
            reasons.append(f"{name}: {error}")
    return OFF, None, "; ".join(reasons)


def description() -> str:
    """What computes bf16 on this machine's CPU, in a line. Compiles the kernels if nobody has."""
    name, path, reason = library()
    kind = f"compiled kernels, {name}" if path is not None else "PyTorch, without compiled kernels"
    return kind + (f" ({reason})" if reason else "")


def expectation() -> str:
    """The same before anything is compiled. Raises ConfigError as `wanted`."""
    names = wanted()
    if not names:
        return f"PyTorch, without compiled kernels ({VARIABLE}={OFF})"
    if _compiler() is None:
        return "PyTorch, without compiled kernels (no C compiler: install one, and bf16 is several times faster)"
    return f"compiled kernels, {names[0]} ({VARIABLE} may be {', '.join([*available(), OFF])})"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


def _compiled(name: str) -> Path:
    """Raises OSError or SubprocessError: it cannot be had."""
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler (cc, or what CC names)")
    flags = [*FLAGS, *INSTRUCTION_SETS[name][1]]
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_LIMIT_S, check=True).stdout
    parts = [SOURCE.read_bytes(), version, " ".join(sorted(cpu_flags())).encode(), " ".join(flags).encode()]
    built_before = cache_root() / "kernels" / f"{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:24]}.so"
    if not built_before.exists():
        built_before.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built_before.parent) as folder:  # others may compile: the last rename wins
            built = Path(folder) / built_before.name
            compile_library(compiler, flags, built)
            built.replace(built_before)
    return built_before


def compile_library(compiler: str, flags: list[str], target: Path) -> None:
    """Raises OSError with what the compiler said."""
    command = [compiler, *flags, str(SOURCE), "-o", str(target), "-lm"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
    if ran.returncode:
        raise OSError(f"{compiler} could not compile {SOURCE.name}: {ran.stderr[-500:]}")
