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
SIZES = dict(d_model=16, d_state=5, head_dim=8, n_head=2, n_kv_head=1, d_mlp=7)
KINDS = {"mamba": Config(("mamba",) * 2, **SIZES),
         "mamba2": Config(("mamba2",) * 2, **SIZES),
         "mamba3": Config(("mamba3",) * 2, **SIZES),
         "attention": Config(("attention+mlp",) * 2, **SIZES, window=7),
         "hybrid": Config(("mamba", "attention+mlp", "mamba2"), **SIZES)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def close(actual, expected, tol=1e-10):
    """Tensors, or tuples of them like states."""
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def make(kind, scale=0.3):
    torch.manual_seed(0)
    model = LM(KINDS[kind]).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        save(folder / kind / "best.pt", make(kind).float())
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


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=F64).log()


# The distribution


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 3.0]], dtype=F64)
    for temperature in (0.3, 1.0, 2.5):
        close(filter_logits(logits, temperature), torch.softmax(logits / temperature, -1))


def test_temperature_zero_takes_the_likeliest_and_the_first_in_a_tie():
    probabilities = filter_logits(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0], [-1.0, -1.0, -1.0]]), 0, top_k=2, top_p=0.5)
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
    """Nucleus sampling (Holtzman et al. 2020, eq. 2), by going through all subsets; one at least, and all for p = 1."""
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
    logits = logs(0.4, 0.3, 0.2, 0.1)
    assert filter_logits(logits, top_p=1e-30).tolist() == [1, 0, 0, 0]
    assert (filter_logits(logits, top_p=1.0) > 0).all()


def test_top_k_comes_before_top_p_and_temperature_before_both():
    """Of 0.4 0.3 0.2 0.1 the two likeliest are 4/7 and 3/7, and the first alone reaches 1/2; of all four it does not.

    At temperature 1/2 they are squared, 16 9 4 1 of 30: there the first alone does.
    """
    logits = logs(0.4, 0.3, 0.2, 0.1)
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


@every_kind
@pytest.mark.parametrize("length", [1, 2, 10])
def test_generation_equals_reading_the_whole_prefix_again_at_every_step(kind, length):
    """What the state carries is all there is to carry (attention's window of 7 included)."""
    model = make(kind)
    text = torch.randint(256, (3, length), generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor(list(generate(model, text, 25, greedy))).T
    assert tokens.shape == (3, 25)
    for i in range(25):
        logits, _ = model(torch.cat([text, tokens[:, :i]], dim=1))
        assert torch.equal(tokens[:, i], logits[:, -1].argmax(-1))
    assert len(set(tokens.flatten().tolist())) > 5  # it does not just repeat itself


@every_kind
@pytest.mark.parametrize("piece", [1, 3, 7, 20])
def test_a_prompt_read_in_pieces_is_the_prompt(kind, piece, monkeypatch):
    model, text = make(kind), torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    logits, state = prefill(model, text)
    monkeypatch.setattr(sample, "PREFILL", piece)
    close(prefill(model, text), (logits, state))
    close(logits, model(text)[0][:, -1])


@pytest.mark.parametrize("kind, bounded_after", [("mamba", 0), ("mamba2", 0), ("attention", 7)])
def test_memory_is_constant_however_much_is_written(kind, bounded_after):
    """A state-space model from the first byte on, attention once its window is full."""
    model, sizes = make(kind), []

    def step(token, state):
        logits, state = model(token, state)
        sizes.append(sum(t.untyped_storage().nbytes() for layer in state for t in layer))
        return logits, state

    list(generate(model, torch.tensor([[10]]), 60, greedy, step=step))
    assert len(sizes) == 59 and len(set(sizes[bounded_after:])) == 1 and max(sizes) == sizes[-1]


def test_draws_follow_the_distribution():
    """A model of constant logits: 4,000 bytes land in proportion, four standard deviations wide."""
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])

    def model(tokens, state=None, last=False):
        return probabilities.log().expand(*tokens.shape, 4), ()

    prompt, generator = torch.zeros(400, 1, dtype=torch.long), torch.Generator().manual_seed(0)
    drawn = torch.tensor(list(generate(model, prompt, 10, filter_logits, generator)))
    share = torch.bincount(drawn.flatten(), minlength=4) / 4000
    assert ((share - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 4000).sqrt()).all()


# The script


@every_kind
def test_the_script_writes_the_prompt_and_what_generate_generates(kind, runs, capsysbinary):
    prompt, flags = "né".encode(), ("--ckpt", runs / kind, "--bytes", 30, "--prompt", "né")
    raw = written(capsysbinary, *flags, "--raw", "--temperature", 0, "--dtype", "float64")
    tokens = generate(make(kind).float().double(), torch.tensor([list(prompt)]), 30, greedy)
    assert raw == prompt + bytes(token for token, in tokens)
    raw = written(capsysbinary, *flags, "--raw")
    assert len(raw) == len(prompt) + 30 and raw.startswith(prompt)
    assert written(capsysbinary, *flags) == raw.decode(errors="replace").encode() + b"\n"


@every_kind
def test_a_seed_reproduces_and_another_seed_does_not(kind, runs, capsysbinary):
    flags = ("--ckpt", runs / kind, "--bytes", 40, "--raw", "--seed")
    first, again, other = (written(capsysbinary, *flags, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_greedy_does_not_depend_on_the_seed_and_no_prompt_is_a_newline(runs, capsysbinary):
    flags = ("--ckpt", runs / "mamba", "--bytes", 20, "--raw")
    text = written(capsysbinary, *flags, "--temperature", 0, "--seed", 3)
    assert text == written(capsysbinary, *flags, "--top_k", 1, "--seed", 4)
    assert text == written(capsysbinary, *flags, "--top_p", 1e-9, "--seed", 5)
    assert b"\n" + written(capsysbinary, *flags) == written(capsysbinary, *flags, "--prompt", "\n")


def test_a_prompt_may_hold_any_bytes_from_a_flag_or_standard_input(runs, capsysbinary, monkeypatch):
    """Undecodable bytes of a flag arrive as surrogates; only standard input can hold a NUL."""
    flags = ("--ckpt", runs / "mamba2", "--bytes", 20)

    def piped(prompt, *more):
        monkeypatch.setattr(sample.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(prompt)))
        return written(capsysbinary, *flags, "--prompt", "-", *more)

    prompt = bytes(range(1, 256))
    by_flag = written(capsysbinary, *flags, "--raw", "--prompt=" + prompt.decode("utf-8", "surrogateescape"))
    assert by_flag.startswith(prompt) and len(by_flag) == 275
    assert piped(prompt, "--raw") == by_flag
    assert piped(prompt) == by_flag.decode(errors="replace").encode() + b"\n"  # valid UTF-8
    assert piped(b"\0a\0", "--raw").startswith(b"\0a\0")


def test_a_batch_is_several_texts_under_headings(runs, capsysbinary):
    flags = ("--ckpt", runs / "mamba", "--bytes", 30, "--prompt", "ab", "--batch", 3)
    raw = written(capsysbinary, *flags, "--raw")
    texts = [raw[i:i + 32] for i in range(0, 96, 32)]
    assert len(raw) == 96 and all(text.startswith(b"ab") for text in texts) and len(set(texts)) == 3
    shown = [text.decode(errors="replace").encode() for text in texts]
    want = b"".join(b"--- %d of 3\n%b\n" % (i + 1, text) for i, text in enumerate(shown))
    assert written(capsysbinary, *flags) == want


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_is_compiled_before_writing_is_all_that_is(kind, monkeypatch):
    """The token that is tried has the strides of those after a prompt: a second graph takes as long again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, tokens = make(kind), torch.randint(256, (1, 70))
    list(generate(model, tokens, 4, filter_logits, None, compiled_step(model, tokens[:, :1])))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_ctrl_c_and_a_closed_pipe_end_quietly(runs, monkeypatch, capsys):
    flags = ["--ckpt", str(runs / "mamba"), "--bytes", "9", "--device", "cpu"]
    for stop in (KeyboardInterrupt, BrokenPipeError):
        def interrupted(*args, **kwargs):
            yield [65]
            raise stop

        with monkeypatch.context() as patch:
            patch.setattr(sample, "generate", interrupted)
            patch.setattr(sample.sys, "stdout", sample.sys.stdout)  # put back afterwards
            assert sample.main(flags) == 130
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--temperature -1", "--temperature nan", "--temperature inf", "--temperature hot", "--top_p 0", "--top_p 1.5",
    "--top_p nan", "--top_p 1e-46", "--top_k -1", "--bytes 0", "--bytes -5", "--bytes 1.5", "--batch 0", "--batch 70000", "--rounds -1",
    "--promt a", "--device tpu9", "--dtype int8", "--seed 99999999999999999999"])
def test_bad_flags_are_one_line(flags, runs, capsys):
    """The flag and its value are named, in argparse's words for a wrong type or name."""
    parts = flags.split() if flags in ("--temperature hot", "--bytes 1.5", "--promt a") else [flags]
    refused(capsys, ["--ckpt", runs / "mamba", *flags.split()], *parts)


@pytest.mark.parametrize("flags, part", [
    ("--fill a_ --prompt a", "exclude"), ("--fill a_ --crlf", "--crlf"), ("--stats", "--draft"),
    ("--draft ngram --batch 2", "one text")])
def test_flags_that_do_nothing_together_are_refused(flags, part, runs, capsys):
    refused(capsys, ["--ckpt", runs / "mamba", *flags.split()], part)


def test_bad_checkpoints_are_one_line(runs, capsys, tmp_path):
    out = tmp_path / "none"
    for path in (out, out / "best.pt"):
        refused(capsys, ["--ckpt", path], f"no checkpoint at {path}; train one: python train.py --out {out}\n")
    refused(capsys, ["--ckpt", tmp_path], "no best.pt, last.pt")
    whole = (runs / "mamba" / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    refused(capsys, ["--ckpt", tmp_path / "cut.pt"], "cut.pt", "cut short")
    (tmp_path / "text.pt").write_text("hello")
    refused(capsys, ["--ckpt", tmp_path / "text.pt"], "text.pt", "not a checkpoint")


def test_a_notebook_shows_the_same_text(runs, monkeypatch, capsysbinary):
    """Its sys.stdout takes characters and has no buffer for bytes."""
    for flags in (["--bytes", 30], ["--bytes", 9, "--batch", 2], ["--bytes", 9, "--raw"]):
        flags = ["--ckpt", runs / "mamba2", "--prompt", "d\u00e9f ", *flags]
        text = written(capsysbinary, *flags).decode(errors="replace")
        assert text.startswith(("d\u00e9f ", "--- 1 of 2\nd\u00e9f "))
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", io.StringIO())
            assert main([*map(str, flags), "--device", "cpu"]) == 0
            shown = sys.stdout.getvalue()
        if "--raw" in flags:  # a byte that is no character of its own is U+FFFD
            assert shown.startswith("d\u00e9f ") and len(shown) == 4 + 9
        else:
            assert shown == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_cuda_where_there_is_none(runs, capsys):
    refused(capsys, ["--ckpt", runs / "mamba", "--device", "cuda"], "--device cuda", "--device cpu")


def test_weights_that_are_not_finite_write_nothing(tmp_path, capsys):
    model = make("mamba").float()
    with torch.no_grad():
        model.norm_f.weight[3] = torch.nan
    save(tmp_path / "best.pt", model)
    refused(capsys, ["--ckpt", tmp_path, "--temperature", 0], "not finite")


@pytest.mark.parametrize("flags", ["--temperature 0", "--temperature 1", "--top_p 0.5", "--draft ngram"])
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


@pytest.mark.parametrize("saved", [{"data": "induction"}, "another program's"])
def test_a_model_of_no_corpus_is_drafted_for_from_its_own_text(saved, tmp_path, capsysbinary):
    save(tmp_path / "best.pt", make("mamba2").float(), flags=saved)
    flags = ("--ckpt", tmp_path, "--bytes", 9, "--raw", "--temperature", 0)
    assert written(capsysbinary, *flags, "--draft", "ngram") == written(capsysbinary, *flags)


# Published checkpoints


def published(folder, vocab):
    torch.manual_seed(0)
    save(folder, LM(Config(("mamba",), d_model=16, vocab=vocab, norm="layer", tie=False)), "state-spaces")
    return str(folder)


def test_crlf_is_the_models_affair(tmp_path, capsysbinary):
    """PG19's byte models learned lines that end in CR LF; prompt and text have plain LF."""
    ckpt = published(tmp_path, 256)
    assert main(["--ckpt", ckpt, "--prompt", "a\n", "--bytes", "1500", "--temperature", "9", "--raw", "--crlf"]) == 0
    text = capsysbinary.readouterr().out
    assert text.startswith(b"a\n") and b"\r" not in text and len(text) < 1502


def test_models_of_tokens_take_and_give_ids(tmp_path, capsys):
    """state-spaces' models read GPT-NeoX's tokens, which are not ours to make; fewer than 256 are no bytes either."""
    ckpt = published(tmp_path / "few", 65)
    assert main(["--ckpt", ckpt, "--prompt", "64", "--bytes", "5"]) == 0 and main(["--ckpt", ckpt, "--prompt", "a"]) == 2
    capsys.readouterr()
    ckpt = published(tmp_path / "many", 300)
    assert main(["--ckpt", ckpt, "--prompt", "299 7", "--bytes", "5"]) == 0
    assert capsys.readouterr().out.startswith("299 7 ")
    assert main(["--ckpt", ckpt, "--prompt", "0", "--bytes", "5", "--batch", "2"]) == 0
    ids = [int(i) for i in capsys.readouterr().out.split() if i.isdigit()]
    assert len(ids) == 2 * 6 + 4 and max(ids) < 300
    for prompt in ("", "text", "300", "-1"):
        assert main(["--ckpt", ckpt, "--prompt", prompt]) == 2
        assert "takes their ids, from 0 to 299" in capsys.readouterr().err
