"""The model under test: kvbank's own decoder. Computes a context once and answers questions on forks of it.

An answer is teacher forced: all its tokens are given at once, and it counts when each of them was the first choice where
it was due. Greedy decoding would have said exactly that answer, so the two agree.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.quality.attention import Fork, Prefilled, Reader, Recorder, Rows
from kvbank.errors import ModelError
from kvbank.workers.models.config_reader import read_config
from kvbank.workers.models.decoder import Decoder
from kvbank.workers.weights import load_weights


@dataclass(frozen=True, slots=True)
class Turn:
    """One question: the tokens that put it, and those that answer it."""

    prompt: list[int]
    answer: list[int]


@dataclass(slots=True)
class Answered:
    """One row per answer token of all turns, in order."""

    logits: Tensor                       # [S, vocab] float32, before the token was said
    target: Tensor                       # [S] what should be said
    turn: Tensor                         # [S]
    attended: Tensor                     # [layers, S, heads * d]: what attention gave in the forward that made the logits
    asked: list[Tensor]                  # by layer, queries [R, heads, d] of all rows
    asked_turn: Tensor                   # [R] the turn of a row that belongs to a question; -1: to an answer

    def question(self, turn: int) -> list[Tensor]:
        """By layer, the queries of one turn's prompt."""
        return [queries[self.asked_turn == turn] for queries in self.asked]

    @staticmethod
    def joined(each: list[Answered]) -> Answered:
        """Turns that were asked apart, in one piece and without their queries."""
        logits, target, turn = (torch.cat([getattr(one, name) for one in each]) for name in ("logits", "target", "turn"))
        return Answered(logits, target, turn, torch.cat([one.attended for one in each], dim=1), [], turn)


class Subject:
    """A model folder, in float32 on the CPU."""

    def __init__(self, folder: str | Path) -> None:
        self.config = read_config(folder)
        if any(self.config.windows):
            raise ModelError(f"{folder} has layers with a sliding window: the quality suite needs full attention in all")
        layers = range(self.config.num_layers)
        weights = load_weights(folder, self.config, layers, first=True, last=True, dtype="float32")
        self.decoder = Decoder(self.config, weights, layers, True, True)

    def prefill(self, ids: list[int], seed: str) -> Prefilled:
        """The context under full attention."""
        recorder = Recorder(seed)
        self.decoder.forward(torch.tensor(ids), None, torch.arange(len(ids)), recorder)
        return recorder.left

    def ask(self, context: Prefilled, fork: Fork, turns: list[Turn], first: int = 0) -> Answered:
        """Every turn for itself, right behind the context. first: the number that the first of them has on its page."""
        ids, positions, of, scored, target = [], [], [], [], []
        for number, turn in enumerate(turns, first):
            given = [*turn.prompt, *turn.answer[:-1]]
            begin = len(ids) + len(turn.prompt) - 1
            scored += range(begin, begin + len(turn.answer))
            target += turn.answer
            ids += given
            positions += range(context.length, context.length + len(given))
            of += [number] * len(given)
        rows, at = Rows(torch.tensor(positions), torch.tensor(of)), torch.tensor(scored)
        reader = Reader(fork, self.config.num_layers)
        reader.begin(rows)
        hidden = self.decoder.forward(torch.tensor(ids), None, rows.positions, reader)
        in_prompt = torch.cat([torch.arange(len(turn.prompt) + len(turn.answer) - 1) < len(turn.prompt) for turn in turns])
        attended = torch.stack([output[at].flatten(1) for output in reader.outputs])
        return Answered(self.decoder.logits(hidden[at]), torch.tensor(target), rows.turn[at], attended, reader.queries,
                        rows.turn.masked_fill(~in_prompt, -1))

    def decode(self, context: Prefilled, fork: Fork, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
        """Greedy tokens, one step each, and the seconds of every step but the first (which takes the whole prompt)."""
        reader, said, took = Reader(fork, self.config.num_layers), list[int](), list[float]()
        given, place = prompt, context.length
        while len(said) < steps:
            began = time.perf_counter()
            rows = Rows(torch.arange(place, place + len(given)), torch.zeros(len(given), dtype=torch.int64))
            reader.begin(rows)
            hidden = self.decoder.forward(torch.tensor(given), None, rows.positions, reader)
            said.append(int(self.decoder.logits(hidden[-1:]).argmax()))
            given, place = said[-1:], place + len(given)
            took.append(time.perf_counter() - began)
        return said, took[1:]
