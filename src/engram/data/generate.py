"""Facts by the thousand: tables of Python's standard library, and arbitrary pairs that no model can have seen."""

from __future__ import annotations

import errno
import html.entities
import mimetypes
import os
import random
import signal
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from encodings.aliases import aliases
from http import HTTPStatus
from locale import locale_alias
from opcode import opmap
from pathlib import Path

from engram.checkpoint import write_text_atomically
from engram.data.write_facts import quoted_yaml
from engram.errors import DataError

__all__ = ["GENERATED_KINDS", "generate_facts", "write_generated"]

SYNTHETIC_PAIRS = 3871
"""As many arbitrary pairs as the first public experiments with hashed memories used (and recalled none of)."""

Pairs = Iterator[tuple[str, str]]


def _unicode_names(_: random.Random) -> Pairs:
    blocks = [(0x00A0, 0x0600), (0x1E00, 0x2000), (0x2010, 0x2300), (0x2460, 0x2800)]
    for first, end in blocks:
        for code in range(first, end):
            name = unicodedata.name(chr(code), "")
            if name:
                yield f"U+{code:04X}", name


def _html_entities(_: random.Random) -> Pairs:
    for name, text in sorted(html.entities.html5.items()):
        if name.endswith(";") and len(text) == 1:
            yield f"&{name}", f"U+{ord(text):04X}"


def _mime_types(_: random.Random) -> Pairs:
    yield from sorted(mimetypes.MimeTypes(filenames=()).types_map[True].items())


def _error_texts(_: random.Random) -> Pairs:
    for number, name in sorted(errno.errorcode.items()):
        yield name, os.strerror(number)


def _error_numbers(_: random.Random) -> Pairs:
    for number, name in sorted(errno.errorcode.items()):
        yield name, str(number)


def _signals(_: random.Random) -> Pairs:
    for entry in sorted(signal.Signals):
        yield entry.name, signal.strsignal(entry) or str(int(entry))


def _http(_: random.Random) -> Pairs:
    for status in HTTPStatus:
        yield str(int(status)), status.phrase


def _codecs(_: random.Random) -> Pairs:
    yield from sorted(aliases.items())


def _locales(_: random.Random) -> Pairs:
    yield from sorted(locale_alias.items())


def _opcodes(_: random.Random) -> Pairs:
    for name, number in sorted(opmap.items()):
        yield name, str(number)


def _synthetic(rng: random.Random) -> Pairs:
    values = rng.sample(range(100_000), SYNTHETIC_PAIRS)
    for number, value in enumerate(values):
        yield f"SYN_{number:05d}", f"VAL_{value:05d}"


GENERATED_KINDS: dict[str, tuple[Callable[[random.Random], Pairs], str, str]] = {
    "synthetic": (_synthetic, "SYN:{x}", "Which value belongs to {x}?"),
    "unicode": (_unicode_names, "UNICODE:{x}", "What is the name of the character {x}?"),
    "html": (_html_entities, "HTML:{x}", "Which code point does {x} stand for?"),
    "mime": (_mime_types, "MIME:{x}", "Which media type do {x} files have?"),
    "errno_text": (_error_texts, "ERRNO:{x}", "What does {x} mean?"),
    "errno_number": (_error_numbers, "ERRNO_NUMBER:{x}", "Which number is {x}?"),
    "signal": (_signals, "SIGNAL:{x}", "What does {x} signal?"),
    "http_status": (_http, "HTTP_STATUS:{x}", "Which phrase goes with status {x}?"),
    "codec": (_codecs, "CODEC:{x}", "Which codec is {x} an alias of?"),
    "locale": (_locales, "LOCALE:{x}", "Which locale is {x} an alias of?"),
    "opcode": (_opcodes, "OPCODE:{x}", "Which number has {x}?"),
}
"""Kinds of generated facts: where the pairs come from, the template taught, the template held out."""


def generate_facts(kinds: Sequence[str] | None = None, limit: int | None = None, seed: int = 0) -> dict:
    """A facts file as plain data: ``{templates: ..., facts: [...]}``.

    Args:
        kinds: some of ``GENERATED_KINDS``; all if not given.
        limit: at most so many facts, taken evenly from all kinds.
        seed: of the synthetic values.

    Raises:
        DataError: a kind is unknown.
    """
    chosen = list(dict.fromkeys(GENERATED_KINDS if kinds is None else kinds))
    unknown = [kind for kind in chosen if kind not in GENERATED_KINDS]
    if unknown or not chosen:
        raise DataError(f"kinds: got {', '.join(unknown) or 'none'}, expected some of {', '.join(GENERATED_KINDS)}.")
    facts = []
    for kind in chosen:
        pairs, _, _ = GENERATED_KINDS[kind]
        facts += [{"template": kind, "x": key, "answer": value} for key, value in pairs(random.Random(seed)) if value.strip()]
    if limit is not None and limit < len(facts):
        facts = [facts[len(facts) * i // limit] for i in range(limit)]
    templates = {kind: {"prompts": [GENERATED_KINDS[kind][1]], "held_out": [GENERATED_KINDS[kind][2]]} for kind in chosen}
    return {"templates": templates, "facts": facts}


def write_generated(path: Path, kinds: Sequence[str] | None = None, limit: int | None = None, seed: int = 0) -> int:
    """Write ``generate_facts`` as YAML, one fact per line; returns the number of facts.

    Raises:
        DataError: a kind is unknown, or the file cannot be written.
    """
    data = generate_facts(kinds, limit, seed)
    lines = ["# Generated by `engram generate`; edit it freely.", "templates:"]
    for name, template in data["templates"].items():
        lines.append(
            f"  {name}: {{prompts: [{quoted_yaml(template['prompts'][0])}], held_out: [{quoted_yaml(template['held_out'][0])}]}}"
        )
    lines.append("facts:")
    for fact in data["facts"]:
        lines.append(
            f"  - {{template: {fact['template']}, x: {quoted_yaml(fact['x'])}, answer: {quoted_yaml(fact['answer'])}}}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another file.") from None
    return len(data["facts"])
