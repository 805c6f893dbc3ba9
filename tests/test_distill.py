"""distill.py: the map from attention to a state-space layer, what is copied, frozen and trained, and every loss."""
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import model
import sample
import train
from conftest import close
from data.corpus import load_tokens
from distill import align_loss, input_rows, keeps_attention, make_student, match, replaced
from model import LM, Config, load
from scan import ssd
from tests.test_train import losses, refused

F64 = torch.float64


def transformer(n_layer=4, n_head=6, n_kv_head=3, size=4, **changes):
    """A float64 transformer with grouped queries, whose norms are not all alike."""
    torch.manual_seed(0)
    teacher = LM(Config(("attention+mlp",) * n_layer, d_model=n_head * size, n_head=n_head, n_kv_head=n_kv_head,
                        tie=False, **changes)).double()
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.1 * torch.randn_like(p)
    return teacher


# The map


@pytest.mark.parametrize("impl", ["naive", "quadratic", "chunked"])
@pytest.mark.parametrize("l", [1, 7, 67])
def test_ssd_without_decay_is_attention_without_softmax(impl, l):
    """dt = 1, A = 0, D = 0, n = head size: y_t = sum_{s <= t} (q_t . k_s) v_s (The Mamba in the Llama, section 3)."""
    torch.manual_seed(0)
    b, heads, kv_heads, size = 2, 6, 3, 5
    q, k, v = (torch.randn(b, l, h, size, dtype=F64) for h in (heads, kv_heads, kv_heads))
    k_all, v_all = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
    want = torch.einsum("bihn,bjhn,bjhp,ij->bihp", q, k_all, v_all, torch.ones(l, l, dtype=F64).tril())
    y, h = ssd(v_all, torch.ones(b, l, heads, dtype=F64), torch.zeros(heads, dtype=F64), k_all, q, impl=impl)
    close(y, want, name="y")
    close(h, torch.einsum("bjhp,bjhn->bhpn", v_all, k_all), name="h")


def test_a_mapped_layer_without_its_new_parts_is_the_attention_layer_without_softmax():
    """The copied rows, through ssd with dt = 1 and A = 0 and the copied out_proj; keys and values are shared."""
    teacher, x = transformer(), torch.randn(2, 11, 24, dtype=F64)
    attention, mixer = teacher.layers[1].mixer, make_student(teacher, 0, "attention").layers[1].mixer
    parts = {name: (x @ rows.T).unflatten(-1, (6, 4)) for name, rows in input_rows(mixer).items() if name != "dt"}
    y, _ = ssd(parts["x"], torch.ones(2, 11, 6, dtype=F64), torch.zeros(6, dtype=F64), parts["B"], parts["C"])
    q = attention.q_proj(x).unflatten(-1, (6, 4))
    k, v = (p(x).unflatten(-1, (3, 4)).repeat_interleave(2, dim=2) for p in (attention.k_proj, attention.v_proj))
    causal = torch.ones(11, 11, dtype=F64).tril()
    want = attention.out_proj(torch.einsum("bihn,bjhn,bjhp,ij->bihp", q, k, v, causal).flatten(2))
    close(mixer.out_proj(y.flatten(2)), want, name="output")


def test_new_parts_begin_out_of_the_way():
    """Unlike in the paper: the convolution is the identity, D = 0, dt = 0.1, biases 0, as near to neutral as can be."""
    mixer = make_student(transformer(bias=True), 0, "attention").layers[1].mixer
    for part in (mixer.in_proj, mixer.out_proj):
        close(part.bias, torch.zeros_like(part.bias), name="bias")
    identity = torch.tensor([0.0, 0, 0, 1], dtype=F64).expand_as(mixer.conv1d.weight)
    close(mixer.conv1d.weight, identity, name="conv1d.weight")
    close(mixer.conv1d.bias, torch.zeros_like(mixer.conv1d.bias), name="conv1d.bias")
    close(mixer.D, torch.zeros_like(mixer.D), name="D")
    close(F.softplus(mixer.dt_bias), torch.full_like(mixer.D, 0.1), 1e-6, "dt")


@pytest.mark.parametrize("share, kept", [(0, []), (0.125, [7]), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]),
                                         (0.75, [1, 2, 3, 5, 6, 7]), (0.875, list(range(1, 8))), (1, list(range(8)))])
def test_attention_stays_where_the_paper_keeps_it(share, kept):
    """Section 3.3; each of these shares keeps what the smaller ones here keep, so layers can be replaced stepwise."""
    assert [i for i in range(8) if keeps_attention(i, share)] == kept
    assert [i for i in range(32) if not keeps_attention(i, 0.75)] == list(range(0, 32, 4))
    assert [i for i in range(32) if keeps_attention(i, share)] == [i + 8 * j for j in range(4) for i in kept]
    larger = [s for s in (0.125, 0.25, 0.5, 0.75, 0.875, 1) if s > share]
    assert all(keeps_attention(i, s) for s in larger for i in kept)


# The student


def test_replacing_no_layer_leaves_the_logits_identical():
    teacher, tokens = transformer(), torch.randint(256, (2, 9))
    student = make_student(teacher, 1, "attention")
    assert replaced(student, teacher) == [] and torch.equal(student(tokens)[0], teacher(tokens)[0])


@pytest.mark.parametrize("share", [0, 0.5, 0.75])
def test_all_but_the_new_parts_equals_the_teacher(share):
    """The map Q -> C, K -> B, V -> x, O -> out_proj, 3 heads of keys for 6 of queries; the rest stays as it is."""
    teacher = transformer(norm="layer", rope_base=500.0, window=13)
    student = make_student(teacher, share, "attention")
    new = replaced(student, teacher)
    assert new == [i for i in range(4) if not keeps_attention(i, share)]
    assert list(student.config.layers) == [("mamba2" if i in new else "attention") + "+mlp" for i in range(4)]
    old, now = teacher.state_dict(), student.state_dict()
    assert {k for k in old.keys() & now.keys() if not torch.equal(old[k], now[k])} == set()
    assert {k.split("mixer.")[1] for k in now.keys() - old.keys()} == {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight"}
    for i in new:
        attention, mixer = teacher.layers[i].mixer, student.layers[i].mixer
        close(mixer.out_proj.weight, attention.out_proj.weight, 0, "out_proj")
        rows = input_rows(mixer)
        assert sum(len(r) for r in rows.values()) == len(mixer.in_proj.weight)
        for name, projection in {"x": attention.v_proj, "B": attention.k_proj, "C": attention.q_proj}.items():
            heads = projection.weight.unflatten(0, (-1, 4))
            for head, block in enumerate(rows[name].unflatten(0, (6, 4))):
                close(block, heads[head * len(heads) // 6], 0, f"{name} of head {head}")


def test_a_student_from_random_mixers_or_from_scratch_shares_only_what_it_says():
    teacher = transformer()
    old = teacher.state_dict()
    for mixers, same in (("random", True), ("scratch", False)):
        student = make_student(teacher, 0.5, mixers)
        mixer, attention = student.layers[0].mixer, teacher.layers[0].mixer
        assert not torch.equal(mixer.out_proj.weight, attention.out_proj.weight)
        assert not torch.equal(input_rows(mixer)["C"], attention.q_proj.weight)
        now = student.state_dict()
        new = distill.prefixes(replaced(student, teacher))
        shared = [k for k in old.keys() & now.keys() if not k.startswith(new)]
        assert shared and all(torch.equal(now[k], old[k]) == same for k in shared)
    torch.manual_seed(7)
    want = LM(distill.student_config(teacher.config, 0.5, "attention")).double().state_dict()
    torch.manual_seed(7)
    got = make_student(teacher, 0.5, "scratch").state_dict()
    assert all(torch.equal(got[k], w) for k, w in want.items())


def test_stepwise_replacement_keeps_the_layers_that_were_replaced_before():
    """75 -> 50 -> 25 -> 0 % attention, each student the source of the next."""
    source = teacher = transformer(n_layer=8)
    for share, new in ((0.75, [0, 4]), (0.5, [2, 6]), (0.25, [1, 5]), (0, [3, 7])):
        student = make_student(source, share, "attention")
        assert replaced(student, source) == new
        old, now = source.state_dict(), student.state_dict()
        assert all(torch.equal(old[k], now[k]) for k in old.keys() & now.keys())
        source = student
    assert replaced(source, teacher) == list(range(8)) and source.constant_memory


def test_a_hybrid_continues_from_its_mixed_state():
    student, tokens = make_student(transformer(window=7), 0.5, "attention"), torch.randint(256, (2, 23))
    whole, _ = student(tokens)
    state, pieces = None, []
    for piece in tokens.split([1, 2, 9, 1, 10], dim=1):
        logits, state = student(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)


# Losses


def pieces(student, teacher, targets):
    """(KL(teacher || student), KL(student || teacher), cross entropy), each a mean over positions, by autograd."""
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return ((log_q.exp() * (log_q - log_p)).sum(-1).mean(), (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
            F.nll_loss(log_p.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.3, 0.7, 1.9)])
def test_the_loss_has_the_value_and_gradient_of_its_definition(weights):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, dtype=F64) for _ in range(2))
    targets = torch.randint(7, (2, 5))
    leaf = student.clone().requires_grad_()
    got = match(leaf, teacher, targets, *weights)
    other = student.clone().requires_grad_()
    want = sum(w * loss for w, loss in zip(weights, pieces(other, teacher, targets)))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(2 * t, x)[0] for t, x in ((got, leaf), (want, other)))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_forward_and_reverse_divergence_by_hand():
    """q = (3/4, 1/4), p = (1/2, 1/2): KL(q || p) = 3/4 ln 3/2 + 1/4 ln 1/2 and KL(p || q) = 1/2 ln 2/3 + 1/2 ln 2."""
    student, teacher = torch.zeros(1, 1, 2, dtype=F64), torch.tensor([[[math.log(3), 0.0]]], dtype=F64)
    target = torch.tensor([[1]])
    forward, reverse = match(student, teacher, target, 1.0, 0.0, 0.0), match(student, teacher, target, 0.0, 1.0, 0.0)
    assert forward.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert reverse.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert match(student, None, target, 0.0, 0.0, 1.0).item() == pytest.approx(math.log(2))


def test_losses_are_means_over_positions_whatever_the_window():
    student, teacher = torch.randn(2, 1, 3, 5, dtype=F64).unbind(0)
    targets = torch.tensor([[0, 1, 2]])
    one = match(student, teacher, targets, 1.0, 0.5, 0.2)
    for b, l in ((4, 1), (1, 6), (3, 2)):
        many = match(student.repeat(b, l, 1), teacher.repeat(b, l, 1), targets.repeat(b, l), 1.0, 0.5, 0.2)
        torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-10)


def test_narrow_logits_are_compared_in_float32():
    student, teacher = (8 * torch.randn(1, 4, 9)).bfloat16(), (8 * torch.randn(1, 4, 9)).bfloat16()
    targets = torch.randint(9, (1, 4))
    leaf = student.clone().requires_grad_()
    loss = match(leaf, teacher, targets, 1.0, 1.0, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, match(student.float(), teacher.float(), targets, 1.0, 1.0, 1.0))
    assert torch.autograd.grad(loss, leaf)[0].dtype == torch.bfloat16


def test_alignment_is_zero_for_the_layer_itself_and_one_for_a_silent_layer():
    """Both read what the teacher's layer reads, so that layers do not depend on one another."""
    teacher, x = transformer(), torch.randn(2, 7, 24, dtype=F64)
    seen = {i: (x, teacher.layers[i].mixer(x)[0].detach()) for i in (0, 2)}
    assert align_loss(teacher, seen).item() == 0
    student = make_student(teacher, 0, "attention")
    for i in (0, 2):
        student.layers[i].mixer.out_proj.weight.data.zero_()
    assert align_loss(student, seen).item() == 1


# The script

TINY = "--seq_len 16 --batch_size 4 --warmup 2 --device cpu".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(200))[:2000])
    return path


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A run of train.py --layer attention with four layers."""
    out = tmp_path_factory.mktemp("teacher")
    assert train.main([*TINY, *"--layer attention --n_layer 4 --d_model 16 --n_head 2 --steps 60 --lr 0.01".split(),
                       "--data", str(corpus), "--out", str(out)]) == 0
    return out


def argv(teacher, corpus, out, *flags):
    return [*TINY, "--teacher", str(teacher), "--data", str(corpus), "--out", str(out), "--steps", "4",
            *map(str, flags)]


def go(teacher, corpus, out, *flags):
    """A run that must succeed: (its log, its model)."""
    assert distill.main(argv(teacher, corpus, out, *flags)) == 0
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()], load(out)[0]


@pytest.mark.parametrize("share", [0.25, 0])
def test_distillation_brings_the_student_to_its_teacher(share, teacher, corpus, tmp_path, capsys):
    """From attention to a student nearer to the teacher than to the beginning; then it samples and validates."""
    log, student = go(teacher, corpus, tmp_path / "run", "--keep_attention", share, "--steps", 80)
    out, bar = capsys.readouterr()
    assert "step 0      loss " in out and "guessing" not in out  # a divergence, neither bits per byte nor beside ln 256
    assert "| loss " in bar and "bits per" not in bar
    assert sorted(os.listdir(tmp_path / "run")) == ["best.pt", "last.pt", "log.jsonl"]
    assert list(student.config.layers) == [("attention" if keeps_attention(i, share) else "mamba2") + "+mlp"
                                           for i in range(4)]
    assert losses(log)[-1] < losses(log)[0] / 4
    for part in ("--stage all trains", "teacher", f"{log[-1]['val_bpb']:.4f}"):
        assert part in out
    start = float(out.split("student ")[-1].split()[0])
    assert log[-1]["val_bpb"] < start
    assert train.main(["--out", str(tmp_path / "run"), "--eval_only", "--device", "cpu"]) == 0
    assert f"{log[-1]['val_bpb']:.4f}" in capsys.readouterr().out
    assert sample.main(["--ckpt", str(tmp_path / "run"), "--bytes", "40", "--prompt", "12", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("12")


@pytest.mark.parametrize("stage", ["align", "mixers", "all"])
def test_what_is_frozen_stays_bit_for_bit_and_what_is_trained_moves(stage, teacher, corpus, tmp_path):
    source = load(teacher)[0]
    torch.manual_seed(1)
    before = make_student(source, 0.25, "attention").state_dict()
    _, student = go(teacher, corpus, tmp_path / "run", "--stage", stage, "--weight_decay", 0.5)
    for name, w in student.state_dict().items():
        trained = stage == "all" or ".mixer." in name and not name.startswith("layers.3.")
        assert torch.equal(w, before[name]) != trained, name


def test_alignment_makes_each_new_layer_answer_as_its_attention_layer(teacher, corpus, tmp_path):
    log, _ = go(teacher, corpus, tmp_path / "run", "--stage", "align", "--steps", 60, "--lr", 0.01)
    assert losses(log)[-1] < losses(log)[0] / 2


def test_stages_follow_one_another(teacher, corpus, tmp_path, capsys):
    """Half of the attention aligned, the mixers trained on the teacher's own text, a quarter end to end from there."""
    go(teacher, corpus, tmp_path / "align", "--stage", "align", "--keep_attention", 0.5)
    pseudo = tmp_path / "pseudo.bin"
    pseudo.write_bytes(bytes(corpus.read_bytes()[::-1]))
    go(teacher, corpus, tmp_path / "mixers", "--stage", "mixers", "--keep_attention", 0.5,
       "--student", tmp_path / "align", "--pseudo", pseudo, "--ce", 1, "--kl", 0.1)
    assert str(pseudo) in capsys.readouterr().out
    _, student = go(teacher, corpus, tmp_path / "all", "--student", tmp_path / "mixers", "--reverse_kl", 1)
    assert [layer[:6] for layer in student.config.layers] == ["mamba2"] * 3 + ["attent"]


def test_scratch_with_cross_entropy_alone_is_training_without_a_teacher(teacher, corpus, tmp_path):
    log, _ = go(teacher, corpus, tmp_path / "run", "--mixers", "scratch", "--ce", 1, "--kl", 0, "--dtype", "float64")
    source = load(teacher)[0].double()
    torch.manual_seed(1)
    student = make_student(source, 0.25, "scratch")
    first = torch.from_numpy(train.windows(train.load_corpus(str(corpus)).train, 17, 4, 1, 0))
    nats = train.prediction_loss(student, first[:, :-1], first[:, 1:]).item()
    assert losses(log)[0] == pytest.approx(nats / math.log(2), rel=1e-10)


@pytest.mark.parametrize("stage", ["align", "all"])
def test_a_stopped_distillation_resumes_exactly(stage, teacher, corpus, tmp_path, monkeypatch, capsys):
    flags = ("--stage", stage, "--steps", 6)
    whole, want = go(teacher, corpus, tmp_path / "whole", *flags)
    draw = train.windows

    def windows(data, length, batch, seed, first):
        if first == 2 * batch:
            signal.raise_signal(signal.SIGINT)
        return draw(data, length, batch, seed, first)

    with monkeypatch.context() as patch:
        patch.setattr(train, "windows", windows)
        assert distill.main(argv(teacher, corpus, tmp_path / "parts", *flags)) == 130
    assert "python distill.py" in capsys.readouterr().out
    assert distill.main(["--out", str(tmp_path / "parts"), "--resume"]) == 0
    parts = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert losses(parts) == losses(whole)
    got = load(tmp_path / "parts")[0].state_dict()
    assert all(torch.equal(got[name], w) for name, w in want.state_dict().items())


@pytest.mark.parametrize("flags, parts", [
    ("--keep_attention 1.5", ["--keep_attention 1.5"]), ("--keep_attention nan", ["--keep_attention"]),
    ("--layer mamba", ["--layer"]), ("--mixers best", ["--mixers best", "scratch"]),
    ("--stage 2", ["--stage 2", "align"]), ("--kl -1", ["--kl -1"]), ("--kl 0", ["all 0"]),
    ("--kl nan", ["--kl nan"]), ("--beta 1", ["--beta"]), ("--steps " + "9" * 30, ["--steps"]), ("--steps 0", ["--steps 0"]),
    ("--stage align --keep_attention 1", ["--stage align", "--keep_attention 1"]), ("--teacher no_such", ["no_such"]),
    ("--student no_such", ["no_such"]), ("--pseudo no_such", ["no_such"]), ("--d_model 32", ["--d_model"])])
def test_bad_flags_are_one_line_and_leave_no_trace(flags, parts, teacher, corpus, tmp_path, capsys):
    refused(capsys, [*argv(teacher, corpus, tmp_path / "run"), *flags.split()], *parts, main=distill.main)
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit(teacher, corpus, tmp_path, capsys):
    """A teacher without attention, an encoder, a student of another shape, SSMs of two kinds, another script's run."""
    model.save(tmp_path / "ssm.pt", LM(Config(("mamba2",), d_model=16, head_dim=8)))
    refused(capsys, argv(tmp_path / "ssm.pt", corpus, tmp_path / "run"), "ssm.pt", "no attention", "mamba2", main=distill.main)
    encoder = Config(("attention",), d_model=16, n_head=2, n_kv_head=2, vocab=257, block="gated")
    model.save(tmp_path / "encoder.pt", model.make_model(encoder))
    refused(capsys, argv(tmp_path / "encoder.pt", corpus, tmp_path / "run"), "encoder.pt", "Encoder", "causal", main=distill.main)
    for name, changes in {"d_model": {"d_model": 32}, "n_layer": {"layers": ("attention+mlp",) * 3},
                          "vocab": {"vocab": 300}, "n_head": {"n_head": 4, "n_kv_head": 4}}.items():
        config = dataclasses.replace(load(teacher)[0].config, **changes)
        model.save(tmp_path / f"{name}.pt", LM(config))
        refused(capsys, argv(teacher, corpus, tmp_path / "run", "--student", tmp_path / f"{name}.pt"),
                f"{name}.pt", name, main=distill.main)
    mixed = Config(("mamba2+mlp", *("attention+mlp",) * 3), d_model=16, head_dim=4, n_head=2, n_kv_head=2)
    model.save(tmp_path / "mixed.pt", LM(mixed))
    refused(capsys, argv(teacher, corpus, tmp_path / "run", "--student", tmp_path / "mixed.pt"), "state-space layers", "head_dim", main=distill.main)
    refused(capsys, ["--out", teacher, "--resume"], "no run of distill.py", main=distill.main)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_teacher_and_its_shape(teacher, corpus, tmp_path, capsys):
    go(teacher, corpus, tmp_path / "run")
    for name, value in (("keep_attention", 0.5), ("stage", "align"), ("mixers", "random")):
        refused(capsys, ["--out", tmp_path / "run", "--resume", f"--{name}", value], f"--{name}", "another --out", main=distill.main)
    assert train.main(["--out", str(tmp_path / "run"), "--resume"]) == 2


# Llama, on token ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama 3 of transformers with random weights: grouped queries, rotary scaling, a tied head, in several files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=331, hidden_size=24, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=29, rope_theta=500.0, rope_scaling=scaling, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp("llama")
    peer.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Token ids beyond a byte, two of which follow each other with certainty."""
    path = tmp_path_factory.mktemp("tokens") / "ids.npy"
    np.save(path, (np.arange(3000) * 7 % 331).astype(np.uint16))
    return path


def test_a_llama_is_distilled_on_token_ids(llama, tokens, tmp_path, capsys):
    """The student keeps Llama's attention in a quarter of the layers, its rotary scaling and its tied head."""
    log, student = go(llama, tokens, tmp_path / "run", "--steps", 40, "--kl", 0.5, "--ce", 0.5, "--lr", 0.01)
    c = student.config
    assert [layer[:6] for layer in c.layers] == ["mamba2"] * 3 + ["attent"] and c.tie and c.rope_scaling[0] == 8
    assert (c.n_kv_head, c.n_group, c.head_dim, c.d_state, c.vocab) == (2, 6, 4, 4, 331)
    assert losses(log)[-1] < losses(log)[0] and "token ids" in capsys.readouterr().out
    teacher = load(llama)[0]
    ids = torch.randint(331, (1, 40))
    assert torch.equal(make_student(teacher, 1, "attention")(ids)[0], teacher(ids)[0])
    attention, mixer = teacher.layers[0].mixer, make_student(teacher, 0, "attention").layers[0].mixer
    assert torch.equal(input_rows(mixer)["B"][8:12], attention.k_proj.weight[:4])  # the third query's key is the first


def test_token_files(llama, tokens, tmp_path, capsys):
    """.bin is what .npy is without its header; ids the model does not know, other types and text are refused."""
    ids = np.load(tokens)
    ids.tofile(tmp_path / "ids.bin")
    for vocab in (331, 70_000):
        np.save(tmp_path / "wide.npy", ids.astype(np.uint32))
        for name in ("ids.bin",) * (vocab == 331) + ("wide.npy",):
            corpus = load_tokens(str(tmp_path / name), vocab)
            assert np.array_equal(np.concatenate([corpus.train, corpus.val]), ids) and len(corpus.val) == 300
    (ids.astype(np.uint32)).tofile(tmp_path / "wide.bin")
    assert np.array_equal(load_tokens(str(tmp_path / "wide.bin"), 70_000).train, ids[:2700])
    np.save(tmp_path / "float.npy", np.zeros(9))
    np.save(tmp_path / "high.npy", np.array([1, 331, 2], np.uint16))
    (tmp_path / "text.npy").write_text("To be, or not to be")
    (tmp_path / "text.txt").write_bytes(bytes(20))  # each two bytes a known id, but a text is none
    (tmp_path / "empty.bin").write_bytes(b"")
    if hasattr(os, "mkfifo"):  # on Windows it is one more name that does not exist
        os.mkfifo(tmp_path / "pipe.bin")
    for name, part in {"float.npy": "float64", "text.txt": "neither .npy nor .bin", "high.npy": "331", "text.npy": "text.npy", "empty.bin": "empty.bin", "pipe.bin": "no such file",
                       "none.bin": "none.bin"}.items():
        refused(capsys, argv(llama, tmp_path / name, tmp_path / "run"), f"--data {tmp_path / name}", part, main=distill.main)
    assert not (tmp_path / "run").exists()


def test_a_llama_with_a_missing_file_is_refused(llama, tokens, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "llama")
    gone = sorted((tmp_path / "llama").glob("*.safetensors"))[1]
    gone.unlink()
    refused(capsys, argv(tmp_path / "llama", tokens, tmp_path / "run"), gone.name, main=distill.main)
    (tmp_path / "llama" / "config.json").unlink()
    refused(capsys, argv(tmp_path / "llama", tokens, tmp_path / "run"), tmp_path / "llama", main=distill.main)
