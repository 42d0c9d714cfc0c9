"""Training examples that cannot be made into batches: said in the words of whoever gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram.errors import DataError

__all__ = ["OneLength", "check_not_empty"]


def check_not_empty(dataset: Any) -> None:
    """Refuse a dataset that says it has no examples.

    Raises:
        DataError: it does.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError("train_dataset: got no examples, expected at least one; are the texts shorter than a block?")


@dataclass(frozen=True)
class OneLength:
    """A collator that ``transformers.Trainer`` chose by itself, with an error that says so where examples have several lengths."""

    collator: Callable[..., Any]

    def __call__(self, examples: Sequence[Any]) -> Any:
        """As the collator.

        Raises:
            DataError: examples are no mappings, or a column that it stacks has several lengths.
        """
        if strange := [
            example for example in examples if not isinstance(example, Mapping) and not hasattr(example, "__dict__")
        ]:
            raise DataError(
                f"got {type(strange[0]).__name__} among the examples ({str(strange[0])[:40]!r}), expected mappings such as {{'input_ids': ..., "
                "'labels': ...}; engram.data.packing.pack makes them from texts."
            )
        try:
            return self.collator(examples)
        except (ValueError, RuntimeError) as error:
            uneven = next(self._uneven(examples), None)
            if uneven is None:
                raise
            name, lengths = uneven
            raise DataError(
                f"got {name} of {lengths[0]} to {lengths[-1]} tokens in one batch, expected one length; pack the texts "
                "(engram.data.packing.pack), or pass data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), which pads."
            ) from error

    def _uneven(self, examples: Sequence[Any]) -> Iterator[tuple[str, list[int]]]:
        """Columns of several lengths, but for those that the collator pads, and their lengths in order."""
        padded = getattr(getattr(self.collator, "tokenizer", None), "model_input_names", ())
        if not all(isinstance(example, Mapping) for example in examples):
            return
        for name, value in examples[0].items():
            if name not in padded and hasattr(value, "__len__") and not isinstance(value, str):
                lengths = sorted({len(example[name]) for example in examples})
                if len(lengths) > 1:
                    yield name, lengths
