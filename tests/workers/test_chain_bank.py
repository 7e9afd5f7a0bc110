"""A span is lent for all shards or for none: every order in which shards can answer, as a story."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import permutations

import pytest

from kvbank.kvstore.layout import SlotId
from kvbank.workers.chain_bank import ChainBank
from kvbank.workers.chain_frames import Books, Home, Landed, Lend, Settle
from kvbank.workers.seams import BackendLost, Lost, Move, Moved, MustReturn, Returned, Stayed, StayedAway

MOVE = Move(1, SlotId(4), (), b"", b"")


class Local:
    """Shard 0's own bank: says what it is told to say and remembers what it was asked."""

    def __init__(self) -> None:
        self.says, self.settled, self.asked = [], [], []

    def lendable(self) -> int:
        return 7

    def lend_out(self, moves, *, tenant, age, needy=False) -> None:
        self.asked += [("press" if needy else "lend", move.uid) for move in moves]

    def bring_home(self, uid, slot) -> None:
        self.asked.append(("home", uid))

    def settle(self, uids, *, keep) -> None:
        assert not keep
        self.settled += uids

    def poll(self):
        said, self.says = self.says, []
        return said


class Others:
    """Shards 1 and 2."""

    shards = 3

    def __init__(self) -> None:
        self.homes: dict[int, SlotId] = {}
        self.on_lost: Callable = lambda lost: None
        self.on_reset: list[Callable] = []
        self.says: list = []
        self.sent: list = []
        self.lost = False

    def check(self) -> None:
        if self.lost:
            self.lost = False
            for forget in self.on_reset:
                forget()
            raise BackendLost("gone")

    def send(self, message) -> None:
        self.sent += [(1, message), (2, message)]

    def tell(self, shard, message) -> None:
        self.sent.append((shard, message))

    def take_events(self):
        said, self.says = self.says, []
        return said

    def settled(self) -> list[tuple[int, int]]:
        return [(shard, uid) for shard, message in self.sent if isinstance(message, Settle) for uid in message.uids]


class Story:
    """A ChainBank between its fakes."""

    def __init__(self) -> None:
        self.local, self.others = Local(), Others()
        self.bank = ChainBank(self.local, self.others)

    def say(self, shard: int, event) -> list:
        """One shard says it; what the engine hears then."""
        if shard:
            lent = self.bank._lent.get(event.uid)
            self.others.says.append((shard, lent.attempt if lent is not None else 0, event))
        else:
            self.local.says.append(event)
        return self.bank.poll()

    def settled(self) -> list[int]:
        """Shards that were told to settle span 1, in order of number."""
        assert set(self.local.settled) <= {1} and all(uid == 1 for _, uid in self.others.settled())
        return sorted([0] * len(self.local.settled) + [shard for shard, _ in self.others.settled()])

    def lend(self) -> None:
        self.bank.lend_out([MOVE], tenant="t", age=1.0)

    def lent(self) -> Story:
        self.lend()
        for shard in range(3):
            heard = self.say(shard, Moved(1, f"lender-{shard}"))
        assert heard == [Moved(1, "lender-0", ("lender-1", "lender-2"))]
        return self

    def returning(self) -> Story:
        self.lent().bank.bring_home(1, SlotId(9))
        return self


def test_every_shard_is_asked_to_lend() -> None:
    story = Story()
    story.lend()
    assert story.local.asked == [("lend", 1)]
    assert [(shard, type(message)) for shard, message in story.others.sent] == [(1, Lend), (2, Lend)]
    assert story.bank.lendable() == 7 // 3


def test_every_shard_presses_its_lenders_for_a_needy_job() -> None:
    story = Story()
    story.bank.lend_out([MOVE], tenant="t", age=1.0, needy=True)
    assert story.local.asked == [("press", 1)]
    assert [message.needy for _, message in story.others.sent] == [True, True]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_span_has_moved_when_every_part_has(order) -> None:
    story = Story()
    story.lend()
    heard = [story.say(shard, Moved(1, "same")) for shard in order]
    assert heard == [[], [], [Moved(1, "same")]]
    assert story.settled() == []


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("stays", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_a_part_that_stays_keeps_the_whole_span(order, stays) -> None:
    story = Story()
    story.lend()
    heard = [story.say(shard, Stayed(1, "FULL") if shard in stays else Moved(1, "x")) for shard in order]
    assert heard == [[], [], [Stayed(1, "FULL")]], "told once, and only when nobody reads the slot to send it any more"
    assert story.settled() == [shard for shard in range(3) if shard not in stays]


@pytest.mark.parametrize("event", [Lost(1, "gone"), MustReturn(1, 2.0, "NEED")])
@pytest.mark.parametrize("shard", [0, 2])
def test_a_part_that_is_lost_or_recalled_before_the_others_moved_costs_nothing(event, shard) -> None:
    story = Story()
    story.lend()
    assert story.say(shard, Moved(1, "x")) == []
    assert story.say(shard, event) == []
    rest = [other for other in range(3) if other != shard]
    heard = [story.say(other, Moved(1, "x")) for other in rest]
    assert heard[0] == [] and [type(event) for event in heard[1]] == [Stayed]
    assert story.settled() == sorted(rest + ([shard] if isinstance(event, MustReturn) else []))


@pytest.mark.parametrize("shard", range(3))
def test_one_lost_part_loses_the_span_once(shard) -> None:
    story = Story().lent()
    assert story.say(shard, Lost(1, "silent")) == [Lost(1, "silent")]
    assert story.settled() == [other for other in range(3) if other != shard]
    assert all(story.say(other, Lost(1, "silent")) == [] for other in range(3))
    assert story.bank._lent == {}


def test_what_a_step_lost_is_settled_where_it_was_not_lost() -> None:
    story = Story().lent()
    story.others.on_lost({1: {0, 2}, 99: {1}})
    assert story.settled() == [1]
    assert story.say(0, Lost(1, "silent")) == [] == story.say(2, Lost(1, "silent"))


def test_a_recall_is_passed_on_once_however_many_lenders_recall() -> None:
    story = Story().lent()
    recall = MustReturn(1, 2.0, "NEED")
    assert [story.say(shard, recall) for shard in (2, 0, 1)] == [[recall], [], []]


def test_every_part_comes_home_before_the_span_does() -> None:
    story = Story().returning()
    assert story.local.asked[-1] == ("home", 1)
    assert [m for _, m in story.others.sent if isinstance(m, Home)] == [Home(1, 9), Home(1, 9)]
    assert story.say(1, Returned(1, SlotId(9))) == []
    assert story.say(0, Returned(1, SlotId(9))) == []
    assert story.others.homes == {1: 9}, "until the others are home too, this shard reads its slot for the lent uid"
    assert story.say(2, Returned(1, SlotId(9))) == [Returned(1, SlotId(9))]
    assert story.others.homes == {} and (2, Landed((1,))) in story.others.sent
    assert story.settled() == []


def test_when_no_part_comes_home_the_span_is_read_where_it_was() -> None:
    story = Story().returning()
    heard = [story.say(shard, StayedAway(1)) for shard in range(3)]
    assert heard == [[], [], [StayedAway(1)]]
    assert story.say(1, MustReturn(1, 1.0, "NEED")) == [MustReturn(1, 1.0, "NEED")], "and may be recalled again"


@pytest.mark.parametrize("home", [{0}, {1}, {0, 1}, {1, 2}])
def test_a_span_that_is_half_at_home_is_lost(home) -> None:
    story = Story().returning()
    heard = [story.say(shard, Returned(1, SlotId(9)) if shard in home else StayedAway(1)) for shard in range(3)]
    assert heard == [[], [], [Lost(1, "recall")]]
    assert story.settled() == [shard for shard in range(3) if shard not in home]
    assert story.others.homes == {}


def test_a_part_lost_on_its_way_home_loses_the_span() -> None:
    story = Story().returning()
    story.say(0, Returned(1, SlotId(9)))
    assert story.say(1, Lost(1, "gone")) == [Lost(1, "gone")]
    assert story.settled() == [2]
    assert story.say(2, Returned(1, SlotId(9))) == []
    assert story.others.homes == {}


def test_a_settled_span_is_settled_everywhere_and_never_heard_of_again() -> None:
    story = Story().lent()
    story.bank.settle([1], keep=True)
    assert story.settled() == [0, 1, 2]
    assert [story.say(shard, Lost(1, "gone")) for shard in range(3)] == [[], [], []]


def test_a_lost_shard_ends_every_move_and_loses_every_lent_span() -> None:
    story = Story().lent()
    story.bank.lend_out([Move(2, SlotId(5), (), b"", b"")], tenant="t", age=1.0)
    story.local.says.append(Moved(2, "x"))
    story.bank.poll()
    story.others.lost = True
    with pytest.raises(BackendLost):
        story.bank.poll()
    assert set(story.bank.poll()) == {Lost(1, "shard_lost"), Stayed(2, "shard_lost")}
    assert story.local.settled == [1, 2]


def test_a_part_that_moves_after_the_shard_was_lost_is_given_back() -> None:
    story = Story()
    story.lend()
    story.others.lost = True
    with pytest.raises(BackendLost):
        story.bank.poll()
    assert story.bank.poll() == [Stayed(1, "shard_lost")]
    assert story.say(0, Moved(1, "x")) == []
    assert story.local.settled == [1]


def test_the_books_are_passed_on_when_they_change() -> None:
    local, others, books = Local(), Others(), [(8, 0)]
    bank = ChainBank(local, others, books=lambda: books[0])
    for now in ((8, 0), (8, 0), (5, 3)):
        books[0] = now
        bank.poll()
    assert [message for shard, message in others.sent if shard == 1] == [Books(8, 0), Books(5, 3)]


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_shards_say_no_part_is_forgotten_and_each_thing_is_heard_once(seed) -> None:
    """A random walk of three shards' books, each obeying the protocol; in the end everything is settled or at home."""
    rng = random.Random(seed)
    story = Story()
    wires: dict[int, list] = {1: [], 2: []}
    lends, attempt = {}, {}                      # uid -> its last attempt; (shard, uid) -> the one that shard has
    state = {}                                   # (shard, uid) -> sending | away | fetching: what that shard's book thinks
    engine: dict[int, str] = {}                  # uid -> moving | away | returning, by what the engine heard
    uids = iter(range(1, 100))
    stayed: list[int] = []                       # may be lent again under the same uid

    def obey() -> None:
        """Carry out what was asked of the shards since last time."""
        for shard in range(3):
            for kind, uid in orders(shard):
                if kind == "lend":
                    state[shard, uid], attempt[shard, uid] = "sending", lends[uid]
                elif kind == "home" and state.get((shard, uid)) == "away":
                    state[shard, uid] = "fetching"
                elif kind == "settle":
                    assert state.pop((shard, uid), None) != "sending", "a part is given up while its bytes are sent"

    def orders(shard):
        if shard == 0:
            made = story.local.asked + [("settle", uid) for uid in story.local.settled]
            story.local.asked, story.local.settled = [], []
            return made
        made = []
        for to, message in story.others.sent:
            if to == shard:
                if isinstance(message, Lend):
                    made += [("lend", move[0]) for move in message.moves]
                elif isinstance(message, Home):
                    made.append(("home", message.uid))
                elif isinstance(message, Settle):
                    made += [("settle", uid) for uid in message.uids]
        story.others.sent = [(to, message) for to, message in story.others.sent if to != shard]
        return made

    def one_event():
        busy = sorted(state)
        if not busy:
            return
        shard, uid = rng.choice(busy)
        now = state[shard, uid]
        if now == "sending":
            if rng.random() < 0.7:
                event, state[shard, uid] = Moved(uid, f"l{shard}"), "away"
            else:
                event = Stayed(uid, "FULL")
                del state[shard, uid]
        elif rng.random() < 0.15:
            event = Lost(uid, "gone")
            del state[shard, uid]
        elif now == "fetching":
            if rng.random() < 0.7:
                event = Returned(uid, SlotId(uid))
                del state[shard, uid]
            else:
                event, state[shard, uid] = StayedAway(uid), "away"
        else:
            event = MustReturn(uid, 1.0, "NEED")
        if shard == 0:
            story.local.says.append(event)
        else:
            wires[shard].append((shard, attempt[shard, uid], event))

    def listen() -> None:
        for wire in wires.values():              # some of it is still on its way
            arrived = rng.randrange(len(wire) + 1)
            story.others.says += wire[:arrived]
            del wire[:arrived]
        for event in story.bank.poll():
            uid, now = event.uid, engine.get(event.uid)
            match event:
                case Moved():
                    assert now == "moving"
                    engine[uid] = "away"
                case Stayed():
                    assert now == "moving"
                    del engine[uid]
                    stayed.append(uid)
                case Lost():
                    assert now in ("away", "returning")
                    del engine[uid]
                case MustReturn():
                    assert now == "away"
                    engine[uid] = "returning"
                    story.bank.bring_home(uid, SlotId(uid))
                case Returned():
                    assert now == "returning"
                    del engine[uid]
                case StayedAway():
                    assert now == "returning"
                    engine[uid] = "away"

    for _ in range(120):
        if rng.random() < 0.2:
            uid = rng.choice(stayed) if stayed and rng.random() < 0.7 else next(uids)
            if uid in stayed:
                stayed.remove(uid)
            engine[uid] = "moving"
            story.bank.lend_out([Move(uid, SlotId(uid), (), b"", b"")], tenant="t", age=1.0)
            lends[uid] = story.bank._lent[uid].attempt
        held = [uid for uid, now in engine.items() if now != "moving"]
        if held and rng.random() < 0.1:
            uid = rng.choice(held)
            del engine[uid]
            story.bank.settle([uid], keep=False)
        obey()
        one_event()
        if rng.random() < 0.6:
            listen()
            obey()
    for _ in range(1000):                        # let every transfer end
        obey()
        pending = [(shard, uid) for (shard, uid), now in sorted(state.items()) if now in ("sending", "fetching")]
        if not pending and not story.local.says and not any(wires.values()):
            break
        one_event()
        listen()
    for uid in [uid for uid, now in engine.items()]:
        story.bank.settle([uid], keep=False)
    obey()
    assert state == {} and story.bank._lent == {} and story.others.homes == {}


def test_late_news_of_an_earlier_attempt_do_not_touch_the_next() -> None:
    """Found by killing lenders in a row: a span stayed, was lent again, and then its first loss arrived."""
    story = Story()
    story.lend()
    story.say(0, Moved(1, "x"))
    story.say(0, Lost(1, "gone"))
    first = story.bank._lent[1].attempt
    story.say(1, Moved(1, "x"))
    assert story.say(2, Moved(1, "x")) == [Stayed(1, "gone")]
    story.lend()
    story.others.says.append((1, first, Lost(1, "gone")))
    assert story.bank.poll() == [] and not story.bank._lent[1].failed


def test_a_shard_that_waits_for_older_jobs_makes_the_replica_wait() -> None:
    story = Story()
    story.lend()
    assert story.say(0, Stayed(1, "avoided")) + story.say(1, Stayed(1, "OLDER")) == []
    assert story.say(2, Stayed(1, "FULL")) == [Stayed(1, "OLDER")]
