"""What a taught memory holds: the facts of its ledger and the rows that they own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engram.data.facts import pad_right
from engram.editing.keys import PlannedRows, plan_rows
from engram.editing.ledger import Ledger, LedgerFact
from engram.editing.lesson import answers_exactly
from engram.editing.reports import RowConflict
from engram.models import EngramModel
from engram.models.mode import evaluation_mode
from engram.tables import ABSENT, StoredRows, VerifiedTable

__all__ = ["Holdings", "TaggedRows"]

_SHOWN = 5
_HASHED_AT_ONCE = 1024
_UNREAD = object()

TaggedRows = dict[str, tuple[Tensor, Tensor]]
"""Per layer, row numbers ``[n]`` (sorted) and the tags ``[n]`` of the n-grams that own them."""


class Holdings:
    """Facts and rows of one memory, kept in step: questions about them, and their removal. What is written is written by ``Teaching``.

    Args:
        memory: an attached memory with verified rows.
    """

    def __init__(self, memory: EngramModel) -> None:
        self.memory = memory
        self._read: Any = _UNREAD
        self._ledger = self.ledger  # a malformed one is told at once

    @property
    def ledger(self) -> Ledger:
        """The memory's ledger, read again wherever another one stands there than was read or written here: other editors may have changed
        the memory, or it was loaded anew.

        Raises:
            CheckpointError: what stands there is malformed.
        """
        if self.memory.ledger is not self._read:
            self._ledger = Ledger.from_dict(self.memory.ledger) if self.memory.ledger else Ledger()
            self._read = self.memory.ledger
        return self._ledger

    @property
    def facts(self) -> list[LedgerFact]:
        """In the order in which they were taught."""
        return list(self.ledger)

    def table(self, layer: str) -> VerifiedTable:
        """Rows of one layer."""
        return self.memory.engrams[layer].table

    # -- for a while -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Put tables and ledger back if the block fails, whatever the reason (tables replace their tensors, they never write into them)."""
        with self.evaluating():
            rows, ledger, written = self.rows(), self.ledger.copy(), self.memory.ledger
            before, self.memory.is_being_changed = self.memory.is_being_changed, True
            try:
                yield
                self.write_down()
            except BaseException:
                self._go_back(rows, ledger, written)
                raise
            finally:
                self.memory.is_being_changed = before

    @contextmanager
    def without(self, fact_ids: Sequence[str]) -> Iterator[None]:
        """Inside this context, as if these facts were forgotten; whatever else is changed there is undone with that."""
        with self.memory.turns:
            rows, ledger, written = self.rows(), self.ledger, self.memory.ledger
            self._ledger = ledger.copy()
            try:
                self.take_out(fact_ids)
                yield
            finally:
                self._go_back(rows, ledger, written)

    def write_down(self) -> None:
        """Let the memory have the ledger as it is now."""
        self._read = self.memory.ledger = self.ledger.to_dict()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With the model in evaluation mode and the memory heard by all, whatever surrounds this."""
        memory = self.memory
        with memory.turns, evaluation_mode(memory), memory.enable_engram(), memory.routed(None), _outside_inference_mode():
            yield

    def rows(self) -> dict[str, StoredRows]:
        """Rows of every layer as they are now, to put back."""
        return {layer: self.table(layer).stored for layer in self.memory.engrams}

    def _go_back(self, rows: dict[str, StoredRows], ledger: Ledger, written: dict[str, Any] | None) -> None:
        """Rows, ledger and what the memory holds of it, as they were together."""
        self.put_back(rows)
        self._ledger, self._read, self.memory.ledger = ledger, written, written

    def put_back(self, rows: dict[str, StoredRows]) -> None:
        """Make ``rows`` those of the tables again."""
        for layer, stored in rows.items():
            self.table(layer).stored = stored

    # -- questions -------------------------------------------------------------------------------------------------------------------

    def not_exact(self, facts: Sequence[LedgerFact], batch_size: int = 256) -> list[str]:
        """Ids of those facts that the model does not answer exactly, one prompt being enough."""
        prompts = [(fact.id, prompt) for fact in facts for prompt in fact.prompts]
        exact = answers_exactly(self.memory, [prompt for _, prompt in prompts], batch_size)
        return list(dict.fromkeys(fact_id for (fact_id, _), ok in zip(prompts, exact) if not ok))

    def names_of(self, fact_ids: Sequence[str]) -> str:
        """The first few of these facts by their first prompts, for messages."""
        return ", ".join(repr(self.ledger[fact_id].prompts[0].text) for fact_id in fact_ids[:_SHOWN])

    def owned_rows(self, facts: Sequence[LedgerFact]) -> dict[str, Tensor]:
        """Stored rows that facts own, per layer, sorted, each once."""
        return {layer: plan.row_ids[self._stored(layer, plan)].unique() for layer, plan in self._plan(facts).items()}

    def owners(self, layer: str, row_ids: Sequence[int]) -> dict[int, list[str]]:
        """Ids of the facts that own each of some rows."""
        wanted = torch.tensor(sorted(set(row_ids)), dtype=torch.int64)
        facts = self.facts
        fact_of_prompt = torch.tensor([n for n, fact in enumerate(facts) for _ in fact.prompts], dtype=torch.int64)
        planned = self._plan(facts)[layer]
        chosen = self._stored(layer, planned) & torch.isin(planned.row_ids, wanted)
        numbers = fact_of_prompt[planned.prompt[chosen.nonzero()[:, 0]]]
        owned = set(zip(planned.row_ids[chosen].tolist(), numbers.tolist()))
        return {int(row): [fact.id for number, fact in enumerate(facts) if (int(row), number) in owned] for row in wanted}

    def conflicts(self, entries: Sequence[LedgerFact]) -> list[RowConflict]:
        """Rows of new facts that belong to another n-gram, in the memory or among the new facts themselves."""
        found = []
        owner_of_prompt = [entry.id for entry in entries for _ in entry.prompts]
        for layer, planned in self._plan(entries).items():
            rows, tags = planned.row_ids.flatten(), planned.tags.flatten()
            prompts = planned.prompt.repeat_interleave(planned.row_ids.shape[1])
            held = self.tags(layer, rows)
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

    def leaning_on(self, rows: TaggedRows) -> list[LedgerFact]:
        """Facts one of whose prompts reads one of these rows anywhere; no other fact can notice them come or go."""
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

    def tags(self, layer: str, row_ids: Tensor) -> Tensor:
        """Tags of the n-grams that own some rows, int32, on the CPU; 0 for a row that nobody has written."""
        table = self.table(layer)
        return table.owner_tags(row_ids.to(table.row_ids.device)).cpu()

    def rows_beyond(self, before: dict[str, StoredRows]) -> TaggedRows:
        """Rows that are here now and were not in ``before``."""
        found = {}
        for layer, stored in before.items():
            now = self.table(layer).row_ids
            new = now[~torch.isin(now, stored.row_ids)].cpu()
            found[layer] = (new, self.tags(layer, new))
        return found

    def _plan(self, facts: Sequence[LedgerFact]) -> dict[str, PlannedRows]:
        """Rows that all prompts of some facts may write, per layer."""
        return plan_rows(self.memory.mapping, [prompt for fact in facts for prompt in fact.prompts])

    def _stored(self, layer: str, planned: PlannedRows) -> Tensor:
        """Which planned rows are in the table under their own tag, bool ``[m, K]``."""
        table = self.table(layer)
        device = table.row_ids.device
        return (table.find(planned.row_ids.to(device), planned.tags.to(device)) != ABSENT).cpu()

    # -- removal ---------------------------------------------------------------------------------------------------------------------

    def take_out(self, fact_ids: Sequence[str]) -> tuple[TaggedRows, int]:
        """Strike facts out of the ledger and delete their rows; as ``delete_rows``."""
        gone = [self.ledger.remove(fact_id) for fact_id in fact_ids]
        return self.delete_rows(gone, self.facts)

    def delete_rows(self, gone: Sequence[LedgerFact], keepers: Sequence[LedgerFact]) -> tuple[TaggedRows, int]:
        """Delete the rows that ``gone`` own and ``keepers`` do not; returns them, and how many stay because both do."""
        theirs, kept = self.owned_rows(gone), self.owned_rows(keepers)
        deleted, shared = {}, 0
        for layer, rows in theirs.items():
            also_kept = torch.isin(rows, kept[layer])
            shared += int(also_kept.sum())
            only_theirs = rows[~also_kept]
            deleted[layer] = (only_theirs, self.tags(layer, only_theirs))
            self.table(layer).delete(only_theirs)
        return deleted, shared


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Rows that were made in inference mode could be optimised neither now nor later."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
