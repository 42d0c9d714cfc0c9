"""The small model that ships with engram."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engram.errors import CheckpointError

__all__ = ["BUNDLED_MODEL", "BUNDLED_NAME", "load_bundled", "load_model", "load_tokenizer"]

BUNDLED_NAME = "bundled"
"""Name that stands for the bundled model wherever a model path is asked for."""
BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "base_model"


def load_bundled() -> tuple[PreTrainedModel, Any]:
    """The bundled base model (float32, evaluation mode) and its tokenizer: a small Llama trained by this project.

    Raises:
        CheckpointError: the installation lacks the model's files.
    """
    return load_model(BUNDLED_NAME)


def load_model(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer from a local folder, a hub name or ``bundled``.

    Raises:
        CheckpointError: it cannot be loaded; the message carries the loader's own reason.
    """
    path = str(BUNDLED_MODEL) if name == BUNDLED_NAME else name
    with _readable_errors(name):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    if name == BUNDLED_NAME:
        model.config._name_or_path = BUNDLED_NAME  # the same identity wherever the package is installed
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that ``load_model`` would load.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    with _readable_errors(name):
        return AutoTokenizer.from_pretrained(str(BUNDLED_MODEL) if name == BUNDLED_NAME else name)


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    if name != BUNDLED_NAME and _is_path(name) and not Path(name).is_dir():  # a hub would be asked for it again and again
        raise CheckpointError(
            f"cannot load model {name!r}: there is no such folder. Expected one with config.json and weights."
        )
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot load model {name!r}: {reason}. Expected a folder with config.json and weights, or a hub name."
        ) from error


def _is_path(name: str) -> bool:
    """Whether a name cannot be one of a hub (``model`` or ``owner/model``)."""
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name
