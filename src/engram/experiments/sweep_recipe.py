"""What a sweep is: a base point, named variants of it, seeds, and how learning rates are chosen."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from engram.config import EngramConfig
from engram.data.recipe import build_fields as build_flat
from engram.errors import ConfigError
from engram.experiments.arms import REFERENCE
from engram.experiments.backbone import BackboneConfig
from engram.experiments.changes import change_field
from engram.experiments.recipe import (
    SEEDS,
    DataRecipe,
    PointRecipe,
    build_fields,
    insert_corpus,
    read_mapping,
    set_fields,
    wrong_forms,
)

__all__ = ["Choice", "Point", "SweepRecipe", "TuneGroup", "TuneRecipe", "check_distinct", "read_base", "read_sweep"]

QUESTIONS = ("allocation", "slots", "ablation", "comparison")


@dataclass(frozen=True)
class TuneGroup:
    """Points that share a learning rate, and the one of them it is chosen at."""

    at: Mapping[str, str]
    """Variant by dimension; a dimension left out is tuned separately for each of its variants."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Variants by dimension that belong to the group; a dimension left out allows all."""

    def __post_init__(self) -> None:
        for name, fields, kinds, expected in (
            ("at", self.at, str, 'a variant by dimension, such as {rho: "0.6"}'),
            ("where", self.where, (list, tuple), 'lists of variants by dimension, such as {rho: ["0.6", "0.8"]}'),
        ):
            if not isinstance(fields, Mapping) or not all(isinstance(value, kinds) for value in fields.values()):
                raise ConfigError(f"sweep.tune.groups.{name}: got {fields!r}, expected {expected}.")

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether a point belongs to the group."""
        return all(labels.get(dimension) in variants for dimension, variants in self.where.items())


@dataclass(frozen=True)
class TuneRecipe:
    """How learning rates are chosen: by validation loss, with seeds that report nothing."""

    learning_rate: Sequence[float]
    groups: Sequence[TuneGroup]
    seeds: Sequence[int] = (1000,)

    def __post_init__(self) -> None:
        rates = self.learning_rate
        if not isinstance(rates, (list, tuple)) or not all(isinstance(r, float) and 0 < r < math.inf for r in rates):
            raise ConfigError(f"sweep.tune.learning_rate: got {rates!r}, expected a list of numbers such as [2.0e-3, 4.0e-3].")
        _check_seeds(self.seeds, "sweep.tune.seeds")
        if not self.groups:
            raise ConfigError(
                'sweep.tune.groups: got none, expected at least one, such as {at: {rho: "0.6"}}: no rate would be chosen.'
            )


def _check_seeds(seeds: Any, where: str) -> None:
    if not isinstance(seeds, (list, tuple)):
        raise ConfigError(f"{where}: got {seeds!r}, expected a list such as [0, 1, 2].")
    whole = all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < SEEDS for s in seeds)
    if not seeds or not whole or len(set(seeds)) != len(seeds):
        raise ConfigError(f"{where}: got {list(seeds)}, expected at least one whole number below 2**32, none twice.")


class Choice(NamedTuple):
    """One choice of a learning rate: the number of its group and the point it is made at."""

    group: int
    at: tuple[tuple[str, str], ...]
    """Variant by dimension, in order."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    labels: Mapping[str, str]
    seed: int
    recipe: PointRecipe
    role: str = "point"
    """``point`` or ``tuning``."""

    @cached_property
    def digest(self) -> str:
        """Identity of the run: two points of one digest give one result."""
        fields = json.dumps(self.recipe.identity(), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    @property
    def at(self) -> str:
        """Its variants, for people."""
        return ",".join(f"{dimension}={label}" for dimension, label in self.labels.items())

    @property
    def name(self) -> str:
        """Readable and usable as the name of a folder."""
        parts = [self.at]
        if self.role == "tuning":
            parts.append(f"lr={self.recipe.learning_rate:g}")
        text = ",".join([*parts, f"seed={self.seed}"])
        return "".join(c if c.isalnum() or c in "=,.+-" else "_" for c in text)


@dataclass(frozen=True)
class SweepRecipe:
    """A sweep, read from YAML.

    Raises:
        ConfigError: a variant changes what does not exist, or a value is impossible.
    """

    name: str
    question: str
    """What the summary answers: ``allocation`` (a curve over ``rho``), ``slots`` (a slope over ``rows``), ``ablation`` (differences to the
    variant ``reference`` of ``arm``) or ``comparison`` (models side by side, with differences to the one named by ``reference``)."""
    base: Mapping[str, Any]
    """Fields of ``PointRecipe``."""
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By dimension and label: fields to change, nested ones with dots (``engram.use_conv: false``). Points are all combinations."""
    seeds: Sequence[int] = (0, 1, 2)
    tune: TuneRecipe | None = None
    reference: str = REFERENCE
    """The variant of ``arm`` that others are compared with; an ablation's own is always called ``reference``."""
    remarks: str = ""
    """What a reader of the results must know and figures do not tell; the report says it."""

    def __post_init__(self) -> None:
        if self.question not in QUESTIONS:
            raise ConfigError(f"sweep.question: got {self.question!r}, expected one of {', '.join(QUESTIONS)}.")
        if not self.variants or not all(isinstance(v, Mapping) and v for v in self.variants.values()):
            raise ConfigError("sweep.variants: expected at least one dimension with at least one variant each.")
        labels = [*self.variants, *(label for variants in self.variants.values() for label in variants)]
        if not_text := [label for label in labels if not isinstance(label, str)]:
            raise ConfigError(f'sweep.variants: got the label {not_text[0]!r}, expected text: write "{not_text[0]}".')
        dimension = {"allocation": "rho", "slots": "rows"}.get(self.question, "arm")
        if dimension not in self.variants or (self.question == "slots" and len(self.variants) > 1):
            only = "only " if self.question == "slots" else ""
            raise ConfigError(
                f"sweep.variants: got {', '.join(map(str, self.variants))}, expected {only}the dimension {dimension!r} for the question "
                f"{self.question!r}."
            )
        if self.reference != REFERENCE and (self.question != "comparison" or self.reference not in self.variants["arm"]):
            raise ConfigError(
                f"sweep.reference: got {self.reference!r}, expected one of the arms of a sweep with the question 'comparison'."
            )
        _check_seeds(self.seeds, "sweep.seeds")
        if self.tune and not self.tune.learning_rate:
            raise ConfigError("sweep.tune: expected at least one learning rate.")
        if self.tune and set(self.tune.seeds) & set(self.seeds):
            raise ConfigError("sweep.tune.seeds: settings must be chosen with other seeds than those that report.")
        for group in self.tune.groups if self.tune else ():
            for dimension, label in [*group.at.items(), *((d, v) for d, vs in group.where.items() for v in vs)]:
                if label not in self.variants.get(dimension, {}):
                    raise ConfigError(f"sweep.tune.groups: {dimension} {label!r} is not one of the variants.")

    def combinations(self) -> Iterator[dict[str, str]]:
        """Labels of all points, seeds aside."""
        for labels in itertools.product(*self.variants.values()):
            yield dict(zip(self.variants, labels))

    def recipe_of(self, labels: Mapping[str, str], seed: int, **changes: Any) -> PointRecipe:
        """The recipe of a point.

        Raises:
            ConfigError: as for ``PointRecipe``.
        """
        fields = copy.deepcopy(dict(self.base))
        for dimension, label in labels.items():
            for key, value in self.variants[dimension][label].items():
                if key == "seed":
                    raise ConfigError(f"sweep.variants.{dimension}.{label}: got 'seed', expected it in the sweep's 'seeds'.")
                change_field(fields, key, value, f"sweep.variants.{dimension}.{label}", "the base")
        return build_fields(PointRecipe, {**fields, "seed": seed, **changes}, f"sweep {self.name}: {dict(labels)}")

    def points(self, learning_rates: Mapping[Choice, float]) -> list[Point]:
        """All points that report, at the learning rates chosen."""
        found = []
        for labels in self.combinations():
            choice = self.choice_of(labels)
            rate = None if choice is None else learning_rates.get(choice)
            changes = {} if rate is None else {"learning_rate": rate}
            found += [Point(labels, seed, self.recipe_of(labels, seed, **changes)) for seed in self.seeds]
        return found

    def choice_of(self, labels: Mapping[str, str]) -> Choice | None:
        """The choice of learning rate that a point depends on; None if none is made."""
        for number, group in enumerate(self.tune.groups if self.tune else ()):
            if group.holds(labels):
                return Choice(number, tuple((dimension, group.at.get(dimension, label)) for dimension, label in labels.items()))
        return None

    def tuning_points(self) -> dict[Choice, list[Point]]:
        """By choice, the points that are tried for it."""
        found: dict[Choice, list[Point]] = {}
        for labels in self.combinations():
            choice = self.choice_of(labels)
            if choice is not None and choice not in found:
                assert self.tune is not None
                at = dict(choice.at)
                found[choice] = [
                    Point(at, seed, self.recipe_of(at, seed, learning_rate=float(lr)), "tuning")
                    for lr in self.tune.learning_rate
                    for seed in self.tune.seeds
                ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=dict))


def read_sweep(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> SweepRecipe:
    """Read a sweep, and check that every point of it can be built.

    Args:
        path: YAML file. Its ``data.corpus`` may name another recipe file with a ``corpus`` in it, relative to this one.
        changes: fields of the base to change, dotted (``tokens``, ``data.seq_len``).

    Raises:
        DataError: the file is missing or not YAML.
        ConfigError: a key is unknown, a value impossible, or a budget cannot be met.
    """
    with wrong_forms(f"sweep {path}", "what `engram recipe sweep` writes"):
        recipe = _build_sweep(path, changes)
        points = {}
        for labels in recipe.combinations():
            point = points[tuple(labels.items())] = recipe.recipe_of(labels, recipe.seeds[0])
            _check_fresh(point, path)
    _check_points(recipe, points)
    return recipe


def _build_sweep(path: str | os.PathLike[str], changes: Mapping[str, Any] | None) -> SweepRecipe:
    fields = read_mapping(path)
    tune = fields.pop("tune", None)
    if tune is not None:
        groups = [build_flat(TuneGroup, group, f"sweep {path}: tune.groups") for group in tune.get("groups", [])]
        tune = build_flat(TuneRecipe, {**tune, "groups": groups}, f"sweep {path}: tune")
    base = fields.pop("base", None) or {}
    if not isinstance(base, Mapping):
        raise ConfigError(f"sweep {path}: base: got {base!r}, expected a mapping as in what `engram recipe sweep` writes.")
    base = copy.deepcopy(dict(base))
    if "seed" in base:
        raise ConfigError(f"sweep {path}: base: got 'seed', expected it in the sweep's 'seeds'.")
    insert_corpus(base, path)
    if "seed" in (changes or {}):
        raise ConfigError("--set: got 'seed', but the seeds of a sweep are the list 'seeds' in its recipe.")
    set_fields(base, changes or {}, "the base")
    return build_flat(SweepRecipe, {**fields, "base": base, "tune": tune}, f"sweep {path}")


def _check_fresh(point: PointRecipe, path: str | os.PathLike[str]) -> None:
    if point.model is not None:
        raise ConfigError(
            f"sweep {path}: got model: {point.model}, but the points of a sweep start from fresh backbones; use engram train."
        )


def _check_points(recipe: SweepRecipe, points: Mapping[tuple[tuple[str, str], ...], PointRecipe]) -> None:
    """Refuse points that do not make one sweep, or cannot be built.

    Raises:
        ConfigError: they share no text, are the same, or a budget cannot be met.
    """
    without_memory, data = set(), None
    for pairs, point in points.items():
        labels = dict(pairs)
        data = data or point.data
        if point.data != data:
            raise ConfigError(f"sweep.variants: {labels} changes 'data', which all points share; make a sweep of each text.")
        if point.solved().engram is None:
            without_memory.add(labels.get("rows"))
    if recipe.question == "slots" and len(without_memory) > 1:
        raise ConfigError(
            f"sweep.variants.rows: got {', '.join(sorted(map(str, without_memory)))} without a memory, expected at most one: "
            "the others are compared with it."
        )
    _check_distinct_but_for_rates(recipe)


def check_distinct(points: Sequence[Point]) -> None:
    """Refuse two points that are one run: they would count twice.

    Raises:
        ConfigError: there are such.
    """
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(point.digest, point)
        if other is not point:
            raise ConfigError(
                f"sweep: {other.name} and {point.name} are the same run, expected different ones; remove one of the variants. (A learning "
                "rate that is tuned takes the place of a variant's own.)"
            )


def _check_distinct_but_for_rates(recipe: SweepRecipe) -> None:
    """What can be told before learning rates are chosen: points that share a choice will share its rate, whichever that is."""
    of_choice: dict[Choice | None, list[Point]] = {}
    any_rate = dict.fromkeys(recipe.tuning_points(), float(recipe.tune.learning_rate[0]) if recipe.tune else 0.0)
    for point in recipe.points(any_rate):
        of_choice.setdefault(recipe.choice_of(point.labels), []).append(point)
    for points in of_choice.values():
        check_distinct(points)


def read_base(path: str | os.PathLike[str]) -> tuple[BackboneConfig, EngramConfig, int]:
    """Backbone, memory and sequence length of a sweep's base.

    Raises:
        DataError: the file is missing or not YAML.
        ConfigError: a key is unknown, a value impossible or of the wrong form, or there is no memory in it.
    """
    base = read_mapping(path).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("engram"), dict):
        raise ConfigError(f"recipe {path}: expected a 'base' mapping with an 'engram' mapping in it.")
    sizes, data = (_mapping_of(base, part, path) for part in ("backbone", "data"))
    seq_len = data.get("seq_len", DataRecipe.seq_len)
    if not isinstance(seq_len, int) or isinstance(seq_len, bool) or seq_len < 1:
        raise ConfigError(f"recipe {path}: base.data.seq_len: got {seq_len!r}, expected a whole number above 0.")
    with wrong_forms(f"recipe {path}", "what `engram recipe sweep` writes"):
        backbone = build_fields(BackboneConfig, sizes, f"recipe {path}: base.backbone")
        backbone = backbone.replace(vocab_size=data.get("vocab_size", backbone.vocab_size))
        return backbone, EngramConfig.from_dict(base["engram"]), seq_len


def _mapping_of(base: Mapping[str, Any], part: str, path: str | os.PathLike[str]) -> Mapping[str, Any]:
    found = base.get(part, {})
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"recipe {path}: base.{part}: got {found!r}, expected a mapping as in what `engram recipe sweep` writes."
        )
    return found
