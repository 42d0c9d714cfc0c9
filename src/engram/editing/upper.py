"""The part of a model above its memory, run again and again on streams that were computed once.

While rows are taught, base and reader stand still, so the residual stream that enters the first memory block is a constant of each
prompt. It is computed once; the blocks below are skipped after that, and the output head sees answer positions only. What is left costs
a fraction of a forward pass and works for every architecture, because the model's own forward function still runs.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engram.data.facts import pad_right
from engram.editing.keys import KeyedPrompt
from engram.models import EngramModel, find_decoder
from engram.models.devices import input_device

__all__ = ["LOUDER", "UpperModel", "answer_logits", "prompt_tensors"]

LOUDER = 1.5
"""Factor on the streams of other prompts: deep in a long context the stream is larger than in any prompt, and must not drown a fact."""


def prompt_tensors(memory: EngramModel, prompts: Sequence[KeyedPrompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, padding mask and answer mask (True where the next token belongs to the answer), all ``[B, T]``."""
    ids, mask = pad_right([prompt.ids for prompt in prompts], memory.engram_config.pad_id)
    answer = torch.zeros_like(mask, dtype=torch.bool)
    for number, prompt in enumerate(prompts):
        answer[number, len(prompt.prompt_ids) - 1 : len(prompt.ids) - 1] = True
    device = input_device(memory)
    return ids.to(device), mask.to(device), answer.to(device)


@contextmanager
def at_answers_only(memory: EngramModel, answer: Tensor) -> Iterator[None]:
    """Inside this context the output head computes logits ``[1, answer tokens, V]``, in the order of ``answer [B, T]``."""
    head: nn.Module | None = memory.base_model.get_output_embeddings()
    if head is None:  # an unusual model: its logits are picked afterwards
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (_picked(args[0], answer), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _picked(hidden: Tensor, answer: Tensor) -> Tensor:
    """Positions of an answer ``[1, answer tokens, d]``; the head may be on another device than the prompts."""
    return hidden[answer.to(hidden.device)].unsqueeze(0)


def answer_logits(memory: EngramModel, ids: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
    """Logits ``[answer tokens, V]`` of the whole model."""
    with at_answers_only(memory, answer):
        logits = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # Nothing is asked at the last position, so answer tokens alone are never of the shape of the whole.
    return logits[answer] if logits.shape[:2] == answer.shape else logits[0]


class UpperModel:
    """The blocks from the first memory block on, for one batch of prompts.

    Args:
        memory: an attached memory.
        prompts: the batch.
    """

    def __init__(self, memory: EngramModel, prompts: Sequence[KeyedPrompt]) -> None:
        self.memory = memory
        self.ids, self.mask, self.answer = prompt_tensors(memory, prompts)
        blocks = find_decoder(memory.base_model).blocks
        first = min(memory.engram_config.layer_ids)
        self._first, self._below = blocks[first], list(blocks[:first])
        self._tails: dict[nn.Module, tuple | None] = {}
        self._shared: dict[str, dict[Any, Any]] = {}
        self.stream = self._record()

    @torch.no_grad()
    def _record(self) -> Tensor:
        """Run everything once; note what enters the first memory block, and how the blocks below return and what they leave in dicts."""
        seen: list[Tensor] = []

        def note_output(block: nn.Module, args: tuple, output: Any) -> None:
            self._tails[block] = output[1:] if isinstance(output, tuple) else None

        def note_input(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            self._shared = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}

        with ExitStack() as stack:
            for block in self._below:
                stack.callback(block.register_forward_hook(note_output).remove)
            stack.callback(self._first.register_forward_pre_hook(note_input, with_kwargs=True, prepend=True).remove)
            with self.memory.disable_engram():
                answer_logits(self.memory, self.ids, self.mask, self.answer)
        return seen[0]

    def logits(self, members: Tensor, streams: Tensor) -> Tensor:
        """Logits ``[answer tokens, V]`` of some prompts of the batch.

        Args:
            members: int64 ``[b]``, numbers of the prompts.
            streams: int64 ``[b]``, numbers of the prompts whose residual stream they are read in. Streams of others are made ``LOUDER``.
        """
        stream = self.stream[streams]
        volume = torch.where(streams == members, 1.0, LOUDER).to(stream)
        stream = stream * volume.view(-1, *[1] * (stream.dim() - 1))
        with self._shortcut(stream, streams):
            return answer_logits(self.memory, self.ids[members], self.mask[members], self.answer[members])

    def targets(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """Answer tokens ``[answer tokens]`` of some prompts, and the number (0..b-1) of the prompt that each belongs to."""
        ids, answer = self.ids[members], self.answer[members]
        owner = torch.arange(len(members), device=ids.device).unsqueeze(1).expand_as(answer)
        return ids[:, 1:][answer[:, :-1]], owner[answer]

    @contextmanager
    def _shortcut(self, stream: Tensor, rows: Tensor) -> Iterator[None]:
        def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            for name, left in self._shared.items():  # keys and values that blocks above use again (Gemma 4)
                kwargs[name].update({key: _rows(value, rows) for key, value in left.items() if key not in kwargs[name]})
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

        with ExitStack() as stack:
            for block in self._below:
                stack.callback(_set_forward, block, block.__dict__.get("forward"))  # accelerate's, say
                _set_forward(block, _passing(_rows(self._tails[block], rows)))
            stack.callback(self._first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            yield


def _set_forward(block: nn.Module, forward: Any) -> None:
    """Give a block a forward function of its own; None leaves it that of its class."""
    if forward is None:
        block.__dict__.pop("forward", None)
    else:
        block.forward = forward


def _rows(value: Any, rows: Tensor) -> Any:
    """Some prompts' part of what a block has left: of tensors, and of tensors in tuples."""
    if isinstance(value, tuple):
        return tuple(_rows(item, rows) for item in value)
    return value[rows.to(value.device)] if isinstance(value, Tensor) else value


def _passing(tail: tuple | None) -> Any:
    """A forward function that hands its input on, in the shape that the block returns."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return hidden_states if tail is None else (hidden_states, *tail)

    return forward
