"""What decides one training run of an experiment: a point."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engram.config import EngramConfig, TableConfig
from engram.data.recipe import CorpusRecipe, parse_corpus, read_yaml
from engram.data.recipe import build_fields as build_flat
from engram.errors import ConfigError, EngramError
from engram.experiments.backbone import BackboneConfig
from engram.experiments.budget import allocate
from engram.experiments.changes import change_field, check_field
from engram.optim import BACKBONE_OPTIMIZERS, ROW_STATES

__all__ = [
    "SEEDS",
    "BudgetRecipe",
    "DataRecipe",
    "PointRecipe",
    "build_fields",
    "insert_corpus",
    "read_mapping",
    "read_point",
    "set_fields",
    "wrong_forms",
]

_DECAY_SHARE = 0.2


SEEDS = 1 << 32
"""How many seeds there are: NumPy's generators take no larger ones."""


@dataclass(frozen=True)
class DataRecipe:
    """Text and how it is cut; all points of a sweep share it.

    Raises:
        ConfigError: a value is impossible.
    """

    corpus: CorpusRecipe
    vocab_size: int = 2048
    """Tokens of the byte-level tokenizer that is trained on the training text."""
    seq_len: int = 128
    held_out_tokens: int = 131_072
    """At most so many tokens are measured in each of the two held-out halves: ``validation``, which settings are chosen by, and ``test``,
    which reports."""
    held_out_by: str = "document"
    """What the halves are cut by: ``document``, as in all older results, or ``file``, which puts a program and the documentation in it into
    one half and leaves out documents of more than an eighth of ``held_out_tokens`` (``HeldOutBlocks``)."""

    def __post_init__(self) -> None:
        if self.held_out_by not in ("document", "file"):
            raise ConfigError(f"DataRecipe.held_out_by: got {self.held_out_by!r}, expected 'document' or 'file'.")
        if not isinstance(self.corpus, CorpusRecipe):
            raise ConfigError(
                "DataRecipe.corpus: got none, expected a mapping, or the name of a recipe beside this one that has it."
            )
        for name in ("vocab_size", "seq_len", "held_out_tokens"):
            _positive(self, name, whole=True)


@dataclass(frozen=True)
class BudgetRecipe:
    """Parameters to spend, embeddings and head left out (``engram.experiments.counts``)."""

    total: int
    active: int
    rho: float

    def __post_init__(self) -> None:
        for name in ("total", "active"):
            _positive(self, name, whole=True)
        if isinstance(self.rho, bool) or not isinstance(self.rho, (int, float)):
            raise ConfigError(f"BudgetRecipe.rho: got {self.rho!r}, expected a number from 0 to 1.")


@dataclass(frozen=True)
class PointRecipe:
    """One training run; every key is a key in YAML.

    Raises:
        ConfigError: a value is impossible, or the budget cannot be met.
    """

    data: DataRecipe
    model: str | None = None
    """A model that exists, to go on from instead of a fresh backbone: a folder, a hub name or ``bundled``. Its tokenizer makes the ids."""
    train_backbone: bool = True
    """With a model: whether it is trained too. False leaves it as it is, bit for bit, and trains the memory alone."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    engram: EngramConfig | None = None
    table: TableConfig | None = None
    """Where the memory's rows are while they are trained, and in which type; float32 on the model's device if not given. The files of
    ``mmap`` lie in the run's folder until it is finished. Without a memory it means nothing."""
    budget: BudgetRecipe | None = None
    """With a budget, experts, dense width and table rows follow from it, and a rho of 1 means no memory."""
    tokens: int = 1_500_000
    batch_size: int = 16
    """Sequences per step."""
    learning_rate: float = 3e-3
    optimizer: str = "adamw"
    """``adamw`` or ``muon`` for the backbone's matrices."""
    table_lr_multiplier: float = 5.0
    table_row_state: str = "adam"
    """What the optimiser remembers per table row: ``adam``, ``rowwise_adam`` (half of it) or ``rowwise_adagrad`` (one number)."""
    table_stochastic_rounding: bool = False
    """Whether rows of 16 bits are rounded by chance, so that small steps count."""
    shard_model: bool = False
    """Whether several processes divide the weights between them too (``engram.models.shard_model``), for a model too large for each."""
    memory_dropout: float = 0.0
    """Share of training sequences that do not read the memory; with one, held-out losses are told with the memory off too."""
    weight_decay: float = 0.1
    warmup_share: float = 0.05
    """Share of the steps over which the learning rate rises."""
    lr_scheduler: str = "cosine"
    """What the learning rate does after that. ``cosine`` and ``linear``: fall until the end. ``constant``: stay. ``wsd``: stay, and fall by a
    cosine over the last ``decay_share`` of the steps (transformers' ``warmup_stable_decay``)."""
    decay_share: float = _DECAY_SHARE
    """With ``wsd``: share of the steps over which the learning rate falls."""
    min_lr_ratio: float = 0.1
    """Where the learning rate ends, as a share of itself; with ``constant`` it means nothing."""
    balance_rate: float = 1e-3
    """What a router's bias moves by per step."""
    seed: int = 0
    """Of weights, order of documents and hash multipliers."""
    bf16: bool = True
    keep_model: bool = False
    """Whether the trained model and memory are kept beside the result."""
    curve_points: int = 8
    """How often the validation half is measured on the way (on a sixteenth of it)."""
    save_steps: int = 200
    keep_checkpoints: bool = False
    """Whether every checkpoint stays, to look back on how something came about; else the newest, until the run is finished."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_size", "save_steps", "curve_points"):
            _positive(self, name, whole=True)
        for name in ("learning_rate", "table_lr_multiplier"):
            _positive(self, name)
        for name in ("weight_decay", "balance_rate"):
            _number(self, name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < SEEDS:
            raise ConfigError(f"PointRecipe.seed: got {self.seed!r}, expected a whole number of at least 0 and below 2**32.")
        for name in ("bf16", "keep_model", "keep_checkpoints", "train_backbone", "table_stochastic_rounding", "shard_model"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"PointRecipe.{name}: got {getattr(self, name)!r}, expected true or false.")
        if self.optimizer not in BACKBONE_OPTIMIZERS:
            raise ConfigError(
                f"PointRecipe.optimizer: got {self.optimizer!r}, expected {' or '.join(map(repr, BACKBONE_OPTIMIZERS))}."
            )
        if self.table_row_state not in ROW_STATES:
            raise ConfigError(
                f"PointRecipe.table_row_state: got {self.table_row_state!r}, expected one of {', '.join(ROW_STATES)}."
            )
        for name in ("warmup_share", "decay_share", "min_lr_ratio"):
            _number(self, name)
            if getattr(self, name) > 1:
                raise ConfigError(f"PointRecipe.{name}: got {getattr(self, name)!r}, expected 0 to 1.")
        self._check_schedule()
        _number(self, "memory_dropout")
        if self.memory_dropout >= 1:
            raise ConfigError(f"PointRecipe.memory_dropout: got {self.memory_dropout!r}, expected a share below 1.")
        if self.shard_model and self.engram is None:
            raise ConfigError("PointRecipe.shard_model: got true without a memory, expected one in 'engram'.")
        self._check_table()
        self._check_engram()
        if self.steps < 1:
            raise ConfigError(f"PointRecipe.tokens: got {self.tokens}, expected at least one batch, {self.batch_tokens}.")
        if self.model is None:
            self._fit_backbone()
        else:
            self._check_model()

    def _check_schedule(self) -> None:
        if self.lr_scheduler not in _SCHEDULES:
            raise ConfigError(f"PointRecipe.lr_scheduler: got {self.lr_scheduler!r}, expected one of {', '.join(_SCHEDULES)}.")
        if self.lr_scheduler != "wsd" and self.decay_share != _DECAY_SHARE:
            raise ConfigError(
                f"PointRecipe.decay_share: got {self.decay_share!r} with lr_scheduler {self.lr_scheduler!r}, which has none, expected wsd."
            )
        if self.lr_scheduler == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ConfigError(
                f"PointRecipe: got warmup_share {self.warmup_share} and decay_share {self.decay_share}, expected at most 1 together."
            )

    def _check_engram(self) -> None:
        default = EngramConfig()
        for name, instead in (("seed", "the point's own 'seed' is used"), ("pad_id", "the tokenizer's is used")):
            if self.engram is not None and getattr(self.engram, name) != getattr(default, name):
                raise ConfigError(f"PointRecipe.engram.{name}: got {getattr(self.engram, name)}, expected none: {instead}.")

    def _check_table(self) -> None:
        if self.table is None:
            return
        given = {name: getattr(self.table, name) for name in ("path", "changed_rows", "files")}
        if given != {"path": None, "changed_rows": "refuse", "files": None}:
            raise ConfigError(f"PointRecipe.table: got {given}, expected none of them to be set: row files are the run's own.")
        if self.table.dtype not in _TRAINED_TYPES:
            raise ConfigError(
                f"PointRecipe.table.dtype: got {self.table.dtype!r}, expected one of {', '.join(_TRAINED_TYPES)}."
            )

    def _fit_backbone(self) -> None:
        if not self.train_backbone:
            raise ConfigError("PointRecipe.train_backbone: got false, expected true where no 'model' is given to go on from.")
        if self.backbone.vocab_size != self.data.vocab_size:
            object.__setattr__(self, "backbone", self.backbone.replace(vocab_size=self.data.vocab_size))
        if self.backbone.max_position_embeddings < self.data.seq_len:
            raise ConfigError(
                f"PointRecipe: got data.seq_len {self.data.seq_len}, expected at most backbone.max_position_embeddings = "
                f"{self.backbone.max_position_embeddings}."
            )
        blocks = self.backbone.num_hidden_layers
        if self.engram is not None and (outside := [i for i in self.engram.layer_ids if i >= blocks]):
            raise ConfigError(
                f"PointRecipe.engram.layer_ids: got {outside}, expected 0..{blocks - 1}: backbone.num_hidden_layers is {blocks}."
            )

    def _check_model(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"PointRecipe.model: got {self.model!r}, expected a folder, a hub name or 'bundled'.")
        if self.budget is not None or self.backbone != BackboneConfig():
            raise ConfigError("PointRecipe: got a 'model' and a 'backbone' or 'budget', expected one or the other.")
        if not self.train_backbone and self.engram is None:
            raise ConfigError("PointRecipe: got train_backbone false and no 'engram': nothing would be trained.")
        if not self.train_backbone and self.optimizer != "adamw":
            raise ConfigError(
                f"PointRecipe.optimizer: got {self.optimizer!r} with train_backbone false, expected 'adamw': Muon steps a backbone's matrices."
            )

    @property
    def batch_tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.batch_tokens

    def solved(self) -> PointRecipe:
        """The same point with its budget turned into sizes."""
        if self.budget is None:
            return self
        if self.engram is None and self.budget.rho < 1:
            raise ConfigError(
                f"PointRecipe: got engram: null and budget.rho {self.budget.rho}, expected rho 1 without a memory."
            )
        engram = self.engram or EngramConfig(layer_ids=(1,))  # left away at rho 1
        allocation = allocate(self.backbone, engram, self.budget.total, self.budget.active, self.budget.rho)
        return dataclasses.replace(self, backbone=allocation.backbone, engram=allocation.engram, budget=None)

    def identity(self) -> dict[str, Any]:
        """What decides the result, JSON-ready: fields that are not at their defaults, so that options added later change no identity."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.table is not None:  # where rows are does not change what becomes of them, their type does
            fields["table"] = None if self.table.dtype == "float32" else TableConfig(dtype=self.table.dtype)
        later = {f.name for f in dataclasses.fields(self) if f.name in _LATER and fields[f.name] == f.default}
        return {name: _identity(value) for name, value in fields.items() if name not in _WITHOUT_EFFECT and name not in later}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        fields = dataclasses.asdict(self)
        fields["engram"] = None if self.engram is None else self.engram.to_dict()
        fields["data"]["corpus"] = self.data.corpus.to_dict()
        fields["table"] = None if self.table is None else _identity(self.table)
        return fields


# Options that came once results had been made: their defaults are in no identity.
_LATER = (
    "model",
    "train_backbone",
    "memory_dropout",
    "table",
    "table_row_state",
    "table_stochastic_rounding",
    "lr_scheduler",
    "decay_share",
)
_SCHEDULES = ("cosine", "constant", "linear", "wsd")
_TRAINED_TYPES = ("float32", "bfloat16", "float16")
_AS_IN_THE_DEMO = EngramConfig()
_WITHOUT_EFFECT = ("keep_model", "keep_checkpoints", "curve_points", "save_steps", "shard_model")


def _identity(value: Any) -> Any:
    if isinstance(value, CorpusRecipe):
        return value.to_dict()
    if not dataclasses.is_dataclass(value):
        return value
    changed = {}
    for f in dataclasses.fields(value):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if isinstance(value, EngramConfig):  # which writes some of its fields out
            default = getattr(_AS_IN_THE_DEMO, f.name)
        inner = getattr(value, f.name)
        if inner != default or isinstance(default, type(dataclasses.MISSING)):
            changed[f.name] = list(inner) if isinstance(inner, tuple) else _identity(inner)
    return changed


def _positive(recipe: Any, name: str, whole: bool = False) -> None:
    value = getattr(recipe, name)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        what = "whole number above 0" if whole else "positive number that is finite"
        raise ConfigError(f"{type(recipe).__name__}.{name}: got {value!r}, expected a {what}.")


def _number(recipe: Any, name: str) -> None:
    value = getattr(recipe, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"{type(recipe).__name__}.{name}: got {value!r}, expected a finite number of at least 0.")


def read_point(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> PointRecipe:
    """Read one training run from YAML; ``data.corpus`` may be the name of another recipe beside it.

    Args:
        path: the recipe.
        changes: fields to change in it, dotted (``tokens``, ``data.seq_len``).

    Raises:
        DataError: the file is missing or not YAML.
        ConfigError: a key is unknown, a value impossible, or the budget cannot be met.
    """
    fields = read_mapping(path)
    with wrong_forms(f"recipe {path}", "what `engram recipe train` writes"):
        insert_corpus(fields, path)
        set_fields(fields, changes or {}, "the recipe")
        recipe = build_fields(PointRecipe, fields, f"recipe {path}")
    recipe.solved()
    return recipe


@contextmanager
def wrong_forms(where: str, example: str) -> Iterator[None]:
    """Inside, values of a type that nothing can be made of are errors of the recipe.

    Raises:
        ConfigError: instead of Python's own.
    """
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        if isinstance(error, EngramError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: a value has the wrong form ({reason}); expected lists, mappings and numbers as in {example}."
        ) from error


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a recipe file.

    Raises:
        DataError: the file is missing or not YAML.
        ConfigError: it holds no mapping.
    """
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {path}: got {type(fields).__name__}, expected a mapping.")
    return fields


def insert_corpus(fields: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Put the ``corpus`` of a recipe beside ``path`` where ``data.corpus`` names that recipe.

    Raises:
        DataError: it is missing or not YAML.
        ConfigError: it lies elsewhere or has no corpus.
    """
    data = fields.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("corpus"), str):
        return
    name = data["corpus"]
    if os.path.basename(name) != name:
        raise ConfigError(
            f"recipe {path}: data.corpus: got {name!r}, expected the name of a recipe in the same folder, since the paths in both are "
            "relative to it; or write the corpus out here."
        )
    other = os.path.join(os.path.dirname(path), name)
    found = read_yaml(other)
    if not isinstance(found, dict) or not isinstance(found.get("corpus"), dict):
        raise ConfigError(f"recipe {other}: expected a mapping with a 'corpus' mapping in it.")
    fields["data"] = {**data, "corpus": found["corpus"]}


def set_fields(fields: dict[str, Any], changes: Mapping[str, Any], whole: str) -> None:
    """Change fields of a run, by their dotted names, as ``--set`` asks for; ``whole`` is what has them, in words.

    Raises:
        ConfigError: there is no such field, or no such part to change something in.
    """
    for key, value in changes.items():
        check_field(key, _PARTS, whole)
        change_field(fields, key, value, "--set", whole)


_CONFIGS: dict[str, Any] = {"engram": EngramConfig, "table": TableConfig}
_NEEDED = ("data", "backbone")
"""Parts that every run has."""
_NESTED: dict[str, type] = {"data": DataRecipe, "backbone": BackboneConfig, "budget": BudgetRecipe, "corpus": CorpusRecipe}
_PARTS: dict[str, type] = {
    "": PointRecipe,
    "data": DataRecipe,
    "data.corpus": CorpusRecipe,
    "backbone": BackboneConfig,
    "engram": EngramConfig,
    "table": TableConfig,
    "budget": BudgetRecipe,
}
"""What has the fields of a run, by the dotted name of the part."""


def build_fields(cls: type, fields: Mapping[str, Any], where: str) -> Any:
    """An instance of one of the recipe classes from plain values, nested ones included.

    Raises:
        ConfigError: a key is unknown or missing, or a value impossible; the message says where.
    """
    values = {name: _build_value(name, value, f"{where}.{name}") for name, value in fields.items()}
    return build_flat(cls, values, where)


def _build_value(name: str, value: Any, where: str) -> Any:
    if name not in _NESTED and name not in _CONFIGS:
        return value
    if dataclasses.is_dataclass(value) or (value is None and name not in _NEEDED):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: got {value!r}, expected a mapping.")
    if name == "corpus":
        return parse_corpus(value, where)
    return _CONFIGS[name].from_dict(value) if name in _CONFIGS else build_fields(_NESTED[name], value, where)
