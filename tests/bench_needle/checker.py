"""Solves a sample of the needle tasks from its tokens alone: what is told is read from the text, never from the generator.

A generator that marks the wrong token, asks for what was never told, or tells a key twice is found here.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

from bench.needle.sample import Sample

KEY = r"[a-z]+ [a-z]+"
TOLD = re.compile(rf"(?:The|the) ([a-z]+) of ({KEY}) is (\d{{4}})\.")
SCORED = re.compile(rf"Score: ({KEY}) (\d\d)\.")
SET = re.compile(rf"Set ({KEY}) = ({KEY}|\d{{4}})\.")
LISTED = re.compile(rf"({KEY}) is (\d{{4}});")
TURN = re.compile(r"\nQuestion: ([^\n]*)\nAnswer:([^\n]*)</s>")


def marked(tokenizer: Tokenizer, sample: Sample) -> list[str]:
    """The text of each answer as the sample marks it, in order."""
    spans: dict[int, list[int]] = {}
    for token, number in zip(sample.ids, sample.answer, strict=True):
        if number:
            spans.setdefault(number, []).append(token)
    return [tokenizer.decode(spans[number], skip_special_tokens=False) for number in sorted(spans)]


def solve(tokenizer: Tokenizer, sample: Sample) -> list[str]:
    """The right answers, worked out from the tokens."""
    text = tokenizer.decode(sample.ids, skip_special_tokens=False)
    return {"copy": _copy, "recall": _listed, "stream": _listed}.get(sample.task, _questions)(text)


def _questions(text: str) -> list[str]:
    story = text.split("\nQuestion: ")[0]
    assert text.count("\nQuestion: ") == len(TURN.findall(text))
    return [_answer(story, question) for question, _ in TURN.findall(text)]


def _answer(story: str, question: str) -> str:
    if found := re.fullmatch(rf"what is the ([a-z]+) of ({KEY})\?", question):
        attribute, key = found.groups()
        if attribute != "value":
            value = only({value for *told, value in TOLD.findall(story) if told == [attribute, key]})
            return f" {key} is {value}.</s>"
        chain = [key]
        while not chain[-1].isdigit():
            chain.append(only({right for left, right in SET.findall(story) if left == chain[-1]}))
        return f" {' = '.join(chain)}.</s>"
    found = re.fullmatch(rf"who scored more, ({KEY}) or ({KEY})\?", question)
    assert found, question
    one, other = found.groups()
    scores = {key: int(score) for key, score in SCORED.findall(story)}
    left, right = scores[one], scores[other]
    told = f" {one} {left}, {other} {right} {'less' if left > right else 'more'}"
    return f"{told}: {one if left > right else other}.</s>"


def _listed(text: str) -> list[str]:
    """The second time a key is listed, and later, its value is known."""
    known: dict[str, str] = {}
    answers = []
    for key, value in LISTED.findall(text):
        if key in known:
            answers.append(f" {known[key]}")
        known.setdefault(key, value)
    return answers


def _copy(text: str) -> list[str]:
    """One answer per token: joined, they are the text between the two marks."""
    begin = text.rindex("\nCopy:")
    return [text[text.rindex("\nText:", 0, begin) + 6: begin]]


def only(found: set[str]) -> str:
    (one,) = found
    return one
