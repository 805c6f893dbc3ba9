"""Byte-pair encoding: a vocabulary of words over bytes, learned from a corpus.

The words are the 256 single bytes and one more for every merge of two words that often stand side by side (Sennrich
et al. 2016), so any bytes can be written and come back unchanged. A text is first cut into pieces: words with the space
before them, signs, white space. No merge crosses a cut (GPT-2); pieces repeat, so each distinct one is worked on once.
"""
import re
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from functools import cache, cached_property

import numpy as np
from tqdm import tqdm

from data.files import require

# every byte is in one piece, of at most 25
PIECE = re.compile(rb" ?[\w\x80-\xff]{1,24}| ?[^\s\w\x80-\xff]{1,24}|\s{1,24}")


def learn_merges(data, count):
    """count pairs of words, (int, int), the most frequent first: merge i makes word 256 + i. UserError if fewer exist.

    Counts of pairs are kept up to date: a merge touches the pieces that hold its pair, and no others.
    """
    require(1 <= count <= 2**16 - 256, f"--bpe {count} is not from 1 to {2**16 - 256:,}")
    found = Counter(match.group() for match in PIECE.finditer(memoryview(data)))
    pieces = [list(piece) for piece in found]
    weights = list(found.values())
    pairs = Counter()
    holders = defaultdict(set)  # the pieces that had the pair at some time
    for i, (piece, weight) in enumerate(zip(pieces, weights)):
        for pair in zip(piece, piece[1:]):
            pairs[pair] += weight
            holders[pair].add(i)
    merges = []
    for word in tqdm(range(256, 256 + count), desc="byte pairs", leave=False, disable=None):
        pair = max(pairs, key=pairs.get, default=None)  # the first one in a tie
        require(pairs[pair] > 1, f"--bpe {count}: after {len(merges)} merges no pair of words "
                                 "occurs twice; lower it or choose a larger --data")
        merges.append(pair)
        for i in holders.pop(pair):
            merged = merge(pieces[i], pair, word)
            for old in zip(pieces[i], pieces[i][1:]):
                pairs[old] -= weights[i]
            for new in zip(merged, merged[1:]):
                pairs[new] += weights[i]
                holders[new].add(i)
            pieces[i] = merged
        del pairs[pair]
    return merges


def check_merges(merges, vocab):
    """The merges as tuples. UserError unless vocab is the bytes and the merges, and those are pairs of words that exist
    by then, and make no word longer than a piece can be."""
    words = 256 + len(merges)
    require(vocab == words or not merges, f"vocab {vocab} is not {words}, the bytes and the merges")
    lengths = [1] * 256
    for pair in merges:
        known = (type(pair) in (tuple, list) and len(pair) == 2
                 and all(type(i) is int and 0 <= i < len(lengths) for i in pair))
        require(known and sum(lengths[i] for i in pair) <= 25,
                f"merges: {pair!r:.80} is no pair of words")
        lengths.append(lengths[pair[0]] + lengths[pair[1]])
    return tuple(map(tuple, merges))


def merge(words, pair, word):
    """The list with word for every occurrence of the pair, from the left: [1, 2, 1, 2, 3], (1, 2), 9 -> [9, 9, 3]."""
    out = []
    i = 0
    while i < len(words):
        both = words[i:i + 2] == [*pair]
        out.append(word if both else words[i])
        i += 1 + both
    return out


class BPE:
    """The vocabulary that merges make: words as bytes, texts as words, and the words in order, as a trie.

    sorted holds the words in the order of their bytes, order their numbers: words that begin alike stand side by side.
    """

    def __init__(self, merges=()):
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.words = [bytes([b]) for b in range(256)]
        for a, b in merges:
            self.words.append(self.words[a] + self.words[b])
        self.order = sorted(range(len(self.words)), key=self.words.__getitem__)
        self.sorted = [self.words[i] for i in self.order]
        self.encode_piece = cache(self.encode_piece)

    def encode(self, data):
        """Bytes, or an array of them -> words, an array of integers."""
        out = array("H")
        for piece in PIECE.findall(bytes(data)):
            out += self.encode_piece(piece)
        return np.array(out, np.uint16)

    def encode_piece(self, piece):
        """Always the merge that was learned first, until none applies."""
        words = list(piece)
        while len(words) > 1:
            pair = min(zip(words, words[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                break
            words = merge(words, pair, 256 + self.rank[pair])
        return array("H", words)

    def resume(self, text, lengths):
        """Where to encode a text anew of which some beginnings, of these lengths, have been read already.

        Returns the longest of them at which a piece of the text begins (lengths[0] must be such a place), the words
        from there to the last, without it, and the last one's bytes.
        """
        begins = [lengths[0] + match.start() for match in PIECE.finditer(text[lengths[0]:])]
        length = max(n for n in lengths if n in begins)
        *before, last = self.encode(text[length:]).tolist()
        return length, before, self.words[last]

    def span(self, prefix):
        """(first, end): the words that begin with prefix, or are it, are sorted[first:end]."""
        return bisect_left(self.sorted, prefix), bisect_left(self.sorted, prefix + b"\xff" * 99)

    @cached_property
    def letters(self):
        """(words, 25): the bytes of each word in order, and 256 after its end."""
        return np.array([[*word, *[256] * (25 - len(word))] for word in self.sorted])

    def reveal(self, q, word, known=0):
        """The distributions (len(word) - known, 256) of a word's bytes after the first `known`, if it is drawn from q.

        q holds the probabilities of the words in order. Byte i is b with the mass of all words that begin with
        word[:i] + b, divided by that of all that begin with word[:i] and are longer. With the words a and ab, byte 1
        of ab is certain: whether the word ends is a draw of its own, made before the next byte is drawn. It decides
        whether a byte is guessed at all, and not which.
        """
        mass = np.zeros((len(word) - known, 257), q.dtype)
        for row, i in zip(mass, range(known, len(word))):
            same = slice(*self.span(word[:i]))
            np.add.at(row, self.letters[same, i], q[same])
        mass = mass[:, :256]
        return mass / mass.sum(1, keepdims=True)


def in_words(corpus, merges):
    """The corpus as the words that byte-pair merges make of it; without merges the corpus itself."""
    if not merges or not len(corpus.val):
        return corpus
    bpe = BPE(merges)
    val = bpe.encode(corpus.val)
    return corpus._replace(train=bpe.encode(corpus.train), val=val,
                           bytes_per_token=len(corpus.val) / len(val))
