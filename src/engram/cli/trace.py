"""`engram trace`: what a memory does with a sentence, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.loading import AllowOtherBaseOption, DeviceOption, ModelDtypeOption, Running, open_memory
from engram.cli.outputs import check_text, print_folded
from engram.errors import ConfigError

if TYPE_CHECKING:
    from engram.evaluation.trace import Trace
    from engram.models import EngramModel

__all__ = ["trace_command"]

_SHOWN_ROWS = 3


def trace_command(
    text: Annotated[str, typer.Argument(help="The sentence.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a folder, a hub name or 'bundled'. Default: the one the memory was made for, else the bundled one."
        ),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(help="A saved memory, or 'bundled'. Default: a random, untrained one at two layers."),
    ] = None,
    demo_size: Annotated[
        bool,
        typer.Option(
            "--demo-size", help="A random model of the paper demo's own sizes (30 blocks, 4 streams; 9 GB of memory)."
        ),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer for --demo-size: a folder or hub name. Default: the bundled one.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Random seed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: DeviceOption = "cpu",
    model_dtype: ModelDtypeOption = "float32",
    allow_other_base: AllowOtherBaseOption = False,
) -> None:
    """Show what a memory looks up for each token of a sentence.

    N-grams, canonical id (of the token without case, accents and spaces), rows per head, gates per layer, and where the rows are.
    """
    import torch

    from engram.evaluation.trace import trace_text

    if demo_size and memory is not None:
        raise ConfigError("--demo-size shows a random model; it cannot be combined with --memory.")
    if demo_size and model is not None:
        raise typer.BadParameter(
            "got a model beside --demo-size, which shows a random one; expected one of the two", param_hint="--model"
        )
    if tokenizer is not None and not demo_size:
        raise ConfigError("--tokenizer goes with --demo-size; other models bring their own.")
    if not text.strip():
        raise ConfigError("trace: the text is empty.")
    check_text(text, "TEXT")
    running = Running(device, model_dtype, allow_other_base)
    running.check()
    torch.manual_seed(seed)
    engram_model, tokens = _demo_sized(tokenizer, running) if demo_size else _attached(model, memory, running)
    trace = trace_text(engram_model, tokens, text)
    if as_json:
        print(json.dumps(trace.to_dict(), indent=1, ensure_ascii=False))
    else:
        _print_table(trace, fresh=memory is None)


def _attached(model: str | None, memory: Path | None, running: Running) -> tuple[EngramModel, Any]:
    from engram.config import EngramConfig, common_layers
    from engram.evaluation.generation import padding_id
    from engram.models import get_engram_model
    from engram.models.bundled_files import memory_folder

    if memory is not None:
        return open_memory(memory_folder(memory), model, running)
    base, tokenizer = running.load(model or "bundled")
    config = EngramConfig(
        engram_vocab_size=20_000,
        n_embed_per_ngram=256,
        layer_ids=common_layers(base.config.num_hidden_layers),
        pad_id=padding_id(tokenizer) or 0,
        table_init="normal",
    )
    return get_engram_model(base, config, tokenizer), tokenizer


def _demo_sized(tokenizer_name: str | None, running: Running) -> tuple[EngramModel, Any]:
    """A random transformer with the demo's sizes: 30 blocks, width 1024, four streams, vocabulary 129,280, memory at blocks 1 and 15."""
    import torch
    from transformers import AutoTokenizer, DeepseekV4Config, DeepseekV4ForCausalLM

    from engram.config import EngramConfig
    from engram.errors import CheckpointError
    from engram.models import get_engram_model
    from engram.models.bundled_files import BUNDLED_MODEL

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or str(BUNDLED_MODEL))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load tokenizer {tokenizer_name!r}: {str(error).splitlines()[0]}") from error
    blocks = 30
    base = DeepseekV4ForCausalLM(
        DeepseekV4Config(
            vocab_size=129_280,
            hidden_size=1024,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=128,
            partial_rotary_factor=0.5,
            q_lora_rank=256,
            o_lora_rank=128,
            o_groups=4,
            index_n_heads=4,
            index_head_dim=128,
            moe_intermediate_size=512,
            n_routed_experts=4,
            num_experts_per_tok=2,
            hc_mult=4,
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention"] * (blocks // 2),
            mlp_layer_types=["moe"] * blocks,
        )
    ).eval()
    placed = running.place(base.to(getattr(torch, running.dtype)), "of the demo's sizes")
    return get_engram_model(placed, EngramConfig(table_init="normal"), tokenizer), tokenizer


def _print_table(trace: Trace, fresh: bool) -> None:
    from rich.table import Table

    layers = list(trace.tables)
    table = Table(title=f"{len(trace.tokens)} tokens -> output {trace.output_shape}")
    for heading in (
        "",
        "token",
        "id > canonical",
        "n-grams",
        *(f"layer {i}: rows of the first heads" for i in layers),
        *(f"gate {i}" for i in layers),
    ):
        table.add_column(heading)
    for token in trace.tokens:
        rows = [" ".join(map(str, layer.rows[:_SHOWN_ROWS])) + " ..." for layer in token.layers]
        gates = [" ".join(f"{gate:.2f}" for gate in layer.gate) for layer in token.layers]
        ngrams = " | ".join(repr(text) for text in token.ngrams.values())
        ids = f"{token.token_id} > {token.canonical_id}"
        table.add_row(str(token.position), repr(token.token), ids, ngrams, *rows, *gates)
    print_folded(table)
    for layer_id, place in trace.tables.items():
        print(f"layer {layer_id}: {len(trace.tokens[0].layers[0].rows)} rows per token from {place}")
    if fresh:
        print("The memory shown is fresh and untrained: addresses are real, gates are those of a random reader.")
