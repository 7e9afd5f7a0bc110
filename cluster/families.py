"""Families: every metric of /metrics, once: its name, kind, labels and meaning. docs/metrics.md is made from this table.

    python -m kvbank.cluster.families > docs/metrics.md

A ratio is always two counters, so that whoever asks chooses the window. A label's values are few and ours: members, tiers,
reasons; of tenants only the first `MAX_TENANTS` have a name of their own. No label is what a caller wrote.

`told` joins a family to the counters that members report (Jobs.Status): (their name, the value of the last label). A name
that ends in * stands for all that begin so, and what the star hides is the value.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_TENANTS = 32                     # names of tenants in labels; later ones count as OTHER
OTHER = "other"
COUNTER, GAUGE, HISTOGRAM, SUMMARY = "counter", "gauge", "histogram", "summary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric. `name` is what queries say, so a counter's ends in _total."""

    name: str
    kind: str
    about: str
    labels: tuple[str, ...] = ()
    told: tuple[tuple[str, str], ...] = ()


def _one(kind: str, name: str, labels: str, about: str, *told: str | tuple[str, str]) -> Family:
    pairs = tuple((said, "") if isinstance(said, str) else said for said in told)
    return Family(name=f"kvbank_{name}", kind=kind, about=about, labels=tuple(labels.split()), told=pairs)


GATEWAY: tuple[Family, ...] = (
    _one(GAUGE, "build_info", "version model", "Always 1; which version serves which model"),
    _one(GAUGE, "jobs", "state", "Jobs of the gateway that are not over: queued or running"),
    _one(GAUGE, "jobs_limit", "", "Jobs the gateway carries at most; one more is refused as overloaded"),
    _one(COUNTER, "jobs_admitted_total", "model tenant", "Jobs admitted"),
    _one(COUNTER, "jobs_ended_total", "model tenant outcome", "Jobs over: stop, length, or the code of their error"),
    _one(COUNTER, "requests_refused_total", "code", "Requests that kvbank answered with an error, by its code"),
    _one(COUNTER, "attempts_lost_total", "reason", "Attempts of jobs that a worker did not finish; the job goes on elsewhere"),
    _one(COUNTER, "prompt_tokens_total", "model tenant", "Prompt tokens of jobs over: the lookups of the hit ratio"),
    _one(COUNTER, "reused_tokens_total", "model tenant source",
         "Prompt tokens not computed, by where their KV was: the hits of the hit ratio"),
    _one(COUNTER, "missed_tokens_total", "model tenant reason", "Prompt tokens computed, by why their KV was not there"),
    _one(COUNTER, "computed_tokens_total", "model tenant", "Tokens computed for jobs over"),
    _one(COUNTER, "output_tokens_total", "model tenant", "Tokens streamed"),
    _one(COUNTER, "replayed_tokens_total", "model", "Tokens of jobs over that were computed again after a fault"),
    _one(HISTOGRAM, "ttft_seconds", "model", "From admission to the first token"),
    _one(HISTOGRAM, "inter_token_seconds", "model", "From one token to the next, as they arrive at the gateway"),
    _one(HISTOGRAM, "job_seconds", "model", "From admission to the end"),
)

MEMBERS: tuple[Family, ...] = (
    _one(GAUGE, "members", "kind state", "Members by kind (model, lender) and state (ok, silent)"),
    _one(GAUGE, "members_expected", "kind", "Members that the settings ask for"),
    _one(GAUGE, "member_up", "worker kind", "1 while the member answers, 0 while it is silent; members that left are absent"),
    _one(GAUGE, "member_capacity_blocks", "worker", "KV blocks of the member's device"),
    _one(GAUGE, "member_blocks", "worker state", "KV blocks of the device: free (blank or idle cache), used by its jobs, lent"),
    _one(GAUGE, "member_pinned_blocks", "worker", "KV blocks of the device that ops pinned: evicted after all others",
         "blocks_pinned"),
    _one(GAUGE, "member_borrowed_blocks", "worker", "KV blocks the member holds at others"),
    _one(GAUGE, "member_loans", "worker", "Loans open, by lender"),
    _one(GAUGE, "member_resident_bytes", "worker", "Memory of the member's process", "resident_bytes"),
    _one(GAUGE, "member_jobs", "worker state", "Jobs on the member: running, waiting",
         ("jobs_running", "running"), ("jobs_waiting", "waiting")),
    _one(GAUGE, "member_pending_tokens", "worker", "Tokens of its jobs whose KV is not there yet", "tokens_pending"),
    _one(COUNTER, "member_steps_total", "worker", "Steps of the engine", "steps"),
    _one(COUNTER, "member_forward_rows_total", "worker", "Rows computed; over the steps: the mean batch", "forward_rows"),
    _one(COUNTER, "member_forward_seconds_total", "worker", "Seconds in the model's forward", "forward_s"),
    _one(COUNTER, "member_step_seconds_total", "worker", "Seconds in steps, forward included", "step_s"),
    _one(COUNTER, "member_preemptions_total", "worker", "Jobs sent back to the queue to make room", "preemptions"),
    _one(COUNTER, "member_replayed_tokens_total", "worker", "Tokens computed again because their KV was lost", "replayed_tokens"),
    _one(COUNTER, "member_chain_sessions_total", "worker", "Times a shard that does not lead was taken up by its leader",
         "sessions"),
    _one(COUNTER, "store_missed_total", "worker reason", "Frames that the tiers were asked for and did not have, by reason",
         ("store_missed_*", "")),
    _one(COUNTER, "attend_calls_total", "worker", "Questions for partial attention sent to lenders", "remote_attention_calls"),
    _one(COUNTER, "attend_bytes_total", "worker direction", "Bytes of the hot stream at the borrower",
         ("attend_bytes_sent", "sent"), ("attend_bytes_received", "received")),
    _one(COUNTER, "attend_served_total", "worker", "Questions for partial attention answered as lender",
         "remote_attention_served"),
    _one(COUNTER, "attend_served_rows_total", "worker", "Query rows answered as lender", "remote_attention_rows"),
    _one(COUNTER, "attend_served_bytes_total", "worker direction", "Bytes of the hot stream at the lender",
         ("attend_bytes_in", "received"), ("attend_bytes_out", "sent")),
    _one(COUNTER, "attend_stale_total", "worker", "Spans asked for under a promise that was over", "attend_stale"),
    _one(COUNTER, "attend_tainted_total", "worker", "Lent spans whose bytes were no longer those that were sealed",
         "attend_tainted"),
    _one(COUNTER, "logged_errors_total", "worker", "Errors that the member's process, or `gateway`'s, has logged since it "
         "started: what it survived. Those of the launcher and of control stand in their logs alone", "logged_errors"),
)

LOANS: tuple[Family, ...] = (
    _one(COUNTER, "loans_asked_total", "worker", "Loans asked for, by borrower", "book_loans_asked"),
    _one(COUNTER, "loans_opened_total", "worker", "Loans received, by borrower", "book_loans_opened"),
    _one(COUNTER, "loans_denied_total", "worker reason", "Loans that were refused to this borrower", ("book_refused_*", "")),
    _one(COUNTER, "loans_granted_total", "worker", "Loans granted, by lender", "ledger_loans"),
    _one(COUNTER, "loans_refused_total", "worker reason", "Loans that this lender refused", ("ledger_refused_*", "")),
    _one(COUNTER, "loan_recalls_total", "worker", "Spans the lender called back", "ledger_recalls"),
    _one(COUNTER, "loan_spans_total", "worker event", "Lent spans, by lender: granted, and sealed once their bytes had come",
         ("ledger_slots_granted", "granted"), ("ledger_slots_sealed", "sealed")),
    _one(COUNTER, "loan_spans_ended_total", "worker reason",
         "Lent spans whose promise ended, by lender; settled is how it should be", ("ledger_revoked_*", "")),
    _one(COUNTER, "loan_faults_total", "worker reason", "What should not happen at a lender",
         ("ledger_stale_reads", "stale_read"), ("ledger_stale_puts", "stale_put"), ("ledger_bad_digests", "bad_digest"),
         ("ledger_slow_pins", "slow_pin")),
    _one(COUNTER, "borrowed_spans_lost_total", "worker reason", "Borrowed spans that were lost and are computed again",
         ("book_lost_*", "")),
    _one(COUNTER, "borrowed_spans_total", "worker event",
         "What happened to borrowed spans: home (called back and there again), adopted, moved, bad_copy",
         ("book_spans_home", "home"), ("book_spans_adopted", "adopted"), ("book_spans_moved", "moved"),
         ("book_bad_copies", "bad_copy")),
    _one(COUNTER, "borrowed_spans_back_total", "worker reason", "Borrowed spans on their way home, by why", ("book_back_*", "")),
)

TIERS: tuple[Family, ...] = (
    _one(GAUGE, "tier_bytes", "worker tier", "Bytes in the tier; redis is one for all members, so take the maximum"),
    _one(GAUGE, "tier_limit_bytes", "worker tier", "Bytes the tier may hold"),
    _one(GAUGE, "tier_frames", "worker tier", "Frames in the tier"),
    _one(GAUGE, "tier_breaker", "worker tier state", "1 for the state the tier is in: ok, half_open, open, off"),
    _one(GAUGE, "tier_pinned_bytes", "worker tier", "Bytes that running jobs keep in the tier", "bytes_pinned"),
    _one(COUNTER, "tier_lookups_total", "worker tier", "Frames the tier was asked for", "lookups"),
    _one(COUNTER, "tier_hits_total", "worker tier", "Frames that came, verified", "found"),
    _one(SUMMARY, "tier_read_seconds", "worker tier", "Reading from the tier, verification included: reads and their seconds",
         ("reads", "count"), ("read_us", "sum")),
    _one(COUNTER, "tier_puts_total", "worker tier", "Frames stored", "puts"),
    _one(COUNTER, "tier_put_bytes_total", "worker tier", "Bytes stored", "bytes_put"),
    _one(COUNTER, "tier_evictions_total", "worker tier", "Frames driven out to make room", "evicted", "released_for_room"),
    _one(COUNTER, "tier_refused_total", "worker tier reason", "Frames and commands the tier refused", ("refused_*", "")),
    _one(COUNTER, "tier_integrity_total", "worker tier", "Frames that were not what was stored: dropped, and missed",
         "integrity"),
    _one(COUNTER, "tier_faults_total", "worker tier reason", "Requests without an answer", ("timeouts", "timeout"),
         ("lost", "lost"), ("not_asked", "not_asked"), ("no_connection_free", "no_connection")),
    _one(COUNTER, "tier_breaker_opened_total", "worker tier", "Times the breaker opened", "breaker_opened"),
    _one(GAUGE, "write_behind_bytes", "worker tier", "Bytes that wait to be written to the tier", "write_behind_bytes"),
    _one(COUNTER, "write_behind_frames_total", "worker tier outcome", "Frames that left the queue of writes",
         ("write_behind_stored", "stored"), ("write_behind_lost", "lost"), ("write_behind_dropped_*", "")),
)

REST: tuple[Family, ...] = (
    _one(COUNTER, "member_events_total", "worker event", "Counters of a member that have no family of their own", ("*", "")),
    _one(COUNTER, "tier_events_total", "worker tier event", "Counters of a tier that have no family of their own", ("*", "")),
)

# Members begin to tell some counters with the first event. Shown as 0 until then: Prometheus sees no increase in a series
# that is born with its first event. By the kind of the member, or the name of the tier.
_LENDER = tuple(f"ledger_{said}" for said in (
    "loans", "slots_granted", "slots_sealed", "recalls", "stale_reads", "stale_puts", "bad_digests", "revoked_settled",
    "revoked_term", "revoked_recall", "revoked_gone", "revoked_digest", "refused_FULL", "refused_CAP"))
_BORROWER = tuple(f"book_{said}" for said in (
    "loans_asked", "loans_opened", "spans_home", "spans_moved", "lost_gone", "lost_silent", "lost_stale", "lost_missing",
    "lost_recall", "lost_tainted"))
BEGIN: dict[str, tuple[str, ...]] = {
    "lender": _LENDER,
    "model": _LENDER + _BORROWER,
    "host": ("puts", "bytes_put", "evicted"),
    "redis": ("timeouts", "lost", "not_asked", "breaker_opened", "write_behind_stored", "write_behind_lost",
              "write_behind_dropped_full"),
}
BEGIN_CODES = ("invalid_request", "too_long", "unauthorized", "forbidden", "not_found", "overloaded", "unavailable", "internal")
BEGIN_LOST = ("unavailable", "silent", "stream_ended")

SECTIONS: tuple[tuple[str, str, tuple[Family, ...]], ...] = (
    ("Jobs", "Counted by the gateway; over all members, since the gateway started.", GATEWAY),
    ("Members", "What each member says of itself when it is asked; a member that was started again counts from 0.", MEMBERS),
    ("Loans", "Who lent, who borrowed, and how it ended.", LOANS),
    ("Tiers", "What lies below the device.", TIERS),
    ("The rest", "So that a new counter of a member is never lost.", REST),
)
ALL: dict[str, Family] = {family.name: family for _, _, families in SECTIONS for family in families}


class Names:
    """The first `limit` values of a label keep their name; whoever comes later is OTHER. Bounds what a scrape may cost."""

    def __init__(self, limit: int = MAX_TENANTS) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(value)
        return value


def page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics", "",
        "`GET /metrics` of the gateway, in Prometheus' text format, for keys with the role ops. Made from "
        "`cluster/families.py`; do not edit it here.", "",
        "A ratio is two counters: the share of prompt tokens that were not computed is "
        "`sum(rate(kvbank_reused_tokens_total[5m])) / sum(rate(kvbank_prompt_tokens_total[5m]))`. "
        f"Seconds and bytes throughout. At most {MAX_TENANTS} tenants have a name in labels; later ones are `{OTHER}`. "
        "`worker` is a member's id as `kvbank status` shows it. No label holds what a caller wrote.", "",
        "Alerts on these are in `deploy/alerts.yml`, a dashboard in `deploy/grafana/kvbank.json`.", "",
    ]
    for title, about, families in SECTIONS:
        lines += [f"## {title}", "", about, "", "| Name | Kind | Labels | What |", "|---|---|---|---|"]
        lines += [f"| `{f.name}` | {f.kind} | {', '.join(f'`{label}`' for label in f.labels) or '-'} | {f.about} |"
                  for f in families]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
