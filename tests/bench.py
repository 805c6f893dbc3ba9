"""How fast is it, beside other people's code: python -m tests.bench NAME [--quick] [--rounds N] [--json FILE]

    scan        the selective scan, forward and backward, by length, and its error against float64
    ssd         the Mamba-2 scan; training by length of the windows
    train       training, bytes/s, against mambapy and transformers
    decode      writing, bytes/s, against the same, and ms per byte as the context grows
    s4          kernels, training, the error of convolutions against steps, what a HiPPO state remembers
    published   loading and writing with a model of MambaByte-353M's shape, beside the memory's speed
    calls       a call of the model by how many bytes it reads, eager and compiled: what speculation has to pay
    speculate   speculative against plain writing, by drafter and guesses; trains its models first
    gpu         the kernels beside the GPU's limits, and decoding, eager and compiled

Is my change slower? Run `python -m tests.bench train --json before.json`, change, run it again with another file, and
compare the `seconds` of a row with those of a row that the change does not touch: a machine's speed moves from run to
run. To measure something new, write make(path, ..., device) that returns the function to time, as
make_scan does below, and give it to compare, as bench_scan does.

Every path lives in a process of its own, a worker, so its peak memory is its own. The workers of a group start together
and are called in turn, round after round, so a busy machine hits all alike. Times are medians. Fresh memory costs a CPU
more than the arithmetic does, so a path may get "huge pages" (2 MB each) or memory that is "kept"
(freed memory is reused, as train.py does). A path that cannot run, perhaps because its package is
missing, says why in its row.

Sections 1 and 2 are the harness, also of studies.py and contexts.py, which train models and score
them: whatever measures is a generator of rows, dicts, and `run` prints each and writes all to a
file, which figures.py draws.
"""
import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data.corpus import load_corpus
from data.files import require
from model import LM, MIXERS, Config, load, save
from sample import (ByteDrafter, CountDrafter, SubwordDrafter, compiled_step, filter_logits,
                    generate, prefill, speculate)
from scan import discretize, hippo_legs, s4d_kernel, selective_scan, ssd, tl, triton
from tests.dense import discretize_dense, legs_basis, s4d_init
from train import flag, keep_memory, parse, pick_device, script

# ---------------------------------------------------------------------------------------------------------------------
# 1. The harness: times

LIMIT = 400   # seconds after which a worker is given up; it may compile, or have been killed
ENOUGH = 2.0  # seconds of calls after which a path sits out the remaining rounds
ONCE = 5.0    # a call that takes longer is the only one


def begin(make, memory, device):
    """In the worker: makes the function to time."""
    global function, base
    warnings.simplefilter("ignore")
    one = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2 * one, one)  # the first gradient imports 40 MB of modules
    if memory == "kept":
        keep_memory()
    function = make(device=device)
    base = held("VmRSS", device)
    return [], 0


def calls(device, warm):
    """In the worker: ([seconds of a call, ...], peak), as many calls as fit into a fifth of a second, at least one.

    To warm up, two calls, since the first sets up threads; only one if it takes a second. They do not count, except
    one so long that it is the only one. The peak begins anew with each.
    """
    times = []
    limit = 1 if warm else 0.2
    while sum(times) < limit and not (warm and len(times) == 2):
        if warm:
            reset_peak(device)
        times.append(timed(function, device))
    if warm:
        times = [t for t in times if t > ONCE]
    return times, max(0, held("VmHWM", device) - base)


def timed(f, device=torch.device("cpu")):
    """Seconds of a call."""
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def held(name, device):
    """Bytes that this process holds (VmRSS) or held at most (VmHWM); 0 on a CPU without Linux's /proc."""
    if device.type == "cuda":
        cuda = torch.cuda
        return (cuda.max_memory_allocated if name == "VmHWM" else cuda.memory_allocated)(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return 1024 * int(line.split()[1])
    return 0


def reset_peak(device):
    """Begin the peak anew, after giving freed memory back, since an earlier call's would count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # only glibc trims, only Linux resets
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """The parent's end of a worker; after an error it only remembers what went wrong."""

    def __init__(self, path, memory, make, device):
        self.row = {"path": path, "memory": memory}
        self.device = device
        self.times = []
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(memory == "huge pages"))  # torch reads it
        context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
        # Ctrl-C is the parent's to handle
        self.pool = context.Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        self.answer = self.pool.apply_async(begin, (make, memory, device))

    def turn(self, warm):
        """Have calls made, unless there are enough."""
        if sum(self.times) < (ENOUGH if len(self.times) > 1 else ONCE) and "error" not in self.row:
            self.answer = self.pool.apply_async(calls, (self.device, warm))
            self.wait()

    def wait(self):
        """Keep the times of calls, or the error, which is a path's result too."""
        try:
            times, self.peak = self.answer.get(LIMIT)
            self.times += times
        except Exception as e:
            error = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
            if isinstance(e, multiprocessing.TimeoutError):
                error = f"not done after {LIMIT} s, or out of memory"
            self.row |= {"mode": "failed", "error": error}


def measure(cells, device, rounds, work):
    """The rows of cells (path, memory, make) that run side by side."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports missing kernels
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # workers compile side by side
    workers = []
    try:
        for cell in cells:
            workers.append(Worker(*cell, device))
        for w in workers:
            w.wait()
        for i in range(rounds + 1):
            for w in workers:
                w.turn(warm=i == 0)
    finally:
        for w in workers:
            w.pool.terminate()
    for w in workers:
        if "error" not in w.row:
            seconds = statistics.median(w.times)
            w.row |= {"seconds": seconds, "seconds_min": min(w.times), "calls": len(w.times),
                      "peak_mb": w.peak / 1e6}
            if work:
                w.row |= {"bytes_per_second": work / seconds, "ms_per_byte": 1e3 * seconds / work}
    return [w.row for w in workers]


def compare(c, table, mode, make, paths, sizes, work=0, **more):
    """Rows of a group: for each of the paths, or of {memory: paths}, make(path, **sizes, **more,
    device=...) runs in a worker and returns the function to time, whose call handles `work` bytes
    of text, if any. The dict sizes names the group in each of its rows.

    A ratio is the time over that of the first path that ran in the same kind of memory. On a GPU,
    whose memory all would share, one path runs after the other. Kinds of memory beside the default
    are Linux's, and a CPU's.
    """
    device = pick_device(c.device)
    kinds = paths if isinstance(paths, dict) else {"default": paths}
    if device.type != "cpu" or sys.platform != "linux":
        kinds = {"default": next(iter(kinds.values()))}
    cells = [(path, memory, functools.partial(make, path, **sizes, **more))
             for memory, names in kinds.items() for path in names]
    first = {}
    print(f"\n{table}, {mode}, {words(sizes)}")
    print(f"{'':42}{'ms':>10}{'min':>10}{'ratio':>7}{'peak MB':>9}{'bytes/s':>9}")
    for group in [cells] if device.type == "cpu" else [[cell] for cell in cells]:
        for row in measure(group, device, c.rounds, work):
            if "seconds" in row:
                row["ratio"] = row["seconds"] / first.setdefault(row["memory"], row["seconds"])
            yield {"table": table, "mode": mode, **sizes, **row}


# ---------------------------------------------------------------------------------------------------------------------
# 2. The harness: runs, rows and files

ASSETS = Path(__file__).parent.parent / "assets"
DRAWN = {"legs"}  # tables of hundreds of rows, which are not printed
QUICK = "--steps 2 --minutes 0 --batch_size 2"  # added to a run's flags by --quick


@dataclass
class Flags:
    json: str = flag("", "where the result goes (default: assets/bench_NAME.json)")
    device: str = flag("cpu", "cpu, or cuda")
    rounds: int = flag(5, "rounds of calls; a path whose calls are slow sits out some", low=1)
    quick: bool = flag(False, "a smoke test: tiny sizes, one round, no file unless --json names it")


def folder_of(c, name):
    """Where the runs of a measurement lie."""
    return Path("out") / (name + "_quick" if c.quick else name)


def trained(folder, flags, program=train.main, resume=True):
    """(model, extra) of the run in folder, made at the first call by train.py or another program.
    One that was stopped is resumed, or begins again if it had not saved yet. Only a run's end
    validates, and so writes best.pt."""
    if not (folder / "best.pt").exists():
        print(f"\n{folder}", flush=True)
        resume = resume and (folder / "last.pt").exists()
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        status = program([*flags.split(), "--out", str(folder), *["--resume"] * resume])
        if status:
            raise SystemExit(status)  # the program has said why
    return load(folder)


def words(row):
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in row.items())


def show(row):
    """Print a row: a time in compare's columns, and what was added to it by name, as any other."""
    text = words(row)
    if "mode" in row:
        memory = "" if row["memory"] == "default" else ", " + row["memory"]
        text = f"{row['path'] + memory:40}{row.get('error', '')}"
    if "ratio" in row:
        text += (f"{1e3 * row['seconds']:10.2f}{1e3 * row['seconds_min']:10.2f}"
                 f"{row['ratio']:7.2f}{row['peak_mb']:9.0f}")
        if "bytes_per_second" in row:
            text += f"{row['bytes_per_second']:9,.0f}"
        added = list(row)[list(row).index("ratio") + 1:]
        text += "  " + words({name: row[name] for name in added})
    if row["table"] not in DRAWN:
        print("  " + text.rstrip(), flush=True)


def hardware():
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
             "python": platform.python_version(), "torch": torch.__version__}
    for peer in ("mambapy", "transformers", "mamba-ssm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    return found


def run(module, prefix, measurements):
    """The command line of {name: f(flags) that yields rows}: print them, write PREFIX_NAME.json."""
    @script
    def main(_):
        argv = sys.argv[1:]
        usage = f"python -m {module} {'|'.join(measurements)}"
        name = argv[0] if argv and not argv[0].startswith("-") else ""
        c, _ = parse(Flags, argv[1:] if name else argv, usage)
        require(name in measurements,
                f"{name or 'no name'} is not among what can be measured: {usage}")
        c.rounds = 1 if c.quick else c.rounds
        now = datetime.datetime.now(datetime.timezone.utc)
        result = {"benchmark": name, "command": " ".join([f"python -m {module}", *argv]),
                  "hardware": hardware(), "date": now.isoformat(timespec="seconds"), "rows": []}
        print(", ".join(f"{key} {value}" for key, value in result["hardware"].items() if value))
        for row in measurements[name](c):
            show(row)
            result["rows"].append(row)
        if c.json or not c.quick:
            path = Path(c.json or ASSETS / f"{prefix}_{name}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"wrote {path}")
        return 0

    sys.exit(main())


# ---------------------------------------------------------------------------------------------------------------------
# 3. Other people's code, imported in the worker

N = {"mamba": 16, "mamba2": 64, "s4": 64, "s4d": 64, "attention": 16}  # attention has no state
CHUNK = 64  # transformers' Mamba-2: the fastest of 16 .. 256 on a CPU, 256 is its default


def operation(path, ours):
    """f(x, dt, A, B, C, D) -> y: a peer's, or ours with impl=path."""
    if path == "mambapy pscan":
        from mambapy.mamba import MambaBlock
        return functools.partial(MambaBlock.selective_scan, None)  # it never looks at its self
    if path == "transformers loop":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
        return lambda x, dt, A, B, C, D: mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, D).mT
    if path == "mamba-ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        return selective_scan_fn
    if path == "transformers":
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
        return lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, CHUNK, D)
    return lambda *inputs: ours(*inputs, impl=path)[0]


def our_config(layer, d_model, n_layer):
    """Layers with equally many parameters, to 2 % for mamba, mamba2 and attention, which has SwiGLU
    for it."""
    name = "attention+mlp" if layer == "attention" else layer
    return Config((name,) * n_layer, d_model=d_model, d_state=N[layer],
                  head_dim=min(64, d_model), d_mlp=d_model * 7 // 8)


def language_model(path, d_model, n_layer):
    """(model, f(tokens) -> logits, step(token, state) -> (logits, state)) of a peer, or of our
    layer called path."""
    package, _, layer = path.partition(" ")
    if package == "mambapy":
        return mambapy_model(d_model, n_layer)
    if package == "transformers":
        return transformers_model(layer, d_model, n_layer)
    model = LM(our_config(path, d_model, n_layer))
    return model, lambda tokens: model(tokens, upto=0)[0], model  # training asks for no state


def mambapy_model(d_model, n_layer):
    """Its own language model cannot be imported without the CUDA package."""
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm
    config = MambaConfig(d_model=d_model, n_layers=n_layer)
    embedding = nn.Embedding(256, d_model)
    body = Mamba(config)
    norm = RMSNorm(d_model)
    head = nn.Linear(d_model, 256, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, body, norm, head)

    def step(token, caches=None, last=True):
        zeros = functools.partial(torch.zeros, 1, config.d_inner, device=token.device)
        if caches is None:
            caches = [(zeros(config.d_state), zeros(config.d_conv - 1)) for _ in body.layers]
        x, caches = body.step(embedding(token[:, 0]), list(caches))
        return head(norm(x))[:, None], caches

    return model, model, step


def transformers_model(layer, d_model, n_layer):
    """Its Mamba takes mambapy's scan, since its own loop, also compiled, is slower."""
    import transformers
    sizes = {"hidden_size": d_model, "num_hidden_layers": n_layer, "vocab_size": 256,
             "state_size": N[layer]}
    if layer == "mamba":
        config = transformers.MambaConfig(**sizes, use_mambapy=True)
        model = transformers.MambaForCausalLM(config)
    else:
        p = min(64, d_model)
        config = transformers.Mamba2Config(**sizes, head_dim=p, num_heads=2 * d_model // p,
                                           n_groups=1, chunk_size=CHUNK, tie_word_embeddings=True)
        model = transformers.Mamba2ForCausalLM(config)

    def step(token, cache=None, last=True):
        out = model(token, cache_params=cache, use_cache=True)
        return out.logits, out.cache_params

    return model, lambda tokens: model(tokens, use_cache=False).logits, step


# ---------------------------------------------------------------------------------------------------------------------
# 4. The operations: the scans and S4's kernel

SCANS = ("chunked", "parallel", "naive", "mambapy pscan", "transformers loop")


def with_gradients(f, inputs, dy):
    """f(*inputs) and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = f(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def scan_inputs(b, l, d, n, device, dt_max=0.1):
    """x, dt, A, B, C, D and a gradient for y; A is -1 .. -n in every channel, as Mamba begins."""
    g = torch.Generator().manual_seed(0)
    shapes = (b, l, d), (b, l, n), (b, l, n), (d,), (b, l, d)
    x, B, C, D, dy = (torch.randn(shape, generator=g) for shape in shapes)
    dt = torch.rand(b, l, d, generator=g) * dt_max
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    return [t.to(device) for t in (x, dt, A, B, C, D, dy)]


def make_scan(path, device, dtype="float32", **sizes):
    tensors = scan_inputs(**sizes, device=device)
    *inputs, dy = (t.to(getattr(torch, dtype)) if t.ndim == 3 else t for t in tensors)
    if path == "mamba-ssm":  # length last
        *inputs, dy = (t.mT.contiguous() if t.ndim == 3 else t for t in (*inputs, dy))
    return functools.partial(with_gradients, operation(path, selective_scan), inputs, dy)


def bench_scan(c):
    """Float32, by length; the loops get the lengths that they finish soon."""
    sizes = {"b": 2, "d": 8, "n": 4} if c.quick else {"b": 4, "d": 512, "n": 16}
    longest = {"naive": 1024, "transformers loop": 256}
    for l in (32,) if c.quick else (256, 1024, 4096):
        paths = [path for path in SCANS if l <= longest.get(path, l)]
        few = ["chunked", "mambapy pscan"]  # to save time
        kinds = {"default": paths, "huge pages": few, "kept": paths}
        yield from compare(c, "selective scan", "forward+backward", make_scan, kinds,
                           {**sizes, "l": l})
    yield from scan_errors(c)


def scan_errors(c):
    """Largest deviation from the float64 recurrence over its largest value, where errors have time to grow."""
    sizes = {"b": 1, "l": 33, "d": 4, "n": 3} if c.quick else {"b": 2, "l": 4001, "d": 64, "n": 16}
    for dt_max in (0.1, 5.0):
        *inputs, dy = scan_inputs(**sizes, device=pick_device(c.device), dt_max=dt_max)
        naive = operation("naive", selective_scan)
        exact = with_gradients(naive, [t.double() for t in inputs], dy.double())
        for path in SCANS[:4]:
            row = {"table": "error", "path": path, "dt_max": dt_max, **sizes}
            try:
                got = with_gradients(operation(path, selective_scan), inputs, dy)
                errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, exact)]
                row["errors"] = {name: float(f"{error.item():.2e}")
                                 for name, error in zip(("y", *"x dt A B C D".split()), errors)}
            except ImportError as e:
                row["error"] = str(e)
            yield row


def make_ssd(path, b, l, nh, p, n, device):
    """The operation with one group, dt up to 0.1 and A = -1 .. -nh, as transformers begins."""
    shapes = (b, l, nh, p), (b, l, 1, n), (b, l, 1, n), (b, l, nh, p)
    x, B, C, dy = (torch.randn(shape, device=device) for shape in shapes)
    dt = torch.rand(b, l, nh, device=device) * 0.1
    A = -torch.arange(1.0, nh + 1, device=device)
    inputs = [x, dt, A, B, C, torch.ones(nh, device=device)]
    return functools.partial(with_gradients, operation(path, ssd), inputs, dy)


def bench_ssd(c):
    """8 heads of 64, n = 64, 8 x 512 bytes; training on as many, however they are cut into windows."""
    sizes = {"b": 8, "l": 512, "nh": 8, "p": 64, "n": 64}
    if c.quick:
        sizes = {"b": 2, "l": 64, "nh": 2, "p": 8, "n": 4}
    paths = "chunked", "transformers", "quadratic", "naive"
    yield from compare(c, "ssd", "forward+backward", make_ssd, paths, sizes,
                       work=sizes["b"] * sizes["l"])
    paths = "mamba2", "mamba", "attention", "transformers mamba2"
    for b, l in ((8, 512),) if c.quick else ((8, 512), (2, 2048), (1, 8192)):
        yield from compare_training(c, *paths, b=b, l=l)


def make_kernel(path, l, d, n, device):
    """S4D's kernel: a product of two small matrices, or all n l d exponentials."""
    dt = torch.rand(d, device=device) / 10
    A = s4d_init("lin", 2 * n)[0].to(device, torch.complex64).repeat(d, 1)
    C = torch.randn(d, n, dtype=torch.complex64, device=device)
    dK = torch.randn(d, l, device=device)

    def written_out(dt, A, C):
        Abar, Bbar = discretize(dt[:, None], A, 1.0, "zoh")
        powers = Abar[..., None] ** torch.arange(l, device=device)  # (d, n, l)
        return ((C * Bbar)[..., None] * powers).sum(1).real

    small_matrices = lambda dt, A, C: s4d_kernel(dt, A, 1.0, C, l)
    f = written_out if path == "written out" else small_matrices
    return functools.partial(with_gradients, f, [dt, A, C], dK)


@torch.no_grad()
def step_errors(l):
    """Largest difference of the convolution from the recurrence, both float32, in a layer as it begins; n = 64."""
    for layer in ("s4d", "s4"):
        torch.manual_seed(0)
        mixer = MIXERS[layer](Config((layer,), d_model=64, d_state=64))
        x = torch.randn(1, l, 64)
        y, _ = mixer.system(x, None, 0)
        steps = []
        h = None
        for x_t in x.split(1, dim=1):
            y_t, h = mixer.system(x_t, h, None)
            steps.append(y_t)
        error = (y - torch.cat(steps, dim=1)).abs().max().item()
        largest = y.abs().max().item()
        yield {"table": "error", "path": layer, "l": l, "error": error, "largest": largest}


def reconstructions():
    """What HiPPO-LegS with n numbers remembers of a signal, by age."""
    dt = 2e-3
    now = dt * torch.arange(3000, dtype=torch.float64)
    x = torch.sin(2 * now) + torch.exp(-8 * (now - 4.5) ** 2) - (now > 5.3).double()
    shown = torch.arange(0, 2000, 10)
    age = dt * (shown.double() + 0.5)
    curves = {"the signal": x.flip(0)[shown]}
    for n in (8, 32, 128):
        Abar, Bbar = discretize_dense(dt, *hippo_legs(n), "bilinear")
        h = torch.zeros(n, dtype=torch.float64)
        for x_t in x:
            h = Abar @ h + Bbar * x_t
        curves[f"from {n} numbers"] = legs_basis(age, n) @ h
    for path, values in curves.items():
        for a, value in zip(age.tolist(), values.tolist()):
            yield {"table": "legs", "path": path, "memory": "default", "age": a, "value": value}


def bench_s4(c):
    """S4D's kernel with d = 256 and 32 modes; training with layers of width 256; errors and memories."""
    sizes = {"l": 32, "d": 8, "n": 4} if c.quick else {"l": 4096, "d": 256, "n": 32}
    paths = "two small matrices", "written out"
    yield from compare(c, "s4d kernel", "forward+backward", make_kernel, paths, sizes)
    yield from compare_training(c, "mamba", "mamba2", "s4d", "s4")
    yield from step_errors(7 if c.quick else 4096)
    yield from reconstructions()


# ---------------------------------------------------------------------------------------------------------------------
# 5. Whole models: training and writing

WRITTEN = 8  # bytes per call of published: the first one after another process has run is slow


def training_step(model, optimizer, loss):
    """A function that makes a step: loss() and its gradients, clipping, the optimizer."""
    def step():
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_train(path, b, l, d_model, n_layer, device):
    """A training step with AdamW, the same for all."""
    model, f, _ = language_model(path, d_model, n_layer)
    model.to(device).train()
    tokens = torch.randint(256, (b, l + 1), device=device)

    def loss():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = f(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return training_step(model, optimizer, loss)


def compare_training(c, *paths, b=8, l=512):
    """A step of each path, memory kept as in train.py: 4 layers of width 256, b windows of l."""
    sizes = {"b": b, "l": l, "d_model": 256, "n_layer": 4}
    if c.quick:
        sizes = {"b": 2, "l": 32, "d_model": 32, "n_layer": 1}
    return compare(c, "training", "training step", make_train, {"kept": paths}, sizes,
                   work=sizes["b"] * sizes["l"])


def bench_train(c):
    return compare_training(c, "mamba2", "mamba", "mambapy mamba", "transformers mamba")


def write_after(model, tokens, count):
    """A function that draws count bytes after tokens, which are read in the first call, while the
    others rest."""
    read = functools.cache(lambda: prefill(model, tokens))

    def first(*_, last):
        logits, state = read()
        return logits[:, None], state

    one_more = count + 1  # of which the first takes no step
    return lambda: list(generate(first, tokens[:, :1], one_more, filter_logits, step=model))


def make_writing(path, count, d_model, n_layer, device, context=0):
    """count bytes after a newline by sample.generate, around the model's own step; or after a
    context, whose state every call begins from, attention's window being unlimited."""
    name, _, compiled = path.partition(", ")
    model, _, step = language_model(name, d_model, n_layer)
    model.to(device).eval()
    if context:
        return write_after(model, torch.randint(256, (1, context), device=device), count)
    token = torch.tensor([[10]], device=device)
    fast = torch.compile(step) if compiled else step
    f = lambda: list(generate(step, token, count, filter_logits, step=fast))
    if compiled:
        f()
    return f


def bench_decode(c):
    """Batch 1, 4 layers of width 256."""
    sizes = {"count": 64, "d_model": 256, "n_layer": 4}
    if c.quick:
        sizes = {"count": 4, "d_model": 32, "n_layer": 1}
    paths = ["mamba", "mamba2", "mambapy mamba", "transformers mamba"]
    paths += [f"{path}, compiled" for path in paths]
    yield from compare(c, "decoding", "writing", make_writing, paths, sizes, sizes["count"])
    for context in (16,) if c.quick else (256, 2048, 8192):
        yield from compare(c, "decoding after a context", "writing", make_writing,
                           ("mamba2", "attention"), {"context": context, **sizes}, sizes["count"])


def published_config(quick):
    """MambaByte-353M's, the size that was released."""
    n_layer, d_model = (2, 32) if quick else (53, 1024)
    return Config(("mamba",) * n_layer, d_model=d_model, norm="layer", tie=False)


def make_published(path, folder, device, **_):
    """Reading the file; reading every weight as often as bytes are written, which no writing can beat; writing."""
    if path == "load":
        return lambda: load(folder, device)
    model, _ = load(folder, device)
    if path == "mamba":
        return write_after(model, torch.tensor([[10]], device=device), WRITTEN)
    weights = [p for name, p in model.named_parameters() if name != "embedding.weight"]
    return torch.inference_mode()(lambda: [p.sum() for _ in range(WRITTEN) for p in weights])


def bench_published(c):
    """Random weights, float32, written once to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        model = LM(published_config(c.quick))
        sizes = {"weights_mb": round(sum(p.nbytes for p in model.parameters()) / 1e6)}
        save(folder, model, "state-spaces")
        del model
        yield from compare(c, "published", "loading", make_published, ("load",), sizes,
                           folder=folder)
        yield from compare(c, "published", "writing", make_published,
                           ("every weight read for each", "mamba"), sizes, WRITTEN, folder=folder)


# ---------------------------------------------------------------------------------------------------------------------
# 6. speculate: in one process, plain and speculative writing in turn

SPECULATION = {"target": "--d_model 160 --n_layer 12 --steps 2200",
               "bytes": "--n_layer 1 --steps 2200",
               "words": "--n_layer 1 --bpe 1024 --seq_len 256 --steps 2200"}  # train.py's flags
GUESSES = {"counts": (2, 4, 8, 12, 16), "bytes": (1, 2, 4, 6, 8), "words": (1, 2, 3, 4, 6)}


def write_both(model, drafter, prompts, count, k, temperature):
    """The figures of speculative writing after every prompt, beside plain writing of as many bytes."""
    distribution = functools.partial(filter_logits, temperature=temperature)
    rounds = []
    fast = plain = 0.0
    for seed, prompt in enumerate(prompts):
        g = torch.Generator().manual_seed(seed)
        args = model, prompt, count, distribution
        fast += timed(lambda: list(speculate(*args, drafter, k, g, rounds)))
        plain += timed(lambda: list(generate(*args, g)))
    written = count * len(prompts)
    accepted = sum(accepted for _, accepted in rounds)
    return {"bytes_per_call": written / len(rounds),
            "acceptance": accepted / max(sum(guessed for guessed, _ in rounds), 1),
            "ms_per_byte": 1e3 * fast / written, "plain_ms_per_byte": 1e3 * plain / written,
            "speedup": plain / fast}


@torch.inference_mode()
def bench_calls(c):
    """ms of a call of speculate's target, random weights, by how many bytes it reads: eager, and compiled for each."""
    shape = {"d_model": 160, "head_dim": 32, "d_state": 32, "tie": False}
    model = LM(Config(("mamba2",) * (1 if c.quick else 12), **shape)).eval()
    text = torch.randint(256, (1, 100))
    _, state = prefill(model, text)
    for path, call in (("eager", model), ("compiled", torch.compile(model, dynamic=False))):
        for width in (1, 2) if c.quick else (1, 5, 9, 17, 33):
            window = text[:, :width].contiguous()
            times = [timed(lambda: call(window, state)) for _ in range(60)]
            yield {"table": "a call", "path": path, "bytes": width,
                   "ms": 1e3 * statistics.median(times[10:])}


def bench_speculate(c):
    """Bytes per call of the target, and time against plain writing, by drafter, guesses and temperature.

    200 bytes after each of three prompts; the models are trained into out/speculate at the first call.
    """
    keep_memory()
    corpus = load_corpus("scan.py" if c.quick else "python")
    small = f"--d_model 16 --head_dim 8 --n_layer 1 --data scan.py {QUICK}" if c.quick else ""
    target, byte_model, word_model = (
        trained(folder_of(c, "speculate") / name, f"{flags} {small}")[0]
        for name, flags in SPECULATION.items())
    drafters = {"counts": CountDrafter(corpus.train), "bytes": ByteDrafter(byte_model),
                "words": SubwordDrafter(word_model)}
    count = 8 if c.quick else 200
    starts = (0,) if c.quick else (50_000, 200_000, 350_000)
    prompts = [torch.tensor([corpus.val[start:start + 100].tolist()]) for start in starts]
    for name, drafter in drafters.items():
        write_both(target, drafter, prompts[:1], 8, 2, 1.0)  # threads and libraries set up
        cells = [(k, temperature) for k in GUESSES[name] for temperature in (1.0, 0.0)]
        for k, temperature in cells[:1] if c.quick else cells:
            yield {"table": "speculation", "path": name, "k": k, "temperature": temperature,
                   **write_both(target, drafter, prompts, count, k, temperature)}


# ---------------------------------------------------------------------------------------------------------------------
# 7. gpu

GPU_SHAPES = ((8, 2048, 1536, 16), (1, 65536, 1536, 16),  # b, l, d, n
              (64, 512, 768, 16), (8, 2048, 1536, 64))


def _exp_kernel(out, ROUNDS: tl.constexpr):
    """1,024 numbers per program, each through 8 ROUNDS exponentials, which stay between 0 and 1."""
    at = tl.arange(0, 1024)
    z = at / 1024.0
    for _ in range(ROUNDS):
        for _ in tl.static_range(8):
            z = tl.exp2(-z)
    tl.store(out + tl.program_id(0) * 1024 + at, z)


if triton is not None:
    _exp_kernel = triton.jit(_exp_kernel)


def limits(device, quick):
    """(bytes/s of a copy, exponentials/s of a kernel that does nothing else), the best of ten."""
    programs = rounds = 2 if quick else 1024
    out = torch.empty(programs * 1024, device=device)
    a = torch.ones(2**12 if quick else 2**30, device=device)
    b = torch.empty_like(a)
    copy = min(timed(lambda: b.copy_(a), device) for _ in range(10))
    launch = lambda: _exp_kernel[(programs,)](out, ROUNDS=rounds)
    exp = min(timed(launch, device) for _ in range(10))
    return 2 * a.nbytes / copy, 8 * rounds * len(out) / exp


def make_decoding(path, b, count, quick, device):
    """count bytes for each of b texts, in bfloat16."""
    model = LM(published_config(quick)).to(device).eval()
    tokens = torch.full((b, 1), 10, device=device)
    cast = torch.autocast(device.type, torch.bfloat16)
    cast.__enter__()  # while this process lives, since it keeps the narrowed weights
    step = compiled_step(model, tokens) if path == "compiled" else model
    return lambda: list(generate(model, tokens, count, filter_logits, step=step))


def bench_gpu(c):
    """The kernels beside the limits, in float32 and bfloat16; MambaByte's model for 1 and 64 texts.

    Of both limits the slower counts, for what a scan has to move and compute at least. Forward
    reads x, dt, B, C and writes y, with one exponential per state and step. Backward reads those
    four and dy, writes four gradients, and computes the exponentials again.
    """
    require(c.quick or torch.cuda.is_available(), "gpu needs a CUDA GPU, and torch finds none "
            "here; on a CPU: python -m tests.bench scan, or gpu --quick with TRITON_INTERPRET=1")
    c.device = c.device if c.quick else "cuda"
    copied, computed = limits(pick_device(c.device), c.quick)
    torch.cuda.empty_cache()  # 8 GB, which the workers may need
    yield {"table": "ceilings", "bytes_per_second": copied, "exps_per_second": computed}
    for dtype in ("float32", "bfloat16"):
        for b, l, d, n in ((2, 9, 3, 4),) if c.quick else GPU_SHAPES:
            moved = getattr(torch, dtype).itemsize * b * l * (8 * d + 6 * n)
            exps = 2 * b * l * d * n
            for row in compare(c, "selective scan", "forward+backward", make_scan,
                               ("triton", "mamba-ssm", "chunked"),
                               {"b": b, "l": l, "d": d, "n": n, "dtype": dtype}):
                if seconds := row.get("seconds"):
                    row |= {"useful_bytes_per_second": moved / seconds,
                            "useful_exps_per_second": exps / seconds,
                            "times_floor": seconds / max(moved / copied, exps / computed)}
                yield row
    count = 2 if c.quick else 256
    for b in (1, 64):
        yield from compare(c, "decoding, 353M", "writing", make_decoding, ("eager", "compiled"),
                           {"b": b, "count": count}, b * count, quick=c.quick)


if __name__ == "__main__":
    run("tests.bench", "bench", {
        "scan": bench_scan, "ssd": bench_ssd, "train": bench_train, "decode": bench_decode,
        "s4": bench_s4, "published": bench_published, "calls": bench_calls,
        "speculate": bench_speculate, "gpu": bench_gpu})
