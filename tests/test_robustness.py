"""Evaluating any byte checkpoint as MambaByte does (2401.13660): noise, sliding windows, loss by position, words."""
import math

import numpy as np
import pytest
import torch

import train
from data.files import UserError
from model import LM, Config, load, save
from tests.noise import NOISES, corrupt
from tests.studies import by_position, sliding_bpb, window_nats, word_perplexity
from train import evaluate

TEXT = np.frombuffer("Ein Ärgernis: the quick brown fox jumps over 13 lazy dogs.\n".encode() * 50, np.uint8)


def noisy(noise, text="a bÄ-Z{9`\n"):
    return bytes(corrupt(np.frombuffer(text.encode(), np.uint8), noise)).decode()


def test_noises_that_draw_nothing():
    """Letters are ASCII's; antspeak does not tear a character of several bytes apart."""
    assert noisy("upper") == "A BÄ-Z{9`\n"
    assert noisy("antspeak") == "A   B Ä - Z { 9 ` \n "
    assert noisy("") == "a bÄ-Z{9`\n"


def test_noises_at_probability_one():
    assert noisy("drop:1") == "" and noisy("repeat:1", "abc") == "aabbcc" and noisy("swap:1", "abcde") == "badce"


@pytest.mark.parametrize("noise", ["drop", "repeat", "swap"])
def test_noise_meets_a_share_p_of_the_bytes(noise):
    """Within four standard deviations; swaps by their number, of which overlapping ones are left out."""
    x = np.arange(100_000, dtype=np.uint32)  # all differ, so that what happened to each is seen
    for p in (0.05, 0.3):
        y = NOISES[noise](x, p, np.random.default_rng(1))
        met = {"drop": 1 - len(y) / len(x), "repeat": len(y) / len(x) - 1}.get(noise)
        if noise == "swap":
            assert sorted(y) == list(x) and np.abs(y.astype(int) - x).max() == 1
            met, p = (y != x).mean() / 2, p / (1 + p)  # runs of chosen neighbours swap every second time
        else:
            assert (np.diff(y.astype(int)) >= 0).all() and set(np.bincount(y)) <= {0, 1, 2}
        assert abs(met - p) < 4 * math.sqrt(p / len(x))


def test_random_case_tosses_a_coin_for_each_letter():
    y = bytes(corrupt(TEXT, "random_case"))
    assert y.upper() == bytes(TEXT).upper() and y == bytes(corrupt(TEXT, "random_case"))
    letters = [c for c in y.decode() if c.isascii() and c.isalpha()]
    assert abs(sum(c.isupper() for c in letters) / len(letters) - 0.5) < 4 * 0.5 / math.sqrt(len(letters))


@pytest.mark.parametrize("noise", ["drop", "drop:0", "drop:1.5", "drop:x", "drop:nan", "upper:0.1", "noise", ":0.1",
                                   "swap:-1"])
def test_unknown_noise_is_a_one_line_error(noise):
    with pytest.raises(UserError, match="is not one of drop:P") as error:
        corrupt(TEXT, noise)
    assert "\n" not in str(error.value)


def model_of(layer, dtype=torch.float64):
    torch.manual_seed(0)
    return LM(Config((layer,) * 2, d_model=12, head_dim=4, n_head=2, n_kv_head=1, d_state=5)).to(dtype).eval()


@pytest.mark.parametrize("layer", ["mamba", "attention+mlp"])
def test_windows_score_each_byte_from_what_their_window_has_shown(layer):
    """Against one call for every byte: the byte before a window is all it knows of the past; read in pieces of 3."""
    model, data = model_of(layer), TEXT[:23]
    nats = window_nats(model, data, 7, 3, 2, piece=3)
    assert nats.shape == (6, 7)
    with torch.inference_mode():
        for w, i in ((0, 0), (0, 6), (2, 0), (2, 5), (5, 6)):
            before = [10, *data[:-1]][3 * w:3 * w + i + 1]
            want = -torch.log_softmax(model(torch.tensor([before]).long())[0][0, -1], -1)[int(data[3 * w + i])].item()
            assert abs(nats[w, i].item() - want) < 1e-10


def test_sliding_windows_are_the_strides_of_ordinary_validation():
    """All of the first window, the last `stride` bytes of every other; disjoint windows are the special case."""
    model, data = model_of("mamba"), TEXT[:28]
    nats = window_nats(model, data, 8, 4, 3)
    want = torch.cat([nats[0], *(row[4:] for row in nats[1:])])
    assert len(want) == 28 and abs(sliding_bpb(nats, 4) - want.mean().item() / math.log(2)) < 1e-12
    assert abs(sliding_bpb(window_nats(model, data, 7, 7, 3), 7) - evaluate(model, data, 7, 3)[0]) < 1e-10


def test_loss_by_position_doubles_its_parts():
    nats = torch.arange(64.0).log2().clamp(min=0).expand(3, 64) * math.log(2)
    parts = by_position(nats)
    assert [(a, b) for a, b, _ in parts] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    assert abs(sum((b - a) * bpb for a, b, bpb in parts) - nats[0].sum().item() / math.log(2)) < 1e-3
    assert by_position(torch.zeros(2, 5))[-1][:2] == (2, 5)


def test_bits_per_byte_are_a_perplexity_of_words():
    """MambaByte-972M on PG19's test: 0.5901387288 nats a byte, 41,289,101 bytes, 6,965,511 words -> 33.0537."""
    bits_per_word = 0.5901387288 / math.log(2) * 41_289_101 / 6_965_511
    assert abs(word_perplexity(1000 * bits_per_word, b"word \n " * 1000) - 33.0537) < 1e-3


def test_a_published_checkpoint_is_evaluated_and_trained_further(tmp_path, capsys):
    (tmp_path / "text").write_bytes(bytes(TEXT))
    save(tmp_path / "published", model_of("mamba", torch.float32), "state-spaces")
    flags = ["--data", str(tmp_path / "text"), "--seq_len", "16"]
    assert train.main(["--eval_only", "--out", str(tmp_path / "published"), *flags]) == 0
    out = capsys.readouterr().out
    assert "with the state carried through" in out
    flags += ["--init", str(tmp_path / "published"), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert train.main([*flags, "--lr", "0", "--layer", "mamba"]) == 2
    assert "--layer is fixed by" in capsys.readouterr().err
    assert train.main([*flags, "--lr", "1e-9"]) == 0
    want, got = load(tmp_path / "published")[0], load(tmp_path / "run")[0]
    assert got.config == want.config
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert train.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
