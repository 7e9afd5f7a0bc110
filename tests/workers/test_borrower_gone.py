"""A borrower that dies does not keep its lenders' slots until the term: its session ends, nobody answers, the loans go."""

from __future__ import annotations

import time

from kvbank.proto import control_pb2 as pb
from kvbank.workers.sequence import JobSpec


def test_a_dead_borrowers_slots_are_free_long_before_the_term(town, prompt) -> None:
    bank = town(lenders=2, lender_blocks=160, term_s=60.0)
    worker = bank.worker
    me = pb.Member(id=worker.id, boot=worker.boot, kind="model", address=worker.address)
    for lender in bank.lenders:
        lender.on_members([me])
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=400, ignore_eos=True)
    worker.engine.add(job)
    while not any(member.vault.counts().lent for member in bank.lenders):
        bank.refresh()
        if not worker.engine.step():
            worker.engine.wake.wait(0.002)
    started = time.monotonic()
    worker._server.stop(grace=None)                      # as a SIGKILL: no goodbye, the port closes
    worker.banker.stop()
    while any(member.vault.counts().lent for member in bank.lenders):
        assert time.monotonic() - started < 10, [m.vault.counts() for m in bank.lenders]
        time.sleep(0.02)
    assert not any(member.ledger.check() or member.vault.check() for member in bank.lenders)
