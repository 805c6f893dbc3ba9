"""WordPiece, the tokens of BERT and BiGS's released weights (Wu et al. 2016): whole words, or a beginning and ##pieces.

Text is lower-cased and loses its accents; every punctuation mark and Chinese character is a word of its own. A word
becomes the longest piece of the vocabulary that it begins with, then the longest ##piece of what is left, and so on.
"""
import re
import unicodedata

from data.files import UserError, require

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
LONGEST = 100  # characters; a longer word is unknown


def stands_alone(c):
    """Punctuation, which for ASCII is all that is neither letter nor digit, and Chinese."""
    if "!" <= c <= "~":
        return not c.isalnum()
    chinese = any(first <= ord(c) <= last for first, last in CHINESE)
    return chinese or unicodedata.category(c).startswith("P")


def drop(text, *categories):
    """The text without the characters of some categories of Unicode."""
    return "".join(c for c in text if unicodedata.category(c) not in categories)


def split_words(text):
    """The words and marks of a text, lower-cased, without accents and control characters."""
    text = drop(re.sub(r"[\t\n\r]", " ", text).replace("\ufffd", ""), "Cc", "Cf")
    text = drop(unicodedata.normalize("NFD", text), "Mn").lower()  # accents are characters there
    return "".join(f" {c} " if stands_alone(c) else c for c in text).split()


class WordPiece:
    """pieces: the vocabulary in the order of its ids, one per line of vocab.txt.

    length: how many tokens the model reads, 0 for any number. BiGS's weights were trained on texts padded to the last
    position, and padding flows into them, so a text to fill is padded likewise.
    """

    def __init__(self, pieces, length=0):
        self.pieces = list(pieces)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.length = length
        missing = ", ".join(piece for piece in SPECIAL if piece not in self.ids)
        require(not missing, f"the vocabulary lacks {missing}; expected BERT's vocab.txt")
        self.mask = self.ids["[MASK]"]

    def pieces_of(self, word):
        """The pieces of one word, or [UNK] alone if it cannot be cut into any."""
        found = []
        rest = word
        while rest and len(word) <= LONGEST:
            sharps = "##" if found else ""
            fits = (sharps + rest[:end] for end in range(len(rest), 0, -1))
            piece = next((piece for piece in fits if piece in self.ids), None)
            if piece is None:
                return ["[UNK]"]
            found.append(piece)
            rest = rest[len(piece) - len(sharps):]
        return found or ["[UNK]"]

    def encode(self, text):
        """Ids of [CLS] text [SEP]; special tokens that stand in the text are themselves."""
        pieces = ["[CLS]"]
        for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
            if part in SPECIAL:
                pieces.append(part)
            else:
                pieces += [p for word in split_words(part) for p in self.pieces_of(word)]
        return [self.ids[piece] for piece in [*pieces, "[SEP]"]]

    def decode(self, tokens):
        """The text without its special tokens, as bytes."""
        pieces = [self.pieces[i] for i in tokens]
        text = " ".join(piece for piece in pieces if piece not in ("[CLS]", "[SEP]", "[PAD]"))
        return text.replace(" ##", "").encode()

    def holes(self, text, count):
        """Every run of underscores is a hole of one token, as is [MASK]; count is for vocabularies of bytes."""
        ids = self.encode(re.sub("_+", "[MASK]", text.decode(errors="replace")))
        require(self.mask in ids, "--fill has no hole; write ____ where a word is missing")
        require(len(ids) <= (self.length or len(ids)), f"--fill is {len(ids)} tokens, the model "
                f"reads at most {self.length}; shorten it")
        return ids + [self.ids["[PAD]"]] * (self.length - len(ids))


def read_vocabulary(path, size=0, length=0):
    """The WordPiece of a vocab.txt, for models of size tokens (0: any) that read length of them, or a UserError."""
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is needed to turn words into tokens: {e}") from e
    require(size in (0, len(pieces)), f"{path.name} has {len(pieces):,} pieces, the model "
                                      f"{size:,}; take the one that was published with it")
    return WordPiece(pieces, length)
