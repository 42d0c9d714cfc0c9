"""The n-gram hash: the paper's formulas in NumPy, vectorised PyTorch, the native kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from engram.bench.setting import Setting
from engram.config import EngramConfig
from engram.hashing import NgramHashMapping, mapping_without_tokenizer

__all__ = ["hash_settings", "numpy_hash"]

_VOCABULARY = 128_000
_SECONDS_OF_WORK = 20_000  # repeats are chosen so that a turn hashes about so many tokens


def hash_settings(quick: bool) -> Iterator[Setting]:
    """1 to 16,384 tokens per call, the demo's sizes (without its tokenizer: raw ids instead of compressed ones)."""
    mapping = mapping_without_tokenizer(EngramConfig(layer_ids=(1, 15), hidden_size=64, hash_spec="exact_v1"), _VOCABULARY)
    for tokens in (1, 64, 2048) if quick else (1, 64, 2048, 16_384):
        ids = torch.randint(_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
        yield _setting(mapping, ids)


def _setting(mapping: NgramHashMapping, ids: Tensor) -> Setting:
    array = ids.numpy()
    calls: dict[str, Callable[[], dict]] = {
        "NumPy, as the demo": lambda: numpy_hash(mapping, array),
        "PyTorch": lambda: mapping.hash_plain(ids),
    }
    kernel = mapping.kernel_for(ids)
    if kernel is not None:
        out = kernel.hash(ids, None, None, False)[0]
        calls["engram"] = lambda: mapping.hash(ids)
        calls["engram, arrays"] = lambda: mapping.hash(array)
        calls["engram, reused buffer"] = lambda: dict(zip((1, 15), kernel.hash(ids, None, None, False, out)[0]))

    def verify() -> str | None:
        expected = calls["NumPy, as the demo"]()
        for name, call in calls.items():
            got = call()
            if any(not np.array_equal(np.asarray(got[layer]), expected[layer]) for layer in expected):
                return f"{name} gives other addresses than NumPy"
        return None

    repeats = max(3, min(200, _SECONDS_OF_WORK // ids.numel() // 10))
    return Setting(
        f"{ids.numel():,} tokens", calls, "NumPy, as the demo", ids.numel(), verify, size=ids.numel(), repeats=repeats
    )


def numpy_hash(mapping: NgramHashMapping, ids: np.ndarray) -> dict[int, np.ndarray]:
    """The paper's formulas in the obvious NumPy: one mix per order, one modulus per head, stacked to ``[B, T, H]`` per layer."""
    canonical = mapping.compressed_tokenizer.lookup_table[ids]
    result = {}
    for layer, multipliers in mapping.layer_multipliers.items():
        shifted = [canonical]
        for k in range(1, mapping.config.max_ngram_size):
            shifted.append(np.pad(canonical, ((0, 0), (k, 0)), constant_values=mapping.pad_id)[:, : canonical.shape[1]])
        heads = []
        for order, primes in enumerate(mapping.vocab_size_across_layers[layer], start=2):
            mix = shifted[0] * multipliers[0]
            for k in range(1, order):
                mix = np.bitwise_xor(mix, shifted[k] * multipliers[k])
            heads += [mix % prime for prime in primes]
        result[layer] = np.stack(heads, axis=2)
    return result
