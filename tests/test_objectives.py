"""What is predicted: masked bytes (BERT, 2018), masked diffusion (Sahoo et al. 2024); filling with what learnt it."""
import itertools
import math
import re
import signal
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import train
from model import LM, Config, Encoder, load, save
from sample import filter_logits, unmask
from tests.test_train import F64, argv, at_step, go, losses, read_log, refused
from train import MASK, NO_TARGET, evaluate, masked_bytes, masked_diffusion, prediction_loss, surprise


def window(b, l, seed=0):
    """(the byte before each, the bytes)"""
    x = np.random.default_rng(seed).integers(256, size=(b, l + 1))
    return x[:, :-1], x[:, 1:]


# What is masked


@pytest.mark.parametrize("l, count", [(1, 1), (3, 1), (20, 3), (101, 15)])
def test_15_percent_of_every_row_are_predicted(l, count):
    before, x = window(7, l)
    tokens, targets = masked_bytes(before, x, 3, 0)
    chosen = targets != NO_TARGET
    assert (chosen.sum(1) == count).all()
    assert (targets[chosen] == x[chosen]).all() and (tokens[~chosen] == x[~chosen]).all()


def test_80_percent_are_masked_10_are_random_and_10_stay():
    before, x = window(200, 500)
    tokens, targets = masked_bytes(before, x, 3, 0)
    chosen = targets != NO_TARGET
    shown, real = tokens[chosen], x[chosen]
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == real).mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    assert ((shown != MASK) & (shown != real)).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("objective", ["mask", "diffusion"])
def test_draws_depend_on_the_seed_and_on_where_they_are_alone(objective):
    def draw(seed, first):
        c, text = train.Flags(seed=seed, seq_len=30), np.zeros(99, np.uint8)
        return train.draw_batch(c, text, train.OBJECTIVES[objective], first).tolist()

    assert draw(1, 8) == draw(1, 8)
    assert draw(1, 8) != draw(2, 8) and draw(1, 8) != draw(1, 12)


def test_what_is_masked_does_not_depend_on_which_windows_are_drawn():
    """(seed, step) and (seed, step, 0) seed the same generator in NumPy; the masks' must be another."""
    rng = train.choose(np.empty(0, int), 10, 1, 0)[1]
    assert not np.isin(rng.random(64), np.random.default_rng((1, 0)).random(64)).any()


def test_diffusion_masks_what_it_chooses_and_their_number_is_uniform():
    """Over many windows every k in 1 .. l comes equally often, and spread out within any few."""
    before, x = window(2000, 10)
    tokens, targets = masked_diffusion(before, x, 3, 0)
    chosen = targets != NO_TARGET
    assert (tokens == np.where(chosen, MASK, x)).all() and (targets[chosen] == x[chosen]).all()
    counts = Counter(chosen.sum(1).tolist())
    assert counts.keys() == set(range(1, 11)) and all(abs(n - 200) <= 4 for n in counts.values())
    for first in (0, 4, 1000):
        assert len(set((masked_diffusion(*window(4, 1000), 3, first)[1] != NO_TARGET).sum(1) // 200)) >= 3


def test_every_set_of_k_places_is_equally_likely():
    chosen, _ = train.choose(np.full(30_000, 2), 4, 1, 0)
    counts = Counter(map(tuple, chosen.tolist()))
    assert len(counts) == 6 and all(abs(n - 5000) < 350 for n in counts.values())  # five standard deviations


@pytest.mark.parametrize("l", [1, 2, 4])
def test_the_diffusion_loss_is_the_chain_rule_averaged_over_orders(l):
    """E_k E_{k masked} mean surprise = mean over all orders of (1/l) sum_j -log p(x_j | those before it in that order),
    and every term is the log of a law over whole texts: the loss bounds -log of their mean (Jensen). All enumerated."""
    torch.manual_seed(0)
    config = Config(("s4d",), block="gated", d_model=8, vocab=MASK + 1, d_state=4, expand=3, norm="layer")
    model = Encoder(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    x = torch.tensor([[3, 141, 59, 26][:l]])

    @torch.no_grad()
    def nats(hidden, wanted):
        """Of the wanted places, a mean, where those that are hidden are masked."""
        hidden = torch.tensor([[i in hidden for i in range(l)]])
        others = torch.tensor([[i not in wanted for i in range(l)]])
        shown, targets = x.masked_fill(hidden, MASK), x.masked_fill(others, NO_TARGET)
        return prediction_loss(model, shown, targets).item()

    by_k = [np.mean([nats(places, places) for places in itertools.combinations(range(l), k)])
            for k in range(1, l + 1)]
    by_order = [nats(order[j:], order[j:j + 1])
                for order in itertools.permutations(range(l)) for j in range(l)]
    assert np.mean(by_k) == pytest.approx(np.mean(by_order), rel=1e-12)


# Losses and validation


def test_a_rows_loss_is_the_mean_over_its_targets():
    logits, targets = torch.randn(2, 3, 5, dtype=F64), torch.tensor([[1, NO_TARGET, 4], [NO_TARGET, 2, NO_TARGET]])
    nats = -logits.log_softmax(-1)
    want = torch.stack([(nats[0, 0, 1] + nats[0, 2, 4]) / 2, nats[1, 1, 2]])
    torch.testing.assert_close(surprise(logits, targets), want, rtol=1e-12, atol=1e-12)
    assert surprise(logits.float(), targets).dtype == surprise(logits.bfloat16(), targets).dtype == torch.float32


class Oracle(torch.nn.Embedding):
    def forward(self, tokens, state=None, upto=None):
        return super().forward(tokens), None


@pytest.fixture
def oracle():
    """Knows each byte that it sees, with probability 1/2, and guesses uniformly at a mask."""
    law = torch.full((257, 257), 0.5 / 256, dtype=F64).fill_diagonal_(0.5)
    law[MASK] = 1 / 257
    return Oracle.from_pretrained(law.log())


@pytest.mark.parametrize("size, seq_len", [(64, 16), (70, 16), (5, 16), (30, 1)])
def test_validation_of_masks_is_a_mean_over_bytes(size, seq_len, oracle):
    """What is masked costs log2 257 bits whatever the windows; a shorter last one counts by its length."""
    data = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    diffusion = train.OBJECTIVES["diffusion"]
    bpb, accuracy = evaluate(oracle, data, seq_len, 3, objective=diffusion)
    assert bpb == pytest.approx(math.log2(257), rel=1e-10) and accuracy == 0  # the first of equals is byte 0
    assert evaluate(oracle, data, seq_len, 3, objective=diffusion) == (bpb, accuracy)


def test_masked_accuracy_and_bits_count_what_was_left_standing(oracle):
    """80 % are masked: log2 257 bits each. 10 % stay: 1 bit each, and right. 10 % are replaced: log2 512 and wrong."""
    data = np.random.default_rng(0).integers(1, 256, size=100_000, dtype=np.uint8)
    bpb, accuracy = evaluate(oracle, data, 1000, 3, objective=train.OBJECTIVES["mask"])
    assert bpb == pytest.approx(0.8 * math.log2(257) + 0.1 * 1 + 0.1 * 9, abs=0.1)
    assert accuracy == pytest.approx(0.1, abs=0.01)


# Runs


@pytest.mark.parametrize("flags, unit", [
    ("--objective mask --block gated --layer s4d", "bits per masked byte"),
    ("--objective diffusion --block stacked --layer attention", "bits per byte at most")])
def test_an_encoder_learns_and_says_what_it_measures(flags, unit, corpus, tmp_path, capsys):
    flags = flags.split()
    log = go(corpus, tmp_path / "run", *flags, "--steps", 40, "--lr", 0.01)
    end = log[-1]
    assert max(np.mean(losses(log)[-10:]), end["val_bpb"]) < 0.75 * losses(log)[0]
    out = capsys.readouterr().out
    figure = f"{end['val_bpb']:.4f} {unit}"
    for part in (figure, f"{end['val_accuracy']:.1%} guessed right", "ln 257", "--fill"):
        assert part in out
    assert ("xz" in out) == ("diffusion" in flags) and end["val_bpb_carried"] is None
    config = load(tmp_path / "run")[0].config
    assert [config.block, *config.layers] == flags[3::2]
    assert train.main(["--out", str(tmp_path / "run"), "--eval_only", "--device", "cpu"]) == 0
    assert figure in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["mask", "diffusion"])
def test_parts_of_a_batch_and_resuming_draw_the_same_masks(
        objective, corpus, tmp_path, monkeypatch):
    flags = ("--objective", objective, "--dtype", "float64")
    whole = losses(go(corpus, tmp_path / "whole", *flags))
    accumulated = losses(go(corpus, tmp_path / "accumulated", *flags, "--accumulate", 2))
    assert accumulated == pytest.approx(whole, rel=1e-10)
    parts = tmp_path / "parts"
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    assert train.main(argv(corpus, parts, *flags)) == 130
    monkeypatch.undo()
    assert train.main(["--out", str(parts), "--resume"]) == 0
    assert losses(read_log(parts)) == whole


def test_defaults_of_an_encoder():
    c = train.Flags(objective="mask")
    assert (c.layer, c.block, c.out) == ("s4d", "gated", "out/mask")
    c = train.Flags()
    assert (c.layer, c.block, c.out) == ("mamba2", "", "out/mamba2")


@pytest.mark.parametrize("flags, parts", [
    ("--objective masks", ["masks", "next, mask, diffusion"]), ("--block gated", ["--block gated", "--objective mask"]),
    ("--objective mask --block square", ["square", "gated, stacked"])])
def test_bad_flags_are_one_line(flags, parts, corpus, tmp_path, capsys):
    refused(capsys, argv(corpus, tmp_path / "run", *flags.split()), *parts)
    assert not [*(tmp_path / "run").glob("*")]


# Filling


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "text").write_bytes(bytes(range(100)) * 10)
    go(folder / "text", folder / "run", "--objective", "mask")
    return folder / "run"


def test_another_objective_validates_an_encoder_but_does_not_train_it(encoder, capsys):
    validate = ["--eval_only", "--out", str(encoder), "--objective"]
    assert train.main([*validate, "diffusion"]) == 0
    assert "bits per byte at most" in capsys.readouterr().out
    refused(capsys, [*validate, "next"], "is for an encoder")
    resume = ["--resume", "--out", encoder, "--objective", "next"]
    refused(capsys, resume, "'mask'", "another --out")


def fill(encoder, capfdbinary, text, *flags):
    capfdbinary.readouterr()
    assert sample.main(["--ckpt", str(encoder), "--fill", text, "--raw", "--device", "cpu", *map(str, flags)]) == 0
    return capfdbinary.readouterr().out


@pytest.mark.parametrize("text, flags, filled", [
    ("12 ___ared is é_", [], b"12 ...ared is \xc3\xa9."),
    ("12 ___ared is é_", ["--rounds", 3], b"12 ...ared is \xc3\xa9."),
    ("12 squared", ["--bytes", 7], b"12 squared.{7}")])
def test_filling_keeps_what_is_known(text, flags, filled, encoder, capfdbinary):
    """It goes on after a text without a hole."""
    assert re.fullmatch(filled, fill(encoder, capfdbinary, text, *flags), re.DOTALL)


def test_filling_depends_on_the_seed_and_at_temperature_0_on_nothing(encoder, capfdbinary):
    write = lambda *flags: fill(encoder, capfdbinary, "____________", *flags)
    assert write() == write() != write("--seed", 2)
    assert write("--temperature", 0) == write("--temperature", 0, "--seed", 2)
    two = fill(encoder, capfdbinary, "a____________b", "--batch", 2)
    assert len(two) == 28 and two[:14] != two[14:] and two[0:1] == two[14:15] == b"a"


def test_a_causal_model_does_not_fill_and_an_encoder_does_nothing_else(encoder, tmp_path, capsys):
    save(tmp_path / "causal.pt", LM(Config(("mamba",), d_model=16)))
    for ckpt, flags, *parts in (
            (tmp_path / "causal.pt", ["--fill", "a_"], "causal", "leave --fill out"),
            (encoder, ["--prompt", "a"], "encoder", "--fill TEXT"),
            (encoder, ["--prompt", "a", "--fill", "a_"], "--fill and --prompt"),
            (encoder, ["--fill", "a_", "--rounds", -1], "--rounds -1")):
        refused(capsys, ["--ckpt", ckpt, "--device", "cpu", *flags], *parts, main=sample.main)


# p(1) of a bit if the other is 0, 1, masked
FIRST, SECOND = torch.tensor([[0.9, 0.2, 0.4], [0.3, 0.6, 0.8]])


def pair(tokens):
    """A model of two bits that knows their law; 2 is the mask, and never to be drawn."""
    one = torch.stack([FIRST[tokens[:, 1]], SECOND[tokens[:, 0]]], dim=1)
    return torch.stack([(1 - one).log(), one.log(), torch.full_like(one, 9.0)], dim=-1), None


def test_a_byte_a_round_samples_the_chain_rule_in_a_random_order():
    """Both orders enumerated: p(a, b) = (p1(a) p2(b | a) + p2(b) p1(a | b)) / 2."""
    bit = lambda p, value: p.item() if value else 1 - p.item()
    n = 40_000
    holes, generator = torch.full((n, 2), 2), torch.Generator().manual_seed(0)
    drawn = {rounds: unmask(pair, holes, rounds, filter_logits, generator, 2).tolist()
             for rounds in (0, 1)}
    for a, b in itertools.product((0, 1), repeat=2):
        apart = bit(FIRST[2], a) * bit(SECOND[2], b)
        p = (bit(FIRST[2], a) * bit(SECOND[a], b) + bit(SECOND[2], b) * bit(FIRST[b], a)) / 2
        for rounds, want in ((0, p), (1, apart)):  # in one round the two know nothing of each other
            error = math.sqrt(want * (1 - want) / n)
            assert drawn[rounds].count([a, b]) / n == pytest.approx(want, abs=5 * error)


@pytest.mark.parametrize("holes, rounds, calls", [(7, 0, 7), (7, 3, 3), (7, 20, 7), (0, 5, 0)])
def test_the_model_is_asked_once_a_round(holes, rounds, calls):
    """What is known stays, even by one that would write nothing but masks."""
    asked = []

    def model(tokens):
        asked.append(tokens)
        return 9.0 * F.one_hot(torch.full_like(tokens, MASK), MASK + 1), None

    tokens = torch.tensor([[MASK, 1] * holes + [0, 1]])
    filled = unmask(model, tokens, rounds, filter_logits)
    assert len(asked) == calls and (filled != MASK).all()
    assert torch.equal(torch.where(tokens == MASK, MASK, filled), tokens)


def test_temperature_0_fills_where_the_model_is_surest_first():
    """First the second bit, p(1) = 0.8, then the first, of which p(1 | 1) = 0.2."""
    greedy = lambda logits: filter_logits(logits, temperature=0)
    filled = unmask(pair, torch.full((3, 2), 2), 0, greedy, mask=2, likeliest=True)
    assert filled.tolist() == [[0, 1]] * 3
