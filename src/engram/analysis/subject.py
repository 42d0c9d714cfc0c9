"""What is looked at: a model, with its memory on or off, or without any."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engram.models import EngramModel, find_decoder
from engram.models.architectures import accepts
from engram.models.devices import input_device

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A causal language model under a name."""

    name: str
    model: Any
    """An ``EngramModel``, or a Hugging Face model without a memory."""
    memory_on: bool = True
    """Whether the memory, if there is one, takes part."""

    @property
    def has_memory(self) -> bool:
        """Whether there is a memory at all, on or off."""
        return isinstance(self.model, EngramModel)

    @property
    def base(self) -> Any:
        """The Hugging Face model."""
        return self.model.base_model if self.has_memory else self.model

    @property
    def device(self) -> Any:
        """Where token ids go."""
        return input_device(self.base)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Float32 logits ``[B, T, V]`` of right-padded ids and their mask, both ``[B, T]``."""
        with self._memory_as_said():
            output = self._call(self.base, ids, mask)
        return output.logits.float()

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """Run the decoder without its head, for what hooks and recordings see of it."""
        with self._memory_as_said():
            self._call(find_decoder(self.base).module, ids, mask)

    def _call(self, module: nn.Module, ids: Tensor, mask: Tensor) -> Any:
        """A forward pass without a cache; of a model that knows none, none need be refused."""
        no_cache = {"use_cache": False} if accepts(module, "use_cache") else {}
        return module(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **no_cache)

    def _memory_as_said(self) -> AbstractContextManager[None]:
        return self.model.disable_engram() if self.has_memory and not self.memory_on else nullcontext()
