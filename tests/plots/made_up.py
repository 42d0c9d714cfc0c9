"""Results of sweeps with made-up losses: everything that follows from losses comes from engram.experiments.summary."""

import json

import numpy as np

from engram.experiments.summary import summarise

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4)
ARMS = {
    "reference": {},
    "no conv": {"engram.use_conv": False},
    "no gating": {"engram.fuse": "add"},
    "no compression": {"engram.hash_spec": "exact_v1"},
    "4-grams": {"engram.max_ngram_size": 4, "engram.engram_vocab_size": 500},
    "layer 0": {"engram.layer_ids": [0]},
    "layer 1": {"engram.layer_ids": [1]},
    "layer 3": {"engram.layer_ids": [3]},
    "no memory": {"engram": None},
}
ARM_LOSSES = {
    "reference": 3.0,
    "no conv": 3.001,
    "no gating": 3.05,
    "no compression": 2.95,
    "4-grams": 3.02,
    "layer 0": 3.06,
    "layer 1": 3.02,
    "layer 3": 3.08,
    "no memory": 3.2,
}


def entry(labels, seed, loss, rho=1.0, slots=0, learning_rate=3e-3):
    """A point as a sweep's result keeps it."""
    half = {"loss": loss, "tokens": 1000, "by_kind": {"code": {"loss": loss, "tokens": 1000}}, "bits_per_byte": loss / 2}
    counts = {"rho": rho, "total": 4_288_000, "active": 389_600, "experts": 96, "dense_width": 320, "table_rows": slots}
    return {
        "labels": labels,
        "seed": seed,
        "digest": f"{json.dumps(labels)}{seed}{learning_rate}",
        "learning_rate": learning_rate,
        "validation": half,
        "test": half,
        "counts": {**counts, "rows_per_head": [slots // 8] * 2 if slots else [], "flops_per_token": 972_096},
        "tokens": 499_712,
        "epochs": 0.056,
        "steps": 244,
        "curve": [[step, loss + 100 / step] for step in (61, 122, 183, 244)],
        "expert_load_max": 1.4,
        "seconds": 71.5,
    }


def sweep(question, variants, entries, name="made up", seeds=(0, 1, 2), **changes):
    """A sweep's result around entries."""
    points = len(seeds)
    for labels in variants.values():
        points *= len(labels)
    base = {"data": {"vocab_size": 2048, "seq_len": 128}, "backbone": {"hidden_size": 96}, "engram": {"layer_ids": [1, 2]}}
    counts = {"documents": 10, "bytes": 3_000_000, "tokens": 900_000}
    return {
        "sweep": name,
        "question": question,
        "recipe": {"name": name, "base": base, "variants": variants, "seeds": list(seeds), "tune": None},
        "data": {
            "fingerprint": "ad80bab3f9356ae5",
            "counts": {"train": {"code": counts, "prose": {**counts, "tokens": 100_000}}, "held_out": {"code": counts}},
        },
        "expected_points": points,
        "learning_rates": [],
        "tuning": [],
        "points": entries,
        "failures": [],
        "summary": summarise(question, entries),
        **changes,
    }


def noise(seeds, scale=0.002):
    """One offset for each seed, the same at every call."""
    return dict(zip(seeds, scale * np.random.default_rng(7).standard_normal(len(seeds))))


def allocation(seeds=(0, 1, 2), lowest=0.75, depth=1.0, budgets=("small", "large"), shares=SHARES, **changes):
    """A U (``depth`` > 0) or its opposite around ``lowest``; noise differs from point to point."""
    entries, rng = [], np.random.default_rng(3)
    for number, budget in enumerate(budgets):
        for rho in shares:
            for seed in seeds:
                loss = 3 - 0.2 * number + depth * (rho - lowest) ** 2 + 0.002 * rng.standard_normal()
                labels = {"budget": budget, "rho": f"{rho:.0%}"}
                entries.append(entry(labels, seed, float(loss), rho, 0 if rho == 1 else int(1e5 * (1 - rho))))
    variants = {"budget": {budget: {} for budget in budgets}, "rho": {f"{rho:.0%}": {"budget.rho": rho} for rho in SHARES}}
    return sweep("allocation", variants, entries, "allocation", seeds, **changes)


def slots(seeds=(0, 1, 2), slope=-0.03, **changes):
    """A line over the logarithm of slots, and no memory."""
    offsets, rng = noise(seeds), np.random.default_rng(4)
    entries = []
    for rows in (0, 1_000, 10_000, 100_000):
        for seed in seeds:
            loss = 3.2 if not rows else 3.2 + slope * np.log10(rows) + 0.002 * rng.standard_normal()
            entries.append(entry({"rows": str(rows) if rows else "none"}, seed, float(loss + offsets[seed]), slots=rows))
    return sweep("slots", {"rows": {e["labels"]["rows"]: {} for e in entries}}, entries, "slots", seeds, **changes)


def ablation(seeds=(0, 1, 2), arms=ARMS, **changes):
    """Arms around a reference; seeds shift all arms, single points a little."""
    offsets, rng = noise(seeds, 0.02), np.random.default_rng(5)
    entries = [
        entry(
            {"arm": arm},
            seed,
            float(ARM_LOSSES[arm] + offsets[seed] + 0.003 * rng.standard_normal()),
            slots=0 if arm == "no memory" else 8000,
        )
        for arm in arms
        for seed in seeds
    ]
    return sweep("ablation", {"arm": arms}, entries, "ablation", seeds, **changes)


def comparison(seeds=(0, 1, 2), **changes):
    """Three kinds of model."""
    offsets = noise(seeds)
    losses = {"dense": 3.1, "experts": 3.05, "experts and memory": 3.0}
    entries = [
        entry({"arm": arm}, seed, float(loss + offsets[seed]), slots=8000 if "memory" in arm else 0)
        for arm, loss in losses.items()
        for seed in seeds
    ]
    return sweep("comparison", {"arm": {arm: {} for arm in losses}}, entries, "dense", seeds, **changes)


def score(kind, exact, answers=256):
    """All depths of one kind of question."""
    told = {"kind": kind, "length": 256, "depth": None, "answers": answers, "exact": exact, "share": exact / answers}
    return {**told, "low": 0.0, "high": 1.0, "log_probability": -1.5, "log_probability_error": 0.1, "rank": 3.0}


def corpus(fingerprint="ad80bab3f9356ae5"):
    """As ``engram corpus`` writes it."""
    found = {"n": 13, "ngrams": 1000, "shared": 75, "share": 0.075, "documents": 10, "documents_shared_over_half": 2}
    return {
        "command": "engram corpus",
        "fingerprint": fingerprint,
        "counts": {},
        "duplicates": {"exact": 3, "near": 4},
        "contamination": [{**found, "share_by_kind": {"code": 0.05, "prose": 0.1}}],
    }


def long_context(seeds=(0, 1), queries=(200, 205)):
    """As ``benchmarks/long_context.py`` writes it; ``queries``: exact answers of the model with a memory, by seed."""
    entries = []
    for seed in seeds:
        for model, exact in (("dense", (230, 128, 77)), ("engram_equal_loss", (240, queries[seed], 80))):
            scores = [score(kind, number) for kind, number in zip(("needle", "multi_query", "tracking"), exact)]
            entries.append(
                {"seed": seed, "model": model, "step": 100, "held_out_loss_before": 2.9, "held_out_loss": 3.1, "scores": scores}
            )
    return {
        "command": "python benchmarks/long_context.py",
        "hardware": "a machine",
        "versions": {},
        "sizes": {},
        "entries": entries,
    }


def copying():
    """As ``benchmarks/copying.py`` writes it: seed 0 copies without a memory, neither does in seed 1, which has no pair of equal loss."""
    entries = [
        {"model": model, "seed": seed, "step": step, "tokens": 1000 * step, "held_out_loss": 4.0 - step / 100, "copying": nats}
        for seed in (0, 1)
        for model, last in (("dense", 0.75 * (1 - seed)), ("engram", 0.05))
        for step, nats in ((50, 0.01), (100, last))
    ]
    pair = {"seed": 0, "dense": entries[1], "engram": {**entries[2], "held_out_loss": 3.0}}
    told = {"command": "python benchmarks/copying.py", "hardware": "a machine", "versions": {}}
    return {**told, "sizes": {"equal": 0.01}, "entries": entries, "pairs": [pair]}


def recall():
    """As ``engram recall`` writes it: one model, with its memory and without."""
    return {
        name: {"scores": [score("multi_query", exact)], "examples": 64, "seed": 0, "split": "test", "provenance": {}}
        for name, exact in (("without memory", 100), ("with memory", 200))
    }


def throughput():
    """As ``benchmarks/throughput.py`` writes it."""

    def spread(median):
        return {"median": median, "min": 0.9 * median, "max": 1.1 * median, "rounds": 25}

    entries = [
        {
            "backbone": "llama",
            "optimizer": optimizer,
            "table_rows": 100_238,
            "tokens_per_step": 2048,
            "seconds": {"without": spread(0.5), "with": spread(0.52)},
            "share_of_without": {"throughput": spread(0.96)},
        }
        for optimizer in ("adamw", "muon")
    ]
    told = {"command": "python benchmarks/throughput.py", "hardware": "a machine, 2 cores", "versions": {"torch": "2"}}
    return {**told, "threads": 2, "rounds": 25, "entries": entries}


def ngram_counts(difference=-0.2, fingerprint="ad80bab3f9356ae5", mixed=False):
    """As ``benchmarks/ngram_baseline.py`` writes it; ``difference``: to experts alone, and half of it to the best share with a memory."""

    def spread(mean):
        return {"mean": mean, "n": 3, "min": mean - 0.01, "max": mean + 0.01, "low": mean - 0.02, "high": mean + 0.02}

    def half(mean):
        return {"loss": spread(mean), "bits_per_byte": spread(mean / 2)}

    def less(mean):
        return {"rho": "1.00", "validation": half(mean - 0.1), "test": half(mean)}

    summary = [
        {
            "budget": budget,
            "order": order,
            "seeds": [0, 1, 2],
            "validation": half(4.1),
            "test": half(4.4),
            "less": {"experts alone": less(difference), "best with a memory": less(difference / 2)},
        }
        for budget in ("small", "large")
        for order in (1, 3, 5)
    ]
    points = [{"budget": entry["budget"], "order": entry["order"], "ngrams": [2000, 30_000]} for entry in summary]
    names = ("model", "counts", "mixture")
    mixtures = [
        {
            "arm": arm,
            "order": 3,
            "seed": seed,
            "weight_of_model": 0.4,
            "test": {name: {"bits_per_byte": 2.5 - n / 10} for n, name in enumerate(names)},
        }
        for arm in ("experts", "memory")
        for seed in range(3)
    ]
    asked = ("without - with", "without + counts - with", "with + counts - with", "without + counts - with + counts")
    differences = [
        {"without": "experts", "with": "memory", "order": 3, **{name: {"bits_per_byte": spread(0.1)} for name in asked}}
    ]
    told = {"command": "python benchmarks/ngram_baseline.py", "hardware": "a machine", "versions": {}, "text": fingerprint}
    told["held_out_text"] = {"test": {"documents": 14, "files": 1, "largest": "lib/ast.py", "largest_share": 0.4247}}
    found = {"smoothing": "modified", "points": points, "summary": summary}
    return {**told, **found, "mixtures": mixtures if mixed else [], "differences": differences if mixed else []}


def looks(seeds=(0, 1, 2), other=True):
    """As ``benchmarks/looks.py`` writes it: with a memory early blocks know more, are further on, and gates open where phrases end."""

    def layer(seed):
        means = {"completes": 0.75, "begins": 0.5, "same_word": 0.5 + seed / 100, "other": 0.25}
        means |= {f"completes_less_{name}": means["completes"] - means[name] for name in ("begins", "same_word", "other")}
        return {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name, mean in means.items()}

    def one(seed):
        cka = {"memory": {"map": [[0.5] * 4] * 4, "top": 4, "soft_alignment": [1.5, 2.0 + seed / 100, 2.5, 2.5]}}
        if other:
            cka["without"] = {"map": [[0.5] * 4] * 4, "top": 4, "soft_alignment": [1.0, 1.5, 2.0, 2.5]}
        return {
            "layer_ids": [1],
            "logit_lens": {
                "memory": [3.0, 1.0 - seed / 100, 0.5, 0.0],
                "off": [3.0, 2.5, 1.0, 0.0],
                "without": [2.0, 1.5, 0.5, 0.0],
            },
            "cka": cka,
            "phrases": {
                "wanted": 7,
                "phrases": {"regular expression": 3, "event loop": 2},
                "occurrences": 5,
                "documents": 2,
                "windows_left_out": 0,
                "layers": {"1": layer(seed)},
                "examples": [],
            },
        }

    text = {"tokens": 6000, "kinds": {"code": {"documents": 8, "windows": 9, "tokens": 6000}}}
    told = {"command": "python benchmarks/looks.py", "hardware": "a machine", "versions": {}}
    runs = {
        kind: {"recipe": {"seed": 0}, "held_out": {"test": {"loss": loss}}}
        for kind, loss in (("memory", 4.0), ("without", 4.25))
    }
    return {**told, "runs": runs, "entries": [{"seed": seed, "text": text, "looks_by_seed": one(seed)} for seed in seeds]}


def memory_off(seeds=(0, 1, 2), facts_off=20, reading_off=90, **changes):
    """As ``benchmarks/memory_off.py`` writes it: of 100 facts and notes 100 with the memory on, fewer with it off."""

    def found(facts, reading, loss):
        groups = {"facts": {"port": [facts, 100]}, "reading": {"needle, 128 tokens": [reading, 100]}}
        return {**groups, "known before": {"capitals": [100, 100]}, "held_out_loss": loss}

    entries = [
        {
            "seed": seed,
            "arm": arm,
            "start": start,
            "memory_dropout": dropout,
            "memory_off": {"on": found(100, 100, 3.0), "off": found(facts_off + seed, reading_off, 3.25)},
            "curve": [{"step": 50, "on": {"facts": 0.5, "needle": 1.0}, "off": {"facts": 0.25, "needle": 1.0}}],
            **changes,
        }
        for seed in seeds
        for arm, start, dropout in (("together", "bundled", 0.0), ("dropout", "bundled", 0.3), ("new", "empty", 0.0))
    ]
    told = {"command": "python benchmarks/memory_off.py", "hardware": "a machine", "versions": {}}
    return {**told, "chance": {"needle, 128 tokens": 0.25}, "before": found(0, 50, 3.5), "entries": entries}
