"""Replicas of several shards as whole clusters: they answer as one big worker does, whoever is killed."""

from __future__ import annotations

import os
import signal

import pytest

from kvbank.cluster.client import Client


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_give_the_tokens_of_one_big_worker(cluster, big, text, quiet, shards) -> None:
    jobs = [{"prompt": text(400 + 50 * i, i), "max_tokens": 24, "ignore_eos": True,
             **({"temperature": 0.9, "seed": 7} if i % 2 else {})} for i in range(4)]
    want = [big.generate(**job).token_ids for job in jobs]
    with Client(cluster(workers=1, lenders=0, shards=shards, device_blocks=512).address) as client:
        handles = [client.submit(**job) for job in jobs]
        assert [handle.result(timeout_s=60).token_ids for handle in handles] == want
        again = client.generate(**jobs[0])
        assert again.token_ids == want[0] and again.receipt.reused["device"] == 384
        workers = [(w.id, w.shard) for w in client.status().workers]
        assert workers == [("worker-0", 0), *((f"worker-0.{shard}", shard) for shard in range(1, shards))]
        quiet(client)


def test_shards_borrow_and_a_lender_is_killed_during_decode(cluster, big, text, until, quiet) -> None:
    prompt = text(2000, 1)
    want = big.generate(prompt, max_tokens=160, ignore_eos=True)
    town = cluster(workers=1, shards=2, lenders=4, lender_blocks=160)
    with Client(town.address) as client:
        job = client.submit(prompt, max_tokens=160, ignore_eos=True)
        seen = 0
        for delta in job.stream():
            seen += len(delta.token_ids)
            if seen >= 20:
                break
        loans = client.status().loans
        assert {loan.borrower for loan in loans} == {"worker-0", "worker-0.1"}, "every shard borrows for its own layers"
        os.kill(town.processes[sorted(loan.lender for loan in loans)[0]], signal.SIGKILL)
        result = job.result(timeout_s=60)
        assert result.token_ids == want.token_ids
        assert result.receipt.recomputed_after_fault > 0 and result.receipt.borrowed_blocks_peak > 40
        quiet(client)


@pytest.mark.parametrize(("shard", "how"), [
    pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow), (1, signal.SIGKILL),
    pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
])
def test_a_job_goes_on_elsewhere_when_a_shard_of_its_replica_is_gone(cluster, big, text, shard, how) -> None:
    prompt = text(600, 3)
    want = big.generate(prompt, max_tokens=200, ignore_eos=True)
    town = cluster(workers=2, shards=2, lenders=0, device_blocks=512)
    with Client(town.address) as client:
        job = client.submit(prompt, max_tokens=200, ignore_eos=True)
        ids: list[int] = []
        stream = job.stream()
        for delta in stream:
            ids += delta.token_ids
            if len(ids) >= 20:
                break
        busy = next(w.replica for w in client.status().workers if w.blocks_used and w.shard == 0)
        os.kill(town.processes[f"worker-{busy}" + (f".{shard}" if shard else "")], how)
        for delta in stream:
            ids += delta.token_ids
        assert ids == want.token_ids == job.result(timeout_s=60).token_ids


def test_the_only_replica_comes_back_with_a_new_shard_and_the_stream_goes_on(cluster, big, text, quiet) -> None:
    prompt = text(600, 4)
    want = big.generate(prompt, max_tokens=200, ignore_eos=True)
    town = cluster(workers=1, shards=2, lenders=0, device_blocks=512)
    with Client(town.address) as client:
        job = client.submit(prompt, max_tokens=200, ignore_eos=True)
        ids: list[int] = []
        stream = job.stream()
        for delta in stream:
            ids += delta.token_ids
            if len(ids) >= 20:
                break
        os.kill(town.processes["worker-0.1"], signal.SIGKILL)
        for delta in stream:
            ids += delta.token_ids
        assert ids == want.token_ids
        quiet(client)
