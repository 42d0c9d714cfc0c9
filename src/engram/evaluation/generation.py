"""Greedy answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from engram.models.mode import evaluation_mode

__all__ = ["generate_greedily", "padding_id"]


def generate_greedily(model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
    """The most likely continuation, token by token, whatever the checkpoint's own ``generation_config`` asks for.

    Args:
        model: a causal language model, with or without a memory.
        tokenizer: its tokenizer, whose end-of-text token ends an answer.
        ids: prompts, padded on the left, ``[B, T]``.
        mask: 0 where they are padded, ``[B, T]``.
        max_new_tokens: longest answer.

    Returns:
        Prompts and answers, ``[B, T + new]``.
    """
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    # Another thread would meet the defaults that are set aside.
    mode = evaluation_mode(model) if isinstance(model, nn.Module) else nullcontext()  # what only generates has none
    with getattr(model, "turns", nullcontext()), mode, _without_defaults(model.generation_config):
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)


def padding_id(tokenizer: Any) -> int | None:
    """What pads prompts: the tokenizer's own padding, or its end-of-text token; None if it has neither."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@contextmanager
def _without_defaults(config: GenerationConfig) -> Iterator[None]:
    """Inside this context a model's generation defaults are those of transformers: ``generate`` takes from them whatever it isn't told."""
    own = dict(vars(config))
    vars(config).clear()  # in place: models that wrap each other share one
    vars(config).update(vars(GenerationConfig()))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(own)
