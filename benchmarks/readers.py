"""Which reader holds facts in how many values per n-gram: seeded signs, one trained on other facts, one fitted to the output head.

Every reader is frozen before it is judged, and taught the same facts: how many passes that took, how many facts failed, and how many are
still exact behind 500 tokens of other text. A seed that is in the result file already is skipped.
"""

import argparse
import tempfile
import time

import torch
from common import add_entries, entries_of, result_file
from knowledge import CORPUS, UNSEEN, all_facts

from engram import MemoryEditor, TeachSettings, load_bundled
from engram.data.long_range import after_distraction
from engram.editing import fit_reader_to_head
from engram.editing.entries import make_entries
from engram.editing.holdings import Holdings
from engram.editing.lesson import RowDescent, _drafts, _judge, stream_sizes
from engram.editing.reports import TeachReport
from engram.editing.spelling import Speller
from engram.editing.teaching import Teaching
from engram.editing.upper import UpperModel
from engram.evaluation import check_facts

WIDTHS = (32, 64, 128)
READERS = ("seeded", "trained", "head")
EVERY = 50  # about 230 facts to judge by, as many others to train on
STEPS = 120


def train_reader(editor, facts):
    """Rows of these facts and the reader together (Adam for the reader); the rows are thrown away."""
    settings = TeachSettings()
    holdings, speller = Holdings(editor.memory), Speller(editor.memory.base_model, editor.tokenizer)
    entries = make_entries(editor.memory, editor.tokenizer, speller, facts, holdings.facts, settings)
    prompts = [prompt for entry in entries for prompt in entry.prompts]
    rows = Teaching(holdings, speller, entries, settings, TeachReport(), None)._new_rows(prompts)
    sizes = stream_sizes(editor.memory, prompts[:256])
    upper = UpperModel(editor.memory, prompts)
    reader = [p for engram in editor.memory.engrams.values() for p in engram.parameters()]
    generator = torch.Generator().manual_seed(editor.memory.engram_config.seed)
    before = holdings.rows()
    with _drafts(editor.memory, rows) as drafts:
        reader = [p.requires_grad_(True) for p in reader if all(p is not draft.held for draft in drafts.values())]
        adam = torch.optim.Adam(reader, lr=1e-2)
        descent = RowDescent([(draft.held, 0.3 * sizes[layer]) for layer, draft in drafts.items()])
        for layer, draft in drafts.items():
            draft.held.data.normal_(0, 2 * sizes[layer], generator=generator)  # zero rows would give the reader no gradient
        for _ in range(STEPS):
            members = torch.randperm(len(prompts), generator=generator)[:128]
            streams = torch.randint(len(prompts), members.shape, generator=generator)
            with torch.enable_grad():
                loss, learnt = _judge(upper, members, streams, 2 * settings.margin)
                if not bool(learnt.all()):
                    loss.backward()
                    descent.step()
                    adam.step()
                    adam.zero_grad()
    holdings.put_back(before)
    for parameter in reader:
        parameter.requires_grad_(False)


def judge(seed, reader, width, others, facts):
    model, tokenizer = load_bundled()
    kind = "seeded" if reader == "seeded" else "trained"
    torch.manual_seed(seed)
    editor = MemoryEditor.create(model, tokenizer, seed=seed, n_embed_per_ngram=width, reader=kind)
    started = time.perf_counter()
    if reader == "trained":
        train_reader(editor, others)
    elif reader == "head":
        fit_reader_to_head(editor.memory)
    fitted = time.perf_counter()
    report = editor.teach(facts)
    taught = time.perf_counter()
    one_prompt = [type(f)(f.prompts[:1], f.answer, f.category, (), f.id) for f in facts if f.category != "unicode"][::3]
    distraction = [(CORPUS / name).read_text() for name in UNSEEN]
    far = check_facts(editor.memory, tokenizer, after_distraction(tokenizer, one_prompt, distraction, 500), batch_size=16)
    return {
        "seed": seed,
        "reader": reader,
        "values_per_ngram": width,
        "facts": len(facts),
        "not_exact": len(report.not_exact),
        "passes": report.steps,
        "fit_seconds": fitted - started,
        "teach_seconds": taught - fitted,
        "row_bytes": sum(t.weight.numel() * t.weight.element_size() for t in map(editor.table, editor.memory.engrams)),
        "far_asked": len(far),
        "far_exact": sum(answer.exact for answer in far),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "readers.json")
    for seed in args.seeds:
        if any(run["seed"] == seed for run in entries_of(out, "runs")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            facts = all_facts(seed, folder)
        runs = []
        for width in WIDTHS:
            for reader in READERS:
                runs.append(judge(seed, reader, width, facts[EVERY // 2 :: EVERY], facts[::EVERY]))
                print(runs[-1], flush=True)
        add_entries(out, "runs", runs, "seed", "reader", "values_per_ngram")


if __name__ == "__main__":
    main()
