"""Compiled kernels for CPUs: products, attention, norms, rotary embedding, gated units, logprobs, sampling."""
