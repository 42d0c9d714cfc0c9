"""Steps of engram-peft's trainer in as many processes as a launcher starts, each with its part of the batch; run by its own Python.

Prints the seconds of every step of the first process, a JSON list.
"""

import json
import os
import sys
import tempfile
import time

import torch
from engram_peft_step import build
from protocol import FULL, QUICK, Documents, trainer_options
from transformers import TrainerCallback, TrainingArguments

STEPS = 10


class Times(TrainerCallback):
    """Seconds from the start of a step to its end."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **_):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.started)


def main():
    rows, sizes = int(sys.argv[1]), QUICK if "--quick" in sys.argv else FULL
    torch.set_num_threads(1)
    count, times = int(os.environ["WORLD_SIZE"]), Times()
    with tempfile.TemporaryDirectory() as folder:
        options = trainer_options(folder, sizes)
        options |= {"max_steps": STEPS, "per_device_train_batch_size": sizes["batch"] // count}
        trainer = build(rows, sizes)(
            args=TrainingArguments(**options), train_dataset=Documents(sizes, labels=False), callbacks=[times]
        )
        trainer.train()
    if os.environ["RANK"] == "0":
        print(json.dumps(times.seconds))


if __name__ == "__main__":
    main()
