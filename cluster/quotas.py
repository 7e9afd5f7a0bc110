"""Quotas: what one tenant may have running at once, and how many tokens it may ask for per second.

A token bucket per tenant that fills at `tokens_per_s` and holds `BURST_S` seconds' worth. A job costs its prompt and its
max_tokens when it is admitted; one that is larger than the bucket is let through when the bucket is full, and leaves it in
debt. Pure: time comes in. Tenants come from authentication, so there are as many as keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbank.errors import InvalidRequest, Overloaded

BURST_S = 10.0                               # what may be asked for at once after a pause, in seconds of the rate


@dataclass(slots=True)
class _Account:
    jobs: int = 0
    tokens: float = 0.0                      # in the bucket; below 0: a large job is being paid off
    at: float = 0.0


class Quotas:
    """Limits that are None do not limit."""

    def __init__(self, *, jobs: int | None = None, tokens_per_s: float | None = None) -> None:
        self._jobs, self._rate = jobs, tokens_per_s
        self._accounts: dict[str, _Account] = {}

    def admit(self, tenant: str, tokens: int, now: float, *, jobs: int = 1) -> None:
        """Count the jobs of one request in, all or none; tokens: of all of them. Raises Overloaded when the tenant has had its
        share for now, InvalidRequest when it can never have so many jobs at once."""
        account = self._accounts.get(tenant) or _Account(tokens=(self._rate or 0.0) * BURST_S, at=now)
        if self._jobs is not None and jobs > self._jobs:
            raise InvalidRequest(f"this request has {jobs} choices, and this tenant may have {self._jobs} jobs at once; "
                                 "ask for fewer")
        if self._jobs is not None and account.jobs + jobs > self._jobs:
            raise Overloaded(f"this tenant has {account.jobs} jobs waiting or running, which is its limit; "
                             "retry when one is over")
        if self._rate is not None:
            full = self._rate * BURST_S
            filled = min(full, account.tokens + (now - account.at) * self._rate)
            if filled < min(tokens, full):
                wait_s = (min(tokens, full) - filled) / self._rate
                raise Overloaded(f"this tenant may ask for {self._rate:g} tokens per second, prompts and outputs together; "
                                 f"these {tokens} can be taken in {wait_s:.1f} s", retry_after_s=wait_s)
            account.tokens, account.at = filled - tokens, now
        account.jobs += jobs
        self._accounts[tenant] = account

    def release(self, tenant: str) -> None:
        """A job that was counted in is over."""
        account = self._accounts[tenant]
        account.jobs -= 1
        if not account.jobs and self._rate is None:
            del self._accounts[tenant]
