"""Four tasks, made in memory; each is too much for at least one kind of layer. Targets are answers, not next bytes.
A task gives (tokens, targets), both (batch, length). In short:

    selective_copy    ..c....a...f...===   ->  at each = the next letter read: c, a, f
    induction         kd#gcafejkmbh#       ->  what followed the first #: g
    parity            01101                ->  at each place, whether the ones so far are odd: 0, 1, 0, 0, 1
    recall            QcAhMcAMAQ           ->  after the pairs Qc, Ah, Mc, at each key its value: h, c, h, c

The first two (Mamba, section 4.1) want a layer that chooses what to remember. A convolution weighs a letter by how long
ago it was, and here that says nothing: the letters lie anywhere, and the dots or letters between have to pass without a
trace. Parity wants a state that every "1" turns over: with factors from 0 to 1 in h_t = a_t h_{t-1} + b_t it can only
forget, and no number of layers counts modulo 2 at every length (Grazzi et al. 2411.12537). Recall, the MQAR of Zoology
(Arora et al. 2312.04927), wants room for all pairs at once.
"""
import numpy as np

from data.files import require

NO_TARGET = -100  # the target of a byte that nobody has to predict
LETTERS = np.frombuffer(b"abcdefghijklmn", np.uint8)
NOISE, COPY, MARK = b".=#"
KEYS = np.arange(64, 96)  # of recall: "@", "A" to "_"


def selective_copy(length, batch, seed, step):
    """Letters scattered among dots, then as many `=`, whose targets are the letters in order.

    There are sqrt(length) / 4 letters: 4 in 256 bytes, and 16 in 4,112, which is the paper's size, 4,096 and the 16 to
    fill in.
    """
    rng = np.random.default_rng((seed, step))
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
    """Random letters with a `#` somewhere and one at the end, whose target is the letter after the first."""
    rng = np.random.default_rng((seed, step))
    rows = np.arange(batch)
    tokens = rng.choice(LETTERS, (batch, length)).astype(np.int64)
    place = rng.integers(length - 2, size=batch)
    tokens[rows, place] = MARK
    tokens[:, -1] = MARK
    targets = np.full((batch, length), NO_TARGET, np.int64)
    targets[:, -1] = tokens[rows, place + 1]
    return tokens, targets


def parity(length, batch, seed, step):
    """Random bits; the target at every place is 1 if the ones up to it, itself included, are odd, and else 0."""
    rng = np.random.default_rng((seed, step))
    bits = rng.integers(2, size=(batch, length))
    return ord("0") + bits, ord("0") + bits.cumsum(1) % 2


def recall(length, batch, seed, step, pairs=0):
    """Pairs of a key and its value, then queries: any of the keys, whose targets are their values.

    The keys of a window differ, so no answer is ambiguous. Every window has so many
    pairs, or with 0 a number of its own from 1 to length / 4, at most 32: small ones are learnt first and teach the
    others.
    """
    rng = np.random.default_rng((seed, step))
    require(0 <= 2 * pairs < length and pairs <= len(KEYS), f"recall: {pairs} pairs do not fit "
            f"into {length} bytes and {len(KEYS)} keys")
    most = min(max(length // 4, 1), len(KEYS))
    keys = rng.permuted(np.tile(KEYS, (batch, 1)), axis=1)
    values = rng.choice(LETTERS, keys.shape)
    count = np.full((batch, 1), pairs) if pairs else rng.integers(1, most + 1, (batch, 1))
    asked = rng.integers(count, size=(batch, length))
    place = np.arange(length)
    told = place < 2 * count  # (batch, length)
    pair = np.where(told, place // 2, asked)
    key, value = (np.take_along_axis(t, pair, axis=1).astype(np.int64) for t in (keys, values))
    tokens = np.where(told & (place % 2 == 1), value, key)
    return tokens, np.where(told, NO_TARGET, value)


TASKS = {task.__name__: task for task in (selective_copy, induction, parity, recall)}
