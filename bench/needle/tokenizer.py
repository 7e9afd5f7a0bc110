"""A byte-level BPE of 1,536 tokens: trained on the corpus, plus the tasks' own words as whole tokens.

A line break is always a token of its own and a number is read in pairs of digits, so text that is encoded piece by piece
(lines, words, numbers) has the same ids as when it is encoded whole; the tasks are built from encoded pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bench.needle.words import whole_words

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIALS = (BOS, EOS, PAD)
VOCAB = 1536
SPLIT = r"\n| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|[^\S\n]+(?=[^\S\n])|[^\S\n]"


def train_tokenizer(texts: Iterable[str], vocab: int = VOCAB) -> Tokenizer:
    """The tokenizer, with BOS put before every text that it encodes."""
    words = [_as_bytes(word) for word in whole_words()]
    texts, learned = list(texts), vocab - len(words)
    while True:
        known, merges = _learn(texts, learned)
        missing = [word for word in words if word not in known]
        if len(known) + len(missing) >= vocab:
            break
        learned += vocab - len(known) - len(missing)     # some words were learned anyway and leave room for more merges
    known |= {word: len(known) + at for at, word in enumerate(missing)}
    assert len(known) == vocab, f"{len(known)} tokens instead of {vocab}"
    return _with_words(known, merges)


def load(path: str | Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def _learn(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return dict(model["vocab"]), [(left, right) for left, right in model["merges"]]


def _with_words(known: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer in which a text between two splits that is an entry is that entry, merged or not."""
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def _as_bytes(word: str) -> str:
    """The word in byte-level spelling: a space is U+0120, ASCII is itself."""
    return word.replace(" ", "\u0120")
