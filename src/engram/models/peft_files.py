"""Adapters of a checkpoint in the layout of peft, for ``PeftModel.from_pretrained``."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engram.checkpoint import ADAPTERS_FOLDER
from engram.errors import CheckpointError, reason_of

__all__ = ["load_for_peft", "save_for_peft"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_for_peft(base: Any, trained: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters of a base model that were trained as peft does; what an earlier run left there goes.

    An adapter named ``default`` lies in ``folder/adapters``, others in a folder of their name in it. Adapters that peft cannot take out
    of the model alone are left out, with a warning: the checkpoint resumes all the same.

    Args:
        base: the model with the adapters.
        trained: whole parameters of adapters by their names in ``base``.
        folder: the checkpoint's.
    """
    place = folder / ADAPTERS_FOLDER
    if (place / _CONFIG).exists() or any(place.glob(f"*/{_CONFIG}")):
        shutil.rmtree(place)
    for name, config in getattr(base, "peft_config", {}).items():
        if any(name in parameter.split(".") for parameter in trained):
            _save_one(base, trained, name, config, place if name == "default" else place / name)


def load_for_peft(base: Any, folder: Path) -> Any:
    """The base model with the adapters that ``save_for_peft`` wrote, frozen and all at work; the model as it is where it wrote none.

    Args:
        base: the model without adapters; they are put into it.
        folder: the checkpoint's, or a memory's.

    Raises:
        CheckpointError: peft is not installed, or the adapters do not fit the model.
    """
    place = folder / ADAPTERS_FOLDER
    found = {"default": place} if (place / _CONFIG).is_file() else {}
    found |= {config.parent.name: config.parent for config in sorted(place.glob(f"*/{_CONFIG}"))}
    if not found:
        return base
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CheckpointError(
            f"{place} holds adapters that were trained with the memory, and peft, which reads them, is not installed: "
            "pip install 'engram-memory[lora]'."
        ) from error
    try:
        names = list(found)
        adapted: Any = PeftModel.from_pretrained(base, str(found[names[0]]), adapter_name=names[0])
        for name in names[1:]:
            adapted.load_adapter(str(found[name]), name)
        if len(names) > 1:
            adapted.base_model.set_adapter(names, inference_mode=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the adapters in {place} cannot be put on the base model: {reason_of(error)}") from error
    return adapted.get_base_model().eval()


def _save_one(base: Any, trained: Mapping[str, Tensor], name: str, config: Any, place: Path) -> None:
    from peft import get_peft_model_state_dict

    # Taking the model's own state would have bitsandbytes lay 4-bit weights out anew.
    whole = {**dict(base.named_buffers()), **dict(base.named_parameters(remove_duplicate=False)), **trained}
    try:
        state = get_peft_model_state_dict(base, whole, name, save_embedding_layers=False)
    except (KeyError, ValueError) as error:
        logging.getLogger("engram").warning("%s: adapter %r was not written as peft does: %s", place, name, error)
        return
    place.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(tensors, place / _WEIGHTS, metadata={"format": "pt"})
    written = copy.copy(config)
    written.inference_mode = True
    written.base_model_name_or_path = written.base_model_name_or_path or getattr(base, "name_or_path", None)
    written.save_pretrained(str(place))
