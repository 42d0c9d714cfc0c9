"""What looks inside and long texts say about the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engram.data.long_context import chance_of
from engram.experiments.evidence import AGREES, CANNOT_TELL, DISAGREES, Evidence, Results, sign_verdict
from engram.experiments.statistics import share_over_seeds, widened

__all__ = ["alignment", "logit_lens", "phrase_gates", "recall", "tells_what_memory_does"]


def tells_what_memory_does(look: Mapping[str, Any]) -> bool:
    """Whether a look was at a model with a memory beside one without."""
    if not look.get("against"):
        return False
    # Results from before this was written down are of such models: the second was chosen for it.
    return look.get("has_memory", {"model": True, "against": False}) == {"model": True, "against": False}


def logit_lens(results: Results) -> Iterator[Evidence]:
    """KL of the lens in the first half of the blocks, from the first that has a memory: the second model's less that of the first."""
    for where, result in results.get("look", {}).items():
        curve = result.get("logit_lens", {}).get("difference", {}).get("against")
        if not curve or not tells_what_memory_does(result):
            continue
        # Above zero, the model with a memory knows more. Blocks before its first module say nothing about it.
        first = min((int(layer) for layer in result.get("rows", {}).get("layers", {})), default=0)
        early = curve[first : max(first + 1, len(curve) // 2)]
        verdicts = [sign_verdict(p["low"], p["high"], 1) for p in early]
        mean = math.fsum(p["mean"] for p in early) / len(early)
        note = (
            f"{len(early)} early {'block' if len(early) == 1 else 'blocks'} from the first with a memory: "
            f"{verdicts.count(AGREES)} with an interval over documents above zero, {verdicts.count(DISAGREES)} below; one model of each kind, "
            "and seeds were not varied"
        )
        yield Evidence(CANNOT_TELL, where, mean, note=note)


def alignment(results: Results) -> Iterator[Evidence]:
    """How many blocks ahead the most similar ones of the second model are, in the first half."""
    for where, result in results.get("look", {}).items():
        found = result.get("cka")
        if not found or not tells_what_memory_does(result):
            continue
        early = found["soft_alignment"][: max(1, len(found["soft_alignment"]) // 2)]
        ahead = math.fsum(index - block for block, index in enumerate(early)) / len(early)
        blocks = len(found["map"][0])
        note = f"no interval; the index is a mean over the {found['top']} most similar of {blocks} blocks: early ones are pulled to the middle"
        if found["top"] >= blocks:
            nothing = math.fsum((blocks - 1) / 2 - block for block in range(len(early))) / len(early)
            note += f": a map that is the same everywhere would give {nothing:+.4f}"
        yield Evidence(CANNOT_TELL, where, ahead, unit="blocks ahead", note=note)


def phrase_gates(results: Results) -> Iterator[Evidence]:
    """Gates at ends of phrases less those at the same words elsewhere, layer by layer of one model."""
    for where, result in results.get("look", {}).items():
        found = (result.get("phrases") or {}).get("layers", {})
        differences = [layer["completes_less_same_word"] for layer in found.values()]
        if not differences:
            continue
        if any(difference["mean"] is None for difference in differences):
            yield Evidence(CANNOT_TELL, where, unit="of a gate", note="the last words of phrases were not seen elsewhere")
            continue
        verdicts = [sign_verdict(d["low"], d["high"], 1) for d in differences]
        mean = math.fsum(d["mean"] for d in differences) / len(differences)
        note = (
            f"ends of {result['phrases']['occurrences']:,} phrases less the same words elsewhere; {len(verdicts)} layers: "
            f"{verdicts.count(AGREES)} with an interval over documents above zero, {verdicts.count(DISAGREES)} below; one model, and seeds "
            "were not varied"
        )
        yield Evidence(CANNOT_TELL, where, mean, unit="of a gate", note=note)


def recall(kind: str) -> Callable[[Results], Iterator[Evidence]]:
    """A judge of one kind of question: exact answers of models with a memory against those of the one without, by length of text."""

    def judge_kind(results: Results) -> Iterator[Evidence]:
        for name, result in results.get("long_context", {}).items():
            models = result["models"]
            plain = [n for n in models if _is_control(n)]
            for other in models if len(plain) == 1 else ():
                if other not in plain:
                    yield from _compare_recall(name, other, plain[0], result, kind)

    return judge_kind


def _is_control(name: str) -> bool:
    words = name.lower().replace("_", " ").replace("-", " ").split()
    return bool({"without", "off", "moe", "dense", "plain", "none", "baseline"} & set(words))


def _finds_more_than_random(scores: Sequence[Mapping[str, Any]], kind: str, length: int) -> bool:
    """Whether a model's whole interval is above chance. One that cannot copy every needle copies no more of what it takes at random."""
    of = {score["kind"]: score for score in scores if score["length"] == length}
    copied = of["needle"]["share"] if "needle" in of else 1.0
    return bool(of[kind]["low"] > chance_of(of[kind]) * copied)


def _compare_recall(name: str, other: str, plain: str, result: Mapping[str, Any], kind: str) -> Iterator[Evidence]:
    models = result["models"]
    scores = {n: {s["length"]: s for s in models[n]["scores"] if s["kind"] == kind} for n in (other, plain)}
    for length in sorted(set(scores[other]) & set(scores[plain])):
        seeds = sorted(scores[other][length]["by_seed"].keys() & scores[plain][length]["by_seed"].keys())
        if not seeds:
            continue
        of_each = [[scores[n][length]["by_seed"][seed] for seed in seeds] for n in (other, plain)]
        a, b = map(share_over_seeds, of_each)
        value = a["share"] - b["share"]
        # Over answers: Newcombe's, from Wilson's of each (Statistics in Medicine 17, 1998, method 10).
        (a_low, a_high), (b_low, b_high) = a["wilson"], b["wilson"]
        least = value - math.hypot(a["share"] - a_low, b_high - b["share"])
        most = value + math.hypot(a_high - a["share"], b["share"] - b_low)
        differences = [x / of_x - y / of_y for (x, of_x), (y, of_y) in zip(*of_each)]
        low, high = widened(differences, least, most) or (None, None)
        verdict, note = sign_verdict(low, high, 1), f"{other!r} against {plain!r}, {a['answers']} answers each"
        if low is None:
            note = f"{note}; one seed: no interval"
        if not result["trained_apart"]:
            verdict, note = CANNOT_TELL, f"{note}; one model with its memory on and off, none that was trained without"
        if not any(_finds_more_than_random(models[n]["scores"], kind, length) for n in (other, plain)):
            verdict, note = CANNOT_TELL, f"{note}; neither is above what copying at random finds"
        # Then seeds are of what followed; of several pairs each has its own.
        if isinstance(result.get("sizes", {}).get("joint"), str):
            verdict, note = CANNOT_TELL, f"{note}; all seeds go on from one model of either kind"
        low, high = (None, None) if low is None or high is None else (100 * low, 100 * high)
        where, unit = f"{name}, {length} tokens", "percentage points"
        yield Evidence(verdict, where, 100 * value, low, high, unit, note, len(seeds))
