"""Whether a saved memory belongs to the model that it shall be attached to, adapters and quantisation included."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram.checkpoint import ADAPTERS_FOLDER
from engram.errors import FingerprintError
from engram.models.identity import (
    adapter_digests,
    adapter_kinds,
    adapter_parameters,
    attached_identity,
    base_of,
    identity_mismatch,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engram.models.engram_model import EngramModel

__all__ = ["ALLOWED", "adapters_beside", "check_base", "has_other_adapters", "only_weights_differ"]

ALLOWED = "load it with --allow-other-base, in Python allow_other_base=True"
"""How another base model is accepted, for the ends of messages."""
_ON_TOP = (
    " A memory that was made on top of another is attached to that one: EngramModel.from_pretrained(the one beneath, ...)."
)


def check_base(
    description: dict[str, Any],
    model: PreTrainedModel | EngramModel,
    path: str | os.PathLike[str],
    allow_other_base: bool,
    tell: bool = True,
) -> None:
    """Refuse another base than the one that a memory was made for; ``tell``: warn where nobody can know."""
    saved, present = description.get("base_model") or {}, attached_identity(model)
    differences = identity_mismatch(saved, present)
    sizes_differ = not only_weights_differ(differences, saved, present)
    if tell:
        _note_other_adapters(description, model, path)
    if tell and saved.get("weights_sha256") and present["weights_sha256"] is None:
        logging.getLogger("engram").warning(
            "%s: the base model's weights are offloaded, so that nobody can tell whether they are those that this memory was made for.",
            os.fspath(path),
        )
    if differences and (sizes_differ or not allow_other_base):
        about_quantisation = _told_of_quantisation(saved, present, differences)
        theirs, ours = saved.get("name_or_path"), getattr(model.config, "name_or_path", "") or type(model).__name__
        other = f"not to {ours!r}" if ours != theirs else "not to what is called so now"
        raise FingerprintError(
            f"the memory in {path} belongs to base model {theirs or 'unknown'!r}, {other}: {'; '.join(differences)}."
            + about_quantisation
            + (_ON_TOP if any(d.startswith("memory beneath") for d in differences) else "")
            + ("" if sizes_differ else f" If they differ on purpose (a fine-tuned base, one with more tokens), {ALLOWED}.")
        )


def only_weights_differ(differences: Sequence[str], saved: dict[str, Any], present: dict[str, Any]) -> bool:
    """Whether a base model could be accepted in another's place: it has the same sizes, or more tokens.

    Args:
        differences: what ``identity_mismatch`` found between ``saved`` and ``present``.
    """
    before = saved.get("vocab_size")
    # Addresses are the tokenizer's: more tokens in the model leave them as they are.
    grown = ("vocab_size",) if isinstance(before, int) and before <= present["vocab_size"] else ()
    return all(d.startswith(("embedding_sha256", "weights_sha256", "memory beneath", *grown)) for d in differences)


def _told_of_quantisation(saved: dict[str, Any], present: dict[str, Any], differences: Sequence[str]) -> str:
    """What quantised weights have to do with differing bases, for a message; empty if nothing."""
    if (
        "quantized" not in saved
        and [d.partition(":")[0] for d in differences] == ["weights_sha256"]
        and not present["quantized"]
    ):
        return " Was it made by an earlier version on a quantised form of this model, the weights are the same, and only their layout is not."
    if bool(saved.get("quantized")) == present["quantized"]:
        return ""
    forms = ["quantised" if identity.get("quantized") else "not quantised" for identity in (saved, present)]
    return f" (Made on a base that is {forms[0]}, and this one is {forms[1]}; that alone is no reason: weights are not compared then.)"


def adapters_beside(memory: EngramModel) -> dict[str, list[str]]:
    """What is noted of the adapters that a trained memory leans on, those that the trainer noted or that a loop of one's own trains now: their
    kinds, and who they are. Empty where there are none: facts are exact with adapters or without, or are found not to be.
    """
    base = memory.base_model
    trained = any(p.requires_grad for p in adapter_parameters(base).values())
    kinds = memory.trained_beside or (adapter_kinds(base) if trained else [])
    if memory.engram_config.verify_rows or not kinds:
        return {}
    digests = adapter_digests(base) if trained or memory.adapters_sha256 is None else memory.adapters_sha256
    return {"trained_beside": kinds, **({"adapters_sha256": digests} if digests else {})}


def has_other_adapters(description: dict[str, Any], model: Any) -> bool:
    """Whether those at work in a model are others, or weigh otherwise, than those that a memory was trained beside. Memories that do not say
    beside which, of an earlier version, have no others.
    """
    saved = description.get("adapters_sha256")
    return saved is not None and saved != adapter_digests(base_of(model))


def _note_other_adapters(
    description: dict[str, Any], model: PreTrainedModel | EngramModel, path: str | os.PathLike[str]
) -> None:
    """Say that a memory was trained beside adapters which its base model does not have now, or which are others."""
    beside = description.get("trained_beside")
    if not beside:
        return
    none = not adapter_parameters(base_of(model))
    if not none and not has_other_adapters(description, model):
        return
    folder = Path(path) / ADAPTERS_FOLDER
    logging.getLogger("engram").warning(
        "%s: this memory was trained beside adapters (%s), and the base model has %s: answers will differ from those in training. Load %s "
        "first: PeftModel.from_pretrained(model, ...).get_base_model().",
        os.fspath(path),
        ", ".join(map(str, beside)),
        "none" if none else "others at work, or the same with other weights or another scaling",
        f"those in {folder}" if folder.is_dir() else "them",
    )
