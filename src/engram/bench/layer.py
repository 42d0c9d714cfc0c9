"""Where an Engram layer's time goes, beside a transformer block of the same width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from engram.bench.setting import Setting
from engram.config import EngramConfig
from engram.hashing import mapping_without_tokenizer
from engram.layers import Engram, EngramState

__all__ = ["layer_settings"]

_WIDTH, _D_MEM, _VOCABULARY = 576, 1280, 32_000
_ROWS_PER_HEAD = 100_000


def layer_settings(quick: bool) -> Iterator[Setting]:
    """One token (decoding) and 512 (prefill); hidden 576, d_mem 1280, orders 2 and 3, 8 heads."""
    torch.manual_seed(0)
    rows = 1000 if quick else _ROWS_PER_HEAD
    config = EngramConfig(
        engram_vocab_size=rows,
        n_embed_per_ngram=_D_MEM // 2,
        layer_ids=(0,),
        hidden_size=_WIDTH,
        hash_spec="exact_v1",
        table_init="normal",
    )
    layer = Engram(config, mapping_without_tokenizer(config, _VOCABULARY), 0).eval().requires_grad_(False)
    assert layer.short_conv is not None
    torch.nn.init.normal_(layer.short_conv.conv.weight, std=0.02)
    block = torch.nn.TransformerEncoderLayer(_WIDTH, 9, 4 * _WIDTH, dropout=0.0, batch_first=True).eval().requires_grad_(False)
    for tokens in (1, 64) if quick else (1, 512):
        yield _setting(layer, block, tokens)


def _setting(layer: Engram, block: torch.nn.Module, tokens: int) -> Setting:
    ids = torch.randint(_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, tokens, _WIDTH)
    hash_ids = layer.mapping.hash(ids)[0]
    home = layer.multi_head_embedding
    state = EngramState()
    calls: dict[str, Callable[[], Any]] = {
        "transformer block": lambda: block(hidden),
        "hash": lambda: layer.mapping.hash(ids),
        "gather": lambda: home(hash_ids),
        "whole layer": lambda: layer(hidden, hash_ids=hash_ids, state=state),
    }

    def verify() -> str | None:
        fast = layer(hidden, hash_ids=hash_ids, state=EngramState())
        hook = layer.value_proj.register_forward_hook(lambda *_: None)  # native code stands aside for modules with hooks
        plain = layer(hidden, hash_ids=hash_ids, state=EngramState())
        hook.remove()
        difference = float((fast - plain).abs().max())
        return None if difference <= 1e-5 * max(1.0, float(plain.abs().max())) else f"the fast layer is off by {difference:.2g}"

    def no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(call)

    timed = {name: no_grad(call) for name, call in calls.items()}
    repeats = 50 if tokens == 1 else 2
    return Setting(
        f"{tokens:,} tokens", timed, "transformer block", tokens, torch.no_grad()(verify), size=tokens, repeats=repeats
    )
