"""Floor 3: files. No pickle anywhere."""

from engram.checkpoint.store import (
    DESCRIPTION_NAME,
    FORMAT_VERSION,
    open_tensors,
    read_description,
    write_json_atomically,
    write_store,
)
from engram.checkpoint.tree import load_tree, save_tree

__all__ = [
    "DESCRIPTION_NAME",
    "FORMAT_VERSION",
    "load_tree",
    "open_tensors",
    "read_description",
    "save_tree",
    "write_json_atomically",
    "write_store",
]
