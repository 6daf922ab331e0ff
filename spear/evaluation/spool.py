"""Where the items of tasks wait until they are scored: in memory up to a limit, beyond it in files that are mapped back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from spear.evaluation.tasks.base import Array, Features, Rows
from spear.files import make_folder


class Budget:
    """Bytes that the spools of one model may still hold in memory."""

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes

    def take(self, size: int) -> bool:
        """Whether `size` bytes fit; if so they are taken."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


class Spool:
    """Items of one task, split and model as they come, cut by cut.

    Args:
        folder: for the files, made when the first is needed; the caller removes it once the features are no longer used.
        budget: shared by the spools of a model.
    """

    def __init__(self, folder: Path, budget: Budget) -> None:
        self._folder, self._budget = folder, budget
        self._parts: dict[str, Rows] = {}
        self._on_disk: dict[str, int] = {}
        self._rows_on_disk = 0

    def add(self, cut_id: str, rows: Rows) -> None:
        """Keep the items of one cut."""
        if not rows.labels:
            return
        if self._budget.take(sum(x.nbytes for x in rows.layers)):
            self._parts[cut_id] = Rows(rows.labels, [np.array(x, np.float32) for x in rows.layers])  # views would keep the whole cut
            return
        make_folder(self._folder)
        for i, x in enumerate(rows.layers):
            with self._path(i, "arrived").open("ab") as file:
                np.ascontiguousarray(x, np.float32).tofile(file)
        self._on_disk[cut_id] = self._rows_on_disk
        self._rows_on_disk += len(rows.labels)
        self._parts[cut_id] = Rows(rows.labels, [x[:0] for x in rows.layers])

    def features(self, frame_rate_hz: float = 0.0, codebook_size: int = 0) -> Features:
        """All items in the order of their cuts' ids; empties the spool.

        Args:
            frame_rate_hz, codebook_size: of the model, see `Features`.

        Raises:
            DataError: there is no item at all.
        """
        if self._on_disk:
            ids = sorted(self._parts)
            labels = [label for cut_id in ids for label in self._parts[cut_id].labels]
            groups = [cut_id for cut_id in ids for _ in self._parts[cut_id].labels]
            layers = [self._gather(i, ids) for i in range(len(self._parts[ids[0]].layers))]
            found = Features(labels, groups, layers)
        else:
            found = Features.join(self._parts)
        self._parts, self._on_disk = {}, {}
        found.frame_rate_hz, found.codebook_size = frame_rate_hz, codebook_size
        return found

    def _gather(self, layer: int, ids: list[str]) -> Array:
        """Write the layer's items in the order of `ids` and map the file."""
        arrived, path = self._path(layer, "arrived"), self._path(layer, "items")
        width, rows = self._parts[ids[0]].layers[layer].shape[1], 0
        with arrived.open("rb") as source, path.open("wb") as target:
            for cut_id in ids:
                part, count = self._parts[cut_id], len(self._parts[cut_id].labels)
                if cut_id in self._on_disk:
                    source.seek(self._on_disk[cut_id] * width * 4)
                    np.fromfile(source, np.float32, count * width).tofile(target)
                else:
                    part.layers[layer].tofile(target)
                    part.layers[layer] = part.layers[layer][:0].copy()
                rows += count
        with contextlib.suppress(FileNotFoundError):
            arrived.unlink()
        return np.memmap(path, np.float32, "r", shape=(rows, width))

    def _path(self, layer: int, what: str) -> Path:
        return self._folder / f"layer{layer}.{what}"
