"""The bundled pair, a model trained on together with a memory (backbone in bfloat16, rows in int8), and how well each part predicts text.

Takes the runs of `engram pretrain recipes/base_model.yaml` (`--before`), `engram train recipes/train_joint.yaml` and `engram train
recipes/train_joint_plain.yaml`, writes `base_model` and `memory` into `--out`, and measures what was written beside the model before and
the run without a memory, on the documents that none of them was trained on. Differences have intervals over documents; there is one run
of each.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, provenance, write

from engram import EngramModel, TableConfig, load_facts
from engram.analysis.intervals import document_mean
from engram.checkpoint import read_description
from engram.data.corpus import CorpusRecipe, held_out_standard_library
from engram.evaluation import check_facts
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.models.bundled import load_model
from engram.models.bundled_files import BUNDLED_MODEL, BUNDLED_NAME
from engram.training.pretrain import export_model

RECORDED = ("recipe", "held_out", "held_out_off", "held_out_before", "seconds", "tokens", "made_with")  # in training.json
WINDOW = 256  # tokens, as `engram pretrain` measures


def export(before, run, out):
    """Write the pair; the memory's description tells the backbone as it was written, rounded, under its name in the package."""
    model, tokenizer = load_model(f"{run}/model")
    found = json.loads((run / "result.json").read_text())
    record = {key: found[key] for key in RECORDED if key in found}
    record["went_on_from"] = json.loads((before / "model" / "training.json").read_text())
    read_description(run / "memory")  # all is there: what was in ``out`` may go
    for part in ("base_model", "memory"):
        shutil.rmtree(out / part, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    export_model(model, tokenizer, out / "base_model", record)
    model, tokenizer = load_model(str(out / "base_model"))
    model.config._name_or_path = BUNDLED_NAME
    rows = TableConfig(dtype="int8")
    memory = EngramModel.from_pretrained(model, run / "memory", tokenizer, rows, allow_other_base=True)
    memory.save_pretrained(out / "memory")
    memory.unload()


def measure(model, tokenizer, documents, capitals):
    """Bits of every document, and how many capitals are known."""
    bits = [bits_per_byte(model, tokenizer, [doc.text], WINDOW) * len(doc.text.encode()) for doc in documents]
    return np.array(bits), sum(answer.exact for answer in check_facts(model, tokenizer, capitals))


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="run folder of the model that both went on from")
    parser.add_argument("--plain", type=Path, required=True, help="run folder without a memory")
    parser.add_argument("--joint", type=Path, required=True, help="run folder with one")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pair; replaced there")
    parser.add_argument("--json", default=RESULTS / "bundle.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    export(args.before, args.joint, args.out)
    documents = held_out_standard_library(CorpusRecipe(standard_library=True))
    sizes = np.array([len(doc.text.encode()) for doc in documents])
    capitals = load_facts(BUNDLED_MODEL.parent / "capitals.yaml")
    bits, known = {}, {}

    def look(name, model, tokenizer):
        bits[name], known[name] = measure(model, tokenizer, documents, capitals)
        print(f"{name}: {bits[name].sum() / sizes.sum():.4f} bits per byte, {known[name]} capitals", flush=True)

    look("before", *load_model(f"{args.before}/model"))
    look("plain", *load_model(f"{args.plain}/model"))
    model, tokenizer = load_model(f"{args.joint}/model")
    memory = EngramModel.from_pretrained(model, args.joint / "memory", tokenizer)
    look("joint", memory, tokenizer)
    model, tokenizer = load_model(str(args.out / "base_model"))
    memory = EngramModel.from_pretrained(model, args.out / "memory", tokenizer)
    look("shipped", memory, tokenizer)
    with memory.disable_engram():
        look("shipped, memory off", memory, tokenizer)
    pairs = [("joint", "plain"), ("shipped", "joint"), ("shipped, memory off", "plain"), ("shipped, memory off", "before")]
    runs = {name: json.loads((run / "result.json").read_text()) for name, run in (("plain", args.plain), ("joint", args.joint))}
    write(
        args.json,
        {
            **provenance(0),
            "documents": len(documents),
            "bytes": int(sizes.sum()),
            "bits_per_byte": {name: float(found.sum() / sizes.sum()) for name, found in bits.items()},
            "difference": {f"{a} - {b}": document_mean(bits[a] - bits[b], sizes) for a, b in pairs},
            "capitals_known": {**known, "asked": sum(len(fact.prompts) for fact in capitals)},
            "shipped_bytes": {"base_model": size(args.out / "base_model"), "memory": size(args.out / "memory")},
            "runs": {
                name: {key: run[key] for key in run if key.startswith(("held_out", "seconds", "tokens"))}
                for name, run in runs.items()
            },
        },
    )


if __name__ == "__main__":
    main()
