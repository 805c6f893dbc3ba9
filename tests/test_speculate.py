"""Speculative sampling: exact by enumeration in rational numbers; the loop keeps distribution, text and state."""
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from data.bpe import learn_merges
from model import LM, Config, save
from sample import (ByteDrafter, CopyDrafter, CountDrafter, Drafter, SubwordDrafter, exact, filter_logits, generate,
                    prefill, speculate)
from test_sample import close, greedy, refused, written
from test_vocabulary import TRIE

F64 = torch.float64
V = 3


# The rules, in rational numbers. A distribution of texts is a dict, text -> Fraction; texts are tuples of tokens.


def toy(seed, size=V):
    """A model: a function, text -> a list of Fractions, none of them alike."""
    def distribution(text):
        weights = np.random.default_rng([seed, *text, 99]).integers(0, 7, size)
        weights[len(text) % size] += 1  # never all zero
        return [Fraction(int(w), int(weights.sum())) for w in weights]
    return distribution


def rows(*lists):
    return np.array([[Fraction(x) for x in row] for row in lists], dtype=object)


def point_mass(p, q, onehot):
    """exact for guesses that nobody drew, whatever q is."""
    return exact(p, onehot, onehot)


def one_round(rule, p, text, guesses, q):
    """{what a round adds: probability}, by the shipped rule, for guesses drawn from the rows of q."""
    size = len(p(text))
    texts = [(*text, *guesses[:i]) for i in range(len(guesses) + 1)]
    onehot = rows(*([int(b == guess) for b in range(size)] for guess in guesses))
    chance, instead = rule(rows(*map(p, texts[:-1])), rows(*q), onehot)
    chance, instead = [*chance, 0], [*instead, p(texts[-1])]  # nothing is guessed behind the last
    added, passed = {}, Fraction(1)
    for i in range(len(texts)):
        for token in range(size):
            more = passed * (1 - chance[i]) * instead[i][token]
            added[(*guesses[:i], token)] = added.get((*guesses[:i], token), 0) + more
        passed *= chance[i]
    return added


def speculated(rule, p, drafts, n):
    """The distribution of the first n tokens, over as many rounds as it takes; what goes beyond n is summed over.

    drafts(text) goes through all (guesses, the distributions reported for them, probability).
    """
    done, unfinished = {}, {(): Fraction(1)}
    while unfinished:
        text, mass = unfinished.popitem()
        if len(text) >= n:
            done[text[:n]] = done.get(text[:n], 0) + mass
            continue
        for guesses, q, drawn in drafts(text):
            for added, share in one_round(rule, p, text, guesses, q).items():
                if share:
                    longer = (*text, *added)
                    unfinished[longer] = unfinished.get(longer, 0) + mass * drawn * share
    return done


def tokens_from(q, k, reported=None):
    """Drafts of k tokens drawn from q one after the other, reported as drawn from q or from another distribution."""
    def drafts(text, k=k):
        if k == 0:
            yield (), [], Fraction(1)
            return
        for token, mass in enumerate(q(text)):
            if mass:
                for guesses, later, drawn in drafts((*text, token), k - 1):
                    yield (token, *guesses), [(reported or q)(text), *later], mass * drawn
    return drafts


def target(p, n):
    texts = {(): Fraction(1)}
    for _ in range(n):
        texts = {(*text, token): mass * x for text, mass in texts.items() for token, x in enumerate(p(text)) if x}
    return texts


def total_variation(a, b):
    return sum(abs(a.get(text, 0) - b.get(text, 0)) for text in {*a, *b}) / 2


def expected_length(rule, p, drafts):
    """The expected number of tokens that the first round adds."""
    return sum(drawn * mass * len(added) for guesses, q, drawn in drafts(())
               for added, mass in one_round(rule, p, (), guesses, q).items())


def mostly_first(text):
    return rows(["1/2", "1/4", "1/4"])[0]


def mostly_last(text):
    return rows(["1/4", "1/4", "1/2"])[0]


def error(rule, p, drafts, n):
    """How far speculated text is from the target's: total variation, in rational numbers."""
    return total_variation(speculated(rule, p, drafts, n), target(p, n))


@pytest.mark.parametrize("k, n", [(1, 1), (1, 3), (2, 3), (3, 2)])
@pytest.mark.parametrize("rule", [exact, point_mass])
def test_the_text_has_the_targets_distribution_exactly(rule, k, n):
    """Leviathan et al. 2023, appendix A.1: total variation 0, over several rounds, with n reached in mid-draft."""
    for seed in range(2):
        assert error(rule, toy(seed), tokens_from(toy(seed + 50), k), n) == 0


def test_guesses_that_nobody_drew_are_exact_wherever_they_come_from():
    """Also from a certain distribution: what is reported does not matter to a point mass."""
    p, certain = toy(1), lambda text: [int(token == len(text) % V) for token in range(V)]
    for q in (toy(2), certain):
        assert error(point_mass, p, tokens_from(q, 2, toy(77)), 3) == 0


def test_drawing_from_another_distribution_than_the_one_tested_is_caught():
    """The guess of the likelier half, reported as if it came from all of q: not exact, so the tests above can fail."""
    half = lambda text: rows([0, "1/3", "2/3"])[0]
    assert error(exact, mostly_first, tokens_from(half, 2), 3) == 0
    wrong = speculated(exact, mostly_first, tokens_from(half, 1, mostly_last), 1)
    assert total_variation(wrong, target(mostly_first, 1)) > Fraction(1, 50)


def test_a_perfect_drafter_is_always_believed():
    """q = p: accepted for sure, and what rounding leaves of (p - q)+ is no distribution to draw from."""
    p = torch.softmax(torch.randn(4, 7, dtype=F64, generator=torch.Generator().manual_seed(0)), -1)
    chance, instead = exact(p, p, torch.eye(7, dtype=F64)[:4])
    assert chance.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(instead, p, rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_expected_length_of_a_round_is_the_geometric_sum(k):
    """Leviathan et al. 2023, equation 1, where p and q are the same at every place: alpha = sum min(p, q)."""
    alpha = Fraction(3, 4)
    assert expected_length(exact, mostly_first, tokens_from(mostly_last, k)) == (1 - alpha**(k + 1)) / (1 - alpha)


# Words, revealed byte by byte. The tokens are the bytes a and b, 0 and 1 here.


def words_from(q, k):
    """Drafts of k words drawn from q one after the other, with the distributions that reveal reports."""
    def drafts(text, k=k):
        if k == 0:
            yield (), [], Fraction(1)
            return
        of_words = np.array(q(text), dtype=object)
        for word, mass in zip(TRIE.sorted, of_words):
            if mass:
                revealed = TRIE.reveal(of_words, word)
                assert all(sum(row) == sum(row[97:99]) == 1 for row in revealed)
                tokens = tuple(byte - 97 for byte in word)
                for guesses, later, drawn in drafts((*text, *tokens), k - 1):
                    yield (*tokens, *guesses), [*revealed[:, 97:99], *later], mass * drawn
    return drafts


@pytest.mark.parametrize("k, n", [(1, 4), (2, 3)])
@pytest.mark.parametrize("rule", [exact, point_mass])
def test_words_verified_byte_by_byte_leave_the_distribution_of_bytes(rule, k, n):
    """Total variation 0 for words that begin alike, over several rounds that end inside words."""
    assert error(rule, toy(5, 2), words_from(toy(6, 5), k), n) == 0


def test_a_word_is_accepted_more_often_by_its_trie_than_as_a_point_mass():
    """The same drafts, by their expected number of accepted bytes."""
    p, q = toy(5, 2)(()), toy(6, 5)(())
    by_trie, by_point = (expected_length(rule, lambda text: p, words_from(lambda text: q, 1))
                         for rule in (exact, point_mass))
    assert by_trie > by_point


# The loop

SIZES = dict(d_model=16, d_state=6, head_dim=8, n_head=2, n_kv_head=1, d_mlp=7)
KINDS = {"mamba": ("mamba",) * 2, "mamba2": ("mamba2",) * 2, "mamba3": ("mamba3",) * 2,
         "attention": ("attention+mlp",) * 2, "s4": ("s4", "s4d"), "hybrid": ("mamba", "attention+mlp", "mamba2")}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, seed=0, vocab=256, scale=0.3, **sizes):
    torch.manual_seed(seed)
    model = LM(Config(KINDS[kind], vocab=vocab, window=7, **{**SIZES, **sizes})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    return model


def make_words(seed, data, count):
    """A model over the words of so many merges learned from data."""
    return make("mamba2", seed, vocab=256 + count, merges=learn_merges(data, count))


def written_by(f, *args, **kwargs):
    """All tokens that generate or speculate yields for one text."""
    return [token for token, in f(*args, **kwargs)]


def prompt(length):
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(length))


class Guess(Drafter):
    """A drafter that guesses what f(text, k) says."""

    def __init__(self, f):
        self.f = f

    def draft(self, text, k, distribution, generator):
        return self.f(text, k), None


def adversaries(model, text, count):
    """Drafters that are always right, always wrong, right now and then, random, empty, and no UTF-8; and the real."""
    truth = text[0].tolist() + written_by(generate, model, text, count + 20, greedy)
    g = np.random.default_rng(0)
    yield "right", Guess(lambda t, k: truth[len(t):len(t) + k])
    yield "wrong", Guess(lambda t, k: [(b + 1) % 256 for b in truth[len(t):len(t) + k]])
    yield "mixed", Guess(lambda t, k: [b if g.random() < 0.7 else 0 for b in truth[len(t):len(t) + k]])
    yield "random", Guess(lambda t, k: g.integers(256, size=k).tolist())
    yield "none", Guess(lambda t, k: [])
    yield "more than asked for", Guess(lambda t, k: truth[len(t):len(t) + 3 * k])
    yield "no UTF-8", Guess(lambda t, k: [255, 128, 192, 254][:k])
    yield "itself", ByteDrafter(model)
    yield "another model", ByteDrafter(make("mamba", 5))
    yield "attention", ByteDrafter(make("attention", 5))
    yield "s4", ByteDrafter(make("s4", 5))
    yield "copies", CopyDrafter()
    yield "counts", CountDrafter(list(truth))
    yield "words", SubwordDrafter(make_words(6, bytes(truth * 9), 9))


@every_kind
@pytest.mark.parametrize("k, length", [(1, 3), (5, 1), (9, 10)])
def test_greedy_text_is_the_targets_whatever_the_drafter_says(kind, k, length):
    """Temperature 0, float64: byte for byte, with the end of the text in mid-draft."""
    model, text = make(kind), prompt(length)
    want = written_by(generate, model, text, 11, greedy)
    for name, drafter in adversaries(model, text, 11):
        assert written_by(speculate, model, text, 11, greedy, drafter, k) == want, name


def test_a_drafter_serves_a_second_text():
    """Its states are of the first text, which is longer; the second goes as with a drafter that is new."""
    model, sampled = make("mamba2"), filter_logits
    for (name, used), (_, new) in zip(adversaries(model, prompt(3), 20), adversaries(model, prompt(3), 20)):
        written_by(speculate, model, prompt(34), 20, greedy, used, 4)
        if name in ("mixed", "random"):  # these draw from a generator of their own
            continue
        runs = []
        for drafter in (used, new):
            rounds, g = [], torch.Generator().manual_seed(0)
            runs.append((written_by(speculate, model, prompt(3), 20, sampled, drafter, 4, g, rounds), rounds))
        assert runs[0] == runs[1], name


@every_kind
@pytest.mark.parametrize("accepted", range(6))
def test_the_state_after_any_number_of_accepted_guesses_is_the_state_from_scratch(kind, accepted):
    """A call that also reads guesses leaves no trace of them, also in the convolution's tail; three rounds in a row."""
    model, text = make(kind), torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1))
    state, seen, end = None, 0, 3
    for ahead in (5, 1, 4, 7):
        logits, state = model(text[:, seen:end + ahead], state, end - seen)
        whole, _ = model(text[:, :end + ahead])
        close((logits, state), (whole[:, seen:], prefill(model, text[:, :end])[1]))
        seen, end = end, end + 1 + min(accepted, ahead)


@pytest.mark.parametrize("kind", ["mamba2"])  # Mamba's chunked scan has buffers of its own, of 2 MB or 16 steps
def test_looking_ahead_makes_no_tensor_of_all_states(kind):
    """Reading 4 bytes and 8 guesses: what is held is one state per layer and the bytes; no (12, d, n) comes up."""
    model, text, largest = make(kind, d_state=64), prompt(40), [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            largest[0] = max([largest[0], *(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with torch.inference_mode():
        _, state = prefill(model, text[:, :20])
        one = state[0].h.numel()
        with Watch():
            _, state = model(text[:, 20:32], state, 4)
    assert one <= largest[0] < 12 * one / 2 and all(layer.h.numel() == one for layer in state)


@every_kind
def test_a_state_owns_no_more_than_it_shows(kind):
    """After a prompt in whole chunks: a view would keep the whole prompt's keys, or the states of all its chunks."""
    with torch.no_grad():
        _, state = make(kind)(prompt(320))
    for layer in state:
        for t in layer:
            assert t.untyped_storage().nbytes() <= 2 * t.nbytes


@every_kind
def test_the_state_after_no_position_is_the_state_before(kind):
    """And no other number of positions can be kept than there are."""
    model, text = make(kind), prompt(20)
    want, before = model(text[:, :9])
    _, same = model(text[:, 9:], before, 0)
    torch.testing.assert_close(model(text[:, 9:], same)[0], model(text[:, 9:], before)[0], rtol=0, atol=0)
    _, none = model(text, None, 0)
    close(model(text[:, :9], none)[0], want)
    for upto in (21, -1):
        with pytest.raises(ValueError, match=f"upto is {upto}, expected from 0"):
            model(text, None, upto)


def test_a_perfect_drafter_commits_k_plus_one_bytes_per_call():
    model, calls, rounds = make("mamba2"), [], []
    model.register_forward_hook(lambda *args: calls.append(args))
    assert len(written_by(speculate, model, prompt(5), 30, greedy, ByteDrafter(make("mamba2")), 4, rounds=rounds)) == 30
    assert rounds == [(4, 4)] * 6 and len(calls) == 6 + 1  # and the prompt


def test_nobody_guesses_beyond_the_end():
    asked = []
    wrong = Guess(lambda text, k: asked.append((len(text), k)) or [0] * k)
    written_by(speculate, make("mamba2"), prompt(3), 6, greedy, wrong, 50)
    assert asked and all(length + k == 3 + 6 - 1 for length, k in asked)  # the last byte needs no guess


class Oracle:
    """Depth-first search over all random outcomes: it answers every draw, and runs the program again for each path.

    A run repeats the choices of the last one up to the deepest draw that has an outcome left, and takes that one.
    """

    def __init__(self):
        self.path = []  # [choice, probabilities] of every draw so far

    def choose(self, probabilities):
        if self.at == len(self.path):
            self.path.append([0, probabilities])
        choice, known = self.path[self.at]
        assert known == pytest.approx(probabilities, abs=1e-12)  # a run repeats itself
        self.at, self.mass = self.at + 1, self.mass * probabilities[choice]
        return choice

    def runs(self, f):
        """(result, probability) of every run of f."""
        while True:
            self.at, self.mass = 0, 1.0
            result = f()
            yield result, self.mass
            while self.path and self.path[-1][0] + 1 == len(self.path[-1][1]):
                self.path.pop()
            if not self.path:
                return
            self.path[-1][0] += 1


@pytest.mark.parametrize("k, count, temperature", [(1, 3, 1.0), (2, 2, 0.6)])
def test_the_loop_itself_has_the_targets_distribution(k, count, temperature, monkeypatch):
    """speculate as it ships, every outcome of every random draw, on models of two symbols."""
    model, drafter, text = make("mamba2", vocab=2), ByteDrafter(make("mamba", 3, vocab=2)), torch.tensor([[1, 0, 1]])
    distribution = functools.partial(filter_logits, temperature=temperature)
    want = {}
    for new in itertools.product(range(2), repeat=count):
        p = distribution(model(torch.cat([text, torch.tensor([new])], dim=1))[0])[0, 2:]
        want[new] = math.prod(p[i, token].item() for i, token in enumerate(new))
    oracle = Oracle()

    def multinomial(p, n, generator):
        drawn = torch.tensor([oracle.choose(p.flatten().tolist())])
        return drawn.expand(p.shape[:-1] + (1,))

    def bernoulli(chance, generator):
        return torch.tensor([float(oracle.choose([1 - x, x])) if 0 < x < 1 else x for x in chance.tolist()], dtype=F64)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    got = {}
    for new, mass in oracle.runs(lambda: tuple(written_by(speculate, model, text, count, distribution, drafter, k))):
        got[new] = got.get(new, 0) + mass
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)
    assert got == pytest.approx(want, abs=1e-12)


# Drafters


def test_words_go_on_where_a_refusal_left_the_text():
    """The docstring's trace: only words that begin with what the text ends with, from the state of the words before."""
    model = make("mamba2", 6, vocab=259, merges=[(97, 98), (256, 99), (257, 100)])  # ab abc abcd
    drafter, distribution = SubwordDrafter(model), functools.partial(torch.softmax, dim=-1)
    seconds = set()
    for seed in range(9):
        drafter.start()
        guesses, q = drafter.draft(list(b"abcdxab"), 2, distribution, torch.Generator().manual_seed(seed))
        began, read, then = drafter.states
        assert began == 0 and read == 5 and then in (7, 8, 9)  # the piece; ab, abc or abcd
        close(drafter.states[5][0], model(torch.tensor([[10, 258, 120]]))[0][:, -1])
        assert len(guesses) == len(q) and (q[range(len(guesses)), guesses] > 0).all()
        torch.testing.assert_close(q.sum(1), torch.ones(len(q), dtype=F64))
        seconds.add(then)
        if then > 7:  # abc or abcd, both go on with c
            assert guesses[0] == ord("c") and q[0, ord("c")] == 1
    assert len(seconds) > 1
    drafter.draft(list(b"abcdxabq"), 1, distribution, torch.Generator().manual_seed(0))
    assert list(drafter.states) == [0, 7]  # c was refused: abcd x ab q is read from the beginning of the piece


def test_counts_draw_from_the_distribution_they_report():
    drafter, top_2 = CountDrafter(list(b"aabaaab" * 3)), functools.partial(filter_logits, top_k=2)
    guesses, q = drafter.draft(prompt(3)[0].tolist(), 5, top_2, torch.Generator().manual_seed(0))
    assert len(guesses) == 5 and q.shape == (5, 256) and ((q > 0).sum(-1) == 2).all()
    assert q[range(5), guesses].min() > 0
    torch.testing.assert_close(q.sum(-1), torch.ones(5))


# The script


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        save(folder / kind / "best.pt", make(kind).float())
    save(folder / "small" / "best.pt", make("mamba", 1, vocab=300).float())
    save(folder / "words" / "best.pt", make_words(2, b"the cat and the hat, " * 9, 9).float())
    for name, data in (("read", "README.md"), ("moved", "no_such_corpus.txt")):
        save(folder / name / "best.pt", make("mamba2").float(), flags={"data": data})
    return folder


@every_kind
def test_the_script_writes_the_same_greedy_text_with_a_drafter(kind, runs, capsysbinary):
    flags = ("--ckpt", runs / kind, "--bytes", 30, "--prompt", "ab", "--raw", "--temperature", 0, "--dtype", "float64")
    plain = written(capsysbinary, *flags)
    for draft in (runs / "mamba", runs / "s4", runs / "words", "ngram"):
        assert written(capsysbinary, *flags, "--draft", draft, "--k", 3) == plain


def test_counts_of_the_corpus_that_the_checkpoint_names(runs, capsysbinary):
    flags = ["--ckpt", str(runs / "read"), "--bytes", "30", "--prompt", "ab", "--raw", "--temperature", "0"]
    plain = written(capsysbinary, *flags)
    assert sample.main([*flags, "--draft", "counts", "--device", "cpu"]) == 0
    out, err = capsysbinary.readouterr()
    assert out == plain and b"sorting " in err and b"README.md" in err


def test_a_seed_reproduces_a_speculated_text(runs, capsysbinary):
    for draft in (runs / "mamba", runs / "words", "ngram"):
        flags = ("--ckpt", runs / "mamba2", "--draft", draft, "--bytes", 30, "--raw", "--seed")
        first, again, other = (written(capsysbinary, *flags, seed) for seed in (3, 3, 4))
        assert first == again != other and len(first) == 30


@pytest.mark.parametrize("flags, parts", [
    ("--draft ngram --k 0", ["--k 0"]),
    ("--draft no_such_run", ["no_such_run", "ngram, counts"]),
    ("--draft counts", ["--draft counts", "does not say its corpus", "--draft ngram"]),
    ("--draft counts --ckpt {}/moved", ["--draft counts", "moved was trained on", "no such file"]),
    ("--draft {}/small", ["vocabulary of 300", "256"]), ("--ckpt {}/words", ["--ckpt MODEL_OF_BYTES --draft"]),
    ("--draft ngram --compile", ["--draft", "--compile"]), ("--draft ngram --fill _", ["--draft", "--fill"]),
    ("--draft ngram --batch 2", ["--draft", "one text", "--batch"]),
    ("--draft ngram --ckpt {}/small", ["--draft ngram guesses bytes", "small reads tokens"]),
    ("--draft counts --ckpt {}/small", ["--draft counts guesses bytes", "small reads tokens"]),
    ("--draft {}/words --ckpt {}/small", ["vocabulary of 265", "the model 300"])])
def test_bad_flags_are_one_line(flags, parts, runs, capsys):
    refused(capsys, ["--ckpt", runs / "mamba", *flags.replace("{}", str(runs)).split()], *parts)


def test_stats_tell_acceptance_and_time_plain_writing_too(runs, capsys):
    same = ["--ckpt", str(runs / "mamba2"), "--draft", str(runs / "mamba2")]
    assert sample.main([*same, "--bytes", "30", "--k", "4", "--stats"]) == 0
    err = capsys.readouterr().err
    assert "5.00 tokens per call" in err and "24 of 24 guesses accepted" in err and "times as fast" in err
