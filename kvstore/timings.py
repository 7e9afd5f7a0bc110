"""LoanTimings: every duration of the loan protocol, in one place. Seconds on one's own monotonic clock, never compared
across nodes. Safety never rests on them (names and pins do); they only decide when to give up.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbank.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoanTimings:
    """Defaults are the protocol's; tests that do not test expiry use `term_s=30`."""

    term_s: float = 6.0                # lender: a loan ends this long after the last Renew that kept it arrived
    renew_s: float = 1.5               # borrower: one Renew per lender this often, while it owes something there
    fill_s: float = 3.0                # lender: a HELD slot without new bytes for this long is taken back
    borrow_retry_s: float = 0.3        # borrower: the same Borrow again
    borrow_give_up_s: float = 1.0      # borrower: no answer, ask the next candidate
    borrow_candidates: int = 3         # lenders asked in turn before a want is given up
    put_retry_s: float = 0.5           # borrower: the same Put or Fetch again
    put_give_up_s: float = 3.0         # borrower: the span stays where it is
    attend_hedge_s: float = 0.25       # borrower: no Partial yet, open a second connection and say Hello
    attend_lost_s: float = 1.0         # borrower: no Partial yet, the spans there are lost
    recall_urgent_s: float = 2.0
    recall_calm_s: float = 10.0
    recall_drain_s: float = 60.0
    recall_repeat_s: float = 0.5       # lender: the same Recall again until settled
    drop_share: float = 0.8            # borrower: of a recall's time; what found no place by then is dropped
    quarantine_s: float = 10.0         # no new loan between a pair after a recall or a loss by silence
    direct_share: float = 0.8          # one-sided lanes stop reading at this share of the term
    slow_pin_s: float = 1.0            # lender: a revoked slot pinned for longer raises a counter
    gone_refusals: int = 3             # connects refused within gone_within_s that prove a peer gone
    gone_within_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < 2 * self.renew_s <= self.term_s:
            raise ConfigError(
                f"renew_s {self.renew_s} must be at most half of term_s {self.term_s}: else one lost Renew ends loans")
        if not 0 < self.borrow_retry_s <= self.borrow_give_up_s:
            raise ConfigError(
                f"borrow_retry_s {self.borrow_retry_s} must not exceed borrow_give_up_s {self.borrow_give_up_s}")
        if not 0 < self.put_retry_s <= self.put_give_up_s:
            raise ConfigError(f"put_retry_s {self.put_retry_s} must not exceed put_give_up_s {self.put_give_up_s}")
