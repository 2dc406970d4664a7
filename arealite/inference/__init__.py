"""The built-in inference server ("native"): the trainer's Hugging Face modelling code behind SGLang's wire."""

import os

# libgomp reads these when torch is loaded. A step has about two hundred parallel regions: a thread that slept between
# them would be woken as often, one that spins without bound would keep the core from everybody else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
