"""Every call between members said twice, and every answer lost once: nobody can tell from the tokens, and nothing stays lent.

Whatever is named by its request (Borrow, Renew, Settle, Put, Fetch, Attend) may be said again. So each envelope, each Put and
each Fetch happens twice here, each kind of answer is dropped the first time it comes, and partials come twice or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

from kvbank.kvstore.messages import FOR_LENDER, Grant, Recall, Refuse, Renewed, Settled, Stale
from kvbank.kvstore.transport import wire
from kvbank.kvstore.transport.links import PUT
from kvbank.workers.sequence import JobSpec

BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])
ANSWERS = (Grant, Refuse, Renewed, Settled, Stale, Recall)


class Lost(grpc.RpcError):
    """The connection broke after the call was served."""


class Wire:
    """What stands between the members of a bank. Switch on `twice` and `drop`; `did` is the proof that it had an effect."""

    def __init__(self, bank: Any) -> None:
        self.twice = self.drop = False
        self.did: Counter[str] = Counter()
        self._dropped: set[Any] = set()
        for member in [bank.worker, *bank.lenders]:
            self._tap(member)

    def _tap(self, member: Any) -> None:
        banker, links = member.banker, member.banker.links
        arrived, bulk, hot = banker.arrived, links.bulk, links.hot

        def hear(data: bytes) -> None:
            message = wire.unpack(data).message
            if self._lose(member.id, message):
                return
            for _ in range(2 if self.twice else 1):
                arrived(data)
            self.did[f"twice {type(message).__name__}"] += self.twice

        def call(boot: Any, method: str) -> Callable[..., Any]:
            return self._put(bulk(boot, method)) if method == PUT else self._fetch(bulk(boot, method))

        def stream(boot: Any, **options: Any) -> Any:
            return self._hot(hot(boot, **options), boot)

        banker.arrived, links.bulk, links.hot = hear, call, stream

    def _lose(self, where: str, message: Any) -> bool:
        """The first answer of its name is lost; said again, it arrives."""
        if not self.drop or isinstance(message, FOR_LENDER) or not isinstance(message, ANSWERS):
            return False
        name = (where, type(message), getattr(message, "loan", getattr(message, "refs", None)))
        if isinstance(message, Renewed):
            name = (where, Renewed, message.no // 2)       # every second one: each Renew has a number of its own
        if name in self._dropped:
            return False
        self._dropped.add(name)
        self.did[f"lost {type(message).__name__}"] += 1
        return True

    def _put(self, real: Callable[..., bytes]) -> Callable[..., bytes]:
        def put(messages: Iterator[bytes], **options: Any) -> bytes:
            said = list(messages)
            for _ in range(2 if self.twice else 1):
                answer = real(iter(said), **options)
                self.did["puts"] += 1
            if self.drop and said[0] not in self._dropped:
                self._dropped.add(said[0])
                self.did["lost Sealed"] += 1
                raise Lost
            return answer
        return put

    def _fetch(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def fetch(request: bytes, **options: Any) -> Iterator[bytes]:
            for _ in range(2 if self.twice else 1):
                answer = list(real(request, **options))
                self.did["fetches"] += 1
            if self.drop and request not in self._dropped:
                self._dropped.add(request)
                self.did["cut Fetch"] += 1
                return iter(answer[:1])
            return iter(answer)
        return fetch

    def _hot(self, link: Any, boot: bytes) -> Any:
        if not hasattr(link, "untapped"):
            link.untapped = link.receive
            spare: list[bytes] = []

            def receive() -> bytes:
                if spare:
                    self.did["twice Partial"] += 1
                    return spare.pop()
                data = link.untapped()
                if self.drop and ("hot", boot) not in self._dropped:
                    self._dropped.add(("hot", boot))
                    self.did["lost Partial"] += 1
                    data = link.untapped()
                if self.twice:
                    spare.append(data)
                return data

            def send(message: bytes, said: Any = link.send) -> None:
                said(message)
                if self.twice and message[0] != 1:         # a plan is not a question
                    said(message)
                    self.did["twice Attend"] += 1

            link.receive, link.send = receive, send
        return link


def empty(bank: Any) -> None:
    """Both books are empty, every vault adds up."""
    bank.settle(10.0)
    worker = bank.worker
    assert not worker.book.check() and not worker.book.refs() and not worker.book.owes
    assert worker.vault.counts().held == 0 and worker.borrower.num_borrowed == 0 and not worker.vault.check()
    for member in bank.lenders:
        assert member.vault.counts().lent == 0 and member.ledger.num_lent == 0
        assert not member.ledger.check() and not member.vault.check()


@BOTH
@pytest.mark.parametrize("fault", ["twice", "drop", "both"])
def test_calls_said_twice_and_answers_lost_change_nothing(town, alone, run_jobs, prompt, exactness, fault) -> None:
    """Lends, renews, fetches home, adopts and settles, with everything repeated or lost on the way."""
    text = prompt(1500)
    jobs = [JobSpec(id=name, prompt=text, max_tokens=20, ignore_eos=True, age=i) for i, name in enumerate("ab")]
    want = run_jobs(alone(exactness=exactness), jobs[0])
    bank = town(lenders=2, exactness=exactness, lender_blocks=160, term_s=3.0, attend_lost_s=0.5, fill_s=1.0, avoid_s=0.5)
    net = Wire(bank)
    net.twice, net.drop = fault != "drop", fault != "twice"
    first = bank.run(jobs[0])
    empty(bank)
    second = bank.run(jobs[1])
    for name, got in (("a", first), ("b", second)):
        assert not got.errors
        assert got.tokens[name] == want.tokens["a"]
        if exactness == "bitwise":
            assert torch.equal(got.logits[name], want.logits["a"])
    empty(bank)
    wanted = {"twice": ["twice Borrow", "twice Grant", "twice Settle", "puts", "twice Partial", "twice Attend"],
              "drop": ["lost Grant", "lost Sealed", "lost Settled", "lost Partial"]}
    for kind in ("twice", "drop"):
        if getattr(net, kind):
            assert all(net.did[what] for what in wanted[kind]), net.did


@BOTH
def test_spans_come_home_through_a_wire_that_repeats_and_loses(town, alone, run_jobs, prompt, exactness) -> None:
    """A lender drains in the middle of a job: its spans are recalled, with every Recall and Fetch doubled and lost once."""
    from kvbank.kvstore.loan_events import Drain

    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=40, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    bank = town(lenders=2, exactness=exactness, lender_blocks=96, recall_drain_s=3.0)
    net = Wire(bank)
    net.twice = net.drop = True
    drained = []

    def drain() -> None:
        seqs = bank.worker.engine.jobs()
        if not drained and seqs and seqs[0].num_output >= 5:
            lender = next(m for m in bank.lenders if m.vault.counts().lent)
            drained.append(lender)
            lender.banker.tell_ledger(Drain())

    got = bank.run(job, each_step=drain)
    assert drained and not got.errors
    assert got.tokens["a"] == want.tokens["a"]
    if exactness == "bitwise":
        assert torch.equal(got.logits["a"], want.logits["a"])
    empty(bank)
    assert net.did["lost Recall"]
