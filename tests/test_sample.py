"""sample.py: the distributions it draws from, generation against recomputation, streaming, any bytes, bad input."""
import functools
import io
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from model import LM, Config, save
from sample import compiled_step, filter_logits, generate, main, prefill

F64 = torch.float64
SIZES = dict(d_model=16, d_state=6, head_dim=8, n_head=2, n_kv_head=1, d_mlp=7, window=7)
KINDS = {"mamba": ("mamba",) * 2, "mamba2": ("mamba2",) * 2, "mamba3": ("mamba3",) * 2,
         "attention": ("attention+mlp",) * 2, "s4": ("s4+mlp", "s4d+mlp"),
         "hybrid": ("mamba", "attention+mlp", "mamba2")}
every_kind = pytest.mark.parametrize("kind", KINDS)


def close(actual, expected, tol=1e-10):
    """Tensors, or tuples of them like states."""
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def make(kind, seed=4, **sizes):
    """A small model. Its parameters all differ, and its greedy text does not just repeat itself."""
    torch.manual_seed(seed)
    model = LM(Config(KINDS[kind], **SIZES | sizes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(folder / "best.pt", make("mamba2").float())
    return folder


def written(capsysbinary, *flags):
    """What main writes to standard output; it must succeed."""
    capsysbinary.readouterr()
    assert sample.main([*map(str, flags), "--device", "cpu"]) == 0
    return capsysbinary.readouterr().out


def refused(capsys, flags, *parts):
    """The error that main(flags) must give: one line on stderr that names all parts, status 2, nothing written."""
    capsys.readouterr()
    assert sample.main(list(map(str, flags))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    assert all(str(part) in err for part in parts), err


# The distribution


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 3.0]], dtype=F64)
    for temperature in (0.3, 1.0, 2.5):
        close(filter_logits(logits, temperature), torch.softmax(logits / temperature, -1))


def test_temperature_zero_takes_the_likeliest_and_the_first_in_a_tie():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0], [-1.0, -1.0, -1.0]])
    probabilities = filter_logits(logits, 0, top_k=2, top_p=0.5)
    assert probabilities.tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-44, 1e-300])
def test_a_tiny_temperature_is_nearly_greedy_and_no_nan(temperature):
    """logits / temperature is infinite, and infinity less infinity is no number."""
    probabilities = filter_logits(torch.tensor([3.0, 90.0, -40.0]), temperature)
    close(probabilities, torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_top_k_keeps_exactly_k_also_in_a_tie(k):
    """And all of them for 0, or for more than there are."""
    for logits in ([1.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 5, [5.0, 4.0, 3.0, 2.0, 1.0]):
        logits = torch.tensor(logits, dtype=F64)
        probabilities, before = filter_logits(logits, top_k=k), torch.softmax(logits, -1)
        kept = probabilities > 0
        assert kept.sum() == k
        assert all(before[i] >= before[j] for i in kept.nonzero() for j in (~kept).nonzero())
        close(probabilities[kept], before[kept] / before[kept].sum())
        for all_of_them in (0, 5, 6, 1000):
            assert torch.equal(filter_logits(logits, top_k=all_of_them), before)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    """Nucleus sampling (Holtzman et al. 2020, eq. 2), by going through all subsets."""
    torch.manual_seed(0)
    for logits in torch.randn(20, 5, dtype=F64) * 2:
        before = torch.softmax(logits, -1)
        for p in (1e-9, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99, 0.9999):
            probabilities = filter_logits(logits, top_p=p)
            kept = (probabilities > 0).nonzero()[:, 0].tolist()
            enough = [s for m in range(1, 6) for s in itertools.combinations(range(5), m) if before[list(s)].sum() >= p]
            smallest = min(map(len, enough))
            assert len(kept) == smallest and before[kept].sum() >= p
            assert before[kept].sum() == max(before[list(s)].sum() for s in enough if len(s) == smallest)
            close(probabilities[kept], before[kept] / before[kept].sum())


def test_top_k_comes_before_top_p_and_temperature_before_both():
    """Of 0.4 0.3 0.2 0.1 the two likeliest are 4/7 and 3/7, and the first alone reaches 1/2; of all
    four it does not. At temperature 1/2 they are squared, 16 9 4 1 of 30: there it does."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64).log()
    assert filter_logits(logits, top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]
    close(filter_logits(logits, top_p=0.5), torch.tensor([4 / 7, 3 / 7, 0, 0], dtype=F64))
    assert filter_logits(logits, temperature=0.5, top_p=0.5).tolist() == [1, 0, 0, 0]
    close(filter_logits(logits, temperature=0.5, top_k=2), torch.tensor([16 / 25, 9 / 25, 0, 0], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_every_distribution_sums_to_one(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 11) * 3).to(dtype)
    for temperature, k, p in itertools.product((0, 0.7, 1.0), (0, 1, 4, 20), (0.2, 0.9, 1.0)):
        probabilities = filter_logits(logits, temperature, k, p)
        assert probabilities.shape == logits.shape and (probabilities >= 0).all()
        assert probabilities.dtype == (F64 if dtype == F64 else torch.float32)
        close(probabilities.sum(-1), torch.ones(2, 3, dtype=probabilities.dtype), 1e-6)


# Generation

greedy = functools.partial(filter_logits, temperature=0)


def prompt(length, batch=1):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))


@every_kind
@pytest.mark.parametrize("length", [1, 2, 10])
def test_generation_equals_reading_the_whole_prefix_again_at_every_step(kind, length):
    """What the state carries is all there is to carry (attention's window of 7 included)."""
    model, text = make(kind), prompt(length, 3)
    tokens = torch.tensor(list(generate(model, text, 25, greedy))).T
    assert tokens.shape == (3, 25)
    for i in range(25):
        logits, _ = model(torch.cat([text, tokens[:, :i]], dim=1))
        assert torch.equal(tokens[:, i], logits[:, -1].argmax(-1))
    assert len(set(tokens.flatten().tolist())) > 5  # it does not just repeat itself


@pytest.mark.parametrize("piece", [1, 3, 7, 20])
def test_a_prompt_read_in_pieces_is_the_prompt(piece, monkeypatch):
    model, text = make("hybrid"), prompt(20, 2)
    logits, state = prefill(model, text)
    monkeypatch.setattr(sample, "PREFILL", piece)
    close(prefill(model, text), (logits, state))
    close(logits, model(text)[0][:, -1])


@every_kind
def test_memory_is_constant_however_much_is_written(kind):
    """After a prompt in whole chunks, longer than the window, and later: no state is a view that
    keeps the prompt's keys, or the states of all its chunks."""
    model, sizes = make(kind), []

    def step(token, state):
        tensors = [t for layer in state for t in layer]
        assert all(t.untyped_storage().nbytes() <= 2 * t.nbytes for t in tensors)
        sizes.append(sum(t.untyped_storage().nbytes() for t in tensors))
        return model(token, state)

    list(generate(model, prompt(320), 20, greedy, step=step))
    assert len(sizes) == 19 and len({*sizes}) == 1


def test_draws_follow_the_distribution():
    """A model of constant logits: 4,000 bytes land in proportion, four standard deviations wide."""
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    logits = probabilities.log()
    model = lambda tokens, state=None, last=False: (logits.expand(*tokens.shape, 4), ())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(list(generate(model, prompt(1, 400), 10, filter_logits, generator)))
    share = torch.bincount(drawn.flatten(), minlength=4) / 4000
    assert ((share - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 4000).sqrt()).all()


# The script


def test_the_script_writes_the_prompt_and_what_generate_generates(ckpt, capsysbinary):
    begin, flags = "né".encode(), ("--ckpt", ckpt, "--bytes", 30, "--prompt", "né")
    raw = written(capsysbinary, *flags, "--raw", "--temperature", 0, "--dtype", "float64")
    tokens = generate(make("mamba2").float().double(), torch.tensor([list(begin)]), 30, greedy)
    assert raw == begin + bytes(token for token, in tokens)
    raw = written(capsysbinary, *flags, "--raw")
    assert len(raw) == len(begin) + 30 and raw.startswith(begin)
    assert written(capsysbinary, *flags) == raw.decode(errors="replace").encode() + b"\n"


def test_a_seed_decides_all_but_greedy_text_and_no_prompt_is_a_newline(ckpt, capsysbinary):
    flags = ("--ckpt", ckpt, "--bytes", 20, "--raw")
    first, again, other = (written(capsysbinary, *flags, "--seed", seed) for seed in (3, 3, 4))
    assert first == again != other
    text = written(capsysbinary, *flags, "--temperature", 0, "--seed", 3)
    assert text == written(capsysbinary, *flags, "--top_k", 1, "--seed", 4)
    assert text == written(capsysbinary, *flags, "--top_p", 1e-9, "--seed", 5)
    assert b"\n" + first == written(capsysbinary, *flags, "--seed", 3, "--prompt", "\n")


def test_a_prompt_may_hold_any_bytes_from_a_flag_or_standard_input(ckpt, capsysbinary, monkeypatch):
    """Undecodable bytes of a flag arrive as surrogates; only standard input can hold a NUL."""
    flags = ("--ckpt", ckpt, "--bytes", 20, "--raw")

    def piped(data):
        monkeypatch.setattr(sample.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        return written(capsysbinary, *flags, "--prompt", "-")

    data = bytes(range(1, 256))
    by_flag = written(capsysbinary, *flags, "--prompt=" + data.decode("utf-8", "surrogateescape"))
    assert by_flag.startswith(data) and len(by_flag) == 275
    assert piped(data) == by_flag
    assert piped(b"\0a\0").startswith(b"\0a\0")


def test_a_batch_is_several_texts_under_headings(ckpt, capsysbinary):
    flags = ("--ckpt", ckpt, "--bytes", 30, "--prompt", "ab", "--batch", 3)
    raw = written(capsysbinary, *flags, "--raw")
    texts = [raw[i:i + 32] for i in range(0, 96, 32)]
    assert len(raw) == 96 and all(text.startswith(b"ab") for text in texts) and len(set(texts)) == 3
    want = "".join(f"--- {i + 1} of 3\n{text.decode(errors='replace')}\n"
                   for i, text in enumerate(texts))
    assert written(capsysbinary, *flags) == want.encode()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_is_compiled_before_writing_is_all_that_is(kind, monkeypatch):
    """The token that is tried has the strides of those after a prompt: a second graph takes as long again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, tokens = make(kind), torch.randint(256, (1, 70))
    list(generate(model, tokens, 4, filter_logits, None, compiled_step(model, tokens[:, :1])))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, BrokenPipeError])
def test_ctrl_c_and_a_closed_pipe_end_quietly(stop, ckpt, monkeypatch, capsys):
    def interrupted(*args):
        yield [65]
        raise stop

    monkeypatch.setattr(sample, "generate", interrupted)
    assert main(["--ckpt", str(ckpt), "--device", "cpu"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--temperature hot", "--temperature -1", "--temperature nan", "--temperature inf",
    "--top_p 0", "--top_p 1.5", "--top_k -1", "--bytes 0", "--batch 70000", "--promt a",
    "--device tpu9", "--dtype int8", "--seed 99999999999999999999"])
def test_bad_flags_are_one_line(flags, ckpt, capsys):
    """The flag and its value are named."""
    refused(capsys, ["--ckpt", ckpt, *flags.split()], *flags.split())


def test_a_missing_checkpoint_says_how_to_train_one(capsys):
    for path in ("none", "none/best.pt"):
        way_out = "train one: python train.py --out none\n"
        refused(capsys, ["--ckpt", path], f"no checkpoint at {path}; {way_out}")


def test_a_notebook_shows_the_same_text(ckpt, monkeypatch, capsysbinary):
    """Its sys.stdout takes characters and has no buffer for bytes; raw ones are U+FFFD each."""
    for more in (["--batch", 1], ["--batch", 2], ["--raw"]):
        flags = ["--ckpt", ckpt, "--prompt", "d\u00e9f ", "--bytes", 9, *more]
        text = written(capsysbinary, *flags).decode(errors="replace")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", io.StringIO())
            assert main([*map(str, flags), "--device", "cpu"]) == 0
            shown = sys.stdout.getvalue()
        assert "d\u00e9f " in shown
        assert len(shown) == 4 + 9 if "--raw" in flags else shown == text


@pytest.mark.parametrize("flags", ["--temperature 0", "--temperature 1", "--draft ngram"])
def test_logits_that_are_not_finite_write_nothing(flags, tmp_path, capsys):
    """Finite weights may overflow; NUL bytes, the first of equal ones, would look like text."""
    model = make("mamba").float()
    with torch.no_grad():
        model.norm_f.weight.fill_(3e38)
        model.lm_head.weight.mul_(100)
    save(tmp_path / "best.pt", model)
    refused(capsys, ["--ckpt", tmp_path, "--device", "cpu", *flags.split()], "not finite")


def test_the_state_of_a_prompt_can_be_trained_on():
    model, tokens = make("mamba2"), torch.randint(256, (2, 9))
    _, state = prefill(model, tokens)
    model(tokens, state)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# Published checkpoints


def published(folder, vocab):
    torch.manual_seed(0)
    save(folder, LM(Config(("mamba",), d_model=16, vocab=vocab, norm="layer", tie=False)), "state-spaces")
    return str(folder)


def test_crlf_is_the_models_affair(tmp_path, capsysbinary):
    """PG19's byte models learned lines that end in CR LF; prompt and text have plain LF."""
    flags = ("--prompt", "a\n", "--bytes", 1500, "--temperature", 9, "--raw", "--crlf")
    text = written(capsysbinary, "--ckpt", published(tmp_path, 256), *flags)
    assert text.startswith(b"a\n") and b"\r" not in text and len(text) < 1502


@pytest.mark.parametrize("vocab", [65, 300])
def test_models_of_tokens_take_and_give_ids(vocab, tmp_path, capsys):
    """GPT-NeoX's tokens are not ours to make; fewer than 256 tokens are no bytes either."""
    flags = ("--ckpt", published(tmp_path, vocab), "--bytes", 5, "--prompt")
    assert written(capsys, *flags, f"{vocab - 1} 7").startswith(f"{vocab - 1} 7 ")
    words = written(capsys, *flags, "0", "--batch", 2).split()
    ids = [int(word) for word in words if word.isdigit()]
    assert len(ids) == 2 * 6 + 4 and max(ids) < vocab  # and the headings' numbers
    refused(capsys, [*flags, "text"], f"takes their ids, from 0 to {vocab - 1}")
