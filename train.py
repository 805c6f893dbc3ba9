"""Train a byte language model: python train.py, or -h for the flags.

In order: flags, where it runs, what is predicted, the optimizer, validation, the loop (the function train). Then what
stands around it and may wait: a run's folder, its state, the screen, the script. Letters: c the flags, b windows, l
positions, v tokens of the vocabulary.

    main -> claim, open_run, load_data, make_model, fit
    fit  -> train   -> Run.validate_if_due, batches, loss_of, after_step
         -> finish  -> Run.validate -> measure -> evaluate, once or twice

Figures are in bits per byte (nats / ln 2, and where tokens are words, divided by the mean length of a word), unless
they name another unit: the loss at step 0 is in nats, --objective mask counts bits per masked byte, diffusion bounds
bits per byte, a task has bits per target.
"""
import argparse
import ctypes
import errno
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Windows, where nothing claims a folder
    fcntl = None

from data.bpe import in_words, learn_merges
from data.corpus import KNOWN, Corpus, compressed_bpb, load_corpus, windows
from data.files import UserError, bounded, check_fields, require, require_one_of
from data.synthetic import NO_TARGET, TASKS
from model import BLOCKS, ENCODER_MIXERS, MASK, MIXERS, Config, load, make_model, save

# ---------------------------------------------------------------------------------------------------------------------
# 1. Flags: one dataclass per script, every field a flag


def flag(default, text, low=0, high=2**62, one_of=None, fixed=False):
    """A field of a dataclass that is a command-line flag too, with the bounds of data/files.py. A fixed flag belongs to
    the checkpoint, so that no resumed run may change it."""
    return bounded(default, low, high, one_of, help=text, fixed=fixed)


def parse(cls, argv, description):
    """The dataclass cls from the command line, and a dict of the flags that were given there; -h prints and exits."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)  # only what is given
    # instead of the usage and an exit
    parser.error = lambda message: require(False, f"{message}; -h lists the flags")
    for f in fields(cls):
        default = f" (default: {f.default})" if f.default != "" else ""
        text = (f.metadata["help"] + default).replace("%", "%%")
        switch = {"action": argparse.BooleanOptionalAction}
        kind = switch if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument("--" + f.name, help=text, **kind)
    given = vars(parser.parse_args(argv))
    c = cls(**given)
    check_fields(c, "--")  # for classes that do not check themselves, as RunFlags does
    return c, given


def forget_broken_output():
    """Without standard output if that cannot be written: Python would flush it at exit, and fail again."""
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None


def script(main):
    """main(argv) that ends in one line where a user can mend the error: status 2, or 130 after Ctrl-C or where nobody
    reads standard output any more. What its encoding cannot show is shown as a question mark."""
    @wraps(main)
    def run(argv=None):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        # closed (>&-, 2>&-); print(file=None) would write to standard output
        sys.stdout = sys.stdout or open(os.devnull, "w")
        sys.stderr = sys.stderr or open(os.devnull, "w")
        try:
            status = main(argv)
            print(end="", flush=True)  # fails here rather than at exit
            return status
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except (UserError, MemoryError, RuntimeError, OSError) as e:
            signs = ("out of memory", "allocate", "size calculation overflowed", "too big")
            no_memory = isinstance(e, MemoryError) or any(sign in str(e) for sign in signs)
            no_memory = no_memory and not isinstance(e, UserError)  # a file may be named "too big"
            if isinstance(e, RuntimeError) and not no_memory:
                raise
            forget_broken_output()
            if isinstance(e, BrokenPipeError):
                return 130
            reason = " ".join(str(e).split())[:300] or "out of memory"
            way_out = "; lower the batch, the length or the model's size, or give it less data"
            print(f"error: {reason}{way_out if no_memory else ''}", file=sys.stderr)
            return 2
    return run


@dataclass
class RunFlags:
    """The flags of every run, whatever it trains: also distill.py's."""
    script: ClassVar[str] = "train.py"  # no flag: the program that makes such runs
    data: str = flag("python", "a file, a folder, or a known name: python, shakespeare, enwik8, "
                     f"in train.py {', '.join(TASKS)}")
    out: str = flag("", "folder of the run (default: out/LAYER, of an encoder out/OBJECTIVE)")
    steps: int = flag(4400, "optimizer steps, unless --minutes is given", low=1)
    minutes: float = flag(0.0, "train this long instead, not counting validation")
    resume: bool = flag(False, "go on with the run in --out, with its flags but for those given")
    eval_every: int = flag(0, "validate every so many steps too, not only at the end")
    val_bytes: int = flag(1_000_000, "validate on so many bytes at most; 0 is all")
    seed: int = flag(1, "of the weights, the windows and dropout")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    dtype: str = flag("auto", "float32, float64, or bfloat16 (autocast), which is auto on a GPU "
                     "from compute capability 8.0",
                      one_of=("auto", "float32", "bfloat16", "float64"))
    compile: bool = flag(False, "torch.compile the model: slow to start, then faster")
    seq_len: int = flag(128, "bytes in a window (tokens, if those are words)", low=1, high=2**24)
    batch_size: int = flag(8, "windows in a step, over all processes", low=1, high=2**20)
    accumulate: int = flag(1, "cut a step into parts, one after the other, to save memory", low=1)
    lr: float = flag(5e-3, "learning rate, which falls in a line from here to zero")
    warmup: int = flag(50, "first N steps, in which that rate is multiplied by 1/N, 2/N, .. 1")
    weight_decay: float = flag(0.1, "on the weights of linear layers, on nothing else")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is no limit")

    def __post_init__(self):
        check_fields(self, "--")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Where it runs


def pick_device(name):
    """torch.device from a flag; auto is CUDA, then Apple's mps, then the CPU."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name.startswith("cuda") and processes()[1] > 1:  # a GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from e
    return device


def pick_dtype(name, device):
    """(dtype of the parameters, autocast context): bfloat16 means float32 parameters under autocast."""
    if name == "auto":  # GPUs below compute capability 8.0 only emulate bfloat16, slowly
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bfloat16" if fast else "float32"
    if name == "bfloat16":
        return torch.float32, torch.autocast(device.type, torch.bfloat16)
    return getattr(torch, name), nullcontext()


def keep_memory():
    """Linux: reuse freed memory. glibc returns each large tensor to the system and takes the next one as fresh pages,
    which the kernel fills with zeros: a fifth of a step's time on two cores. It is set for the whole process, so only
    a script that is the program calls this, not main."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def processes():
    """(rank, number) of the processes that torchrun started; (0, 1) without it."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # a cluster may set one of the two
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_processes(device):
    """(rank, number of processes, device), when all of them have come here."""
    rank, world = processes()
    if world == 1:
        return rank, world, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patient = timedelta(days=1)  # with process 0, which validates alone
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patient)
    dist.barrier()  # all have looked into --out before process 0 writes there
    return rank, world, device


# ---------------------------------------------------------------------------------------------------------------------
# 3. What is predicted: an objective turns bytes into tokens to read and targets to predict from them
#
# draw(before, targets, seed, first) takes two int64 arrays (b, l), where before[t] is the byte that comes before
# targets[t], and gives the tokens to read and the targets, at least one per window. Its random numbers are a pure
# function of the shape, the seed, and `first`, the number of windows drawn before these: a resumed run and several
# processes draw the same. A window's loss is the mean over its targets. A task (data/synthetic.py) makes windows of its
# own instead of cutting a text: task(length, batch, seed, step) -> tokens, targets, which next_byte passes on as they
# are.

TASK_WINDOWS = 512  # on which a task is scored


class Objective(NamedTuple):
    draw: callable
    unit: str  # of the figures
    task: callable = None


def choose(k, l, seed, first):
    """Booleans (b, l), k[i] of them True in row i, chosen at random; and the generator to go on with."""
    rng = np.random.default_rng((seed, first, 1))  # another stream than that of `windows`
    place = rng.random((len(k), l)).argsort(1).argsort(1)  # ranks in a random order
    return place < k[:, None], rng


def next_byte(before, targets, seed, first):
    """Every byte from those before it."""
    return before, targets


def masked_bytes(before, targets, seed, first):
    """15 % of the bytes from both sides (BERT, Devlin et al. 2019): 80 % of them are masked, 10 % replaced by any byte,
    and 10 % stay as they are, so that no byte which the model sees is beyond doubt."""
    b, l = targets.shape
    chosen, rng = choose(np.full(b, max(1, round(0.15 * l))), l, seed, first)
    dice = rng.random((b, l))
    any_byte = rng.integers(256, size=(b, l))
    shown = np.where(dice < 0.8, MASK, np.where(dice < 0.9, any_byte, targets))
    return np.where(chosen, shown, targets), np.where(chosen, targets, NO_TARGET)


def masked_diffusion(before, targets, seed, first):
    """k of l bytes from the others, k uniform in 1 .. l: the mean loss bounds that of all bytes in a row.

        -log p(x) / l  <=  E_k (1/k) sum_{i masked} -log p(x_i | bytes not masked)
    Proof: write a text in a random order; p(x) is the mean of p(x | order) over all orders. While k bytes are masked,
    each of them is the next with chance 1/k, so the expected -log p of the next is (1/k) sum_{i masked}. Added up for
    k = l .. 1 that is the expected -log p(x | order), which by Jensen is at least -log p(x). With t = k/l it is the
    diffusion bound, an integral over t weighted 1/t (Sahoo et al. 2024), without the variance of the number of masks.
    """
    b, l = targets.shape
    golden = (math.sqrt(5) - 1) / 2
    fraction = golden * (first + np.arange(b)) % 1  # uniform, evenly spread in any few windows
    chosen, _ = choose(1 + np.floor(l * fraction).astype(np.int64), l, seed, first)
    return np.where(chosen, MASK, targets), np.where(chosen, targets, NO_TARGET)


OBJECTIVES = {"next": Objective(next_byte, "bits per byte"),
              "mask": Objective(masked_bytes, "bits per masked byte"),
              "diffusion": Objective(masked_diffusion, "bits per byte at most")}
NEXT = OBJECTIVES["next"]


def draw_batch(c, data, objective, first):
    """The tokens and targets of a step, for all processes: (b, 2, seq_len). `first` counts the windows before them."""
    if objective.task:
        pair = objective.task(c.seq_len, c.batch_size, c.seed, first // c.batch_size)
    else:
        batch = windows(data, c.seq_len + 1, c.batch_size, c.seed, first)
        pair = batch[:, :-1], batch[:, 1:]
    drawn = objective.draw(*pair, c.seed, first)
    return torch.from_numpy(np.stack(drawn, axis=1))


def surprise(logits, targets):
    """Mean nats of each row's targets, float32 or wider: logits (b, l, v), targets (b, l) -> (b,)."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=NO_TARGET)
    return nats.view_as(targets).sum(1) / (targets != NO_TARGET).sum(1)


def prediction_loss(model, tokens, targets):
    """Mean nats of the targets (b, l), given the tokens (b, l)."""
    logits, _ = model(tokens, upto=0)  # no state is wanted
    return surprise(logits, targets).mean()


# ---------------------------------------------------------------------------------------------------------------------
# 4. The optimizer

SHARE = {"decayed": 1.0, "not decayed": 1.0, "slow": 0.1}  # of the learning rate, as S4 trains


def parameter_groups(model):
    """{"decayed": {name: parameter}, "not decayed": ..., "slow": ...}: only the weights of Linear layers are decayed.

    By module, since shape misleads: A_log has two axes, and decay would pull every A = -exp(A_log) towards -1. The
    embedding is not decayed, also where the head shares it. A module lists its slow parameters in an attribute `slow`:
    a small change of S4's dt or A changes its whole kernel.
    """
    group_of = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            group_of[f"{path}.weight"] = "decayed"
        for name in getattr(module, "slow", ()):
            group_of[f"{path}.{name}"] = "slow"
    groups = {group: {} for group in SHARE}
    for name, p in model.named_parameters():  # a shared tensor appears once, as the embedding
        groups[group_of.get(name, "not decayed")][name] = p
    return {group: named for group, named in groups.items() if named}


def make_optimizer(model, lr, weight_decay):
    """AdamW on the groups, each with its share of the learning rate."""
    groups = []
    for group, named in parameter_groups(model).items():
        decay = weight_decay if group == "decayed" else 0.0
        groups.append({"params": [*named.values()], "weight_decay": decay, "share": SHARE[group]})
    fused = next(model.parameters()).device.type != "mps"  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=fused)


def learning_rate(c, step, progress):
    """Linear warm-up, a factor from 1/warmup to 1, times a line from lr at progress 0 to 0 at progress 1."""
    return c.lr * min(1.0, (step + 1) / max(c.warmup, 1)) * (1 - min(progress, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Validation: evaluate is one pass over the data; measure, below, calls it once or twice


def validation_pieces(data, seq_len, batch_size):
    """All of data once, in arrays (2, b, l), [0] the bytes before and [1] the bytes; a newline comes before the first.
    Windows of seq_len, up to batch_size per piece, and a shorter last one."""
    size = seq_len * batch_size
    whole = len(data) // seq_len * seq_len
    before = np.concatenate([np.frombuffer(b"\n", np.uint8), data[:-1]])
    # 17 bytes, windows of 3, 2 in a piece: cut at 6, 12, 15; an empty rest is left out
    pieces = np.split(np.stack([before, data]), [*range(size, whole, size), whole], axis=1)
    return [p.reshape(2, -1, min(seq_len, p.shape[1])) for p in pieces if p.size]


@torch.inference_mode()
def evaluate(model, data, seq_len, batch_size, cast=nullcontext(), carried=False, objective=NEXT):
    """(bits per target, share guessed right) over all of data; for the objective next each token is a target once.

    Each window begins with an empty state, so a byte is predicted from its window alone. Carried: windows come one by
    one and hand the state on, so a byte is predicted from all before it that the state keeps, in constant memory. A
    window counts by its length, however few of its bytes are targets.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = right = first = count = 0
    state = None
    if objective.task:  # windows from a seed that no run uses: the largest --seed is 2**62
        scored = np.stack(objective.task(seq_len, TASK_WINDOWS, 2**63, 0))
        pieces = np.split(scored, range(batch_size, TASK_WINDOWS, batch_size), axis=1)
    else:
        pieces = validation_pieces(data, seq_len, 1 if carried else batch_size)
    for piece in tqdm(pieces, desc="validating", leave=False, disable=None):
        _, b, l = piece.shape
        drawn = objective.draw(*piece.astype(np.int64), 0, first)
        tokens, targets = (torch.from_numpy(t).to(device) for t in drawn)
        with cast:
            logits, after = model(tokens, state, upto=None if carried else 0)
        state = after if carried else None
        hits = (logits.argmax(-1) == targets).sum(1) / (targets != NO_TARGET).sum(1)
        nats += l * surprise(logits, targets).sum().item()
        right += l * hits.sum().item()
        first += b
        count += b * l
    model.train(training)
    return nats / math.log(2) / count, right / count


# ---------------------------------------------------------------------------------------------------------------------
# 6. The loop


def train(run, model):
    """The loop, until the budget is spent or a signal comes. model is run.model, or that one compiled, or for several
    processes."""
    c = run.c
    optimizer = run.optimizer
    while run.progress < 1 and not run.stopped:
        run.validate_if_due()
        began = time.perf_counter()
        torch.manual_seed(c.seed + run.step * run.world + run.rank)  # of dropout: resumed exactly
        for group in optimizer.param_groups:
            group["lr"] = run.lr * group["share"]
        loss = 0.0
        for tokens, targets in run.batches():  # the windows of the step; in parts with --accumulate
            with run.cast:
                part = run.loss_of(model, tokens, targets) / c.accumulate
            part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        nats = loss.item()  # waits for the device
        run.after_step(nats, time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------------
# 7. The run's folder: best.pt, last.pt, log.jsonl


FILES = ("last.pt", "best.pt", "log.jsonl")


@contextmanager
def claim(c):
    """Makes the folder c.out and keeps other processes from training there within the `with` (under torchrun process 0
    does): two runs in one folder would destroy each other. UserError if another has it."""
    folder = Path(c.out)
    text = os.path.isdir(c.data) and c.data not in (*KNOWN, *TASKS)
    nested = text and folder.resolve().is_relative_to(Path(c.data).resolve())
    require(not nested, f"--out {folder} lies in --data {c.data}, and a run is no text to train on")
    with ExitStack() as stack:
        try:
            rank, _ = processes()
            if rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                require(os.access(folder, os.W_OK), "no permission")
            if rank == 0 and fcntl:
                lock = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another process trains in --out {folder}; choose another") from e
        except (OSError, ValueError) as e:
            raise UserError(f"--out {folder} cannot be written: {e}") from e
        yield


def with_saved(c, given, extra):
    """The flags c with those that a checkpoint's run had, but for those given and those that no longer exist."""
    saved = {name: value for name, value in extra.get("flags", {}).items() if name in vars(c)}
    return type(c)(**{**saved, **given, "out": c.out})


def open_run(c, given):
    """(flags, None, {}) of a new run in --out, or (flags, model, extra) of the last.pt there, to be resumed with its
    own flags but for those given."""
    folder = Path(c.out)
    files = [name for name in FILES if (folder / name).exists()]
    can_resume = "last.pt" in files
    require(not files or c.resume and can_resume, f"{folder} holds {', '.join(files)}; choose "
            f"another --out{', or go on with --resume' if can_resume else ''}")
    if not c.resume:
        return c, None, {}
    model, extra = load(folder / "last.pt")
    require(extra.get("script") == c.script,
            f"{folder} is no run of {c.script}; choose another --out")
    if "steps" in given and "minutes" not in given:
        given = {**given, "minutes": 0.0}  # --steps takes the place of the run's --minutes
    print(f"resuming {folder} at step {extra.get('step')}")
    before = vars(with_saved(c, {}, extra))
    fixed = {f.name for f in fields(c) if f.metadata["fixed"]}
    fixed |= {"seq_len", "val_bytes"}  # else figures would not compare with those before
    for name, value in given.items():
        if value != before[name] and name != "resume":
            require(name not in fixed, f"--{name} {value}: the run in {folder} has "
                    f"{before[name]!r}; leave the flag out or choose another --out")
            print(f"with        --{name} {value} (was {before[name]})")
    return with_saved(c, given, extra), model, extra


# ---------------------------------------------------------------------------------------------------------------------
# 8. What stands around the loop: figures, what a run carries and keeps, the screen, signals

VALIDATION_TOKENS = 8192  # in a call, about: S4 makes its kernel once per call
CARRIED_TOKENS = 1024  # in a call: attention in a window would score longer ones l x l
SAVE_SECONDS = 60  # a crash loses about this much training at most
KEPT = {"step": int, "validated": int, "read": int, "seconds": float, "best_bpb": float,
        "logged": int, "data": str}  # of a Run, in its checkpoints
FIGURES = ("train_bpb", "val_bpb", "val_bpb_carried", "val_accuracy", "lr", "bytes_per_second")
BAR = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}  {desc}"


def measure(run):
    """The figures of a validation, bits per byte also where tokens are words. val_bpb_carried is None for an encoder,
    for attention without a window, whose state grows, for S4, which takes a step per byte to find its state, and for
    tasks, which are no stream."""
    c = run.c
    val = run.encoded.val
    bytes_per_token = run.encoded.bytes_per_token
    batch_size = max(1, VALIDATION_TOKENS // c.seq_len)
    bits, accuracy = evaluate(run.model, val, c.seq_len, batch_size, run.cast,
                              objective=run.objective)
    carried = None
    if run.model.constant_memory and not run.objective.task and "s4" not in run.model.config.kinds:
        carried, _ = evaluate(run.model, val, CARRIED_TOKENS, 1, run.cast, carried=True)
        carried /= bytes_per_token
    return {"val_bpb": bits / bytes_per_token, "val_bpb_carried": carried, "val_accuracy": accuracy}


class Run:
    """What a run carries from step to step, and how it is kept: all that the loop is not."""

    def __init__(self, c, where, model, corpus, objective, loss_of=None):
        self.c = c
        self.rank, self.world, self.device = where
        self.folder = Path(c.out)
        self.corpus = corpus._replace(val=corpus.val[:c.val_bytes or None])
        self.encoded = in_words(self.corpus, model.config.merges)  # as the model reads it
        # what a resumed run has to find again
        ends = bytes(corpus.train[:4096]) + bytes(corpus.train[-4096:])
        checksum = f"{len(corpus.train)} bytes, checksum {zlib.crc32(ends):x}"
        self.data = corpus.name if objective.task else checksum
        self.objective = objective
        self.loss_of = loss_of or prediction_loss
        self.unit = "" if loss_of else objective.unit  # of the loss that is trained
        dtype, self.cast = pick_dtype(c.dtype, self.device)
        self.model = model.to(self.device, dtype).train()
        self.optimizer = make_optimizer(model, c.lr, c.weight_decay)
        self.step = self.validated = 0  # validated: the step of the last validation
        self.read = 0  # tokens, so far
        self.logged = 0  # bytes of log.jsonl
        self.seconds = self.saved_at = 0.0  # of training; saved_at: those at the last save
        self.best_bpb = math.inf
        self.caught = 0  # the signal that this process noted
        self.caught_at = 0.0
        self.stopped = 0  # the one that all agreed on, whoever noted it
        self.interruptible = False  # True in a validation by a single process
        self.bar = None  # made by fit

    # A signal is noted (caught). After the step all processes agree whether any has noted one (stopped), the loop ends,
    # and fit saves last.pt. A validation by a single process ends at once, by a KeyboardInterrupt: it can be repeated.

    def on_signal(self, number, frame):
        """The first Ctrl-C or SIGTERM is noted, and ends a validation that can be repeated; a second exits."""
        now = time.monotonic()
        if not self.caught:
            self.caught_at = now
            self.caught = number
            if self.interruptible:
                raise KeyboardInterrupt
        elif now - self.caught_at > 1:  # sooner it may be one wish sent twice
            sys.exit(128 + number)

    def agree(self, nats, seconds):
        """The mean of all processes' nats, process 0's clock, and a signal that any of them has caught: all have to
        stop at the same step."""
        if self.world == 1:
            return nats, seconds, self.caught
        mine = [nats, seconds if self.rank == 0 else 0, self.caught > 0, self.step]
        total = torch.tensor(mine, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)  # a sum
        nats, seconds, stopped, steps = total.tolist()
        require(steps == self.step * self.world, "the processes resumed different checkpoints")
        number = self.caught or signal.SIGTERM  # its own, for the exit status
        return nats / self.world, seconds, number if stopped else 0

    @property
    def progress(self):
        """From 0 to 1, by the clock or by the steps."""
        c = self.c
        return self.seconds / (60 * c.minutes) if c.minutes else self.step / c.steps

    @property
    def lr(self):
        """The learning rate of the next step."""
        return learning_rate(self.c, self.step, self.progress)

    def restore(self, extra):
        """Go on where a checkpoint was saved, with AdamW's moments; rates and decay are those of this run's flags."""
        try:
            kept = {name: kind(extra[name]) for name, kind in KEPT.items()}
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**extra["optimizer"], "param_groups": groups})
            # it has compared no shapes, and a fused step would read beyond an end
            fits = all(state[name].shape == p.shape for p, state in self.optimizer.state.items()
                       for name in ("exp_avg", "exp_avg_sq"))
            require(fits, "its optimizer is that of another model")
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as e:
            raise UserError(f"{self.folder}/last.pt cannot be resumed: {e}") from e
        require(kept["data"] == self.data, f"--data {self.c.data} has {self.data}, but this run "
                f"has read {kept['data']}; give it that data, or choose another --out")
        vars(self).update(kept)
        self.saved_at = self.seconds
        log = self.folder / "log.jsonl"
        if log.exists() and self.rank == 0:  # whole lines, of which a crash may have left more
            os.truncate(log, log.read_bytes()[:self.logged].rfind(b"\n") + 1)

    def save(self, name):
        """Model, optimizer, flags and counts, as last.pt or best.pt. Never weights that are not finite: the file that
        was saved before stays."""
        finite = all(p.isfinite().all() for p in self.model.parameters())
        self.stop_unless(finite, "weights are not finite")
        save(self.folder / name, self.model, script=self.c.script, flags=asdict(self.c),
             optimizer=self.optimizer.state_dict(), **{kept: getattr(self, kept) for kept in KEPT})
        self.saved_at = self.seconds

    def stop_unless(self, fine, found):
        """UserError that ends a run which has blown up, unless all is fine."""
        rate = self.optimizer.param_groups[0]["lr"]  # of the last update
        require(fine, f"the {found} at step {self.step}, learning rate {rate:.2e}: lower --lr, "
                f"with --resume if {self.folder} has a last.pt, else in another --out")

    def record(self, **figures):
        """One line of log.jsonl."""
        line = {"step": self.step, "bytes": round(self.read * self.encoded.bytes_per_token),
                "seconds": round(self.seconds, 3), **dict.fromkeys(FIGURES), **figures}
        with open(self.folder / "log.jsonl", "ab") as log:
            log.write(json.dumps(line).encode() + b"\n")
            self.logged = log.tell()

    def validate(self):
        """Validate and, if all is well, save."""
        if self.world > 1:  # no signal ends it then, and torchrun kills half a minute after one
            self.save("last.pt")
        self.interruptible = self.world == 1  # of several, others would wait
        if self.caught and self.interruptible:  # after the step, for example in a save
            raise KeyboardInterrupt
        figures = measure(self)
        self.interruptible = False
        bpb = figures["val_bpb"]
        self.stop_unless(math.isfinite(bpb), f"validation loss is {bpb}")
        if self.validated < self.step:  # else a finished run was resumed: its line is there
            self.record(**figures)
        self.validated = self.step
        if bpb < self.best_bpb:
            self.best_bpb = bpb
            self.save("best.pt")
        self.save("last.pt")
        return figures

    def validate_if_due(self):
        """Process 0, every --eval_every steps."""
        every = self.c.eval_every
        if every and self.step % every == 0 and self.step > self.validated and not self.rank:
            bpb = self.validate()["val_bpb"]
            self.bar.write(f"step {self.step:<7}validation {bpb:.4f} {self.objective.unit}")

    def batches(self):
        """This process's windows of the step, in --accumulate parts: (tokens, targets), each (b, seq_len)."""
        first = self.read // self.c.seq_len  # windows of this length in what is read
        batch = draw_batch(self.c, self.encoded.train, self.objective, first)
        own = batch.chunk(self.world)[self.rank].to(self.device)
        return [part.unbind(1) for part in own.chunk(self.c.accumulate)]

    def after_step(self, nats, took):
        """Count the step; process 0 logs it, shows it, and saves once a minute."""
        lr = self.lr  # of this step, which is not counted yet
        nats, self.seconds, self.stopped = self.agree(nats, self.seconds + took)
        self.stop_unless(math.isfinite(nats), f"loss is {nats}")
        count = self.c.batch_size * self.c.seq_len
        self.step += 1
        self.read += count
        if self.rank:
            return
        bpb = nats / math.log(2) / self.encoded.bytes_per_token
        speed = count * self.encoded.bytes_per_token / took
        self.record(train_bpb=bpb, lr=lr, bytes_per_second=round(speed, 1))
        show_step(self, nats, bpb, speed, took)
        if self.seconds - self.saved_at > SAVE_SECONDS:
            self.save("last.pt")


def show_step(run, nats, bpb, speed, took):
    """The bar, after the first step the loss before any update, and after 20 how long it will take."""
    if run.step == 1:
        v = run.model.config.vocab
        guess = f" nats; guessing uniformly is ln {v} = {math.log(v):.3f}" if run.unit else ""
        run.bar.write(f"step 0      loss {nats:.3f}{guess}")
    minutes = (run.c.steps - 20) * took / 60
    if run.step == 20 and not run.c.minutes and minutes > 1:
        run.bar.write(f"            about {minutes:.0f} minutes at this speed; "
                      "to train for fewer: --minutes N")
    loss = f"{bpb:.3f} {run.unit}" if run.unit else f"loss {nats:.3f}"
    run.bar.desc = f"step {run.step} | {loss} | {speed:,.0f} bytes/s"
    run.bar.update(min(run.progress, 1.0) - run.bar.n)


def introduce(run):
    """The first lines on the screen: the data, the table of parameters, and where it runs."""
    corpus = run.corpus
    config = run.model.config
    size = f"{len(corpus.train):,} bytes to train on, {len(corpus.val):,} to validate; "
    print(f"data        {corpus.name}: {'' if run.objective.task else size}{corpus.note}")
    total = sum(p.numel() for p in run.model.parameters())
    print(f"model       {len(config.layers)} layers of {', '.join(sorted(config.kinds))}, "
          f"d_model {config.d_model}: {total:,} parameters")
    for group, named in parameter_groups(run.model).items():
        count = sum(p.numel() for p in named.values())
        # the last two parts of a name, without a layer's number
        ends = {".".join(filter(str.isidentifier, name.split(".")[-2:])) for name in named}
        print(f"  {group:12}{count:>12,}  rate x {SHARE[group]}  {' '.join(sorted(ends))}")
    dtype = str(next(run.model.parameters()).dtype).removeprefix("torch.")
    numbers = "bfloat16" if isinstance(run.cast, torch.autocast) else dtype
    print(f"runs on     {run.device}, {numbers}, {torch.get_num_threads()} threads, "
          f"processes: {run.world}; its folder is {run.folder}", flush=True)


def report(run, figures):
    """The figures of a validation, beside those of compressors for the same bytes."""
    unit = run.objective.unit
    print(f"validation  {figures['val_bpb']:.4f} {unit}, windows of {run.c.seq_len}; "
          f"{figures['val_accuracy']:.1%} guessed right")
    if figures["val_bpb_carried"] is not None:
        print(f"            {figures['val_bpb_carried']:.4f} with the state carried through")
    val = run.corpus.val
    comparable = unit.startswith("bits per byte") and val.dtype == np.uint8
    if comparable and len(val) <= 20_000_000:  # xz is slow
        bits = [f"{name} {bpb:.3f}" for name, bpb in compressed_bpb(val).items()]
        print(f"            {', '.join(bits)}, same bytes")


def finish(run):
    """The last validation, its figures, and the next thing to do."""
    report(run, run.validate())
    use = "--draft" if run.model.config.merges else "--ckpt"
    fill = ' --fill "what is ____ in the middle"' if run.model.config.block else ""
    then = f"sample.py {use} {run.folder}{fill}"
    if run.objective.task:
        then = f"train.py --eval_only --out {run.folder} --seq_len {2 * run.c.seq_len}"
    print(f"saved       {run.folder}: best.pt and last.pt; try: python {then}")


@contextmanager
def handled(on_signal):
    """SIGINT, SIGTERM and SIGHUP call on_signal inside. Only the main thread may handle any."""
    with ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            main = threading.current_thread() is threading.main_thread()
            # nohup ignores it; None is a handler that is not Python's
            if main and number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                stack.callback(signal.signal, number, signal.signal(number, on_signal))
        yield


def fit(c, where, model, extra, corpus, objective=NEXT, loss_of=None):
    """Train model in the folder c.out until the budget is spent, and validate: the exit status.

    where comes from join_processes, extra from a resumed checkpoint, or it is empty. loss_of(model, tokens, targets) is
    trained instead of the prediction loss, which validation measures all the same.
    """
    world = where[1]
    require(c.batch_size % (world * c.accumulate) == 0, f"--batch_size {c.batch_size} is not "
            f"divisible by {world} processes * --accumulate {c.accumulate}")
    run = Run(c, where, model, corpus, objective, loss_of)
    draw_batch(c, run.encoded.train, objective, 0)  # an error now if a window does not fit
    if extra:
        run.restore(extra)
    if run.rank == 0:
        introduce(run)
    model = torch.compile(model) if c.compile else model
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    seconds = 0.1 if sys.stderr.isatty() else 1.0  # between two lines of a file or a notebook
    run.bar = tqdm(total=1.0, initial=min(run.progress, 1.0), disable=run.rank > 0,
                   mininterval=seconds, dynamic_ncols=True, bar_format=BAR)
    with handled(run.on_signal):
        try:
            with run.bar:
                train(run, model)
            if world > 1:  # the rest is process 0's; the others need not wait
                dist.barrier()
                del model  # its threads use the group
                dist.destroy_process_group()
                run.world = 1  # alone from here, so validate may be interrupted
            if run.rank == 0 and not run.stopped:
                finish(run)
        # between two steps, so that a save is whole: a validation ended, or the screen is gone
        except (KeyboardInterrupt, OSError) as e:
            gone = isinstance(e, (KeyboardInterrupt, BrokenPipeError)) or e.errno == errno.EIO
            if not (gone or run.caught):
                raise
            run.stopped = run.caught or signal.SIGINT
        if run.rank == 0 and run.stopped:
            run.save("last.pt")
            with suppress(OSError):
                print(f"stopped at step {run.step}, saved {run.folder}/last.pt; "
                      f"go on: python {c.script} --out {run.folder} --resume", flush=True)
            forget_broken_output()
    return 128 + run.stopped if run.stopped else 0


# ---------------------------------------------------------------------------------------------------------------------
# 9. The script

# the mixers' own state sizes, for --d_state 0
D_STATE = {"mamba": 16, "mamba2": 32, "mamba3": 32, "s4": 64, "s4d": 64}


@dataclass
class Flags(RunFlags):
    objective: str = flag("next", "next byte; an encoder learns mask, 15 % of the bytes "
                          "from both sides, or diffusion", one_of=OBJECTIVES, fixed=True)
    layer: str = flag("", f"the mixer of every layer: {', '.join(MIXERS)} (default mamba2); "
                      f"of an encoder {', '.join(ENCODER_MIXERS)} (default s4d); "
                      "a,b,c takes turns: a hybrid", fixed=True)
    block: str = flag("", f"of an encoder: {', '.join(BLOCKS)}", one_of=("", *BLOCKS), fixed=True)
    bpe: int = flag(0, "byte-pair merges: tokens are words, for sample.py --draft", fixed=True)
    eval_only: bool = flag(False, "validate the checkpoint in --out and stop")
    init: str = flag("", "begin with a checkpoint's weights, in whose sizes", fixed=True)
    d_model: int = flag(192, "width", low=1, fixed=True)
    n_layer: int = flag(3, "layers", low=1, high=1000, fixed=True)
    d_state: int = flag(0, f"state size n; 0 is the mixer's own: {D_STATE}, of a hybrid the "
                        "smallest of theirs", fixed=True)
    head_dim: int = flag(32, "mamba2, mamba3: channels per head", low=1, fixed=True)
    n_head: int = flag(4, "attention: heads", low=1, fixed=True)
    dropout: float = flag(0.0, "on layers' outputs, or an encoder's input", high=0.99, fixed=True)

    def __post_init__(self):
        """The defaults that depend on other flags, and the rules between flags."""
        super().__post_init__()
        encoder = self.objective != "next"
        require(encoder or not self.block, f"--block {self.block} is for an encoder; "
                "add --objective mask or --objective diffusion")
        require(not encoder or not self.bpe, f"--bpe {self.bpe} is for --objective next")
        require(not encoder or self.data not in TASKS,
                f"--data {self.data} has its own targets; leave out --objective")
        self.layer = self.layer or ("s4d" if encoder else "mamba2")
        for kind in self.layer.split(","):
            require_one_of("--layer", kind, ENCODER_MIXERS if encoder else MIXERS)
        self.block = self.block or ("gated" if encoder else "")
        name = self.objective if encoder else self.layer.replace(",", "+")
        self.out = self.out or f"out/{name}"


def load_data(c):
    """(corpus, objective): a text, or a task of data/synthetic.py, which needs none."""
    if c.data in TASKS:
        require(c.seq_len >= 3, f"--data {c.data} needs windows of at least 3 bytes, not "
                f"--seq_len {c.seq_len}")
        none = np.empty(0, np.uint8)
        note = f"new windows in each step, {TASK_WINDOWS} to validate"
        objective = NEXT._replace(unit="bits per target", task=TASKS[c.data])
        return Corpus(c.data, none, none, note), objective
    return load_corpus(c.data), OBJECTIVES[c.objective]


def make_config(c, merges=()):
    """The model's shape by the flags: the kinds of --layer in turn, SwiGLU beside attention only, attention's window
    that of training, the head untied as in MambaByte.

    A hybrid has one n for all its layers, the smallest of their own: none then costs more than it does alone. An
    encoder has BiGS's proportions, m = 3 d_model and 64 modes, and the mask as a symbol beside the bytes.
    """
    kinds = c.layer.split(",")
    require(len(kinds) <= c.n_layer, f"--layer {c.layer} names {len(kinds)} layers, more than "
            f"--n_layer {c.n_layer}")
    layers = [kinds[i % len(kinds)] for i in range(c.n_layer)]
    shape = {"d_model": c.d_model, "n_head": c.n_head, "n_kv_head": c.n_head, "dropout": c.dropout}
    if c.objective != "next":
        return Config(layers=layers, block=c.block, vocab=MASK + 1, expand=3,
                      norm="layer", norm_eps=1e-12, d_state=c.d_state or 64, **shape)
    own = min((D_STATE[kind] for kind in kinds if kind in D_STATE), default=16)
    return Config(layers=["attention+mlp" if kind == "attention" else kind for kind in layers],
                  window=c.seq_len if "attention" in layers else 0, vocab=256 + len(merges),
                  merges=merges, tie=False, head_dim=c.head_dim, d_state=c.d_state or own, **shape)


def check_model(path, config, c, given):
    """UserError unless a checkpoint's model is of the kind that --objective trains, with sizes that no flag changes."""
    for f in fields(c):
        free = not f.metadata["fixed"] or f.name in ("objective", "init")
        require(free or f.name not in given, f"--{f.name} is fixed by {path}; leave it out")
    require(config.vocab == 256 + bool(config.block) or config.merges,
            f"{path} reads {config.vocab:,} kinds of tokens; only models of bytes are trained here")
    kind = "an encoder" if config.block else "causal"
    require(bool(config.block) == (c.objective != "next"),
            f"{path} is {kind}; --objective {c.objective} is not for it")


def eval_only(c, given):
    """Validate --out, a run or a published checkpoint, by its own flags but for those given."""
    require(not c.init and not c.compile, "--init and --compile: not with --eval_only; leave out")
    model, extra = load(c.out)
    c = with_saved(c, given, extra)  # distill.py has others
    check_model(c.out, model.config, c, given)
    corpus, objective = load_data(c)
    run = Run(c, (0, 1, pick_device(c.device)), model, corpus, objective)
    introduce(run)
    figures = measure(run)
    bpb = figures["val_bpb"]
    require(math.isfinite(bpb), f"{c.out}: its validation loss is {bpb}")
    report(run, figures)
    return 0


@script
def main(argv):
    c, given = parse(Flags, argv, "Train a byte language model; by default Mamba-2 on Python code.")
    if c.eval_only:
        return eval_only(c, given)
    with claim(c):
        c, model, extra = open_run(c, given)
        where = join_processes(pick_device(c.device))
        corpus, objective = load_data(c)
        torch.manual_seed(c.seed)
        if c.init and not extra:
            model, _ = load(c.init)
            check_model(c.init, model.config, c, given)
        elif not extra:
            model = make_model(make_config(c, learn_merges(corpus.train, c.bpe) if c.bpe else ()))
        return fit(c, where, model, extra, corpus, objective)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
