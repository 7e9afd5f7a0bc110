"""Facts hidden in a long document and asked for at its end: an answer that has them was looked up, not guessed.

Names and numbers are ones that the needle model (bench/needle) never saw in training; any other model may be asked too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Planted:
    """One question. told: sentences and how deep in the document each stands, 0 (its beginning) to 1 (its end)."""

    told: tuple[tuple[float, str], ...]
    question: str
    wanted: str

    def is_in(self, answer: str) -> bool:
        """Whether the answer names what was asked for and nothing that was planted for another question."""
        return self.wanted in answer and not any(each.wanted in answer for each in PLANTED if each is not self)

    @property
    def prompt(self) -> str:
        return f"\nQuestion: {self.question}\nAnswer:"


PLANTED = (
    Planted(((0.08, "The code of quiet bridge is 7864."),), "what is the code of quiet bridge?", "7864"),
    Planted(((0.45, "The price of eager rocket is 8889."),), "what is the price of eager rocket?", "8889"),
    Planted(((0.93, "The room of loyal fountain is 3659."),), "what is the room of loyal fountain?", "3659"),
    Planted(((0.70, "Set proud salmon = honest cloud."), (0.25, "Set honest cloud = 6966.")),
            "what is the value of proud salmon?", "6966"),
)


def plant(text: str) -> str:
    """The text with every told sentence on a line of its own, before the line that begins nearest to its depth."""
    lines = text.splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    told = sorted((depth, sentence) for each in PLANTED for depth, sentence in each.told)
    for depth, sentence in reversed(told):
        at = min(range(len(begins)), key=lambda number: abs(begins[number] - depth * len(text)))
        lines.insert(at, f" {sentence}\n")
    return "".join(lines)
