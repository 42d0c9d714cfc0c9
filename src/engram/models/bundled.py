"""The small model that ships with engram, and the memory that was trained with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from engram.checkpoint import BACKBONE_FOLDER
from engram.errors import CheckpointError, reason_of
from engram.models.bundled_files import BUNDLED_MEMORY, BUNDLED_MODEL, BUNDLED_NAME, is_path
from engram.models.engram_model import EngramModel

__all__ = [
    "auto_class",
    "load_bundled",
    "load_model",
    "load_tokenizer",
    "load_without_weights",
]


@overload
def load_bundled(memory: Literal[False] = False) -> tuple[PreTrainedModel, Any]: ...


@overload
def load_bundled(memory: Literal[True]) -> tuple[EngramModel, Any]: ...


def load_bundled(memory: bool = False) -> tuple[PreTrainedModel | EngramModel, Any]:
    """The bundled base model (float32, evaluation mode) and its tokenizer: a small Llama trained by this project.

    Args:
        memory: with the memory that was trained together with it (int8 rows). Facts are taught to either: to the model alone, which was
            trained to do as well on its own, or on top of that memory (``MemoryEditor.create(memory, tokenizer)``).

    Raises:
        CheckpointError: the installation lacks the model's files.
    """
    model, tokenizer = load_model(BUNDLED_NAME)
    if not memory:
        return model, tokenizer
    return EngramModel.from_pretrained(model, BUNDLED_MEMORY, tokenizer).eval(), tokenizer


def load_model(name: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A causal language model (it may take pictures too) and its tokenizer from a local folder (a model's, a run's with ``model`` in it, or a
    memory's with ``backbone`` in it), a hub name or ``bundled``.

    Raises:
        CheckpointError: it cannot be loaded; the message carries the loader's own reason.
    """
    name = os.fspath(name)
    with _readable_errors(name):
        path = _place(name)
        model = _class_for(path).from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    if name == BUNDLED_NAME:
        model.config._name_or_path = BUNDLED_NAME  # the same identity wherever the package is installed
    return model.eval(), tokenizer


def auto_class(config: Any) -> Any:
    """What of transformers makes a model that generates text: ``AutoModelForImageTextToText`` of one that takes pictures too, whole, for
    ``AutoModelForCausalLM`` makes the text part of some; else that.
    """
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def _class_for(path: str) -> Any:
    """As ``auto_class``, of what lies there. A folder of adapters (peft) has no config of a model: that of their base is found by
    ``AutoModelForCausalLM``, which also says best what else is amiss.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return AutoModelForCausalLM
    try:
        return auto_class(AutoConfig.from_pretrained(path))
    except ValueError:
        return AutoModelForCausalLM
    except OSError as error:
        if _is_missing_there(error):
            return AutoModelForCausalLM
        raise  # without a network: to ask again would take as long again


def _is_missing_there(error: BaseException | None) -> bool:
    """Whether a repository on the hub was found, and the file is not in it."""
    while error is not None:
        if isinstance(error, EntryNotFoundError):
            return not isinstance(error, LocalEntryNotFoundError)
        error = error.__cause__ or error.__context__
    return False


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model that ``load_model`` would load.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    with _readable_errors(name):
        return AutoTokenizer.from_pretrained(_place(name))


def load_without_weights(name: str) -> PreTrainedModel:
    """The model that ``load_model`` would load, made from its config alone, on the meta device: to ask what it looks like.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    with _readable_errors(name), torch.device("meta"):
        config = AutoConfig.from_pretrained(_place(name))
        return auto_class(config).from_config(config)


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    if name != BUNDLED_NAME and is_path(name) and not Path(name).is_dir():  # a hub would be asked for it again and again
        raise CheckpointError(
            f"cannot load model {name!r}: there is no such folder. Expected one with config.json and weights."
        )
    try:
        yield
    except ImportError as error:  # of what unpacks its weights, bitsandbytes say
        raise CheckpointError(
            f"cannot load model {name!r}: {reason_of(error)}. Expected the package that reads its weights: install it, or give a model in full "
            "precision."
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load model {name!r}: {reason_of(error)}. Expected a folder with config.json and weights, or a hub name."
        ) from error


def _place(name: str) -> str:
    """What transformers is asked for: the bundled model's folder, that of the model in a run's folder or in that of a memory that was
    trained with it, or what the name says.
    """
    if name == BUNDLED_NAME:
        return str(BUNDLED_MODEL)
    if (Path(name) / "config.json").is_file():
        return name
    inside = (Path(name) / folder for folder in ("model", BACKBONE_FOLDER))
    return next((str(folder) for folder in inside if (folder / "config.json").is_file()), name)
