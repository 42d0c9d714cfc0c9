"""Adapters beside a memory, in the layout of peft, for ``PeftModel.from_pretrained``."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from engram.checkpoint import ADAPTERS_FOLDER
from engram.errors import CheckpointError, ConfigError, reason_of
from engram.models.identity import own_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_adapters", "refuse_merged", "save_for_peft"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DEFAULT = "default"


def refuse_merged(base: Any) -> None:
    """
    Raises:
        ConfigError: adapters were merged into the weights of a model, and are on it still: saved, they would count twice.
    """
    if any(hasattr(module, "adapter_layer_names") and getattr(module, "merged", False) for module in base.modules()):
        raise ConfigError(
            "EngramTrainer: got a base model with adapters that are merged into its weights, expected them apart (unmerge_adapter()) or gone "
            "(merge_and_unload())."
        )


def save_for_peft(
    base: Any, names: Iterable[str], adapters: Mapping[str, Tensor], folder: Path, trained_base: Path | None = None
) -> bool:
    """Write adapters as peft does, in the place of what an earlier run wrote there.

    An adapter named ``default`` lies in ``folder/adapters``, others in a folder of their name in it. Adapters that peft cannot take out
    of the model alone are left out, with a warning: the checkpoint resumes all the same. Returns whether any were written.

    Args:
        base: the model with the adapters.
        names: which.
        adapters: whole parameters of all adapters by their names in ``base``.
        folder: the checkpoint's.
        trained_base: where the base model was saved, if it was trained too: the adapters belong to that one.
    """
    place, new = folder / ADAPTERS_FOLDER, folder / f".{ADAPTERS_FOLDER}.new"
    shutil.rmtree(new, ignore_errors=True)
    configs = getattr(base, "peft_config", {})
    written = [
        _save_one(base, adapters, name, _config_of(configs[name], base, trained_base), new if name == _DEFAULT else new / name)
        for name in names
        if name in configs
    ]
    if any(written):
        shutil.rmtree(place, ignore_errors=True)
        os.replace(new, place)
    return any(written)


def load_adapters(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Put the adapters that ``EngramTrainer`` saved beside a memory on its base model, frozen and all at work. Where there are none, nothing is
    changed.

    Args:
        model: the base model, without adapters; they are put into it.
        folder: the memory's, or a checkpoint's. Adapters lie in ``adapters`` there, as ``PeftModel.from_pretrained`` reads them; each but
            ``default`` in a folder of its name.

    Returns:
        The same model.

    Raises:
        CheckpointError: peft is not installed, or the adapters do not fit the model.
    """
    base: Any = model
    place = Path(os.path.abspath(folder)) / ADAPTERS_FOLDER  # what is no folder would be a name on the hub for peft
    found = {_DEFAULT: place} if (place / _CONFIG).is_file() else {}
    found |= {config.parent.relative_to(place).as_posix(): config.parent for config in sorted(place.glob(f"*/**/{_CONFIG}"))}
    if not found:
        return model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CheckpointError(
            f"{place} holds adapters that were trained with the memory, and peft, which reads them, cannot be loaded ({reason_of(error)}): "
            "pip install 'engram-memory[lora]'."
        ) from error
    if lacking := [str(at) for at in found.values() if not (at / _WEIGHTS).is_file()]:
        raise CheckpointError(
            f"the adapters in {lacking[0]} are incomplete: {_WEIGHTS} is missing. Put it back, or save the memory again."
        )
    names = list(found)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something by an older name
            adapted: Any = PeftModel.from_pretrained(base, str(found[names[0]]), adapter_name=names[0])
            for name in names[1:]:
                adapted.load_adapter(str(found[name]), name)
            if len(names) > 1:
                adapted.base_model.set_adapter(names, inference_mode=True)
    except Exception as error:  # of a config that is not one peft raises many kinds
        raise CheckpointError(
            f"the adapters in {place} cannot be put on the base model: {type(error).__name__}: {reason_of(error)}"
        ) from error
    adapted.eval()
    return model


def _config_of(config: Any, base: Any, trained_base: Path | None) -> Any:
    """An adapter's config, of one to load: on the base model as it is now."""
    written = copy.copy(config)
    written.inference_mode = True
    if trained_base is None:
        written.base_model_name_or_path = written.base_model_name_or_path or getattr(base, "name_or_path", None)
        return written
    written.base_model_name_or_path = os.path.abspath(trained_base)
    if isinstance(
        getattr(written, "init_lora_weights", None), str
    ):  # such as PiSSA's, which would take its part out of the weights again
        written.init_lora_weights = True
    return written


def _save_one(base: Any, adapters: Mapping[str, Tensor], name: str, config: Any, place: Path) -> bool:
    """Whether peft could take it out of the model."""
    from peft import get_peft_model_state_dict

    # Taking the model's own state would have bitsandbytes lay 4-bit weights out anew, and would hold weights that FSDP has divided.
    buffers = dict(base.named_buffers())
    kept = {key: buffers[key] for key in buffers.keys() - own_names(base, buffers).keys()}
    try:
        state = get_peft_model_state_dict(base, {**kept, **adapters}, name, save_embedding_layers=False)
    except (KeyError, ValueError) as error:
        logging.getLogger("engram").warning(
            "%s: adapter %r is saved to resume from alone, for peft cannot take it out of the model by itself (%s); save the PeftModel too.",
            place.parent,
            name,
            error,
        )
        return False
    place.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(tensors, place / _WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(place))
    return True
