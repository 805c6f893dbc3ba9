"""Mamba-2 on one page: a trained model writes on, byte by byte. numpy does it all; torch only opens the file.

    python -m tests.one_page assets/mamba2.pt "def "

Letters as in scan.py: nh heads of p channels, d in all; h (nh, p, n) is what a layer remembers, beside the last k-1
inputs of its convolution. B and C (n,) are the same for all heads.
"""
import sys

import numpy as np
import torch


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x**2) + 1e-5) * weight


def mamba2(x, w, before, h):
    """One byte through one layer: x (d_model,), its weights w, before (k-1, channels). Also the next before and h."""
    nh, p, n = h.shape
    d = nh * p
    z, xBC, dt = np.split(w["in_proj.weight"] @ x, [d, 2 * d + 2 * n])
    inputs = np.vstack([before, xBC])  # (k, channels)
    xBC = silu(np.sum(inputs * w["conv1d.weight"][:, 0].T, axis=0) + w["conv1d.bias"])
    x, B, C = np.split(xBC, [d, d + n])
    x = x.reshape(nh, p, 1)
    dt = np.log1p(np.exp(dt + w["dt_bias"])).reshape(nh, 1, 1)  # softplus
    A = -np.exp(w["A_log"]).reshape(nh, 1, 1)
    h = np.exp(dt * A) * h + dt * x * B  # keep, and write
    y = h @ C + w["D"].reshape(nh, 1) * x[:, :, 0]  # read
    y = rms_norm(y.reshape(d) * silu(z), w["norm.weight"])
    return w["out_proj.weight"] @ y, inputs[1:], h


def write(path, text, count):
    """The text and count more bytes, each the likeliest after all before it."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    w = {name: weight.double().numpy() for name, weight in file["model"].items()}
    size = file["config"]
    mixers = []
    states = []
    for i in range(len(size["layers"])):
        start = f"layers.{i}.mixer."
        mixer = {name.removeprefix(start): w[name] for name in w if name.startswith(start)}
        mixers.append(mixer)
        states.append((np.zeros((size["d_conv"] - 1, len(mixer["conv1d.bias"]))),
                       np.zeros((len(mixer["D"]), size["head_dim"], size["d_state"]))))
    for t in range(len(text) + count - 1):
        x = w["embedding.weight"][text[t]]
        for i, mixer in enumerate(mixers):
            normed = rms_norm(x, w[f"layers.{i}.norm.weight"])
            y, *states[i] = mamba2(normed, mixer, *states[i])
            x = x + y
        if t == len(text) - 1:
            logits = w["lm_head.weight"] @ rms_norm(x, w["norm_f.weight"])
            text += bytes([logits.argmax()])
    return text


if __name__ == "__main__":
    sys.stdout.buffer.write(write(sys.argv[1], sys.argv[2].encode(), 200) + b"\n")
