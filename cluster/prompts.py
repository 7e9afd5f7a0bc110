"""Prompts: text, token ids, segments or a chat, checked and turned into token ids.

    str | [id, ...] | [{"text"|"token_ids": ..., "reusable": ...}, ...] | Rendered --> ids as int32 bytes, segments
    messages                                                                       --> what a chat template reads

Everything wrong is an InvalidRequest or TooLong that names its place. Knows a vocabulary's size and how to tokenise.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbank.cluster.fields import Fields, check_text, shown
from kvbank.errors import InvalidRequest, TooLong

PROMPT, MESSAGES = "prompt", "messages"      # the fields that hold them
MAX_SEGMENTS = 4096
WIRE_TOKENS = 900_000                # one Submit message is at most 4 MiB, ids are 4 bytes
SLOW = 1 << 12                       # characters and ids; longer prompts are read off the event loop (2 us a character)
MAX_MESSAGES = 4096                  # of one chat
_EMPTY = frozenset({"annotations", "tool_calls"})     # lists in answers that come back as history, as long as nothing is in them
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}     # as templates know them

Encode = Callable[[str, bool], list[int]]    # (text, at the start of the prompt) -> token ids; lets other threads run meanwhile


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


def size(prompt: Any) -> int:
    """Characters and ids of what a caller may send as prompt; 0 for what is none."""
    if isinstance(prompt, Rendered):
        return len(prompt.text)
    if not isinstance(prompt, list):
        return len(prompt) if isinstance(prompt, str) else 0
    return len(prompt) + sum(len(inner) for piece in prompt if isinstance(piece, dict) for inner in piece.values()
                             if isinstance(inner, (str, list)))


def read_prompt(prompt: Any, encode: Encode, vocab: int, where: str = PROMPT) -> tuple[bytes, tuple[PromptSegment, ...]]:
    """The ids of what a caller may send as prompt, or of a Rendered; and its segments, where it came in some. where: its path in
    the request."""
    if prompt is None:
        raise InvalidRequest(f"{where} is missing", param=where)
    if isinstance(prompt, Rendered):
        check_text(prompt.text, where)
        made = token_bytes(encode(prompt.text, False), where, vocab)
        if not made:
            raise InvalidRequest("the chat template made no prompt of these messages; send some text", param=where)
        return made, ()
    if prompt in ("", []):
        raise InvalidRequest(f"{where} is empty: give at least one token", param=where)
    segments: tuple[PromptSegment, ...] = ()
    if isinstance(prompt, str):
        made = _text(prompt, where, encode, vocab, at_start=True)
    elif not isinstance(prompt, list):
        raise InvalidRequest(f"{where} must be a string, a list of token ids, or a list of segments", param=where)
    elif isinstance(prompt[0], dict):
        made, segments = _segments(prompt, where, encode, vocab)
    else:
        made = token_bytes(prompt, where, vocab)
    if not made:
        raise InvalidRequest(f"{where} is empty: give at least one token", param=where)
    return made, segments


def _segments(pieces: list[Any], where: str, encode: Encode, vocab: int) -> tuple[bytes, tuple[PromptSegment, ...]]:
    if len(pieces) > MAX_SEGMENTS:
        raise InvalidRequest(f"{where} has {len(pieces)} segments, at most {MAX_SEGMENTS} are read", param=where)
    parts: list[bytes] = []
    segments: list[PromptSegment] = []
    first = 0
    for number, piece in enumerate(pieces):
        ids, reusable = _segment(piece, f"{where}[{number}]", encode, vocab, at_start=first == 0)
        parts.append(ids)
        segments.append(PromptSegment(first, first + len(ids) // 4, reusable))
        first = segments[-1].last
    return b"".join(parts), tuple(segments)


def _segment(piece: Any, where: str, encode: Encode, vocab: int, *, at_start: bool) -> tuple[bytes, bool]:
    if not isinstance(piece, dict) or set(piece) - {"text", "token_ids", "reusable"}:
        raise InvalidRequest(f"{where} must be an object of text or token_ids, and reusable", param=where)
    if ("text" in piece) == ("token_ids" in piece):
        raise InvalidRequest(f"{where} must have either text or token_ids", param=where)
    reusable = Fields(piece, where).flag("reusable", True)
    if "token_ids" in piece:
        return token_bytes(piece["token_ids"], f"{where}.token_ids", vocab), reusable
    if not isinstance(piece["text"], str):
        raise InvalidRequest(f"{where}.text must be a string", param=f"{where}.text")
    return _text(piece["text"], f"{where}.text", encode, vocab, at_start=at_start), reusable


def _text(text: str, where: str, encode: Encode, vocab: int, *, at_start: bool) -> bytes:
    check_text(text, where)
    return token_bytes(encode(text, at_start), where, vocab)


def token_bytes(ids: Any, where: str, vocab: int) -> bytes:
    """Token ids as int32 bytes; refuses what is not an integer or not in the vocabulary, naming its index."""
    if not isinstance(ids, list):
        raise InvalidRequest(f"{where}: token ids must be a list of integers", param=where)
    if len(ids) > WIRE_TOKENS:
        raise TooLong(f"{where} has {len(ids)} tokens, at most {WIRE_TOKENS} fit one job", param=where)
    if not ids:
        return b""
    if not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab):
        at = next(n for n, i in enumerate(ids) if not (type(i) is int and 0 <= i < vocab))
        raise InvalidRequest(
            f"{where}: token {at} is {shown(ids[at])}; ids are integers from 0 to {vocab - 1} for this model",
            param=where,
        )
    return array("i", ids).tobytes()


def chat_messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages with a role of ours and plain text. Raises InvalidRequest naming what is something else."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"there are {len(messages)} messages, at most {MAX_MESSAGES} are read", param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object with role and content", param=where)
    given = {name: value for name, value in message.items() if value is not None and not (name in _EMPTY and value == [])}
    if unknown := sorted(set(given) - {"role", "content", "name"}):
        raise InvalidRequest(f"{where}: {shown(unknown[0])} is not supported; a message has role, content and name",
                             param=where)
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{where}: role {shown(role)} is not supported; it is one of {', '.join(ROLES)}",
                             param=f"{where}.role")
    if "content" not in given:
        raise InvalidRequest(f"{where}: content is missing", param=f"{where}.content")
    told = {"role": ROLES[role], "content": _content(given["content"], f"{where}.content")}
    if "name" in given:
        told["name"] = Fields(given, where).text("name", "")
        check_text(told["name"], f"{where}.name")
    return told


def _content(content: Any, where: str) -> str:
    """A string, or parts of type text, which become lines."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise InvalidRequest(f"{where} must be a string or a list of text parts", param=where)
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise InvalidRequest(f"{where}: type {shown(kind)} is not supported; this server reads text only",
                                 param=where)
        if not isinstance(part.get("text"), str) or set(part) - {"type", "text"}:
            raise InvalidRequest(f"{where}: a text part has a string as text, and nothing else", param=where)
    text = "\n".join(part["text"] for part in parts)
    check_text(text, where)
    return text
