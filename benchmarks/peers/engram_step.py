"""Worker: the same steps by this library. ``--tables`` names what is done with tables: adam, rowwise_adam, rowwise_adagrad."""

import argparse
import sys
import tempfile
from pathlib import Path

from protocol import FULL, QUICK, Channel, Documents, StepOnCommand, serve_plain_loop, trainer_options

from engram import EngramAdamW, EngramTrainer, EngramTrainingArguments
from engram.optim import build_param_groups

sys.path.append(str(Path(__file__).parents[1]))
from train_step import build_model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["trainer", "raw"])
    parser.add_argument("rows", type=int)
    parser.add_argument("--tables", default="adam")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    sizes, channel = QUICK if args.quick else FULL, Channel()
    model = build_model(args.rows, sizes)
    tables = [engram.multi_head_embedding.embedding.weight.shape[0] for engram in model.engrams.values()]
    if args.mode == "trainer":
        with tempfile.TemporaryDirectory() as folder:
            options = EngramTrainingArguments(
                **trainer_options(folder, sizes), train_backbone=True, table_row_state=args.tables, remove_unused_columns=False
            )
            EngramTrainer(
                model=model,
                args=options,
                train_dataset=Documents(sizes, labels=True),
                callbacks=[StepOnCommand(channel, tables)],
            ).train()
        return
    optimizer = EngramAdamW(build_param_groups(model, model.engrams, lr=1e-3), lr=1e-3, row_state=args.tables)
    serve_plain_loop(channel, model, optimizer, sizes, tables)


if __name__ == "__main__":
    main()
