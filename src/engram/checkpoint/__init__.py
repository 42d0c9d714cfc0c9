"""Floor 3: files. No pickle anywhere."""

from engram.checkpoint.base import ADAPTERS_FOLDER, BACKBONE_FOLDER, base_name
from engram.checkpoint.convert import ConversionReport, LayerError, convert_memory
from engram.checkpoint.sole import sole_writer
from engram.checkpoint.store import (
    DESCRIPTION_NAME,
    FORMAT_VERSION,
    again_if_saved,
    lock_store,
    open_tensors,
    read_description,
    read_ledger,
    read_tensors,
    saved_version,
    stream_store,
    tensor_offsets,
    write_atomically,
    write_json_atomically,
    write_store,
    write_text_atomically,
)
from engram.checkpoint.stream import TensorReader, TensorSpec, write_tensors
from engram.checkpoint.tree import load_tree, save_tree
from engram.checkpoint.unsaved import placed_folder

__all__ = [
    "ADAPTERS_FOLDER",
    "BACKBONE_FOLDER",
    "DESCRIPTION_NAME",
    "FORMAT_VERSION",
    "ConversionReport",
    "LayerError",
    "TensorReader",
    "TensorSpec",
    "again_if_saved",
    "base_name",
    "convert_memory",
    "load_tree",
    "lock_store",
    "open_tensors",
    "placed_folder",
    "read_description",
    "read_ledger",
    "read_tensors",
    "save_tree",
    "saved_version",
    "sole_writer",
    "stream_store",
    "tensor_offsets",
    "write_atomically",
    "write_json_atomically",
    "write_store",
    "write_tensors",
    "write_text_atomically",
]
