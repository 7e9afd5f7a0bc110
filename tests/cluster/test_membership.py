"""Membership as a table of transitions, and as something that survives any order of events."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from kvbank.cluster.membership import (
    Admitted,
    Effect,
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
)

OWN = Versions(kvbank="1.0")
MODEL = Versions(kvbank="1.0", model_digest="aaa", torch="2.6")
WORKER = Facts(id="worker-0", boot=b"b" * 16, kind="model", host="here", pid=7)


def fresh(first_session: int = 100) -> Membership:
    return Membership(OWN, first_session=first_session, suspect_s=1.5, gone_s=5.0)


def session_of(effects: list[Effect]) -> int:
    return next(effect.session for effect in effects if isinstance(effect, Admitted))


def test_a_member_is_admitted_reports_and_is_seen() -> None:
    members = fresh()
    effects = members.on(0.0, Register(WORKER, MODEL))
    assert effects == [Admitted(101), Joined(WORKER)]
    assert members.on(0.5, Heard("worker-0", 101, 1, Load(slots_free=3))) == []
    (view,) = members.views(0.75)
    assert (view.facts, view.load.slots_free, view.silent_s, view.suspect) == (WORKER, 3, 0.25, False)


def test_silence_first_makes_suspect_then_gone() -> None:
    members = fresh()
    members.on(0.0, Register(WORKER, MODEL))
    assert not members.views(1.4)[0].suspect
    assert members.views(1.5)[0].suspect
    assert members.wake_at() == 5.0
    assert members.on(4.9, Tick()) == []
    assert members.on(5.0, Tick()) == [Gone(WORKER, "silent")]
    assert members.views(5.0) == [] and members.wake_at() == math.inf


def test_an_idle_member_that_reports_is_never_reaped() -> None:
    members = fresh()
    session = session_of(members.on(0.0, Register(WORKER, MODEL)))
    for beat in range(1, 10_000):
        now = beat * 0.5
        assert members.on(now, Tick()) == []
        assert members.on(now, Heard("worker-0", session, beat, Load())) == []
    assert not members.views(5_000.0)[0].suspect


def test_a_restart_faster_than_a_heartbeat_is_a_new_member_and_the_old_process_cannot_come_back() -> None:
    members = fresh()
    first = session_of(members.on(0.0, Register(WORKER, MODEL)))
    reborn = replace(WORKER, boot=b"c" * 16, pid=8)
    effects = members.on(0.1, Register(reborn, MODEL))
    assert effects == [Gone(WORKER, "replaced"), Admitted(102), Joined(reborn)]
    assert members.on(0.2, Heard("worker-0", first, 1, Load())) == [Unknown("worker-0")]
    (refused,) = members.on(0.3, Register(WORKER, MODEL))
    assert isinstance(refused, Refused) and "worker-0" in refused.error and "pid 7" in refused.error


def test_registering_twice_keeps_the_member_under_its_newest_session() -> None:
    members = fresh()
    first = session_of(members.on(0.0, Register(WORKER, MODEL)))
    second = session_of(members.on(0.1, Register(WORKER, MODEL)))
    assert members.on(0.2, Heard("worker-0", first, 1, Load())) == [Unknown("worker-0")]
    assert members.on(0.2, Heard("worker-0", second, 1, Load())) == []
    assert len(members.views(0.2)) == 1


def test_a_session_of_an_earlier_control_means_nothing_to_this_one() -> None:
    assert fresh(first_session=7_000).on(0.0, Heard("worker-0", 101, 5, Load())) == [Unknown("worker-0")]


def test_a_report_that_was_lost_is_missed_and_one_that_is_late_or_double_says_nothing() -> None:
    members = fresh()
    session = session_of(members.on(0.0, Register(WORKER, MODEL)))
    assert members.on(1.0, Heard("worker-0", session, 2, Load(slots_free=2))) == [Missed("worker-0")]
    assert members.on(2.0, Heard("worker-0", session, 1, Load(slots_free=1))) == [Late("worker-0")]
    assert members.on(2.0, Heard("worker-0", session, 2, Load(slots_free=9))) == [Late("worker-0")]
    assert members.views(2.0)[0].load.slots_free == 2 and members.views(2.0)[0].silent_s == 1.0


def test_leaving_is_immediate_and_only_for_the_newest_session() -> None:
    members = fresh()
    session = session_of(members.on(0.0, Register(WORKER, MODEL)))
    assert members.on(0.1, Leave("worker-0", session - 1)) == []
    assert members.on(0.1, Leave("worker-0", session)) == [Gone(WORKER, "left")]
    assert members.on(0.1, Leave("worker-0", session)) == []


@pytest.mark.parametrize(("versions", "words"), [
    (Versions(kvbank="1.0", protocol=2), ["protocol", "worker-1 speaks version 2", "control speaks version 1"]),
    (Versions(kvbank="0.9"), ["kvbank version", "worker-1 runs 0.9", "control runs 1.0"]),
    (Versions(kvbank="1.0", model_digest="bbb"), ["model digest", "worker-1 has bbb", "worker-0 has aaa"]),
    (Versions(kvbank="1.0", torch="2.5"), ["torch version", "worker-1 has 2.5", "worker-0 has 2.6"]),
])
def test_a_mismatch_is_refused_with_both_sides_named(versions: Versions, words: list[str]) -> None:
    members = fresh()
    members.on(0.0, Register(WORKER, MODEL))
    other = replace(WORKER, id="worker-1", boot=b"d" * 16)
    (refused,) = members.on(0.0, Register(other, versions))
    assert isinstance(refused, Refused)
    assert not [word for word in words if word not in refused.error], refused.error
    assert len(members.views(0.0)) == 1


def test_a_member_without_a_model_or_torch_fits_everywhere() -> None:
    members = fresh()
    members.on(0.0, Register(WORKER, MODEL))
    gateway = Facts(id="gateway", boot=b"g" * 16, kind="gateway")
    assert session_of(members.on(0.0, Register(gateway, Versions(kvbank="1.0"))))


def test_a_whole_new_model_may_come_when_the_old_members_have_gone() -> None:
    members = fresh()
    members.on(0.0, Register(WORKER, MODEL))
    changed = replace(MODEL, model_digest="bbb")
    assert session_of(members.on(0.1, Register(replace(WORKER, boot=b"e" * 16), changed)))


def test_a_member_that_others_cannot_reach_is_suspect_until_they_can() -> None:
    members = fresh()
    sessions = {}
    for name, kind in (("worker-0", "model"), ("worker-1", "model"), ("worker-2", "model"), ("lender-0", "lender")):
        facts = Facts(id=name, boot=name.encode().ljust(16, b"."), kind=kind)
        sessions[name] = session_of(members.on(0.0, Register(facts, MODEL)))

    def suspects() -> list[str]:
        return [view.facts.id for view in members.views(0.1) if view.suspect]

    members.on(0.1, Heard("worker-0", sessions["worker-0"], 1, Load(suspects=("lender-0", "nobody", "worker-0"))))
    assert suspects() == ["lender-0"]
    members.on(0.1, Heard("worker-0", sessions["worker-0"], 2, Load()))
    assert suspects() == []


def test_any_order_of_events_leaves_one_seat_per_id_and_only_newest_sessions() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        members = fresh(first_session=seed * 1000)
        now, newest, boots, known = 0.0, {}, {}, set()
        for step in range(400):
            now += rng.choice([0.0, 0.1, 0.5, 2.0, 6.0]) if rng.random() < 0.3 else 0.05
            name = f"worker-{rng.randrange(5)}"
            if rng.random() < 0.02:
                members = fresh(first_session=seed * 1000 + step * 1_000_000 + 1)        # control restarted
                newest.clear()
                known.clear()
            kind = rng.randrange(5)
            if kind == 0:
                boots[name] = step.to_bytes(16, "little")
            if kind <= 1:
                facts = Facts(id=name, boot=boots.get(name, b"0" * 16), kind="model")
                effects = members.on(now, Register(facts, MODEL))
                if not isinstance(effects[-1], Refused):
                    newest[name] = session_of(effects)
            elif kind == 2:
                session = rng.choice([newest.get(name, 0), rng.randrange(10**6)])
                effects = members.on(now, Heard(name, session, rng.randrange(1, 40), Load()))
                assert (effects == [Unknown(name)]) == (session != newest.get(name) or name not in known)
            elif kind == 3:
                effects = members.on(now, Leave(name, newest.get(name, 0)))
            else:
                effects = members.on(now, Tick())
            for effect in effects:
                if isinstance(effect, Joined):
                    assert effect.facts.id not in known
                    known.add(effect.facts.id)
                elif isinstance(effect, Gone):
                    known.remove(effect.facts.id)
            views = members.views(now)
            assert [view.facts.id for view in views] == sorted(known)
            assert all(view.silent_s >= 0 for view in views)
