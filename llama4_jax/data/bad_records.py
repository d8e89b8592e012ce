"""Records that cannot be read: counted, named in the log, and too many of them stop the run."""

import logging
import threading

from llama4_jax.errors import UserError

logger = logging.getLogger(__name__)


class BadRecord(UserError):
    """A record, or a file from some place on, cannot be read. The message names file and place."""


class BadRecords:
    """Those of one reading of the data, by one process in one sitting. May be shared by threads.

    Attributes:
        found: what was wrong with each, a line that names its place.
    """

    def __init__(self, budget: int = 0):
        """`budget` is how many may be left out: DataConfig.max_bad_records."""
        self.found: list[str] = []
        self._budget, self._lock = budget, threading.Lock()

    def leave_out(self, error: UserError) -> None:
        """Notes and logs it; one that was noted before, such as in an earlier epoch, does not count again.

        Raises UserError when there are more than the budget.
        """
        with self._lock:
            if str(error) in self.found:
                return
            self.found.append(str(error))
        if len(self.found) > self._budget:
            raise UserError(
                f"{error} (records that cannot be read: {len(self.found)}; allowed by DataConfig.max_bad_records: {self._budget})"
            ) from None
        logger.warning("%s; left out, the %d. of at most %d", error, len(self.found), self._budget)
