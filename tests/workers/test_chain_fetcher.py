"""A tier hit of several shards is one when each has its part; otherwise nobody keeps anything staged for it."""

from __future__ import annotations

from kvbank.workers.chain_fetcher import ChainFetcher
from kvbank.workers.chain_frames import Ask, Drop, Forget, Found, Load, Want

A, B = b"a" * 32, b"b" * 32


class Local:
    """Shard 0's fetcher: has what the test says."""

    def __init__(self) -> None:
        self.states: dict[bytes, str] = {}
        self.dropped: list[bytes] = []
        self.loaded: list[bytes] = []

    def want(self, job, keys, tokens, *, now) -> None: ...

    def state(self, job, key, *, now) -> str:
        return self.states.get(key, "coming")

    def load(self, job, key, slot, start):
        self.loaded.append(key)
        return "redis" if self.states.pop(key, None) == "here" else None

    def drop(self, job, key) -> None:
        self.dropped.append(key)

    def forget(self, job) -> None: ...


class Others:
    """Shards 1 and 2."""

    shards = 3

    def __init__(self) -> None:
        self.on_reset = []
        self.sent: list = []
        self.says: list = []

    def send(self, message) -> None:
        self.sent.append(message)

    def take_found(self):
        said, self.says = self.says, []
        return said

    def find(self, shard: int, key: bytes, state: str = "here", want: int = -1) -> None:
        names = [message.name for message in self.sent if isinstance(message, Want | Ask)]
        self.says.append((shard, Found(names[want], key, state)))


def story():
    local, others = Local(), Others()
    return local, others, ChainFetcher(local, others, wait_s=1.0)


def test_a_hit_needs_every_shard() -> None:
    local, others, fetcher = story()
    fetcher.want("job", [A], [b"tokens"], now=0.0)
    assert others.sent == [Want(others.sent[0].name, (A,), (b"tokens",))]
    assert fetcher.state("job", A, now=0.0) == "coming"
    local.states[A] = "here"
    others.find(1, A)
    assert fetcher.state("job", A, now=0.1) == "coming"
    others.find(2, A)
    assert fetcher.state("job", A, now=0.2) == "here"
    assert fetcher.load("job", A, 4, 16) == "redis"
    assert others.sent[-1] == Load(others.sent[0].name, A, 4, 16)


def test_what_one_shard_misses_is_dropped_by_all_and_stays_missed() -> None:
    local, others, fetcher = story()
    fetcher.want("job", [A, B], [b"", b""], now=0.0)
    local.states.update({A: "here", B: "here"})
    others.find(1, A)
    others.find(2, A, "evicted")
    assert fetcher.state("job", A, now=0.0) == "evicted" == fetcher.state("job", A, now=9.0)
    assert local.dropped == [A] and others.sent[-1] == Drop(others.sent[0].name, A)
    local.states[B] = "integrity"
    assert fetcher.state("job", B, now=0.0) == "integrity", "nobody asks the others about what is missing here"
    assert others.sent[-1] == Drop(others.sent[0].name, B)


def test_others_that_say_nothing_are_waited_for_as_long_as_allowed() -> None:
    local, others, fetcher = story()
    fetcher.want("job", [A, B], [b"", b""], now=0.0)
    local.states.update({A: "here", B: "here"})
    others.find(1, B)
    assert fetcher.state("job", A, now=0.9) == "coming", "somebody said something at 0.9"
    assert fetcher.state("job", A, now=1.8) == "coming"
    assert fetcher.state("job", A, now=1.9) == "timeout"
    assert local.dropped == [A]


def test_a_key_nobody_asked_for_ahead_is_asked_for_once() -> None:
    local, others, fetcher = story()
    local.states[A] = "here"
    assert fetcher.state("job", A, now=5.0) == "coming" == fetcher.state("job", A, now=5.1)
    assert [type(message) for message in others.sent] == [Ask]
    others.find(1, A)
    others.find(2, A)
    assert fetcher.state("job", A, now=5.2) == "here"


def test_an_answer_to_an_earlier_want_is_not_taken_for_one_to_this() -> None:
    """A preempted job wants the same keys again; what others had staged for the first time they have forgotten."""
    local, others, fetcher = story()
    local.states[A] = "here"
    fetcher.want("job", [A], [b""], now=0.0)
    fetcher.forget("job")
    assert others.sent[-1] == Forget(others.sent[0].name)
    fetcher.want("job", [A], [b""], now=0.0)
    others.find(1, A, want=0)
    others.find(2, A, want=0)
    assert fetcher.state("job", A, now=0.1) == "coming"


def test_a_lost_chain_is_asked_nothing_more_about_the_past() -> None:
    _, others, fetcher = story()
    fetcher.want("job", [A], [b""], now=0.0)
    others.on_reset[0]()
    sent = len(others.sent)
    fetcher.forget("job")
    assert len(others.sent) == sent
