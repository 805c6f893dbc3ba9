"""data/synthetic.py: what each task asks for, and why no convolution solves the first."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import close
from data.synthetic import (
    COPY, KEYS, LETTERS, MARK, NO_TARGET, NOISE, TASKS, induction, parity, recall, selective_copy)
from model import LM, Config
from tests.studies import score


@pytest.mark.parametrize("task", TASKS.values())
def test_a_task_is_a_function_of_seed_and_step(task):
    first, again, other, later = (np.stack(task(40, 9, *where))
                                  for where in ((1, 5), (1, 5), (2, 5), (1, 6)))
    assert first.shape == (2, 9, 40) and first.dtype == np.int64
    assert (first == again).all() and (first != other).any() and (first != later).any()


@pytest.mark.parametrize("length, count", [(3, 1), (16, 1), (256, 4), (1000, 8), (4112, 16)])
def test_selective_copying_asks_for_the_letters_in_order(length, count):
    """The answer is what is left when the dots are taken out; every place in the noise occurs."""
    tokens, targets = selective_copy(length, 50, 1, 0)
    read, answers = tokens[:, :-count], targets[:, -count:]
    assert (tokens[:, -count:] == COPY).all() and (targets[:, :-count] == NO_TARGET).all()
    assert ((read != NOISE).sum(1) == count).all() and np.isin(answers, LETTERS).all()
    assert (read[read != NOISE] == answers.ravel()).all()
    if length == 16:
        assert (read != NOISE).any(0).sum() > 12


@pytest.mark.parametrize("length", [3, 4, 31, 256])
def test_induction_asks_for_what_followed_the_mark(length):
    tokens, targets = induction(length, 200, 1, 0)
    assert ((tokens == MARK).sum(1) == 2).all() and (tokens[:, -1] == MARK).all()
    assert (targets[:, :-1] == NO_TARGET).all() and np.isin(targets[:, -1], LETTERS).all()
    place = (tokens[:, :-1] == MARK).argmax(1)
    assert np.array_equal(targets[:, -1], tokens[np.arange(200), place + 1])
    assert set(place) == set(range(length - 2)) if length < 32 else len(set(place)) > 100


@pytest.mark.parametrize("length", [3, 31, 256])
def test_parity_asks_whether_the_ones_so_far_are_odd(length):
    """At every place (Grazzi et al. 2411.12537); bits and answers are as often 1 as 0."""
    tokens, targets = parity(length, 50, 1, 0)
    ones = tokens == ord("1")
    odd = np.logical_xor.accumulate(ones, axis=1)
    assert np.isin(tokens, [*b"01"]).all() and (targets == ord("0") + odd).all()
    assert abs(ones.mean() - 0.5) < 0.1 and abs(odd.mean() - 0.5) < 0.1


@pytest.mark.parametrize("length, pairs", [(3, 0), (3, 1), (31, 0), (31, 15), (400, 0), (400, 32)])
def test_recall_asks_for_the_values_of_keys(length, pairs):
    """MQAR (Arora et al. 2312.04927), by a loop: the keys of a window differ, any may come first,
    and be asked for. Without a number of pairs, windows have 1 to a quarter of their length."""
    tokens, targets = recall(length, 100, 1, 0, pairs)
    counts = (targets == NO_TARGET).sum(1) // 2
    asked = set()
    for row, answer, count in zip(tokens.tolist(), targets.tolist(), counts):
        keys, values, queries = row[0:2 * count:2], row[1:2 * count:2], row[2 * count:]
        value_of = dict(zip(keys, values))
        assert len(value_of) == count and {*keys} <= {*KEYS} and {*values} <= {*LETTERS}
        assert queries and answer == 2 * count * [NO_TARGET] + [value_of[key] for key in queries]
        asked |= {keys.index(key) for key in queries}
    assert asked == set(range(counts.max()))
    most = pairs or min(max(length // 4, 1), len(KEYS))
    assert counts.min() == (pairs or 1) and 0.9 * most < counts.max() <= most
    assert {*recall(9, 2000, 1, 0)[0][:, 0]} == {*KEYS} and not {*KEYS} & {*LETTERS}


@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_a_time_invariant_layer_adds_what_it_sees_wherever_it_was(layer):
    """A system's answer to a text is the sum of those to its letters: content gates nothing."""
    torch.manual_seed(0)
    system = LM(Config((layer,), d_model=5, d_state=6)).double().layers[0].mixer.system
    x = torch.randn(1, 20, 5, dtype=torch.float64)
    y = system(x, None, 0)[0]
    impulses = torch.eye(20, dtype=torch.float64)[:, :, None] * x  # (20, 20, 5), a letter each
    close(system(impulses, None, 0)[0].sum(0, keepdim=True), y)
    close(system(F.pad(x[:, :13], (0, 0, 7, 0)), None, 0)[0][:, 7:], y[:, :13])


TINY = "--layer mamba --d_model 16 --n_layer 1 --seq_len 8 --batch_size 64 --device cpu".split()


def test_a_task_trains_resumes_and_reports_accuracy(tmp_path, capsys):
    """induction in windows of 8: better than one in 14; its figures are targets', not bytes'."""
    out = ["--out", str(tmp_path / "run")]
    assert train.main([*TINY, *out, "--data", "induction", "--lr", "0.05", "--steps", "2"]) == 0
    assert train.main([*out, "--resume", "--steps", "100"]) == 0
    said = capsys.readouterr().out
    assert "induction: new windows" in said and "bits per target" in said and "gzip" not in said
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_bpb_carried"] is None and last["val_accuracy"] > 0.3
    assert train.main([*out, "--eval_only", "--seq_len", "20"]) == 0
    assert "windows of 20" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    *((f"--data {name} --seq_len 2", f"{name} needs windows of at least 3") for name in TASKS),
    ("--data selective_copy --objective mask", "has its own targets")])
def test_a_task_refuses_what_it_cannot_be(tmp_path, capsys, flags, message):
    assert train.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()]) == 2
    assert message in capsys.readouterr().err and not [*(tmp_path / "run").glob("*")]


def test_the_study_scores_targets_only_in_the_window_and_in_its_last_quarter():
    tokens = np.arange(8)[None]
    targets = np.array([[NO_TARGET, 1, 0, 3, NO_TARGET, 5, 6, 0]])
    same = lambda tokens, state: (F.one_hot(tokens, 9), None)  # guesses what it reads
    assert score(same, tokens, targets) == pytest.approx({"accuracy": 4 / 6, "last_quarter": 1 / 2})
