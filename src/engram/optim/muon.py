"""Muon for matrices and stacks of matrices, beside row-sparse Adam for tables and AdamW for the rest, in one optimiser."""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from engram.distributed import part_of, whole
from engram.errors import ConfigError
from engram.optim.sparse_adam import EngramAdamW

__all__ = ["EngramMuon", "orthogonalize", "update_scale"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Keller Jordan, "Muon"): steepest at zero; singular values end between about 0.7 and 1.2, not at 1."""
_SMALLEST_NORM = 1e-7
_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
_X86 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
_LARGEST_STACK = 1 << 26
"""Numbers orthogonalised at once; small matrices of one shape go together, large ones must not be copied all at the same time."""


class EngramMuon(EngramAdamW):
    """``EngramAdamW`` whose groups marked ``algorithm="muon"`` take Muon steps; ``build_param_groups`` makes such groups.

    A Muon step on a matrix W with gradient G, momentum B and learning rate ``lr`` (Jordan et al. 2024; Liu et al. 2025, "Muon is scalable"):

        B <- momentum * B + (1 - momentum) * G
        U  = (1 - momentum) * G + momentum * B if nesterov else B
        W <- (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(max(rows, columns)) * orthogonalize(U)

    The scale gives an update the root mean square that AdamW's usually have (0.2), so that AdamW's learning rate and weight decay can be
    shared. ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` computes the same for matrices; here parameters may also be stacks
    ``[E, rows, columns]`` (the experts of one layer), each matrix of which is orthogonalised and scaled by itself. With ``parts=2`` in a
    group, a parameter holds two matrices one above the other (gate and up projection of experts, fused into one tensor).

    Arguments are those of ``EngramAdamW``; the others can be given per group as well, and concern Muon groups only.

    Args:
        momentum: decay of the momentum, which has the parameter's dtype.
        nesterov: whether the step looks ahead.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: what they compute in: ``bfloat16``, ``float32``, or ``auto``, the former unless the device is a CPU without instructions
            for it (emulated, they take most of a step). That is for the machine at hand to say at every step: a checkpoint that moves to
            another kind of machine goes on in other arithmetic.

    Raises:
        ConfigError: a Muon group has an impossible option or a parameter that is no matrix; or, at a step, a sparse gradient came.
    """

    _options_of_groups = (*EngramAdamW._options_of_groups, "momentum", "nesterov", "ns_steps", "ns_dtype", "parts", "algorithm")
    _algorithms = ("adamw", "muon")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        self.defaults.update(muon, algorithm="adamw", parts=1)
        for group in self.param_groups:
            for name in (*muon, "algorithm", "parts"):
                group.setdefault(name, self.defaults[name])
            _check_muon_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``EngramAdamW``'s; a Muon group is checked.

        Raises:
            ConfigError: it has an impossible option or a parameter that is no matrix.
        """
        super().add_param_group(param_group)
        if "algorithm" in self.defaults:  # otherwise the groups of the constructor, which have not all their options yet
            try:
                _check_muon_group(self.param_groups[-1])
            except ConfigError:
                del self.param_groups[-1]
                raise

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        """Torch's ``step`` collects the gradients of every group here; those of Muon groups are dealt with and kept from AdamW."""
        if group.get("algorithm", "adamw") != "muon":
            return super()._init_group(group, *lists)
        self._muon_step(group)
        return False

    @torch.no_grad()
    def _muon_step(self, group: dict[str, Any]) -> None:
        stacks: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                update = self._momentum_update(group, p)
                stacks[(update.shape[-2] // group["parts"], update.shape[-1], update.dtype, update.device)].append((p, update))
        lr = float(group["lr"])
        for (rows, columns, _, device), members in stacks.items():
            scale = lr * update_scale(rows, columns)
            dtype = _DTYPES[group["ns_dtype"]] or (torch.bfloat16 if _native_bfloat16(device) else torch.float32)
            for part in _in_portions(members):
                matrices = [whole(update).reshape(-1, rows, columns).to(dtype) for _, update in part]
                steps = orthogonalize(torch.cat(matrices), group["ns_steps"], dtype)
                for (p, _), step in zip(part, steps.split([len(own) for own in matrices])):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(part_of(step.reshape(p.shape), p), alpha=scale if group["maximize"] else -scale)

    def _momentum_update(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Advance the momentum; what is to be orthogonalised, of the parameter's shape and divided as it is."""
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise ConfigError(
                "EngramMuon: got a sparse gradient in a Muon group, expected dense ones; put tables in a group without it."
            )
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(
                0.0, dtype=torch.float32, device="cpu"
            )  # torch's Adam wants one of every state it loads
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        state["step"] = state["step"] + 1
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def update_scale(rows: int, columns: int) -> float:
    """What an orthogonal ``[rows, columns]`` is multiplied by so that its root mean square is 0.2 (Liu et al. 2025, section 2.2)."""
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly the nearest (semi-)orthogonal matrix of each: singular values go to about 1, singular vectors stay.

    Five Newton-Schulz iterations of the form ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from X of Frobenius norm 1. Zero stays zero.

    Args:
        matrices: ``[n, rows, columns]``, not changed.
        steps: iterations.
        dtype: of the computation and of the result.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x  # the smaller of the two products
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _native_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. Asked, not timed, so that a resumed run finds what the first found on its machine."""
    if device.type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return any(asked() for name in _X86 if (asked := getattr(torch.cpu, name, None)) is not None)
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is not None and bool(asked())


def _in_portions(members: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cut a list of (parameter, update) so that no portion is much larger than can be copied without a thought."""
    portion: list[tuple[Tensor, Tensor]] = []
    for member in members:
        if portion and _size([*portion, member]) > _LARGEST_STACK:
            yield portion
            portion = []
        portion.append(member)
    yield portion


def _size(members: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(update.numel() for _, update in members)


def _check_muon_group(group: dict[str, Any]) -> None:
    where = f"EngramMuon group {group.get('name', '')!r}"
    if group["algorithm"] == "adamw":
        return
    parts, dtype, steps, momentum = (group[name] for name in ("parts", "ns_dtype", "ns_steps", "momentum"))
    if dtype not in _DTYPES:
        raise ConfigError(f"{where}: got ns_dtype={dtype!r}, expected one of {', '.join(_DTYPES)}.")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{where}: got ns_steps={steps!r}, expected a whole number from 1 up.")
    if not 0 <= momentum < 1:
        raise ConfigError(f"{where}: got momentum={momentum!r}, expected at least 0 and below 1.")
    for p in group["params"]:
        if p.dim() not in (2, 3) or p.is_complex() or p.shape[-2] % parts:
            raise ConfigError(
                f"{where}: got a parameter {list(p.shape)} of {p.dtype}, expected a real matrix or a stack of them whose rows divide into "
                f"{parts}; leave the others to AdamW."
            )
