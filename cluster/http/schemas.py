"""What requests and answers look like, as JSON Schema: each field once, with the bounds that the code checks.

A dialect's request has exactly the fields that its route knows: one without a line here stops the tests. Data only; the
document is put together in openapi.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvbank.cluster.intake import MAX_LOGPROBS, MAX_SALT_CHARS, MAX_STOP_CHARS, MAX_STOPS, POLICIES
from kvbank.cluster.prompts import MAX_MESSAGES, MAX_SEGMENTS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_PARAM: Schema = {"type": ["string", "null"], "description": "The field at fault, or a path into it such as messages[0].role."}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _COUNT}
_OPEN: Schema = {"type": "object", "additionalProperties": True}


def _told(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description}


def _integer(low: int, high: int, description: str, **more: Any) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high, "description": description, **more}


def _number(low: float, high: float, description: str, **more: Any) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high, "description": description, **more}


def named(name: str) -> Schema:
    """A reference to one of SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


def _list(of: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": of, **more}


def _or_null(schema: Schema) -> Schema:
    """`schema`, or null; what describes it stays outside."""
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema


def body(fields: Iterable[str], *, required: Iterable[str], neutral: Mapping[str, tuple[Any, ...]] | None = None,
         own: Mapping[str, Schema] | None = None) -> Schema:
    """An object of just these fields; null is as good as left out. neutral: those accepted only where they change nothing;
    own: told otherwise here."""
    asked = set(required)
    told = {name: schema if name in asked else _or_null(schema) for name, schema in {**FIELDS, **(own or {})}.items()}
    told |= {name: {"enum": [None, *allowed], "description": "Not supported: accepted only where it changes nothing."}
             for name, allowed in (neutral or {}).items()}
    return {"type": "object", "additionalProperties": False, "required": sorted(asked),
            "properties": {name: told[name] for name in sorted(fields)}}


FIELDS: dict[str, Schema] = {
    "model": _told(_TEXT, "The served model's name; others are 404. May be left out."),
    "prompt": {"description": "Text, token ids, or segments of both.", "anyOf": [
        {**_TEXT, "minLength": 1}, {**_IDS, "minItems": 1}, _list(named("Segment"), minItems=1, maxItems=MAX_SEGMENTS)]},
    "messages": _list(named("Message"), minItems=1, maxItems=MAX_MESSAGES),
    "max_tokens": _integer(1, 2**31 - 1, "Tokens of the answer at most. Default 16; in a chat 4096, or what fits."),
    "max_completion_tokens": _integer(1, 2**31 - 1, "Another name of max_tokens."),
    "temperature": _number(0, 2, "0 is greedy. Default 1 in OpenAI's dialects, 0 in /v1/jobs."),
    "top_p": _number(0, 1, "The likeliest tokens that together reach this probability.", exclusiveMinimum=0, default=1),
    "top_k": _integer(-1, 2**31 - 1, "That many likeliest tokens; 0 and -1: all.", default=0),
    "seed": _integer(-2**63, 2**64 - 1, "With it the same request draws the same tokens; choice i of n takes seed + i."),
    "stop": {"description": "The answer ends before the first of these.", "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
        _list({"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}, maxItems=MAX_STOPS)]},
    "stop_token_ids": _told({**_IDS, "maxItems": 64}, "The answer ends with the first of these."),
    "ignore_eos": _told(_FLAG, "Go on after the model's own end."),
    "deadline_s": _number(0, 30 * 86_400, "Seconds until the job ends with deadline_exceeded.", exclusiveMinimum=0),
    "policy": {"enum": list(POLICIES), "description": "How the cache may answer."},
    "job_id": {"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9._:-]{1,128}$",
               "description": "A name for the one job of this request: sent twice it is one job, unless its readers have left."},
    "cache_salt": {"type": "string", "minLength": 1, "maxLength": MAX_SALT_CHARS,
                   "description": "Jobs share KV only with jobs of the same tenant and salt."},
    "n": _integer(1, 16, "Choices of each prompt.", default=1),
    "best_of": _integer(1, 16, "Equal to n, or left out."),
    "stream": _told(_FLAG, "Server-sent events, ended by [DONE]."),
    "stream_options": {"type": "object", "additionalProperties": False,
                       "properties": {"include_usage": _FLAG, "include_obfuscation": _FLAG}},
    "return_token_ids": _told(_FLAG, "Token ids beside each choice's text."),
    "echo": _told(_FLAG, "Each text begins with its prompt. Not together with logprobs."),
    "logprobs": _integer(0, MAX_LOGPROBS, "Log-probabilities of the answer's tokens and of that many likely ones: the model's "
                         "own, before temperature, top_k and top_p. Of every token drawn, also of those that end the text and "
                         "are not in it."),
    "top_logprobs": _integer(0, MAX_LOGPROBS, "Likely tokens beside each token; needs logprobs."),
    "prompt_cache_key": _told(_TEXT, "Accepted; changes nothing, prefixes are found by content."),
    "add_generation_prompt": _told({**_FLAG, "default": True}, "Whether the prompt asks for an answer."),
    "tokens": _told(_IDS, "Token ids; at most as many as the model reads (max_model_len of /tokenize)."),
    **{name: _told({}, "Accepted; changes nothing.") for name in (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_retention")},
}
COMPLETION_FIELDS: dict[str, Schema] = {
    "prompt": {"description": "Text, token ids, or segments of both; or a list of texts or of lists of ids, each with choices "
                              "of its own: at most 16 choices in all.",
               "anyOf": [*FIELDS["prompt"]["anyOf"], _list(_TEXT, minItems=1), _list(_IDS, minItems=1)]},
    "logprobs": {"description": FIELDS["logprobs"]["description"], "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"const": False}]},
}
CHAT_FIELDS: dict[str, Schema] = {"logprobs": _told(_FLAG, "Log-probabilities of the answer's tokens: the model's own, before "
                                                    "temperature, top_k and top_p. Of every token drawn, also of those that end "
                                                    "the text and are not in it.")}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties}


def _answer(kind: str, choice: Schema) -> Schema:
    return _object(id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_list(choice),
                   usage={"description": "null in chunks before a last one that has it.",
                          "anyOf": [named("Usage"), {"type": "null"}]},
                   kvbank=_told(_OPEN, "The job's id and receipt."))


_REASON: Schema = {"enum": ["stop", "length", None]}
_CHAT_LOGPROBS = {"anyOf": [named("ChatLogprobs"), {"type": "null"}]}
_ENTRY = _object(token=_TEXT, logprob={"type": "number"}, bytes=_list(_integer(0, 255, "One byte.")))
_ROLES: Schema = {"enum": ["system", "developer", "user", "assistant"]}
_PART: Schema = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}

SCHEMAS: dict[str, Schema] = {
    "Segment": {"type": "object", "additionalProperties": False,
                "properties": {"text": _TEXT, "token_ids": _IDS, "reusable": {**_FLAG, "default": True}}},
    "Message": {"type": "object", "required": ["role", "content"], "properties": {
        "role": _ROLES, "name": _TEXT, "content": {"anyOf": [_TEXT, _list(_PART, minItems=1)]}}},
    "Usage": _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT,
                     prompt_tokens_details=_object(cached_tokens=_COUNT)),
    "Logprobs": _object(tokens=_list(_TEXT), token_logprobs=_list({"type": ["number", "null"]}), text_offset=_list(_COUNT),
                        top_logprobs=_list({"type": ["object", "null"], "additionalProperties": {"type": "number"}})),
    "ChatLogprobs": _object(content=_list({"allOf": [_ENTRY, _object(top_logprobs=_list(_ENTRY))]}), refusal={"type": "null"}),
    "Completion": _answer("text_completion", _object(
        index=_COUNT, text=_TEXT, finish_reason=_REASON, logprobs={"anyOf": [named("Logprobs"), {"type": "null"}]})),
    "ChatCompletion": _answer("chat.completion", _object(
        index=_COUNT, finish_reason=_REASON, logprobs=_CHAT_LOGPROBS,
        message=_object(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"}))),
    "ChatCompletionChunk": _answer("chat.completion.chunk", _object(
        index=_COUNT, finish_reason=_REASON, logprobs=_CHAT_LOGPROBS, delta=_object(role=_TEXT, content=_TEXT))),
    "Model": _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT),
    "Models": _object(object={"const": "list"}, data=_list(named("Model"))),
    "Tokenized": _object(tokens=_IDS, count=_COUNT, max_model_len=_COUNT),
    "Detokenized": _object(prompt=_TEXT),
    "Job": {**_OPEN, "description": "A job: id, state, progress, and at the end result, error and receipt."},
    "Jobs": _object(object={"const": "list"}, data=_list(named("Job"))),
    "Health": _object(status={"enum": ["ok", "unavailable"]}, workers=_COUNT, version=_TEXT),
    "Status": {**_OPEN, "description": "Workers, loans and tiers of the cluster now, and this tenant's jobs."},
    "Session": _object(name=_TEXT, tenant=_TEXT, role=_TEXT, csrf=_TEXT),
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_PARAM, code=_TEXT, retry_after_s={"type": "number"})),
}
