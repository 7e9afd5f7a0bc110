"""Faults at odd moments: what the streams and threads of loans do must cost a replay at most, never a step or a job."""

from __future__ import annotations

import pytest

from kvbank.workers.sequence import JobSpec


@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
def test_a_lender_that_answers_half_of_a_layer_costs_a_replay(town, alone, run_jobs, prompt, exactness) -> None:
    """Its rows travel in several messages; it goes away between the first answer and the second."""
    job = JobSpec(id="a", prompt=prompt(900), max_tokens=6, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    one = town(lenders=3, device_blocks=32, exactness=exactness, prefill_chunk_tokens=64)
    remote = one.worker.remote
    remote.ship, remote._rows_per_part = "query", 8
    real, cut = remote._receive, []

    def receive(part, layer):
        parts = [p for p in remote._parts if p.lender == part.lender]
        if not cut and len(parts) > 2 and part is parts[1] and layer == 1:
            cut.append(part.lender)
            remote._break(part.lender, "lender_gone")
            return None
        return real(part, layer)
    remote._receive = receive
    got = one.run(job)
    assert cut, "nothing was cut"
    assert got.tokens == want.tokens
    assert got.tally["a"].recomputed_after_fault > 0


def test_garbage_from_a_lender_costs_its_spans_only(town, alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(900), max_tokens=6, ignore_eos=True)
    want = run_jobs(alone(), job)
    one = town(lenders=3, device_blocks=32)
    real, lied = one.worker.borrower.stream, []

    class Liar:
        def __init__(self, stream) -> None:
            self._stream = stream

        def send(self, message) -> None:
            self._stream.send(message)

        def receive(self) -> bytes:
            data = self._stream.receive()
            if lied:
                return data
            lied.append(data)
            return b"\x63" + data[1:40]
    one.worker.borrower.stream = lambda lender: Liar(real(lender))
    got = one.run(job)
    assert lied and not got.errors
    assert got.tokens == want.tokens


def test_a_hot_stream_that_broke_between_two_steps_costs_nothing(town, prompt) -> None:
    """What was lent is still there: the new stream is told the plan again."""
    job = JobSpec(id="a", prompt=prompt(900), max_tokens=12, ignore_eos=True)
    one = town(lenders=3, device_blocks=32)
    cut = []

    def cut_once() -> None:
        seqs = one.worker.engine.jobs()
        if not cut and seqs and seqs[0].num_output == 6:
            for link in list(one.worker._links._hot.values()):
                cut.append(link)
                link.close()
    got = one.run(job, each_step=cut_once)
    assert cut, "no stream was open"
    assert got.tally["a"].recomputed_after_fault == 0 and not got.errors


def test_a_timer_that_fails_once_does_not_end_the_renewals(town) -> None:
    one = town(lenders=1)
    banker, calls = one.lenders[0].banker, []
    real = banker.ledger.wake_at

    def wake_at() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a bug in a core")
        return real() if len(calls) < 2 else min(real(), banker.now() + 0.01)
    banker.ledger.wake_at = wake_at
    for _ in range(500):
        if len(calls) > 4:
            break
        with banker._timer:
            banker._timer.notify()
        banker._thread.join(0.01)
    assert len(calls) > 4 and banker._thread.is_alive()


def test_a_search_for_peers_that_fails_does_not_keep_the_job_waiting(town, prompt) -> None:
    one = town(lenders=1, stall_s=2.0)

    def broken(keys):
        raise RuntimeError("control does not take our token")
    one.worker.borrower._locate = broken
    got = one.run(JobSpec(id="a", prompt=prompt(300), max_tokens=2, ignore_eos=True))
    assert not got.errors and len(got.tokens["a"]) == 2
