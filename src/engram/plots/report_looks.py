"""The report's tables on looks inside, long context and throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engram.data.long_context import RecallTask, chance_of
from engram.experiments.look_evidence import tells_what_memory_does
from engram.experiments.statistics import mean_interval
from engram.plots.markdown import count, interval, literal_text, plural, table
from engram.plots.results import COPYING, SHARE, recall_interval

__all__ = ["copying", "easier_questions", "long_context", "looks", "throughput"]


def looks(result: Mapping[str, Any]) -> list[str]:
    """What was read, and what is lost with the memory off."""
    against = f", beside {literal_text(result['against'])}" if result["against"] else ""
    parts = [f"Looked at: {literal_text(result['model'])}{against}, on {count(result['text']['tokens'])} tokens."]
    parts += [f"Left out: {literal_text(name)}: {literal_text(reason)}." for name, reason in result["skipped"].items()]
    parts += _lens(result)
    off = result.get("memory_off")
    if off:
        groups = {"all": off["all"], **off["by_kind"], **{f"token: {name}": group for name, group in off["by_token"].items()}}
        rows = [
            (
                literal_text(name),
                count(group["tokens"]),
                interval(group["loss_on"], 3),
                interval(group["loss_off"], 3),
                interval(group["lost"], 3, signed=True),
                interval(group["accuracy_kept"], 1, factor=100),
            )
            for name, group in groups.items()
        ]
        if "facts" in off["by_kind"] and str(result.get("texts")).endswith("standard texts"):
            parts.append(
                "The sentences of *facts* stand in `corpus/countries.txt`: a model whose corpus has that file was trained on them."
            )
        parts.append(
            table(("text", "tokens", "loss, memory on", "loss, off", "lost, nats", "accuracy kept, %"), rows, right=range(1, 6))
        )
    return parts


def _lens(result: Mapping[str, Any]) -> list[str]:
    """What each block knows already of what the model will say."""
    lens = result.get("logit_lens") or {}
    differences = lens.get("difference", {}).get("against")
    if not differences:
        return []
    first, second = lens["subjects"][lens["reference"]], lens["subjects"]["against"]
    rows = [
        (str(a["layer"]), interval(a, 3), interval(b, 3), interval(difference, 3, signed=True))
        for a, b, difference in [*zip(first, second, differences)][:-1]  # of the last block it is zero
    ]
    documents = ", ".join(
        f"{literal_text(kind)} {found['documents']}" for kind, found in result["text"].get("kinds", {}).items()
    )
    told = f" Intervals are over documents ({documents}): too narrow where they are few." if documents else ""
    names = (
        ["with memory", "without"]
        if tells_what_memory_does(result)
        else list(map(literal_text, (result["model"], result["against"])))
    )
    header = ("block", f"KL of the lens, {names[0]}", names[1], f"{names[1]} less {names[0].removesuffix(' memory')}")
    return [
        table(header, rows, right=range(4)),
        f"KL of what the head makes of a block's output to what the model says in the end, nats per token; one model each.{told}",
    ]


_COPIES = 0.5
"""Nats per token from which a model is said to copy here."""


def copying(result: Mapping[str, Any]) -> list[str]:
    """By seed and model: from how many tokens on it copies, and what it does at equal tokens and where the losses of the two are equal."""
    runs = _copying_runs(result["entries"])
    last_common = {seed: _last_common([run for (of, _), run in runs.items() if of == seed]) for seed, _ in runs}
    all_at = set(last_common.values())
    at = all_at.pop() if len(all_at) == 1 else None
    equal = {pair["seed"]: pair for pair in result.get("pairs", ())}
    rows = []
    for (seed, model), run in runs.items():
        first = next((entry["tokens"] for entry in run if entry[COPYING] >= _COPIES), None)
        pair = equal.get(seed, {}).get(model)
        there = (count(pair["tokens"]), f"{pair['held_out_loss']:.4f}", f"{pair[COPYING]:.2f}") if pair else ("–",) * 3
        rows.append(
            (
                str(seed),
                literal_text(model),
                count(first) if first else f"not by {count(run[-1]['tokens'])} (ended there)",
                _nats_at(run, last_common[seed], say_where=at is None),
                f"{run[-1][COPYING]:.2f}",
                *there,
            )
        )
    at_tokens = "nats at equal tokens" if at is None else f"nats at {count(at)} tokens"
    header = (
        *("seed", "model", "tokens to copy", at_tokens, "nats at its own end"),
        *("tokens at equal loss", "held-out loss there", "nats there"),
    )
    return [table(header, rows, right=range(2, 8)), *_less_copied(runs, last_common, equal), _copying_note(result["sizes"])]


def _less_copied(
    runs: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]], last_common: Mapping[int, int | None], equal: Mapping[int, Any]
) -> list[str]:
    """By how much less models with a memory copy than those without, over seeds; nothing where no two are to be compared."""
    at_tokens = [
        [next(entry[COPYING] for entry in runs[seed, model] if entry["tokens"] == tokens) for model in ("dense", "engram")]
        for seed, tokens in last_common.items()
        if tokens is not None
    ]
    at_loss = [[pair[model][COPYING] for model in ("dense", "engram")] for pair in equal.values()]
    told = []
    for where, both in (("equal tokens", at_tokens), ("equal loss", at_loss)):
        if both:
            less = mean_interval([without - having for without, having in both])
            told.append(f"{interval(less, 2, signed=True)} nats at {where} ({plural(len(both), 'seed')})")
    return [f"Copying without a memory less that with one, seed by seed: {', '.join(told)}."] if told else []


def _copying_runs(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], list[Mapping[str, Any]]]:
    """Checkpoints by seed and model, in the order of tokens."""
    runs: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: (entry["seed"], entry["model"], entry["tokens"])):
        runs.setdefault((entry["seed"], entry["model"]), []).append(entry)
    return runs


def _last_common(runs: Sequence[Sequence[Mapping[str, Any]]]) -> int | None:
    """The largest number of tokens at which all of several runs were measured; None for one run, or where there is none."""
    common = set.intersection(*({entry["tokens"] for entry in run} for run in runs))
    return max(common) if len(runs) > 1 and common else None


def _nats_at(run: Sequence[Mapping[str, Any]], tokens: int | None, say_where: bool) -> str:
    if tokens is None:
        return "–"
    nats = next(entry[COPYING] for entry in run if entry["tokens"] == tokens)
    return f"{nats:.2f} (at {count(tokens)})" if say_where else f"{nats:.2f}"


def _copying_note(sizes: Mapping[str, Any]) -> str:
    smoothed = (
        f", by their own loss and by the median of {sizes['smoothed']} neighbouring checkpoints, since single losses swing"
        if "smoothed" in sizes
        else ", by their own loss alone, which swings from one checkpoint to the next"
    )
    return (
        "Nats per token by which random tokens cost less when they are shown a second time in one context. To copy: at least "
        f"{_COPIES} nats, at the first checkpoint that was measured. Runs may have ended at different numbers of tokens; at equal tokens is at "
        "the last at which both models of a seed were measured. Equal loss: the latest checkpoints of the two models of a seed that are within "
        f"{sizes['equal']} nats on held-out text{smoothed}; a dash where there are none."
    )


_RANDOM = (
    "*Copying at random*: what a model finds that copies numbers noted in the text, whichever are asked for, and copies without fail. One that "
    "finds only a share of single needles would find that share of it; what is not above that shows no more than copying."
)
_EQUAL_LOSS = (
    "Equal loss before recall was trained is that of single checkpoints, which swings from one to the next. Whether the pairs were equal by "
    "smoothed losses too stands where copying is measured; those that were not may be equal by chance."
)
_OTHER = " *Another noted number*: answers that are wrong, but are a number noted elsewhere in the text; the other wrong ones are none of them."


def long_context(result: Mapping[str, Any]) -> list[str]:
    """Exact answers by model, question and length, beside what copying at random finds."""
    models = result["models"]
    keys = list(dict.fromkeys((s["kind"], s["length"]) for model in models.values() for s in model["scores"]))
    others = any(score.get("other_value") is not None for model in models.values() for score in model["scores"])
    rows: list[tuple[str, ...]] = []
    for name, model in models.items():
        scores = {(s["kind"], s["length"]): s for s in model["scores"]}
        losses = ("–" if model[key] is None else f"{model[key]:.4f}" for key in ("held_out_loss_before", "held_out_loss"))
        told = (literal_text(name), *losses)
        rows += [(*told, *_recall_cells(scores[key], others)) for key in keys if key in scores]
    exact = f"exact, % [95 %: {recall_interval(models)}]"
    header = [
        "model",
        "held-out loss before",
        "after",
        "question",
        "tokens",
        "answers",
        "copying at random, %",
        exact,
        "by seed, %",
    ]
    header += ["another noted number, %"] if others else []
    parts = [table(header, rows, right=(1, 2, *range(4, 10))), _RANDOM + (_OTHER if others else ""), *_of_before(result)]
    if any(len(score["by_seed"]) > 1 for model in models.values() for score in model["scores"]):
        parts.append(
            "Answers of one training hang together, so intervals are over seeds; they are no narrower than Wilson's over all answers, and end "
            "at 0 and 100 %."
        )
    if result.get("sizes", {}).get("equal_loss"):
        parts.append(_EQUAL_LOSS)
    before = [_copying_before(name, model) for name, model in models.items() if model["copying_before"]]
    if before:
        parts.append(
            f"Random tokens shown a second time in one context cost less by so many nats per token, before recall was trained: "
            f"{'; '.join(before)}. A model that cannot copy yet gains about nothing."
        )
    return parts


def easier_questions(result: Mapping[str, Any]) -> dict[str, float]:
    """What copying at random found of the questions that are harder by default now, by kind; 0 to 1."""
    scores = [score for model in result["models"].values() for score in model["scores"]]
    return {score["kind"]: chance_of(score) for score in scores if score.get("more_easily")}


def _of_before(result: Mapping[str, Any]) -> list[str]:
    """That a result is of questions that are asked otherwise now, and its command makes no such result any more."""
    easier = easier_questions(result)
    if not easier:
        return []
    told = "; ".join(
        f"{literal_text(kind)} {100 * then:.1f} % then, {100 * RecallTask(kind).chance:.1f} % now"
        for kind, then in easier.items()
    )
    return [
        "**Asked more easily than now.** This result is from before some questions were asked among more notes. What copying at random finds: "
        f"{told}. The command it was made with asks the harder questions today: what it gives is not to be compared with this."
    ]


def _recall_cells(score: Mapping[str, Any], others: bool) -> tuple[str, ...]:
    """One kind of question and length, as cells; with ``others`` how often another noted number was said."""
    share, low, high = (100 * score[key] for key in ("share", "low", "high"))
    other = score.get("other_value")
    said_other = "–" if other is None else f"{100 * other / score['answers']:.1f}"
    return (
        literal_text(score["kind"]),
        count(score["length"]),
        count(score["answers"]),
        f"{100 * chance_of(score):.1f}",
        f"{share:.1f} [{low:.1f}, {high:.1f}]",
        ", ".join(f"{100 * exact / answers:.1f}" for exact, answers in score["by_seed"].values()),
        *([said_other] if others else []),
    )


def _copying_before(name: str, model: Mapping[str, Any]) -> str:
    values = [f"{value:.2f}" for value in model["copying_before"]]
    return f"{literal_text(name)} {values[0] if len(set(values)) == 1 else ', '.join(values) + ' by seed'}"


def throughput(result: Mapping[str, Any]) -> list[str]:
    """Seconds per step with a memory and without, and the share of throughput that is left, round by round."""
    rows = []
    for entry in result["entries"]:
        share, seconds = entry[SHARE]["throughput"], entry["seconds"]
        rows.append(
            (
                *(literal_text(entry[key]) for key in ("backbone", "optimizer")),
                count(entry["table_rows"]),
                count(entry["tokens_per_step"]),
                *(f"{seconds[arm]['median']:.4f}" for arm in ("without", "with")),
                f"{share['median']:.3f} ({share['min']:.3f} to {share['max']:.3f})",
                f"{entry[SHARE]['cpu_time']['median']:.3f}" if "cpu_time" in entry[SHARE] else "–",
            )
        )
    header = (
        "backbone",
        "optimiser",
        "table rows",
        "tokens per step",
        "seconds without",
        "seconds with",
        "throughput kept",
        "by CPU time",
    )
    rounds = result["entries"][0][SHARE]["throughput"]["rounds"]
    shares = [entry[SHARE]["throughput"] for entry in result["entries"]]
    level = sum(share["min"] <= 1 <= share["max"] for share in shares)
    return [
        table(header, rows, right=range(2, 8)),
        f"Medians of {rounds} rounds, of the seconds and of the shares each for itself; in brackets the range, which includes 1 in {level} of "
        f"{len(shares)} rows.",
    ]
