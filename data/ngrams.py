"""What followed before: a guess by copying from the text itself, and a distribution from the n-grams of a corpus.

The distribution costs no training:

    p_n = (counts + 20 p_m) / (all counts + 20)   for the last n = 2, 4 and 8 bytes, m being the length before n

counts are those of the bytes that follow the last n bytes in the corpus, and p_0 gives all bytes 1/256. Each length is
a Dirichlet prior for the next (MacKay and Peto 1995).
"""
import numpy as np

LENGTHS = (2, 4, 8)
PRIOR = 20    # the prior counts as much as so many bytes
ENOUGH = 500  # places that are counted for one context


def copied(text, k):
    """Up to k bytes that followed the longest suffix of the text, of 3 to 32 bytes, where it occurred last before."""
    for length in range(min(32, len(text) - 1), 2, -1):
        place = text.rfind(text[-length:], 0, len(text) - 1)
        if place >= 0:
            return text[place + length:place + length + k]
    return b""


class NgramCounts:
    """The places of a corpus, sorted by the 8 bytes before each, from the last of them backwards.

    Contexts with the same end lie side by side, so two binary searches find all that follows one of them:

        corpus      a b c a b d
        place       0    1    4     2    5      3    6
        before it   .    a    abca  ab   abcab  abc  abcabd
        follows     a    b    b     c    d      a    newline        after ab come c and d

    They are sorted as numbers of 64 bits with the last byte highest.
    corpus: an array of bytes. Memory: 9 bytes per byte of it, about 30 while it is sorted.
    """

    def __init__(self, corpus):
        corpus = np.asarray(corpus, np.uint8)
        padded = np.concatenate([np.zeros(8, np.uint8), corpus])
        before = np.lib.stride_tricks.sliding_window_view(padded, 8)  # (len(corpus) + 1, 8)
        keys = np.ascontiguousarray(before).view("<u8")[:, 0]  # keys[i] is that of corpus[:i]
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        after = np.append(corpus, np.uint8(ord("\n")))  # the corpus ends a line
        self.following = after[order]

    def predict(self, context):
        """The distribution (256,) of the byte after context, bytes of which the last 8 count.

        A context with 500 places or more is counted at every second, third, .. of them, 250 to 500 in all.
        """
        place = int.from_bytes(context[-8:].rjust(8, b"\0"), "little")
        p = np.full(256, 1 / 256)
        for n in LENGTHS:
            if n > len(context):
                break
            beyond = 2 ** (64 - 8 * n) - 1  # the bits of the bytes before the last n
            first = np.searchsorted(self.keys, np.uint64(place & ~beyond))
            last = np.searchsorted(self.keys, np.uint64(place | beyond), side="right")
            stride = (last - first) // ENOUGH + 1
            counts = np.bincount(self.following[first:last:stride], minlength=256)
            p = (counts + PRIOR * p) / (counts.sum() + PRIOR)
        return p
