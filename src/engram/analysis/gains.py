"""Which n-grams a memory gains most bits with, and with which it loses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engram.analysis.addresses import found_orders, ngram_codes
from engram.analysis.intervals import document_mean
from engram.analysis.losses import TokenLosses
from engram.analysis.sample import Sample

__all__ = ["gains"]

_LISTED = 25


def gains(memory: Any, losses: TokenLosses, sample: Sample, tokenizer: Any, listed: int = _LISTED) -> dict[str, Any]:
    """Bits by which tokens become more probable with the memory on, summed by the longest n-gram that is read just before them.

    For verified rows that is the longest n-gram found; positions that read nothing are left out. So are the first positions of a window that
    does not begin its document: what stood before them was cut away, so that they read n-grams of the leading token that no text holds.
    What an n-gram does to later tokens, through attention or the convolution, is booked on the n-grams there.

    Args:
        memory: an ``EngramModel``.
        losses: its ``token_losses`` on the sample.
        sample: the text.
        tokenizer: makes text of n-grams.
        listed: how many of the largest gains and losses are listed.

    Returns:
        ``per_token``: bits with interval, over all predicted tokens; ``ngrams`` and ``tokens`` that took part, ``cut_off``: tokens left out at
        the beginnings of windows; ``gained`` and ``lost`` bits in all; ``top_gains`` and ``top_losses``: each with the n-gram's text (its
        first occurrence), count, bits in all and on average, and the token that gained (lost) most.
    """
    bits = (losses.off - losses.on) / math.log(2)
    starts = np.cumsum([0, *(len(window.ids) for window in sample.windows)])
    at = starts[losses.window] + losses.position
    order, codes = found_orders(memory, sample)[at], ngram_codes(memory, sample)
    span = max(len(sample_codes) for sample_codes in codes.values()) + 1
    key = np.zeros(len(at), dtype=np.int64)
    for n, code in codes.items():
        key = np.where(order == n, n * span + code[at], key)
    begins = np.array([window.is_beginning for window in sample.windows])[losses.window]
    cut_off = (order > 0) & ~begins & (losses.position < max(memory.engram_config.orders))
    reads = (order > 0) & ~cut_off
    documents = sample.document_places()[losses.window]
    totals = [np.bincount(documents, column) for column in (bits, np.ones(len(bits)))]
    _, first, place = np.unique(key[reads], return_index=True, return_inverse=True)
    number, total = np.bincount(place, minlength=len(first)), np.bincount(place, bits[reads], minlength=len(first))
    chosen = np.flatnonzero(reads)

    def entry(which: int) -> dict[str, Any]:
        members = chosen[place == which]
        best = members[np.argmax(bits[members] * np.sign(total[which]))]
        return {
            "ngram": _text(tokenizer, sample, losses, chosen[first[which]], int(order[chosen[first[which]]])),
            "count": int(number[which]),
            "bits": round(float(total[which]), 3),
            "bits_per_token": round(float(total[which] / number[which]), 3),
            "next": tokenizer.decode([int(losses.target[best])]),
        }

    ranked = np.argsort(-total, kind="stable")
    return {
        "unit": "bits",
        "per_token": document_mean(*totals),
        "tokens": int(reads.sum()),
        "cut_off": int(cut_off.sum()),
        "ngrams": len(first),
        "gained": round(float(total[total > 0].sum()), 3),
        "lost": round(float(total[total < 0].sum()), 3),
        "top_gains": [entry(which) for which in ranked[:listed] if total[which] > 0],
        "top_losses": [entry(which) for which in ranked[::-1][:listed] if total[which] < 0],
    }


def _text(tokenizer: Any, sample: Sample, losses: TokenLosses, token: int, order: int) -> str:
    """Text of the n-gram that ends before a predicted token."""
    ids, end = sample.windows[losses.window[token]].ids, int(losses.position[token]) + 1
    return tokenizer.decode(list(ids[max(0, end - order) : end]))
