"""OpenAI's own client, sync and async, against a whole cluster: real workers, a real model, a chat template of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from kvbank.cluster.client import Client
from kvbank.cluster.launcher import LocalCluster
from kvbank.workers.models.random_model import write_random_model

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a span?"}]
TEXT = "<|system|>Be brief.\n<|user|>What is a span?\n<|assistant|>"
KEYS = {"key-a": "tenant-a", "key-b": "tenant-b"}
MODEL = "talker"


class Served:
    """A cluster of one worker with keys."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address

    def openai(self, key: str = "key-a", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models") / MODEL
    write_random_model(folder, seed=7, vocab=512)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}))
    with LocalCluster(model=str(folder), workers=1, device_blocks=256, redis=None, host_bytes=0, torch_threads=1, max_jobs=4,
                      launcher="process", api_keys=KEYS) as cluster:
        yield Served(folder, cluster.address)


def test_chats_and_completions_give_the_tokens_of_our_own_client(served) -> None:
    from transformers import AutoTokenizer

    with Client(served.address, api_key="key-a") as ours, served.openai() as theirs:
        want = ours.generate(TEXT, max_tokens=24, ignore_eos=True)
        chat = theirs.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=24, temperature=0,
                                              extra_body={"return_token_ids": True, "ignore_eos": True})
        assert AutoTokenizer.from_pretrained(served.folder).apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True) == TEXT
        assert chat.choices[0].token_ids == want.token_ids and chat.choices[0].message.content == want.text
        assert chat.usage.prompt_tokens_details.cached_tokens == want.receipt.prompt_tokens // 16 * 16 > 0
        whole = theirs.completions.create(model=MODEL, prompt=TEXT, max_tokens=24, temperature=0, echo=True)
        assert whole.choices[0].text == TEXT + want.text
        hot: dict[str, Any] = {"max_tokens": 16, "temperature": 0.9, "top_p": 0.95, "seed": 11}
        drawn = ours.generate(TEXT, **hot)
        assert theirs.completions.create(model=MODEL, prompt=TEXT, **hot).choices[0].text == drawn.text
        assert theirs.chat.completions.create(model=MODEL, messages=CHAT, **hot).choices[0].message.content == drawn.text


def test_streams_give_the_whole_in_pieces(served) -> None:
    with served.openai() as client:
        options: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "temperature": 0, "n": 2,
                                   "stream_options": {"include_usage": True}}
        whole = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=20, temperature=0)
        said, reasons = {0: "", 1: ""}, {}
        for chunk in client.chat.completions.create(messages=CHAT, stream=True, **options):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert chunk.usage.completion_tokens == 40 and chunk.usage.prompt_tokens == whole.usage.prompt_tokens
        assert said == dict.fromkeys((0, 1), whole.choices[0].message.content) and reasons == {0: "length", 1: "length"}
        text = "".join(choice.text for chunk in client.completions.create(prompt=TEXT, stream=True, **options)
                       for choice in chunk.choices if choice.index == 1)
        assert text == whole.choices[0].message.content


@pytest.mark.slow
def test_log_probabilities_are_those_of_transformers(served) -> None:
    from transformers import AutoModelForCausalLM

    with served.openai() as client:
        ask: dict[str, Any] = {"model": MODEL, "max_tokens": 10, "temperature": 0}
        told = client.completions.create(prompt=TEXT, logprobs=3, extra_body={"return_token_ids": True}, **ask).choices[0]
        chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **ask).choices[0]
        headers = {"Authorization": "Bearer key-a"}
        prompt = httpx.post(f"{served.address}/tokenize", json={"messages": CHAT}, headers=headers).json()
    model = AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt["tokens"] + told.token_ids])).logits[0, prompt["count"] - 1 : -1]
    wanted = logits.log_softmax(-1)
    drawn = wanted[range(10), told.token_ids]
    for said in (told.logprobs.token_logprobs, [entry.logprob for entry in chat.logprobs.content]):
        assert (torch.tensor(said) - drawn).abs().max() < 1e-4       # the chat found the prompt in the cache: other chunks
    top = torch.tensor([[other.logprob for other in entry.top_logprobs] for entry in chat.logprobs.content])
    assert (top - wanted.topk(3).values).abs().max() < 1e-4
    assert b"".join(bytes(entry.bytes) for entry in chat.logprobs.content).decode(errors="replace") == chat.message.content


def test_errors_have_the_clients_own_types(served) -> None:
    with served.openai() as client:
        def chat(**changes: Any) -> Any:
            return client.chat.completions.create(**{"model": MODEL, "messages": CHAT, "max_tokens": 2, **changes})

        with pytest.raises(openai.NotFoundError, match="/v1/models"):
            chat(model="other")
        with pytest.raises(openai.BadRequestError, match="tools"):
            chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
        with pytest.raises(openai.BadRequestError, match="response_format"):
            chat(response_format={"type": "json_object"})
        with pytest.raises(openai.BadRequestError) as caught:
            chat(max_tokens=10**9)
        assert caught.value.code == "too_long" and str(served.folder) not in str(caught.value)
        with served.openai("wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert [model.id for model in client.models.list()] == [MODEL]


def test_a_caller_over_the_limit_hears_429_and_when_to_come_back(served, until) -> None:
    with served.openai() as client, Client(served.address, api_key="key-a") as ours:
        jobs = [ours.submit(f"{number} goes on and on", max_tokens=2000, ignore_eos=True) for number in range(4)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "overloaded"
        for job in jobs:
            job.cancel()
        until(lambda: all(job.status().state == "cancelled" for job in jobs))
        assert client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2).choices[0].finish_reason == "length"


def test_a_reader_who_leaves_gives_the_memory_back_at_once(served, until) -> None:
    with Client(served.address, api_key="key-a") as ours, served.openai() as client:
        def used() -> int:
            return sum(worker.blocks_used for worker in ours.status().workers)

        until(lambda: used() == 0)
        for leave in ("chat", "completion"):
            if leave == "chat":
                stream: Any = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3000, stream=True,
                                                             extra_body={"ignore_eos": True})
            else:
                stream = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=3000, stream=True,
                                                   extra_body={"ignore_eos": True})
            for number, _ in enumerate(stream):
                if number == 5:
                    break
            until(lambda: used() > 0)
            stream.close()                           # how soon it is free again: `kvbank bench gateway`
            until(lambda: used() == 0)


@pytest.mark.slow
def test_salts_and_tenants_share_nothing_through_the_whole_stack(served) -> None:
    text = [(number * 31) % 500 for number in range(400)]

    def cached(key: str, **salt: str) -> int:
        with served.openai(key) as client:
            usage = client.completions.create(model=MODEL, prompt=text, max_tokens=1, extra_body=salt).usage
            return usage.prompt_tokens_details.cached_tokens

    assert [cached("key-a"), cached("key-a", cache_salt="x"), cached("key-a", cache_salt="y"), cached("key-b"),
            cached("key-b", cache_salt="x")] == [0] * 5
    assert [cached("key-a"), cached("key-a", cache_salt="x"), cached("key-b", cache_salt="x")] == [384] * 3


def test_the_async_client_does_the_same(served) -> None:
    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="key-a", max_retries=0, timeout=60) as client:
            ask: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "temperature": 0}
            first, second, text = await asyncio.gather(
                client.chat.completions.create(**ask), client.chat.completions.create(**ask, logprobs=True),
                client.completions.create(model=MODEL, prompt=TEXT, max_tokens=12, temperature=0))
            assert first.choices[0].message.content == second.choices[0].message.content == text.choices[0].text
            assert len(second.choices[0].logprobs.content) == 12
            said = ""
            async for chunk in await client.chat.completions.create(**ask, stream=True):
                said += chunk.choices[0].delta.content or ""
            assert said == text.choices[0].text
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**{**ask, "messages": []})

    asyncio.run(talk())
