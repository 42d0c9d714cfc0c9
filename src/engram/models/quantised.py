"""Base models with quantised weights: which they are, and how gradients pass them."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "forget_layout",
    "gradients_pass",
    "is_quantised",
    "is_quantised_parameter",
    "lay_out_for_gradients",
    "note_layout",
    "parameter_count",
    "refusal_of_training",
]

_NOTED = "_engram_quant_state"
_MAY_PACK = "support_avx512bf16_for_cpu"


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's weights are quantised, by transformers (bitsandbytes, GPTQ, ...) or by hand."""
    return getattr(model, "hf_quantizer", None) is not None or any(map(is_quantised_parameter, model.parameters()))


def is_quantised_parameter(parameter: Tensor) -> bool:
    """Whether a parameter holds codes of values, and not the values. Those of bitsandbytes may be stored in any type."""
    return parameter.dtype.itemsize == 1 or hasattr(parameter, "quant_state")


def parameter_count(parameter: Tensor) -> int:
    """How many values a parameter stands for: bitsandbytes has two of four bits in a byte."""
    if type(parameter).__name__ != "Params4bit":
        return parameter.numel()
    return 2 * parameter.numel() * parameter.element_size()


def refusal_of_training(model: nn.Module) -> str | None:
    """Why no memory can be trained on a model, for a message; None where nothing is in the way."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_trainable or getattr(quantizer, "is_qat_trainable", False):
        return None
    method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
    return f"got a base model quantised by {getattr(method, 'value', method)}, whose weights pass no gradients"


def note_layout(model: nn.Module) -> None:
    """Keep the scales of 4-bit weights, so that ``lay_out_for_gradients`` can give them back as they were.

    On CPUs with AVX512-BF16 bitsandbytes lays 4-bit weights out anew in the first forward pass of evaluation mode: faster by far, but with
    scales rounded to bfloat16, and no gradient passes them any more. The scales are an eighth of the weights.
    """
    for module in _four_bit(model):
        if not _is_laid_out_anew(module) and getattr(module, _MAY_PACK):
            module.__dict__[_NOTED] = copy.copy(module.weight.quant_state)


def forget_layout(model: nn.Module) -> None:
    """Let go of what ``note_layout`` kept."""
    for module in _four_bit(model):
        module.__dict__.pop(_NOTED, None)


def lay_out_for_gradients(model: nn.Module) -> None:
    """Give 4-bit weights that bitsandbytes laid out for inference the layout that passes gradients; see ``note_layout``."""
    exact = [_give_back(module) for module in _four_bit(model) if _is_laid_out_anew(module)]
    if not all(exact):
        logging.getLogger("engram").warning(
            "the 4-bit base model ran before a memory was attached, and bitsandbytes has rounded its scales to bfloat16 for that; training "
            "uses those. Attach the memory before the model runs to train on the weights that were loaded."
        )


@contextmanager
def gradients_pass(model: nn.Module) -> Iterator[None]:
    """Inside this context weights have the layout that passes gradients, in evaluation mode too."""
    held = [module for module in _four_bit(model) if getattr(module, _MAY_PACK)]
    lay_out_for_gradients(model)
    try:
        for module in held:
            setattr(module, _MAY_PACK, False)
        yield
    finally:
        for module in held:
            setattr(module, _MAY_PACK, True)


def _four_bit(model: nn.Module) -> Iterator[Any]:
    """Modules whose weights bitsandbytes may lay out anew; without it nothing is searched, for training asks this at every step."""
    if "bitsandbytes" not in sys.modules:
        return
    for module in model.modules():
        if hasattr(module, _MAY_PACK) and getattr(module.weight, "quant_state", None) is not None:
            yield module


def _is_laid_out_anew(module: Any) -> bool:
    return bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))


def _give_back(module: Any) -> bool:
    """Lay one module's weights out as they were loaded; returns whether its scales are exact."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse  # what saving such a module calls

    noted, present = module.__dict__.get(_NOTED), module.weight.quant_state
    rounded = present.absmax.T.reshape(-1).to(torch.float32)
    module.weight.data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, present)
    if noted is None:  # bitsandbytes would leave the scales transposed, or quantise them again otherwise than they were
        state.absmax, state.nested = rounded, False
    else:
        state = copy.copy(noted)
    module.weight.quant_state = module.quant_state = state
    return noted is not None
