"""Balancing the experts of a mixture without an auxiliary loss (Wang et al., arXiv:2408.15664; DeepSeek-V3, section 2.1.2).

The routers of DeepSeek-V3 and V4 add a bias to each expert's score when they choose, and only then. transformers keeps that bias
(``e_score_correction_bias``) but leaves it alone in training; here it is moved after every step, up for experts that saw fewer tokens
than the mean and down for those that saw more, always by the same amount.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from engram.distributed import sum_everywhere
from engram.errors import ConfigError

__all__ = ["BalanceCallback", "LoadBalancer", "find_routers", "step_bias"]

_BIAS = "e_score_correction_bias"


def step_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias after one step: ``bias + rate * sign(mean(load) - load)``, all ``[experts]``."""
    return bias + rate * torch.sign(load.mean() - load)


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers that choose by a corrected score, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(getattr(module, _BIAS, None), Tensor)}


class LoadBalancer:
    """Counts how many tokens each expert gets while ``model`` trains, and moves the routers' biases.

    Args:
        model: anything with routers of the DeepSeek kind inside.
        rate: what a bias moves by per step (the papers: 0.001).

    Raises:
        ConfigError: there is no such router, or the rate is negative.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        if not rate >= 0:
            raise ConfigError(f"LoadBalancer.rate: got {rate}, expected a number of at least 0.")
        self.rate, self.routers = rate, find_routers(model)
        if not self.routers:
            raise ConfigError(
                "LoadBalancer: the model has no router with an e_score_correction_bias; expected a mixture of experts."
            )
        self._loads: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.listen()

    def listen(self) -> None:
        """Start counting."""
        self._handles = [router.register_forward_hook(self._counter(name)) for name, router in self.routers.items()]

    def _counter(self, name: str) -> Any:
        def count(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if router.training and torch.is_grad_enabled():
                chosen = output[2].flatten()
                # Not bincount, which makes the host wait for the largest number.
                load = chosen.new_zeros(len(getattr(router, _BIAS))).scatter_add_(0, chosen, torch.ones_like(chosen))
                self._loads[name] = self._loads[name] + load if name in self._loads else load

        return count

    @torch.no_grad()
    def update(self) -> Tensor:
        """Move the biases by what was counted since the last update, and forget the counts.

        Returns:
            The largest load of any expert as a multiple of the mean load, a number on the routers' device (to read it is to wait for
            the step); 1 at best, 0 if nothing was counted.
        """
        worst = torch.zeros(())
        for name, load in self._loads.items():
            bias: Any = getattr(self.routers[name], _BIAS)
            counted = sum_everywhere(load).to(bias.dtype)
            bias.copy_(step_bias(bias, counted, self.rate))
            worst = torch.maximum(worst.to(counted.device), (counted.max() / counted.mean()).float())
        self._loads.clear()
        return worst

    def remove(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class BalanceCallback(TrainerCallback):
    """Loss-free balancing in a ``transformers.Trainer``; logs the largest load (``expert_load_max``, 1 is balanced).

    The biases are buffers of the model and travel with its checkpoints, so that a resumed run is exact.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        self.balancer = LoadBalancer(model, rate)
        self.balancer.remove()  # until training begins
        self._worst = torch.zeros(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from here on; training may begin more than once."""
        self.balancer.remove()
        self.balancer.listen()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the biases once the optimiser has stepped."""
        self._worst = self.balancer.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the load of the last step to what is logged."""
        if logs is not None and (worst := float(self._worst)):
            logs["expert_load_max"] = round(worst, 3)
            if state.log_history:
                state.log_history[-1].setdefault("expert_load_max", logs["expert_load_max"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop counting."""
        self.balancer.remove()
