"""A run's weights, optimizer and place on disk, written beside and then renamed: a stopped run loses minutes at most."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from bench.needle.train import Trainer

PLACE = ("step", "stage", "stage_tokens", "tokens", "seconds", "seed")


def save(folder: Path, trainer: Trainer) -> None:
    """Replace the folder's checkpoint by where `trainer` stands."""
    fresh, kept = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}, fresh / "weights.safetensors")
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    moments = {f"{names[id(weight)]}/{key}": value for optimizer in trainer.optimizers
               for weight, state in optimizer.state.items() for key, value in state.items()}
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "place.json").write_text(json.dumps({name: getattr(trainer, name) for name in PLACE}))
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(fresh, kept)


def load(folder: Path, trainer: Trainer) -> bool:
    """Bring `trainer` to where the folder's checkpoint stands, if there is one."""
    kept = folder / "checkpoint"
    if not (kept / "place.json").exists():
        return False
    trainer.model.load_state_dict(load_file(kept / "weights.safetensors"))
    moments = load_file(kept / "optimizer.safetensors")
    named = dict(trainer.model.named_parameters())
    for optimizer in trainer.optimizers:
        own = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for key, value in moments.items():
            name, moment = key.rsplit("/", 1)
            if id(named[name]) in own:
                optimizer.state[named[name]][moment] = value
    for name, value in json.loads((kept / "place.json").read_text()).items():
        setattr(trainer, name, value)
    return True
