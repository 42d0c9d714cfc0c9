"""One lesson: batches of prompts are given rows, checked, and entered into the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engram.editing.keys import KeyedPrompt, goes_on_otherwise, plan_rows
from engram.editing.ledger import LedgerFact
from engram.editing.lesson import TeachSettings, optimise_rows, stream_sizes
from engram.editing.reports import TeachReport
from engram.errors import TeachError

if TYPE_CHECKING:
    from engram.editing.editor import MemoryEditor

__all__ = ["Progress", "Teaching"]

Progress = Callable[[int, int], None]
"""Called with (prompts learnt, prompts in all)."""

_SHOWN = 5


class Teaching:
    """One call of ``teach``: batches of prompts are given rows, checked, and entered into the ledger."""

    def __init__(
        self,
        editor: MemoryEditor,
        entries: list[LedgerFact],
        settings: TeachSettings,
        report: TeachReport,
        progress: Progress | None,
    ) -> None:
        self.editor, self.memory, self.settings, self.report = editor, editor.memory, settings, report
        self.entries = {entry.id: entry for entry in entries}
        self.total = sum(len(entry.prompts) for entry in entries)
        self.progress = progress
        self.done = 0
        self.given_up: list[LedgerFact] = []

    def run(self) -> None:
        """Teach, check, teach again what failed, give up what still fails, and write the ledger."""
        earlier = self.editor.facts
        sample = [prompt for entry in list(self.entries.values())[:256] for prompt in entry.prompts][:256]
        sizes = stream_sizes(self.memory, sample)
        self.lr = {layer: self.settings.lr * size for layer, size in sizes.items()}
        before = {layer: self.editor.table(layer).row_ids for layer in self.memory.engrams}
        self._learn(list(self.entries), self.settings.max_steps)
        failed = self._failed()
        for attempt in range(1, self.settings.retries + 1):
            if not failed:
                break
            self._drop_rows(failed)
            self.done -= sum(len(self.entries[fact_id].prompts) for fact_id in failed)
            self._learn(failed, self.settings.max_steps << attempt)
            failed = self._failed()
        if failed:
            self._give_up(failed)
        self._enter(before, earlier)

    def _learn(self, fact_ids: list[str], max_steps: int) -> None:
        """Prompts of similar length together, in batches; each batch's rows are in the tables before the next begins."""
        prompts = [prompt for fact_id in fact_ids for prompt in self.entries[fact_id].prompts]
        prompts.sort(key=lambda prompt: len(prompt.ids))
        for start in range(0, len(prompts), self.settings.batch_size):
            batch = prompts[start : start + self.settings.batch_size]
            new = self._new_rows(batch)
            self.report.steps += optimise_rows(self.memory, batch, new, self.lr, self.settings, max_steps, self._show)
            self.done += len(batch)
            self._show(0)

    def _show(self, learnt: int) -> None:
        if self.progress is not None:
            self.progress(self.done + learnt, self.total)

    def _new_rows(self, prompts: list[KeyedPrompt]) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows that these prompts own and nobody has written, per layer: sorted row numbers and their tags."""
        new = {}
        for layer, planned in plan_rows(self.memory.mapping, prompts).items():
            order = torch.argsort(planned.row_ids.flatten(), stable=True)
            row_ids, tags = planned.row_ids.flatten()[order], planned.tags.flatten()[order]
            first = torch.ones_like(row_ids, dtype=torch.bool)
            first[1:] = row_ids[1:] != row_ids[:-1]  # of two new n-grams in one row, one gets it
            row_ids, tags = row_ids[first], tags[first]
            held = self.editor.table(layer).owner_tags(row_ids.to(self.editor.table(layer).row_ids.device)).cpu()
            new[layer] = (row_ids[held == 0], tags[held == 0])
        return new

    def _failed(self) -> list[str]:
        """Facts one of whose prompts is not answered from the committed rows."""
        return self.editor._not_exact(list(self.entries.values()), self.settings.batch_size)

    def _drop_rows(self, fact_ids: list[str]) -> None:
        """Remove the rows that only these facts would own."""
        gone = set(fact_ids)
        keepers = [entry for fact_id, entry in self.entries.items() if fact_id not in gone]
        self.editor._delete_rows([self.entries[fact_id] for fact_id in fact_ids], [*self.editor.facts, *keepers])

    def _give_up(self, failed: list[str]) -> None:
        """Take out what could not be made exact, and whatever then turns out to have leant on it."""
        while failed:
            self._drop_rows(failed)
            self.report.not_exact |= {fact_id: self._reason(self.entries[fact_id]) for fact_id in failed}
            self.given_up += [self.entries.pop(fact_id) for fact_id in failed]
            failed = self._failed() if self.entries else []

    def _reason(self, entry: LedgerFact) -> str:
        others = [fact for fact in [*self.editor.facts, *self.entries.values(), *self.given_up] if fact.id != entry.id]
        for prompt in entry.prompts:
            for other in (rival for fact in others for rival in fact.prompts):
                if goes_on_otherwise(prompt, other) or goes_on_otherwise(other, prompt):
                    return (
                        f"its words and those of {other.text!r} are the same up to where one answer has begun and the other prompt ends; "
                        "one text cannot go on in two ways: reword one of them"
                    )
        longest = self.memory.engram_config.max_ngram_size
        if any(prompt.key_length == longest for prompt in entry.prompts):
            return f"its last {longest} tokens are those of another fact; ask with the distinctive words nearer to the end"
        if any(prompt.key_length + len(prompt.answer_ids) > longest + 1 for prompt in entry.prompts):
            return f"the end of its answer is out of reach of its key ({longest} tokens): shorten it, or make a memory with more max_ngram_size"
        if unsaid := self.editor._speller.unsayable([token for prompt in entry.prompts for token in prompt.answer_ids]):
            shown = ", ".join(repr(self.editor.tokenizer.decode([token])) for token in unsaid[:_SHOWN])
            return (
                f"its answer has tokens that the model hardly met in training and may not be able to tell from others ({shown}): "
                "put it in other words"
            )
        return "its answer did not become greedy-exact; raise max_steps or lr, or shorten the answer"

    def _enter(self, before: dict[str, Tensor], earlier: list[LedgerFact]) -> None:
        """Count, check the earlier facts that could notice, and write the ledger."""
        report, editor = self.report, self.editor
        new_rows = {}
        for layer, rows in before.items():
            now = editor.table(layer).row_ids
            new_rows[layer] = editor._with_tags(layer, now[~torch.isin(now, rows)])
        report.rows_written = sum(len(rows[0]) for rows in new_rows.values())
        readers = editor._leaning_on(new_rows) if earlier else []
        report.reverified = sum(len(fact.prompts) for fact in readers)
        broken = editor._not_exact(readers)
        if broken:
            names = ", ".join(repr(editor._ledger[fact_id].prompts[0].text) for fact_id in broken[:_SHOWN])
            raise TeachError(
                f"the new facts would change {len(broken)} earlier answer(s): {names}. Nothing was written. "
                "Teach those again together with the new ones, or reword the new prompts."
            )
        for entry in self.entries.values():
            editor._ledger.add(entry)
        report.taught = list(self.entries)
        report.prompts = sum(len(entry.prompts) for entry in self.entries.values())
