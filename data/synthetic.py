"""Two tasks that a layer solves only if it chooses what to remember (Mamba, section 4.1), made in memory.

    selective_copy    ..c....a...f.===     ->  at each = the next letter read: c, a, f
    induction         kd#gcafe...mbh#      ->  what followed the first #: g

A convolution weighs a letter by how long ago it was, and here that says nothing: the letters lie anywhere, and the dots
or letters between have to pass without a trace.
"""
import numpy as np

from data.files import UserError

NO_TARGET = -100                       # of a byte that nobody has to predict
LETTERS = np.frombuffer(b"abcdefghijklmn", np.uint8)
NOISE, COPY, MARK = b".=#"


def selective_copy(length: int, batch: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters scattered among dots, then as many `=`, whose targets are the letters in order: (batch, length) both.

    A quarter of the length's root of them: 4 in 256 bytes, 16 in 4,112, the paper's size: 4,096 and the 16 to fill in.
    """
    rng, count = generator("selective_copy", length, seed, step), max(1, round(length**0.5 / 4))
    places = np.sort(rng.random((batch, length - count)).argsort(1)[:, :count], axis=1)
    letters = rng.choice(LETTERS, (batch, count))
    tokens = np.full((batch, length), NOISE, np.int64)
    np.put_along_axis(tokens, places, letters, axis=1)
    tokens[:, -count:] = COPY
    targets = np.full((batch, length), NO_TARGET, np.int64)
    targets[:, -count:] = letters
    return tokens, targets


def induction(length: int, batch: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Random letters with a `#` somewhere and one at the end, whose target is the letter after the first."""
    rng, rows = generator("induction", length, seed, step), np.arange(batch)
    tokens = rng.choice(LETTERS, (batch, length)).astype(np.int64)
    place = rng.integers(length - 2, size=batch)
    tokens[rows, place] = tokens[:, -1] = MARK
    targets = np.full((batch, length), NO_TARGET, np.int64)
    targets[:, -1] = tokens[rows, place + 1]
    return tokens, targets


def generator(name: str, length: int, seed: int, step: int) -> np.random.Generator:
    """A generator of each step's own, as in corpus.windows. UserError if a window is too short for the task."""
    if length < 3:
        raise UserError(f"--data {name} needs windows of at least 3 bytes, not --seq_len {length}")
    return np.random.default_rng((seed, step))


TASKS = {"selective_copy": selective_copy, "induction": induction}
