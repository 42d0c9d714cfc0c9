"""`engram teach | why | facts | forget | diff | merge`: what a memory knows."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engram.cli.loading import (
    DeviceOption,
    ModelDtypeOption,
    Running,
    check_out,
    is_beneath,
    open_beneath,
    open_editor,
    taught_folder,
)
from engram.cli.outputs import check_prompt, count_bar, print_folded
from engram.errors import DataError, EngramError, TeachError, first_of

if TYPE_CHECKING:
    from engram.data import Fact
    from engram.editing import Explanation, MemoryEditor, RowConflict

__all__ = [
    "ChatOption",
    "ModelOption",
    "diff_command",
    "facts_command",
    "forget_command",
    "merge_command",
    "teach_command",
    "why_command",
]

_SAVE_EVERY = 1000
_LISTED = 20

MemoryOption = Annotated[Path, typer.Option(help="Folder of the memory, a taught one (trained ones hold no facts).")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="Base model: a folder, a hub name or 'bundled'. The one the memory was made for if not given."),
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template, as a user's turn.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def teach_command(
    facts: Annotated[Path, typer.Argument(help="Facts to teach (YAML).")],
    memory: Annotated[Path, typer.Option(help="Folder of the memory; a new one if there is none.")],
    model: ModelOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Facts that contradict the memory replace what it says.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, max=(1 << 63) - 1, help="Seed of a new memory's addresses and reader (0 if not given).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Teach every prompt as a chat turn too (chat template).")] = False,
    over: Annotated[
        Path | None,
        typer.Option(help="Make a new memory on top of this one ('bundled': the bundled one), so that both are read."),
    ] = None,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
) -> None:
    """Teach facts to a memory, new or existing; exit code 1 and a list if any fact is not exact.

    The memory is saved after every thousand facts: a run that was stopped goes on where it was.
    """
    from engram.checkpoint import lock_store
    from engram.data import with_chat_prompts

    memory = taught_folder(memory)
    lessons, checksum = _read_facts(facts)
    with lock_store(memory):
        editor = _open(memory, model, seed, over, Running(device, model_dtype))
        if chat:
            lessons = with_chat_prompts(editor.tokenizer, lessons)
        taught = known = 0
        at_start: list[str] = []
        failed: dict[str, str] = {}
        started = time.perf_counter()
        parts = editor.in_parts(lessons, _SAVE_EVERY, replace)  # a refusal comes before there is a bar
        with _told_how_far(memory, lessons), count_bar("teaching", sum(len(fact.prompts) for fact in lessons)) as bar:
            done = 0
            for part in parts:
                show = partial(_shift, bar, done)
                report = editor.teach(part, None, facts.name, checksum, replace, show, _report_conflicts)
                editor.save(memory)
                done += sum(len(fact.prompts) for fact in part)
                bar(done)
                taught, known = taught + len(report.taught), known + len(report.already_known)
                at_start += report.at_start_only
                failed.update(report.not_exact)
                for line in report.replaced:
                    print(f"replaced: {line}", file=sys.stderr)
                for gone, kept in report.joined.items():
                    print(f"joined: {gone!r} and {kept!r} are one fact, which stands as {kept!r}", file=sys.stderr)
        seconds = time.perf_counter() - started
    print(
        f"taught {taught} facts in {seconds:.1f} s, {known} were known; the memory holds {len(editor.facts)} "
        f"({_size(memory):,} bytes in {memory})"
    )
    if at_start:
        print(
            f"note: {len(at_start)} of the taught facts ({first_of(at_start, _LISTED)}) speak at the start of an input or of a line only, not "
            "within running text: their prompts are so short that the first word is part of what is looked for; add a longer phrasing, if that "
            "matters",
            file=sys.stderr,
        )
    if failed:
        prompts = {fact.id: fact.prompts[0] for fact in lessons}
        for fact_id, reason in failed.items():
            print(f"not exact: {prompts.get(fact_id, fact_id)!r}: {reason}", file=sys.stderr)
        raise typer.Exit(1)


def _read_facts(file: Path) -> tuple[list[Fact], str]:
    """What a facts file teaches, and its SHA-256. A pipe can be read but once, so a copy is read."""
    from engram.data import load_facts

    if not (file.is_fifo() or file.is_char_device()):
        return load_facts(file), hashlib.sha256(file.read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_bytes(file.read_bytes())
        try:
            return load_facts(copy), hashlib.sha256(copy.read_bytes()).hexdigest()
        except DataError as error:
            raise DataError(str(error).replace(str(copy), str(file))) from None


@contextmanager
def _told_how_far(memory: Path, lessons: Sequence[Fact]) -> Iterator[None]:
    """Have an interruption say how many of the facts the folder holds by then; a part may have been saved in that very moment."""
    from engram.checkpoint import DESCRIPTION_NAME, read_description, read_ledger
    from engram.editing.ledger import Ledger
    from engram.editing.sorting import sort_out

    try:
        yield
    except KeyboardInterrupt:
        saved = read_ledger(memory, read_description(memory)) if (memory / DESCRIPTION_NAME).exists() else None
        known = sort_out(Ledger.from_dict(saved), lessons).already_known if saved else []
        raise KeyboardInterrupt(
            f"stopped; {len(known):,} of {len(lessons):,} facts are saved in {memory}, and the same command goes on from there"
        ) from None


def why_command(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    memory: MemoryOption,
    model: ModelOption = None,
    as_json: JsonOption = False,
    chat: ChatOption = False,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
) -> None:
    """Ask, and show token by token which facts spoke, through which rows, and what they changed."""
    from engram.data import chat_prompt

    check_prompt(prompt, "PROMPT")
    editor = open_editor(taught_folder(memory), model, Running(device, model_dtype))
    if chat:
        prompt = chat_prompt(editor.tokenizer, prompt)
    explanation = editor.why(prompt)
    if as_json:
        print(json.dumps(explanation.to_dict(), ensure_ascii=False, indent=1))
    else:
        _print_explanation(explanation, editor)


def facts_command(memory: MemoryOption, as_json: JsonOption = False) -> None:
    """List the facts of a memory: ids, prompts, answers, rows. Loads no model."""
    from engram.editing.merge import StoredMemory

    stored = StoredMemory(taught_folder(memory))
    owned = stored.rows_by_fact()
    if as_json:
        entries = [
            {
                "id": fact.id,
                "category": fact.category,
                "prompts": [prompt.text for prompt in fact.prompts],
                "answer": fact.answer,
                "rows": owned[fact.id],
                "source": fact.source,
                "sha256": fact.checksum,
                "taught_at": fact.taught_at,
            }
            for fact in stored.ledger
        ]
        print(json.dumps(entries, ensure_ascii=False, indent=1))
        return
    for fact in stored.ledger:
        rows = sum(map(len, owned[fact.id].values()))
        print(
            f"{fact.id}  {' | '.join(repr(prompt.text) for prompt in fact.prompts)} -> {fact.answer!r}  ({rows} rows, {fact.source})"
        )
    print(f"{len(stored.ledger)} facts", file=sys.stderr)


def forget_command(
    fact_ids: Annotated[list[str], typer.Argument(help="Ids of facts (`engram facts`), or their prompts word for word.")],
    memory: MemoryOption,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
) -> None:
    """Take facts out of a memory, rows and all; others stay as they were taught."""
    from engram.checkpoint import lock_store

    memory = taught_folder(memory)
    _require(memory)
    with lock_store(memory):
        editor = open_editor(memory, model, Running(device, model_dtype))
        by_prompt = {prompt.text: fact.id for fact in editor.facts for prompt in fact.prompts}
        known = {fact.id for fact in editor.facts}  # an id is meant as one, even if it is some other fact's prompt too
        report = editor.forget([name if name in known else by_prompt.get(name, name) for name in fact_ids])
        editor.save(memory)
    shared = f", {report.rows_shared} rows stay because other facts own them too" if report.rows_shared else ""
    print(f"forgot {len(report.forgotten)} facts, {report.rows_removed} rows{shared}; {len(editor.facts)} facts remain")
    if report.no_longer_exact:
        print(f"no longer exact, teach again: {', '.join(report.no_longer_exact)}", file=sys.stderr)
        raise typer.Exit(1)


def diff_command(
    a: Annotated[Path, typer.Argument(help="A memory.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """Facts and rows in which two memories differ; exit code 1 if they do, 2 if one of them cannot be read."""
    from engram.editing import diff_memories
    from engram.editing.merge import StoredMemory

    a, b = taught_folder(a, "A"), taught_folder(b, "B")
    try:
        found = diff_memories(a, b)
    except (EngramError, OSError) as error:  # not 1, which scripts take for "they differ"
        print(f"engram: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False, indent=1))
    else:
        for sign, folder, ids in (("-", a, found.only_a), ("+", b, found.only_b)):
            ledger = StoredMemory(folder).ledger
            for fact_id in ids:
                print(f"{sign} {fact_id}  {ledger[fact_id].prompts[0].text!r} -> {ledger[fact_id].answer!r}")
        for entry in found.conflicts:
            print(f"! {entry['prompt']!r}: {entry['a']!r} | {entry['b']!r}")
        print(
            f"rows: {found.rows_shared_equal} equal, {found.rows_only_a} only in {a}, {found.rows_only_b} only in {b}, "
            f"{found.rows_shared_different} of the same n-gram differ, {found.rows_in_collision} collide"
        )
    if not found.equal:
        raise typer.Exit(1)


def merge_command(
    a: Annotated[Path, typer.Argument(help="A memory.")],
    b: Annotated[Path, typer.Argument(help="Another, of the same base model and seed.")],
    out: Annotated[Path, typer.Option(help="Folder of the union.")],
    prefer: Annotated[
        str | None, typer.Option(help="Who wins conflicts: 'a' or 'b'. Without it conflicts are refused.")
    ] = None,
    model: ModelOption = None,
    verify: Annotated[bool, typer.Option(help="Ask the model every fact of the union before it is written.")] = True,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
) -> None:
    """Unite two memories; conflicts are listed and never resolved silently."""
    from engram.checkpoint import lock_store
    from engram.editing import merge_memories
    from engram.editing.merge import refuse_other_memory

    if prefer not in (None, "a", "b"):
        raise typer.BadParameter(f"got {prefer!r}, expected 'a' or 'b'", param_hint="--prefer")
    side: Literal["a", "b"] | None = prefer  # type: ignore[assignment]
    a, b = taught_folder(a, "A"), taught_folder(b, "B")
    check_out(out)
    if out.resolve() in (a.resolve(), b.resolve()):
        raise typer.BadParameter("the union would overwrite one of the two; choose another folder", param_hint="--out")
    running = Running(device, model_dtype)
    running.check()
    with lock_store(out):
        refuse_other_memory(out, a, b)
        if verify:
            with tempfile.TemporaryDirectory() as trial:
                merge_memories(a, b, Path(trial) / "union", side)
                exact = open_editor(Path(trial) / "union", model, running).verify()
            wrong = [fact_id for fact_id, ok in exact.items() if not ok]
            if wrong:
                raise TeachError(
                    f"in the union {len(wrong)} facts are not exact: {first_of(wrong, _LISTED)}. Nothing was written."
                )
        report = merge_memories(a, b, out, side)
    for line in report.resolved:
        print(f"decided for {prefer}: {line}", file=sys.stderr)
    print(
        f"{out}: {report.facts} facts ({report.from_a} from a, {report.from_b} from b), {report.rows} rows, {_size(out):,} bytes"
    )


def _open(memory: Path, model: str | None, seed: int | None, over: Path | None, running: Running) -> MemoryEditor:
    """The memory in a folder, or a new one if there is none yet."""
    from engram.checkpoint import DESCRIPTION_NAME, read_description
    from engram.config import EngramConfig
    from engram.editing import MemoryEditor

    if (memory / DESCRIPTION_NAME).exists():
        own = EngramConfig.from_dict(read_description(memory)["engram_config"]).seed
        if seed not in (None, own):
            raise typer.BadParameter(
                f"got {seed}, but the memory in {memory} was made with seed {own}; leave the option out", param_hint="--seed"
            )
        if over is not None and not is_beneath(over, memory):
            raise typer.BadParameter(
                f"got {str(over)!r}, but the memory in {memory} was not made on top of that one; leave the option out, or name a new folder",
                param_hint="--over",
            )
        return open_editor(memory, model, running)
    base, tokenizer = running.load(model or "bundled") if over is None else open_beneath(over, model, running)
    return MemoryEditor.create(base, tokenizer, seed=seed or 0)


def _require(memory: Path) -> None:
    from engram.checkpoint import read_description

    read_description(memory)  # before anything is made in a folder that holds no memory


def _size(memory: Path) -> int:
    return sum(file.stat().st_size for file in memory.iterdir() if file.is_file())


def _report_conflicts(conflicts: list[RowConflict]) -> None:
    told = [f"row {c.row}: {c.loser} does without, {', '.join(c.owners)} keeps it" for c in conflicts]
    print(f"{len(conflicts)} rows in conflict: {first_of(told, _LISTED, '; ')}", file=sys.stderr)


def _shift(bar: Callable[[int], None], before: int, done: int, _: int) -> None:
    bar(before + done)


def _print_explanation(explanation: Explanation, editor: MemoryEditor) -> None:
    from rich.table import Table

    table = Table(title=f"{explanation.prompt!r} -> {explanation.answer!r}")
    for heading in ("token", "then says", "base says", "logit change", "n-gram read", "gate", "facts", "foreign rows"):
        table.add_column(heading)
    for token in explanation.tokens:
        cells = [repr(token.token), repr(token.says), repr(token.says_off), f"{token.logit_change:+.2f}"]
        hits = [
            ", ".join(repr(hit.ngram) for hit in token.hits),
            ", ".join(" ".join(f"{gate:.2f}" for gate in hit.gate) for hit in token.hits),
            ", ".join(dict.fromkeys(fact for hit in token.hits for fact in hit.facts)),
            f"{token.foreign_rows} refused" if token.foreign_rows else "",
        ]
        table.add_row(*cells, *hits)
    print_folded(table)
    if not explanation.facts:
        print("no taught n-gram occurs: this is the base model's answer, bit for bit")
    held = {fact.id: fact for fact in editor.facts}
    for fact_id, nats in sorted(explanation.facts.items(), key=lambda entry: -entry[1]):
        fact = held[fact_id]
        line = f"{fact_id}: {fact.prompts[0].text!r} -> {fact.answer!r} adds {nats:+.2f} nats to the answer ({fact.source}, {fact.taught_at})"
        print(line)
