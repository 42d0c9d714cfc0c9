"""Pretraining a small Llama-architecture model from text files (`engram pretrain`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from engram.checkpoint import write_json_atomically
from engram.data.corpus import Corpus, CorpusRecipe, build_corpus
from engram.data.packing import pack
from engram.data.recipe import build_fields, parse_corpus, read_yaml
from engram.errors import CheckpointError, ConfigError
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.evaluation.versions import made_with
from engram.models.mode import evaluation_mode
from engram.training.guards import read_claim
from engram.training.progress import LiveProgress
from engram.training.safe_trainer import InOrder, SafeTrainer, last_checkpoint
from engram.training.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

__all__ = ["PretrainRecipe", "export_model", "pretrain", "read_recipe"]


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that decides a pretraining run; read from YAML, every key below is a key there.

    Raises:
        ConfigError: a value is impossible.
    """

    corpus: CorpusRecipe
    vocab_size: int = 6144
    hidden_size: int = 288
    num_hidden_layers: int = 6
    intermediate_size: int = 768
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    max_position_embeddings: int = 1024
    seq_len: int = 256
    batch_size: int = 16
    steps: int = 1000
    warmup_steps: int = 100
    decay_steps: int = 200
    """Last steps, over which the learning rate falls to a tenth of itself and on to ``min_lr_ratio``."""
    min_lr_ratio: float = 0.02
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0
    bf16: bool = True
    """Autocast to bfloat16 in the forward and backward pass; weights and Adam's moments stay float32."""
    compile: bool = False
    eval_steps: int = 250
    eval_texts: int = 40
    """Held-out documents measured during the run (all of them at the end)."""
    save_steps: int = 250

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, default = getattr(self, f.name), f.default
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            if f.name != "corpus" and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
                raise ConfigError(f"PretrainRecipe.{f.name}: got {value!r}, expected {type(default).__name__}.")
        self._check_numbers()
        self._check_shape()
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f"PretrainRecipe: warmup_steps + decay_steps = {self.warmup_steps + self.decay_steps}, expected at most steps = {self.steps}."
            )

    def _check_numbers(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), _LEAST.get(f.name, 1)
            if isinstance(f.default, int) and not isinstance(f.default, bool) and value < least:
                expected = "a positive number" if least == 1 else f"at least {least}"
                raise ConfigError(f"PretrainRecipe.{f.name}: got {value}, expected {expected}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(
                f"PretrainRecipe.learning_rate: got {self.learning_rate}, expected a finite number above 0 such as 2.0e-3."
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"PretrainRecipe.weight_decay: got {self.weight_decay}, expected a finite number of at least 0.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"PretrainRecipe.min_lr_ratio: got {self.min_lr_ratio}, expected a share from 0 to 1.")
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"PretrainRecipe.vocab_size: got {self.vocab_size}, expected at least {SMALLEST_VOCABULARY} (256 bytes and two special tokens)."
            )

    def _check_shape(self) -> None:
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):  # rotary positions turn the values of a head in pairs
            raise ConfigError(
                f"PretrainRecipe.hidden_size: got {self.hidden_size}, expected a multiple of {2 * heads}: heads of one even width, and "
                f"num_attention_heads is {heads}."
            )
        if heads % key_heads:
            raise ConfigError(
                f"PretrainRecipe.num_key_value_heads: got {key_heads}, expected a divisor of num_attention_heads = {heads}: each serves as "
                "many query heads as the next."
            )
        if self.seq_len > self.max_position_embeddings:
            raise ConfigError(
                f"PretrainRecipe.seq_len: got {self.seq_len}, expected at most max_position_embeddings = {self.max_position_embeddings}."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, as they come back from a file."""
        fields = {**dataclasses.asdict(self), "corpus": self.corpus.to_dict()}
        return json.loads(json.dumps(fields))


_LEAST = {"seed": 0, "decay_steps": 0}  # whole numbers that may be zero


def read_recipe(path: str | os.PathLike[str]) -> PretrainRecipe:
    """Read a recipe file.

    Raises:
        DataError: the file is missing or not YAML.
        ConfigError: a key is unknown or a value impossible.
    """
    fields = read_yaml(path)
    if not isinstance(fields, dict) or not isinstance(fields.get("corpus"), dict):
        raise ConfigError(f"recipe {path}: expected a mapping with a 'corpus' mapping in it.")
    corpus = parse_corpus(fields["corpus"], f"recipe {path}")
    return build_fields(PretrainRecipe, {**fields, "corpus": corpus}, str(path))


@dataclass
class _Run:
    """What a run carries from start to end."""

    recipe: PretrainRecipe
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast


def pretrain(
    recipe: PretrainRecipe, out: str | os.PathLike[str], folder: str | os.PathLike[str] = ".", resume: bool = True
) -> Path:
    """Train a tokenizer and a model and write them to ``out/model`` (bfloat16, with ``training.json`` beside the weights).

    Checkpoints go to ``out/checkpoints``; a run that was stopped goes on from the newest one, with the losses it would have had.

    Args:
        recipe: see ``PretrainRecipe``.
        out: run folder.
        folder: what the recipe's text paths are relative to.
        resume: go on from the newest checkpoint; False starts again (and refuses a folder that has checkpoints or a finished model).

    Raises:
        DataError, ConfigError: the corpus or recipe cannot be used.
        CheckpointError: the folder holds another run, or any run where ``resume`` is False; nothing is overwritten.
    """
    out = Path(out)
    _put_back(out / "model")
    checkpoints = out / "checkpoints"
    last = last_checkpoint(checkpoints)
    corpus = build_corpus(recipe.corpus, Path(folder))
    _claim_folder(out, recipe, corpus, fresh=not resume)
    set_seed(recipe.seed)
    tokenizer = train_tokenizer((doc.text for doc in corpus.train), recipe.vocab_size, recipe.max_position_embeddings)
    tokenizer.save_pretrained(out / "tokenizer")  # so that any checkpoint can be tried before the run ends
    run = _Run(recipe, corpus, tokenizer)
    model = _new_model(recipe, tokenizer)
    measure = _Measure(run)
    trainer = _PackedTrainer(
        model=model,
        args=_training_arguments(recipe, checkpoints),
        train_dataset=pack(corpus.train, tokenizer, recipe.seq_len, recipe.steps * recipe.batch_size, recipe.seed),
        callbacks=[measure, LiveProgress()],
    )
    measure.trainer = trainer
    trainer.train(resume_from_checkpoint=str(last) if last and resume else None)
    if trainer.interrupt.interrupted:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; the same command goes on from there")
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    return _finish(run, trainer, losses, out / "model")


class _PackedTrainer(InOrder, SafeTrainer):
    """For packed text."""


class _Measure(TrainerCallback):
    """Held-out bits per byte at intervals."""

    trainer: SafeTrainer

    def __init__(self, run: _Run) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        recipe = self.run.recipe
        if state.global_step % recipe.eval_steps == 0 and self.run.corpus.held_out:
            texts = [doc.text for doc in self.run.corpus.held_out[: recipe.eval_texts]]
            with evaluation_mode(model), self.trainer.throughput.paused():  # tokens per second are those of training
                bits = bits_per_byte(model, self.run.tokenizer, texts, recipe.seq_len)
            state.log_history.append({"step": state.global_step, "bits_per_byte": round(bits, 4)})


def _new_model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    names = (
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    return LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(recipe, name) for name in names},
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _training_arguments(recipe: PretrainRecipe, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        adam_beta2=0.95,
        weight_decay=recipe.weight_decay,
        max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "min_lr_ratio": recipe.min_lr_ratio},
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=recipe.compile,
        logging_steps=10,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to=[],
        dataloader_pin_memory=False,
    )


def _claim_folder(out: Path, recipe: PretrainRecipe, corpus: Corpus, fresh: bool) -> None:
    """One folder holds one recipe on one text, which the tokenizer follows from: refuse to mix two runs or to overwrite one."""
    file, present = out / "recipe.json", {**recipe.to_dict(), "text_sha256": _text_digest(corpus)}
    finished = (out / "model").exists()
    if fresh and (finished or last_checkpoint(out / "checkpoints")):
        what = "the model" if finished else "checkpoints"
        raise CheckpointError(
            f"{out} holds {what} of an earlier run, expected neither; resume it or choose another folder (nothing was overwritten)."
        )
    if file.is_file() and read_claim(file) != present:
        raise CheckpointError(
            f"{out} holds a run of another recipe or on other text; choose another folder (nothing was overwritten)."
        )
    if finished and not file.is_file():
        raise CheckpointError(
            f"{out} holds a model and no recipe.json that says what made it; choose another folder (nothing was overwritten)."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomically(file, present)
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror}.") from None


def _text_digest(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for document in (*corpus.train, *corpus.held_out):
        for part in (document.name, document.text):
            digest.update(hashlib.sha256(part.encode("utf-8", "surrogateescape")).digest())
    return digest.hexdigest()


def _finish(run: _Run, trainer: SafeTrainer, losses: list[dict[str, float]], target: Path) -> Path:
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    held_out = [doc.text for doc in run.corpus.held_out]
    curve = [entry for entry in trainer.state.log_history if "bits_per_byte" in entry]
    made = made_with()
    report = {
        "recipe": run.recipe.to_dict(),
        "parameters": model.num_parameters(),
        "train_documents": len(run.corpus.train),
        "train_bytes": sum(len(doc.text.encode()) for doc in run.corpus.train),
        "held_out_documents": len(held_out),
        "tokens_seen": trainer.state.global_step * run.recipe.batch_size * run.recipe.seq_len,
        "held_out_bits_per_byte": bits_per_byte(model.to(torch.bfloat16).float(), run.tokenizer, held_out, run.recipe.seq_len)
        if held_out
        else None,
        "seconds": round(trainer.seconds),
        "loss": losses[:: max(1, len(losses) // 200)],
        "bits_per_byte": curve,
        "versions": made["versions"],
        "hardware": made["device"],
    }
    return export_model(model, run.tokenizer, target, report)


def export_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path, report: dict[str, Any]) -> Path:
    """Write model (bfloat16 safetensors), tokenizer and ``training.json`` to a folder, which is never half written.

    A model that is there already is put aside (``.NAME.old``) for the moment between two renames. What is stopped right then leaves neither
    at ``target``; the next export, and the next run in the folder, begins by putting the old one back.
    """
    _put_back(target)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    half: Any = model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    half.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if target.exists():
        old = _aside(target)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
    return target


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _put_back(target: Path) -> None:
    """Give a model its place again that an export put aside and never replaced."""
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)
