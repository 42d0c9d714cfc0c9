import numpy as np
import pytest
import torch

from engram.analysis import Subject, cka, soft_alignment
from engram.analysis.cka import CkaSums
from engram.errors import ConfigError
from engram.testing import tiny_memory, tiny_model
from tests.analysis.helpers import make_sample


def similarity(a, b, minibatch=128):
    sums = CkaSums()
    for x, y in zip(a.split(minibatch), b.split(minibatch)):
        sums.add([x], [y])
    return float(sums.similarity()[0, 0])


def features(seed, tokens=512, width=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64)


def test_rotations_shifts_and_scales_are_the_same():
    x = features(0)
    rotation = torch.linalg.qr(features(1, 24, 24))[0]
    assert similarity(x, x @ rotation) == pytest.approx(1, abs=1e-12)
    assert similarity(x, 3 * x + 7) == pytest.approx(1, abs=1e-12)
    assert similarity(x, x * torch.arange(1, 25)) < 0.99


def test_independent_features_have_no_similarity_however_wide():
    """The biased estimator would give 0.9 here: 300 features, 128 tokens."""
    found = [similarity(features(i, 256, 300), features(100 + i, 256, 300)) for i in range(5)]
    assert abs(np.mean(found)) < 0.02


def test_the_estimator_is_that_of_the_definition():
    """Unbiased HSIC as an average over all quadruples of different tokens (Song et al., 2012, equation 4)."""
    import itertools

    x, y = features(2, 6, 3), features(3, 6, 3)
    k, m = x @ x.T, y @ y.T

    def hsic(p, q):
        values = [p[i, j] * (q[i, j] + q[a, b] - 2 * q[i, a]) for i, j, a, b in itertools.permutations(range(6), 4)]
        return sum(values) / len(values)

    sums = CkaSums()
    sums.add([x], [y])
    assert float(sums._cross) == pytest.approx(float(hsic(k, m)), rel=1e-9)


def test_too_few_tokens_are_refused():
    with pytest.raises(ConfigError, match="at least 4"):
        CkaSums().add([features(0, 3)], [features(1, 3)])


def test_soft_alignment_is_a_weighted_mean_of_the_best():
    assert soft_alignment(np.array([[0.0, 1.0, 0.0], [0.5, 0.5, -0.9]]), top=2) == [1.0, 0.5]
    assert soft_alignment(np.array([[0.1, 0.2, 0.6, 0.4]]), top=2) == [pytest.approx((0.6 * 2 + 0.4 * 3) / 1.0)]
    assert soft_alignment(np.array([[-0.1, -0.2]]), top=5) == [0.5]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v4"])
def test_of_models(model_type):
    memory = tiny_memory(tiny_model(model_type))
    on, off = Subject("on", memory), Subject("off", memory, memory_on=False)
    other = Subject("other", tiny_model("llama", seed=5, num_hidden_layers=4))
    sample = make_sample()
    own, moved, crossed = cka(on, on, sample), cka(on, off, sample), cka(on, other, sample)
    assert np.allclose(np.diag(own["map"]), 1, atol=1e-6)
    assert np.array(moved["map"])[0, 0] < 0.999
    assert np.array(crossed["map"]).shape == (3, 4)
    assert all(0 <= index <= 3 for index in crossed["soft_alignment"])
    assert own["minibatches"] >= 1
