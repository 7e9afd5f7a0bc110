"""Lenders that die or stop while a prompt is computed, one after the other or all at once: right tokens, or a typed error."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvbank.cluster.client import Client, Job, WorkerStatus
from kvbank.errors import Unavailable

LONG = 4200                                           # tokens: 33 spans, and the worker has 6 slots
FAST_TIMES = {"stall_s": 6.0, "avoid_s": 2.0}


def worker(client: Client) -> WorkerStatus:
    return client.status().workers[0]


def spans_lost(client: Client) -> float:
    return sum(count for name, count in worker(client).counters.items() if name.startswith("book_lost_"))


def in_prefill(client: Client, job: Job, until: Callable[..., Any], at_least: int) -> list[str]:
    """Wait until so many prompt tokens are computed and the prompt is not done; the lenders, most used first."""
    until(lambda: worker(client).counters["forward_rows"] >= at_least, 60)
    assert not job.status().output_tokens, "the prompt was done before the fault"
    lent: dict[str, int] = {}
    for loan in client.status().loans:
        lent[loan.lender] = lent.get(loan.lender, 0) + loan.blocks
    assert lent, "nothing was borrowed"
    return sorted(lent, key=lambda name: -lent[name])


def kill(town: Any, name: str) -> None:
    os.kill(town.processes[name], signal.SIGKILL)


def test_a_lender_with_many_spans_killed_while_the_prompt_is_computed(cluster, big, text, until, quiet) -> None:
    want = big.generate(text(LONG), max_tokens=16, ignore_eos=True)
    town = cluster(workers=1, lenders=4, lender_blocks=160, prefill_chunk_tokens=32, **FAST_TIMES)
    with Client(town.address) as client:
        job = client.submit(text(LONG), max_tokens=16, ignore_eos=True)
        kill(town, in_prefill(client, job, until, 2000)[0])
        result = job.result(timeout_s=90)
        assert result.token_ids == want.token_ids
        assert result.receipt.recomputed_after_fault >= 256, "it held several spans"
        quiet(client)


@pytest.mark.slow
def test_a_second_lender_killed_while_the_first_ones_spans_are_replayed(cluster, big, text, until, quiet) -> None:
    want = big.generate(text(LONG), max_tokens=16, ignore_eos=True)
    town = cluster(workers=1, lenders=4, lender_blocks=128, prefill_chunk_tokens=32, restart=False, **FAST_TIMES)
    with Client(town.address) as client:
        job = client.submit(text(LONG), max_tokens=16, ignore_eos=True)
        first, *others = in_prefill(client, job, until, 3000)      # 24 spans: more than 6 here and the 16 of one lender
        assert others, "one lender had it all"
        kill(town, first)
        until(lambda: spans_lost(client), 30)         # the replay begins
        assert not job.status().output_tokens
        kill(town, others[0])
        result = job.result(timeout_s=120)
        assert result.token_ids == want.token_ids
        assert result.receipt.recomputed_after_fault >= 384
        quiet(client)


@pytest.mark.parametrize("host_bytes", ["64MiB", pytest.param(0, marks=pytest.mark.slow)])
def test_all_lenders_killed(cluster, big, text, until, host_bytes) -> None:
    """With host memory the job parks there and ends well; without it has no room left, and says so. Never a wrong token."""
    want = big.generate(text(LONG), max_tokens=16, ignore_eos=True)
    town = cluster(workers=1, lenders=3, lender_blocks=160, prefill_chunk_tokens=32, restart=False, host_bytes=host_bytes,
                   **FAST_TIMES)
    with Client(town.address) as client:
        job = client.submit(text(LONG), max_tokens=16, ignore_eos=True)
        in_prefill(client, job, until, 1500)
        for number in range(3):
            kill(town, f"lender-{number}")
        if host_bytes:
            result = job.result(timeout_s=120)
            assert result.token_ids == want.token_ids
            assert result.receipt.parked_blocks_peak > 0 and result.receipt.recomputed_after_fault > 0
        else:
            with pytest.raises(Unavailable, match="no room"):
                job.result(timeout_s=120)
        small = client.generate(text(300, 5), max_tokens=8, ignore_eos=True)
        assert small.token_ids == big.generate(text(300, 5), max_tokens=8, ignore_eos=True).token_ids
        until(lambda: worker(client).blocks_used == worker(client).blocks_borrowed == 0, 10)


@pytest.mark.slow
def test_killed_lenders_that_come_back_are_used_again(cluster, big, text, until, quiet) -> None:
    want = big.generate(text(LONG), max_tokens=16, ignore_eos=True)
    town = cluster(workers=1, lenders=3, lender_blocks=160, prefill_chunk_tokens=32, **(FAST_TIMES | {"stall_s": 30.0}))
    with Client(town.address) as client:
        job = client.submit(text(LONG), max_tokens=16, ignore_eos=True)
        in_prefill(client, job, until, 1500)
        for number in range(3):
            kill(town, f"lender-{number}")
        assert job.result(timeout_s=120).token_ids == want.token_ids
        quiet(client)


@pytest.mark.parametrize("when", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_a_lender_stopped_for_three_seconds(cluster, big, text, until, quiet, when) -> None:
    want = big.generate(text(LONG), max_tokens=120, ignore_eos=True)
    town = cluster(workers=1, lenders=4, lender_blocks=128, prefill_chunk_tokens=32, **FAST_TIMES)
    with Client(town.address) as client:
        job = client.submit(text(LONG), max_tokens=120, ignore_eos=True)
        if when == "prefill":
            victim = in_prefill(client, job, until, 2000)[0]
        else:
            until(lambda: job.status().output_tokens >= 10, 60)
            victim = sorted({loan.lender for loan in client.status().loans})[0]
        pid = town.processes[victim]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(pid, signal.SIGCONT)
        result = job.result(timeout_s=90)
        assert result.token_ids == want.token_ids
        assert result.receipt.recomputed_after_fault > 0, "it was not missed"
        assert town.processes[victim] == pid, "it did not die"
        quiet(client)
