"""Signals that ask a run to stop: remembered, so that the step in progress can end and be saved."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager that catches SIGTERM and SIGINT once; the previous handlers return on exit and at a second signal.

    Outside the main thread, where Python cannot handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: not set from Python, so there is nothing to put back but the default
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            logger.info("%s: stopping after this step; a second signal stops at once", self.received.name)
            return
        self._restore()
        os.kill(os.getpid(), number)
