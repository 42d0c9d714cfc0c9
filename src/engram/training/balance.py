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

from engram.distributed import sum_everywhere, whole, write_whole
from engram.errors import ConfigError

__all__ = ["BalanceCallback", "LoadBalancer", "find_routers", "step_bias"]

_BIAS = "e_score_correction_bias"


def step_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias after one step: ``bias + rate * sign(mean(load) - load)``, all ``[experts]``."""
    return bias + rate * torch.sign(load.mean() - load)


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers that choose by a corrected score, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(getattr(module, _BIAS, None), Tensor)}


def _chooser(model: nn.Module, name: str, router: nn.Module) -> nn.Module:
    """Which module chooses experts by a router's bias: that itself, the gate that it hands it to (MiniMax-M2, Hunyuan 3), or, where it only
    adds the bias, the one around it (Ernie 4.5).
    """
    gate = getattr(router, "gate", None)
    if isinstance(gate, nn.Module):
        return gate
    return model.get_submodule(name.rpartition(".")[0]) if name.endswith("moe_statics") else router


def _chosen(router: nn.Module, output: Any) -> Tensor:
    """The experts' numbers in what a router gives."""
    numbers = [x for x in output if isinstance(x, Tensor) and not x.is_floating_point()] if isinstance(output, tuple) else []
    if len(numbers) != 1 or numbers[0].dtype not in (torch.int64, torch.int32):
        raise ConfigError(
            f"LoadBalancer: got a router ({type(router).__name__}) that does not give the numbers of the experts it chose, expected one that "
            "gives (logits, weights, numbers) as DeepSeek-V3's does."
        )
    return numbers[0].flatten().long()


class LoadBalancer:
    """Counts how many tokens each expert gets while ``model`` trains, and moves the routers' biases.

    Args:
        model: anything with routers of the DeepSeek kind inside.
        rate: what a bias moves by per step (the papers: 0.001).

    Raises:
        ConfigError: there is no such router, or the rate is negative; or, at a forward pass, a router does not say which experts it chose.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        if not rate >= 0:
            raise ConfigError(f"LoadBalancer.rate: got {rate}, expected a number of at least 0.")
        self.rate, self.routers = rate, find_routers(model)
        if not self.routers:
            raise ConfigError(
                "LoadBalancer: the model has no router with an e_score_correction_bias; expected a mixture of experts."
            )
        self._choosers = {name: _chooser(model, name, router) for name, router in self.routers.items()}
        self._loads: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.listen()

    def listen(self) -> None:
        """Start counting."""
        self._handles = [chooser.register_forward_hook(self._counter(name)) for name, chooser in self._choosers.items()]

    def _counter(self, name: str) -> Any:
        experts = getattr(self.routers[name], _BIAS).numel()

        def count(chooser: nn.Module, args: Any, output: Any) -> None:
            if chooser.training and torch.is_grad_enabled():
                chosen = _chosen(chooser, output)
                # Not bincount, which makes the host wait for the largest number.
                load = chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))
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
            before = whole(bias)  # where it is a parameter, FSDP divides it
            write_whole(bias, step_bias(before, counted.view_as(before), self.rate))
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

    Raises:
        ConfigError: as ``LoadBalancer``; or, when training begins, the routers are frozen: nothing would keep their biases then.
    """

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        self.balancer = LoadBalancer(model, rate)
        self.balancer.remove()  # until training begins
        self._worst = torch.zeros(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count from here on; training may begin more than once."""
        if not any(p.requires_grad for chooser in self.balancer._choosers.values() for p in chooser.parameters()):
            raise ConfigError(
                "BalanceCallback: got a frozen base model, whose routers stay as they are, expected one that is trained (train_backbone); "
                "leave the callback out."
            )
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
