"""A model folder's tokenizer.json. Imports no torch: the gateway uses it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from kvbank.errors import InvalidRequest, ModelError


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The folder's tokenizer, with truncation and padding switched off. Raises ModelError naming the file."""
    path = Path(folder) / "tokenizer.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. kvbank needs the fast tokenizer file; "
                         "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` writes one") from error
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:               # the library raises bare Exception for everything it finds in the file
        raise ModelError(f"{path} is not a tokenizer that can be read: {error}") from error
    tokenizer.no_truncation()                # a prompt is served whole or refused
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, special_tokens: bool = True) -> list[int]:
    """The text's token ids, with the special tokens the model expects around it. Other threads run meanwhile. Raises
    InvalidRequest.

    A lone surrogate is half a character: JSON can carry it, no tokenizer can.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt holds a lone surrogate U+{ord(text[error.start]):04X} at character "
                             f"{error.start}; send well-formed Unicode") from error
    # As the tokenizer's own `encode` gives them, without their places in the text: in half the time, and without the
    # interpreter, which that one keeps (0.23: 7 s for 8 million characters).
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids)
