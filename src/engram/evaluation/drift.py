"""What a memory changes where it has no business: divergence from the base model on other text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from engram.data.facts import pad_right, tokenize_prompt
from engram.errors import refuse_one_text
from engram.evaluation.answers import reads_memory
from engram.models import EngramModel, Router
from engram.models.devices import input_device
from engram.models.mode import evaluation_mode
from engram.models.positions import within_context

__all__ = ["Drift", "measure_drift"]


@dataclass(frozen=True)
class Drift:
    """Memory on against memory off, over all predicted tokens of some texts."""

    tokens: int
    mean_kl: float
    """Mean KL(base || with memory), nats per token."""
    tokens_changed: int
    """Tokens whose most likely successor changed."""
    untouched: float
    """Share of texts whose logits are bit for bit those of the base model."""


@torch.no_grad()
def measure_drift(
    memory: EngramModel, tokenizer: Any, texts: Sequence[str], max_length: int = 256, router: Router | None = None
) -> Drift:
    """Compare next-token distributions with the memory on and off.

    Args:
        memory: an attached memory.
        tokenizer: the model's tokenizer.
        texts: what to read.
        max_length: tokens of each, at most the model's context.
        router: decides per text whether the memory is read; without one it always is.

    Raises:
        DataError: one text in place of several.
    """
    refuse_one_text(texts, "measure_drift")
    max_length = within_context(memory.config, max_length)
    total = changed = same = 0
    kl = 0.0
    device = input_device(memory)
    with evaluation_mode(memory):
        for text, read in zip(texts, reads_memory(router, texts)):
            row = tuple(tokenize_prompt(tokenizer, text)[:max_length])
            if not row:  # of an empty text, where the tokenizer begins with no token
                same += 1
                continue
            ids, mask = (x.to(device) for x in pad_right([row], 0))
            with memory.routed(None if router is None else torch.tensor([read])):
                on = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            with memory.disable_engram():
                off = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            same += int(torch.equal(on, off))
            total += ids.shape[1]
            changed += int((on.argmax(-1) != off.argmax(-1)).sum())
            kl += float(F.kl_div(on.log_softmax(-1), off.log_softmax(-1), log_target=True, reduction="sum"))
    return Drift(total, kl / max(total, 1), changed, same / max(len(texts), 1))
