"""One lesson: batches of prompts are given rows, checked, and entered into the ledger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engram.editing.holdings import Holdings
from engram.editing.keys import KeyedPrompt, goes_on_otherwise, plan_rows
from engram.editing.ledger import LedgerFact
from engram.editing.lesson import TeachSettings, in_batches, optimise_rows, stream_sizes
from engram.editing.reports import TeachReport
from engram.editing.spelling import Speller
from engram.errors import TeachError
from engram.tables import StoredRows

__all__ = ["Progress", "Teaching"]

Progress = Callable[[int, int], None]
"""Called with (prompts learnt, prompts in all)."""

_SHOWN = 5


class Teaching:
    """One call of ``teach``: batches of prompts are given rows, checked, and entered into the ledger."""

    def __init__(
        self,
        holdings: Holdings,
        speller: Speller,
        entries: list[LedgerFact],
        settings: TeachSettings,
        report: TeachReport,
        progress: Progress | None,
    ) -> None:
        self.holdings, self.memory, self.speller = holdings, holdings.memory, speller
        self.settings, self.report = settings, report
        self.entries = {entry.id: entry for entry in entries}
        self.total = sum(len(entry.prompts) for entry in entries)
        self.progress = progress
        self.done = 0
        self.given_up: list[LedgerFact] = []

    def run(self) -> None:
        """Teach, check, teach again what failed, give up what still fails, and write the ledger."""
        earlier = self.holdings.facts
        sample = [prompt for entry in list(self.entries.values())[:256] for prompt in entry.prompts][:256]
        sizes = stream_sizes(self.memory, sample)
        self.lr = {layer: self.settings.lr * size for layer, size in sizes.items()}
        before = self.holdings.rows()
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
        shorter: list[KeyedPrompt] = []
        for members in in_batches([len(prompt.ids) for prompt in prompts], self.settings.batch_size):
            batch = [prompts[i] for i in members]
            lent = shorter[: max(0, min(self.settings.contexts + 1, self.settings.batch_size) - len(batch))]
            new = self._new_rows(batch)
            self.report.steps += optimise_rows(self.memory, batch, new, self.lr, self.settings, max_steps, self._show, lent)
            self.done += len(batch)
            self._show(0)
            shorter = batch[::-1]

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
            free = self.holdings.tags(layer, row_ids) == 0
            new[layer] = (row_ids[free], tags[free])
        return new

    def _failed(self) -> list[str]:
        """Facts one of whose prompts is not answered from the committed rows."""
        return self.holdings.not_exact(list(self.entries.values()), self.settings.batch_size)

    def _drop_rows(self, fact_ids: list[str]) -> None:
        """Remove the rows that only these facts would own."""
        gone = set(fact_ids)
        keepers = [entry for fact_id, entry in self.entries.items() if fact_id not in gone]
        self.holdings.delete_rows([self.entries[fact_id] for fact_id in fact_ids], [*self.holdings.facts, *keepers])

    def _give_up(self, failed: list[str]) -> None:
        """Take out what could not be made exact, and whatever then turns out to have leant on it."""
        while failed:
            self._drop_rows(failed)
            self.report.not_exact |= {fact_id: self._reason(self.entries[fact_id]) for fact_id in failed}
            self.given_up += [self.entries.pop(fact_id) for fact_id in failed]
            failed = self._failed() if self.entries else []

    def _reason(self, entry: LedgerFact) -> str:
        facts = [*self.holdings.facts, *self.entries.values(), *self.given_up]
        rivals = [rival for fact in facts if fact.id != entry.id for rival in fact.prompts]
        for prompt in entry.prompts:
            for other in rivals:
                if goes_on_otherwise(prompt, other) or goes_on_otherwise(other, prompt):
                    return (
                        f"its words and those of {other.text!r} are the same up to where one answer has begun and the other prompt ends; "
                        "one text cannot go on in two ways: reword one of them"
                    )
        if self._cannot_end(end := entry.prompts[0].answer_ids[-1]):
            return (
                f"the model cannot end an answer: its head has nothing but zeros for the end-of-text token (id {end}), as tied embeddings "
                "leave it that were made with it for padding. If nothing was trained yet, make the model with pad_token_id=None; of a saved "
                "one give that row values (model.get_input_embeddings().weight[end]), or the tokenizer another eos_token"
            )
        longest = self.memory.engram_config.max_ngram_size
        for prompt in entry.prompts:
            for other in rivals:
                if prompt.prompt_ids == other.prompt_ids and prompt.text != other.text:
                    return f"the tokenizer makes the same tokens of its prompt and of {other.text!r}; ask in words that it tells apart"
        if any(prompt.key_length == longest for prompt in entry.prompts):
            return f"its last {longest} tokens are those of another fact; ask with the distinctive words nearer to the end"
        if any(prompt.key_length + len(prompt.answer_ids) > longest + 1 for prompt in entry.prompts):
            return (
                f"the end of its answer is out of reach of its key ({longest} tokens): shorten it "
                "(in Python also: MemoryEditor.create(..., max_ngram_size=...) for a memory that reaches further)"
            )
        if unsaid := self.speller.unsayable_texts([token for prompt in entry.prompts for token in prompt.answer_ids]):
            shown = ", ".join(map(repr, unsaid[:_SHOWN]))
            return (
                f"its answer has tokens that the model hardly met in training and may not be able to tell from others ({shown}): "
                "put it in other words"
            )
        return (
            "its answer did not become greedy-exact: reword the prompt or shorten the answer "
            "(in Python also: TeachSettings with more max_steps, or another lr)"
        )

    def _cannot_end(self, token: int) -> bool:
        """Whether a token's logit is the same whatever the model computes."""
        weight = getattr(self.memory.base_model.get_output_embeddings(), "weight", None)
        return isinstance(weight, Tensor) and not weight.is_meta and not bool(weight[token].any())

    def _enter(self, before: dict[str, StoredRows], earlier: list[LedgerFact]) -> None:
        """Count, check the earlier facts that could notice, and write the ledger."""
        report, holdings = self.report, self.holdings
        new_rows = holdings.rows_beyond(before)
        report.rows_written = sum(len(row_ids) for row_ids, _ in new_rows.values())
        readers = holdings.leaning_on(new_rows) if earlier else []
        report.reverified = sum(len(fact.prompts) for fact in readers)
        if broken := holdings.not_exact(readers):
            raise TeachError(
                f"the new facts would change {len(broken)} earlier answer(s): {holdings.names_of(broken)}. Nothing was written. "
                "Teach those again together with the new ones, or reword the new prompts."
            )
        for entry in self.entries.values():
            holdings.ledger.add(entry)
        report.taught = list(self.entries)
        report.prompts = sum(len(entry.prompts) for entry in self.entries.values())
