"""Anything at all at every door: HTTP bodies, every RPC of real members, settings. Refused in words, or served; never broken.

In CI a few hundred of each; `pytest --hypothesis-profile=long` takes minutes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbank.cluster import config
from kvbank.cluster.control import Control
from kvbank.cluster.settings import SECTIONS
from kvbank.errors import ConfigError, KVBankError
from kvbank.kvstore.transport import rpc
from kvbank.workers.models.random_model import write_random_model
from tests.cluster.test_route_walk import methods_of
from tests.workers.conftest import TOKEN, Town

FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def bounded(examples: int) -> Callable[[Any], Any]:
    """As many, or what the profile on the command line says, in a time to match."""
    most = settings().max_examples
    long = most > 1000

    def apply(test: Any) -> Any:
        made = settings(max_examples=most if long else examples, deadline=None, suppress_health_check=FIXTURE)(test)
        return pytest.mark.timeout(3600)(made) if long else made

    return apply


# -- HTTP --------------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
                    st.sampled_from(["", "a" * 300, "\ud800", "\0", "../x", "<script>", "-1", "1e999"]))
JSON = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=4)), max_leaves=12)
FIELDS = [
    "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stop_token_ids", "ignore_eos", "deadline_s", "policy", "job_id", "model", "stream", "stream_options", "n", "best_of",
    "echo", "logprobs", "top_logprobs", "suffix", "logit_bias", "presence_penalty", "user", "cache_salt", "return_token_ids",
    "unknown"]
ODD_BYTES = [b"[" * 100_000, b'{"a":' * 20_000, b"\xef\xbb\xbf{}", b"nan", b'{"prompt":1e400}']
ODD_FILES = [b"a: &a [*a]", b"? {}", b"!!python/object/apply:os.system [true]", b"a: 1\na: 2", b"\x00", b"- " * 2000, b"{" * 2000,
             b"&a " * 50, b"a: 2001-99-99", b"a: " + b"9" * 5000]
SOUND = {"prompt": [1, 2, 3], "max_tokens": 2}
BODIES = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).map(lambda some: {**SOUND, **some}),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), JSON)
POSTS = ["/v1/completions", "/v1/chat/completions", "/v1/jobs", "/tokenize", "/detokenize", "/v1/jobs/x/cancel"]


@pytest.fixture()
def gateway(make_worker, make_server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=make_server(make_worker("worker-0")).address, timeout=20) as client:
        yield client


def check(answer: httpx.Response) -> None:
    """An answer, or an error as everybody knows it. 503 and 504 are states of the cluster; 500 is a fault of ours."""
    assert answer.status_code not in (500, 501, 502), (answer.status_code, answer.text[:300])
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["code"] and error["message"] and "Traceback" not in error["message"] and "/usr/" not in error["message"]


@bounded(250)
@given(body=BODIES, path=st.sampled_from(POSTS))
def test_any_json_at_any_route_is_served_or_refused_in_words(gateway, body, path) -> None:
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    check(gateway.post(path, content=raw, headers={"Content-Type": "application/json"}))


@bounded(150)
@given(raw=st.one_of(st.binary(max_size=200), st.sampled_from(ODD_BYTES)),
       path=st.sampled_from(POSTS))
def test_any_bytes_at_any_route_are_refused_in_words(gateway, raw, path) -> None:
    answer = gateway.post(path, content=raw)
    check(answer)
    assert 400 <= answer.status_code < 500


@bounded(150)
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#?"), max_size=40),
       method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"]), query=st.text(max_size=20))
def test_any_path_and_method_is_answered(gateway, path, method, query) -> None:
    answer = gateway.request(method, f"/v1/jobs/{path}", params={"wait_s": query, "from": query})
    assert answer.status_code not in (500, 501, 502)
    if method != "HEAD":
        check(answer)


# -- RPC ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, str]]]:
    """(address, method) of everything that a cluster with two shards and a lender serves."""
    model = tmp_path_factory.mktemp("model")
    write_random_model(model, seed=1, num_hidden_layers=2)
    town = Town(model, 1, shards=2)
    control = Control(TOKEN)
    address = control.start("127.0.0.1:0")
    found = [(address, method) for method in methods_of(control._server)]
    found += [(member.address, method) for member in (town.lenders[0], town.worker, town.followers[1])
              for method in methods_of(member._server)]
    yield found
    for address, method in found:
        if method in ("kvbank.Control/Snapshot", "kvbank.Jobs/Status"):
            with rpc.channel(address, TOKEN) as channel:
                channel.unary_unary(f"/{method}")(b"", timeout=10)
    control.stop()
    town.stop()


@pytest.fixture(scope="module")
def channels(members) -> Iterator[dict[str, grpc.Channel]]:
    made = {address: rpc.channel(address, TOKEN) for address, _ in members}
    yield made
    for channel in made.values():
        channel.close()


@bounded(300)
@given(data=st.data())
def test_any_bytes_at_any_rpc_end_in_time_and_break_nothing(members, channels, data) -> None:
    address, method = data.draw(st.sampled_from(members))
    message = st.one_of(st.binary(max_size=64), st.binary(min_size=1, max_size=8).map(lambda head: head + bytes(5000)))
    messages = data.draw(st.lists(message, min_size=1, max_size=3))
    call = channels[address].stream_stream(f"/{method}")(iter(messages), timeout=5)
    try:
        for _ in call:
            call.cancel()
    except grpc.RpcError as error:
        code, said = error.code(), error.details() or ""
        assert code != grpc.StatusCode.UNKNOWN, f"{method} met an exception of its own: {said}"
        assert code != grpc.StatusCode.INTERNAL or "deserializing" in said, (method, said)


# -- settings ----------------------------------------------------------------------------------------------------------

NAMES = [name for section in SECTIONS.values() for name in section.__dataclass_fields__]
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=6), SCALARS, max_size=3),
                   st.sampled_from([math.nan, math.inf, -1, 0, 10**30, "1e9999", "9" * 24 + "GiB", "9" * 5000, b"x"]))


@bounded(600)
@given(values=st.dictionaries(st.one_of(st.sampled_from([*NAMES, *SECTIONS]), st.text(max_size=10)), VALUES, max_size=4))
def test_any_settings_are_sound_or_a_config_error(values) -> None:
    try:
        made = config.load(values, environ={})
    except ConfigError as error:
        assert str(error)
        return
    assert config.load(made.flat(), environ={}).flat() == made.flat()


@bounded(200)
@given(text=st.one_of(st.binary(max_size=120), st.sampled_from(ODD_FILES)), ending=st.sampled_from([".yaml", ".toml"]))
def test_any_file_is_settings_or_a_config_error(tmp_path_factory, text, ending) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / f"fuzzed{ending}"
    path.write_bytes(text)
    try:
        config.load(path, environ={})
    except KVBankError as error:
        assert isinstance(error, ConfigError)
