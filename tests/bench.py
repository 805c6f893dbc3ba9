"""Time and memory of scans, layers, training and decoding beside other people's code: python -m tests.bench scan

    scan      the selective scan, forward and backward, by length, and its error against float64
    ssd       the Mamba-2 scan, single layers and whole models, by length
    train     bytes/s of training, against mambapy and transformers
    decode    bytes/s of writing, against the same, and ms per byte as the context grows
    robust    bits per byte under noise, and far beyond the training length, of two trained models
    published loading and writing with a model of MambaByte-353M's shape, beside the memory's speed
    distill   a transformer, its students, and the same students without it: bits per byte, speed, memory
    gpu       the kernels on a GPU: time beside the floor, memory, errors, training and captured decoding
    s4        kernels, layers, the error of convolutions against steps, and what a HiPPO state remembers
    selection accuracy on selective copying and induction heads, by length; trains what is not trained yet
    speculate speculative against plain writing, by drafter and length of draft; trains its models into out/speculate,
              and goes on there where it was stopped
    figures   assets/*.svg from the JSON files that the others wrote

Every path lives in a process of its own, a worker, so that its peak memory is its own: what it held at most above what
it held when inputs and model had been made. The workers of a group start together and are called in turn, round after
round, so that whatever else the machine does hits all alike; times are medians. Ratios are taken within a group.
Fresh memory costs a CPU more than the arithmetic does, so there are rows with "huge pages" (THP_MEM_ALLOC_ENABLE=1:
torch asks Linux for 2 MB pages) and with memory "kept" (freed memory is reused, as in train.py), for all alike.
mambapy and transformers are optional; a path that cannot run says why in its row. No timing is asserted anywhere.
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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import distill
import train
from data.bpe import BPE
from data.corpus import load_corpus, windows
from noise import corrupt
from data.synthetic import NO_TARGET, TASKS
from distill import freeze, make_loss, make_student, replaced
from data.files import UserError
from model import LM, MIXERS, Block, Config, _CausalConv, load, save
from sample import (RULES, WITHOUT_MODEL, ByteDrafter, Stats, SubwordDrafter, capture_step, compile_step, filter_logits,
                    generate, prefill, read, speculate)
from scan import (_kernel, discretize, discretize_dense, hippo_legs, legs_basis, s4d_init, s4d_kernel, selective_scan,
                  ssd, tl, triton_conv)
from train import (by_position, evaluate, flag, keep_memory, make_optimizer, parse, pick_device, prediction_loss,
                   script, sliding_bpb, train_step, window_nats, word_perplexity)

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass
class Flags:
    json: str = flag("", "where the result goes (default: assets/bench_NAME.json)")
    device: str = flag("cpu", "cpu, or cuda")
    rounds: int = flag(5, "rounds of calls; a path whose calls are slow sits out some")
    quick: bool = flag(False, "a smoke test: tiny sizes, one round, no JSON unless --json says where")


# ---------------------------------------------------------------------------------------------------------------------
# The worker's side


def serve(pipe, cell, device):
    """Make the path, then answer ("warm", mode) by (seconds, peak bytes) and ("time", mode) by a list of seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    warnings.simplefilter("ignore")  # the peers' own, about themselves
    try:
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(2 * x, x, torch.ones(1))  # the first gradient imports 40 MB of modules
        if cell.memory == "kept":
            keep_memory()
        functions = cell.make(**cell.args, device=device)
        base = memory("VmRSS", device)
        pipe.send(list(functions))
        while True:
            kind, mode = pipe.recv()
            pipe.send(warm_up(functions[mode], device, base) if kind == "warm" else repeat(functions[mode], device))
    except (EOFError, BrokenPipeError):  # the parent has all it wants
        pass
    except ImportError as e:
        pipe.send(f"not installed: {e}")
    except Exception as e:  # whatever a path raises is its result
        pipe.send(f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}")


def warm_up(f, device, base):
    """(seconds, peak bytes above base) of the second call, for the first also sets up threads and libraries.

    Where the first takes over a second, set-up is small beside it and its own figures do.
    """
    for _ in range(2):
        reset_peak(device)
        seconds = timed(f, device)
        if seconds > 1:
            break
    return seconds, max(0, memory("VmHWM", device) - base)


def repeat(f, device):
    """Seconds of each call, as many as fit into a fifth of a second, at least one."""
    times = []
    while sum(times) < 0.2:
        times.append(timed(f, device))
    return times


def timed(f, device):
    began = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def memory(name, device):
    """Bytes this process holds (VmRSS) or held at most (VmHWM); without /proc both are the peak of its whole life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if name == "VmHWM" else torch.cuda.memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(name + ":"))
    except OSError:
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device):
    """Start the peak anew, after giving freed memory back: an earlier call's leftovers would count."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # only glibc trims, only Linux resets
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------------------------------------------------------------
# The parent's side

START, CALL = 400, 100  # seconds after which a worker is given up: while it starts (it may compile), and in one call
ENOUGH = 2.0            # seconds of calls after which a path sits out the remaining rounds
ONCE = 5.0              # a call that takes longer is the only one


@dataclass
class Cell:
    """A path to measure: make(**args, device=...) runs in the worker and returns {mode: function}."""
    path: str
    make: callable
    args: dict
    memory: str = "default"  # or "huge pages", or "kept"
    work: int = 0            # bytes of text that a call reads or writes; 0 leaves bytes/s out


class Worker:
    """The parent's end of a worker; after an error it only remembers what went wrong."""

    def __init__(self, cell, device):
        self.cell, self.error, self.modes, self.times, self.peak = cell, None, [], {}, {}
        context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, cell, device))
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(cell.memory == "huge pages"))  # read as torch starts
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would report missing CUDA kernels
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the workers compile side by side already
        self.process.start()
        theirs.close()

    def answer(self, *question, limit=CALL):
        """The worker's answer; None once anything went wrong."""
        if self.error:
            return None
        try:
            if question:
                self.pipe.send(question)
            answer = self.pipe.recv() if self.pipe.poll(limit) else f"not done after {limit} s"
        except (EOFError, OSError):
            self.process.join(10)
            answer = f"the process ended with status {self.process.exitcode} (-9: out of memory, most likely)"
        if isinstance(answer, str):
            self.error = answer
            return self.process.kill()
        return answer

    def warm(self):
        for mode in self.modes:
            seconds, self.peak[mode] = self.answer("warm", mode) or (0, 0)
            self.times[mode] = [seconds] if seconds > ONCE else []

    def turn(self):
        for mode, times in self.times.items():
            if sum(times) < (ENOUGH if len(times) > 1 else ONCE):
                times += self.answer("time", mode) or []

    def rows(self, table, sizes):
        """One row a mode, or one that says what went wrong."""
        cell = self.cell
        row = {"table": table, "path": cell.path, "memory": cell.memory, **sizes}
        if self.error:
            return [{**row, "mode": "failed", "error": self.error}]
        rows = []
        for mode, times in self.times.items():
            seconds = statistics.median(times)
            rows.append({**row, "mode": mode, "seconds": seconds, "seconds_min": min(times), "calls": len(times),
                         "peak_mb": self.peak[mode] / 1e6})
            if cell.work:
                rows[-1].update(bytes_per_second=cell.work / seconds, ms_per_byte=1e3 * seconds / cell.work)
        return rows


def compare(table, sizes, cells, c):
    """Measure a group of cells and print it; sizes, a dict, names the group in each of its rows.

    Ratios are against the first cell of the group that ran, by mode and kind of memory. On a GPU, which nobody else
    disturbs and whose memory all would share, the cells take turns as a whole.
    """
    device = pick_device(c.device)
    workers = [w for group in ([cells] if device.type == "cpu" else [[cell] for cell in cells])
               for w in measure(group, device, c)]
    rows, first = [row for w in workers for row in w.rows(table, sizes)], {}
    for row in rows:
        if "seconds" in row:
            row["ratio"] = row["seconds"] / first.setdefault((row["mode"], row["memory"]), row["seconds"])
    show(f"{table}, " + ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in sizes.items()), rows)
    return rows


def measure(cells, device, c):
    """The workers of cells that run side by side, with their times and peaks."""
    workers = []
    try:
        for cell in cells:
            workers.append(Worker(cell, device))
        for w in workers:
            w.modes = w.answer(limit=START) or []
        for w in workers:
            w.warm()
        for _ in range(1 if c.quick else c.rounds):
            for w in workers:
                w.turn()
    finally:
        for w in workers:
            w.pipe.close()  # it ends by itself, unless it hangs
            w.process.join(5)
            w.process.kill()
    return workers


def show(title, rows):
    """A group as a table, mode by mode; ratio 2 means twice the time of the first row."""
    print(f"\n{title}\n{'':44}{'ms':>10}{'min':>10}{'ratio':>7}{'peak MB':>9}{'bytes/s':>9}")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        print(f"  {mode}")
        for row in (row for row in rows if row["mode"] == mode):
            label = f"    {row['path']}{'' if row['memory'] == 'default' else ', ' + row['memory']}"
            print(f"{label:44}" + (row.get("error") or f"{1e3 * row['seconds']:10.2f}{1e3 * row['seconds_min']:10.2f}"
                                   f"{row['ratio']:7.2f}{row['peak_mb']:9.0f}"
                                   + (f"{row['bytes_per_second']:9,.0f}" if "bytes_per_second" in row else "")))
    sys.stdout.flush()


def kinds_of_memory(c, *kinds):
    """Those of kinds that exist here: beside the default they are Linux's, and a CPU's."""
    return kinds if c.device == "cpu" and sys.platform == "linux" else ("default",)


# ---------------------------------------------------------------------------------------------------------------------
# scan


SCANS = ("chunked", "parallel", "naive", "mambapy pscan", "transformers loop")  # the first is what ratios refer to


def forward_and_backward(f, inputs, dy, parameters=()):
    """Two modes: the values alone, and the values with the gradients of inputs and parameters."""
    leaves = [*(t.requires_grad_() for t in inputs), *parameters]

    def both():
        torch.autograd.grad(f(*inputs), leaves, dy)

    return {"forward": torch.no_grad()(lambda: f(*inputs)), "forward+backward": both}


def scan_inputs(b, l, d, n, device, dt_max=0.1):
    """x, dt, A, B, C, D and a gradient for y; A is -1 .. -n in every channel, as Mamba begins."""
    g = torch.Generator().manual_seed(0)
    x, B, C, D, dy = (torch.randn(s, generator=g) for s in ((b, l, d), (b, l, n), (b, l, n), (d,), (b, l, d)))
    dt, A = torch.rand(b, l, d, generator=g) * dt_max, -torch.arange(1.0, n + 1).repeat(d, 1)
    return [t.to(device) for t in (x, dt, A, B, C, D, dy)]


def in_layout(path, dtype, tensors):
    """x, dt, B, C and dy, whatever has three axes, in dtype, and as the path keeps them in memory."""
    narrow = (t.to(getattr(torch, dtype)) if t.ndim == 3 else t for t in tensors)
    return [t.mT.contiguous() if t.ndim == 3 and path == "mamba-ssm" else t for t in narrow]


def scan_path(path):
    """f(x, dt, A, B, C, D) -> y."""
    if path == "mambapy pscan":
        from mambapy.mamba import MambaBlock
        return functools.partial(MambaBlock.selective_scan, None)  # a method that never looks at its self
    if path == "mamba-ssm":  # length last, as its kernel wants it
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
    lengths, sizes = ((32,), {"b": 2, "d": 8, "n": 4}) if c.quick else ((256, 1024, 4096), {"b": 4, "d": 512, "n": 16})
    longest, rows = {"naive": 1024, "transformers loop": 256}, []
    for l in lengths:
        paths = [p for p in SCANS if l <= longest.get(p, l)]
        cells = [Cell(p, make_scan, {"path": p, "l": l, **sizes}, kind)
                 for kind in kinds_of_memory(c, "default", "huge pages", "kept") for p in paths
                 if kind != "huge pages" or p in ("chunked", "mambapy pscan")]  # the others to save time
        rows += compare("selective scan", {**sizes, "l": l}, cells, c)
    return rows + scan_errors(c)


def scan_errors(c, paths=SCANS[:4], dtype="float32"):
    """Largest deviation from the float64 recurrence over its largest value, where errors have time to grow."""
    device, rows = pick_device(c.device), []
    sizes = {"b": 1, "l": 33, "d": 4, "n": 3} if c.quick else {"b": 2, "l": 4001, "d": 64, "n": 16}
    print(f"\nrelative error (max norm) against the float64 recurrence, {dtype}, {sizes}")
    for dt_max in (0.1, 5.0):
        inputs = in_layout("", dtype, scan_inputs(**sizes, device=device, dt_max=dt_max))
        exact = output_and_gradients("naive", *(t.double() for t in inputs))
        for path in paths:
            row = {"table": "error", "path": path, "dtype": dtype, "dt_max": dt_max, **sizes}
            try:
                got = output_and_gradients(path, *in_layout(path, dtype, inputs))
                got = {k: v.mT if v.shape != exact[k].shape else v for k, v in got.items()}
                errors = {k: ((got[k] - v).abs().max() / v.abs().max()).item() for k, v in exact.items()}
                worst = max(list(errors)[1:], key=errors.get)
                text = f"output {errors['y']:.1e}   worst gradient {errors[worst]:.1e}, of {worst}"
                rows.append({**row, "errors": errors})
            except Exception as e:  # a path that fails is a row, not the end
                text = f"{type(e).__name__}: {e}"
                rows.append({**row, "error": text})
            print(f"  dt up to {dt_max:<5}{path:16}{text}")
    return rows


def output_and_gradients(path, *inputs_and_dy):
    *leaves, dy = (t.clone().requires_grad_() for t in inputs_and_dy)
    y = scan_path(path)(*leaves)
    return dict(zip(("y", "x", "dt", "A", "B", "C", "D"), (y.detach(), *torch.autograd.grad(y, leaves, dy.detach()))))


# ---------------------------------------------------------------------------------------------------------------------
# ssd and train: the operation, one layer, the whole model

N = {"mamba": 16, "mamba2": 64, "s4": 64, "s4d": 64, "attention": 16}  # state sizes; attention has none
CHUNK = 64  # transformers' Mamba-2: the fastest of 16 .. 256 on a CPU, 256 being its default


def make_ssd(path, b, l, nh, p, n, device):
    """The operation with one group, dt up to 0.1 and A = -1 .. -nh, as transformers begins."""
    x, B, C, dy = (torch.randn(s, device=device) for s in ((b, l, nh, p), (b, l, 1, n), (b, l, 1, n), (b, l, nh, p)))
    dt, A = torch.rand(b, l, nh, device=device) * 0.1, -torch.arange(1.0, nh + 1, device=device)
    inputs = [x, dt, A, B, C, torch.ones(nh, device=device)]
    if path != "transformers":
        return forward_and_backward(lambda *inputs: ssd(*inputs, impl=path)[0], inputs, dy)
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    return forward_and_backward(lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, CHUNK, D), inputs, dy)


def our_config(layer, d_model, n_layer):
    """Layers of three kinds with equally many parameters, to 2 %: SwiGLU is what brings attention up to the others."""
    name = "attention+mlp" if layer == "attention" else layer
    return Config((name,) * n_layer, d_model=d_model, d_state=N[layer], head_dim=min(64, d_model),
                  d_mlp=d_model * 7 // 8)


def transformers_config(layer, d_model, n_layer):
    """The same shapes there. Its Mamba takes mambapy's scan: its loop, and its scan under torch.compile, are slower."""
    import transformers
    sizes = {"hidden_size": d_model, "num_hidden_layers": n_layer, "vocab_size": 256, "state_size": N[layer]}
    if layer == "mamba":
        return transformers.MambaConfig(**sizes, use_mambapy=True)
    p = min(64, d_model)
    return transformers.Mamba2Config(**sizes, head_dim=p, num_heads=2 * d_model // p, n_groups=1, chunk_size=CHUNK,
                                     tie_word_embeddings=True)


def make_layer(path, b, l, d_model, device):
    """A mixer; attention comes with its SwiGLU, its norms and residual sums."""
    if path == "transformers mamba2":
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
        f = layer = Mamba2Mixer(transformers_config("mamba2", d_model, 1), 0)
    else:
        kinds = {**MIXERS, "attention": lambda config: Block(config, "attention+mlp")}
        layer = kinds[path](our_config(path, d_model, 1))
        f = lambda x: layer(x)[0]
    layer.to(device).train()
    x, dy = torch.randn(2, b, l, d_model, device=device)
    return forward_and_backward(f, [x.clone()], dy, layer.parameters())


def language_model(path, d_model, n_layer):
    """(model, function from tokens to logits) for "mamba2", "transformers mamba", ..."""
    who, layer = path.split() if " " in path else ("ours", path)
    if who == "mambapy":  # its own LM cannot be imported without the CUDA package
        from mambapy.mamba import Mamba as Body, MambaConfig, RMSNorm
        model = nn.Sequential(nn.Embedding(256, d_model), Body(MambaConfig(d_model=d_model, n_layers=n_layer)),
                              RMSNorm(d_model), nn.Linear(d_model, 256, bias=False))
        model[3].weight = model[0].weight
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


def compare_training(paths, b, l, d_model, kinds, c, n_layer=4):
    args = {"b": b, "l": l, "d_model": d_model, "n_layer": n_layer}
    cells = [Cell(p, make_train, {"path": p, **args}, kind, b * l) for kind in kinds for p in paths]
    return compare("training", args, cells, c)


def bench_ssd(c):
    """d_model 256, 8 heads of 64, n = 64; as many bytes a call, however they are cut into windows."""
    shapes, d_model = (((2, 64),), 32) if c.quick else (((8, 512), (2, 2048), (1, 8192)), 256)
    heads, rows = {"nh": 2, "p": 8, "n": 4} if c.quick else {"nh": 8, "p": 64, "n": 64}, []
    for b, l in shapes:
        size = {"b": b, "l": l}
        paths = ["chunked", "transformers"] + ["quadratic", "naive"] * (l <= 2048)  # longer ones need tens of GB
        rows += compare("ssd", size, [Cell(p, make_ssd, {"path": p, **size, **heads}, work=b * l) for p in paths], c)
        args = {**size, "d_model": d_model}
        paths = ("mamba2", "mamba", "attention", "transformers mamba2")
        rows += compare("layer", args, [Cell(p, make_layer, {"path": p, **args}, work=b * l) for p in paths], c)
        rows += compare_training(paths, b, l, d_model, kinds_of_memory(c, "kept"), c)
    return rows


def bench_train(c):
    """4 layers of width 256, 8 windows of 512 bytes."""
    b, l, d_model = (2, 32, 32) if c.quick else (8, 512, 256)
    paths = ("mamba2", "mamba", "attention", "mambapy mamba", "transformers mamba", "transformers mamba2")
    return compare_training(paths, b, l, d_model, kinds_of_memory(c, "default", "kept"), c)


# ---------------------------------------------------------------------------------------------------------------------
# decode


def peer_step(path, model):
    """(function of token (1, 1) and state to logits (1, v) and state, the state before the first token)."""
    if path.startswith("transformers"):
        def step(token, cache):
            out = model(token, cache_params=cache, use_cache=True)
            return out.logits[:, -1], out.cache_params
        return step, lambda: None
    embedding, body, norm, head = model
    d, n, k = body.config.d_inner, body.config.d_state, body.config.d_conv

    def step(token, caches):
        x, caches = body.step(embedding(token[:, 0]), list(caches))
        return head(norm(x)), caches

    zeros = functools.partial(torch.zeros, device=head.weight.device)
    return step, lambda: [(zeros(1, d, n), zeros(1, d, k - 1)) for _ in body.layers]


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
        step = compile_step(model, token) if compiled else None
        return {"writing": lambda: list(generate(model, token, count, filter_logits, step=step))}
    step, state = peer_step(path, model)
    step = torch.compile(step) if compiled else step
    functions = write(step, lambda: step(token, state()), count)
    if compiled:
        functions["writing"]()
    return functions


def write_after(model, tokens, count):
    """A function that draws count bytes after tokens, which are read in the first call: the others rest meanwhile."""
    def step(token, state):
        logits, state = model(token, state)
        return logits[:, -1], state

    return write(step, functools.cache(lambda: prefill(model, tokens)), count)


def make_context(path, context, count, d_model, n_layer, device):
    """count bytes after a context, whose state every call begins from; attention's window is unlimited."""
    model, _ = language_model(path, d_model, n_layer)
    model.to(device).eval()
    tokens = torch.randint(256, (1, context), device=device)

    return write_after(model, tokens, count)


def bench_decode(c):
    """Batch 1, 4 layers of width 256."""
    size = {"count": 4, "d_model": 32, "n_layer": 1} if c.quick else {"count": 64, "d_model": 256, "n_layer": 4}
    paths = ("mamba", "mamba2", "attention", "mambapy mamba", "transformers mamba")
    cells = [Cell(p + ", compiled" * compiled, make_decode, {"path": p, "compiled": compiled, **size},
                  work=size["count"]) for compiled in (False, True) for p in paths]
    rows = compare("decoding", size, cells, c)
    for context in (16,) if c.quick else (256, 2048, 8192):
        args = {"context": context, **size}
        cells = [Cell(p, make_context, {"path": p, **args}, work=size["count"]) for p in ("mamba2", "attention")]
        rows += compare("decoding after a context", args, cells, c)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# robust: no times, but what the text costs

TRAINED = {"mamba": "out/robust_mamba", "attention": "out/robust_attention"}  # by the commands in the README
NOISES = ("", "drop:0.05", "drop:0.3", "repeat:0.05", "repeat:0.3", "antspeak", "upper", "random_case", "swap:0.05",
          "swap:0.3")  # as MambaByte's table has them


def bench_robust(c):
    """MambaByte's robustness: noise of several kinds, and texts 64 times as long as the windows of training."""
    rows = []
    for name, path in TRAINED.items():
        if c.quick:
            model, seq_len, data = LM(our_config(name, 32, 1)), 16, "this file"
            val = np.frombuffer(Path(__file__).read_bytes()[:2000], np.uint8)
        else:
            model, extra = load(path)
            seq_len, data = extra["flags"]["seq_len"], extra["flags"]["data"]
            val = load_corpus(data).val
        size = {"path": name, "memory": "default", "data": data, "seq_len": seq_len,
                "parameters": sum(p.numel() for p in model.parameters())}
        rows += [{**size, **row} for row in (*noise_rows(model, val, seq_len), *length_rows(name, model, val, seq_len))]
    return rows


def noise_rows(model, val, seq_len):
    rows = []
    print(f"\n{'noise':14}{'bits per byte':>15}{'bits per word':>15}{'perplexity of a word':>22}")
    for noise in NOISES:
        text = corrupt(val, noise)
        bits = evaluate(model, text, seq_len, 16)[0] * len(text)
        words = len(bytes(val).split())  # of the clean text: noise makes no words
        rows.append({"table": "noise", "noise": noise or "none", "bpb": bits / len(text), "bits_per_word": bits / words,
                     "word_perplexity": word_perplexity(bits, val)})
        print(f"{noise or 'none':14}{bits / len(text):15.3f}{bits / words:15.3f}{rows[-1]['word_perplexity']:22.4g}")
    return rows


def length_rows(name, model, val, seq_len):
    """By position, over 6 windows of 64 times the length; Mamba in windows of its training has one figure for all."""
    length, curves = min(64 * seq_len, len(val)), {}
    stride = max(1, (len(val) - length) // 5)
    if name == "mamba":
        curves["plain"] = by_position(window_nats(model, val, length, stride, 1))
        sliding = sliding_bpb(window_nats(model, val, seq_len, seq_len // 2, 16), seq_len // 2)
        curves["windowed"] = [(a, b, sliding) for a, b, _ in curves["plain"]]
    else:
        for curve, window in (("plain", 0), ("windowed", seq_len)):
            for layer in model.layers:
                layer.mixer.window = window
            piece = 512 if window else length  # in one piece, attention without a window needs no mask in memory
            curves[curve] = by_position(window_nats(model, val, length, stride, 1, piece=piece))
    for curve, parts in curves.items():
        print(f"{name}, {curve}: " + ", ".join(f"to {b:,} {bpb:.3f}" for _, b, bpb in parts))
    return [{"table": "position", "path": f"{name}, {curve}", "from": a, "to": b, "bpb": bpb}
            for curve, parts in curves.items() for a, b, bpb in parts]


# ---------------------------------------------------------------------------------------------------------------------
# published: a checkpoint of the size that MambaByte released


def make_published(path, folder, device):
    """Reading the file; reading every weight as often as bytes are written, which no writing can beat; writing."""
    if path == "load":
        return {"loading": lambda: load(folder, device)}
    model, _ = load(folder, device)
    if path == "read":
        weights = [p for name, p in model.named_parameters() if name != "embedding.weight"]  # of that one row is read
        return {"writing": torch.inference_mode()(lambda: [p.sum() for _ in range(WRITTEN) for p in weights])}

    def step(token, state):
        logits, state = model(token, state)
        return logits[:, -1], state

    start = torch.inference_mode()(step)(torch.tensor([[10]]), None)
    return write(step, lambda: start, WRITTEN)


WRITTEN = 8  # bytes a call: the first one after another process has run is slow for both


def bench_published(c):
    """Random weights in MambaByte-353M's shape, float32, written once to a temporary folder in both kinds of file."""
    config = (Config(("mamba",) * 2, d_model=32, norm="layer", tie=False) if c.quick else
              Config(("mamba",) * 53, d_model=1024, norm="layer", tie=False))
    with tempfile.TemporaryDirectory() as folder:
        model = LM(config)
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        save(folder, model, "state-spaces")
        del model
        args = {"path": "load", "folder": folder}
        return compare("published", {"weights_mb": round(size / 1e6)}, [
            Cell("load", make_published, args),
            Cell("every weight read for each", make_published, {**args, "path": "read"}, work=WRITTEN),
            Cell("mamba", make_published, {**args, "path": "write"}, work=WRITTEN)], c)


# ---------------------------------------------------------------------------------------------------------------------
# distill: a transformer, its students, and the same students without it
#
# Every model is a run in a folder of its own, which a second call goes on with: after Ctrl-C repeat the command.

SHARES = (0.5, 0.25, 0.125, 0.0)  # of the layers that stay attention
RUNS = Path("out/bench_distill")


def distillation_runs(root, quick):
    """(folder, script, flags) of every run, in an order in which they can be made.

    A student reads a fifth of its teacher's bytes: a quarter of them to align its layers, the others end to end. From
    scratch it reads as many, or half as many more, which takes longer than distillation with the teacher's reading.
    """
    data, shape = "--data shakespeare --seq_len 256", "--n_layer 8 --d_model 64 --n_head 2 --batch_size 16 --steps 600"
    align, rest, batch = 60, 180, 8
    if quick:
        data, shape = (f"--data {Path(__file__)} --seq_len 16",
                       "--n_layer 2 --d_model 16 --n_head 2 --batch_size 4 --steps 8")
        align, rest, batch = 2, 4, 2
    runs = [(root / "teacher", train, f"--layer attention {shape} --lr 3e-3 {data}")]
    for share in SHARES:
        student = f"--teacher {root / 'teacher'} --keep_attention {share} --batch_size {batch} --warmup 10 {data}"
        for init in ("attention", "random"):
            done = root / f"{share}_{init}"
            runs.append((aligned(done), distill, f"{student} --init {init} --stage align --lr 1e-2 --steps {align}"))
            runs.append((done, distill, f"{student} --student {aligned(done)} --lr 8e-3 --steps {rest}"))
        scratch = f"{student} --init scratch --kl 0 --ce 1"
        runs.append((root / f"{share}_scratch", distill, f"{scratch} --steps {align + rest}"))
        runs.append((root / f"{share}_scratch_longer", distill, f"{scratch} --steps {3 * (align + rest) // 2}"))
    return runs


def aligned(folder):
    """The run of a student's first stage."""
    return folder.with_name(folder.name + "_aligned")


def stages(folder):
    """The last lines of the logs of a model's stages."""
    logs = [f / "log.jsonl" for f in (aligned(folder), folder)]
    return [json.loads(log.read_text().splitlines()[-1]) for log in logs if log.exists()]


def last_loss(folder, count=20):
    """Mean loss in bits of a run's last steps; students of one teacher read the same windows in them."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return statistics.mean([line["train_bpb"] for line in lines if line["train_bpb"] is not None][-count:])


def make_run(folder, script, flags):
    """Train what is not trained yet: only a run's end validates, and so writes best.pt."""
    if (folder / "best.pt").exists():
        return
    print(f"\n{folder.name}", flush=True)
    resume = ["--resume"] * (folder / "last.pt").exists()
    if status := script.main([*flags.split(), "--out", str(folder), *resume]):
        raise SystemExit(status)  # stopped, or what is wrong has been said


def describe_run(folder):
    """A row: bits per byte before the first step, after alignment and at the end; the divergence from the teacher that
    is left; bytes and seconds of all; recall."""
    model, extra = load(folder)
    done, val = stages(folder), load_corpus(extra["flags"]["data"]).val
    gaps = (64, 1024) if "scratch" not in folder.name else ()
    row = {"table": "distillation", "model": folder.name, "parameters": sum(p.numel() for p in model.parameters()),
           "val_bpb": done[-1]["val_bpb"], "bytes": sum(stage["bytes"] for stage in done),
           "seconds": sum(stage["seconds"] for stage in done), "recall": {gap: recall(model, val, gap) for gap in gaps}}
    if len(done) > 1:
        row |= {"first_bpb": beginning(load(aligned(folder))[1]["flags"], val), "aligned_bpb": done[0]["val_bpb"],
                "kl": last_loss(folder)}
    print(f"  {folder.name:22}" + "".join(f"{row[k]:9.4f}" if k in row else f"{'':9}" for k in BPB)
          + f"{row['bytes']:11,}{row['seconds']:7.0f}" + "".join(f"{bits:9.3f}" for bits in row["recall"].values()),
          flush=True)
    return row


BPB = ("first_bpb", "aligned_bpb", "val_bpb", "kl")


def beginning(flags, val):
    """Bits per byte of a student as it was made."""
    teacher = load(flags["teacher"])[0]
    torch.manual_seed(flags["seed"])
    student = make_student(teacher, flags["layer"], flags["keep_attention"], flags["init"])
    return evaluate(student, val, flags["seq_len"], 16)[0]


@torch.inference_mode()
def recall(model, val, gap, count=32, size=64, cue=16):
    """Bits per byte that a model saves on the rest of a passage, after its first bytes, the cue, if the passage has
    stood gap bytes before, against another passage having stood there."""
    once, other = (torch.from_numpy(windows(val, size, count, 0, step)) for step in (0, 1))
    between, bits = torch.from_numpy(windows(val, gap, count, 0, 2)), []
    for first in (other, once):
        logits, _ = model(torch.cat([first, between, once], dim=1))
        nats = F.cross_entropy(logits[:, cue - size - 1:-1].flatten(0, 1), once[:, cue:].flatten()).item()
        bits.append(nats / math.log(2))
    return bits[0] - bits[1]


def make_distillation(path, share, b, l, d_model, n_layer, device):
    """A step of the student: of plain training, or of a stage of distillation, the teacher's reading included."""
    config = Config(("attention+mlp",) * n_layer, d_model=d_model, n_head=2, n_kv_head=2, window=l)
    teacher = LM(config).to(device).eval()
    student = make_student(teacher, "mamba2", share, "attention").to(device).train()
    c, mixers = distill.Flags(stage="align" if path == "align" else "all"), replaced(student, teacher)
    freeze(student, c.stage, mixers)
    loss_of = prediction_loss if path == "training" else make_loss(c, teacher, mixers)
    optimizer, batch = make_optimizer(student, c.lr, c.weight_decay), torch.randint(256, (b, 2, l), device=device)
    return {"step": lambda: train_step(student, optimizer, batch, c, contextlib.nullcontext(), c.lr, loss_of)}


def unlimited(folder, device="cpu"):
    """A run's model, attention seeing all that was read."""
    model, _ = load(folder, device)
    wide = LM(dataclasses.replace(model.config, window=0)).to(device).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def make_run_context(path, root, context, count, device):
    """count bytes after a context, by a run's model."""
    return write_after(unlimited(Path(root) / path, device), torch.randint(256, (1, context), device=device), count)


def state_mb(folder, context):
    """What a model keeps after context bytes."""
    _, state = prefill(unlimited(folder), torch.randint(256, (1, context)))
    return sum(t.numel() * t.itemsize for layer in state for t in layer) / 1e6


def bench_distill(c):
    """The README's table: see distillation_runs; then speed and memory of writing, and the price of a step."""
    root = Path(tempfile.mkdtemp()) if c.quick else RUNS
    size = ({"b": 2, "l": 16, "d_model": 16, "n_layer": 2} if c.quick else
            {"b": 8, "l": 256, "d_model": 64, "n_layer": 8})
    rows, names = [], ["teacher", *(f"{share}_attention" for share in SHARES)]
    for run in distillation_runs(root, c.quick):
        make_run(*run)
    print(f"\n  {'':22}" + "".join(f"{k:>9}" for k in ("first", "aligned", "end", "KL"))
          + f"{'bytes':>11}{'s':>7}   recall at 64, 1,024")
    rows += [describe_run(run[0]) for run in distillation_runs(root, c.quick) if not run[0].name.endswith("aligned")]
    for share in SHARES:
        cells = [Cell(p, make_distillation, {"path": p, "share": share, **size}, kind, size["b"] * size["l"])
                 for kind in kinds_of_memory(c, "kept") for p in ("training", "align", "all")]
        rows += compare("distillation step", {"share": share}, cells, c)
    for context in (16,) if c.quick else (256, 2048, 8192):
        cells = [Cell(n, make_run_context, {"path": n, "root": str(root), "context": context, "count": 32}, work=32)
                 for n in names]
        found = compare("writing after a context", {"context": context}, cells, c)
        for row in found:
            row["state_mb"] = state_mb(root / row["path"], context)
        print("    state MB: " + ", ".join(f"{row['path']} {row['state_mb']:.2f}" for row in found), flush=True)
        rows += found
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# gpu

GPU_SHAPES = ((8, 2048, 1536, 16), (1, 65536, 1536, 16), (64, 512, 768, 16), (8, 2048, 1536, 64))  # b, l, d, n
GPU_PATHS = ("triton", "mamba-ssm", "chunked", "parallel", "naive", "mambapy pscan")


@_kernel()
def _exp_kernel(out, ROUNDS: tl.constexpr):
    """1,024 numbers a program, each through 8 ROUNDS exponentials, that stay between 0 and 1."""
    at = tl.arange(0, 1024)
    z = at / 1024.0
    for _ in range(ROUNDS):
        for _ in tl.static_range(8):
            z = tl.exp2(-z)
    tl.store(out + tl.program_id(0) * 1024 + at, z)


def ceilings(device, quick):
    """Bytes/s of a copy and exponentials/s of a kernel that does nothing else, the best of ten."""
    programs, rounds = (2, 1) if quick else (1024, 1024)
    out, a = torch.empty(programs * 1024, device=device), torch.ones(2**12 if quick else 2**30, device=device)
    b = torch.empty_like(a)
    copy = min(timed(lambda: b.copy_(a), device) for _ in range(10))
    exp = min(timed(lambda: _exp_kernel[(programs,)](out, ROUNDS=rounds), device) for _ in range(10))
    return {"bytes_per_second": 8 * len(a) / copy, "exps_per_second": 8 * rounds * len(out) / exp}


def beside_the_floor(rows, peak, b, l, d, n, dtype):
    """To each row what it had to move and compute at least, per second, and its time over that of the slower of both.

    Forward reads x, dt, B, C and writes y, with one exponential a state and step; backward reads those four and dy,
    writes four gradients, and computes the exponentials again.
    """
    for row in rows:
        if "seconds" in row:
            both = row["mode"] != "forward"
            moved = (2 if dtype == "bfloat16" else 4) * b * l * (3 * d + 2 * n + both * (5 * d + 4 * n))
            exps = b * l * d * n * (1 + both)
            floor = max(moved / peak["bytes_per_second"], exps / peak["exps_per_second"])
            row.update(useful_bytes_per_second=moved / row["seconds"], useful_exps_per_second=exps / row["seconds"],
                       times_floor=row["seconds"] / floor)
            print(f"    {row['path']:16}{row['mode']:18}{moved / row['seconds'] / 1e9:10,.0f} GB/s"
                  f"{exps / row['seconds'] / 1e9:10,.0f} G exp/s{row['times_floor']:8.2f} x floor")
    return rows


def make_conv(path, b, l, d, device):
    """The convolution beside the scan, four taps, float32."""
    x, taps, bias, dy = (torch.randn(s, device=device) for s in ((b, l + 3, d), (4, d), (d,), (b, l, d)))
    f = {"triton": triton_conv, "shifted products": _CausalConv.apply,
         "F.conv1d": lambda x, taps, bias: F.conv1d(x.mT, taps.T[:, None], bias, groups=d).mT}[path]
    return forward_and_backward(f, [x, taps, bias], dy)


def make_captured(captured, b, count, sizes, device):
    """count bytes for each of b texts, by MambaByte's model in bfloat16; the step captured or launched from Python."""
    model = LM(Config(**sizes)).to(device).eval()
    tokens = torch.full((b, 1), 10, device=device)
    cast = torch.autocast(device.type, torch.bfloat16)
    cast.__enter__()  # for as long as this process lives: it keeps the narrowed weights
    with torch.inference_mode():
        step = capture_step(model, tokens, model(tokens)[1]) if captured else None
    return {"writing": lambda: list(generate(model, tokens, count, filter_logits, step=step))}


def bench_gpu(c):
    """The kernels beside every other path, in float32 and bfloat16, and the official kernel where mamba-ssm imports."""
    if not c.quick:
        if not torch.cuda.is_available():
            raise UserError("gpu needs a CUDA GPU, and torch finds none here; "
                              "on a CPU: python -m tests.bench scan, or gpu --quick with TRITON_INTERPRET=1")
        c = dataclasses.replace(c, device="cuda")
    device = pick_device(c.device)
    peak = ceilings(device, c.quick)
    torch.cuda.empty_cache()  # 8 GB, which the cells' processes may need
    rows = [{"table": "ceilings", **peak}]
    print(f"measured ceilings: {peak['bytes_per_second'] / 1e9:,.0f} GB/s, "
          f"{peak['exps_per_second'] / 1e9:,.0f} G exp/s")
    for dtype in ("float32", "bfloat16"):
        for b, l, d, n in ((2, 9, 3, 4),) if c.quick else GPU_SHAPES:
            sizes = {"b": b, "l": l, "d": d, "n": n, "dtype": dtype}
            paths = [p for p in GPU_PATHS if l <= 2048 or p != "naive"]
            cells = [Cell(p, make_scan, {"path": p, **sizes}) for p in paths]
            rows += beside_the_floor(compare("selective scan", sizes, cells, c), peak, **sizes)
        rows += scan_errors(c, GPU_PATHS[:4], dtype)
    for b, l, d in ((2, 9, 3),) if c.quick else [shape[:3] for shape in GPU_SHAPES[:3]]:
        sizes = {"b": b, "l": l, "d": d}
        cells = [Cell(p, make_conv, {"path": p, **sizes}) for p in ("triton", "shifted products", "F.conv1d")]
        rows += compare("convolution", sizes, cells, c)
    size = (2, 9, 16) if c.quick else (8, 2048, 768)
    rows += compare_training(("mamba", "transformers mamba"), *size, ("default",), c, n_layer=1 if c.quick else 24)
    sizes = dict(layers=("mamba",) * (1 if c.quick else 53), d_model=16 if c.quick else 1024, norm="layer", tie=False)
    weights = sum(p.numel() for name, p in LM(Config(**sizes)).named_parameters() if name != "embedding.weight")
    for b in (1, 64):
        count = 2 if c.quick else 256
        cells = [Cell("captured" if captured else "eager", make_captured,
                      {"captured": captured, "b": b, "count": count, "sizes": sizes}, work=b * count)
                 for captured in (True, False) if not (captured and device.type == "cpu")]
        limit = b * peak["bytes_per_second"] / (2 * weights)  # every weight crosses memory once a step, as bfloat16
        print(f"\nevery weight once a step: at most {limit:,.0f} bytes/s")
        rows += [{**row, "limit": limit} for row in compare("decoding, 353M", {"b": b, "count": count}, cells, c)]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# s4


def make_kernel(path, l, d, n, device):
    """S4D's kernel: a product of two small matrices, or all n l d exponentials."""
    dt, A = torch.rand(d, device=device) / 10, s4d_init("lin", 2 * n)[0].to(device, torch.complex64).repeat(d, 1)
    C, dK = torch.randn(d, n, dtype=torch.complex64, device=device), torch.randn(d, l, device=device)

    def written_out(dt, A, C):
        Abar, Bbar = discretize(dt[:, None], A, 1.0, "zoh")
        return ((C * Bbar)[..., None] * Abar[..., None] ** torch.arange(l, device=device)).sum(1).real

    f = written_out if path == "written out" else lambda dt, A, C: s4d_kernel(dt, A, 1.0, C, l)
    return forward_and_backward(f, [dt, A, C], dK)


def step_errors(lengths):
    """Largest difference of the convolution from the recurrence, both float32, in a layer as it begins; n = 64."""
    rows = []
    print(f"\nconvolution against recurrence, float32, largest |difference|{'largest |y|':>24}")
    for layer in ("s4d", "s4"):
        torch.manual_seed(0)
        mixer = MIXERS[layer](Config((layer,), d_model=64, d_state=64))
        for l in lengths:
            x = torch.randn(1, l, 64)
            with torch.no_grad():
                y, h = mixer.systems(x, None)
                steps, states = [], None
                for x_t in x.split(1, dim=1):
                    y_t, states = mixer.systems(x_t, states)
                    steps.append(y_t)
            error = (y - torch.cat(steps, dim=1)).abs().max().item()
            rows.append({"table": "error", "path": layer, "l": l, "error": error, "largest": y.abs().max().item()})
            print(f"  {layer:8}l = {l:<8,}{error:12.1e}{rows[-1]['largest']:36.2f}")
    return rows


def reconstructions():
    """What HiPPO-LegS with n numbers remembers of a signal, by age."""
    dt, steps, rows = 2e-3, 3000, []
    time_ = dt * torch.arange(steps, dtype=torch.float64)
    x = torch.sin(2 * time_) + torch.exp(-8 * (time_ - 4.5) ** 2) - (time_ > 5.3).double()
    shown = range(0, 2000, 10)
    age = dt * (torch.tensor(shown, dtype=torch.float64) + 0.5)
    curves = {"the signal": x.flip(0)[list(shown)]}
    for n in (8, 32, 128):
        Abar, Bbar = discretize_dense(dt, *hippo_legs(n), "bilinear")
        h = torch.zeros(n, dtype=torch.float64)
        for x_t in x:
            h = Abar @ h + Bbar * x_t
        curves[f"from {n} numbers"] = legs_basis(age, n) @ h
    for path, values in curves.items():
        rows += [{"table": "legs", "path": path, "memory": "default", "age": a, "value": v}
                 for a, v in zip(age.tolist(), values.tolist())]
    return rows


def bench_s4(c):
    """S4D's kernel with d = 256 and 32 modes; training with layers of width 256; errors and memories."""
    size = {"d": 8, "n": 4} if c.quick else {"d": 256, "n": 32}
    rows = []
    for l in (32,) if c.quick else (1024, 4096):
        paths = ("two small matrices", "written out")
        rows += compare("s4d kernel", {**size, "l": l},
                        [Cell(p, make_kernel, {"path": p, "l": l, **size}) for p in paths], c)
    b, l, d_model = (2, 32, 32) if c.quick else (8, 512, 256)
    paths = ("mamba", "mamba2", "s4d", "s4", "attention")
    args = {"b": b, "l": l, "d_model": d_model}
    rows += compare("layer", args, [Cell(p, make_layer, {"path": p, **args}, kind, b * l)
                                    for kind in kinds_of_memory(c, "kept") for p in paths], c)
    rows += compare_training(paths, b, l, d_model, kinds_of_memory(c, "kept"), c)
    return rows + step_errors((7,) if c.quick else (64, 1024, 4096)) + reconstructions()


# ---------------------------------------------------------------------------------------------------------------------
# selection


def selection_runs(root, quick):
    """(folder, flags) of every run. What is trained in windows of 256 begins with the weights of a run in short ones:
    1 to 4 targets in 256 letters may teach nothing in minutes."""
    runs, quickly = [], " --steps 2" * quick
    for task, short, then in (("selective_copy", 64, "--lr 5e-3 --steps 800"),
                              ("induction", 32, "--lr 2e-3 --steps 300")):
        for layer in ("mamba", "s4d"):
            folder = root / f"{task}_{layer}_{short}"
            runs.append((folder, f"--data {task} --layer {layer} --d_model 64 --n_layer 2 --seq_len {short} "
                                 f"--batch_size {2048 // short} --lr 5e-3 --steps 800{quickly}"))
            runs.append((root / f"{task}_{layer}", f"--data {task} --init {folder} --seq_len 256 --batch_size 16 "
                                                   + then + quickly))
    return runs


def accuracy(model, task, length, count):
    """Share of the targets guessed right in count windows, read piece by piece with the state carried along."""
    tokens, targets = (torch.from_numpy(t) for t in TASKS[task](length, count, 2**63, length))
    size, right, state = max(1, 2**16 // count), 0, None
    with torch.inference_mode():
        for t, y in zip(tokens.split(size, dim=1), targets.split(size, dim=1)):
            logits, state = model(t, state)
            right += (logits.argmax(-1) == y).sum().item()
    return right / (targets != NO_TARGET).sum().item()


def bench_selection(c):
    """Two layers of width 64, trained in windows of 256 in a few minutes a run; then windows of up to 65,536."""
    rows = []
    for folder, flags in selection_runs(Path("out/selection" + "_quick" * c.quick), c.quick):
        make_run(folder, train, flags)
        task, _, layer = folder.name.rpartition("_")
        if task not in TASKS:
            continue
        model, extra = load(folder / "last.pt")
        longest = 64 if c.quick else 2**16 if task == "induction" and layer == "mamba" else 2**14
        for length in (2**i for i in range(6, 17, 2) if 2**i <= longest):
            count = min(256, 2**20 // length)
            rows.append({"table": task, "path": layer, "memory": "default", "length": length, "windows": count,
                         "accuracy": accuracy(model, task, length, count), "steps": extra["step"],
                         "parameters": sum(p.numel() for p in model.parameters())})
            print(f"{task:16}{layer:12}length {length:>9,}{rows[-1]['accuracy']:9.1%} of {count} windows", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# speculate: in one process, plain and speculative writing in turn

SPECULATION = {"target": "--d_model 160 --n_layer 12", "words": "--n_layer 1 --bpe 1024 --seq_len 256",
               "bytes": "--n_layer 1"}  # train.py's flags: what README says
LENGTHS = {"counts": (8, 12, 4, 16, 2), "ngram": (16, 8, 4, 32, 2), "bytes": (6, 8, 4, 2, 1),
           "words": (4, 3, 2, 6, 1)}  # the most interesting first


def speculation_model(name, folder, quick):
    """(model, extra) of a run in folder, trained now if it is not there; a run that was stopped is resumed."""
    flags, last = SPECULATION[name].split(), folder / name / "last.pt"
    if quick:
        flags = ("--d_model 16 --head_dim 8 --n_layer 1 --steps 2 --seq_len 64 --data scan.py "
                 f"{'--bpe 9' * (name == 'words')}").split()
    steps = parse(train.Flags, flags, "")[0].steps
    if not last.exists() or load(last)[1]["step"] < steps:
        if train.main([*flags, "--out", str(folder / name), *["--resume"] * last.exists()]):
            raise UserError(f"{folder / name} is not trained yet; run this again to go on")
    return load(last)


def make_drafter(name, folder, corpus, quick):
    if name in WITHOUT_MODEL:
        return WITHOUT_MODEL[name](corpus.train)
    model, extra = speculation_model(name, folder, quick)
    return SubwordDrafter(model, BPE(extra["merges"])) if name == "words" else ByteDrafter(model)


def write_both(model, drafter, prompts, count, k, temperature, rule="exact", to_boundary=False):
    """One row: speculative writing after every prompt, and plain writing of as many bytes beside it."""
    law, stats, plain = functools.partial(filter_logits, temperature=temperature), Stats(), 0.0
    for seed, prompt in enumerate(prompts):
        g = torch.Generator().manual_seed(seed)
        drafter.states = drafter.texts = None  # a new text
        for _ in speculate(model, prompt, count, law, drafter, k, RULES[rule], g, stats, to_boundary):
            pass
        began = time.perf_counter()
        for _ in generate(model, prompt, count, law, g):
            pass
        plain += time.perf_counter() - began
    bytes_, seconds = sum(a + 1 for _, a in stats.rounds), stats.drafting + stats.verifying
    return {"bytes_per_call": bytes_ / stats.calls, "guessed_per_call": sum(n for n, _ in stats.rounds) / stats.calls,
            "acceptance": stats.acceptance()[:16], "ms_per_byte": 1e3 * seconds / bytes_,
            "drafting_share": stats.drafting / seconds, "call_ms": 1e3 * stats.verifying / stats.calls,
            "plain_ms_per_byte": 1e3 * plain / (count * len(prompts)),
            "speedup": plain / (count * len(prompts)) * bytes_ / seconds}


def time_rollbacks(model, prompt, k=8, accepted=4):
    """Ways to have the state after 4 accepted of 8 guesses: ms a round, and bytes of state that are held meanwhile."""
    _, old = prefill(model, prompt)
    text = torch.cat([prompt, prompt], dim=1)
    size, l = sum(t.nbytes for layer in old for t in layer), prompt.shape[1]

    def steps():
        state, kept = old, []
        for i in range(k + 1):
            _, state = model(text[:, l + i:l + i + 1], state)
            kept.append(state)

    ways = {"read again in the next call": (lambda: read(model, text, [l], [l + accepted + 1], k, old), 1),
            "read again at once": (lambda: [model(text[:, l:l + n], old) for n in (k + 1, accepted + 1)], 1),
            "a state at every position": (steps, k + 1)}
    rows = []
    for way, (f, states) in ways.items():
        times = sorted(timed(torch.inference_mode()(f), torch.device("cpu")) for _ in range(9))
        rows.append({"table": "rollback", "path": way, "ms": 1e3 * times[4], "state_bytes": states * size})
        print(f"  {way:32}{1e3 * times[4]:8.2f} ms{states * size / 1e3:10,.0f} kB of state")
    return rows


def time_compiled(model, prompts, count):
    """Plain writing with --compile beside plain writing, temperature 1; no row where there is no compiler."""
    began = time.perf_counter()
    try:
        step = compile_step(model, prompts[0][:, :1])
    except UserError as e:
        print(e)
        return []
    row = {"table": "compiled", "compiling_seconds": time.perf_counter() - began}
    for name, f in (("ms_per_byte", step), ("plain_ms_per_byte", None)):
        began = time.perf_counter()
        for prompt in prompts:
            list(generate(model, prompt, count, filter_logits, torch.Generator().manual_seed(0), f))
        row[name] = 1e3 * (time.perf_counter() - began) / (count * len(prompts))
    print(f"plain, compiled in {row['compiling_seconds']:.0f} s: {row['ms_per_byte']:.2f} ms a byte, "
          f"eager {row['plain_ms_per_byte']:.2f}")
    return [row]


def bench_speculate(c):
    """Bytes per call of the target, and time against plain writing, by drafter, guesses, temperature and rule."""
    keep_memory()
    folder, corpus = Path("out") / f"speculate{'_quick' * c.quick}", load_corpus("scan.py" if c.quick else "python")
    target, _ = speculation_model("target", folder, c.quick)
    kept = folder / "rows.jsonl"  # a row at once, so that nothing is measured twice
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    count, starts = (8, (0,)) if c.quick else (200, (50_000, 200_000, 350_000))
    prompts = [torch.tensor([corpus.val[s:s + 100].tolist()]) for s in starts]
    cells = [{"path": path, "k": lengths[i], "temperature": temperature} for i in range(1 if c.quick else 5)
             for path, lengths in LENGTHS.items() for temperature in (1.0, 0.0, 0.5)[:2 if i else 3]]
    cells += [{"path": "words", "k": 4, "temperature": t, **how} for t in (1.0, 0.0)
              for how in ({"rule": "point_mass"}, {"rule": "top_beta"}, {"to_boundary": True})]
    drafters = {}
    print(f"{'drafter':10}{'k':>3}{'temp.':>7}  {'':12}{'bytes/call':>11}"
          f"{'guessed':>9}{'ms/byte':>9}{'plain':>8}{'ratio':>7}")
    for cell in cells:
        row = next((r for r in rows if cell.items() <= r.items() and len(r) == len(cell) + 9), None)
        if row is None:
            if cell["path"] not in drafters:
                drafters[cell["path"]] = make_drafter(cell["path"], folder, corpus, c.quick)
            drafter = drafters[cell["path"]]
            how = {n: v for n, v in cell.items() if n != "path"}
            if not rows:
                write_both(target, drafter, prompts[:1], 20, **how)  # threads and libraries set up
            row = {"table": "speculation", **cell, **write_both(target, drafter, prompts, count, **how)}
            rows.append(row)
            with open(kept, "a") as f:
                f.write(json.dumps(row) + "\n")
        other = " ".join(str(v) if n == "rule" else n for n, v in cell.items() if n in ("rule", "to_boundary"))
        print(f"{row['path']:10}{row['k']:3}{row['temperature']:7}  {other:12}{row['bytes_per_call']:11.2f}"
              f"{row['guessed_per_call']:9.2f}{row['ms_per_byte']:9.2f}{row['plain_ms_per_byte']:8.2f}"
              f"{row['speedup']:7.2f}", flush=True)
    return rows + time_rollbacks(target, prompts[0]) + time_compiled(target, prompts, count)


# ---------------------------------------------------------------------------------------------------------------------
# figures


def draw(name, rows, x, y, xlabel, ylabel, yscale, xscale="log"):
    """One SVG, a curve for every path and kind of memory; the same bytes for the same rows."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise UserError(f"figures need matplotlib ({e}); pip install matplotlib") from e
    plt.rcParams.update({"svg.hashsalt": "bytestate", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    curves = {}
    for row in rows:
        curves.setdefault((row["path"], row["memory"]), []).append((row[x], y(row)))
    colors = {path: f"C{i}" for i, path in enumerate(dict.fromkeys(path for path, _ in curves))}
    for (path, kind), points in curves.items():
        style = {"default": "o-", "huge pages": "o--", "kept": "o:"}[kind]
        axes.plot(*zip(*points), style if xscale == "log" else "-", color=colors[path], markersize=4,
                  label=path if kind == "default" else None)
    axes.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    if xscale == "log":
        ticks = sorted({row[x] for row in rows})
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axes.set_xticks([], minor=True)
        axes.set_ylim(bottom=0 if yscale == "linear" else None)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)  # beside the curves, not over them
    figure.savefig(ASSETS / name, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {ASSETS / name}")


def measured(name, **wanted):
    """The rows of a benchmark's JSON that have these values."""
    path = ASSETS / f"bench_{name}.json"
    if not path.exists():
        raise UserError(f"{path} is missing; measure first: python -m tests.bench {name}")
    return [row for row in json.loads(path.read_text())["rows"] if wanted.items() <= row.items()]


def draw_errors():
    """assets/gpu_errors.svg: every path's error in y and in its worst gradient, by dtype."""
    rows = [row for row in measured("gpu", table="error", dt_max=5.0) if "errors" in row]
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    places = range(len(rows))
    axes.plot(places, [row["errors"]["y"] for row in rows], "o", label="y")
    axes.plot(places, [max(v for k, v in row["errors"].items() if k != "y") for row in rows], "s",
              label="worst gradient")
    axes.set_xticks(places, [f"{row['path']}\n{row['dtype']}" for row in rows], rotation=45)
    axes.set(yscale="log", ylabel="relative error against float64 (max norm)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(ASSETS / "gpu_errors.svg", metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {ASSETS / 'gpu_errors.svg'}")


def draw_speculation():
    rows = [{**row, "path": f"{row['path']}, temperature {row['temperature']:g}", "memory": "default"}
            for row in measured("speculate", table="speculation") if "rule" not in row and "to_boundary" not in row]
    rows = sorted((row for row in rows if not row["path"].endswith("0.5")), key=lambda row: (row["path"], row["k"]))
    draw("speculate.svg", rows, "k", lambda row: row["speedup"], "guesses: words, or bytes",
         "times as fast as plain writing", "linear")
    draw("speculate_calls.svg", rows, "k", lambda row: row["bytes_per_call"], "guesses: words, or bytes",
         "bytes per call of the model", "linear")


FIGURES = (
    lambda: draw("scan_time.svg", measured("scan", table="selective scan", mode="forward+backward"), "l",
                 lambda row: 1e3 * row["seconds"], "length",
                 "forward and backward, ms\n(dashed: huge pages, dotted: memory kept)", "log"),
    lambda: draw("decode_context.svg", measured("decode", table="decoding after a context", mode="writing"), "context",
                 lambda row: row["ms_per_byte"], "bytes read before", "ms per byte written", "linear"),
    lambda: draw("length.svg", measured("robust", table="position"), "to", lambda row: row["bpb"],
                 "up to this position (trained on the first part)", "bits per byte", "linear"),
    lambda: draw("selective_copy.svg", measured("selection", table="selective_copy"), "length",
                 lambda row: 100 * row["accuracy"], "length (trained on 256)", "selective copying: letters right, %",
                 "linear"),
    lambda: draw("induction.svg", measured("selection", table="induction"), "length",
                 lambda row: 100 * row["accuracy"], "length (trained on 256)", "induction: right, %", "linear"),
    lambda: draw("legs.svg", measured("s4", table="legs"), "age", lambda row: row["value"], "age", "x(now - age)",
                 "linear", "linear"),
    draw_speculation,
    draw_errors)


def figures():
    """The figures of assets/, of what was measured."""
    for figure in FIGURES:
        try:
            figure()
        except UserError as e:
            print(f"no figure: {e}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The command line

BENCHMARKS = {"scan": bench_scan, "ssd": bench_ssd, "train": bench_train, "decode": bench_decode,
              "robust": bench_robust, "published": bench_published, "distill": bench_distill,
              "gpu": bench_gpu, "s4": bench_s4, "selection": bench_selection,
              "speculate": bench_speculate}


def hardware():
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
             "python": platform.python_version(), "torch": torch.__version__}
    for peer in ("mambapy", "transformers", "mamba-ssm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    return found


@script
def main(argv):
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv and not argv[0].startswith("-") else None
    names = "|".join([*BENCHMARKS, "figures"])
    c, _ = parse(Flags, argv[1:] if name else argv, f"Measure: python -m tests.bench {names}")
    if name == "figures":
        return figures()
    if name not in BENCHMARKS:
        raise UserError(f"what to measure is missing or unknown: python -m tests.bench {names}")
    result = {"benchmark": name, "command": " ".join(["python -m tests.bench", *argv]), "hardware": hardware(),
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    print(", ".join(f"{k} {v}" for k, v in result["hardware"].items() if v is not None))
    began = time.perf_counter()
    result["rows"] = BENCHMARKS[name](c)
    print(f"\n{time.perf_counter() - began:.0f} s")
    if c.json or not c.quick:
        path = Path(c.json or ASSETS / f"bench_{name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
