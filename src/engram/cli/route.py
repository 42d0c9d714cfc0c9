"""`engram route`: a router that lets texts read a memory as far as it helps them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engram.cli.loading import AllowOtherBaseOption, DeviceOption, ModelDtypeOption, ModelOption, Running, open_memory
from engram.cli.outputs import check_writable, command_line, made_with, print_whole

if TYPE_CHECKING:
    from engram.evaluation import RoutedKind

__all__ = ["route_command"]


def route_command(
    memory: Annotated[Path, typer.Argument(help="Folder of the memory, or 'bundled'.")],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Texts of the kinds that the model will see: a file per kind (documents separated by lines of <|doc|>), or YAML "
            "(kind: [texts]); two texts of each kind at least. Default: code and manual pages of Python's library, prose, stories, "
            "sentences of facts."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the router; without it the router is only judged.")] = None,
    first_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text that the router looks at.")] = 64,
    model: ModelOption = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Fit a router that decides which texts read a memory.

    It learns from how much each text gains by reading the memory, and is judged on texts left out of the fit.
    """
    from engram.checkpoint import write_json_atomically
    from engram.data.texts import load_documents, standard_texts
    from engram.evaluation import fit_router_to_texts
    from engram.models.bundled_files import memory_folder

    for file in (out, json_out):
        check_writable(file)
    kinds: dict[str, list[str]] = {}
    for path in texts or []:
        for kind, group in load_documents(path).items():
            kinds.setdefault(kind, []).extend(group)
    running = Running(device, model_dtype, allow_other_base)
    with_memory, tokenizer = open_memory(memory_folder(memory), model, running)
    router, judged = fit_router_to_texts(with_memory, tokenizer, kinds or standard_texts(), first_tokens)
    if out is not None:
        router.save(out)
    _print(judged)
    if out is not None:
        print(f"{out}: reads texts as far as the memory helps them; `LearnedRouter.load`, or `engram ask --router`")
    if json_out is not None:
        named, options = (memory, *(texts or [])), (("first-tokens", first_tokens), ("model", model))
        command = command_line("route", *map(str, named), options=options) + running.options()
        write_json_atomically(json_out, {"command": command, **made_with(), "kinds": [asdict(kind) for kind in judged]})


def _print(judged: list[RoutedKind]) -> None:
    from rich.table import Table

    table = Table(title="gain over the model alone, nats per token, on texts left out of the fit")
    for heading in ("kind", "texts", "read it", "always read", "routed", "best"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind in judged:
        gains = (f"{gain:+.3f}" for gain in (kind.always, kind.routed, kind.best))
        table.add_row(kind.kind, str(kind.texts), str(kind.read), *gains)
    print_whole(table)
