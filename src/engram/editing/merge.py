"""Comparing and uniting saved memories. Works on the folders alone: no base model is loaded and nothing is taught."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engram.checkpoint import (
    DESCRIPTION_NAME,
    again_if_saved,
    open_tensors,
    read_description,
    read_ledger,
    write_store,
)
from engram.config import EngramConfig
from engram.editing.keys import plan_rows
from engram.editing.ledger import Ledger, LedgerFact
from engram.errors import CheckpointError, ConfigError, FingerprintError, MergeConflictError
from engram.hashing import mapping_without_tokenizer
from engram.models.identity import identity_mismatch
from engram.tables import RowFormat, StoredRows, row_format

__all__ = ["MemoryDiff", "MergeReport", "StoredMemory", "diff_memories", "merge_memories", "refuse_other_memory"]

_IDENTITY = ("fingerprint", "reader_sha256", "layer_classes")
_TABLE = "multi_head_embedding.embedding."
_SHOWN = 10
Side = Literal["a", "b"]


@dataclass
class MemoryDiff:
    """What tells two memories apart."""

    only_a: list[str] = field(default_factory=list)
    """Ids of facts that only the first holds."""
    only_b: list[str] = field(default_factory=list)
    conflicts: list[dict[str, str]] = field(default_factory=list)
    """Prompts with two answers: ``prompt``, ``a``, ``b``."""
    rows_only_a: int = 0
    rows_only_b: int = 0
    rows_shared_equal: int = 0
    """Rows that both hold with the same n-gram and the same values."""
    rows_shared_different: int = 0
    """Rows of the same n-gram with different values."""
    rows_in_collision: int = 0
    """Rows that two different n-grams claim."""

    @property
    def equal(self) -> bool:
        """Whether both hold the same facts in the same rows, bit for bit."""
        return not (self.only_a or self.only_b or self.conflicts) and not any(
            (self.rows_only_a, self.rows_only_b, self.rows_shared_different, self.rows_in_collision)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {"equal": self.equal, **asdict(self)}


@dataclass
class MergeReport:
    """What merging did."""

    facts: int
    from_a: int
    from_b: int
    rows: int
    resolved: list[str] = field(default_factory=list)
    """Conflicts that were decided by ``prefer``, one line each."""


class StoredMemory:
    """A saved memory's description, tensors and ledger, read into memory.

    Args:
        path: its folder.

    Raises:
        CheckpointError: it is missing, truncated or malformed.
        ConfigError: its rows are not verified.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.tensors: dict[str, Tensor] = {}
        again_if_saved(path, self._read)

    def _read(self) -> None:
        self.description = read_description(self.path)
        self.config = EngramConfig.from_dict(self.description["engram_config"])
        if not self.config.verify_rows:
            raise ConfigError(
                f"{self.path}: this memory was not taught facts (its rows are not verified); it holds no facts to list or compare."
            )
        with open_tensors(self.path, self.description) as tensors:
            self.tensors = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        self.ledger = Ledger.from_dict(read_ledger(self.path, self.description) or Ledger().to_dict())
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Refuse tensors that are not those of the tables that the description speaks of."""
        form, dim = self.form, self.config.head_dim
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer_id in self.config.layer_ids:
            prefix = f"layers.{layer_id}.{_TABLE}"
            rows = self.tensors.get(f"{prefix}row_ids", torch.zeros(0)).shape[:1].numel()
            expected |= {f"{prefix}row_ids": (torch.int64, (rows,)), f"{prefix}tags": (torch.int32, (rows,))}
            expected[f"{prefix}weight"] = (form.dtype, (rows, form.width(dim)))
            if form.scale_dtype is not None:
                expected[f"{prefix}scales"] = (form.scale_dtype, form.scale_shape(rows, dim))
        found = {name: (t.dtype, tuple(t.shape)) for name, t in self.tensors.items() if _TABLE in name}
        if found != expected:
            wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
            raise CheckpointError(
                f"{self.path}: {', '.join(wrong[:4])} do not fit the memory's description ({len(self.config.layer_ids)} layer(s) of "
                f"{form.name} rows of {dim} values). Copy the memory again."
            )

    def rows_by_fact(self) -> dict[str, dict[str, list[int]]]:
        """Stored rows that each fact owns, per layer."""
        owners, facts = _Owners(self), list(self.ledger)
        result: dict[str, dict[str, list[int]]] = {fact.id: {} for fact in facts}
        for layer_id in self.config.layer_ids:
            stored = owners.rows_of(self, facts, layer_id)
            for row, ids in sorted(owners.owners(facts, layer_id, stored).items()):
                for fact_id in ids:
                    result[fact_id].setdefault(str(layer_id), []).append(row)
        return result

    @property
    def form(self) -> RowFormat:
        """How the rows are stored."""
        return row_format(self.description.get("table_dtype", "float32"))

    def rows(self, layer_id: int) -> StoredRows:
        """The rows of one layer as they are stored."""
        prefix = f"layers.{layer_id}.{_TABLE}"
        names = ("row_ids", "tags", "weight", *(("scales",) if self.form.quantised else ()))
        return StoredRows(self.form, *(self.tensors[prefix + name] for name in names))


def diff_memories(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> MemoryDiff:
    """Facts and rows in which two saved memories differ.

    Raises:
        CheckpointError, ConfigError: one cannot be read.
        FingerprintError: they have different addresses, readers or bases, so that their rows cannot be compared.
    """
    return _diff(*_both(a, b))


def merge_memories(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    prefer: Side | None = None,
) -> MergeReport:
    """Unite two saved memories in a third folder. Facts keep their rows bit for bit; those of a second memory in another row format are
    turned into the first one's.

    Facts that both hold are taken from the first. Prompts with two answers, n-grams that both wrote differently and rows that two
    n-grams claim are conflicts: they are refused, or decided by ``prefer`` and listed. A fact on the losing side of a conflict over rows
    stays only if it is the one from the preferred side: the other is left out whole.

    Args:
        a: first memory.
        b: second memory.
        out: folder of the union; may not hold a memory yet, unless it is ``a`` or ``b``.
        prefer: which side wins conflicts; None refuses them.

    Raises:
        CheckpointError: a memory cannot be read, or ``out`` cannot be written.
        FingerprintError: the memories have different addresses, readers or bases.
        ConfigError: ``prefer`` is neither, or ``out`` holds another memory.
        MergeConflictError: there are conflicts and ``prefer`` is not given; nothing is written.
    """
    if prefer not in (None, "a", "b"):
        raise ConfigError(f"prefer: got {prefer!r}, expected 'a', 'b' or None.")
    refuse_other_memory(out, a, b)
    first, second = _both(a, b)
    conflicts, losers = _conflicts(first, second, prefer)
    if conflicts and prefer is None:
        more = f"\n... and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
        listed = "\n".join(conflicts[:_SHOWN])
        raise MergeConflictError(
            f"{len(conflicts)} conflict(s), nothing was merged; decide with --prefer a or b (prefer= in Python):\n{listed}{more}"
        )
    lost_a, lost_b = (losers, set()) if prefer == "b" else (set(), losers)
    kept_a = [fact for fact in first.ledger if fact.id not in lost_a]
    union = Ledger(kept_a)
    kept_b = [fact for fact in second.ledger if fact.id not in lost_b and fact.id not in union and not _held(union, fact)]
    tensors = dict(first.tensors)
    winner, other = (second, first) if prefer == "b" else (first, second)
    kept_w, kept_o = (kept_b, kept_a) if prefer == "b" else (kept_a, kept_b)
    mapping = _Owners(first)
    total = 0
    for layer_id in first.config.layer_ids:
        parts = [mapping.rows_of(winner, kept_w, layer_id), mapping.rows_of(other, kept_o, layer_id)]
        fresh = ~torch.isin(parts[1].row_ids, parts[0].row_ids)  # what is left in common is equal, or lost to the winner
        rows = StoredRows.join([parts[0].in_format(first.form), parts[1].select(fresh).in_format(first.form)])
        prefix = f"layers.{layer_id}.{_TABLE}"
        for name in ("row_ids", "tags", "weight", *(("scales",) if first.form.quantised else ())):
            tensors[prefix + name] = getattr(rows, name)
        total += len(rows)
    ledger = Ledger([*kept_a, *kept_b])
    description = {k: v for k, v in first.description.items() if k not in ("format_version", "weights", "ledger")}
    refuse_other_memory(out, a, b)  # somebody may have saved there meanwhile
    write_store(Path(out), tensors, description, ledger.to_dict())
    return MergeReport(len(ledger), len(kept_a), len(kept_b), total, conflicts)


def refuse_other_memory(out: str | os.PathLike[str], *united: str | os.PathLike[str]) -> None:
    """Refuse a folder for a union that holds a memory which is not one of those united.

    Raises:
        ConfigError: it does.
    """
    target = Path(out)
    if (target / DESCRIPTION_NAME).exists() and target.resolve() not in [Path(folder).resolve() for folder in united]:
        raise ConfigError(f"{out} holds a memory already; choose another folder for the union.")


class _Owners:
    """Which stored rows belong to which facts, from the ledger's ids and the recorded addresses alone."""

    def __init__(self, memory: StoredMemory) -> None:
        self.plan: Callable[[list[LedgerFact]], dict[int, tuple[Tensor, Tensor, Tensor]]] = _planner(memory)

    def rows_of(self, memory: StoredMemory, facts: list[LedgerFact], layer_id: int) -> StoredRows:
        """The stored rows that these facts own."""
        rows = memory.rows(layer_id)
        planned, planned_tags, _ = self.plan(facts)[layer_id]
        owned = torch.zeros(len(rows), dtype=torch.bool)
        slot, found = _find(rows, planned, planned_tags)
        owned[slot[found]] = True
        return rows.select(owned)

    def owners(self, facts: list[LedgerFact], layer_id: int, rows: StoredRows) -> dict[int, list[str]]:
        """Ids of the facts that own each of some stored rows: those that plan them for the n-gram whose tag they carry."""
        planned, planned_tags, owner = self.plan(facts)[layer_id]
        _, chosen = _find(rows, planned, planned_tags)
        result: dict[int, list[str]] = {}
        for row, number in zip(planned[chosen].tolist(), owner[chosen].tolist()):
            ids = result.setdefault(row, [])
            if facts[number].id not in ids:
                ids.append(facts[number].id)
        return result


def _find(rows: StoredRows, row_ids: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows of these numbers and tags are stored, ``[n]``, and which are, bool ``[n]``."""
    if not len(rows):
        return torch.zeros_like(row_ids), torch.zeros_like(row_ids, dtype=torch.bool)
    slot = torch.searchsorted(rows.row_ids, row_ids).clamp_max(len(rows) - 1)
    return slot, (rows.row_ids[slot] == row_ids) & (rows.tags[slot] == tags)


def _vocab_size(memory: StoredMemory) -> int:
    size = memory.description.get("vocab_size")
    if size is None or memory.config.pad_id >= size:
        raise CheckpointError(
            f"{memory.path}: the description has vocab_size {size} with pad_id {memory.config.pad_id}, expected a size above it. Copy the "
            "memory again."
        )
    return size


def _planner(memory: StoredMemory) -> Callable[[list[LedgerFact]], dict[int, tuple[Tensor, Tensor, Tensor]]]:
    mapping = mapping_without_tokenizer(memory.config, _vocab_size(memory))
    cache: dict[tuple[LedgerFact, ...], dict[int, tuple[Tensor, Tensor, Tensor]]] = {}

    def plan(facts: list[LedgerFact]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        key = tuple(facts)
        if key not in cache:
            numbers = torch.tensor([n for n, fact in enumerate(facts) for _ in fact.prompts], dtype=torch.int64)
            planned = plan_rows(mapping, [prompt for fact in facts for prompt in fact.prompts])
            cache[key] = {
                int(layer): (p.row_ids.flatten(), p.tags.flatten(), numbers[p.prompt].repeat_interleave(p.row_ids.shape[1]))
                for layer, p in planned.items()
            }
        return cache[key]

    return plan


def _both(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[StoredMemory, StoredMemory]:
    first, second = StoredMemory(a), StoredMemory(b)
    differing = [name for name in _IDENTITY if first.description.get(name) != second.description.get(name)]
    if first.config != second.config:  # read, not as written: fields that an older version did not know have their defaults
        differing.insert(0, "engram_config")
    readers = [{name: t for name, t in memory.tensors.items() if _TABLE not in name} for memory in (first, second)]
    if readers[0].keys() != readers[1].keys() or not all(torch.equal(t, readers[1][name]) for name, t in readers[0].items()):
        differing.append("reader")  # a trained one: that of a seeded one is not saved
    bases = [memory.description.get("base_model") or {} for memory in (first, second)]
    if identity_mismatch(*bases):
        differing.append("base_model")
    if differing:
        names = [base.get("name_or_path") or "unknown" for base in bases]
        raise FingerprintError(
            f"{a} (base model {names[0]!r}) and {b} (base model {names[1]!r}) differ in {', '.join(differing)}: their rows mean "
            "different things and cannot be compared or united. Teach the facts of one to the other instead."
        )
    return first, second


def _diff(first: StoredMemory, second: StoredMemory) -> MemoryDiff:
    result = MemoryDiff()
    found = _contradictions(first, second)
    result.conflicts = [{"prompt": prompt, "a": mine.answer, "b": theirs.answer} for prompt, mine, theirs in found]
    contradicted = {fact.id for _, mine, theirs in found for fact in (mine, theirs)}
    result.only_a = [f.id for f in first.ledger if not _held(second.ledger, f) and f.id not in contradicted]
    result.only_b = [f.id for f in second.ledger if not _held(first.ledger, f) and f.id not in contradicted]
    for layer_id in first.config.layer_ids:
        a, b = first.rows(layer_id), second.rows(layer_id)
        in_b, in_a = torch.isin(a.row_ids, b.row_ids), torch.isin(b.row_ids, a.row_ids)
        result.rows_only_a += int((~in_b).sum())
        result.rows_only_b += int((~in_a).sum())
        a, b = a.select(in_b), b.select(in_a)
        same_tag, same_values = a.tags == b.tags, a.equal_to(b)
        result.rows_in_collision += int((~same_tag).sum())
        result.rows_shared_equal += int((same_tag & same_values).sum())
        result.rows_shared_different += int((same_tag & ~same_values).sum())
    return result


def _held(ledger: Ledger, fact: LedgerFact) -> bool:
    holder = ledger.owner_of_prompt(fact.prompts[0].text)
    return holder is not None and holder.same_as(fact)


def _contradictions(first: StoredMemory, second: StoredMemory) -> list[tuple[str, LedgerFact, LedgerFact]]:
    """Prompts that the two answer differently, and facts of one id that do not say the same."""
    found = []
    for theirs in second.ledger:
        for prompt in theirs.prompts:
            mine = first.ledger.owner_of_prompt(prompt.text)
            if mine is not None and not mine.same_as(theirs):
                found.append((prompt.text, mine, theirs))
        if theirs.id in first.ledger and not first.ledger[theirs.id].same_as(theirs):
            mine = first.ledger[theirs.id]
            if not any(entry[1] is mine and entry[2] is theirs for entry in found):
                found.append((theirs.prompts[0].text, mine, theirs))
    return found


def _conflicts(first: StoredMemory, second: StoredMemory, prefer: Side | None) -> tuple[list[str], set[str]]:
    """Conflicts, one line each, and the ids of the facts that lose them when ``prefer`` decides."""
    lines, losers = [], set()
    for prompt, mine, theirs in _contradictions(first, second):
        said = (
            f"answer {mine.answer!r} in a, {theirs.answer!r} in b"
            if mine.answer != theirs.answer
            else "other prompts in a than in b"
        )
        if prompt not in {p.text for p in mine.prompts}:
            said = f"one id, {mine.prompts[0].text!r} -> {mine.answer!r} in a, {prompt!r} -> {theirs.answer!r} in b"
            lines.append(f"id {theirs.id!r}: {said}")
        else:
            lines.append(f"prompt {prompt!r}: {said}")
        lines[-1] += _leaving(prompt, mine, theirs, first, second, prefer)
        losers.add(mine.id if prefer == "b" else theirs.id)
    while more := _row_conflicts(first, second, prefer, losers):
        told, lost = more
        lines += [line for line in told if line not in lines]
        if lost <= losers:
            break
        losers |= lost  # a fact that both hold comes from the second if the first's is lost, and may be in others' way then
    return lines, losers


def _row_conflicts(
    first: StoredMemory, second: StoredMemory, prefer: Side | None, losers: Collection[str]
) -> tuple[list[str], set[str]] | None:
    """Rows that both claim where ``losers`` have left, one line each, and who loses them; None if there are none."""
    lines, lost = list[str](), set[str]()
    # A fact that both hold is taken from the first: its rows in the second are no conflict.
    own_a = [fact for fact in first.ledger if not (prefer == "b" and fact.id in losers)]
    staying = Ledger(own_a)
    own_b = [fact for fact in second.ledger if not _held(staying, fact) and not (prefer != "b" and fact.id in losers)]
    owners = _Owners(first)
    for layer_id in first.config.layer_ids:
        a, b = owners.rows_of(first, own_a, layer_id), owners.rows_of(second, own_b, layer_id)
        in_b, in_a = torch.isin(a.row_ids, b.row_ids), torch.isin(b.row_ids, a.row_ids)
        a, b = a.select(in_b), b.select(in_a)
        differ = (a.tags != b.tags) | ~a.equal_to(b.in_format(a.form))
        if not bool(differ.any()):
            continue
        rows = a.row_ids[differ]
        collided = dict(zip(rows.tolist(), (a.tags != b.tags)[differ].tolist()))
        of_a, of_b = owners.owners(own_a, layer_id, a.select(differ)), owners.owners(own_b, layer_id, b.select(differ))
        for row in rows.tolist():
            what = "two n-grams claim it" if collided[row] else "the same n-gram with other values"
            lines.append(f"layer {layer_id}, row {row}: {what}; facts {', '.join(of_a[row])} in a, {', '.join(of_b[row])} in b")
            lost.update(of_a[row] if prefer == "b" else of_b[row])
    return (lines, lost) if lines else None


def _leaving(
    prompt: str, mine: LedgerFact, theirs: LedgerFact, first: StoredMemory, second: StoredMemory, prefer: Side | None
) -> str:
    """What else would be answered no more if a side lost a conflict over ``prompt``: a fact leaves whole."""
    told = ""
    for side, loser, winners in (("a", mine, second.ledger), ("b", theirs, first.ledger)):
        texts = [repr(p.text) for p in loser.prompts if p.text != prompt and winners.owner_of_prompt(p.text) is None]
        if texts and side != prefer:
            told += f"; {', '.join(texts)} would leave with {side}'s fact"
    return told
