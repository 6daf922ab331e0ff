"""Files that stay open between reads, for all readers of a process together."""

from __future__ import annotations

import itertools
import os
import resource
from collections import OrderedDict
from pathlib import Path
from threading import RLock

MOST = 1024
"""Files that stay open at most; fewer where a process may open less than twice as many."""
_numbers = itertools.count()


class OpenFiles:
    """Reads stretches of files; of all files of one reader or of many, those read last stay open.

    A forked process reads on with the files it inherits: every read names its own place. Readers of several threads wait for each other.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, Path], int] = OrderedDict()
        self._lock = RLock()  # a reader may be dropped while its own thread reads for another
        os.register_at_fork(after_in_child=self._unlock)

    def __len__(self) -> int:
        return len(self._open)

    def read(self, owner: int, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on, fewer where it ends before.

        Args:
            owner: number of the reader (`new_owner`); files of two readers are apart, so that a new reader sees a new file of an old name.
        Raises:
            OSError: the file cannot be opened or read.
        """
        with self._lock:
            key = (owner, path)
            if key in self._open:
                self._open.move_to_end(key)
            else:
                self._make_room()
                self._open[key] = os.open(path, os.O_RDONLY)
            return os.pread(self._open[key], size, offset)

    def drop(self, owner: int) -> None:
        """Close all files of a reader."""
        with self._lock:
            for key in list(self._open):
                if key[0] == owner:
                    os.close(self._open.pop(key))

    def _make_room(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 2))
        while len(self._open) >= most:
            os.close(self._open.popitem(last=False)[1])

    def _unlock(self) -> None:
        self._lock = RLock()


def new_owner() -> int:
    """A number that no other reader of this process has."""
    return next(_numbers)


FILES = OpenFiles()
"""Of this process."""
