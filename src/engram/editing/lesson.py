"""The optimisation behind teaching: rows of a draft are adjusted until every answer is greedy-exact with a margin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.editing.keys import KeyedPrompt
from engram.editing.upper import UpperModel, answer_logits, prompt_tensors
from engram.errors import ConfigError, TeachError
from engram.models import EngramModel
from engram.models.quantised import gradients_pass
from engram.tables import DraftTable

__all__ = ["TeachSettings", "answers_exactly", "in_batches", "optimise_rows", "stream_sizes"]

_PADDED, _SMALL = 3, 1024
"""A batch may take, padded, this many times the tokens of its prompts, or this many tokens; a prompt with which it would take more begins
the next one."""


@dataclass(frozen=True)
class TeachSettings:
    """How rows are chosen and optimised."""

    lr: float = 2.5
    """How far a row moves per step (RMS), as a multiple of the residual stream's size (RMS) at the memory's block: a trained model's stream
    grows by orders of magnitude from block to block, and a step must be felt but not overshoot at any of them."""
    max_steps: int = 80
    """Upper bound of passes over the prompts of a batch that are not learnt yet."""
    margin: float = 2.0
    """A token is learnt when its logit leads all others by this much; keeps the answer when the context changes."""
    contexts: int = 5
    """A prompt is learnt when it is answered in the residual streams of this many other prompts and in its own, one after the other:
    what is right there is right in any conversation."""
    min_order: int = 5
    """Shortest key, in tokens (a prompt of fewer tokens is a key as a whole). Longer keys keep `ELEMENT:Fe` and `NUMBER:Fe` apart even
    when they are taught to different memories that are merged later; shorter ones carry over to more phrasings."""
    min_bits: float = 32.0
    """Least surprise of a key under the base model: text that was not taught contains it about once in 2^min_bits tokens."""
    batch_size: int = 256
    """Most prompts per forward pass, and per batch that is taught together; those far longer than the others make batches of their own."""
    retries: int = 2
    """How often facts that fail the final check are taught again, each time with twice the steps."""

    def __post_init__(self) -> None:
        for name in ("lr", "max_steps", "contexts", "batch_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"TeachSettings.{name}: got {getattr(self, name)}, expected a positive number.")
        for name in ("margin", "min_bits", "retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"TeachSettings.{name}: got {getattr(self, name)}, expected 0 or more.")
        if self.min_order < 2:
            raise ConfigError(f"TeachSettings.min_order: got {self.min_order}, expected 2 or more.")


def optimise_rows(
    memory: EngramModel,
    prompts: Sequence[KeyedPrompt],
    new_rows: dict[str, tuple[Tensor, Tensor]],
    lr: dict[str, float],
    settings: TeachSettings,
    max_steps: int,
    progress: Callable[[int], None] | None = None,
    others: Sequence[KeyedPrompt] = (),
) -> int:
    """Fill new rows so that the prompts are answered, and put them into the tables; returns the steps taken.

    Rows stop moving once all prompts that read them are learnt: a learnt prompt leaves the batch, and ``RowDescent`` touches only the
    rows that were read. Base, reader and every row written before stay as they are.

    Args:
        memory: a memory with verified rows.
        prompts: with their keys; all of them in one forward pass.
        new_rows: per layer, sorted row numbers ``[n]`` and tags ``[n]`` that are not in the table yet.
        lr: per layer, step size.
        settings: margin and contexts.
        max_steps: upper bound of passes.
        progress: called after every step with the number of prompts learnt.
        others: not taught here; the prompts are read in their residual streams too, so that few prompts have as many contexts as many.

    Raises:
        TeachError: the model passes no gradients.
    """
    generator = torch.Generator().manual_seed(memory.engram_config.seed)
    pending, step = torch.arange(len(prompts)), 0
    passed, felt = torch.zeros(len(prompts), dtype=torch.int64), False
    with gradients_pass(memory.base_model), ExitStack() as held:
        upper = UpperModel(memory, [*prompts, *others])  # before there are drafts
        drafts = held.enter_context(_drafts(memory, new_rows))
        optimizer = RowDescent([(draft.held, lr[layer]) for layer, draft in drafts.items()])
        while len(pending) and step < max_steps:
            step += 1
            elsewhere = torch.randint(len(prompts) + len(others), pending.shape, generator=generator)
            streams = torch.where(passed[pending] == settings.contexts, pending, elsewhere)  # its own stream comes last
            with torch.enable_grad():
                loss, learnt = _judge(upper, pending, streams, settings.margin)
                if not bool(learnt.all()):
                    if loss.requires_grad:
                        # Nowhere else: whoever trains the model has gradients in its parameters.
                        loss.backward(inputs=[draft.held for draft in drafts.values()])
                    if not felt and not any(_is_felt(draft.held.grad) for draft in drafts.values()):
                        _refuse_without_gradients(upper, drafts, pending)
                    felt = True
                    optimizer.step()
            passed[pending] = torch.where(learnt, passed[pending] + 1, 0)
            pending = pending[passed[pending] <= settings.contexts]
            if progress is not None:
                progress(len(prompts) - len(pending))
    return step


def in_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of prompts of similar length together, shorter ones first, so that a few long ones do not slow down all others.

    Args:
        lengths: of the prompts, tokens.
        batch_size: most prompts of a batch.
    """
    batches: list[list[int]] = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        tokens += lengths[number]
        full = not batches or len(batches[-1]) == batch_size
        if full or (len(batches[-1]) + 1) * lengths[number] > max(_PADDED * tokens, _SMALL):
            batches.append([])
            tokens = lengths[number]
        batches[-1].append(number)
    return batches


@torch.no_grad()
def answers_exactly(memory: EngramModel, prompts: Sequence[KeyedPrompt], batch_size: int, margin: float = 0.0) -> list[bool]:
    """Whether each prompt's answer is what greedy decoding gives, every token ahead of all others by more than ``margin``."""
    exact: list[bool] = [False] * len(prompts)
    for members in in_batches([len(prompt.ids) for prompt in prompts], batch_size):
        batch = [prompts[i] for i in members]
        ids, mask, answer = prompt_tensors(memory, batch)
        leads = _lead(answer_logits(memory, ids, mask, answer).float(), ids[:, 1:][answer[:, :-1]]) > margin
        for i, ok in zip(members, leads.split([len(prompt.answer_ids) for prompt in batch])):
            exact[i] = bool(ok.all())
    return exact


@torch.no_grad()
def stream_sizes(memory: EngramModel, prompts: Sequence[KeyedPrompt]) -> dict[str, float]:
    """RMS of the residual stream at answer positions, per layer (the median: a few positions may be far larger)."""
    sizes: dict[str, list[Tensor]] = {}
    for members in in_batches([len(prompt.ids) for prompt in prompts], max(1, len(prompts))):
        ids, mask, answer = prompt_tensors(memory, [prompts[i] for i in members])
        with memory.record() as traces:
            memory(input_ids=ids, attention_mask=mask, use_cache=False)
        for layer, trace in traces.items():
            stream = trace["stream"].float()[answer.to(trace["stream"].device)]
            sizes.setdefault(str(layer), []).append(stream.square().mean(dim=-1).sqrt())
    return {layer: float(torch.cat(found).median()) for layer, found in sizes.items()}


@contextmanager
def _drafts(memory: EngramModel, new_rows: dict[str, tuple[Tensor, Tensor]]) -> Iterator[dict[str, DraftTable]]:
    """Put drafts in place of the tables; commit them if the block ends well, drop them if it does not."""
    homes = {layer: engram.multi_head_embedding for layer, engram in memory.engrams.items()}
    tables = {layer: home.embedding for layer, home in homes.items()}
    try:
        for layer, home in homes.items():
            device = home.offsets.device
            home.embedding = DraftTable(tables[layer], *(x.to(device) for x in new_rows[layer])).to(device)
        drafts = {layer: home.embedding for layer, home in homes.items()}
        yield drafts
        for draft in drafts.values():
            draft.commit()
    finally:
        for layer, home in homes.items():
            home.embedding = tables[layer]


def _judge(upper: UpperModel, members: Tensor, streams: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Summed loss over the answer tokens that do not lead yet, and per prompt whether all of them do."""
    scores = upper.logits(members, streams).float()
    target, owner = upper.targets(members)
    short = _lead(scores, target) <= margin
    learnt = torch.ones(len(members), dtype=torch.bool)
    learnt[owner[short].cpu()] = False
    return F.cross_entropy(scores[short], target[short], reduction="sum"), learnt


def _is_felt(gradient: Tensor | None) -> bool:
    """Whether it moves anything."""
    if gradient is None:
        return False
    return bool((gradient.coalesce().values() if gradient.is_sparse else gradient).any())


def _refuse_without_gradients(upper: UpperModel, drafts: Mapping[str, DraftTable], members: Tensor) -> None:
    """Refuse a model through which no logit of an answer depends on a new row that is read. Losses alone may be without: those of answers that
    have no row of their own, for instance, where the others' answers are right already; and new rows that no prompt reads, because it finds
    longer n-grams of other facts, are the facts' fault.

    Raises:
        TeachError: it is such a model.
    """
    with upper.memory.record() as traces:
        scores, (target, _) = upper.logits(members, members).float(), upper.targets(members)
    rows = [d.held for layer, d in drafts.items() if bool((traces[int(layer)]["slots"] >= d.base.stored_rows).any())]
    said = scores.gather(1, target.unsqueeze(1)).sum()
    if not rows or (said.requires_grad and any(map(_is_felt, torch.autograd.grad(said, rows, allow_unused=True)))):
        return
    raise TeachError(
        "teach: got a model that passes no gradients (its loss does not depend on the new rows; dynamic int8 quantisation does that, for "
        "instance), expected weights that gradients pass through. Teach to the unquantised model: a quantised one can still read what "
        "was taught before it was quantised."
    )


def _lead(scores: Tensor, target: Tensor) -> Tensor:
    """By how much the target's logit leads all others, ``[tokens]``."""
    right = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    return right - scores.scatter(1, target.unsqueeze(1), float("-inf")).amax(dim=1)


class RowDescent:
    """Momentum on the direction of each row's gradient: every row that is read moves by ``lr`` (RMS), whatever its gradient's size."""

    def __init__(self, groups: Sequence[tuple[torch.nn.Parameter, float]], momentum: float = 0.8) -> None:
        self.groups = [(held, lr, torch.zeros_like(held)) for held, lr in groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        """Move the rows that have a gradient and forget it."""
        for held, lr, velocity in self.groups:
            if held.grad is None:
                continue
            gradient = held.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            moved = values.abs().amax(dim=1) > 0
            rows, values = rows[moved], F.normalize(values[moved], dim=1)
            velocity[rows] = self.momentum * velocity[rows] + values
            held[rows] -= lr * held.shape[1] ** 0.5 * F.normalize(velocity[rows], dim=1)
            held.grad = None
