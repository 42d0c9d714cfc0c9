"""Conditional routing: which prompts may read the memory at all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import yaml
from torch import Tensor

from engram.errors import ConfigError

__all__ = ["DEFAULT_RULES", "EngramRouter", "LearnedRouter", "RouteRule", "Router"]

DEFAULT_RULES = Path(__file__).parent.parent / "bundled" / "routing.yaml"


class Router(Protocol):
    """Anything that scores prompts."""

    threshold: float

    def scores(self, prompts: Sequence[str]) -> list[float]:
        """A score in [0, 1] for every prompt."""
        ...


@dataclass(frozen=True)
class RouteRule:
    """A pattern and the score of prompts in which it is found."""

    name: str
    pattern: str
    score: float


class EngramRouter:
    """Scores prompts by rules: the first rule whose pattern is found decides.

    Args:
        rules: tried in order.
        otherwise: score of prompts that no rule fits.
        threshold: from this score on a prompt reads the memory.

    Raises:
        ConfigError: a pattern is no regular expression, or a score is outside [0, 1].
    """

    def __init__(self, rules: Sequence[RouteRule], otherwise: float = 0.0, threshold: float = 0.5) -> None:
        for name, score in [("otherwise", otherwise), ("threshold", threshold), *((rule.name, rule.score) for rule in rules)]:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
                raise ConfigError(f"EngramRouter, {name}: got score {score!r}, expected a number from 0 to 1.")
        try:
            self._patterns = [re.compile(rule.pattern) for rule in rules]
        except (re.error, TypeError) as error:
            raise ConfigError(f"EngramRouter: a pattern is not a regular expression: {error}.") from error
        self.rules, self.otherwise, self.threshold = list(rules), float(otherwise), float(threshold)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str] = DEFAULT_RULES) -> Self:
        """Read rules from a file like ``bundled/routing.yaml``.

        Raises:
            ConfigError: the file is missing or malformed.
        """
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read routing rules {path}: {' '.join(str(error).split())}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("rules"), list):
            raise ConfigError(f"{path}: expected a mapping with 'rules', a list of {{name, pattern, score}}.")
        unknown = sorted(str(key) for key in set(fields) - {"rules", "otherwise", "threshold"})
        if unknown:
            raise ConfigError(f"{path}: unknown key(s) {', '.join(unknown)}; expected rules, otherwise, threshold.")
        try:
            rules = [RouteRule(**rule) for rule in fields["rules"]]
        except TypeError as error:
            raise ConfigError(f"{path}: a rule needs exactly name, pattern and score ({error}).") from None
        return cls(rules, fields.get("otherwise", 0.0), fields.get("threshold", 0.5))

    def score(self, prompt: str) -> float:
        """Score of one prompt, 0 to 1."""
        return next((rule.score for rule, found in zip(self.rules, self._patterns) if found.search(prompt)), self.otherwise)

    def scores(self, prompts: Sequence[str]) -> list[float]:
        """Score of every prompt."""
        return [self.score(prompt) for prompt in prompts]


class LearnedRouter:
    """Scores prompts by logistic regression on the base model's hidden states: the mean over a prompt's tokens, standardised.

    Made by ``fit`` from prompts that should read the memory and prompts that should not.
    """

    def __init__(
        self, model: Any, tokenizer: Any, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, threshold: float
    ) -> None:
        self.model, self.tokenizer, self.threshold = model, tokenizer, threshold
        self.mean, self.scale, self.weight, self.bias = mean, scale, weight, bias

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        routed: Sequence[str],
        bypassed: Sequence[str],
        l2: float = 1e-2,
        threshold: float = 0.5,
    ) -> Self:
        """Fit the regression (L-BFGS on the regularised log loss; both kinds of prompts weigh the same).

        Args:
            model: a causal language model, with or without a memory (which is not read here).
            tokenizer: its tokenizer.
            routed: prompts that should read the memory.
            bypassed: prompts that should not.
            l2: weight of the penalty on the squared coefficients.
            threshold: from this score on a prompt reads the memory.

        Raises:
            ConfigError: one of the two lists is empty.
        """
        if not routed or not bypassed:
            raise ConfigError(
                f"LearnedRouter.fit: got {len(routed)} routed and {len(bypassed)} bypassed prompts, expected some of both."
            )
        states = _mean_states(model, tokenizer, [*routed, *bypassed])
        label = torch.tensor([1.0] * len(routed) + [0.0] * len(bypassed))
        share = torch.where(label == 1, 0.5 / len(routed), 0.5 / len(bypassed))
        mean, scale = states.mean(0), states.std(0).clamp_min(1e-6)
        x = (states - mean) / scale
        weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = x @ weight + bias
            value = (share * torch.nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="none")).sum()
            value = value + l2 * weight.square().mean()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return cls(model, tokenizer, mean, scale, weight.detach(), bias.detach(), threshold)

    def scores(self, prompts: Sequence[str]) -> list[float]:
        """Score of every prompt, 0 to 1."""
        if not prompts:
            return []
        states = _mean_states(self.model, self.tokenizer, prompts)
        return ((states - self.mean) / self.scale @ self.weight + self.bias).sigmoid().tolist()


@torch.no_grad()
def _mean_states(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Mean over the tokens of the last hidden state, float32 ``[prompts, d]``, computed without the memory."""
    from contextlib import nullcontext

    device = model.get_input_embeddings().weight.device
    states = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], device=device)
        with model.disable_engram() if hasattr(model, "disable_engram") else nullcontext():
            output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        last = output.hidden_states[-1][0].float()
        states.append(last.reshape(last.shape[0], -1).mean(0).cpu())
    return torch.stack(states)
