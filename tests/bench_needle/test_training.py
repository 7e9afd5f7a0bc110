"""The loop learns, stops and goes on as if it had not stopped; what it exports is the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.needle import export, plot
from bench.needle.curriculum import Stage, draw_batch
from bench.needle.model import Llama, Shape, rotate, rotation
from bench.needle.muon import orthogonal
from bench.needle.tasks import World
from bench.needle.train import Trainer

STAGE = Stage(name="tiny", length=64, tokens=64 * 2 * 6, lr=2e-3, step_tokens=128, shares={"copy": 1, "stream": 1})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_a_run_that_was_stopped_ends_with_the_same_weights(world: World, tmp_path: Path) -> None:
    whole = Trainer(tmp_path / "whole", world, (STAGE, STAGE), seed=1)
    whole.run()
    half = Trainer(tmp_path / "halves", world, (STAGE,), seed=1)
    half.stages = (STAGE, STAGE)                  # the same rates; stopped by hand after the first
    while half.stage_tokens < STAGE.tokens:
        half.train_step(draw_batch(world, STAGE, 1, half.step))
    half.stage, half.stage_tokens = 1, 0
    half.run(minutes=0)
    rest = Trainer(tmp_path / "halves", world, (STAGE, STAGE), seed=1)
    assert (rest.step, rest.stage, rest.tokens) == (6, 1, STAGE.tokens)
    rest.run()
    assert rest.step == whole.step == 12
    assert all(torch.equal(tensor, weights(rest)[name]) for name, tensor in weights(whole).items())


@torch.inference_mode()
def test_the_first_weights_look_back_compare_and_copy() -> None:
    """Random tokens twice: layer 0 looks 1 to 4 back; layer 1 at what followed the first time, far more than by chance."""
    model = Llama(Shape())
    model.begin(seed=1)
    once = torch.randint(3, 1536, (4, 100), generator=torch.Generator().manual_seed(0))
    x = model.embed_tokens(torch.cat((once, once), dim=1))
    cos, sin = rotation(200, model.shape)
    for back, seen in enumerate(looks_at(model, 0, x, cos, sin).unbind(1), 1):
        assert seen.diagonal(-back, 1, 2).mean() > 0.9
    followed = looks_at(model, 1, model.layers[0](x, cos, sin), cos, sin)[:, :, 100:].diagonal(1, 2, 3)
    assert followed.mean() > 0.1


def looks_at(model: Llama, layer: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """How much each token attends to each before it, [B, heads, T, T]."""
    attention, x = model.layers[layer].self_attn, model.layers[layer].input_layernorm(x)
    batch, length, _ = x.shape
    q, k = (rotate(project(x).view(batch, length, -1, 32).transpose(1, 2), cos, sin)
            for project in (attention.q_proj, attention.k_proj))
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) / 32 ** 0.5
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def test_orthogonal_brings_singular_values_near_one() -> None:
    found = torch.linalg.svdvals(orthogonal(torch.randn(3, 48, 16, generator=torch.Generator().manual_seed(0))))
    assert found.min() > 0.3 and found.max() < 1.3


def test_what_is_exported_is_read_back_whole(world: World, tmp_path: Path) -> None:
    model = Llama(Shape())
    model.begin(seed=2)
    world.speller.tokenizer.save(str(tmp_path / "source.json"))
    export.write_folder(tmp_path / "model", model.state_dict(), model.shape, tmp_path / "source.json")
    again = export.read_model(tmp_path / "model")
    assert again.shape == model.shape
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_plot_is_an_image_of_the_log(tmp_path: Path) -> None:
    lines = [{"tokens": step * 1000, "loss": 7 / step, "right": {"copy": 0.1 * step}} for step in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot.draw_loss(tmp_path / "log.jsonl", tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_text().count("<polyline") == 2
