"""Floor 3: files. No pickle anywhere."""

from engram.checkpoint.store import (
    DESCRIPTION_NAME,
    FORMAT_VERSION,
    lock_store,
    open_tensors,
    read_description,
    read_ledger,
    tensor_offsets,
    write_json_atomically,
    write_store,
)
from engram.checkpoint.tree import load_tree, save_tree

__all__ = [
    "DESCRIPTION_NAME",
    "FORMAT_VERSION",
    "load_tree",
    "lock_store",
    "open_tensors",
    "read_description",
    "read_ledger",
    "save_tree",
    "tensor_offsets",
    "write_json_atomically",
    "write_store",
]
