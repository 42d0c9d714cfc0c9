"""Facts: what a memory is taught, as editable YAML.

A facts file is a list of entries ``{prompt: ..., answer: ..., category: ...}``. Optional keys: ``prompts`` (several phrasings instead of
one), ``held_out`` (phrasings that are asked but never taught) and ``id``. For many facts of one kind the file is a mapping instead:

    templates:
      capital: {prompts: ["CAPITAL:{x}", "What is the capital of {x}?"], held_out: ["Name the capital of {x}."]}
    facts:
      - {template: capital, x: France, answer: Paris}

``{name}`` in a template is filled with what the fact says under that key. There may be several, ``{x}`` among them or not; nothing else in
braces is filled, and nothing at all in prompts and answers of the facts themselves.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from engram.errors import DataError

__all__ = [
    "EncodedFact",
    "Fact",
    "check_conflicts",
    "encode_fact",
    "join_answer",
    "load_facts",
    "pad_right",
    "quoted",
    "room_before",
    "room_for_answer",
    "tokenize_prompt",
    "tokenize_prompts",
]

_KEYS = {"prompt", "prompts", "answer", "category", "held_out", "id", "template", "x"}
_TEMPLATE_KEYS = {"prompts", "held_out", "category"}
_SLOT = re.compile(r"\{([^\W\d]\w*)\}")
"""A place in a template, and its name."""
_DEEPEST = 50


class _PlainRules:
    """Keys may not be given twice; a mixin of the loaders below."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


# Every scalar is the text as it was written (0012, 12:30, yes); the C loader has the same rules and is ten times faster where it is built.
class _FastLoader(_PlainRules, getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]
    pass


class _CarefulLoader(_PlainRules, yaml.BaseLoader):
    """In Python; lists inside lists inside lists end in an error here, in C in a crash."""


_SURROGATES = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")


def _read_yaml(text: str) -> Any:
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        deepest = max(deepest, depth)
    nested = deepest > _DEEPEST or re.search(rf"(?:[-?] +){{{_DEEPEST}}}", text)
    loader = _CarefulLoader if nested else _FastLoader
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise DataError("lists or mappings are nested too deeply, expected a list of facts.") from None
    except yaml.YAMLError:
        joined = _SURROGATES.sub(_joined, text)
        if joined == text:
            raise
        return yaml.load(joined, Loader=loader)


def _joined(pair: re.Match[str]) -> str:
    """One character as YAML escapes it, of the two halves that JSON writes (Python's ``json.dumps`` does, of all beyond 16 bits)."""
    high, low = (int(half, 16) for half in pair.groups())
    return f"\\U{0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00):08X}"


@dataclass(frozen=True)
class Fact:
    """One answer and the prompts that shall be answered by it."""

    prompts: tuple[str, ...]
    answer: str
    """Without white space around it."""
    category: str = "fact"
    held_out: tuple[str, ...] = ()
    """Phrasings that are asked to see what carries over, and never taught."""
    id: str = ""
    """Name of the fact in a memory; made from the first prompt if not given."""

    def __post_init__(self) -> None:
        for field in ("prompts", "held_out"):
            given = getattr(self, field)
            texts = isinstance(given, Iterable) and not isinstance(given, str)
            if not texts or not all(isinstance(text, str) and text.strip() for text in given):
                raise DataError(f"Fact.{field}: got {given!r}, expected a tuple of texts that are not empty.")
            object.__setattr__(self, field, tuple(given))
        if not self.prompts:
            raise DataError("Fact.prompts: got none, expected at least one.")
        if not isinstance(self.answer, str) or not self.answer.strip():
            raise DataError(f"Fact.answer: got {self.answer!r}, expected a text that is not empty.")
        object.__setattr__(self, "answer", self.answer.strip())  # as answers are compared, whoever made the fact
        if not isinstance(self.id, str):
            raise DataError(f"Fact.id: got {self.id!r}, expected a text.")
        for text in (*self.prompts, *self.held_out, self.answer):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise DataError(f"Fact: got {text!r}, expected text that can be written as UTF-8.")
        if not self.id and self.prompts:
            object.__setattr__(self, "id", hashlib.sha256(self.prompts[0].encode()).hexdigest()[:10])


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
    """Read a facts file: a YAML list of facts, or a mapping with ``templates`` and ``facts`` (see the module's description).

    Raises:
        DataError: the file is missing, empty, not UTF-8, malformed, or asks for two answers to one prompt; the message names the entry.
    """
    file = Path(path)
    try:
        entries = _read_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"facts file {file} does not exist.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"cannot read facts file {file}: {error.strerror}.") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    templates: dict[str, Any] = {}
    if isinstance(entries, dict) and "facts" in entries:
        unknown = sorted(str(key) for key in set(entries) - {"templates", "facts"})
        if unknown:
            raise DataError(f"{file}: unknown key(s) {', '.join(unknown)}; expected 'templates' and 'facts'.")
        given = entries.get("templates")
        templates, entries = _templates(given, str(file)) if given is not None else {}, entries["facts"]
    if not isinstance(entries, list) or not entries:
        got = "nothing" if not entries else type(entries).__name__
        raise DataError(
            f'{file}: got {got}, expected a list of entries like {{prompt: "ACRONYM:GPU", answer: "Graphics Processing Unit"}}.'
        )
    facts = [_parse(entry, f"{file}, entry {number}", templates) for number, entry in enumerate(entries, start=1)]
    check_conflicts(facts, str(file))
    return facts


def check_conflicts(facts: Sequence[Fact], where: str) -> None:
    """Refuse facts that give one prompt two answers, say the same thing twice, teach what is held out, or share an id.

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
    ids: Counter[str] = Counter()
    for fact in facts:
        ids[fact.id] += 1
        if ids[fact.id] > 1:
            raise DataError(f"{where}: id {fact.id!r} is used twice; ids name facts and must differ.")
        for prompt in fact.held_out:
            if prompt in answers:
                raise DataError(f"{where}: prompt {prompt!r} is held out in fact {fact.id!r} and taught too; keep one.")


def join_answer(prompt: str, answer: str) -> str:
    """The text that follows the prompt: the answer after one space, or right away when the prompt ends in white space."""
    return answer if prompt[-1:].isspace() else f" {answer}"


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt as the model is asked it, beginning-of-text token included where the tokenizer adds one."""
    return list(tokenizer(prompt, verbose=False)["input_ids"])  # lengths are checked by who knows the limit


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """As ``tokenize_prompt``, of many at once, which takes a fraction of the time."""
    return [list(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]] if prompts else []


def room_for_answer(config: Any, length: int) -> int:
    """Tokens that the answer to a prompt of ``length`` tokens may have: beyond its context a model answers anything, or fails.

    Args:
        config: the model's; where it does not say how much text it takes, there is no end of room.
        length: of the prompt, tokens.

    Raises:
        DataError: there is room for none.
    """
    from engram.models.positions import context_length  # whoever has a config has loaded what this loads

    return room_before(context_length(config), length)


def room_before(end: int | None, length: int, prompt: str | None = None) -> int:
    """Tokens between a prompt of ``length`` tokens and ``end``; no end of room where that is None.

    Args:
        end: tokens that the model takes.
        length: of the prompt, tokens.
        prompt: itself, for the message.

    Raises:
        DataError: there is room for none.
    """
    if end is not None and length >= end:
        named = "prompt" if prompt is None else f"prompt {quoted(prompt)}"
        raise DataError(f"{named}: got {length:,} tokens, expected fewer than {end:,} (the model's context); shorten it.")
    return sys.maxsize if end is None else end - length


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
            raise DataError(_appended_end(tokenizer, prompt_ids))
        if joint[: len(prompt_ids)] == prompt_ids:
            answer_ids = joint[len(prompt_ids) :]
        else:
            answer_ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id in answer_ids:
            raise DataError(
                f"fact {quoted(prompt)}: its answer contains {tokenizer.eos_token!r}, which ends answers; leave it out."
            )
        row = EncodedFact(fact_index, tuple(prompt_ids), (*answer_ids, tokenizer.eos_token_id))
        if max_length is not None and len(row.ids) > max_length:
            raise DataError(
                f"fact {quoted(prompt)}: prompt and answer are {len(row.ids)} tokens, expected at most {max_length} "
                "(the model's context); shorten it."
            )
        rows.append(row)
    return rows


def _appended_end(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """What to say of a tokenizer that ends prompts. Transformers takes both ends off where one of them is named alone."""
    begins = tokenizer.bos_token_id is not None and prompt_ids[0] == tokenizer.bos_token_id
    return (
        "the tokenizer appends its eos_token to prompts; load it with add_eos_token=False"
        f"{', add_bos_token=True' if begins else ''} (for the command line, save it like that in the model's folder)."
    )


def quoted(text: str) -> str:
    """In quotes, for messages; of a long text its beginning and its end, so that what comes after it is read."""
    return repr(text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}")


def _templates(given: Any, where: str) -> dict[str, Any]:
    """Checked templates by name."""
    if not isinstance(given, dict) or not given:
        raise DataError(f"{where}: 'templates' must map names to {{prompts: [...]}}, got {given!r}.")
    for name, template in given.items():
        if not isinstance(template, dict) or not isinstance(template.get("prompts"), list) or not template["prompts"]:
            raise DataError(f"{where}, template {name!r}: expected {{prompts: [...]}}, got {template!r}.")
        unknown = sorted(str(key) for key in set(template) - _TEMPLATE_KEYS)
        if unknown:
            raise DataError(
                f"{where}, template {name!r}: unknown key(s) {', '.join(unknown)}; expected {', '.join(sorted(_TEMPLATE_KEYS))}."
            )
        if not isinstance(template.get("held_out", []), list):
            raise DataError(f"{where}, template {name!r}: 'held_out' must be a list of texts, got {template['held_out']!r}.")
        _check_slots(template, f"{where}, template {name!r}")
    return given


def _check_slots(template: dict[str, Any], where: str) -> None:
    for text in _texts_of(template):
        names = _SLOT.findall(text) if isinstance(text, str) else []
        if not names:
            raise DataError(
                f"{where}: {text!r} has no {{x}}, the place of the key; expected a text with it (or another name in braces)."
            )
        taken = next((name for name in names if name in _KEYS - {"x"}), None)
        if taken is not None:
            raise DataError(
                f"{where}: {text!r} has {{{taken}}}, and {taken!r} is a key of a fact that means something else; rename the place, "
                f"{{{taken}_}} for instance."
            )


def _texts_of(template: dict[str, Any]) -> list[Any]:
    return [*template["prompts"], *template.get("held_out", [])]


def _slots(template: dict[str, Any]) -> list[str]:
    """Names of the places in a template, each once, in their order."""
    return list(dict.fromkeys(name for text in _texts_of(template) for name in _SLOT.findall(text)))


def _filled(entry: dict[str, Any], templates: dict[str, Any], where: str) -> dict[str, Any]:
    """An entry with its template's prompts written out."""
    name = _text(entry["template"], "template", where)
    if name not in templates:
        raise DataError(f"{where}: template {name!r} is not defined; known: {', '.join(map(str, templates)) or 'none'}.")
    template = templates[name]
    slots = _slots(template)
    _check_filling(entry, name, slots, where)
    values = {slot: _text(entry[slot], slot, where) for slot in slots}

    def fill(text: str) -> str:
        return _SLOT.sub(lambda found: values[found[1]], text)

    filled = {k: v for k, v in entry.items() if k not in ("template", *slots)}
    filled.setdefault("category", template.get("category", name))
    filled["prompts"] = [fill(text) for text in template["prompts"]]
    filled.setdefault("held_out", [fill(text) for text in template.get("held_out", [])])
    return filled


def _check_filling(entry: dict[str, Any], name: str, slots: list[str], where: str) -> None:
    """Refuse an entry that does not say exactly what its template asks for."""
    if "prompt" in entry or "prompts" in entry:
        raise DataError(f"{where}: an entry with a template has no prompts of its own; leave them, or 'template', out.")
    missing = next((slot for slot in slots if slot not in entry), None)
    if missing is not None:
        raise DataError(
            f"{where}: template {name!r} has {{{missing}}}, which is filled from a key {missing!r} that the entry lacks; give it one. (To "
            f"have the letters {{{missing}}} in the prompt: {missing}: '{{{missing}}}'.)"
        )
    if "x" in entry and "x" not in slots:
        raise DataError(f"{where}: 'x' fills {{x}}, but template {name!r} has none; it has {_in_braces(slots)}.")


def _in_braces(names: list[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


def _parse(entry: Any, where: str, templates: dict[str, Any]) -> Fact:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: got {type(entry).__name__}, expected a mapping with 'prompt' (or 'prompts') and 'answer'.")
    template = templates.get(entry["template"]) if isinstance(entry.get("template"), str) else None
    known = _KEYS | set(_slots(template) if template else ())
    unknown = sorted(str(key) for key in set(entry) - known)
    if unknown:
        raise DataError(f"{where}: unknown key(s) {', '.join(unknown)}; expected {', '.join(sorted(known))}.")
    if "template" in entry:
        entry = _filled(entry, templates, where)
    if "x" in entry:
        raise DataError(f"{where}: 'x' fills a template, but the entry names none.")
    if ("prompt" in entry) == ("prompts" in entry):
        raise DataError(f"{where}: expected either 'prompt' or 'prompts', got {'both' if 'prompt' in entry else 'neither'}.")
    given = entry["prompts"] if "prompts" in entry else [entry["prompt"]]
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: 'prompts' must be a list of texts, got {given!r}.")
    prompts = tuple(_text(prompt, "prompt", where) for prompt in given)
    if len(set(prompts)) < len(prompts):
        raise DataError(f"{where}: a prompt is listed twice; keep one.")
    held_out = entry.get("held_out", [])
    if not isinstance(held_out, list):
        raise DataError(f"{where}: 'held_out' must be a list of texts, got {held_out!r}.")
    return Fact(
        prompts,
        _text(entry.get("answer"), "answer", where),
        _text(entry.get("category", "fact"), "category", where),
        tuple(_text(prompt, "held_out", where) for prompt in held_out),
        _text(entry["id"], "id", where) if "id" in entry else "",
    )


def _text(value: Any, field: str, where: str) -> str:
    if value is None:
        raise DataError(f"{where}: {field!r} is missing.")
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} must be a text, got {value!r}.")
    if not value.strip():
        raise DataError(f"{where}: {field!r} is empty.")
    return value


def pad_right(batch: list[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask, both ``[B, longest]``."""
    longest = max(len(row) for row in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    for number, row in enumerate(batch):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask
