"""What each process of forks.py would import, build and measure again."""

import psutil  # noqa: F401
import torch
import torch.distributed.tensor
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import arealite.engine.ppo.actor
import arealite.inference.serve  # noqa: F401
from arealite.engine.flops import peak_flops

torch.set_num_threads(1)
get_checkpoint_conversion_mapping("llama")
peak_flops(torch.device("cpu"), torch.float32)
