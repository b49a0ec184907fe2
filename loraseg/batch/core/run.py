"""The loop over a job's work units, and its progress log."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

from loraseg.batch.core.executor import Executor, Stage, WorkUnit

__all__ = ["Progress", "run_units"]

logger = logging.getLogger(__name__)

# Units that are planned and handed over together: tens of MB in the driver.
_UNITS_PER_BATCH = 2000
_LOG_INTERVAL_S = 10.0


def run_units(
    executor: Executor, stages: Sequence[Stage], state: Any, units: Iterable[WorkUnit]
) -> Generator[tuple[str, Any], None, None]:
    """Run all units and yield (unit id, value of the last stage) as they complete.

    Args:
        executor: Runs the stages.
        stages: Steps of a unit, in order.
        state: Run state that the stages are built from.
        units: Consumed in batches, so that planning needs memory for one batch.

    Raises:
        LorasegError: The first error of a unit; the results of completed units stay committed.
    """
    remaining = iter(units)
    while batch := list(islice(remaining, _UNITS_PER_BATCH)):
        with closing(executor.run(stages, state, batch)) as results:
            for result in results:
                if result.error is not None:
                    raise result.error
                yield result.unit_id, result.value


class Progress:
    """Logs how many images are done, at most every ten seconds and after the last one."""

    def __init__(
        self, total: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock.

        Args:
            total: Number of images, None if unknown.
            clock: Returns seconds.
        """
        self._total, self._clock = total, clock
        self._started_at = self._logged_at = clock()
        self._done = 0

    def update(self, images: int, detail: str) -> None:
        """Add completed images.

        Args:
            images: Number of images that completed since the last call.
            detail: What else to log, such as "3 without a mask".
        """
        self._done += images
        now = self._clock()
        if now - self._logged_at < _LOG_INTERVAL_S and self._done != self._total:
            return
        self._logged_at = now
        rate = self._done / max(now - self._started_at, 1e-9)
        count = f"{self._done}" if self._total is None else f"{self._done} of {self._total}"
        logger.info("%s images done (%s), %.2f per second%s", count, detail, rate, self._left(rate))

    def _left(self, rate: float) -> str:
        if self._total is None or not rate:
            return ""
        return f", {(self._total - self._done) / rate:.0f} s left"
