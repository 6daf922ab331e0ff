"""Who is told the metrics of a run beside its own files; each is one class here and one line in the table of `spear.training.tracking`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spear.files import sha256

logger = logging.getLogger(__name__)


class Sink(ABC):
    """Takes scalars between `start` and `close`."""

    @abstractmethod
    def start(self, folder: Path, step: int) -> None:
        """Begin, or go on, with the run in `folder` after update `step`; what was said about later updates is void."""

    @abstractmethod
    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Take the values of an update."""

    @abstractmethod
    def close(self) -> None:
        """Flush and end."""


class TensorBoard(Sink):
    """Event files in ``folder/tensorboard``."""

    FOLDER = "tensorboard"

    def start(self, folder: Path, step: int) -> None:
        """See `Sink.start`."""
        # TensorBoard takes a second to import
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / self.FOLDER), purge_step=step + 1)

    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """See `Sink.scalars`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """See `Sink.close`."""
        self._writer.close()


class WeightsAndBiases(Sink):
    """A run at Weights & Biases; project, entity and mode come from its own environment variables (``WANDB_PROJECT``, ``WANDB_MODE``, ...).

    Where the package is not installed, one line says so and nothing is sent.
    """

    _run: Any = None

    def start(self, folder: Path, step: int) -> None:
        """See `Sink.start`; the run is named after its folder, and a continued one goes on."""
        if importlib.util.find_spec("wandb") is None:
            logger.warning("`training.trackers` names wandb, which is not installed: no metrics are sent (pip install wandb)")
            return
        wandb = importlib.import_module("wandb")
        path = folder.resolve()
        try:
            self._run = wandb.init(dir=str(path), name=path.name, id=sha256(str(path).encode())[:16], resume="allow")
        except Exception as error:  # no run of a month ends because a service is away
            logger.warning("wandb takes no metrics: %s", " ".join(str(error).split()))

    def scalars(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """See `Sink.scalars`."""
        if self._run is not None:
            self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """See `Sink.close`."""
        if self._run is not None:
            self._run.finish()
            self._run = None
