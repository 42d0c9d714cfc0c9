import pytest

from engram import DataError
from engram.experiments import cross_checks
from engram.experiments.arms import arm_fields, find_arm, layer_arms
from engram.experiments.claims import CLAIMS, judge
from engram.experiments.evidence import Evidence, sign_verdict
from engram.experiments.summary import summarise
from engram.experiments.sweep_evidence import _beside_paper, first_two, last_against_second
from engram.plots.results import pool_recall
from tests.plots import made_up


def verdicts(kind, result, claim):
    found = judge({kind: {"result": result}})
    return [entry for entry in found if entry["claim"] == claim]


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [
        (0.1, 0.2, 1, "agrees"),
        (float("nan"), float("nan"), -1, "cannot tell"),
        (-0.2, -0.1, 1, "disagrees"),
        (-0.2, -0.1, -1, "agrees"),
        (-0.1, 0.1, 1, "cannot tell"),
        (0.0, 0.1, 1, "cannot tell"),
        (None, None, -1, "cannot tell"),
    ],
)
def test_a_sign_is_judged_by_the_whole_interval(low, high, expected, verdict):
    assert sign_verdict(low, high, expected) == verdict


@pytest.mark.parametrize(
    ("changes", "verdict", "note"),
    [
        ({}, "agrees", "at 40 %, the smallest share measured, the loss is 0.1"),
        ({"depth": -1.0}, "disagrees", "bends the other way"),
        ({"depth": 0.0}, "cannot tell", "may be zero"),
        ({"lowest": 1.2}, "disagrees", "not below 100 %"),
        ({"lowest": 0.3}, "cannot tell", "best at 40 %"),
        ({"lowest": 0.42}, "cannot tell", "not clearly above"),
        ({"seeds": (0,)}, "cannot tell", "no interval"),
        ({"shares": (1.0, 0.8, 0.6)}, "cannot tell", "fewer than four"),
    ],
)
def test_u_shape(changes, verdict, note):
    (found,) = verdicts("allocation", made_up.allocation(budgets=("small",), **changes), "u_shape")
    assert found["verdict"] == verdict
    assert note in found["note"]


@pytest.mark.parametrize(
    ("changes", "verdict", "note"),
    [
        ({"lowest": 0.78}, "agrees", "best share with a memory: 80 %"),
        ({"lowest": 0.5}, "disagrees", "best share with a memory: 50 %, against 80 %, the nearest in loss of the paper's"),
        ({"lowest": 0.78, "depth": 0.001}, "cannot tell", "best share with a memory"),
        ({"lowest": 0.5, "shares": (1.0, 0.6, 0.5, 0.4)}, "cannot tell", "none of the paper's shares was measured"),
        ({"lowest": 0.5, "seeds": (0,)}, "cannot tell", "against 80 %"),
    ],
)
def test_optimum(changes, verdict, note):
    (found,) = verdicts("allocation", made_up.allocation(budgets=("small",), **changes), "optimum")
    assert found["verdict"] == verdict
    assert note in found["note"]


def test_shares_count_as_they_were_asked_for():
    """Whole experts and primes make 0.5998 of 0.6, which is one of the paper's shares all the same."""

    def result(lowest):
        made = made_up.allocation(budgets=("small",), lowest=lowest)
        for point in made["points"]:
            point["counts"] = {**point["counts"], "rho": point["counts"]["rho"] * 0.9995}
        return {**made, "summary": summarise("allocation", made["points"])}

    (found,) = verdicts("allocation", result(0.6), "optimum")
    assert "best share with a memory: 60 %" in found["note"]
    assert found["verdict"] == "agrees"
    whole = made_up.allocation(budgets=("small",))
    for made in (whole, result(0.75)):
        shares = cross_checks.shares_from(made["summary"]["small"]["curve"], 0.4)
        assert len(shares) == sum(share >= 0.4 for share in made_up.SHARES)


def test_a_curve_that_flattens_out_is_no_u():
    """Its parabola is open upwards and lowest inside the range, but the loss is never seen to rise: as on real small models."""
    shares = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    losses = (4.703, 4.628, 4.597, 4.575, 4.546, 4.530, 4.524, 4.517)
    entries = [
        made_up.entry({"rho": str(rho)}, seed, loss + 0.001 * ((7 * seed + place) % 3), rho, int(1e4 * (1 - rho)))
        for place, (rho, loss) in enumerate(zip(shares, losses))
        for seed in (0, 1, 2)
    ]
    result = made_up.sweep("allocation", {"rho": {str(rho): {} for rho in shares}}, entries)
    parabola = result["summary"]["all"]["parabola"]
    assert parabola["curvature_interval"][0] > 0
    assert 0.4 < parabola["lowest_interval"][0] < parabola["lowest_interval"][1] < 1
    (found,) = verdicts("allocation", result, "u_shape")
    assert found["verdict"] == "cannot tell"
    assert "best at 40 %" in found["note"]


@pytest.mark.parametrize(
    ("changes", "verdict"), [({}, "agrees"), ({"lowest": 1.2}, "disagrees"), ({"depth": 0.0}, "cannot tell")]
)
def test_gain_over_experts_alone(changes, verdict):
    (found,) = verdicts("allocation", made_up.allocation(budgets=("small",), **changes), "gain")
    assert found["verdict"] == verdict


def test_a_gain_within_the_spread_of_seeds_is_not_told():
    """The seeds differ by much more than the memory gains, though it gains in every one of them."""
    entries = []
    for seed, offset in enumerate((0.0, 0.1, 0.2)):
        entries.append(made_up.entry({"rho": "1"}, seed, 3 + offset, 1.0))
        entries.append(made_up.entry({"rho": "0.8"}, seed, 3 + offset - 0.01 - 0.0001 * seed, 0.8, 100))
    result = made_up.sweep("allocation", {"rho": {"1": {}, "0.8": {}}}, entries)
    (found,) = verdicts("allocation", result, "gain")
    assert found["high"] < 0
    assert found["verdict"] == "cannot tell"
    assert found["note"].endswith("more than the gain")


@pytest.mark.parametrize(("slope", "verdict"), [(-0.03, "agrees"), (0.03, "disagrees"), (0.0, "cannot tell")])
def test_slope_per_decade(slope, verdict):
    (found,) = verdicts("slots", made_up.slots(slope=slope), "slope")
    assert found["verdict"] == verdict
    assert found["low"] < found["value"] < found["high"]


def test_ablations_are_recognised_by_what_they_change():
    found = {entry["claim"]: entry for entry in judge({"ablation": {"a": made_up.ablation()}})}
    told = {claim: entry["verdict"] for claim, entry in found.items() if entry["verdict"] != "not measured"}
    assert told == {
        "memory": "agrees",
        "ablation_compression": "disagrees",
        "ablation_gating": "agrees",
        "ablation_four_grams": "agrees",
        "ablation_convolution": "cannot tell",
        "first_layer": "agrees",
        "late_layer": "agrees",
        "two_modules": "agrees",
    }
    assert "'layer 3' against 'layer 1'" in found["late_layer"]["note"]


def test_placements_are_told_by_their_layers_and_not_by_their_order():
    """Layers 1 and 3 are no first and second layer."""
    assert first_two({1: "layer 1", 3: "layer 3"}) is None
    assert first_two({0: "layer 0", 1: "layer 1"}) == ("layer 0", "layer 1")
    assert last_against_second({1: "layer 1", 3: "layer 3"}) == ("layer 3", "layer 1")
    assert last_against_second({0: "layer 0", 1: "layer 1"}) is None
    assert last_against_second({0: "layer 0", 3: "layer 3"}) is None
    assert last_against_second({}) is None


@pytest.mark.parametrize(
    ("interval", "told"), [((-0.01, 0.02), True), ((-0.01, 0.004), False), ((0.001, 0.02), False), ((None, None), False)]
)
def test_what_cannot_be_told_from_the_papers_effect_says_so(interval, told):
    low, high = interval
    found = _beside_paper(Evidence(sign_verdict(low, high, 1), "a", 0.003, low, high, note="arm 'x'"), 0.005)
    assert ("the paper's difference lies in the interval too" in found.note) == told
    assert found.note.startswith("arm 'x'")


def test_an_arm_that_changes_two_things_is_no_ablation():
    arms = {"reference": {"engram.use_conv": False}, "x": {"engram.use_conv": True}, "y": {"engram": None}}
    recipe = {"base": {"engram": {"use_conv": True, "fuse": "gate"}}, "variants": {"arm": arms}}
    assert find_arm(recipe, "gating") is None
    assert find_arm(recipe, "convolution") is None  # the reference is without: x says what putting it in does
    arms |= {"z": {"engram.fuse": "add"}, "too much": {"engram.use_conv": False, "engram.fuse": "add", "tokens": 7}}
    assert find_arm(recipe, "gating") is None
    arms |= {"more rows": {"engram.use_conv": False, "engram.fuse": "add", "engram.engram_vocab_size": 7}}
    assert find_arm(recipe, "gating") == "more rows"
    assert arm_fields(recipe, "reference") == {"engram.use_conv": False, "engram.fuse": "gate"}
    assert arm_fields(recipe, "y") == {"engram": None}
    assert layer_arms({"layer 3": 0, "layer 0": 0, "layers": 0}) == {0: "layer 0", 3: "layer 3"}


def test_one_seed_gives_no_verdict():
    for kind, result in (
        ("allocation", made_up.allocation((0,))),
        ("slots", made_up.slots((0,))),
        ("ablation", made_up.ablation((0,))),
    ):
        measured = [entry for entry in judge({kind: {"r": result}}) if entry["verdict"] != "not measured"]
        assert measured
        assert {entry["verdict"] for entry in measured} == {"cannot tell"}


def test_long_context_asks_for_models_of_their_own():
    (found,) = verdicts("long_context", pool_recall(made_up.long_context()), "multi_query")
    assert (found["verdict"], found["where"]) == ("agrees", "result, 256 tokens")
    (one,) = verdicts("long_context", pool_recall(made_up.long_context(seeds=(0,), queries=(200,))), "multi_query")
    assert one["verdict"] == "cannot tell"
    assert "one seed" in one["note"]
    assert found["value"] == pytest.approx(100 * (405 - 256) / 512)
    (found,) = verdicts("long_context", pool_recall(made_up.long_context()), "tracking")
    assert found["verdict"] == "cannot tell"
    (found,) = verdicts("long_context", pool_recall(made_up.long_context(queries=(256, 100))), "multi_query")
    assert found["verdict"] == "cannot tell"
    assert found["low"] < 0 < found["high"]  # two trainings that differ in sign
    from_runs = {**made_up.long_context(), "sizes": {"plain": "runs/a", "joint": "runs/b"}}
    (found,) = verdicts("long_context", pool_recall(from_runs), "multi_query")
    assert found["verdict"] == "cannot tell"
    assert "go on from one model of either kind" in found["note"]
    from_pairs = {**made_up.long_context(), "sizes": {"plain": ["runs/a", "runs/c"], "joint": ["runs/b", "runs/d"]}}
    (found,) = verdicts("long_context", pool_recall(from_pairs), "multi_query")
    assert found["verdict"] == "agrees"  # each seed goes on from another pretraining
    short = made_up.long_context(seeds=(0, 1, 2), queries=(200, 205, 203))
    (whole,) = verdicts("long_context", pool_recall({**short, "entries": short["entries"][:4]}), "multi_query")
    short["entries"] = [*short["entries"][3::-1], short["entries"][5]]  # seed 2 lacks its control, and the order is another
    (found,) = verdicts("long_context", pool_recall(short), "multi_query")
    assert found == whole  # seeds that both have, each with its own
    short["entries"].append(short["entries"][0])
    with pytest.raises(DataError, match="two entries of one model and seed"):
        pool_recall(short)
    (found,) = verdicts("long_context", pool_recall(made_up.recall()), "multi_query")
    assert found["verdict"] == "cannot tell"
    assert "trained without" in found["note"]


RANDOM = "neither is above what copying at random finds"


def of_tracking(dense, engram, needle=256, chance=0.25, seeds=(0, 1)):
    """Exact answers of 256 in ``tracking``, the same for every seed, of models that find so many needles."""
    result = made_up.long_context(seeds)
    for entry in result["entries"]:
        exact = dense if entry["model"] == "dense" else engram
        entry["scores"] = [made_up.score("needle", needle), {**made_up.score("tracking", exact), "chance": chance}]
    return verdicts("long_context", pool_recall(result), "tracking")


@pytest.mark.parametrize(
    ("changes", "verdict", "random"),
    [
        ({"dense": 60, "engram": 100}, "agrees", False),  # one of them finds more than a quarter
        ({"dense": 100, "engram": 60}, "disagrees", False),
        ({"dense": 100, "engram": 100}, "cannot tell", False),
        ({"dense": 10, "engram": 62}, "cannot tell", True),  # more, but so does one that copies at random
        ({"dense": 62, "engram": 10}, "cannot tell", True),
        ({"dense": 10, "engram": 62, "needle": 128}, "agrees", False),  # of a model that copies every second number only
        ({"dense": 60, "engram": 100, "chance": 0.5}, "cannot tell", True),
        ({"dense": 60, "engram": 100, "chance": None}, "cannot tell", True),  # results from before: two chains
        ({"dense": 0, "engram": 0, "needle": 0}, "cannot tell", True),
    ],
)
def test_more_answers_tell_nothing_where_copying_at_random_finds_as_many(changes, verdict, random):
    (found,) = of_tracking(**changes)
    assert found["verdict"] == verdict
    assert (RANDOM in found["note"]) == random


def test_every_model_with_a_memory_is_judged_at_every_length():
    result = made_up.long_context()
    more = [{**entry, "model": "engram_equal_steps"} for entry in result["entries"] if entry["model"] != "dense"]
    result["entries"] += more
    for entry in result["entries"]:
        entry["scores"] = [{**score, "length": length} for score in entry["scores"] for length in (256, 512)]
    found = verdicts("long_context", pool_recall(result), "multi_query")
    assert [(entry["where"], entry["note"].split("'")[1]) for entry in found] == [
        (f"result, {length} tokens", model) for model in ("engram_equal_loss", "engram_equal_steps") for length in (256, 512)
    ]
    result["entries"] += [{**entry, "model": "experts without"} for entry in more]
    (none,) = verdicts("long_context", pool_recall(result), "multi_query")
    assert none["verdict"] == "not measured"  # which of two is the control is not said


def test_looks_need_a_second_model():
    def look(difference, against="experts", layers=(0, 1)):
        curve = [{"layer": i, "mean": m, "low": m - 0.1, "high": m + 0.1} for i, m in enumerate(difference)]
        lens = {"difference": {"against" if against else "memory off": curve}}
        rows = {"layers": {str(layer): {} for layer in layers}}
        cka = {"soft_alignment": [1.5, 2.0], "top": 5, "map": [[1.0, 0.5]]}
        return {"logit_lens": lens, "rows": rows, "against": against, "cka": cka}

    for difference, layers, value, counts in (
        ([0.3, 0.2, 0, 0], (0, 1), 0.25, "2 with an interval over documents above zero, 0 below"),
        ([0.3, -0.3, 0, 0], (0, 1), 0, "1 with an interval over documents above zero, 1 below"),
        (
            [0.3, -0.3, 0, 0],
            (1, 2),
            -0.3,
            "0 with an interval over documents above zero, 1 below",
        ),  # block 0 lies before the first module
        ([-0.3, -0.3, -0.3, 0.3], (3,), 0.3, "1 with an interval over documents above zero, 0 below"),
    ):
        (found,) = verdicts("look", look(difference, layers=layers), "logit_lens")
        assert found["value"] == pytest.approx(value)
        assert counts in found["note"]
        assert found["verdict"] == "cannot tell"  # one training of each kind
    assert verdicts("look", look([0.3]), "alignment")[0]["verdict"] == "cannot tell"
    for claim in ("logit_lens", "alignment"):
        assert verdicts("look", look([0.3], None), claim)[0]["verdict"] == "not measured"
        two_plain = {**look([0.3]), "has_memory": {"model": False, "against": False}}
        assert verdicts("look", two_plain, claim)[0]["verdict"] == "not measured"


@pytest.mark.parametrize(("claim", "value"), [("logit_lens", 0.51), ("alignment", 0.51), ("gates", 0.24)])
def test_looks_at_several_trainings_are_judged_over_seeds(claim, value):
    found = verdicts("looks", made_up.looks(), claim)[0]
    verdict = "cannot tell" if claim == "alignment" else "agrees"
    assert (found["verdict"], found["value"]) == (verdict, pytest.approx(value))
    assert found["low"] < value < found["high"]
    assert "3 seeds" in found["note"]
    one = verdicts("looks", made_up.looks(seeds=(1,)), claim)[0]
    assert (one["verdict"], one["low"]) == ("cannot tell", None)
    assert "one seed: no interval" in one["note"]


def test_values_that_share_models_must_tell_the_same_by_every_other_one():
    found = verdicts("looks", made_up.looks(seeds=range(6)), "alignment")[0]
    assert found["verdict"] == "agrees"
    assert "neighbouring values share a model: every other one [+0.47, +0.57] and [+0.48, +0.58]" in found["note"]
    few = verdicts("looks", made_up.looks(), "alignment")[0]
    assert few["note"].endswith("neighbouring values share a model")
    result = made_up.looks(seeds=range(6))
    for number, entry in enumerate(result["entries"]):  # over all six it is above zero, over every other one it is not
        entry["looks_by_seed"]["cka"]["memory"]["soft_alignment"][1] = 1.5 + (number % 2 or number / 4)
    mixed = verdicts("looks", result, "alignment")[0]
    assert mixed["low"] > 0
    assert mixed["verdict"] == "cannot tell"


def test_similar_layers_need_a_control():
    assert verdicts("looks", made_up.looks(other=False), "alignment")[0]["verdict"] == "not measured"
    assert verdicts("looks", made_up.looks(other=False), "logit_lens")[0]["verdict"] == "agrees"


def test_gates_are_held_against_the_same_words_elsewhere():
    found, beside_first = verdicts("looks", made_up.looks(), "gates")
    assert "less ends of other words +0.500" in found["note"]
    assert beside_first["note"].startswith("ends of phrases less ends of their own first words")
    assert [beside_first[key] for key in ("value", "low", "high", "verdict")] == [0.25, 0.25, 0.25, "agrees"]
    result = made_up.looks()
    for entry in result["entries"]:
        entry["looks_by_seed"]["phrases"]["layers"]["1"]["completes_less_begins"]["mean"] = None
    (found,) = verdicts("looks", result, "gates")
    assert "the same words elsewhere" in found["note"]
    result["entries"][0]["looks_by_seed"]["phrases"]["layers"]["1"]["completes_less_same_word"]["mean"] = None
    (found,) = verdicts("looks", result, "gates")
    assert (found["verdict"], found["value"]) == ("cannot tell", None)
    assert "were not seen elsewhere" in found["note"]


def test_gates_of_one_model_tell_nothing_of_others():
    def look(mean):
        layers = {"1": {"completes_less_same_word": {"mean": mean, "low": 0.05, "high": 0.15}}}
        return {"against": None, "phrases": {"occurrences": 12, "layers": layers}}

    (found,) = verdicts("look", look(0.1), "gates")
    assert (found["verdict"], found["value"]) == ("cannot tell", 0.1)
    assert "1 layers: 1 with an interval over documents above zero" in found["note"]
    assert verdicts("look", look(None), "gates")[0]["note"] == "the last words of phrases were not seen elsewhere"
    assert verdicts("look", {"against": None}, "gates")[0]["verdict"] == "not measured"


@pytest.mark.parametrize(("changes", "value"), [({}, 69), ({"facts_off": 95, "reading_off": 50}, -46), ({"seeds": (0,)}, 70)])
def test_what_is_kept_with_the_memory_off_is_of_one_pretraining(changes, value):
    (found,) = verdicts("memory_off", made_up.memory_off(**changes), "memory_off")
    assert (found["verdict"], found["value"]) == ("cannot tell", pytest.approx(value))
    assert "'together', facts taught after pretraining: kept of reading" in found["note"]  # and always read
    assert "all seeds go on from one pretrained model" in found["note"]


def test_a_share_of_nothing_is_no_evidence():
    result = made_up.memory_off()
    for entry in result["entries"]:
        entry["memory_off"]["on"]["facts"]["port"][0] = 4
    (found,) = verdicts("memory_off", result, "memory_off")
    assert (found["verdict"], found["value"]) == ("cannot tell", None)
    assert "hardly anything was exact with the memory on" in found["note"]


def test_without_results_nothing_is_claimed():
    found = judge({})
    assert [entry["claim"] for entry in found] == [claim.key for claim in CLAIMS]
    assert {entry["verdict"] for entry in found} == {"not measured"}
    unfinished = made_up.sweep("slots", {"rows": {"none": {}, "100": {}}}, [])
    assert {entry["verdict"] for entry in judge({"slots": {"s": unfinished}})} == {"not measured"}


def test_an_unfinished_sweep_says_so():
    result = made_up.allocation(budgets=("small",), expected_points=30)
    (found,) = verdicts("allocation", result, "u_shape")
    assert found["where"] == "result (24 of 30 points), small"
