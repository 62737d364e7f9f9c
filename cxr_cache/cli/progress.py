"""How far a long job is: a bar on a terminal, and in a log one line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from cxr_cache.cli.output import is_quiet

EVERY_S: Final = 60.0


class Progress:
    """Counts what is done, and tells it in lines to a stream that is no terminal.

    Parameters
    ----------
    noun
        What is counted, in the plural: "images".
    stream
        Where the lines go.
    clock
        Gives seconds.
    """

    def __init__(
        self, noun: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._noun, self._stream, self._clock = noun, stream, clock
        self._started = self._told = clock()
        self._n_before: int | None = None
        self._has_ended = False
        self.n_done, self.n_all, self.n_failed = 0, 0, 0

    def update(self, n_done: int, n_all: int) -> None:
        """Take the new counts; once a minute, write a line."""
        if self._n_before is None:  # a job that continues has some from before
            self._n_before = n_done if n_done < n_all else 0
        self.n_done, self.n_all = n_done, n_all
        if n_done >= n_all:
            self.close()
        elif self._clock() - self._told >= EVERY_S:
            self._told = self._clock()
            self._write(self.to_text())

    def close(self) -> None:
        """Write the last line, if anything was counted, and once."""
        if self.n_all and not self._has_ended:
            self._has_ended = True
            elapsed = describe_seconds(self._clock() - self._started)
            self._write(f"{self.to_text(ended=True)}, after {elapsed}")

    def to_text(self, *, ended: bool = False) -> str:
        """Done of all, failures, rate and time left."""
        share = self.n_done / max(1, self.n_all)
        parts = [f"{self.n_done:,} of {self.n_all:,} {self._noun} ({share:.0%})"]
        if self.n_failed:
            parts.append(f"{self.n_failed:,} failed")
        elapsed = self._clock() - self._started
        n_new = self.n_done - (self._n_before or 0)
        if n_new > 0 and elapsed > 0:
            rate = n_new / elapsed
            parts.append(f"{rate:,.1f} a second" if rate >= 1 else f"{60 * rate:,.1f} a minute")
            if not ended:
                left = describe_seconds((self.n_all - self.n_done) / rate)
                parts.append(f"about {left} left")
        return ", ".join(parts)

    def _write(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=self._stream, flush=True)


class Bar(Progress):
    """The same, as a tqdm bar for a terminal."""

    def __init__(self, noun: str, stream: TextIO) -> None:
        from tqdm import tqdm

        super().__init__(noun, stream)
        self._bar = tqdm(unit=f" {noun}", file=stream, smoothing=0.05)

    def update(self, n_done: int, n_all: int) -> None:  # noqa: D102
        self._bar.total = n_all
        self._bar.update(n_done - self._bar.n)
        if self.n_failed:
            self._bar.set_postfix(failed=self.n_failed, refresh=False)

    def close(self) -> None:  # noqa: D102
        self._bar.close()

    def _write(self, line: str) -> None:
        self._bar.write(line, file=self._stream)


class Silent(Progress):
    """The same for --quiet: it counts, and tells nothing."""

    def _write(self, line: str) -> None:
        pass


@contextmanager
def progress(noun: str) -> Iterator[Progress]:
    """Show the progress of the block on stderr, unless --quiet was given."""
    kind = Silent if is_quiet() else Bar if sys.stderr.isatty() else Progress
    shown = kind(noun, sys.stderr)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def counting(noun: str) -> Iterator[Callable[[int, int], None]]:
    """The same, as the function to be told how much of how much is done."""
    with progress(noun) as shown:
        yield shown.update


def describe_seconds(seconds: float) -> str:
    """A duration in its largest two units.

    Examples
    --------
    >>> describe_seconds(42), describe_seconds(400), describe_seconds(20_000)
    ('42 s', '6 min 40 s', '5 h 33 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
