"""What models learn: python -m tests.studies NAME [--quick] [--rounds N] [--json FILE]

    selection   accuracy on selective copying and induction heads, by length
    robust      bits per byte under noise, and far beyond the training length, of two trained models
    distill     a transformer, its students, and the same students without it: bits per byte, speed, memory
    state       accuracy of six layers on four tasks, and of recall by number of pairs and state size
    shakespeare nats per byte of tiny Shakespeare after 90 seconds, beside nanoGPT's laptop recipe where the environment
                variable NANOGPT names its folder, with data/shakespeare_char prepared

Models are runs in folders of their own below out/, which a second call does not train again: after Ctrl-C repeat the
command. Results go to assets/study_NAME.json. Only distill measures speed, with bench.py's harness.
"""
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import distill
from data.corpus import load_corpus
from data.files import require
from data.synthetic import NO_TARGET, TASKS, recall
from distill import freeze, make_loss, make_student, replaced
from model import LM, Config, load
from sample import prefill
from tests.bench import (QUICK, compare, folder_of, our_config, run, trained, training_step,
                         write_after)
from tests.noise import corrupt
from train import evaluate, keep_memory, make_optimizer, prediction_loss

# ---------------------------------------------------------------------------------------------------------------------
# 1. How models are scored


@torch.inference_mode()
def read_through(model, tokens, targets, piece, score):
    """score(logits, targets), (b, l), of tokens (b, l), read in pieces with the state carried
    along: pieces bound the memory and leave the result as it is."""
    found = []
    state = None
    for t, y in zip(tokens.split(piece, dim=1), targets.split(piece, dim=1)):
        logits, state = model(t, state)
        found.append(score(logits, y))
    return torch.cat(found, dim=1)


def score(model, tokens, targets, piece=2**16):
    """Share of the targets guessed right, in all of the window and in its last quarter."""
    tokens, targets = torch.from_numpy(tokens), torch.from_numpy(targets)
    hits = read_through(model, tokens, targets, piece, lambda logits, y: logits.argmax(-1) == y)
    late = tokens.shape[1] * 3 // 4
    return {name: (hits[:, first:].sum() / (targets[:, first:] != NO_TARGET).sum()).item()
            for name, first in (("accuracy", 0), ("last_quarter", late))}


def each_nats(logits, targets):
    """Nats of every target: logits (b, l, v), targets (b, l) -> (b, l)."""
    return F.cross_entropy(logits.mT, targets, reduction="none")


def text_nats(model, texts, batch_size, piece=512):
    """Nats of each byte of texts (n, l + 1) but the first, each text from an empty state."""
    model.eval()
    parts = tqdm(texts.split(batch_size), leave=False, disable=None)
    return torch.cat([read_through(model, part[:, :-1], part[:, 1:], piece, each_nats).cpu()
                      for part in parts])


def window_nats(model, data, length, stride, batch_size, piece=512):
    """Nats of each byte in windows that begin every `stride` bytes, each from an empty state: (windows, length).

    The mean over windows is the loss by position. With stride = length / 2 the second halves, and all of the first
    window, are what MambaByte reports: none is scored twice, and after the first window none with less than half a
    window before it. The last bytes, up to stride - 1 of them, are in no window.
    """
    text = np.concatenate([[ord("\n")], data]).astype(np.int64)
    text = torch.from_numpy(text).to(next(model.parameters()).device)
    return text_nats(model, text.unfold(0, length + 1, stride), batch_size, piece)


def sliding_bpb(nats, stride):
    """Bits per byte of window_nats, each byte in the first window that reads it within its last `stride` bytes."""
    scored = torch.cat([nats[0], nats[1:, -stride:].flatten()])
    return scored.mean().item() / math.log(2)


def by_position(nats, parts=7):
    """[(from, to, bits per byte)]: the windows in parts that double, so that the first is 1/64 of the length."""
    cuts = [0] + [nats.shape[1] >> i for i in reversed(range(parts))]
    pairs = [(a, b) for a, b in zip(cuts, cuts[1:]) if a < b]
    return [(a, b, nats[:, a:b].mean().item() / math.log(2)) for a, b in pairs]


def position_rows(parts, **row):
    """Rows of by_position's parts."""
    return [{**row, "from": a, "to": b, "bpb": bpb} for a, b, bpb in parts]


def word_perplexity(bits, text):
    """2^(bits / words), what a model over words would have to reach; words of `text` are what white space separates."""
    words = max(len(bytes(text).split()), 1)
    return 2 ** min(bits / words, 1000)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Selection

SHORT = {"selective_copy": "--seq_len 64 --batch_size 32",
         "induction": "--seq_len 32 --batch_size 64"}
LONG = {"selective_copy": "--lr 5e-3 --steps 800", "induction": "--lr 2e-3 --steps 300"}


def study_selection(c):
    """Two layers of width 64, trained in windows of 256 in a few minutes per run; then windows of
    up to 16,384.

    Training in windows of 256 begins with the weights of a run in short ones, since 1 to 4 targets
    in 256 letters may teach nothing in minutes.
    """
    root = folder_of(c, "selection")
    quick = QUICK if c.quick else ""
    for task in SHORT:
        for layer in ("mamba", "s4d"):
            short = root / f"{task}_{layer}_short"
            trained(short, f"--data {task} --layer {layer} --d_model 64 --n_layer 2 {SHORT[task]} "
                    f"--lr 5e-3 --steps 800 {quick}")
            model, extra = trained(root / f"{task}_{layer}", f"--data {task} --init {short} "
                                   f"--seq_len 256 --batch_size 16 {LONG[task]} {quick}")
            for length in (64,) if c.quick else (64, 256, 1024, 4096, 2**14):
                count = min(256, 2**20 // length)
                windows = TASKS[task](length, count, 2**63, length)
                share = score(model, *windows, piece=max(1, 2**16 // count))["accuracy"]
                yield {"table": task, "path": layer, "length": length, "windows": count,
                       "accuracy": share, "steps": extra["step"]}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Robust

TRAINED = {"mamba": "out/robust_mamba",  # by the commands in tests/README.md
           "attention": "out/robust_attention"}
NOISES = ("", "drop:0.05", "drop:0.3", "repeat:0.05", "repeat:0.3", "antspeak", "upper",
          "random_case", "swap:0.05", "swap:0.3")  # as MambaByte's table has them


def study_robust(c):
    """MambaByte's robustness: noise of several kinds, and texts 64 times as long as the windows of training."""
    for name, path in TRAINED.items():
        if c.quick:
            model = LM(our_config(name, 32, 1))
            seq_len = 16
            val = np.frombuffer(Path(__file__).read_bytes()[:2000], np.uint8)
        else:
            model, extra = load(path)
            seq_len = extra["flags"]["seq_len"]
            val = load_corpus(extra["flags"]["data"]).val
        for noise in NOISES:
            bpb, _ = evaluate(model, corrupt(val, noise), seq_len, 16)
            yield {"table": "noise", "path": name, "noise": noise or "none", "bpb": bpb}
        for key, parts in curves(name, model, val, seq_len).items():
            yield from position_rows(parts, table="position", path=f"{name}, {key}")


def curves(name, model, val, seq_len):
    """By position, over 6 windows of 64 times the length; Mamba in windows of its training has one figure for all."""
    length = min(64 * seq_len, len(val))
    stride = max(1, (len(val) - length) // 5)

    def curve(model, piece=512):
        return by_position(window_nats(model, val, length, stride, 1, piece))

    if name == "mamba":
        half = seq_len // 2
        sliding = sliding_bpb(window_nats(model, val, seq_len, half, 16), half)
        plain = curve(model)
        return {"plain": plain, "windowed": [(a, b, sliding) for a, b, _ in plain]}
    plain = curve(with_config(model, window=0), length)  # one piece needs no mask in memory
    return {"plain": plain, "windowed": curve(model)}  # as it was trained


# ---------------------------------------------------------------------------------------------------------------------
# 4. Distill: a transformer, its students, and the same students without it

SHARES = (0.5, 0.25, 0.125, 0.0)  # of the layers that stay attention


def describe(*stages):
    """A row of a run, made in one stage or two: bits per byte as it began, after alignment and at
    the end; KL, the divergence from the teacher in the last 20 steps, where students of one teacher
    read the same windows; bytes and seconds of all stages."""
    logs = [[json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
            for stage in stages]
    ends = [log[-1] for log in logs]
    row = {"table": "distillation", "model": stages[-1].name, "val_bpb": ends[-1]["val_bpb"],
           "bytes": sum(end["bytes"] for end in ends),
           "seconds": sum(end["seconds"] for end in ends)}
    if len(stages) == 2:
        flags = load(stages[0])[1]["flags"]
        teacher, _ = load(flags["teacher"])
        torch.manual_seed(flags["seed"])
        student = make_student(teacher, flags["keep_attention"], flags["mixers"])  # as it began
        first, _ = evaluate(student, load_corpus(flags["data"]).val, flags["seq_len"], 16)
        losses = [line["train_bpb"] for line in logs[1] if line["train_bpb"] is not None]
        row |= {"first_bpb": first, "aligned_bpb": ends[0]["val_bpb"],
                "kl": statistics.mean(losses[-20:])}
    return row


def distillation_rows(c, root):
    """A student reads a fifth of its teacher's bytes: a quarter of them to align its layers, the
    others end to end. From scratch it reads as many, or half as many more, which takes longer than
    distillation with the teacher's reading."""
    data = "--data shakespeare --seq_len 256"
    if c.quick:
        data = f"--data tests/studies.py --seq_len 16 {QUICK}"
    shape = "--n_layer 8 --d_model 16" if c.quick else "--n_layer 8 --d_model 64"
    teacher = root / "teacher"
    trained(teacher, f"--layer attention {shape} --n_head 2 --batch_size 16 --steps 600 --lr 3e-3 "
            f"{data}")
    yield describe(teacher)
    for share in SHARES:
        student = f"--teacher {teacher} --keep_attention {share} --batch_size 8 --warmup 10"
        for mixers in ("attention", "random"):
            end = root / f"{share}_{mixers}"
            aligned = root / f"{share}_{mixers}_aligned"
            trained(aligned, f"{student} --mixers {mixers} --stage align --lr 1e-2 --steps 60 "
                    f"{data}", distill.main)
            trained(end, f"{student} --student {aligned} --lr 8e-3 --steps 180 {data}",
                    distill.main)
            yield describe(aligned, end)
        for name, steps in (("scratch", 240), ("scratch_longer", 360)):
            folder = root / f"{share}_{name}"
            trained(folder, f"{student} --mixers scratch --kl 0 --ce 1 --steps {steps} {data}",
                    distill.main)
            yield describe(folder)


def make_distillation(path, share, b, l, d_model, n_layer, device):
    """A step of the student: of plain training, or of distillation, the teacher's reading included."""
    shape = {"d_model": d_model, "n_head": 2, "n_kv_head": 2, "window": l}
    teacher = LM(Config(("attention+mlp",) * n_layer, **shape)).to(device).eval()
    student = make_student(teacher, share, "attention").to(device).train()
    c = distill.Flags()
    mixers = replaced(student, teacher)
    freeze(student, c.stage, mixers)
    loss_of = prediction_loss if path == "training" else make_loss(c, teacher, mixers)
    tokens, targets = torch.randint(256, (2, b, l), device=device)
    optimizer = make_optimizer(student, c.lr, c.weight_decay)
    return training_step(student, optimizer, lambda: loss_of(student, tokens, targets))


def with_config(model, **changes):
    """A copy of a model, its Config changed where no weight depends on it."""
    copy = LM(dataclasses.replace(model.config, **changes)).to(model.embedding.weight)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def unlimited(folder, device="cpu"):
    """A run's model, attention seeing all that was read."""
    return with_config(load(folder, device)[0], window=0)


def make_run_context(path, root, context, count, device):
    """count bytes after a context, by a run's model."""
    model = unlimited(root / path, device)
    return write_after(model, torch.randint(256, (1, context), device=device), count)


def study_distill(c):
    """The runs; then the price of a step, speed and memory of writing, and what models keep of a
    context."""
    root = folder_of(c, "bench_distill")
    yield from distillation_rows(c, root)
    size = {"b": 8, "l": 256, "d_model": 64, "n_layer": 8}
    if c.quick:
        size = {"b": 2, "l": 16, "d_model": 16, "n_layer": 2}
    for share in SHARES:
        yield from compare(c, "distillation step", "step", make_distillation,
                           {"kept": ("training", "all")}, {"share": share},
                           size["b"] * size["l"], **size)
    paths = ["teacher"] + [f"{share}_attention" for share in SHARES]
    for context in (16,) if c.quick else (256, 2048, 8192):
        for row in compare(c, "writing after a context", "writing", make_run_context, paths,
                           {"context": context}, 32, root=root, count=32):
            _, state = prefill(unlimited(root / row["path"]), torch.randint(256, (1, context)))
            row["state_mb"] = sum(t.nbytes for layer in state for t in layer) / 1e6
            yield row


# ---------------------------------------------------------------------------------------------------------------------
# 5. State: what layers of one size can hold

HOLDERS = ("s4d", "mamba", "mamba2", "mamba3", "attention", "mamba2,attention")
RATES = (1e-3, 2e-3, 4e-3)
SIZES = (4, 8, 16, 32)  # n of Mamba-2, in recall; all other runs have 16
TASK_FLAGS = {"parity": "--seq_len 64 --batch_size 8 --steps 800",
              "recall": "--seq_len 64 --batch_size 8 --steps 2000",
              "induction": "--seq_len 32 --batch_size 16 --steps 800",
              "selective_copy": "--seq_len 64 --batch_size 8 --steps 1500"}
PAIRS = (1, 2, 4, 8, 16, 24)  # in training 1 to 16, a quarter of the length


def state_runs(root, quick):
    """{(task, layer, n): {rate: (folder, flags)}} of every run."""
    cells = [(task, layer, 16) for task in TASK_FLAGS for layer in HOLDERS]
    cells += [("recall", "mamba2", n) for n in SIZES if n != 16]
    shape = "--n_layer 2 --d_model 64 --head_dim 16 --n_head 1 --device cpu --dtype float32"
    runs = {}
    for task, layer, n in cells:
        for lr in RATES:
            flags = f"--data {task} --layer {layer} --d_state {n} {shape} {TASK_FLAGS[task]}"
            folder = root / f"{task}_{layer.replace(',', '+')}_{n}_{lr:g}"
            runs.setdefault((task, layer, n), {})[lr] = (
                folder, f"{flags} --lr {lr} {QUICK if quick else ''}")
    return runs


def train_all(runs, log):
    """In a process of its own, with one thread: the runs in turn. What they say goes to the file log."""
    torch.set_num_threads(1)
    for folder, flags in runs:
        with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
            trained(folder, flags)
        print(f"  {folder} has ended", flush=True)


def train_by_two(runs, root):
    """Two runs at a time, since models this small have no use for a second thread."""
    root.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn").Process
    processes = [spawn(target=train_all, args=(runs[i::2], root / f"log{i}.txt")) for i in (0, 1)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # theirs: Ctrl-C is this process's affair
    for process in processes:
        process.start()
    signal.signal(signal.SIGINT, before)
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()  # train.py saves
            process.join()
    failed = any(process.exitcode for process in processes)
    require(not failed, f"a run failed: see {root}/log*.txt")


def study_state(c):
    """Two layers of width 64, each task with three learning rates; recall also by number of pairs, at the best rate."""
    root = folder_of(c, "state")
    runs = state_runs(root, c.quick)
    train_by_two([run for cell in runs.values() for run in cell.values()], root)
    best = {}  # (accuracy, rate, model, length) of a cell
    for (task, layer, n), cell in runs.items():
        found = []
        for lr, (folder, _) in cell.items():
            model, extra = load(folder)
            length = extra["flags"]["seq_len"]
            row = {"table": "layers" if n == 16 else "sizes", "path": layer, "task": task, "n": n,
                   "lr": lr, "steps": extra["step"], "length": length,
                   **score(model, *TASKS[task](length, 512, 2**63, 0))}
            found.append((row["accuracy"], lr, model, length))
            yield row
        best[task, layer, n] = max(found, key=lambda run: run[0])
    for layer, n in [*(("mamba2", n) for n in SIZES), ("mamba2,attention", 16)]:
        _, lr, model, length = best["recall", layer, n]
        for pairs in PAIRS:
            yield {"table": "pairs", "path": f"{layer}, n = {n}", "pairs": pairs, "lr": lr,
                   **score(model, *recall(length, 512, 2**63, 0, pairs))}


# ---------------------------------------------------------------------------------------------------------------------
# 6. Ninety seconds of tiny Shakespeare

ATTENTION = "--layer attention --d_model 128 --n_layer 4"
SHAKESPEARE = {
    "mamba2": "--d_state 16 --seq_len 256",
    "mamba": "--layer mamba --d_model 184 --d_state 8 --seq_len 256 --lr 6e-3",
    "attention": f"{ATTENTION} --seq_len 256 --lr 2e-3",
    "attention, nanoGPT's sizes": f"{ATTENTION} --seq_len 64 --batch_size 12 --lr 1e-3 "
                                  "--warmup 100"}
NANOGPT = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
           "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
           "--lr_decay_iters=2000 --dropout=0.0")  # its README, for a laptop


class NanoGPT(nn.Module):
    """A model that nanoGPT trained, with the interface of ours: bytes in, logits of bytes out."""

    def __init__(self, folder):
        super().__init__()
        spec = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
        self.gpt = program.GPT(program.GPTConfig(**saved["model_args"]))
        self.gpt.load_state_dict(saved["model"])
        meta = pickle.loads((folder / "data" / "shakespeare_char" / "meta.pkl").read_bytes())
        self.bytes = torch.tensor([ord(char) for char in meta["itos"].values()])  # of its ids
        self.ids = torch.zeros(256, dtype=torch.long)
        self.ids[self.bytes] = torch.arange(len(self.bytes))

    def forward(self, tokens, state=None, upto=None):
        x = self.ids[tokens]
        known = self.gpt(x, x)[0]  # given targets, whatever they are, it has logits of all positions
        logits = known.new_full((*tokens.shape, 256), -torch.inf)
        logits[..., self.bytes] = known
        return logits, None


def study_shakespeare(c):
    """The whole validation split, the same last 10 % for all, in windows of 64 and, where they fit, of 256."""
    root = folder_of(c, "shakespeare")
    val = load_corpus("shakespeare").val[:2000 if c.quick else None]
    models = {}
    for name, flags in SHAKESPEARE.items():
        model, extra = trained(root / name.split()[-1], f"--data shakespeare --minutes 1.5 {flags} "
                               f"{QUICK if c.quick else ''}")
        models[name] = model, extra["step"], extra["seconds"], extra["flags"]["seq_len"]
    if "NANOGPT" in os.environ:
        folder = Path(os.environ["NANOGPT"]).resolve()
        began = time.perf_counter()
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT.split()]
        subprocess.run(command + ["--max_iters=250"] * c.quick, cwd=folder, check=True)
        models["nanoGPT"] = NanoGPT(folder), 250 if c.quick else 2000, time.perf_counter() - began, 64
    for name, (model, steps, seconds, longest) in models.items():
        row = {"table": "shakespeare", "path": name, "steps": steps, "seconds": seconds,
               "parameters": sum(p.numel() for p in model.parameters())}
        for length in {64, longest}:
            row[f"nats_{length}"] = evaluate(model, val, length, 2**13 // length)[0] * math.log(2)
        yield row


if __name__ == "__main__":
    keep_memory()
    run("tests.studies", "study", {
        "selection": study_selection, "robust": study_robust, "distill": study_distill,
        "state": study_state, "shakespeare": study_shakespeare})
