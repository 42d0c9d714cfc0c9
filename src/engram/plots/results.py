"""Result files: what kind each is, told by what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.data.long_context import asked_more_easily, chance_of
from engram.errors import DataError, EngramError
from engram.experiments.seed_evidence import LOOKS, MEMORY_OFF

__all__ = [
    "COPYING",
    "SHARE",
    "SWEEPS",
    "ResultFile",
    "group_results",
    "pool_recall",
    "read_result",
    "reading",
    "recall_interval",
    "recognise",
]

SWEEPS = ("allocation", "slots", "ablation", "comparison")
"""Questions of sweeps; each is a kind of result."""

_KINDS: dict[str, tuple[str, ...]] = {
    "bench": ("benchmarks", "hardware"),
    "eval": ("recall", "categories", "harm", "gates"),
    "look": ("model", "against", "text", "skipped"),
    "corpus": ("fingerprint", "counts", "contamination"),
    "ngram_counts": ("smoothing", "points", "summary", "mixtures", "differences"),
}
"""Kinds that are told by their keys."""

SHARE = "share_of_without"
"""What entries of ``benchmarks/throughput.py`` are told by."""

COPYING = "copying"
"""What entries of ``benchmarks/copying.py`` are told by."""

_SWEEP_KEYS = (
    "sweep",
    "question",
    "recipe",
    "data",
    "expected_points",
    "learning_rates",
    "tuning",
    "points",
    "failures",
    "summary",
)


@dataclass(frozen=True)
class ResultFile:
    """A result and what it is."""

    name: str
    """The file's name without its ending."""
    kind: str
    data: Mapping[str, Any]

    @property
    def is_sweep(self) -> bool:
        """Whether it is a sweep's."""
        return self.kind in SWEEPS


def recognise(data: Any) -> str | None:
    """The kind of a result; None if it is of no kind that is known here."""
    if not isinstance(data, Mapping):
        return None
    if "sweep" in data and data.get("question") in SWEEPS:
        return data["question"]
    kind = next((kind for kind, keys in _KINDS.items() if all(key in data for key in keys)), None)
    if kind is not None:
        return kind
    if _recall_runs(data):
        return "long_context"
    entries = data.get("entries")
    if not isinstance(entries, list) or not entries:
        return None
    marks = {"throughput": SHARE, "copying": COPYING, "looks": LOOKS, "memory_off": MEMORY_OFF}
    return next((kind for kind, mark in marks.items() if all(isinstance(e, Mapping) and mark in e for e in entries)), None)


def _recall_runs(data: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Measurements by model: of ``engram recall`` (models by name) or of ``benchmarks/long_context.py`` (entries of models and seeds)."""
    entries = data.get("entries")
    if (
        isinstance(entries, list)
        and entries
        and all(isinstance(e, Mapping) and "model" in e and "scores" in e for e in entries)
    ):
        found: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            found.setdefault(entry["model"], []).append(entry)
        return found
    if data and all(isinstance(entry, Mapping) and isinstance(entry.get("scores"), list) for entry in data.values()):
        return {name: [entry] for name, entry in data.items()}
    return {}


def pool_recall(data: Mapping[str, Any]) -> dict[str, Any]:
    """A result on long context with the answers of all seeds together.

    Returns:
        ``models: {name: {held_out_loss, held_out_loss_before, copying_before, scores}}`` (losses None where one is not known, copying a list
        by seed) beside what else the result says, and ``trained_apart``: whether they are models of their own, not one with its memory on and
        off. Scores have ``kind``, ``length``, ``chance``, ``more_easily`` (``asked_more_easily``, of any seed), ``other_value`` (of all
        seeds; None where a seed does not say), ``by_seed`` (exact answers and all, for each seed) and what ``share_over_seeds`` gives.

    Raises:
        DataError: a model has two entries of one seed, or seeds were not asked the same.
    """
    runs = _recall_runs(data)
    models = {}
    for name, entries in runs.items():
        losses = {key: _mean(entries, key) for key in ("held_out_loss", "held_out_loss_before")}
        copying = [entry["copying_before"] for entry in entries if "copying_before" in entry]
        models[name] = {**losses, "copying_before": copying, "scores": _pool(entries)}
    rest = {} if set(runs) == set(data) else {key: value for key, value in data.items() if key != "entries"}
    told = {} if rest else {"provenance": next(iter(data.values())).get("provenance", {})}  # one command measured them all
    return {**rest, **told, "trained_apart": bool(rest), "models": models}


def recall_interval(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What intervals of a result on long context are over, in words for a heading; ``models`` as ``pool_recall`` gives them."""
    seeds = {len(score["by_seed"]) > 1 for model in models.values() for score in model["scores"]}
    over = {frozenset({True}): "Student's t over seeds", frozenset({False}): "Wilson's over answers of one seed"}
    return over.get(frozenset(seeds), "Student's t over seeds; Wilson's over answers where there is one seed")


def _mean(entries: list[Mapping[str, Any]], key: str) -> float | None:
    values = [entry[key] for entry in entries if key in entry]
    return sum(values) / len(values) if values else None


def _pool(entries: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: entry.get("seed", 0)):
        for score in (score for score in entry["scores"] if score["depth"] is None):
            of_seed = groups.setdefault((score["kind"], score["length"]), {})
            if (seed := entry.get("seed", 0)) in of_seed:
                raise DataError(f"two entries of one model and seed {seed}; expected one.")
            of_seed[seed] = score
    return [_pool_seeds(kind, length, of_seed) for (kind, length), of_seed in groups.items()]


def _pool_seeds(kind: str, length: int, of_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    from engram.experiments.statistics import share_over_seeds

    by_seed = {seed: (score["exact"], score["answers"]) for seed, score in of_seed.items()}
    chances = {round(chance_of(score), 9) for score in of_seed.values()}
    if len(chances) > 1:
        raise DataError(f"{kind}: seeds were asked among different numbers of notes; expected the same for all.")
    others = [score.get("other_value") for score in of_seed.values()]
    return {
        "kind": kind,
        "length": length,
        "chance": chances.pop(),
        "more_easily": any(map(asked_more_easily, of_seed.values())),
        "other_value": None if None in others else sum(others),
        "by_seed": by_seed,
        **share_over_seeds(by_seed.values()),
    }


def read_result(path: Path, strict: bool = True) -> ResultFile | None:
    """Read a result file.

    Args:
        path: JSON file.
        strict: whether a file that is no JSON or of no known kind is an error; else it is None.

    Raises:
        DataError: the file is missing, no JSON, of no known kind, or lacks what its kind has.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"result {path}: {error.strerror}; expected a JSON file that engram wrote.") from None
    except (ValueError, RecursionError) as error:
        if not strict:  # what a command that is at work, or was cut off, left there
            return None
        raise DataError(f"result {path}: not JSON ({error}); write it again with the command that made it.") from None
    kind = recognise(data)
    if kind is None:
        if not strict:
            return None
        raise DataError(
            f"result {path}: of no kind that can be drawn; expected a result of engram sweep, bench, corpus, eval, look or recall, or of "
            "benchmarks/long_context.py, copying.py, throughput.py, looks.py, memory_off.py or ngram_baseline.py."
        )
    missing = [key for key in _SWEEP_KEYS if kind in SWEEPS and key not in data]
    if missing:
        raise DataError(f"result {path}: lacks {', '.join(missing)}, which every sweep's result has; run engram sweep again.")
    with reading(f"result {path}"):
        return ResultFile(path.stem, kind, pool_recall(data) if kind == "long_context" else data)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what goes wrong because a result lacks something into one clear error.

    Raises:
        DataError: instead of the errors of missing keys and wrong types.
    """
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, EngramError):
            raise
        told = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{what} is malformed ({told}); write it again with the command that made it.") from error


def group_results(files: Iterable[ResultFile]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Results by kind and name."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for file in files:
        groups.setdefault(file.kind, {})[file.name] = file.data
    return groups
