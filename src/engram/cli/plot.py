"""`engram plot`: pictures of result files, and the report made from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.outputs import check_folder, command_line

if TYPE_CHECKING:
    from engram.plots import Report, ResultFile

__all__ = ["plot_command"]

_RESULTS, _DOCS = Path("results"), Path("docs")


def plot_command(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Result files of engram sweep, bench, corpus, eval, look or recall, or of benchmarks/long_context.py, copying.py, "
            "throughput.py, looks.py, memory_off.py or ngram_baseline.py. Without any: all of results/ that can be drawn, as "
            "docs/pictures, docs/report.md and docs/report.html."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures (needs matplotlib). Default: 'pictures' if files are named.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="File for the report as one self-contained page.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for the report in Markdown, which links the pictures.")] = None,
) -> None:
    """Draw result files, and write the report on them.

    Pictures are like the paper's figures; the report has a verdict on each of the paper's claims.
    """
    from engram.errors import DataError
    from engram.plots import draw_result
    from engram.plots.figure import new_figure

    new_figure(1)  # before anything is read or written: is matplotlib there
    files, command = _read(results), _command(results, out, html, markdown)
    if not results:
        out, html, markdown = out or _DOCS / "pictures", html or _DOCS / "report.html", markdown or _DOCS / "report.md"
    out = out or Path("pictures")
    for folder in (out, *(file.parent for file in (html, markdown) if file is not None)):
        check_folder(folder)
    paper = _paper()
    pictures: dict[str, Any] = {}
    for file in files:
        before = {picture.path: name for name, drawn in pictures.items() for picture in drawn}
        pictures[file.name] = draw_result(file, out, paper)
        for picture in pictures[file.name]:
            if picture.path in before:
                raise DataError(
                    f"{picture.path}: a picture of {before[picture.path]} and of {file.name}; rename one of the result files."
                )
            print(picture.path)
    for file in files:
        if file.is_sweep and not file.data["points"]:
            print(f"{file.name}: no points so far, so nothing was drawn{_kept_aside(file)}")
    if html is not None or markdown is not None:
        _write(_report(files, pictures, command, study=not results), html, markdown)


def _command(results: Sequence[Path] | None, out: Path | None, html: Path | None, markdown: Path | None) -> str:
    """What was typed."""
    options = [("out", out), ("html", html), ("markdown", markdown)]
    return command_line("plot", *map(str, results or ()), options=options)


def _kept_aside(file: ResultFile) -> str:
    aside = len(file.data.get("other_points", ()))
    return f" ({aside} points of another recipe, or not yet of this one, are kept aside in the file)" if aside else ""


def _read(given: Sequence[Path] | None) -> list[ResultFile]:
    from engram.errors import DataError
    from engram.plots import read_result

    paths = list(given or sorted(_RESULTS.glob("*.json")))
    if not paths:
        raise DataError(
            f"no result files: got none, and there are none in {_RESULTS}/ here; name some, or run from the repository."
        )
    read = {path: read_result(path, strict=bool(given)) for path in paths}
    left = [path.name for path, file in read.items() if file is None]
    if left:
        print(f"left out, of no kind that is drawn here: {', '.join(left)}")
    files = [file for file in read.values() if file is not None]
    names = [file.name for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"result files of one name: {', '.join(twice)}; their pictures would overwrite each other, so rename one."
        )
    if not files:
        raise DataError(f"no result in {_RESULTS}/ is of a kind that can be drawn; run engram sweep first, or name files.")
    return files


def _paper() -> dict:
    from engram.experiments.paper import PAPER

    return PAPER


def _report(files: Sequence[ResultFile], pictures: dict, command: str, study: bool) -> Report:
    from engram.experiments.claims import judge
    from engram.plots import Report, group_results
    from engram.plots.results import reading

    with reading("one of the results"):
        verdicts = judge(group_results(files))
    return Report(files, pictures, verdicts, _paper(), command, study)


def _write(report: Report, html: Path | None, markdown: Path | None) -> None:
    from engram.checkpoint import write_text_atomically
    from engram.plots import render_page

    if markdown is not None:
        folder = markdown.parent

        def link(path: Path) -> str:
            return f"<{Path(os.path.relpath(path, folder)).as_posix()}>"

        write_text_atomically(markdown, report.markdown(link))
        print(markdown)
    if html is not None:
        write_text_atomically(html, render_page(report.markdown))
        print(html)
