"""What a process logs as an error is counted, so that a failure that was caught and survived is seen without reading logs.

    log.exception(..), log.error(..) of kvbank's modules --> count --> kvbank_logged_errors_total

Whoever catches everything logs what it caught; this is the counter beside each such place. Keeps and writes nothing.
"""

from __future__ import annotations

import logging


class LoggedErrors(logging.Handler):
    """Counts records of level ERROR and above."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1                              # one at a time: the handler's lock is held


_OF_THIS_PROCESS = LoggedErrors()


def counted() -> LoggedErrors:
    """The count of this process, which begins with the first call. Only for processes that set up logging: Python prints
    errors of a library that no handler hears, and this is one that hears."""
    logging.getLogger("kvbank").addHandler(_OF_THIS_PROCESS)
    return _OF_THIS_PROCESS
