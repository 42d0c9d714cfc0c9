"""`MemoryEditor`: facts in, facts out, and an account of both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self

from transformers import PreTrainedModel

from engram.checkpoint import lock_store, read_description, saved_version
from engram.config import EngramConfig, TableConfig
from engram.data.facts import Fact, check_conflicts
from engram.distributed import is_fully_sharded
from engram.editing.asking import at_start_only, not_given_back, out_of_reach
from engram.editing.entries import make_entries
from engram.editing.holdings import Holdings
from engram.editing.ledger import LedgerFact
from engram.editing.lesson import TeachSettings
from engram.editing.reports import ForgetReport, RowConflict, TeachReport
from engram.editing.sorting import SortedFacts, in_parts, sort_out
from engram.editing.spelling import Speller
from engram.editing.teaching import Progress, Teaching
from engram.errors import AttachError, CheckpointError, ConfigError, TeachError
from engram.evaluation.generation import padding_id
from engram.models import EngramModel, find_decoder, get_engram_model
from engram.models.files import saved_aside
from engram.models.hub import check_order, found_at, remember_name
from engram.models.identity import attached_identity, base_of, identity_mismatch
from engram.tables import VerifiedTable

if TYPE_CHECKING:
    from engram.editing.merge import MemoryDiff, MergeReport
    from engram.editing.why import Explanation

__all__ = ["MemoryEditor", "refuse_trained"]


def refuse_trained(config: EngramConfig) -> None:
    """Refuse a memory that was not made for facts.

    Raises:
        ConfigError: its rows are not verified.
    """
    if not config.verify_rows:
        raise ConfigError(
            "facts: got a memory whose rows are not verified (a trained one), in which they would leak into other text; expected one "
            "made for facts: name a new folder (`engram teach`), or call MemoryEditor.create(model, tokenizer). What a trained memory does, "
            "`engram look` and `engram trace` show."
        )


class MemoryEditor:
    """Teaches facts to a memory with verified rows, explains them, and takes them out again.

    Only table rows are ever written. A fact owns the rows of the n-grams that end in its key and the answer so far (see
    ``engram.editing.keys``); the ledger knows which.

    Args:
        memory: an attached memory whose configuration has ``verify_rows`` (``EngramConfig.for_teaching``).
        tokenizer: the model's tokenizer.

    Raises:
        ConfigError: the memory's rows are not verified, or it has a convolution (whose reach would carry a fact past its owner's rows).
        AttachError: the memory is divided between processes (``shard_model``).
    """

    def __init__(self, memory: EngramModel, tokenizer: Any) -> None:
        config = memory.engram_config
        refuse_trained(config)
        if is_fully_sharded(memory):
            raise AttachError(
                "facts: got a memory that shard_model divided, expected a whole one: facts are taught by one process."
            )
        if memory.mapping.spec.ids != "raw":
            raise ConfigError(
                f"facts: hash_spec {config.hash_spec!r} merges tokens that differ in case or accents, so that `mW` and `MW` would be "
                "one key; use EngramConfig.for_teaching() or hash_spec='exact_v1'."
            )
        if config.use_conv:
            raise ConfigError("facts: got use_conv=True, expected False: a convolution carries facts past their own rows.")
        self.memory, self.tokenizer = memory, tokenizer
        self.holdings = Holdings(memory)
        self._speller = Speller(memory.base_model, tokenizer)
        self._checked_on = attached_identity(memory.below)
        self._told_of_end = False

    @classmethod
    def create(
        cls, model: PreTrainedModel | EngramModel, tokenizer: Any, seed: int = 0, dtype: str = "bfloat16", **changes: Any
    ) -> Self:
        """Attach a new, empty memory to a model.

        Args:
            model: any causal language model of a known architecture, or a memory on one: facts are taught on top of that, which stays as it is.
            tokenizer: its tokenizer.
            seed: seed of the hash and the reader.
            dtype: storage type of the rows, any of ``TableConfig.dtype``; rows are optimised in float32 and stored in it.
            **changes: fields of ``EngramConfig.for_teaching`` to change. ``layer_ids`` defaults to the last block.

        Raises:
            AttachError, ConfigError: as ``get_engram_model``.
        """
        pad = padding_id(tokenizer)
        if pad is None:
            raise ConfigError("the tokenizer has neither a pad_token nor an eos_token; set one of them.")
        blocks = find_decoder(base_of(model)).blocks
        defaults = {"layer_ids": (len(blocks) - 1,), "pad_id": pad, "seed": seed}
        config = EngramConfig.for_teaching(**{**defaults, **changes})
        placement = TableConfig(dtype=dtype)  # type: ignore[arg-type]
        return cls(get_engram_model(model, config, tokenizer, placement), tokenizer)

    @classmethod
    def load(
        cls,
        model: PreTrainedModel | EngramModel,
        path: str | os.PathLike[str],
        tokenizer: Any,
        allow_other_base: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Attach a saved memory to a model.

        Args:
            model: the one it was made for.
            path: a folder, or the name (``owner/name``) of what ``EngramModel.push_to_hub`` uploaded; it is saved in a folder from then on.
            tokenizer: the model's.
            allow_other_base: as for ``EngramModel.from_pretrained``, like ``revision`` and ``token``.

        Raises:
            CheckpointError, FingerprintError, ConfigError, AttachError: as ``EngramModel.from_pretrained``.
        """
        check_order(model, path)
        folder, placement = found_at(path, revision, token)  # here, so that the hub is asked once
        memory = EngramModel.from_pretrained(model, folder, tokenizer, placement, allow_other_base=allow_other_base)
        remember_name(memory, path, folder)
        try:
            editor = cls(memory, tokenizer)
            editor._checked_on = read_description(folder).get("base_model") or {}
            return editor
        except BaseException:
            memory.unload()
            raise

    def __repr__(self) -> str:
        layers = list(self.memory.engram_config.layer_ids)
        rows = sum(self.table(layer).stored_rows for layer in layers)
        return f"{type(self).__name__}(facts={len(self.facts)}, layers={layers}, rows={rows}, dtype={self.table(layers[0]).format_name!r})"

    @property
    def facts(self) -> list[LedgerFact]:
        """What the memory holds, in the order in which it was taught."""
        return self.holdings.facts

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Save memory and ledger into a folder, atomically, under the folder's lock. What is saved belongs to the base model as it is now: a
        warning is logged if that changed since the facts were taught, loaded or verified.

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
            self.memory.save_pretrained(path, overwrite=True)
        self._warn_of_other_base(path)

    def _warn_of_other_base(self, path: str | os.PathLike[str]) -> None:
        """Say once that what was just saved belongs to weights on which nobody has checked it; later loads would not."""
        present = attached_identity(self.memory.below)
        if self.facts and (changed := identity_mismatch(self._checked_on, present)):
            logging.getLogger("engram").warning(
                "%s: the base model has changed since these facts were taught or saved (%s), and the memory was saved as belonging to it as it "
                "is now. editor.verify() tells which facts still hold; teach the others again.",
                os.fspath(path),
                ", ".join(line.partition(":")[0] for line in changed),
            )
        self._checked_on = present

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
        nothing behind and are reported, and so are those whose answers the tokenizer does not give back as they are written. Earlier facts
        keep their rows; those whose prompts read a new row are asked again. An interruption, or an error, leaves the memory as it was.

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
            TeachError: there are no facts, one contradicts the memory (and ``replace_answers`` is off), an earlier fact would break, or the
                model was loaded under ``torch.inference_mode()`` or passes no gradients.
        """
        settings = settings or TeachSettings()
        facts = list(facts) if isinstance(facts, Iterable) else facts  # a generator can be read only once
        if not isinstance(facts, list) or not all(isinstance(fact, Fact) for fact in facts):
            raise TeachError("teach: expected a list of Fact objects; read a file with load_facts(path).")
        if not facts:
            raise TeachError("teach: got no facts, expected at least one.")
        check_conflicts(facts, "facts to teach")
        _refuse_inference_tensors(self.memory)
        self._tell_of_other_end()
        if not self.facts:  # all that it will hold is checked on the weights of now
            self._checked_on = attached_identity(self.memory.below)
        kept = dict[str, str]()
        while wanted := [fact for fact in facts if fact.id not in kept]:
            try:
                with self.holdings.all_or_nothing():
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
        found = sort_out(self.holdings.ledger, facts)
        if not replace_answers:
            found.refuse_contradictions()
        return in_parts(self.holdings.ledger, facts, size)

    def forget(self, fact_ids: str | Iterable[str]) -> ForgetReport:
        """Take facts out: rows that only they own are deleted. If nothing was taught with them or after them, the memory is bit for bit what it
        was before; other facts stay as they were taught, some beside those that leave. (Where rows were in conflict, a fact may have taken one
        that an earlier fact had done without: that stays with the earlier one.)

        Args:
            fact_ids: the id of a fact, or several.

        Raises:
            TeachError: an id is unknown, or none is given; nothing is forgotten then.
        """
        fact_ids = _one_or_several(fact_ids, "forget")
        unknown = [fact_id for fact_id in fact_ids if fact_id not in self.holdings.ledger]
        if unknown or not fact_ids:
            raise TeachError(
                f"forget: no fact {', '.join(map(repr, unknown)) or '(no id given)'} in this memory; `engram facts` lists ids."
            )
        with self.holdings.all_or_nothing():
            only_theirs, shared = self.holdings.take_out(fact_ids)
            broken = self.holdings.not_exact(self.holdings.leaning_on(only_theirs))
        rows = sum(len(row_ids) for row_ids, _ in only_theirs.values())
        return ForgetReport(fact_ids, rows, shared, broken)

    @contextmanager
    def without(self, fact_ids: str | Iterable[str]) -> Iterator[None]:
        """Inside this context the memory is as if these facts were forgotten.

        Args:
            fact_ids: the id of a fact, or several.

        Raises:
            TeachError: an id is unknown.
        """
        with self.holdings.without(_one_or_several(fact_ids, "without")):
            self.holdings.write_down()  # for whoever saves or compares the memory inside
            yield

    def verify(self, batch_size: int = 256) -> dict[str, bool]:
        """Ask the model every prompt of every fact, as its tokenizer splits it now; by id, whether all answers are exact."""
        wrong = set(self._stale(self.facts, batch_size))
        if not wrong:
            self._checked_on = attached_identity(self.memory.below)
        return {fact.id: fact.id not in wrong for fact in self.facts}

    def _stale(self, facts: Sequence[LedgerFact], batch_size: int) -> list[str]:
        """Ids of those facts that the memory holds and nobody is told."""
        with self.holdings.evaluating():
            wrong = self.holdings.not_exact(facts, batch_size)
        return list(dict.fromkeys([*wrong, *out_of_reach(self.tokenizer, facts)]))

    def why(self, prompt: str, max_new_tokens: int | None = None) -> Explanation:
        """Answer a prompt and say, token by token, which facts spoke and what they changed; see ``explain``.

        Args:
            prompt: what is asked.
            max_new_tokens: longest answer; 32, or as long as the longest fact, if not given.

        Raises:
            DataError: the prompt fills the model's context.
        """
        from engram.editing.why import explain

        with self.holdings.evaluating():
            return explain(self, prompt, max_new_tokens)

    def diff(self, other: str | os.PathLike[str]) -> MemoryDiff:
        """Facts and rows in which this memory (a) and a saved one (b) differ; see ``diff_memories``."""
        from engram.editing.merge import diff_memories

        with saved_aside(self.memory) as folder:
            return diff_memories(folder, other)

    def merge(self, other: str | os.PathLike[str], prefer: Literal["a", "b"] | None = None) -> MergeReport:
        """Take in the facts of a saved memory (b); see ``merge_memories``. Check the outcome with ``verify``."""
        from engram.editing.merge import merge_memories

        with saved_aside(self.memory) as folder:
            report = merge_memories(folder, other, f"{folder}/union", prefer)
            self.memory.load_memory(f"{folder}/union")
        return report

    def rows_of(self, fact_id: str) -> dict[str, list[int]]:
        """Rows that a fact owns, sorted, by the layers' names (``"5"``), each of which ``table`` and ``owners`` take.

        Args:
            fact_id: as in ``facts``.

        Raises:
            TeachError: there is no such fact.
        """
        owned = self.holdings.owned_rows([self.holdings.ledger[fact_id]])
        return {layer: rows.tolist() for layer, rows in owned.items()}

    def owners(self, layer: int | str, row_ids: Sequence[int]) -> dict[int, list[str]]:
        """Ids of the facts that own each of some rows; none for a row that nobody owns.

        Args:
            layer: number or name of the layer, one of the configuration's ``layer_ids``.
            row_ids: numbers of rows in its table.

        Raises:
            ConfigError: the memory has no such layer.
        """
        return self.holdings.owners(self._name_of(layer), row_ids)

    def table(self, layer: int | str) -> VerifiedTable:
        """Rows of one layer.

        Args:
            layer: number or name of the layer, one of the configuration's ``layer_ids``.

        Raises:
            ConfigError: the memory has no such layer.
        """
        return self.holdings.table(self._name_of(layer))

    def _name_of(self, layer: int | str) -> str:
        """A layer as tables are called."""
        if str(layer) not in self.memory.engrams:
            raise ConfigError(f"layer: got {layer!r}, expected one of this memory's: {', '.join(self.memory.engrams)}.")
        return str(layer)

    def _tell_of_other_end(self) -> None:
        """Say once that the model's own ``generate`` does not stop where taught answers end."""
        end, settings = self.tokenizer.eos_token_id, getattr(self.memory.base_model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        if self._told_of_end or settings is None or end is None or end in (ends if isinstance(ends, list) else [ends]):
            return
        self._told_of_end = True
        logging.getLogger("engram").warning(
            "taught answers end with %r (id %s), where this model's generate() does not stop (generation_config.eos_token_id: %s): it would "
            "go on after them. Set model.generation_config.eos_token_id = tokenizer.eos_token_id, or pass eos_token_id to generate().",
            self.tokenizer.eos_token,
            end,
            ends,
        )

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
        holdings = self.holdings
        found = sort_out(holdings.ledger, facts)
        if stale := self._stale([holdings.ledger[fact_id] for fact_id in found.holding], settings.batch_size):
            found = sort_out(holdings.ledger, facts, stale)
        if not replace_answers:
            found.refuse_contradictions()
        report = TeachReport(already_known=found.already_known, replaced=found.contradictions, joined=found.joined)
        leaving = list(dict.fromkeys(fact_id for ids in found.leaving.values() for fact_id in ids))
        deleted, _ = holdings.take_out(leaving) if leaving else ({}, 0)
        entries, report.not_exact = self._entries(list(found.new.values()), settings, origin)
        if entries:
            conflicts = holdings.conflicts(entries)
            report.rows_in_conflict = len(conflicts)
            if conflicts and on_conflicts is not None:
                on_conflicts(conflicts)
            Teaching(holdings, self._speller, entries, settings, report, progress).run()
            report.at_start_only = at_start_only(self.tokenizer, [holdings.ledger[fact_id] for fact_id in report.taught])
        lost = {
            given: why for new_id, why in report.not_exact.items() if found.leaving[new_id] for given in found.given[new_id]
        }
        if lost:
            raise _WouldBeLostError(lost | _in_the_same_place(found, report.not_exact))
        if broken := holdings.not_exact(holdings.leaning_on(deleted)) if deleted else []:
            raise TeachError(
                f"{len(broken)} other answer(s) lean on what would be replaced: {holdings.names_of(broken)}. Nothing was written. Teach "
                "those again together with the new facts."
            )
        return report

    def _entries(
        self, facts: list[Fact], settings: TeachSettings, origin: tuple[str, str]
    ) -> tuple[list[LedgerFact], dict[str, str]]:
        """Facts as they will stand in the ledger, and those whose answers nobody would read as they are written, with the reason."""
        held = self.holdings.facts
        entries = make_entries(self.memory, self.tokenizer, self._speller, facts, held, settings, *origin)
        refused = not_given_back(self.tokenizer, entries)
        if refused:  # keys need not be told apart from theirs
            facts = [fact for fact in facts if fact.id not in refused]
            entries = make_entries(self.memory, self.tokenizer, self._speller, facts, held, settings, *origin)
        return entries, refused


def _refuse_inference_tensors(memory: EngramModel) -> None:
    """Nothing can be optimised through them."""
    if any(tensor.is_inference() for tensor in chain(memory.parameters(), memory.buffers())):
        raise TeachError(
            "teach: got a model, or a memory, that was loaded under torch.inference_mode(), expected weights that gradients can pass; load "
            "both outside of it (teaching inside is fine)."
        )


def _in_the_same_place(found: SortedFacts, lost: Collection[str]) -> dict[str, str]:
    """Facts of the lesson that would replace what others, which cannot be made exact, would replace too: by their ids, why they must wait."""
    waiting, gone = dict[str, str](), {held for new_id in lost for held in found.leaving[new_id]}
    while more := [new_id for new_id, held in found.leaving.items() if new_id not in {*lost, *waiting} and gone & set(held)]:
        for new_id in more:
            waiting[new_id] = "it would replace the same fact as another that could not be made exact"
            gone |= set(found.leaving[new_id])
    return {given: why for new_id, why in waiting.items() for given in found.given[new_id]}


class _WouldBeLostError(Exception):
    """Facts for which others made way, and which then could not be made exact: by id, with the reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__()
        self.reasons = {fact_id: f"{reason}; what the memory said before is kept" for fact_id, reason in reasons.items()}


def _one_or_several(fact_ids: str | Iterable[str], asked: str) -> list[str]:
    """Ids, each once: text is one id, and no list of its letters.

    Raises:
        TeachError: it is neither an id nor several.
    """
    if not isinstance(fact_ids, Iterable):
        raise TeachError(f"{asked}: got {fact_ids!r}, expected the id of a fact, or several.")
    return [fact_ids] if isinstance(fact_ids, str) else list(dict.fromkeys(fact_ids))
