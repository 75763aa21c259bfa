"""When scoring has to stop, so that a batch is there at the moment the trainer has time for it (`--until-ready`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from stages.valuation.costs import RECENT, Times


class Anytime:
    """Whether the batch of a round is wanted by now.

    It is when the trainer has published the version of that number: it then waits. Waiting is foreseen, so that it
    need not happen: update r - 1 begins when version r - 1 is published and batch r - 1 delivered, and takes what the
    latest updates took; what is left to do here once scoring stops takes what it took in the latest rounds. None of
    these times depends on what a candidate looks like, so neither does the number that is scored.

    Args:
        published_s: version -> when it was published, in seconds of `clock`; None where it is not there.
        clock: seconds; the same for this process and the trainer's files.
    """

    def __init__(self, published_s: Callable[[int], float | None], clock: Callable[[], float]) -> None:
        self._published_s, self._clock = published_s, clock
        self._update_s = float("inf")
        self._finishing_s: deque[float] = deque(maxlen=RECENT)
        self._stopped_s: float | None = None
        self._delivered_s = float("-inf")
        self._looked: tuple[int, float] | None = None

    def updates(self, times: Times) -> None:
        """What the trainer says its latest updates took: (samples, seconds)."""
        measured = [seconds for samples, seconds in times if samples]
        if measured:
            self._update_s = median(measured)

    def wanted(self, number: int) -> bool:
        """Whether to stop scoring the candidates of round `number`; to be asked after every chunk of them."""
        now_s = self._clock()
        chunk_s = now_s - self._looked[1] if self._looked is not None and self._looked[0] == number else 0.0
        self._looked = number, now_s
        wanted = self._published_s(number) is not None or now_s + chunk_s / 2 >= self._latest_s(number)
        if wanted:
            self._stopped_s = now_s
        return wanted

    def delivered(self) -> None:
        """The batch has been handed over."""
        self._delivered_s = self._clock()
        if self._stopped_s is not None:
            self._finishing_s.append(self._delivered_s - self._stopped_s)
        self._stopped_s = None

    def _latest_s(self, number: int) -> float:
        """When scoring must stop for the batch to be in time."""
        before_s = self._published_s(number - 1)
        if before_s is None or not self._finishing_s:
            return float("inf")
        return max(before_s, self._delivered_s) + self._update_s - median(self._finishing_s)
