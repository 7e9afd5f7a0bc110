"""The edge in front of a real cluster: text, limits, tenants, leaving callers and bad input, and nothing left behind."""

from __future__ import annotations

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from kvbank import Client, errors


def test_text_streams_as_the_tokenizer_decodes_and_stops_where_it_was_told(cluster, model_folder) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    with Client(cluster(workers=1, lenders=0).address) as client:
        for seed in range(4):
            job = client.submit("Grüße aus 東京 🙂 " * 5, max_tokens=60, temperature=1.0, seed=seed)
            deltas, result = list(job.stream()), job.result()
            assert "".join(delta.text for delta in deltas) == result.text == tokenizer.decode(result.token_ids)
            assert [i for delta in deltas for i in delta.token_ids] == result.token_ids
        stop = result.text[20:24]
        stopped = client.generate("Grüße aus 東京 🙂 " * 5, max_tokens=60, temperature=1.0, seed=3, stop=stop)
        assert stopped.text == result.text[:result.text.index(stop)] and stopped.finish_reason == "stop"
        assert result.token_ids[:len(stopped.token_ids)] == stopped.token_ids


def test_openais_client_speaks_to_a_real_cluster_and_hears_of_the_cache(cluster, text) -> None:
    client = openai.OpenAI(base_url=cluster(workers=1, lenders=0).address + "/v1", api_key="any")
    (model,) = client.models.list().data
    ask = {"model": model.id, "prompt": text(200), "max_tokens": 12, "temperature": 0}
    first = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == first.choices[0].text
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 192       # all but the last block


def test_the_longest_job_is_served_and_one_token_more_is_too_long(cluster, text, quiet) -> None:
    with Client(cluster(workers=1, lenders=1).address) as client:            # 6 spans of its own and 6 to borrow
        assert len(client.generate(text(1500), max_tokens=36).token_ids) == 36
        with pytest.raises(errors.TooLong, match="1537 together, the whole cluster holds 1536"):
            client.submit(text(1500), max_tokens=37)
        with pytest.raises(errors.TooLong, match="the model reads 32768"):
            client.submit(text(10), max_tokens=40_000)
        quiet(client)


def test_a_deadline_and_a_leaving_caller_give_their_blocks_back(cluster, text, quiet, until) -> None:
    address = cluster(workers=1, lenders=1).address
    with Client(address) as client:
        with pytest.raises(errors.DeadlineExceeded):
            client.generate(text(1000), max_tokens=500, deadline_s=0.3)
        quiet(client)
        body = {"prompt": text(1000, 1), "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as answer:
            until(lambda: client.status().jobs)
            assert answer.status_code == 200
        until(lambda: not client.status().jobs)
        quiet(client)


def test_tenants_with_the_same_prompt_share_nothing(cluster, text) -> None:
    address = cluster(workers=1, lenders=0, device_blocks=256, api_keys={"key-a": "a", "key-b": "b"}).address
    a, b = (Client(address, api_key=key) for key in ("key-a", "key-b"))
    prompt = text(300)
    receipts = [client.generate(prompt, max_tokens=4).receipt.reused for client in (a, b, a, b)]
    assert [sum(reused.values()) for reused in receipts] == [0, 0, 288, 288]
    for client in (Client(address), Client(address, api_key="wrong")):
        with pytest.raises(errors.Unauthorized):
            client.status()


@pytest.mark.slow
def test_tenants_with_the_same_prompts_share_no_frame_on_any_tier(cluster, text) -> None:
    """Three prompts that together need three times the device, so that host, Redis and the neighbour's cache are all used."""
    import redis

    one = cluster(workers=1, lenders=1, device_blocks=48, host_bytes="3MiB", redis="embedded", redis_bytes="64MiB",
                  api_keys={"key-a": "a", "key-b": "b"})
    a, b = (Client(one.address, api_key=key) for key in ("key-a", "key-b"))
    prompts = [text(700, seed) for seed in range(3)]

    def rounds(client: Client) -> dict[str, int]:
        found: dict[str, int] = {}
        for prompt in (*prompts, *prompts):
            for source, tokens in client.generate(prompt, max_tokens=2).receipt.reused.items():
                found[source] = found.get(source, 0) + tokens
        return found

    def frames() -> set[bytes]:
        with redis.Redis.from_url(one._redis.url) as server:
            return {bytes(name) for name in server.scan_iter(match=b"kvb:*", count=1000) if server.type(name) == b"string"}

    first = [a.generate(prompt, max_tokens=2).receipt.reused for prompt in prompts]
    assert not any(first)
    assert {"redis", "host"} <= set(rounds(a)) | set(rounds(a))
    of_a = frames()
    assert of_a
    first = [b.generate(prompt, max_tokens=2).receipt.reused for prompt in prompts]
    assert not any(first), "b was served what a had computed"
    rounds(b)
    of_b = frames() - of_a
    assert of_b and not {name.split(b":")[1] for name in of_b} & {name.split(b":")[1] for name in of_a}


def test_bad_input_of_every_kind_leaves_the_cluster_unharmed(cluster, text, quiet) -> None:
    address = cluster(workers=1, lenders=0).address
    prompt = text(100)
    with Client(address) as client:
        expected = client.generate(prompt, max_tokens=8).token_ids
        bad = [{"prompt": ""}, {"prompt": []}, {"prompt": [512]}, {"prompt": [-1]}, {"prompt": "\ud800"},
               {"prompt": prompt, "max_tokens": 0}, {"prompt": prompt, "max_tokens": 10**12}, {"prompt": [1] * 40_000},
               {"prompt": prompt, "temperature": -1}, {"prompt": prompt, "policy": "unknown"},
               {"prompt": prompt, "stop": [""]}, {"prompt": prompt, "stop_token_ids": [10**9]}]
        for _ in range(3):
            for body in bad:
                with pytest.raises(errors.InvalidRequest):
                    client.submit(**body)
            for raw in (b"\xff", b"{", b'{"prompt": "\xff"}', b"[" * 50_000):
                assert httpx.post(f"{address}/v1/completions", content=raw).status_code == 400
        assert client.generate(prompt, max_tokens=8).token_ids == expected
        quiet(client)
        assert httpx.get(f"{address}/health").status_code == 200
