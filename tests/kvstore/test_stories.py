"""Plays tests/stories/*.txt: each is a case of the loan protocol, told as commands and what follows from them.

A line that begins with `> ` is a command; the lines below it are everything that happened. The network does nothing by
itself: what is sent lies in flight until `deliver`, `drop` or `double`. After every command both cores are checked.

    > members L=2 B            L has 2 slots to lend, B none; they have said Hello
    > B wants 1 2 from L       also: `for 7`, the age of the job (default 5); `needily`: it cannot go on without
    > B adopts a b from L as 8 9
    > deliver                  everything in flight, and what follows, oldest first; `deliver B>L`: the oldest on that way;
    > deliver B>L Renew        .. of that kind
    > drop L>B                 the oldest on that way is lost; `double B>L`: it arrives, and will arrive again
    > put B 1                  the bytes go to the lender and are hashed there; the answer is in flight
    > begin put B 1, end put B 1, cut put B 1, garbled put B 1
    > begin read B 1, end read B 1, read B 1       an Attend or Fetch of span 1 where B reads it: pinned in between
    > boundary B               B's engine is between two steps
    > home B 1, spill B 1      bring the span home; `copied B 1`: the copy is there and right, `miscopied B 1`: and wrong
    > done B 1, done B 1 keep  no job needs it
    > L needs 1 for 3          a job of age 3 calls a slot back; `L needs 1 for 3 calmly`, `L homes 1`, `L drains`
    > wait 1.5                 timers end, messages stay in flight; `run 1.5`: messages are delivered too;
    > skip 1.5                 .. and not told
    > pause B, wake B          a paused member hears nothing and its timers stand still
    > restart L, B finds L gone, B hears nothing from L, B is told stale by L about 1
    > books                    what everybody's book says

`PYTHONPATH=. python tests/kvstore/test_stories.py` writes what really happened into the stories: read it before you
believe it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbank.kvstore import loan_events as ev
from kvbank.kvstore import messages as m
from kvbank.kvstore.debt_book import DebtBook
from kvbank.kvstore.layout import BlockKey, Boot
from kvbank.kvstore.ledger import LoanLedger

STORIES = sorted((Path(__file__).parent.parent / "stories").glob("*.txt"))
COMPAT = m.Compat(slot_bytes=1, numerics="cpu")


class Slots:
    """The lender's pool: lowest blank slot first."""

    def __init__(self, size: int) -> None:
        self.blank, self.idle = list(range(size)), dict[int, m.KeptSpan]()

    def lendable(self) -> int:
        return len(self.blank) + len(self.idle)

    def take_for_loan(self, number: int) -> list[int]:
        while len(self.blank) < number:
            self.blank.append(self.idle.popitem()[0])
        taken, self.blank = self.blank[:number], self.blank[number:]
        return taken

    def adopt(self, keys: Any, tenant: str) -> list[tuple[int, m.KeptSpan]]:
        return [(slot, self.idle.pop(slot)) for slot, span in list(self.idle.items()) if span.key in keys]

    def give_back(self, slot: int, kept: m.KeptSpan | None) -> None:
        if kept is not None:
            self.idle[slot] = kept
        else:
            self.blank = sorted([*self.blank, slot])


class Member:
    def __init__(self, name: str, slots: int, life: int = 0) -> None:
        self.name, self.size, self.life = name, slots, life
        self.boot = Boot(f"{name}{chr(39) * life}".ljust(16).encode())
        self.slots = Slots(slots)
        self.ledger = LoanLedger(self.boot, COMPAT, self.slots, lend_cap=slots)
        self.book = DebtBook(self.boot)
        self.paused = False
        self.reading: dict[int, list[m.Ref]] = {}                  # pinned, by uid
        self.filling: dict[int, m.Ref] = {}


class Story:
    """One text being played: `out` collects what happened since the last command."""

    def __init__(self) -> None:
        self.now = 0.0
        self.members: dict[str, Member] = {}
        self.flight: list[tuple[str, str, Any]] = []
        self.out: list[str] = []
        self.asked_puts: dict[tuple[str, int], m.Ref] = {}     # (member, uid) -> what its book last told it to fill
        self.attempts: dict[tuple[str, int], int] = {}         # (member, uid) -> of the fetch that its book last asked for
        self.last_read: dict[tuple[str, int], m.Ref] = {}

    # -- commands -----------------------------------------------------------------------------------------------------

    def play(self, text: str) -> str:
        told: list[str] = []
        for line in text.splitlines():
            if line.startswith("> "):
                told += [line, *self.command(line[2:])]
            elif not line.strip() or line.startswith("#"):
                told.append(line)
        return "\n".join(told) + "\n"

    def command(self, line: str) -> list[str]:
        self.out = []
        for pattern, method in COMMANDS:
            if match := re.fullmatch(pattern, line):
                method(self, *match.groups())
                break
        else:
            raise AssertionError(f"no such command: {line}")
        for member in self.members.values():
            self.out += [f"BROKEN {member.name}: {what}" for what in [*member.ledger.check(), *member.book.check()]]
        return [f"    {line}" for line in self.out]

    def meet(self, spec: str) -> None:
        self.now, self.flight, self.members, self.asked_puts, self.last_read = 0.0, [], {}, {}, {}
        for word in spec.split():
            name, _, slots = word.partition("=")
            self.members[name] = Member(name, int(slots or 0))
        for member in self.members.values():
            self.greet(member)

    def greet(self, member: Member) -> None:
        """Everybody knows everybody: sessions are ordered and begin with Hello."""
        for one, other in [(member, o) for o in self.members.values()] + [(o, member) for o in self.members.values()]:
            if one is not other:
                hello = m.Hello(m.PROTOCOL_VERSION, one.name, one.boot, b"", COMPAT)
                other.ledger.on(self.now, m.Envelope(one.boot, other.boot, hello))

    def wants(self, name: str, uids: str, lenders: str, age: str | None, needily: str | None) -> None:
        boots = tuple(self.members[each].boot for each in lenders.split())
        self.book(name, ev.Want(boots, numbers(uids), "t", (float(age or 5), name), needy=bool(needily)))

    def adopts(self, name: str, keys: str, lender: str, uids: str) -> None:
        named = tuple(BlockKey(f"key {key}".encode()) for key in keys.split())
        self.book(name, ev.Adopt(self.members[lender].boot, numbers(uids), named, "t", (5.0, name)))

    def deliver(self, way: str | None = None, kind: str | None = None) -> None:
        if way is not None:
            self.arrive(*self.flight.pop(self.oldest(way, kind)))
            return
        while reachable := [each for each in self.flight if not self.members[each[1]].paused]:
            self.flight.remove(reachable[0])
            self.arrive(*reachable[0])

    def drop(self, way: str, kind: str | None) -> None:
        _, _, message = self.flight.pop(self.oldest(way, kind))
        self.out.append(f"{way} {self.words(message)} is lost")

    def double(self, way: str, kind: str | None) -> None:
        self.arrive(*self.flight[self.oldest(way, kind)])

    def oldest(self, way: str, kind: str | None) -> int:
        """The first in flight on that way; with a kind, the first of it."""
        return next(i for i, (sender, receiver, message) in enumerate(self.flight)
                    if f"{sender}>{receiver}" == way and self.words(message).startswith(kind or ""))

    def put(self, name: str, uid: str) -> None:
        self.begin_put(name, uid)
        if int(uid) in self.members[name].filling:
            self.end_put(name, uid)

    def begin_put(self, name: str, uid: str) -> None:
        ref = self.asked_puts[name, int(uid)]
        lender = self.owner(ref)
        verdict = lender.ledger.begin_put(self.now, ref)
        if verdict.kind == "GO":
            self.members[name].filling[int(uid)] = ref
        elif verdict.kind == "SEALED":
            self.flight.append((lender.name, name, m.Sealed(ref, verdict.digest)))
        elif verdict.kind == "STALE":
            self.flight.append((lender.name, name, m.Stale((ref,))))
        if verdict.kind != "GO":
            self.out.append(f"{lender.name}: {verdict.kind} to a Put of {self.words(ref)}")

    def end_put(self, name: str, uid: str, how: str = "right") -> None:
        ref = self.members[name].filling.pop(int(uid))
        lender, span = self.owner(ref), span_of(uid)
        got = {"right": span.digest, "cut": None, "garbled": b"garbled"}[how]
        if lender.boot != ref.lender_boot:
            return self.out.append(f"nobody is there for the Put of {uid}")
        for effect in self.ledger(lender.name, ev.PutEnded(ref, span if got else None, got)):
            if isinstance(effect, ev.Answer):
                self.flight.append((lender.name, name, effect.message))
        return None

    def begin_read(self, name: str, uid: str) -> None:
        ref = self.members[name].book.refs().get(int(uid)) or self.last_read[name, int(uid)]
        lender = self.owner(ref)
        self.last_read[name, int(uid)] = ref
        if lender.boot == ref.lender_boot and lender.ledger.pin(ref):
            self.members[name].reading.setdefault(int(uid), []).append(ref)
            self.out.append(f"{lender.name}: reads {self.words(ref)}, pinned")
        else:
            self.out.append(f"{lender.name}: {self.words(ref)} is stale")
            self.flight.append((lender.name, name, m.Stale((ref,))))

    def end_read(self, name: str, uid: str) -> None:
        ref = self.members[name].reading[int(uid)].pop()
        lender = self.owner(ref)
        right = lender.boot == ref.lender_boot
        if right:
            lender.ledger.unpin(ref)
        self.out.append(f"{name}: has {'an answer' if right else 'no answer'} for span {uid}")

    def read(self, name: str, uid: str) -> None:
        self.begin_read(name, uid)
        if self.members[name].reading.get(int(uid)):
            self.end_read(name, uid)

    def copied(self, how: str, name: str, uid: str) -> None:
        self.book(name, ev.CopyVerified(int(uid), b"wrong" if how else span_of(uid).digest, self.attempts[name, int(uid)]))

    def wait(self, seconds: str, *, delivering: bool = False) -> None:
        end = self.now + float(seconds)
        while True:
            if delivering:
                self.deliver()
            due = min(((max(core.wake_at(), self.now), member.name, which)
                       for member in self.members.values() if not member.paused
                       for which, core in (("ledger", member.ledger), ("book", member.book))), default=(math.inf, "", ""))
            if due[0] > end:
                break
            self.now = due[0]
            said = len(self.out)
            (self.ledger if due[2] == "ledger" else self.book)(due[1], ev.Tick())
            if len(self.out) > said:
                self.out.insert(said, f"at {round(self.now, 2)}")
        self.now = end

    def skip(self, seconds: str) -> None:
        """Like `run`, and of what is sent in that time nothing is told."""
        self.wait(seconds, delivering=True)
        self.out = [line for line in self.out if ">" not in line and not line.startswith("at ")]

    def restart(self, name: str) -> None:
        old = self.members[name]
        self.members[name] = Member(name, old.size, old.life + 1)
        self.greet(self.members[name])
        self.asked_puts = {key: ref for key, ref in self.asked_puts.items() if key[0] != name}

    def pause(self, name: str, *, paused: bool = True) -> None:
        self.members[name].paused = paused
        if not paused:
            self.book(name, ev.Tick())
            self.ledger(name, ev.Tick())

    def told_stale(self, name: str, lender: str, uid: str) -> None:
        self.arrive(lender, name, m.Stale((self.members[name].book.refs()[int(uid)],)))

    def books(self) -> None:
        for name, member in self.members.items():
            if member.size:
                states = [f"{count} {state}" for state, count in member.ledger.num_by_state().items() if count]
                free, kept = len(member.slots.blank), len(member.slots.idle)
                self.out.append(f"{name} lends: " + ", ".join([f"{free} FREE", *states, *([f"{kept} cached"] if kept else [])]))
            uids = {uid for key, uid in self.asked_puts if key == name} | set(member.book.refs())
            spans = [f"{uid} {member.book.state(uid).replace('LOCAL', 'not lent')}" for uid in sorted(uids)]
            if spans:
                self.out.append(f"{name} borrows: " + ", ".join(spans))

    # -- the cores --------------------------------------------------------------------------------------------------------

    def book(self, name: str, event: Any) -> list[Any]:
        return self.carry_out(self.members[name], self.members[name].book.on(self.now, event))

    def ledger(self, name: str, event: Any) -> list[Any]:
        return self.carry_out(self.members[name], self.members[name].ledger.on(self.now, event))

    def carry_out(self, member: Member, effects: list[Any]) -> list[Any]:
        for effect in effects:
            if isinstance(effect, ev.InDebt):
                self.ledger(member.name, effect)
            elif isinstance(effect, ev.Avoid):
                self.book(member.name, effect)
            elif isinstance(effect, ev.Send):
                to = self.at(effect.to_boot).name
                self.flight.append((member.name, to, m.Envelope(member.boot, effect.to_boot, effect.message)))
                self.out.append(f"{member.name}>{to} {self.words(effect.message)}")
            elif not isinstance(effect, ev.FlipsWaiting):
                if isinstance(effect, ev.StartPut):
                    self.asked_puts[member.name, effect.uid] = effect.ref
                if isinstance(effect, ev.StartFetch):
                    self.attempts[member.name, effect.uid] = effect.attempt
                said = effect.message if isinstance(effect, ev.Answer) else effect
                self.out.append(f"{member.name}: {self.words(said)}")
        return effects

    def arrive(self, sender: str, receiver: str, message: Any) -> None:
        if isinstance(message, m.Envelope):
            if isinstance(message.message, m.FOR_LENDER):
                self.ledger(receiver, message)
            if isinstance(message.message, m.FOR_BORROWER):
                self.book(receiver, message)
        elif isinstance(message, m.Sealed):
            self.book(receiver, ev.PutDone(message.ref, message.digest, message.digest))
        elif isinstance(message, m.BadDigest):
            self.book(receiver, ev.PutFailed(message.ref, "bad_digest"))
        elif isinstance(message, m.Stale):
            self.book(receiver, message)

    def at(self, boot: Boot) -> Member:
        """Who lives at the address where that boot lives or lived."""
        return self.members[boot.decode().strip().rstrip("'")]

    def owner(self, ref: m.Ref) -> Member:
        return self.at(ref.lender_boot)

    # -- words ------------------------------------------------------------------------------------------------------------

    def words(self, thing: Any) -> str:
        """`Grant loan=1 refs=L/0.1`, without what a story does not need."""
        if isinstance(thing, m.Envelope):
            return self.words(thing.message)
        if isinstance(thing, m.Ref):
            return f"{thing.lender_boot.decode().strip()}/{thing.slot}.{thing.gen}"
        if isinstance(thing, bytes):
            return thing.decode().strip().removeprefix("key ")
        if isinstance(thing, tuple):
            return ",".join(self.words(each) for each in thing) or "none"
        if isinstance(thing, int | float | str):
            return str(round(thing, 2)) if isinstance(thing, float) else str(thing)
        fields = {name: getattr(thing, name) for name in type(thing).__dataclass_fields__ if name not in SILENT}
        shown = [f"{name}={self.words(value)}" for name, value in fields.items()
                 if value not in (None, "", b"", ()) and (name, value) != ("needy", False)]
        return " ".join([type(thing).__name__, *shown])


SILENT = {"tenant", "job", "term_ms", "digest", "sealed_digests"}
NAME, UIDS, WAY = r"(\w+)", r"(\d+(?: \d+)*)", r"(\w+>\w+)"
COMMANDS: list[tuple[str, Callable[..., Any]]] = [
    (r"members (.+)", Story.meet),
    (rf"{NAME} wants {UIDS} from (\w+(?: \w+)*?)(?: for (\d+))?( needily)?", Story.wants),
    (rf"{NAME} adopts (\w+(?: \w+)*) from {NAME} as {UIDS}", Story.adopts),
    (rf"deliver(?: {WAY}(?: (\w+))?)?", Story.deliver),
    (rf"drop {WAY}(?: (\w+))?", Story.drop),
    (rf"double {WAY}(?: (\w+))?", Story.double),
    (rf"put {NAME} (\d+)", Story.put),
    (rf"begin put {NAME} (\d+)", Story.begin_put),
    (rf"end put {NAME} (\d+)", Story.end_put),
    (rf"cut put {NAME} (\d+)", lambda self, name, uid: self.end_put(name, uid, "cut")),
    (rf"garbled put {NAME} (\d+)", lambda self, name, uid: (self.begin_put(name, uid), self.end_put(name, uid, "garbled"))),
    (rf"begin read {NAME} (\d+)", Story.begin_read),
    (rf"end read {NAME} (\d+)", Story.end_read),
    (rf"read {NAME} (\d+)", Story.read),
    (rf"boundary {NAME}", lambda self, name: self.book(name, ev.StepBoundary())),
    (rf"home {NAME} {UIDS}", lambda self, name, uids: self.book(name, ev.BringHome(numbers(uids), "LOCAL"))),
    (rf"spill {NAME} {UIDS}", lambda self, name, uids: self.book(name, ev.BringHome(numbers(uids), "SPILLED"))),
    (rf"(mis)?copied {NAME} (\d+)", Story.copied),
    (rf"done {NAME} {UIDS}( keep)?",
     lambda self, name, uids, keep: self.book(name, ev.NoLongerNeeded(numbers(uids), bool(keep)))),
    (rf"{NAME} needs (\d+) for (\d+)( calmly)?",
     lambda self, name, number, age, calm: self.ledger(name, ev.Need(int(number), (float(age), name), not calm))),
    (rf"{NAME} homes (\d+)", lambda self, name, number: self.ledger(name, ev.Homecoming(int(number)))),
    (rf"{NAME} drains", lambda self, name: self.ledger(name, ev.Drain())),
    (r"wait ([\d.]+)", Story.wait),
    (r"run ([\d.]+)", lambda self, seconds: self.wait(seconds, delivering=True)),
    (r"skip ([\d.]+)", Story.skip),
    (rf"pause {NAME}", Story.pause),
    (rf"wake {NAME}", lambda self, name: self.pause(name, paused=False)),
    (rf"restart {NAME}", Story.restart),
    (rf"{NAME} finds {NAME} gone", lambda self, name, peer: (self.book(name, ev.PeerGone(self.members[peer].boot)),
                                                             self.ledger(name, ev.PeerGone(self.members[peer].boot)))),
    (rf"{NAME} hears nothing from {NAME}",
     lambda self, name, peer: self.book(name, ev.AttendSilent(self.members[peer].boot))),
    (rf"{NAME} waits for {NAME}", lambda self, name, peer: self.book(name, ev.AttendSlow(self.members[peer].boot))),
    (rf"{NAME} is told stale by {NAME} about (\d+)", Story.told_stale),
    (r"books", Story.books),
]


def numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split())


def span_of(uid: str) -> m.KeptSpan:
    """Span 1 is the KV of key a, 2 of b.."""
    letter = chr(ord("a") + int(uid) - 1)
    return m.KeptSpan((BlockKey(f"key {letter}".encode()),), b"", f"digest of {letter}".encode())


def replay(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    return text, Story().play(text)


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_the_story_happens_as_told(path: Path) -> None:
    told, happened = replay(path)
    diff = difflib.unified_diff(told.splitlines(), happened.splitlines(), "told", "happened", lineterm="")
    assert told == happened, "\n".join(diff)
    assert "BROKEN" not in happened


def test_the_stories_are_there() -> None:
    assert len(STORIES) >= 15


if __name__ == "__main__":
    for each in STORIES:
        each.write_text(replay(each)[1], encoding="utf-8")
