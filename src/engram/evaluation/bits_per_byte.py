"""Bits per byte: how well a model predicts text, independent of its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engram.data.facts import pad_right
from engram.data.store import begin_token
from engram.errors import DataError, refuse_one_text
from engram.models.devices import input_device
from engram.models.mode import evaluation_mode
from engram.models.positions import within_context

__all__ = ["bits_per_byte", "text_windows"]


def text_windows(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of the texts in windows of at most ``max_length``, each led by the beginning-of-text token; text that looks like a special
    token is text.

    Raises:
        ConfigError: the tokenizer has neither that token nor an end-of-text token to take its place.
    """
    start = begin_token(tokenizer)
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        windows += [[start, *ids[i : i + max_length - 1]] for i in range(0, len(ids), max_length - 1)]
    return windows


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int = 256, batch_size: int = 16) -> float:
    """Negative log2 probability of the texts per UTF-8 byte.

    Args:
        model: a causal language model (with or without a memory).
        tokenizer: its tokenizer.
        texts: what to predict; every token counts, each window of ``max_length`` starts afresh.
        max_length: tokens per window, at most the model's context.
        batch_size: windows per forward pass.

    Raises:
        DataError: there is no text, or one in place of several.
        ConfigError: the tokenizer has no token to lead windows.
    """
    refuse_one_text(texts, "bits_per_byte")
    written = sum(len(text.encode()) for text in texts)
    if not written:
        raise DataError(f"bits_per_byte: got {len(texts)} texts without a byte, expected some to predict.")
    max_length = within_context(model.config, max_length)
    windows = sorted(text_windows(tokenizer, texts, max_length), key=len)
    device = input_device(model)
    nats = 0.0
    with evaluation_mode(model):
        for start in range(0, len(windows), batch_size):
            rows = [tuple(window) for window in windows[start : start + batch_size]]
            ids, mask = (x.to(device) for x in pad_right(rows, pad_id=0))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            nats += F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum").item()
    return nats / math.log(2) / written
