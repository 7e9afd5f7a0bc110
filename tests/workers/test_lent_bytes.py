"""What lending costs in bytes, what the borrower keeps of what it lent, and what happens when a lender's bytes go bad."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvbank.workers.remote_attention import RemoteAttention
from kvbank.workers.sequence import JobSpec

ROOT = Path(__file__).parents[2]
LENT_PROMPT = 6 * 48 * 16 - 40


def flip(bank: Any, lender: Any) -> None:
    """One byte of one value, in the first slot that holds a sealed span: its exponent grows by eight."""
    refs = [ref for ref in bank.worker.book.refs().values() if ref.lender_boot == lender.boot]
    values = lender.arena.view(bank.worker.layout)[refs[0].slot, 0, 1]       # V of the first layer
    _, tokens, dim = values.shape
    at = int(values.abs().argmax())
    head, token, column = at // (tokens * dim), at // dim % tokens, at % dim
    raw = values.numpy()[head, token, column : column + 1].view("uint8")
    raw[3] += 4


def strike_once(bank: Any, after: int = 4) -> tuple[Any, list[str]]:
    struck: list[str] = []

    def strike() -> None:
        seqs = bank.worker.engine.jobs()
        if not struck and seqs and seqs[0].num_output >= after:
            lender = next(m for m in bank.lenders if m.vault.counts().lent)
            flip(bank, lender)
            struck.append(lender.id)
    return strike, struck


def test_without_the_digest_check_a_flipped_byte_at_a_lender_changes_the_answer(town, alone, run_jobs, prompt) -> None:
    job = JobSpec(id="a", prompt=prompt(1700), max_tokens=24, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=2, exactness="bitwise", lender_blocks=96)
    strike, struck = strike_once(bank)
    got = bank.run(job, each_step=strike)
    assert struck and not got.errors
    assert (got.logits["a"] - want.logits["a"]).abs().max() > 1e-2


@pytest.mark.parametrize("ship", ["smaller", "query", "kv"])
def test_with_verify_attend_a_flipped_byte_is_never_used(town, alone, run_jobs, prompt, ship) -> None:
    job = JobSpec(id="a", prompt=prompt(1700), max_tokens=24, ignore_eos=True)
    want = run_jobs(alone(exactness="bitwise"), job)
    bank = town(lenders=2, exactness="bitwise", lender_blocks=96, verify_attend=True)
    bank.worker.remote.ship = ship
    strike, struck = strike_once(bank)
    got = bank.run(job, each_step=strike)
    assert struck and not got.errors
    assert got.tokens["a"] == want.tokens["a"] and torch.equal(got.logits["a"], want.logits["a"])
    assert got.tally["a"].recomputed_after_fault == 128, "one span went bad"
    assert got.tally["a"].missed["stale"] == 128
    assert sum(m.attend.counters.tainted for m in bank.lenders) == 1
    bank.settle()
    for member in bank.lenders:
        assert not member.ledger.check() and not member.vault.check()


def test_a_tainted_span_that_was_the_lenders_own_cache_is_not_cached_again(town, prompt) -> None:
    bank = town(lenders=1, lender_blocks=160, verify_attend=True)
    text = prompt(1500)
    first = bank.run(JobSpec(id="a", prompt=text, max_tokens=4, ignore_eos=True))
    bank.settle()
    (lender,) = bank.lenders
    flipped = []

    def strike() -> None:
        if not flipped and bank.worker.book.refs() and any(s.num_output for s in bank.worker.engine.jobs()):
            flip(bank, lender)
            flipped.append(True)

    again = bank.run(JobSpec(id="b", prompt=text, max_tokens=4, ignore_eos=True), each_step=strike)
    assert flipped and again.tally["b"].reused["peer"] > 0
    assert again.tokens["b"] == first.tokens["a"]
    bank.settle()
    third = bank.run(JobSpec(id="c", prompt=text, max_tokens=4, ignore_eos=True))
    assert third.tokens["c"] == first.tokens["a"]
    assert lender.attend.counters.tainted == 1, "the bad bytes were adopted a second time"


def test_decode_bytes_from_lenders_are_at_most_twice_the_formula(town, prompt) -> None:
    bank = town(lenders=3, lender_blocks=160)
    remote: RemoteAttention = bank.worker.remote
    layout, shape = bank.worker.layout, bank.worker.parts.shape
    before: dict[str, int] = {}
    steps: list[tuple[int, int]] = []                    # (bytes, calls) of each decode step

    def measure() -> None:
        seqs = bank.worker.engine.jobs()
        now = {"bytes": remote.bytes_sent + remote.bytes_received, "calls": remote.calls}
        if seqs and seqs[0].num_output > 1 and before:
            steps.append((now["bytes"] - before["bytes"], now["calls"] - before["calls"]))
        before.update(now)

    got = bank.run(JobSpec(id="a", prompt=prompt(LENT_PROMPT), max_tokens=40, ignore_eos=True), each_step=measure)
    assert not got.errors and len(steps) >= 35
    per_call = shape.heads * layout.head_dim * (4 + 4)   # T = 1: one query there, one partial back
    assert all(calls and calls % layout.layers == 0 for _, calls in steps)
    moved, calls = sum(step[0] for step in steps), sum(step[1] for step in steps)
    assert calls / len(steps) / layout.layers >= 2, "the spans should be at several lenders"
    assert moved <= 2 * calls * per_call, f"{moved / calls:.0f} bytes a call, the formula says {per_call}"
    counted = sum(m.attend.counters.bytes_in + m.attend.counters.bytes_out for m in bank.lenders)
    assert counted == remote.bytes_sent + remote.bytes_received, "both ends count the same bytes"


# -- the auditor --------------------------------------------------------------------------------------------------------------

LENDER = """
import json, sys
from kvbank.workers.service import build_worker

member = build_worker(json.loads(sys.stdin.readline()), None)
print(json.dumps([member.start("127.0.0.1:0"), member.arena.slot_bytes, member.vault.num_slots]), flush=True)
sys.stdin.read()
member.stop()
"""


class Abroad:
    """A lender in a process of its own, so that what it needs to lend is not found here."""

    kind = "lender"

    def __init__(self, bank: Any, name: str) -> None:
        config = bank.config("lender", name)
        self.id, self.boot, self._book = name, bytes.fromhex(config["boot"]), bank.worker.book
        self._process = subprocess.Popen([sys.executable, "-c", LENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        print(json.dumps(config), file=self._process.stdin, flush=True)

    def wait(self) -> None:
        self.address, slot_bytes, slots = json.loads(self._process.stdout.readline())
        self.arena, self.vault = SimpleNamespace(slot_bytes=slot_bytes), SimpleNamespace(num_slots=slots)
        self.ledger = self

    def lendable(self) -> int:
        return self.vault.num_slots - sum(ref.lender_boot == self.boot for ref in self._book.held())

    def stop(self) -> None:
        self._process.communicate()


def live_buffers(at_least: int) -> dict[int, tuple[int, Any]]:
    """address -> (bytes, what keeps it) of every tensor storage, bytes and bytearray of at least that size that this
    process can reach. Who holds the result holds the addresses too: nothing new appears at one of them."""
    found: dict[int, tuple[int, Any]] = {}

    def note(thing: Any) -> None:
        if issubclass(type(thing), torch.Tensor):
            if thing.layout != torch.strided:
                return                                   # packed weights
            storage = thing.untyped_storage()
            if storage.nbytes() >= at_least:
                found[storage.data_ptr()] = storage.nbytes(), storage
        elif type(thing) in (bytes, bytearray) and len(thing) >= at_least:
            found[id(thing)] = len(thing), thing

    for thing in gc.get_objects():
        kind = type(thing)
        if kind is type or kind.__name__ in ("module", "function"):
            continue
        note(thing)
        if kind in (dict, list, tuple, set) or hasattr(kind, "__slots__") or kind.__name__ in ("deque", "SimpleQueue", "cell"):
            for inner in gc.get_referents(thing):
                note(inner)
    gc.disable()           # a tensor that is freed inside takes a lock that _current_frames holds (CPython 3.11): a standstill
    try:
        frames = list(sys._current_frames().values())
    finally:
        gc.enable()
    for frame in frames:
        while frame is not None:
            for value in frame.f_locals.values():
                note(value)
            frame = frame.f_back
    return found


def new_bytes(known: dict[int, tuple[int, Any]], at_least: int) -> int:
    """Bytes of all live buffers that are not among the known ones."""
    return sum(size for at, (size, _) in live_buffers(at_least).items() if at not in known)


def test_nothing_new_hides_at_the_address_of_a_buffer_that_the_auditor_knew() -> None:
    gone = [torch.zeros(1 << 20, dtype=torch.uint8)]
    known, storage = live_buffers(1 << 20), StorageWeakRef(gone[0].untyped_storage())
    gone.clear()
    assert not storage.expired(), "its address is free for a buffer that the auditor would take for it"
    assert new_bytes(known, 1 << 20) == 0
    fresh = torch.zeros(1 << 20, dtype=torch.uint8)
    assert new_bytes(known, 1 << 20) == fresh.nbytes


@pytest.mark.slow
def test_a_borrower_keeps_no_more_kv_than_its_vault_and_its_staging(town, alone, run_jobs, prompt) -> None:
    """Every buffer that appeared since before the job, mid-forward too, beside what a big worker's forward needs anyway."""
    text = prompt(LENT_PROMPT)
    bank = town(lenders=0, lender_blocks=160, staging_spans=4, prefill_chunk_tokens=64)
    bank.lenders = [Abroad(bank, f"lender-{i}") for i in range(3)]
    for lender in bank.lenders:
        lender.wait()
    bank.refresh()
    layout = bank.worker.layout
    per_layer = layout.slot_bytes // layout.layers

    def audited(engine: Any, run: Any) -> int:
        """The most bytes of new buffers at any sample, in layer 2 of some steps and between steps."""
        known, most, calls = live_buffers(per_layer), 0, 0
        model = engine.backend.model
        forward = model.forward

        def sample() -> None:
            nonlocal most
            most = max(most, new_bytes(known, per_layer))

        def watched(ids: Any, hidden: Any, positions: Any, attend: Any) -> Any:
            nonlocal calls
            calls += 1

            def inner(layer: int, q: Any, k: Any, v: Any) -> Any:
                out = attend(layer, q, k, v)
                if layer == 2 and calls % 18 == 0:
                    sample()
                return out
            return forward(ids, hidden, positions, inner)

        model.forward = watched
        try:
            run(sample)
        finally:
            del model.forward
        return most

    def every(number: int, act: Any) -> Any:
        steps = iter(range(10**9))
        return lambda: act() if next(steps) % number == 0 else None

    job = JobSpec(id="a", prompt=text, max_tokens=6, ignore_eos=True)
    big = alone(prefill_chunk_tokens=64)
    activations = audited(big, lambda sample: run_jobs(big, job, each_step=every(31, sample)))
    got = audited(bank.worker.engine, lambda sample: bank.run(job, each_step=every(31, sample)))
    staging = bank.worker.worker_config.staging_spans * layout.slot_bytes
    lent = -(-LENT_PROMPT // 128) * layout.slot_bytes - bank.worker.arena.bytes.nbytes
    assert got <= staging + activations, f"{got} bytes beside the vault; staging {staging}, activations {activations}"
    assert staging + activations < lent, "a copy of what is lent would not be seen"
