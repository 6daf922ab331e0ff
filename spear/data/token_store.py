"""Codes of a corpus on the disk: blocks of a fixed number of cuts, joined to audio by cut id, never by order.

``block-00000.safetensors`` holds codes (F, C) and offsets (M + 1,), ``block-00000.json`` the ids of its M cuts, ``store.json`` the TokenSpec.
A block is written once; its JSON is written after its codes and says that it is whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from spear.errors import ArtifactError, DataError
from spear.files import make_folder, read_json, write_json, write_tensors
from spear.types import TokenSpec

STORE = "store.json"
OPEN_BLOCKS = 64

Codes = NDArray[np.uint8] | NDArray[np.int16] | NDArray[np.int32]


def code_dtype(codebook_size: int) -> str:
    """Smallest integer type that holds K - 1."""
    if codebook_size <= 2**8:
        return "uint8"
    return "int16" if codebook_size <= 2**15 else "int32"


def block_path(folder: Path, index: int) -> Path:
    """The tensors of block `index`; its JSON lies beside them."""
    return folder / f"block-{index:05d}.safetensors"


class TokenWriter:
    """Writes a store block by block; run again, it goes on after the last finished block.

    Args:
        folder: of one teacher, corpus and split. spec: what the codes are.
    """

    def __init__(self, folder: Path, spec: TokenSpec) -> None:
        self.folder, self.spec = make_folder(folder), spec
        self.dtype = getattr(torch, code_dtype(spec.codebook_size))

    def finished(self, index: int) -> dict[str, Any] | None:
        """The JSON of a whole block (``ids`` and what was noted with it), None where it is still to be made."""
        if not self.is_finished(index):
            return None
        found: dict[str, Any] = read_json(block_path(self.folder, index).with_suffix(".json"))
        return found

    def is_finished(self, index: int) -> bool:
        """Whether a block is whole."""
        path = block_path(self.folder, index)
        return path.exists() and path.with_suffix(".json").exists()

    def write(self, index: int, ids: Sequence[str], codes: Sequence[torch.Tensor], **notes: Any) -> None:
        """Write one block.

        Args:
            ids: of M cuts. codes: one (T, C) integer tensor per cut. notes: JSON values to keep with the block.
        Raises:
            ValueError: codes of another shape or range than the spec's.
        """
        if len(ids) != len(codes):
            raise ValueError(f"{len(ids)} ids, but {len(codes)} arrays of codes")
        for cut_id, item in zip(ids, codes):
            if item.ndim != 2 or item.shape[1] != self.spec.num_codebooks:
                raise ValueError(f"codes of {cut_id} must be (T, {self.spec.num_codebooks}), but are {tuple(item.shape)}")
            if item.numel() and not 0 <= int(item.min()) <= int(item.max()) < self.spec.codebook_size:
                raise ValueError(f"codes of {cut_id} must be in 0..{self.spec.codebook_size - 1}")
        offsets = torch.tensor([0, *(len(item) for item in codes)], dtype=torch.int64).cumsum(0)
        empty = torch.zeros(0, self.spec.num_codebooks, dtype=self.dtype)
        path = block_path(self.folder, index)
        write_tensors(path, {"codes": torch.cat([empty, *(item.to(self.dtype) for item in codes)]), "offsets": offsets})
        write_json(path.with_suffix(".json"), {"ids": list(ids), **notes})

    def codes(self, index: int) -> torch.Tensor:
        """(F, C) codes of a finished block."""
        with safe_open(block_path(self.folder, index), framework="pt") as file:
            found: torch.Tensor = file.get_tensor("codes")
        return found

    def discard(self, index: int) -> None:
        """Forget that a block is finished, so that the next run makes it again."""
        block_path(self.folder, index).with_suffix(".json").unlink(missing_ok=True)

    def reopen(self) -> None:
        """Forget that the store is finished; its blocks stay."""
        (self.folder / STORE).unlink(missing_ok=True)

    def close(self, num_blocks: int) -> None:
        """Write ``store.json``: from now on the store can be opened."""
        counts = [self.finished(index) for index in range(num_blocks)]
        missing = [index for index, found in enumerate(counts) if found is None]
        if missing:
            raise ArtifactError(f"{block_path(self.folder, missing[0])} does not exist or is unfinished")
        num_cuts = sum(len(found["ids"]) for found in counts if found is not None)
        write_json(self.folder / STORE, {**asdict(self.spec), "num_cuts": num_cuts, "num_blocks": num_blocks})


class TokenStore:
    """Codes by cut id, read from memory-mapped blocks. Make one with ``TokenStore.open``."""

    def __init__(self, folder: Path, spec: TokenSpec, starts: list[int], rows: dict[str, int]) -> None:
        self.folder, self.spec = folder, spec
        self._starts, self._rows = starts, rows
        self._blocks: OrderedDict[int, tuple[Any, NDArray[np.int64]]] = OrderedDict()

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Open a finished store.

        Raises:
            ArtifactError: unfinished, damaged, or an id occurs twice.
        """
        if not (folder / STORE).exists():
            raise ArtifactError(f"{folder} is not a finished token store: run `spear tokens` first")
        values: dict[str, Any] = read_json(folder / STORE)
        try:
            spec = TokenSpec(**{field.name: values[field.name] for field in fields(TokenSpec)})
            num_blocks, num_cuts = int(values["num_blocks"]), int(values["num_cuts"])
        except KeyError as error:
            raise ArtifactError(f"{folder / STORE} must have the key {error.args[0]!r}, but does not") from error
        starts: list[int] = []
        rows: dict[str, int] = {}
        for index in range(num_blocks):
            starts.append(len(rows))
            for cut_id in read_json(block_path(folder, index).with_suffix(".json"))["ids"]:
                if cut_id in rows:
                    raise ArtifactError(f"{folder} holds the cut {cut_id} twice")
                rows[cut_id] = len(rows)
        if len(rows) != num_cuts:
            raise ArtifactError(f"{folder} must hold {num_cuts} cuts, but its blocks name {len(rows)}")
        return cls(folder, spec, starts, rows)

    @property
    def ids(self) -> list[str]:
        """Cut ids in the order they were written."""
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, cut_id: object) -> bool:
        return cut_id in self._rows

    def __getitem__(self, cut_id: str) -> Codes:
        """(T, C) uint8; int16 where K > 256.

        Raises:
            DataError: the store lacks that cut. ArtifactError: its block is damaged.
        """
        handle, start, stop = self._find(cut_id)
        if start == stop:
            return np.zeros((0, self.spec.num_codebooks), dtype=code_dtype(self.spec.codebook_size))
        found: Codes = handle.get_slice("codes")[start:stop]
        return found

    def blocks(self) -> Iterator[tuple[list[str], Codes, NDArray[np.int64]]]:
        """Block after block: ids of M cuts, codes (F, C), offsets (M + 1,) of their rows.

        Raises:
            ArtifactError: a block is damaged.
        """
        ids = self.ids
        for index, start in enumerate(self._starts):
            handle, offsets = self._block(index)
            yield ids[start : start + len(offsets) - 1], handle.get_tensor("codes"), offsets

    def num_frames(self, cut_id: str) -> int:
        """T of one cut, without reading its codes."""
        _, start, stop = self._find(cut_id)
        return stop - start

    def check(self, expected: TokenSpec) -> None:
        """Make sure that the store is what a recipe expects; an empty expected fingerprint matches any.

        Raises:
            ArtifactError: names the first field that differs, with both values.
        """
        for name, value in asdict(expected).items():
            found = getattr(self.spec, name)
            if value != "" and found != value:
                raise ArtifactError(f"`{name}` of the tokens in {self.folder} must be {value}, but is {found}")

    def _find(self, cut_id: str) -> tuple[Any, int, int]:
        row = self._rows.get(cut_id)
        if row is None:
            raise DataError(f"the cut {cut_id} has no tokens in {self.folder}", cause="missing_tokens")
        index = bisect_right(self._starts, row) - 1
        handle, offsets = self._block(index)
        place = row - self._starts[index]
        return handle, int(offsets[place]), int(offsets[place + 1])

    def _block(self, index: int) -> tuple[Any, NDArray[np.int64]]:
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        path = block_path(self.folder, index)
        try:
            handle = safe_open(path, framework="numpy")
            offsets: NDArray[np.int64] = handle.get_tensor("offsets")
            shape = handle.get_slice("codes").get_shape()
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} is not a readable block of tokens: {error}") from error
        last = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._rows)
        whole = len(offsets) == last - self._starts[index] + 1 and offsets[0] == 0 and offsets[-1] == shape[0]
        if not whole or bool((np.diff(offsets) < 0).any()) or shape[1] != self.spec.num_codebooks:
            raise ArtifactError(f"{path} must hold the codes of the cuts its .json names, but does not")
        self._blocks[index] = (handle, offsets)
        if len(self._blocks) > OPEN_BLOCKS:
            self._blocks.popitem(last=False)
        return handle, offsets

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": OrderedDict()}
