"""Facts on top of a memory that was trained on text: both are read, and each is switched, saved and loaded on its own."""

import math
import tempfile

import torch

from engram import Fact, MemoryEditor, load_bundled
from engram.evaluation import ask, bits_per_byte

FACTS = [Fact(("DOOR:garden", "What is the code of the garden door?"), "4711", id="door")]
CODE = "for key, value in sorted(table.items()):\n    print(key, value)\n"


def main() -> None:
    trained, tokenizer = load_bundled(memory=True)  # a model with the memory that was trained together with it
    before = bits_per_byte(trained, tokenizer, [CODE])
    editor = MemoryEditor.create(trained, tokenizer)  # not the model, but the memory on it: facts come on top
    editor.teach(FACTS)
    facts, prompts = editor.memory, [FACTS[0].prompts[0], "CAPITAL:France"]
    print("both:", ask(facts, tokenizer, prompts))
    print("text like the trained one is read as before:", math.isclose(bits_per_byte(facts, tokenizer, [CODE]), before))
    with facts.disable_engram():
        print("trained memory alone:", ask(facts, tokenizer, prompts[:1]))
    with trained.disable_engram(), torch.no_grad():  # taught with the trained memory on: what is exact without it is luck
        print("facts alone:", ask(facts, tokenizer, prompts[:1]))

    with tempfile.TemporaryDirectory() as folder:
        editor.save(folder)  # the facts alone; loading them without the trained memory is refused
        again = MemoryEditor.load(load_bundled(memory=True)[0], folder, tokenizer)
        print("loaded again:", ask(again.memory, tokenizer, prompts[:1]))
    editor.memory.unload().unload()  # in the order in which they came


if __name__ == "__main__":
    main()
