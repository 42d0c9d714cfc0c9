"""Which prompts may read the memory: rules, a regression on hidden states, and a batch of both kinds."""

import torch

from engram import EngramRouter, Fact, LearnedRouter, MemoryEditor, load_bundled
from engram.evaluation import ask
from engram.models import RouteRule

KINDS = ("garden", "cellar", "tower", "kitchen", "attic", "stable")
CODES = [Fact((f"DOOR:{place}",), str(4711 + 13 * number), id=place) for number, place in enumerate(KINDS)]
OTHER = ["for key, value in", "The river is", "import sys", "A list of", "In the morning", "def main("]


def main() -> None:
    model, tokenizer = load_bundled()
    editor = MemoryEditor.create(model, tokenizer)
    editor.teach(CODES)
    memory = editor.memory

    by_rules = EngramRouter([RouteRule("codes", r"^DOOR:", 1.0)])
    prompts = ["DOOR:tower", "The capital of France is"]
    print("by rules:", dict(zip(prompts, by_rules.scores(prompts))), ask(memory, tokenizer, prompts, 8, router=by_rules))

    # From examples; the last of each kind are kept to see whether it carries over.
    by_states = LearnedRouter.fit(memory, tokenizer, [fact.prompts[0] for fact in CODES[:4]], OTHER[:4])
    asked = [fact.prompts[0] for fact in CODES[4:]] + OTHER[4:]
    print("by states:", {prompt: round(score, 2) for prompt, score in zip(asked, by_states.scores(asked))})

    # By hand: the second sequence of this batch gets the base model's logits, bit for bit.
    ids = torch.tensor([tokenizer("DOOR:tower")["input_ids"]] * 2)
    with torch.no_grad():
        with memory.routed(torch.tensor([True, False])):
            mixed = memory(input_ids=ids, use_cache=False).logits
        with memory.disable_engram():
            base = memory(input_ids=ids, use_cache=False).logits
    print("bypassed is base:", bool(torch.equal(mixed[1], base[1])), "- routed is not:", not torch.equal(mixed[0], base[0]))


if __name__ == "__main__":
    main()
