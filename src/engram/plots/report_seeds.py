"""The report's tables on several trainings: looks inside seed by seed, and what is left when the memory is switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engram.data.long_context import RecallTask
from engram.experiments.seed_evidence import LOOKS, arms_of, kept, total
from engram.experiments.statistics import mean_interval
from engram.plots.look import PHRASE_COLUMNS
from engram.plots.markdown import count, interval, literal_text, plural, table

__all__ = ["KEPT_GROUPS", "kept_interval", "looks_by_seed", "memory_off"]

KEPT_GROUPS = ("facts", "reading", "known before")
"""Groups of questions in a result on memories switched off."""

_PHRASES = 12
_EARLIER_CHANCE = 0.25


def looks_by_seed(result: Mapping[str, Any]) -> list[str]:
    """Logit lens, similarity of layers and gates at ends of phrases, means over seeds with their intervals."""
    looks = [entry[LOOKS] for entry in result["entries"]]
    texts = [entry["text"] for entry in result["entries"]]
    tokens = ", ".join(sorted({count(text["tokens"]) for text in texts}))
    documents = sum(kind["documents"] for kind in texts[0]["kinds"].values())
    modules = ", ".join(map(str, looks[0]["layer_ids"]))
    return [
        f"{plural(len(looks), 'training')} of either kind on the same text; memory at blocks "
        f"{modules}, counted from 0. Looked at: {tokens} tokens of {plural(documents, 'held-out document')}.",
        *_runs(result),
        _lens(looks),
        "KL of what the head makes of a block's output to what the model says in the end, nats per token. *Memory off*: of the same model.",
        *_alignment(looks),
        *_phrases(looks),
    ]


def _runs(result: Mapping[str, Any]) -> list[str]:
    runs = result.get("runs") or {}
    told = [
        f"{literal_text(kind)} {run['held_out']['test']['loss']:.4f} (seed {run['recipe']['seed']})"
        for kind, run in runs.items()
        if "test" in run.get("held_out", {})
    ]
    return [f"Held-out test loss of the first of either kind, nats per token: {', '.join(told)}."] if told else []


def _lens(looks: Sequence[Mapping[str, Any]]) -> str:
    curves = [look["logit_lens"] for look in looks]
    rows = []
    for block in range(len(curves[0]["memory"]) - 1):  # after the last block it is zero
        cells = [mean_interval([curve[name][block] for curve in curves]) for name in ("memory", "off", "without")]
        difference = mean_interval([curve["without"][block] - curve["memory"][block] for curve in curves])
        rows.append((str(block), *(f"{cell['mean']:.3f}" for cell in cells), interval(difference, 3, signed=True)))
    header = ("block", "KL of the lens, with memory", "memory off", "without", "without less with")
    return table(header, rows, right=range(5))


def _alignment(looks: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [look["cka"] for look in looks]
    if any("without" not in alike for alike in found):
        return []
    indices = [{kind: alike[kind]["soft_alignment"] for kind in ("memory", "without")} for alike in found]
    rows = []
    for block in range(len(indices[0]["memory"])):
        memory, without = ([index[kind][block] for index in indices] for kind in ("memory", "without"))
        ahead = mean_interval([a - b for a, b in zip(memory, without)])
        means = (f"{mean_interval(values)['mean']:.2f}" for values in (memory, without))
        rows.append((str(block), *means, interval(ahead, 2, signed=True)))
    top, blocks = found[0]["memory"]["top"], len(found[0]["memory"]["map"][0])
    return [
        table(("block", "index, with memory", "index, without", "blocks ahead"), rows, right=range(4)),
        f"Soft alignment index: the mean place of the {top} of {blocks} blocks of another seed's model without a memory that are most similar "
        "to this one. It is pulled to the middle whatever is compared, so a model without one stands beside it, compared with the very same.",
    ]


def _phrases(looks: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [look["phrases"] for look in looks]
    rows = []
    for layer in found[0]["layers"]:
        cells = []
        for name in PHRASE_COLUMNS:
            values = [phrases["layers"][layer][name]["mean"] for phrases in found]
            known = None if None in values else mean_interval(values)
            cells.append(interval(known, 3, signed=name.startswith("completes_less")))
        rows.append((layer, *cells))
    occurrences = ", ".join(count(phrases["occurrences"]) for phrases in found)
    frequent = ", ".join(list(found[0]["phrases"])[:_PHRASES])
    return [
        table(("layer", *PHRASE_COLUMNS.values()), rows, right=range(8)),
        f"Gates where phrases end: pairs of words that stand together in the text each run was trained on (`find_phrases`), {occurrences} "
        f"occurrences by seed in what was looked at. The most frequent: {literal_text(frequent)}.",
    ]


def _chance(result: Mapping[str, Any], question: str) -> float | None:
    """What copying noted numbers at random finds of a question (kind, then length), 0 to 1; None where the result does not tell."""
    chance = result.get("chance", {}).get(question)
    kind = question.partition(",")[0]
    # So say results from before answers that were given were counted out.
    return RecallTask(kind).chance if kind == "multi_query" and chance == _EARLIER_CHANCE else chance


def memory_off(result: Mapping[str, Any]) -> list[str]:
    """Exact answers with the memory on and off, by arm and question."""
    before, parts = result["before"], []
    rows, details = [], []
    for arm, found in arms_of(result).items():
        for group in KEPT_GROUPS:
            rows.append(
                (literal_text(arm), group, *_states(found, group), interval(kept_interval(found, group), 1, factor=100))
            )
        losses = [mean_interval([entry[state]["held_out_loss"] for entry in found]) for state in ("on", "off")]
        lost = mean_interval([entry["off"]["held_out_loss"] - entry["on"]["held_out_loss"] for entry in found])
        told = " and ".join(f"{loss['mean']:.3f}" for loss in losses)
        parts.append(f"{literal_text(arm)} {told} (off less on {interval(lost, 3, signed=True)})")
        for group in KEPT_GROUPS:
            for question in found[0]["on"][group]:
                own = [
                    {state: {group: {question: entry[state][group][question]}} for state in ("on", "off")} for entry in found
                ]
                exact, asked = before[group][question]
                chance = _chance(result, question)
                at_random = "–" if chance is None else f"{100 * chance:.1f}"
                cells = (
                    literal_text(arm),
                    literal_text(f"{group}: {question}"),
                    count(asked),
                    at_random,
                    f"{100 * exact / asked:.1f}",
                )
                details.append((*cells, *_states(own, group), interval(kept_interval(own, group), 1, factor=100)))
    seeds = len({entry["seed"] for entry in result["entries"]})
    return [
        table(("arm", "questions", "exact, memory on, %", "memory off, %", "kept, %"), rows, right=(2, 3, 4)),
        f"Kept: exact answers with the memory off as a share of those with it on (a dash where these are hardly any), seed by seed; "
        f"{plural(seeds, 'seed')}, intervals of 95 % by Student's t over them. *Known before*: capitals, which the model knew before this "
        "training, whose text does not have them. In all arms facts and reading were trained together, by all weights.",
        f"Held-out loss on ordinary text with the memory on and off, nats per token: {'; '.join(parts)}; before "
        f"{before['held_out_loss']:.3f} (the model alone).",
        table(
            ("arm", "question", "asked", "copying at random, %", "before, %", "memory on, %", "memory off, %", "kept, %"),
            details,
            right=range(2, 8),
        ),
    ]


def kept_interval(found: Sequence[Mapping[str, Any]], group: str) -> dict[str, Any] | None:
    """Share kept with the memory off, mean over seeds with its interval; None as for ``kept``."""
    shares = kept(found, group)
    return None if shares is None else mean_interval(shares)


def _states(found: Sequence[Mapping[str, Any]], group: str) -> tuple[str, str]:
    """Exact answers with the memory on and off, percent, mean over seeds."""
    shares = [[total(entry[state], group) for entry in found] for state in ("on", "off")]
    on, off = (f"{100 * sum(exact / asked for exact, asked in of) / len(of):.1f}" for of in shares)
    return on, off
