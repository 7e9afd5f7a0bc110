"""The control plane: membership, directory and placement behind one gRPC service. It advises and owns nothing.

Everything it knows was reported to it. When it dies, running jobs and open loans go on; when it is back, members are
told to register again and it knows everything again within two heartbeats. One short lock guards the three cores.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import grpc

import kvbank
from kvbank.cluster import placement
from kvbank.cluster.directory import KEY_BYTES, Directory, Held, Left
from kvbank.cluster.membership import (
    Admitted,
    Effect,
    Event,
    Facts,
    Gone,
    Heard,
    Joined,
    Late,
    Leave,
    Load,
    Membership,
    Missed,
    Refused,
    Register,
    Tick,
    Unknown,
    Versions,
    View,
)
from kvbank.errors import ConfigError
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.proto import control_pb2 as pb

log = logging.getLogger(__name__)

SERVICE = "kvbank.Control"
MAX_QUESTION_KEYS = 65_536           # 1M tokens of 16-token blocks
MAX_RUNS = 256                       # in one answer


class Control:
    """One control plane. `start` serves it; `clock` is monotonic seconds."""

    def __init__(
        self, badge: Badge | str, *, suspect_s: float = 1.5, gone_s: float = 5.0, directory_keys: int = 1_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._badge = badge
        self._clock = clock
        self._lock = threading.Lock()
        self._members = Membership(Versions(kvbank=kvbank.__version__), first_session=secrets.randbits(48),
                                   suspect_s=suspect_s, gone_s=gone_s)
        self._directory = Directory(directory_keys)
        self._server: grpc.Server | None = None

    def start(self, address: str) -> str:
        """Serve on `host:port` (port 0: any); the address members use. Raises ConfigError when it cannot be bound."""
        server = rpc.server(self._badge, threads=8)
        methods: dict[str, tuple[Any, Any]] = {
            "Register": (self.register, pb.RegisterRequest), "Heartbeat": (self.heartbeat, pb.Report),
            "Lenders": (self.lenders, pb.LendersRequest), "Locate": (self.locate, pb.LocateRequest),
            "Snapshot": (self.snapshot, pb.SnapshotRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {
            name: grpc.unary_unary_rpc_method_handler(
                method, request_deserializer=request.FromString, response_serializer=_serialized)
            for name, (method, request) in methods.items()
        }),))
        try:
            port = rpc.bind(server, address)
        except OSError as error:
            raise ConfigError(str(error)) from error
        server.start()
        self._server = server
        return f"{address.rpartition(':')[0]}:{port}"

    def stop(self) -> None:
        """Answer what has begun, at most 0.5 s, then close."""
        if self._server is not None:
            self._server.stop(0.5).wait(1.0)

    # -- the five calls ------------------------------------------------------------------------------------------------

    def register(self, request: pb.RegisterRequest, context: Any = None) -> pb.RegisterReply:
        told = request.member
        facts = Facts(**{name: getattr(told, name) for name in Facts.__slots__})
        versions = Versions(kvbank=request.kvbank_version, protocol=request.protocol,
                            model_digest=request.model_digest, torch=request.torch_version)
        if not facts.id or len(facts.boot) != 16:
            return pb.RegisterReply(error="a member needs an id and a boot of 16 bytes")
        with self._lock:
            for effect in self._take(Register(facts, versions)):
                if isinstance(effect, Admitted):
                    return pb.RegisterReply(session=effect.session)
                if isinstance(effect, Refused):
                    return pb.RegisterReply(error=effect.error)
        raise AssertionError("a Register is admitted or refused")

    def heartbeat(self, report: pb.Report, context: Any = None) -> pb.Advice:
        with self._lock:
            if report.leaving:
                self._take(Leave(report.id, report.session))
                return pb.Advice()
            effects = self._take(Heard(report.id, report.session, report.seq, _load(report)))
            if any(isinstance(effect, Unknown) for effect in effects):
                return pb.Advice(register_again=True)
            if not any(isinstance(effect, Late) for effect in effects):
                self._directory.on(Held(report.id, split_keys(report.keys_added), split_keys(report.keys_removed), report.full))
            missed = any(isinstance(effect, Missed) for effect in effects)
            members = [_member(view.facts) for view in self._members.views(self._clock())]
        return pb.Advice(members=members, send_full=not report.full and (missed or report.seq == 1))

    def lenders(self, request: pb.LendersRequest, context: Any = None) -> pb.LendersReply:
        best = placement.choose_lenders(self.views(), borrower=request.borrower, slots=request.slots,
                                        slot_bytes=request.slot_bytes)
        return pb.LendersReply(candidates=[
            pb.Candidate(id=v.facts.id, boot=v.facts.boot, address=v.facts.address,
                         slots_lendable=v.load.slots_lendable)
            for v in best
        ])

    def locate(self, request: pb.LocateRequest, context: Any = None) -> pb.LocateReply:
        keys = split_keys(request.keys[:MAX_QUESTION_KEYS * KEY_BYTES])
        with self._lock:
            runs = self._directory.runs(keys, without=request.asker)[:MAX_RUNS]
        return pb.LocateReply(holdings=[pb.Holding(id=run.id, first=run.first, count=run.count) for run in runs])

    def snapshot(self, request: pb.SnapshotRequest, context: Any = None) -> pb.SnapshotReply:
        return pb.SnapshotReply(members=[
            pb.MemberView(member=_member(view.facts), report=pb.Report(id=view.facts.id, **asdict(view.load)),
                          silent_s=view.silent_s, suspect=view.suspect)
            for view in self.views()
        ])

    def views(self) -> list[View]:
        """Everyone in, by id."""
        with self._lock:
            self._take()
            return self._members.views(self._clock())

    def _take(self, event: Event | None = None) -> list[Effect]:
        """Let the core see how late it is, then the event. Members that went are struck from the directory."""
        now = self._clock()
        effects = self._members.on(now, Tick()) if now >= self._members.wake_at() else []
        if event is not None:
            effects = [*effects, *self._members.on(now, event)]
        for effect in effects:
            if isinstance(effect, Gone):
                self._directory.on(Left(effect.facts.id))
                log.info("member_gone id=%s why=%s", effect.facts.id, effect.why)
            elif isinstance(effect, Joined):
                log.info("member_joined id=%s kind=%s pid=%d", effect.facts.id, effect.facts.kind, effect.facts.pid)
            elif isinstance(effect, Refused):
                log.warning("member_refused error=%r", effect.error)
        return effects


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def split_keys(keys: bytes) -> list[bytes]:
    """Block keys as they travel: one after the other, 32 bytes each."""
    return [keys[at:at + KEY_BYTES] for at in range(0, len(keys) - KEY_BYTES + 1, KEY_BYTES)]


def _load(report: pb.Report) -> Load:
    names: Iterable[str] = (name for name in Load.__slots__ if name != "suspects")
    return Load(suspects=tuple(report.suspects[:64]), **{name: getattr(report, name) for name in names})


def _member(facts: Facts) -> pb.Member:
    return pb.Member(**asdict(facts))
