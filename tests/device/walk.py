"""Everything that people do with a memory, with the model on another device; prints what came of each thing as JSON.

Run by ``test_elsewhere.py`` in a process of its own, because a registered device stays.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from typer.testing import CliRunner

from engram import EngramModel, EngramRouter, LearnedRouter, MemoryEditor, TableConfig, load_bundled, load_facts
from engram.analysis import ANALYSES, Subject, look
from engram.cli.main import app
from engram.data.texts import standard_texts
from engram.evaluation import ask, check_facts, evaluate_memory, measure_drift, measure_recall, result, trace_text
from engram.models.bundled_files import BUNDLED_MEMORY, BUNDLED_MODEL
from engram.models.identity import memory_identity
from tests.device.pretend import pretend_device

FACTS = load_facts(BUNDLED_MODEL.parent / "facts.yaml")[::160]
CAPITALS = load_facts(BUNDLED_MODEL.parent / "capitals.yaml")[:3]
OTHER = ["hello there", "the weather is fine"]
PLACES = [
    ("device", "float32"),
    ("device", "int8"),
    ("host", "float32"),
    ("host", "int8"),
    ("mmap", "int8"),
    ("hybrid", "float8"),
]


def model_elsewhere():
    model, tokenizer = load_bundled()
    model.to("pretend")
    assert model.device.type == "pretend"
    return model, tokenizer


def teaching(folder):
    """Steps of a taught memory, in order: each is a name and a function whose result can be compared."""
    editor = MemoryEditor.create(*model_elsewhere())
    memory, tokenizer = editor.memory, editor.tokenizer
    prompts = [fact.prompts[0] for fact in FACTS]

    def routers():
        learned = LearnedRouter.fit(memory, tokenizer, prompts, OTHER)
        return [ask(memory, tokenizer, prompts[:2], 16, router=router) for router in (EngramRouter.from_yaml(), learned)]

    def loaded():
        model, tokenizer = model_elsewhere()
        again = MemoryEditor.load(model, folder, tokenizer)
        exact = sum(again.verify().values())
        again.memory.unload()
        return exact

    yield "teach", lambda: editor.teach(FACTS).not_exact
    yield "check", lambda: sum(answer.exact for answer in check_facts(memory, tokenizer, FACTS))
    yield "ask", lambda: ask(memory, tokenizer, prompts[:1], 16)
    yield "route", routers
    yield "why", lambda: list(editor.why(prompts[0]).facts)
    yield "trace", lambda: trace_text(memory, tokenizer, prompts[0]).output_shape[0]
    yield "drift", lambda: measure_drift(memory, tokenizer, OTHER).mean_kl
    yield (
        "evaluate",
        lambda: evaluate_memory(memory, tokenizer, FACTS, {"other": OTHER}, ["import os\nimport sys\n"], CAPITALS).recall,
    )
    yield "save", lambda: editor.save(folder)
    yield "load", loaded
    yield (
        "command line",
        lambda: CliRunner().invoke(app, ["ask", prompts[0], "--memory", str(folder), "--device", "pretend"]).stdout,
    )
    yield "forget", lambda: editor.forget([FACTS[0].id]).forgotten
    yield "teach again", lambda: editor.teach(FACTS[:1]).not_exact


def trained():
    """A trained memory from every place: the largest difference to the CPU's logits, and what it generates."""
    on_cpu, tokenizer = load_bundled(memory=True)
    given = tokenizer(["The capital of France is", "import os"], return_tensors="pt", padding=True, padding_side="left")
    expected = on_cpu(**given).logits
    here = {name: ids.to("pretend") for name, ids in given.items()}

    def placed(tier, dtype):
        model, _ = model_elsewhere()
        place = TableConfig(tier=tier, dtype=dtype, hot_rows=100 if tier == "hybrid" else None)
        memory = EngramModel.from_pretrained(model, BUNDLED_MEMORY, tokenizer, place).eval()
        said = [memory.generate(**here, max_new_tokens=3, do_sample=False, num_beams=beams)[0] for beams in (1, 2)]
        return float((memory(**here).logits.cpu() - expected).abs().max()), tokenizer.batch_decode(
            said, skip_special_tokens=True
        )

    for tier, dtype in PLACES:
        yield f"{tier} {dtype}", lambda tier=tier, dtype=dtype: placed(tier, dtype)


def looking():
    model, tokenizer = model_elsewhere()
    memory = EngramModel.from_pretrained(model, BUNDLED_MEMORY, tokenizer).eval()
    texts = {kind: list(found)[:1] for kind, found in standard_texts().items()}
    options = {"tokens": 100, "row_tokens": 200, "length": 64, "phrases": ["the"]}
    for name in ANALYSES:
        yield f"look {name}", lambda name=name: name in look(Subject("bundled", memory), tokenizer, texts, [name], **options)
    library = [text for found in texts.values() for text in found]
    yield "recall", lambda: len(measure_recall(memory, tokenizer, library, ["needle"], [96], 2, 0).scores)


def on_two_devices():
    """A memory whose layers are on another device than the token embeddings, as ``device_map`` spreads a large model."""
    model, tokenizer = load_bundled()
    memory = EngramModel.from_pretrained(model, BUNDLED_MEMORY, tokenizer)
    before = memory_identity(memory)
    memory.engrams.to("pretend")
    yield "identity on two devices", lambda: memory_identity(memory) == before


def main():
    found = {}
    result._DECODE_ROUNDS = 1  # times mean nothing here
    with tempfile.TemporaryDirectory() as folder, pretend_device():
        for steps in (teaching(Path(folder) / "memory"), trained(), looking(), on_two_devices()):
            for name, step in steps:
                try:
                    found[name] = step()
                except Exception:
                    found[name] = {"failed": traceback.format_exc()}
        mixed = {}
        one, other = torch.ones(2, device="pretend"), torch.ones(2)
        for name, mix in {"add": lambda: one + other, "index": lambda: other[one.long()], "numpy": lambda: one.numpy()}.items():
            try:
                mix()
            except (RuntimeError, TypeError) as error:
                mixed[name] = str(error)
    json.dump({"steps": found, "refused": mixed}, sys.stdout)


if __name__ == "__main__":
    main()
