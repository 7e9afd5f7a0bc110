"""Heartbeat: a member's line to the control plane, on a thread of its own so that no computation can silence it.

It registers, reports every half second or when somebody must know who is there now, registers again when control does
not know it (control was restarted), and asks on the member's behalf who could lend or who holds a prefix. Control being
away is normal: the last known members stay, questions get an empty answer within a fraction of a second, and the reports
go on until somebody listens.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import grpc

from kvbank.cluster.control import MAX_QUESTION_KEYS, SERVICE, split_keys
from kvbank.cluster.directory import KEY_BYTES
from kvbank.cluster.membership import Facts, Versions
from kvbank.errors import ConfigError, Unauthorized, Unavailable
from kvbank.kvstore.transport import rpc
from kvbank.kvstore.transport.badge import Badge
from kvbank.proto import control_pb2 as pb

log = logging.getLogger(__name__)

CALL_S = 1.0                         # one report or registration
REPORT_BYTES = 49_152 * KEY_BYTES    # of keys in one report: 1.5 MiB, well within a message
QUESTION_S = 0.25                    # one question on behalf of a job that waits for the answer


REPLIES: dict[str, Any] = {"Register": pb.RegisterReply, "Heartbeat": pb.Advice, "Lenders": pb.LendersReply,
                           "Locate": pb.LocateReply, "Snapshot": pb.SnapshotReply}


class Heartbeat:
    """One member's line to control.

    report:      `report(full) -> {field of control.proto's Report: value}`; keys_added and keys_removed are what
                 changed since the last call, or with `full` keys_added is all that is held. Called on its thread.
    on_members:  called on its thread with everyone alive, whenever an id, boot or address changed.
    """

    def __init__(
        self, control: str, badge: Badge | str, *, interval_s: float = 0.5,
        report: Callable[[bool], Mapping[str, Any]] | None = None,
        on_members: Callable[[Sequence[pb.Member]], None] | None = None,
    ) -> None:
        self._channels, self._control = rpc.Channels(badge), control
        self._interval_s = interval_s
        self._report = report or (lambda full: {})
        self._on_members = on_members or (lambda members: None)
        self._members: tuple[pb.Member, ...] = ()
        self._request = pb.RegisterRequest()
        self._session = 0
        self._seq = 0
        self._need_full = True
        self._waiting_keys = b""
        self._complaint = ""
        self._stopping = threading.Event()
        self._hurry = threading.Event()          # the next beat is due now
        self._beats = threading.Condition()
        self._begun = self._answered = 0         # beats: how many began, and the last one that told who is alive
        self._thread: threading.Thread | None = None

    def start(self, facts: Facts, versions: Versions, *, within_s: float = 30.0) -> None:
        """Register, then report from now on. Raises ConfigError when refused, Unavailable when nobody answers."""
        self._request = pb.RegisterRequest(
            member=pb.Member(**asdict(facts)), kvbank_version=versions.kvbank, protocol=versions.protocol,
            model_digest=versions.model_digest, torch_version=versions.torch,
        )
        give_up = time.monotonic() + within_s
        while (error := self._register()) is None:
            if time.monotonic() > give_up or self._stopping.wait(0.05):
                raise Unavailable(f"the control plane at {self._control} did not answer within {within_s:.0f} s")
        if error:
            raise ConfigError(error)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye, so that nobody has to wait for the silence to be noticed."""
        self._stopping.set()
        self._hurry.set()
        if self._thread is not None:
            self._thread.join(CALL_S + self._interval_s)
            farewell = pb.Report(id=self._request.member.id, session=self._session, seq=self._seq + 1, leaving=True)
            self._ask("Heartbeat", farewell, QUESTION_S)
        self._channels.close()

    # -- what the member may ask; safe from any thread -----------------------------------------------------------------

    @property
    def members(self) -> tuple[pb.Member, ...]:
        """Everyone alive as of the last advice."""
        return self._members

    @property
    def id(self) -> str:
        return str(self._request.member.id)

    def lenders(self, slots: int, slot_bytes: int) -> list[pb.Candidate]:
        """Who could lend now, best first; empty when nobody can or control is away."""
        question = pb.LendersRequest(borrower=self.id, slots=slots, slot_bytes=slot_bytes)
        reply = self._ask("Lenders", question, QUESTION_S)
        return list(reply.candidates) if reply else []

    def locate(self, keys: Sequence[bytes]) -> list[pb.Holding]:
        """Who else holds runs of `keys`, leading runs first; empty when nobody does or control is away."""
        reply = self._ask("Locate", pb.LocateRequest(keys=b"".join(keys[:MAX_QUESTION_KEYS]), asker=self.id), QUESTION_S)
        return list(reply.holdings) if reply else []

    def snapshot(self) -> list[pb.MemberView]:
        """Everyone's facts and latest counts; empty when control is away."""
        reply = self._ask("Snapshot", pb.SnapshotRequest(), QUESTION_S)
        return list(reply.members) if reply else []

    def beat_now(self, within_s: float) -> None:
        """Report now, and wait until control has told who is alive, at most `within_s`: `members` are then no older than
        this call."""
        with self._beats:
            awaited = self._begun + 1
            self._hurry.set()
            self._beats.wait_for(lambda: self._answered >= awaited, within_s)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self._hurry.wait(max(0.0, due - time.monotonic()))
            if self._stopping.is_set():
                return
            self._hurry.clear()
            if (now := time.monotonic()) >= due:
                due = max(due + self._interval_s, now)               # after a pause: once now, not once per missed beat
            self._beat()

    def _beat(self) -> None:
        with self._beats:
            self._begun += 1
        full, self._need_full = self._need_full, False
        self._seq += 1
        try:
            counts = dict(self._report(full))
        except Exception:            # whatever is wrong with the member's counts, it is alive and must not be reaped
            log.exception("report_failed id=%s", self.id)
            counts, full = {}, False
            self._need_full = True
        report = pb.Report(**{**counts, "id": self.id, "session": self._session, "seq": self._seq, "full": full})
        self._fit(report)
        advice = self._ask("Heartbeat", report, CALL_S)
        if advice is None:
            self._need_full = True   # what this report said may or may not have arrived
        elif advice.register_again:
            self._register()
        else:
            self._need_full |= advice.send_full
            self._see(tuple(advice.members))
            with self._beats:
                self._answered = self._begun
                self._beats.notify_all()

    def _fit(self, report: pb.Report) -> None:
        """A report fits one message: added keys beyond that wait for the next one, unless they are removed first."""
        if report.full:
            self._waiting_keys = b""
        if self._waiting_keys and report.keys_removed:
            removed = dict.fromkeys(split_keys(report.keys_removed))
            self._waiting_keys = b"".join(key for key in split_keys(self._waiting_keys) if key not in removed)
        added = self._waiting_keys + report.keys_added
        report.keys_added, self._waiting_keys = added[:REPORT_BYTES], added[REPORT_BYTES:]
        if len(report.keys_removed) > REPORT_BYTES:
            report.ClearField("keys_removed")
            self._need_full = True

    def _see(self, members: tuple[pb.Member, ...]) -> None:
        def names(of: Sequence[pb.Member]) -> list[tuple[str, bytes, str]]:
            return [(m.id, m.boot, m.address) for m in of]

        changed = names(members) != names(self._members)
        self._members = members
        if changed:
            self._on_members(members)

    def _register(self) -> str | None:
        """'' when registered, the reason when refused, None when nobody answered."""
        reply = self._ask("Register", self._request, CALL_S)
        if reply is None:
            return None
        if reply.error:
            self._complain(str(reply.error))
            return str(reply.error)
        self._session, self._seq, self._need_full, self._complaint = reply.session, 0, True, ""
        log.info("registered id=%s session=%d", self.id, self._session)
        return ""

    def _ask(self, method: str, request: Any, within_s: float) -> Any:
        """The reply, or None when control is away. Raises Unauthorized when it does not take our token."""
        try:
            call = self._channels.to(self._control).unary_unary(
                f"/{SERVICE}/{method}", request_serializer=_serialized, response_deserializer=REPLIES[method].FromString)
            return call(request, timeout=within_s)
        except ValueError:           # the channel was closed: we are stopping
            return None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                if threading.current_thread() is not self._thread:
                    raise Unauthorized(f"control at {self._control} does not take our cluster token") from None
                self._complain("the control plane does not take our cluster token any more")
            elif method != "Heartbeat":
                log.debug("control_away method=%s code=%s", method, error.code().name)
            return None

    def _complain(self, text: str) -> None:
        if text != self._complaint:  # once, not twice a second
            self._complaint = text
            log.error("control_refused id=%s error=%r", self.id, text)


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())
