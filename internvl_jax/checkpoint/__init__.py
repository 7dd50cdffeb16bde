"""Parameters on disk: one layout, written in chunks, that Orbax can restore on its own.

`DIRECTORY/params/` is an Orbax checkpoint of the parameter tree in its true shapes: one zarr array per leaf, beside
config.json and the tokenizer files. Orbax's own checkpointer holds a whole leaf several times while it saves (measured:
14 GB for V1-1's largest stack of 5.7 GB). Here leaves are written chunk by chunk through TensorStore, which Orbax uses
too, so memory is bounded by one chunk. A chunk is one layer, split along the axes that a mesh splits, and is not
compressed: a device reads little more than its own part, and a truncated file is recognized by its size. Chunks have
checksums, which Orbax ignores.

Several processes read and write one directory together, on a file system that all of them see. Each reads what its
devices hold, and writes what no other process writes; process 0 creates the directory and gives it its final name.

    chunks.py   one array on disk: chunks and their checksums
    layout.py   which arrays a checkpoint has: names, shapes, chunk shapes, Orbax's metadata
    reader.py   load, verify
    writer.py   save, and copies of a checkpoint with changes
"""

from internvl_jax.checkpoint.chunks import CheckpointError, check_path, first_non_finite
from internvl_jax.checkpoint.layout import (
    PARAMS,
    QVALUE,
    Progress,
    check_shapes,
    is_converted,
    named_leaves,
    stored_tree,
)
from internvl_jax.checkpoint.reader import Reader, bytes_read, load, verify
from internvl_jax.checkpoint.writer import Writer, new_directory, save, write_changed, write_mapped

__all__ = [
    "PARAMS",
    "QVALUE",
    "CheckpointError",
    "Progress",
    "Reader",
    "Writer",
    "bytes_read",
    "check_path",
    "check_shapes",
    "first_non_finite",
    "is_converted",
    "load",
    "named_leaves",
    "new_directory",
    "save",
    "stored_tree",
    "verify",
    "write_changed",
    "write_mapped",
]
