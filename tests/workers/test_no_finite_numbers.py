"""KV of which a job made no finite numbers: that job fails, and the next one with the same text is answered."""

from __future__ import annotations

from kvbank.workers.sequence import JobSpec


def test_a_peers_cache_that_spoiled_one_job_spoils_no_other(town, alone, run_jobs, prompt) -> None:
    text = prompt(700)
    ask = [JobSpec(id=name, prompt=text, max_tokens=8, ignore_eos=True) for name in "abc"]
    want = run_jobs(alone(), ask[0]).tokens["a"]
    bank = town(lenders=1, lender_blocks=160, device_blocks=24)
    (lender,) = bank.lenders
    assert bank.run(ask[0]).tokens["a"] == want
    bank.settle()
    poisoned = [span for span in lender.vault._idle.values() if span.slot is not None]
    for span in poisoned:
        lender.arena.view(bank.worker.layout)[span.slot].fill_(float("nan"))
    assert poisoned
    bank.worker.vault.drop_idle()
    assert "finite" in str(bank.run(ask[1]).errors["b"])
    bank.settle()
    got = bank.run(ask[2])
    assert not got.errors and got.tokens["c"] == want
