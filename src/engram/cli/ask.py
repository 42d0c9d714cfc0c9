"""`engram ask`: prompts in, answers out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.knowledge import ChatOption
from engram.cli.loading import (
    AllowOtherBaseOption,
    DeviceOption,
    ModelDtypeOption,
    ModelOption,
    Running,
    open_editor,
    open_memory,
)
from engram.cli.outputs import check_prompt, is_terminal, more_bar

if TYPE_CHECKING:
    from engram.editing import LedgerFact
    from engram.models import EngramModel, Router

__all__ = ["ask_command"]

_ANSWER_TOKENS = 64
_STANDARD_INPUT = "-"


def ask_command(
    prompts: Annotated[list[str], typer.Argument(help="What to ask; '-' reads prompts from standard input, one per line.")],
    memory: Annotated[Path, typer.Option(help="Folder of the memory, taught or trained, or 'bundled'.")],
    model: ModelOption = None,
    off: Annotated[bool, typer.Option("--off", help="Ask the base model, memory switched off.")] = False,
    route: Annotated[bool, typer.Option("--route", help="Read the memory only if the routing rules say so.")] = False,
    rules: Annotated[
        Path | None, typer.Option(help="Routing rules (YAML) in place of the bundled ones; implies --route.")
    ] = None,
    router: Annotated[
        Path | None, typer.Option(help="Let this router decide (a file that `engram route` wrote) instead of rules.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens. Default: 64, or the length of the longest fact.")
    ] = None,
    chat: ChatOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of prompts and answers.")] = False,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    r"""Answer prompts with a model and its memory.

    Prints the answer and nothing else. Several prompts get a line each, in their order; a line break in an answer is shown there as \n.
    """
    from engram.data import chat_prompt
    from engram.editing.ledger import answer_room
    from engram.models import EngramRouter, LearnedRouter

    wanted = _wanted(prompts)
    if router is not None and (route or rules is not None):
        raise typer.BadParameter("got rules too, expected one way to decide", param_hint="--router")
    if off and (route or rules is not None or router is not None):
        raise typer.BadParameter(
            "got a way to decide when the memory is read too (--route, --rules or --router), expected it to be off, or routed",
            param_hint="--off",
        )
    decides: Router | None = EngramRouter.from_yaml(rules) if route or rules else None
    asked, tokenizer, facts = _to_ask(memory, model, Running(device, model_dtype, allow_other_base))
    if router is not None:
        decides = LearnedRouter.load(router, asked, tokenizer, allow_other_base)
    texts = [chat_prompt(tokenizer, prompt) for prompt in wanted] if chat else wanted
    longest = answer_room(facts, _ANSWER_TOKENS) if max_new_tokens is None else max_new_tokens
    with asked.disable_engram() if off else nullcontext():
        answers = _answers(asked, tokenizer, texts, longest, decides)
    if as_json:
        entries = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(wanted, answers)]
        print(json.dumps(entries, ensure_ascii=False, indent=1))
    elif len(prompts) > 1 or prompts == [_STANDARD_INPUT]:
        print("\n".join("\\n".join(answer.splitlines()) for answer in answers))
    else:
        print(answers[0])


def _wanted(prompts: Sequence[str]) -> list[str]:
    """The prompts of a command line; in the place of a '-' those of standard input."""
    wanted: list[str] = []
    for prompt in prompts:
        if prompt == _STANDARD_INPUT:
            wanted += _lines()
        else:
            check_prompt(prompt, "PROMPTS")
            wanted.append(prompt)
    if not wanted:
        raise typer.BadParameter("got no prompt from standard input, expected one a line", param_hint="PROMPTS")
    return wanted


def _lines() -> list[str]:
    """What standard input holds, line by line; of nothing there are none."""
    if sys.stdin is None:
        return []
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise typer.BadParameter(
            "got bytes that are not UTF-8 from standard input, expected text", param_hint="PROMPTS"
        ) from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    for number, line in enumerate(lines, 1):
        check_prompt(line, f"line {number} of standard input")
    return lines


def _answers(memory: EngramModel, tokenizer: Any, prompts: list[str], longest: int, router: Router | None) -> list[str]:
    """Answers of at most ``longest`` tokens; prompts with less room than that in the model's context are asked apart."""
    from engram.evaluation import ask

    limits = [min(longest, _room(memory, tokenizer, prompt)) for prompt in prompts]
    answers = [""] * len(prompts)
    with more_bar("asking", len(prompts)) if len(prompts) > 1 and is_terminal(sys.stderr) else nullcontext() as count:
        for limit in sorted(set(limits)):
            members = [i for i, own in enumerate(limits) if own == limit]
            said = ask(memory, tokenizer, [prompts[i] for i in members], limit, progress=count, router=router)
            for i, answer in zip(members, said):
                answers[i] = answer
    return answers


def _to_ask(memory: Path, model: str | None, running: Running) -> tuple[EngramModel, Any, list[LedgerFact]]:
    """A saved memory, taught or trained, on its base model; its tokenizer, and the facts that it was taught."""
    from engram.checkpoint import read_description
    from engram.models.bundled_files import memory_folder

    folder = memory_folder(memory)
    if read_description(folder)["engram_config"].get("verify_rows"):
        editor = open_editor(folder, model, running)
        return editor.memory, editor.tokenizer, editor.facts
    return *open_memory(folder, model, running), []


def _room(memory: EngramModel, tokenizer: Any, prompt: str) -> int:
    """Tokens that an answer may have."""
    from engram.data.facts import room_before, tokenize_prompt
    from engram.models.positions import context_length

    return room_before(context_length(memory.config), len(tokenize_prompt(tokenizer, prompt)), prompt)
