"""How early a model knows what it will say: divergence of the logit lens from its own last word, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.analysis.intervals import as_interval, document_statistic
from engram.analysis.sample import Progress, Sample, iter_batches
from engram.analysis.streams import Lens, record_blocks
from engram.analysis.subject import Subject

__all__ = ["lens_divergence", "logit_lens"]


@torch.no_grad()
def lens_divergence(subject: Subject, sample: Sample, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Per document the sums of KL(final || lens at the block), nats ``[D, L]``, and numbers of tokens ``[D]``."""
    lens, places = Lens(subject), sample.document_places()
    documents, sums = len(sample.documents), None
    counts = np.bincount(places, [len(window.ids) for window in sample.windows], minlength=documents)
    with record_blocks(subject) as blocks:
        for batch in iter_batches(sample, subject.vocab_size, progress):
            final = subject.logits(batch.ids, batch.mask)
            real = batch.mask.bool().to(final.device)
            owner = torch.from_numpy(places[batch.places])[:, None].expand_as(batch.mask)[batch.mask.bool()].numpy()
            if sums is None:
                sums = np.zeros((documents, len(blocks)))
            values = _divergence(lens, final[real], [hidden[real] for hidden in blocks])
            for layer, own in enumerate(values.cpu().numpy()):
                sums[:, layer] += np.bincount(owner, own, minlength=documents)
    assert sums is not None
    return sums, counts


def logit_lens(subjects: Mapping[str, Subject], sample: Sample, progress: Progress | None = None) -> dict[str, Any]:
    """Mean KL(final || lens) per block of each subject, and the difference of the others from the first, document by document.

    Args:
        subjects: what to look at, by name; each is compared with its own final distribution. The first is the reference.
        sample: the text; every token counts.
        progress: told of tokens done, for each subject in turn.

    Returns:
        ``subjects: {name: [{layer, mean, low, high}]}`` and ``difference: {name: ...}`` in nats per token, for subjects with as many
        blocks as the first; blocks are counted from 0, and the value is that after the block.
    """
    found = {name: lens_divergence(subject, sample, progress) for name, subject in subjects.items()}
    first = next(iter(found))
    curves = {name: _curve(sums, counts) for name, (sums, counts) in found.items()}
    differences = {
        name: _curve(sums - found[first][0], counts)
        for name, (sums, counts) in found.items()
        if name != first and sums.shape == found[first][0].shape
    }
    tokens = int(next(iter(found.values()))[1].sum())
    return {
        "unit": "nats per token",
        "tokens": tokens,
        "documents": len(sample.documents),
        "reference": first,
        "subjects": curves,
        "difference": differences,
    }


def _divergence(lens: Lens, final: Tensor, blocks: list[Tensor]) -> Tensor:
    """KL(final || lens), nats ``[L, n]``, from final logits ``[n, V]`` and hidden states ``[n, ...]`` of each block."""
    values = torch.empty((len(blocks), len(final)), dtype=torch.float64, device=final.device)
    for start in range(0, len(final), lens.chunk):
        part = slice(start, start + lens.chunk)
        wanted = final[part].log_softmax(-1)
        share = wanted.exp()
        negative_entropy = (share * wanted).sum(-1)
        for layer, hidden in enumerate(blocks):
            said = lens.logits(hidden[part])
            cross = said.logsumexp(-1) - (share * said).sum(-1)
            values[layer, part] = negative_entropy + cross
    return values


def _curve(sums: np.ndarray, counts: np.ndarray) -> list[dict[str, Any]]:
    columns = np.concatenate([sums, counts[:, None]], axis=1)
    value, low, high = document_statistic(columns, lambda totals: totals[:, :-1] / totals[:, -1:])
    ends = (None, None) if low is None or high is None else (low, high)
    return [
        {"layer": layer, **as_interval("mean", value[layer], *(None if end is None else end[layer] for end in ends))}
        for layer in range(sums.shape[1])
    ]
