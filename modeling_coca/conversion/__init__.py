"""Other people's CoCa checkpoints to ours and back, each family as a table of names.

`convert` and `convert_to_open_clip` go from files to files, `open_checkpoint` into memory, `from_open_clip` and
`to_open_clip` from and to a state dict.
"""

from .convert import convert, convert_to_open_clip, open_checkpoint, open_foreign, processor_for
from .open_clip import config_from_open_clip, from_open_clip, load_open_clip_folder, read_open_clip_folder, to_open_clip

__all__ = [
    "config_from_open_clip",
    "convert",
    "convert_to_open_clip",
    "from_open_clip",
    "load_open_clip_folder",
    "open_checkpoint",
    "open_foreign",
    "processor_for",
    "read_open_clip_folder",
    "to_open_clip",
]
