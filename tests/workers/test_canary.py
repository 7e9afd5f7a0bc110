"""The canary on one worker: it answers what it answers alone, whatever the chunks, batches and settings, and dies of one bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvbank.errors import ConfigError, ModelError
from kvbank.workers.assembly import build_engine
from kvbank.workers.canary import VOCAB, write_canary
from kvbank.workers.canary_alone import CanaryAlone
from kvbank.workers.config import WorkerConfig
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.sampler import SamplingParams
from kvbank.workers.sequence import JobSpec


def engine_of(folder: Path, **settings):
    return build_engine(WorkerConfig(model=str(folder), **{"device_blocks": 512, **settings}), secret=b"s" * 32, digest="d")


def job(name: str, prompt: list[int], **more) -> JobSpec:
    return JobSpec(id=name, prompt=prompt, max_tokens=12, ignore_eos=True, **more)


@pytest.mark.parametrize("settings", [
    {}, {"exactness": "bitwise"}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"prefill_chunk_tokens": 77},
    {"span_tokens": 32, "block_size": 8},
], ids=str)
def test_one_worker_answers_what_the_canary_answers_alone(canary, run_jobs, prompt, settings) -> None:
    alone = CanaryAlone(canary, dtype=settings.get("dtype", "float32"))
    jobs = [job(f"j{length}", prompt(length, length), age=length) for length in (1, 15, 129, 400)]
    got = run_jobs(engine_of(canary, **settings), *jobs)
    for one in jobs:
        assert got.tokens[one.id] == alone.answer(one.prompt, one.max_tokens), one.id


@pytest.mark.parametrize("window", [1, 100, 300])
def test_a_window_hides_what_lies_behind_it(tmp_path, run_jobs, prompt, window) -> None:
    folder = write_canary(tmp_path, sliding_window=window)
    text, alone = prompt(900), CanaryAlone(folder)
    want = alone.answer(text, 12)
    assert run_jobs(engine_of(folder), job("a", text)).tokens["a"] == want
    assert want != CanaryAlone(write_canary(tmp_path / "whole")).answer(text, 12)


def test_sampling_draws_the_same_noise_as_the_canary_alone(canary, run_jobs, prompt) -> None:
    sampling = [SamplingParams(temperature=2.0, seed=seed) for seed in range(4)]
    jobs = [job(f"j{n}", prompt(50), sampling=params, age=n) for n, params in enumerate(sampling)]
    got = run_jobs(engine_of(canary), *jobs)
    alone = CanaryAlone(canary)
    for one in jobs:
        assert got.tokens[one.id] == alone.answer(one.prompt, 12, sampling=one.sampling)
    assert len({tuple(tokens) for tokens in got.tokens.values()}) > 1, "the noise chose nothing"


def test_tenants_models_and_prefixes_have_kv_of_their_own(canary, tmp_path, prompt) -> None:
    other = CanaryAlone(write_canary(tmp_path, seed=1))
    alone, text = CanaryAlone(canary), prompt(200)
    answers = [alone.answer(text, 4), alone.answer(text, 4, tenant="b"), other.answer(text, 4),
               alone.answer([text[0] + 1, *text[1:]], 4)]
    assert len({tuple(answer) for answer in answers}) == 4


def test_one_flipped_bit_in_a_slot_changes_the_next_token(canary, run_jobs, prompt) -> None:
    """Any slot, layer and token that the sequence can see; and no other memory of the worker matters."""
    text = prompt(300)
    want = CanaryAlone(canary).answer(text, 12)
    for number, offset in enumerate((0, 5_000, 40_000, 70_001, 98_303)):          # bytes within a slot of 98,304
        engine = engine_of(canary)
        arena, struck = engine.backend.arena, []

        def strike(offset=offset, engine=engine, arena=arena, struck=struck) -> None:
            (seq, *_) = engine.jobs() or [None]
            if seq is not None and seq.num_output == 5 and not struck:
                struck.append(True)
                arena.slot(seq.table.at(0).slot)[offset] ^= 1
                arena.slot(arena.num_slots - 1)[offset] ^= 1                      # nobody's: makes no difference

        got = run_jobs(engine, job("a", text), each_step=strike).tokens["a"]
        assert struck and got[:5] == want[:5]
        assert got[5] != want[5], f"flip {number} at byte {offset} went unseen"


def test_it_is_chosen_by_its_folder_and_by_nothing_else(canary) -> None:
    spec = read_config(canary)
    assert spec.model_type == "kvbank_canary" and spec.vocab_size == VOCAB
    assert torch.equal(engine_of(canary).backend.model.logits(torch.zeros(1, 16)).topk(4).values,
                       torch.tensor([[40.0, 39.0, 38.5, 38.0]]))


def test_a_folder_that_is_no_canary_after_all_is_refused(tmp_path) -> None:
    folder = write_canary(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    with pytest.raises(ModelError, match="head_dim"):
        engine_of(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cpu"):
        engine_of(folder, device="cuda")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="key"):
        engine_of(folder)
