"""Training examples that cannot be made into batches: said in the words of whoever gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithPadding, default_data_collator

from engram.errors import DataError

__all__ = ["OneLength", "check_not_empty", "with_clear_error"]


def check_not_empty(dataset: Any) -> None:
    """Refuse a dataset that says it has no examples.

    Raises:
        DataError: it does.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError("train_dataset: got no examples, expected at least one; are the texts shorter than a block?")


def with_clear_error(collator: Callable[..., Any]) -> Callable[..., Any]:
    """A collator that ``transformers.Trainer`` chose itself, wrapped in ``OneLength``; one of the caller's own is left as it is."""
    chosen = collator is default_data_collator or type(collator) is DataCollatorWithPadding
    return OneLength(collator) if chosen else collator


@dataclass(frozen=True)
class OneLength:
    """A collator that stacks examples of one length, and says so where they have several."""

    collator: Callable[..., Any]

    def __call__(self, examples: Sequence[Any]) -> Any:
        """As the collator.

        Raises:
            DataError: the examples have several lengths.
        """
        try:
            return self.collator(examples)
        except (ValueError, RuntimeError) as error:
            lengths = sorted({len(e["input_ids"]) for e in examples if isinstance(e, dict) and "input_ids" in e})
            if len(lengths) < 2:
                raise
            raise DataError(
                f"got examples of {lengths[0]} to {lengths[-1]} tokens in one batch, expected one length; pack the texts "
                "(engram.data.packing.pack), or pass data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), which pads."
            ) from error
