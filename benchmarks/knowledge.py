"""What fits into a memory, how exactly, how fast, and what it harms: the figures of the README's knowledge table.

One memory of everything (hand-written facts, patterns, tables of the standard library, 3,871 arbitrary pairs), one of a thousand facts, and
the long-range task, for every seed. A seed that is in the result file already is skipped.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import add_entries, entries_of, result_file

from engram import MemoryEditor, load_bundled, load_facts
from engram.data.corpus import held_out_standard_library
from engram.data.generate import write_generated
from engram.data.long_range import after_distraction
from engram.data.texts import load_texts
from engram.evaluation import check_facts, evaluate_memory

BUNDLED = Path(__file__).parents[1] / "src" / "engram" / "bundled"
CORPUS = Path(__file__).parents[1] / "corpus"
SLICE = 1000
DISTANCES = (50, 200, 1000, 2000)
ASKED_FAR = 120
UNSEEN = ("held_out/prose.txt",)  # in no training text of the base model


def all_facts(seed, folder):
    write_generated(Path(folder) / "generated.yaml", seed=seed)
    return [
        *load_facts(BUNDLED / "facts.yaml"),
        *load_facts(BUNDLED / "patterns.yaml"),
        *load_facts(Path(folder) / "generated.yaml"),
    ]


def texts_not_taught():
    other = load_texts(BUNDLED / "none_of_its_business.yaml")
    other["library"] = [doc.text[:1200] for doc in held_out_standard_library()][:60]
    other["unseen prose"] = [text for name in UNSEEN for text in (CORPUS / name).read_text().split("\n<|doc|>\n")][:60]
    return other


def teach(editor, facts):
    started, not_exact, conflicts = time.perf_counter(), {}, 0
    for start in range(0, len(facts), SLICE):
        report = editor.teach(facts[start : start + SLICE])
        not_exact.update(report.not_exact)
        conflicts += report.rows_in_conflict
        print(
            f"  {start + len(facts[start : start + SLICE])} facts, {time.perf_counter() - started:.0f} s, not exact: {len(not_exact)}",
            flush=True,
        )
    return {"seconds": time.perf_counter() - started, "not_exact": len(not_exact), "rows_in_conflict": conflicts}


def tables(editor):
    return [
        t.clone()
        for layer in editor.memory.engrams
        for t in (editor.table(layer).row_ids, editor.table(layer).tags, editor.table(layer).weight)
    ]


def large(model, tokenizer, facts, seed):
    editor = MemoryEditor.create(model, tokenizer, seed=seed)
    taught = teach(editor, facts)
    capitals = load_facts(BUNDLED / "capitals.yaml")
    result = evaluate_memory(
        editor.memory, tokenizer, facts, texts_not_taught(), [d.text[:1500] for d in held_out_standard_library()][:40], capitals
    ).to_dict()
    wrong = [f for f in result.pop("facts") if not f["exact"] and not f["held_out"]]
    with tempfile.TemporaryDirectory() as folder:
        editor.save(folder)
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
    editor.memory.unload()
    return {"facts": len(facts), **taught, **result, "file_bytes": size, "wrong": wrong[:10]}


def thousand(model, tokenizer, facts, extra, seed):
    editor = MemoryEditor.create(model, tokenizer, seed=seed)
    taught = teach(editor, facts)
    before = tables(editor)
    times, reverified = [], 0
    for fact in extra:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            report = editor.teach([fact])
            editor.save(folder)
            times.append(time.perf_counter() - started)
            reverified += report.reverified
            size = sum(f.stat().st_size for f in Path(folder).iterdir())
    exact = sum(editor.verify().values())
    editor.forget([fact.id for fact in extra])
    same = all(torch.equal(a, b) for a, b in zip(before, tables(editor)))
    far = {}
    sample = [f for f in facts if f.category not in ("synthetic", "unicode")][:: max(1, len(facts) // ASKED_FAR)][:ASKED_FAR]
    distraction = [(CORPUS / name).read_text() for name in UNSEEN]
    for tokens in DISTANCES:
        one_prompt = [type(f)(f.prompts[:1], f.answer, f.category, (), f.id) for f in sample]
        asked = after_distraction(tokenizer, one_prompt, distraction, tokens)
        answers = check_facts(editor.memory, tokenizer, asked, batch_size=16)
        far[str(tokens)] = {"asked": len(answers), "exact": sum(a.exact for a in answers)}
        if tokens in (50, 2000):
            with editor.memory.disable_engram():
                far[str(tokens)]["exact_off"] = sum(
                    a.exact for a in check_facts(editor.memory, tokenizer, asked, batch_size=16)
                )
    editor.memory.unload()
    return {
        "facts": len(facts),
        **taught,
        "one_more_seconds": times,
        "reverified": reverified,
        "file_bytes": size,
        "exact_after_more": exact,
        "forget_bit_for_bit": same,
        "long_range": far,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out")
    parser.add_argument("--limit", type=int, help="fewer facts, for trying the script; needs --out")
    args = parser.parse_args()
    out = result_file(parser, args, "knowledge.json", "limit")
    for seed in args.seeds:
        if any(run["seed"] == seed for run in entries_of(out, "runs")):
            continue
        print(f"seed {seed}", flush=True)
        model, tokenizer = load_bundled()
        with tempfile.TemporaryDirectory() as folder:
            facts = all_facts(seed, folder)
        if args.limit:
            facts = facts[:: len(facts) // args.limit]
        spread = [facts[len(facts) * i // 1010] for i in range(1010)] if len(facts) > 1010 else facts
        small = thousand(model, tokenizer, spread[:-10], spread[-10:], seed)
        run = {"seed": seed, "thousand": small, "everything": large(model, tokenizer, facts, seed)}
        add_entries(out, "runs", [run], "seed")


if __name__ == "__main__":
    main()
