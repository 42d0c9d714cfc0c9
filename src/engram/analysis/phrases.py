"""Whether gates open where a phrase is complete: at its last token, beside the end of its first word and the ends of other words."""

from __future__ import annotations

import re
from collections import Counter
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

_WORD = re.compile(r"(?<!\w)[^\W\d_]{2,}(?!\w)")
_SHOWN = 40
_PLACES = ("completes", "begins", "same_word", "other", "completes_begun")
"""The last: ends of phrases that have another first word."""


@torch.no_grad()
def phrase_gates(
    memory: Any, sample: Sample, tokenizer: Any, phrases: Sequence[str], progress: Progress | None = None
) -> dict[str, Any]:
    """Gates where phrases are complete, layer by layer.

    A phrase *completes* at the token with which its last word ends, and *begins* at the one with which its first word does, if that is
    another. The *same word* is a phrase's last one where it stands outside of all phrases, and *other* are all other words of two letters and
    more there, at the tokens they end with: ends of words are compared with ends of words. Gates are means over residual streams, of
    positions that read something. A word that a token goes on beyond, or that the window's edge may have cut, counts nowhere.

    Args:
        memory: an ``EngramModel``.
        sample: the text.
        tokenizer: of the kind that knows where in a text its tokens stand.
        phrases: names and phrases, in any case of letters, of a script that puts something between words (others are found only where
            signs stand around them).
        progress: told of tokens done.

    Returns:
        ``phrases`` (those found: ``{phrase: occurrences}``), ``not_found`` (the others), ``occurrences``, ``documents`` with any,
        ``windows_left_out`` (whose text makes other tokens), ``layers: {layer: {completes, begins, same_word, other, completes_less_begins,
        completes_less_same_word, completes_less_other}}`` (each a mean with its 95 % interval over documents, None without; there is none where
        phrases occur in fewer than about ten documents of many) and ``examples``: single occurrences, token by token, with gates by layer.

    Raises:
        ConfigError: no phrase is given.
        DataError: none of them occurs in the text, or the tokenizer does not know where tokens stand.
    """
    phrases = [phrase for phrase in (" ".join(phrase.split()) for phrase in phrases) if phrase]
    if not phrases:
        raise ConfigError("phrases: got none, expected at least one to look for.")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("phrases: the tokenizer does not know where in a text its tokens stand; load its fast version.")
    pattern, last_words = _pattern(phrases), _last_words(phrases)
    marked = [_mark(window, tokenizer, pattern, last_words) for window in sample.windows]
    found = Counter(phrase for marks in marked if marks for phrase in marks.phrases)
    if not found:
        left = f" ({marked.count(None)} of {len(marked)} windows make other tokens than were read)" if None in marked else ""
        raise DataError(
            f"phrases: none of {len(phrases):,} occurs in the text that was read{left}; expected some that do, or more text."
        )
    layers, documents = memory.engram_config.layer_ids, sample.document_places()
    sums, examples = _read_gates(memory, sample, tokenizer, marked, progress)
    own = sorted({documents[place] for place, marks in enumerate(marked) if marks is not None})
    return {
        "phrases": dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))),
        "not_found": [phrase for phrase in phrases if phrase.lower() not in found],
        "occurrences": found.total(),
        "documents": len({documents[place] for place, marks in enumerate(marked) if marks and marks.phrases}),
        "windows_left_out": sum(marks is None for marks in marked),
        "layers": {str(layer): _means(of_layer[own]) for layer, of_layer in zip(layers, sums)},
        "examples": sorted(examples, key=lambda example: example["turn"])[:_SHOWN],
    }


def _read_gates(
    memory: Any, sample: Sample, tokenizer: Any, marked: Sequence[_Marks | None], progress: Progress | None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Sums and numbers of gates ``[L, D, 5, 2]`` by layer, document and place, and all occurrences as examples."""
    layers, documents = memory.engram_config.layer_ids, sample.document_places()
    sums = np.zeros((len(layers), len(sample.documents), len(_PLACES), 2))
    examples: list[dict[str, Any]] = []
    shown: Counter[str] = Counter()
    subject = Subject("memory", memory)
    for batch in iter_batches(sample, subject.vocab_size, progress):
        with memory.record() as recorded:
            subject.run(batch.ids, batch.mask)
        read = [gates_and_reads(recorded[layer]) for layer in layers]
        for row, place in enumerate(batch.places):
            marks = marked[place]
            if marks is None:
                continue
            gates = np.stack([gate[row].mean(-1) for gate, _ in read])
            reads = np.stack([does_read[row] for _, does_read in read])
            for group, name in enumerate(_PLACES):
                at = np.array(marks.places[name], dtype=int)
                counted = reads[:, at]
                sums[:, documents[place], group, 0] += (gates[:, at] * counted).sum(-1)
                sums[:, documents[place], group, 1] += counted.sum(-1)
            for example in _examples(sample.windows[place], marks, gates, layers, tokenizer):
                shown[example["phrase"]] += 1
                examples.append({**example, "turn": shown[example["phrase"]]})  # every phrase once before any a second time
    return sums, examples


class _Marks:
    """Where phrases stand in a window: positions by what they are, and for each occurrence its phrase, first and last token."""

    def __init__(self) -> None:
        self.phrases: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.places: dict[str, list[int]] = {name: [] for name in _PLACES}


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Any of the phrases between ends of words, wherever one begins; of two that begin alike the longer one. White space may be of any kind."""
    longest_first = sorted(set(phrases), key=len, reverse=True)
    told = (r"\s+".join(map(re.escape, phrase.split())) for phrase in longest_first)
    return re.compile(rf"(?<!\w)(?=({'|'.join(told)})(?!\w))", re.IGNORECASE)


def _mark(window: Window, tokenizer: Any, pattern: re.Pattern[str], last_words: frozenset[str]) -> _Marks | None:
    """None where the window's text makes other tokens than the window has."""
    text = tokenizer.decode(list(window.ids[1:]), clean_up_tokenization_spaces=False)
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
    if tuple(encoded["input_ids"]) != window.ids[1:]:
        return None
    # The leading token is no part of the text.
    ends = {end: place for place, (_, end) in enumerate(encoded["offset_mapping"], start=1)}
    first_at = [start for start, _ in encoded["offset_mapping"]]
    marks, inside = _Marks(), np.zeros(len(text), dtype=bool)
    for match in pattern.finditer(text):  # matches are empty, what they look at may overlap
        start, end = match.span(1)
        inside[start:end] = True
        if end not in ends or _may_be_cut(start, end, text, window):
            continue
        first_word = _WORD.match(text, start)
        begins = ends.get(first_word.end()) if first_word else None
        marks.places["completes"].append(ends[end])
        if begins is not None and begins != ends[end]:
            marks.places["begins"].append(begins)
            marks.places["completes_begun"].append(ends[end])
        marks.phrases.append(" ".join(match[1].lower().split()))
        marks.spans.append((max(1, int(np.searchsorted(first_at, start, side="right"))), ends[end]))
    for word in _WORD.finditer(text):
        if inside[word.start() : word.end()].any() or word.end() not in ends or _may_be_cut(*word.span(), text, window):
            continue
        marks.places["same_word" if word[0].lower() in last_words else "other"].append(ends[word.end()])
    return marks


def _may_be_cut(start: int, end: int, text: str, window: Window) -> bool:
    """Whether more of a word may have stood beyond the window's edge."""
    return end == len(text) or (start == 0 and not window.is_beginning)


def _last_words(phrases: Sequence[str]) -> frozenset[str]:
    """The last words of the phrases, in lower case."""
    found = (_WORD.findall(phrase.lower()) for phrase in phrases)
    return frozenset(words[-1] for words in found if words)


def _means(sums: np.ndarray) -> dict[str, Any]:
    """Means and their differences, from sums and numbers of positions per document and place, ``[D, 5, 2]``."""
    numbers = {name: number for number, name in enumerate(_PLACES)}

    def mean(place: str) -> Any:
        return lambda totals: totals[:, numbers[place], 0] / totals[:, numbers[place], 1]

    def less(place: str, other: str) -> Any:
        return lambda totals: mean(place)(totals) - mean(other)(totals)

    wanted = {name: mean(name) for name in ("completes", "begins", "same_word", "other")}
    # A phrase of one word has no first word to compare with.
    wanted["completes_less_begins"] = less("completes_begun", "begins")
    wanted |= {f"completes_less_{name}": less("completes", name) for name in ("same_word", "other")}
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
