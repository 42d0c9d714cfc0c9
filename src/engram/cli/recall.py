"""`engram recall`: what a model finds again in long text, with and without a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.loading import AllowOtherBaseOption, DeviceOption, ModelDtypeOption, Running, open_base
from engram.cli.outputs import check_writable, command_line, made_with, print_whole

__all__ = ["recall_command"]

_SHORT = {"model": "none", "without memory": "without", "with memory": "with"}
_LEGEND = """at random: what copying noted numbers at random finds; 95 %: interval of exact;
log p: of the right answer, nats per token; rank: of its tokens, 1 is the likeliest"""


def recall_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model: a folder, a hub name or 'bundled'. Default: the one the memory was made for, else the bundled one."
        ),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(help="Folder of a memory, or 'bundled'; the model is measured with it and without.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Separated by commas: needle (one note), multi_key (one of several), multi_query (all of several), multi_value (all values "
            "of one name), tracking (chains of notes)."
        ),
    ] = "needle,multi_query,tracking",
    lengths: Annotated[str, typer.Option(help="Tokens per text, separated by commas.")] = "256,512",
    examples: Annotated[int, typer.Option(min=1, help="Texts per task and length; notes lie at evenly spaced depths.")] = 64,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts to hide notes in: YAML (kind: [texts]) or a text file (documents separated by lines of <|doc|>); parts of Python's "
            "library if not given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the result.")] = None,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Test whether a model finds notes hidden in long text.

    Reports exact answers, and how likely the right ones were.
    """
    from engram.checkpoint import write_json_atomically
    from engram.data.texts import load_documents
    from engram.evaluation import measure_recall

    asked = _names(tasks)
    tokens = _numbers(lengths)
    check_writable(json_out)
    hidden_in = [text for group in load_documents(texts).values() for text in group] if texts is not None else _library_text()
    running = Running(device, model_dtype, allow_other_base)
    subject, tokenizer = _subject(model, memory, running)

    def measure() -> dict[str, Any]:
        result = measure_recall(subject, tokenizer, hidden_in, asked, tokens, examples, seed)
        result.provenance = _provenance(model, memory, texts, tasks, lengths, examples, seed, running)
        return result.to_dict()

    results = {}
    if memory is None:
        results["model"] = measure()
    else:
        with subject.disable_engram():
            results["without memory"] = measure()
        results["with memory"] = measure()
    _print_table(results)
    if json_out is not None:
        write_json_atomically(json_out, results)


def _print_table(results: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from engram.evaluation import recall_rows

    headings, rows = recall_rows({_SHORT[name]: result for name, result in results.items()})
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("task", "memory") else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    print_whole(table)
    print(_LEGEND)


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _numbers(given: str) -> list[int]:
    try:
        return [int(number) for number in _names(given)]
    except ValueError:
        raise typer.BadParameter(
            f"got {given!r}, expected numbers of tokens separated by commas, such as 256,512", param_hint="--lengths"
        ) from None


def _library_text() -> list[str]:
    from engram.data.corpus import held_out_standard_library

    return [doc.text for doc in held_out_standard_library()]


def _subject(model: str | None, memory: Path | None, running: Running) -> tuple[Any, Any]:
    from engram.models import EngramModel
    from engram.models.bundled_files import memory_folder

    if memory is None:
        return running.load(model or "bundled")
    memory = memory_folder(memory)
    base, tokenizer = open_base(memory, model, running)
    return EngramModel.from_pretrained(base, memory, tokenizer, allow_other_base=running.allow_other_base), tokenizer


def _provenance(
    model: str | None,
    memory: Path | None,
    texts: Path | None,
    tasks: str,
    lengths: str,
    examples: int,
    seed: int,
    running: Running,
) -> dict[str, Any]:
    given = {
        "model": model or None,
        "memory": memory,
        "texts": texts,
        "tasks": tasks,
        "lengths": lengths,
        "examples": examples,
        "seed": seed,
    }
    return {"command": command_line("recall", options=given.items()) + running.options(), **made_with()}
