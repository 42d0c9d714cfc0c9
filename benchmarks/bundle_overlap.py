"""How much of the text that the bundled pair is judged by stands in its training text too, and what its memory is worth without that.

Files are held out as wholes and exact duplicates left out, but a document may be contained in another file. Counted are word 13-grams of
every held-out document that occur in the training text of recipes/base_model.yaml; the memory is switched on and off on all documents, and
on those of which at most half are shared. Intervals are over documents, and over files, of which some documents are parts.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from common import RESULTS, provenance, write

from engram import load_bundled
from engram.analysis.intervals import document_mean
from engram.data.corpus import CorpusRecipe, build_corpus, held_out_standard_library
from engram.data.recipe import read_corpus_recipe
from engram.evaluation.bits_per_byte import bits_per_byte

RECIPE = Path(__file__).parents[1] / "recipes" / "base_model.yaml"
WINDOW = 256  # tokens, as benchmarks/bundle.py measures
N, MOST = 13, 0.5


def ngrams(text):
    words = text.split()
    return [hash(tuple(words[i : i + N])) for i in range(len(words) - N + 1)]


def shares(held_out, train):
    """Of each held-out document, the share of its n-grams that training documents hold; 0 of one too short to have any."""
    wanted = [ngrams(document.text) for document in held_out]
    asked = set().union(*wanted)
    found = set()
    for document in train:
        found |= asked.intersection(ngrams(document.text))
    return [sum(gram in found for gram in grams) / max(1, len(grams)) for grams in wanted]


def bits_of(memory, tokenizer, documents):
    return np.array([bits_per_byte(memory, tokenizer, [doc.text], WINDOW) * len(doc.text.encode()) for doc in documents])


def compared(on, off, sizes, files):
    """Bits per byte with the memory on and off, and their difference with both intervals."""
    by_file = [np.bincount(files, values) for values in (on - off, sizes)]
    present = by_file[1] > 0
    return {
        "documents": len(sizes),
        "files": int(present.sum()),
        "bits_per_byte": {"on": float(on.sum() / sizes.sum()), "off": float(off.sum() / sizes.sum())},
        "on - off": document_mean(on - off, sizes),
        "on - off, over files": document_mean(by_file[0][present], by_file[1][present]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=RESULTS / "bundle_overlap.json")
    args = parser.parse_args()
    held_out = held_out_standard_library(CorpusRecipe(standard_library=True))
    shared = np.array(shares(held_out, build_corpus(read_corpus_recipe(RECIPE), RECIPE.parent).train))
    memory, tokenizer = load_bundled(memory=True)
    on = bits_of(memory, tokenizer, held_out)
    with memory.disable_engram():
        off = bits_of(memory, tokenizer, held_out)
    sizes = np.array([len(doc.text.encode()) for doc in held_out])
    names = [doc.name.partition("#")[0] for doc in held_out]
    files = np.unique(names, return_inverse=True)[1]
    apart = shared <= MOST
    worst = Counter({doc.name: round(share, 3) for doc, share in zip(held_out, shared.tolist())}).most_common(5)
    result = {
        **provenance(0),
        "n": N,
        "most": MOST,
        "most_shared": dict(worst),
        "all": compared(on, off, sizes, files),
        "apart": compared(on[apart], off[apart], sizes[apart], files[apart]),
    }
    write(args.out, result)
    for name in ("all", "apart"):
        print(name, result[name])


if __name__ == "__main__":
    main()
