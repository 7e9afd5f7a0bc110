"""Clocked jobs: what one job costs, seen by the client, through the whole stack."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvbank import Client, Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocked:
    """One job from before its submission to its last token."""

    ttft_s: float                    # to the first delta that brings a token
    decode_s: float                  # from there to the last one
    decoded: int                     # tokens that came in that time
    receipt: Receipt

    @property
    def tokens_per_s(self) -> float:
        return self.decoded / self.decode_s


def clock(client: Client, prompt: list[int], max_tokens: int) -> Clocked:
    """Run one greedy job to its end."""
    arrived: list[tuple[float, int]] = []
    began, tokens = time.perf_counter(), 0
    job = client.submit(prompt, max_tokens=max_tokens, ignore_eos=True)
    for delta in job.stream():
        if not delta.token_ids:
            continue
        tokens += len(delta.token_ids)
        arrived.append((time.perf_counter(), tokens))
    first, last = arrived[0], arrived[-1]
    return Clocked(ttft_s=first[0] - began, decode_s=last[0] - first[0], decoded=last[1] - first[1],
                   receipt=job.result().receipt)


def texts(vocab: int, seed: int = 0) -> Callable[[int], list[int]]:
    """A source of prompts: every call gives other tokens."""
    rng = random.Random(seed)
    return lambda length: [rng.randrange(vocab) for _ in range(length)]
