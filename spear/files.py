"""Atomic writing, hashing and reading of the files that artifacts are made of."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spear.errors import ArtifactError, DataError, SpearError

_CAUSES = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "the folder is not writable",
    errno.EPERM: "the folder is not writable",
    errno.EROFS: "the file system is read-only",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder under `path` into one clear SpearError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CAUSES:
            raise
        raise SpearError(f"cannot write {path}: {_CAUSES[error.errno]}") from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise SpearError(f"cannot write {path}: {error}") from error


def make_folder(path: Path) -> Path:
    """Create `path` and its parents; returns it.

    Raises:
        SpearError: the folder cannot be made (read-only, full, or a file is in the way).
    """
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise SpearError(f"cannot make the folder {path}: a file is in the way") from error
    return path


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    A reader sees the old file or the whole new one, never a part; a killed writer leaves only a ``.tmp`` file.
    """
    make_folder(path.parent)
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            os.chmod(temporary, 0o644)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_atomic(path, lambda temporary: void(temporary.write_bytes(data)))


def void(_: object) -> None:
    """Drop a value, so that an expression fits where a procedure is wanted."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes."""
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_atomic(path, lambda temporary: save_file(ready, temporary, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error


def check_names(names: Iterable[str], where: str = "") -> None:
    """Refuse names of audio files that have no UTF-8: they fit into no manifest.

    Args:
        names: as Python gives them. where: what they are names in, for the message.
    Raises:
        DataError: names the first.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            place = f"{where}: " if where else ""
            raise DataError(f"{place}names of audio files must be UTF-8, but one is {name!a}", cause="id") from error


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist") from error
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def seed_from(*parts: object) -> int:
    """A 63-bit seed that depends on every part, e.g. (seed, step, cut id), and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
