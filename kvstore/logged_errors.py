"""What a process logs as an error is counted, so that a failure that was caught and survived is seen without reading logs.

    log.exception(..), log.error(..) of anybody --> root logger --> count --> kvbank_logged_errors_total

Whoever catches everything logs what it caught, our own code as well as gRPC's, asyncio's and the HTTP server's; this is the
counter beside all those places. Keeps and writes nothing.
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


OF_THIS_PROCESS = LoggedErrors()                     # hears from the time on when logging is set up (cluster/logs.py)
