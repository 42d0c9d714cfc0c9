"""Memories on the Hugging Face hub: uploaded as they are saved, found again by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from engram.checkpoint import DESCRIPTION_NAME, read_description
from engram.config import TableConfig
from engram.errors import CheckpointError, ConfigError, reason_of
from engram.models.bundled_files import is_path
from engram.models.files import saved_aside
from engram.tables import is_in_parts

if TYPE_CHECKING:
    from engram.models.engram_model import EngramModel

__all__ = ["check_order", "found_at", "push_memory", "remember_name"]

_EACH_SAVE = ["engram-*.safetensors", "engram-*.ledger.json"]
"""Files of a saved memory whose names every save makes anew."""


def push_memory(memory: EngramModel, repo_id: str, commit_message: str, private: bool | None, token: str | bool | None) -> str:
    """As ``EngramModel.push_to_hub``."""
    if is_in_parts(memory):
        raise ConfigError(
            "push_to_hub: got tables or weights that are divided between processes, expected whole ones; save the memory in all processes, "
            "load it in one and push that."
        )
    api = HfApi(token=token)
    with saved_aside(memory) as folder:
        try:
            found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=found,
                folder_path=folder,
                commit_message=commit_message,
                allow_patterns=[DESCRIPTION_NAME, *_EACH_SAVE],
                delete_patterns=_EACH_SAVE,
            )
        except Exception as error:  # of a network the client passes on many kinds
            raise CheckpointError(
                f"push_to_hub: cannot upload to {repo_id!r}: {reason_of(error)}. Nothing here was changed."
            ) from error
    return commit.commit_url


def check_order(model: Any, path: Any) -> None:
    """Refuse what loading a memory is given in another order than it takes: a model, a path, a tokenizer.

    Raises:
        ConfigError: the model is a name, or the path is none.
    """
    if isinstance(model, (str, os.PathLike)) or not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"loading a memory: got a {type(model).__name__} for the model and a {type(path).__name__} for the path, expected (model, path, "
            "tokenizer): a model that is loaded, the folder or hub name of the memory, the model's tokenizer."
        )


def found_at(
    path: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> tuple[str | os.PathLike[str], TableConfig | None]:
    """The folder of a memory, and where its rows shall be if nobody says: of a folder, itself and as it was placed (None).

    Of a name on the hub (``owner/name``) it is what was fetched, and rows go to the model's device in their own format, for what somebody
    else's memory says of paths is not for this machine. What is here comes first: a name is one of the hub only if there is no such folder, and
    it does not begin with one that there is.

    Args:
        path: what was given in the place of a folder; only a text may be a name.
        revision: branch, tag or commit.
        token: as for ``huggingface_hub``.

    Raises:
        CheckpointError: there is no such memory, or it cannot be fetched.
        ConfigError: a revision of a folder was asked for.
    """
    could_be = (
        isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")) and not os.path.exists(path)
    )
    if could_be and is_path(os.fspath(path)):
        raise CheckpointError(
            f"no memory in {path}: it is taken for a folder, because there is a folder {str(path).split('/')[0]!r} here, and none of this "
            "name is in it. Expected the folder of a saved memory; to have one of this name from the hub, run where no such folder is."
        )
    if not could_be:
        if revision is not None:
            raise ConfigError(
                f"revision: got {revision!r} of {os.fspath(path)!r}, which is taken for a folder; expected it with a name on the hub: "
                "owner/name, where there is no folder here that is called so or like the owner."
            )
        return path, None
    try:
        found = Path(
            HfApi(token=token).snapshot_download(
                os.fspath(path), revision=revision, allow_patterns=[DESCRIPTION_NAME, *_EACH_SAVE]
            )
        )
    except Exception as error:  # of a network the client passes on many kinds
        raise CheckpointError(
            f"no memory in {path}, and none of this name could be fetched from the hub: {reason_of(error)}. Expected a folder of a saved "
            "memory, or the name of a repository that has one."
        ) from error
    if not (found / DESCRIPTION_NAME).is_file():
        raise CheckpointError(
            f"{path} on the hub holds no memory: {DESCRIPTION_NAME} is missing; expected what push_to_hub uploaded."
        )
    return found, TableConfig(dtype=read_description(found).get("table_dtype", "float32"))


def remember_name(memory: EngramModel, path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Have a memory that was fetched into ``folder`` known by the name it was asked for: a cache is of this machine alone, and may be gone
    tomorrow.
    """
    if folder is not path:
        memory.folder = os.fspath(path)
