"""Ops over gRPC: drain this member, call its loans home, empty its caches. Each is an event that the cores know already.

    gateway --Draining--> ledger: Drain        --RecallLoans--> ledger: Homecoming        --ClearCaches--> vault, host tier

Who may ask was decided at the gateway's ops door. Redis is not cleared from here: it is every member's, and keeps its own
term.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc

from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.loan_events import Drain, Homecoming
from kvbank.kvstore.store import BlockStore
from kvbank.kvstore.vault import Vault
from kvbank.proto import ops_pb2 as pb

log = logging.getLogger(__name__)


class OpsService:
    """One per member."""

    def __init__(
        self, banker: Banker, vault: Vault, store: Callable[[], BlockStore | None], *, blocks_per_span: int,
        leads: bool = True,
    ) -> None:
        """store: the shelves below the device, if there are any. leads: False on a shard whose books another one keeps."""
        assert banker.ledger is not None
        self._banker, self._ledger, self._vault, self._store = banker, banker.ledger, vault, store
        self._per_span, self._leads = blocks_per_span, leads

    @property
    def draining(self) -> bool:
        """No new jobs, no new loans."""
        return self._ledger.draining

    def act(self, request: pb.OpsRequest) -> pb.OpsReply:
        """Do what is asked; a refusal is an `error` in the reply."""
        kind = request.WhichOneof("kind")
        if not self._leads:
            return pb.OpsReply(error="this shard follows: ask the leading shard of its replica")
        reply = pb.OpsReply(error="this member does not know that action: it may run another version")
        if kind == "draining":
            reply = self._drain(request.draining.on)
        elif kind == "recall":
            reply = self._recall()
        elif kind == "clear":
            reply = self._clear(request.clear)
        log.info("ops done=%s blocks=%d frames=%d refused=%s", kind, reply.blocks, reply.frames, bool(reply.error))
        return reply

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("kvbank.Ops", {
            "Act": grpc.unary_unary_rpc_method_handler(
                lambda request, _context: self.act(request), request_deserializer=pb.OpsRequest.FromString,
                response_serializer=pb.OpsReply.SerializeToString)})

    def _drain(self, on: bool) -> pb.OpsReply:
        lent = self._lent() if on else 0
        self._banker.tell_ledger(Drain(on))
        return pb.OpsReply(blocks=lent)

    def _recall(self) -> pb.OpsReply:
        lent = self._lent()
        self._banker.tell_ledger(Homecoming(lent // self._per_span))
        return pb.OpsReply(blocks=lent)

    def _clear(self, wish: pb.ClearCaches) -> pb.OpsReply:
        reply, store = pb.OpsReply(), self._store()
        if wish.device:
            reply.blocks = self._vault.drop_idle() * self._per_span
        if wish.host and store is not None:
            reply.frames = store.clear_host()
        return reply

    def _lent(self) -> int:
        """Blocks away from the vault."""
        with self._vault.lock:
            return self._ledger.num_lent * self._per_span
