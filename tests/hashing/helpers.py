"""Two layers of a few hundred rows per head."""

from engram import EngramConfig


def small_config(**changes):
    fields = {
        "engram_vocab_size": [500, 700],
        "n_embed_per_ngram": 16,
        "n_head_per_ngram": 4,
        "layer_ids": [1, 15],
        "pad_id": 1,
    }
    return EngramConfig(**{**fields, **changes})
