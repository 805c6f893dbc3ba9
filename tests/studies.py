"""What a trained model is asked beyond bits per byte: figures for studies, as MambaByte (2401.13660) reports them."""
import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


@torch.inference_mode()
def window_nats(model, data, length, stride, batch_size, cast=contextlib.nullcontext(), piece=512):
    """Nats of each byte in windows that begin every `stride` bytes, each from an empty state: (windows, length).

    The mean over windows is the loss by position. The last bytes, up to stride - 1 of them, are in no window. A window
    is read `piece` bytes at a time, which bounds the memory and leaves the result as it is.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    text = np.concatenate([np.frombuffer(b"\n", np.uint8), data])
    starts = np.arange(0, len(data) - length + 1, stride)
    rows = []
    for i in tqdm(range(0, len(starts), batch_size), desc="sliding", leave=False, disable=None):
        at = starts[i:i + batch_size, None] + np.arange(length + 1)
        window = torch.from_numpy(text[at].astype(np.int64)).to(device)  # (b, length + 1)
        nats = []
        state = None
        for start in range(0, length, piece):
            tokens = window[:, start:min(start + piece, length)]
            targets = window[:, start + 1:start + 1 + tokens.shape[1]]
            with cast:
                logits, state = model(tokens, state)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats.append(F.cross_entropy(wide.mT, targets, reduction="none").cpu())
        rows.append(torch.cat(nats, dim=1))
    model.train(training)
    return torch.cat(rows) if rows else torch.empty(0, length)


def sliding_bpb(nats, stride):
    """Bits per byte of window_nats, each byte in the first window that reads it within its last `stride` bytes."""
    return torch.cat([nats[0], nats[1:, -stride:].flatten()]).mean().item() / math.log(2)


def by_position(nats, parts=7):
    """[(from, to, bits per byte)]: the windows in parts that double, so that the first is 1/64 of the length."""
    cuts = [0, *(nats.shape[1] >> i for i in reversed(range(parts)))]
    bits = nats.mean(0) / math.log(2)
    return [(a, b, bits[a:b].mean().item()) for a, b in zip(cuts, cuts[1:]) if a < b]


def word_perplexity(bits, text):
    """2^(bits / words), the perplexity of a model over words; the words of text are what white space separates."""
    return 2 ** min(bits / max(len(bytes(text).split()), 1), 1000)
