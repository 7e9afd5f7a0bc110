"""Facts hidden in a long document and asked for at its end: an answer that has them was looked up, not guessed.

Names and numbers are ones that the needle model (bench/needle) never saw in training; any other model may be asked too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NEAR = 0.02                          # of the text: a line break within it is near


@dataclass(frozen=True, slots=True)
class Planted:
    """One question. told: sentences and how deep in the document each stands, 0 (its beginning) to 1 (its end)."""

    told: tuple[tuple[float, str], ...]
    question: str
    wanted: str

    def is_in(self, answer: str) -> bool:
        """Whether the last number of the answer's first line is what was asked for. What a model says after that line,
        another question perhaps, is no answer to this one."""
        line = answer.strip().partition("\n")[0]
        return re.findall(r"\d+(?:\.\d+)*", line)[-1:] == [self.wanted]

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
    """The text with every told sentence on a line of its own, at the line break nearest to its depth; where lines are so
    long that none is near, the line is broken at the nearest space."""
    breaks, spaces = ([0, *(at.end() for at in re.finditer(what, text)), len(text)] for what in ("\n", r"\s"))
    told = sorted(((depth, sentence) for each in PLANTED for depth, sentence in each.told), reverse=True)
    length = len(text)
    for depth, sentence in told:                             # from the end, so that what lies before stays where it was
        wanted = depth * length
        at = _nearest(breaks, wanted)
        if abs(at - wanted) > NEAR * length:
            at = _nearest(spaces, wanted)
        before = text[:at] if not at or text[at - 1] == "\n" else f"{text[:at]}\n"
        text = f"{before} {sentence}\n{text[at:]}"
    return text


def _nearest(places: list[int], wanted: float) -> int:
    return min(places, key=lambda place: abs(place - wanted))
