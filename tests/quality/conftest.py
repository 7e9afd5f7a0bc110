"""A small world of held-out text and a model that was never trained: enough for everything but answers that are right."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from bench.needle import export, tokenizer
from bench.needle.corpus import Piece
from bench.needle.filler import Filler
from bench.needle.model import Llama, Shape
from bench.needle.sample import Speller
from bench.needle.tasks import World
from bench.needle.words import is_held_out
from bench.quality.attention import Prefilled
from bench.quality.subject import Subject, Turn

ROOT = Path(__file__).resolve().parent.parent.parent


def piece(path: Path, kind: str) -> Piece:
    """A file of this project, under a name that the split holds out."""
    name = next(name for number in count() if is_held_out(name := f"{path.name}/{number}"))
    return Piece(name, kind, path.read_text(encoding="utf-8").encode("ascii", "replace").decode())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    made = tmp_path_factory.mktemp("quality")
    texts = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.py")]]
    tokenizer.train_tokenizer(texts).save(str(made / "tokenizer.json"))
    shape = Shape(hidden_size=64, intermediate_size=96, num_hidden_layers=3, head_dim=16)
    model = Llama(shape)
    model.begin(seed=3)
    export.write_folder(made, model.state_dict(), shape, made / "tokenizer.json")
    return made


@pytest.fixture(scope="session")
def world(folder: Path) -> World:
    loaded = tokenizer.load(folder / "tokenizer.json")
    pieces = [piece(ROOT / name, kind) for name, kind in (
        ("docs/tour.md", "prose"), ("docs/promises.md", "prose"), ("cluster/cli.py", "code"))]
    return World(Speller(loaded), Filler(pieces, loaded, held_out=True), held_out=True)


@pytest.fixture(scope="session")
def subject(folder: Path) -> Subject:
    torch.set_num_threads(1)
    return Subject(folder)


@pytest.fixture(scope="session")
def context(subject: Subject) -> Prefilled:
    generator = torch.Generator().manual_seed(5)
    return subject.prefill(torch.randint(3, 1536, (61,), generator=generator).tolist(), "page")


@pytest.fixture(scope="session")
def turns() -> list[Turn]:
    """Three questions of different lengths."""
    numbers = torch.randint(3, 1536, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    return [Turn(numbers[:7], numbers[7:10]), Turn(numbers[10:12], numbers[12:13]), Turn(numbers[13:25], numbers[25:34])]
