"""Mamba-2 on one page: a trained model writes on, byte by byte. numpy does it all; torch only opens the file.

    python -m tests.one_page assets/mamba2.pt "import "

Letters as in scan.py: nh heads of p = head_dim channels, d in all; h (nh, p, n), n = d_state, is what a layer
remembers, beside the tail, the last k-1 inputs of its convolution of k = d_conv taps. B and C (n,) serve all heads.
"""
import sys

import numpy as np
import torch


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x**2) + 1e-5) * weight


def mamba2(x, w, tail, h):
    """One byte through one layer with weights w: x (d_model,), normed, to its output; and the next tail and h."""
    nh, p, n = h.shape
    d = nh * p
    z, xBC, dt = np.split(w["in_proj.weight"] @ x, [d, 2 * d + 2 * n])
    inputs = np.vstack([tail, xBC])  # (k, channels)
    xBC = silu(np.sum(inputs * w["conv1d.weight"][:, 0].T, axis=0) + w["conv1d.bias"])
    x, B, C = np.split(xBC, [d, d + n])
    x = x.reshape(nh, p, 1)
    dt = np.log1p(np.exp(dt + w["dt_bias"])).reshape(nh, 1, 1)  # softplus
    A = -np.exp(w["A_log"]).reshape(nh, 1, 1)
    h = np.exp(dt * A) * h + dt * x * B  # keep exp(dt A) of it, write dt x B^T
    y = h @ C + w["D"].reshape(nh, 1) * x[:, :, 0]  # read
    y = rms_norm(y.reshape(d) * silu(z), w["norm.weight"])
    return w["out_proj.weight"] @ y, inputs[1:], h


def write(path, text, count):
    """The text and count more bytes, each the likeliest after all before it."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    w = {name: weight.double().numpy() for name, weight in file["model"].items()}
    config = file["config"]
    plain = {"norm": "rms", "n_group": 1, "bias": False, "conv_bias": True, "merges": ()}
    if {*config["layers"]} != {"mamba2"} or not plain.items() <= config.items():
        sys.exit(f"{path} is no plain Mamba-2 over bytes")
    mixers = []
    states = []
    for i in range(len(config["layers"])):
        start = f"layers.{i}.mixer."
        mixer = {name.removeprefix(start): w[name] for name in w if name.startswith(start)}
        mixers.append(mixer)
        states.append((np.zeros((config["d_conv"] - 1, len(mixer["conv1d.bias"]))),
                       np.zeros((len(mixer["D"]), config["head_dim"], config["d_state"]))))
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
    if len(sys.argv) != 3 or not sys.argv[2]:
        sys.exit(__doc__)
    sys.stdout.buffer.write(write(sys.argv[1], sys.argv[2].encode(), 200) + b"\n")
