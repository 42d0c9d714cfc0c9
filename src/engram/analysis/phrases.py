"""Whether gates open where a phrase is complete: at its last token, beside the end of its first word and the ends of other words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from engram.analysis.gates import gates_and_reads
from engram.analysis.intervals import as_interval, document_statistic
from engram.analysis.sample import Progress, Sample, Window, iter_batches
from engram.analysis.subject import Subject
from engram.errors import ConfigError, DataError

__all__ = ["phrase_gates"]

_WORD = re.compile(r"[^\W\d_]{2,}")
_SHOWN = 40
_PLACES = ("completes", "begins", "other")


@torch.no_grad()
def phrase_gates(
    memory: Any, sample: Sample, tokenizer: Any, phrases: Sequence[str], progress: Progress | None = None
) -> dict[str, Any]:
    """Gates where phrases are complete, layer by layer.

    A phrase *completes* at the token with which its last word ends, and *begins* at the one with which its first word does, if that is
    another. *Other* are tokens with which a word of two letters and more ends outside of all phrases: ends of words are compared with ends of
    words. Gates are means over residual streams, of positions that read something.

    Args:
        memory: an ``EngramModel``.
        sample: the text.
        tokenizer: of the kind that knows where in a text its tokens stand.
        phrases: names and phrases, in any case of letters.
        progress: told of tokens done.

    Returns:
        ``phrases`` (those found: ``{phrase: occurrences}``), ``occurrences``, ``documents`` with any, ``windows_left_out`` (text that makes
        other tokens when it is cut there), ``layers: {layer: {completes, begins, other, completes_less_begins, completes_less_other}}`` (each
        a mean with its 95 % interval over documents) and ``examples``: single occurrences, token by token, with gates by layer.

    Raises:
        ConfigError: no phrase is given.
        DataError: none of them occurs in the text, or the tokenizer does not know where tokens stand.
    """
    if not phrases:
        raise ConfigError("phrases: got none, expected at least one to look for.")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("phrases: the tokenizer does not know where in a text its tokens stand; load its fast version.")
    pattern = _pattern(phrases)
    marked = [_mark(window, tokenizer, pattern) for window in sample.windows]
    found = [phrase for marks in marked if marks for phrase in marks.phrases]
    if not found:
        raise DataError(
            f"phrases: none of {len(phrases):,} occurs in the text that was read; expected some that do, or more text."
        )
    layers = memory.engram_config.layer_ids
    documents = sample.document_places()
    sums = np.zeros((len(layers), len(sample.documents), len(_PLACES), 2))
    examples: list[dict[str, Any]] = []
    subject = Subject("memory", memory)
    for batch in iter_batches(sample, subject.vocab_size, progress):
        with memory.record() as recorded:
            subject.run(batch.ids, batch.mask)
        read = {layer: gates_and_reads(recorded[layer]) for layer in layers}
        for row, place in enumerate(batch.places):
            marks = marked[place]
            if marks is None:
                continue
            gates = np.stack([gate[row].mean(-1) for gate, _ in read.values()])
            reads = np.stack([does_read[row] for _, does_read in read.values()])
            for group, name in enumerate(_PLACES):
                at = np.array(marks.places[name], dtype=int)
                counted = reads[:, at]
                sums[:, documents[place], group, 0] += (gates[:, at] * counted).sum(-1)
                sums[:, documents[place], group, 1] += counted.sum(-1)
            if len(examples) < _SHOWN:
                examples += _examples(sample.windows[place], marks, gates, layers, tokenizer)
    own = sorted(set(documents[[place for place, marks in enumerate(marked) if marks is not None]]))
    return {
        "phrases": {
            phrase: found.count(phrase) for phrase in sorted(set(found), key=lambda phrase: (-found.count(phrase), phrase))
        },
        "occurrences": len(found),
        "documents": int((sums[0, :, 0, 1] > 0).sum()),
        "windows_left_out": sum(marks is None for marks in marked),
        "layers": {str(layer): _means(of_layer[own]) for layer, of_layer in zip(layers, sums)},
        "examples": examples[:_SHOWN],
    }


class _Marks:
    """Where phrases stand in a window: positions by what they are, and for each occurrence its phrase, first and last token."""

    def __init__(self) -> None:
        self.phrases: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.places: dict[str, list[int]] = {name: [] for name in _PLACES}


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Any of the phrases between ends of words; of two that begin alike the longer one. White space may be of any kind."""
    longest_first = sorted({phrase.strip().lower() for phrase in phrases if phrase.strip()}, key=len, reverse=True)
    told = (r"\s+".join(map(re.escape, phrase.split())) for phrase in longest_first)
    return re.compile(rf"(?<!\w)(?:{'|'.join(told)})(?!\w)", re.IGNORECASE)


def _mark(window: Window, tokenizer: Any, pattern: re.Pattern[str]) -> _Marks | None:
    """None where the window's text makes other tokens than the window has: text cut in the midst of a word."""
    text = tokenizer.decode(list(window.ids[1:]), clean_up_tokenization_spaces=False)
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
    if tuple(encoded["input_ids"]) != window.ids[1:]:
        return None
    # The leading token is no part of the text.
    ends = {end: place for place, (_, end) in enumerate(encoded["offset_mapping"], start=1)}
    first_at = [start for start, _ in encoded["offset_mapping"]]
    marks, inside = _Marks(), np.zeros(len(text) + 1, dtype=bool)
    for match in pattern.finditer(text):
        inside[match.start() : match.end() + 1] = True
        if match.end() not in ends:  # a token goes on beyond the phrase
            continue
        last, first_word = ends[match.end()], _WORD.match(text, match.start())
        begins = ends.get(first_word.end()) if first_word else None
        marks.places["completes"].append(last)
        if begins is not None and begins != last:
            marks.places["begins"].append(begins)
        first = int(np.searchsorted(first_at, match.start(), side="right"))
        marks.phrases.append(" ".join(match.group().lower().split()))
        marks.spans.append((max(first, 1), last))
    for word in _WORD.finditer(text):
        if not inside[word.start() : word.end()].any() and word.end() in ends:
            marks.places["other"].append(ends[word.end()])
    return marks


def _means(sums: np.ndarray) -> dict[str, Any]:
    """Means and their differences, from sums and numbers of positions per document and place, ``[D, 3, 2]``."""

    def mean(place: int) -> Any:
        return lambda totals: totals[:, place, 0] / totals[:, place, 1]

    def less(other: int) -> Any:
        return lambda totals: mean(0)(totals) - mean(other)(totals)

    wanted = {name: mean(place) for place, name in enumerate(_PLACES)}
    wanted |= {f"completes_less_{name}": less(place) for place, name in enumerate(_PLACES) if place}
    return {name: as_interval("mean", *document_statistic(sums, statistic)) for name, statistic in wanted.items()}


def _examples(
    window: Window, marks: _Marks, gates: np.ndarray, layers: Sequence[int], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    for phrase, (first, last) in zip(marks.phrases, marks.spans):
        tokens = [
            {
                "token": tokenizer.decode([window.ids[place]]),
                "gates": {str(layer): round(float(gates[number, place]), 4) for number, layer in enumerate(layers)},
            }
            for place in range(max(1, first - 2), last + 1)
        ]
        yield {"phrase": phrase, "tokens": tokens}
