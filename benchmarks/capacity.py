"""How many facts fit: recall and harm against the number of facts and the rows per head, and the same memories with their tags ignored.

One memory per size is taught more and more facts (in slices, one attempt each) and measured on the way. Ignoring tags shows what
verification is for: whatever row an n-gram hits is read, whoever wrote it. A seed and size that is in the result file with all these numbers of
facts is skipped.
"""

import argparse
import tempfile
import time
from contextlib import contextmanager
from unittest import mock

import torch
from common import add_entries, entries_of, result_file
from knowledge import SLICE, all_facts, texts_not_taught

from engram import MemoryEditor, TeachError, TeachSettings, load_bundled, native
from engram.evaluation import measure_drift
from engram.tables import ABSENT, VerifiedTable

FACTS = (300, 1000, 3000, 10_000)
ROWS = (20_000, 200_000, 1 << 31)
POINT = ("seed", "rows_per_head", "facts", "tags")  # what tells points apart
STRIDE = 25  # facts are taken in strides, so that the first few hundred hold every kind


@contextmanager
def tags_ignored():
    def find(table, row_ids, tags):
        slot = torch.searchsorted(table.row_ids, row_ids).clamp_max(max(table.stored_rows - 1, 0))
        return torch.where(table.row_ids[slot] == row_ids, slot, ABSENT)

    with (
        mock.patch.object(VerifiedTable, "find", find),
        mock.patch.object(native, "_core", None),
    ):  # the native search compares tags
        yield


def measure(editor, tokenizer, asked, texts):
    """Recall over everything asked for (what could not be taught counts as wrong), and KL over the texts."""
    drifts = [measure_drift(editor.memory, tokenizer, group) for group in texts.values()]
    tokens = sum(drift.tokens for drift in drifts)
    return {
        "recall": sum(editor.verify().values()) / asked,
        "kl": sum(drift.mean_kl * drift.tokens for drift in drifts) / tokens,
        "tokens": tokens,
        "tokens_changed": sum(drift.tokens_changed for drift in drifts),
    }


def teach(editor, facts):
    """A lesson that would change an earlier answer is refused as a whole; its halves are tried, down to the fact that is to blame."""
    try:
        editor.teach(facts, TeachSettings(retries=0))
    except TeachError:
        if len(facts) > 1:
            teach(editor, facts[: len(facts) // 2])
            teach(editor, facts[len(facts) // 2 :])


def one_size(seed, rows_per_head, counts, save):
    model, tokenizer = load_bundled()
    with tempfile.TemporaryDirectory() as folder:
        facts = all_facts(seed, folder)
    facts = [fact for start in range(STRIDE) for fact in facts[start::STRIDE]]
    texts = {kind: group[::3] for kind, group in texts_not_taught().items()}
    editor = MemoryEditor.create(model, tokenizer, seed=seed, engram_vocab_size=rows_per_head)
    points, taught, seconds = [], 0, 0.0
    for count in counts:
        started = time.perf_counter()
        while taught < count:
            upto = min(taught + SLICE, count)
            teach(editor, facts[taught:upto])
            taught = upto
        seconds += time.perf_counter() - started
        point = {"seed": seed, "facts": count, "rows_per_head": rows_per_head, "seconds": seconds}
        point["rows_written"] = sum(editor.table(layer).stored_rows for layer in editor.memory.engrams)
        points.append({**point, "tags": True, **measure(editor, tokenizer, count, texts)})
        with tags_ignored():
            points.append({**point, "tags": False, **measure(editor, tokenizer, count, texts)})
        print(*points[-2:], sep="\n", flush=True)
        save(points)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--facts", type=int, nargs="+", default=FACTS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "capacity.json")
    for seed in args.seeds:
        for rows in args.rows:
            points = entries_of(out, "points")
            done = {p["facts"] for p in points if p["seed"] == seed and p["rows_per_head"] == rows}
            if not done.issuperset(args.facts):
                one_size(seed, rows, sorted(args.facts), lambda new: add_entries(out, "points", new, *POINT))


if __name__ == "__main__":
    main()
