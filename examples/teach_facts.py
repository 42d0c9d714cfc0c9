"""Teach a model two facts, ask it, see why it knows, forget one, save and load the rest."""

import tempfile

from engram import Fact, MemoryEditor, load_bundled

FACTS = [
    Fact(("ACRONYM:GPU", "What does GPU stand for?"), "Graphics Processing Unit", id="gpu"),
    Fact(("DOOR:garden",), "4711", id="door"),
]


def ask(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    model, tokenizer = load_bundled()
    editor = MemoryEditor.create(model, tokenizer)  # base weights frozen; logits unchanged, bit for bit
    editor.teach(FACTS)
    for fact in FACTS:
        for prompt in fact.prompts:
            with editor.memory.disable_engram():
                before = ask(editor.memory, tokenizer, prompt)
            print(f"{prompt!r}: {before!r} -> {ask(editor.memory, tokenizer, prompt)!r}")
    print("owed to:", editor.why("DOOR:garden").facts)

    editor.forget(["gpu"])
    with tempfile.TemporaryDirectory() as folder:
        editor.save(folder)
        editor.memory.unload()
        again = MemoryEditor.load(model, folder, tokenizer)
        print("loaded again:", [fact.id for fact in again.facts], ask(again.memory, tokenizer, "DOOR:garden"))


if __name__ == "__main__":
    main()
