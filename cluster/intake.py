"""Intake: what a caller sent becomes a JobSpec, or a typed error that says what is wrong and by how much.

Everything that can be refused is refused here, before a job exists, so that nothing behind it meets a surprising value.
Knows the model's vocabulary and length and how to tokenise; knows nothing of workers, HTTP or queues.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvbank.errors import InvalidRequest, Overloaded, TooLong
from kvbank.kvstore.hashing import key_space

POLICIES = ("exact",)
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SEGMENTS = 4096
WIRE_TOKENS = 900_000                # one Submit message is at most 4 MiB, ids are 4 bytes
SEEDS = 1 << 63                      # workers take seeds below this; any 64-bit integer of a caller becomes one of them
MAX_RENDERS = 32                     # chats whose template runs or waits to run; one more is Overloaded
SLOW_TEXT = 1 << 15                  # characters; longer texts are tokenised off the event loop
MAX_MESSAGES = 4096                  # of one chat
MAX_SALT_CHARS = 256
MAX_DEPTH = 32                       # of a JSON body; ours need six
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}     # as templates know them
MAX_LOGPROBS = 20                    # likely tokens told for each token of the output
_JOB_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Encode = Callable[[str, bool], list[int]]    # (text, at the start of the prompt) -> token ids
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]      # (messages, add_generation_prompt) -> the prompt's text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the edge must know of the model that is served."""

    name: str                        # as /v1/models shows it
    vocab_size: int
    max_position: int                # prompt + output tokens at most


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text that already has the special tokens it needs: what a chat template made."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Tokens `first .. last - 1` of a prompt came as one Segment."""

    first: int
    last: int
    reusable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A job as asked for, checked. `fingerprint` covers all that decides the answer, so a repeated job_id is safe."""

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
    fingerprint: bytes = b""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def key_space(self) -> str:
        """What block keys grow from."""
        return key_space(self.tenant, self.cache_salt)


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
        self._renderers, self._rendering = ThreadPoolExecutor(2, thread_name_prefix="chat-template"), 0
        self._capacity_tokens, self._max_job_tokens = capacity_tokens, max_job_tokens

    async def spec(
        self, body: Mapping[str, Any], *, tenant: str, temperature: float = 0.0, max_tokens: int = 16,
        fitting: bool = False, logprobs: int | None = None,
    ) -> JobSpec:
        """The job that `body` asks for. Raises InvalidRequest.

        temperature, max_tokens: the dialect's defaults. fitting: the default of max_tokens is cut to the room that is left.
        body["prompt"]: what a caller may send, or a Rendered.
        """
        fields = Fields(body)
        fields.refuse_unknown(SPEC_FIELDS)
        wanted = fields.integer("max_tokens", None, low=1, high=2**31 - 1)
        stop = _stop(body.get("stop"))
        policy = fields.text("policy", "exact")
        if policy not in POLICIES:
            raise InvalidRequest(f"policy {_shown(policy)} is not known; this version serves {', '.join(POLICIES)}")
        job_id = fields.text("job_id", None)
        if job_id is not None and not _JOB_ID.fullmatch(job_id):
            raise InvalidRequest("job_id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        top_k = fields.integer("top_k", 0, low=-1, high=2**31 - 1)
        seed = fields.integer("seed", None, low=-(2**63), high=2**64 - 1)
        cache_salt = fields.text("cache_salt", "")
        if len(cache_salt) > MAX_SALT_CHARS or body.get("cache_salt") == "":
            raise InvalidRequest(f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters; leave it out for none")
        _check_text(cache_salt, "cache_salt")
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
        prompt, segments = await self._prompt(body.get("prompt"))
        if wanted is None:
            wanted = max(1, min(max_tokens, self.room_tokens() - len(prompt) // 4)) if fitting else max_tokens
        sampling["max_tokens"] = wanted
        self._check_length(len(prompt) // 4, sampling["max_tokens"])
        return JobSpec(
            tenant=tenant, prompt=prompt, segments=segments, deadline_s=deadline_s, job_id=job_id,
            fingerprint=_fingerprint(prompt, segments, sampling), **sampling,
        )

    async def chat(self, messages: Any, *, add_generation_prompt: bool = True) -> Rendered:
        """Messages as the model's chat template writes them. Raises InvalidRequest."""
        checked = _messages(messages)
        if self._rendering >= MAX_RENDERS:
            raise Overloaded(f"{MAX_RENDERS} chats are being written as prompts already; retry in a moment")
        self._rendering += 1                 # threads of their own: a slow template holds up chats and nothing else
        try:
            text = await asyncio.get_running_loop().run_in_executor(self._renderers, self._render, checked, add_generation_prompt)
        finally:
            self._rendering -= 1
        return Rendered(text)

    async def token_ids(self, prompt: Any) -> list[int]:
        """What `prompt` becomes, however long it is. Raises InvalidRequest."""
        ids, _ = await self._prompt(prompt)
        return list(memoryview(ids).cast("i"))

    def prompt_text(self, prompt: Any) -> str:
        """What a prompt that `spec` took says, in text; token ids are decoded."""
        pieces = [prompt] if isinstance(prompt, str) or not isinstance(prompt[0], dict) else prompt
        parts: list[Any] = [piece.get("text", piece.get("token_ids")) if isinstance(piece, dict) else piece for piece in pieces]
        return "".join(part if isinstance(part, str) else self.decode(part) for part in parts)

    def checked_ids(self, ids: Any, where: str) -> list[int]:
        """A list of ids of this model's vocabulary. Raises InvalidRequest."""
        self._ids(ids, where)
        return list(ids)

    def room_tokens(self) -> int:
        """Prompt and output tokens that one job may have at most."""
        limits = [self.facts.max_position, self._max_job_tokens, self._capacity_tokens()]
        return min(limit for limit in limits if limit is not None)

    async def _prompt(self, prompt: Any) -> tuple[bytes, tuple[PromptSegment, ...]]:
        if prompt is None:
            raise InvalidRequest("prompt is missing")
        if isinstance(prompt, Rendered):
            _check_text(prompt.text, "messages")
            made = self._ids(await self._encoded(prompt.text, at_start=False), "messages")
            if not made:
                raise InvalidRequest("the chat template made no prompt of these messages; send some text")
            return made, ()
        pieces = [{"text": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(pieces, list):
            raise InvalidRequest("prompt must be a string, a list of token ids, or a list of segments")
        if not pieces or (isinstance(prompt, str) and not prompt):
            raise InvalidRequest("the prompt is empty: give at least one token")
        if not isinstance(pieces[0], dict):
            return self._ids(pieces, "prompt"), ()
        if len(pieces) > MAX_SEGMENTS:
            raise InvalidRequest(f"the prompt has {len(pieces)} segments, at most {MAX_SEGMENTS} are read")
        parts: list[bytes] = []
        segments: list[PromptSegment] = []
        first = 0
        for number, piece in enumerate(pieces):
            ids, reusable = await self._segment(piece, number, at_start=first == 0)
            parts.append(ids)
            segments.append(PromptSegment(first, first + len(ids) // 4, reusable))
            first = segments[-1].last
        if first == 0:
            raise InvalidRequest("the prompt is empty: give at least one token")
        return b"".join(parts), () if isinstance(prompt, str) else tuple(segments)

    async def _segment(self, piece: Any, number: int, *, at_start: bool) -> tuple[bytes, bool]:
        where = f"prompt segment {number}"
        if not isinstance(piece, dict) or set(piece) - {"text", "token_ids", "reusable"}:
            raise InvalidRequest(f"{where} must be an object of text or token_ids, and reusable")
        if ("text" in piece) == ("token_ids" in piece):
            raise InvalidRequest(f"{where} must have either text or token_ids")
        reusable = Fields(piece).flag("reusable", True)
        if "token_ids" in piece:
            return self._ids(piece["token_ids"], where), reusable
        text = piece["text"]
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}: text must be a string")
        _check_text(text, where)
        return self._ids(await self._encoded(text, at_start=at_start), where), reusable

    async def _encoded(self, text: str, *, at_start: bool) -> list[int]:
        if len(text) > SLOW_TEXT:
            return await asyncio.to_thread(self._encode, text, at_start)
        return self._encode(text, at_start)

    def _ids(self, ids: Any, where: str) -> bytes:
        """Token ids as int32 bytes; refuses what is not an integer or not in the vocabulary, naming its index."""
        if not isinstance(ids, list):
            raise InvalidRequest(f"{where}: token ids must be a list of integers")
        if len(ids) > WIRE_TOKENS:
            raise TooLong(f"{where} has {len(ids)} tokens, at most {WIRE_TOKENS} fit one job")
        vocab = self.facts.vocab_size
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            at = next(n for n, i in enumerate(ids) if not (type(i) is int and 0 <= i < vocab))
            raise InvalidRequest(
                f"{where}: token {at} is {_shown(ids[at])}; ids are integers from 0 to {vocab - 1} for this model"
            )
        return np.asarray(ids, dtype="<i4").tobytes()

    def _token_list(self, ids: Any, where: str, *, limit: int) -> tuple[int, ...]:
        if ids is None:
            return ()
        if isinstance(ids, list) and len(ids) > limit:
            raise InvalidRequest(f"{where} has {len(ids)} entries, at most {limit} are read")
        self._ids(ids, where)
        return tuple(ids)

    def _check_length(self, prompt: int, output: int) -> None:
        total = prompt + output
        if total > (limit := self.facts.max_position):
            raise TooLong(
                f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, the model reads "
                f"{limit}; shorten the prompt or ask for at most {max(0, limit - prompt)} tokens"
            )
        if self._max_job_tokens is not None and total > self._max_job_tokens:
            raise TooLong(
                f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, this server takes "
                f"{self._max_job_tokens} a job; shorten the prompt, ask for fewer, or raise http.max_job_tokens"
            )
        capacity = self._capacity_tokens()
        if capacity is not None and total > capacity:
            raise TooLong(
                f"the prompt has {prompt} tokens and max_tokens is {output}: {total} together, the whole cluster holds "
                f"{capacity}; start more workers, lenders or blocks, or shorten the prompt"
            )


class Fields:
    """A JSON object read field by field. An absent or null field is its default; a wrong one raises InvalidRequest."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def refuse_unknown(self, known: frozenset[str]) -> None:
        if unknown := sorted(set(self._body) - known):
            raise InvalidRequest(f"unknown field {_shown(unknown[0])}; known ones are {', '.join(sorted(known))}")

    def raw(self, name: str) -> Any:
        """As it was sent; None where it was not."""
        return self._body.get(name)

    def integer(self, name: str, default: Any, *, low: int, high: int) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise InvalidRequest(f"{name} must be an integer from {low} to {high}, not {_shown(value)}")
        return value

    def number(self, name: str, default: Any, *, low: float, high: float, open_low: bool = False) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        fits = type(value) in (int, float) and low <= value <= high and not (open_low and value == low)
        if not fits or not math.isfinite(value):
            border = "above" if open_low else "from"
            raise InvalidRequest(f"{name} must be a number {border} {low:g} to {high:g}, not {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, not {_shown(value)}")
        return value

    def text(self, name: str, default: Any) -> Any:
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must be a string, not {_shown(value)}")
        return value


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`. Raises InvalidRequest for anything else, however it is malformed."""
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        at = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the body is not valid JSON{at}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _deeper_than(body, MAX_DEPTH):
        raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} deep")
    return body


def _deeper_than(body: Any, depth: int) -> bool:
    level = [body]
    for _ in range(depth):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
    return bool(level)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) for s in stops):
        raise InvalidRequest(f"stop must be a string or a list of at most {MAX_STOPS} strings")
    for number, text in enumerate(stops):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"stop string {number} has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed")
        _check_text(text, f"stop string {number}")
    return tuple(stops)


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages with a role of ours and plain text. Raises InvalidRequest naming what is something else."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"there are {len(messages)} messages, at most {MAX_MESSAGES} are read")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    if unknown := sorted(set(given) - {"role", "content", "name"}):
        raise InvalidRequest(f"{where}: {_shown(unknown[0])} is not supported; a message has role, content and name")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{where}: role {_shown(role)} is not supported; it is one of {', '.join(ROLES)}")
    if "content" not in given:
        raise InvalidRequest(f"{where}: content is missing")
    told = {"role": ROLES[role], "content": _content(given["content"], where)}
    if "name" in given:
        told["name"] = Fields(given).text("name", "")
        _check_text(told["name"], f"{where}: name")
    return told


def _content(content: Any, where: str) -> str:
    """A string, or parts of type text, which become lines."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{where}: content must be a string or a list of text parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise InvalidRequest(f"{where}: content of type {_shown(kind)} is not supported; this server reads text only")
        if not isinstance(part.get("text"), str) or set(part) - {"type", "text"}:
            raise InvalidRequest(f"{where}: a text part has a string as text, and nothing else")
    text = "\n".join(part["text"] for part in parts)
    _check_text(text, where)
    return text


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: character {error.start} is a lone surrogate, which no text can contain"
        ) from None


def _shown(value: Any) -> str:
    """A value for an error message: short, printable, and never a prompt."""
    if isinstance(value, (bool, int, float)):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        return text
    if isinstance(value, str) and len(value) <= 40:
        return ascii(value)
    return f"a {type(value).__name__}"


def _fingerprint(prompt: bytes, segments: tuple[PromptSegment, ...], sampling: Mapping[str, Any]) -> bytes:
    plain = json.dumps([sampling, [(s.first, s.last, s.reusable) for s in segments]], sort_keys=True)
    return hashlib.sha256(prompt + plain.encode()).digest()
