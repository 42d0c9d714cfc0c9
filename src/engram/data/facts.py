"""Facts: what a memory is taught, as an editable YAML list."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from engram.errors import DataError

__all__ = ["EncodedFact", "Fact", "check_conflicts", "encode_fact", "join_answer", "load_facts", "pad_right", "tokenize_prompt"]

_KEYS = {"prompt", "prompts", "answer", "category"}


@dataclass(frozen=True)
class Fact:
    """One answer and the prompts that shall be answered by it."""

    prompts: tuple[str, ...]
    answer: str
    category: str = "fact"


@dataclass(frozen=True)
class EncodedFact:
    """One prompt of a fact as token ids; ``answer_ids`` ends with the end-of-text token."""

    fact_index: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer in one row."""
        return self.prompt_ids + self.answer_ids


def load_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """Read a facts file: a YAML list of ``{prompt: ..., answer: ..., category: ...}``; ``prompts: [...]`` gives several phrasings.

    Raises:
        DataError: the file is missing, empty, not UTF-8, malformed, or asks for two answers to one prompt; the message names the entry.
    """
    file = Path(path)
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"facts file {file} does not exist.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"cannot read facts file {file}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        got = "nothing" if not entries else type(entries).__name__
        raise DataError(
            f'{file}: got {got}, expected a list of entries like {{prompt: "ACRONYM:GPU", answer: "Graphics Processing Unit"}}.'
        )
    facts = [_parse(entry, f"{file}, entry {number}") for number, entry in enumerate(entries, start=1)]
    check_conflicts(facts, str(file))
    return facts


def check_conflicts(facts: Iterable[Fact], where: str) -> None:
    """Refuse facts that give one prompt two answers, or say the same thing twice.

    Raises:
        DataError: naming the prompts.
    """
    answers: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for fact in facts:
        for prompt in fact.prompts:
            answers.setdefault(prompt, set()).add(fact.answer)
            counts[prompt] += 1
    for prompt, given in answers.items():
        if len(given) > 1:
            options = " and ".join(repr(answer) for answer in sorted(given))
            raise DataError(f"{where}: prompt {prompt!r} has different answers: {options}; keep one.")
        if counts[prompt] > 1:
            raise DataError(f"{where}: prompt {prompt!r} occurs {counts[prompt]} times; keep one.")


def join_answer(prompt: str, answer: str) -> str:
    """The text that follows the prompt: the answer after one space, or right away when the prompt ends in white space."""
    return answer if prompt[-1:].isspace() else f" {answer}"


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt as the model is asked it, beginning-of-text token included where the tokenizer adds one."""
    return list(tokenizer(prompt, verbose=False)["input_ids"])  # lengths are checked by who knows the limit


def encode_fact(tokenizer: Any, fact: Fact, fact_index: int, max_length: int | None = None) -> list[EncodedFact]:
    """Token ids of a fact, one row per prompt.

    The answer's ids are those that follow the prompt's in the joint text; where the tokenizer merges across the seam, the answer is
    tokenised on its own, so that the ids asked for at generation are always the prompt's.

    Raises:
        DataError: the tokenizer has no end-of-text token, or prompt and answer are longer than ``max_length`` tokens.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token, which marks the end of an answer; set tokenizer.eos_token.")
    rows = []
    for prompt in fact.prompts:
        prompt_ids = tokenize_prompt(tokenizer, prompt)
        text = join_answer(prompt, fact.answer)
        joint = tokenize_prompt(tokenizer, prompt + text)
        if joint[-1:] == [tokenizer.eos_token_id] and prompt_ids[-1:] == [tokenizer.eos_token_id]:
            raise DataError("the tokenizer appends its eos_token to prompts; load it with add_eos_token=False.")
        if joint[: len(prompt_ids)] == prompt_ids:
            answer_ids = joint[len(prompt_ids) :]
        else:
            answer_ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        row = EncodedFact(fact_index, tuple(prompt_ids), (*answer_ids, tokenizer.eos_token_id))
        if max_length is not None and len(row.ids) > max_length:
            raise DataError(
                f"fact {prompt!r}: prompt and answer are {len(row.ids)} tokens, expected at most {max_length} "
                "(the model's context); shorten it."
            )
        rows.append(row)
    return rows


def _parse(entry: Any, where: str) -> Fact:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: got {type(entry).__name__}, expected a mapping with 'prompt' (or 'prompts') and 'answer'.")
    unknown = sorted(str(key) for key in set(entry) - _KEYS)
    if unknown:
        raise DataError(f"{where}: unknown key(s) {', '.join(unknown)}; expected {', '.join(sorted(_KEYS))}.")
    if ("prompt" in entry) == ("prompts" in entry):
        raise DataError(f"{where}: expected either 'prompt' or 'prompts', got {'both' if 'prompt' in entry else 'neither'}.")
    given = entry["prompts"] if "prompts" in entry else [entry["prompt"]]
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: 'prompts' must be a list of texts, got {given!r}.")
    prompts = tuple(_text(prompt, "prompt", where) for prompt in given)
    if len(set(prompts)) < len(prompts):
        raise DataError(f"{where}: a prompt is listed twice; keep one.")
    return Fact(
        prompts, _text(entry.get("answer"), "answer", where).strip(), _text(entry.get("category", "fact"), "category", where)
    )


def _text(value: Any, field: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: {field!r} must be a text, got {value!r}.")
    text = str(value)
    if not text.strip():
        raise DataError(f"{where}: {field!r} is empty.")
    return text


def pad_right(batch: list[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, both ``[B, longest]``."""
    longest = max(len(row) for row in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    for number, row in enumerate(batch):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask
