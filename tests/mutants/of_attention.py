"""Bugs on the way of bytes and sums: attention at lenders, moves home, slots, frames, Redis."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

from kvbank.kvstore import frame
from tests.mutants.planted import Mutant, nothing


def any_answer_will_do(real: Any) -> Any:
    """_receive with the check of the step left out."""
    def receive(self: Any, part: Any, layer: int) -> Any:
        remembered = self._step

        class AnyStep(int):
            def __eq__(self, other: object) -> bool:
                return True
            __hash__ = int.__hash__

        self._step = AnyStep(remembered)
        try:
            return real(self, part, layer)
        finally:
            self._step = remembered
    return receive


def lost_is_not_noticed(real: Any) -> Any:
    def run(self: Any, plan: Any, **options: Any) -> Any:
        result = real(self, plan, **options)
        result.lost = {}
        return result
    return run


def home_before_its_bytes(real: Any) -> Any:
    def came_home(self: Any, uid: int) -> Any:
        with self._lock:
            home = self._homes.pop(uid, None)
        from kvbank.workers.seams import Returned
        return None if home is None or home.buffer is None else Returned(uid, home.slot)
    return came_home


def copies_one_token_less(real: Any) -> Any:
    return lambda self, source, target, start, stop: real(self, source, target, start, stop - 1)


def block_of_the_neighbour(real: Any) -> Any:
    def block_frame(self: Any, span: Any, number: int) -> Any:
        header, _ = real(self, span, number)
        return header, real(self, span, max(0, number - 1))[1]
    return block_frame


def the_checksum_is_skipped(real: Any) -> Any:
    return SimpleNamespace(crc32=lambda data, start=0: 0)


def only_the_header_is_hashed(real: Any) -> Any:
    """As the checksum of what comes first: the payload adds nothing to it."""
    def crc32(data: Any, so_far: int | None = None) -> int:
        return zlib.crc32(memoryview(data)[:64]) if so_far is None else so_far
    return SimpleNamespace(crc32=crc32)


def no_seal(real: Any) -> Any:
    def decode(data: Any, *, secret: Any = None, **rest: Any) -> Any:
        whole = memoryview(data).cast("B")
        return real(whole if secret is None else whole[: -frame.SEAL_BYTES], secret=None, **rest)
    return decode


def any_frame_under_that_name(real: Any) -> Any:
    """decode believes the frame's own key, parent and tokens."""
    def decode(data: Any, *, expect_key: bytes, tokens: Any = None, secret: Any = None, **rest: Any) -> Any:
        whole = memoryview(data).cast("B")
        whole = whole if secret is None else whole[: -frame.SEAL_BYTES]
        import msgpack
        try:
            size = frame._PRELUDE.unpack_from(whole)[3]
            key = msgpack.unpackb(whole[frame._PRELUDE.size : frame._PRELUDE.size + size], raw=False)["key"]
        except Exception:                    # cut or flipped in the header: the real one says what is wrong with it
            key = expect_key
        return real(whole, expect_key=key, tokens=None, secret=None, **rest)
    return decode


def parked_is_not_pinned_down(real: Any) -> Any:
    def unpark(self: Any, uid: int, slot: Any) -> None:
        held = self._parked.pop(uid)
        if slot is not None:
            self._parked[uid] = held
            real(self, uid, slot)
            return
        self._host.release(held)             # and the pin stays
    return unpark


def verify_looks_away(real: Any) -> Any:
    return lambda self, borrower, ref: True


ATTEND, SHARD, STORE = "workers.remote_attention:RemoteAttention.", "workers.shard:LocalShard.", "kvstore.store:"
MUTANTS = [
    Mutant("what a lender calls stale is merged without", "The lender revoked the slot and answers stale for it. The borrower "
           "merges what came, as if the span did not exist.", {ATTEND + "_note_stale": nothing}),
    Mutant("a lost span does not stop its rows", "The lender stays silent; the span's partial is missing from the sum; the row "
           "is sampled all the same.", {SHARD + "run": lost_is_not_noticed}),
    Mutant("an answer to an older step is taken", "A step's partial comes after its step was given up; the next step takes it "
           "for "
           "its own.", {ATTEND + "_receive": any_answer_will_do}),
    Mutant("a span is home before its bytes are", "The span's slot is flipped to when the fetch ends; nobody copies the bytes "
           "out "
           "of staging.", {"workers.borrower:Borrower._came_home": home_before_its_bytes}),
    Mutant("a copy of shared blocks ends one token early", "Two prompts share 40 tokens; the second copies blocks of the first's "
           "span, all but their last token.", {SHARD + "copy_tokens": copies_one_token_less}),
    Mutant("a tail block is stored with its neighbour's bytes", "Block 1 of a tail is spilled as block 0's bytes under block 1's "
           "key. It is fetched, verified, and wrong.", {SHARD + "_block_frame": block_of_the_neighbour}),
    Mutant("frames carry no checksum", "A byte of a frame flips in host memory; nobody notices.",
           {"kvstore.frame:zlib": the_checksum_is_skipped}),
    Mutant("the checksum covers the header only", "A frame of which one payload byte flipped on the shelf passes its checksum "
           "and the span it fills is wrong.", {"kvstore.frame:zlib": only_the_header_is_hashed}),
    Mutant("what rests in Redis is not sealed, and its checksum is not read", "Somebody flips a byte of a value in Redis; it "
           "comes back as KV.", {STORE + "decode": no_seal, "kvstore.frame:zlib": the_checksum_is_skipped}),
    Mutant("a frame is not bound to its key", "Redis gives the value of another key. It is a good frame, of another text.",
           {STORE + "decode": any_frame_under_that_name}),
    Mutant("unparking leaves the pin", "A parked job is cancelled: its spans become ordinary frames that nothing can drive out, "
           "until the host tier is full of them.", {SHARD + "unpark": parked_is_not_pinned_down}),
    Mutant("verify_attend compares nothing", "A byte rots in a sealed slot while verify_attend is set.",
           {"workers.attend_server:AttendServer._is_as_sealed": verify_looks_away}),
]
