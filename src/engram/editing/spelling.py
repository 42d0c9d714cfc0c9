"""Answers in tokens that a model can say.

A token that a model hardly ever met in training has an output row like that of other such tokens: whatever the stream, one of them is as likely
as the other, and no memory can make it the likeliest. Its text can be said in smaller tokens, though, and what is decoded is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Speller"]

_SAMPLE = 256
_BLOCK = 256
_SHARE = 0.25
"""A token is told apart from its nearest by at least this share of what is usual in its vocabulary. Of the bundled model's 6,144 tokens the
127 that its training text lacks lie at 0.006 to 0.009, nine in ten of those met one to four times below 0.21, and nine in ten of those met a
hundred times or more above 0.7."""


class Speller:
    """Finds tokens that a model cannot say and spells them in smaller ones.

    Args:
        model: a causal language model. One without output embeddings is taken to say every token.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        head = model.get_output_embeddings()
        self._rows: Tensor | None = None if head is None else head.weight.detach()
        self._tokenizer = tokenizer
        self._usual: float | None = None
        self._sayable: dict[int, bool] = {}

    def spell(self, answers: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The answers, token ids, without tokens that cannot be said; one that cannot be spelt otherwise stays as it is."""
        if self._rows is None:
            return [tuple(ids) for ids in answers]
        self._look_at({token for ids in answers for token in ids})
        return [self._spell(ids) for ids in answers]

    def unsayable(self, ids: Sequence[int]) -> list[int]:
        """Tokens among ``ids`` that the model cannot say."""
        if self._rows is None:
            return []
        self._look_at(ids)
        return [token for token in ids if not self._sayable[token]]

    def _spell(self, ids: Sequence[int]) -> tuple[int, ...]:
        pieces = {token: self._pieces(token) for token in self.unsayable(ids)}
        spelt = tuple(piece for token in ids for piece in pieces.get(token, [token]))
        same = self._tokenizer.decode(spelt) == self._tokenizer.decode(ids)
        return spelt if same and not self.unsayable(spelt) else tuple(ids)

    def _pieces(self, token: int) -> list[int]:
        """The token's characters, as the vocabulary writes them; the token itself if one of them is no token."""
        if token in self._tokenizer.all_special_ids:
            return [token]
        found = self._tokenizer.convert_tokens_to_ids(list(self._tokenizer.convert_ids_to_tokens(token)))
        return found if None not in found and self._tokenizer.unk_token_id not in found else [token]

    def _look_at(self, tokens: Iterable[int]) -> None:
        """Remember which of these tokens can be said."""
        new = sorted(set(tokens) - self._sayable.keys())
        if not new or self._rows is None:
            return
        if self._usual is None:
            sample = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
            self._usual = float(self._nearest(sample).median())
        told = self._nearest(torch.tensor(new)) >= _SHARE * self._usual
        self._sayable.update(zip(new, told.tolist()))

    def _nearest(self, tokens: Tensor) -> Tensor:
        """Distance of each token's output row to the nearest other one ``[n]``, on the CPU."""
        assert self._rows is not None
        found = []
        for part in tokens.split(_BLOCK):
            part = part.to(self._rows.device)
            distances = torch.cdist(self._rows[part].float(), self._rows.float())
            distances[torch.arange(len(part), device=part.device), part] = float("inf")
            found.append(distances.min(dim=1).values.cpu())
        return torch.cat(found)
