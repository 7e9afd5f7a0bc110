"""Keeps a cluster up while it runs: starts dead members and Redis again, and gives up on one that keeps dying."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from kvbank.cluster.seams import Launcher
from kvbank.errors import ConfigError, KVBankError
from kvbank.kvstore.tiers.embedded_redis import EmbeddedRedis

log = logging.getLogger(__name__)

RESTARTS = 5                         # a member that dies more often than this has a reason that stays
RESTARTS_WITHIN_S = 60.0
RETRY_S = 1.0                        # after a restart that failed
LOOK_S = 0.25                        # between two looks for dead members

Deaths = dict[str, deque[float]]     # when each member died lately


def keep_up(
    launcher: Launcher, launch: Callable[[str], object], stopping: threading.Event, redis: EmbeddedRedis | None,
    watch: Callable[[int], None],
) -> None:
    """Start dead members again, under the same id, in the same place, until `stopping`.

    launch:  start the member of this id, wait until it serves. watch: hears of each new Redis by its process id.
    """
    deaths: Deaths = {}
    while not stopping.wait(LOOK_S):
        if redis is not None and not redis.running and _may_restart("redis", deaths):
            with contextlib.suppress(ConfigError):
                redis.start()
                watch(redis.pid or 0)
        for name in launcher.dead():
            log.warning("member_died id=%s", name)
            launcher.stop([name], grace_s=0.0)                   # whatever it left of its process group
            again = threading.Thread(target=_restart, args=(name, deaths, launch, stopping), name=f"restart-{name}", daemon=True)
            again.start()


def _restart(name: str, deaths: Deaths, launch: Callable[[str], object], stopping: threading.Event) -> None:
    """Until it serves again, the cluster stops, or it died too often."""
    while _may_restart(name, deaths):
        try:
            launch(name)
            log.info("member_restarted id=%s", name)
            return
        except KVBankError as error:
            if stopping.wait(RETRY_S):
                return
            log.error("member_not_restarted id=%s error=%r", name, str(error))
    log.error("member_given_up id=%s deaths=%d within_s=%.0f", name, RESTARTS, RESTARTS_WITHIN_S)


def _may_restart(name: str, deaths: Deaths) -> bool:
    recent, now = deaths.setdefault(name, deque(maxlen=RESTARTS + 1)), time.monotonic()
    recent.append(now)
    return len(recent) <= RESTARTS or now - recent[0] > RESTARTS_WITHIN_S
