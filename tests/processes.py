"""Commands in fresh processes that die where they are told to.

Run as a program (``python -m tests.processes``) it serves `Processes`: it imports the package once and forks for every command, so
that a fresh process costs no import.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from spear.cli import main
from spear.stages import STAGES
from tests.conftest import ROOT

DIED = 9


class Processes:
    """Commands in fresh processes. Use as a context manager.

    A command can be told to die, as if by SIGKILL, to get a signal or to rest at changes of names below `root`, see `Changes`.
    """

    def __init__(self, logs: Path) -> None:
        self._log = logs / "output.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._helper = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"], env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._helper.communicate()

    def _ask(self, **request: object) -> int:
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        self._helper.stdin.write(json.dumps(request) + "\n")
        self._helper.stdin.flush()
        return int(self._helper.stdout.readline())

    def start(self, arguments: Sequence[str], *, root: Path, die_at: int | str = 0, after: bool = False, by: int = 0, rest_s: float = 0.0) -> int:
        """Start a command; returns its process id."""
        return self._ask(start=list(arguments), log=str(self._log), root=str(root), die_at=die_at, after=after, by=by, rest_s=rest_s)

    def wait(self, pid: int) -> int:
        """Exit code of a started command, negative for a signal."""
        return self._ask(wait=pid)

    def run(self, arguments: Sequence[str], **settings: Any) -> int:
        """Exit code of a command."""
        return self.wait(self.start(arguments, **settings))

    def output(self) -> str:
        """What the last command wrote."""
        return self._log.read_text()


class Changes:
    """Counts the changes of names below a folder by this process, and dies or rests at them. Use as a context manager.

    Args:
        root: of the folders to watch. die_at: number of the change to die at, or the name of a file to die at when it appears; 0 lives.
        after: die just after the change, else just before it. by: a signal that the process sends itself there instead of dying, once;
            the thread that makes the change waits for its effect. rest_s: pause before every change.
    """

    NAMES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir")

    def __init__(self, root: Path, die_at: int | str = 0, *, after: bool = False, by: int = 0, rest_s: float = 0.0) -> None:
        self.root, self.die_at, self.after, self.by, self.rest_s = str(root), die_at, after, by, rest_s
        self.count = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Changes:
        for name in self.NAMES:
            self._stack.enter_context(mock.patch.object(os, name, self._watched(getattr(os, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _counts(self, change: str, path: Any, options: dict[str, Any]) -> bool:
        """Whether a change is below the root and really changes something."""
        if options.get("dir_fd") is not None:  # the inside of a folder that is removed
            return True
        if not str(path).startswith(self.root):
            return False
        return os.path.isdir(os.path.dirname(path)) and not os.path.lexists(path) if change == "mkdir" else os.path.lexists(path)

    def _watched(self, change: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(change)
        def watched(*arguments: Any, **options: Any) -> None:
            if not self._counts(change.__name__, arguments[0], options):
                change(*arguments, **options)
                return
            self.count += 1
            time.sleep(self.rest_s)
            appears = Path(arguments[1]).name if change.__name__ in ("replace", "rename") else None
            dies = self.die_at in (self.count, appears)
            if dies and not self.after:
                self._die()
            change(*arguments, **options)
            if dies and self.after:
                self._die()

        return watched

    def _die(self) -> None:
        if not self.by:
            os._exit(DIED)
        self.die_at = 0
        os.kill(os.getpid(), self.by)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(1.0)  # the handler runs in the main thread


def _import_all() -> None:
    """Import what the stages import on the way, so that a fork has it."""
    import importlib

    import matplotlib.pyplot  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import torch.utils.tensorboard.writer  # noqa: F401
    import transformers.models.wavlm.modeling_wavlm  # noqa: F401

    for stage in STAGES:
        importlib.import_module(f"spear.stages.{stage}")
    for name in ("recipe", "teachers.waveform", "teachers.logmel", "quantizers.mvq_fit", "quantizers.kmeans", "objectives.masked_prediction"):
        importlib.import_module(f"spear.{name}")
    for name in ("frames", "segments", "utterances", "verification"):
        importlib.import_module(f"spear.evaluation.tasks.{name}")


def _child(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    Changes(Path(request["root"]), request["die_at"], after=request["after"], by=request["by"], rest_s=request["rest_s"]).__enter__()
    code = 70
    try:
        code = main(request["start"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    torch.set_num_threads(1)
    _import_all()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _child(request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
