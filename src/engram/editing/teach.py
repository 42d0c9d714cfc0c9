"""Teaching: write facts into table rows, with the base model and the reader frozen.

Only the rows read at answer positions are changed, and only those of the higher n-gram orders: a row is addressed by the exact
tokens in front of it, so text that does not contain them keeps reading the rows it always read. The rows are optimised apart from
the table (``OverlayTable``) and written back together at the end; an interruption leaves the memory as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.data.facts import EncodedFact, Fact, check_conflicts, encode_fact, pad_right
from engram.errors import ConfigError, TeachError
from engram.models import EngramModel
from engram.tables import OverlayTable

__all__ = ["TeachReport", "TeachSettings", "teach_facts"]


@dataclass(frozen=True)
class TeachSettings:
    """How rows are optimised."""

    lr: float = 0.1
    """Adam's step size on the rows, as a multiple of the residual stream's size (RMS) at the memory's block: a trained model's stream
    grows by orders of magnitude from block to block, and a step must be felt but not overshoot at any of them."""
    max_steps: int = 120
    """Upper bound of passes over the facts that are not learnt yet."""
    margin: float = 2.0
    """A token is learnt when its logit leads all others by this much; keeps the answer stable under rounding."""
    min_order: int = 4
    """Lowest n-gram order written; shorter n-grams occur in other text and are left alone."""
    batch_size: int = 256
    """Prompts per forward pass."""
    check_every: int = 8
    """Passes between checks of all facts, learnt ones included."""

    def __post_init__(self) -> None:
        for name in ("lr", "max_steps", "batch_size", "check_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"TeachSettings.{name}: got {getattr(self, name)}, expected a positive number.")
        if self.min_order < 2:
            raise ConfigError(f"TeachSettings.min_order: got {self.min_order}, expected 2 or more.")


@dataclass
class TeachReport:
    """What teaching did."""

    facts: int
    prompts: int
    steps: int
    rows_written: int
    not_exact: list[int] = field(default_factory=list)
    """Indices of facts with at least one prompt whose answer is not exact."""


Progress = Callable[[int, int, int], None]
"""Called with (step, prompts learnt, prompts in all)."""


def teach_facts(
    memory: EngramModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    settings: TeachSettings | None = None,
    progress: Progress | None = None,
) -> TeachReport:
    """Write facts into the memory's rows until every answer is greedy-exact with a margin, or ``max_steps`` are spent.

    Args:
        memory: an attached memory; base and reader are left as they are.
        tokenizer: the model's tokenizer.
        facts: what to teach.
        settings: see ``TeachSettings``.
        progress: called after every step.

    Raises:
        DataError: facts contradict each other or do not fit the context.
        TeachError: there are no facts, or no order that may be written.
    """
    settings = settings or TeachSettings()
    if not facts:
        raise TeachError("teach_facts: got no facts, expected at least one.")
    if settings.min_order > memory.engram_config.max_ngram_size:
        raise TeachError(
            f"TeachSettings.min_order is {settings.min_order}, but the memory's orders end at {memory.engram_config.max_ngram_size}; "
            "lower min_order or make a memory with a larger max_ngram_size."
        )
    check_conflicts(facts, "facts to teach")
    context = getattr(memory.config, "max_position_embeddings", None)
    encoded = [row for index, fact in enumerate(facts) for row in encode_fact(tokenizer, fact, index, context)]
    lesson = _Lesson(memory, encoded, settings)
    with lesson.rows_apart():
        steps, learnt = lesson.run(progress)
    failed = sorted({row.fact_index for row, ok in zip(encoded, learnt.tolist()) if not ok})
    return TeachReport(len(facts), len(encoded), steps, lesson.rows_written, failed)


class _Lesson:
    """One call of ``teach_facts``: encoded prompts, the rows they may write, and the optimisation."""

    def __init__(self, memory: EngramModel, encoded: list[EncodedFact], settings: TeachSettings) -> None:
        self.memory, self.encoded, self.settings = memory, encoded, settings
        self.rows_written = 0
        self.pad_id = memory.engram_config.pad_id
        self.device = memory.get_input_embeddings().weight.device

    @contextmanager
    def rows_apart(self) -> Iterator[None]:
        """Put overlays in place of the tables; write them back if the block ends well, drop them if it does not."""
        touched = self._touched_rows()
        homes = {layer: engram.multi_head_embedding for layer, engram in self.memory.engrams.items()}
        tables = {layer: home.embedding for layer, home in homes.items()}
        for layer, home in homes.items():
            home.embedding = OverlayTable(tables[layer], touched[layer].to(home.offsets.device)).to(home.offsets.device)
        try:
            yield
            for home in homes.values():
                home.embedding.commit()
                self.rows_written += home.embedding.held.shape[0]
        finally:
            for layer, home in homes.items():
                home.embedding = tables[layer]

    def run(self, progress: Progress | None) -> tuple[int, Tensor]:
        """Optimise until every prompt is learnt; returns the steps taken and what is learnt."""
        was_training = self.memory.training
        self.memory.eval()
        try:
            sizes = self._stream_sizes()
            groups = [
                {"params": [engram.multi_head_embedding.embedding.held], "lr": self.settings.lr * sizes[int(layer)]}
                for layer, engram in self.memory.engrams.items()
            ]
            return self._optimise(torch.optim.Adam(groups), progress)
        finally:
            self.memory.train(was_training)

    def _optimise(self, optimizer: torch.optim.Optimizer, progress: Progress | None) -> tuple[int, Tensor]:
        total = len(self.encoded)
        learnt = self._check(range(total))
        step = 0
        while not bool(learnt.all()) and step < self.settings.max_steps:
            step += 1
            pending = torch.nonzero(~learnt).flatten().tolist()
            optimizer.zero_grad()
            for batch in _batches(pending, self.settings.batch_size):
                loss, ok = self._pass(batch)
                (loss * len(batch) / len(pending)).backward()
                learnt[torch.tensor(batch)] = ok
            optimizer.step()
            if step % self.settings.check_every == 0 or bool(learnt.all()):
                learnt = self._check(range(total))
            if progress is not None:
                progress(step, int(learnt.sum()), total)
        return step, self._check(range(total), margin=0.0)

    @torch.no_grad()
    def _stream_sizes(self) -> dict[int, float]:
        """RMS of the residual stream at answer positions, per layer (the median: a few positions may be far larger)."""
        ids, mask, answer = self._tensors(list(range(min(len(self.encoded), self.settings.batch_size))))
        with self.memory.record() as traces:
            self.memory(input_ids=ids, attention_mask=mask, use_cache=False)
        return {
            layer: float(trace["stream"].float()[answer.to(trace["stream"].device)].square().mean(dim=-1).sqrt().median())
            for layer, trace in traces.items()
        }

    def _check(self, rows: range, margin: float | None = None) -> Tensor:
        """Which prompts are answered exactly, bool ``[len(rows)]``."""
        with torch.no_grad():
            return torch.cat([self._pass(batch, margin)[1] for batch in _batches(list(rows), self.settings.batch_size)])

    def _pass(self, batch: list[int], margin: float | None = None) -> tuple[Tensor, Tensor]:
        """Loss over answer tokens, and per prompt whether every answer token leads by the margin."""
        ids, mask, answer = self._tensors(batch)
        with self.memory.write_only(answer):
            logits = self.memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
        where = answer[:, :-1]
        scores, target = logits[:, :-1][where].float(), ids[:, 1:][where]
        right = scores.gather(1, target.unsqueeze(1)).squeeze(1)
        others = scores.scatter(1, target.unsqueeze(1), float("-inf")).amax(dim=1)
        leads = torch.zeros_like(where)
        leads[where] = right - others > (self.settings.margin if margin is None else margin)
        return F.cross_entropy(scores, target), (leads | ~where).all(dim=1).cpu()

    def _tensors(self, batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, padding mask and answer mask: True where the next token belongs to the answer."""
        rows = [self.encoded[i] for i in batch]
        ids, mask = pad_right([row.ids for row in rows], self.pad_id)
        answer = torch.zeros_like(mask, dtype=torch.bool)
        for number, row in enumerate(rows):
            answer[number, len(row.prompt_ids) - 1 : len(row.ids) - 1] = True
        return ids.to(self.device), mask.to(self.device), answer.to(self.device)

    def _touched_rows(self) -> dict[str, Tensor]:
        """Rows that answer positions read in the orders that may be written, per layer, sorted."""
        config = self.memory.engram_config
        first_column = (self.settings.min_order - 2) * config.n_head_per_ngram
        touched: dict[str, list[Tensor]] = {layer: [] for layer in self.memory.engrams}
        for batch in _batches(list(range(len(self.encoded))), self.settings.batch_size):
            ids, mask, answer = self._tensors(batch)
            for layer_id, hash_ids in self.memory.mapping.hash(ids, attention_mask=mask).items():
                home = self.memory.engrams[str(layer_id)].multi_head_embedding
                rows = home.row_ids(hash_ids.to(home.offsets.device))[answer.to(home.offsets.device)]
                touched[str(layer_id)].append(rows[:, first_column:].unique())
        return {layer: torch.cat(rows).unique() for layer, rows in touched.items()}


def _batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
