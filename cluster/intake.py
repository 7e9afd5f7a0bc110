"""Intake: what a caller sent becomes a JobSpec, or a typed error that says what is wrong and by how much.

Everything that can be refused is refused here, before a job exists, so that nothing behind it meets a surprising value.
Knows the model's vocabulary and length and how to tokenise; knows nothing of workers, HTTP or queues.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from kvbank.cluster.fields import Fields, check_text, shown
from kvbank.cluster.prompts import (
    MESSAGES,
    PROMPT,
    SLOW,
    WIRE_TOKENS,
    Encode,
    PromptSegment,
    Rendered,
    chat_messages,
    read_prompt,
    size,
    token_bytes,
)
from kvbank.cluster.turns import Turns
from kvbank.errors import InvalidRequest, TooLong
from kvbank.kvstore.hashing import key_space

POLICIES = ("exact",)
MAX_STOPS = 16
MAX_STOP_CHARS = 256
SEEDS = 1 << 63                      # workers take seeds below this; any 64-bit integer of a caller becomes one of them
MAX_SALT_CHARS = 256
MAX_LOGPROBS = 20                    # likely tokens told for each token of the output
_JOB_ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._:-]{1,128}")      # as part of a path, . and .. are taken away on the way

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]      # (messages, add_generation_prompt) -> the prompt's text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the edge must know of the model that is served."""

    name: str                        # as /v1/models shows it
    vocab_size: int
    max_position: int                # prompt + output tokens at most


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A job as asked for, checked."""

    tenant: str
    prompt: bytes                    # token ids, int32 little-endian
    segments: tuple[PromptSegment, ...] = ()
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None          # None: the gateway draws one, so that a resumed job samples the same
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    deadline_s: float | None = None
    policy: str = "exact"
    job_id: str | None = None
    cache_salt: str = ""             # jobs of other salts, or of none, share no KV with this one
    logprobs: int | None = None      # likely tokens wanted beside each drawn one's log-probability; None: nothing of it
    digest: bytes = b""              # `fingerprint`, once the prompt is let go

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def key_space(self) -> str:
        """What block keys grow from."""
        return key_space(self.tenant, self.cache_salt)

    @property
    def fingerprint(self) -> bytes:
        """Covers all that decides the answer, so that a repeated job_id is safe. Made when it is asked for: hardly any is."""
        if self.digest:
            return self.digest
        answer = [getattr(self, name) for name in _DECISIVE]
        plain = json.dumps([answer, [(s.first, s.last, s.reusable) for s in self.segments]])
        return hashlib.sha256(self.prompt + plain.encode()).digest()

    def without_prompt(self) -> JobSpec:
        """What is kept of a job that is over."""
        return replace(self, prompt=b"", digest=self.fingerprint)


_DECISIVE = tuple(each.name for each in fields(JobSpec)          # the prompt and its segments aside
                  if each.name not in ("tenant", "prompt", "segments", "deadline_s", "job_id", "digest"))


SPEC_FIELDS = frozenset({
    "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos",
    "deadline_s", "policy", "job_id", "cache_salt",
})


class Pieces(Protocol):
    """What single tokens stand for. workers/token_pieces.py is the real one."""

    def piece(self, token: int) -> bytes:
        """Its bytes, of special tokens too; empty for an id without a token."""

    def shown(self, token: int, *, first: bool) -> bytes:
        """What of them stands in an answer's text; `first`: it begins the answer."""


class _NoPieces:
    def piece(self, token: int) -> bytes:
        return b""

    def shown(self, token: int, *, first: bool) -> bytes:
        return b""


def no_template(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """Where a model has no chat template."""
    raise InvalidRequest("this model has no chat template: send /v1/completions with a prompt instead")


class Intake:
    """Checks and tokenises. `capacity_tokens` says how many tokens the cluster can hold for one job, None: unknown."""

    def __init__(
        self, facts: ModelFacts, encode: Encode, *, capacity_tokens: Callable[[], int | None] = lambda: None,
        decode: Callable[[list[int]], str] = lambda ids: "", render: Render = no_template, max_job_tokens: int | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """decode: token ids -> text. max_job_tokens: the operator's bound of prompt and output together."""
        self.facts = facts
        self.decode = decode
        self.pieces: Pieces = pieces or _NoPieces()
        self._encode, self._render = encode, render
        self._renderers, self._readers = Turns("the chat template"), Turns("the tokenizer")
        self._capacity_tokens, self._max_job_tokens = capacity_tokens, max_job_tokens

    async def spec(
        self, body: Mapping[str, Any], *, tenant: str, temperature: float = 0.0, max_tokens: int = 16,
        fitting: bool = False, logprobs: int | None = None, where: str = PROMPT,
    ) -> JobSpec:
        """The job that `body` asks for. Raises InvalidRequest.

        temperature, max_tokens: the dialect's defaults. fitting: the default of max_tokens is cut to the room that is left.
        body["prompt"]: what a caller may send, or a Rendered; where: its path in the request.
        """
        fields = Fields(body)
        fields.refuse_unknown(SPEC_FIELDS)
        wanted = fields.integer("max_tokens", None, low=1, high=2**31 - 1)
        stop = _stop(body.get("stop"))
        policy = fields.text("policy", "exact")
        if policy not in POLICIES:
            raise InvalidRequest(f"policy {shown(policy)} is not known; this version serves {', '.join(POLICIES)}",
                                 param="policy")
        job_id = fields.text("job_id", None)
        if job_id is not None and not _JOB_ID.fullmatch(job_id):
            raise InvalidRequest("job_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -, and neither . nor ..",
                                 param="job_id")
        top_k = fields.integer("top_k", 0, low=-1, high=2**31 - 1)
        seed = fields.integer("seed", None, low=-(2**63), high=2**64 - 1)
        cache_salt = fields.text("cache_salt", "")
        if len(cache_salt) > MAX_SALT_CHARS or body.get("cache_salt") == "":
            raise InvalidRequest(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters; leave it out for none",
                                 param="cache_salt")
        check_text(cache_salt, "cache_salt")
        sampling: dict[str, Any] = {
            "temperature": fields.number("temperature", temperature, low=0.0, high=2.0),
            "top_p": fields.number("top_p", 1.0, low=0.0, high=1.0, open_low=True),
            "top_k": max(0, top_k),
            "seed": None if seed is None else seed % SEEDS,
            "stop": stop,
            "stop_token_ids": self._token_list(body.get("stop_token_ids"), "stop_token_ids", limit=64),
            "ignore_eos": fields.flag("ignore_eos", False),
            "policy": policy,
            "cache_salt": cache_salt,
            "logprobs": logprobs,
        }
        deadline_s = fields.number("deadline_s", None, low=0.0, high=30 * 86_400.0, open_low=True)
        prompt, segments = await self._read(body.get("prompt"), tenant, where)
        if wanted is None:
            wanted = max(1, min(max_tokens, self.room_tokens() - len(prompt) // 4)) if fitting else max_tokens
        sampling["max_tokens"] = wanted
        self._check_length(len(prompt) // 4, sampling["max_tokens"], where)
        return JobSpec(
            tenant=tenant, prompt=prompt, segments=segments, deadline_s=deadline_s, job_id=job_id,
            **sampling,
        )

    async def chat(self, messages: Any, *, tenant: str, add_generation_prompt: bool = True) -> Rendered:
        """Messages as the model's chat template writes them. Raises InvalidRequest, Overloaded."""
        checked = chat_messages(messages)    # threads of their own: a slow template holds up chats and nothing else
        try:
            return Rendered(await self._renderers.run(tenant, self._render, checked, add_generation_prompt))
        except InvalidRequest as error:      # the template's own words
            error.param = MESSAGES
            raise

    async def token_ids(self, prompt: Any, *, tenant: str) -> list[int]:
        """What `prompt` becomes, however long it is. Raises InvalidRequest, Overloaded."""
        ids, _ = await self._read(prompt, tenant, MESSAGES if isinstance(prompt, Rendered) else PROMPT)
        return list(memoryview(ids).cast("i"))

    async def prompt_text(self, prompt: Any, *, tenant: str, where: str) -> str:
        """What a prompt says, in text; token ids are decoded. where: as for `spec`. Raises InvalidRequest, Overloaded."""
        await self._read(prompt, tenant, where)      # it is one
        return await asyncio.to_thread(self._text_of, prompt)

    async def _read(self, prompt: Any, tenant: str, where: str) -> tuple[bytes, tuple[PromptSegment, ...]]:
        """Its ids and segments. Long ones are read on threads, the tenants by turns. Raises InvalidRequest, Overloaded."""
        if size(prompt) <= SLOW:
            return read_prompt(prompt, self._encode, self.facts.vocab_size, where)
        return await self._readers.run(tenant, read_prompt, prompt, self._encode, self.facts.vocab_size, where)

    def _text_of(self, prompt: Any) -> str:
        pieces = [prompt] if isinstance(prompt, str) or not isinstance(prompt[0], dict) else prompt
        parts: list[Any] = [piece.get("text", piece.get("token_ids")) if isinstance(piece, dict) else piece for piece in pieces]
        return "".join(part if isinstance(part, str) else self.decode(part) for part in parts)

    def checked_ids(self, ids: Any, where: str) -> list[int]:
        """A list of ids of this model's vocabulary. Raises InvalidRequest."""
        token_bytes(ids, where, self.facts.vocab_size)
        return list(ids)

    def room_tokens(self) -> int:
        """Prompt and output tokens that one job may have at most."""
        limits = [self.facts.max_position, self._max_job_tokens, self._capacity_tokens()]
        return min(limit for limit in limits if limit is not None)

    def _token_list(self, ids: Any, where: str, *, limit: int) -> tuple[int, ...]:
        if ids is None:
            return ()
        if isinstance(ids, list) and len(ids) > limit:
            raise InvalidRequest(f"{where} has {len(ids)} entries, at most {limit} are read", param=where)
        token_bytes(ids, where, self.facts.vocab_size)
        return tuple(ids)

    def _check_length(self, prompt: int, output: int, where: str) -> None:
        total = prompt + output
        param = where if prompt >= self.room_tokens() else None           # else it is the sum of two
        if total > (limit := self.facts.max_position):
            raise TooLong(
                f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, the model reads "
                f"{limit}; shorten the prompt or ask for at most {max(0, limit - prompt)} tokens",
                param=param,
            )
        if total > WIRE_TOKENS:
            raise TooLong(f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, a job has at most "
                          f"{WIRE_TOKENS}; shorten the prompt, or ask for fewer", param=param)
        if self._max_job_tokens is not None and total > self._max_job_tokens:
            raise TooLong(
                f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, this server takes "
                f"{self._max_job_tokens} a job; shorten the prompt, ask for fewer, or raise http.max_job_tokens",
                param=param,
            )
        capacity = self._capacity_tokens()
        if capacity is not None and total > capacity:
            raise TooLong(
                f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, the whole cluster holds "
                f"{capacity}; start more workers, lenders or blocks, or shorten the prompt",
                param=param,
            )


def _stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) for s in stops):
        raise InvalidRequest(f"stop must be a string or a list of at most {MAX_STOPS} strings", param="stop")
    for number, text in enumerate(stops):
        where = "stop" if text is stop else f"stop[{number}]"
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"{where} has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed", param=where)
        check_text(text, where)
    return tuple(stops)
