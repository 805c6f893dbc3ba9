"""A look inside a trained Mamba-2: what its heads keep, erase and write.

    python -m tests.look                                    # by default this file, read by a trained default run
    python -m tests.look --ckpt out/mine --text "a = f(b)"
"""
import math
import os
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import model as model_module
from data.files import require
from model import load
from sample import first_ckpt
from scan import _decays, per_head
from train import flag, parse, script

SETS = {"newline": "\n", "space": " ", "a-z": string.ascii_lowercase, "A-Z": string.ascii_uppercase,
        "0-9": string.digits, "()[]{}": "()[]{}", "quote": "\"'"}
RAMP = " .:-=+*#%@"  # for dt from 0.01 to 1, in equal ratios


class Layer(NamedTuple):
    """The arguments with which a layer of Mamba-2 called ssd for a text of l bytes, and what follows from them. One dt
    does both: a head that writes much of a byte erases much of what was there, by decay = exp(dt A)."""
    x: torch.Tensor   # (l, nh, p)
    dt: torch.Tensor  # (l, nh), the step size: how much of a byte a head writes into its state
    A: torch.Tensor   # (nh,)
    B: torch.Tensor   # (l, g, n)
    C: torch.Tensor   # (l, g, n)

    @property
    def decay(self):
        """exp(dt A), the share of its state that a head keeps at each byte: (l, nh)."""
        return torch.exp(self.dt * self.A)

    @property
    def half_life(self):
        """Bytes until half of a head's state is forgotten, at the text's mean of dt A: (nh,)."""
        return math.log(2) / (self.dt * self.A).mean(0).abs()

    @property
    def L(self):
        """L_ij = exp(dt_i A + ... + dt_{j+1} A): what a head still has of byte j at byte i, (nh, l, l)."""
        return _decays((self.dt * self.A).T)

    @property
    def matrix(self):
        """L * (C B^T), masked attention without softmax, which maps dt x to y - D x: (nh, l, l)."""
        scores = self.C.transpose(0, 1) @ self.B.permute(1, 2, 0)  # (g, l, l)
        return self.L * per_head(scores, len(self.A), 0)


@torch.no_grad()
def look(model, text):
    """A Layer for each layer of Mamba-2 in the model, other kinds not counted, as it reads the bytes of text: ssd notes
    what it is given."""
    seen = []
    ssd = model_module.ssd

    def noting_ssd(x, dt, A, B, C, *rest, **options):
        seen.append(Layer(x[0], dt[0], A, B[0], C[0]))
        return ssd(x, dt, A, B, C, *rest, **options)

    model_module.ssd = noting_ssd
    try:
        model(torch.tensor([list(text)], device=model.embedding.weight.device))
    finally:
        model_module.ssd = ssd
    return seen


def table(layers, text):
    """Lines of text, a head each: its half-life, what it erases by kind of byte, what it writes of the last line."""
    kinds = {name: [chr(byte) in members for byte in text] for name, members in SETS.items()}
    kinds = {name: torch.tensor(chosen) for name, chosen in kinds.items() if any(chosen)}
    line = text.splitlines()[-1]
    first = len(text.rstrip(b"\r\n")) - len(line)
    yield "% of a head's state that a byte erases; dt of the last line, from ' ' below 0.016 to '@' above 0.63"
    names = "".join(f"{name:>8}" for name in kinds)
    yield f"layer head half gone after  {names}  {line.decode('ascii', 'replace')}"
    for i, layer in enumerate(layers):
        erased = 100 * (1 - layer.decay)  # (l, nh)
        level = (5 * layer.dt[first:first + len(line)].log10() + 10).clamp(0, 9).int()
        for head in layer.half_life.argsort().tolist():
            shares = "".join(f"{erased[chosen, head].mean():8.0f}" for chosen in kinds.values())
            shades = "".join(RAMP[shade] for shade in level[:, head].tolist())
            yield f"{i:5}{head:5}{layer.half_life[head]:9.1f} bytes  {shares}  {shades}"


@dataclass
class Flags:
    ckpt: str = flag("", "a run of Mamba-2 (default: that of sample.py)")
    text: str = flag("", "what it reads (default: the source of this command)")


@script
def main(argv):
    c, _ = parse(Flags, argv, "A look inside a trained Mamba-2: python -m tests.look")
    path = c.ckpt or first_ckpt()
    model, _ = load(path)
    fits = model.config.vocab == 256 and "mamba2" in model.config.kinds
    require(fits, f"--ckpt {path} is no model of bytes with a layer of mamba2")
    text = os.fsencode(c.text) or Path(__file__).read_bytes()
    for line in table(look(model, text), text):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
