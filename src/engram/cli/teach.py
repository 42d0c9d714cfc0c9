"""`engram teach`: facts from a file into a memory, new or existing."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engram.cli.knowledge import folder_size
from engram.cli.loading import (
    AllowOtherBaseOption,
    DeviceOption,
    ModelDtypeOption,
    Running,
    is_beneath,
    open_beneath,
    open_editor,
    taught_folder,
)
from engram.cli.outputs import count_bar
from engram.errors import DataError, first_of

if TYPE_CHECKING:
    from engram.data import Fact
    from engram.editing import MemoryEditor, RowConflict, TeachReport

__all__ = ["teach_command"]

_SAVE_EVERY = 1000
_LISTED = 20


def teach_command(
    facts: Annotated[Path, typer.Argument(help="Facts to teach (YAML).")],
    memory: Annotated[Path, typer.Option(help="Folder of the memory; a new one if there is none.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a folder, a hub name or 'bundled'. Default: the one the memory was made for; of a new memory 'bundled'."
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Where a fact contradicts the memory, take the new answer. Without it that is refused."),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=(1 << 63) - 1,
            help="Seed of a new memory's addresses and reader (default: 0). Only memories of one seed can be merged.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Teach every prompt inside the tokenizer's chat template too, as a user's turn."),
    ] = False,
    over: Annotated[
        Path | None,
        typer.Option(help="Make the new memory on top of this one (a folder, or 'bundled'): both are read."),
    ] = None,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Teach facts to a memory, making it if it does not exist.

    Facts that do not become exact are listed, with exit code 1. The memory is saved after every thousand facts; the same command resumes a
    run that was stopped.
    """
    from engram.checkpoint import lock_store
    from engram.data import with_chat_prompts

    memory = taught_folder(memory)
    lessons, checksum = _read_facts(facts)
    with lock_store(memory):
        editor = _open(memory, model, seed, over, Running(device, model_dtype, allow_other_base))
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
                _show_changes(report)
        seconds = time.perf_counter() - started
    print(
        f"taught {taught} facts in {seconds:.1f} s, {known} were known; the memory holds {len(editor.facts)} "
        f"({folder_size(memory):,} bytes in {memory})"
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


def _show_changes(report: TeachReport) -> None:
    """Facts that were replaced, or turned out to be one."""
    for line in report.replaced:
        print(f"replaced: {line}", file=sys.stderr)
    for gone, kept in report.joined.items():
        print(f"joined: {gone!r} and {kept!r} are one fact, which stands as {kept!r}", file=sys.stderr)


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


def _report_conflicts(conflicts: list[RowConflict]) -> None:
    told = [f"row {c.row}: {c.loser} does without, {', '.join(c.owners)} keeps it" for c in conflicts]
    print(f"{len(conflicts)} rows in conflict: {first_of(told, _LISTED, '; ')}", file=sys.stderr)


def _shift(bar: Callable[[int], None], before: int, done: int, _: int) -> None:
    bar(before + done)
