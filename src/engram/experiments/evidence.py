"""What one result says about one claim: a verdict by an interval alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engram.experiments.statistics import excludes_zero

__all__ = ["AGREES", "CANNOT_TELL", "DISAGREES", "NOT_MEASURED", "Evidence", "Results", "of_sign", "sign_verdict"]

AGREES, DISAGREES, CANNOT_TELL, NOT_MEASURED = "agrees", "disagrees", "cannot tell", "not measured"

Results = Mapping[str, Mapping[str, Any]]
"""By kind of result (``allocation``, ``slots``, ``ablation``, ``comparison``, ``look``, ``long_context``) and name."""


@dataclass(frozen=True)
class Evidence:
    """What one result says about one claim."""

    verdict: str
    where: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval of ``value``; None without one."""
    unit: str = "nats"
    note: str = ""
    seeds: int | None = None
    """Trainings that the interval is over."""


def sign_verdict(low: float | None, high: float | None, expected: int) -> str:
    """Whether an interval has the expected sign (1 or -1) all over: ``cannot tell`` if it touches zero or there is none."""
    if low is None or not excludes_zero(low, high):
        return CANNOT_TELL
    return AGREES if (low > 0) == (expected > 0) else DISAGREES


def of_sign(where: str, interval: Mapping[str, Any] | None, expected: int, note: str = "") -> Iterator[Evidence]:
    """Evidence from a mean with its interval (``statistics.mean_interval``); none where there is no mean."""
    if interval is not None:
        mean, low, high = interval["mean"], interval["low"], interval["high"]
        if low is None:
            note = "; ".join(filter(None, [note, "one seed: no interval"]))
        yield Evidence(sign_verdict(low, high, expected), where, mean, low, high, note=note, seeds=interval["n"])
