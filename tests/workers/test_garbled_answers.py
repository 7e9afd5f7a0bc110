"""A lender whose answers do not fit what was asked costs a replay: no other job, no step, no wrong token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvbank.kvstore.transport.hot import Layer, Partial, Want, unpack
from kvbank.workers.models.random_model import write_random_model
from kvbank.workers.sequence import JobSpec

HEADS, DIM = 4, 32
FAR = np.array([[0, 999]], dtype="<i4")

Answer = Partial | Layer
GARBLED: dict[str, Callable[[Answer], Answer | Want]] = {
    "cut": lambda answer: replace(answer, data=answer.data[:-64]) if isinstance(answer, Layer)
    else replace(answer, out=answer.out[: -4 * HEADS * DIM], lse=answer.lse[: -4 * HEADS]),
    "the wrong kind": lambda answer: Partial(answer.plan, answer.step, answer.layer, FAR[:0], FAR[:0], b"", b"")
    if isinstance(answer, Layer) else Layer(answer.plan, answer.step, answer.layer, FAR[:0], b""),
    "nothing": lambda answer: replace(answer, data=b"") if isinstance(answer, Layer)
    else replace(answer, nodes=np.zeros((0, 4), "<i4"), out=b"", lse=b""),
    "a question": lambda answer: Want(answer.plan, answer.step, answer.layer),
    "stale what nobody asked for": lambda answer: replace(answer, stale=FAR),
}


@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
@pytest.mark.parametrize("fetched", [False, True], ids=["attended", "fetched"])
@pytest.mark.parametrize("how", GARBLED)
def test_an_answer_that_does_not_fit_costs_a_replay(town, alone, run_jobs, prompt, how, fetched, exactness) -> None:
    job = JobSpec(id="a", prompt=prompt(1300), max_tokens=16, ignore_eos=True)
    beside = JobSpec(id="b", prompt=prompt(60, 5), max_tokens=30, ignore_eos=True, age=1.0)
    want = run_jobs(alone(exactness=exactness), job, beside)
    bank = town(lenders=1, lender_blocks=96, exactness=exactness, avoid_s=0.3)
    (lender,) = bank.lenders
    if fetched:
        lender.ledger.compat = replace(lender.ledger.compat, numerics="another kind of machine")
    serve, garbled = lender.attend.serve, []

    def faulty(borrower, messages):
        for data in serve(borrower, messages):
            seqs = bank.worker.engine.jobs()
            if not garbled and seqs and seqs[0].num_output >= 4:
                garbled.append(how)
                data = GARBLED[how](unpack(data, lse_per_row=HEADS, out_per_row=HEADS * DIM)).pack()
            yield data

    lender.attend.serve = faulty
    got = bank.run(job, beside)
    assert garbled and not got.errors, got.errors
    assert got.tokens == want.tokens
    assert got.tally["a"].missed["lender_garbled"] > 0, got.tally["a"]


def test_what_a_window_hides_is_rightly_left_out_of_an_answer(town, prompt, tmp_path) -> None:
    """Two layers see 300 tokens back, two see all: a lender leaves spans that no row sees out of the first ones' nodes."""
    model = write_random_model(
        tmp_path, seed=8, vocab=512, model_type="qwen2", use_sliding_window=True, sliding_window=300, max_window_layers=2,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"])
    bank = town(lenders=1, lender_blocks=96, model=model, exactness="bitwise")
    got = bank.run(JobSpec(id="a", prompt=prompt(1300), max_tokens=16, ignore_eos=True))
    assert not got.errors and bank.lenders[0].attend.counters.calls
    assert not got.tally["a"].recomputed_after_fault, got.tally["a"]
