"""A model folder's chat template: messages in, the prompt's text out, in the form the model was trained on.

    chat_template.jinja, or tokenizer_config.json: chat_template  --jinja2, sandboxed-->  "<|im_start|>user\\nHi<|im_end|>..."

Speaks the same Jinja as transformers' `apply_chat_template`, its oracle in the tests. A template is a program that came with
the weights: it runs in a sandbox that cannot change what it is given, within a number of characters and of seconds. Imports
no torch: the gateway uses it. Knows nothing of HTTP or tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvbank.errors import InvalidRequest

RENDERED_CHARS = 16 << 20                    # a prompt that long fits no job
RENDER_S = 5.0                               # looked at between two pieces of output
SHOWN_CHARS = 200                            # of what a template says when it refuses
TEMPLATE_FILE = "chat_template.jinja"
_ADVICE = "send /v1/completions with a prompt instead"


class ChatTemplate:
    """Renders messages. Safe to call from several threads."""

    def __init__(self, source: str | None, tokens: Mapping[str, str] | None = None, *, missing: str = "") -> None:
        """source: the Jinja text, None when there is none (`missing` says why). tokens: variables like `bos_token`."""
        self._tokens = dict(tokens or {})
        self._template: Any = None
        self._trouble = missing or f"this model has no chat template: {_ADVICE}, or add chat_template to tokenizer_config.json"
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except TemplateSyntaxError as error:
                self._trouble = f"this model's chat template has an error in line {error.lineno}: mend it, or {_ADVICE}"
            except Exception:                # compiling runs a template's constant parts, which may fail in any way
                self._trouble = f"this model's chat template cannot be compiled: mend it, or {_ADVICE}"

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text; it brings its own special tokens. Raises InvalidRequest. May take RENDER_S."""
        if self._template is None:
            raise InvalidRequest(self._trouble)
        variables = {**self._tokens, "messages": [dict(message) for message in messages], "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt}
        try:
            return self._joined(variables)
        except InvalidRequest:
            raise
        except _Refused as refusal:
            raise InvalidRequest(f"this model's chat template refuses these messages: {refusal}") from None
        except Exception:                    # a template can fail in every way a program can, and its words are not ours
            raise InvalidRequest("this model's chat template cannot render these messages: check the order of their roles, "
                                 f"or {_ADVICE}") from None

    def _joined(self, variables: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size, give_up = 0, time.monotonic() + RENDER_S
        for part in self._template.generate(variables):
            parts.append(part)
            size += len(part)
            if size > RENDERED_CHARS:
                raise InvalidRequest(f"these messages give a prompt of more than {RENDERED_CHARS} characters; shorten them")
            if time.monotonic() > give_up:
                raise InvalidRequest(f"this model's chat template took more than {RENDER_S:g} s; send fewer messages")
        return "".join(parts)


def load_chat_template(folder: str | Path) -> ChatTemplate:
    """The folder's template. What is wrong with it is told to whoever renders: completions need none."""
    folder = Path(folder)
    config = _json_object(folder / "tokenizer_config.json")
    tokens = _special_tokens({**_json_object(folder / "special_tokens_map.json"), **config})
    try:
        return ChatTemplate((folder / TEMPLATE_FILE).read_text(encoding="utf-8"), tokens)
    except (OSError, UnicodeDecodeError):
        pass
    given = config.get("chat_template")
    if isinstance(given, list):              # several by name: [{"name": "default", "template": "..."}, ...]
        named = {each.get("name"): each.get("template") for each in given if isinstance(each, dict)}
        given = named.get("default")
        if given is None:
            return ChatTemplate(None, missing=f"this model's chat templates have none with the name default: {_ADVICE}")
    return ChatTemplate(given if isinstance(given, str) else None, tokens)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like: plain strings, or objects with a `content`."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
    return found


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


# -- the Jinja that templates are written for --------------------------------------------------------------------------


class _Refused(TemplateError):
    """The template called raise_exception: its words are meant for the caller."""


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks, for training, what an assistant said; here it only shows it."""

    tags = {"generation"}                    # noqa: RUF012

    def parse(self, parser: Parser) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Unlike Jinja's own: no HTML escapes, keys in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    text = "".join(c if c.isprintable() else " " for c in str(message)[:SHOWN_CHARS])
    raise _Refused(text)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
