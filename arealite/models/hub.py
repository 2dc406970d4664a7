"""Whether the model hub has something, asked once and shortly. Called by whatever takes a hub id for a model or a data
set.
"""

from __future__ import annotations

import os
from pathlib import Path

from arealite.api.errors import DatasetError

HUB_LIMIT_S = 3.0


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
