"""Wrong bytes found after they may have been read: nothing made from them survives, and no wrong token is ever final."""

from __future__ import annotations

import pytest

from kvbank.errors import KVBankError
from kvbank.workers.seams import Lost
from kvbank.workers.sequence import JobSpec


@pytest.mark.parametrize("answered", [False, True])
def test_a_tainted_span_takes_everything_after_it_along(town, alone, run_jobs, prompt, answered) -> None:
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=30, ignore_eos=True)
    want = run_jobs(alone(), job)
    bank = town(lenders=2, lender_blocks=160)
    engine = bank.worker.engine
    struck: list[int] = []

    def strike() -> None:
        seq = next(iter(engine.jobs()), None)
        if struck or seq is None or not engine.room.away or (seq.num_output >= 5) is not answered:
            return
        uid = next(span.uid for _, span in seq.table.live() if span.place == "remote")
        struck.append(uid)
        bank.worker.borrower.settle([uid], keep=False)
        engine.room.absorb([Lost(uid, "tainted")])
        assert seq.table.holes.lowest[0] < 1500 and not any(span.keys for i, span in seq.table.live()
                                                            if i * 128 >= seq.table.holes.lowest[0])

    got = bank.run(job, each_step=strike)
    assert struck
    if answered:
        assert isinstance(got.errors["a"], KVBankError) and "submit the job again" in str(got.errors["a"])
    else:
        assert not got.errors
        assert got.tokens["a"] == want.tokens["a"] and got.tally["a"].missed["tainted"] > 0
    again = bank.run(JobSpec(id="b", prompt=job.prompt, max_tokens=30, ignore_eos=True))
    assert again.tokens["b"] == want.tokens["a"]
    bank.settle()
    assert not bank.worker.vault.check() and bank.worker.vault.counts().held == 0
