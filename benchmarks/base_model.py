"""The bundled model, with its memory and without: its training, its size, held-out text of several kinds, and the capitals it answers."""

import json

from bundle import WINDOW, size
from common import RESULTS, provenance, write

from engram import load_bundled, load_facts
from engram.analysis import Subject, look
from engram.data.corpus import CorpusRecipe, held_out_standard_library
from engram.data.texts import standard_texts
from engram.evaluation import check_facts, score_by_category
from engram.evaluation.bits_per_byte import bits_per_byte
from engram.models.bundled_files import BUNDLED_MEMORY, BUNDLED_MODEL

FIRST = "engram pretrain recipes/base_model.yaml --out runs/base"
THEN = "engram train recipes/train_joint.yaml --out runs/joint"


def stages():
    """Both parts of the training, from the record beside the model."""
    then = json.loads((BUNDLED_MODEL / "training.json").read_text())
    first = then["went_on_from"]
    return [
        {"command": FIRST, "tokens": first["tokens_seen"], "seconds": first["seconds"], "hardware": first["hardware"]},
        {"command": THEN, "tokens": then["tokens"], "seconds": then["seconds"], "hardware": then["made_with"]["device"]},
    ]


def knows(model, tokenizer, facts, texts):
    answers = check_facts(model, tokenizer, facts)
    return {
        "bits_per_byte": bits_per_byte(model, tokenizer, texts, WINDOW),
        "capitals": sum(answer.exact for answer in answers),
        "by_phrasing": {score.category: [score.exact, score.prompts] for score in score_by_category(facts, answers)},
        "capitals_missed": [f"{answer.prompt!r}: {answer.said!r}" for answer in answers if not answer.exact],
    }


def main():
    memory, tokenizer = load_bundled(memory=True)
    kinds = memory.num_parameters_by_kind()
    facts = load_facts(BUNDLED_MODEL.parent / "capitals.yaml")
    texts = [doc.text for doc in held_out_standard_library(CorpusRecipe(standard_library=True))]
    kinds_of_text = look(Subject("bundled", memory), tokenizer, standard_texts(), ["memory_off"])["memory_off"]["by_kind"]
    with_memory = knows(memory, tokenizer, facts, texts)
    with memory.disable_engram():
        alone = knows(memory, tokenizer, facts, texts)
    write(
        RESULTS / "base_model.json",
        {
            **provenance(0),
            "stages": stages(),
            "parameters": memory.base_model.num_parameters(),
            "parameters_of_memory": sum(kinds[kind] for kind in ("tables", "reader")),
            "bytes": {folder.name: size(folder) for folder in (BUNDLED_MODEL, BUNDLED_MEMORY)},
            "held_out_documents": len(texts),
            "prompts": sum(len(fact.prompts) for fact in facts),
            "alone": alone,
            "with_memory": with_memory,
            "kinds_of_text": {  # nats per token; lost: loss without the memory less loss with it
                kind: {key: found[key] for key in ("tokens", "documents", "loss_on", "loss_off", "lost")}
                for kind, found in kinds_of_text.items()
            },
        },
    )


if __name__ == "__main__":
    main()
