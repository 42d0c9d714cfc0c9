"""Intervals for few repetitions, and fits with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from engram.evaluation.answers import wilson_interval

__all__ = [
    "NOTHING",
    "excludes_zero",
    "fit_line",
    "fit_parabola",
    "half_width_over_settings",
    "holm",
    "mean_interval",
    "p_value",
    "seed_interval",
    "share_over_seeds",
    "student_t",
    "widened",
]

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (any statistics table).
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


NOTHING = 1e-9
"""What is smaller is rounding, of losses and of shares: no difference between models."""


def student_t(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t, to three decimals."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    # The series of Cornish and Fisher in 1 / degrees (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5).
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def p_value(value: float, low: float, high: float, degrees: int) -> float:
    """Two-sided probability of a mean this far from zero if there were no effect, from its 95 % interval by Student's t.

    Of an interval that is wider on one side, the side towards zero counts. Sums of Abramowitz and Stegun, Handbook of Mathematical Functions,
    26.7.3 and 26.7.4.
    """
    half = value - low if value > 0 else high - value
    if half <= 0:  # no spread at all
        return float(value == 0)
    angle = math.atan(abs(value) / half * student_t(degrees) / math.sqrt(degrees))
    odd = degrees % 2
    term, inside = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(1 + odd, degrees, 2):
        inside += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    inside *= math.sin(angle)
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several effects are there if the chance of finding any that is not shall be ``level`` for all together (S. Holm, Scandinavian
    Journal of Statistics 6, 1979).
    """
    found = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        if p_values[place] > level / (len(p_values) - rank):
            break
        found[place] = True
    return found


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its 95 % interval (Student's t); the interval is None for a single value."""
    mean = sum(values) / len(values)
    entry: dict[str, Any] = {"mean": mean, "n": len(values), "min": min(values), "max": max(values), "low": None, "high": None}
    if len(values) > 1:
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        half = student_t(len(values) - 1) * deviation / math.sqrt(len(values))
        entry |= {"low": mean - half, "high": mean + half}
    return entry


def widened(values: Sequence[float], low: float, high: float) -> tuple[float, float] | None:
    """95 % interval of a mean over trainings (Student's t), no narrower than ``low`` to ``high``, which is that over answers.

    Answers of one model hang together, so that an interval over all of them is too narrow; a few trainings may agree by chance, so that
    the one over trainings alone may be too.

    Returns:
        None for a single value: one training says nothing about others.
    """
    entry = mean_interval(values)
    return None if entry["low"] is None else (min(entry["low"], low), max(entry["high"], high))


def half_width_over_settings(groups: Sequence[Sequence[float]]) -> float | None:
    """Half of the 95 % interval of a difference between two settings of several, if all are as noisy as each other.

    Values are taken as setting + seed + noise; the noise's variance is that of all residuals. One setting's differences to another say little
    about it where there are few seeds: two degrees of freedom of three.

    Args:
        groups: for each setting, one value per seed, in one order of seeds.

    Returns:
        The half-width by Student's t of (settings - 1) (seeds - 1) degrees of freedom, in the values' unit; None for fewer than three settings
        or two seeds.

    Raises:
        ValueError: settings have different numbers of seeds.
    """
    values = np.array(groups, dtype=float)
    if len(groups) < 3 or values.shape[1] < 2:
        return None
    residuals = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    settings, seeds = values.shape
    degrees = (settings - 1) * (seeds - 1)
    return float(student_t(degrees) * math.sqrt((residuals**2).sum() / degrees * 2 / seeds))


def share_over_seeds(answers: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Exact answers of several trainings together.

    Args:
        answers: exact ones and all, for each seed.

    Returns:
        ``exact``, ``answers``, ``share`` with its 95 % interval ``low`` to ``high``, Student's t over seeds and no narrower than ``wilson``,
        that over all answers as if they were independent; of one seed it is ``wilson``.
    """
    counted = list(answers)
    exact, asked = (sum(numbers) for numbers in zip(*counted))
    wilson = wilson_interval(exact, asked)
    low, high = widened([right / of for right, of in counted], *wilson) or wilson
    ends = {"low": max(0.0, low), "high": min(1.0, high), "wilson": wilson}
    return {"exact": exact, "answers": asked, "share": exact / asked, **ends}


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether there is an interval of numbers (NaN is none), and zero is not in it, nor so near that rounding alone keeps it out."""
    return low is not None and high is not None and (NOTHING < low <= high or low <= high < -NOTHING)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by least squares."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def fit_parabola(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Coefficients of ``a x^2 + b x + c`` by least squares."""
    a, b, c = np.polyfit(x, y, 2)
    return float(a), float(b), float(c)


def seed_interval(
    groups: Sequence[Sequence[float]], statistic: Callable[[list[float]], float | None]
) -> tuple[float, float] | None:
    """95 % interval of a statistic over settings that were all measured with the same seeds: computed seed by seed, Student's t over them.

    What a seed does to all settings alike (the order of the text, above all) is no uncertainty of a curve's shape this way.

    Args:
        groups: for each setting, one value per seed, in one order of seeds.
        statistic: of one value per setting; None where it does not exist.

    Returns:
        None for fewer than two seeds, or where the statistic does not exist for one of them.
    """
    values = [statistic(list(of_seed)) for of_seed in zip(*groups, strict=True)]
    found = [value for value in values if value is not None and math.isfinite(value)]
    if len(found) < 2 or len(found) < len(values):
        return None
    interval = mean_interval(found)
    return interval["low"], interval["high"]
