"""Noise on a text's bytes: what MambaByte is tested with (2401.13660, robustness), each a function (x, p, rng) -> x.

Tokens of a fixed vocabulary fall apart under such noise; bytes stay bytes. x is (bytes,) uint8; what is drawn for one
byte is independent of the others, so p is the share of the bytes that it meets.
"""
import numpy as np

from data.files import UserError


def drop(x, p, rng):
    return x[rng.random(len(x)) >= p]


def repeat(x, p, rng):
    return np.repeat(x, 1 + (rng.random(len(x)) < p))


def swap(x, p, rng):
    """Neighbours change places: a byte that has just been moved stays, so of two overlapping swaps the first counts."""
    i, chosen = np.arange(len(x) - 1), rng.random(len(x) - 1) < p
    since = i - np.maximum.accumulate(np.where(chosen, -1, i))  # how many chosen in a row end here
    first = i[chosen & (since % 2 == 1)]
    order = np.arange(len(x))
    order[first], order[first + 1] = first + 1, first
    return x[order]


def upper(x, p, rng):
    return np.where((x >= ord("a")) & (x <= ord("z")), x - 32, x).astype(np.uint8)


def random_case(x, p, rng):
    """Each letter in upper or lower case, by the toss of a coin."""
    letter = (upper(x, p, rng) >= ord("A")) & (upper(x, p, rng) <= ord("Z"))
    return np.where(letter & (rng.random(len(x)) < 0.5), x ^ 32, x).astype(np.uint8)


def antspeak(x, p, rng):
    """UPPER CASE WITH A SPACE AFTER EACH CHARACTER, which in UTF-8 ends where the next byte is not 10xxxxxx."""
    ends = np.append(x[1:] & 0xC0 != 0x80, True)
    y = np.repeat(upper(x, p, rng), 1 + ends)
    y[np.cumsum(1 + ends)[ends] - 1] = ord(" ")
    return y


NOISES = {"drop": drop, "repeat": repeat, "swap": swap, "upper": upper, "random_case": random_case,
          "antspeak": antspeak}


def corrupt(x, noise, seed=0):
    """x under a noise "name" or "name:p"; "" is none. UserError for any other."""
    name, _, p = noise.partition(":")
    try:
        p = float(p or 0)
    except ValueError:
        p = -1.0
    if noise and (name not in NOISES or not 0 <= p <= 1 or (p > 0) != (name in ("drop", "repeat", "swap"))):
        raise UserError(f"noise {noise} is not one of drop:P, repeat:P, swap:P with 0 < P <= 1, "
                        "upper, random_case, antspeak")
    return NOISES[name](x, p, np.random.default_rng(seed)) if noise else x
