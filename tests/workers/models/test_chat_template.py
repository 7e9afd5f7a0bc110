"""Chat templates: the text that transformers would make, or a typed error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvbank.errors import InvalidRequest
from kvbank.workers.models import chat_template
from kvbank.workers.models.chat_template import ChatTemplate, load_chat_template
from kvbank.workers.models.random_model import byte_level_tokenizer

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{% set loop_messages = messages %}
{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns: user, assistant, user, ...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
BUSY = """
{%- set ns = namespace(turns=0, seen=[]) -%}
{%- if tools is not none and tools %}TOOLS{{ tools | tojson(indent=2) }}{% endif -%}
{%- macro head(role) %}<{{ role | upper }}>{% endmacro -%}
{% for message in messages -%}
    {%- if message.content | length == 0 %}{% continue %}{% endif -%}
    {%- set ns.turns = ns.turns + 1 -%}
    {{ head(message.role) }}{{ {'n': ns.turns, 'say': message.content, 'by': message.name | default('?')} | tojson }}
    {%- if message.role == 'assistant' %}{% generation %}!{{ message.content[::-1] }}{% endgeneration %}{% endif -%}
    {%- if 'stop' in message.content %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now('%Y') | length }} {{ ns.turns }}{{ eos_token }}{% if add_generation_prompt %}<ASSISTANT>{% endif %}
"""
SHAPES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "busy": BUSY}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [{"role": "system", "content": "Be \"brief\" & <kind>."}, {"role": "user", "content": "  Grüße 😀\n"}],
    "long": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": " b \n"},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "stop"}],
}


def write_folder(folder: Path, **config: Any) -> Path:
    byte_level_tokenizer(300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "single_word": False,
                      "normalized": False, "special": True}, **config}))
    return folder


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_text_is_what_transformers_makes(tmp_path, shape, chat, ask) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(write_folder(tmp_path, chat_template=shape))
    wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
    assert load_chat_template(tmp_path).render(chat, add_generation_prompt=ask) == wanted
    assert chat[0]["content"].strip() in wanted or shape is BUSY


def test_a_template_that_refuses_is_quoted(tmp_path) -> None:
    template = load_chat_template(write_folder(tmp_path, chat_template=MISTRAL))
    with pytest.raises(InvalidRequest, match="roles must take turns"):
        template.render([{"role": "assistant", "content": "I begin"}])


@pytest.mark.parametrize(("source", "words"), [
    ("{% for m in messages %}", "error in line 1"), ("{{ 1 + }}", "error in line 1"), ("{% nonsense %}", "error in line 1"),
    ("{{ messages[0].nothing.more }}", "cannot render"), ("{{ messages[0]['content'] + 1 }}", "cannot render"),
    ("{{ 1 // 0 }}", "cannot"), ("{{ messages.append(1) }}", "cannot render"),
    ("{{ messages.__class__.__mro__ }}", "cannot render"), ("{{ ''.__class__.__base__.__subclasses__() }}", "cannot render"),
    ("{% include 'x' %}", "cannot render"), ("{% for a in range(10**9) %}{% endfor %}", "cannot render"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render"),
])
def test_a_bad_template_is_a_typed_error_with_advice(source, words) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "planted"}])
    assert "planted" not in str(caught.value) and "/v1/completions" in str(caught.value)


def test_a_template_cannot_change_what_the_caller_gave() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[0].update({'content': 'x'}) }}").render(chat)
    assert chat == [{"role": "user", "content": "Hi"}]


def test_output_is_bounded_in_characters_and_in_time(monkeypatch) -> None:
    chat = [{"role": "user", "content": "x" * 1000}]
    endless = ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}"
                           "{{ messages[0].content }}{% endfor %}{% endfor %}")
    monkeypatch.setattr(chat_template, "RENDERED_CHARS", 50_000)
    with pytest.raises(InvalidRequest, match="more than 50000 characters"):
        endless.render(chat)
    monkeypatch.setattr(chat_template, "RENDER_S", -1.0)
    with pytest.raises(InvalidRequest, match="took more than"):
        endless.render(chat)


def test_where_a_template_may_stand(tmp_path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidRequest, match=r"has no chat template.*tokenizer_config"):
        load_chat_template(tmp_path / "nowhere").render(chat)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    write_folder(tmp_path, chat_template=named)
    assert load_chat_template(tmp_path).render(chat) == "D<s>"
    write_folder(tmp_path, chat_template=named[:1])
    with pytest.raises(InvalidRequest, match="name default"):
        load_chat_template(tmp_path).render(chat)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<p>", "bos_token": "other"}')
    (tmp_path / "chat_template.jinja").write_text("F{{ bos_token }}{{ pad_token }}{{ eos_token }}")
    assert load_chat_template(tmp_path).render(chat) == "F<s><p></s>"
