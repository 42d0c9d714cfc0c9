"""Answers in tokens that a model can say.

A token that a model hardly ever met in training has an output row like that of other such tokens: whatever the stream, one of them is about as
likely as the other, and a memory may not be able to make it the likeliest. Its text can be said in smaller tokens, though, and what is decoded
is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Speller"]

_SAMPLE = 256
_BLOCK, _ROWS_AT_ONCE = 256, 1 << 14
_SHARE = 0.25
"""A token that lies nearer to another one than this share of what is usual in its vocabulary is spelt. Of the bundled model's 6,144 tokens
the 127 that its training text lacks lie at 0.006 to 0.009 and cannot be said. Nine in ten of those met one to four times lie below 0.21; most
can be said in some sentences (``ZZ``, at 0.15, not in ``DZZHE``). Nine in ten of those met a hundred times or more lie above 0.7. Spelling
costs a few rows; what cannot be said costs the fact."""


class Speller:
    """Finds tokens that a model may not be able to say and spells them in smaller ones.

    Args:
        model: a causal language model. One whose output rows cannot be seen (no head, packed or offloaded weights) is taken to say everything.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._usual: float | None = None
        self._seen: tuple[int, ...] = ()
        self._sayable: dict[int, bool] = {}

    def spell(self, answers: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The answers, token ids, with doubtful tokens in smaller ones, where there are such and they are less doubtful."""
        self._look_at({token for ids in answers for token in ids})
        return [self._spell(ids) for ids in answers]

    def unsayable(self, ids: Sequence[int]) -> list[int]:
        """Tokens among ``ids`` that the model may not be able to say, each once; special ones, which mark ends, are not looked at."""
        self._look_at(ids)
        return [token for token in dict.fromkeys(ids) if not self._sayable.get(token, True)]

    def unsayable_texts(self, ids: Sequence[int]) -> list[str]:
        """The same as texts."""
        return [self._tokenizer.decode([token]) for token in self.unsayable(ids)]

    def _spell(self, ids: Sequence[int]) -> tuple[int, ...]:
        pieces = {token: self._pieces(token) for token in self.unsayable(ids)}
        if not pieces:
            return tuple(ids)
        spelt = tuple(piece for token in ids for piece in pieces.get(token, [token]))
        return spelt if self._tokenizer.decode(spelt) == self._tokenizer.decode(ids) else tuple(ids)

    def _pieces(self, token: int) -> list[int]:
        """The token's characters, as the vocabulary writes them; the token itself if they are no tokens or no better."""
        found = self._tokenizer.convert_tokens_to_ids(list(self._tokenizer.convert_ids_to_tokens(token)))
        known = None not in found and self._tokenizer.unk_token_id not in found
        return found if known and not self.unsayable(found) else [token]

    def _look_at(self, tokens: Iterable[int]) -> None:
        """Remember which of these tokens can be said."""
        rows = self._rows()
        if rows is None:
            return
        if self._seen != tuple(rows.shape):  # a first look, or a vocabulary that grew
            self._seen, self._usual, self._sayable = tuple(rows.shape), None, {}
        new = sorted(set(tokens) - self._sayable.keys() - self._special)
        if not new:
            return
        if self._usual is None:
            sample = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
            self._usual = float(_nearest(rows, sample).median())
        told = _nearest(rows, torch.tensor(new)) >= _SHARE * self._usual
        self._sayable.update(zip(new, told.tolist()))

    def _rows(self) -> Tensor | None:
        """Output rows ``[V, d]`` as they are now."""
        weight: Any = getattr(self._model.get_output_embeddings(), "weight", None)
        seen = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() and not weight.is_meta
        return weight.detach() if seen and len(weight) >= len(self._tokenizer) else None


def _nearest(rows: Tensor, tokens: Tensor) -> Tensor:
    """Distance of each token's output row to the nearest other one ``[n]``, on the CPU; in parts, so that no copy of all rows is made."""
    found = []
    for part in tokens.split(_BLOCK):
        part = part.to(rows.device)
        mine, nearest = rows[part].float(), torch.full(part.shape, float("inf"), device=rows.device)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            distances = torch.cdist(mine, rows[start : start + _ROWS_AT_ONCE].float())
            inside = (part >= start) & (part < start + distances.shape[1])
            distances[inside.nonzero().flatten(), part[inside] - start] = float("inf")
            nearest = torch.minimum(nearest, distances.min(dim=1).values)
        found.append(nearest.cpu())
    return torch.cat(found)
