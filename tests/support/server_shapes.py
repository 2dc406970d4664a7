"""Run in a process of its own, which has an accelerator without numbers from then on: the built-in server's steps,
prompts, decode and sampler. Prints one line of JSON: what was drawn, and what is found when tensors stay on the CPU."""

import json
import os
import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from arealite.inference.core import batcher, layout, sampler, served_model
from arealite.inference.core.requests import GenerateRequest, SamplingParams
from arealite.inference.core.sequence import Sequence
from arealite.kernels.functions import use_kernels
from arealite.prove.dry_run import KIND, ShapeKernels, Shapes, accelerator

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
TOKEN = 7  # what is drawn, since nothing has numbers


class ServerShapes(ShapeKernels):
    """What the server asks of kernels.gpu.GpuKernels besides: shapes of results, of operands on one device alone."""

    def __init__(self, device):
        self.device, self.num_decoded = device, 0

    def add_rms_norm(self, x, added, weight, eps, plus_one):
        return x + added, self.rms_norm(x + added, weight, eps, plus_one)

    def rotate(self, x, cos, sin, out, back=False):
        self._check(x, cos, sin, out)

    def decode(self, q, k, v, pool_layer, tables, lens, window, scale, max_keys):
        self._check(q, k, v, pool_layer, tables, lens)
        self.num_decoded += len(q)
        assert tables.dtype == lens.dtype == torch.int32 and len(q) == len(tables) == len(lens)
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def sample(self, logits, temperature, uniform):
        self._check(logits, temperature, uniform)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        return tokens, torch.empty_like(temperature), torch.empty_like(tokens, dtype=torch.bool)

    def _check(self, *operands):
        kinds = {x.device.type for x in operands}
        assert kinds == {KIND}, f"operands on {sorted(kinds)}"


def on_cpu(arrays, _):
    return [torch.from_numpy(array) for array in arrays]


def read(packed, restricted):
    """As sampler.read_drawn, of a tensor that came from the device."""
    num = packed.shape[1]
    assert packed.shape[0] == 4 and packed.device.type == "cpu"
    return sampler.Sampled([TOKEN] * num, [-1.0] * num, [True] * num, dict.fromkeys(restricted, 0.0))


def small_model():
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=layout.ATTENTION_NAME)


def served(module):
    """Its parameters come to the accelerator."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, x in ((name, x) for name, x in own.items() if x is not None):
                there = torch.empty(x.shape, dtype=x.dtype, device=torch.device(KIND, 0))
                own[name] = torch.nn.Parameter(there) if own is part._parameters else there
    return served_model.ServedModel(module.requires_grad_(False), None, "small")


def answers(model, *patches):
    """The tokens of three requests: greedy, sampled and restricted; the third one joins while the others run."""
    with ExitStack() as stack:
        for module in (sampler, batcher):
            if hasattr(module, "read_drawn"):
                stack.enter_context(patch.object(module, "read_drawn", read))
        stack.enter_context(torch.inference_mode())
        running = batcher.Batcher(served(model), 4, 1024, "0", step_tokens=32)
        for each in patches:
            stack.enter_context(each)
        params = [SamplingParams(6, temperature=0.0), SamplingParams(6), SamplingParams(4, top_k=5, top_p=0.9)]
        sequences = [Sequence(GenerateRequest(str(i), [3] * (20 + 30 * i), p)) for i, p in enumerate(params)]
        for sequence in sequences[:2]:
            running.add(sequence)
        for step in range(40):
            if step == 3:
                running.add(sequences[2])
            running.step()
        running.catch_up()
        assert running.counters.num_nan_requests == 0
        return [(list(s.tokens[s.num_prompt :]), s.finish_reason) for s in sequences]


def main():
    os.environ["AREALITE_GRAPHS"] = "0"  # no graphs of such work
    device, _ = accelerator()
    kernels = ServerShapes(device)
    use_kernels(KIND, kernels)
    shapes, modules = Shapes(), [small_model() for _ in range(4)]
    with shapes.counting():
        found = {"answers": answers(modules.pop()), "decoded": kernels.num_decoded}
        for name, module in {"places": layout, "inputs": served_model, "sampler": sampler}.items():
            try:
                answers(modules.pop(), patch.object(module, "to_device", on_cpu))
                found[name] = "nothing was found"
            except Exception as error:  # its class depends on torch's release, and on who finds it
                found[name] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
