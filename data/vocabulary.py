"""Vocabularies: the tokens that a model reads for the bytes that a person writes, and back.

    encode(prompt)       bytes -> token ids to go on from
    decode(tokens)       token ids -> bytes to show
    holes(text, count)   bytes -> token ids, with the id `mask` in every place that is to be filled
    mask                 the id that stands for a hole

Bytes has all four, Ids the first two, since no model that fills holes reads ids. WordPiece (wordpiece.py) has all but
encode of bytes, since its models only fill.
"""
import codecs
import sys
from itertools import chain
from pathlib import Path

from data.files import require
from data.wordpiece import read_vocabulary


class Bytes:
    """Token = byte, and one more for a hole. With crlf lines end in CR LF inside the model and in LF outside."""
    mask = 256

    def __init__(self, crlf=False):
        self.crlf = crlf

    def encode(self, prompt):
        """An empty prompt is a newline, because a model must read something before it writes."""
        prompt = prompt or b"\n"
        if self.crlf:
            prompt = prompt.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        return list(prompt)

    def decode(self, tokens):
        """With crlf every CR is dropped, because a CR and its LF may come in two calls."""
        text = bytes(tokens)
        return text.replace(b"\r", b"") if self.crlf else text

    def holes(self, text, count):
        """Every underscore is a hole of one byte; a text without any gets count of them at its end."""
        if b"_" not in text:
            text += b"_" * count
        return [self.mask if byte == ord("_") else byte for byte in text]


class Ids:
    """The token ids themselves, as numbers with spaces between, for models whose tokenizer is not here."""

    def __init__(self, size):
        self.size = size

    def encode(self, prompt):
        try:
            ids = [int(word) for word in prompt.split()]
        except ValueError:
            ids = []
        require(ids and min(ids) >= 0 and max(ids) < self.size, "the model reads tokens, not "
                f"bytes: --prompt takes their ids, from 0 to {self.size - 1}, and spaces")
        return ids

    def decode(self, tokens):
        return b"".join(b" %d" % token for token in tokens)


def vocabulary_of(path, config, layout, fill, crlf=False):
    """What the model of a checkpoint reads; UserError if it cannot fill where fill is asked for, or only that."""
    require(not config.merges,
            f"{path} reads words and only drafts: --ckpt MODEL_OF_BYTES --draft {path}")
    require(fill or not config.block,
            f"{path} is an encoder; give it --fill TEXT with underscores to fill")
    require(config.block or not fill,
            f"{path} is a causal model, which cannot fill holes; leave --fill out")
    if layout == "bigs":
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        return read_vocabulary(folder / "vocab.txt", config.vocab, config.n_position)
    require(not fill or config.vocab == Bytes.mask + 1,
            f"{path} has {config.vocab} tokens; filling bytes takes {Bytes.mask + 1}")
    return Bytes(crlf) if fill or config.vocab == 256 else Ids(config.vocab)


def show(texts, raw):
    """Texts, each in pieces of bytes, to standard output as they come: exact bytes, or characters with headings."""
    for i, pieces in enumerate(texts):
        if not raw:
            heading = f"--- {i + 1} of {len(texts)}\n" if len(texts) > 1 else ""
            characters = codecs.iterdecode(pieces, "utf-8", "replace")  # as soon as they are complete
            pieces = map(str.encode, chain([heading], characters, ["\n"]))
        for piece in pieces:
            if hasattr(sys.stdout, "buffer"):
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            else:  # a notebook's takes characters only
                sys.stdout.write(piece.decode("utf-8", "replace"))
