"""When routing helps: recall and harm with no router, the rules, and a learned router, on memories with tags, and with their tags ignored.

Everything is judged on prompts and texts that the learned router was not fitted to. A seed that is in the result file is skipped.
"""

import argparse
from contextlib import nullcontext

from capacity import tags_ignored
from common import add_entries, entries_of, result_file
from knowledge import BUNDLED, texts_not_taught

from engram import EngramRouter, LearnedRouter, MemoryEditor, load_bundled, load_facts
from engram.evaluation import check_facts, measure_drift

SHARED_ROWS = 20_000  # rows per head of the memory whose tags are ignored: small enough for n-grams to meet


def harm(memory, tokenizer, texts, router):
    """KL over all texts; a text that the router bypasses is the base's, bit for bit (which the tests hold)."""
    nats = tokens = routed = changed = 0
    for text in texts:
        drift = measure_drift(memory, tokenizer, [text])
        reads = router is None or router.scores([text])[0] >= router.threshold
        tokens, routed = tokens + drift.tokens, routed + reads
        if reads:
            nats, changed = nats + drift.mean_kl * drift.tokens, changed + drift.tokens_changed
    return {"texts": len(texts), "routed": routed, "kl": nats / tokens, "tokens": tokens, "tokens_changed": changed}


def one_seed(seed, every):
    facts = [*load_facts(BUNDLED / "facts.yaml"), *load_facts(BUNDLED / "patterns.yaml")][::every]
    texts = {kind: group[::every] for kind, group in texts_not_taught().items()}
    result = {}
    for name, rows, tags in (("tags", 1 << 31, True), ("tags ignored", SHARED_ROWS, False)):
        model, tokenizer = load_bundled()
        editor = MemoryEditor.create(model, tokenizer, seed=seed, engram_vocab_size=rows)
        editor.teach(facts)
        routed = [prompt for fact in facts[::2] for prompt in fact.prompts]
        learned = LearnedRouter.fit(editor.memory, tokenizer, routed, [t for group in texts.values() for t in group[::2]])
        for kind, router in (("none", None), ("rules", EngramRouter.from_yaml()), ("learned", learned)):
            with nullcontext() if tags else tags_ignored():
                answers = check_facts(editor.memory, tokenizer, facts[1::2], router=router)
                harms = {k: harm(editor.memory, tokenizer, group[1::2], router) for k, group in texts.items()}
            exact = sum(answer.exact for answer in answers)
            result[f"{name}, {kind}"] = {"prompts": len(answers), "exact": exact, "harm": harms}
            print(name, kind, exact, len(answers), {k: round(h["kl"], 6) for k, h in harms.items()}, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--every", type=int, default=1, help="only every n-th fact and text, for trying the script; needs --out"
    )
    parser.add_argument("--out")
    args = parser.parse_args()
    out = result_file(parser, args, "routing.json", "every")
    for seed in args.seeds:
        if not any(run["seed"] == seed for run in entries_of(out, "runs")):
            add_entries(out, "runs", [{"seed": seed, "systems": one_seed(seed, args.every)}], "seed")


if __name__ == "__main__":
    main()
