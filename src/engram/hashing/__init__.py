"""Floor 1: from token ids to row numbers."""

from engram.hashing.compression import CompressedTokenizer
from engram.hashing.ngram import NgramHashMapping
from engram.hashing.reference import hash_reference
from engram.hashing.spec import HASH_SPECS, HashSpec, get_hash_spec

__all__ = ["HASH_SPECS", "CompressedTokenizer", "HashSpec", "NgramHashMapping", "get_hash_spec", "hash_reference"]
