"""data/synthetic.py: what each task asks for, and why no convolution solves the first."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data.synthetic import COPY, KEYS, LETTERS, MARK, NO_TARGET, NOISE, TASKS, induction, parity, recall, selective_copy
from model import LM, Config
from tests.studies import score, state_runs


@pytest.mark.parametrize("length, count", [(3, 1), (16, 1), (64, 2), (65, 2), (256, 4), (1000, 8), (4112, 16)])
def test_selective_copying_asks_for_the_letters_in_order(length, count):
    """The answer is what is left when the dots are taken out; every place in the noise occurs."""
    tokens, targets = selective_copy(length, 50, 1, 0)
    assert tokens.shape == targets.shape == (50, length) and tokens.dtype == targets.dtype == np.int64
    for row, answer in zip(tokens, targets):
        assert (row[-count:] == COPY).all() and (answer[:-count] == NO_TARGET).all()
        letters = row[:-count][row[:-count] != NOISE]
        assert np.array_equal(letters, answer[-count:]) and np.isin(letters, LETTERS).all() and len(letters) == count
    if length == 16:
        assert ((tokens[:, :-count] != NOISE).sum(0) > 0).sum() > 12


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
    """At every place (Grazzi et al. 2411.12537), by a loop; bits and answers are as often 1 as 0."""
    tokens, targets = parity(length, 50, 1, 0)
    assert tokens.shape == (50, length) and tokens.dtype == targets.dtype == np.int64
    for row, answer in zip(tokens, targets):
        odd = 0
        for bit, want in zip(row, answer):
            odd ^= bit == ord("1")
            assert bit in b"01" and want == ord("01"[odd])
    assert abs((tokens == ord("1")).mean() - 0.5) < 0.1 and abs((targets == ord("1")).mean() - 0.5) < 0.1


@pytest.mark.parametrize("length, pairs", [(3, 0), (3, 1), (31, 0), (31, 15), (64, 16), (400, 0), (400, 32)])
def test_recall_asks_for_the_values_of_keys(length, pairs):
    """MQAR (Arora et al. 2312.04927), by a loop: the keys of a window differ, and every query is a target. Without a
    number of pairs, windows have 1 to a quarter of their length."""
    tokens, targets = recall(length, 100, 1, 0, pairs)
    assert tokens.shape == (100, length) and tokens.dtype == targets.dtype == np.int64
    counts = (targets == NO_TARGET).sum(1) // 2
    for row, answer, count in zip(tokens, targets, counts):
        value_of = dict(zip(row[0:2 * count:2], row[1:2 * count:2]))
        assert len(value_of) == count and np.isin(list(value_of), KEYS).all()
        assert np.isin(list(value_of.values()), LETTERS).all() and (answer[:2 * count] == NO_TARGET).all()
        assert [value_of[key] for key in row[2 * count:]] == list(answer[2 * count:]) and 2 * count < length
    most = min(max(length // 4, 1), len(KEYS))
    assert set(counts) == {pairs} if pairs else counts.min() == 1 and counts.max() > 0.9 * most >= 0.9 * counts.max()
    asked = {place for row, count in zip(tokens, counts) for place in np.isin(row[:2 * count:2], row[2 * count:]).nonzero()[0]}
    assert asked == set(range(counts.max()))  # a query may be for the first pair and for the last


def test_recalls_keys_are_no_values_and_any_of_them_may_come_first():
    assert not set(KEYS) & set(LETTERS) and set(recall(9, 2000, 1, 0)[0][:, 0]) == set(KEYS)


@pytest.mark.parametrize("task", TASKS.values())
def test_a_task_is_a_function_of_seed_and_step(task):
    first, again, other, later = (np.stack(task(40, 9, *where)) for where in ((1, 5), (1, 5), (2, 5), (1, 6)))
    assert np.array_equal(first, again) and not np.array_equal(first, other) and not np.array_equal(first, later)


@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_a_time_invariant_layer_adds_what_it_sees_wherever_it_was(layer):
    """A system's answer to letters and dots is the sum of its answers to each, shifted: content gates nothing."""
    torch.manual_seed(0)
    mixer = LM(Config((layer,), d_model=5, d_state=6)).double().layers[0].mixer
    x, zero = torch.randn(1, 20, 5, dtype=torch.float64), torch.zeros(1, 20, 5, dtype=torch.float64)
    y = mixer.system(x, None, 0)[0]
    alone = sum(mixer.system(torch.cat([zero[:, :t], x[:, t:t + 1], zero[:, t + 1:]], dim=1), None, 0)[0]
                for t in range(20))
    torch.testing.assert_close(y, alone, rtol=1e-10, atol=1e-10)
    late = mixer.system(torch.cat([zero[:, :7], x[:, :13]], dim=1), None, 0)[0]
    torch.testing.assert_close(late[:, 7:], y[:, :13], rtol=1e-10, atol=1e-10)


TINY = ["--d_model", "8", "--n_layer", "1", "--head_dim", "4", "--d_state", "4", "--seq_len", "8", "--batch_size", "64",
        "--device", "cpu", "--layer", "mamba"]


def test_a_task_trains_resumes_and_reports_accuracy(tmp_path, capsys):
    """induction in windows of 8: better than one in 14 within seconds; its figures are targets', not bytes'."""
    flags = [*TINY, "--data", "induction", "--lr", "0.03", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--steps", "2"]) == 0
    assert train.main(["--out", str(tmp_path / "run"), "--resume", "--steps", "200"]) == 0
    out = capsys.readouterr().out
    assert "induction: new windows in each step" in out and "bits per target" in out and "gzip" not in out
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_bpb_carried"] is None and last["val_accuracy"] > 0.3
    assert train.main(["--out", str(tmp_path / "run"), "--eval_only", "--seq_len", "20"]) == 0
    assert "windows of 20" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    *((f"--data {task} --seq_len 2", f"--data {task} needs windows of at least 3 bytes") for task in TASKS),
    ("--data selective_copy --objective mask", "has its own targets")])
def test_a_task_refuses_what_it_cannot_be(tmp_path, capsys, flags, message):
    assert train.main([*TINY, "--out", str(tmp_path / "run"), *flags.split()]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_study_of_states_trains_every_cell_in_a_folder_of_its_own():
    """4 tasks, 6 layers, 3 rates, and recall with three more sizes of Mamba-2's state: flags that train.py takes."""
    runs = [run for cell in state_runs(Path("out"), quick=False).values() for run in cell.values()]
    assert len({folder for folder, _ in runs}) == len(runs) == 4 * 6 * 3 + 3 * 3
    for _, flags in runs:
        c, given = train.parse(train.Flags, flags.split(), "")
        assert len(train.make_config(c).layers) == 2 and c.data in TASKS and "lr" in given


def test_the_study_scores_targets_only_in_the_window_and_in_its_last_quarter():
    tokens = np.arange(8)[None]
    targets = np.array([[NO_TARGET, 1, 0, 3, NO_TARGET, NO_TARGET, 6, 0]])
    same = lambda tokens, state: (F.one_hot(tokens, 9), None)  # guesses what it reads
    assert score(same, tokens, targets) == pytest.approx({"accuracy": 3 / 5, "last_quarter": 1 / 2})
