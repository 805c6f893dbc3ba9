"""train.py: what is decayed, exact resume, how validation counts, schedules, and every bad input as one line."""
import ctypes
import dataclasses
import errno
import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import distill
import sample
import train
from data.files import UserError
from model import ENCODER_MIXERS, LM, MIXERS, Config, load
from train import Flags, evaluate, learning_rate, make_optimizer, parameter_groups, prediction_loss

ROOT = Path(train.__file__).parent
TINY = ("--d_model 16 --n_layer 1 --head_dim 8 --d_state 4 --n_head 2 --seq_len 16 --batch_size 4 --steps 4 --warmup 2 "
        "--device cpu").split()
KEYS = ["step", "bytes", "seconds", "train_bpb", "val_bpb", "val_bpb_carried", "val_accuracy", "lr", "bytes_per_second"]
LAYERS = ["mamba", "mamba2", "s4", "s4d", "attention"]
F64 = torch.float64


def argv(corpus, out, *flags):
    return [*TINY, "--data", str(corpus), "--out", str(out), *map(str, flags)]


def go(corpus, out, *flags):
    """A run that must succeed: its log."""
    assert train.main(argv(corpus, out, *flags)) == 0
    return read_log(out)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(log):
    return [line["train_bpb"] for line in log if line["train_bpb"] is not None]


def weights(path):
    return load(path)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(text):
    """The lines of a terminal: a bar that is drawn again starts with a carriage return."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def refused(capsys, flags, *parts, main=train.main):
    """The error that main(flags) must give: one line on stderr that names all parts, status 2."""
    capsys.readouterr()
    assert main(list(map(str, flags))) == 2
    err = capsys.readouterr().err
    errors = [line for line in shown(err) if not re.search(r"\d+% ?\|", line)]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in err, err
    for part in parts:
        assert str(part) in errors[0]
    return errors[0]


def at_step(monkeypatch, step, action):
    """Runs action when the windows of a step are drawn."""
    draw = train.windows

    def windows(data, length, batch, seed, first):
        if first == step * batch and (first or sys._getframe(2).f_code.co_name == "batches"):
            action()  # not in the check before the loop
        return draw(data, length, batch, seed, first)

    monkeypatch.setattr(train, "windows", windows)


# The optimizer


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "attention+mlp", "s4", "s4d"])
@pytest.mark.parametrize("tie", [False, True])
def test_parameter_groups_partition_the_parameters_and_decay_linear_weights_only(layer, tie):
    """Mamba's A_log, D and dt_bias must not be pulled to zero; nor embeddings, norms, biases and the convolution."""
    model = LM(Config((layer,) * 2, d_model=16, head_dim=8, tie=tie))
    groups = parameter_groups(model)
    assert sorted(sum(map(list, groups.values()), [])) == sorted(name for name, _ in model.named_parameters())
    assert all(re.search(r"(proj|lm_head)\.weight$", name) for name in groups["decayed"])
    for name in groups["not decayed"]:
        assert re.search(r"A_log$|\.[CD]$|dt_bias$|embedding\.weight$|conv1d|norm|\.bias$", name), name
    slow = {"s4": ["log_dt", "log_A_real", "A_imag", "P", "B"],
            "s4d": ["log_dt", "log_A_real", "A_imag"]}.get(layer, [])
    assert list(groups.get("slow", [])) == [f"layers.{i}.mixer.{name}" for i in range(2) for name in slow]
    assert ("lm_head.weight" in groups["decayed"]) == (not tie)
    optimizer = make_optimizer(model, 0.1, 0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0, 0][:len(groups)]
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(names) for names in groups.values()]


def test_a_slow_parameter_is_one_that_its_module_declares():
    """Not one of a certain name: a new mixer's B or log_dt learns at the full rate unless the mixer says otherwise."""
    mixer = nn.Module()
    mixer.B, mixer.log_dt = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert parameter_groups(nn.Sequential(mixer)) == {"not decayed": {"0.B": mixer.B, "0.log_dt": mixer.log_dt}}
    mixer.slow = ("log_dt",)
    assert parameter_groups(nn.Sequential(mixer)) == {"not decayed": {"0.B": mixer.B}, "slow": {"0.log_dt": mixer.log_dt}}


def test_parameters_of_s4_learn_at_a_tenth_of_the_learning_rate(corpus, tmp_path, capsys):
    """S4 and S4D train A, B, P and dt with 0.001 beside 0.01; the first lines say so. A resumed run keeps it, and
    decays by its own flags, not by what the optimizer saved."""
    flags = argv(corpus, tmp_path / "run", "--layer", "s4", "--lr", 0.5)
    assert train.main(flags) == 0
    assert train.main([*flags, "--resume", "--steps", "6", "--weight_decay", "0.3"]) == 0
    assert re.search(r"slow +[\d,]+  rate x 0.1  mixer.A_imag .*mixer.log_dt", capsys.readouterr().out)
    decayed, rest, slow = load(tmp_path / "run" / "last.pt")[1]["optimizer"]["param_groups"]
    assert decayed["lr"] == rest["lr"] == pytest.approx(10 * slow["lr"]) and slow["lr"] > 0
    assert [group["weight_decay"] for group in (decayed, rest, slow)] == [0.3, 0, 0]


def test_a_step_without_gradient_shrinks_linear_weights_and_nothing_else():
    torch.manual_seed(0)
    model = LM(Config(("mamba", "mamba2", "attention+mlp"), d_model=16, head_dim=8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.1, 0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head.weight"}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in linear else 1))


def test_learning_rate_warms_up_linearly_and_falls_in_a_line_to_zero():
    c = Flags(lr=2.0, warmup=10)
    assert [learning_rate(c, step, 0) for step in (0, 4, 9, 50)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert [learning_rate(c, 99, progress) for progress in (0.5, 1.0, 1.2)] == pytest.approx([1.0, 0.0, 0.0])
    rates = [learning_rate(c, 99, i / 20) for i in range(21)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(Flags(lr=2.0, warmup=0), 0, 0) == 2.0


# Validation


def direct_bpb(model, data, start_of):
    """Bits per byte, one byte after the other: each from the bytes since start_of(i), the byte before that first."""
    bits, read = 0.0, b"\n" + bytes(data)
    for i, byte in enumerate(bytes(data)):
        logits, _ = model(torch.tensor([list(read[start_of(i):i + 1])]))
        bits -= torch.log_softmax(logits[0, -1], -1)[byte].item() / math.log(2)
    return bits / len(data)


def random_model(layer):
    torch.manual_seed(0)
    model = LM(Config((layer,), d_model=16, head_dim=8, d_state=4, n_head=2, n_kv_head=1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "attention+mlp"])
@pytest.mark.parametrize("size, seq_len", [(37, 8), (32, 8), (5, 8), (1, 3), (7, 1)])
def test_validation_scores_each_byte_once_in_windows(layer, size, seq_len):
    """Each byte from what its window has shown; a shorter last window counts too, the batch does not matter."""
    model, data = random_model(layer), np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    want = direct_bpb(model, data, lambda i: i // seq_len * seq_len)
    for batch in (1, 2, 3, 100):
        assert evaluate(model, data, seq_len, batch)[0] == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "s4", "s4d", "attention+mlp"])
def test_carried_validation_is_one_pass_over_the_whole(layer):
    """The state goes from piece to piece, so the size of the pieces does not matter."""
    model, data = random_model(layer), np.random.default_rng(0).integers(0, 256, 41, dtype=np.uint8)
    want = direct_bpb(model, data, lambda i: 0)
    for seq_len, batch in ((1, 1), (2, 3), (8, 1), (7, 4), (41, 1), (1000, 2)):
        assert evaluate(model, data, seq_len, batch, carried=True)[0] == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_validation_runs_without_dropout_and_leaves_mode_and_random_state_alone(training):
    model = random_model("mamba").train(training)
    model.layers[0].dropout.p = 0.5
    data, before = np.arange(40, dtype=np.uint8), torch.get_rng_state()
    assert evaluate(model, data, 8, 2) == evaluate(model, data, 8, 2)
    assert torch.equal(torch.get_rng_state(), before) and model.training == training


@pytest.mark.parametrize("batch", [8, 100, 1000])
def test_a_task_is_scored_on_as_many_windows_as_is_said(batch):
    """Also where --batch_size does not divide them: the last piece is cut, not filled up. Each is scored once."""
    sizes = []

    def task(seq_len, count, seed, step):
        sizes.append(count)
        return train.TASKS["induction"](seq_len, count, seed, step)

    model = random_model("mamba2")
    objective = train.Objective(train.next_byte, "", task=task)
    bits, accuracy = evaluate(model, None, 16, batch, objective=objective)
    before, targets = map(torch.from_numpy, task(16, 512, 2**63, 0))
    assert sizes == [train.TASK_WINDOWS, 512]
    want = prediction_loss(model, before, targets).item() / math.log(2)
    assert bits == pytest.approx(want, rel=1e-10) and round(accuracy * 512, 6) % 1 == 0


# The run


@pytest.mark.parametrize("layer", LAYERS)
def test_a_run_logs_every_step_and_ends_with_a_validation(layer, corpus, tmp_path, capsys):
    """Keys of the log as fixed; the first lines say what is decayed, where it runs, and the loss beside ln 256."""
    log = go(corpus, tmp_path / "run", "--layer", layer)
    assert sorted(os.listdir(tmp_path / "run")) == ["best.pt", "last.pt", "log.jsonl"]
    assert all(list(line) == KEYS for line in log)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 4]
    assert [line["bytes"] for line in log] == [64, 128, 192, 256, 256]
    assert log[0]["train_bpb"] == pytest.approx(8, abs=0.3)
    assert all(line["train_bpb"] > 0 and line["val_bpb"] is None and line["bytes_per_second"] > 0 for line in log[:4])
    assert 0 < log[4]["val_bpb"] < 8.5 and (log[4]["val_bpb_carried"] is None) == (layer == "s4")
    model, extra = load(tmp_path / "run")
    assert extra["step"] == 4 and extra["flags"]["layer"] == layer
    val = np.fromfile(corpus, np.uint8)[900:]
    assert evaluate(model, val, 16, 4) == pytest.approx((log[4]["val_bpb"], log[4]["val_accuracy"]), rel=1e-6)
    out, bar = capsys.readouterr()
    for part in ("900 bytes to train on, 100 to validate", "decayed", "not decayed", "cpu, float32", "ln 256 = 5.545",
                 f"{log[4]['val_bpb']:.4f}", "gzip -9", "python sample.py --ckpt"):
        assert part in out
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in out and "<00:00  step 4 | " in bar


def test_a_hybrids_layers_take_turns_and_share_one_state_size():
    """One rule for all: SwiGLU beside attention only, attention's window that of training, the smallest of the kinds'
    own n. A list of one kind is that kind."""
    def shape(layer, **flags):
        c = train.make_config(Flags(layer=layer, seq_len=50, **flags))
        return c.layers, c.window, c.d_state

    turns = ("mamba2", "mamba2", "attention+mlp")
    assert shape("mamba2,mamba2,attention", n_layer=7) == (turns + turns + turns[:1], 50, train.D_STATE["mamba2"])
    assert shape("s4d,mamba") == shape("s4d,mamba", d_state=16) == (("s4d", "mamba", "s4d"), 0, 16)
    assert shape("s4d,mamba", d_state=6) == (("s4d", "mamba", "s4d"), 0, 6)
    assert shape("mamba2,mamba2") == shape("mamba2") == (("mamba2",) * 3, 0, train.D_STATE["mamba2"])
    assert shape("attention", n_layer=2)[:2] == (("attention+mlp",) * 2, 50)
    encoder = train.make_config(Flags(layer="s4d,attention", objective="mask"))
    assert (encoder.layers, encoder.d_state) == (("s4d", "attention", "s4d"), 64)
    assert Flags(layer="mamba2,attention").out == "out/mamba2+attention"


def test_whatever_takes_a_model_takes_a_hybrid(corpus, tmp_path, capsys):
    """Resuming, validating, writing, drafting for itself (the greedy text stays the same), and as the teacher of a
    student that keeps every state-space layer and replaces attention."""
    layer = ["--layer", "mamba2,s4d,attention", "--n_layer", 3]
    run = tmp_path / "run"
    go(corpus, run, *layer, "--steps", 2)
    assert train.main(["--out", str(run), "--resume", "--steps", "4"]) == 0
    log = read_log(run)  # resumed at step 2
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4] and log[-1]["val_bpb_carried"] > 0
    capsys.readouterr()
    assert train.main(["--out", str(run), "--eval_only", "--device", "cpu"]) == 0
    assert f"{log[-1]['val_bpb']:.4f}" in capsys.readouterr().out
    write = ["--ckpt", str(run), "--prompt", "12", "--bytes", "20", "--temperature", "0", "--dtype", "float64"]
    texts = []
    for draft in ([], ["--draft", str(run), "--k", "3"]):
        assert sample.main([*write, "--device", "cpu", *draft]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("12")
    teach = ["--teacher", run, "--data", corpus, "--out", tmp_path / "student", "--keep_attention", 0, "--steps", 2,
             "--seq_len", 16, "--batch_size", 4, "--device", "cpu"]
    refused(capsys, teach, "other sizes", "--mixers random", main=distill.main)
    assert distill.main([*map(str, teach), "--mixers", "random"]) == 0
    student, teacher = load(tmp_path / "student")[0], load(run)[0]
    assert student.config == dataclasses.replace(teacher.config, layers=("mamba2", "s4d", "mamba2+mlp"))
    encoder = tmp_path / "encoder"
    go(corpus, encoder, "--layer", "s4d,attention", "--n_layer", 2, "--objective", "mask")
    assert sample.main(["--ckpt", str(encoder), "--fill", "1__2", "--device", "cpu"]) == 0


def test_training_learns(corpus, tmp_path):
    log = go(corpus, tmp_path / "run", "--steps", 60, "--lr", 0.01)
    assert losses(log)[-1] < 0.7 * losses(log)[0]
    assert log[-1]["val_bpb"] < 0.7 * losses(log)[0]


def test_the_same_seed_trains_the_same_model_and_another_seed_another(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(corpus, tmp_path / name, "--seed", seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize("every, figures", [(2, [5.0, 4.0, 4.5]), (4, [4.0, 4.5])])
def test_best_is_kept_and_last_goes_on(every, figures, corpus, tmp_path, monkeypatch):
    """Validation figures that fall and rise again: best.pt is the lowest, also across a resume and right after it."""
    figures = iter([*figures, 4.2])
    monkeypatch.setattr(train, "measure", lambda *args: {
        "val_bpb": next(figures), "val_bpb_carried": None, "val_accuracy": 0.5})
    go(corpus, tmp_path / "run", "--steps", 6 if every == 2 else 4, "--eval_every", every)
    go(corpus, tmp_path / "run", "--steps", 7, "--resume", "--eval_every", 0)
    assert load(tmp_path / "run" / "best.pt")[1]["step"] == 4 and load(tmp_path / "run" / "last.pt")[1]["step"] == 7


@pytest.mark.parametrize("layer", LAYERS)
def test_accumulation_changes_nothing_but_memory(layer, corpus, tmp_path):
    """A step in 2 or 4 parts has the loss and the gradient of the whole (float64)."""
    flags = ("--layer", layer, "--dtype", "float64", "--accumulate")
    whole, two, four = (losses(go(corpus, tmp_path / str(parts), *flags, parts)) for parts in (1, 2, 4))
    for parts in (two, four):
        assert parts == pytest.approx(whole, rel=1e-10)


def test_the_gradient_norm_is_clipped(corpus, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def note(self, *args, **kwargs):
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for g in self.param_groups for p in g["params"])))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    go(corpus, tmp_path / "a", "--grad_clip", 0.01)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    norms.clear()
    go(corpus, tmp_path / "b", "--grad_clip", 0)
    assert len(norms) == 4 and min(norms) > 0.02  # 0 is no clipping


def test_the_clock_ends_a_run_given_in_minutes_and_sets_its_schedule(corpus, tmp_path, monkeypatch):
    """A clock that moves half a second a look: a step takes half a second, and 3 seconds are six steps."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 2))
    log = go(corpus, tmp_path / "run", "--minutes", 0.05, "--eval_every", 2)
    trained = [line for line in log if line["train_bpb"] is not None]
    assert [line["seconds"] for line in trained] == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3])  # validations do not count
    c = Flags(warmup=2)
    assert [line["lr"] for line in trained] == pytest.approx([learning_rate(c, i, i / 6) for i in range(6)])


def test_eval_only_prints_what_the_log_has_in_the_runs_own_dtype(corpus, tmp_path, capsys, monkeypatch):
    last = go(corpus, tmp_path / "run", "--dtype", "float64")[-1]
    before = contents(tmp_path / "run")
    dtypes = []
    monkeypatch.setattr(train, "evaluate", lambda model, *args, **kwargs: dtypes.append(
        next(model.parameters()).dtype) or evaluate(model, *args, **kwargs))
    capsys.readouterr()
    assert train.main(["--out", str(tmp_path / "run"), "--eval_only", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"{last['val_bpb']:.4f} bits per byte, windows of 16" in out and f"{last['val_bpb_carried']:.4f}" in out
    assert contents(tmp_path / "run") == before and set(dtypes) == {F64}


# Stopping and resuming


@pytest.mark.parametrize("layer, number, extra", [
    ("mamba", signal.SIGINT, []), ("mamba2", signal.SIGTERM, ["--dropout", 0.1]),
    ("attention", signal.SIGINT, ["--dropout", 0.1, "--accumulate", 2]),
    ("mamba2,attention", signal.SIGINT, ["--n_layer", 2]),
    ("mamba2", signal.SIGINT, ["--eval_every", 3]), ("mamba2", signal.SIGINT, ["--eval_every", 2])])
def test_resume_is_exact(layer, number, extra, corpus, tmp_path, monkeypatch, capsys):
    """Stopped by a signal in the middle and resumed: losses, validations and weights of a run without a stop, bit for
    bit, also where a validation was due right after the step in which the signal came. Its handlers are put back."""
    extra = ["--layer", layer, "--steps", 7, *extra]
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    whole = go(corpus, tmp_path / "whole", *extra)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(number))
        capsys.readouterr()
        assert train.main(argv(corpus, tmp_path / "parts", *extra)) == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    out = capsys.readouterr().out
    assert str(tmp_path / "parts") in out and "--resume" in out and "step 4" in out
    assert load(tmp_path / "parts" / "last.pt")[1]["step"] == 4
    assert train.main(["--out", str(tmp_path / "parts"), "--resume"]) == 0
    parts = read_log(tmp_path / "parts")
    for figure in ("step", "bytes", "train_bpb", "val_bpb", "val_bpb_carried", "lr"):
        assert [line[figure] for line in parts] == [line[figure] for line in whole], figure
    for name in ("last.pt", "best.pt"):
        assert same(weights(tmp_path / "parts" / name), weights(tmp_path / "whole" / name))


@pytest.mark.parametrize("apart", [0.1, 5.0])
def test_a_second_signal_exits_at_once_unless_it_comes_with_the_first(apart, corpus, tmp_path, monkeypatch):
    """Without the end of the step; what was saved before is whole, and the handlers are back."""
    handler = signal.getsignal(signal.SIGINT)
    ticks = iter([0.0, apart])
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(ticks)))

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 1, twice)
    if apart < 1:
        assert train.main(argv(corpus, tmp_path / "run")) == 130
        assert load(tmp_path / "run" / "last.pt")[1]["step"] == 2
        return
    with pytest.raises(SystemExit) as left:
        train.main(argv(corpus, tmp_path / "run", "--eval_every", 1))
    assert left.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGINT) == handler
    assert load(tmp_path / "run" / "last.pt")[1]["step"] == 1


def test_ctrl_c_before_training_is_one_line(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_corpus", lambda name: signal.raise_signal(signal.SIGINT))
    assert train.main(argv(corpus, tmp_path / "run")) == 130
    assert capsys.readouterr().err == "stopped\n" and not [*(tmp_path / "run").glob("*")]


@pytest.mark.parametrize("program", [train, distill])
def test_main_leaves_no_handler_allocator_setting_or_thread_count_behind(program, corpus, tmp_path, monkeypatch):
    """In a notebook, where main([...]) is called; the allocator is set by a script that is the program."""
    monkeypatch.delattr(signal, "SIGHUP", raising=False)  # as on Windows
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or SimpleNamespace())
    handlers = [signal.getsignal(s) for s in sorted(signal.valid_signals())]
    threads = torch.get_num_threads()
    flags = argv(corpus, tmp_path / "teacher", "--layer", "attention", "--n_layer", 2)
    assert train.main(flags) == 0
    if program is distill:
        flags = ["--teacher", tmp_path / "teacher", "--out", tmp_path / "student", "--data", corpus, "--steps", 2,
                 "--seq_len", 16, "--batch_size", 4, "--device", "cpu", "--keep_attention", 0.5]
        assert distill.main([*map(str, flags)]) == 0
    assert asked == [] and torch.get_num_threads() == threads
    assert [signal.getsignal(s) for s in sorted(signal.valid_signals())] == handlers
    monkeypatch.setattr(sys, "argv", ["name", "-h"])
    with pytest.raises(SystemExit):
        runpy.run_path(program.__file__, run_name="__main__")
    assert asked == ["libc.so.6"]


def test_training_works_in_a_thread(corpus, tmp_path):
    """Where Python allows no signal handlers; some notebooks and every web app run main there."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.main, argv(corpus, tmp_path / "run")).result() == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert losses(read_log(tmp_path / "run")) == losses(go(corpus, tmp_path / "same"))


@pytest.mark.parametrize("flags", [[], ["--eval_every", 2]])
def test_a_signal_during_validation_loses_nothing(flags, corpus, tmp_path, monkeypatch):
    """Neither of the last validation nor of one on the way, which the resumed run makes up for before it goes on."""
    whole = go(corpus, tmp_path / "whole", *flags)

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert train.main(argv(corpus, tmp_path / "parts", *flags)) == 130
    assert load(tmp_path / "parts" / "last.pt")[1]["step"] == (2 if flags else 4)
    assert train.main(["--out", str(tmp_path / "parts"), "--resume"]) == 0
    parts = read_log(tmp_path / "parts")
    for figure in ("step", "train_bpb", "val_bpb", "val_bpb_carried", "val_accuracy"):
        assert [line[figure] for line in parts] == [line[figure] for line in whole], figure
    for name in ("last.pt", "best.pt"):
        assert same(weights(tmp_path / "parts" / name), weights(tmp_path / "whole" / name))


def test_a_signal_while_process_0_validates_stops_all_at_the_same_step(corpus, tmp_path, monkeypatch):
    """The others wait in the next step: the validation ends, and what that step sends them says to stop."""
    alike = lambda tensor: tensor.mul_(2)
    monkeypatch.setattr(train, "join_processes", lambda device: (0, 2, device))
    monkeypatch.setattr(train, "dist", SimpleNamespace(
        all_reduce=alike, barrier=lambda: None, destroy_process_group=lambda: None))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(train, "evaluate",
                        lambda *args, **kwargs: signal.raise_signal(signal.SIGINT) or evaluate(*args, **kwargs))
    assert train.main(argv(corpus, tmp_path / "run", "--layer", "attention", "--eval_every", 2)) == 130
    assert load(tmp_path / "run" / "last.pt")[1]["step"] == 3
    assert [(line["step"], line["val_bpb"] is None) for line in read_log(tmp_path / "run")] == [
        (1, True), (2, True), (2, False), (3, True)]


def test_a_validation_that_was_logged_but_not_saved_is_logged_once(corpus, tmp_path, monkeypatch):
    """Stopped at a step whose validation is due, then killed between its line and its checkpoint, then resumed."""
    flags = argv(corpus, tmp_path / "run", "--eval_every", 2)

    def crash(*args, **kwargs):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert train.main(flags) == 130
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "save", crash)
        train.main([*flags, "--resume"])
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 2]
    assert train.main([*flags, "--resume"]) == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 2, 3, 4, 4]


def test_a_crash_goes_on_from_the_last_checkpoint_and_its_log(corpus, tmp_path, monkeypatch):
    """Steps after the checkpoint are run again and stand in the log once; a damaged line is left out, whatever it is."""
    whole = go(corpus, tmp_path / "whole", "--steps", 6, "--eval_every", 3)

    def crash():
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_step(patch, 5, crash)
        train.main(argv(corpus, tmp_path / "parts", "--steps", 6, "--eval_every", 3))
    with open(tmp_path / "parts" / "log.jsonl", "ab") as log:
        log.write(b'[1, 2]\n{"bytes": 3}\n\xff\xfe\0\nnull\n{"step": "x", "val_bpb": 1}\n{"step": 6, "by')
    assert train.main(["--out", str(tmp_path / "parts"), "--resume"]) == 0
    parts = read_log(tmp_path / "parts")
    assert [line["step"] for line in parts] == [line["step"] for line in whole] and losses(parts) == losses(whole)
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_finished_run_can_be_given_more_steps(corpus, tmp_path, capsys):
    go(corpus, tmp_path / "run")
    log = go(corpus, tmp_path / "run", "--steps", 6, "--resume")
    assert [line["step"] for line in log if line["train_bpb"]] == [1, 2, 3, 4, 5, 6]
    assert "--steps 6 (was 4)" in capsys.readouterr().out


def test_a_flag_that_no_longer_exists_does_not_orphan_a_run(corpus, tmp_path):
    go(corpus, tmp_path / "run")
    model, extra = load(tmp_path / "run" / "last.pt")
    train.save(tmp_path / "run" / "last.pt", model, **{**extra, "flags": {**extra["flags"], "noise": ""}})
    assert len(losses(go(corpus, tmp_path / "run", "--resume", "--steps", 5))) == 5


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, capsys, monkeypatch):
    """Step, learning rate and what is left to go on from; that checkpoint is as it was."""
    go(corpus, tmp_path / "run", "--steps", 2)
    before = (tmp_path / "run" / "last.pt").read_bytes(), (tmp_path / "run" / "best.pt").read_bytes()
    loss = train.prediction_loss
    monkeypatch.setattr(train, "prediction_loss", lambda *args: loss(*args) * math.nan)
    message = refused(capsys, argv(corpus, tmp_path / "run", "--resume", "--steps", 5), "step 2", "lower --lr", "--resume")
    assert re.search(r"learning rate \d\.\d\de-\d\d", message)
    assert before == ((tmp_path / "run" / "last.pt").read_bytes(), (tmp_path / "run" / "best.pt").read_bytes())
    refused(capsys, argv(corpus, tmp_path / "new"), "step 0", "learning rate", "another --out")


@pytest.mark.parametrize("flags", [[], ["--eval_every", 1], ["--steps", 1]])
def test_a_step_that_is_far_too_long_stops_the_run(flags, corpus, tmp_path, capsys):
    """Its own loss is finite: the next step's shows it, or a validation right after it, or the last one. What is then
    called the last good checkpoint is good, and the log stays JSON, without NaN."""
    flags = argv(corpus, tmp_path / "run", "--lr", 1e18, "--warmup", 0, *flags)
    refused(capsys, flags, "loss is" if "1" not in flags[-1:] else "step 1", "learning rate", "e+")
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
    if (tmp_path / "run" / "last.pt").exists():
        assert math.isfinite(evaluate(load(tmp_path / "run" / "last.pt")[0], np.fromfile(corpus, np.uint8), 16, 4)[0])


def test_another_batch_size_reads_on_where_the_run_was(corpus, tmp_path, monkeypatch):
    """No window twice and none left out; the log's bytes are those that were read."""
    firsts, draw = [], train.windows
    monkeypatch.setattr(train, "windows", lambda data, length, batch, seed, first: firsts.append(
        (first, batch)) or draw(data, length, batch, seed, first))
    go(corpus, tmp_path / "run", "--batch_size", 8)
    log = go(corpus, tmp_path / "run", "--resume", "--batch_size", 4, "--steps", 7)
    assert firsts[1:5] == [(0, 8), (8, 8), (16, 8), (24, 8)] and firsts[-3:] == [(32, 4), (36, 4), (40, 4)]
    assert [line["bytes"] for line in log if line["train_bpb"]] == [128, 256, 384, 512, 576, 640, 704]


def test_a_run_knows_what_it_has_read(corpus, tmp_path, capsys):
    """Another file of the same name is refused, and a folder that its own log would join."""
    go(corpus, tmp_path / "run")
    corpus.write_bytes(corpus.read_bytes().swapcase())
    refused(capsys, ["--out", tmp_path / "run", "--resume", "--steps", 9], "this run has read 900 bytes")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(corpus.read_bytes())
    refused(capsys, argv(tmp_path / "texts", tmp_path / "texts" / "run"), "no text to train on")
    assert not (tmp_path / "texts" / "run").exists()


@pytest.mark.skipif(not train.fcntl, reason="on Windows nothing claims a folder")
def test_a_folder_belongs_to_one_run_at_a_time(corpus, tmp_path, capsys):
    """From before it looks into the folder to its end."""
    c = Flags(data=str(corpus), out=str(tmp_path / "run"))
    with train.claim(c):
        refused(capsys, argv(corpus, tmp_path / "run"), "another process trains in")
    go(corpus, tmp_path / "run")
    with train.claim(c):  # a run that has ended holds nothing
        pass


def test_a_signal_ends_the_last_validation_of_several_processes_too(corpus, tmp_path, monkeypatch):
    """The others have left by then, and what starts them kills after half a minute."""
    monkeypatch.setattr(train, "join_processes", lambda device: (0, 2, device))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(train.dist, name, lambda *args: None)
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(train, "measure", lambda run: signal.raise_signal(signal.SIGINT))
    assert train.main(argv(corpus, tmp_path / "run")) == 130
    assert load(tmp_path / "run" / "last.pt")[1]["step"] == 4


def test_validation_holds_no_more_than_its_own_number_of_tokens(corpus, tmp_path, monkeypatch):
    """Whatever --batch_size is: training may cut that into parts or share it among processes."""
    sizes = []
    monkeypatch.setattr(train, "evaluate", lambda model, data, seq_len, batch_size, *rest, **more: (
        sizes.append(seq_len * batch_size) or evaluate(model, data, seq_len, batch_size, *rest, **more)))
    go(corpus, tmp_path / "run", "--batch_size", 1024, "--accumulate", 256, "--steps", 1)
    assert sizes == [train.VALIDATION_TOKENS, train.CARRIED_TOKENS]


def test_a_folder_where_no_step_was_made_is_free(corpus, tmp_path, capsys, monkeypatch):
    """After "out of memory; lower the batch" the same --out will do."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda run, model: (_ for _ in ()).throw(MemoryError()))
        refused(capsys, argv(corpus, tmp_path / "run"), "lower the batch")
    assert len(go(corpus, tmp_path / "run")) == 5


@pytest.mark.parametrize("flag", ["--val_bytes", "--seq_len"])
def test_a_run_is_validated_alike_to_its_end(flag, corpus, tmp_path, capsys):
    """Or best.pt would be the best of figures that do not compare; --eval_only takes any."""
    go(corpus, tmp_path / "run")
    refused(capsys, ["--out", tmp_path / "run", "--resume", "--steps", 6, flag, 30], f"{flag} 30: the run in")
    assert train.main(["--out", str(tmp_path / "run"), "--eval_only", flag, "30"]) == 0


@pytest.mark.parametrize("steps, caught, message", [(5, 0, "different checkpoints"), (8, 1, "")])
def test_processes_agree_on_the_step_and_on_a_signal_of_any(steps, caught, message, monkeypatch):
    """all_reduce as it is with another process, which is at steps - 4 and may have caught a signal."""
    monkeypatch.setattr(train.dist, "all_reduce", lambda total: total.copy_(
        torch.tensor([3.0, 7.0, caught, steps])))
    run = SimpleNamespace(world=2, rank=0, caught=0, step=4, device="cpu")
    if message:
        with pytest.raises(UserError, match=message):
            train.Run.agree(run, 1.0, 7.0)
    else:
        assert train.Run.agree(run, 1.0, 7.0) == (1.5, 7.0, signal.SIGTERM)


def test_half_a_line_of_the_log_goes_when_a_run_is_resumed(corpus, tmp_path):
    """After a power cut the log may be shorter than the checkpoint counts."""
    go(corpus, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    assert [line["step"] for line in go(corpus, tmp_path / "run", "--resume", "--steps", 6)] == [1, 2, 3, 4, 5, 6, 6]


def test_a_folder_of_the_name_of_a_corpus_is_not_that_corpus(corpus, tmp_path, monkeypatch):
    """--data python is the standard library, whatever lies in ./python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").mkdir()
    for name in ("python", "parity"):
        with train.claim(Flags(data=name, out=f"{name}/run")):
            pass
    with pytest.raises(UserError, match="lies in --data"), train.claim(Flags(data="./python", out="python/run")):
        pass


def test_a_run_that_fails_before_its_first_step_gives_all_back(corpus, tmp_path, capsys, monkeypatch):
    """The folder and the handlers: a notebook goes on."""
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train, "introduce", lambda run: (_ for _ in ()).throw(OSError("no screen")))
        refused(capsys, argv(corpus, tmp_path / "run"), "no screen")
    go(corpus, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before and sys.stdout is not None


def test_a_terminal_that_is_gone_saves_the_run(corpus, tmp_path, monkeypatch):
    """It went without SIGHUP, as after disown: what is written there gives EIO."""
    def gone():
        raise OSError(errno.EIO, "Input/output error")

    at_step(monkeypatch, 2, gone)
    assert train.main(argv(corpus, tmp_path / "run")) == 130
    assert load(tmp_path / "run" / "last.pt")[1]["step"] == 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_the_run(corpus, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGHUP))
    assert train.main(argv(corpus, tmp_path / "run")) == 129
    assert load(tmp_path / "run" / "last.pt")[1]["step"] == 2


def test_a_task_is_not_resumed_as_another(tmp_path, capsys):
    flags = ["--out", tmp_path / "run", "--seq_len", 16, "--device", "cpu"]
    assert train.main([*map(str, flags), *"--data induction --d_model 16 --head_dim 8 --n_layer 1 --steps 1".split()]) == 0
    refused(capsys, [*flags, "--resume", "--steps", 2, "--data", "parity"], "this run has read induction")


@pytest.mark.parametrize("name", ["evaluate", "learn_merges"])
def test_ctrl_c_outside_the_loop_is_one_line(name, corpus, tmp_path, monkeypatch, capsys):
    go(corpus, tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr(train, name, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    flags = ["--out", str(tmp_path / "run"), "--eval_only"]
    assert train.main(flags if name == "evaluate" else argv(corpus, tmp_path / "new", "--bpe", 3)) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("changes", [
    {"step": "x"}, {"seconds": None}, {"read": [1]}, {"optimizer": 7},
    {"flags": {"lr": "fast"}}, {"flags": {"warmup": [3]}}, {"flags": {"data": None}}, {"flags": {"seq_len": -1}}])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(changes, corpus, tmp_path, capsys):
    go(corpus, tmp_path / "run")
    model, extra = load(tmp_path / "run" / "last.pt")
    changes = {name: {**extra[name], **value} if name == "flags" else value for name, value in changes.items()}
    train.save(tmp_path / "run" / "last.pt", model, **{**extra, **changes})
    refused(capsys, ["--out", tmp_path / "run", "--resume", "--steps", 9])


def test_the_state_of_another_optimizer_is_refused(corpus, tmp_path, capsys):
    """AdamW's fused step would read beyond its end."""
    go(corpus, tmp_path / "run")
    model, extra = load(tmp_path / "run" / "last.pt")
    extra["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    train.save(tmp_path / "run" / "last.pt", model, **extra)
    refused(capsys, ["--out", tmp_path / "run", "--resume", "--steps", 9], "its optimizer is that of another model")


def test_others_wait_for_a_validation_of_process_0(monkeypatch):
    """As long as it takes: the usual half hour would end the run, and nothing would be saved."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")  # a cluster may set it, and no rank
    assert train.join_processes(torch.device("cpu")) == (0, 1, torch.device("cpu"))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *args, **kwargs: given.update(kwargs))
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setenv("RANK", "0")
    assert train.join_processes(torch.device("cpu")) == (0, 2, torch.device("cpu"))
    assert given["timeout"].total_seconds() >= 86_400


# Bad input


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), RuntimeError("can't allocate")])
def test_too_little_memory_names_what_to_lower(error, corpus, tmp_path, capsys, monkeypatch):
    def raises(*args):
        raise error

    monkeypatch.setattr(train, "prediction_loss", raises)
    refused(capsys, argv(corpus, tmp_path / "run"), "lower the batch, the length or the model")


@pytest.mark.parametrize("flags", [[], ["--eval_only"]])
def test_an_output_that_takes_nothing_is_one_line(flags, corpus, tmp_path, capsys, monkeypatch):
    """A full disk says so; where nobody reads, nothing is said."""
    class Output:
        def __init__(self, error):
            self.error = error

        def write(self, text):
            raise self.error

        flush = write

    go(corpus, tmp_path / "run")
    for i, (error, status) in enumerate(((OSError(28, "No space left on device"), 2), (BrokenPipeError(), 130))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Output(error))
            again = ["--out", str(tmp_path / "run"), *flags]
            assert train.main(again if flags else argv(corpus, tmp_path / str(i))) == status
        assert "Traceback" not in capsys.readouterr().err


def test_what_the_terminal_cannot_show_is_a_question_mark(corpus, tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert train.main(argv(corpus, tmp_path / "r\u0436n")) == 0 and len(read_log(tmp_path / "r\u0436n")) == 5
    out.flush()
    assert b"/r?n" in out.buffer.getvalue()


def test_weights_that_are_not_finite_are_not_validated(corpus, tmp_path, capsys):
    go(corpus, tmp_path / "run")
    model, extra = load(tmp_path / "run")
    with torch.no_grad():
        model.norm_f.weight[3] = torch.nan
    train.save(tmp_path / "run" / "best.pt", model, **extra)
    refused(capsys, ["--out", tmp_path / "run", "--eval_only"], "validation loss is nan")


@pytest.mark.parametrize("flags, parts", [
    ("--d_modl 3", ["--d_modl"]), ("--step 3", ["--step"]), ("extra", ["extra"]), ("--steps many", ["--steps", "many"]),
    ("--layer rnn", ["--layer rnn", "mamba2", "attention"]), ("--steps 0", ["--steps 0"]), ("--steps -1", ["--steps -1"]),
    ("--d_model -16", ["--d_model -16"]), ("--n_layer 0", ["--n_layer 0"]), ("--seq_len -5", ["--seq_len -5"]),
    ("--batch_size 0", ["--batch_size 0"]), ("--d_state -1", ["--d_state -1"]), ("--head_dim 0", ["--head_dim 0"]),
    ("--head_dim 7", ["head_dim 7"]), ("--lr nan", ["--lr nan"]), ("--lr -1", ["--lr -1"]),
    ("--minutes inf", ["--minutes"]),
    ("--layer mamba2,rnn", ["--layer rnn", "mamba2", "attention"]), ("--layer mamba2,", ["--layer (nothing)"]),
    ("--layer mamba2,attention", ["names 2 layers", "--n_layer 1"]), ("--layer attention+mlp", ["--layer attention+mlp"]),
    ("--layer mamba,s4d --objective mask", ["--layer mamba", "s4d, attention"]),
    ("--dropout 1", ["--dropout 1"]), ("--layer attention --n_head 3", ["d_model 16", "n_head 3"]),
    ("--layer attention --n_head 0", ["--n_head 0"]), ("--seed -1", ["--seed -1"]),
    ("--seed 99999999999999999999", ["--seed 99999999999999999999"]), ("--grad_clip nan", ["--grad_clip"]),
    ("--accumulate 3", ["--batch_size 4", "--accumulate 3"]), ("--device tpu9", ["--device tpu9", "--device cpu"]),
    ("--device meta", ["--device meta"]), ("--dtype float16", ["--dtype float16", "float64"]),
    ("--seq_len 900", ["900 bytes", "901", "--seq_len"]), ("--data no_such_file", ["no_such_file", "shakespeare"]),
    ("--resume", ["last.pt", "python train.py"]), ("--bpe -1", ["--bpe -1"]), ("--bpe 70000", ["--bpe 70000"]),
    ("--warmup -1", ["--warmup -1"]), ("--eval_every -1", ["--eval_every -1"]),
    ("--batch_size 1000000000", ["--batch_size 1000000000"]), ("--d_model 1000000000", ["lower", "model's size"]),
    (f"--seq_len {10**30}", ["--seq_len"]), (f"--seq_len {2**62}", ["--seq_len"])])
def test_bad_flags_are_one_line_and_leave_no_trace(flags, parts, corpus, tmp_path, capsys):
    refused(capsys, argv(corpus, tmp_path / "run", *flags.split()), *parts)
    assert not [*(tmp_path / "run").glob("*")]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_auto_never_takes_bfloat16_where_a_gpu_only_emulates_it(monkeypatch):
    """Compute capability 7.5 and below: float32 without autocast. --dtype bfloat16 is still obeyed."""
    gpu = torch.device("cuda", 1)
    for capability, narrow in (((7, 5), False), ((6, 1), False), ((8, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: capability}.get)
        dtype, cast = train.pick_dtype("auto", gpu)
        assert dtype == torch.float32 and isinstance(cast, torch.autocast) == narrow
        assert isinstance(train.pick_dtype("bfloat16", gpu)[1], torch.autocast)
    assert not isinstance(train.pick_dtype("auto", torch.device("cpu"))[1], torch.autocast)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_cuda_where_there_is_none(corpus, tmp_path, capsys):
    refused(capsys, argv(corpus, tmp_path / "run", "--device", "cuda"), "--device cuda", "--device cpu")
    assert not [*(tmp_path / "run").glob("*")]


@pytest.mark.parametrize("data", [b"", b"a", b"ab"])
def test_a_corpus_too_small(data, corpus, tmp_path, capsys):
    corpus.write_bytes(data)
    refused(capsys, argv(corpus, tmp_path / "run"), "bytes")
    assert not [*(tmp_path / "run").glob("*")]


def test_a_run_is_not_overwritten(corpus, tmp_path, capsys):
    """Neither by a new one, nor by a resume that does not fit or a checkpoint that is cut short."""
    out = tmp_path / "run"
    go(corpus, out)
    before = contents(out)
    refused(capsys, argv(corpus, out), "holds last.pt", "--resume", "another --out")
    for name, value, was in (("d_model", 32, 16), ("layer", "mamba", "mamba2"), ("n_layer", 2, 1), ("d_state", 8, 4),
                             ("head_dim", 16, 8), ("n_head", 4, 2), ("dropout", 0.3, 0.0), ("init", out, "")):
        refused(capsys, ["--out", out, "--resume", f"--{name}", value], f"--{name} {value}", repr(was), "another --out")
    refused(capsys, ["--out", out, "--resume", "--batch_size", 4, "--accumulate", 3], "--accumulate 3")
    refused(capsys, ["--out", out, "--resume", "--data", tmp_path / "gone"], "gone")
    assert contents(out) == before
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[:len(whole) // 2])
    before = contents(out)
    refused(capsys, ["--out", out, "--resume"], "last.pt", "cut short")
    assert contents(out) == before


def test_any_file_of_a_run_is_enough_to_refuse_a_new_one(corpus, tmp_path, capsys):
    for name in ("last.pt", "best.pt", "log.jsonl"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("precious")
        way_on = "go on with --resume" if name == "last.pt" else "another --out"
        refused(capsys, argv(corpus, folder), f"holds {name}", "another --out", way_on)
        refused(capsys, argv(corpus, folder, "--resume"), name)
        assert contents(folder) == {str(folder / name): b"precious"}
    train.save(folder / "last.pt", LM(Config(d_model=16, head_dim=8)))  # a model without a run
    refused(capsys, argv(corpus, folder, "--resume"), "no run of train.py")


def test_an_out_folder_that_cannot_be_made(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run"):
        refused(capsys, argv(corpus, out), "--out", out)
    for out in ("a\0b", tmp_path / ("long" * 99)):
        refused(capsys, argv(corpus, out), "error")
    refused(capsys, ["--out", tmp_path / "file" / "run", "--resume"], "--out", tmp_path / "file")
    refused(capsys, ["--out", tmp_path / "file" / "run", "--eval_only"], "python train.py")
    assert (tmp_path / "file").read_text() == "precious"


def test_help_mentions_every_flag_with_its_default(capsys):
    for script, flags in ((train, train.Flags), (sample, sample.Flags), (distill, distill.Flags)):
        with pytest.raises(SystemExit) as done:
            script.main(["-h"])
        assert done.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for f in dataclasses.fields(flags):
            assert f"--{f.name}" in text and f.metadata["help"].split()[0] in text
            assert f.default == "" or f"(default: {f.default})" in text
        if script is train:  # from the tables of model.py, so a new mixer appears by itself
            assert all(name in text for name in (*MIXERS, *ENCODER_MIXERS))


def test_eval_only_refuses_flags_that_the_checkpoint_has(corpus, tmp_path, capsys):
    go(corpus, tmp_path / "run")
    for flags in (["--layer", "mamba"], ["--d_model", 32], ["--bpe", 3], ["--dropout", 0.5], ["--init", tmp_path],
                  ["--compile"]):
        refused(capsys, ["--eval_only", "--out", tmp_path / "run", *flags], flags[0], "leave")


def test_flags_have_the_types_of_their_defaults():
    c, given = train.parse(Flags, "--lr 1 --steps 3 --resume --no-compile --out x".split(), "")
    assert (c.lr, c.steps, c.resume, c.compile, c.out) == (1.0, 3, True, False, "x")
    assert given == {"lr": 1.0, "steps": 3, "resume": True, "compile": False, "out": "x"}
    assert all(type(f.default) is f.type for f in dataclasses.fields(Flags))


# As a user runs it


def script(*command):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, timeout=300)


def test_train_and_sample_from_the_command_line(corpus, tmp_path, capfdbinary):
    out = tmp_path / "run"
    done = script("train.py", *argv(corpus, out))
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "log.jsonl"]
    assert all(list(line) == KEYS for line in read_log(out)) and len(read_log(out)) == 5
    assert sample.main(["--ckpt", str(out), "--bytes", "20", "--prompt", "12", "--raw", "--device", "cpu"]) == 0
    written = capfdbinary.readouterr().out
    assert len(written) == 22 and written.startswith(b"12")


def test_two_processes_train_like_one(corpus, tmp_path):
    """torchrun with gloo: the same seed and global batch give the same losses to rounding (float64), and one log."""
    one = go(corpus, tmp_path / "one", "--dtype", "float64", "--accumulate", 2)
    two = script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
                 *argv(corpus, tmp_path / "two", "--dtype", "float64", "--accumulate", 2))
    assert two.returncode == 0, two.stderr.decode()
    two = read_log(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for figure in ("train_bpb", "val_bpb", "val_bpb_carried", "lr"):
        for a, b in zip(one, two):
            assert a[figure] == b[figure] or a[figure] == pytest.approx(b[figure], rel=1e-10), figure
    for name, w in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], w, rtol=1e-9, atol=1e-9)
