"""Several shards that borrow: each from lenders of its own choice, over real gRPC, and nobody can tell from the answer."""

from __future__ import annotations

import time

import pytest
import torch

from kvbank.errors import Unavailable
from kvbank.workers.sequence import JobSpec

BOTH = pytest.mark.parametrize("exactness", ["fast", "bitwise"])
BLOCKS = 48                                  # a vault of six spans


def check_quiet(bank) -> None:
    """Nothing is lent, borrowed or held anywhere, and every book agrees."""
    bank.settle()
    give_up = time.monotonic() + 5.0
    while bank.worker.vault.counts().held and time.monotonic() < give_up:     # a span on its way when its job failed
        bank.worker.engine.step()
        time.sleep(0.01)
    assert bank.worker.vault.counts().held == 0 and not bank.worker.vault.check()
    for member in [bank.worker, *bank.followers.values()]:
        assert member.borrower.num_borrowed == 0 and not member.book.check(), member.id
        assert not member.borrower._moves and not member.borrower._homes
    for member in bank.lenders:
        assert member.vault.counts().lent == 0 and not member.ledger.check() and not member.vault.check()
    for member in bank.followers.values():
        assert member.follower.loans.idle
    assert not bank.worker.chain.homes and not bank.worker.engine._bank._lent


def check_same(got, want, exactness: str, job: str = "a") -> None:
    assert not got.errors
    assert got.tokens[job] == want.tokens[job]
    if exactness == "bitwise":
        assert torch.equal(got.logits[job], want.logits[job])
    else:
        assert (got.logits[job] - want.logits[job]).abs().max() < 1e-4


@BOTH
@pytest.mark.parametrize("shards", [2, 3])
def test_a_prompt_six_times_the_vault_borrows_for_every_shard(town, alone, run_jobs, prompt, exactness, shards) -> None:
    job = JobSpec(id="a", prompt=prompt(6 * BLOCKS * 16 - 40), max_tokens=24, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    bank = town(lenders=3, shards=shards, exactness=exactness, lender_blocks=120 * shards)
    got = bank.run(job)
    check_same(got, want, exactness)
    tally = got.tally["a"]
    assert tally.borrowed_blocks_peak > 200
    assert tally.missed["never_seen"] + tally.missed["last_block"] == len(job.prompt) and not tally.recomputed_after_fault
    assert set(tally.lenders) <= {m.id for m in bank.lenders} and len(tally.lenders) >= 2
    assert all(member.remote.calls for member in [bank.worker, *bank.followers.values()])
    check_quiet(bank)


@BOTH
def test_a_lender_that_dies_during_decode_costs_a_replay_and_no_token(town, alone, run_jobs, prompt, exactness) -> None:
    job = JobSpec(id="a", prompt=prompt(1700), max_tokens=40, ignore_eos=True)
    want = run_jobs(alone(exactness=exactness), job)
    bank = town(lenders=3, shards=2, exactness=exactness, lender_blocks=160)

    def kill_once() -> None:
        jobs = bank.worker.engine.jobs()
        if len(bank.lenders) == 3 and jobs and jobs[0].num_output >= 10:
            bank.kill(next(i for i, m in enumerate(bank.lenders) if m.vault.counts().lent))

    got = bank.run(job, each_step=kill_once)
    assert len(bank.lenders) == 2, "the fault had no effect"
    check_same(got, want, exactness)
    assert got.tally["a"].recomputed_after_fault > 0
    check_quiet(bank)


def test_lenders_die_one_after_the_other_while_a_long_prompt_is_computed(town, alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(2200), max_tokens=30, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=5, shards=2, exactness="bitwise", lender_blocks=160)
    steps = [0]

    def kill_some() -> None:
        steps[0] += 1
        if steps[0] in (6, 14, 22) and len(bank.lenders) > 2:
            bank.kill(next((i for i, m in enumerate(bank.lenders) if m.vault.counts().lent), 0))

    got = bank.run(job, each_step=kill_some)
    assert len(bank.lenders) == 2
    check_same(got, want, "bitwise")
    check_quiet(bank)


@pytest.mark.parametrize("urgent", [True, False])
def test_recalled_spans_come_home_or_are_computed_again(town, alone, run_jobs, prompt, urgent) -> None:
    """One shard's lender wants its slots back: the whole span comes home, also from the lender that did not ask."""
    from kvbank.kvstore.loan_events import Drain

    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=40, ignore_eos=True)
    other = JobSpec(id="x", prompt=prompt(300, 1), max_tokens=2, age=-1.0, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=3, shards=2, exactness="bitwise", lender_blocks=96, recall_drain_s=2.0 if urgent else 20.0)
    drained = []

    def drain_once() -> None:
        jobs = [seq for seq in bank.worker.engine.jobs() if seq.job.id == "a"]
        if not drained and jobs and jobs[0].num_output >= 10:
            drained.append(next(m for m in bank.lenders if m.vault.counts().lent))
            drained[0].banker.tell_ledger(Drain())

    got = bank.run(job, other, each_step=drain_once)
    assert drained, "nothing was recalled"
    check_same(got, want, "bitwise")
    check_quiet(bank)


def test_what_is_borrowed_is_given_back_when_jobs_are_cancelled_at_any_time(town, prompt) -> None:
    bank = town(lenders=2, shards=2, lender_blocks=320)
    for round_ in range(12):
        engine, name = bank.worker.engine, f"j{round_}"
        engine.add(JobSpec(id=name, prompt=prompt(900 + 50 * round_, round_), max_tokens=50, ignore_eos=True))
        for _ in range(3 * round_):
            bank.refresh()
            engine.step()
        engine.cancel(name)
        while engine.busy:
            engine.step()
    check_quiet(bank)


def test_a_lost_shard_returns_all_that_was_borrowed_and_a_new_one_borrows_again(town, alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=400, ignore_eos=True)
    again = JobSpec(id="b", prompt=prompt(1500), max_tokens=10, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), again)
    bank = town(lenders=3, shards=2, exactness="bitwise", lender_blocks=160, term_s=2.0, renew_s=0.5)

    def kill_once() -> None:
        jobs = bank.worker.engine.jobs()
        if 1 in bank.followers and jobs and jobs[0].num_output >= 5:
            assert bank.followers[1].borrower.num_borrowed
            bank.followers.pop(1).stop()

    lost = bank.run(job, each_step=kill_once)
    assert isinstance(lost.errors["a"], Unavailable)
    assert bank.worker.borrower.num_borrowed == 0
    bank.followers[1] = bank._start("model", "worker-0.1", 1)
    got = bank.run(again)
    check_same(got, want, "bitwise", "b")
    bank.settle(within_s=10.0)                # what the dead one had borrowed ends with its term
    check_quiet(bank)


def test_two_jobs_too_large_for_one_vault_borrow_side_by_side(town, alone, run_jobs, prompt) -> None:
    jobs = [JobSpec(id=name, prompt=prompt(700, seed), max_tokens=30, age=seed, ignore_eos=True)
            for seed, name in enumerate("abc")]
    want = run_jobs(alone(exactness="bitwise"), *jobs)
    bank = town(lenders=3, shards=2, exactness="bitwise", lender_blocks=160)
    got = bank.run(*jobs)
    for job in jobs:
        check_same(got, want, "bitwise", job.id)
    check_quiet(bank)


@pytest.mark.parametrize("shard", [0, 1])
def test_a_wrong_byte_at_any_shards_lender_changes_the_logits(town, alone, run_jobs, prompt, shard) -> None:
    """The negative control of the rows above: it is the lenders' bytes that were read."""
    job = JobSpec(id="a", prompt=prompt(1500), max_tokens=8, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=2, shards=2, exactness="bitwise", lender_blocks=320)
    spoiled = []

    def spoil_once() -> None:
        jobs = bank.worker.engine.jobs()
        if not spoiled and jobs and jobs[0].num_output >= 2:
            member = bank.worker if shard == 0 else bank.followers[1]
            ref = next(iter(member.borrower._where.values()))
            lender = next(m for m in bank.lenders if m.boot == ref.lender_boot)
            lender.arena.slot(ref.slot).zero_()
            spoiled.append(ref)

    got = bank.run(job, each_step=spoil_once)
    assert spoiled
    assert (got.logits["a"] - want.logits["a"]).abs().max() > 1e-2


def test_followers_report_what_they_borrow_and_their_leaders_books(town, prompt) -> None:
    bank = town(lenders=2, shards=2, lender_blocks=320)
    seen = []

    def look() -> None:
        status = bank.followers[1].status()
        seen.append((status.blocks_borrowed, status.blocks_used))

    bank.run(JobSpec(id="a", prompt=prompt(1500), max_tokens=8, ignore_eos=True), each_step=look)
    assert max(borrowed for borrowed, _ in seen) > 40 and max(used for _, used in seen) > 0
    check_quiet(bank)
    give_up = time.monotonic() + 5
    while bank.followers[1].status().blocks_used:
        assert time.monotonic() < give_up
        bank.worker.engine.step()
    status = bank.followers[1].status()
    assert status.blocks_borrowed == status.blocks_lent == 0 and status.blocks_free == status.blocks_total


def test_followers_report_the_keys_their_leader_reports(town, prompt) -> None:
    """Placement counts a prefix as far as all shards report it."""
    bank = town(lenders=0, shards=3, device_blocks=80)

    def reported(full: bool) -> list[set[bytes]]:
        led = bank.worker.report(full)
        give_up = time.monotonic() + 5
        told = [dict.fromkeys(_keys(led["keys_added"]))] + [{} for _ in bank.followers]
        while any(set(more) != set(told[0]) for more in told[1:]) and time.monotonic() < give_up:
            bank.worker.engine.step()
            for mine, follower in zip(told[1:], bank.followers.values(), strict=True):
                mine.update(dict.fromkeys(_keys(follower.report(False)["keys_added"])))
        return [set(keys) for keys in told]

    bank.run(JobSpec(id="a", prompt=prompt(600), max_tokens=2, ignore_eos=True))
    first = reported(full=False)
    assert len(first[0]) == 600 // 16 and first[1] == first[2] == first[0]
    bank.run(JobSpec(id="b", prompt=prompt(1100, 1), max_tokens=2, ignore_eos=True))       # drives most of them out
    bank.worker.report(False)
    bank.worker.engine.step()
    held = set(_keys(bank.worker.report(True)["keys_added"]))
    give_up = time.monotonic() + 5
    while set(_keys(bank.followers[1].report(True)["keys_added"])) != held:
        assert time.monotonic() < give_up
        bank.worker.engine.step()


def _keys(joined: bytes) -> list[bytes]:
    return [joined[at : at + 32] for at in range(0, len(joined), 32)]


def test_a_needy_job_does_not_wait_for_the_loans_of_its_own_shards(town, prompt) -> None:
    """Alone in the cluster, and what admission counted has gone: there is nobody older to wait for."""
    bank = town(lenders=1, shards=2, exactness="bitwise", lender_blocks=64, stall_s=1.5)
    bank.worker.engine._capacity_tokens = lambda: 1 << 20
    pressed = bank.lenders[0].ledger.counters
    give_up = time.monotonic() + 15

    def not_for_ever() -> None:
        assert time.monotonic() < give_up, pressed

    got = bank.run(JobSpec(id="a", prompt=prompt(2000), max_tokens=2, ignore_eos=True), each_step=not_for_ever)
    assert isinstance(got.errors["a"], Unavailable)
    assert pressed["refused_CAP"] and not pressed["refused_OLDER"], pressed


def test_a_needy_job_asks_for_what_all_its_shards_can_have(town, prompt) -> None:
    """One shard alone could take all that a lender has left: then no span is elsewhere for all shards, however often its
    bytes are sent. Advice says nothing, as while slots change hands."""
    bank = town(lenders=1, shards=2, exactness="bitwise", lender_blocks=32, stall_s=1.5)
    bank.worker.engine._capacity_tokens = lambda: 1 << 20
    bank.lenders_now = lambda asker=None: []
    got = bank.run(JobSpec(id="a", prompt=prompt(2000), max_tokens=2, ignore_eos=True))
    assert isinstance(got.errors["a"], Unavailable)
    assert bank.lenders[0].ledger.counters["slots_granted"] <= 48, "the same spans go there and back"
    check_quiet(bank)
