"""Train a byte language model: python train.py, or -h for the flags.

In order: flags, where it runs, what is predicted, what the optimizer decays, validation, the run's folder, the loop.
Figures are in bits per byte, nats / ln 2, unless they name another unit: the loss at step 0 is in nats, --objective
mask counts bits per masked byte, a task bits per target.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.bpe import BPE, learn_merges
from data.corpus import Corpus, compressed_bpb, load_corpus, windows
from tests.noise import corrupt
from data.synthetic import NO_TARGET, TASKS
from data.files import UserError
from model import MASK, Config, load, make_model, save

# ---------------------------------------------------------------------------------------------------------------------
# Flags: one dataclass a script, every field a flag


def flag(default, text, low=None, high=None, one_of=None):
    """A field of a dataclass that is a command-line flag too; low and high, both included, bound a number."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "one_of": one_of})


def check_flags(c):
    """UserError unless every flag of the dataclass c has its type and a value within its bounds."""
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        low, high, one_of = f.metadata["low"], f.metadata["high"], f.metadata["one_of"]
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            raise UserError(f"--{f.name} {value!r} is not of type {f.type.__name__}")
        if one_of and value not in one_of:
            raise UserError(f"--{f.name} {value} is not one of {', '.join(filter(None, one_of))}")
        if f.type not in (int, float):
            continue
        highest = high if high is not None else 2**63 - 1 if f.type is int else 1e30
        if not (low is None or value >= low) or not -highest - 1 <= value <= highest:
            bounds = f"from {low} to {high}" if high is not None else f"a number from {low} up"
            raise UserError(f"--{f.name} {value} is not {bounds}")


def parse(cls, argv, description):
    """The dataclass cls from the command line, each field a --flag of its name, type and default, and a dict of what
    was given there. A bad flag is a UserError; -h prints and exits."""
    p = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(cls):
        text = f.metadata["help"] + ("" if f.default == "" else f" (default: {f.default})")
        kind = {"type": f.type, "metavar": f.type.__name__}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        p.add_argument("--" + f.name, help=text.replace("%", "%%"), **kind)

    def error(message):
        raise UserError(f"{message}; -h lists the flags")

    p.error = error
    given = vars(p.parse_args(argv))
    c = cls(**given)
    check_flags(c)
    return c, given


def script(main):
    """main(argv) with the errors that are the user's to mend turned into one line and exit status 2."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
    return run


@dataclass
class RunFlags:
    """What every run has, whatever it trains: also distill.py's."""
    objective, block, span, bpe = "next", "", 1, 0  # no flags here: only train.py has encoders and words
    data: str = flag("python", "a file, a folder, or a known name: python, shakespeare, enwik8; "
                     "train.py also selective_copy, induction")
    out: str = flag("", "folder of the run (default: out/LAYER, of an encoder out/OBJECTIVE)")
    steps: int = flag(2200, "optimizer steps, unless --minutes is given")
    minutes: float = flag(0.0, "train this long instead; counts training only, and the schedule follows the clock")
    resume: bool = flag(False, "go on with the run in --out; flags not given are the run's own")
    eval_every: int = flag(0, "validate every so many steps too, not only at the end")
    seed: int = flag(1, "of the weights, the windows and dropout")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    dtype: str = flag("auto", "float32, bfloat16 (autocast) or float64; auto is bfloat16 on CUDA, else float32")
    compile: bool = flag(False, "torch.compile the model: slow to start, then faster")
    seq_len: int = flag(128, "bytes in a window")
    batch_size: int = flag(8, "windows in a step, over all processes")
    accumulate: int = flag(1, "parts a process cuts its windows into, one after the other, to save memory")
    lr: float = flag(5e-3, "peak learning rate")
    warmup: int = flag(50, "steps of linear warm-up, under a line that falls from the peak to zero")
    weight_decay: float = flag(0.1, "on the weights of linear layers, on nothing else")
    grad_clip: float = flag(1.0, "largest norm of the gradient")


@dataclass
class Flags(RunFlags):
    objective: str = flag("next", "next byte; an encoder learns mask (15 % of the bytes, from both sides) or diffusion")
    layer: str = flag("", "the mixer of every layer: mamba, mamba2 (default), s4, s4d or attention; "
                      "of an encoder s4d (default) or attention")
    bpe: int = flag(0, "byte-pair merges: the model reads words, as a drafter for sample.py --draft; 0 reads bytes")
    block: str = flag("", "of an encoder: gated (default) or stacked")
    span: int = flag(1, "mask: bytes are masked in runs of so many")
    eval_only: bool = flag(False, "validate the checkpoint in --out, a run's or a published one, and stop")
    noise: str = flag("", "with --eval_only, on the text: drop:P, repeat:P, swap:P, upper, random_case or antspeak")
    init: str = flag("", "begin with the weights of this checkpoint, a run's or a published one, whose sizes then hold")
    d_model: int = flag(192, "width")
    n_layer: int = flag(3, "layers")
    d_state: int = flag(0, "state size n; 0 is 16 for mamba, 32 for mamba2, 64 for s4 and s4d")
    head_dim: int = flag(32, "mamba2: channels of a head")
    n_head: int = flag(4, "attention: heads")
    dropout: float = flag(0.0, "on every layer's output, of an encoder on the embeddings, while training")

    def __post_init__(self):
        encoder = self.objective != "next"
        self.layer = self.layer or ("s4d" if encoder else "mamba2")
        self.block = self.block or ("gated" if encoder else "")
        self.out = self.out or f"out/{self.objective if encoder else self.layer}"


# fixed for a run's whole life
MODEL_FLAGS = ("objective", "block", "layer", "bpe", "d_model", "n_layer", "d_state", "head_dim", "n_head")
D_STATE = {"mamba": 16, "mamba2": 32, "s4": 64, "s4d": 64}


def check(c):
    """Values that no later step would refuse with a better message; distill.py has no flags for the model's shape."""
    for name in ("steps", "batch_size", "accumulate", "seq_len", "span", "d_model", "n_layer"):
        if getattr(c, name, 1) < 1:
            raise UserError(f"--{name} {getattr(c, name)} is not positive")
    for name in ("minutes", "lr", "warmup", "weight_decay", "grad_clip", "d_state", "eval_every", "seed", "bpe"):
        if not 0 <= getattr(c, name, 0) < (2**63 if name == "seed" else math.inf):
            raise UserError(f"--{name} {getattr(c, name)} is not a number from 0 up" + " to 2^63" * (name == "seed"))
    if not 0 <= getattr(c, "dropout", 0) < 1:
        raise UserError(f"--dropout {c.dropout} is not in [0, 1)")
    if c.objective not in OBJECTIVES:
        raise UserError(f"--objective {c.objective} is not one of {', '.join(OBJECTIVES)}")
    if c.objective != "next" and c.data in TASKS:
        raise UserError(f"--data {c.data} has its own targets; leave out --objective {c.objective}")
    if c.objective == "next" and c.block:
        raise UserError(f"--block {c.block} is for an encoder; add --objective mask or --objective diffusion")
    if c.objective != "next" and c.bpe:
        raise UserError(f"--bpe {c.bpe} is for --objective next, not for {c.objective}")
    if c.data in TASKS and c.bpe:
        raise UserError(f"--bpe {c.bpe} is for a text, not for --data {c.data}")
    if c.objective != "mask" and c.span > 1:
        raise UserError(f"--span {c.span} is for --objective mask, not for {c.objective}")


def reads_bytes(path, model, c, merges=()):
    """UserError unless the checkpoint's model is one of bytes, or words, and of the kind that --objective trains."""
    if model.config.vocab > MASK + 1 and not merges:
        raise UserError(f"{path} reads tokens, {model.config.vocab:,} kinds of them; "
                          "only models of bytes are trained here")
    if bool(model.config.block) != (c.objective != "next"):
        raise UserError(f"{path} is {'an encoder' if model.config.block else 'causal'}; "
                          f"--objective {c.objective} is not for it")


def start_from(c, given):
    """The model of --init, to be trained further: the flags of its sizes are not ours to choose."""
    if wrong := [name for name in (*MODEL_FLAGS, "dropout") if name in given and name != "objective"]:
        raise UserError(f"--{wrong[0]} is fixed by the checkpoint of --init; leave it out")
    model = load(c.init)[0]
    reads_bytes(c.init, model, c)
    return model


def make_config(c, vocab=256):
    """The model's shape by the flags: layers all alike, SwiGLU beside attention only, the head untied as in MambaByte.

    An encoder has BiGS's proportions, m = 3 d_model and 64 modes, and the mask as a symbol beside the bytes.
    """
    if c.objective != "next":
        return Config(layers=(c.layer,) * c.n_layer, block=c.block, d_model=c.d_model, vocab=MASK + 1, expand=3,
                      norm="layer", norm_eps=1e-12, d_state=c.d_state or 64, n_head=c.n_head, n_kv_head=c.n_head,
                      dropout=c.dropout)
    layer = "attention+mlp" if c.layer == "attention" else c.layer
    return Config(layers=(layer,) * c.n_layer, d_model=c.d_model, d_state=c.d_state or D_STATE.get(c.layer, 16),
                  head_dim=c.head_dim, n_head=c.n_head, n_kv_head=c.n_head, dropout=c.dropout, tie=False, vocab=vocab,
                  window=c.seq_len if c.layer == "attention" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs


def pick_device(name):
    """torch.device from a flag; auto is CUDA, then Apple's mps, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device {name} cannot be used here ({str(e).splitlines()[0]}); try --device cpu") from e
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise UserError(f"--device {name} holds no numbers; try --device cpu")
    return device


def pick_dtype(name, device):
    """(dtype of the parameters, autocast context) from a flag: bfloat16 means float32 parameters under autocast."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in ("float32", "bfloat16", "float64"):
        raise UserError(f"--dtype {name} is not one of auto, float32, bfloat16, float64")
    cast = torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else contextlib.nullcontext()
    return torch.float64 if name == "float64" else torch.float32, cast


def join_processes(device):
    """(rank, number of processes, device): one process, or those that torchrun started, each with its own GPU."""
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def keep_memory():
    """Linux: reuse freed memory instead of returning it. glibc hands each large tensor back to the system and takes the
    next one as fresh pages, which the kernel zeroes one by one: a fifth of a step's time on two cores."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop reads between steps; the second acts at once."""

    def __init__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        self.signal = number
        self.restore()

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------------
# What is predicted: an objective turns bytes into tokens to read and targets to predict from them
#
# It is a function (before, targets, seed, first) of int64 arrays (b, l): the byte before each, the bytes, and where the
# draws come from: they are a pure function of the seed and of `first`, the number of windows before these, so that a
# resumed run and several processes draw the same. A window's loss is the mean over the targets it has.

TASK_WINDOWS = 512  # on which a task is scored
GOLDEN = (math.sqrt(5) - 1) / 2


def next_byte(before, targets, seed, first):
    """Every byte from those before it."""
    return before, targets


def masked_bytes(before, targets, seed, first, span=1):
    """15 % of the bytes from both sides (BERT, Devlin et al. 2019): 80 % of them are masked, 10 % replaced by any byte,
    and 10 % stay as they are, so that no byte which the model sees is beyond doubt."""
    b, l = targets.shape
    chosen, rng = choose(np.full(b, max(1, round(0.15 * l))), l, seed, first, span)
    dice = rng.random((b, l))
    shown = np.where(dice < 0.8, MASK, np.where(dice < 0.9, rng.integers(256, size=(b, l)), targets))
    return np.where(chosen, shown, targets), np.where(chosen, targets, NO_TARGET)


def masked_diffusion(before, targets, seed, first):
    """k of l bytes from the others, k uniform in 1 .. l: the mean loss bounds that of all bytes in a row.

        -log p(x) / l  <=  E_k (1/k) sum_{i masked} -log p(x_i | bytes not masked)
    This is the chain rule, averaged over all orders; with t = k/l it is the diffusion bound, an integral over t
    weighted 1/t (Sahoo et al. 2024), less the noise of how many are masked. Window j takes k from the fraction
    (j * golden ratio) mod 1: uniform in the long run, and spread out evenly within any few windows.
    """
    b, l = targets.shape
    k = 1 + np.floor(l * (GOLDEN * (first + np.arange(b)) % 1)).astype(np.int64)
    chosen, _ = choose(k, l, seed, first)
    return np.where(chosen, MASK, targets), np.where(chosen, targets, NO_TARGET)


def choose(k, l, seed, first, span=1):
    """k (b,) places of each row at random, in runs of span: booleans (b, l), and the generator to go on with."""
    rng = np.random.default_rng((seed, first, 1))  # windows() has (seed, epoch), to which a 0 here would be equal
    run = (rng.integers(span, size=(len(k), 1)) + np.arange(l)) // span  # (b, l), the first run may be cut short
    order = np.take_along_axis(rng.random((len(k), l // span + 2)), run, 1).argsort(1, kind="stable")
    return order.argsort(1) < k[:, None], rng


OBJECTIVES = {"next": (next_byte, "bits per byte"), "mask": (masked_bytes, "bits per masked byte"),
              "diffusion": (masked_diffusion, "bits per byte at most")}


def load_data(name):
    """A corpus; or a task of data/synthetic.py with the function that draws its windows, targets and all, for bytes."""
    if name in TASKS:
        return Corpus(name, TASKS[name], TASKS[name], f"new windows in each step, {TASK_WINDOWS} to validate")
    return load_corpus(name)


def in_words(data, merges):
    """(data as the words that byte-pair merges make, bytes in a word); without merges the data itself, 1."""
    if not merges:
        return data, 1.0
    words = BPE(merges).encode(data)
    return words, len(data) / len(words)


def make_objective(c):
    """The function that --objective names."""
    f, _ = OBJECTIVES[c.objective]
    return functools.partial(f, span=c.span) if f is masked_bytes else f


def unit_of(c):
    """What a run's figures are in."""
    return "bits per target" if c.data in TASKS else OBJECTIVES[c.objective][1]


def nats_of(logits, targets):
    """-log p of each target, 0 where there is none, float32 or wider: logits (b, l, v), targets (b, l) -> (b, l)."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=NO_TARGET).view_as(targets)


def surprise(logits, targets):
    """Mean nats of each row's targets: logits (b, l, v), targets (b, l) -> (b,)."""
    return nats_of(logits, targets).sum(1) / (targets != NO_TARGET).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


SLOW = {"log_dt", "log_A_real", "A_real", "A_imag", "P", "B"}  # the memory of S4, S4D, BiGS; Mamba's A_log is not slow
SHARE = {"decayed": 1.0, "not decayed": 1.0, "slow": 0.1}  # of the learning rate; S4 trains with 0.01, these with 0.001


def parameter_groups(model):
    """{"decayed": names, "not decayed": names, "slow": names}: only linear layers' weights are pulled towards zero.

    By name, since shape misleads: A_log has two axes, and decay would pull every A towards -1. The embedding is not
    decayed, also where the head shares it. A small change of S4's dt or A changes its whole kernel: hence slow.
    """
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups = {group: [] for group in SHARE}
    for name, _ in model.named_parameters():  # a shared tensor appears once, as the embedding
        groups["decayed" if name in linear else "slow" if name.split(".")[-1] in SLOW else "not decayed"].append(name)
    return {group: names for group, names in groups.items() if names}


def make_optimizer(model, lr, weight_decay):
    parameters = dict(model.named_parameters())
    groups = [{"params": [parameters[n] for n in names], "weight_decay": weight_decay * (group == "decayed"),
               "share": SHARE[group]} for group, names in parameter_groups(model).items()]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=next(model.parameters()).device.type != "mps")


def describe(model):
    """The parameter table: what is decayed, what is not, what learns slowly, by the last part of the name."""
    parameters = dict(model.named_parameters())
    lines = [f"{sum(p.numel() for p in parameters.values()):,} parameters"]
    for group, names in parameter_groups(model).items():
        kinds = sorted({".".join(p for p in n.split(".")[-2:] if not p.isdigit()) for n in names})
        lines.append(f"  {group:12}{sum(parameters[n].numel() for n in names):>12,}  {' '.join(kinds)}"
                     + f"; not decayed, {SHARE[group]} of the learning rate" * (SHARE[group] < 1))
    return "\n".join(lines)


def learning_rate(c, step, progress):
    """Linear warm-up to the peak, times a line from 1 at progress 0 to 0 at progress 1."""
    return c.lr * min(1.0, (step + 1) / max(c.warmup, 1)) * (1 - min(progress, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Validation


VALIDATED = 8192  # bytes at a time, or as many as a step reads: they share what a call costs, say an S4 kernel


class Interrupted(Exception):
    """Validation was cut short by a signal."""


def validation_pieces(data, seq_len, batch_size, carried):
    """[(the bytes before, the bytes), ...], arrays (b, l), each byte of the data once; a newline before the first.

    Not carried: windows of seq_len. Carried: one stream. A task draws windows from a seed that no run has.
    """
    if callable(data):
        return [data(seq_len, min(batch_size, TASK_WINDOWS - i * batch_size), 2**63, i)
                for i in range(-(-TASK_WINDOWS // batch_size))]
    read = np.concatenate([np.frombuffer(b"\n", np.uint8), data[:-1]])
    if carried:
        size = seq_len * batch_size
        return [(read[None, i:i + size], data[None, i:i + size]) for i in range(0, len(data), size)]
    whole = len(data) // seq_len * seq_len
    rows, targets = read[:whole].reshape(-1, seq_len), data[:whole].reshape(-1, seq_len)
    pieces = [(rows[i:i + batch_size], targets[i:i + batch_size]) for i in range(0, len(rows), batch_size)]
    return pieces + [(read[None, whole:], data[None, whole:])] * (whole < len(data))


@torch.inference_mode()
def evaluate(model, data, seq_len, batch_size, cast=contextlib.nullcontext(), carried=False, stop=None,
             objective=next_byte):
    """(bits per byte of data, share guessed right), each byte, or word, scored once.

    Not carried: each window from an empty state, so a byte is predicted from what its window has shown.
    Carried: the state handed from piece to piece, so from everything before it, in constant memory.
    """
    model.eval()
    device = next(model.parameters()).device
    nats, right, first, count, state = 0.0, 0.0, 0, 0, None
    pieces = validation_pieces(data, seq_len, batch_size, carried)
    for before, targets in tqdm(pieces, desc="validating" + ", carried" * carried, leave=False, disable=None):
        if stop is not None and stop.signal:
            raise Interrupted
        b, l = targets.shape
        tokens, targets = objective(before.astype(np.int64), targets.astype(np.int64), 0, first)
        tokens, targets = torch.from_numpy(tokens).to(device), torch.from_numpy(targets).to(device)
        first, count = first + b, count + b * l
        with cast:
            logits, state = model(tokens, state if carried else None)
        nats += l * surprise(logits, targets).sum().item()
        right += l * ((logits.argmax(-1) == targets).sum(1) / (targets != NO_TARGET).sum(1)).sum().item()
    model.train()
    return nats / math.log(2) / count, right / count


@torch.inference_mode()
def window_nats(model, data, length, stride, batch_size, cast=contextlib.nullcontext(), piece=512):
    """Nats of each byte in windows that begin every `stride` bytes, each from an empty state: (windows, length).

    The mean over windows is the loss by position; with stride = length / 2 the second halves, and all of the first
    window, are what MambaByte reports: none is scored twice, and after the first window none with less than half a
    window before it. The last bytes, up to stride - 1 of them, are in no window.
    A window is read `piece` bytes at a time, which bounds the memory and leaves the result as it is.
    """
    model.eval()
    device = next(model.parameters()).device
    read = np.concatenate([np.frombuffer(b"\n", np.uint8), data[:-1]])
    starts, rows = np.arange(0, len(data) - length + 1, stride), []
    for part in tqdm(range(0, len(starts), batch_size), desc="sliding", leave=False, disable=None):
        index = starts[part:part + batch_size, None] + np.arange(length)
        tokens, targets = (torch.from_numpy(t[index].astype(np.int64)).to(device) for t in (read, data))
        nats, state = [], None
        for x, y in zip(tokens.split(piece, dim=1), targets.split(piece, dim=1)):
            with cast:
                logits, state = model(x, state)
            nats.append(nats_of(logits, y).cpu())
        rows.append(torch.cat(nats, dim=1))
    return torch.cat(rows) if rows else torch.empty(0, length)


def sliding_bpb(nats, stride):
    """Bits per byte of window_nats, each byte in the first window that reads it within its last `stride` bytes."""
    return torch.cat([nats[0], nats[1:, -stride:].flatten()]).mean().item() / math.log(2)


def by_position(nats, parts=7):
    """[(from, to, bits per byte)]: the windows in parts that double, so that the first is 1/64 of the length."""
    cuts = [0, *(nats.shape[1] >> i for i in reversed(range(parts)))]
    return [(a, b, nats[:, a:b].mean().item() / math.log(2)) for a, b in zip(cuts, cuts[1:]) if a < b]


def word_perplexity(bits, text):
    """2^(bits / words): what a model over words would have to reach; words of `text` are what white space separates."""
    return 2 ** min(bits / max(len(bytes(text).split()), 1), 1000)


def validate(model, val, c, cast, stop=None, word=1.0):
    """{"val_bpb": ..., "val_bpb_carried": ... or None, "val_accuracy": ...}; attention has no state to carry for ever,
    S4 pays n^3 a piece for its kernel, however short, and the windows of a task are no stream. word is how many bytes a
    token of val stands for."""
    batch = max(c.batch_size, VALIDATED // c.seq_len)
    bpb, accuracy = evaluate(model, val, c.seq_len, batch, cast, stop=stop, objective=make_objective(c))
    stream = model.recurrent and "s4" not in model.config.layers and not callable(val)
    carried = evaluate(model, val, c.seq_len, batch, cast, True, stop)[0] / word if stream else None
    return {"val_bpb": bpb / word, "val_bpb_carried": carried, "val_accuracy": accuracy}


def report(result, val, c):
    """The figures on the screen, beside what compressors need for the same bytes."""
    print(f"validation  {result['val_bpb']:.4f} {unit_of(c)}, windows of {c.seq_len}; "
          f"{result['val_accuracy']:.1%} guessed right")
    if result["val_bpb_carried"] is not None:
        print(f"            {result['val_bpb_carried']:.4f} with the state carried through")
    if getattr(val, "dtype", None) == np.uint8 and c.objective != "mask" and len(val) <= 20_000_000:  # xz is slow
        print("            " + ", ".join(f"{name} {bpb:.3f}" for name, bpb in compressed_bpb(val).items())
              + ", same bytes")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder: best.pt, last.pt, log.jsonl


def open_run(c, given, fixed):
    """(flags, model and extra of last.pt or None): a new run in c.out, or the one to resume there with its own flags.

    fixed names the flags that a run keeps for its whole life."""
    folder = Path(c.out)
    last = folder / "last.pt"
    if not (c.resume and last.exists()) and any((folder / n).exists() for n in ("last.pt", "best.pt", "log.jsonl")):
        way_out = f"go on with it: --out {folder} --resume; or" if last.exists() else "it has no last.pt to go on from;"
        raise UserError(f"{folder} holds a run; {way_out} choose another --out")
    if not c.resume:
        return c, None
    model, extra = load(last)
    if "flags" not in extra:
        raise UserError(f"{last} holds a model but no run to resume")
    if foreign := extra["flags"].keys() - vars(c).keys():
        raise UserError(f"{last} is another script's run: it has the flag --{min(foreign)}")
    saved = type(c)(**extra["flags"])
    for name in fixed:
        if name in given and given[name] != (was := getattr(saved, name)):
            has = f"no --{name}" if was == "" else f"--{name} {was}, not {given[name]}"
            raise UserError(f"--resume: the run in {folder} has {has}; leave the flag out or choose another --out")
    changed = [f"--{n} {v} (was {getattr(saved, n)})" for n, v in given.items()
               if n not in ("resume", "out") and getattr(saved, n) != v]
    if set(given) & {"steps", "minutes"} == {"steps"}:
        given = {**given, "minutes": 0.0}
    c = dataclasses.replace(saved, **given)
    print(f"resuming {last} at step {extra['step']}" + (", with " + ", ".join(changed) if changed else ""))
    return c, (model, extra)


def open_log(folder, step, validated):
    """log.jsonl, without what a crash left behind: lines later than the checkpoint's step, or its last validation."""
    path = folder / "log.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        known = [(line, json.loads(line)) for line in lines if line.endswith("}")]
        path.write_text("".join(line + "\n" for line, figures in known
                                if figures["step"] <= (step if figures["val_bpb"] is None else validated)))
        return open(path, "a", buffering=1)
    except OSError as e:
        raise UserError(f"--out {folder} cannot be written: {e}") from e


# ---------------------------------------------------------------------------------------------------------------------
# The loop

SAVE_SECONDS = 60  # a crash loses at most this much training


def prediction_loss(model, tokens, targets):
    """Mean nats of the targets (b, l), given the tokens (b, l)."""
    return surprise(model(tokens)[0], targets).mean()


def draw_batch(c, data, step):
    """The tokens and targets of a step, for all processes: (b, 2, seq_len)."""
    if callable(data):
        before, targets = data(c.seq_len, c.batch_size, c.seed, step)
    else:
        batch = windows(data, c.seq_len + 1, c.batch_size, c.seed, step)
        before, targets = batch[:, :-1], batch[:, 1:]
    tokens, targets = make_objective(c)(before, targets, c.seed, step * c.batch_size)
    return torch.from_numpy(np.stack([tokens, targets], axis=1))


def train_step(model, optimizer, batch, c, cast, lr, loss_of):
    """One step on this process's part (b, 2, seq_len) of a batch: loss_of(model, tokens, targets) in nats, a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    total = 0.0
    parts = batch.chunk(c.accumulate)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1  # gradients are averaged over processes once a step, with the last part
        with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            with cast:
                loss = loss_of(model, *part.unbind(1)) * (len(part) / len(batch))
            loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


@dataclass
class Run:
    """What a run carries from step to step, and how it is kept."""
    c: Flags
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    cast: contextlib.AbstractContextManager
    val: np.ndarray
    step: int = 0
    validated: int = 0    # the step of the last validation
    seconds: float = 0.0  # of training
    best_bpb: float = math.inf
    lr: float = 0.0
    merges: list = ()     # of byte pairs, if tokens are words
    word: float = 1.0     # bytes in a token

    @property
    def progress(self):
        """From 0 to 1, by the clock or by the steps."""
        return self.seconds / (60 * self.c.minutes) if self.c.minutes else self.step / self.c.steps

    def save(self, name):
        """Never weights that are not finite: what was saved before stays."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.ruined("weights are not finite")
        save(self.folder / name, self.model, optimizer=self.optimizer.state_dict(), step=self.step,
             validated=self.validated, seconds=self.seconds, best_bpb=self.best_bpb, flags=dataclasses.asdict(self.c),
             random=torch.get_rng_state(), merges=list(self.merges))

    def ruined(self, what):
        """The error that ends a run which has blown up."""
        kept = self.folder / "last.pt"
        way_out = (f"the last good checkpoint is {kept}; go on from it with --resume and a lower --lr"
                   if kept.exists() else "nothing was saved before; try a lower --lr and another --out")
        return UserError(f"the {what} at step {self.step}, learning rate {self.lr:.2e}; {way_out}")

    def record(self, **figures):
        """One line of log.jsonl."""
        keys = ("train_bpb", "val_bpb", "val_bpb_carried", "val_accuracy", "lr", "bytes_per_second")
        read = round(self.step * self.c.batch_size * self.c.seq_len * self.word)
        self.log.write(json.dumps({"step": self.step, "bytes": read,
                                   "seconds": round(self.seconds, 3), **{k: figures.get(k) for k in keys}}) + "\n")

    def validate(self, stop):
        """Validate, and save if that shows nothing wrong: the last step's own loss was of the weights before it."""
        result = validate(self.model, self.val, self.c, self.cast, stop, self.word)
        if not math.isfinite(result["val_bpb"]):
            raise self.ruined(f"validation loss is {result['val_bpb']}")
        self.record(**result)
        self.validated = self.step
        if result["val_bpb"] < self.best_bpb:
            self.best_bpb = result["val_bpb"]
            self.save("best.pt")
        self.save("last.pt")
        return result


@script
def main(argv):
    c, given = parse(Flags, argv, "Train a byte language model. Without flags: a Mamba-2 on Python's standard library.")
    if c.eval_only:
        return eval_only(c, given)
    if c.noise:
        raise UserError(f"--noise {c.noise} is for --eval_only")
    c, resumed = open_run(c, given, (*MODEL_FLAGS, "dropout", "init"))
    check(c)
    corpus = load_data(c.data)
    merges = resumed[1].get("merges", []) if resumed else learn_merges(corpus.train, c.bpe) if c.bpe else []
    torch.manual_seed(c.seed)
    model, extra = resumed or (start_from(c, given) if c.init else make_model(make_config(c, 256 + len(merges))), {})
    return fit(c, join_processes(pick_device(c.device)), model, extra, corpus, prediction_loss, "train.py", merges)


def fit(c, where, model, extra, corpus, loss_of, script, merges=()):
    """Train model in the folder c.out until the budget is spent: the exit status.

    where is join_processes', extra a resumed checkpoint's or empty, script what the user calls to go on. With merges
    the model reads the words that they make of the corpus; figures are bits per byte all the same.
    """
    rank, world, device = where
    if c.batch_size % (world * c.accumulate):
        raise UserError(f"--batch_size {c.batch_size} is not divisible by "
                          f"{world} processes * --accumulate {c.accumulate}")
    dtype, cast = pick_dtype(c.dtype, device)
    keep_memory()
    (tokens, _), (val, word) = in_words(corpus.train, merges), in_words(corpus.val, merges)
    draw_batch(c, tokens, 0)  # an error now if a window does not fit

    model.to(device, dtype).train()
    r = Run(c, Path(c.out), model, make_optimizer(model, c.lr, c.weight_decay), cast, val, merges=merges, word=word)
    if extra:
        for saved, own in zip(extra["optimizer"]["param_groups"], r.optimizer.param_groups):
            saved.update(share=own["share"], weight_decay=own["weight_decay"])  # the first runs saved no share
        r.optimizer.load_state_dict(extra["optimizer"])
        r.step, r.seconds, r.best_bpb = extra["step"], extra["seconds"], extra["best_bpb"]
        r.validated = extra.get("validated", r.step)
        torch.set_rng_state(extra["random"].cpu())
    if rank:
        torch.manual_seed(c.seed + rank + r.step)  # dropout differs from process to process
    else:
        r.log = open_log(r.folder, r.step, r.validated)
        layers = ", ".join(f"{layer.removesuffix('+mlp')} x {n}" for layer, n in Counter(model.config.layers).items())
        size = "" if corpus.name in TASKS else (f"{len(corpus.train):,} bytes to train on, "
                                                f"{len(corpus.val):,} to validate; ")
        print(f"data        {corpus.name}: {size}{corpus.note}")
        print(f"model       {layers}, d_model {model.config.d_model}: {describe(model)}")
        numbers = "bfloat16" if isinstance(cast, torch.autocast) else str(dtype).removeprefix("torch.")
        print(f"runs on     {device}, {numbers}, {torch.get_num_threads()} threads, "
              f"{world} process{'es' * (world > 1)}; saves to {r.folder}", flush=True)
    fast = torch.compile(model) if c.compile else model
    fast = nn.parallel.DistributedDataParallel(fast) if world > 1 else fast
    stop = Stop()
    try:
        train(r, fast, tokens, loss_of, rank, world, device, stop)
        if rank == 0:
            report(r.validate(stop), corpus.val, c)
            use = "draft with it: python sample.py --draft" if merges else "let it write: python sample.py --ckpt"
            use += f" {r.folder}" + ' --fill "what is ____ in the middle"' * bool(c.block)
            print(f"saved       {r.folder}/best.pt" + f"; {use}" * (not callable(corpus.val)))
    except Interrupted:
        if rank == 0:
            r.save("last.pt")
            go_on = f"python {script} --out {r.folder} --resume"
            print(f"stopped at step {r.step}, saved {r.folder}/last.pt; go on: {go_on}")
        return 128 + stop.signal
    finally:
        stop.restore()
        if world > 1:
            dist.destroy_process_group()
    return 0


def train(r, model, data, loss_of, rank, world, device, stop):
    """Steps until the budget is spent, or Interrupted by a signal. model is r.model, compiled or wrapped as may be."""
    c, saved, stopped, unit = r.c, r.seconds, 0, unit_of(r.c)
    predicts = loss_of is prediction_loss  # what distill.py minimizes is in no unit of ours
    with tqdm(total=1.0, initial=min(r.progress, 1.0), disable=rank > 0, dynamic_ncols=True,
              bar_format="{percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}") as bar:
        while r.progress < 1:
            if stopped or (world == 1 and stop.signal):
                raise Interrupted
            if rank == 0 and c.eval_every and r.step % c.eval_every == 0 and r.step > r.validated:
                result = r.validate(stop if world == 1 else None)  # several processes stop together, after a step
                bar.write(f"step {r.step:<7}validation {result['val_bpb']:.4f} {unit}")
            began, r.lr = time.perf_counter(), learning_rate(c, r.step, r.progress)
            batch = draw_batch(c, data, r.step)
            loss = train_step(model, r.optimizer, batch.chunk(world)[rank].to(device), c, r.cast, r.lr, loss_of)
            if world > 1:
                dist.all_reduce(loss)
                loss /= world
            nats = loss.item()
            if not math.isfinite(nats):
                raise r.ruined(f"loss is {nats}")
            took = time.perf_counter() - began
            r.step, r.seconds = r.step + 1, r.seconds + took
            if world > 1:  # process 0's clock and signals rule, or the others would stop at another step
                shared = torch.tensor([r.seconds, stop.signal], dtype=torch.float64, device=device)
                dist.broadcast(shared, 0)
                r.seconds, stopped = shared[0].item(), int(shared[1])
            if rank:
                continue
            bpb, speed = nats / math.log(2) / r.word, c.batch_size * c.seq_len * r.word / took
            r.record(train_bpb=bpb, lr=r.lr, bytes_per_second=round(speed, 1))
            if r.step == 1:
                v = r.model.config.vocab
                guess = f" nats; guessing uniformly is ln {v} = {math.log(v):.3f}" if predicts else ""
                bar.write(f"step 0      loss {nats:.3f}{guess}")
            shown = f"{bpb:.3f} {unit}" if predicts else f"loss {nats:.3f}"
            bar.set_postfix_str(f"step {r.step} | {shown} | {speed:,.0f} bytes/s", refresh=False)
            bar.update(min(r.progress, 1.0) - bar.n)
            if r.seconds - saved > SAVE_SECONDS:
                saved = r.seconds
                r.save("last.pt")


def eval_only(c, given):
    """Validate --out, a run or a published checkpoint, on its own corpus and windows unless flags say otherwise."""
    model, extra = load(c.out)
    known = {n: v for n, v in extra.get("flags", {}).items() if n in vars(c)}  # a run of distill.py has others too
    c, merges = dataclasses.replace(Flags(**known), **{**given, "out": c.out}), extra.get("merges", ())
    reads_bytes(c.out, model, c, merges)
    check(dataclasses.replace(c, span=given.get("span", 1)))  # the run's own span is no fault of another --objective
    device = pick_device(c.device)
    dtype, cast = pick_dtype(c.dtype, device)
    corpus = load_data(c.data)
    if corpus.name in TASKS and c.noise:
        raise UserError(f"--noise {c.noise} is for a text; leave it out with --data {corpus.name}")
    val = corrupt(corpus.val, c.noise) if c.noise else corpus.val
    if c.noise and not len(val):
        raise UserError(f"--noise {c.noise} leaves no byte to validate")
    size = f"{TASK_WINDOWS} windows" if corpus.name in TASKS else f"{len(val):,} bytes"
    print(f"{c.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {size} of {corpus.name}"
          + f", {c.noise}" * bool(c.noise))
    tokens, word = in_words(val, merges)
    report(validate(model.to(device, dtype), tokens, c, cast, word=word), val, c)
    if c.objective == "next" and not callable(val) and len(tokens) >= c.seq_len > 1:
        nats = window_nats(model, tokens, c.seq_len, c.seq_len // 2, c.batch_size, cast) / word
        bpb = sliding_bpb(nats, c.seq_len // 2)
        print(f"            {bpb:.4f} in windows that overlap by half, second halves scored; perplexity of a word "
              f"{word_perplexity(bpb * len(val), corpus.val):,.2f}")
        print("by position " + ", ".join(f"{a:,} to {b:,}: {bpb:.3f}" for a, b, bpb in by_position(nats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
