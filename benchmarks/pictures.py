"""Draw the pictures of docs/ from `results/*.json`."""

import json
from pathlib import Path

from engram.evaluation import wilson_interval
from engram.plots import plot_bench, plot_capacity, plot_gates, plot_shares, plot_steps

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"


STEPS = {
    "frozen": "tables frozen",
    "sparse": "row-sparse Adam",
    "dense_fused": "dense gradients, fused AdamW",
    "dense": "dense gradients, AdamW",
}


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def recall(part, title):
    """Exact answers per category and system, prompts of all seeds together."""
    runs = [run["systems"] for run in load("baselines")["runs"]]
    systems = {}
    for name in runs[0]:
        systems[name] = {}
        for category in runs[0][name][part]:
            shares = [run[name][part][category] for run in runs]
            exact, prompts = sum(s["exact"] for s in shares), sum(s["prompts"] for s in shares)
            low, high = wilson_interval(exact, prompts)
            systems[name][category] = {"share": exact / prompts, "low": low, "high": high}
    plot_shares(systems, PICTURES / f"{part}.png", title)


def main():
    recall("categories", "exact answers to taught prompts")
    recall("categories_held_out", "exact answers to phrasings nobody taught")
    points = load("capacity")["points"]
    for tags in (True, False):
        plot_capacity([p for p in points if p["tags"] == tags], PICTURES / f"capacity_{'tags' if tags else 'no_tags'}.png")
    bench = load("bench")
    plot_bench({"benchmarks": {name: bench["benchmarks"][name] for name in ("hash", "tiers")}}, PICTURES)
    plot_steps(load("train_step")["entries"], STEPS, PICTURES / "train_step.png")
    everything = load("knowledge")["runs"][0]["everything"]
    plot_gates({f"{everything['facts']:,} facts": everything["gates"]}, PICTURES / "gates.png")


if __name__ == "__main__":
    main()
