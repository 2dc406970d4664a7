"""Architectures that are accepted compute what plain Hugging Face does; others are refused with the reason."""

import re

import pytest
import torch
from test_engine_loading import EXPERTS, SIZES
from transformers import CONFIG_MAPPING, AutoConfig

from arealite.api.errors import ConfigError
from arealite.engine.packed_model import LANGUAGE, REWARD, VALUE, load_model
from arealite.inference.core.served_model import check_architecture

WINDOW = {"sliding_window": 64}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
RIGHT = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": EXPERTS, "mixtral": {"num_local_experts": 3}, "mistral": WINDOW,
    "gemma3_text": WINDOW, "smollm3": {}, "olmo2": {}, "phi3": {}, "granite": {}, "starcoder2": {},
}  # fmt: skip
WRONG = {
    "minicpm3": (LATENT | {"v_head_dim": 16, "dim_model_base": 8}, "logits are not .*logits_scaling"),
    "granite": ({"logits_scaling": 8.0}, "logits are not .*logits_scaling 8.0"),
    "cohere": ({}, "logits are not .*logit_scale 0.0625"),
    "phi": ({}, "logits are not .*lm_head.bias"),
    "doge": ({}, "even alone a sequence gets other scores"),
    "phimoe": (WINDOW | {"num_local_experts": 2}, "gets other scores"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "beside others|standard attention"),
    "minimax_m3_vl_text": ({"layer_types": ["full_attention", "minimax_m3_sparse"]}, "other scores|fails there"),
    "falcon": ({}, "do not use transformers' attention interface"),
    "gpt_neo": ({"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "do not use transformers' attention"),
    "mamba": ({}, "do not use transformers' attention|max_position_embeddings"),
    "llama4_text": ({}, "no last hidden states"),
    "deepseek_v3": (LATENT | {"v_head_dim": 8, "n_routed_experts": 8, "n_group": 2}, "fails there|one shape"),
}  # fmt: skip

HEADS = {"trainer": LANGUAGE, "critic": VALUE, "reward": REWARD}


def save_config(folder, kind, changes) -> str:
    default = CONFIG_MAPPING[kind]()
    small = {name: size for name, size in SIZES.items() if name in {*vars(default), *default.attribute_map}}
    AutoConfig.for_model(kind, **small | {"pad_token_id": None} | changes).save_pretrained(folder)
    return str(folder)


def open_as(who: str, folder: str) -> None:
    """What trainer, critic or server find out about a folder before they read weights."""
    if who in HEADS:
        load_model(folder, HEADS[who])
    else:
        check_architecture(AutoConfig.from_pretrained(folder), folder, None, False, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("who", [*HEADS, "server"])
def test_right_architectures_are_accepted(tmp_path, who):
    for kind, changes in RIGHT.items():
        if who not in ("critic", "reward") or kind in ("llama", "qwen3", "mistral"):
            open_as(who, save_config(tmp_path / kind, kind, changes))


@pytest.mark.parametrize("who", ["trainer", "server"])
def test_others_are_refused_with_the_reason(tmp_path, who):
    for kind, (changes, reason) in WRONG.items():
        if (who, kind) == ("server", "phi"):
            continue  # which serves heads with a bias
        with pytest.raises(ConfigError) as refused:
            open_as(who, save_config(tmp_path / kind, kind, changes))
        assert re.search(reason, str(refused.value)) and "Traceback" not in str(refused.value), (kind, refused.value)
