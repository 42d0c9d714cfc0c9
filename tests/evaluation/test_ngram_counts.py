"""Kneser-Ney counts against a slow reference with dictionaries, and what makes them a model at all: probabilities that sum to 1."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from engram import ConfigError, DataError
from engram.evaluation import NgramCounts, mixture_weight
from engram.evaluation.ngram_counts import _discounts

VOCAB, BEGIN = 7, 0
BEFORE = "before the beginning"


def streams(seed, lengths=(40, 1, 33, 2, 25), vocab=VOCAB):
    """Tokens that are not even, so that counts of counts of 1 to 4 all come up, with begin tokens among them."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab + 1)
    return [generator.choice(vocab, size=length, p=weights / weights.sum()) for length in lengths]


def contexts(stream, order, begin):
    """The ``order - 1`` symbols before each token."""
    found = []
    for place in range(len(stream)):
        context = []
        for back in range(1, order):
            ended = len(context) < back - 1 or (context and begin is not None and context[-1] == begin)
            if not ended and place - back >= 0:
                context.append(int(stream[place - back]))
        found.append(tuple([BEFORE] * (order - 1 - len(context)) + context[::-1]))
    return found


class Reference:
    """The formulas, word for word."""

    def __init__(self, streams, vocab, order, begin):
        self.vocab, self.order, self.begin = vocab, order, begin
        seen = [
            (*context, int(token))
            for stream in streams
            for context, token in list(zip(contexts(stream, order, begin), stream))[1:]
        ]
        self.counts = {order: Counter(seen)}
        for length in range(order - 1, 0, -1):
            self.counts[length] = Counter(gram[1:] for gram in self.counts[length + 1])
        self.discounts = {length: self.estimate(counts) for length, counts in self.counts.items()}
        self.followers = {length: defaultdict(dict) for length in self.counts}
        for length, counts in self.counts.items():
            for gram, count in counts.items():
                self.followers[length][gram[:-1]][gram[-1]] = count

    @staticmethod
    def estimate(counts):
        n = [sum(count == number for count in counts.values()) for number in (1, 2, 3, 4)]
        if 0 in n:
            return [0.5, 1.0, 1.5]
        y = n[0] / (n[0] + 2 * n[1])
        found = [number - (number + 1) * y * n[number] / n[number - 1] for number in (1, 2, 3)]
        return found if all(0 < d <= most for most, d in enumerate(found, 1)) else [0.5, 1.0, 1.5]

    def probability(self, context, token):
        found = 1 / self.vocab
        for length in range(1, self.order + 1):
            followers = self.followers[length].get(context[len(context) - length + 1 :])
            if followers is None:
                break
            taken = {other: self.discounts[length][min(count, 3) - 1] for other, count in followers.items()}
            total = sum(followers.values())
            own = (followers[token] - taken[token]) / total if token in followers else 0.0
            found = own + sum(taken.values()) / total * found
        return found

    def log_probabilities(self, stream):
        return [math.log(self.probability(c, int(t))) for c, t in zip(contexts(stream, self.order, self.begin), stream)]


@pytest.mark.parametrize("begin", [BEGIN, None])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_it_equals_the_reference(order, begin):
    for seed in range(4):
        given, asked = streams(seed), streams(100 + seed)
        reference = Reference(given, VOCAB, order, begin)
        counts = NgramCounts(given, VOCAB, order, begin)
        assert counts.tokens == sum(len(stream) - 1 for stream in given)
        assert counts.ngrams == tuple(len(reference.counts[length]) for length in range(1, order + 1))
        assert counts.discounts == [pytest.approx(reference.discounts[length]) for length in range(1, order + 1)]
        for stream in asked:
            np.testing.assert_allclose(counts.log_probabilities(stream), reference.log_probabilities(stream), rtol=1e-12)


def test_discounts_are_estimated_where_counts_of_counts_allow_it():
    given = streams(0, lengths=(3000,), vocab=200)
    counts = NgramCounts(given, 200, 3, BEGIN)
    reference = Reference(given, 200, 3, BEGIN)
    assert (0.5, 1.0, 1.5) not in counts.discounts[1:]
    np.testing.assert_allclose(
        counts.log_probabilities(given[0][:300]), reference.log_probabilities(given[0][:300]), rtol=1e-12
    )


def test_a_discount_of_nothing_is_not_taken():
    counts = np.repeat([1, 2, 3, 4], [6, 3, 4, 3])  # of counts of 2: 2 - 3 * (6 / 12) * (4 / 3)
    assert _discounts(counts) == (0.5, 1.0, 1.5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_in_every_context(order):
    """Contexts of all lengths, seen ones and others, with begin tokens in every place."""
    counts = NgramCounts(streams(1, lengths=(60,)), VOCAB, order, BEGIN)
    for length in range(5):
        before = np.array(list(itertools.product(range(VOCAB), repeat=length)), dtype=np.int64)[:400]
        asked = np.concatenate([np.repeat(before, VOCAB, axis=0), np.tile(np.arange(VOCAB), len(before))[:, None]], axis=1)
        told = np.exp(counts.log_probabilities(asked)[:, -1]).reshape(-1, VOCAB)
        assert told.min() > 0
        np.testing.assert_allclose(told.sum(axis=1), 1, rtol=1e-12)


def test_unseen_contexts_are_told_by_shorter_ones():
    given = [[1, 2, 3, 1, 2, 4, 1, 2, 3]]
    counts = NgramCounts(given, VOCAB, 3)
    told = counts.log_probabilities([[5, 2, 3], [6, 2, 3], [1, 2, 3]])[:, 2]
    assert told[0] == told[1] != told[2]  # 5, 6: never before 2
    unseen, unigram = counts.log_probabilities([[5, 6, 2], [2, 5, 2]])[:, 2], counts.log_probabilities([2])
    assert unseen.tolist() == [unigram[0]] * 2
    never = np.exp(counts.log_probabilities([[0], [5], [6]]))
    assert never[0] == never[1] == never[2] > 0


def test_contexts_begin_with_a_stream_and_with_a_begin_token():
    rows = streams(2, lengths=(30, 30, 30))
    counts = NgramCounts(rows, VOCAB, 3, BEGIN)
    apart = [counts.log_probabilities(row) for row in rows]
    np.testing.assert_array_equal(counts.log_probabilities(np.stack(rows)), np.stack(apart))
    after = counts.log_probabilities([[1, 2, BEGIN, 3, 4], [5, 6, BEGIN, 3, 4], [6, 5, BEGIN, 3, 4]])[:, 3:]
    assert (after == after[0]).all()
    split = NgramCounts([[1, 2], [3, 4], [3]], VOCAB, 2)
    assert split.tokens == 2  # nothing follows 2
    assert split.ngrams == (2, 2)


def test_how_it_is_given_does_not_matter_and_neither_does_the_order_of_streams():
    rows = streams(3, lengths=(30, 30))
    asked = streams(4)[0]
    told = NgramCounts(rows, VOCAB, 3, BEGIN).log_probabilities(asked)
    for given in (
        rows[::-1],
        [np.stack(rows)],
        [rows[0].tolist(), torch.from_numpy(rows[1])],
        (row.astype("<u2") for row in rows),
    ):
        np.testing.assert_array_equal(NgramCounts(given, VOCAB, 3, BEGIN).log_probabilities(torch.from_numpy(asked)), told)


def test_nothing_is_told_of_nothing():
    counts = NgramCounts(streams(0), VOCAB)
    assert counts.log_probabilities([]).shape == (0,)
    assert counts.log_probabilities(np.zeros((3, 0), dtype=np.int64)).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, r"order: got 0, expected a whole number of at least 1"),
        ({"order": 2.0}, r"order: got 2\.0, expected a whole number"),
        ({"vocab_size": True}, r"vocab_size: got True, expected a whole number"),
        ({"order": 25}, r"got order 25 with vocab_size 7, expected .* below 2 \*\* 63; take a smaller order"),
        ({"begin_id": 7}, r"begin_id: got 7, expected an id from 0 to 6"),
    ],
)
def test_impossible_numbers_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        NgramCounts(**{"streams": [[1, 2]], "vocab_size": VOCAB, **options})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 7]], r"got ids from 1 to 7, expected them from 0 to 6"),
        ([[-100, 1]], r"got ids from -100 to 1, expected"),
        ([[0.5, 1.0]], r"got float64 of shape \(2,\), expected whole numbers \[T\] or \[B, T\]"),
        ([np.zeros((1, 2, 3), dtype=int)], r"shape \(1, 2, 3\), expected"),
        ([], r"got no tokens to predict, expected a stream of at least two ids"),
        ([[1], [2], []], r"got no tokens to predict"),
    ],
)
def test_streams_that_cannot_be_counted_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        NgramCounts(given, VOCAB)
    if message.startswith("got ids"):
        with pytest.raises(DataError, match=message):
            NgramCounts([[1, 2]], VOCAB).log_probabilities(given)


def test_the_weight_of_a_mixture_is_the_likeliest():
    generator = np.random.default_rng(0)
    p, q = np.log(generator.uniform(0.01, 1, 200)), np.log(generator.uniform(0.01, 1, 200))
    weight = mixture_weight(p, q)
    likelihood = [np.logaddexp(np.log(w) + p, np.log1p(-w) + q).sum() for w in (weight - 1e-3, weight, weight + 1e-3)]
    assert likelihood[1] > max(likelihood[0], likelihood[2])
    assert mixture_weight(q, p) == pytest.approx(1 - weight)
    assert mixture_weight(p, p - 1) == pytest.approx(1)
    assert mixture_weight([-2000.0, -1.0], [-1.0, -2000.0]) == pytest.approx(0.5)


@pytest.mark.parametrize(("p", "q"), [([], []), ([-1.0], [-1.0, -2.0]), ([[-1.0]], [[-1.0]])])
def test_a_mixture_wants_the_same_tokens(p, q):
    with pytest.raises(DataError, match="expected log-probabilities of the same tokens"):
        mixture_weight(p, q)
