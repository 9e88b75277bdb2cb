"""SIGTERM and SIGINT as a request to stop at the next safe point."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from wan_common.errors import Interrupted


class StopSignals:
    """While active, the first SIGTERM or SIGINT is remembered; a second SIGINT interrupts at once.

    Outside :meth:`working` (loading, compiling: nothing would be lost) the first signal ends the command at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._saved: dict[int, Any] = {}
        self._working = False

    def __enter__(self) -> StopSignals:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._saved[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._saved.items():
            signal.signal(signum, handler)

    def working(self, on: bool) -> None:
        """From now on (or no longer) there is progress to save: signals wait for :meth:`received` to be looked at."""
        self._working = on
        if not on and self.received is not None:
            raise self.error("nothing was in progress")

    def error(self, what: str) -> Interrupted:
        """The error that ends the command for the signal received."""
        assert self.received is not None
        return Interrupted(f"stopped by {signal.Signals(self.received).name}: {what}", self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signum
        if again and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._working:
            raise self.error("nothing was in progress yet")
