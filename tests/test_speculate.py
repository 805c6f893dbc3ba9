"""Speculative sampling: the rules are exact, by enumeration in rational numbers; the loop keeps law, text and state."""
import functools
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from data.bpe import BPE, learn_merges
from data.corpus import load_corpus
from data.files import UserError
from model import LM, Config, load, save
from sample import (ByteDrafter, CountDrafter, NgramDrafter, Stats, SubwordDrafter, exact, filter_logits, generate,
                    point_mass, prefill, read, reveal, speculate, top_beta)

F64 = torch.float64
V = 3


# The rules, in rational numbers


def toy_law(seed, size=V):
    """A law for every prefix: law(prefix) is a row of Fractions, none of them alike."""
    def law(prefix):
        weights = np.random.default_rng([seed, *prefix, 99]).integers(0, 7, size)
        weights[len(prefix) % size] += 1  # never all zero
        return [Fraction(int(w), int(weights.sum())) for w in weights]
    return law


def rows(*laws):
    return np.array([[Fraction(x) for x in law] for law in laws], dtype=object)


def drafts(q, prefix, k):
    """Every (guesses, probability) of k guesses drawn from q one after the other."""
    if k == 0:
        return [((), Fraction(1))]
    return [((b, *rest), q_b * r) for b, q_b in enumerate(q(prefix)) if q_b
            for rest, r in drafts(q, (*prefix, b), k - 1)]


def verify(rule, p, q, prefix, guesses):
    """{bytes committed: probability}: the shipped rule on the laws along one draft."""
    paths = [(*prefix, *guesses[:i]) for i in range(len(guesses) + 1)]
    laws = rows(*map(p, paths))
    by = rows(*map(q, paths[:-1]), [0] * V)
    hot = rows(*([int(b == g) for b in range(V)] for g in guesses), [0] * V)
    chance, after = rule(laws, by, hot, laws)
    out, reached = {}, Fraction(1)
    for i in range(len(guesses) + 1):
        for b in range(V):
            committed = (*guesses[:i], b)
            out[committed] = out.get(committed, 0) + reached * (1 - chance[i]) * after[i][b]
        reached *= chance[i]
    assert reached == 0  # the row after the last guess accepts nothing
    return out


def speculative_law(rule, p, q, draw, k, n):
    """The law of the first n bytes, over as many rounds as it takes; what goes beyond n is summed over."""
    done, open_ = {}, {(): Fraction(1)}
    while open_:
        text, mass = open_.popitem()
        for guesses, m in drafts(draw, text, k):
            for committed, r in verify(rule, p, q, text, guesses).items():
                if r:
                    new = (*text, *committed)
                    where, new = (done, new[:n]) if len(new) >= n else (open_, new)
                    where[new] = where.get(new, 0) + mass * m * r
    return done


def target_law(p, n):
    law = {(): Fraction(1)}
    for _ in range(n):
        law = {(*t, b): m * p_b for t, m in law.items() for b, p_b in enumerate(p(t)) if p_b}
    return law


def total_variation(a, b):
    return sum(abs(a.get(t, 0) - b.get(t, 0)) for t in {*a, *b}) / 2


@pytest.mark.parametrize("k, n", [(1, 1), (1, 3), (2, 3), (3, 2)])
@pytest.mark.parametrize("rule", [exact, point_mass])
def test_the_text_has_the_targets_law_exactly(rule, k, n):
    """Leviathan et al. 2023, appendix A.1: total variation 0, over several rounds, with n reached in mid-draft."""
    for seed in range(2):
        p, q = toy_law(seed), toy_law(seed + 50)
        assert total_variation(speculative_law(rule, p, q, q, k, n), target_law(p, n)) == 0


def test_a_point_mass_is_exact_whatever_guesses():
    """Guesses drawn from anything, also from a certain law: q does not matter."""
    p, nonsense, certain = toy_law(1), toy_law(77), lambda prefix: rows(np.eye(V, dtype=int)[len(prefix) % V])[0]
    for draw in (toy_law(2), certain):
        assert total_variation(speculative_law(point_mass, p, nonsense, draw, 2, 3), target_law(p, 3)) == 0


def test_drawing_from_another_law_than_the_one_tested_is_caught():
    """The guess of the likelier half, tested as if it came from all of q: not exact, so the tests above can fail."""
    p, q = (lambda prefix: rows(["1/2", "1/4", "1/4"])[0]), (lambda prefix: rows(["1/4", "1/4", "1/2"])[0])
    draw = lambda prefix: rows([0, "1/3", "2/3"])[0]
    assert total_variation(speculative_law(exact, p, draw, draw, 2, 3), target_law(p, 3)) == 0
    assert total_variation(speculative_law(exact, p, q, draw, 1, 1), target_law(p, 1)) > Fraction(1, 50)


def test_top_beta_is_exact_for_no_beta_above_one():
    """MambaByte's rule gives the drafter's law inside the beta likeliest: here a third of the mass is elsewhere."""
    p, q = toy_law(3), toy_law(4)
    for beta in (2, 3):
        law = speculative_law(lambda *rows: top_beta(*rows, beta=beta), p, q, q, 2, 2)
        assert total_variation(law, target_law(p, 2)) > Fraction(3, 10)


def test_top_beta_accepts_by_rank_and_ties_count_for_the_guess():
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0]]).repeat(5, 1)
    hot = torch.cat([torch.eye(4), torch.zeros(1, 4)])
    for beta, accepted in ((1, [1, 0, 0, 0, 0]), (2, [1, 1, 1, 0, 0]), (3, [1, 1, 1, 0, 0]), (4, [1, 1, 1, 1, 0])):
        assert top_beta(None, None, hot, scores, beta)[0].tolist() == accepted


def test_a_perfect_drafter_is_always_believed():
    """q = p: accepted for sure, and what rounding leaves of (p - q)+ is no law to draw from."""
    p = torch.softmax(torch.randn(4, 7, dtype=F64, generator=torch.Generator().manual_seed(0)), -1)
    hot = torch.cat([torch.eye(7, dtype=F64)[:3], torch.zeros(1, 7, dtype=F64)])
    q = torch.cat([p[:3], torch.zeros(1, 7, dtype=F64)])
    chance, after = exact(p, q, hot)
    assert chance.tolist() == [1, 1, 1, 0]
    torch.testing.assert_close(after, p, rtol=1e-14, atol=0)


# Words, revealed byte by byte

WORDS = [b"a", b"b", b"ab", b"ba", b"aab"]  # prefixes of each other, and several ways to write a text


class Words(BPE):
    """A vocabulary of any words, as a trie."""

    def __init__(self, words):
        self.words, self.bounds, self.sorted = words, {}, sorted(words)
        self.order = [words.index(w) for w in self.sorted]


TRIE = Words(WORDS)


def word_drafts(law, text, k):
    """Every (bytes, laws of the bytes, probability) of k words drawn one after the other."""
    if k == 0:
        return [(b"", [], Fraction(1))]
    out, q = [], law(text)
    for word, mass in zip(TRIE.sorted, q):
        if mass:
            branches = np.stack([TRIE.branches(word[:n]) for n in range(len(word))])
            laws = reveal(np.array(q, dtype=object), branches)[:, 97:99]
            assert all(sum(row) == 1 for row in laws)
            out += [(word + rest, [*laws, *more], mass * m) for rest, more, m in word_drafts(law, text + word, k - 1)]
    return out


@pytest.mark.parametrize("k, n", [(1, 4), (2, 3)])
@pytest.mark.parametrize("rule", [exact, point_mass])
def test_words_verified_byte_by_byte_leave_the_law_of_bytes(rule, k, n):
    """Total variation 0 for words that begin alike, over several rounds that end inside words."""
    p, q = (lambda text: toy_law(5, 2)(tuple(text))), (lambda text: toy_law(6, len(WORDS))(tuple(text)))
    done, open_ = {}, {b"": Fraction(1)}
    while open_:
        text, mass = open_.popitem()
        for guesses, laws, m in word_drafts(q, text, k):
            paths = [text + guesses[:i] for i in range(len(guesses) + 1)]
            hot = rows(*([int(b == g) for b in b"ab"] for g in guesses), [0, 0])
            chance, after = rule(rows(*map(p, paths)), rows(*laws, [0, 0]), hot)
            reached = mass * m
            for i in range(len(paths)):
                for b in range(2):
                    if r := reached * (1 - chance[i]) * after[i][b]:
                        new = text + guesses[:i] + b"ab"[b:b + 1]
                        where, new = (done, new[:n]) if len(new) >= n else (open_, new)
                        where[new] = where.get(new, 0) + r
                reached *= chance[i]
    want = {bytes(b + 97 for b in t): m for t, m in target_law(lambda t: p(bytes(b + 97 for b in t)), n).items()}
    assert total_variation(done, want) == 0


def test_a_word_is_accepted_more_often_by_its_trie_than_as_a_point_mass():
    """The same drafts, by their expected number of accepted bytes."""
    p, q = toy_law(5, 2)(()), toy_law(6, len(WORDS))(())
    accepted = {exact: 0, point_mass: 0}
    for guesses, laws, m in word_drafts(lambda text: q, b"", 1):
        hot = rows(*([int(b == g) for b in b"ab"] for g in guesses), [0, 0])
        for rule in accepted:
            chance, _ = rule(rows(*[p] * len(hot)), rows(*laws, [0, 0]), hot)
            accepted[rule] += m * sum(np.cumprod(chance))
    assert accepted[exact] > accepted[point_mass]


# The loop

SIZES = dict(d_model=16, d_state=6, head_dim=8, n_head=2, n_kv_head=1, d_mlp=7)
KINDS = {"mamba": ("mamba",) * 2, "mamba2": ("mamba2",) * 2, "attention": ("attention+mlp",) * 2,
         "s4": ("s4", "s4d"), "hybrid": ("mamba", "attention+mlp", "mamba2")}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, seed=0, vocab=256, scale=0.3, **sizes):
    torch.manual_seed(seed)
    model = LM(Config(KINDS[kind], vocab=vocab, window=7, **{**SIZES, **sizes})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    return model


def greedy(logits):
    return filter_logits(logits, 0)


def written_by(f, *args, **kwargs):
    """All that generate or speculate yields, (b, count)."""
    return torch.stack(list(f(*args, **kwargs)), dim=1)


def prompt(length, b=1):
    return torch.randint(256, (b, length), generator=torch.Generator().manual_seed(length))


class Guess:
    """A drafter that guesses what f(text, end, k) says, a list of bytes a row."""

    def __init__(self, f):
        self.f = f

    def draft(self, text, end, k, law, generator):
        return torch.tensor([self.f(row[:e].tolist(), k) for row, e in zip(text, end)]).reshape(len(end), -1), None


def adversaries(model, text, count):
    """Drafters that are always right, always wrong, right now and then, random, empty, and no UTF-8."""
    truth = torch.cat([text, written_by(generate, model, text, count + 20, greedy)], dim=1).tolist()
    row = lambda t: next(r for r in truth if r[:len(text[0])] == t[:len(text[0])])
    g = np.random.default_rng(0)
    yield "right", Guess(lambda t, k: row(t)[len(t):len(t) + k])
    yield "wrong", Guess(lambda t, k: [(b + 1) % 256 for b in row(t)[len(t):len(t) + k]])
    yield "mixed", Guess(lambda t, k: [b if g.random() < 0.7 else 0 for b in row(t)[len(t):len(t) + k]])
    yield "random", Guess(lambda t, k: g.integers(256, size=k).tolist())
    yield "none", Guess(lambda t, k: [])
    yield "no UTF-8", Guess(lambda t, k: [255, 128, 192, 254][:k])
    yield "itself", ByteDrafter(model)
    yield "another model", ByteDrafter(make("mamba", 5))
    yield "ngram", NgramDrafter(bytes(truth[0] * 2), 1)
    yield "counts", CountDrafter(bytes(truth[0]))
    if len(text) == 1:
        words = BPE(learn_merges(bytes(truth[0] * 9), 9))
        yield "words", SubwordDrafter(make("mamba2", 6, vocab=265), words)


@every_kind
@pytest.mark.parametrize("k, length", [(1, 3), (5, 1), (9, 10)])
def test_greedy_text_is_the_targets_whatever_the_drafter_says(kind, k, length):
    """Temperature 0, float64: byte for byte, with the end of the text in mid-draft."""
    model, text = make(kind), prompt(length)
    want = written_by(generate, model, text, 17, greedy)
    rules = itertools.cycle((exact, point_mass, lambda *rows: top_beta(*rows, beta=1)))
    for (name, drafter), rule in zip(adversaries(model, text, 17), rules):
        assert torch.equal(written_by(speculate, model, text, 17, greedy, drafter, k, rule), want), name


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_batch_is_its_rows_each_alone(kind):
    """Rows accept different numbers of guesses and are done at different times."""
    model, text, count = make(kind), prompt(4, 3), 17
    want = written_by(generate, model, text, count, greedy)
    for name, drafter in adversaries(model, text, count + 80):
        if name != "ngram":
            assert torch.equal(written_by(speculate, model, text, count, greedy, drafter, 4), want), name
    stats = Stats()
    list(speculate(model, text, count, greedy, ByteDrafter(make(kind, 0, scale=0.25)), 4, stats=stats))
    assert len({accepted for _, accepted in stats.rounds}) > 2


def test_correcting_up_to_white_space_changes_nothing_but_the_calls():
    """MambaByte's way after a refusal."""
    model, text = make("mamba2"), prompt(3)
    want = written_by(generate, model, text, 20, greedy)
    for name, drafter in adversaries(model, text, 20):
        stats = Stats()
        got = written_by(speculate, model, text, 20, greedy, drafter, 4, stats=stats, to_boundary=True)
        assert torch.equal(got, want), name
        if name == "wrong":
            assert stats.rounds[:3] == [(4, 0), (0, 0), (0, 0)] and stats.calls == 20


@every_kind
@pytest.mark.parametrize("keep", range(6))
def test_the_state_after_any_number_of_accepted_guesses_is_the_state_from_scratch(kind, keep):
    """read() looks at guesses and leaves no trace of them, also in the convolution's tail; three rounds in a row."""
    model = make(kind)
    text = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1))
    state, start, end = None, [0], [3]
    for ahead in (5, 0, 4, 7):
        logits, state = read(model, text, start, end, ahead, state)
        whole, _ = model(text[:, :end[0] + ahead])
        torch.testing.assert_close(logits, whole[:, end[0] - 1:], rtol=1e-10, atol=1e-10)
        _, scratch = prefill(model, text[:, :end[0]])
        for layer, layer2 in zip(state, scratch, strict=True):
            for t, t2 in zip(layer, layer2, strict=True):
                torch.testing.assert_close(t, t2, rtol=1e-10, atol=1e-10)
        start, end = end, [end[0] + 1 + min(keep, ahead)]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_rows_keep_different_numbers_of_positions(kind):
    """A dt of zero leaves h as it is, bit by bit; the tail of the convolution is gathered."""
    model, text, keep = make(kind), prompt(9, 4), torch.tensor([0, 9, 2, 5])
    _, before = model(prompt(6, 4))
    logits, state = model(text, before, keep)
    torch.testing.assert_close(logits, model(text, before)[0], rtol=1e-10, atol=1e-10)
    for i, n in enumerate(keep.tolist()):
        one = tuple(type(layer)(*(t[i:i + 1] for t in layer)) for layer in before)
        want = model(text[i:i + 1, :n], one)[1] if n else one
        for layer, layer2 in zip(state, want, strict=True):
            for t, t2 in zip(layer, layer2, strict=True):
                torch.testing.assert_close(t[i:i + 1], t2, rtol=1e-10, atol=1e-10)
    for layer, layer2 in zip(state, before):
        assert torch.equal(layer.conv[0], layer2.conv[0]) and torch.equal(layer.h[0], layer2.h[0])


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_looking_ahead_makes_no_tensor_of_all_states(kind):
    """Reading 4 bytes again and 8 guesses: what is held is one state a layer and the bytes; no (12, d, n) comes up."""
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
            _, state = read(model, text, [20], [24], 8, state)
    assert one <= largest[0] < 12 * one / 2 and all(layer.h.numel() == one for layer in state)


def test_what_cannot_be_kept_is_an_error():
    for keep, part in ((0, "upto 0 is not from 1 to 5"), (6, "upto 6"), (-1, "upto -1")):
        with pytest.raises(ValueError, match=part):
            make("mamba2")(prompt(5), None, keep)
    for kind in ("attention", "s4"):
        with pytest.raises(ValueError, match="keep one number of positions for all rows"):
            make(kind)(prompt(5, 2), None, torch.tensor([1, 2]))


@every_kind
def test_a_state_owns_no_more_than_it_shows(kind):
    """After a prompt in whole chunks: a view would keep the whole prompt's keys, or the states of all its chunks."""
    for layer in make(kind)(prompt(320))[1]:
        for t in layer:
            assert t.untyped_storage().nbytes() <= 2 * t.nbytes


def test_forgetting_the_convolutions_tail_would_show():
    """The bug that hides in rollbacks: h restored, the last inputs of the convolution not."""
    model, text = make("mamba"), prompt(12)
    _, state = read(model, text, [0], [6], 5, None)
    _, wrong = model(text[:, :11])
    mixed = tuple(layer._replace(conv=w.conv) for layer, w in zip(state, wrong))
    good, bad, want = model(text[:, 6:7], state)[0], model(text[:, 6:7], mixed)[0], model(text[:, :7])[0][:, -1:]
    torch.testing.assert_close(good, want, rtol=1e-10, atol=1e-10)
    assert (bad - want).abs().max() > 1e-3


def test_a_perfect_drafter_commits_k_plus_one_bytes_a_call():
    model, calls = make("mamba2"), []
    model.register_forward_hook(lambda *args: calls.append(args))
    stats = Stats()
    assert len(list(speculate(model, prompt(5), 30, greedy, ByteDrafter(make("mamba2")), 4, stats=stats))) == 30
    assert len(stats.rounds) == 6 and set(stats.rounds) == {(4, 4)} and len(calls) == 6 + 1  # and the prompt


class Oracle:
    """Goes through every outcome of every draw: each run repeats the choices of the last one, up to the next branch."""

    def __init__(self):
        self.path = []  # [choice, probabilities] by draw

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


def test_words_go_on_where_a_refusal_left_the_text(monkeypatch):
    """Only words that begin with what the text ends with are drawn, from the state of the words before them."""
    words = BPE([(97, 98), (256, 99), (257, 100)])  # ab abc abcd
    model = make("mamba2", 6, vocab=259)
    drafter, law = SubwordDrafter(model, words), lambda logits: torch.softmax(logits, -1)
    text = torch.tensor([list(b"abcdxab........")])
    for seed in range(9):
        drafter.states = None
        guesses, q = drafter.draft(text, [7], 2, law, torch.Generator().manual_seed(seed))
        (began, _, _), (read, logits, _), (then, _, _) = drafter.states
        assert began == 0 and read == 5 and then in (7, 8, 9)  # the piece; ab, abc or abcd
        torch.testing.assert_close(logits, model(torch.tensor([[10, 258, 120]]))[0][:, -1], rtol=1e-10, atol=1e-10)
        assert len(guesses[0]) == len(q[0]) and (q[0, range(len(guesses[0])), guesses[0]] > 0).all()
        if then > 7:  # abc or abcd, both go on with c
            assert guesses[0, 0] == ord("c") and q[0, 0, ord("c")] == 1


@pytest.mark.parametrize("k, count, temperature", [(1, 3, 1.0), (2, 2, 0.6)])
def test_the_loop_itself_has_the_targets_law(k, count, temperature, monkeypatch):
    """speculate as it ships, every outcome of every random draw, on models of two symbols."""
    model, drafter, text = make("mamba2", vocab=2), make("mamba", 3, vocab=2), torch.tensor([[1, 0, 1]])
    oracle = Oracle()
    law = lambda logits: filter_logits(logits, temperature)
    want = {}
    for new in itertools.product(range(2), repeat=count):
        p = law(model(torch.cat([text, torch.tensor([new])], dim=1))[0])[0, 2:]
        want[new] = np.prod([p[i, b].item() for i, b in enumerate(new)])

    def coins(p, generator=None):
        return torch.tensor([[float(oracle.choose([1 - x, x])) if 0 < x < 1 else x for x in p[0].tolist()]], dtype=F64)

    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: torch.tensor([[oracle.choose(p[0].tolist())]]))
    monkeypatch.setattr(torch, "bernoulli", coins)
    got, mass = {}, 0
    for new, m in oracle.runs(
            lambda: written_by(speculate, model, text, count, law, ByteDrafter(drafter), k)[0].tolist()):
        got[tuple(new)], mass = got.get(tuple(new), 0) + m, mass + m
    assert mass == pytest.approx(1, abs=1e-12)
    assert got == pytest.approx(want, abs=1e-12)


# Byte pairs


@pytest.mark.parametrize("text", [b"", b"a", bytes(range(256)) * 3, b"\xff" * 400, b"\0\n \t" * 50,
                                  "né €😀\u2028".encode() * 9])
def test_any_bytes_come_back(text):
    words = BPE(learn_merges(b"the cat and the hat, " * 9 + bytes(range(256)) * 2, 30))
    tokens = words.encode(text)
    assert words.decode(tokens) == text and tokens.max(initial=0) < 286
    assert BPE().encode(text).tolist() == list(text)


def test_merges_are_the_most_frequent_pairs_of_what_is_left():
    """Sennrich et al. 2016, figure 1's words: e s, es t, l o, lo w, then the pair of the new word."""
    data = b" low" * 5 + b" lower" * 2 + b" newest" * 6 + b" widest" * 3
    words = BPE(learn_merges(data, 4))
    assert words.words[256:258] == [b"es", b"est"] and len(words.encode(b"newest")) == 4
    assert BPE(learn_merges(b"abab abab", 1)).words[256] == b"ab"


def test_encoding_applies_merges_in_the_order_they_were_learned():
    words = BPE([(98, 99), (97, 98), (97, 256)])  # bc, ab, abc
    assert words.encode(b"abc").tolist() == [258] and words.encode(b"ab").tolist() == [257]


def test_no_merge_crosses_a_cut_and_no_word_is_long():
    words = BPE(learn_merges(b"x = y + 1\n" * 200 + b"a" * 3000, 9))
    assert max(map(len, words.words)) <= 25 and not any(b"= y" in w or b"x =" in w for w in words.words)


def test_too_many_merges_are_refused():
    for count in (0, -1, 70000, 50):
        with pytest.raises(UserError, match=f"--bpe {count}"):
            learn_merges(b"abcabc", count)


def test_a_trie_knows_what_goes_on_after_a_prefix():
    for prefix in (b"", b"a", b"ab", b"aab", b"c"):
        bounds = TRIE.branches(prefix)
        for b in range(256):
            assert TRIE.sorted[bounds[b]:bounds[b + 1]] == [w for w in TRIE.sorted if w.startswith(prefix + bytes([b]))]
        assert TRIE.sorted[slice(*TRIE.span(prefix))] == [w for w in TRIE.sorted if w.startswith(prefix)]


def test_training_on_words_reports_bits_per_byte_and_keeps_the_merges(tmp_path, capsys):
    data, flags = tmp_path / "text", "--d_model 16 --n_layer 1 --head_dim 8 --seq_len 32 --bpe 40 --steps 3"
    data.write_bytes(b"".join(b"the %d cats sat on mat %x. " % (i * i, i**3) for i in range(500)))
    assert train.main([*flags.split(), "--data", str(data), "--out", str(tmp_path / "run")]) == 0
    model, extra = load(tmp_path / "run")
    assert len(extra["merges"]) == 40 and model.config.vocab == 296
    words = BPE(extra["merges"])
    val = load_corpus(str(data)).val
    tokens = words.encode(val)
    assert words.decode(tokens) == val.tobytes() and len(tokens) < len(val) / 2
    logits, _ = model(torch.tensor([[10, *tokens[:-1].tolist()]]))
    nats = torch.nn.functional.cross_entropy(logits[0], torch.tensor(tokens.astype(int)), reduction="sum").item()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["val_bpb_carried"] == pytest.approx(nats / math.log(2) / len(val), rel=1e-5)
    assert log[-1]["bytes"] > 3 * 4 * 32
    assert train.main(["--eval_only", "--out", str(tmp_path / "run")]) == 0
    assert train.main(["--resume", "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    assert f"{log[-1]['val_bpb']:.4f}" in capsys.readouterr().out


# Drafters


def test_the_longest_suffix_wins_and_the_text_comes_before_the_corpus():
    ngram = NgramDrafter(b"the cat sat. one cat ran.")
    assert ngram.continuation(b"a dog; the cat", 5) == b" sat."
    assert ngram.continuation(b"not one cat", 4) == b" ran"
    assert ngram.continuation(b"the cat lay, the cat", 4) == b" lay"
    assert ngram.continuation(b"xyz", 4) == b"" and ngram.continuation(b"", 4) == b""
    assert NgramDrafter().continuation(b"abcdabc", 9) == b"dabc"


def test_the_longest_suffix_is_found_among_all():
    """Against the plain search through every position."""
    g = np.random.default_rng(0)
    corpus = bytes(g.integers(97, 100, 400).tolist())
    ngram = NgramDrafter(corpus, 1)
    for _ in range(50):
        text = bytes(g.integers(97, 100, 12).tolist())
        longest = max(n for n in range(1, 9) if corpus.find(text[-n:], 0, len(corpus) - 1) >= 0)
        guess = ngram.continuation(b"#" * 9 + text[-8:], 3)
        assert guess and text[-longest:] + guess in corpus


def test_counts_are_those_of_the_corpus():
    """b"aabaaab" by hand: "aa" leads to b, a, b and "baaa" to b; no other context of 4 or 8 bytes here occurs in it."""
    counts, prior = CountDrafter(b"aabaaab"), np.full(256, 1 / 256)
    after_aa = (20 * prior + np.bincount([98, 97, 98], minlength=256)) / 23
    after_baaa = (20 * after_aa + np.bincount([98], minlength=256)) / 21
    for last, law in ((b"aa", after_aa), (b"xxaa", after_aa), (b"abaaa", after_baaa), (b"xxabbaaa", after_baaa),
                      (b"a", prior), (b"", prior)):
        np.testing.assert_allclose(counts.predict(last), law)
    np.testing.assert_allclose(CountDrafter(b"").predict(b"abcdefgh"), prior)


def test_counts_draw_from_the_law_they_report():
    counts = CountDrafter(b"aabaaab" * 3)
    law = functools.partial(filter_logits, top_k=2)
    guesses, q = counts.draft(prompt(3, 2), [3, 2], 5, law, torch.Generator().manual_seed(0))
    assert guesses.shape == (2, 5) and q.shape == (2, 5, 256) and ((q > 0).sum(-1) == 2).all()
    assert q.gather(2, guesses[..., None]).min() > 0
    torch.testing.assert_close(q.sum(-1), torch.ones(2, 5))


# The script


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        save(folder / kind / "best.pt", make(kind).float())
    save(folder / "small" / "best.pt", make("mamba", 1, vocab=300).float())
    merges = learn_merges(b"the cat and the hat, " * 9, 9)
    save(folder / "words" / "best.pt", make("mamba2", 2, vocab=265).float(), merges=merges)
    for name, data in (("read", "README.md"), ("moved", "no_such_corpus.txt")):
        save(folder / name / "best.pt", make("mamba2").float(), flags={"data": data})
    return folder


def written(capsysbinary, *flags):
    capsysbinary.readouterr()
    assert sample.main([*map(str, flags), "--device", "cpu"]) == 0
    return capsysbinary.readouterr().out


@every_kind
def test_the_script_writes_the_same_greedy_text_with_a_drafter(kind, runs, capsysbinary):
    flags = ("--ckpt", runs / kind, "--bytes", 30, "--prompt", "ab", "--raw", "--temperature", 0, "--dtype", "float64")
    plain = written(capsysbinary, *flags)
    for draft in (runs / "mamba", runs / "words", "ngram"):
        assert written(capsysbinary, *flags, "--draft", draft, "--k", 3) == plain


def test_counts_of_the_corpus_that_the_checkpoint_names(runs, capsysbinary):
    flags = ("--ckpt", runs / "read", "--bytes", 30, "--prompt", "ab", "--raw", "--temperature", 0)
    assert written(capsysbinary, *flags, "--draft", "counts") == written(capsysbinary, *flags)


def test_nobody_guesses_beyond_the_end():
    model, stats = make("mamba2"), Stats()
    list(speculate(model, prompt(3), 6, greedy, Guess(lambda t, k: [0] * k), 50, stats=stats))
    assert [guessed + 1 + sum(a + 1 for _, a in stats.rounds[:i]) for i, (guessed, _) in enumerate(stats.rounds)] == \
        [6] * len(stats.rounds)


def test_a_seed_reproduces_a_speculated_text(runs, capsysbinary):
    flags = ("--ckpt", runs / "mamba2", "--draft", runs / "mamba", "--bytes", 30, "--raw", "--batch", 3, "--seed")
    first, again, other = (written(capsysbinary, *flags, seed) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("flags, parts", [
    ("--draft ngram --k 0", ["--k 0"]), ("--draft ngram --rule best", ["--rule best", "point_mass"]),
    ("--draft ngram --rule top_beta --beta 0", ["--beta 0"]), ("--draft no_such_run", ["no_such_run", "ngram, counts"]),
    ("--draft counts", ["--draft counts", "does not say", "--draft ngram"]),
    ("--draft counts --ckpt {}/moved", ["--draft counts", "moved was trained on", "no such file"]),
    ("--draft {}/small", ["vocabulary of 300", "256"]), ("--ckpt {}/words", ["--ckpt MODEL_OF_BYTES --draft"]),
    ("--draft {}/words --batch 2", ["words", "--batch 1"]), ("--draft ngram --compile", ["--compile"]),
    ("--draft ngram --to_boundary --batch 2", ["--to_boundary"]),
    ("--draft ngram --ckpt {}/attention --batch 2", ["--batch 2", "attention has attention", "--batch 1"]),
    ("--draft {}/attention --batch 2", ["--batch 2", "attention has attention", "--batch 1"]),
    ("--draft {}/s4 --batch 2", ["--batch 2", "s4 has s4, s4d", "--batch 1"]),
    ("--draft ngram --ckpt {}/small", ["--draft ngram guesses bytes", "small reads tokens"]),
    ("--draft counts --ckpt {}/small", ["--draft counts guesses bytes", "small reads tokens"]),
    ("--draft {}/words --ckpt {}/small", ["words guesses bytes", "small reads tokens"])])
def test_bad_flags_are_one_line(flags, parts, runs, capsys):
    assert sample.main(["--ckpt", str(runs / "mamba"), *flags.replace("{}", str(runs)).split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts), err


def test_stats_tell_bytes_calls_and_acceptance(runs, capsys):
    same = ["--ckpt", str(runs / "mamba2"), "--draft", str(runs / "mamba2")]
    assert sample.main([*same, "--bytes", "30", "--k", "4", "--stats"]) == 0
    err = capsys.readouterr().err
    assert "5.00 bytes per call" in err and "1.00 1.00 1.00 1.00" in err and "times as fast" in err
    assert Stats([(3, 0), (3, 2), (1, 1), (0, 0)]).acceptance() == [2 / 3, 1, 0]


def test_top_beta_says_that_it_changes_the_law(runs, capsys):
    flags = ["--ckpt", str(runs / "mamba"), "--draft", "ngram", "--bytes", "9", "--rule", "top_beta", "--beta"]
    for beta in (1, 3):
        assert sample.main([*flags, str(beta)]) == 0
        assert ("does not follow the model's law" in capsys.readouterr().err) == (beta > 1)
