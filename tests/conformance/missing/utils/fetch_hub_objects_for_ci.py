"""Stands in for transformers' cache of files on the Hub: pictures are drawn, nothing is downloaded."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

_FOLDER = tempfile.TemporaryDirectory()


def url_to_local_path(url: str) -> str:
    """The path of a photograph-sized, smooth picture for the URL of one; other URLs become the path of no file."""
    path = Path(_FOLDER.name) / url.rsplit("/", 1)[-1]
    if path.suffix in {".jpg", ".png"} and not path.exists():
        y, x = np.mgrid[:480, :640]
        waves = [127 * (1 + np.sin(x / 40 + channel) * np.cos(y / 30 - channel)) for channel in range(3)]
        Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(path)
    return str(path)
