"""Other people's CoCa checkpoints to ours and back, each as a table of names."""

from .open_clip import config_from_open_clip, from_open_clip, load_open_clip_folder, read_open_clip_folder, to_open_clip

__all__ = [
    "config_from_open_clip",
    "from_open_clip",
    "load_open_clip_folder",
    "read_open_clip_folder",
    "to_open_clip",
]
