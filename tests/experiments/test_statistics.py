import math

import numpy as np
import pytest

from engram.experiments.statistics import (
    excludes_zero,
    fit_line,
    fit_parabola,
    half_width_over_settings,
    holm,
    mean_interval,
    p_value,
    seed_interval,
    student_t,
    widened,
)
from engram.experiments.summary import summarise


def test_an_interval_is_students():
    entry = mean_interval([1.0, 2.0, 3.0])
    assert entry["mean"] == 2.0
    assert entry["high"] - 2.0 == pytest.approx(4.303 / 3**0.5)  # t of two degrees, standard deviation 1
    assert mean_interval([5.0])["low"] is None


def test_quantiles_of_students_t_beyond_the_table():
    """From a statistics table with four decimals."""
    known = {31: 2.0395, 40: 2.0211, 56: 2.0032, 60: 2.0003, 100: 1.9840, 120: 1.9799, 10_000: 1.9602}
    assert [student_t(degrees) for degrees in known] == pytest.approx(list(known.values()), abs=1e-4)
    assert student_t(30) > student_t(31) > student_t(32)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101])
def test_an_interval_that_touches_zero_has_a_p_value_of_one_in_twenty(degrees):
    assert p_value(2.0, 0.0, 4.0, degrees) == pytest.approx(0.05, abs=2e-4)
    assert p_value(-2.0, -9.0, 0.0, degrees) == pytest.approx(0.05, abs=2e-4)  # the side towards zero
    assert p_value(0.0, -1.0, 1.0, degrees) == pytest.approx(1.0)


def test_p_values_of_students_t():
    """Three of a table: t = 3.365 and 5 degrees of freedom leave 2 %, t = 31.821 and one 2 %, t = 2.681 and 12 again 2 %."""
    for t, degrees in ((3.365, 5), (31.821, 1), (2.681, 12)):
        assert p_value(t, t - student_t(degrees), t + student_t(degrees), degrees) == pytest.approx(0.02, abs=2e-5)


def test_holms_rule_stops_at_the_first_that_is_too_likely():
    assert holm([0.04, 0.001, 0.03, 0.012]) == [False, True, False, True]  # at most 0.0125, 0.0167, 0.025, 0.05
    assert holm([0.02]) == [True]
    assert holm([]) == []


def test_an_interval_over_trainings_is_no_narrower_than_that_over_answers():
    assert widened([0.5, 0.5, 0.5], 0.4, 0.6) == (0.4, 0.6)  # agree by chance
    low, high = widened([0.2, 0.5, 0.8], 0.4, 0.6)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - 0.5 == pytest.approx(4.303 * 0.3 / 3**0.5)
    assert widened([0.5], 0.4, 0.6) is None


def test_noise_pooled_over_settings_is_that_of_an_additive_model():
    losses = np.random.default_rng(0).normal(size=(4, 3))
    columns = [[a == i for i in range(4)] + [s == j for j in (1, 2)] for a in range(4) for s in range(3)]
    design = np.array(columns, dtype=float)
    residuals = losses.reshape(-1) - design @ np.linalg.lstsq(design, losses.reshape(-1), rcond=None)[0]
    expected = student_t(6) * ((residuals**2).sum() / 6 * 2 / 3) ** 0.5
    assert half_width_over_settings(losses.tolist()) == pytest.approx(expected)
    assert half_width_over_settings((losses + np.array([0, 5, -9])).tolist()) == pytest.approx(expected)  # seeds, not noise
    assert half_width_over_settings(losses[:2].tolist()) is None
    assert half_width_over_settings(losses[:, :1].tolist()) is None
    assert half_width_over_settings([]) is None


def test_the_pooled_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, missed = np.array([[0.0], [0.5], [-0.2], [0.1]]), 0
    for _ in range(2000):
        losses = truth + rng.normal(size=(1, 3)) + 0.3 * rng.normal(size=(4, 3))
        found = (losses[1] - losses[0]).mean()
        missed += abs(found - 0.5) > half_width_over_settings(losses.tolist())
    assert missed / 2000 == pytest.approx(0.05, abs=0.02)


def test_what_a_seed_does_to_all_settings_alike_is_no_uncertainty_of_a_shape():
    x, shifts, slopes = [0.0, 1.0, 2.0], [0.0, 10.0, -7.0], [1.0, 1.1, 0.9]
    groups = [[shift + slope * at for shift, slope in zip(shifts, slopes)] for at in x]
    low, high = seed_interval(groups, lambda values: fit_line(x, values)[0])
    expected = mean_interval(slopes)
    assert (low, high) == pytest.approx((expected["low"], expected["high"]))


def test_what_rounding_alone_keeps_from_zero_is_zero():
    assert not excludes_zero(3e-16, 4e-16)
    assert not excludes_zero(-4e-16, -3e-16)
    assert excludes_zero(1e-6, 2e-6)
    assert excludes_zero(-2e-6, -1e-6)
    level = [entry(rho, seed, 4.0) for rho in (0.2, 0.4, 0.6, 0.8, 1.0) for seed in (0, 1)]
    assert summarise("allocation", level)["all"]["parabola"]["lowest"] is None


def test_a_share_without_a_loss_is_not_the_best():
    """Results from before such runs failed may hold one."""
    entries = [entry(rho, seed, math.nan if rho == 0.2 else 4 - rho) for rho in (0.2, 0.4, 0.6, 1.0) for seed in (0, 1)]
    assert summarise("allocation", entries)["all"]["best"]["label"] == "0.6"


def test_without_repetition_or_where_a_fit_has_no_answer_there_is_no_interval():
    assert seed_interval([[1.0], [2.0]], lambda values: values[0]) is None
    assert seed_interval([[1.0, 2.0], [2.0, 3.0]], lambda values: None if values[0] > 1 else 0.0) is None
    assert seed_interval([[1.0, 2.0, 3.0]] * 2, lambda values: None if values[0] > 2 else values[0]) is None


def entry(rho, seed, loss):
    counts = {
        "total": 1,
        "active": 1,
        "experts": 1,
        "dense_width": 1,
        "table_rows": 1,
        "rows_per_head": [1],
        "flops_per_token": 1,
    }
    half = {"loss": loss}
    return {"labels": {"rho": str(rho)}, "seed": seed, "test": half, "validation": half, "counts": {**counts, "rho": rho}}


def test_a_parabola_is_found_and_a_seed_that_one_arm_lacks_does_not_bend_it():
    def loss(rho, seed):
        return 2 * (rho - 0.6) ** 2 + 3 + 5 * seed

    entries = [entry(rho, seed, loss(rho, seed)) for rho in (0.2, 0.4, 0.6, 0.8, 1.0) for seed in (0, 1, 2)]
    whole = summarise("allocation", entries)["all"]["parabola"]
    without = [e for e in entries if (e["labels"]["rho"], e["seed"]) != ("0.2", 2)]  # a high seed is missing at one end
    part = summarise("allocation", without)["all"]["parabola"]
    least = summarise("allocation", [e for e in entries if e["seed"] == 0 or e["labels"]["rho"] == "0.6"] + entries[:2])
    assert least["all"]["best"]["rho"] == 0.6  # not 0.2 or 0.8, whose means lack the high seeds
    for found in (whole, part):
        assert found["lowest"] == pytest.approx(0.6)
        assert found["lowest_interval"] == pytest.approx((0.6, 0.6))
        assert found["coefficients"][0] == pytest.approx(2)
    assert fit_parabola([0, 1, 2], [1, 0, 1]) == pytest.approx((1, -2, 1))
