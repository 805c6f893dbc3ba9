"""Two tasks that a layer solves only if it chooses what to remember (Mamba, section 4.1), made in memory.

    selective_copy    ..c....a...f.===     ->  at each = the next letter read: c, a, f
    induction         kd#gcafe...mbh#      ->  what followed the first #: g

A convolution weighs a letter by how long ago it was, and here that says nothing: the letters lie anywhere, and the dots
or letters between have to pass without a trace.
"""
import numpy as np

from data.files import UserError

NO_TARGET = -100  # the target of a byte that nobody has to predict
LETTERS = np.frombuffer(b"abcdefghijklmn", np.uint8)
NOISE, COPY, MARK = b".=#"


def generator(name, length, seed, step):
    """A generator of each step's own, as in corpus.windows. UserError if a window is too short for the task."""
    if length < 3:
        raise UserError(f"--data {name} needs windows of at least 3 bytes, not --seq_len {length}")
    return np.random.default_rng((seed, step))


def selective_copy(length, batch, seed, step):
    """Letters scattered among dots, then as many `=`, whose targets are the letters in order.

    tokens, targets (batch, length). There are sqrt(length) / 4 letters: 4 in 256 bytes, and 16 in 4,112, which is the
    paper's size, 4,096 and the 16 to fill in.
    """
    rng = generator("selective_copy", length, seed, step)
    count = max(1, round(length**0.5 / 4))
    order = rng.random((batch, length - count)).argsort(1)
    places = np.sort(order[:, :count], axis=1)  # (batch, count)
    letters = rng.choice(LETTERS, (batch, count))
    tokens = np.full((batch, length), NOISE, np.int64)
    np.put_along_axis(tokens, places, letters, axis=1)
    tokens[:, -count:] = COPY
    targets = np.full((batch, length), NO_TARGET, np.int64)
    targets[:, -count:] = letters
    return tokens, targets


def induction(length, batch, seed, step):
    """Random letters with a `#` somewhere and one at the end, whose target is the letter after the first.

    tokens, targets (batch, length).
    """
    rng = generator("induction", length, seed, step)
    rows = np.arange(batch)
    tokens = rng.choice(LETTERS, (batch, length)).astype(np.int64)
    place = rng.integers(length - 2, size=batch)
    tokens[rows, place] = MARK
    tokens[:, -1] = MARK
    targets = np.full((batch, length), NO_TARGET, np.int64)
    targets[:, -1] = tokens[rows, place + 1]
    return tokens, targets


TASKS = {"selective_copy": selective_copy, "induction": induction}
