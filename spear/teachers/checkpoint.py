"""Released weights that are torch files, as the authors of a model publish them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from spear.errors import ConfigError


def read_checkpoint(name: str, folder: Path | None) -> Any:
    """What the file `name` holds, on the CPU: under `folder` if it is there, else a path. Nothing but tensors and plain values is read.

    Raises:
        ConfigError: no such file, or a damaged one.
    """
    candidates = [Path(name).expanduser()] if folder is None else [folder / name, Path(name).expanduser()]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(f"`weights` must be a file, but {name} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(f"`weights` {name} cannot be read: {' '.join(str(error).split())[:200]}") from error
