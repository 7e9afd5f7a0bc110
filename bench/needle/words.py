"""The names, numbers and phrases that the tasks are written with, and the rule that keeps some of them for evaluation.

A key is two words, `amber falcon`; a value is a number of four digits, which the tokenizer sees as two pairs. Every word
and every pair is one token, so that an answer is easy to spell and hard to guess: a model that answers has looked it up.
What is held out is a combination (a tenth of the keys, a tenth of the values), never a token.
"""

from __future__ import annotations

import hashlib
from random import Random

_ADJECTIVES = """amber azure brown bronze calm copper coral crimson curly dusty early eager faded fancy fierce gentle
giant golden hasty hidden hollow honest humble icy idle ivory jolly keen lazy lively lonely loyal lucky mellow merry misty
modest mossy narrow noble olive pale polite proud purple quick quiet rapid rusty salty scarlet shiny silver sleepy sturdy
sunny swift tender timid velvet violet wary wise yellow"""
_NOUNS = """acorn anchor arrow badger barrel basket beaver bridge candle canyon castle cedar cherry cliff cloud comet
cottage dolphin eagle falcon feather fiddle forest fountain fox garden glacier hammer harbor hazel heron hill island jaguar
kettle ladder lantern lemon lizard maple marble meadow mirror mountain otter owl parrot pebble pepper pigeon planet puffin
rabbit raven river rocket saddle salmon sparrow squirrel thistle tiger tulip walnut"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
ATTRIBUTES = ("code", "number", "price", "weight", "size", "room", "seat", "badge")
_PHRASES = "The the code of is Question what Answer Set scored points who more or and so value Text Copy Codes"
HELD_OUT_IN = 10                         # one combination in ten is never trained on


def is_held_out(text: str) -> bool:
    """Whether this key, value or file name is kept for evaluation; the same answer on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % HELD_OUT_IN == 0


def draw_keys(rng: Random, count: int, held_out: bool) -> list[str]:
    """Different keys, all of one side of the split."""
    found: dict[str, None] = {}
    while len(found) < count:
        key = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        if is_held_out(key) == held_out:
            found[key] = None
    return list(found)


def draw_value(rng: Random, held_out: bool) -> str:
    """A number of four digits."""
    while True:
        value = str(rng.randrange(1000, 10000))
        if is_held_out(value) == held_out:
            return value


def whole_words() -> list[str]:
    """What the tokenizer must know as one token, space and all."""
    words = [*ADJECTIVES, *NOUNS, *ATTRIBUTES, *_PHRASES.split()]
    words = [f" {word}" for word in words] + ["The", "Set", "Question", "Answer", "Text", "Copy", "Codes"]
    numbers = [f"{n:02d}" for n in range(100)] + [f" {n:02d}" for n in range(100)] + [f" {n}" for n in range(10)]
    marks = [" =", " ?", "?", ".", ",", ":", ";"]
    return list(dict.fromkeys([*words, *numbers, *marks]))
