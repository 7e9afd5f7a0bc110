"""Control and heartbeat over real gRPC: mismatches, the token, and a control plane that dies and comes back."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import pytest

from kvbank import __version__
from kvbank.cluster import heartbeat
from kvbank.cluster.control import Control
from kvbank.cluster.heartbeat import Heartbeat
from kvbank.cluster.membership import Facts, Versions
from kvbank.errors import ConfigError, Unauthorized, Unavailable
from kvbank.proto import control_pb2 as pb

TOKEN = "cd" * 16
KEYS = [bytes([number]) * 32 for number in range(8)]
FAST_S = 0.02


class FakeMember:
    """A member's side: what it holds, what it was told, and its line."""

    def __init__(self, control: str, name: str, kind: str = "model", token: str = TOKEN, interval_s: float = FAST_S,
                 **facts: object) -> None:
        self.held: list[bytes] = []
        self.fulls: list[bool] = []
        self.seen: list[list[str]] = []
        self.lendable, self.broken = 8, False
        self.line = Heartbeat(control, token, interval_s=interval_s, report=self._report, on_members=self._meet)
        self.facts = Facts(id=name, boot=os.urandom(16), kind=kind, host="here", pid=1, address="127.0.0.1:1",
                           slot_bytes=4096, slots_total=8, **facts)

    def start(self, **versions: object) -> FakeMember:
        self.line.start(self.facts, Versions(**{"kvbank": __version__, "torch": "2.6", **versions}), within_s=5.0)
        return self

    def _report(self, full: bool) -> dict[str, object]:
        if self.broken:
            raise ZeroDivisionError
        self.fulls.append(full)
        return {"slots_free": 8, "slots_lendable": self.lendable, "keys_added": b"".join(self.held) if full else b""}

    def _meet(self, members: list[pb.Member]) -> None:
        self.seen.append([member.id for member in members])


@pytest.fixture
def cluster() -> Iterator[Callable[..., object]]:
    """Start controls and members; all end with the test."""
    ends: list[Callable[[], None]] = []

    def control(address: str = "127.0.0.1:0", **options: float) -> tuple[Control, str]:
        made = Control(TOKEN, **{"suspect_s": 0.5, "gone_s": 1.0, **options})
        ends.append(made.stop)
        return made, made.start(address)

    def member(*args: object, **facts: object) -> FakeMember:
        made = FakeMember(*args, **facts)
        ends.append(made.line.stop)
        return made

    control.member = member
    yield control
    for end in reversed(ends):
        end()


def test_members_meet_and_what_they_hold_is_found(cluster, until) -> None:
    _, address = cluster()
    one, two = cluster.member(address, "worker-0"), cluster.member(address, "lender-0", "lender")
    one.held = KEYS[:5]
    one.start(), two.start()
    until(lambda: one.seen and one.seen[-1] == ["lender-0", "worker-0"])
    until(lambda: two.line.locate(KEYS))
    (run,) = two.line.locate(KEYS)
    assert (run.id, run.first, run.count) == ("worker-0", 0, 5)
    assert one.line.locate(KEYS) == [], "the asker knows what it holds itself"
    until(lambda: one.line.lenders(4, 4096))
    (candidate,) = one.line.lenders(4, 4096)
    assert (candidate.id, candidate.boot, candidate.slots_lendable) == ("lender-0", two.facts.boot, 8)
    assert one.line.lenders(4, 4097) == []
    views = {view.member.id: view for view in one.line.snapshot()}
    assert views["worker-0"].report.slots_free == 8 and not views["worker-0"].suspect


@pytest.mark.parametrize(("versions", "words"), [
    ({"kvbank": "0.0.1"}, ["kvbank version mismatch: worker-1 runs 0.0.1", f"control runs {__version__}"]),
    ({"protocol": 9}, ["worker-1 speaks version 9", "control speaks version 1"]),
    ({"model_digest": "bbb"}, ["worker-1 has bbb", "worker-0 has aaa"]),
    ({"torch": "1.13"}, ["worker-1 has 1.13", "worker-0 has 2.6"]),
])
def test_a_mismatch_ends_the_start_with_a_config_error_naming_both(cluster, versions, words) -> None:
    _, address = cluster()
    cluster.member(address, "worker-0").start(model_digest="aaa")
    with pytest.raises(ConfigError) as caught:
        cluster.member(address, "worker-1").start(**{"model_digest": "aaa", **versions})
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_without_the_cluster_token_nothing_is_answered(cluster) -> None:
    control, address = cluster()
    with pytest.raises(Unauthorized):
        cluster.member(address, "worker-0", token="ef" * 16).start()
    assert control.views() == []


def test_a_control_that_never_answers_is_unavailable_within_the_time_given() -> None:
    line = Heartbeat("127.0.0.1:9", TOKEN)
    with pytest.raises(Unavailable, match="did not answer"):
        line.start(Facts(id="worker-0", boot=b"b" * 16, kind="model"), Versions(kvbank=__version__), within_s=0.2)
    line.stop()


def test_an_address_in_use_is_a_config_error(cluster) -> None:
    _, address = cluster()
    with pytest.raises(ConfigError, match="cannot bind"):
        cluster(address)


def test_a_member_that_asks_sees_who_came_since_its_last_beat(cluster, until) -> None:
    _, address = cluster(suspect_s=1e3, gone_s=1e3)
    one = cluster.member(address, "worker-0", interval_s=600.0).start()
    until(lambda: one.seen)
    cluster.member(address, "lender-0", "lender").start()
    one.line.beat_now(30.0)
    assert [member.id for member in one.line.members] == ["lender-0", "worker-0"]


def test_a_member_that_asks_while_control_is_away_keeps_what_it_knew(cluster, until) -> None:
    control, address = cluster()
    one = cluster.member(address, "worker-0").start()
    until(lambda: one.seen)
    control.stop()
    one.line.beat_now(0.1)
    assert [member.id for member in one.line.members] == ["worker-0"]


def test_a_restarted_control_knows_everything_again(cluster, until) -> None:
    first, address = cluster()
    members = [cluster.member(address, f"worker-{number}") for number in range(3)]
    for number, member in enumerate(members):
        member.held = KEYS[:number + 1]
        member.start()
    until(lambda: len(members[0].line.locate(KEYS)) == 2)
    until(lambda: len(members[0].line.members) == 3)        # else a last beat on its way tells more after `known`
    first.stop()
    known = members[0].line.members
    assert members[0].line.locate(KEYS) == [] and members[0].line.lenders(1, 1) == []
    assert members[0].line.members == known, "the last view stays while control is away"
    second, _ = cluster(address)
    until(lambda: len(second.views()) == 3)

    def found() -> list[tuple[str, int]]:
        return sorted((run.id, run.count) for run in members[0].line.locate(KEYS))

    until(lambda: found() == [("worker-1", 2), ("worker-2", 3)])
    assert second.views()[0].facts.boot == members[0].facts.boot


def test_questions_are_answered_within_a_fraction_of_a_second_while_control_is_away(cluster) -> None:
    control, address = cluster()
    member = cluster.member(address, "worker-0").start()
    control.stop()
    answers: list[object] = []
    asker = threading.Thread(target=lambda: answers.append((member.line.lenders(1, 1), member.line.locate(KEYS))))
    asker.start()
    asker.join(5.0)
    assert answers == [([], [])]


def test_who_stops_is_gone_at_once_and_who_is_killed_after_a_while(cluster, until) -> None:
    control, address = cluster(gone_s=0.6)
    polite, killed = cluster.member(address, "worker-0").start(), cluster.member(address, "worker-1").start()
    until(lambda: len(control.views()) == 2)
    polite.line.stop()
    assert [view.facts.id for view in control.views()] == ["worker-1"]
    killed.line._stopping.set()                                  # its thread ends without a word, as by SIGKILL
    until(lambda: [view.suspect for view in control.views()] in ([True], []))
    until(lambda: control.views() == [])


def test_a_member_whose_counts_fail_stays_a_member(cluster, until) -> None:
    control, address = cluster(gone_s=0.6)
    member = cluster.member(address, "worker-0").start()
    until(lambda: member.fulls)
    member.broken = True
    beats = member.line._seq
    until(lambda: member.line._seq > beats + 60)
    assert [view.facts.id for view in control.views()] == ["worker-0"]
    member.broken, member.held = False, KEYS[:2]
    member.fulls.clear()
    until(lambda: True in member.fulls)


def test_a_lost_report_is_made_good_by_a_full_one(cluster) -> None:
    control, _ = cluster()
    session = control.register(pb.RegisterRequest(
        member=pb.Member(id="worker-0", boot=b"b" * 16, kind="model"), kvbank_version=__version__, protocol=1)).session
    report = pb.Report(id="worker-0", session=session)
    assert control.heartbeat(pb.Report(id="worker-0", session=session, seq=1)).send_full, "the first must be full"
    report.seq, report.full, report.keys_added = 2, True, KEYS[0]
    assert not control.heartbeat(report).send_full
    assert control.heartbeat(pb.Report(id="worker-0", session=session, seq=4, keys_removed=KEYS[0])).send_full
    assert control.heartbeat(pb.Report(id="worker-0", session=session + 1, seq=5)).register_again


def test_a_report_that_arrives_twice_changes_nothing(cluster) -> None:
    control, _ = cluster()
    session = control.register(pb.RegisterRequest(
        member=pb.Member(id="worker-0", boot=b"b" * 16, kind="model"), kvbank_version=__version__, protocol=1)).session
    first = pb.Report(id="worker-0", session=session, seq=1, full=True, keys_added=KEYS[0] + KEYS[1])
    second = pb.Report(id="worker-0", session=session, seq=2, keys_removed=KEYS[1])
    for report in (first, second, second, first):
        control.heartbeat(report)
    (run,) = control.locate(pb.LocateRequest(keys=KEYS[0] + KEYS[1])).holdings
    assert run.count == 1


class Mangled(grpc.UnaryUnaryClientInterceptor):
    """A wire on which every call arrives twice, and of each method every third answer is lost."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def intercept_unary_unary(
        self, proceed: Callable[..., grpc.Call], details: grpc.ClientCallDetails, request: object
    ) -> object:
        proceed(details, request).exception()
        answer = proceed(details, request)
        self.calls[details.method] += 1
        if self.calls[details.method] % 3 == 1:
            answer.exception()
            raise LostAnswer
        return answer


class LostAnswer(grpc.RpcError):
    """The call was served, and its answer never came."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "lost"


def test_calls_that_arrive_twice_and_answers_that_are_lost_change_nothing(cluster, until, monkeypatch) -> None:
    wires: list[Mangled] = []

    def channel(address: str, token: str, make: Callable[..., grpc.Channel] = heartbeat.rpc.channel) -> grpc.Channel:
        wires.append(Mangled())
        return grpc.intercept_channel(make(address, token), wires[-1])

    monkeypatch.setattr(heartbeat.rpc, "channel", channel)
    control, address = cluster()
    one, two = cluster.member(address, "worker-0"), cluster.member(address, "lender-0", "lender")
    one.held = KEYS[:5]
    one.start(), two.start()
    until(lambda: [(run.id, run.count) for run in two.line.locate(KEYS)] == [("worker-0", 5)])
    until(lambda: [candidate.id for candidate in one.line.lenders(4, 4096)] == ["lender-0"])
    assert sorted(view.facts.id for view in control.views()) == ["lender-0", "worker-0"]
    two.line.stop()
    until(lambda: [view.facts.id for view in control.views()] == ["worker-0"])
    assert all(wire.calls[f"/kvbank.Control/{name}"] for wire in wires for name in ("Register", "Heartbeat"))


def test_more_keys_than_fit_one_message_arrive_one_report_after_the_other(cluster, until, monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "REPORT_BYTES", 3 * 32)
    _, address = cluster()
    holder, asker = cluster.member(address, "worker-0"), cluster.member(address, "worker-1")
    holder.held = list(KEYS)
    holder.start(), asker.start()
    until(lambda: [run.count for run in asker.line.locate(KEYS)] == [len(KEYS)])


def test_a_key_that_is_gone_before_it_was_told_is_not_told() -> None:
    line = heartbeat.Heartbeat("127.0.0.1:9", TOKEN)
    line._waiting_keys = KEYS[0] + KEYS[1] + KEYS[2]
    report = pb.Report(keys_added=KEYS[3], keys_removed=KEYS[1])
    line._fit(report)
    assert report.keys_added == KEYS[0] + KEYS[2] + KEYS[3]
    many = pb.Report(keys_removed=b"r" * (heartbeat.REPORT_BYTES + 32))
    line._need_full = False
    line._fit(many)
    assert not many.keys_removed and line._need_full, "too much to tell: all is told anew"
    line.stop()


@pytest.mark.parametrize("member", [pb.Member(), pb.Member(id="x"), pb.Member(id="x", boot=b"short")])
def test_a_member_without_a_name_or_a_boot_is_refused(cluster, member) -> None:
    control, _ = cluster()
    assert "16 bytes" in control.register(pb.RegisterRequest(member=member, protocol=1)).error
