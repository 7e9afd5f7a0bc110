"""The two streams of a chain as a follower serves them: Lead from shard 0, Activate from the shard before. Raw bytes.

    grpc threads: bytes --> arrivals, Session.hidden        the follower's thread: what it says --> Session.outbox

Forwards; decides nothing. The newest Hello wins: a leader that connects again has given the old streams up.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from threading import Thread
from typing import Any

import grpc

from kvbank.kvstore.transport.links import Outbox
from kvbank.workers.chain_frames import CHAIN_KEY, ChainFormatError, Failed, Message, pack, unpack
from kvbank.workers.chain_link import OUTBOX_LIMIT

log = logging.getLogger(__name__)


class SessionOver(Exception):
    """The leader, or the shard before, is gone: whatever was under way is not wanted any more."""


class Session:
    """One Lead stream and the hidden states that belong to it."""

    def __init__(self) -> None:
        self.chain = b""                                     # set by its Hello
        self.outbox = Outbox(OUTBOX_LIMIT)
        self.hidden: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()     # None: no more will come

    def send(self, message: Message) -> None:
        """Raises SessionOver."""
        if not self.outbox.put(pack(message)):
            raise SessionOver("the leader does not listen")

    def end(self, failed: str = "") -> None:
        """No more in either direction; `failed` is the last word to the leader. Safe to repeat."""
        if failed:
            self.outbox.put(pack(Failed(failed)))
        self.outbox.close()
        self.hidden.put(None)


Arrival = tuple[Session | None, Any]         # (session, message); message None: it ended; session None: wake up


class ShardService:
    """One per follower. `arrivals` is the follower thread's inbox."""

    def __init__(self) -> None:
        self.arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self.current: Session | None = None                  # set by the follower's thread

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("kvbank.Shard", {
            "Lead": grpc.stream_stream_rpc_method_handler(self.lead),
            "Activate": grpc.stream_stream_rpc_method_handler(self.activate),
        })

    def lead(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The leader's commands in, what this shard has to say out."""
        session = Session()
        context.add_callback(lambda: self._ended(session))
        Thread(target=self._read, args=(session, messages), name="lead-in", daemon=True).start()
        yield from session.outbox

    def activate(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Hidden states of the shard before, for the chain that is current."""
        session = self.current
        if session is None or (CHAIN_KEY, session.chain.hex()) not in context.invocation_metadata():
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another chain")
            return
        try:
            for data in messages:
                session.hidden.put(data)
        except Exception as error:                           # gRPC's iterator raises a bare one when the call is over
            log.debug("activate ended error=%s", type(error).__name__)
        session.hidden.put(None)
        yield from ()

    def _read(self, session: Session, messages: Iterator[bytes]) -> None:
        try:
            for data in messages:
                self.arrivals.put((session, unpack(data)))
        except ChainFormatError as error:
            session.end(str(error))
        except Exception as error:                           # as in activate: the leader's call is over
            log.debug("lead ended error=%s", type(error).__name__)
        self._ended(session)

    def _ended(self, session: Session) -> None:
        session.end()
        self.arrivals.put((session, None))
