"""Bugs in keys, the prefix index, and the engine's books: what is reused, lost, replayed, released."""

from __future__ import annotations

import hashlib
from typing import Any

from kvbank.kvstore.hashing import token_bytes
from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.span_table import LOCAL
from tests.mutants.planted import Mutant


def without_tenant(real: Any) -> Any:
    return lambda secret, **named: real(secret, **{**named, "tenant": ""})


def without_model(real: Any) -> Any:
    return lambda secret, **named: real(secret, **{**named, "model_digest": ""})


def without_parent(real: Any) -> Any:
    """A block's key is a hash of its tokens, whatever came before."""
    def block_keys(root: bytes, token_ids: Any, block_size: int, *, parent: bytes | None = None) -> list[BlockKey]:
        data, step = token_bytes(token_ids), 4 * block_size
        return [BlockKey(hashlib.sha256(data[at : at + step]).digest()) for at in range(0, len(data) - len(data) % step, step)]
    return block_keys


def keeps_what_is_lost(real: Any) -> Any:
    def lose(self: Any, uid: int, reason: str) -> None:
        index, self._vault.index.withdraw = self._vault.index, lambda span: None
        try:
            real(self, uid, reason)
        finally:
            del index.withdraw
    return lose


def replays_one_block_late(real: Any) -> Any:
    def lose(self: Any, index: int, num_tokens: int) -> int:
        start = index * self.span_tokens
        before = self.holes.overlap(start, start + 8)
        lost: int = real(self, index, num_tokens)
        if not before and lost > 8:
            self.holes.fill(start, start + 8)
        return lost
    return lose


def replay_rewinds(real: Any) -> Any:
    """What is lost rewinds the sequence: everything from there on is a hole, but its spans stay."""
    def lose(self: Any, index: int, num_tokens: int) -> int:
        lost: int = real(self, index, num_tokens)
        for span in self.spans[index + 1 :]:
            if span is not None:
                span.keys.clear()
        return lost
    return lose


def rows_are_the_tail(real: Any) -> Any:
    """A replayed chunk gets the positions of the sequence's end (kv_len = sequence length)."""
    def plan_rows(self: Any, seq: Any, builder: Any, limit: int, now: float) -> int:
        first = len(builder)
        planned: int = real(self, seq, builder, limit, now)
        if planned and seq.lost and seq.table.holes.lowest[0] + planned < seq.num_tokens:
            builder._positions[first:] = range(seq.num_tokens - planned, seq.num_tokens)
        return planned
    return plan_rows


def frees_before_the_flip(real: Any) -> Any:
    """Lent spans leave their slots when the move begins."""
    def lend(self: Any, seq: Any, spans: Any) -> None:
        real(self, seq, spans)
        self._backend.scrub([span.slot for span in spans if span.place == LOCAL and span.slot is not None])
    return lend


def preempts_without_holes(real: Any) -> Any:
    def preempt(self: Any, seq: Any) -> None:
        holes = seq.table.holes.intervals()
        real(self, seq)
        seq.table.holes.fill(0, seq.num_tokens)
        for start, stop in holes:
            seq.table.holes.add(start, stop)
    return preempt


def cancel_forgets_the_spans(real: Any) -> Any:
    def remove(self: Any, seq: Any) -> None:
        if seq.num_output < seq.job.max_tokens:
            let_go, self._let_go = self._let_go, lambda seq: None
            try:
                real(self, seq)
            finally:
                self._let_go = let_go
        else:
            real(self, seq)
    return remove


def released_twice(real: Any) -> Any:
    def release(self: Any, span: Any) -> bool:
        if span.refs > 1:
            span.refs -= 1
        return bool(real(self, span))
    return release


def published_before_loaded(real: Any) -> Any:
    def load(self: Any, job: str, key: Any, slot: Any, start: int) -> Any:
        load, self._load = self._load, lambda payload, slot, start: None
        try:
            return real(self, job, key, slot, start)
        finally:
            self._load = load
    return load


def staging_is_not_given_back(real: Any) -> Any:
    def drop(self: Any, wants: Any) -> None:
        if wants is not None:
            wants.pending.clear()
            wants.staged.clear()
    return drop


def window_one_span_short(real: Any) -> Any:
    def release(self: Any, seq: Any) -> None:
        window, self._window = self._window, self._window - self._span
        try:
            real(self, seq)
        finally:
            self._window = window
    return release


def recall_is_obeyed_and_not_noted(real: Any) -> Any:
    def must_return(self: Any, event: Any) -> None:
        self._bank.settle([event.uid], keep=False)
    return must_return


def noise_of_the_step(real: Any) -> Any:
    """The noise of a draw hangs on the row it is drawn in."""
    return lambda row, params, position, *rest: real(row, params, row, *rest)


def claims_outlive_their_owner(real: Any) -> Any:
    def end(self: Any, seq: Any) -> Any:
        claims = dict(self._computing)
        unplaced = real(self, seq)
        self._computing.update(claims)
        return unplaced
    return end


ROOM, SCHEDULER, REUSE = "workers.room:Room.", "workers.scheduler:Scheduler.", "workers.reuse:Reuse."
MUTANTS = [
    Mutant("the tenant is not in the key", "Tenant a asks a text; tenant b asks the same and is answered from a's KV.",
           {"workers.assembly:root_key": without_tenant}),
    Mutant("the model is not in the key", "Two models share a Redis; the second finds the first one's KV under its keys.",
           {"workers.assembly:root_key": without_model}),
    Mutant("a key does not hang on what came before", "Two texts share their second block and not their first.",
           {"workers.reuse:block_keys": without_parent, "kvstore.frame:block_keys": without_parent}),
    Mutant("the prefix index keeps a lost span", "A lender dies; a new job finds the dead span by key and reads nowhere.",
           {ROOM + "lose": keeps_what_is_lost}),
    Mutant("a replay begins one block late", "Span 2 is lost; blocks 1 to 3 of it are computed again, block 0 stays zero.",
           {"kvstore.span_table:SpanTable.lose": replays_one_block_late}),
    Mutant("a loss rewinds the sequence", "Span 2 is lost; spans 3 and 4 are taken for unwritten, and are not found by key again "
           "though they are listed.", {"kvstore.span_table:SpanTable.lose": replay_rewinds}),
    Mutant("replayed rows sit at the sequence's end", "Span 2 is computed again with the positions of the last tokens, and sees "
           "what comes after it.", {SCHEDULER + "_plan_rows": rows_are_the_tail}),
    Mutant("a slot is given up before its copy is sealed", "A span begins to move; its slot is blank before the lender has it, "
           "and is still read.", {ROOM + "_lend": frees_before_the_flip}),
    Mutant("a preempted job remembers KV that it gave up", "The youngest job is preempted and comes back; what it computed "
           "counts "
           "as there.", {SCHEDULER + "_preempt": preempts_without_holes}),
    Mutant("cancel leaks slots", "A job is cancelled; its spans stay held for ever.",
           {SCHEDULER + "remove": cancel_forgets_the_spans}),
    Mutant("a release counts twice", "Two jobs share a span, one ends, and the span is idle while the other reads it.",
           {"kvstore.vault:Vault.release": released_twice}),
    Mutant("published before its bytes are there", "A span comes from Redis; it is listed, credited and read, and its slot is "
           "empty.", {"workers.fetcher:TierFetcher.load": published_before_loaded}),
    Mutant("staging leaks when a job ends", "A job is cancelled with fetched spans in staging; their room is never given back.",
           {"workers.fetcher:TierFetcher._drop": staging_is_not_given_back}),
    Mutant("the window lets go one span early", "A sliding window still sees the span that is released behind it.",
           {SCHEDULER + "_release_behind_window": window_one_span_short}),
    Mutant("a recalled span is settled and still read", "A lender recalls; the borrower settles at once, and its span table "
           "still points there.", {ROOM + "_must_return": recall_is_obeyed_and_not_noted}),
    Mutant("noise hangs on the batch", "A seeded job draws other tokens when another job sits before it in the batch.",
           {"workers.batch:Draw": noise_of_the_step}),
    Mutant("claims outlive their owner", "An older job that would compute a prefix is cancelled; its claim stays for ever.",
           {REUSE + "end": claims_outlive_their_owner}),
]
