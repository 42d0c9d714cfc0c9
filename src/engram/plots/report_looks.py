"""The report's tables on looks inside, long context and throughput."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engram.experiments.look_evidence import tells_what_memory_does
from engram.plots.markdown import count, interval, literal_text, table
from engram.plots.results import COPYING, SHARE, recall_interval

__all__ = ["copying", "long_context", "looks", "throughput"]


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
    """By seed and model: from how many tokens on it copies, and what it does where the losses of the two are equal."""
    entries = result["entries"]
    equal = {pair["seed"]: pair for pair in result.get("pairs", ())}
    rows = []
    for seed, model in sorted({(entry["seed"], entry["model"]) for entry in entries}):
        run = sorted((e for e in entries if (e["seed"], e["model"]) == (seed, model)), key=lambda entry: entry["tokens"])
        first = next((entry["tokens"] for entry in run if entry[COPYING] >= _COPIES), None)
        at = equal.get(seed, {}).get(model)
        there = (count(at["tokens"]), f"{at['held_out_loss']:.4f}", f"{at[COPYING]:.2f}") if at else ("–",) * 3
        last = run[-1]
        rows.append(
            (
                str(seed),
                literal_text(model),
                count(first) if first else f"not by {count(last['tokens'])}",
                f"{last[COPYING]:.2f}",
                *there,
            )
        )
    header = ("seed", "model", "tokens to copy", "nats at the end", "tokens at equal loss", "held-out loss there", "nats there")
    return [
        table(header, rows, right=range(2, 7)),
        "Nats per token by which random tokens cost less when they are shown a second time in one context. To copy: at least "
        f"{_COPIES} nats, at the first checkpoint that was measured. Equal loss: the latest checkpoints of the two models of a seed "
        f"that are within {result['sizes']['equal']} nats on held-out text.",
    ]


def long_context(result: Mapping[str, Any]) -> list[str]:
    """Exact answers by model, question and length."""
    models = result["models"]
    keys = list(dict.fromkeys((s["kind"], s["length"]) for model in models.values() for s in model["scores"]))
    rows = []
    for name, model in models.items():
        scores = {(s["kind"], s["length"]): s for s in model["scores"]}
        before, after = (
            "–" if model[key] is None else f"{model[key]:.4f}" for key in ("held_out_loss_before", "held_out_loss")
        )
        for key in keys:
            if key in scores:
                score = scores[key]
                share = f"{100 * score['share']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
                seeds = ", ".join(f"{100 * exact / answers:.1f}" for exact, answers in score["by_seed"].values())
                rows.append(
                    (
                        literal_text(name),
                        before,
                        after,
                        literal_text(key[0]),
                        count(key[1]),
                        count(score["answers"]),
                        share,
                        seeds,
                    )
                )
    exact = f"exact, % [95 %: {recall_interval(models)}]"
    header = ("model", "held-out loss before", "after", "question", "tokens", "answers", exact, "by seed, %")
    parts = [table(header, rows, right=(1, 2, 4, 5, 6, 7))]
    if any(len(score["by_seed"]) > 1 for model in models.values() for score in model["scores"]):
        parts.append(
            "Answers of one training hang together, so intervals are over seeds; they are no narrower than Wilson's over all answers, and end "
            "at 0 and 100 %."
        )
    told = [_copying_before(name, model) for name, model in models.items() if model["copying_before"]]
    if told:
        parts.append(
            f"Random tokens shown a second time in one context cost less by so many nats per token, before recall was trained: "
            f"{'; '.join(told)}. A model that cannot copy yet gains about nothing."
        )
    return parts


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
            )
        )
    header = ("backbone", "optimiser", "table rows", "tokens per step", "seconds without", "seconds with", "throughput kept")
    rounds = result["entries"][0][SHARE]["throughput"]["rounds"]
    shares = [entry[SHARE]["throughput"] for entry in result["entries"]]
    level = sum(share["min"] <= 1 <= share["max"] for share in shares)
    return [
        table(header, rows, right=range(2, 7)),
        f"Medians of {rounds} rounds, of the seconds and of the shares each for itself; in brackets the range, which includes 1 in {level} of "
        f"{len(shares)} rows.",
    ]
