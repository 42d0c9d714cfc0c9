"""A device that is not the CPU, for machines that have no other.

Its tensors lie in CPU memory and say ``pretend:0``. What a real device refuses is refused: operands on two devices, NumPy views, indices on
the device of a tensor on the CPU. What it cannot show: kernels, streams, and speed. Sparse gradients are carried dense, because the autograd
engine has no sparse tensors for such a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

aten = torch.ops.aten
DEVICE = torch.device("cpu")  # until ``pretend_device`` registers its own
_COPIES = (aten.copy_.default, aten._to_copy.default)
_WRITES_AT = (aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
_INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor, *_WRITES_AT)


class PretendTensor(torch.Tensor):
    """A tensor that says it is elsewhere; ``raw`` is where it is."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> PretendTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"PretendTensor({self.raw!r})"

    def tolist(self):
        return self.raw.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert a tensor on {DEVICE} to NumPy; copy it to the CPU first.")

    def __array__(self, *_, **__):
        return self.numpy()


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device, for as long as the context lasts; modules moved to it get new parameters. What is registered stays in the process."""
    global DEVICE
    if DEVICE.type == "cpu":
        torch.utils.backend_registration._setup_privateuseone_for_python_backend("pretend")
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        DEVICE = torch.device("pretend", 0)
        PreTrainedModel.to = _move_and_tie(PreTrainedModel.to)
    with torch.autograd.set_multithreading_enabled(False), _Functions(), _Operations():
        yield DEVICE


def _move_and_tie(move):
    """Parameters that are one stay one, as they do on a real device."""

    def to(model, *args, **kwargs):
        moved = move(model, *args, **kwargs)
        moved.tie_weights()
        return moved

    return to


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What does not reach the dispatcher: ``torch.tensor`` fills memory below it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_elsewhere(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.coalesce and isinstance(args[0], PretendTensor):
            return _Sparse(args[0])
        return func(*args, **kwargs)


class _Sparse:
    """What a sparse gradient is asked for."""

    def __init__(self, dense: PretendTensor) -> None:
        rows = dense.raw.to_sparse(1).coalesce()
        self._parts = [PretendTensor(part) for part in (rows.indices(), rows.values())]

    def indices(self):
        return self._parts[0]

    def values(self):
        return self._parts[1]


def _is_elsewhere(device) -> bool:
    return device is not None and torch.device(device).type == "pretend"


def _run(func, args, kwargs):
    """An operation on the tensors' real memory, its results where the device would have put them."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    elsewhere = [x for x in tensors if isinstance(x, PretendTensor)]
    if elsewhere:
        _refuse_two_devices(func, args, [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0])
    if func is aten._sparse_coo_tensor_with_dims_and_tensors.default and elsewhere:
        _, _, size, rows, values = args
        return PretendTensor(torch.zeros(size, dtype=values.dtype).index_add_(0, rows.raw.flatten(), values.raw))
    device = kwargs.get("device")
    to = _is_elsewhere(device) if device is not None else bool(elsewhere)
    if func is aten.copy_.default:
        to = isinstance(args[0], PretendTensor)
    known = {id(x.raw): x for x in elsewhere}
    inner_args, inner = tree_map_only(PretendTensor, lambda x: x.raw, (args, kwargs))
    if device is not None:
        inner = (
            {**inner, "device": torch.device("cpu"), "pin_memory": None}
            if "pin_memory" in inner
            else {**inner, "device": "cpu"}
        )
    result = func(*inner_args, **inner)
    if to:
        return tree_map_only(torch.Tensor, lambda raw: known[id(raw)] if id(raw) in known else PretendTensor(raw), result)
    return tree_map_only(torch.Tensor, lambda raw: raw.clone() if id(raw) in known else raw, result)


def _refuse_two_devices(func, args, here):
    if func in _COPIES:
        return
    if func in _INDEXED:
        if not isinstance(args[0], PretendTensor):
            raise RuntimeError(f"{func}: indices on {DEVICE} of a tensor on the CPU")
        # A device takes indices from the CPU, values it does not.
        here = [x for x in here if func in _WRITES_AT and x is args[2]]
    if here:
        raise RuntimeError(
            f"{func}: expected all tensors on one device, got {DEVICE} and, on the CPU, {[tuple(x.shape) for x in here]}"
        )
