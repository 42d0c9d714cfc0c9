"""`engram look`: looks inside a model and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.loading import AllowOtherBaseOption, DeviceOption, ModelDtypeOption, Running, open_memory
from engram.cli.outputs import check_folder, check_writable, command_line, made_with, new_console

if TYPE_CHECKING:
    from engram.analysis import Subject
    from engram.data.store import TokenStore

__all__ = ["look_command"]

_WHAT = "gates, phrases, logit_lens, cka, memory_off, rows, zipf, gains"


def look_command(
    memory: Annotated[
        Path | None,
        typer.Argument(
            help="A saved memory, 'bundled', or a run folder with 'model' and 'memory' in it; without it only the model is looked at."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for look.json, pictures and look.html (needs matplotlib).")] = Path("look"),
    model: Annotated[
        str | None,
        typer.Option(help="Model: a folder, a hub name or 'bundled'. Default: the one the memory was made for."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="YAML (kind: [texts]), a text file (documents separated by lines of <|doc|>), .jsonl, or a token store (a run's 'data'), "
            "whose held-out text is read. If not given: a run's own held-out text, or held-out texts of several kinds."
        ),
    ] = None,
    what: Annotated[str | None, typer.Option(help=f"Some of {_WHAT}, separated by commas. Default: all that apply.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A second model of the same tokenizer, for logit_lens and cka: a folder, a hub name, 'bundled' or a run folder."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of text run through the models.")] = 6000,
    row_tokens: Annotated[int, typer.Option(min=16, help="Tokens of text that are only hashed, for rows and zipf.")] = 60_000,
    length: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 128,
    phrases: Annotated[
        Path | None,
        typer.Option(help="Text file with a name or phrase on each line, to see whether gates open where they end."),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")] = None,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Draw and measure what a memory does inside a model.

    Gates, ends of phrases, logit lens, similarity of layers, memory off, rows, caches, n-grams: one page, pictures and JSON.
    """
    from engram.analysis import ANALYSES, look
    from engram.checkpoint import write_json_atomically, write_text_atomically
    from engram.data.phrases import read_phrases
    from engram.plots import plot_look, render_look
    from engram.plots.figure import new_figure

    new_figure(1)  # before minutes of work: is matplotlib there
    check_folder(out)
    for file in (json_out, out / "look.json", out / "look.html"):
        check_writable(file)
    names = None if what is None else [name.strip() for name in what.split(",") if name.strip()]
    unknown = [name for name in names or () if name not in ANALYSES]
    if unknown or names == []:
        raise typer.BadParameter(f"got {', '.join(unknown) or 'nothing'}, expected some of {_WHAT}", param_hint="--what")
    if phrases is not None and names is not None and "phrases" not in names:
        raise typer.BadParameter("got a file that --what does not ask for, expected 'phrases' in it", param_hint="--phrases")
    wanted = None if phrases is None else read_phrases(phrases)
    read, source = _read(texts, (memory, model), max(tokens, row_tokens), length)
    running = Running(device, model_dtype, allow_other_base)
    subject, tokenizer = _open(memory, model, running)
    second = None if against is None else _open_second(against, running)
    with _bars() as start:
        result = look(subject, tokenizer, read, names, second, tokens, row_tokens, length, start, wanted)
    result["texts"] = source
    result["provenance"] = _provenance(memory, model, texts, what, against, phrases, tokens, row_tokens, length, running)
    for file in (out / "look.json", json_out):
        if file is not None:
            write_json_atomically(file, result)
    page = out / "look.html"
    write_text_atomically(page, render_look(result, plot_look(result, out)))
    capped = "" if result["text"]["complete"] else " (a part of the text; --tokens takes more)"
    print(f"looked at {result['text']['tokens']:,} tokens of {source}{capped}: {page}")
    for name, reason in result["skipped"].items():
        print(f"left out: {name}: {reason}")


def _read(
    texts: Path | None, looked_at: Sequence[Path | str | None], tokens: int, length: int
) -> tuple[dict[str, list[str]], str]:
    """Texts by kind, and what to call them: those named, else the held-out text of the run that is looked at, else standard texts."""
    from engram.data.store import STORE_NAME, TokenStore
    from engram.data.texts import held_out_texts, load_documents, standard_texts
    from engram.errors import DataError

    if texts is not None and not (texts / STORE_NAME).is_file():
        return load_documents(texts), texts.name
    store = _store_of_run(looked_at) if texts is None else TokenStore(texts)
    if store is None:
        return standard_texts(), "standard texts"
    found = held_out_texts(store, tokens, length)
    if not found:
        raise DataError(f"{store.folder} holds no text out; expected a token store with held-out documents, or other --texts.")
    return found, f"held-out text of {store.folder}"


def _store_of_run(looked_at: Sequence[Path | str | None]) -> TokenStore | None:
    """The token store of the first run folder among what is looked at (a run, or 'memory' or 'model' in one), if it holds text of the
    user's own out. Runs on the standard library read the standard texts, most of which are held out there too.
    """
    from engram.data.store import STORE_NAME, TokenStore
    from engram.models.bundled_files import BUNDLED_NAME

    for name in looked_at:
        if name is None or str(name) == BUNDLED_NAME:
            continue
        folder = Path(name)
        run = folder.parent if folder.name in ("memory", "model") else folder
        if (run / "data" / STORE_NAME).is_file():
            store = TokenStore(run / "data")
            is_standard = store.description["identity"].get("recipe", {}).get("standard_library")
            return None if is_standard or not len(store.split("held_out")) else store
    return None


def _open(memory: Path | None, model: str | None, running: Running) -> tuple[Subject, Any]:
    """The model to look at, with its memory if one is given, and its tokenizer."""
    from engram.analysis import Subject
    from engram.models.bundled_files import memory_folder

    if memory is None:
        return _open_second(model or "bundled", running)
    memory = memory_folder(memory)
    attached, tokenizer = open_memory(memory, model, running)
    return Subject(_short(memory), attached.eval()), tokenizer


def _open_second(name: str, running: Running) -> tuple[Subject, Any]:
    """A model by name, or that of a run folder with the memory that was trained with it."""
    from engram.analysis import Subject
    from engram.checkpoint import DESCRIPTION_NAME
    from engram.models import EngramModel

    run = Path(name)
    if not (run / "model" / "config.json").is_file():
        base, tokenizer = running.load(name)
        return Subject(_short(run), base), tokenizer
    base, tokenizer = running.load(str(run / "model"))
    if not (run / "memory" / DESCRIPTION_NAME).is_file():
        return Subject(_short(run), base), tokenizer
    memory = EngramModel.from_pretrained(base, run / "memory", tokenizer, allow_other_base=running.allow_other_base)
    return Subject(_short(run), memory.eval()), tokenizer


def _short(folder: Path) -> str:
    """What to call a model: the last folder, or of ``run/memory`` and ``run/model`` the run."""
    return folder.parent.name if folder.name in ("memory", "model") and folder.parent.name else folder.name


@contextmanager
def _bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Progress on standard error: one bar per analysis, in tokens."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=new_console(stderr=True)) as progress:

        def start(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.advance(task, done)

        yield start


def _provenance(
    memory: Path | None,
    model: str | None,
    texts: Path | None,
    what: str | None,
    against: str | None,
    phrases: Path | None,
    tokens: int,
    row_tokens: int,
    length: int,
    running: Running,
) -> dict[str, Any]:
    options = {"model": model, "texts": texts, "what": what, "against": against, "phrases": phrases}
    sizes = {"tokens": tokens, "row-tokens": row_tokens, "length": length}
    words = ["look"] if memory is None else ["look", str(memory)]
    return {"command": command_line(*words, options=(options | sizes).items()) + running.options(), **made_with()}
