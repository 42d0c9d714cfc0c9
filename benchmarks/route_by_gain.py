"""The bundled memory with a router fitted to what reading it is worth, text by text, judged by texts that were left out of the fit."""

import argparse
import random
from dataclasses import asdict

from common import RESULTS, provenance, write

from engram import load_bundled
from engram.data.texts import standard_texts
from engram.evaluation import fit_router_to_texts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--first-tokens", type=int, default=16, help="how much of a text the router looks at")
    parser.add_argument("--out", default=RESULTS / "route_by_gain.json")
    args = parser.parse_args()
    memory, tokenizer = load_bundled(memory=True)
    runs = []
    for seed in args.seeds:  # which half of the texts is left out
        texts = {kind: random.Random(seed).sample(group, len(group)) for kind, group in standard_texts().items()}
        _, judged = fit_router_to_texts(memory, tokenizer, texts, args.first_tokens)
        runs.append({"seed": seed, "kinds": [asdict(kind) for kind in judged]})
        print(runs[-1], flush=True)
    write(args.out, {**provenance(args.seeds), "first_tokens": args.first_tokens, "runs": runs})


if __name__ == "__main__":
    main()
