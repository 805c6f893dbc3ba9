"""Speculative sampling: exact by enumeration in rational numbers; the loop keeps distribution, text and state."""
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import sample
from conftest import Operations
from data.bpe import learn_merges
from model import save
from sample import (ByteDrafter, CopyDrafter, CountDrafter, Drafter, SubwordDrafter, exact, filter_logits, generate,
                    prefill, speculate)
from test_sample import close, every_kind, greedy, make, prompt, refused, written
from test_vocabulary import TRIE

F64 = torch.float64


# The rules, in rational numbers. A distribution of texts is a dict, text -> Fraction; texts are tuples of tokens.


def toy(seed, size=3):
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


def in_a_row(draws, k):
    """Drafts of k draws; draws(text) goes through all (tokens, rows of q, probability) of one."""
    def drafts(text, k=k):
        if k == 0:
            yield (), [], Fraction(1)
            return
        for tokens, q, mass in draws(text):
            for guesses, later, drawn in drafts((*text, *tokens), k - 1):
                yield (*tokens, *guesses), [*q, *later], mass * drawn
    return drafts


def tokens_from(q, k, reported=None):
    """Tokens drawn from q, reported as drawn from q or from another distribution."""
    def draws(text):
        for token, mass in enumerate(q(text)):
            if mass:
                yield (token,), [(reported or q)(text)], mass
    return in_a_row(draws, k)


def expected_length(rule, p, drafts):
    """The expected number of tokens that the first round adds."""
    return sum(drawn * mass * len(added) for guesses, q, drawn in drafts(())
               for added, mass in one_round(rule, p, (), guesses, q).items())


mostly_first = lambda text: rows(["1/2", "1/4", "1/4"])[0]
mostly_last = lambda text: rows(["1/4", "1/4", "1/2"])[0]
certain = lambda text: [int(token == len(text) % 3) for token in range(3)]


def error(rule, p, drafts, n):
    """How far speculated text is from the target's: total variation, in rational numbers."""
    got = speculated(rule, p, drafts, n)
    want = {text: math.prod(p(text[:i])[text[i]] for i in range(n))
            for text in itertools.product(range(len(p(()))), repeat=n)}
    return sum(abs(got.get(text, 0) - want[text]) for text in want) / 2


@pytest.mark.parametrize("k, n", [(1, 1), (1, 3), (2, 3), (3, 2)])
@pytest.mark.parametrize("rule", [exact, point_mass])
def test_the_text_has_the_targets_distribution_exactly(rule, k, n):
    """Leviathan et al. 2023, appendix A.1: total variation 0, over several rounds, with n reached in mid-draft."""
    for p, q in ((toy(0), toy(50)), (toy(1), toy(51)), (toy(2), certain)):
        assert error(rule, p, tokens_from(q, k), n) == 0


def test_drawing_from_another_distribution_than_the_one_tested_is_caught():
    """The guess of the likelier half, reported as if it came from all of q: not exact, so the tests above can fail."""
    half = lambda text: rows([0, "1/3", "2/3"])[0]
    assert error(exact, mostly_first, tokens_from(half, 2), 3) == 0
    assert error(exact, mostly_first, tokens_from(half, 1, mostly_last), 1) > Fraction(1, 50)


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
    """Words drawn from q, with the distributions that reveal reports."""
    def draws(text):
        of_words = np.array(q(text), dtype=object)
        for word, mass in zip(TRIE.sorted, of_words):
            if mass:
                revealed = TRIE.reveal(of_words, word)
                assert all(sum(row) == sum(row[97:99]) == 1 for row in revealed)
                yield tuple(byte - 97 for byte in word), revealed[:, 97:99], mass
    return in_a_row(draws, k)


@pytest.mark.parametrize("k, n", [(1, 4), (2, 3)])
def test_words_verified_byte_by_byte_leave_the_distribution_of_bytes(k, n):
    """Total variation 0 for words that begin alike, over several rounds that end inside words."""
    assert error(exact, toy(5, 2), words_from(toy(6, 5), k), n) == 0


def test_a_word_is_accepted_more_often_by_its_trie_than_as_a_point_mass():
    """The same drafts, by their expected number of accepted bytes."""
    p, q = toy(5, 2)(()), toy(6, 5)(())
    by_trie, by_point = (expected_length(rule, lambda text: p, words_from(lambda text: q, 1))
                         for rule in (exact, point_mass))
    assert by_trie > by_point


# The loop

WORDS = b"the cat and the hat, " * 9


def make_words(data, count=9):
    """A model over the words of so many merges learned from data."""
    return make("mamba2", 6, vocab=256 + count, merges=learn_merges(data, count))


def written_by(f, *args, **kwargs):
    """All tokens that generate or speculate yields for one text."""
    return [token for token, in f(*args, **kwargs)]


def guess(f):
    """A drafter that guesses what f(text, k) says."""
    drafter = Drafter()
    drafter.draft = lambda text, k, distribution, generator: (f(text, k), None)
    return drafter


def adversaries(kind, truth):
    """Drafters that are always right, always wrong, right now and then, and the real ones."""
    g = np.random.default_rng(0)
    yield "right", guess(lambda t, k: truth[len(t):len(t) + k])
    yield "wrong", guess(lambda t, k: [(b + 1) % 256 for b in truth[len(t):len(t) + k]])
    yield "mixed", guess(lambda t, k: [b * (g.random() < 0.7) for b in truth[len(t):len(t) + k]])
    yield "none", guess(lambda t, k: [])
    yield "more than asked for", guess(lambda t, k: truth[len(t):len(t) + 3 * k])
    yield "another model", ByteDrafter(make(kind, 5))
    yield "copies", CopyDrafter()
    yield "counts", CountDrafter(truth)
    yield "words", SubwordDrafter(make_words(bytes(truth * 9), 4))


@every_kind
@pytest.mark.parametrize("k, length", [(1, 3), (5, 1), (9, 10)])
def test_greedy_text_is_the_targets_whatever_the_drafter_says(kind, k, length):
    """Temperature 0, float64: byte for byte, with the end of the text in mid-draft."""
    model, text = make(kind), prompt(length)
    truth = text[0].tolist() + written_by(generate, model, text, 20, greedy)
    for name, drafter in adversaries(kind, truth):
        got = written_by(speculate, model, text, 11, greedy, drafter, k)
        assert got == truth[length:length + 11], name


def test_a_drafter_serves_a_second_text():
    """Its states are of the text before, which may be longer; a text goes as with a new drafter."""
    model, g = make("mamba2"), torch.Generator()
    for drafter in (ByteDrafter(make("mamba", 5)), SubwordDrafter(make_words(WORDS))):
        texts = [written_by(speculate, model, prompt(length), 20, filter_logits, drafter, 4,
                            g.manual_seed(0)) for length in (3, 34, 3)]
        assert texts[0] == texts[2]


def test_looking_ahead_makes_no_tensor_of_all_states():
    """Reading 4 bytes and 8 guesses: what is held is one state per layer; no (12, d, n)."""
    model, text = make("mamba2", d_state=64), prompt(40)
    with torch.inference_mode():
        _, state = prefill(model, text[:, :20])
        one = state[0].h.numel()
        with Operations() as seen:
            _, state = model(text[:, 20:32], state, 4)
    largest = max(numel for _, numel in seen.calls)
    assert one <= largest < 12 * one / 2 and all(layer.h.numel() == one for layer in state)


def test_a_perfect_drafter_commits_k_plus_one_bytes_per_call():
    model, calls, rounds = make("mamba2"), [], []
    model.register_forward_hook(lambda *args: calls.append(args))
    assert len(written_by(speculate, model, prompt(5), 30, greedy, ByteDrafter(make("mamba2")), 4, rounds=rounds)) == 30
    assert rounds == [(4, 4)] * 6 and len(calls) == 6 + 1  # and the prompt


def test_nobody_guesses_beyond_the_end():
    asked = []
    wrong = guess(lambda text, k: asked.append((len(text), k)) or [0] * k)
    written_by(speculate, make("mamba2"), prompt(3), 6, greedy, wrong, 50)
    assert asked and all(length + k == 3 + 6 - 1 for length, k in asked)  # the last byte needs no guess


def every_run(program):
    """(result, probability) of every run of program(choose), where choose(p) draws from a list p.

    A run takes the choices of its path, and then the first of each draw; the others begin paths."""
    paths = [[]]
    while paths:
        path, at, mass = paths.pop(), 0, 1.0

        def choose(p):
            nonlocal at, mass
            if at == len(path):
                paths.extend([*path, other] for other in range(1, len(p)))
                path.append(0)
            choice = path[at]
            at += 1
            mass *= p[choice]
            return choice

        yield program(choose), mass


def test_the_loop_itself_has_the_targets_distribution(monkeypatch):
    """speculate as it ships, every outcome of every random draw, on models of two symbols."""
    model, drafter = make("mamba2", vocab=2), ByteDrafter(make("mamba", 3, vocab=2))
    text = torch.tensor([[1, 0, 1]])
    distribution = functools.partial(filter_logits, temperature=0.6)
    want = {}
    for new in itertools.product(range(2), repeat=3):
        p = distribution(model(torch.cat([text, torch.tensor([new])], dim=1))[0])[0, 2:]
        want[new] = math.prod(p[i, token].item() for i, token in enumerate(new))

    def run(choose):
        def multinomial(p, n, generator):
            return torch.tensor([choose(p.flatten().tolist())]).expand(p.shape[:-1] + (1,))

        def bernoulli(chance, generator):
            passed = [choose([1 - x, x]) if 0 < x < 1 else x for x in chance.tolist()]
            return torch.tensor(passed, dtype=F64)

        monkeypatch.setattr(torch, "multinomial", multinomial)
        monkeypatch.setattr(torch, "bernoulli", bernoulli)
        return tuple(written_by(speculate, model, text, 3, distribution, drafter, 2))

    got = {}
    for new, mass in every_run(run):
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
    """A folder of checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model, more in (
            ("mamba", make("mamba"), {}), ("s4", make("s4"), {}), ("words", make_words(WORDS), {}),
            ("small", make("mamba", 1, vocab=300), {}),
            ("mamba2", make("mamba2"), {"flags": {"data": "README.md"}}),
            ("moved", make("mamba2"), {"flags": {"data": "no_such_corpus.txt"}}),
            ("foreign", make("mamba2"), {"flags": "another program's"})):
        save(folder / name / "best.pt", model.float(), **more)
    return folder


def test_the_script_writes_the_same_greedy_text_with_a_drafter(runs, capsysbinary):
    """Copies are of the text's own, whether the checkpoint names a corpus or not."""
    for ckpt, *drafts in (("mamba2", runs / "mamba", runs / "s4", runs / "words", "counts"),
                          ("moved", "ngram"), ("foreign", "ngram")):
        flags = ("--ckpt", runs / ckpt, "--bytes", 20, "--raw", "--temperature", 0,
                 "--dtype", "float64")
        plain = written(capsysbinary, *flags)
        for draft in drafts:
            assert written(capsysbinary, *flags, "--draft", draft, "--k", 3) == plain


def test_a_seed_reproduces_a_speculated_text(runs, capsysbinary):
    flags = ("--ckpt", runs / "mamba2", "--k", 2, "--bytes", 20, "--raw", "--draft")
    for draft in (runs / "mamba", runs / "words", "counts"):
        first, again, other = (written(capsysbinary, *flags, draft, "--seed", i) for i in (3, 3, 4))
        assert first == again != other and len(first) == 20


@pytest.mark.parametrize("flags, parts", [
    ("--draft ngram --k 0", ["--k 0"]), ("--stats", ["--draft"]), ("--fill a_ --crlf", ["--crlf"]),
    ("--draft no_such_run", ["no_such_run", "ngram, counts"]),
    ("--draft counts", ["--draft counts", "does not say its corpus", "--draft ngram"]),
    ("--draft counts --ckpt {}/moved", ["--draft counts", "moved was trained on", "no such file"]),
    ("--draft {}/small", ["vocabulary of 300", "256"]),
    ("--ckpt {}/words", ["--ckpt MODEL_OF_BYTES --draft"]),
    ("--draft ngram --compile", ["--draft", "--compile"]),
    ("--draft ngram --fill _", ["--draft", "--fill"]),
    ("--draft ngram --batch 2", ["--draft", "one text", "--batch"]),
    ("--draft ngram --ckpt {}/small", ["--draft ngram guesses bytes", "small reads tokens"])])
def test_bad_flags_are_one_line(flags, parts, runs, capsys):
    refused(capsys, ["--ckpt", runs / "mamba", *flags.replace("{}", str(runs)).split()], *parts)


def test_stats_tell_acceptance_and_time_plain_writing_too(runs, capsys):
    same = ["--ckpt", str(runs / "mamba2"), "--draft", str(runs / "mamba2")]
    assert sample.main([*same, "--bytes", "30", "--k", "4", "--stats"]) == 0
    err = capsys.readouterr().err
    assert "5.00 tokens per call" in err and "24 of 24 guesses accepted" in err and "times as fast" in err
