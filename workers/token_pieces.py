"""What a single token stands for, as bytes: half a character is a token, too. Imports no torch: the gateway uses it.

    vocabulary     "Ġthe"  (byte-level: each character is a byte)     "▁the", "<0xE2>"  (sentencepiece)      "##ing"
    piece          b" the"                                            b" the", b"\\xe2"                        its decoded text
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

META_SPACE = "\u2581"                        # how sentencepiece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenPieces:
    """Of one tokenizer. Joined pieces of an answer's tokens are its text in UTF-8, but for a space at its beginning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = "" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()
        self._byte_of = {c: byte for byte, c in enumerate(byte_alphabet())} if '"ByteLevel"' in steps else None
        self._sentencepiece = '"ByteFallback"' in steps or '"Metaspace"' in steps
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token: each.content.encode() for token, each in added.items()}
        self._unseen = frozenset(token for token, each in added.items() if each.special)

    def piece(self, token: int) -> bytes:
        """Its bytes, of special tokens too; empty for an id without a token."""
        if token in self._added:
            return self._added[token]
        written = self._tokenizer.id_to_token(token)
        if written is None:
            return b""
        if self._byte_of is not None and all(c in self._byte_of for c in written):
            return bytes(self._byte_of[c] for c in written)
        if self._sentencepiece:
            byte = _BYTE.fullmatch(written)
            return bytes.fromhex(byte[1]) if byte else written.replace(META_SPACE, " ").encode()
        return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()

    def shown(self, token: int, *, first: bool) -> bytes:
        """What of the piece stands in an answer's text; `first`: it begins the answer, where some decoders drop a space."""
        if token in self._unseen:
            return b""
        piece = self.piece(token)
        if first and piece.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
            return piece[1:]
        return piece


def byte_alphabet() -> list[str]:
    """How byte-level vocabularies, GPT-2's and its heirs', write each byte: as the printable Latin-1 character that it is,
    else as the next free one from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(0x100 + others.index(byte)) for byte in range(256)]
