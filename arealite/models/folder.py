"""A model folder or hub id: what its files say about it, its configuration and tokenizer, or a sentence that says why
there is none. Called by the launcher before a run, and by all that load a model or ask the hub.

No code that a folder brings along is ever run, and nobody is asked whether it should be.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from arealite.api.errors import ConfigError, DatasetError

# What the tests train. Other models run as far as nothing refuses them.
TESTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "mixtral")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_LIMIT_S = 3.0
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)  # transformers raises, of a file
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty when there is none, or it holds something else than a mapping."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def model_fault(path: str) -> str:
    """Why no model can be trained from the folder `path`; empty where no reason can be seen from outside."""
    folder = Path(path)
    config = read_config(folder)
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return f"is {'an empty folder' if folder.is_dir() else 'a file'}, expected a Hugging Face folder"
    if "adapter_config.json" in names and "config.json" not in names:
        return "holds an adapter without its model: merge it into the model, or give the model's folder"
    if "model_type" not in config:
        return f"has no config.json with a model_type, found {', '.join(names[:5])}: give a Hugging Face folder"
    if config.get("quantization_config") is not None:
        return "is quantised, and training needs its full weights: take the model it was made from"
    try:
        stored_tensors(folder)
    except ConfigError as error:
        return str(error).removeprefix(f"{folder} ")
    return ""


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of a tensor."""

    file: Path
    shape: list[int]
    dtype: str  # such as "BF16"


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """By name, what the safetensors of a model folder hold; their headers alone are read.

    Raises:
        ConfigError: there are none, not all that the index names, or one that is not whole.
    """
    names_in: dict[str, list[str]] = {}
    if (folder / INDEX).exists():
        try:
            for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
                names_in.setdefault(file, []).append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder / INDEX} cannot be read ({error!r}): download it again") from error
    elif (folder / SINGLE).exists():
        names_in[SINGLE] = []  # all
    else:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))[:5]
        raise ConfigError(
            f"{folder} has neither {SINGLE} nor {INDEX}" + (f", only {', '.join(others)}" if others else "") + ":"
            " load it with transformers once and write it anew with save_pretrained"
        )
    tensors: dict[str, StoredTensor] = {}
    for file, names in names_in.items():
        try:
            with safe_open(folder / file, "np") as opened:
                held = opened.keys()
                if lacking := sorted(set(names).difference(held)):
                    raise ConfigError(f"{folder / file} lacks {lacking[0]}, which {INDEX} names there: fetch it again")
                for name in names or held:
                    view = opened.get_slice(name)
                    tensors[name] = StoredTensor(folder / file, list(view.get_shape()), view.get_dtype())
        except (OSError, SafetensorError) as error:
            why = str(error).replace(str(folder / file), file)
            raise ConfigError(
                f"{folder} has no whole file {file} ({why}): fetch it again, `git lfs pull` where the folder was cloned"
            ) from error
    return tensors


def tokenizer_fault(path: str) -> str:
    """Why the folder `path` holds no tokenizer; empty when it seems to."""
    folder = Path(path)
    return "" if any((folder / name).is_file() for name in TOKENIZERS) else f"has none of {', '.join(TOKENIZERS)}"


def has_chat_template(path: str) -> bool:
    """Whether the tokenizer in the folder `path` has a chat template; True where there is no such folder."""
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*chat_template*")):
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text()
    except OSError:
        return True


def open_config(path: str, **changes: Any) -> Any:
    """transformers' configuration of the model, with `changes`. Raises ConfigError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    except UNREADABLE as error:
        raise ConfigError(f"no causal language model can be loaded from {_named(path)}: {_why(path, error)}") from error


def open_tokenizer(path: str) -> Any:
    """Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        raise ConfigError(
            f"no tokenizer can be read from {_named(path)}: {_why(path, error)[:500]}; set tokenizer_path to a folder"
            " or hub id that has one"
        ) from error


def _named(path: str) -> str:
    return path if Path(path).exists() else f"{path} (not a local folder, so a hub id)"


def _why(path: str, error: Exception) -> str:
    folder = Path(path)
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = re.search(r'"base_model_name_or_path": *"([^"]*)"', adapter.read_text())
        return (
            f"it is a LoRA adapter for {base[1] if base else 'some model'}, and no model: merge it into that model"
            " first (peft's merge_and_unload, then save_pretrained), or give the path of that model"
        )
    if "trust_remote_code" in str(error):
        return (
            "its code comes with it (auto_map in its json files) and not with transformers, and no such code is run"
            " here: choose a model whose architecture transformers has, or a conversion to one"
        )
    return " ".join(str(error).split()) or type(error).__name__


def find_on_hub(name: str, kind: str = "model") -> None:
    """Raise DatasetError when the hub does not know `name`, or does not answer and has no copy of it in its cache.

    One short question: left alone, the hub's libraries try for half a minute each time. Once it has not answered,
    this process and those that it starts use what the cache has.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    copies = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)]
    if kind == "dataset":  # the library of data sets keeps what it has read beside that
        cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
        copies.append(Path(cache) / name.replace("/", "___"))
    why = "offline mode is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=HUB_LIMIT_S)
            return
        except (RepositoryNotFoundError, HFValidationError) as error:
            said = str(error).splitlines()[0]
            raise DatasetError(f"{name} is neither a local path nor a {kind} on the hub: {said}") from None
        except HfHubHTTPError:
            return  # it answers: its libraries know more
        except Exception as error:  # of whichever HTTP client the hub's library has
            why = f"{constants.ENDPOINT} does not answer ({error or type(error).__name__})"
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not any(copy.exists() for copy in copies):
        raise DatasetError(
            f"{name} is no local path, and {why}: as a hub id it is in no cache here. Check the path, or the network"
        )
