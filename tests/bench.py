"""How fast is it, beside other people's code: python -m tests.bench NAME [--quick] [--rounds N] [--json FILE]

    scan        the selective scan, forward and backward, by length, and its error against float64
    ssd         the Mamba-2 scan and whole models, by length
    train       training, bytes/s, against mambapy and transformers
    decode      writing, bytes/s, against the same, and ms per byte as the context grows
    s4          kernels, training, the error of convolutions against steps, what a HiPPO state remembers
    published   loading and writing with a model of MambaByte-353M's shape, beside the memory's speed
    speculate   speculative against plain writing, by drafter and guesses; trains its models first
    gpu         the kernels beside the GPU's limits, their errors, training, and captured decoding

Is my change slower? Run `python -m tests.bench train --json before.json`, change, run it again with another file, and
compare the `seconds` of a row with those of a row that the change does not touch: a machine's speed moves from run to
run. To measure something new, write make(..., device=...) that returns functions to time, as make_scan does below, and
hand Cells of it to compare. studies.py trains models and scores them, figures.py draws both files' results.

Every path lives in a process of its own, a worker, so its peak memory is its own. The workers of a group start together
and are called in turn, round after round, so a busy machine hits all alike. Times are medians. Fresh memory costs a CPU
more than the arithmetic does, so a Cell may ask for "huge pages" (2 MB each) or for memory that is "kept" (freed memory
is reused, as train.py does). A path that cannot run, perhaps because its package is missing, says why in its row.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
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
from data.files import UserError
from model import LM, MIXERS, Config, load, save
from sample import (ByteDrafter, CopyDrafter, CountDrafter, SubwordDrafter, capture_step, fast_step,
                    filter_logits, generate, prefill, speculate)
from scan import (discretize, hippo_legs, legs_basis, s4d_init, s4d_kernel, selective_scan, ssd,
                  tl, triton)
from tests.dense import discretize_dense
from train import flag, keep_memory, parse, pick_device, script

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass
class Flags:
    json: str = flag("", "where the result goes (default: assets/bench_NAME.json)")
    device: str = flag("cpu", "cpu, or cuda")
    rounds: int = flag(5, "rounds of calls; a path whose calls are slow sits out some", low=1)
    quick: bool = flag(False, "a smoke test: tiny sizes, one round, no file unless --json names it")


# ---------------------------------------------------------------------------------------------------------------------
# 1. The harness


@dataclass
class Cell:
    """A path to measure: make(**args, device=...) runs in the worker and returns {mode: function}."""
    path: str
    make: callable
    args: dict
    memory: str = "default"  # or "huge pages", or "kept"
    work: int = 0            # bytes of text per call; with 0 there is no bytes/s


def serve(pipe, cell, device):
    """The worker: sends its modes, then answers (mode, warm) with call's seconds and peak, or with an error's text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.simplefilter("ignore")
    try:
        one = torch.ones(1, requires_grad=True)
        torch.autograd.grad(2 * one, one)  # the first gradient imports 40 MB of modules
        if cell.memory == "kept":
            keep_memory()
        functions = cell.make(**cell.args, device=device)
        base = held("VmRSS", device)
        pipe.send(list(functions))
        while True:
            mode, warm = pipe.recv()
            times, peak = call(functions[mode], device, warm)
            pipe.send((times, max(0, peak - base)))
    except (EOFError, BrokenPipeError):  # the parent has all it wants
        pass
    except Exception as e:  # an error is a path's result
        pipe.send(f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")


def call(f, device, warm):
    """([seconds of a call, ...], peak of memory): as many calls as fit into a fifth of a second, at least one.

    To warm up, two calls, of which the last counts, since the first sets up threads; only one if it takes a second.
    """
    times = []
    limit = 1 if warm else 0.2
    most = 2 if warm else math.inf
    while sum(times) < limit and len(times) < most:
        if warm:
            reset_peak(device)
        times.append(timed(f, device))
    times = times[-1:] if warm else times
    return times, held("VmHWM", device)


def timed(f, device):
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


START = 400   # seconds after which a worker is given up while it starts, since it may compile
CALL = 100    # the same for one call
ENOUGH = 2.0  # seconds of calls after which a path sits out the remaining rounds
ONCE = 5.0    # a call that takes longer is the only one


class Worker:
    """The parent's end of a worker; after an error it only remembers what went wrong."""

    def __init__(self, cell, device):
        self.cell = cell
        self.error = None
        self.modes = []
        self.times = {}
        self.peak = {}
        context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, cell, device))
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(cell.memory == "huge pages"))  # torch reads it
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports missing kernels
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # workers compile side by side
        self.process.start()
        theirs.close()

    def answer(self, *question, limit=CALL):
        """The worker's answer; None from the first error on."""
        if self.error:
            return None
        try:
            if question:
                self.pipe.send(question)
            answer = f"not done after {limit} s"
            if self.pipe.poll(limit):
                answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            status = self.process.exitcode
            answer = f"the process ended with status {status} (-9 is mostly: out of memory)"
        if isinstance(answer, str):
            self.error = answer
            self.process.kill()
            return None
        return answer

    def warm(self):
        for mode in self.modes:
            times, self.peak[mode] = self.answer(mode, True) or ([0], 0)
            self.times[mode] = times if times[0] > ONCE else []

    def turn(self):
        for mode, times in self.times.items():
            if sum(times) < (ENOUGH if len(times) > 1 else ONCE):
                more, _ = self.answer(mode, False) or ([], 0)
                times += more

    def rows(self, table, sizes):
        """One row per mode, or one that says what went wrong."""
        row = {"table": table, "path": self.cell.path, "memory": self.cell.memory, **sizes}
        if self.error:
            return [{**row, "mode": "failed", "error": self.error}]
        return [{**row, "mode": mode, **self.figures(mode)} for mode in self.times]

    def figures(self, mode):
        times = self.times[mode]
        work = self.cell.work
        seconds = statistics.median(times)
        found = {"seconds": seconds, "seconds_min": min(times), "calls": len(times),
                 "peak_mb": self.peak[mode] / 1e6}
        if work:
            found |= {"bytes_per_second": work / seconds, "ms_per_byte": 1e3 * seconds / work}
        return found


def measure(cells, device, rounds):
    """The workers of cells that run side by side, with their times and peaks."""
    workers = []
    try:
        for cell in cells:
            workers.append(Worker(cell, device))
        for w in workers:
            w.modes = w.answer(limit=START) or []
        for w in workers:
            w.warm()
        for _ in range(rounds):
            for w in workers:
                w.turn()
    finally:
        for w in workers:
            w.pipe.close()  # it ends by itself, unless it hangs
            w.process.join(5)
            w.process.kill()
    return workers


def compare(table, sizes, cells, c):
    """Measure a group of cells and print it; the dict sizes names the group in each of its rows.

    A ratio is the time over that of the group's first cell that ran in the same mode and kind of memory. On a GPU,
    whose memory all would share, one cell runs after the other.
    """
    device = pick_device(c.device)
    groups = [cells] if device.type == "cpu" else [[cell] for cell in cells]
    rows = []
    first = {}
    for group in groups:
        for worker in measure(group, device, 1 if c.quick else c.rounds):
            rows += worker.rows(table, sizes)
    for row in rows:
        if "seconds" in row:
            unit = first.setdefault((row["mode"], row["memory"]), row["seconds"])
            row["ratio"] = row["seconds"] / unit
    show(table, sizes, rows)
    return rows


def show(table, sizes, rows):
    """A group as a table, mode by mode."""
    print(f"\n{table}, {', '.join(f'{name} {size}' for name, size in sizes.items())}")
    print(f"{'':44}{'ms':>10}{'min':>10}{'ratio':>7}{'peak MB':>9}{'bytes/s':>9}")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        print(f"  {mode}")
        for row in rows:
            if row["mode"] == mode:
                memory = "" if row["memory"] == "default" else ", " + row["memory"]
                figures = row.get("error") or numbers(row)
                print(f"    {row['path'] + memory:40}{figures}", flush=True)


def numbers(row):
    speed = row.get("bytes_per_second")
    return (f"{1e3 * row['seconds']:10.2f}{1e3 * row['seconds_min']:10.2f}{row['ratio']:7.2f}"
            f"{row['peak_mb']:9.0f}{'' if speed is None else f'{speed:9,.0f}'}")


def kinds_of_memory(c, *kinds):
    """Those of kinds that exist here: beside the default they are Linux's, and a CPU's."""
    return kinds if c.device == "cpu" and sys.platform == "linux" else ("default",)


# ---------------------------------------------------------------------------------------------------------------------
# 2. scan: the example to copy

SCANS = ("chunked", "parallel", "naive", "mambapy pscan", "transformers loop")


def forward_and_backward(f, inputs, dy):
    """Two modes: the values alone, and the values with the gradients of inputs."""
    leaves = [t.requires_grad_() for t in inputs]
    forward = torch.no_grad()(lambda: f(*inputs))
    both = lambda: torch.autograd.grad(f(*inputs), leaves, dy)
    return {"forward": forward, "forward+backward": both}


def scan_inputs(b, l, d, n, device, dt_max=0.1):
    """x, dt, A, B, C, D and a gradient for y; A is -1 .. -n in every channel, as Mamba begins."""
    g = torch.Generator().manual_seed(0)
    shapes = (b, l, d), (b, l, n), (b, l, n), (d,), (b, l, d)
    x, B, C, D, dy = (torch.randn(shape, generator=g) for shape in shapes)
    dt = torch.rand(b, l, d, generator=g) * dt_max
    A = -torch.arange(1.0, n + 1).repeat(d, 1)
    return [t.to(device) for t in (x, dt, A, B, C, D, dy)]


def in_layout(path, dtype, tensors):
    """x, dt, B, C and dy, all that has three axes, in dtype and in the path's order of axes."""
    narrow = [t.to(getattr(torch, dtype)) if t.ndim == 3 else t for t in tensors]
    if path == "mamba-ssm":  # length last
        return [t.mT.contiguous() if t.ndim == 3 else t for t in narrow]
    return narrow


def scan_path(path):
    """f(x, dt, A, B, C, D) -> y."""
    if path == "mambapy pscan":
        from mambapy.mamba import MambaBlock
        return functools.partial(MambaBlock.selective_scan, None)  # it never looks at its self
    if path == "mamba-ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        return lambda x, dt, A, B, C, D: selective_scan_fn(x, dt, A, B, C, D)
    if path == "transformers loop":
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
        return lambda x, dt, A, B, C, D: mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, D).mT
    return lambda *inputs: selective_scan(*inputs, impl=path)[0]


def make_scan(path, device, dtype="float32", **sizes):
    *inputs, dy = in_layout(path, dtype, scan_inputs(**sizes, device=device))
    return forward_and_backward(scan_path(path), inputs, dy)


def bench_scan(c):
    """Float32, by length; the loops get the lengths that they finish soon."""
    lengths = (32,) if c.quick else (256, 1024, 4096)
    sizes = {"b": 2, "d": 8, "n": 4} if c.quick else {"b": 4, "d": 512, "n": 16}
    longest = {"naive": 1024, "transformers loop": 256}
    rows = []
    for l in lengths:
        paths = [path for path in SCANS if l <= longest.get(path, l)]
        cells = []
        for kind in kinds_of_memory(c, "default", "huge pages", "kept"):
            few = [p for p in paths if p in ("chunked", "mambapy pscan")]  # to save time
            for path in few if kind == "huge pages" else paths:
                cells.append(Cell(path, make_scan, {"path": path, "l": l, **sizes}, kind))
        rows += compare("selective scan", {**sizes, "l": l}, cells, c)
    return rows + scan_errors(c)


def scan_errors(c, paths=SCANS[:4], dtype="float32"):
    """Largest deviation from the float64 recurrence over its largest value, where errors have time to grow."""
    rows = []
    device = pick_device(c.device)
    sizes = {"b": 1, "l": 33, "d": 4, "n": 3}
    if not c.quick:
        sizes = {"b": 2, "l": 4001, "d": 64, "n": 16}
    print(f"\nrelative error (max norm) against the float64 recurrence, {dtype}, {sizes}")
    for dt_max in (0.1, 5.0):
        inputs = in_layout("", dtype, scan_inputs(**sizes, device=device, dt_max=dt_max))
        exact = output_and_gradients("naive", [t.double() for t in inputs])
        for path in paths:
            row = {"table": "error", "path": path, "dtype": dtype, "dt_max": dt_max, **sizes}
            try:
                got = output_and_gradients(path, in_layout(path, dtype, inputs))
                row["errors"] = {name: relative_error(got[name], t) for name, t in exact.items()}
                worst = max(list(exact)[1:], key=row["errors"].get)
                text = (f"output {row['errors']['y']:.1e}   "
                        f"worst gradient {row['errors'][worst]:.1e}, of {worst}")
            except Exception as e:  # a path that fails is a row, not the end
                row["error"] = text = f"{type(e).__name__}: {e}"
            rows.append(row)
            print(f"  dt up to {dt_max:<5}{path:16}{text}")
    return rows


def output_and_gradients(path, inputs_and_dy):
    *leaves, dy = (t.clone().requires_grad_() for t in inputs_and_dy)
    y = scan_path(path)(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy.detach())
    return dict(zip(("y", "x", "dt", "A", "B", "C", "D"), (y.detach(), *gradients)))


def relative_error(got, exact):
    got = got if got.shape == exact.shape else got.mT
    return ((got - exact).abs().max() / exact.abs().max()).item()


# ---------------------------------------------------------------------------------------------------------------------
# 3. ssd and train: the operation and the whole model

N = {"mamba": 16, "mamba2": 64, "s4": 64, "s4d": 64, "attention": 16}  # attention has no state
TINY = {"b": 2, "l": 32, "d_model": 32, "n_layer": 1}  # for --quick
CHUNK = 64  # transformers' Mamba-2: the fastest of 16 .. 256 on a CPU, 256 is its default


def make_ssd(path, b, l, nh, p, n, device):
    """The operation with one group, dt up to 0.1 and A = -1 .. -nh, as transformers begins."""
    shapes = (b, l, nh, p), (b, l, 1, n), (b, l, 1, n), (b, l, nh, p)
    x, B, C, dy = (torch.randn(shape, device=device) for shape in shapes)
    dt = torch.rand(b, l, nh, device=device) * 0.1
    A = -torch.arange(1.0, nh + 1, device=device)
    inputs = [x, dt, A, B, C, torch.ones(nh, device=device)]
    if path != "transformers":
        return forward_and_backward(lambda *inputs: ssd(*inputs, impl=path)[0], inputs, dy)
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def theirs(x, dt, A, B, C, D):
        return mamba2_chunk_scan(x, dt, A, B, C, CHUNK, D)

    return forward_and_backward(theirs, inputs, dy)


def our_config(layer, d_model, n_layer):
    """Layers with equally many parameters, to 2 % for mamba, mamba2 and attention, which has SwiGLU for it."""
    name = "attention+mlp" if layer == "attention" else layer
    return Config((name,) * n_layer, d_model=d_model, d_state=N[layer],
                  head_dim=min(64, d_model), d_mlp=d_model * 7 // 8)


def transformers_config(layer, d_model, n_layer):
    """The same shapes there. Its Mamba takes mambapy's scan, since its own loop, also compiled, is slower."""
    import transformers
    sizes = {"hidden_size": d_model, "num_hidden_layers": n_layer, "vocab_size": 256,
             "state_size": N[layer]}
    if layer == "mamba":
        return transformers.MambaConfig(**sizes, use_mambapy=True)
    p = min(64, d_model)
    return transformers.Mamba2Config(**sizes, head_dim=p, num_heads=2 * d_model // p, n_groups=1,
                                     chunk_size=CHUNK, tie_word_embeddings=True)


def language_model(path, d_model, n_layer):
    """(model, function from tokens to logits) for "mamba2", "transformers mamba", ..."""
    who, layer = path.split() if " " in path else ("ours", path)
    if who == "mambapy":  # its own LM cannot be imported without the CUDA package
        from mambapy.mamba import Mamba as Body, MambaConfig, RMSNorm
        body = Body(MambaConfig(d_model=d_model, n_layers=n_layer))
        head = nn.Linear(d_model, 256, bias=False)
        embedding = nn.Embedding(256, d_model)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, body, RMSNorm(d_model), head)
        return model, model
    if who == "transformers":
        import transformers
        kind = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}[layer]
        model = getattr(transformers, kind)(transformers_config(layer, d_model, n_layer))
        return model, lambda tokens: model(tokens, use_cache=False).logits
    model = LM(our_config(layer, d_model, n_layer))
    return model, lambda tokens: model(tokens)[0]


def make_train(path, b, l, d_model, n_layer, device):
    """A training step: forward, backward, clipping, AdamW."""
    model, f = language_model(path, d_model, n_layer)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(256, (b, l + 1), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = f(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"training step": step}


def compare_training(paths, args, c, kinds=("default",)):
    """A step of each path, which reads b windows of l bytes."""
    work = args["b"] * args["l"]
    cells = []
    for kind in kinds_of_memory(c, *kinds):
        cells += [Cell(path, make_train, {"path": path, **args}, kind, work) for path in paths]
    return compare("training", args, cells, c)


def bench_ssd(c):
    """d_model 256, 8 heads of 64, n = 64; as many bytes per call, however they are cut into windows."""
    shapes = ((2, 64),) if c.quick else ((8, 512), (2, 2048), (1, 8192))
    heads = {"nh": 2, "p": 8, "n": 4} if c.quick else {"nh": 8, "p": 64, "n": 64}
    sizes = {"d_model": 32 if c.quick else 256, "n_layer": 4}
    models = ("mamba2", "mamba", "attention", "transformers mamba2")
    rows = []
    for b, l in shapes:
        size = {"b": b, "l": l}
        paths = ["chunked", "transformers"]
        if l <= 2048:  # longer ones need tens of GB
            paths += ["quadratic", "naive"]
        cells = [Cell(p, make_ssd, {"path": p, **size, **heads}, work=b * l) for p in paths]
        rows += compare("ssd", size, cells, c)
        rows += compare_training(models, {**size, **sizes}, c, ["kept"])
    return rows


def bench_train(c):
    """4 layers of width 256, 8 windows of 512 bytes."""
    args = TINY if c.quick else {"b": 8, "l": 512, "d_model": 256, "n_layer": 4}
    paths = ("mamba2", "mamba", "attention", "mambapy mamba", "transformers mamba",
             "transformers mamba2")
    return compare_training(paths, args, c, ["default", "kept"])


# ---------------------------------------------------------------------------------------------------------------------
# 4. decode


def peer_step(path, model):
    """(function of token (1, 1) and state to logits (1, v) and state, the state before the first token)."""
    if path.startswith("transformers"):
        def step(token, cache):
            out = model(token, cache_params=cache, use_cache=True)
            return out.logits[:, -1], out.cache_params
        return step, lambda: None
    embedding, body, norm, head = model
    config = body.config

    def step(token, caches):
        x, caches = body.step(embedding(token[:, 0]), list(caches))
        return head(norm(x)), caches

    def zeros(*shape):
        return torch.zeros(1, config.d_inner, *shape, device=head.weight.device)

    return step, lambda: [(zeros(config.d_state), zeros(config.d_conv - 1)) for _ in body.layers]


def write(step, start, count):
    """A function that draws count bytes one by one, from (logits, state) = start()."""
    @torch.inference_mode()
    def f():
        logits, state = start()
        for _ in range(count):
            logits, state = step(torch.multinomial(torch.softmax(logits, -1), 1), state)
    return {"writing": f}


def make_decode(path, count, d_model, n_layer, compiled, device):
    """count bytes after a newline: ours by sample.generate, the others by the same loop around their own step."""
    model, _ = language_model(path, d_model, n_layer)
    model.to(device).eval()
    token = torch.tensor([[10]], device=device)
    if " " not in path:
        step = fast_step(model, token, True) if compiled else None
        return {"writing": lambda: list(generate(model, token, count, filter_logits, step=step))}
    step, state = peer_step(path, model)
    step = torch.compile(step) if compiled else step
    functions = write(step, lambda: step(token, state()), count)
    if compiled:
        functions["writing"]()
    return functions


def last_logits(model):
    """The step of an LM as write takes it."""
    def step(token, state):
        logits, state = model(token, state)
        return logits[:, -1], state
    return step


def write_after(model, tokens, count):
    """A function that draws count bytes after tokens, which are read in the first call, while the others rest."""
    return write(last_logits(model), functools.cache(lambda: prefill(model, tokens)), count)


def make_context(path, context, count, d_model, n_layer, device):
    """count bytes after a context, whose state every call begins from; attention's window is unlimited."""
    model, _ = language_model(path, d_model, n_layer)
    model.to(device).eval()
    return write_after(model, torch.randint(256, (1, context), device=device), count)


def bench_decode(c):
    """Batch 1, 4 layers of width 256."""
    contexts = (16,) if c.quick else (256, 2048, 8192)
    size = {"count": 4, "d_model": 32, "n_layer": 1}
    if not c.quick:
        size = {"count": 64, "d_model": 256, "n_layer": 4}
    cells = []
    for ending in ("", ", compiled"):
        for path in ("mamba", "mamba2", "attention", "mambapy mamba", "transformers mamba"):
            args = {"path": path, "compiled": bool(ending), **size}
            cells.append(Cell(path + ending, make_decode, args, work=size["count"]))
    rows = compare("decoding", size, cells, c)
    for context in contexts:
        args = {"context": context, **size}
        cells = [Cell(path, make_context, {"path": path, **args}, work=size["count"])
                 for path in ("mamba2", "attention")]
        rows += compare("decoding after a context", args, cells, c)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 5. s4


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

    def small_matrices(dt, A, C):
        return s4d_kernel(dt, A, 1.0, C, l)

    f = written_out if path == "written out" else small_matrices
    return forward_and_backward(f, [dt, A, C], dK)


def step_errors(lengths):
    """Largest difference of the convolution from the recurrence, both float32, in a layer as it begins; n = 64."""
    rows = []
    print("\nconvolution against recurrence, float32: largest difference, largest output")
    for layer in ("s4d", "s4"):
        torch.manual_seed(0)
        mixer = MIXERS[layer](Config((layer,), d_model=64, d_state=64))
        for l in lengths:
            x = torch.randn(1, l, 64)
            steps = []
            h = None
            with torch.no_grad():
                y, _ = mixer.scan(x, None)
                for x_t in x.split(1, dim=1):
                    y_t, h = mixer.scan(x_t, h)
                    steps.append(y_t)
            error = (y - torch.cat(steps, dim=1)).abs().max().item()
            rows.append({"table": "error", "path": layer, "l": l, "error": error,
                         "largest": y.abs().max().item()})
            print(f"  {layer:8}l = {l:<8,}{error:12.1e}{rows[-1]['largest']:12.2f}")
    return rows


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
    rows = []
    for path, values in curves.items():
        row = {"table": "legs", "path": path, "memory": "default"}
        rows += [{**row, "age": a, "value": v} for a, v in zip(age.tolist(), values.tolist())]
    return rows


def bench_s4(c):
    """S4D's kernel with d = 256 and 32 modes; training with layers of width 256; errors and memories."""
    size = {"d": 8, "n": 4} if c.quick else {"d": 256, "n": 32}
    args = TINY if c.quick else {"b": 8, "l": 512, "d_model": 256, "n_layer": 4}
    rows = []
    for l in (32,) if c.quick else (1024, 4096):
        cells = [Cell(path, make_kernel, {"path": path, "l": l, **size})
                 for path in ("two small matrices", "written out")]
        rows += compare("s4d kernel", {**size, "l": l}, cells, c)
    paths = ("mamba", "mamba2", "s4d", "s4", "attention")
    rows += compare_training(paths, args, c, ["kept"])
    steps = (7,) if c.quick else (64, 1024, 4096)
    return rows + step_errors(steps) + reconstructions()


# ---------------------------------------------------------------------------------------------------------------------
# 6. published: a checkpoint of the size that MambaByte released

WRITTEN = 8  # bytes per call: the first one after another process has run is slow for all


def make_published(path, folder, device):
    """Reading the file; reading every weight as often as bytes are written, which no writing can beat; writing."""
    if path == "load":
        return {"loading": lambda: load(folder, device)}
    model, _ = load(folder, device)
    if path == "read":
        weights = [p for name, p in model.named_parameters() if name != "embedding.weight"]
        read = torch.inference_mode()(lambda: [p.sum() for _ in range(WRITTEN) for p in weights])
        return {"writing": read}
    step = last_logits(model)
    start = torch.inference_mode()(step)(torch.tensor([[10]]), None)
    return write(step, lambda: start, WRITTEN)


def bench_published(c):
    """Random weights in MambaByte-353M's shape, float32, written once to a temporary folder."""
    n_layer, d_model = (2, 32) if c.quick else (53, 1024)
    with tempfile.TemporaryDirectory() as folder:
        model = LM(Config(("mamba",) * n_layer, d_model=d_model, norm="layer", tie=False))
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        save(folder, model, "state-spaces")
        del model
        cells = []
        names = {"load": "load", "read": "every weight read for each", "write": "mamba"}
        for path, name in names.items():
            args = {"path": path, "folder": folder}
            cells.append(Cell(name, make_published, args, work=0 if path == "load" else WRITTEN))
        return compare("published", {"weights_mb": round(size / 1e6)}, cells, c)


# ---------------------------------------------------------------------------------------------------------------------
# 7. speculate: in one process, plain and speculative writing in turn

SPECULATION = {"target": "--d_model 160 --n_layer 12 --steps 2200", "bytes": "--n_layer 1 --steps 2200",
               "words": "--n_layer 1 --bpe 1024 --seq_len 256 --steps 2200"}  # train.py's flags
GUESSES = {"counts": (2, 4, 8, 12, 16), "ngram": (2, 4, 8, 16, 32), "bytes": (1, 2, 4, 6, 8),
           "words": (1, 2, 3, 4, 6)}


def train_once(folder, flags, program=train):
    """Make a run in folder with train.py, or another program, unless it has ended; one that was stopped is resumed.

    Only a run's end validates, and so writes best.pt.
    """
    if (folder / "best.pt").exists():
        return
    print(f"\n{folder}", flush=True)
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    status = program.main([*flags.split(), "--out", str(folder), *resume])
    if status:
        raise SystemExit(status)  # the program has said why


def speculation_model(name, folder, quick):
    flags = SPECULATION[name]
    if quick:
        flags = "--d_model 16 --head_dim 8 --n_layer 1 --steps 2 --seq_len 64 --data scan.py"
        flags += " --bpe 9" if name == "words" else ""
    train_once(folder / name, flags)
    return load(folder / name)[0]


def make_drafter(name, folder, corpus, quick):
    if name == "counts":
        return CountDrafter(corpus.train)
    if name == "ngram":
        return CopyDrafter()
    model = speculation_model(name, folder, quick)
    return SubwordDrafter(model) if name == "words" else ByteDrafter(model)


def seconds_of(stream):
    """How long a stream takes to its end."""
    return timed(lambda: list(stream), torch.device("cpu"))


def write_both(model, drafter, prompts, count, k, temperature):
    """The figures of speculative writing after every prompt, beside plain writing of as many bytes."""
    distribution = functools.partial(filter_logits, temperature=temperature)
    rounds = []
    fast = plain = 0.0
    for seed, prompt in enumerate(prompts):
        g = torch.Generator().manual_seed(seed)
        args = model, prompt, count, distribution
        fast += seconds_of(speculate(*args, drafter, k, g, rounds))
        plain += seconds_of(generate(*args, g))
    written = count * len(prompts)
    guessed = sum(guesses for guesses, _ in rounds)
    return {"bytes_per_call": written / len(rounds), "guessed_per_call": guessed / len(rounds),
            "acceptance": sum(accepted for _, accepted in rounds) / max(guessed, 1),
            "ms_per_byte": 1e3 * fast / written, "plain_ms_per_byte": 1e3 * plain / written,
            "speedup": plain / fast}


def bench_speculate(c):
    """Bytes per call of the target, and time against plain writing, by drafter, guesses and temperature.

    200 bytes after each of three prompts; the models are trained into out/speculate at the first call.
    """
    keep_memory()
    folder = Path("out/speculate_quick" if c.quick else "out/speculate")
    corpus = load_corpus("scan.py" if c.quick else "python")
    target = speculation_model("target", folder, c.quick)
    count = 8 if c.quick else 200
    starts = (0,) if c.quick else (50_000, 200_000, 350_000)
    prompts = [torch.tensor([corpus.val[start:start + 100].tolist()]) for start in starts]
    rows = []
    print(f"{'drafter':10}{'guesses':>8}{'temp.':>7}{'bytes/call':>12}{'accepted':>10}"
          f"{'ms/byte':>9}{'plain':>8}{'times as fast':>15}")
    for name, guesses in GUESSES.items():
        drafter = make_drafter(name, folder, corpus, c.quick)
        cells = [(k, t) for k in guesses for t in (1.0, 0.5, 0.0)]
        write_both(target, drafter, prompts[:1], 8, 2, 1.0)  # threads and libraries set up
        for k, t in cells[:1] if c.quick else cells:
            row = {"table": "speculation", "path": name, "k": k, "temperature": t}
            row |= write_both(target, drafter, prompts, count, k, t)
            rows.append(row)
            print(f"{name:10}{k:8}{t:7}{row['bytes_per_call']:12.2f}"
                  f"{row['acceptance']:10.0%}{row['ms_per_byte']:9.2f}"
                  f"{row['plain_ms_per_byte']:8.2f}{row['speedup']:15.2f}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 8. gpu

GPU_SHAPES = ((8, 2048, 1536, 16), (1, 65536, 1536, 16),  # b, l, d, n
              (64, 512, 768, 16), (8, 2048, 1536, 64))
GPU_PATHS = ("triton", "mamba-ssm", "chunked", "parallel", "naive", "mambapy pscan")


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
    """Bytes/s of a copy and exponentials/s of a kernel that does nothing else, the best of ten."""
    programs = 2 if quick else 1024
    rounds = 1 if quick else 1024
    size = 2**12 if quick else 2**30
    out = torch.empty(programs * 1024, device=device)
    a = torch.ones(size, device=device)
    b = torch.empty_like(a)
    copy = min(timed(lambda: b.copy_(a), device) for _ in range(10))
    launch = lambda: _exp_kernel[(programs,)](out, ROUNDS=rounds)
    exp = min(timed(launch, device) for _ in range(10))
    return {"bytes_per_second": 8 * size / copy, "exps_per_second": 8 * rounds * len(out) / exp}


def beside_the_floor(rows, peak, b, l, d, n, dtype):
    """To each row what it had to move and compute at least, per second, and its time over that of the slower of both.

    Forward reads x, dt, B, C and writes y, with one exponential per state and step. Backward reads those four and dy,
    writes four gradients, and computes the exponentials again.
    """
    for row in rows:
        if "seconds" not in row:
            continue
        seconds = row["seconds"]
        numbers = 3 * d + 2 * n
        exps = b * l * d * n
        if row["mode"] != "forward":
            numbers += 5 * d + 4 * n
            exps *= 2
        moved = (2 if dtype == "bfloat16" else 4) * b * l * numbers
        floor = max(moved / peak["bytes_per_second"], exps / peak["exps_per_second"])
        row["useful_bytes_per_second"] = moved / seconds
        row["useful_exps_per_second"] = exps / seconds
        row["times_floor"] = seconds / floor
        print(f"    {row['path']:16}{row['mode']:18}{moved / seconds / 1e9:10,.0f} GB/s"
              f"{exps / seconds / 1e9:10,.0f} G exp/s{row['times_floor']:8.2f} x floor")
    return rows


def make_captured(path, b, count, sizes, device):
    """count bytes for each of b texts, by MambaByte's model in bfloat16; the step captured or launched from Python."""
    model = LM(Config(**sizes)).to(device).eval()
    tokens = torch.full((b, 1), 10, device=device)
    cast = torch.autocast(device.type, torch.bfloat16)
    cast.__enter__()  # while this process lives, since it keeps the narrowed weights
    step = None
    if path == "captured":
        with torch.inference_mode():
            step = capture_step(model, tokens, model(tokens)[1])
    return {"writing": lambda: list(generate(model, tokens, count, filter_logits, step=step))}


def decode_on_gpu(c, peak):
    """MambaByte's model for 1 and for 64 texts, beside the limit: every weight crosses memory once per step."""
    count = 2 if c.quick else 256
    sizes = {"layers": ("mamba",), "d_model": 16, "norm": "layer", "tie": False}
    if not c.quick:
        sizes |= {"layers": ("mamba",) * 53, "d_model": 1024}
    model = LM(Config(**sizes))
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    del model
    rows = []
    for b in (1, 64):
        args = {"b": b, "count": count, "sizes": sizes}
        paths = ["eager"] if c.device == "cpu" else ["captured", "eager"]
        work = b * count
        cells = [Cell(path, make_captured, {"path": path, **args}, work=work) for path in paths]
        limit = b * peak["bytes_per_second"] / (2 * weights)  # 2 bytes in bfloat16
        print(f"\nevery weight once per step: at most {limit:,.0f} bytes/s")
        found = compare("decoding, 353M", {"b": b, "count": count}, cells, c)
        rows += [{**row, "limit": limit} for row in found]
    return rows


def bench_gpu(c):
    """The kernels beside every other path, in float32 and bfloat16, and the official kernel where mamba-ssm imports."""
    if not c.quick:
        if not torch.cuda.is_available():
            raise UserError("gpu needs a CUDA GPU, and torch finds none here; on a CPU: "
                            "python -m tests.bench scan, or gpu --quick with TRITON_INTERPRET=1")
        c = dataclasses.replace(c, device="cuda")
    peak = limits(pick_device(c.device), c.quick)
    torch.cuda.empty_cache()  # 8 GB, which the workers may need
    rows = [{"table": "ceilings", **peak}]
    print(f"measured limits: {peak['bytes_per_second'] / 1e9:,.0f} GB/s, "
          f"{peak['exps_per_second'] / 1e9:,.0f} G exp/s")
    for dtype in ("float32", "bfloat16"):
        for b, l, d, n in ((2, 9, 3, 4),) if c.quick else GPU_SHAPES:
            sizes = {"b": b, "l": l, "d": d, "n": n, "dtype": dtype}
            cells = [Cell(path, make_scan, {"path": path, **sizes}) for path in GPU_PATHS
                     if l <= 2048 or path != "naive"]
            rows += beside_the_floor(compare("selective scan", sizes, cells, c), peak, **sizes)
        rows += scan_errors(c, GPU_PATHS[:4], dtype)
    args = TINY if c.quick else {"b": 8, "l": 2048, "d_model": 768, "n_layer": 24}
    rows += compare_training(("mamba", "transformers mamba"), args, c)
    return rows + decode_on_gpu(c, peak)


# ---------------------------------------------------------------------------------------------------------------------
# 9. The command line

BENCHMARKS = {"scan": bench_scan, "ssd": bench_ssd, "train": bench_train, "decode": bench_decode,
              "s4": bench_s4, "published": bench_published, "speculate": bench_speculate,
              "gpu": bench_gpu}


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


def run(argv, module, table, prefix):
    """The command line of a table {name: function of the flags}: measure, print, and write PREFIX_NAME.json."""
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = f"python -m {module} {'|'.join(table)}"
    name = argv[0] if argv and not argv[0].startswith("-") else None
    c, _ = parse(Flags, argv[1:] if name else argv, usage)
    if name not in table:
        raise UserError(f"{name or 'no name'} is not among what can be measured: {usage}")
    result = {"benchmark": name, "command": " ".join([f"python -m {module}", *argv]),
              "hardware": hardware(),
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    print(", ".join(f"{key} {value}" for key, value in result["hardware"].items() if value))
    began = time.perf_counter()
    result["rows"] = table[name](c)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if c.json or not c.quick:
        path = Path(c.json or ASSETS / f"{prefix}_{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


@script
def main(argv):
    return run(argv, "tests.bench", BENCHMARKS, "bench")


if __name__ == "__main__":
    sys.exit(main())
