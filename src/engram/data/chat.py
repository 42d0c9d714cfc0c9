"""Prompts as a chat model is asked them: inside its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engram.data.facts import Fact, quoted
from engram.errors import DataError

__all__ = ["chat_prompt", "with_chat_prompts"]


def chat_prompt(tokenizer: Any, prompt: str) -> str:
    """The text a model sees when a user says ``prompt`` as the first turn, up to where its answer begins.

    Raises:
        DataError: the tokenizer has no chat template, or one that leaves the prompt out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("this tokenizer has no chat template; teach and ask plain prompts, or use a chat model's tokenizer.")
    # Templates of models that take pictures may read content in parts alone, and leave plain text out without a word.
    forms: list[Any] = [prompt, [{"type": "text", "text": prompt}]]
    rendered = (_rendered(tokenizer, content) for content in forms)
    text = next((found for found in rendered if found is not None and prompt.strip() in found), None)
    if text is None:
        raise DataError(
            f"the tokenizer's chat template leaves the prompt {quoted(prompt)} out of what the model reads, or changes it; expected one that "
            "has the user's text in it. Teach and ask the rendered text as plain prompts."
        )
    opening = tokenizer.bos_token
    adds_it = opening is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(opening) if adds_it else text  # prompts are tokenised with the opening token in front


def _rendered(tokenizer: Any, content: Any) -> str | None:
    """A first turn of the user's; None where the template cannot make it of such content."""
    try:
        return str(
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        )
    except Exception:  # whatever a template's own code makes of content that it was not written for
        return None


def with_chat_prompts(tokenizer: Any, facts: Sequence[Fact]) -> list[Fact]:
    """The facts with every prompt a second time, as a chat turn (held-out phrasings too). Prompts that are there as chat turns already, as in
    what ``engram facts --yaml`` writes of such a memory, are left as they are.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    return [
        replace(fact, prompts=_and_rendered(tokenizer, fact.prompts), held_out=_and_rendered(tokenizer, fact.held_out))
        for fact in facts
    ]


def _and_rendered(tokenizer: Any, prompts: Sequence[str]) -> tuple[str, ...]:
    rendered = {prompt: chat_prompt(tokenizer, prompt) for prompt in prompts}
    turns = set(rendered.values())
    return (*prompts, *(turn for prompt, turn in rendered.items() if prompt not in turns and turn not in rendered))
