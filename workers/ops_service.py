"""Ops over gRPC: drain this member, call its loans home, empty its caches, pin what a prompt left in its vault.

    gateway --Draining--> ledger: Drain   --RecallLoans--> ledger: Homecoming   --ClearCaches--> vault, host tier   --Pin--> vault

Who may ask was decided at the gateway's ops door. Redis is not cleared from here: it is every member's, and keeps its own
term.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc

from kvbank.kvstore.borrowing import Banker
from kvbank.kvstore.idle import MAX_PIN_S
from kvbank.kvstore.loan_events import Drain, Homecoming
from kvbank.kvstore.store import BlockStore
from kvbank.kvstore.vault import Vault
from kvbank.proto import ops_pb2 as pb
from kvbank.workers.held_keys import split_keys

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
        if not self._leads and (kind != "clear" or request.clear.device):
            return pb.OpsReply(error="this shard follows: ask the leading shard of its replica")
        reply = pb.OpsReply(error="this member does not know that action: it may run another version")
        if kind == "draining":
            reply = self._drain(request.draining.on)
        elif kind == "recall":
            reply = self._recall()
        elif kind == "clear":
            reply = self._clear(request.clear)
        elif kind == "pin":
            reply = self._pin(request.pin)
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

    def _pin(self, wish: pb.Pin) -> pb.OpsReply:
        if wish.term_s > MAX_PIN_S:
            return pb.OpsReply(error=f"a pin lasts at most {MAX_PIN_S:g} s")
        ends, tail = split_keys(wish.ends), split_keys(wish.tail)
        if not wish.term_s:
            return pb.OpsReply(blocks=self._vault.unpin(ends, tail).blocks)
        done = self._vault.pin(ends, tail, wish.term_s)
        if done.blocks:
            return pb.OpsReply(blocks=done.blocks, left_out=done.left_out)
        if done.left_out:
            return pb.OpsReply(error="half of this member's slots are pinned, and more may not be: end another pin first")
        return pb.OpsReply(error="nothing of this prompt lies in this member's vault now")

    def _lent(self) -> int:
        """Blocks away from the vault."""
        with self._vault.lock:
            return self._ledger.num_lent * self._per_span
