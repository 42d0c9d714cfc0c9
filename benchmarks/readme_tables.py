"""Write the tables of the README and of docs/ from `results/*.json`; with --check only say whether they are up to date."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from engram.experiments.statistics import mean_interval

ROOT = Path(__file__).parents[1]


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def source(result, command=None):
    hardware = result["hardware"].replace(", 1 threads", ", 1 thread")
    return f"\n\nRegenerate: `{command or result['command']}` ({hardware}; torch {result['versions']['torch']})."


def percent(entries, key):
    values = [100 * entry[key] / entry["prompts"] for entry in entries]
    low, high = min(values), max(values)
    return f"{low:.0f} %" if round(low) == round(high) else f"{low:.0f}-{high:.0f} %"


SEEDS_HAD = {
    "acronym": "12-25 -> 75 %",
    "element_name": "0-33 -> 67 %",
    "element_number": "0 %",
    "port": "0 %",
    "http": "0 %",
    "unit": "0 %",
}


def demo():
    result = load("demo")
    runs = result["runs"]
    rows = []
    for index, entry in enumerate(runs[0]["categories"]):
        same = [run["categories"][index] for run in runs]
        rows.append(
            (
                f"exact: {entry['category']}",
                entry["prompts"],
                percent(same, "before"),
                f"**{percent(same, 'after')}**",
                SEEDS_HAD[entry["category"]],
            )
        )
    known = [run["capitals"] for run in runs]
    kept = ", ".join(sorted({f"{k['still_right']} of {k['known']}" for k in known}))
    rows.append(
        ("capitals the base model knew, still right", known[0]["prompts"], known[0]["known"], f"**{kept}**", "83 -> 67 %")
    )
    bits = [run["bits_per_byte"] for run in runs]
    change = max(abs(b["change_percent"]) for b in bits)
    after = "-".join(sorted({f"{b['after']:.4f}" for b in bits}))
    rows.append(
        ("held-out bits per byte", "", f"{bits[0]['before']:.4f}", f"**{after}** (changed by at most {change:.3f} %)", "")
    )
    drift = max(run["drift"]["mean_kl"] for run in runs)
    rows.append(("KL to the base model on 60 neutral prompts (nats per token)", 60, "0", f"{drift:.4f}", ""))
    seconds = "-".join(str(s) for s in sorted({min(r["seconds"] for r in runs), max(r["seconds"] for r in runs)}))
    text = table(("", "prompts", "before", "after", "engram-poc"), rows)
    note = f"\n\n{len(runs)} seeds of the random reader, {seconds} s each; ranges are over seeds."
    note += " engram-poc: its published figures, for another base."
    return text + note + source(result)


def knowledge():
    result = load("knowledge")
    runs = result["runs"]
    everything, thousand = [run["everything"] for run in runs], [run["thousand"] for run in runs]
    groups = {
        "hand-written facts (6 categories)": ("acronym", "element_name", "element_number", "port", "http", "unit"),
        "patterns (4 categories)": ("code_idiom", "factual_recall", "format_transform", "error_fix"),
        "Unicode names": ("unicode",),
        "other tables of the standard library (9 categories)": (
            ["html", "mime", "errno_text", "errno_number", "signal", "http_status", "codec", "locale", "opcode"]
        ),
        "made-up pairs": ("synthetic",),
    }
    rows = []
    for name, members in groups.items():
        prompts = sum(everything[0]["categories"][c]["prompts"] for c in members)
        exact = [sum(e["categories"][c]["exact"] for c in members) for e in everything]
        held = [sum(e["categories_held_out"][c]["exact"] for c in members) for e in everything]
        asked = sum(everything[0]["categories_held_out"][c]["prompts"] for c in members)
        rows.append((name, f"{prompts:,}", f"**{_range(exact)}**", f"{_range(held)} of {asked:,}"))
    facts = table(("one memory of everything", "prompts", "exact", "exact, untaught phrasings"), rows)
    first = everything[0]
    texts = sum(kind["tokens"] for kind in first["harm"].values())
    known = first["known"]
    minutes, ratios = [e["seconds"] / 60 for e in everything], [e["latency"]["ratio"] for e in everything]
    far = [t["long_range"]["2000"] for t in thousand]
    bits = [100 * (e["bits_per_byte"]["memory"] / e["bits_per_byte"]["base"] - 1) for e in everything]
    right, changed = min(e["known"]["still_right"] for e in everything), max(e["known"]["changed"] for e in everything)
    seconds, failed = max(t["seconds"] for t in thousand), max(t["not_exact"] for t in thousand)
    more = [
        (f"teaching {first['facts']:,} facts", f"{_range(map(round, minutes))} minutes, {first['file_bytes'] / 1e6:.0f} MB"),
        (
            "KL to the base model on untaught text",
            f"{max(e['kl_to_base'] for e in everything):g} nats per token ({texts:,} tokens)",
        ),
        ("held-out bits per byte", f"at most {max(bits):+.3f} %"),
        ("capitals the base model knew, still right", f"{right} of {known['known']}, {changed} answers changed"),
        ("1,000 facts", f"{seconds:.0f} s, {thousand[0]['file_bytes'] / 1e6:.1f} MB; not exact: {failed}"),
        (
            "adding one more fact to those",
            f"at most {max(max(t['one_more_seconds']) for t in thousand):.2f} s, saving included",
        ),
        ("forgetting it again", "bit for bit" if all(t["forget_bit_for_bit"] for t in thousand) else "NOT bit for bit"),
        (
            "asked after 2,000 tokens of other text",
            f"{min(f['exact'] for f in far)} of {far[0]['asked']} exact (memory off: {far[0]['exact_off']})",
        ),
        (
            "time per token of text that reads no row",
            f"x{min(ratios):.2f} to x{max(ratios):.2f} of the base model's (7M parameters)",
        ),
    ]
    note = f"\n\n{len(runs)} seeds of addresses, reader and made-up values; ranges are over seeds. Bits per byte change only where a "
    note += "taught n-gram occurs, such as the code pattern `for key, value in`."
    return facts + "\n\n" + table(("", ""), more) + note + source(result)


def _range(values):
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def baselines():
    result = load("baselines")
    runs = [run["systems"] for run in result["runs"]]
    rows = []
    for name, first in runs[0].items():
        same = [run[name] for run in runs]
        cells = [_exact(same, part, patterns) for part in ("categories", "categories_held_out") for patterns in (False, True)]
        capitals = _range(s["capitals"]["still_right"] for s in same)
        kl = "-".join(dict.fromkeys(f"{worst(s['harm']['kl'] for s in same):.3g}" for worst in (min, max)))
        loss = f"{first['loss_first_epoch']:.2f} -> {first['loss_last_epoch']:.3f}" if "loss_first_epoch" in first else ""
        size = _size(first["bytes"]) if "bytes" in first else ""
        seconds = _range(round(s.get("cpu_seconds", s["seconds"])) for s in same)
        rows.append((name, *cells, capitals, kl if any(s["harm"]["kl"] for s in same) else "0", loss, size, f"{seconds} s"))
    asked = [
        _exact([runs[0]["base"]], part, patterns, "prompts")
        for part in ("categories", "categories_held_out")
        for patterns in (0, 1)
    ]
    header = ("", f"facts ({asked[0]})", f"patterns ({asked[1]})", f"facts, unseen phrasing ({asked[2]})")
    header += (f"patterns, unseen phrasing ({asked[3]})", f"capitals right, of {runs[0]['base']['capitals']['known']}")
    header += ("KL to the base model on other text", "loss, first and last epoch", "size")
    header += ("time of the processor" if "cpu_seconds" in runs[0]["base"] else "time",)
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds (ranges are over seeds)"
    note = f"\n\nCounts of exact answers; {seeds}, one thread. {_how_trained(result)} "
    note += (
        "Prompt stuffing puts the three nearest taught prompts, with their answers, in front of the question. engram-poc reported "
        "8.6 -> 14.1 % on patterns for its LoRA."
    )
    return table(header, rows) + note + source(result)


def stacked():
    result = load("stacked")
    rows = []
    for over, name in (("model", "the model alone"), ("trained memory", "the model with its trained memory")):
        same = [run for run in result["runs"] if run["over"] == over]
        exact = f"{_range(run['exact'] for run in same)} of {same[0]['prompts']}"
        changed = f"{max(run['tokens_changed'] for run in same)} of {same[0]['tokens']:,}"
        bits = [run["bits_per_byte"] for run in same]
        after = "-".join(sorted({f"{b['memory']:.4f}" for b in bits}))
        known = f"{_range(run['known']['still_right'] for run in same)} of {same[0]['known']['known']}"
        kl = max(run["kl"] for run in same)
        rows.append((name, exact, f"{kl:.2g}", changed, f"{bits[0]['base']:.4f} -> {after}", known))
    header = (
        "facts on top of",
        "exact",
        "KL to the same without the facts",
        "next tokens changed",
        "held-out bits per byte, without and with the facts",
    )
    seeds = len({run["seed"] for run in result["runs"]})
    note = f"\n\n{seeds} seeds of addresses and reader; ranges are over seeds, KL (nats per token) and changes are the worst."
    return table((*header, "capitals known without the facts, still right"), rows) + note + source(result)


def _size(count):
    return f"{count / 1e3:.0f} kB" if count < 1e5 else f"{count / 1e6:.1f} MB"


def _how_trained(result):
    if "settings" not in result:  # made before settings were tried
        note = f"Fine-tuning and LoRA (rank 16): AdamW, {result['runs'][0]['epochs']} epochs."
        return f"{note} Times were taken beside other work on the second core." if result.get("beside_other_work") else note
    names = dict.fromkeys(part["system"] for part in result["settings"])
    rates = {name: [p["lr"] for p in result["settings"] if p["system"] == name and not p["replay"]] for name in names}
    tried = "; ".join(f"{name} {', '.join(f'{rate:g}' for rate in rates[name])}" for name in names)
    shown = "; ".join(f"{name} {_setting([run['systems'][name] for run in result['runs']], rates[name])}" for name in names)
    return (
        "Fine-tuning and LoRA (rank 16): AdamW, stopped once every taught prompt is exact, at most "
        f"{result['protocol']['epochs']} epochs. Learning rates tried: {tried}; each with and without replay (half of the tokens of "
        "every batch are the base model's own training text). Shown: of the settings with the highest recall, the one with the least "
        f"KL, chosen on texts other than those reported ({shown}). Suffix dictionary: the shortest distinctive end of each taught "
        "prompt and its answer, without a network; the base model answers everything else."
    )


def _setting(same, rates):
    replay = "with" if same[0]["replay"] else "without"
    edge = ", the highest rate tried" if same[0]["lr"] == max(rates) else ""
    return f"{same[0]['lr']:g} {replay} replay, {_range(s['epochs'] for s in same)} epochs{edge}"


def _exact(systems, part, patterns, field="exact"):
    of_patterns = ("code_idiom", "factual_recall", "format_transform", "error_fix")
    counts = [sum(share[field] for c, share in s[part].items() if (c in of_patterns) == bool(patterns)) for s in systems]
    return _range(counts)


def peers():
    """What the other tables say beside other implementations, in a line each."""
    hashed = [load(file)["benchmarks"]["hash"]["settings"] for file in ("bench", "bench_avx2")]
    many, one = (
        "x" + _range(round(s[index]["variants"]["engram, arrays"]["speedup"]["median"]) for s in hashed).replace("-", " to x")
        for index in (-1, 0)
    )
    largest = max(load("train_step_peer")["entries"], key=lambda e: (e["rows_per_layer"], e["mode"] == "trainer"))
    ours, theirs = largest["engram"], largest["peer"]
    decoding = {name: 100 * entry["overhead_paired"] for name, entry in load("decode")["variants"].items()}
    several = load("processes")
    systems = [run["systems"] for run in load("baselines")["runs"]]
    kl = {
        n: "-".join(f"{worst(s[n]['harm']['kl'] for s in systems):.2f}" for worst in (min, max))
        for n in ("full fine-tuning", "LoRA")
    }
    known = systems[0]["base"]["capitals"]["still_right"]
    kept = _range(s["Engram"]["capitals"]["still_right"] for s in systems)
    facts = _exact([s["Engram"] for s in systems], "categories", False)
    rows = [
        ("speed of hashing 16,384 tokens; one token", f"{many}; {one}", "1 (the paper's demo, NumPy)", "speed.md#addresses"),
        (
            f"training step, two layers of {largest['rows_per_layer'] / 1e6:.0f}M rows of 64 floats (time, peak memory)",
            f"{ours['seconds']['median']:.2f} s, {ours['peak_bytes'] / 1e9:.1f} GB",
            f"{theirs['seconds']['median']:.2f} s, {theirs['peak_bytes'] / 1e9:.1f} GB (engram-peft)",
            "speed.md#a-training-step",
        ),
        (
            f"training step in {several['processes']} processes, relative to one",
            f"x{several['ways']['copies']['of_one']['median']:.2f}",
            f"x{several['engram_peft']['of_one']['median']:.2f} (engram-peft)",
            "speed.md#several-processes",
        ),
        (
            "decoding, time that two layers add per token",
            f"{decoding['Engram, 2 layers']:+.1f} %",
            f"{decoding['engram-peft, 2 layers, M = 1']:+.1f} % (engram-peft)",
            "speed.md#a-decoding-step",
        ),
        (
            "taught facts answered exactly",
            f"{facts} of {_exact([systems[0]['base']], 'categories', False, 'prompts')}",
            "0 to 75 % by kind (engram-poc)",
            "taught_memories.md#against-other-ways-of-teaching-the-same-facts",
        ),
        (
            "capitals the base model knew, still right",
            f"{kept} of {known}",
            "83 -> 67 % (engram-poc)",
            "taught_memories.md#against-other-ways-of-teaching-the-same-facts",
        ),
        (
            "drift on other text (KL, nats per token)",
            "0, bit for bit",
            f"{kl['LoRA']} (LoRA), {kl['full fine-tuning']} (fine-tuning)",
            "taught_memories.md#against-other-ways-of-teaching-the-same-facts",
        ),
    ]
    cells = [
        (what, f"**{engram}**", others, f"[docs/{link.partition('#')[0]}](docs/{link})") for what, engram, others, link in rows
    ]
    note = f"\n\nExcerpts from the linked tables. engram-peft is version 1.2.7; with {largest['rows_per_layer'] / 1e6:.0f}M rows each library "
    note += "runs its own trainer. Both sides were measured in one run, except engram-peft in several processes, which ran after ours. "
    note += "engram-poc: its published figures, for another base."
    behind = [load(name) for name in ("bench", "bench_avx2", "train_step_peer", "processes", "decode", "baselines")]
    commands = ", ".join(f"`{result['command']}`" for result in behind)
    hardware = ", ".join(dict.fromkeys(result["hardware"].rpartition(",")[0] for result in behind))
    return table(("", "engram", "compared with", "measured in"), cells) + f"{note}\n\nRegenerate: {commands} ({hardware})."


def capacity():
    result = load("capacity")
    points = result["points"]
    counts = sorted({p["facts"] for p in points})
    rows = []
    for rows_per_head in sorted({p["rows_per_head"] for p in points}):
        for tags in (True, False):
            line = [p for p in points if p["rows_per_head"] == rows_per_head and p["tags"] == tags]
            cells = [[p for p in line if p["facts"] == count] for count in counts]
            shown = [f"{_share(min(p['recall'] for p in c))}, {max(p['kl'] for p in c):.2g}" if c else "" for c in cells]
            rows.append((f"{rows_per_head:,}", "yes" if tags else "ignored", *shown))
    header = ("rows per head", "tags", *(f"{count:,} facts" for count in counts))
    note = "\n\nEach cell: exact answers, and KL to the base model on untaught text (nats per token). A fact gets one attempt; if it fails it "
    note += "is left out, and counts as wrong."
    seeds = len(result["seed"])
    note += f" {'One seed' if seeds == 1 else f'{seeds} seeds, the worst of each'}."
    return table(header, rows) + note + source(result)


def _share(part):
    """Percent, which are a hundred only if nothing is missing."""
    return "100 %" if part == 1 else f"{100 * part:.2f} %"


def readers():
    result = load("readers")
    runs = result["runs"]
    names = {"seeded": "random signs (default)", "trained": "trained on other facts", "head": "fitted to the output head"}
    rows = []
    for width in sorted({run["values_per_ngram"] for run in runs}):
        for kind, name in names.items():
            same = [run for run in runs if run["values_per_ngram"] == width and run["reader"] == kind]
            failed, passes = _range(r["not_exact"] for r in same), _range(r["passes"] for r in same)
            far = f"{_range(r['far_exact'] for r in same)} of {same[0]['far_asked']}"
            row_bytes = same[0]["row_bytes"] / same[0]["facts"]
            rows.append((width, name, failed, passes, far, f"{row_bytes:.0f}"))
    header = (
        "values per n-gram",
        "reader",
        f"facts that failed, of {runs[0]['facts']}",
        "passes",
        "exact after 500 tokens of other text",
        "row bytes per fact",
    )
    note = (
        f"\n\n{len({r['seed'] for r in runs})} seeds; ranges are over seeds. Passes: over the prompts that are not learned yet."
    )
    return table(header, rows) + note + source(result)


def larger_models():
    result = load("larger_models")
    rows = [
        (
            entry["model"],
            f"{entry['seconds']:.0f} s",
            entry["steps"],
            f"{entry['one_more_seconds']:.1f} s",
            f"{1000 * entry['forward_seconds']:.0f} ms",
            f"{entry['resident_before'] / 1e9:.1f} + {max(0, entry['peak_bytes'] - entry['resident_before']) / 1e9:.1f} GB",
            f"{entry['saved_bytes'] / 1000:.0f} kB",
            f"{entry['exact']} of {entry['facts']}",
        )
        for entry in result["entries"]
    ]
    first = result["entries"][0]
    header = (
        "model",
        f"{first['facts'] - 1} facts ({first['prompts']} prompts)",
        "passes",
        "one more fact",
        "the base model's pass over one prompt",
        "memory in use before, and more while teaching",
        "saved",
        "exact",
    )
    note = (
        f"\n\nWeights in {first['dtype']}. All models but the first have random weights in the shape of the named ones: what time and memory "
        "teaching takes depends on the shape; that all facts are exact holds for these weights."
    )
    return table(header, rows) + note + source(result)


def routing():
    result = load("routing")
    runs = [run["systems"] for run in result["runs"]]
    rows = []
    for name in runs[0]:
        tags, router = name.split(", ")
        same = [run[name] for run in runs]
        kl, changed = [], []
        for s in same:
            tokens = sum(h["tokens"] for h in s["harm"].values())
            kl.append(sum(h["kl"] * h["tokens"] for h in s["harm"].values()) / tokens)
            changed.append(sum(h["tokens_changed"] for h in s["harm"].values()))
        exact = f"{_range(s['exact'] for s in same)} of {same[0]['prompts']}"
        rows.append((tags, router, exact, f"{max(kl):.2g}", f"{_range(changed)} of {tokens:,}"))
    header = ("rows", "router", "taught prompts, exact", "KL to the base model on untaught text", "next tokens changed")
    return table(header, rows) + f"\n\n{len(runs)} seeds; ranges are over seeds, KL is the worst." + source(result)


def route_by_gain():
    result = load("route_by_gain")
    runs = [run["kinds"] for run in result["runs"]]
    rows = []
    for same in zip(*runs):
        gains = [[kind[which] for kind in same] for which in ("always", "routed", "best")]
        shown = [f"{statistics.mean(found):+.3f} ({min(found):+.2f} to {max(found):+.2f})" for found in gains]
        rows.append((same[0]["kind"], f"{_range(kind['read'] for kind in same)} of {same[0]['texts']}", *shown))
    header = (
        "kind of text",
        "texts that the router lets read the memory",
        "gain if all read it",
        "gain, routed",
        "gain if only texts that it helps read it",
    )
    note = f"\n\nGain in nats per token over the model alone, on texts left out of the fit; mean and range over {len(runs)} ways to divide the "
    note += f"texts. The router looks at the first {result['first_tokens']} tokens; gains are over whole texts, or the first "
    note += "256 tokens of long ones."
    return table(header, rows) + note + source(result)


def joint_training():
    result = load("joint_training")
    rows = [
        (name, f"{statistics.mean(entry['seeds']):.3f}", f"{entry['min']:.3f}-{entry['max']:.3f}")
        for name, entry in (
            ("without a memory", result["held_out_loss"]["dense"]),
            ("with a memory", result["held_out_loss"]["engram"]),
        )
    ]
    gain, seeds = result["gain"], len(result["gain"]["seeds"])
    ends = _interval(mean_interval(gain["seeds"]), 3)
    note = (
        f"\n\n{result['sizes']['steps']} steps. The memory gains {ends} nats per token (95 %, Student's t over seeds). Steps and text are the "
        "same; the memory's parameters and operations come on top, and both runs use one learning rate, which was not tuned."
    )
    return (
        table(("", f"held-out loss, mean of {seeds} seeds (nats per token)", "range over seeds"), rows) + note + source(result)
    )


def _interval(found, digits):
    mean, low, high = (f"{found[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def bundle():
    result = load("bundle")
    bits, capitals = result["bits_per_byte"], result["capitals_known"]
    names = {
        "before": "after the first stage (`runs/base`)",
        "plain": "second stage without a memory",
        "joint": "second stage with a memory",
        "shipped": "as bundled (bfloat16 weights, int8 rows)",
        "shipped, memory off": "as bundled, memory off",
    }
    rows = [(text, f"{bits[name]:.4f}", f"{capitals[name]} of {capitals['asked']}") for name, text in names.items()]
    gain, off = (_interval(result["difference"][pair], 4) for pair in ("joint - plain", "shipped, memory off - plain"))
    tokens, size = result["runs"]["joint"]["tokens"], sum(result["shipped_bytes"].values())
    note = (
        f"\n\n{tokens / 1e6:.0f}M tokens in the second stage, one run each, {result['documents']} held-out documents. With a memory minus "
        f"without: {gain} bits per byte. Bundled with its memory off minus without a memory: {off} (95 %, over documents). Model and memory "
        f"take {size / 1e6:.1f} MB together."
    )
    overlap = load("bundle_overlap")
    (worst, share), files = next(iter(overlap["most_shared"].items())), overlap["all"]["files"]
    switched = [_interval(overlap[of]["on - off"], 4) for of in ("all", "apart")]
    note += (
        f" The documents come from {files} files, and {100 * share:.0f} % of the word 13-grams of one (`{worst}`) are in the training text "
        f"too: memory on minus off is {switched[0]} on all, {switched[1]} without documents that share more than half of their 13-grams."
    )
    both = f"{result['command']}` and `{overlap['command']}"
    return table(("", "held-out bits per byte", "capitals known"), rows) + note + source(result, both)


def train_step():
    return _train_step("train_step")


def train_step_rows():
    return _train_step("train_step_rows")


def _train_step(file):
    result = load(file)
    names = {
        "frozen": "tables frozen",
        "sparse": "row-sparse Adam (EngramAdamW)",
        "dense": "dense gradients, torch AdamW",
        "dense_fused": "dense gradients, torch AdamW (fused)",
    }
    counts = sorted({entry["rows_per_layer"] for entry in result["entries"]})
    rows = []
    for kind, name in names.items():
        cells = {e["rows_per_layer"]: e for e in result["entries"] if e["kind"] == kind}
        if not cells:
            continue
        peak = cells[counts[-1]]["peak_bytes"] / 1e9
        rows.append((name, *(_step_cell(cells[n]) for n in counts), f"{peak:.1f} GB"))
    note = "\n\nMedian seconds; in brackets median and mean, relative to row-sparse Adam at the smallest size. Tables hold random values, "
    note += "and every step reads new rows."
    header = ("rows per layer", *(f"{n:,}" for n in counts), f"peak memory at {counts[-1]:,}")
    return table(header, rows) + note + source(result)


def _step_cell(entry):
    return f"{entry['seconds']['median']:.2f} s (x{entry['to_smallest_sparse']:.2f}, x{entry['mean_to_smallest_sparse']:.2f})"


def train_step_peer():
    result = load("train_step_peer")
    rows = []
    for entry in result["entries"]:
        ours, theirs = entry["engram"], entry["peer"]
        peaks = f"{ours['peak_bytes'] / 1e9:.1f} and {theirs['peak_bytes'] / 1e9:.1f} GB (x{entry['memory']:.2f})"
        seconds = f"{ours['seconds']['median']:.2f} and {theirs['seconds']['median']:.2f} s"
        rows.append((f"{entry['rows_per_layer']:,}", entry["mode"], seconds, f"x{entry['speed_up']:.2f}", peaks))
    header = ("rows per layer", "loop", "step: engram, engram-peft", "engram is faster by", "peak memory: engram, engram-peft")
    return table(header, rows) + source(result)


def processes():
    result = load("processes")
    names = {
        "one": "one process with the whole batch",
        "copies": "copies (`replicate_tables`)",
        "divided": "parts (`sharded=True`)",
        "model": "parts, and the model divided too (`shard_model`)",
        "ddp": "DistributedDataParallel alone: dense gradients, torch's AdamW",
    }
    rows = []
    for way, name in names.items():
        measured = result["ways"][way]
        sizes = [f"{measured['bytes'][kind] / 1e6:,.0f} MB" for kind in ("rows", "states", "weights")]
        of_one = "" if way == "one" else _ratio(measured["of_one"])
        rows.append((name, f"{measured['seconds']['median']:.2f} s", of_one, *sizes))
    header = ("", "step", "relative to one process", "rows per process", "their optimiser state", "other weights")
    peer, count = result["engram_peft"], result["processes"]
    note = f"\n\n{count} processes of one thread each on one machine, gloo; {result['rows'][0]:,} rows of 64 floats in each of two layers."
    note += " Medians, in brackets least and most; all ways run in turn, step by step, and give the same losses."
    note += f" engram-peft {peer['versions']['engram-peft']} (its trainer, the runs one after the other): {peer['one']['median']:.2f} s in"
    note += f" one process, {peer['several']['median']:.2f} s in {count}, x{peer['of_one']['median']:.2f}."
    return table(header, rows) + note + source(result)


def own_tables():
    result = load("own_tables")
    size, tokens = result["table_bytes"] / 1e9, result["sizes"]["tokens"]
    rows = []
    for name, measured in result["variants"].items():
        same = "the same bit for bit" if measured["same_logits"] else f"{measured['same_tokens']} of {tokens} tokens the same"
        ratio = "" if name == "transformers" else _ratio(measured["times_transformers"])
        peak = f"{measured['peak_bytes']['median'] / 1e6:,.0f} MB"
        shown = "transformers, `nn.Embedding`" if name == "transformers" else name
        rows.append((shown, peak, f"{1000 * measured['seconds_per_token']['median']:.1f} ms", ratio, same))
    header = ("rows in", "peak memory", "per token", "relative to transformers", "answers")
    note = f"\n\nA table of {size:.1f} GB in float32, random weights, {tokens} tokens decoded; medians, in brackets the range over rounds."
    note += " With random weights many tokens are almost equally likely, so rows in fewer bits soon lead to others."
    tight = result["in_half_of_the_memory"]
    if tight["memory_limit_bytes"]:
        found = [f"{name} {_in_little_memory(tight[name.strip('`')], tokens)}" for name in ("transformers", "`file`")]
        note += f" In a control group limited to {tight['memory_limit_bytes'] / 1e9:.1f} GB, {' and '.join(found)}."
    return table(header, rows) + note + source(result)


def _in_little_memory(found, tokens):
    return "was killed" if found is None else f"gave the same {found['same_tokens']} of {tokens} tokens"


def _ratio(values):
    return f"x{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def bench(name, file="bench"):
    """One benchmark of `engram bench`: a row per alternative, a column per setting."""
    result = load(file)
    settings = result["benchmarks"][name]["settings"]
    names = list(dict.fromkeys(variant for setting in settings for variant in setting["variants"]))
    unit = result["benchmarks"][name]["unit"]
    rows = []
    for variant in names:
        measured = [setting["variants"].get(variant) for setting in settings]
        rows.append((variant, *("" if m is None else _speed(m) for m in measured)))
    text = table((f"M {unit} per second", *map(_label, settings)), rows)
    note = f"\n\nMedians of {result['rounds']} rounds, in each of which every line has its turn; in brackets: speed relative to the first line."
    for limit, meaning in result["benchmarks"][name]["notes"].items():
        note += f" `{limit}`: {meaning}."
    return text + note + source(result)


def _label(setting):
    return "1 token" if setting["label"] == "1 tokens" else setting["label"]


def _speed(measured):
    return f"{measured['per_second'] / 1e6:.3g} (x{measured['speedup']['median']:.2f})"


def bench_hash():
    return bench("hash")


def bench_hash_avx2():
    return bench("hash", "bench_avx2")


def bench_gather_avx2():
    return bench_gather("bench_avx2")


def bench_gather(file="bench"):
    result = load(file)["benchmarks"]["gather"]["settings"]
    parts = []
    for setting in result:
        rows = [
            (name, f"{m['per_second'] / 1e6:.1f}", f"x{m['speedup']['median']:.2f}") for name, m in setting["variants"].items()
        ]
        parts.append(table((setting["label"], "M rows per second", "relative to the first line"), rows))
    note = "\n\nLimit: every byte of the rows is read and summed, with many loads in flight; nothing is written unless the line says so. Where "
    note += "PyTorch allocates outputs of this size (33 MB), touching their pages for the first time costs more than anything else; engram "
    note += "keeps such memory and reuses it."
    return "\n\n".join(parts) + note + source(load(file))


def bench_tiers():
    return bench("tiers")


def bench_cold():
    return bench("cold")


def bench_layer():
    result = load("bench")
    settings = result["benchmarks"]["layer"]["settings"]
    names = list(settings[0]["variants"])
    rows = [(name, *(f"{1e6 * s['variants'][name]['seconds']['median']:,.0f}" for s in settings)) for name in names]
    note = (
        "\n\nHidden size 576, d_mem 1280 (values read per token), orders 2 and 3 with 8 heads each, a convolution; the hash is "
    )
    note += "that of one layer."
    return table(("microseconds", *map(_label, settings)), rows) + note + source(result)


def decode():
    result = load("decode")
    variants = result["variants"]
    rows = []
    for name, entry in variants.items():
        if name == "base":
            rows.append((name, f"{1e3 * entry['seconds']['median']:.1f} ms", ""))
        elif name == "base again":
            noise = 100 * entry["overhead_paired"]
        else:
            rows.append((name, f"{1e3 * entry['seconds']['median']:.1f} ms", f"{100 * entry['overhead_paired']:+.1f} %"))
    note = "\n\nLlama of 30 layers, hidden size 576, 135M parameters. Engram: d_mem 1280, orders 2 and 3, M = 1, a convolution (M: residual "
    note += f"streams). Overheads are medians of ratios token by token; that of the base against a copy of itself is {noise:+.1f} %. "
    note += "engram-peft 1.2.7 is compared with a copy of the base of its own."
    return table(("", "per token", "overhead"), rows) + note + source(result)


def formats():
    result = load("formats")
    runs = result["runs"]
    rows = []
    for name, first in runs[0]["joint"].items():
        joint = [run["joint"] for run in runs]
        change = [100 * (j[name]["held_out_loss"] / j["float32"]["held_out_loss"] - 1) for j in joint]
        worst = max(change)
        exact = min(run["taught"][name]["exact"] for run in runs)
        size = first["bytes"] / runs[0]["joint"]["float32"]["bytes"]
        error = max(j[name]["relative_error"] for j in joint)
        facts = f"{exact} of {runs[0]['taught'][name]['facts']}"
        rows.append((name, f"x{size:.2f}", f"{error:.4f}", f"{worst:+.3f} %", facts))
    header = ("rows", "size", "relative RMS error of rows", "change of held-out loss, jointly trained", "taught facts exact")
    note = f"\n\n{len(runs)} seeds, the worst of each; jointly trained for {result['sizes']['steps']} steps."
    return table(header, rows) + note + source(result)


def larger_than_memory():
    result = load("larger_than_memory")
    rows = []
    for entry in result["variants"]:
        bound = "none" if entry["resident_bytes"] is None else f"{entry['resident_bytes'] / 2**20:.0f} MB"
        speeds = entry["rows_per_second"]
        per_second = [f"{speeds[k]:,.0f}" for k in ("looked up at random", "trained at random", "walked in order")]
        rows.append((bound, *per_second, f"{entry['peak_bytes'] / 2**20:.0f} MB"))
    first = result["variants"][0]
    header = (
        "`resident_bytes`",
        "rows per second: random look-ups",
        "rows per second: training steps",
        "rows per second: in order",
        "peak memory",
    )
    limit = first["memory_limit_bytes"]
    process = (
        f"that is given {limit / 2**20:.0f} MB (control group), from disk" if limit else "without a limit, from disk or cache"
    )
    note = f"\n\nA table of {first['table_bytes'] / 2**30:.0f} GB in a process {process}."
    return table(header, rows) + note + source(result)


def allocation():
    """Loss and gain at every share, the budgets side by side."""
    result = load("sweep_allocation")
    curves = {name: {float(row["label"]): row for row in summary["curve"]} for name, summary in result["summary"].items()}
    shares = sorted(set().union(*curves.values()), reverse=True)
    rows = []
    for share in shares:
        cells = [f"{100 * share:.0f} %"]
        for curve in curves.values():
            row = curve.get(share)
            gain = row and row["against_experts_alone"]
            cells += [f"{row['experts']}, {row['table_rows']:,}", f"{row['loss']['mean']:.3f}"] if row else ["", ""]
            known = gain and gain["low"] is not None
            cells.append(f"{-gain['mean']:.3f} ({-gain['high']:.3f}-{-gain['low']:.3f})" if known else "")
        rows.append(cells)
    counts = load("ngram_baseline")
    rows.append(["trigram counts, nothing trained", *(cell for name in curves for cell in _trigram_cells(counts, name))])
    notes = []
    for name, curve in curves.items():
        row, point = next(iter(curve.values())), next(p for p in result["points"] if p["labels"]["budget"] == name)
        notes.append(
            f"`{name}`: {row['total'] / 1e6:.2f} M parameters, {row['active'] / 1e3:.0f} k per token (without embeddings), "
            f"{point['tokens'] / 1e6:.1f} M tokens"
        )
    heads = [f"{name}: {what}" for name in curves for what in ("experts, rows", "held-out loss", "gain")]
    seeds = next(iter(result["summary"].values()))["curve"][0]["loss"]["n"]
    note = f"\n\n{'; '.join(notes)}; {seeds} seeds. Gain: loss of experts alone minus this loss, seed by seed, with 95 % intervals."
    note += _mixed(counts)
    both = f"{result['command']}` and `{counts['command']}"
    return table(["experts' share of sparse parameters", *heads], rows) + note + source(result, both)


def _mixed(counts):
    """What a memory gives a model beyond counts; nothing where no models were mixed with them."""
    pair = ("dense, equal operations", "dense with memory", 3)
    same = [d for d in counts["differences"] if (d["without"], d["with"], d["order"]) == pair]
    if not same:
        return ""
    alone, mixed = (same[0][what]["bits_per_byte"] for what in ("without - with", "without + counts - with + counts"))
    return (
        f" With a memory a dense model gains {_interval(alone, 3)} bits per byte; if both are mixed with the trigram counts, "
        f"{_interval(mixed, 3)}."
    )


def _trigram_cells(counts, budget):
    """n-grams kept, loss and gain of Kneser-Ney counts of a budget's tokens."""
    (entry,) = (e for e in counts["summary"] if (e["budget"], e["order"]) == (budget, 3))
    kept = statistics.fmean(sum(p["ngrams"]) for p in counts["points"] if (p["budget"], p["order"]) == (budget, 3))
    gain = entry["less"]["experts alone"]["test"]["loss"]
    shown = f"{-gain['mean']:.3f} ({-gain['high']:.3f}-{-gain['low']:.3f})"
    return [f"{kept:,.0f} n-grams", f"{entry['test']['loss']['mean']:.3f}", shown]


def base_model():
    result = load("base_model")
    alone, with_memory = result["alone"], result["with_memory"]
    tokens, seconds = (sum(stage[key] for stage in result["stages"]) for key in ("tokens", "seconds"))
    rows = [
        (
            "architecture",
            f"Llama, {result['parameters']:,} parameters; memory at blocks 1 and 3, {result['parameters_of_memory']:,}",
        ),
        (
            "size",
            " + ".join(f"{size / 1e6:.1f} MB" for size in result["bytes"].values()) + " (model with its tokenizer, memory)",
        ),
        (
            "trained on",
            f"{tokens / 1e6:.1f} M tokens of the standard library and hand-written text, {seconds / 60:.0f} minutes in all",
        ),
        (
            f"held-out bits per byte ({result['held_out_documents']} documents)",
            f"{alone['bits_per_byte']:.3f} alone, {with_memory['bits_per_byte']:.3f} with its memory",
        ),
        (
            f"capitals known ({result['prompts']} prompts: 117 countries, three phrasings)",
            f"{alone['capitals']} alone, {with_memory['capitals']} with its memory",
        ),
    ]
    commands = " and ".join(f"`{stage['command']}`" for stage in result["stages"])
    kinds = [
        (
            kind,
            found["tokens"],
            f"{found['loss_off']['mean']:.2f}",
            f"{found['loss_on']['mean']:.2f}",
            _interval(found["lost"], 2),
        )
        for kind, found in result["kinds_of_text"].items()
    ]
    header = ("kind of text", "tokens", "nats per token, alone", "with its memory", "loss alone minus with memory")
    return table(("", ""), rows) + f"\n\nMade by {commands}.\n\n" + table(header, kinds) + source(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if not _up_to_date(file, args.check)]
    if args.check and stale:
        sys.exit(f"tables are out of date in {', '.join(f.name for f in stale)}: run python benchmarks/readme_tables.py")


def _up_to_date(file, keep):
    old = file.read_text()
    new = re.sub(
        r"<!-- table: (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- table: {found[1]} -->\n{globals()[found[1]]()}\n<!-- end -->",
        old,
        flags=re.DOTALL,
    )
    if not keep and new != old:
        file.write_text(new)
    return new == old


if __name__ == "__main__":
    main()
