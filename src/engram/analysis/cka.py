"""Which layers of two models do the same work: linear centred kernel alignment.

The unbiased estimator of HSIC (Song et al., 2012) is summed over minibatches of tokens (Nguyen, Raghu and Kornblith, 2021), so that
no matrix over all tokens is needed and few tokens give no similarity of their own.

Shape legend: L layers, n tokens of a minibatch, d features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.analysis.sample import Batch, Progress, Sample, iter_batches
from engram.analysis.streams import record_blocks
from engram.analysis.subject import Subject
from engram.errors import ConfigError, DataError

__all__ = ["CkaSums", "cka", "soft_alignment"]

_MINIBATCH = 256
_TOP = 5


class CkaSums:
    """Sums of unbiased HSIC over minibatches, for every pair of layers of two models."""

    def __init__(self) -> None:
        self._cross: Tensor | None = None
        self._own: list[Tensor] = []
        self.minibatches = 0

    def add(self, a: list[Tensor], b: list[Tensor]) -> None:
        """Add one minibatch: features ``[n, d]`` of each layer of A and of B, the same n tokens in all of them.

        Raises:
            ConfigError: fewer than four tokens, for which the estimator does not exist.
        """
        if a[0].shape[0] < 4:
            raise ConfigError(f"cka: got a minibatch of {a[0].shape[0]} tokens, expected at least 4.")
        kernels = [torch.stack([_kernel(x) for x in side]) for side in (a, b)]
        cross, own = _hsic(kernels[0], kernels[1]), [_hsic(k, None) for k in kernels]
        self._cross = cross if self._cross is None else self._cross + cross
        self._own = own if not self._own else [x + y for x, y in zip(self._own, own)]
        self.minibatches += 1

    def similarity(self) -> np.ndarray:
        """CKA ``[L1, L2]``: 1 for features equal up to rotation and scale, about 0 (of either sign) for independent ones."""
        assert self._cross is not None
        norms = torch.outer(*(own.clamp_min(0).sqrt() for own in self._own))
        return (self._cross / norms.clamp_min(torch.finfo(norms.dtype).tiny)).numpy()


@torch.no_grad()
def cka(a: Subject, b: Subject, sample: Sample, progress: Progress | None = None, seed: int = 0) -> dict[str, Any]:
    """Similarity of every block of ``a`` with every block of ``b`` on the same tokens, and the soft alignment index.

    Several residual streams stand side by side as one set of features. The first token of a window is left out: it is the same
    everywhere, and its state is often so large that it would decide alone.

    Args:
        a: one model.
        b: another, or the same with its memory off; both must share the tokenizer.
        sample: the text.
        progress: told of tokens done.
        seed: of the order in which tokens form minibatches.

    Returns:
        ``map [L1][L2]``, ``soft_alignment`` per block of ``a``, and sizes.

    Raises:
        DataError: there are not four tokens to compare.
    """
    sums, generator = CkaSums(), torch.Generator().manual_seed(seed)
    waiting: list[list[Tensor]] = []
    with record_blocks(a) as blocks_a, record_blocks(b) as blocks_b:
        for batch in iter_batches(sample, max(a.vocab_size, b.vocab_size), progress):
            # Two subjects may share one model: what the first pass left is taken before the second begins.
            features = _features(a, blocks_a, batch)
            layers_a = len(features)
            features += _features(b, blocks_b, batch)
            waiting.append(features)
            if sum(rows[0].shape[0] for rows in waiting) >= 8 * _MINIBATCH:
                waiting = _consume(sums, waiting, layers_a, generator, last=False)
    if waiting and waiting[0]:
        _consume(sums, waiting, layers_a, generator, last=True)
    if not sums.minibatches:
        raise DataError("cka: the text has fewer than four tokens after the first; give more of it.")
    similarity = sums.similarity()
    return {
        "a": a.name,
        "b": b.name,
        "minibatches": sums.minibatches,
        "tokens_per_minibatch": _MINIBATCH,
        "map": similarity.round(6).tolist(),
        "top": min(_TOP, similarity.shape[1]),
        "soft_alignment": soft_alignment(similarity, _TOP),
    }


def soft_alignment(similarity: np.ndarray, top: int = _TOP) -> list[float]:
    """For each layer of A the mean index of its ``top`` most similar layers of B, weighted by their CKA (the paper's section 6).

    Args:
        similarity: CKA ``[L1, L2]``; what is below zero counts as zero.
        top: how many layers of B take part; all of them where there are fewer.
    """
    positive = np.clip(similarity, 0, None)
    best = np.argsort(-positive, axis=1, kind="stable")[:, :top]
    weights = np.take_along_axis(positive, best, axis=1)
    total = weights.sum(axis=1)
    plain = best.mean(axis=1)  # nothing is similar: no layer is preferred
    return np.where(total > 0, (weights * best).sum(axis=1) / np.where(total > 0, total, 1), plain).round(6).tolist()


def _features(subject: Subject, blocks: list[Tensor], batch: Batch) -> list[Tensor]:
    """Features ``[n, d]`` of every block at the real tokens of a batch, first ones left out."""
    subject.run(batch.ids, batch.mask)
    real = batch.mask.bool()
    real[:, 0] = False
    return [x[real.to(x.device)].flatten(1).double().cpu() for x in blocks]


def _consume(
    sums: CkaSums, waiting: list[list[Tensor]], layers_a: int, generator: torch.Generator, last: bool
) -> list[list[Tensor]]:
    """Form minibatches of shuffled tokens; what is left over waits for more, unless this is the end."""
    joined = [torch.cat(parts) for parts in zip(*waiting)]
    order = torch.randperm(joined[0].shape[0], generator=generator)
    parts = list(order.split(_MINIBATCH))
    left = [] if last or parts[-1].shape[0] == _MINIBATCH else [parts.pop()]
    if last and len(parts) > 1 and parts[-1].shape[0] < _MINIBATCH:
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts:
        if part.shape[0] >= 4:
            sums.add([x[part] for x in joined[:layers_a]], [x[part] for x in joined[layers_a:]])
    return [[x[part] for x in joined] for part in left]


def _kernel(features: Tensor) -> Tensor:
    """Linear kernel ``[n, n]`` with its diagonal set to zero."""
    features = features.double() - features.double().mean(dim=0)  # changes no HSIC, and keeps the digits that matter
    return (features @ features.T).fill_diagonal_(0)


def _hsic(k: Tensor, other: Tensor | None) -> Tensor:
    """Unbiased HSIC (Song et al., 2012, equation 5) of kernels ``[L1, n, n]`` with others ``[L2, n, n]``: ``[L1, L2]``.

    Without others, of each with itself: ``[L1]``.
    """
    n = k.shape[-1]
    if other is None:
        product, rows = (k * k).sum(dim=(1, 2)), k.sum(dim=2)
        totals, squares = rows.sum(dim=1) ** 2, (rows * rows).sum(dim=1)
    else:
        product, rows, columns = k.flatten(1) @ other.flatten(1).T, k.sum(dim=2), other.sum(dim=2)
        totals, squares = torch.outer(rows.sum(dim=1), columns.sum(dim=1)), rows @ columns.T
    return (product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * squares) / (n * (n - 3))
