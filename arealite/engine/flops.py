"""How much arithmetic an update is, and what share of the machine's peak that uses (MFU). Called by the engines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from arealite.devices import is_gpu, name_of
from arealite.engine.micro_batch import MicroBatch
from arealite.kernels.functions import matmul

# Dense bfloat16 peaks in FLOP/s, from the makers' sheets; the first name that occurs in torch's device name counts.
BF16_PEAKS = {
    "B300": 2250e12, "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 5090": 209e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}  # fmt: skip
MEASURED_SIZE = 1536  # of square matrices on the CPU: large enough for its full rate, 10 to 100 ms per product and core


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward and backward pass over a micro-batch, what is computed twice to save memory counted once.

    6 per weight and computed token (2 forward, 2 for the gradient of the input, 2 for that of the weight; a frozen
    weight has 4), the head's at predicting tokens only; 12 per attention head's width and pair of a query and a key it
    sees. What a prefix tree shares is computed, and counted, once; of experts those that a token goes to.
    """

    per_token: float
    per_row: float
    per_pair: float  # and layer
    windows: tuple[int | None, ...]  # of each layer: how many keys a query sees at most

    @classmethod
    def of(cls, model: Any) -> ModelFlops:
        """Of a whole transformers causal language model, before it is spread over ranks."""
        config = model.config.get_text_config()
        settings = config.to_dict()
        experts = settings.get("num_experts") or settings.get("num_local_experts") or 1  # by family
        active = settings.get("num_experts_per_tok") or 1
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # a critic has no such head
        head_weight = None if head is None else head.weight
        per_token = per_row = 0.0
        for name, p in model.named_parameters():
            each = p.numel() * (6 if p.requires_grad else 4)
            if p is head_weight:
                per_row += each
            elif p.ndim > 1 and p is not embedding.weight:
                per_token += each * (active / experts if ".experts." in name else 1)
        width = settings.get("head_dim") or config.hidden_size // config.num_attention_heads
        kinds = settings.get("layer_types") or ["full_attention"] * config.num_hidden_layers
        windows = tuple(settings.get("sliding_window") if kind == "sliding_attention" else None for kind in kinds)
        return cls(per_token, per_row, 12.0 * config.num_attention_heads * width, windows)

    def count(self, micro: MicroBatch) -> float:
        """Of one micro-batch: S nodes, R predicting ones."""
        seen = micro.layout.tree.depth + 1
        by_window = {w: float((seen if w is None else seen.clip(max=w)).sum()) for w in set(self.windows)}
        pairs = sum(by_window[w] for w in self.windows)
        return len(seen) * self.per_token + len(micro.predicting) * self.per_row + pairs * self.per_pair


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device can do at best in `dtype`: of GPUs by their name, of the CPU (this process's threads)
    measured once, in a fraction of a second. None: unknown."""
    if is_gpu(device):
        name = name_of(device)
        return next((p for key, p in BF16_PEAKS.items() if key in name), None) if dtype == torch.bfloat16 else None
    square = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=dtype)
    times_s = []
    for _ in range(4):  # the first one prepares the kernel
        start = time.perf_counter()
        matmul(square, square)
        times_s.append(time.perf_counter() - start)
    return 2 * MEASURED_SIZE**3 / min(times_s)
