"""Floor 1: from token ids to row numbers."""

from engram.hashing.compression import CompressedTokenizer, ExactTokenizer, count_ids
from engram.hashing.ngram import NgramHashMapping, build_mapping, mapping_without_tokenizer
from engram.hashing.reference import hash_reference, tag_reference
from engram.hashing.spec import HASH_SPECS, HashSpec, get_hash_spec

__all__ = [
    "HASH_SPECS",
    "CompressedTokenizer",
    "ExactTokenizer",
    "HashSpec",
    "NgramHashMapping",
    "build_mapping",
    "count_ids",
    "get_hash_spec",
    "hash_reference",
    "mapping_without_tokenizer",
    "tag_reference",
]
