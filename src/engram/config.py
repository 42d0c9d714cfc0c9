"""What a memory is, and where it lives.

``EngramConfig`` is identity: it decides every address and every parameter shape, is fingerprinted and is saved with the memory.
``TableConfig`` is placement: its tier may change at every load without changing a single output, its dtype rounds the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, ParamSpec, Self, TypeGuard, TypeVar

from engram.errors import ConfigError, nearest

__all__ = ["EngramConfig", "TableConfig", "common_layers", "names_unknown"]

_SIZES = 1 << 31
"""Widths, counts and ids stay below: kernels count with int32, and a typing error shall not be tried out in memory."""
_MOST_ORDERS = 1 << 16
_MOST_ROWS = 1 << 62
"""Rows of a layer, all heads together. They are numbered in int64; heads get primes a little above ``engram_vocab_size``, so half is left."""

Gate = Literal["signed_sqrt", "plain"]
TableInit = Literal["zero", "normal"]
Reader = Literal["trained", "seeded"]
Fuse = Literal["gate", "add", "concat"]


_FILLED_IN = ("files", "stamps")
"""Fields of ``TableConfig`` that hold where and as what the saved rows of one memory lie."""
_OF_ENGRAM_PEFT = {
    "target_layers": "layer_ids, counted from 0 as there",
    "ngram_sizes": "max_ngram_size, the largest of them: orders 2 to that are read, unless layer_orders leaves some out",
    "engram_vocab_size_per_ngram": "engram_vocab_size, rows of one head and not of all heads together: divide by n_head_per_ngram",
    "embedding_dim": "n_embed_per_ngram, the width of one order and not of all together: divide by the number of orders",
    "enable_tokenizer_compression": "hash_spec, 'exact_v1' for raw ids (False there); the default compresses them",
    "conv_kernel_size": "kernel_size",
    "train_mode": "EngramTrainingArguments.train_backbone; get_engram_model freezes the base model",
    "wrap_peft": "nothing: adapters that are on the model stay as trainable as they are",
}
"""Names of another library, which people bring along, and what they are here."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def common_layers(blocks: int) -> tuple[int, ...]:
    """Where a memory for a model of so many blocks usually goes: the second block and the middle one, the paper's 1 and 15 of 30."""
    return tuple(sorted({min(1, blocks - 1), blocks // 2}))


def names_unknown(where: str, untold: Sequence[str] = ()) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """For a function of fixed parameters: another keyword is an error that says what was meant.

    Args:
        where: what the error calls the function.
        untold: parameters that are not for people to set, of which the error is silent.
    """

    def decorate(call: Callable[_P, _R]) -> Callable[_P, _R]:
        known = [name for name in inspect.signature(call).parameters if name != "self"]
        told = [name for name in known if name not in untold]

        @functools.wraps(call)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            unknown = [name for name in kwargs if name not in known]
            if unknown:
                raise ConfigError(f"{where}: {_meant(unknown, told)}")
            return call(*args, **kwargs)

        return checked

    return decorate


def _meant(unknown: Sequence[str], known: Sequence[str]) -> str:
    """What an error says of names that nothing has."""
    theirs = [f"{name} is here {_OF_ENGRAM_PEFT[name]}" for name in unknown if name in _OF_ENGRAM_PEFT]
    if theirs:
        return f"unknown key(s) {', '.join(unknown)}, expected names of this library, not of engram-peft: {'; '.join(theirs)}."
    near = "".join(nearest(name, known) for name in unknown)
    return f"unknown key(s) {', '.join(unknown)}, expected some of {', '.join(sorted(known))}.{near}"


def _names_unknown_fields(cls: type[_R]) -> type[_R]:
    """``names_unknown`` for a dataclass."""
    setattr(cls, "__init__", names_unknown(cls.__name__, _FILLED_IN)(cls.__init__))  # noqa: B010 - mypy lets no method be assigned
    return cls


def _require(condition: bool, field: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"EngramConfig.{field}: got {got!r}, expected {expected}.")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object, least: int = 1) -> bool:
    return _is_int(value) and least <= value < _SIZES


def _is_positive(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
    except OverflowError:  # an int that no float holds
        return False


def _items(given: Any) -> tuple[Any, ...]:
    """What a list holds; nothing if it is none."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()


def _boundaries(given: Any) -> tuple[int, ...]:
    """Token ids in ascending order; what is no list of them is refused."""
    ids = _items(given)
    listed = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    possible = listed and all(_is_size(i, 0) for i in ids) and len(set(ids)) == len(ids)
    _require(possible, "boundary_ids", given, "a list of token ids >= 0, none twice")
    return tuple(sorted(ids))


def _layer_orders(given: Any, layers: tuple[int, ...], largest: int) -> tuple[tuple[int, tuple[int, ...]], ...] | None:
    """Pairs (layer, ascending orders) of the layers that do not read all orders, in the order of ``layers``; None if all do."""
    if given is None:
        return None
    try:
        pairs = [(layer, tuple(orders)) for layer, orders in (given.items() if isinstance(given, Mapping) else given)]
        # JSON has no keys but strings
        read = {int(layer) if isinstance(layer, str) and layer.isdecimal() else layer: orders for layer, orders in pairs}
    except (TypeError, ValueError):
        pairs, read = [], {"no mapping": ()}
    expected = f"{{layer: orders}} with layers among layer_ids {list(layers)}, each once"
    _require(len(read) == len(pairs) and set(read) <= set(layers), "layer_orders", given, expected)
    expected = f"for every layer named at least one order from 2 to max_ngram_size = {largest}, none twice"
    for orders in read.values():
        possible = all(_is_int(n) and 2 <= n <= largest for n in orders)
        _require(possible and 0 < len(orders) == len(set(orders)), "layer_orders", given, expected)
    return tuple((i, tuple(sorted(read[i]))) for i in layers if i in read and len(read[i]) < largest - 1) or None


@_names_unknown_fields
@dataclass(frozen=True)
class EngramConfig:
    """Identity of an Engram memory. Field names and defaults are those of the paper's public demo, but for ``table_init``.

    The demo's defaults make tables of 2 x 16 heads x 646,400 rows; give smaller ``engram_vocab_size`` for small models.

    Raises:
        ConfigError: a value is impossible; the message names the field, the value and what was expected.
    """

    engram_vocab_size: Sequence[int] | int = 129280 * 5
    """Rows per head, one floor per n-gram order 2..``max_ngram_size``; an int stands for every order. Heads get primes from there on."""
    max_ngram_size: int = 3
    """Largest n-gram order N; orders 2..N are looked up."""
    n_embed_per_ngram: int = 512
    """Width of one order, all heads together; d_mem is ``(N - 1) * n_embed_per_ngram``."""
    n_head_per_ngram: int = 8
    """Hash heads K per order; each reads a row of ``n_embed_per_ngram / K`` values."""
    layer_ids: Sequence[int] = (1, 15)
    """Decoder blocks (0-based) before whose attention the memory is added."""
    pad_id: int = 2
    """Raw token id that stands for positions before the start of a sequence and for masked positions."""
    seed: int = 0
    """Seed of the hash multipliers."""
    kernel_size: int = 4
    """Taps of the short causal convolution; its dilation is ``max_ngram_size``."""
    hidden_size: int | None = None
    """Width d of the residual stream; taken from the model when attaching."""
    hc_mult: int | None = None
    """Residual streams M (hyper-connections); taken from the model when attaching, 1 if never given."""
    gate: Gate = "signed_sqrt"
    """Squashing before the sigmoid: ``signed_sqrt`` as in the demo and shipped models, ``plain`` as in the paper's equation 4."""
    use_bias: bool = True
    """Whether the key and value projections have biases (the demo's do, DeepSeek-V4.1's do not)."""
    use_conv: bool = True
    """Whether the short convolution of equation 5 exists. Its weights start at zero."""
    table_init: TableInit = "zero"
    """``zero``: attaching changes nothing until something is learnt. ``normal``: rows start as N(0, 1), as in the demo."""
    norm_eps: float | None = None
    """Epsilon of the key and query norms; None is torch's default (the machine epsilon of the dtype)."""
    conv_norm_eps: float = 1e-5
    """Epsilon of the norms in front of the convolution."""
    hash_spec: str = "demo_v1"
    """Name of the hash specification (``engram.hashing.HASH_SPECS``)."""
    verify_rows: bool = False
    """Whether every row carries a tag of the n-gram that owns it, so that any other n-gram reads zero instead of a foreign row. On for
    memories that are taught facts; off for jointly trained ones, where sharing rows is part of the model. Only written rows exist then,
    so that ``engram_vocab_size`` costs nothing."""
    longest_only: bool = False
    """Of the n-grams found at a position only the longest is read, as in a back-off language model: independent facts never mix.
    Needs ``verify_rows``."""
    reader: Reader = "trained"
    """``trained``: projections are ordinary parameters, saved with the memory. ``seeded``: they are random signs that follow from
    ``seed``, frozen and never saved."""
    fuse: Fuse = "gate"
    """How a value enters the residual streams. ``gate``: equations 3 and 4. ``add``: as it is, v~ = W_V e, the paper's "without gating";
    the layer then has no ``key_projs``, ``norm1`` and ``norm2``. ``concat``: v~_m = W_C [RMSNorm(h_m) ; W_V e] with W_C of shape
    ``[d, 2d]``, without bias; the layer then has ``concat_projs`` and ``norm2`` (of h), but no ``key_projs`` and ``norm1``. W_C starts as
    ``[0 ; I]``, so that ``concat`` starts as ``add``: with rows and W_C both zero neither would ever get a gradient."""
    branch_gates: bool = True
    """Whether every residual stream has a key projection and norms of its own (with ``concat``: W_C and norm). False: all M streams share
    one of each, the paper's "without branch-specific gates"; a stream is still gated by its own hidden state. The norms in front of the
    convolution are not part of a gate and stay one per stream. With one stream both are the same."""
    layer_orders: Mapping[int, Sequence[int]] | Sequence[tuple[int, Sequence[int]]] | None = None
    """Orders that single layers read, ``{layer id: orders}``; layers not named read all of 2..``max_ngram_size``. Rows, projections and
    d_mem of a layer follow; primes, multipliers and the convolution's dilation do not: every n-gram that is still read is read at the
    address it has when all are (``engram.hashing.layout.prime_walk``). Kept as pairs, without layers that read everything."""
    boundary_ids: Sequence[int] = ()
    """Raw token ids that no n-gram reaches across, an end of text or the place of a picture for instance: such a token and all that is older
    count as ``pad_id`` there, as if the sequence began behind it. The convolution reads on. Kept in ascending order."""

    def __post_init__(self) -> None:
        _require(
            _is_size(self.max_ngram_size, 2) and self.max_ngram_size <= _MOST_ORDERS,
            "max_ngram_size",
            self.max_ngram_size,
            f"an int from 2 to {_MOST_ORDERS}",
        )
        given: Any = self.engram_vocab_size
        sizes = (given,) * (self.max_ngram_size - 1) if _is_int(given) else _items(given)
        _require(
            len(sizes) == self.max_ngram_size - 1 and all(_is_int(s) and s >= 1 for s in sizes),
            "engram_vocab_size",
            self.engram_vocab_size,
            f"{self.max_ngram_size - 1} positive ints, one per order 2..{self.max_ngram_size} (or one int for all)",
        )
        layers = _items(self.layer_ids)
        _require(
            len(layers) > 0 and all(_is_size(i, 0) for i in layers) and len(set(layers)) == len(layers),
            "layer_ids",
            self.layer_ids,
            "a list of at least one 0-based block index, none twice",
        )
        object.__setattr__(self, "engram_vocab_size", sizes)
        object.__setattr__(self, "layer_ids", layers)
        for field in ("n_embed_per_ngram", "n_head_per_ngram", "kernel_size"):
            value = getattr(self, field)
            _require(_is_size(value), field, value, "a positive int below 2^31")
        _require(
            self.n_embed_per_ngram % self.n_head_per_ngram == 0,
            "n_embed_per_ngram",
            self.n_embed_per_ngram,
            f"a multiple of n_head_per_ngram = {self.n_head_per_ngram}",
        )
        _require(
            sum(sizes) * self.n_head_per_ngram < _MOST_ROWS,
            "engram_vocab_size",
            self.engram_vocab_size,
            f"less than 2^62 rows in a layer, all {self.n_head_per_ngram * len(sizes)} heads together: they are numbered in int64",
        )
        for field in ("hidden_size", "hc_mult"):
            value = getattr(self, field)
            _require(value is None or _is_size(value), field, value, "a positive int below 2^31, or None")
        _require(
            _is_size(self.pad_id, 0),
            "pad_id",
            self.pad_id,
            "a token id >= 0 (tokenizers without a padding token: eos_token_id)",
        )
        object.__setattr__(self, "boundary_ids", _boundaries(self.boundary_ids))
        _require(_is_int(self.seed) and 0 <= self.seed < 1 << 63, "seed", self.seed, "an int from 0 to 2^63 - 1")
        _require(isinstance(self.hash_spec, str), "hash_spec", self.hash_spec, "the name of a hash specification")
        _require(self.gate in ("signed_sqrt", "plain"), "gate", self.gate, "'signed_sqrt' or 'plain'")
        _require(self.table_init in ("zero", "normal"), "table_init", self.table_init, "'zero' or 'normal'")
        _require(self.reader in ("trained", "seeded"), "reader", self.reader, "'trained' or 'seeded'")
        _require(self.fuse in ("gate", "add", "concat"), "fuse", self.fuse, "'gate', 'add' or 'concat'")
        for field in ("use_bias", "use_conv", "verify_rows", "longest_only", "branch_gates"):
            _require(isinstance(getattr(self, field), bool), field, getattr(self, field), "True or False")
        _require(self.norm_eps is None or _is_positive(self.norm_eps), "norm_eps", self.norm_eps, "a positive number or None")
        _require(_is_positive(self.conv_norm_eps), "conv_norm_eps", self.conv_norm_eps, "a positive number")
        _require(
            not self.verify_rows or self.table_init == "zero", "table_init", self.table_init, "'zero' when verify_rows is on"
        )
        _require(self.verify_rows or not self.longest_only, "longest_only", True, "False unless verify_rows is on")
        plain = not (self.use_bias or self.use_conv)
        _require(self.reader == "trained" or plain, "reader", self.reader, "'trained' unless use_bias and use_conv are off")
        object.__setattr__(self, "layer_orders", _layer_orders(self.layer_orders, layers, self.max_ngram_size))
        self._check_variants()

    def _check_variants(self) -> None:
        """Refuse combinations in which a variant of the layer would mean nothing."""
        _require(self.fuse != "add" or self.branch_gates, "branch_gates", False, "True when fuse is 'add', which has no gates")
        # Taught memories say nothing where nothing was written, and give each token of an answer the order it needs.
        _require(not self.verify_rows or self.fuse != "concat", "fuse", self.fuse, "'gate' or 'add' when verify_rows is on")
        _require(
            self.reader == "trained" or self.fuse != "concat", "fuse", self.fuse, "'gate' or 'add' when reader is 'seeded'"
        )
        _require(
            not self.verify_rows or self.layer_orders is None, "layer_orders", self.layer_orders, "None when verify_rows is on"
        )
        # A fact's key may hold any token of its prompt.
        _require(
            not self.verify_rows or not self.boundary_ids, "boundary_ids", self.boundary_ids, "none when verify_rows is on"
        )

    @classmethod
    def for_teaching(cls, **changes: Any) -> Self:
        """The configuration of a memory that is taught facts: verified rows, exact ids, long n-grams, a seeded reader, no convolution.

        Orders up to 32 let an address span a key and the whole of most answers, so that keys which agree in their last tokens
        (``SYN:SYN_00123``) stay apart; 2^31 rows per head cost nothing where only written rows exist. ``layer_ids`` defaults to block
        0 and should be chosen for the model (``MemoryEditor.create`` does).
        """
        fields: dict[str, Any] = {
            "engram_vocab_size": 1 << 31,
            "max_ngram_size": 32,
            "n_embed_per_ngram": 128,
            "n_head_per_ngram": 2,
            "layer_ids": (0,),
            "use_bias": False,
            "use_conv": False,
            "hash_spec": "exact_v1",
            "verify_rows": True,
            "longest_only": True,
            "reader": "seeded",
        }
        return cls(**{**fields, **changes})

    @property
    def orders(self) -> range:
        """The n-gram orders that are looked up, 2..N."""
        return range(2, self.max_ngram_size + 1)

    def orders_of(self, layer_id: int) -> tuple[int, ...]:
        """The orders that one layer looks up, ascending."""
        fewer: Any = dict(self.layer_orders or ())
        return tuple(fewer.get(layer_id, self.orders))

    def num_heads_of(self, layer_id: int) -> int:
        """Rows that one layer reads per token, all its orders together."""
        return len(self.orders_of(layer_id)) * self.n_head_per_ngram

    def d_mem_of(self, layer_id: int) -> int:
        """Width of the rows that one layer concatenates."""
        return len(self.orders_of(layer_id)) * self.n_embed_per_ngram

    @property
    def head_dim(self) -> int:
        """Values in one row."""
        return self.n_embed_per_ngram // self.n_head_per_ngram

    @property
    def num_heads(self) -> int:
        """Rows read per token by a layer that reads all orders."""
        return (self.max_ngram_size - 1) * self.n_head_per_ngram

    @property
    def d_mem(self) -> int:
        """Width of the concatenated rows of a layer that reads all orders, ``(N - 1) * n_embed_per_ngram``."""
        return (self.max_ngram_size - 1) * self.n_embed_per_ngram

    @property
    def conv_reach(self) -> int:
        """Positions before the current one that the convolution reads, ``(kernel_size - 1) * N``; 0 without a convolution."""
        return (self.kernel_size - 1) * self.max_ngram_size if self.use_conv else 0

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; ``from_dict`` gives back an equal config."""
        fields = dataclasses.asdict(self)
        if self.layer_orders is not None:
            fields["layer_orders"] = {str(layer): list(orders) for layer, orders in dict(self.layer_orders).items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build from ``to_dict`` output.

        Raises:
            ConfigError: a key is unknown or a value is impossible.
        """
        return _from_dict(cls, fields)


@_names_unknown_fields
@dataclass(frozen=True)
class TableConfig:
    """Placement of the tables: free to change at every load.

    Raises:
        ConfigError: an unknown tier or dtype, or options that do not go together.
    """

    tier: Literal["device", "host", "mmap", "hybrid"] = "device"
    """Where rows live. ``device``: on the device of the block that reads them. ``host``: in host memory, whatever the device. ``mmap``: in
    files that are mapped into memory, so that tables may be larger than it. ``hybrid``: as ``host`` (or ``mmap``, with a path), with
    copies of the ``hot_rows`` on the device."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "float8", "int4"] = "float32"
    """Storage type of the rows, in any tier; the last three are read only as far as training goes."""
    path: str | None = None
    """For ``mmap`` and ``hybrid``: folder of the row files, one per layer, made if missing, read and written. Without one, ``mmap`` reads a
    saved memory where it lies, from its own file, which cannot be trained, and ``hybrid`` keeps rows in host memory."""
    hot_rows: int | None = None
    """For ``hybrid``: rows per layer that may be copied to the device (``HybridTable.rebalance`` and ``engram place`` choose them)."""
    changed_rows: Literal["refuse", "keep", "refill"] = "refuse"
    """For row files in ``path`` that do not hold the saved rows: trained since, or another memory's. ``refuse``: an error; ``keep``: take them
    as they are (and save, to make them the memory's); ``refill``: write the saved rows over them. A new memory (``get_engram_model``) over
    files that are there is refused too; with ``keep`` or ``refill`` it starts with their rows, until a checkpoint is loaded."""
    resident_bytes: int | None = None
    """For row files: about how many bytes of them the process may have mapped in at a time, all layers together; the rest is the system's
    to keep or drop. None leaves that to the system altogether. What one call asks for at once comes on top: the rows of a training step, or
    those of one ``update_rows``."""
    sharded: bool = False
    """For ``device`` and ``host``, while several processes train a memory: each holds a part of every table (``ShardedTable``), so that N
    processes have room for N times the rows, and rows travel to where they are read. Otherwise each holds a copy of all. Set up the
    processes first (make the training arguments, or call ``torch.distributed.init_process_group``); alone, a process has whole tables."""
    files: Mapping[int, tuple[str, tuple[int, ...]]] | None = dataclasses.field(default=None, repr=False)
    """For ``mmap`` without a path: per layer, the file and the first bytes in it of the rows' values and, if they have them, of their
    scales; filled in by ``from_pretrained``."""

    stamps: Mapping[int, str] | None = dataclasses.field(default=None, repr=False)
    """For row files in ``path``: per layer, what the file is noted to hold while it holds the saved rows. Several
    processes may read such a file, also where it cannot be written: the first gets it for writing, for the others it is read-only (training
    and editing are refused). Once its rows are changed, look-ups of the others are errors, never rows half written. Filled in by
    ``from_pretrained``."""

    def __post_init__(self) -> None:
        tiers, types = ("device", "host", "mmap", "hybrid"), ("float32", "bfloat16", "float16", "int8", "float8", "int4")
        if self.tier not in tiers:
            raise ConfigError(f"TableConfig.tier: got {self.tier!r}, expected one of {', '.join(map(repr, tiers))}.")
        if str(self.dtype).startswith("torch."):  # torch.bfloat16 says the same
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        if self.dtype not in types:
            raise ConfigError(f"TableConfig.dtype: got {self.dtype!r}, expected one of {', '.join(map(repr, types))}.")
        if isinstance(self.path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(self.path))
        if self.path is not None and (not isinstance(self.path, str) or "\0" in self.path):
            raise ConfigError(f"TableConfig.path: got {self.path!r}, expected the name of a folder.")
        if self.path is not None and self.tier not in ("mmap", "hybrid"):
            raise ConfigError(f"TableConfig.path: got {self.path!r}, expected None unless tier is 'mmap' or 'hybrid'.")
        if (self.tier == "hybrid") != (self.hot_rows is not None):
            expected = "a number of rows when tier is 'hybrid'" if self.tier == "hybrid" else "None unless tier is 'hybrid'"
            raise ConfigError(f"TableConfig.hot_rows: got {self.hot_rows!r}, expected {expected}.")
        if self.changed_rows not in ("refuse", "keep", "refill"):
            raise ConfigError(f"TableConfig.changed_rows: got {self.changed_rows!r}, expected 'refuse', 'keep' or 'refill'.")
        for field in ("hot_rows", "resident_bytes"):
            value = getattr(self, field)
            if value is not None and not (_is_int(value) and value >= 1):
                raise ConfigError(f"TableConfig.{field}: got {value!r}, expected a positive int.")
        if not isinstance(self.sharded, bool):
            raise ConfigError(f"TableConfig.sharded: got {self.sharded!r}, expected True or False.")
        if self.sharded and (self.tier not in ("device", "host") or self.dtype not in ("float32", "bfloat16", "float16")):
            raise ConfigError(
                f"TableConfig.sharded: got True with tier {self.tier!r} and dtype {self.dtype!r}, expected 'device' or 'host' and a type that "
                "is trained ('float32', 'bfloat16', 'float16')."
            )
        if self.resident_bytes is not None and self.tier != "mmap" and self.path is None:
            raise ConfigError(f"TableConfig.resident_bytes: got {self.resident_bytes}, expected None unless rows are in files.")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, without those that loading fills in; ``from_dict`` gives back an equal placement of what nobody has loaded."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _FILLED_IN}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build from ``to_dict`` output; what loading fills in is not for a file to say.

        Raises:
            ConfigError: a key is unknown or a value is impossible.
        """
        return _from_dict(cls, fields, _FILLED_IN)


def _from_dict(cls: type, fields: Mapping[str, Any], internal: Sequence[str] = ()) -> Any:
    known = {field.name for field in dataclasses.fields(cls)} - set(internal)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"{cls.__name__}: {_meant(unknown, sorted(known))}")
    return cls(**fields)
