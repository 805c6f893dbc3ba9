"""What is predicted: masked bytes (BERT, 2018), masked diffusion (Sahoo et al. 2024); filling with what learnt it."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

import sample
import train
from model import Config, Encoder, load
from sample import filter_logits, unmask
from tests.test_train import F64, argv, go, losses, refused
from train import MASK, NO_TARGET, evaluate, masked_bytes, masked_diffusion, prediction_loss, surprise


def window(b, l, seed=0):
    """(the byte before each, the bytes)"""
    x = np.random.default_rng(seed).integers(256, size=(b, l + 1))
    return x[:, :-1], x[:, 1:]


# Masked bytes


@pytest.mark.parametrize("l, count", [(1, 1), (3, 1), (20, 3), (101, 15)])
def test_15_percent_of_every_row_are_predicted(l, count):
    before, x = window(7, l)
    tokens, targets = masked_bytes(before, x, 3, 0)
    chosen = targets != NO_TARGET
    assert (chosen.sum(1) == count).all()
    assert (targets[chosen] == x[chosen]).all() and (tokens[~chosen] == x[~chosen]).all()


def test_80_percent_are_masked_10_are_random_and_10_stay():
    before, x = window(200, 1000)
    tokens, targets = masked_bytes(before, x, 3, 0)
    chosen = targets != NO_TARGET
    shown, real = tokens[chosen], x[chosen]
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == real).mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    assert ((shown != MASK) & (shown != real)).mean() == pytest.approx(0.1, abs=0.01)


def test_every_position_is_chosen_equally_often():
    chosen = masked_bytes(*window(20_000, 20), 3, 0)[1] != NO_TARGET
    assert chosen.mean(0) == pytest.approx(np.full(20, 0.15), abs=0.01)


@pytest.mark.parametrize("objective", [masked_bytes, masked_diffusion])
def test_draws_depend_on_the_seed_and_on_where_they_are_alone(objective):
    draw = lambda seed, first: objective(*window(4, 30), seed, first)[0]
    assert (draw(1, 8) == draw(1, 8)).all()
    assert (draw(1, 8) != draw(2, 8)).any() and (draw(1, 8) != draw(1, 12)).any()


def test_what_is_masked_does_not_depend_on_which_windows_are_drawn():
    """(seed, step) and (seed, step, 0) seed the same generator in NumPy; the masks' must be another."""
    rng = train.choose(np.empty(0, int), 10, 1, 0)[1]
    drawn = [r.random(64) for r in (rng, np.random.default_rng((1, 0)), np.random.default_rng((1, 0, 0)))]
    assert (drawn[1] == drawn[2]).all() and not np.isin(drawn[0], drawn[1]).any()


# Masked diffusion


def test_the_number_of_masks_is_uniform():
    """Over many windows every k in 1 .. l comes equally often, and spread out within any few."""
    k = (masked_diffusion(*window(2000, 10), 3, 0)[1] != NO_TARGET).sum(1)
    counts = Counter(k.tolist())
    assert counts.keys() == set(range(1, 11)) and all(abs(n - 200) <= 4 for n in counts.values())
    for first in (0, 4, 1000):
        assert len(set((masked_diffusion(*window(4, 1000), 3, first)[1] != NO_TARGET).sum(1) // 200)) >= 3


def test_every_set_of_k_places_is_equally_likely():
    chosen, _ = train.choose(np.full(30_000, 2), 4, 1, 0)
    counts = Counter(map(tuple, chosen.tolist()))
    assert len(counts) == 6 and all(abs(n - 5000) < 350 for n in counts.values())  # five standard deviations


def test_all_chosen_bytes_are_masked():
    before, x = window(50, 20)
    tokens, targets = masked_diffusion(before, x, 3, 0)
    assert ((tokens == MASK) == (targets != NO_TARGET)).all() and (targets[tokens == MASK] == x[tokens == MASK]).all()


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
    def loss(hidden):
        hidden = torch.tensor([[i in hidden for i in range(l)]])
        return prediction_loss(model, x.masked_fill(hidden, MASK), x.masked_fill(~hidden, NO_TARGET)).item()

    by_k = [np.mean([loss(set(s)) for s in itertools.combinations(range(l), k)]) for k in range(1, l + 1)]

    def chain(order):
        return sum(loss_of_one(order[:j], order[j]) for j in range(l)) / l

    @torch.no_grad()
    def loss_of_one(known, place):
        shown = x.masked_fill(torch.tensor([[i not in known for i in range(l)]]), MASK)
        target = torch.full_like(x, NO_TARGET)
        target[0, place] = x[0, place]
        return surprise(model(shown)[0], target).item()

    by_order = [chain(order) for order in itertools.permutations(range(l))]
    assert np.mean(by_k) == pytest.approx(np.mean(by_order), rel=1e-12)


# Losses and validation


def test_a_rows_loss_is_the_mean_over_its_targets():
    logits, targets = torch.randn(2, 3, 5, dtype=F64), torch.tensor([[1, NO_TARGET, 4], [NO_TARGET, 2, NO_TARGET]])
    nats = -logits.log_softmax(-1)
    want = torch.stack([(nats[0, 0, 1] + nats[0, 2, 4]) / 2, nats[1, 1, 2]])
    torch.testing.assert_close(surprise(logits, targets), want, rtol=1e-12, atol=1e-12)
    assert surprise(logits.float(), targets).dtype == surprise(logits.bfloat16(), targets).dtype == torch.float32


class Oracle(torch.nn.Module):
    """Knows each byte that it sees, with probability 1/2, and guesses uniformly at a mask."""
    constant_memory = False

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens, state=None, upto=None):
        law = torch.full((*tokens.shape, 257), 0.5 / 256, dtype=F64).scatter(-1, tokens[..., None], 0.5)
        return torch.where((tokens == MASK)[..., None], torch.full_like(law, 1 / 257), law).log() + self.p, None


@pytest.mark.parametrize("size, seq_len", [(64, 16), (70, 16), (5, 16), (30, 1)])
def test_validation_of_masks_is_a_mean_over_bytes(size, seq_len):
    """What is masked costs log2 257 bits whatever the windows; a shorter last one counts by its length."""
    data = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    bpb, accuracy = evaluate(Oracle(), data, seq_len, 3, objective=train.OBJECTIVES["diffusion"])
    assert bpb == pytest.approx(math.log2(257), rel=1e-10) and accuracy == 0  # the first of equals is byte 0
    assert evaluate(Oracle(), data, seq_len, 3, objective=train.OBJECTIVES["diffusion"]) == (bpb, accuracy)


def test_masked_accuracy_and_bits_count_what_was_left_standing():
    """80 % are masked: log2 257 bits each. 10 % stay: 1 bit each, and right. 10 % are replaced: log2 512 and wrong."""
    data = np.random.default_rng(0).integers(1, 256, size=100_000, dtype=np.uint8)
    bpb, accuracy = evaluate(Oracle(), data, 1000, 3, objective=train.OBJECTIVES["mask"])
    assert bpb == pytest.approx(0.8 * math.log2(257) + 0.1 * 1 + 0.1 * 9, abs=0.1)
    assert accuracy == pytest.approx(0.1, abs=0.01)


# Runs


@pytest.mark.parametrize("objective, block, layer", [("mask", "gated", "s4d"), ("diffusion", "stacked", "attention")])
def test_a_run_says_what_it_measures_and_leaves_an_encoder(objective, block, layer, corpus, tmp_path, capsys):
    log = go(corpus, tmp_path / "run", "--objective", objective, "--block", block, "--layer", layer)
    out = capsys.readouterr().out
    unit = {"mask": "bits per masked byte", "diffusion": "bits per byte at most"}[objective]
    for part in (f"{log[-1]['val_bpb']:.4f} {unit}", f"{log[-1]['val_accuracy']:.1%} guessed right", "ln 257",
                 "--fill"):
        assert part in out
    assert ("xz" in out) == (objective == "diffusion")
    model, extra = load(tmp_path / "run")
    assert isinstance(model, Encoder) and model.config.block == block and model.config.layers == (layer,)
    assert log[-1]["val_bpb_carried"] is None and extra["flags"]["objective"] == objective
    assert train.main(["--out", str(tmp_path / "run"), "--eval_only", "--device", "cpu"]) == 0
    assert f"{log[-1]['val_bpb']:.4f} {unit}" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["mask", "diffusion"])
def test_encoders_learn(objective, corpus, tmp_path):
    log = go(corpus, tmp_path / "run", "--objective", objective, "--steps", 60, "--lr", 0.01)
    assert np.mean(losses(log)[-10:]) < 0.75 * losses(log)[0] and log[-1]["val_bpb"] < 0.75 * losses(log)[0]


@pytest.mark.parametrize("objective", ["mask", "diffusion"])
def test_parts_of_a_batch_and_resuming_draw_the_same_masks(objective, corpus, tmp_path):
    flags = ("--objective", objective, "--dtype", "float64")
    whole = go(corpus, tmp_path / "whole", *flags)
    assert losses(go(corpus, tmp_path / "parts", *flags, "--accumulate", 2)) == pytest.approx(losses(whole), rel=1e-10)
    go(corpus, tmp_path / "two", *flags, "--steps", 2)
    resumed = go(corpus, tmp_path / "two", *flags, "--steps", 4, "--resume")
    assert losses(resumed)[0] == losses(whole)[0]
    c, data = train.Flags(objective=objective, seq_len=9), np.arange(99, dtype=np.uint8)
    draw = lambda step: train.draw_batch(c, data, train.OBJECTIVES[objective], step)
    assert not torch.equal(draw(0), draw(1)) and torch.equal(draw(1), draw(1))


def test_defaults_of_an_encoder():
    c = train.Flags(objective="mask")
    assert (c.layer, c.block, c.out) == ("s4d", "gated", "out/mask")
    c = train.Flags()
    assert (c.layer, c.block, c.out) == ("mamba2", "", "out/mamba2")
    assert train.make_config(train.Flags(objective="diffusion")).vocab == 257


@pytest.mark.parametrize("flags, parts", [
    ("--objective masks", ["masks", "next, mask, diffusion"]), ("--block gated", ["--block gated", "--objective mask"]),
    ("--objective mask --block square", ["square", "gated, stacked"]),
    ("--objective mask --layer mamba", ["mamba", "s4d, attention"])])
def test_bad_flags_are_one_line(flags, parts, corpus, tmp_path, capsys):
    refused(capsys, argv(corpus, tmp_path / "run", *flags.split()), *parts)
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_validated_by_its_own_objective_or_another(corpus, tmp_path, capsys):
    go(corpus, tmp_path / "run", "--objective", "mask")
    flags = ["--eval_only", "--out", str(tmp_path / "run")]
    for more, unit in (([], "masked byte"), (["--objective", "diffusion"], "byte at most")):
        capsys.readouterr()
        assert train.main([*flags, *more]) == 0
        assert f"bits per {unit}" in capsys.readouterr().out
    refused(capsys, [*flags, "--objective", "next"], "is for an encoder")


def test_an_objective_is_fixed_for_a_runs_life(corpus, tmp_path, capsys):
    go(corpus, tmp_path / "run", "--objective", "mask")
    refused(capsys, ["--out", tmp_path / "run", "--resume", "--objective", "next"],
            "'mask'", "another --out")


# Filling


@pytest.fixture
def encoder(corpus, tmp_path):
    go(corpus, tmp_path / "encoder", "--objective", "mask")
    return tmp_path / "encoder"


def fill(encoder, capfdbinary, text, *flags):
    capfdbinary.readouterr()
    assert sample.main(["--ckpt", str(encoder), "--fill", text, "--raw", "--device", "cpu", *map(str, flags)]) == 0
    return capfdbinary.readouterr().out


@pytest.mark.parametrize("steps", [0, 1, 3, 100])
def test_filling_keeps_what_is_known(steps, encoder, capfdbinary):
    filled = fill(encoder, capfdbinary, "12 ___ared is é_", "--rounds", steps)
    assert len(filled) == len("12 ___ared is é_".encode())
    assert filled.startswith(b"12 ") and filled[6:-1] == "ared is é".encode()


def test_filling_without_a_hole_goes_on_after_the_text(encoder, capfdbinary):
    filled = fill(encoder, capfdbinary, "12 squared", "--bytes", 7)
    assert len(filled) == 17 and filled.startswith(b"12 squared")


def test_filling_depends_on_the_seed_and_at_temperature_0_on_nothing(encoder, capfdbinary):
    write = lambda *flags: fill(encoder, capfdbinary, "____________", *flags)
    assert write() == write() != write("--seed", 2)
    assert write("--temperature", 0) == write("--temperature", 0, "--seed", 2)
    two = fill(encoder, capfdbinary, "a____________b", "--batch", 2)
    assert len(two) == 28 and two[:14] != two[14:] and two[0:1] == two[14:15] == b"a"


def test_a_causal_model_does_not_fill_and_an_encoder_does_nothing_else(encoder, corpus, tmp_path, capsys):
    go(corpus, tmp_path / "causal", "--layer", "mamba")
    refused(capsys, ["--ckpt", tmp_path / "causal", "--fill", "a_b", "--device", "cpu"],
            "causal", "leave --fill out", main=sample.main)
    refused(capsys, ["--ckpt", encoder, "--prompt", "a", "--device", "cpu"], "encoder", "--fill TEXT", main=sample.main)
    refused(capsys, ["--ckpt", encoder, "--prompt", "a", "--fill", "a_"], "--fill and --prompt", main=sample.main)
    refused(capsys, ["--ckpt", encoder, "--fill", "a_", "--rounds", -1], "--rounds -1", main=sample.main)


class Pair(torch.nn.Module):
    """A law over two bits given whatever is known of them: logits (b, 2, 257)."""
    first, second = torch.tensor([0.9, 0.2, 0.4]), torch.tensor([0.3, 0.6, 0.8])  # p(1) if the other is 0, 1, masked

    calls = 0

    def forward(self, tokens, state=None, upto=None):
        self.calls += 1
        known = tokens.clamp(max=2).flip(1)  # 0, 1 or 2: masked
        one = torch.stack([self.first[known[:, 0]], self.second[known[:, 1]]], dim=1)  # (b, 2)
        logits = torch.full((*tokens.shape, 257), -torch.inf)
        logits[..., 0], logits[..., 1] = (1 - one).log(), one.log()
        logits[..., MASK] = 9.0  # never to be drawn
        return logits, None


def test_a_byte_a_round_samples_the_chain_rule_in_a_random_order():
    """Both orders enumerated: p(a, b) = (p1(a) p2(b | a) + p2(b) p1(a | b)) / 2."""
    bit = lambda p, value: p if value else 1 - p
    want = {(a, b): (bit(0.4, a) * bit(Pair.second[a].item(), b) + bit(0.8, b) * bit(Pair.first[b].item(), a)) / 2
            for a in (0, 1) for b in (0, 1)}
    n = 40_000
    drawn = unmask(Pair(), torch.full((n, 2), MASK), 0, filter_logits, torch.Generator().manual_seed(0))
    counts = Counter(map(tuple, drawn.tolist()))
    for pair, p in want.items():
        assert counts[pair] / n == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    at_once = Counter(map(tuple, unmask(Pair(), torch.full((n, 2), MASK), 1, filter_logits).tolist()))
    assert at_once[0, 0] / n == pytest.approx(0.6 * 0.2, abs=0.015)  # in one round the two know nothing of each other
    assert abs(want[0, 0] - 0.6 * 0.2) > 0.09


@pytest.mark.parametrize("holes, steps, calls", [(7, 0, 7), (7, 3, 3), (7, 20, 7), (1, 1, 1), (0, 5, 0)])
def test_the_model_is_asked_once_a_round(holes, steps, calls):
    model, tokens = Pair(), torch.tensor([[MASK, 1] * holes + [0, 1]])
    filled = unmask(lambda t: (model(t.view(-1, 2))[0].view(*t.shape, 257), None), tokens, steps, filter_logits)
    assert model.calls == calls and (filled != MASK).all() and (filled[tokens != MASK] == tokens[tokens != MASK]).all()


def test_temperature_0_fills_where_the_model_is_surest_first():
    """First the second byte, p(1) = 0.8, then the first, of which p(1 | 1) = 0.2."""
    greedy = lambda logits: filter_logits(logits, temperature=0)
    assert unmask(Pair(), torch.full((3, 2), MASK), 0, greedy, likeliest=True).tolist() == [[0, 1]] * 3
