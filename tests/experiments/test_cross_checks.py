import math

import numpy as np
import pytest

from engram.experiments import cross_checks
from engram.experiments.statistics import student_t
from tests.plots import made_up


def test_the_other_half_is_summed_up_in_the_same_way():
    result = made_up.ablation()
    for point in result["points"]:
        point["validation"] = {
            **point["validation"],
            "loss": point["test"]["loss"] + (0.5 if point["labels"]["arm"] == "no conv" else 0),
        }
    other = cross_checks.on_validation(result)["all"]
    here = result["summary"]["all"]
    assert other["no gating"] == here["no gating"]
    assert other["no conv"]["against_reference"]["mean"] == pytest.approx(here["no conv"]["against_reference"]["mean"] + 0.5)
    assert cross_checks.measured_tokens({"a": result}) == {"validation": {"code": 1000}, "test": {"code": 1000}}
    assert cross_checks.measured_tokens({}) == {}


def test_pooled_noise_is_that_of_an_additive_model():
    rng, points = np.random.default_rng(0), []
    losses = rng.normal(size=(4, 3))
    for arm, row in enumerate(losses):
        points += [made_up.entry({"arm": str(arm)}, seed, float(loss), slots=8000) for seed, loss in enumerate(row)]
    design = np.array(
        [[a == i for i in range(4)] + [s == j for j in range(1, 3)] for a in range(4) for s in range(3)], dtype=float
    )
    residuals = losses.reshape(-1) - design @ np.linalg.lstsq(design, losses.reshape(-1), rcond=None)[0]
    expected = student_t(6) * math.sqrt((residuals**2).sum() / 6 * 2 / 3)
    assert cross_checks.pooled_half_width(points) == pytest.approx(expected)
    noisy = made_up.entry({"arm": "none"}, 0, 99.0)
    assert cross_checks.pooled_half_width([*points, noisy]) == pytest.approx(expected)  # arms without a memory are left out
    assert cross_checks.pooled_half_width(points[:6]) is None
    assert cross_checks.pooled_half_width(points[::3]) is None


def test_runs_made_twice_are_found():
    first, second = made_up.slots(), made_up.slots()
    for point in second["points"]:
        point["test"] = {**point["test"], "loss": point["test"]["loss"] + 0.01}
    found = cross_checks.made_twice({"b": second, "a": first})
    with_memory = sum(point["counts"]["table_rows"] > 0 for point in first["points"])
    assert 0 < with_memory < len(first["points"])
    assert found[True] == pytest.approx([0.01] * with_memory)
    assert found[False] == pytest.approx([0.01] * (len(first["points"]) - with_memory))
    second["data"] = {**second["data"], "fingerprint": "other"}
    assert cross_checks.made_twice({"a": first, "b": second}) == {}


def test_arms_are_compared_with_experts_alone_of_another_sweep():
    sweeps = {"allocation": made_up.allocation(budgets=("small",)), "dense": made_up.comparison()}
    found = list(cross_checks.against_experts_alone(sweeps))
    assert [(arm, other, has_memory) for arm, other, _, has_memory in found] == [
        (f"dense, {arm}", "allocation, small", "memory" in arm) for arm in ("dense", "experts", "experts and memory")
    ]
    pure = [p["test"]["loss"] for p in sweeps["allocation"]["points"] if p["counts"]["rho"] == 1]
    dense = [p["test"]["loss"] for p in sweeps["dense"]["points"] if p["labels"]["arm"] == "dense"]
    assert found[0][2]["mean"] == pytest.approx(np.mean(dense) - np.mean(pure))
    for point in sweeps["dense"]["points"]:
        point["counts"] = {**point["counts"], "active": 500_000}
    assert not list(cross_checks.against_experts_alone(sweeps))


def test_a_run_that_stands_in_both_sweeps_is_not_compared_with_itself():
    sweeps = {"allocation": made_up.allocation(budgets=("small",)), "dense": made_up.comparison()}
    pure = {p["seed"]: p for p in sweeps["allocation"]["points"] if p["counts"]["rho"] == 1}
    for point in sweeps["dense"]["points"]:
        if point["labels"]["arm"] == "experts" or (point["labels"]["arm"], point["seed"]) == ("dense", 0):
            point |= {name: pure[point["seed"]][name] for name in ("digest", "test")}
    found = {arm: difference for arm, _, difference, _ in cross_checks.against_experts_alone(sweeps)}
    assert {arm: difference["n"] for arm, difference in found.items()} == {"dense, dense": 2, "dense, experts and memory": 3}


def test_shares_that_are_not_told_apart():
    result = made_up.allocation(budgets=("small",), lowest=0.75)
    summary = result["summary"]["small"]
    found = cross_checks.not_told_apart(summary["curve"], result["points"], summary["best"]["label"])
    assert summary["best"]["rho"] in found
    assert 0.4 not in found
    assert 1.0 not in found


def test_a_parabola_depends_on_its_range_where_a_curve_is_none():
    shares = (1.0, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0.0)
    entries = [
        made_up.entry({"rho": str(rho)}, seed, 3 + max(0.0, rho - 0.6) ** 2 + 1e-4 * ((seed + place) % 3), rho)
        for place, rho in enumerate(shares)
        for seed in (0, 1, 2)
    ]
    result = made_up.sweep("allocation", {"rho": {str(rho): {} for rho in shares}}, entries)
    curve = result["summary"]["all"]["curve"]
    part = cross_checks.parabola_above(curve, entries, 0.4)
    assert part["lowest"] > result["summary"]["all"]["parabola"]["lowest"] + 0.1
    assert cross_checks.parabola_above(curve, entries, 0.8) is None


def test_a_line_has_no_quadratic_term():
    found = cross_checks.curvature_per_decade(made_up.slots())
    assert found is None  # three sizes
    entries = []
    for rows in (1_000, 10_000, 100_000, 1_000_000):
        decades = math.log10(rows)
        entries += [
            made_up.entry({"rows": str(rows)}, seed, 3 - 0.1 * decades + 0.02 * decades**2 + 0.01 * seed, slots=rows)
            for seed in (0, 1, 2)
        ]
    result = made_up.sweep("slots", {"rows": {e["labels"]["rows"]: {} for e in entries}}, entries)
    found = cross_checks.curvature_per_decade(result)
    assert found["mean"] == pytest.approx(0.02)
    assert found["low"] == pytest.approx(0.02)


def test_dimensions_of_any_name_are_kept_apart():
    allocation, comparison = made_up.allocation(budgets=("small", "large")), made_up.comparison()
    for point in allocation["points"]:
        point["labels"] = {"size": point["labels"].pop("budget"), **point["labels"]}
        if point["labels"]["size"] == "large":
            point["counts"] = {**point["counts"], "active": 10 * point["counts"]["active"]}
    comparison["points"] = [
        {**point, "labels": {"width": width, **point["labels"]}, "digest": point["digest"] + width}
        for point in comparison["points"]
        for width in ("one", "two")
    ]
    found = list(cross_checks.against_experts_alone({"a": allocation, "c": comparison}))
    assert {other for _, other, _, _ in found} == {"a, small"}
    arms = [arm for arm, _, _, _ in found]
    assert arms == list(dict.fromkeys(arms))
    assert all(arm.startswith(("c, one, ", "c, two, ")) for arm in arms)
    assert {difference["n"] for _, _, difference, _ in found} == {len({point["seed"] for point in comparison["points"]})}
