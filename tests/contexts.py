"""What states are good for beyond a window: python -m tests.contexts NAME [--quick] [--json FILE]

    mamba3      Mamba-3 beside Mamba-2: equal time, equal bytes, with and without a local convolution
    carry       training windows that begin from another window's last state: loss by position to 16,384
    lengths     attention stretched to 4 times its length in three ways, beside state-space layers and a hybrid
    overfill    a small model that goes on from the state of a large one

Models are runs below out/contexts, which a second call does not train again: after Ctrl-C repeat the command. Results
go to assets/context_NAME.json, and python -m tests.figures draws them.
"""
import dataclasses
import math
import random

import torch

import train
from data.corpus import load_corpus
from model import LM, Config
from tests.bench import QUICK, folder_of, run, trained
from tests.studies import (by_position, each_nats, position_rows, text_nats, window_nats,
                           with_config)
from train import evaluate, keep_memory, surprise


def model_of(c, name, flags, make_model=None, loss_of=None):
    """A run's model, trained at the first call: by train.py, but for the model or the loss that is
    given. A loss may remember more than a checkpoint does, so such a run is not resumed."""
    def fit(argv):
        run_flags, given = train.parse(train.Flags, argv, "")
        with train.claim(run_flags):
            run_flags, model, extra = train.open_run(run_flags, given)
            torch.manual_seed(run_flags.seed)
            model = model or make_model()
            where = (0, 1, train.pick_device(c.device))
            return train.fit(run_flags, where, model, extra, *train.load_data(run_flags), loss_of)

    flags += f" --device {c.device}"
    if c.quick:
        flags += f" {QUICK} --data tests/contexts.py --seq_len 16"
    program = fit if make_model else train.main
    model, _ = trained(folder_of(c, "contexts") / name, flags, program, resume=not loss_of)
    return model.to(c.device)


def validation(c, count=400_000):
    """Bytes that no run has trained on."""
    return load_corpus("tests/contexts.py" if c.quick else "python").val[:count]


def rows_by_position(c, model, length, **row):
    """Rows of bits per byte by position, over at most 24 windows of validation text. Attention reads a window at once,
    for which torch needs no mask in memory; other layers in pieces of 512."""
    data = validation(c)
    length = min(length, len(data))
    stride = max(length, (len(data) - length) // 23)
    piece = 512 if model.constant_memory else length
    nats = window_nats(model, data, length, stride, 4 if model.constant_memory else 1, piece)
    return position_rows(by_position(nats), table="position", **row)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Mamba-3 beside Mamba-2


def study_mamba3(c):
    """By steps at several learning rates, then by minutes; and Mamba-2 whose convolution has one tap, so it is none."""
    runs = {}
    for lr in (2.5e-3, 5e-3, 1e-2):
        runs[f"mamba3, 1,000 steps, lr {lr}"] = f"--layer mamba3 --steps 1000 --lr {lr}"
        runs[f"mamba2, 1,000 steps, lr {lr}"] = f"--steps 1000 --lr {lr}"
    runs["mamba2 without convolution, 1,000 steps"] = "--steps 1000"
    for layer in ("mamba2", "mamba3"):
        runs[f"{layer}, 2 minutes"] = f"--layer {layer} --minutes 2"
    for name, flags in runs.items():
        one_tap = dataclasses.replace(train.make_config(train.Flags()), d_conv=1)
        make = (lambda: LM(one_tap)) if "without" in name else None
        model = model_of(c, "mamba3_" + name.replace(" ", "_").replace(",", ""), flags, make)
        bits = evaluate(model, validation(c, 10**6), 128, 64)[0]
        yield {"table": "mamba3", "path": name, "bpb": bits}


# ---------------------------------------------------------------------------------------------------------------------
# 2. States passed on


class StatePassing:
    """A loss for train.fit: with probability p a window begins from the last state of another row of the step before,
    detached (state passing, 2507.02782). So the model sees states that a window alone never reaches."""

    def __init__(self, p):
        self.p = p
        self.state = None
        self.random = random.Random(0)

    def __call__(self, model, tokens, targets):
        b = len(tokens)
        state = None
        if self.state is not None:
            passed = [self.random.random() < self.p for _ in range(b)]
            passed = torch.tensor(passed, device=tokens.device)
            state = tuple(type(s)(*(self.choose(passed, t) for t in s)) for s in self.state)
        logits, after = model(tokens, state)
        self.state = tuple(type(s)(*(t.detach() for t in s)) for s in after)
        return surprise(logits, targets).mean()

    @staticmethod
    def choose(passed, t):
        """Another row's tensor where passed, else zero, which is the beginning of a text."""
        mask = passed.view(-1, *[1] * (t.ndim - 1))
        return torch.where(mask, t.roll(1, dims=0), torch.zeros_like(t))


def study_carry(c):
    """Runs in windows of 128; then a tenth of their steps more, plain and with states passed on."""
    sizes = {"s4d": "--layer s4d --n_layer 7 --steps 1000",
             "mamba": "--layer mamba --d_model 184 --steps 700",
             "mamba2": "--layer mamba2 --steps 1500"}
    for layer, flags in sizes.items():
        base = model_of(c, f"carry_{layer}", flags)
        steps = int(flags.split()[-1]) // 10
        for p in (0.0, 0.5):
            loss_of = StatePassing(p) if p else None  # the usual one
            more = f"--steps {steps} --lr 1e-3 --warmup 10 --seed 2"
            model = model_of(c, f"carry_{layer}_{p}", more, lambda: with_config(base), loss_of)
            bits = [evaluate(model, validation(c, 10**6), 128, 64, carried=carried)[0]
                    for carried in (False, True)]
            yield {"table": "carried", "path": layer, "passed": p, "windows": bits[0],
                   "carried": bits[1]}
            yield from rows_by_position(c, model, 64 if c.quick else 2**14, path=layer, passed=p)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Lengths

LENGTH = 256  # of training
FACTOR = 4    # by which attention is stretched


def stretched(base, how="plain"):
    """base without its window, and but for plain with its rotary positions slowed for a context FACTOR times as long.

    interpolation (2306.15595) slows every pair of channels by FACTOR; ntk raises the base so that the fastest pair
    stays and the slowest is slowed by FACTOR; parts (YaRN, 2309.00071, with Llama 3.1's bounds) slows pairs that turned
    less than once in LENGTH, leaves those that turned more than 4 times, and mixes between.
    """
    config = base.config
    size = config.d_model // config.n_head
    change = {"plain": {},
              "interpolation": {"rope_scaling": (FACTOR, 1e9, 2e9, LENGTH)},
              "ntk": {"rope_base": config.rope_base * FACTOR ** (size / (size - 2))},
              "parts": {"rope_scaling": (FACTOR, 1.0, 4.0, LENGTH)}}[how]
    return with_config(base, window=0, **change)


def repeated(c, model, distance, size=32, count=32):
    """Bits per byte of `size` bytes of text, the same as those `distance` bytes before them."""
    data = torch.from_numpy(validation(c).astype("int64")).to(c.device)
    size = min(size, distance // 2)
    starts = torch.arange(count) * ((len(data) - distance) // count)
    rows = torch.stack([data[s:s + distance + size] for s in starts.tolist()])
    rows[:, -size:] = rows[:, :size]
    batch, piece = (8, 512) if model.constant_memory else (2, distance + size)
    return text_nats(model, rows, batch, piece)[:, -size:].mean().item() / math.log(2)


def study_lengths(c):
    """Equal bytes, 800 steps of 8 windows of 256; then, for attention alone, 100 steps of 4 windows of 1,024."""
    steps = f"--steps 800 --seq_len {LENGTH}"
    flags = {"attention": f"--layer attention --d_model 144 --lr 2e-3 {steps}",
             "mamba2": f"--layer mamba2 {steps}", "mamba3": f"--layer mamba3 {steps}",
             "hybrid": f"--layer mamba2,attention --n_layer 4 --d_model 160 {steps}"}
    models = {name: model_of(c, f"lengths_{name}", line) for name, line in flags.items()}
    base = models.pop("attention")
    models["hybrid"] = stretched(models["hybrid"])
    long = f"--steps 100 --batch_size 4 --seq_len {FACTOR * LENGTH} --lr 5e-4 --warmup 10"
    for how in ("plain", "interpolation", "ntk", "parts"):
        models[f"attention, {how}, not tuned"] = stretched(base, how)
        models[f"attention, {how}"] = model_of(c, f"lengths_{how}", long,
                                               lambda: stretched(base, how))
    for name, model in models.items():
        yield from rows_by_position(c, model, 64 if c.quick else 16 * LENGTH, path=name)
        for distance in (LENGTH, 4 * LENGTH, 16 * LENGTH):
            distance = distance // 16 if c.quick else distance - 32  # the window ends at its length
            yield {"table": "repeated", "path": name, "distance": distance,
                   "bpb": repeated(c, model, distance)}


# ---------------------------------------------------------------------------------------------------------------------
# 4. OverFill

PROMPT = 128  # bytes before the switch


def filled(teacher):
    """A loss for train.fit: the teacher reads a prompt (OverFill, 2508.08446), the student predicts what follows."""
    def loss_of(student, tokens, targets):
        cut = tokens.shape[1] // 2
        with torch.no_grad():
            _, state = teacher(tokens[:, :cut])
        logits, _ = student(tokens[:, cut:], state, upto=0)
        return surprise(logits, targets[:, cut:]).mean()
    return loss_of


@torch.inference_mode()
def after_the_switch(c, reader, writer):
    """Nats of each of PROMPT bytes that the writer predicts from the reader's state. The writer itself reads the last
    byte of the prompt, so that it can predict the first one after it."""
    data = torch.from_numpy(validation(c).astype("int64")).to(c.device)
    half = 16 if c.quick else PROMPT
    nats = []
    for rows in data.unfold(0, 2 * half, 2 * half)[:1024].split(64):
        _, state = reader(rows[:, :half - 1])
        logits, _ = writer(rows[:, half - 1:-1], state, upto=0)
        nats.append(each_nats(logits, rows[:, half:]))
    return torch.cat(nats)


def study_overfill(c):
    """The default run's Mamba-2 and a student of half its width with twice the expansion: their states have one shape,
    so that nothing is converted. Two seeds, 800 steps of 8 windows of 256; a student alone reads the prompt itself."""
    shape = {"expand": 2, "head_dim": 32, "d_state": 32, "tie": False, "layers": ("mamba2",) * 3}
    large = model_of(c, "overfill_teacher", "--steps 2200",
                     lambda: LM(Config(d_model=192, **shape)))
    small = Config(d_model=96, **shape | {"expand": 4})
    cases = [("the large model", 0, large, large)]
    for seed in (1, 2):
        flags = f"--steps 800 --seq_len {2 * PROMPT} --seed {seed}"
        alone = model_of(c, f"overfill_alone_{seed}", flags, lambda: LM(small))
        student = model_of(c, f"overfill_filled_{seed}", flags, lambda: LM(small), filled(large))
        cases += [("the small one alone", seed, alone, alone),
                  ("the small one after the large", seed, large, student)]
    for name, seed, reader, writer in cases:
        nats = after_the_switch(c, reader, writer)
        yield from position_rows(by_position(nats, 5), table="overfill", path=name, seed=seed)


if __name__ == "__main__":
    keep_memory()
    run("tests.contexts", "context", {"mamba3": study_mamba3, "carry": study_carry,
                                      "lengths": study_lengths, "overfill": study_overfill})
