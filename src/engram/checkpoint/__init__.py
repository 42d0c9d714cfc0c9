"""Floor 3: files. No pickle anywhere."""

from engram.checkpoint.store import (
    DESCRIPTION_NAME,
    FORMAT_VERSION,
    open_tensors,
    read_description,
    write_json_atomically,
    write_store,
)

__all__ = ["DESCRIPTION_NAME", "FORMAT_VERSION", "open_tensors", "read_description", "write_json_atomically", "write_store"]
