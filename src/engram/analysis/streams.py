"""Hidden states of every block, and what a model makes of them before it speaks.

Shape legend: B batch, T positions, n tokens, M residual streams, d hidden size, L blocks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engram.analysis.subject import Subject
from engram.errors import AttachError
from engram.models import find_decoder
from engram.models.positions import text_config

__all__ = ["Lens", "record_blocks"]

_VALUES_AT_ONCE = 1 << 21  # 8 MB in float32
_TOLERANCE = 1e-3


@contextmanager
def record_blocks(subject: Subject) -> Iterator[list[Tensor]]:
    """Inside this context the list holds the blocks' outputs of the last forward pass: ``[B, T, d]`` or ``[B, T, M, d]`` each."""
    decoder = find_decoder(subject.base)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [decoder.module.register_forward_pre_hook(lambda module, args: outputs.clear())]
    handles += [block.register_forward_hook(keep) for block in decoder.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What configs (of Gemma, of RecurrentGemma) call the bound of their logits."""


class Lens:
    """The logit lens: a model's own last steps applied to the output of any block (nostalgebraist, 2020).

    Those steps are found by watching which modules beside the blocks run after the last of them: a norm, and in DeepSeek-V4 before it
    the head that joins the residual streams. Where streams are joined by no module, their mean is taken. A factor on the logits
    (Cohere, Granite) or on what enters the head (MiniCPM) is measured.

    Raises:
        AttachError: the model does not say which module its head is, or the last block's output does not give its own logits in this way.
    """

    def __init__(self, subject: Subject) -> None:
        self._tail, self._mean_first = _modules_after_last_block(subject)
        self._head = _head_of(subject.base)
        text = text_config(subject.base.config)
        self._softcap = next((cap for name in _SOFTCAPS if (cap := getattr(text, name, None)) is not None), None)
        self._factor = 1.0
        self.chunk = max(16, _VALUES_AT_ONCE // subject.vocab_size)
        """How many tokens' logits are to be computed at once."""
        self._check(subject)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[n, V]`` of hidden states ``[n, d]`` or ``[n, M, d]``."""
        hidden = hidden.mean(dim=-2) if self._mean_first else hidden
        hidden = hidden.unsqueeze(0)
        for module in self._tail:
            hidden = module(hidden)
        logits = self._head(hidden[0]).float() * self._factor
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    @torch.no_grad()
    def _check(self, subject: Subject) -> None:
        ids = torch.arange(4)[None] % subject.vocab_size
        with record_blocks(subject) as blocks:
            expected = subject.logits(ids, torch.ones_like(ids))[0]
        got = self.logits(blocks[-1][0])
        if self._softcap is None:
            self._factor = _least_squares(got, expected)
            got = got * self._factor
        if not torch.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
            raise AttachError(
                f"logit lens: {type(subject.base).__name__} does more to its last block's output than its norm and head "
                f"(logits differ by {float((got - expected).abs().max()):.3g}); leave logit_lens out for this model."
            )


def _head_of(model: Any) -> nn.Module:
    """What makes logits of hidden states; a model of one's own need not name it.

    Raises:
        AttachError: nothing does.
    """
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # the latter is transformers' own answer
        head = None
    if head is None:
        raise AttachError(
            f"logit lens: got a {type(model).__name__} without get_output_embeddings() that gives its head, expected one; add that method, or "
            "leave logit_lens out for this model."
        )
    return head


def _least_squares(x: Tensor, y: Tensor) -> float:
    """The factor that brings ``x`` nearest to ``y``; exactly 1 where they are equal."""
    x, y = x.double().flatten(), y.double().flatten()
    return float(x @ y / (x @ x))


@torch.no_grad()
def _modules_after_last_block(subject: Subject) -> tuple[list[nn.Module], bool]:
    """The blocks' neighbours in the order in which they run after the last block, and whether streams are joined before them."""
    decoder = find_decoder(subject.base)
    tail: list[nn.Module] = []
    dims: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tail.append(module)
        dims.append(args[0].dim())

    def start(module: nn.Module, args: Any, output: Any) -> None:
        tail.clear()
        dims.clear()

    owner = next(m for m in decoder.module.modules() if any(child is decoder.blocks for child in m.children()))
    neighbours = [child for child in owner.children() if child is not decoder.blocks]
    handles = [decoder.blocks[-1].register_forward_hook(start), *(child.register_forward_hook(note) for child in neighbours)]
    try:
        ids = torch.arange(4)[None] % subject.vocab_size
        subject.logits(ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return tail, decoder.streams > 1 and bool(dims) and dims[0] == 3
