"""`engram why | facts | forget | diff | merge`: what a memory knows."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engram.cli.loading import (
    AllowOtherBaseOption,
    DeviceOption,
    ModelDtypeOption,
    ModelOption,
    Running,
    check_out,
    open_editor,
    taught_folder,
)
from engram.cli.outputs import check_prompt, print_folded
from engram.errors import EngramError, TeachError, first_of

if TYPE_CHECKING:
    from engram.editing import Explanation, MemoryEditor

__all__ = [
    "ChatOption",
    "diff_command",
    "facts_command",
    "folder_size",
    "forget_command",
    "merge_command",
    "why_command",
]

_LISTED = 20

MemoryOption = Annotated[Path, typer.Option(help="Folder of a taught memory.")]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Ask the prompt inside the tokenizer's chat template, as a user's turn.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def why_command(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    memory: MemoryOption,
    model: ModelOption = None,
    as_json: JsonOption = False,
    chat: ChatOption = False,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Answer a prompt and show which facts fired at each token.

    For each token: the n-grams found, their rows and gates, their facts, and what they changed.
    """
    from engram.data import chat_prompt

    check_prompt(prompt, "PROMPT")
    editor = open_editor(taught_folder(memory), model, Running(device, model_dtype, allow_other_base))
    if chat:
        prompt = chat_prompt(editor.tokenizer, prompt)
    explanation = editor.why(prompt)
    if as_json:
        print(json.dumps(explanation.to_dict(), ensure_ascii=False, indent=1))
    else:
        _print_explanation(explanation, editor)


def facts_command(
    memory: MemoryOption,
    as_json: JsonOption = False,
    as_yaml: Annotated[
        bool,
        typer.Option(
            "--yaml", help="Print a facts file, to teach the same to another memory (without phrasings under held_out)."
        ),
    ] = False,
) -> None:
    """List a taught memory's facts: ids, prompts, answers, rows.

    Loads no model. Row numbers are in the JSON.
    """
    from engram.data import Fact
    from engram.data.write_facts import facts_yaml
    from engram.editing.merge import StoredMemory

    if as_json and as_yaml:
        raise typer.BadParameter("got --json too, expected one form", param_hint="--yaml")
    stored = StoredMemory(taught_folder(memory))
    if as_yaml:
        told = (Fact(tuple(p.text for p in fact.prompts), fact.answer, fact.category, id=fact.id) for fact in stored.ledger)
        print(facts_yaml(told), end="")
        return
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
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Remove facts and their rows from a taught memory.

    Other facts stay as they were taught; exit code 1 if one of them leant on a removed fact and is not exact any more.
    """
    from engram.checkpoint import lock_store

    memory = taught_folder(memory)
    _require(memory)
    with lock_store(memory):
        editor = open_editor(memory, model, Running(device, model_dtype, allow_other_base))
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
    a: Annotated[Path, typer.Argument(help="First memory.")],
    b: Annotated[Path, typer.Argument(help="Second memory.")],
    as_json: JsonOption = False,
) -> None:
    """Show how two taught memories differ, in facts and in rows.

    Exit code 1 if they differ, 2 if one of them cannot be read.
    """
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
    a: Annotated[Path, typer.Argument(help="First memory.")],
    b: Annotated[Path, typer.Argument(help="Second memory, of the same base model and made with the same seed.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged memory.")],
    prefer: Annotated[
        str | None,
        typer.Option(
            help="In conflicts keep the answer of 'a' or 'b'. Without it conflicts are listed and nothing is written."
        ),
    ] = None,
    model: ModelOption = None,
    verify: Annotated[bool, typer.Option(help="Ask the model every fact of the merged memory before it is written.")] = True,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Merge two taught memories; conflicts are never hidden."""
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
    running = Running(device, model_dtype, allow_other_base)
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
        f"{out}: {report.facts} facts ({report.from_a} from a, {report.from_b} from b), {report.rows} rows, {folder_size(out):,} bytes"
    )


def _require(memory: Path) -> None:
    from engram.checkpoint import read_description

    read_description(memory)  # before anything is made in a folder that holds no memory


def folder_size(memory: Path) -> int:
    """Bytes of all files in a memory's folder."""
    return sum(file.stat().st_size for file in memory.iterdir() if file.is_file())


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
