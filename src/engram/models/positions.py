"""How much text a model takes."""

from __future__ import annotations

from typing import Any

__all__ = ["context_length", "last_position", "text_config", "within_context"]

_NAMES = ("max_position_embeddings", "n_positions")


def context_length(config: Any) -> int | None:
    """Positions that a model was made for; None if it does not say.

    Args:
        config: of the model; of one that takes more than text, the text part counts.
    """
    text = text_config(config)
    return next((found for name in _NAMES if isinstance(found := getattr(text, name, None), int)), None)


def last_position(config: Any) -> int | None:
    """Tokens beyond which the model fails, having learnt a vector for each position; None where it can go on, however well.

    Args:
        config: of the model.
    """
    return None if getattr(text_config(config), "rope_parameters", None) else context_length(config)


def within_context(config: Any, tokens: int) -> int:
    """``tokens``, or the positions that the model was made for if those are fewer."""
    return min(tokens, context_length(config) or tokens)


def text_config(config: Any) -> Any:
    """The part of a model's config that is about text: of a model that takes pictures too, a config inside it; else the config itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
