"""Where a fact is written: how many tokens of a prompt make its key, and which rows that means.

At the position that predicts the j-th token of an answer the memory writes exactly one n-gram: the key, which is the shortest distinctive
end of the prompt, followed by the j tokens of the answer said so far. So a fact speaks only after its key, never in text that merely
contains words of its answer; and because the key does not reach back to the start of the prompt, it speaks in any context.
A key is distinctive when

- the base model finds it surprising (``min_bits``): text that nobody taught then contains it with probability about 2^-bits per position;
- no other fact with another answer has a prompt that ends in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.data.facts import pad_right
from engram.hashing import NgramHashMapping
from engram.models.devices import input_device

if TYPE_CHECKING:
    from engram.models import EngramModel

__all__ = ["KeyedPrompt", "PlannedRows", "choose_keys", "goes_on_otherwise", "plan_rows", "surprise_bits"]

_DISAGREE: tuple[int, ...] = (-1,)


@dataclass(frozen=True)
class KeyedPrompt:
    """One prompt of a fact as token ids, and the length of its key."""

    text: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    key_length: int = 0
    """Tokens at the end of the prompt that address the answer (padding before the start counts, for prompts too short to be keys)."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer in one row."""
        return self.prompt_ids + self.answer_ids

    def orders(self, max_ngram_size: int) -> list[int]:
        """Order of the n-gram written for each answer token: the key and the answer so far, as far as n-grams reach."""
        return [min(self.key_length + step, max_ngram_size) for step in range(len(self.answer_ids))]


def choose_keys(
    prompts: Sequence[KeyedPrompt],
    bits: Sequence[Sequence[float]],
    others: Iterable[KeyedPrompt],
    max_ngram_size: int,
    min_order: int,
    min_bits: float,
    pad_id: int,
    bos_id: int | None = None,
) -> list[KeyedPrompt]:
    """The prompts with their key lengths: the shortest distinctive end of each (see the module's description).

    A prompt that is not distinctive as a whole takes the start of the text into its key, so that it is answered only as the very
    beginning of an input; one that cannot be told apart within ``max_ngram_size`` tokens gets the longest key there is.

    Args:
        prompts: what to place; ``key_length`` is ignored.
        bits: surprise of every prompt token, as ``surprise_bits`` gives it.
        others: prompts that are in the memory already.
        max_ngram_size: longest n-gram.
        min_order: shortest key.
        min_bits: least surprise of a key.
        pad_id: id that stands before the start.
        bos_id: id that opens every prompt; a short prompt is a key without it.
    """
    answers: dict[tuple[int, ...], tuple[int, ...]] = {}
    for prompt in [*prompts, *others]:
        for suffix in _suffixes(prompt.prompt_ids, max_ngram_size, pad_id):
            known = answers.setdefault(suffix, prompt.answer_ids)
            if known != prompt.answer_ids:
                answers[suffix] = _DISAGREE
    placed = []
    for prompt, surprise in zip(prompts, bits):
        length = max_ngram_size
        words = len(prompt.prompt_ids) - (prompt.prompt_ids[0] == bos_id)
        for suffix in _suffixes(prompt.prompt_ids, max_ngram_size, pad_id):
            size = len(suffix)
            whole = size > len(prompt.prompt_ids)  # padding in the key: only the very start of an input has that
            rare = whole or sum(surprise[-size:]) >= min_bits
            if size >= min(min_order, words) and rare and answers[suffix] != _DISAGREE:
                length = size
                break
        placed.append(replace(prompt, key_length=length))
    return placed


def goes_on_otherwise(one: KeyedPrompt, other: KeyedPrompt) -> bool:
    """Whether ``other`` is asked with the end of ``one``'s prompt and the beginning of its answer, and answered differently from there."""
    start = len(one.prompt_ids)
    for said in range(1, len(one.answer_ids)):
        end = one.ids[max(0, start - one.key_length) : start + said]
        if other.prompt_ids[-len(end) :] == end and other.answer_ids != one.answer_ids[said:]:
            return True
    return False


def _suffixes(ids: tuple[int, ...], longest: int, pad_id: int) -> Iterator[tuple[int, ...]]:
    """Ends of a prompt, shortest first; one of them reaches beyond its start."""
    for size in range(2, min(longest, len(ids)) + 1):
        yield ids[len(ids) - size :]
    if len(ids) < longest:
        yield (pad_id, *ids)


@torch.no_grad()
def surprise_bits(memory: EngramModel, prompts: Sequence[KeyedPrompt], batch_size: int) -> list[list[float]]:
    """-log2 probability of every prompt token under the base model; 0 for the first, which nothing predicts."""
    device = input_device(memory)
    result: list[list[float]] = []
    for start in range(0, len(prompts), batch_size):
        rows = [prompt.prompt_ids for prompt in prompts[start : start + batch_size]]
        ids, mask = (x.to(device) for x in pad_right(rows, memory.engram_config.pad_id))
        with memory.disable_engram():
            logits = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        bits = (nats.view(ids.shape[0], -1) / 0.6931471805599453).cpu()
        result += [[0.0, *row[: len(ids_) - 1].tolist()] for row, ids_ in zip(bits, rows)]
    return result


@dataclass(frozen=True)
class PlannedRows:
    """Rows that prompts may write in one layer: m answer tokens, K heads each."""

    prompt: Tensor
    """int64 ``[m]``: number of the prompt."""
    step: Tensor
    """int64 ``[m]``: number of the answer token."""
    row_ids: Tensor
    """int64 ``[m, K]``."""
    tags: Tensor
    """int32 ``[m, K]``."""


def plan_rows(mapping: NgramHashMapping, prompts: Sequence[KeyedPrompt], batch_size: int = 512) -> dict[str, PlannedRows]:
    """Rows of every answer token of every prompt, per layer: a function of the ids and key lengths alone."""
    config = mapping.config
    heads = config.n_head_per_ngram
    parts: dict[str, list[PlannedRows]] = {str(layer): [] for layer in config.layer_ids}
    offsets = {layer: torch.tensor([0, *mapping.head_sizes(layer)[:-1]]).cumsum(0) for layer in config.layer_ids}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids, mask = pad_right([prompt.ids for prompt in batch], config.pad_id)
        where: list[tuple[int, int, int, int]] = [
            (number, step, len(prompt.prompt_ids) - 1 + step, order)
            for number, prompt in enumerate(batch)
            for step, order in enumerate(prompt.orders(config.max_ngram_size))
        ]
        number, step, position, order = torch.tensor(where, dtype=torch.int64).view(-1, 4).unbind(1)
        columns = (order - 2).unsqueeze(1) * heads + torch.arange(heads)
        for layer_id, (hash_ids, tags) in mapping.hash_with_tags(ids, attention_mask=mask).items():
            rows = hash_ids[number, position].gather(1, columns) + offsets[layer_id][columns]
            parts[str(layer_id)].append(PlannedRows(number + start, step, rows, tags[number, position].gather(1, columns)))
    return {layer: _joined(planned, heads) for layer, planned in parts.items()}


def _joined(parts: list[PlannedRows], heads: int) -> PlannedRows:
    if not parts:
        none: Any = torch.zeros(0, dtype=torch.int64)
        return PlannedRows(none, none, none.view(0, heads), none.int().view(0, heads))
    return PlannedRows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("prompt", "step", "row_ids", "tags")))
