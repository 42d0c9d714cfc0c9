"""`MemoryEditor`: facts in, facts out, and an account of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engram.checkpoint import lock_store, saved_version
from engram.config import EngramConfig, TableConfig
from engram.data.facts import EncodedFact, Fact, check_conflicts, encode_fact, pad_right
from engram.editing.keys import KeyedPrompt, PlannedRows, choose_keys, plan_rows, surprise_bits
from engram.editing.ledger import Ledger, LedgerFact
from engram.editing.lesson import TeachSettings, answers_exactly
from engram.editing.reports import ForgetReport, RowConflict, TeachReport
from engram.editing.sorting import in_parts, sort_out
from engram.editing.spelling import Speller
from engram.editing.teaching import Progress, Teaching
from engram.errors import CheckpointError, ConfigError, TeachError
from engram.models import EngramModel, find_decoder, get_engram_model
from engram.models.positions import context_length
from engram.tables import ABSENT, StoredRows, VerifiedTable

if TYPE_CHECKING:
    from engram.editing.merge import MemoryDiff, MergeReport
    from engram.editing.why import Explanation

__all__ = ["MemoryEditor"]

_SHOWN = 5
_HASHED_AT_ONCE = 1024


class MemoryEditor:
    """Teaches facts to a memory with verified rows, explains them, and takes them out again.

    Only table rows are ever written. A fact owns the rows of the n-grams that end in its key and the answer so far (see
    ``engram.editing.keys``); the ledger knows which.

    Args:
        memory: an attached memory whose configuration has ``verify_rows`` (``EngramConfig.for_teaching``).
        tokenizer: the model's tokenizer.

    Raises:
        ConfigError: the memory's rows are not verified, or it has a convolution (whose reach would carry a fact past its owner's rows).
    """

    def __init__(self, memory: EngramModel, tokenizer: Any) -> None:
        config = memory.engram_config
        if not config.verify_rows:
            raise ConfigError(
                "MemoryEditor: got a memory without verified rows, in which facts would leak into other text; "
                "make one with MemoryEditor.create(model, tokenizer) or EngramConfig.for_teaching()."
            )
        if memory.mapping.spec.ids != "raw":
            raise ConfigError(
                f"MemoryEditor: hash_spec {config.hash_spec!r} merges tokens that differ in case or accents, so that `mW` and `MW` would be "
                "one key; use EngramConfig.for_teaching() or hash_spec='exact_v1'."
            )
        if config.use_conv:
            raise ConfigError(
                "MemoryEditor: got use_conv=True, expected False: a convolution carries facts past their own rows."
            )
        self.memory, self.tokenizer = memory, tokenizer
        self._ledger = Ledger.from_dict(memory.ledger) if memory.ledger else Ledger()
        self._speller = Speller(memory.base_model, tokenizer)

    @classmethod
    def create(cls, model: PreTrainedModel, tokenizer: Any, seed: int = 0, dtype: str = "bfloat16", **changes: Any) -> Self:
        """Attach a new, empty memory to a model.

        Args:
            model: any causal language model of a known architecture.
            tokenizer: its tokenizer.
            seed: seed of the hash and the reader.
            dtype: storage type of the rows, any of ``TableConfig.dtype``; rows are optimised in float32 and stored in it.
            **changes: fields of ``EngramConfig.for_teaching`` to change. ``layer_ids`` defaults to the last block.

        Raises:
            AttachError, ConfigError: as ``get_engram_model``.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ConfigError("the tokenizer has neither a pad_token nor an eos_token; set one of them.")
        defaults = {"layer_ids": (len(find_decoder(model).blocks) - 1,), "pad_id": pad, "seed": seed}
        config = EngramConfig.for_teaching(**{**defaults, **changes})
        placement = TableConfig(dtype=dtype)  # type: ignore[arg-type]
        return cls(get_engram_model(model, config, tokenizer, placement), tokenizer)

    @classmethod
    def load(cls, model: PreTrainedModel, path: str | os.PathLike[str], tokenizer: Any, allow_other_base: bool = False) -> Self:
        """Attach a saved memory to a model.

        Raises:
            CheckpointError, FingerprintError, ConfigError, AttachError: as ``EngramModel.from_pretrained``.
        """
        memory = EngramModel.from_pretrained(model, path, tokenizer, allow_other_base=allow_other_base)
        try:
            return cls(memory, tokenizer)
        except BaseException:
            memory.unload()
            raise

    @property
    def facts(self) -> list[LedgerFact]:
        """What the memory holds, in the order in which it was taught."""
        return list(self._ledger)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Save memory and ledger into a folder, atomically, under the folder's lock.

        Args:
            path: the folder.
            overwrite: replace a memory that was neither read nor written here, or that cannot be read.

        Raises:
            CheckpointError: another process is changing the folder, or has changed it since it was read here, or it cannot be
                written; what was saved before is intact.
        """
        with lock_store(path):
            version = None if overwrite else saved_version(path)
            if version is not None and version not in self.memory.known_versions:
                raise CheckpointError(
                    f"{path} holds a memory that was changed, or made, by somebody else since; saving over it would lose what they did. "
                    "Load it and teach again, choose another folder, or pass overwrite=True."
                )
            self.memory.save_pretrained(path)

    def teach(
        self,
        facts: Sequence[Fact],
        settings: TeachSettings | None = None,
        source: str = "",
        checksum: str = "",
        replace_answers: bool = False,
        progress: Progress | None = None,
        on_conflicts: Callable[[list[RowConflict]], None] | None = None,
    ) -> TeachReport:
        """Write facts into rows until every answer is greedy-exact with a margin.

        Facts that the memory holds already are left alone; new phrasings of one are joined to it. Facts that cannot be made exact leave
        nothing behind and are reported. Earlier facts keep their rows; those whose prompts read a new row are asked again. An
        interruption, or an error, leaves the memory as it was.

        Args:
            facts: what to teach.
            settings: see ``TeachSettings``.
            source: file the facts come from, for the ledger.
            checksum: its SHA-256, for the ledger.
            replace_answers: forget facts whose prompts get another answer now, instead of refusing. One that would be replaced by
                something that cannot be made exact is kept.
            progress: called while prompts are learnt.
            on_conflicts: called before anything is written, if rows are in conflict; an exception it raises stops the lesson.

        Raises:
            DataError: facts contradict each other or do not fit the context.
            TeachError: there are no facts, one contradicts the memory (and ``replace_answers`` is off), or an earlier fact would break.
        """
        settings = settings or TeachSettings()
        facts = list(facts) if isinstance(facts, Iterable) else facts  # a generator can be read only once
        if not isinstance(facts, list) or not all(isinstance(fact, Fact) for fact in facts):
            raise TeachError("teach: expected a list of Fact objects; read a file with load_facts(path).")
        if not facts:
            raise TeachError("teach: got no facts, expected at least one.")
        check_conflicts(facts, "facts to teach")
        kept = dict[str, str]()
        while wanted := [fact for fact in facts if fact.id not in kept]:
            try:
                with self._all_or_nothing():
                    report = self._lesson(wanted, settings, (source, checksum), replace_answers, progress, on_conflicts)
            except _WouldBeLostError as lost:  # all is as before; those facts are left out and the rest is taught
                kept.update(lost.reasons)
            else:
                report.not_exact.update(kept)
                return report
        return TeachReport(not_exact=kept)

    def in_parts(self, facts: Sequence[Fact], size: int, replace_answers: bool = False) -> list[list[Fact]]:
        """A long lesson as lessons of about ``size`` facts, to save in between; one after the other they do what the whole would do.

        Raises:
            TeachError: a fact contradicts the memory (and ``replace_answers`` is off); ``teach`` would say so in the middle.
        """
        found = sort_out(self._ledger, facts)
        if not replace_answers:
            found.refuse_contradictions()
        return in_parts(self._ledger, facts, size)

    def forget(self, fact_ids: Sequence[str]) -> ForgetReport:
        """Take facts out: rows that only they own are deleted. If nothing was taught with them or after them, the memory is bit for bit what it
        was before; other facts stay as they were taught, some beside those that leave.

        Raises:
            TeachError: an id is unknown; nothing is forgotten then.
        """
        fact_ids = [fact_ids] if isinstance(fact_ids, str) else list(fact_ids)
        unknown = [fact_id for fact_id in fact_ids if fact_id not in self._ledger]
        if unknown or not fact_ids:
            raise TeachError(
                f"forget: no fact {', '.join(map(repr, unknown)) or '(no id given)'} in this memory; `engram facts` lists ids."
            )
        with self._all_or_nothing():
            return self._forget(list(dict.fromkeys(fact_ids)))

    @contextmanager
    def without(self, fact_ids: Sequence[str]) -> Iterator[None]:
        """Inside this context the memory is as if these facts were forgotten.

        Raises:
            TeachError: an id is unknown.
        """
        ledger = self._ledger
        self._ledger = ledger.copy()
        rows = self._rows()
        try:
            gone = [self._ledger.remove(fact_id) for fact_id in fact_ids]
            self._delete_rows(gone, self.facts)
            yield
        finally:
            self._put_back(rows)
            self._ledger = ledger

    def verify(self, batch_size: int = 256) -> dict[str, bool]:
        """Ask the model every prompt of every fact; by id, whether all answers are exact."""
        with self._evaluating():
            wrong = set(self._not_exact(self.facts, batch_size))
        return {fact.id: fact.id not in wrong for fact in self._ledger}

    def why(self, prompt: str, max_new_tokens: int = 32) -> Explanation:
        """Answer a prompt and say, token by token, which facts spoke and what they changed; see ``explain``.

        Raises:
            DataError: the prompt fills the model's context.
        """
        from engram.editing.why import explain

        with self._evaluating():
            return explain(self, prompt, max_new_tokens)

    def diff(self, other: str | os.PathLike[str]) -> MemoryDiff:
        """Facts and rows in which this memory (a) and a saved one (b) differ; see ``diff_memories``."""
        from engram.editing.merge import diff_memories

        with TemporaryDirectory() as folder:
            self.save(folder)
            return diff_memories(folder, other)

    def merge(self, other: str | os.PathLike[str], prefer: Literal["a", "b"] | None = None) -> MergeReport:
        """Take in the facts of a saved memory (b); see ``merge_memories``. Check the outcome with ``verify``."""
        from engram.editing.merge import merge_memories

        with TemporaryDirectory() as folder:
            self.save(f"{folder}/a")
            report = merge_memories(f"{folder}/a", other, f"{folder}/union", prefer)
            self.memory.load_memory(f"{folder}/union")
        self._ledger = Ledger.from_dict(self.memory.ledger or {})
        return report

    def rows_of(self, fact_id: str) -> dict[str, list[int]]:
        """Rows that a fact owns, per layer, sorted.

        Raises:
            TeachError: there is no such fact.
        """
        owned = self._owned_rows([self._ledger[fact_id]])
        return {layer: rows.tolist() for layer, rows in owned.items()}

    def owners(self, layer: str, row_ids: Sequence[int]) -> dict[int, list[str]]:
        """Ids of the facts that own each of some rows."""
        wanted = torch.tensor(sorted(set(row_ids)), dtype=torch.int64)
        facts = self.facts
        numbers = torch.tensor([n for n, fact in enumerate(facts) for _ in fact.prompts], dtype=torch.int64)
        planned = plan_rows(self.memory.mapping, [prompt for fact in facts for prompt in fact.prompts])[layer]
        mine = self._stored(layer, planned) & torch.isin(planned.row_ids, wanted)
        pairs = {(row, facts[number].id) for row, number in self._pairs(planned, mine, numbers)}
        return {int(row): [fact.id for fact in facts if (int(row), fact.id) in pairs] for row in wanted}

    @staticmethod
    def _pairs(planned: PlannedRows, chosen: Tensor, numbers: Tensor) -> Iterator[tuple[int, int]]:
        where = chosen.nonzero()
        yield from zip(planned.row_ids[chosen].tolist(), numbers[planned.prompt[where[:, 0]]].tolist())

    def table(self, layer: str) -> VerifiedTable:
        """Rows of one layer."""
        return self.memory.engrams[layer].multi_head_embedding.embedding

    # -- how it is done ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put tables and ledger back if the block fails, whatever the reason (tables replace their tensors, they never write into them)."""
        rows, ledger = self._rows(), self._ledger.copy()
        try:
            with self._evaluating():
                yield
        except BaseException:
            self._put_back(rows)
            self._ledger = ledger
            raise
        self.memory.ledger = self._ledger.to_dict()

    def _rows(self) -> dict[str, StoredRows]:
        return {layer: self.table(layer).stored for layer in self.memory.engrams}

    def _put_back(self, rows: dict[str, StoredRows]) -> None:
        for layer, stored in rows.items():
            self.table(layer).stored = stored

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.memory.training
        self.memory.eval()
        try:
            yield
        finally:
            self.memory.train(was_training)

    def _lesson(
        self,
        facts: Sequence[Fact],
        settings: TeachSettings,
        origin: tuple[str, str],
        replace_answers: bool,
        progress: Progress | None,
        on_conflicts: Callable[[list[RowConflict]], None] | None,
    ) -> TeachReport:
        """Teach what is new; see ``teach``.

        Raises:
            _WouldBeLostError: a fact cannot be made exact for which others had to make way.
        """
        found = sort_out(self._ledger, facts)
        if stale := self._not_exact([self._ledger[fact_id] for fact_id in found.holding], settings.batch_size):
            found = sort_out(self._ledger, facts, stale)
        if not replace_answers:
            found.refuse_contradictions()
        report = TeachReport(already_known=found.already_known, replaced=found.contradictions, joined=found.joined)
        leaving = list(dict.fromkeys(fact_id for ids in found.leaving.values() for fact_id in ids))
        deleted, _ = self._take_out(leaving) if leaving else ({}, 0)
        entries = self._encode(list(found.new.values()), settings, *origin)
        if entries:
            conflicts = self._row_conflicts(entries)
            report.rows_in_conflict = len(conflicts)
            if conflicts and on_conflicts is not None:
                on_conflicts(conflicts)
            Teaching(self, entries, settings, report, progress).run()
        lost = {given: why for new, why in report.not_exact.items() if found.leaving[new] for given in found.given[new]}
        if lost:
            raise _WouldBeLostError(lost)
        broken = self._not_exact(self._leaning_on(deleted)) if deleted else []
        if broken:
            names = ", ".join(repr(self._ledger[fact_id].prompts[0].text) for fact_id in broken[:_SHOWN])
            raise TeachError(
                f"{len(broken)} other answer(s) lean on what would be replaced: {names}. Nothing was written. Teach those again together "
                "with the new facts."
            )
        return report

    def _encode(self, facts: Sequence[Fact], settings: TeachSettings, source: str, checksum: str) -> list[LedgerFact]:
        """Facts as they will stand in the ledger, keys chosen."""
        config = self.memory.engram_config
        if settings.min_order > config.max_ngram_size:
            raise TeachError(
                f"TeachSettings.min_order is {settings.min_order}, but the memory's n-grams end at {config.max_ngram_size}; "
                "lower min_order or make a memory with a larger max_ngram_size."
            )
        context = context_length(self.memory.config)
        encoded = [
            (text, row)
            for index, fact in enumerate(facts)
            for text, row in zip(fact.prompts, encode_fact(self.tokenizer, fact, index, context))
        ]
        spelt = self._speller.spell([row.answer_ids for _, row in encoded])
        rows = [
            KeyedPrompt(text, row.prompt_ids, ids if self._has_room(row, ids, context, settings) else row.answer_ids)
            for (text, row), ids in zip(encoded, spelt)
        ]
        others = [prompt for fact in self._ledger for prompt in fact.prompts]
        bits = surprise_bits(self.memory, rows, settings.batch_size)
        keyed = iter(
            choose_keys(
                rows,
                bits,
                others,
                config.max_ngram_size,
                settings.min_order,
                settings.min_bits,
                config.pad_id,
                self.tokenizer.bos_token_id,
            )
        )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return [
            LedgerFact(
                fact.id,
                fact.answer,
                fact.category,
                tuple(next(keyed) for _ in fact.prompts),
                fact.held_out,
                source,
                checksum,
                now,
            )
            for fact in facts
        ]

    def _has_room(self, row: EncodedFact, spelt: tuple[int, ...], context: int | None, settings: TeachSettings) -> bool:
        """Whether an answer may be spelt so: within the context, and within reach of the shortest key where it was so before."""
        reach = self.memory.engram_config.max_ngram_size + 1 - settings.min_order
        fits = context is None or len(row.prompt_ids) + len(spelt) <= context
        return fits and (len(spelt) <= reach or len(row.answer_ids) > reach)

    def _row_conflicts(self, entries: list[LedgerFact]) -> list[RowConflict]:
        """Rows of new facts that belong to another n-gram, in the memory or among the new facts themselves."""
        found = []
        for layer, planned in plan_rows(self.memory.mapping, [prompt for entry in entries for prompt in entry.prompts]).items():
            owner_of_prompt = [entry.id for entry in entries for _ in entry.prompts]
            rows, tags = planned.row_ids.flatten(), planned.tags.flatten()
            prompts = planned.prompt.repeat_interleave(planned.row_ids.shape[1])
            held = self.table(layer).owner_tags(rows.to(self.table(layer).row_ids.device)).cpu()
            first: dict[int, tuple[int, str]] = {}
            taken = torch.nonzero((held != 0) & (held != tags)).flatten().tolist()
            stored = self.owners(layer, rows[taken].tolist()) if taken else {}
            found += [RowConflict(layer, int(rows[i]), owner_of_prompt[prompts[i]], tuple(stored[int(rows[i])])) for i in taken]
            free = torch.nonzero(held == 0).flatten()
            order = free[torch.argsort(rows[free], stable=True)]
            doubled = torch.zeros(len(order), dtype=torch.bool)
            doubled[1:] = rows[order][1:] == rows[order][:-1]
            doubled[:-1] |= doubled[1:].clone()
            for i in order[doubled].tolist():
                tag, owner = first.setdefault(int(rows[i]), (int(tags[i]), owner_of_prompt[prompts[i]]))
                if tag != int(tags[i]):
                    found.append(RowConflict(layer, int(rows[i]), owner_of_prompt[prompts[i]], (owner,)))
        return list(dict.fromkeys(found))

    def _forget(self, fact_ids: list[str]) -> ForgetReport:
        only_theirs, shared = self._take_out(fact_ids)
        broken = self._not_exact(self._leaning_on(only_theirs))
        return ForgetReport(fact_ids, sum(len(planned[0]) for planned in only_theirs.values()), shared, broken)

    def _take_out(self, fact_ids: Sequence[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
        """Strike facts out of the ledger and delete their rows; as ``_delete_rows``."""
        gone = [self._ledger.remove(fact_id) for fact_id in fact_ids]
        return self._delete_rows(gone, self.facts)

    def _delete_rows(
        self, gone: Sequence[LedgerFact], keepers: Sequence[LedgerFact]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
        """Delete the rows that ``gone`` own and ``keepers`` do not; returns them with their tags, and how many stay because both do."""
        theirs, kept = self._owned_rows(gone), self._owned_rows(keepers)
        deleted, shared = {}, 0
        for layer, rows in theirs.items():
            also_kept = torch.isin(rows, kept[layer])
            shared += int(also_kept.sum())
            deleted[layer] = self._with_tags(layer, rows[~also_kept])
            self.table(layer).delete(rows[~also_kept])
        return deleted, shared

    def _owned_rows(self, facts: Sequence[LedgerFact]) -> dict[str, Tensor]:
        """Stored rows that facts own, per layer, sorted, each once."""
        planned = plan_rows(self.memory.mapping, [prompt for fact in facts for prompt in fact.prompts])
        return {layer: plan.row_ids[self._stored(layer, plan)].unique() for layer, plan in planned.items()}

    def _stored(self, layer: str, planned: PlannedRows) -> Tensor:
        """Which planned rows are in the table under their own tag, bool ``[m, K]``."""
        table = self.table(layer)
        device = table.row_ids.device
        return (table.find(planned.row_ids.to(device), planned.tags.to(device)) != ABSENT).cpu()

    def _with_tags(self, layer: str, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        table = self.table(layer)
        return row_ids.cpu(), table.owner_tags(row_ids.to(table.row_ids.device)).cpu()

    def _leaning_on(self, rows: dict[str, tuple[Tensor, Tensor]]) -> list[LedgerFact]:
        """Facts of the ledger one of whose prompts reads one of these rows anywhere; no other fact can notice them come or go.

        Args:
            rows: per layer, row numbers ``[n]`` (sorted) and tags ``[n]``.
        """
        facts = self.facts
        prompts = [(number, prompt) for number, fact in enumerate(facts) for prompt in fact.prompts]
        tables = {}
        for layer, (row_ids, tags) in rows.items():
            tables[layer] = VerifiedTable(self.table(layer).rows, 0)
            tables[layer].insert(row_ids, tags, torch.zeros(len(row_ids), 0))
        readers: set[int] = set()
        for start in range(0, len(prompts), _HASHED_AT_ONCE):
            batch = prompts[start : start + _HASHED_AT_ONCE]
            ids, mask = pad_right([prompt.ids for _, prompt in batch], self.memory.engram_config.pad_id)
            for layer_id, (hash_ids, tags) in self.memory.mapping.hash_with_tags(ids, attention_mask=mask).items():
                offsets = self.memory.engrams[str(layer_id)].multi_head_embedding.offsets.cpu()
                hit = (tables[str(layer_id)].find(hash_ids + offsets, tags) != ABSENT).any(-1) & (mask != 0)
                readers.update(batch[i][0] for i in hit.any(-1).nonzero().flatten().tolist())
        return [facts[number] for number in sorted(readers)]

    def _not_exact(self, facts: Sequence[LedgerFact], batch_size: int = 256) -> list[str]:
        prompts = [(fact.id, prompt) for fact in facts for prompt in fact.prompts]
        exact = answers_exactly(self.memory, [prompt for _, prompt in prompts], batch_size)
        return list(dict.fromkeys(fact_id for (fact_id, _), ok in zip(prompts, exact) if not ok))


class _WouldBeLostError(Exception):
    """Facts for which others made way, and which then could not be made exact: by id, with the reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__()
        self.reasons = {fact_id: f"{reason}; what the memory said before is kept" for fact_id, reason in reasons.items()}
