"""distill.py: the map from attention to a state-space layer, what is copied, frozen and trained, and every loss."""
import dataclasses
import math
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import model
import sample
import train
from conftest import all_close, close
from data.corpus import load_tokens
from data.files import UserError
from distill import align_loss, input_rows, keeps_attention, make_student, match, replaced
from model import LM, Config, load
from scan import ssd
from tests import test_train
from tests.test_train import F64, at_step, losses, read_log

refused = partial(test_train.refused, main=distill.main)


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


def without_softmax(q, k, v):
    """y_t = sum_{s <= t} (q_t . k_s) v_s of each head."""
    return torch.einsum("bhij,bjhp->bihp", torch.einsum("bihn,bjhn->bhij", q, k).tril(), v)


@pytest.mark.parametrize("impl", ["naive", "quadratic", "chunked"])
@pytest.mark.parametrize("l", [1, 7, 67])
def test_ssd_without_decay_is_attention_without_softmax(impl, l):
    """With dt = 1, A = 0, D = 0 and n = head size (The Mamba in the Llama, section 3)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, l, 6, 5, dtype=F64)
    y, h = ssd(v, torch.ones(2, l, 6, dtype=F64), torch.zeros(6, dtype=F64), k, q, impl=impl)
    close(y, without_softmax(q, k, v), name="y")
    close(h, torch.einsum("bjhp,bjhn->bhpn", v, k), name="h")


def test_a_mapped_layer_without_its_new_parts_is_the_attention_layer_without_softmax():
    """The copied rows, through ssd with dt = 1 and A = 0 and the copied out_proj; keys and values are shared."""
    teacher, x = transformer(), torch.randn(2, 11, 24, dtype=F64)
    attention, mixer = teacher.layers[1].mixer, make_student(teacher, 0, "attention").layers[1].mixer
    parts = {name: (x @ rows.T).unflatten(-1, (6, 4)) for name, rows in input_rows(mixer).items() if name != "dt"}
    y, _ = ssd(parts["x"], torch.ones(2, 11, 6, dtype=F64), torch.zeros(6, dtype=F64), parts["B"], parts["C"])
    q = attention.q_proj(x).unflatten(-1, (6, 4))
    k, v = (p(x).unflatten(-1, (3, 4)).repeat_interleave(2, dim=2) for p in (attention.k_proj, attention.v_proj))
    want = attention.out_proj(without_softmax(q, k, v).flatten(2))
    close(mixer.out_proj(y.flatten(2)), want, name="output")


def test_new_parts_begin_out_of_the_way():
    """Unlike in the paper: the convolution is the identity, D = 0, dt = 0.1, biases 0, as near to neutral as can be."""
    mixer = make_student(transformer(bias=True), 0, "attention").layers[1].mixer
    parts = dict(mixer.named_parameters())
    for name in ("in_proj.bias", "out_proj.bias", "conv1d.bias", "D"):
        close(parts[name], torch.zeros_like(parts[name]), name=name)
    identity = torch.tensor([0.0, 0, 0, 1], dtype=F64).expand_as(mixer.conv1d.weight)
    close(mixer.conv1d.weight, identity, name="conv1d.weight")
    close(F.softplus(mixer.dt_bias), torch.full_like(mixer.D, 0.1), 1e-6, "dt")


@pytest.mark.parametrize("share, kept", [(0, []), (0.125, [7]), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]),
                                         (0.75, [1, 2, 3, 5, 6, 7]), (0.875, list(range(1, 8))), (1, list(range(8)))])
def test_attention_stays_where_the_paper_keeps_it(share, kept):
    """Section 3.3; a larger share keeps what a smaller one keeps, so layers can go stepwise."""
    assert [i for i in range(8) if keeps_attention(i, share)] == kept
    assert [i for i in range(32) if keeps_attention(i, share)] == [i + 8 * j for j in range(4) for i in kept]


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


@pytest.mark.parametrize("mixers, new", [("random", ("layers.0.mixer.", "layers.2.mixer.")),
                                         ("scratch", "")])
def test_new_weights_are_those_of_a_new_model_and_the_others_the_teachers(mixers, new):
    """New are the mixers in the place of attention, or from scratch all weights."""
    teacher = transformer()
    torch.manual_seed(7)
    fresh = LM(distill.student_config(teacher.config, 0.5, mixers)).double().state_dict()
    torch.manual_seed(7)
    for name, w in make_student(teacher, 0.5, mixers).state_dict().items():
        want = fresh if name.startswith(new) else teacher.state_dict()
        assert torch.equal(w, want[name]), name


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


# Losses


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.3, 0.7, 1.9)])
def test_the_loss_has_the_value_and_gradient_of_its_definition(weights):
    """KL(teacher || student), KL(student || teacher), cross entropy: means over all positions."""
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, dtype=F64) for _ in range(2))
    targets = torch.randint(7, (2, 5))
    s, t = student.requires_grad_().softmax(-1), teacher.softmax(-1)
    parts = ((t * (t / s).log()).sum(-1), (s * (s / t).log()).sum(-1),
             -s.gather(-1, targets[..., None]).log())
    want = sum(w * part.mean() for w, part in zip(weights, parts))
    got = match(student, teacher, targets, *weights)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (got, want)]
    all_close((got, gradients[0]), (want, gradients[1]), "loss gradient")


def test_narrow_logits_are_compared_in_float32():
    student, teacher = (8 * torch.randn(2, 1, 4, 9)).bfloat16()
    targets = torch.randint(9, (1, 4))
    loss = match(student, teacher, targets, 1.0, 1.0, 1.0)
    torch.testing.assert_close(loss, match(student.float(), teacher.float(), targets, 1.0, 1.0, 1.0))


def test_alignment_is_zero_for_the_layer_itself_and_one_for_a_silent_layer():
    """Both read what the teacher's layer reads, so that layers do not depend on one another."""
    teacher, student, tokens = transformer(), transformer(), torch.randint(256, (2, 7))
    assert align_loss(student, teacher, tokens, (0, 2)).item() == 0
    for i in (0, 2):
        student.layers[i].mixer.out_proj.weight.data.zero_()
    assert align_loss(student, teacher, tokens, (0, 2)).item() == 1


# The script

TINY = "--seq_len 16 --batch_size 4 --warmup 2 --device cpu".split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of train.py --layer attention with four layers, beside its text."""
    folder = tmp_path_factory.mktemp("teacher")
    text = b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(200))[:2000]
    (folder / "text").write_bytes(text)
    flags = "--layer attention --n_layer 4 --d_model 16 --n_head 2 --steps 60 --lr 0.01".split()
    where = ["--data", str(folder / "text"), "--out", str(folder / "run")]
    assert train.main([*TINY, *flags, *where]) == 0
    return folder / "run"


def argv(teacher, out, *flags):
    return [*TINY, *map(str, ["--teacher", teacher, "--data", teacher.parent / "text", "--out", out,
                              "--steps", 4, *flags])]


def go(teacher, out, *flags):
    """A run that must succeed: (its log, its model)."""
    assert distill.main(argv(teacher, out, *flags)) == 0
    return read_log(out), load(out)[0]


def test_distillation_brings_the_student_to_its_teacher(teacher, tmp_path, capsys):
    """To a quarter of their first divergence, without attention; then it validates and samples."""
    run = tmp_path / "run"
    log, student = go(teacher, run, "--keep_attention", 0, "--steps", 40, "--lr", 0.01)
    out, bar = capsys.readouterr()
    assert "step 0      loss " in out and "guessing" not in out  # a divergence, neither bits per byte nor beside ln 256
    assert "| loss " in bar and "bits per" not in bar
    assert set(student.config.layers) == {"mamba2+mlp"}
    assert losses(log)[-1] < losses(log)[0] / 4
    figure = f"{log[-1]['val_bpb']:.4f}"
    assert "--stage all trains" in out and figure in out
    assert log[-1]["val_bpb"] < float(out.split("student ")[-1].split()[0])
    assert train.main(["--out", str(run), "--eval_only", "--device", "cpu"]) == 0
    assert figure in capsys.readouterr().out
    write = "--bytes 40 --prompt 12 --device cpu --ckpt".split()
    assert sample.main([*write, str(run)]) == 0
    assert capsys.readouterr().out.startswith("12")


@pytest.mark.parametrize("stage", ["align", "mixers", "all"])
def test_what_is_frozen_stays_bit_for_bit_and_what_is_trained_moves(stage, teacher, tmp_path):
    source = load(teacher)[0]
    torch.manual_seed(1)
    before = make_student(source, 0.25, "attention").state_dict()
    _, student = go(teacher, tmp_path / "run", "--stage", stage, "--weight_decay", 0.5)
    for name, w in student.state_dict().items():
        trained = stage == "all" or ".mixer." in name and not name.startswith("layers.3.")
        assert torch.equal(w, before[name]) != trained, name


def test_stages_follow_one_another(teacher, tmp_path, capsys):
    """Half of the attention aligned, so that each new layer answers as its attention layer; the
    mixers trained on the teacher's own text; a quarter end to end from there."""
    log, _ = go(teacher, tmp_path / "align", "--stage", "align", "--keep_attention", 0.5,
                "--steps", 20, "--lr", 0.02)
    assert losses(log)[-1] < losses(log)[0] / 2
    pseudo = tmp_path / "pseudo.bin"
    pseudo.write_bytes((teacher.parent / "text").read_bytes()[1000:])
    go(teacher, tmp_path / "mixers", "--stage", "mixers", "--keep_attention", 0.5,
       "--student", tmp_path / "align", "--pseudo", pseudo, "--ce", 1, "--kl", 0.1)
    out = capsys.readouterr().out
    assert f"900 bytes to train on, 200 to validate; trains on {pseudo} instead" in out
    log, student = go(teacher, tmp_path / "all", "--student", tmp_path / "mixers",
                      "--kl", 0, "--reverse_kl", 1)
    assert losses(log)[0] > 0
    assert [layer[:6] for layer in student.config.layers] == ["mamba2"] * 3 + ["attent"]


def test_scratch_with_cross_entropy_alone_is_training_without_a_teacher(teacher, tmp_path):
    flags = "--mixers scratch --ce 1 --kl 0 --dtype float64".split()
    log, _ = go(teacher, tmp_path / "run", *flags)
    source = load(teacher)[0].double()
    torch.manual_seed(1)
    student = make_student(source, 0.25, "scratch")
    text = train.load_corpus(str(teacher.parent / "text")).train
    first = torch.from_numpy(train.windows(text, 17, 4, 1, 0))
    nats = train.prediction_loss(student, first[:, :-1], first[:, 1:]).item()
    assert losses(log)[0] == pytest.approx(nats / math.log(2), rel=1e-10)


@pytest.mark.parametrize("stage", ["align", "all"])
def test_a_stopped_distillation_resumes_exactly(stage, teacher, tmp_path, monkeypatch, capsys):
    flags = ("--stage", stage, "--steps", 6)
    whole, want = go(teacher, tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert distill.main(argv(teacher, parts, *flags)) == 130
    assert "python distill.py" in capsys.readouterr().out
    assert distill.main(["--out", str(parts), "--resume"]) == 0
    assert losses(read_log(parts)) == losses(whole)
    assert test_train.same(load(parts)[0].state_dict(), want.state_dict())


@pytest.mark.parametrize("flags, parts", [
    ("--keep_attention 1.5", ["--keep_attention 1.5"]), ("--layer mamba", ["--layer"]),
    ("--mixers best", ["--mixers best", "scratch"]), ("--stage 2", ["--stage 2", "align"]),
    ("--kl -1", ["--kl -1"]), ("--kl 0", ["all 0"]),
    ("--stage align --keep_attention 1", ["--stage align", "--keep_attention 1"]),
    ("--teacher no_such", ["no_such"]), ("--student no_such", ["no_such"]),
    ("--pseudo no_such", ["no_such"]), ("--keep_attention 0.1", ["keeps none", "--n_layer 8"]),
    ("--stage align --mixers scratch", ["--mixers scratch"])])
def test_bad_flags_are_one_line_and_leave_no_trace(flags, parts, teacher, tmp_path, capsys):
    refused(capsys, [*argv(teacher, tmp_path / "run"), *flags.split()], *parts)
    assert not [*(tmp_path / "run").glob("*")]


@pytest.mark.parametrize("flag, changes, parts", [
    ("--teacher", {"layers": ("mamba2",), "head_dim": 8}, ["no attention", "mamba2"]),
    ("--teacher", {"layers": ("attention",), "block": "gated", "tie": True}, ["encoder", "causal"]),
    ("--student", {"d_model": 32}, ["'d_model': 32"]),
    ("--student", {"vocab": 300}, ["'vocab': 300"]),
    ("--student", {"layers": ("attention+mlp",) * 3}, ["'n_layer': 3"]),
    ("--student", {"n_head": 4, "n_kv_head": 4}, ["'n_head': 4"])])
def test_models_that_do_not_fit(flag, changes, parts, teacher, tmp_path, capsys):
    config = dataclasses.replace(load(teacher)[0].config, **changes)
    model.save(tmp_path / "x.pt", model.make_model(config))
    flags = argv(teacher, tmp_path / "run", flag, tmp_path / "x.pt")
    refused(capsys, flags, f"{flag} {tmp_path / 'x.pt'}", *parts)
    assert not [*(tmp_path / "run").glob("*")]


def test_a_run_keeps_its_teacher_and_its_shape(teacher, tmp_path, capsys):
    """One script does not resume a run of the other."""
    go(teacher, tmp_path / "run", "--steps", 1)
    resume = ["--out", str(tmp_path / "run"), "--resume"]
    for name, value in (("teacher", tmp_path), ("student", tmp_path), ("keep_attention", 0.5),
                        ("stage", "align"), ("mixers", "random")):
        refused(capsys, [*resume, f"--{name}", value], f"--{name}", "another --out")
    refused(capsys, ["--out", teacher, "--resume"], "no run of distill.py")
    test_train.refused(capsys, resume, "no run of train.py")


# Llama, on token ids


def test_a_llama_is_distilled_on_token_ids(corpus, tmp_path, capsys):
    """It keeps attention in a quarter of the layers, its rotary scaling and its tied head."""
    torch.manual_seed(0)
    llama = LM(Config(("attention+mlp",) * 4, d_model=24, vocab=331, n_head=6, n_kv_head=2,
                      rope_base=500.0, rope_scaling=(8.0, 1.0, 4.0, 32.0)))
    model.save(tmp_path / "llama", llama, layout="llama")
    ids = tmp_path / "ids.npy"
    np.save(ids, (np.arange(3000) * 7 % 331).astype(np.uint16))
    flags = "--steps 20 --kl 0.5 --ce 0.5 --lr 0.01".split()
    log, student = go(tmp_path / "llama", tmp_path / "run", "--data", ids, *flags)
    layers = ("mamba2+mlp",) * 3 + ("attention+mlp",)
    assert student.config == dataclasses.replace(llama.config, layers=layers, expand=1, d_state=4,
                                                 head_dim=4, n_group=6)
    assert losses(log)[-1] < losses(log)[0] and "token ids" in capsys.readouterr().out
    flags = argv(tmp_path / "llama", tmp_path / "no", "--data", corpus)
    refused(capsys, flags, f"--data {corpus}", "neither .npy nor .bin")


def test_token_files(tmp_path):
    """.npy says its type; .bin is the ids alone, in the type that the vocabulary needs."""
    ids = np.arange(3000) * 7 % 331
    np.save(tmp_path / "ids.npy", ids.astype(np.uint32))
    for dtype, vocab in ((np.uint16, 331), (np.uint32, 70_000)):
        ids.astype(dtype).tofile(tmp_path / "ids.bin")
        for name in ("ids.bin", "ids.npy"):
            corpus = load_tokens(str(tmp_path / name), vocab)
            assert np.array_equal(corpus.train, ids[:2700])
            assert np.array_equal(corpus.val, ids[2700:])


def test_files_that_hold_no_token_ids_of_the_model(tmp_path):
    np.save(tmp_path / "float.npy", np.zeros(9))
    np.save(tmp_path / "high.npy", np.array([1, 331, 2], np.uint16))
    (tmp_path / "text.npy").write_text("To be, or not to be")
    (tmp_path / "text.txt").write_bytes(bytes(20))  # each two bytes a known id, but a text is none
    (tmp_path / "empty.bin").write_bytes(b"")
    for name, part in {"float.npy": "float64", "high.npy": "331", "text.npy": "", "empty.bin": "",
                       "text.txt": "neither .npy nor .bin", "none.bin": "no such file"}.items():
        with pytest.raises(UserError, match=f"{name}: .*{part}"):
            load_tokens(str(tmp_path / name), 331)
