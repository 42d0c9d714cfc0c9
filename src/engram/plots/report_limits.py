"""What a small study cannot show, written by hand around numbers from its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engram.experiments.statistics import holm, p_value
from engram.plots.markdown import count, literal_text, plural, span

__all__ = ["limits"]

_ALWAYS = (
    "**Tasks.** There are no downstream tasks: knowledge, reasoning and reading comprehension are out of reach of such models. Loss on "
    "held-out text is what is compared, and answers to made-up questions where long text, or a memory switched off, is asked about.",
    "**Settings.** One optimiser, schedule and batch size serve all arms of a sweep; only learning rates were chosen, and for some groups "
    "of arms together.",
    "**Speed.** Times are of this implementation on the hardware named, not of the paper's system.",
)


def limits(
    sweeps: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], paper: Mapping[str, Any], control: str = ""
) -> str:
    """A list; what needs results is left out without them.

    Args:
        sweeps: results by name.
        verdicts: as ``engram.experiments.claims.judge`` gives them.
        paper: the paper's own figures.
        control: a line on how good experts alone are.
    """
    lines = (*_scale(sweeps, paper), control, _many_questions(verdicts), *_ALWAYS)
    return "\n".join(f"- {line}" for line in lines if line)


def _many_questions(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """That some intervals miss by chance, and what is left if none of them shall."""
    judged = [entry for entry in verdicts if entry["low"] is not None]
    if not judged:
        return ""
    told = (
        f"**Many questions.** {plural(len(judged), 'interval')} of 95 % {'is' if len(judged) == 1 else 'are'} judged above; one in twenty "
        "would miss the truth by chance alone, and a sign that was claimed is counted as agreeing however much smaller or larger the effect "
        "is than the paper's."
    )
    of_seeds = [entry for entry in judged if entry["seeds"] and entry["seeds"] > 1]
    p_values = [p_value(entry["value"], entry["low"], entry["high"], entry["seeds"] - 1) for entry in of_seeds]
    kept = [entry for entry, there in zip(of_seeds, holm(p_values)) if there]
    parts = []
    for verdict in ("agrees", "disagrees"):
        all_of, left = (sum(entry["verdict"] == verdict for entry in entries) for entries in (of_seeds, kept))
        if all_of:
            parts.append(f"{left} of the {all_of} that are told to {verdict.removesuffix('s')}")
    if not parts:
        return told
    lost = [entry for entry in of_seeds if entry["verdict"] in ("agrees", "disagrees") and entry not in kept]
    named = "; ".join(f"{entry['statement']} ({literal_text(entry['where'])})" for entry in lost)
    return (
        f"{told} If the chance of one such miss shall be 5 % for all of them together (Holm's rule), {' and '.join(parts)} stay"
        f"{f'. Not: {named}' if named else ''}."
    )


def _scale(sweeps: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Any]) -> Iterator[str]:
    points = [point for result in sweeps.values() for point in result["points"]]
    if not points:
        return
    total, active = (count(max(p["counts"][key] for p in points)) for key in ("total", "active"))
    scale = next(iter(paper["allocation"].values()))["scale"]
    yield (
        f"**Size.** Models here have at most {total} parameters, and none has more than {active} active ones; the paper's larger budget is "
        f"{scale}. What holds for one need not hold for the other, in either direction."
    )
    per_active, epochs = span([p["tokens"] / p["counts"]["active"] for p in points]), span([p["epochs"] for p in points])
    yield (
        f"**Training.** Runs see {per_active} tokens per active parameter and {epochs} epochs of the text. Tables are read by n-grams that "
        "were seen before, so what a memory is worth depends on both; models that are trained for longer may divide the work otherwise."
    )
    yield _seeds(sweeps)
    yield from list(filter(None, map(_text, sweeps.values())))[:1]


def _seeds(sweeps: Mapping[str, Mapping[str, Any]]) -> str:
    """How many there are of each setting, and what so few cannot tell."""
    found: dict[tuple[str, ...], set[int]] = {}
    for name, result in sweeps.items():
        for point in result["points"]:
            found.setdefault((name, *point["labels"].values()), set()).add(point["seed"])
    numbers = [len(seeds) for seeds in found.values()]
    few = (
        f"intervals from {min(numbers)} seeds are wide and themselves uncertain"
        if min(numbers) > 1
        else "one seed has no interval"
    )
    return (
        f"**Seeds.** {span(numbers)} per setting. Effects as small as several of the paper's are below what so few runs can tell apart, and "
        f"{few}."
    )


def _text(result: Mapping[str, Any]) -> str:
    kinds = {kind: sizes["tokens"] for kind, sizes in result["data"]["counts"].get("train", {}).items()}
    total = sum(kinds.values())
    if not total:
        return ""
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{literal_text(kind)} {100 * tokens / total:.0f} %" for kind, tokens in ordered)
    base = result["recipe"].get("base") or {}
    vocabulary = (base.get("data") or {}).get("vocab_size")
    of = "" if vocabulary is None else f" in a vocabulary of {count(vocabulary)}"
    python = _is_python(base)
    return (
        f"**Text.** {count(total)} tokens{of} to train on, by kind: {shares}.{python} A memory of n-grams may find more to remember in so "
        "narrow a corpus than in text of the web, or less; and with a small vocabulary an n-gram covers fewer words than with a large one."
    )


def _is_python(base: Mapping[str, Any]) -> str:
    corpus = (base.get("data") or {}).get("corpus")
    standard = isinstance(corpus, Mapping) and corpus.get("standard_library")
    return " Python's own library is in it: one programming language, with tests that repeat themselves." if standard else ""
