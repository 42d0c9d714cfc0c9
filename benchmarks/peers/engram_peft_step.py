"""Worker: training steps of engram-peft, by its own trainer or by a plain loop over its model and optimiser. Run by its own Python."""

import sys
import tempfile
import typing
from functools import partial

if not hasattr(typing, "override"):  # engram-peft 1.2.7 takes it from there, where Python has it since 3.12
    typing.override = lambda method: method

from engram_peft import EngramConfig, EngramDataCollator, EngramTrainer, get_engram_model
from protocol import FULL, HEADS, QUICK, Channel, Documents, StepOnCommand, backbone, serve_plain_loop, trainer_options
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainingArguments


def tokenizer(size):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")


def make(rows, sizes):
    """A model with tables of so many rows, its tokenizer and its config."""
    config = EngramConfig(
        engram_vocab_size_per_ngram=[rows // 2, rows // 2],  # of all heads together
        ngram_sizes=[2, 3],
        n_head_per_ngram=HEADS,
        embedding_dim=2 * HEADS * 64,
        target_layers=[1, 2],
        hc_mult=1,  # one residual stream, as the backbone has
        pad_id=0,
        enable_tokenizer_compression=False,  # one look-up less than ours
    )
    words = tokenizer(sizes["vocab"])
    return get_engram_model(backbone(sizes), config, words, train_mode="full_finetune"), words, config


def build(rows, sizes):
    """Its trainer for such a model; the rest of the arguments are to be given."""
    model, words, config = make(rows, sizes)
    return partial(EngramTrainer, model=model, data_collator=EngramDataCollator(words, config, model.compressor))


def main():
    mode, rows, sizes = sys.argv[1], int(sys.argv[2]), QUICK if "--quick" in sys.argv else FULL
    channel = Channel()
    model, words, config = make(rows, sizes)
    tables = [p.shape[0] for name, p in model.named_parameters() if name.endswith("multi_head_embedding.embedding.weight")]
    if mode == "trainer":
        with tempfile.TemporaryDirectory() as folder:
            EngramTrainer(
                model=model,
                args=TrainingArguments(**trainer_options(folder, sizes)),
                train_dataset=Documents(sizes, labels=False),  # its collator makes them
                data_collator=EngramDataCollator(words, config, model.compressor),
                callbacks=[StepOnCommand(channel, tables)],
            ).train()
        return
    optimizer = model.create_optimizer(base_learning_rate=1e-3)
    serve_plain_loop(channel, model, optimizer, sizes, tables)


if __name__ == "__main__":
    main()
