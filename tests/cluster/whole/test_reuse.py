"""The same 4k-token prompt a second time, on a real cluster: all but its last block is found, wherever it lies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from kvbank.cluster.client import Client

LENGTH, OUTPUTS = 4096, 4
ALL_BUT_LAST = (LENGTH - 1) // 16 * 16
FRAME = 4 * 2 * 2 * 128 * 32 * 4 + 8192               # a span of the small model on the host tier
ALONE = LENGTH - ALL_BUT_LAST + OUTPUTS - 1            # rows of a job that finds all the rest


def rows(client: Client) -> float:
    """Rows that models were given so far."""
    time.sleep(0.15)                                  # an answer of the survey is told for a tenth of a second
    return sum(w.counters["forward_rows"] for w in client.status().workers if w.kind == "model")


def test_a_prompt_spread_over_device_lender_host_and_redis_is_computed_once(cluster, big, text, quiet) -> None:
    town = cluster(workers=1, lenders=1, device_blocks=160, lender_blocks=64, host_bytes=6 * FRAME, redis="embedded")
    with Client(town.address) as client:
        for attempt in range(4):
            prompt = text(LENGTH, attempt)
            want = big.generate(prompt, max_tokens=OUTPUTS, ignore_eos=True).token_ids
            first = client.generate(prompt, max_tokens=OUTPUTS, ignore_eos=True)
            quiet(client)
            client.generate(text(700, 100 + attempt), max_tokens=2, ignore_eos=True)      # drives some spans out
            quiet(client)
            before = rows(client)
            again = client.generate(prompt, max_tokens=OUTPUTS, ignore_eos=True)
            assert first.token_ids == again.token_ids == want
            receipt = again.receipt
            assert receipt.computed_tokens == rows(client) - before, receipt
            if not {"timeout", "tier_down", "evicted"} & set(receipt.missed):
                break                                 # else Redis had more to do than 50 ms allow on a busy machine
        assert sum(receipt.reused.values()) == ALL_BUT_LAST, receipt
        assert receipt.reused["device"] and receipt.reused["peer"], receipt
        assert receipt.reused.get("host", 0) and receipt.reused.get("redis", 0), receipt
        assert receipt.computed_tokens == ALONE


def test_two_at_once_compute_a_prompt_once(cluster, big, text) -> None:
    prompt = text(LENGTH)
    want = big.generate(prompt, max_tokens=OUTPUTS, ignore_eos=True).token_ids
    with Client(cluster(workers=1, lenders=2, device_blocks=160, lender_blocks=160).address) as client:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda _: client.generate(prompt, max_tokens=OUTPUTS, ignore_eos=True), range(2)))
        assert [result.token_ids for result in results] == [want, want]
        computed = [result.receipt.computed_tokens for result in results]
        assert rows(client) == sum(computed)
        assert sum(computed) <= LENGTH + OUTPUTS - 1 + ALONE + 32, computed
