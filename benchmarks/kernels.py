"""The native kernels beside NumPy and PyTorch: the n-gram hash at several sizes, and the gather of rows with and without conversion.

Every variant is checked for equality before anything is timed; then all take turns, round after round, in one process.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, provenance, spread, write

from engram import EngramConfig, native
from engram.hashing import mapping_without_tokenizer
from engram.ops import lookup_rows
from engram.tables import FORMATS

VOCABULARY = 128_000
GATHERED = 131_072  # 16 heads x 8,192 tokens


def take_turns(variants, rounds, repeats):
    """Seconds per call of each variant, per round; the slowest start of a process is left out by a call beforehand."""
    seconds = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds


def entry(seconds, baseline):
    """Spread of every variant, and how many times as fast as the baseline it is (median of the rounds' ratios)."""
    return {
        name: {"seconds": spread(times), "speedup": float(np.median(np.array(seconds[baseline]) / np.array(times)))}
        for name, times in seconds.items()
    }


def numpy_hash(mapping, ids):
    """The paper's formulas in the obvious NumPy: one mix per order, one modulus per head, stacked."""
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


def hash_ngrams(rounds):
    mapping = mapping_without_tokenizer(EngramConfig(layer_ids=(1, 15), hidden_size=64, hash_spec="exact_v1"), VOCABULARY)
    result = {}
    for tokens in (1, 64, 2048, 16_384):
        ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
        kernel, core = mapping.kernel_for(ids), native.core()

        def pytorch(ids=ids, core=core):
            native._core = None
            try:
                return mapping.hash(ids)
            finally:
                native._core = core

        variants = {
            "numpy": lambda ids=ids: numpy_hash(mapping, ids.numpy()),
            "pytorch": pytorch,
            "native": lambda ids=ids: mapping.hash(ids),
            "native, kernel alone": lambda ids=ids, kernel=kernel: kernel.hash(ids, None, None, False),
        }
        for layer, expected in variants["numpy"]().items():
            for name in ("pytorch", "native"):
                assert np.array_equal(variants[name]()[layer].numpy(), expected), name
        result[str(tokens)] = entry(take_turns(variants, rounds, max(3, 20_000 // tokens // 10)), "numpy")
        print(
            tokens,
            {name: f"{e['seconds']['median'] * 1e6:.1f} us, x{e['speedup']:.1f}" for name, e in result[str(tokens)].items()},
        )
    return result


def gather(rounds, rows, dim=64):
    table = torch.randn(1 << 16, dim).to(torch.bfloat16).repeat(rows >> 16, 1)
    row_ids = torch.randint(len(table), (GATHERED,), generator=torch.Generator().manual_seed(0))
    copy, wide = torch.empty(GATHERED, dim, dtype=torch.bfloat16), torch.empty(GATHERED, dim)
    variants = {
        "F.embedding": lambda: F.embedding(row_ids, table),
        "native": lambda: lookup_rows(table, row_ids),
        "native, reused buffer": lambda: native.gather_rows(table, row_ids, copy),
        "F.embedding, then float32": lambda: F.embedding(row_ids, table).float(),
        "native to float32": lambda: lookup_rows(table, row_ids, torch.float32),
        "native to float32, reused buffer": lambda: native.gather_rows(table, row_ids, wide),
    }
    assert torch.equal(variants["native"](), variants["F.embedding"]())
    assert torch.equal(variants["native to float32"](), variants["F.embedding, then float32"]())
    for name in ("int8", "float8", "int4"):
        form = FORMATS[name]
        stored, scales = form.encode(table[: 1 << 16].float())
        stored = stored.view(torch.uint8).repeat(rows >> 16, 1).view(form.dtype)
        scales = scales.repeat(rows >> 16, *[1] * (scales.dim() - 1))
        variants[f"{name} to float32"] = lambda form=form, s=stored, c=scales: form.read(s, c, row_ids)
        assert torch.equal(variants[f"{name} to float32"](), form.decode(stored[row_ids], scales[row_ids]))
    result = entry(take_turns(variants, rounds, 2), "F.embedding")
    for name, e in result.items():
        e["rows_per_second"] = GATHERED / e["seconds"]["median"]
        e["to_cast"] = result["F.embedding, then float32"]["seconds"]["median"] / e["seconds"]["median"]
        print(
            f"{name}: {e['rows_per_second'] / 1e6:.1f} M rows/s, x{e['speedup']:.1f}, x{e['to_cast']:.1f} of embedding + cast"
        )
    return {"rows": len(table), "dim": dim, "gathered": GATHERED, "variants": result}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rows", type=int, default=10 << 20, help="rows of the gathered table (a multiple of 65,536)")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    args = parser.parse_args()
    if native.core() is None:
        raise SystemExit("the native core is not built")
    result = {
        "instruction_set": native.instruction_set(),
        "hash": hash_ngrams(args.rounds),
        "gather": gather(args.rounds, args.rows),
    }
    write(args.out, {**provenance(0), **result})


if __name__ == "__main__":
    main()
