"""Writes to a store that may be slow or away: one thread does them, and the work that they tell of never waits.

A write is a function of what is known when it is done, and doing it again changes nothing. So one write a key is
enough, however often it is asked for, and the order of different keys does not matter.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable

FIRST_PAUSE_SECONDS = 0.5  # after a store did not answer; doubled each time
LONGEST_PAUSE_SECONDS = 15.0

log = logging.getLogger(__name__)


class NotWritten(Exception):
    """The store did not take some writes."""


class Outbox:
    """A queue of writes and the thread that does them.

    While the store is away the thread pauses, and goes on with the next write: one that never succeeds holds no other
    one up. A write that fails for another reason is set aside until `flush`.
    """

    def __init__(
        self, store: str, *, is_away: Callable[[Exception], bool], in_words: Callable[[Exception], str], at_end: Callable[[], None]
    ) -> None:
        """What the outbox needs to know.

        Args:
            store: its name, for messages.
            is_away: whether an error may be over when the store is asked again.
            in_words: an error, printable.
            at_end: called in the thread when it ends.
        """
        self._store, self._is_away, self._in_words, self._at_end = store, is_away, in_words, at_end
        self._pending: dict[Hashable, Callable[[], None]] = {}  # in order; what is being done stays until it is done
        self._failed: dict[Hashable, tuple[Callable[[], None], str]] = {}  # set aside, with its error
        self._away_since: float | None = None
        self._progress = time.monotonic()  # when a write was last done, or the queue was empty
        self._why = ""  # of the last failure
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=store, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, key: Hashable, write: Callable[[], None]) -> None:
        """Ask for a write, in place of one of the same key that was not begun. Returns at once."""
        with self._changed:
            if not self._pending:
                self._progress = time.monotonic()
            self._pending[key] = write
            self._changed.notify_all()

    def flush(self, patience_seconds: float) -> None:
        """Wait until everything is written; what was set aside is tried once more.

        Raises NotWritten where that fails again, or nothing could be written for `patience_seconds`.
        """
        self._drain(patience_seconds)
        with self._changed:
            again, self._failed = self._failed, {}
        for key, (write, _) in again.items():
            self.put(key, write)
        self._drain(patience_seconds)
        if self._failed:
            raise NotWritten(f"{self._store} refuses {len(self._failed)} writes, the first with: {next(iter(self._failed.values()))[1]}")

    def close(self) -> int:
        """End the thread when all is written, or as soon as the store is away. How many writes are left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        return len(self._pending) + len(self._failed)

    def _drain(self, patience_seconds: float) -> None:
        with self._changed:
            while self._pending:
                if (quiet := time.monotonic() - self._progress) > patience_seconds:
                    told = f"{self._store} took none of {len(self._pending)} outstanding writes for {quiet:.0f} s"
                    raise NotWritten(f"{told}: {self._why or 'no answer'}. Nothing is lost: --resume writes them later.")
                self._changed.wait(timeout=0.5)

    def _work(self) -> None:
        try:
            self._do_all()
        finally:
            self._at_end()

    def _do_all(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                key, write = next(iter(self._pending.items()))
            away = self._do(key, write)
            if not away:
                pause = FIRST_PAUSE_SECONDS
                continue
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, timeout=pause):
                    return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _do(self, key: Hashable, write: Callable[[], None]) -> bool:
        """Do one write. Whether the store is away."""
        try:
            write()
        except Exception as error:
            away, why = self._is_away(error), self._in_words(error)
            with self._changed:
                self._why = why
                latest = self._pending.pop(key)
                if away:
                    self._pending[key] = latest  # at the end
                else:
                    self._failed[key] = (latest, why)
                self._changed.notify_all()
            self._tell(away, why)
            return away
        with self._changed:
            if self._pending[key] is write:
                del self._pending[key]
            else:  # asked for again meanwhile: after the others
                self._pending[key] = self._pending.pop(key)
            self._failed.pop(key, None)
            self._progress = time.monotonic()
            self._changed.notify_all()
        if self._away_since is not None:
            log.warning("%s answers again, after %.0f s.", self._store, time.monotonic() - self._away_since)
            self._away_since = None
        return False

    def _tell(self, away: bool, why: str) -> None:
        """One line when the store goes away, one for each write that it refuses."""
        if not away:
            log.warning("%s refuses a write (it is tried again at the end): %s", self._store, why)
        elif self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("%s is away; what is to be written waits, and the study goes on: %s", self._store, why)
