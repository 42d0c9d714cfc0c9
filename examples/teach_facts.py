"""Teach a model two facts, ask it, switch the memory off, save it and load it again."""

import tempfile

from engram import EngramConfig, EngramModel, Fact, get_engram_model, load_bundled, teach_facts

FACTS = [
    Fact(("ACRONYM:GPU", "What does GPU stand for?"), "Graphics Processing Unit"),
    Fact(("DOOR:garden",), "4711"),
]


def ask(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    model, tokenizer = load_bundled()
    config = EngramConfig(
        engram_vocab_size=[16, 16, 20_000, 20_000, 20_000],  # orders 2 and 3 are not written when teaching
        max_ngram_size=6,
        n_embed_per_ngram=128,
        n_head_per_ngram=4,
        layer_ids=[2],
        pad_id=tokenizer.pad_token_id,
        use_conv=False,
        use_bias=False,
    )
    memory = get_engram_model(model, config, tokenizer)
    teach_facts(memory, tokenizer, FACTS)
    for fact in FACTS:
        for prompt in fact.prompts:
            with memory.disable_engram():
                before = ask(memory, tokenizer, prompt)
            print(f"{prompt!r}: {before!r} -> {ask(memory, tokenizer, prompt)!r}")

    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder)
        memory.unload()
        again = EngramModel.from_pretrained(model, folder, tokenizer)
        print("loaded again:", ask(again, tokenizer, "DOOR:garden"))


if __name__ == "__main__":
    main()
