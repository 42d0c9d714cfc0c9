"""Steps on command: a worker process takes one training step per line it is sent, so that rounds of several workers can alternate.

Needs torch and transformers only: a peer's worker runs in an environment that has no engram.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

HEADS, SEED = 4, 0
FULL = {"vocab": 8192, "hidden": 256, "batch": 8, "length": 256}
QUICK = {"vocab": 500, "hidden": 32, "batch": 2, "length": 32}


def backbone(sizes):
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden"],
            num_hidden_layers=sizes.get("layers", 4),
            intermediate_size=2 * sizes["hidden"],
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )


def batches(sizes):
    """Endless token ids ``[batch, length]``; never 0, which pads."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"]), generator=generator)


class Documents(torch.utils.data.IterableDataset):
    """The same ids one by one, for a trainer."""

    def __init__(self, sizes, labels):
        self.sizes, self.labels = sizes, labels

    def __iter__(self):
        for ids in batches(self.sizes):
            for row in ids:
                yield {"input_ids": row, "labels": row} if self.labels else {"input_ids": row}


def trainer_options(folder, sizes):
    """Keyword arguments of ``TrainingArguments`` that make a trainer step and do nothing else."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": sizes["batch"],
        "max_steps": 1_000_000,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": SEED,
    }


class Channel:
    """The worker's end: what the libraries print goes to stderr, replies to the stdout of before."""

    def __init__(self):
        self.replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def reply(self, **values):
        self.replies.write(json.dumps(values) + "\n")
        self.replies.flush()

    def wait(self):
        """True when another step is asked for; at the end tells the peak of resident memory."""
        if sys.stdin.readline().strip() == "step":
            return True
        self.reply(peak_bytes=peak_resident_bytes())
        return False


def peak_resident_bytes(start_anew=False):
    """Most resident bytes of this process so far, or since the last call that started anew (Linux; elsewhere building the model counts too).

    Not by ``getrusage``, whose figure in a new program includes that of the process which started it.
    """
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if start_anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def serve_plain_loop(channel, model, optimizer, sizes, tables):
    """Serve training steps of a plain loop over the batches."""
    data = batches(sizes)
    model.train()

    def step():
        ids = next(data)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    serve(channel, step, tables)


def serve(channel, step, rows):
    """Take a step whenever asked."""
    channel.reply(rows=rows)
    while channel.wait():
        started = time.perf_counter()
        step()
        channel.reply(seconds=time.perf_counter() - started)


class StepOnCommand(TrainerCallback):
    """Holds a trainer between its steps; a step includes fetching its batch, as it does in training."""

    def __init__(self, channel, rows):
        self.channel, self.rows = channel, rows

    def on_train_begin(self, args, state, control, **_):
        self.channel.reply(rows=self.rows)
        self._next(control)

    def on_step_end(self, args, state, control, **_):
        self.channel.reply(seconds=time.perf_counter() - self.started)
        self._next(control)

    def _next(self, control):
        if not self.channel.wait():
            os._exit(0)  # the trainer would go on to save
        self.started = time.perf_counter()


class Worker:
    """The other end. Takes ``command`` (a list), starts it and waits until its model is built."""

    def __init__(self, command, log):
        self.name = " ".join(command)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.rows = self._read()["rows"]

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with exit {self.process.wait()}; see its log")
        return json.loads(line)

    def step(self):
        """Seconds of one step."""
        self._send("step")
        return self._read()["seconds"]

    def finish(self):
        """Peak resident bytes; the process is gone then."""
        self._send("quit")
        peak = self._read()["peak_bytes"]
        self.process.wait()
        return peak

    def kill(self):
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()

    def _send(self, word):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
