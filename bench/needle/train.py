"""Trains the needle model: python -m bench.needle.train RUN_FOLDER [--seed N] [--stages FILE] [--pause-while FILE]

    RUN_FOLDER/tokenizer.json      made by the first call
    RUN_FOLDER/corpus.json         what it was made from and is trained on
    RUN_FOLDER/checkpoint/         weights, optimizer, where it stands; the next call goes on from here
    RUN_FOLDER/log.jsonl           a line per report: tokens, loss, answers right by task
    RUN_FOLDER/loss.svg            the same, drawn

One torch thread: on two shared cores a second one makes it slower. Stop it whenever you like.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.needle import checkpoint, corpus, plot, tokenizer
from bench.needle.curriculum import STAGES, Batch, Stage, answers_right, draw_batch
from bench.needle.filler import Filler
from bench.needle.model import Llama, Shape
from bench.needle.muon import Muon
from bench.needle.sample import Speller
from bench.needle.tasks import World

WARMUP_STEPS = 100
REPORT_STEPS = 50
SAVE_S = 60.0
CLIP = 1.0
MUON_LR = 10.0                           # of the matrices, in units of the others' rate: its steps have unit size
LAST_LR = 0.1                            # the last stage ends at this part of its learning rate
DECAY_FROM = 0.25                        # of the last stage's tokens


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.needle.train", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", type=Path, help="JSON list of stages in place of curriculum.STAGES")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, saved, after this long")
    parser.add_argument("--pause-while", type=Path, metavar="FILE", help="wait before each step while FILE exists")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    pieces = corpus.read_pieces()
    _same_corpus(args.folder / "corpus.json", corpus.described(pieces))
    world = open_world(args.folder, pieces)
    stages = tuple(Stage(**fields) for fields in json.loads(args.stages.read_text())) if args.stages else STAGES
    Trainer(args.folder, world, stages, args.seed).run(minutes=args.minutes, pause_while=args.pause_while)
    return 0


def _same_corpus(path: Path, found: dict[str, str | int]) -> None:
    """What a run is trained on is written down at its start; on another text it does not go on."""
    if not path.exists():
        path.write_text(json.dumps(found))
    elif (before := json.loads(path.read_text())) != found:
        raise SystemExit(f"this run began on another text: {before}, now {found}. Begin a new one, or bring the old text back.")


def open_world(folder: Path, pieces: list[corpus.Piece], *, held_out: bool = False) -> World:
    """One side of the corpus, and the folder's tokenizer, trained now if there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        tokenizer.train_tokenizer(piece.text for piece in pieces if not piece.held_out).save(str(path))
    loaded = tokenizer.load(path)
    return World(Speller(loaded), Filler(pieces, loaded, held_out=held_out), held_out)


class Trainer:
    """The loop, and all that a checkpoint must bring back."""

    def __init__(self, folder: Path, world: World, stages: tuple[Stage, ...], seed: int, shape: Shape | None = None) -> None:
        self.folder, self.world, self.stages, self.seed = folder, world, stages, seed
        self.model = Llama(shape or Shape())
        self.model.begin(seed)
        matrices = [weight for name, weight in self.model.named_parameters() if weight.dim() == 2 and "layers" in name]
        others = [weight for name, weight in self.model.named_parameters() if not (weight.dim() == 2 and "layers" in name)]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            Muon(matrices, lr=1e-3, weight_decay=0.01),
            torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0))
        self.step, self.stage, self.stage_tokens, self.tokens, self.seconds = 0, 0, 0, 0, 0.0
        if checkpoint.load(folder, self):
            self._forget_reports_after()

    def run(self, *, minutes: float = float("inf"), pause_while: Path | None = None) -> None:
        began = saved = time.monotonic()
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        losses: list[float] = []
        while self.stage < len(self.stages) and time.monotonic() - began < minutes * 60:
            while pause_while and pause_while.exists():
                time.sleep(1.0)
            stepped = time.monotonic()
            loss, found = self.train_step(draw_batch(self.world, self.stages[self.stage], self.seed, self.step))
            self.seconds += time.monotonic() - stepped
            losses.append(loss)
            for task, (good, of) in found.items():
                right[task][0] += good
                right[task][1] += of
            if self.step % REPORT_STEPS == 0:
                self._report(sum(losses) / len(losses), right)
                losses.clear()
                right.clear()
            if self.stage_tokens >= self.stages[self.stage].tokens:
                self.stage, self.stage_tokens = self.stage + 1, 0
            if time.monotonic() - saved > SAVE_S:
                checkpoint.save(self.folder, self)
                saved = time.monotonic()
        checkpoint.save(self.folder, self)

    def train_step(self, batch: Batch) -> tuple[float, dict[str, tuple[int, int]]]:
        """One update. The head is applied only where something is to be learned."""
        rate = self.learning_rate()
        for optimizer, scale in zip(self.optimizers, (MUON_LR, 1.0), strict=True):
            optimizer.zero_grad(set_to_none=True)
            optimizer.param_groups[0]["lr"] = rate * scale
        hidden = self.model(batch.tokens)
        logits = self.model.logits(hidden.flatten(0, 1)[batch.at])
        each = F.cross_entropy(logits, batch.target, reduction="none")
        loss = (each * batch.weight).sum() / batch.weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.tokens += batch.tokens.numel()
        self.stage_tokens += batch.tokens.numel()
        return float(loss.detach()), answers_right(batch, logits.detach().argmax(-1))

    def learning_rate(self) -> float:
        """Warm-up at the very beginning, the stage's own rate, and a straight way down at the end of the last stage."""
        stage = self.stages[self.stage]
        rate = stage.lr * min(1.0, (self.step + 1) / WARMUP_STEPS)
        if self.stage == len(self.stages) - 1:
            over = (self.stage_tokens / stage.tokens - DECAY_FROM) / (1.0 - DECAY_FROM)
            rate *= 1.0 - (1.0 - LAST_LR) * min(1.0, max(0.0, over))
        return rate

    def _forget_reports_after(self) -> None:
        """What was logged after the checkpoint will be done again."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def _report(self, loss: float, right: dict[str, list[int]]) -> None:
        shares = {task: round(good / of, 4) for task, (good, of) in sorted(right.items())}
        name = self.stages[self.stage].name
        line = {"step": self.step, "stage": name, "tokens": self.tokens, "seconds": round(self.seconds, 1),
                "loss": round(loss, 4), "right": shares}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        told = "  ".join(f"{task} {share:.3f}" for task, share in shares.items())
        print(f"{name:10s} step {self.step:6d}  {self.tokens / 1e6:6.2f}M tokens  {self.tokens / self.seconds:6.0f}/s  "
              f"loss {loss:.3f}  {told}", flush=True)
        if self.step % (REPORT_STEPS * 10) == 0:
            plot.draw_loss(self.folder / "log.jsonl", self.folder / "loss.svg")


if __name__ == "__main__":
    sys.exit(main())
