"""`engram eval`: what a memory knows, harms and costs, as one JSON result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram.cli.loading import (
    AllowOtherBaseOption,
    DeviceOption,
    ModelDtypeOption,
    ModelOption,
    Running,
    open_editor,
    taught_folder,
)
from engram.cli.outputs import check_writable, command_line, made_with, more_bar, new_console

__all__ = ["eval_command"]

_BUNDLED = Path(__file__).parent.parent / "bundled"
_HELD_OUT_CHARACTERS = 60_000


def eval_command(
    memory: Annotated[Path, typer.Option(help="Folder of a taught memory (for a trained one: `engram look`).")],
    facts: Annotated[Path, typer.Option(help="Facts to ask (YAML); phrasings under held_out are reported separately.")],
    json_out: Annotated[Path | None, typer.Option("--json", help="File for the result.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for the tables in Markdown.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures (needs matplotlib).")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Unrelated texts, on which harm is measured (YAML, kind: [texts]). Default: the bundled ones."),
    ] = None,
    model: ModelOption = None,
    route: Annotated[bool, typer.Option("--route", help="Let the routing rules decide which prompts read the memory.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask every prompt inside the tokenizer's chat template too, as a user's turn.")
    ] = False,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Measure a taught memory: recall, harm, latency, size."""
    from rich.markdown import Markdown

    from engram.checkpoint import write_json_atomically, write_text_atomically
    from engram.data import load_facts, with_chat_prompts
    from engram.data.corpus import held_out_standard_library
    from engram.data.texts import load_texts
    from engram.evaluation import evaluate_memory, markdown_table
    from engram.models import EngramRouter

    for file in (json_out, markdown):
        check_writable(file)
    asked = load_facts(facts)
    other = load_texts(texts or _BUNDLED / "none_of_its_business.yaml")
    running = Running(device, model_dtype, allow_other_base)
    editor = open_editor(taught_folder(memory), model, running)
    if chat:
        asked = with_chat_prompts(editor.tokenizer, asked)
    bundled = editor.memory.config.name_or_path == "bundled"
    held_out = [doc.text[:1500] for doc in held_out_standard_library()] if bundled else []
    with more_bar("asking", sum(len(fact.prompts) + len(fact.held_out) for fact in asked)) as answered:
        result = evaluate_memory(
            editor.memory,
            editor.tokenizer,
            asked,
            other,
            held_out[: _HELD_OUT_CHARACTERS // 1500],
            load_facts(_BUNDLED / "capitals.yaml") if bundled else (),
            EngramRouter.from_yaml() if route else None,
            answered,
        )
    given = {"memory": memory, "facts": facts, "texts": texts, "model": model, "route": route, "chat": chat}
    result.provenance = {"command": command_line("eval", options=given.items()) + running.options(), **made_with()}
    fields = result.to_dict()
    new_console().print(Markdown(markdown_table(fields)))
    if json_out is not None:
        write_json_atomically(json_out, fields)
    if markdown is not None:
        write_text_atomically(markdown, markdown_table(fields))
    if plots is not None:
        from engram.plots import plot_evaluation

        plot_evaluation({memory.name: fields}, plots)
