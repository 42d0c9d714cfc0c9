"""`engram corpus`: a token store from a recipe, and what is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.outputs import check_writable, command_line, made_with, new_console, print_whole

if TYPE_CHECKING:
    from engram.data.contamination import Contamination
    from engram.data.store import TokenStore

__all__ = ["corpus_command", "corpus_progress"]

_LISTED = 5


def corpus_command(
    recipe: Annotated[
        Path,
        typer.Argument(help="YAML recipe of a corpus, a run or a sweep; 'engram recipe' writes one."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the token store; one made from the same recipe, tokenizer and files is used again.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer: a folder or hub name. Default: the bundled one, unless --vocab-size is given."),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Train a tokenizer with this many tokens on the corpus.")] = None,
    contamination: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Count how many held-out n-grams of this many tokens occur in the training text too; may be repeated. Default: 13.",
        ),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for counts and contamination.")] = None,
) -> None:
    """Turn text files into a token store to train on.

    Text is deduplicated, split by file and counted, and the held-out part is checked for contamination.
    """
    from engram.checkpoint import write_json_atomically
    from engram.data.contamination import measure_contamination
    from engram.data.recipe import read_corpus_recipe

    if tokenizer is not None and vocab_size is not None:
        raise typer.BadParameter("--tokenizer and --vocab-size exclude each other: take a tokenizer or train one")
    check_writable(json_out)
    read = read_corpus_recipe(recipe)
    with corpus_progress() as show:
        store = _store(read, recipe.parent, out, tokenizer, vocab_size, show)
        found = [measure_contamination(store, n, _named(show, f"{n}-grams")) for n in contamination or [13]]
    compression = _compression(store)
    _print_counts(store)
    _print_compression(compression)
    for entry in found:
        _print_contamination(entry)
    if json_out is not None:
        fields = {
            name: store.description[name] for name in ("counts", "duplicates", "skipped_files", "vocab_size", "fingerprint")
        }
        for name in ("installed", "skipped_names"):  # stores of earlier versions do not say
            fields[name] = store.description.get(name, {})
        given = [
            ("tokenizer", tokenizer),
            ("vocab-size", vocab_size),
            *(("contamination", n) for n in contamination or ()),
            ("json", json_out),
        ]
        command = command_line("corpus", str(recipe), "--out", "STORE", options=given)
        counted = {"contamination": [entry.to_dict() for entry in found]}
        write_json_atomically(json_out, {"command": command, **made_with(), **fields, "compression": compression, **counted})


def _store(
    recipe: Any, folder: Path, out: Path, tokenizer: str | None, vocab_size: int | None, show: Callable[[str, int, int], None]
) -> TokenStore:
    if vocab_size is not None:
        from engram.training.token_store import prepare_store

        return prepare_store(recipe, folder, out, vocab_size, show)
    from engram.data.store import build_store
    from engram.models.bundled import load_tokenizer
    from engram.models.bundled_files import BUNDLED_NAME

    return build_store(recipe, load_tokenizer(tokenizer or BUNDLED_NAME), folder, out, _named(show, "tokens"))


def _compression(store: TokenStore) -> dict[str, Any]:
    """How far canonical ids shrink the vocabulary, and which of them most tokens share."""
    from engram.hashing import CompressedTokenizer
    from engram.models.bundled import load_tokenizer

    tokenizer = load_tokenizer(str(store.folder / "tokenizer"))
    compressed = CompressedTokenizer(tokenizer)
    largest = [{"text": text, "tokens": tokens} for text, tokens in compressed.largest_classes(tokenizer)]
    ids = len(compressed.lookup_table)
    return {"ids": ids, "canonical_ids": len(compressed), "reduction": compressed.reduction, "largest": largest}


def _print_compression(found: dict[str, Any]) -> None:
    largest = ", ".join(f"{entry['text']!r} {entry['tokens']}" for entry in found["largest"])
    print(
        f"compression: {found['ids']:,} token ids, {found['canonical_ids']:,} canonical ones ({100 * found['reduction']:.1f} % fewer); "
        f"most tokens share {largest}"
    )


def _named(show: Callable[[str, int, int], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: show(what, done, total)


@contextmanager
def corpus_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars with a rate on standard error, one per pass; called with (pass, done, in all)."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeRemainingColumn(), console=new_console(stderr=True)) as bar:

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, rate="")
            task = bar.tasks[tasks[what]]
            speed = task.finished_speed or task.speed
            unit = "tokens" if what.endswith("grams") else "B"
            rate = "" if speed is None else f"{speed / 1e6:.1f} M{unit if unit == 'B' else ' tokens'}/s"
            bar.update(tasks[what], completed=done, total=total, rate=rate)

        yield show


def _print_counts(store: TokenStore) -> None:
    from rich.table import Table

    table = Table(title=f"{store.folder}: vocabulary of {store.vocab_size:,}", title_justify="left")
    for heading in ("split", "kind", "documents", "bytes", "tokens", "bytes/token"):
        table.add_column(heading, justify="left" if heading in ("split", "kind") else "right")
    for split, kinds in store.counts.items():
        whole = {name: sum(sizes[name] for sizes in kinds.values()) for name in ("documents", "bytes", "tokens")}
        for kind, sizes in [*kinds.items(), ("all", whole)]:
            numbers = [f"{sizes[name]:,}" for name in ("documents", "bytes", "tokens")]
            table.add_row(split, kind, *numbers, f"{sizes['bytes'] / sizes['tokens']:.2f}" if sizes["tokens"] else "")
    print_whole(table)
    removed = store.description["duplicates"]
    print(f"duplicates left out: {removed['exact']:,} exact, {removed['near']:,} near")
    if store.left_out:
        print("files left out: " + ", ".join(store.left_out))


def _print_contamination(entry: Contamination) -> None:
    fields = entry.to_dict(_LISTED)
    kinds = ", ".join(f"{kind} {100 * share:.2f} %" for kind, share in fields["share_by_kind"].items())
    print(
        f"contamination: {100 * fields['share']:.2f} % of {fields['ngrams']:,} held-out {entry.n}-grams occur in the training text"
        + (f" ({kinds})" if kinds else "")
    )
    for worst in fields["most_contaminated"]:
        print(f"  {100 * worst['share']:5.1f} % of {worst['ngrams']:,} in {worst['document']}")
