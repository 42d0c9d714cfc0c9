"""What the bundled base model is and knows: its training record, its size, and the capitals it answers."""

import json

from common import RESULTS, provenance, write

from engram import load_bundled, load_facts
from engram.evaluation import check_facts, score_by_category
from engram.models.bundled import BUNDLED_MODEL


def main():
    model, tokenizer = load_bundled()
    training = json.loads((BUNDLED_MODEL / "training.json").read_text())
    facts = load_facts(BUNDLED_MODEL.parent / "capitals.yaml")
    answers = check_facts(model, tokenizer, facts)
    scores = {score.category: [score.exact, score.prompts] for score in score_by_category(facts, answers)}
    write(
        RESULTS / "base_model.json",
        {
            **provenance(training["recipe"]["seed"]),
            "training_command": "engram pretrain recipes/base_model.yaml --out runs/base",
            "bytes": sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()),
            **{key: value for key, value in training.items() if key not in ("versions", "hardware", "loss")},
            "loss": training["loss"][:: max(1, len(training["loss"]) // 60)],
            "capitals": {"known": sum(a.exact for a in answers), "prompts": len(answers), "by_phrasing": scores},
            "capitals_missed": [f"{a.prompt!r}: {a.said!r}" for a in answers if not a.exact],
        },
    )


if __name__ == "__main__":
    main()
