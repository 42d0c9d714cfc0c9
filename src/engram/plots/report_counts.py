"""The report's words on counts of n-grams beside the models of an allocation (``benchmarks/ngram_baseline.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engram.experiments.statistics import excludes_zero, mean_interval
from engram.plots.markdown import count, interval, literal_text, plural, table

__all__ = ["counts_beside", "counts_in_short", "counts_row"]

_MEMORYS_OWN = 3
"""The longest n-gram that the allocation's memories look up."""
_ARMS = {"experts alone": "experts alone", "best with a memory": "the best share with a memory"}
_NAMES = {2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}


def counts_row(rival: Mapping[str, Any] | None, budget: str, header: Sequence[str]) -> list[tuple[str, ...]]:
    """A row for the table of an allocation's budget, filled where a column says something of counts; none without such a result."""
    rows = []
    for entry in _trigrams(rival):
        if entry["budget"] == budget:
            less = entry["less"]["experts alone"]
            known = {
                header[0]: "trigram counts (Kneser-Ney)",
                "test loss": interval(entry["test"]["loss"]),
                "bits per byte": f"{entry['test']['bits_per_byte']['mean']:.3f}",
                "difference to experts alone": interval(less["test"]["loss"], signed=True),
                "on the validation half": interval(less["validation"]["loss"], signed=True),
            }
            rows.append(tuple(known.get(name, "–") for name in header))
    return rows


def counts_in_short(rival: Mapping[str, Any] | None) -> list[str]:
    """Lines for the report's opening, beside the gains of memories."""
    return [
        f"- {literal_text(entry['budget'])}: trigram counts of the same tokens (interpolated Kneser-Ney), which train nothing, are "
        f"{_beside(entry)}. Gains over experts alone are to be read beside that."
        for entry in _trigrams(rival)
    ]


def _trigrams(rival: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [] if rival is None else [entry for entry in rival["summary"] if entry["order"] == _MEMORYS_OWN]


def _beside(entry: Mapping[str, Any]) -> str:
    """Where counts lie, with intervals."""
    told = []
    for name, arm in entry["less"].items():
        difference = arm["test"]["loss"]
        told.append(f"{_compared(difference)} {_ARMS[name]} ({interval(difference, signed=True)} nats)")
    return " and ".join(told)


def counts_beside(rival: Mapping[str, Any]) -> list[str]:
    """A table of counts by budget and order, and of mixtures where models were mixed with them."""
    header = (
        "counts",
        "n-grams",
        "test loss",
        "bits per byte",
        "less experts alone",
        "less the best with a memory",
        "on the validation half",
    )
    rows = [
        (
            f"{literal_text(entry['budget'])}, {_NAMES[entry['order']]}s",
            count(_stored(rival, entry)),
            interval(entry["test"]["loss"]),
            f"{entry['test']['bits_per_byte']['mean']:.3f}",
            *(interval(entry["less"][arm]["test"]["loss"], signed=True) for arm in ("experts alone", "best with a memory")),
            interval(entry["less"]["best with a memory"]["validation"]["loss"], signed=True),
        )
        for entry in rival["summary"]
        if entry["order"] in _NAMES
    ]
    return [
        "**Counts of the same tokens.** A memory is addressed by n-grams, so its plain rival is to count them: interpolated Kneser-Ney counts "
        "(modified, Chen and Goodman 1999) of exactly the tokens that a run of each seed reads, with contexts as the run sees them, measured "
        "on the same tokens. Nothing is trained, and nothing but the n-grams' numbers is kept.",
        table(header, rows, right=range(1, len(header))),
        _verdict(rival),
        _held_out(rival.get("held_out_text", {})),
        *_mixtures(rival),
    ]


def _held_out(halves: Mapping[str, Mapping[str, Any]]) -> str:
    """How few texts all losses of the allocation rest on."""
    told = [
        f"{half}: {plural(part['documents'], 'document')} of {plural(part['files'], 'file')}, the largest (`{part['largest']}`) with "
        f"{100 * part['largest_share']:.0f} % of the bytes"
        for half, part in halves.items()
    ]
    return f"What both were measured on, {'; '.join(told)}. Intervals are over seeds and hold for this text." if told else ""


def _stored(rival: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """How many n-grams of all lengths are kept, mean over seeds."""
    chosen = [p for p in rival["points"] if (p["budget"], p["order"]) == (entry["budget"], entry["order"])]
    return mean_interval([float(sum(p["ngrams"])) for p in chosen])["mean"]


def _verdict(rival: Mapping[str, Any]) -> str:
    told = [f"{literal_text(entry['budget'])}: {_beside(entry)}" for entry in _trigrams(rival)]
    return (
        f"Trigram counts beside models, test half: {'; '.join(told)}. So a gain over experts alone is by itself no evidence that a memory is "
        "worth its parameters: within so few tokens experts alone have not yet learnt what counts say, and rows that n-grams address may "
        "gain by learning just that, sooner."
    )


def _compared(difference: Mapping[str, Any]) -> str:
    if not excludes_zero(difference["low"], difference["high"]):
        return "not told apart from"
    return "below" if difference["mean"] < 0 else "above"


def _mixtures(rival: Mapping[str, Any]) -> list[str]:
    if not rival["differences"]:
        return ["*Mixtures of models with counts: not measured (`benchmarks/ngram_baseline.py --train`).*"]
    header = ("arm", "n-grams up to", "model", "counts", "mixture", "weight of the model")
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for entry in rival["mixtures"]:
        groups.setdefault((entry["arm"], entry["order"]), []).append(entry)
    rows = [
        (
            literal_text(arm),
            str(order),
            *(_bits([entry["test"][name] for entry in group]) for name in ("model", "counts", "mixture")),
            f"{mean_interval([entry['weight_of_model'] for entry in group])['mean']:.2f}",
        )
        for (arm, order), group in groups.items()
    ]
    asked = ("without - with", "without + counts - with", "with + counts - with", "without + counts - with + counts")
    sharper = [
        (
            f"{literal_text(entry['without'])} / {literal_text(entry['with'])}",
            str(entry["order"]),
            *(interval(entry[name]["bits_per_byte"], signed=True) for name in asked),
        )
        for entry in rival["differences"]
    ]
    return [
        "The sharper question is whether a memory gives a model more than counts give it: each model mixed with counts of its own tokens, by "
        "one weight that the validation half chooses. Bits per byte on the test half:",
        table(header, rows, right=range(1, len(header))),
        "Differences, seed by seed; above zero the model with the memory (right of the minus) is better:",
        table(("without / with", "n-grams up to", *map(literal_text, asked)), sharper, right=range(1, 6)),
    ]


def _bits(scores: Sequence[Mapping[str, Any]]) -> str:
    return interval(mean_interval([score["bits_per_byte"] for score in scores]), digits=3)
