"""Examples that no batch can be made of: one clear error, from the trainer that meets them."""

import pytest
import torch
from transformers import BatchEncoding, DataCollatorForLanguageModeling, DataCollatorWithPadding, default_data_collator

from engram import EngramTrainer, EngramTrainingArguments
from engram.errors import DataError
from engram.testing import tiny_memory, tiny_tokenizer
from engram.training.examples import OneLength

LENGTHS = (5, 9, 5, 7)


def examples(lengths, as_tensors):
    rows = [list(range(2, 2 + length)) for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in (map(torch.tensor, rows) if as_tensors else rows)]


def trainer(tmp_path, data, **options):
    args = EngramTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return EngramTrainer(tiny_memory(), args, train_dataset=data, **options)


def test_no_examples_are_refused(tmp_path):
    with pytest.raises(DataError, match="got no examples, expected at least one"):
        trainer(tmp_path, []).train()


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_examples_of_several_lengths_are_refused(tmp_path, kind, as_tensors, with_tokenizer):
    options = {"processing_class": tiny_tokenizer()} if with_tokenizer else {}  # then transformers chooses another collator
    uneven = "labels" if with_tokenizer else "input_ids"
    with pytest.raises(DataError, match=f"got {uneven} of 5 to 9 tokens in one batch, expected one length; pack the texts"):
        trainer(tmp_path, [kind(example) for example in examples(LENGTHS, as_tensors)], **options).train()


def test_examples_that_are_no_mappings_or_have_no_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"got str among the examples \('some text'\), expected mappings"):
        trainer(tmp_path, ["some text"] * 4).train()
    with pytest.raises(DataError, match="got examples of input_ids, from which the model computes no loss, expected labels"):
        trainer(tmp_path, [{"input_ids": [2, 3, 4]}] * 4).train()


def test_what_the_error_advises_trains(tmp_path):
    rows = [{"input_ids": example["input_ids"]} for example in examples(LENGTHS, False)]
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    assert trainer(tmp_path, rows, data_collator=collator).train().training_loss > 0


def test_other_errors_and_collators_stay_as_they_are(tmp_path):
    padding = DataCollatorWithPadding(tiny_tokenizer())
    mixed = [{"input_ids": [1, 2], "kind": "a"}, {"input_ids": [1, 2, 3], "kind": "b"}]
    with pytest.raises(ValueError, match="kind"):  # not for their length, which it pads
        OneLength(padding)(mixed)
    assert trainer(tmp_path, mixed, data_collator=padding).data_collator is padding
    batch = OneLength(default_data_collator)(examples((3, 3), False))
    assert batch["input_ids"].tolist() == [[2, 3, 4]] * 2
