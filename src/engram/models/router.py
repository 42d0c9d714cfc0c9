"""Conditional routing: which prompts may read the memory at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engram.checkpoint import write_atomically
from engram.errors import CheckpointError, ConfigError, FingerprintError
from engram.models.base_check import ALLOWED, only_weights_differ
from engram.models.devices import input_device
from engram.models.identity import base_identity, identity_mismatch
from engram.models.mode import evaluation_mode
from engram.models.positions import context_length, text_config
from engram.yaml_text import parse_yaml

__all__ = ["EngramRouter", "LearnedRouter", "RouteRule", "Router"]

_BUNDLED_RULES = Path(__file__).parent.parent / "bundled" / "routing.yaml"


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


def _compiled(rule: RouteRule) -> re.Pattern[str]:
    if not isinstance(rule.pattern, str):
        raise ConfigError(
            f"EngramRouter, {rule.name}: got pattern {rule.pattern!r}, expected a regular expression as text (in YAML put it in quotes)."
        )
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        raise ConfigError(f"EngramRouter, {rule.name}: {rule.pattern!r} is not a regular expression: {error}.") from error


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
        self._patterns = [_compiled(rule) for rule in rules]
        self.rules, self.otherwise, self.threshold = list(rules), float(otherwise), float(threshold)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rules={len(self.rules)}, otherwise={self.otherwise:g}, threshold={self.threshold:g})"

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str] | None = None) -> Self:
        """Read rules from a file.

        Args:
            path: YAML with ``rules`` (a list of ``{name, pattern, score}``), ``otherwise`` and ``threshold``; the rules that ship with engram
                (``engram/bundled/routing.yaml``) if not given.

        Raises:
            ConfigError: the file is missing or malformed.
        """
        path = _BUNDLED_RULES if path is None else path
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read routing rules {path}: {' '.join(str(error).split())}") from None
        fields = parse_yaml(text, f"routing rules {path}", ConfigError)
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

    Made by ``fit`` from prompts that should read the memory and prompts that should not, or by ``fit_to_gains`` from what reading it is
    worth. ``first_tokens`` is how much of a prompt it looks at; None is all of it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor,
        threshold: float,
        first_tokens: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.threshold, self.first_tokens = model, tokenizer, threshold, first_tokens
        self.mean, self.scale, self.weight, self.bias = mean, scale, weight, bias

    def __repr__(self) -> str:
        read = f"width={len(self.weight)}, first_tokens={self.first_tokens}"
        return f"{type(self).__name__}({read}, threshold={self.threshold:g})"

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
        return cls(model, tokenizer, *_regression(states, label, l2), threshold)

    @classmethod
    def fit_to_gains(
        cls,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        gains: Sequence[float],
        first_tokens: int | None = 64,
        strengths: Sequence[float] = (1e-2, 1.0, 1e2, 1e3),
        folds: int = 5,
    ) -> Self:
        """Fit to what reading the memory is worth: prompts with a gain above zero should read it, the others should not.

        The penalty is the one that keeps most of the gains of prompts left out of the fit (every ``folds``-th in turn); of equals the
        largest.

        Args:
            model: a causal language model, with or without a memory (which is not read here).
            tokenizer: its tokenizer.
            prompts: texts of every kind that the model will see.
            gains: of each, loss without the memory less loss with it (``engram.evaluation.measure_gains``).
            first_tokens: how much of a prompt the router looks at, here and later.
            strengths: penalties to choose from, see ``fit``.
            folds: parts for the choice.

        Raises:
            ConfigError: numbers of prompts and gains differ, a gain is not finite, or all prompts should do the same.
        """
        if len(prompts) != len(gains):
            raise ConfigError(
                f"LearnedRouter.fit_to_gains: got {len(prompts)} prompts and {len(gains)} gains, expected as many."
            )
        if first_tokens is not None and first_tokens < 1:
            raise ConfigError(f"LearnedRouter.fit_to_gains: got first_tokens {first_tokens}, expected at least 1.")
        worth = torch.tensor(list(gains), dtype=torch.float64)
        if not bool(worth.isfinite().all()):
            raise ConfigError("LearnedRouter.fit_to_gains: got gains that are no numbers; does the model overflow in its type?")
        helped = int((worth > 0).sum())
        if helped in (0, len(prompts)):
            raise ConfigError(
                f"LearnedRouter.fit_to_gains: the memory helps {helped} of {len(prompts)} prompts, expected some and not all; "
                "without a router it is read always, or can be switched off."
            )
        states = _mean_states(model, tokenizer, prompts, first_tokens)
        kept = {l2: _gains_kept(states, worth, l2, min(folds, len(prompts))) for l2 in sorted(strengths)}
        l2 = max(kept, key=lambda strength: (kept[strength], strength))
        return cls(model, tokenizer, *_regression(states, (worth > 0).float(), l2), 0.5, first_tokens)

    def scores(self, prompts: Sequence[str]) -> list[float]:
        """Score of every prompt, 0 to 1."""
        if not prompts:
            return []
        states = _mean_states(self.model, self.tokenizer, prompts, self.first_tokens)
        return _predict(states, self.mean, self.scale, self.weight, self.bias).tolist()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the router to a file (safetensors), whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        about = {"threshold": self.threshold, "first_tokens": self.first_tokens, "base_model": base_identity(_base(self.model))}
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        file = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save(tensors, {_ABOUT: json.dumps(about)}))
        except OSError as error:
            raise CheckpointError(f"cannot write {file}: {error.strerror or error}; choose another place.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, tokenizer: Any, allow_other_base: bool = False) -> Self:
        """Read a router that ``save`` wrote.

        Args:
            path: the file.
            model: the model whose hidden states it judges, with or without a memory.
            tokenizer: its tokenizer.
            allow_other_base: accept another model of the same sizes (a fine-tuned one, say), or with more tokens.

        Raises:
            CheckpointError: the file is missing or no router.
            FingerprintError: it was fitted to another model; adapters on it and the tokenizer are not compared.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
                mean, scale, weight, bias = (file.get_tensor(name) for name in _TENSORS)
            threshold, first_tokens, saved = about["threshold"], about["first_tokens"], about["base_model"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"cannot read a router from {path}: {error}; expected a file that `engram route` wrote."
            ) from None
        present = base_identity(_base(model))
        differences = identity_mismatch(saved, present)
        alike = only_weights_differ(differences, saved, present)
        if differences and not (alike and allow_other_base):
            otherwise = f", or, if it differs on purpose, {ALLOWED}" if alike else ""
            raise FingerprintError(
                f"the router in {path} was fitted to another model: {'; '.join(differences)}; fit it anew{otherwise}."
            )
        return cls(model, tokenizer, mean, scale, weight, bias, threshold, first_tokens)


_TENSORS = ("mean", "scale", "weight", "bias")
_ABOUT = "engram_router"


def _base(model: Any) -> Any:
    """A memory's base; a bare model has a ``base_model`` too, which is something else."""
    return model.base_model if hasattr(model, "disable_engram") else model


def _regression(states: Tensor, label: Tensor, l2: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and scale of the states ``[n, d]``, weight ``[d]`` and bias; both labels weigh the same."""
    share = torch.where(label == 1, 0.5 / label.sum(), 0.5 / (1 - label).sum())
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
    return mean, scale, weight.detach(), bias.detach()


def _predict(states: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ((states - mean) / scale @ weight + bias).sigmoid()


def _gains_kept(states: Tensor, gains: Tensor, l2: float, folds: int) -> float:
    """The sum of gains of prompts that a router would let read, each judged by a fit without it."""
    part, kept = torch.arange(len(gains)) % folds, 0.0
    for fold in range(folds):
        fitted, asked = part != fold, part == fold
        label = (gains[fitted] > 0).float()
        if label.unique().numel() < 2:  # all of them do the same, and so will those asked
            reads = label[:1].bool().expand(int(asked.sum()))
        else:
            reads = _predict(states[asked], *_regression(states[fitted], label, l2)) >= 0.5
        kept += float(gains[asked][reads].sum())
    return kept


@torch.no_grad()
def _mean_states(model: Any, tokenizer: Any, prompts: Sequence[str], first_tokens: int | None = None) -> Tensor:
    """Mean over the (first) tokens of the last hidden state, float32 ``[prompts, d]``, computed by the base model alone; zero of no
    tokens.
    """
    device = input_device(model)
    context = context_length(model.config)
    longest = min((n for n in (first_tokens, context) if n is not None), default=None)
    states = []
    with ExitStack() as off, evaluation_mode(model):
        for memory in model.and_beneath() if hasattr(model, "disable_engram") else ():
            off.enter_context(memory.disable_engram())
        for prompt in prompts:
            ids = tokenizer(prompt, verbose=False)["input_ids"][:longest]
            if not ids:
                states.append(torch.zeros(text_config(model.config).hidden_size))
                continue
            output = model(input_ids=torch.tensor([ids], device=device), use_cache=False, output_hidden_states=True)
            last = output.hidden_states[-1][0].float()
            states.append(last.reshape(last.shape[0], -1).mean(0).cpu())
    return torch.stack(states)
