"""Reuse: fills the holes of a sequence from what already exists, nearest first.

    device (this worker's index)  ->  peer (adopted where it lies)  ->  host, disk, Redis (fetched)  ->  compute it

And single flight: of two running jobs with a common prefix the older computes it and the younger waits, span by span.

Knows keys and places; decides nothing about whose turn it is. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvbank.kvstore.hashing import block_keys
from kvbank.kvstore.layout import BlockKey
from kvbank.kvstore.prefix_index import Hit
from kvbank.kvstore.span_table import HOST, LOCAL, REMOTE, Holes, Span
from kvbank.kvstore.vault import Vault
from kvbank.workers.seams import Backend, Bank, Fetcher
from kvbank.workers.sequence import RUNNING, Sequence

SOURCE = {LOCAL: "device", REMOTE: "peer", HOST: "host"}


class Reuse:
    """One per engine."""

    def __init__(
        self, vault: Vault, backend: Backend, bank: Bank, fetcher: Fetcher, *,
        root_of: Callable[[str], BlockKey], block_size: int, span_tokens: int, window: int | None,
    ) -> None:
        """root_of: JobSpec.key_space -> root key. window: the widest one when every layer has one, else None."""
        self._vault, self._backend, self._bank, self._fetcher = vault, backend, bank, fetcher
        self._root_of = root_of
        self._block, self._span, self._window = block_size, span_tokens, window
        self._bps = span_tokens // block_size
        self._computing: dict[BlockKey, Sequence] = {}
        self._uncredited: dict[str, Holes] = {}       # per job: prompt positions no source was named for yet
        self._reason: dict[str, str] = {}             # per job: why the hole it computes now was not found
        self._adopting: set[str] = set()              # jobs whose peers have not all answered
        self._wanted: dict[str, set[BlockKey]] = {}   # per job: what the fetcher was asked for, and its place is empty yet

    # -- a job's life ------------------------------------------------------------------------------------------------

    def begin(self, seq: Sequence, now: float) -> None:
        """Hash the sequence, look at peers and tiers for what the device lacks, and claim what is left to compute."""
        uncredited = Holes()
        uncredited.add(0, seq.num_prompt)
        self._uncredited.setdefault(seq.job.id, uncredited)
        self.extend_keys(seq)
        usable = seq.keys[: (seq.num_tokens - 1) // self._block]
        for key in usable:
            self._computing.setdefault(key, seq)
        missing = self._missing(seq, usable)
        if not missing:
            return
        keys = [usable[last] for _, last in missing]
        tokens = [seq.token_bytes(first * self._block, (last + 1) * self._block) for first, last in missing]
        self._fetcher.want(seq.job.id, keys, tokens, now=now)
        self._wanted[seq.job.id] = set(keys)
        self._ask_peers(seq, [usable[last] for first, last in missing if last - first + 1 == self._bps])

    def hold(self, seq: Sequence) -> None:
        """The sequence starts to run: hold every whole span of it that this worker has, wherever in the sequence, before
        the slots that it takes for the others drive them out."""
        if self._window is not None:
            return
        usable = (seq.num_tokens - 1) // self._block
        for index in range(usable // self._bps):
            start = index * self._span
            if seq.table.at(index) is None:
                self._fill_from_device(seq, index, start, seq.keys[index * self._bps : (index + 1) * self._bps], whole=True)

    def adopt_ended(self, job: str) -> None:
        self._adopting.discard(job)

    def end(self, seq: Sequence) -> list[Span]:
        """The sequence stops running: others need not wait for it. Returns what it adopted and never placed: it goes back."""
        for key in [key for key, owner in self._computing.items() if owner is seq]:
            del self._computing[key]
        self._fetcher.forget(seq.job.id)
        self._wanted.pop(seq.job.id, None)
        self._adopting.discard(seq.job.id)
        unplaced = [span for span in seq.adopted.values() if not span.refs]
        seq.adopted.clear()
        return unplaced

    def forget(self, seq: Sequence) -> None:
        """The job is over."""
        self._uncredited.pop(seq.job.id, None)
        self._reason.pop(seq.job.id, None)

    def extend_keys(self, seq: Sequence) -> None:
        """Hash the full blocks that have none yet."""
        done = len(seq.keys)
        if not done and seq.job.keys:
            seq.keys = list(seq.job.keys[: seq.num_prompt // self._block])
            done = len(seq.keys)
        full = seq.num_tokens // self._block
        if full > done:
            root = self._root_of(seq.job.key_space)
            parent = seq.keys[-1] if done else None
            seq.keys += block_keys(root, seq.token_ids[done * self._block : full * self._block], self._block, parent=parent)

    def drop_fetched(self, keys: Iterable[BlockKey]) -> None:
        """What was fetched under these keys, or is on its way, is not used."""
        for key in keys:
            for job, wanted in self._wanted.items():
                if key in wanted:
                    wanted.discard(key)
                    self._fetcher.drop(job, key)

    # -- before a sequence computes ----------------------------------------------------------------------------------

    def fill(self, seq: Sequence, now: float, *, whole: bool = False) -> str:
        """Fill holes from the lowest on until one must be computed. Returns '' or what to wait for instead:
        'prefix' (an older job computes it), 'fetch' (bytes are on their way). Raises OutOfSlots.

        whole: of the device's spans only whole ones. A copy of some blocks takes a slot beside the one they lie in.
        """
        if seq.is_decoding and seq.num_tokens != seq.num_prompt:
            return ""
        if self._window is not None and len(seq.table.holes) == seq.num_tokens:
            self._fill_window(seq)
        usable = (seq.num_tokens - 1) // self._block
        while True:
            hole = seq.table.holes.lowest[0]
            index, block = hole // self._span, hole // self._block
            if hole % self._block or block >= usable:
                return ""
            group = seq.keys[index * self._bps : min((index + 1) * self._bps, usable)]
            if self._fill_from_device(seq, index, hole, group, whole=whole) or self._fill_from_peer(seq, index, hole, group):
                continue
            reason = self._fill_from_tiers(seq, index, hole, group, now)
            if reason == "filled":
                continue
            if reason in ("fetch", "prefix"):
                return reason
            if self._older_computes(seq, block):
                return "prefix"
            self._reason[seq.job.id] = reason
            return ""

    def note_computed(self, seq: Sequence, start: int, stop: int) -> None:
        """These positions were computed: the first time, the receipt says why they were not reused."""
        self._no_longer_wanted(seq, start, stop)
        uncredited = self._uncredited.get(seq.job.id)
        if uncredited and (tokens := uncredited.overlap(start, stop)):
            tail = max(0, min(stop, seq.num_prompt) - max(start, (seq.num_prompt - 1) // self._block * self._block))
            seq.tally.missed["last_block"] += min(tail, tokens)
            if tokens > tail:
                seq.tally.missed[self._reason.get(seq.job.id, "never_seen")] += tokens - tail
            uncredited.fill(start, stop)

    def publish(self, seq: Sequence, start: int, stop: int) -> None:
        """List the blocks that became full when start .. stop-1 were computed."""
        if stop // self._block == start // self._block and stop % self._block:
            return
        self.extend_keys(seq)
        for index in range(start // self._span, (stop - 1) // self._span + 1):
            span = seq.table.at(index)
            if span is None or span.place != LOCAL:
                continue
            self._note_tail(seq, index, span)
            while len(span.keys) < self._bps:
                block = index * self._bps + len(span.keys)
                first, last = block * self._block, (block + 1) * self._block
                if block >= len(seq.keys) or seq.table.holes.overlap(first, last):
                    break
                parent = seq.keys[block - 1] if block else self._root_of(seq.job.key_space)
                self._vault.index.publish(span, seq.keys[block], seq.token_bytes(first, last), parent)

    def _note_tail(self, seq: Sequence, index: int, span: Span) -> None:
        """The same prompt asked again can use this span's blocks up to the prompt's last one."""
        usable = (seq.num_prompt - 1) // self._block
        if index == usable // self._bps:
            span.tail_blocks = max(span.tail_blocks, usable % self._bps)

    # -- the sources -------------------------------------------------------------------------------------------------

    def _fill_from_device(
        self, seq: Sequence, index: int, hole: int, group: list[BlockKey], *, whole: bool = False
    ) -> bool:
        start = index * self._span
        hits = self._vault.index.match(group, tokens=seq.token_bytes(start, start + len(group) * self._block))
        if not hits or start + hits[0].blocks * self._block <= hole:
            return False
        hit = hits[0]
        if hit.blocks == self._bps and seq.table.at(index) is None:
            if not self._vault.hold(hit.span):
                return False
            seq.table.put(index, hit.span)
            if hit.span.place == REMOTE:
                seq.tally.lenders.setdefault(hit.span.lender)
            self._credit(seq, start, start + self._span, SOURCE[hit.span.place])
            return True
        return not whole and self._copy_blocks(seq, index, hole, hit)

    def _copy_blocks(self, seq: Sequence, index: int, hole: int, hit: Hit) -> bool:
        """Only part of a span is common: its blocks are copied into a span of our own."""
        mine = seq.table.at(index)
        if hit.span.place != LOCAL or hit.span is mine or not self._vault.hold(hit.span):
            return False
        start, stop = index * self._span, index * self._span + hit.blocks * self._block
        try:                                   # held until copied: neither our own slot nor a loan may evict it
            if mine is None:
                (mine,) = self._vault.new_spans(1, seq.owner)
                seq.table.put(index, mine)
            assert hit.span.slot is not None and mine.slot is not None
            self._backend.copy_tokens(hit.span.slot, mine.slot, hole - start, stop - start)
        finally:
            self._vault.release(hit.span)
        self._credit(seq, hole, stop, "device")
        self.publish(seq, hole, stop)
        return True

    def _fill_from_peer(self, seq: Sequence, index: int, hole: int, group: list[BlockKey]) -> bool:
        start = index * self._span
        if len(group) < self._bps or hole != start or seq.table.at(index) is not None:
            return False
        span = seq.adopted.pop(group[-1], None)
        if span is None or span.place != REMOTE:
            return False
        span.refs += 1
        self._vault.index.adopt(span)
        seq.table.put(index, span)
        self._credit(seq, start, start + self._span, "peer")
        return True

    def _fill_from_tiers(self, seq: Sequence, index: int, hole: int, group: list[BlockKey], now: float) -> str:
        """'filled', 'fetch' (wait), or the reason of the miss."""
        start = index * self._span
        whole = len(group) == self._bps and hole == start and seq.table.at(index) is None
        key = group[-1] if whole else group[(hole - start) // self._block]
        if whole and seq.job.id not in self._adopting and self._bank.left([key]):
            # Another job had it here when this one was begun, ended, and gave it back to its lender.
            rest = seq.keys[(index + 1) * self._bps - 1 : (seq.num_tokens - 1) // self._block : self._bps]
            self._ask_peers(seq, [key for key in self._bank.left(rest) if self._vault.index.find(key) is None])
        state = self._fetcher.state(seq.job.id, key, now=now)
        self._wanted.setdefault(seq.job.id, set()).add(key)
        if state == "here":
            mine = seq.table.at(index)
            if mine is None:
                (mine,) = self._vault.new_spans(1, seq.owner)
                seq.table.put(index, mine)
            assert mine.slot is not None
            source = self._fetcher.load(seq.job.id, key, mine.slot, hole - start)
            self._wanted[seq.job.id].discard(key)
            if source is not None:
                stop = start + self._span if whole else hole + self._block
                self._credit(seq, hole, stop, source)
                self.publish(seq, hole, stop)
                return "filled"
            return "evicted"
        if state == "coming" or (whole and seq.job.id in self._adopting):
            return "fetch"
        return state

    def _ask_peers(self, seq: Sequence, keys: list[BlockKey]) -> None:
        if keys and self._bank.adopt(seq.job.id, keys, tenant=seq.job.tenant, age=seq.job.age):
            self._adopting.add(seq.job.id)

    def _fill_window(self, seq: Sequence) -> None:
        """Every layer sees only the last `window` tokens: a hit needs just the spans that the window still sees."""
        assert self._window is not None
        usable = (seq.num_tokens - 1) // self._block
        for end in range(usable // self._bps, 0, -1):
            first = max(0, (end * self._span - self._window + 1) // self._span)
            spans = [self._vault.index.find(seq.keys[(i + 1) * self._bps - 1]) for i in range(first, end)]
            if all(span is not None and len(span.keys) == self._bps for span in spans) and self._hold_all(spans):
                for index, span in enumerate(spans, first):
                    seq.table.put(index, span)
                seq.table.released = first
                self._credit(seq, 0, end * self._span, "device")
                return

    def _hold_all(self, spans: Iterable[Span | None]) -> bool:
        """All of them or none."""
        held: list[Span] = []
        for span in spans:
            if span is None or not self._vault.hold(span):
                for one in held:
                    self._vault.release(one)
                return False
            held.append(span)
        return True

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def _missing(self, seq: Sequence, usable: list[BlockKey]) -> list[tuple[int, int]]:
        """(first, last) block of what the device lacks: whole spans, then the tail's blocks one by one."""
        have = 0
        for hit in self._vault.index.match(usable):
            have += hit.blocks
        have -= have % self._bps
        whole = len(usable) - len(usable) % self._bps
        spans = [(b, b + self._bps - 1) for b in range(have, whole, self._bps)]
        return spans + [(b, b) for b in range(max(whole, have), len(usable))]

    def _older_computes(self, seq: Sequence, block: int) -> bool:
        key = seq.keys[block]
        owner = self._computing.get(key)
        if owner is None or owner is seq or owner.state != RUNNING:
            self._computing[key] = seq
            return False
        still_to_do = owner.table.holes.overlap(block * self._block, (block + 1) * self._block)
        return bool(still_to_do) and owner.age < seq.age

    def _no_longer_wanted(self, seq: Sequence, start: int, stop: int) -> None:
        """Positions start .. stop-1 are filled: what the fetcher has of them, or of a span that is no longer empty, would
        only keep room in staging from others."""
        if not (wanted := self._wanted.get(seq.job.id)):
            return
        ends = ((index + 1) * self._bps - 1 for index in range(start // self._span, (stop - 1) // self._span + 1))
        for block in dict.fromkeys([*range(start // self._block, (stop - 1) // self._block + 1), *ends]):
            if block < len(seq.keys) and (key := seq.keys[block]) in wanted:
                wanted.discard(key)
                self._fetcher.drop(seq.job.id, key)

    def _credit(self, seq: Sequence, start: int, stop: int, source: str) -> None:
        self._no_longer_wanted(seq, start, stop)
        seq.table.holes.fill(start, stop)
        seq.lost.fill(start, stop)
        uncredited = self._uncredited[seq.job.id]
        if tokens := uncredited.overlap(start, stop):
            seq.tally.reused[source] += tokens
            uncredited.fill(start, stop)
