import json
import re
from html.parser import HTMLParser

import pytest

from engram.errors import DataError
from engram.experiments.claims import judge
from engram.experiments.paper import PAPER
from engram.experiments.statistics import half_width_over_settings
from engram.plots import Report, ResultFile, draw_result, group_results, plot_sweep, read_result, render_page
from engram.plots.draw import plot_copying, plot_recall
from engram.plots.markdown import interval, literal_text, span, table
from engram.plots.report_limits import limits
from engram.plots.report_looks import copying, long_context
from engram.plots.report_sweeps import experts_as_control
from engram.plots.results import pool_recall, recognise
from engram.plots.settings import differing_settings
from tests.plots import made_up

SMALL = {"seeds": (0, 1), "budgets": ("small",)}
HEADINGS = [
    "Experts or memory",
    "Size of the tables",
    "Ablations",
    "Arms side by side",
    "Looks inside",
    "Looks inside, seed by seed",
    "With the memory off",
    "Copying from the context",
    "Long context",
    "Throughput",
]


def report(results):
    """From results by name, without pictures."""
    files = [ResultFile(name, recognise(result) or "", result) for name, result in results.items()]
    return Report(files, {}, judge(group_results(files)), PAPER)


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


class Page(HTMLParser):
    """Checks that elements nest, and gathers what the page asks for."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "br", "hr"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("question", ["allocation", "slots", "ablation", "comparison"])
def test_pictures_of_sweeps(question, tmp_path):
    result = getattr(made_up, question)((0, 1))
    pictures = plot_sweep(result, tmp_path, "s", PAPER)
    assert all(picture.path.stat().st_size > 5000 and picture.caption for picture in pictures)
    names = [picture.path.name for picture in pictures]
    assert names[0] == "s.png"
    assert names[-1] == "s_curves.png"
    assert {"allocation": "s_gain.png", "ablation": "s_layers.png"}.get(question, "s.png") in names


def test_pictures_of_one_seed_and_of_little(tmp_path):
    # No experts alone: no gain.
    assert len(plot_sweep(made_up.allocation((0,), shares=(0.8, 0.6)), tmp_path, "few", PAPER)) == 2
    assert len(plot_sweep(made_up.slots((0,)), tmp_path, "one")) == 2  # nothing of the paper beside it
    assert len(plot_sweep(made_up.ablation((0,), {"no conv": {}}), tmp_path, "arm", PAPER)) == 1  # curves: no reference
    assert plot_sweep(made_up.sweep("slots", {"rows": {"none": {}}}, []), tmp_path, "none", PAPER) == []
    # No best share: nothing to name in a legend, which matplotlib would warn of.
    alone = made_up.allocation((0,), shares=(1.0,))
    assert len(plot_sweep(alone, tmp_path, "alone", PAPER)) == 2


def test_report_of_everything_is_one_page(tmp_path):
    results = {name: getattr(made_up, name) for name in ("allocation", "ablation", "long_context", "throughput")}
    files = []
    for name, make in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(make(**SMALL) if name == "allocation" else make()))
        files.append(read_result(tmp_path / f"{name}.json"))
    pictures = {file.name: draw_result(file, tmp_path / "pictures", PAPER) for file in files}
    page = render_page(Report(files, pictures, judge(group_results(files)), PAPER).markdown)
    parsed = Page()
    parsed.feed(page)
    assert not parsed.open
    assert len(parsed.sources) == sum(map(len, pictures.values())) == 8
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in parsed.sources)
    assert "http" not in re.sub(r'"data:image[^"]*"', "", page)
    assert "url(" not in page
    assert "<script" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme:dark" in page
    assert parsed.counts["table"] >= 7
    assert "engram\\_equal" not in page  # escapes of Markdown are gone


def test_numbers_of_the_report_are_the_results():
    result = made_up.allocation(**SMALL)
    text = report({"sweep_allocation": result}).markdown(str)
    row = next(row for row in result["summary"]["small"]["curve"] if row["label"] == "70%")
    gain = row["against_experts_alone"]
    assert f"| {row['loss']['mean']:.4f} [{row['loss']['low']:.4f}, {row['loss']['high']:.4f}] |" in text
    assert f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" in text
    assert "| sweep\\_allocation | 16 of 16 | 0, 1 | 4,288,000 | 389,600 | 499,712 | 0.056 |" in text
    assert "1,000,000 tokens in a vocabulary of 2,048 to train on, by kind: code 90 %, prose 10 %." in text
    assert "6e20 FLOPs, 9.9B parameters of which 0.99B active" in text


def test_what_held_out_text_shares_with_training_text_is_told_for_the_text_it_was_counted_on():
    result = made_up.allocation(**SMALL)
    assert recognise(made_up.corpus()) == "corpus"
    told = report({"sweep": result, "corpus": made_up.corpus()}).markdown(str)
    assert "7.5 % of the 1,000 held-out 13-grams (tokens) occur in the training text too (code 5.0 %, prose 10.0 %)" in told
    assert "more than half of those of 2 documents of 10" in told
    for files in ({"sweep": result}, {"sweep": result, "corpus": made_up.corpus("of other text")}):
        assert "What the held-out text shares with the training text was not measured" in report(files).markdown(str)


def test_counts_of_the_same_text_stand_beside_an_allocation():
    result = made_up.allocation(**SMALL)
    fingerprint = result["data"]["fingerprint"]
    assert recognise(made_up.ngram_counts()) == "ngram_counts"
    text = report({"sweep": result, "counts": made_up.ngram_counts(fingerprint=fingerprint)}).markdown(str)
    row = next(line for line in text.splitlines() if line.startswith("| trigram counts (Kneser-Ney)"))
    assert [cell.strip() for cell in row.strip("|").split("|")][-5:] == [
        "4.4000 [4.3800, 4.4200]",
        "2.200",
        "-0.2000 [-0.2200, -0.1800]",
        "–",
        "-0.3000 [-0.3200, -0.2800]",
    ]
    assert "are below experts alone (-0.2000 [-0.2200, -0.1800] nats) and below the best share with a memory" in text
    assert "| small, trigrams | 32,000 |" in text
    assert "test: 14 documents of 1 file, the largest (`lib/ast.py`) with 42 % of the bytes" in text
    assert "Mixtures of models with counts: not measured" in text
    above = report({"sweep": result, "counts": made_up.ngram_counts(0.01, fingerprint, mixed=True)}).markdown(str)
    assert "are not told apart from experts alone" in above
    assert "| experts | 3 | 2.500 [2.500, 2.500] | 2.400 [2.400, 2.400] | 2.300 [2.300, 2.300] | 0.40 |" in above
    assert "| experts / memory | 3 | +0.1000 [+0.0800, +0.1200] |" in above
    other = report({"sweep": result, "counts": made_up.ngram_counts(fingerprint="of other text")}).markdown(str)
    assert "trigram" not in other


def test_largest_loads_of_experts_are_told_over_seeds():
    result = made_up.allocation(**SMALL)
    for point in result["points"]:
        point["expert_load_max"] = None if point["labels"]["rho"] == "40%" else 1.5 + point["seed"]
    told = report({"sweep": result}).markdown(str)
    assert "| 1.5 to 2.5 |" in told
    assert re.search(r"\| 40.0 % \|[^\n]*\| – \|", told)


def test_what_was_not_measured_is_one_line():
    text = report({}).markdown(str)
    assert "**In short:** nothing has been measured yet." in text
    for heading in HEADINGS:
        _, line = section(text, heading).strip().split("\n\n")
        assert re.fullmatch(r"\*Not measured: no result .*\.\*", line), heading
    assert "## What this scale cannot show" in text
    assert "**Size.**" not in text  # nothing is said about the size of models that are not there


def test_unfinished_failed_and_tuned_sweeps_say_so():
    tuned = [made_up.entry({"rows": "none"}, 1000, 3.0, learning_rate=rate) for rate in (1e-3, 3e-3)]
    rates = [{"group": 0, "at": {"rows": "none"}, "learning_rate": 3e-3, "edge": True}]
    failed = [{"point": "rows=10|seed=2", "digest": "x", "error": "ended with code 1; see /somewhere/deep/log.txt"}]
    more = {"tuning": tuned, "learning_rates": rates, "failures": failed}
    text = report({"slots": made_up.slots(expected_points=20, **more)}).markdown(str)
    slots = section(text, "Size of the tables")
    assert "Not finished: 12 of 20 points; what follows is from these alone." in slots
    assert "1 run failed:\n\n- rows=10\\|seed=2: ended with code 1; see log.txt" in slots
    assert (
        "slots: 2 runs of 999,424 tokens in all, 17 % of the tokens of the runs that report, rates 0.001, 0.003, seed 1000."
        in text
    )
    assert (
        "Chosen, in brackets the validation loss at each rate: none: 0.003 (at the edge of those tried) (0.001: 3.000, 0.003: 3.000)."
        in text
    )
    none = made_up.sweep("slots", {"rows": {"none": {}}}, [], **more)
    text = report({"slots": none}).markdown(str)
    assert "Not finished: 0 of 3 points so far (2 runs to choose learning rates)." in text
    assert "**In short:** nothing has been measured yet." in text


def test_one_seed_has_no_interval():
    text = report({"a": made_up.allocation((0,), budgets=("small",)), "s": made_up.slots((0,))}).markdown(str)
    assert " (no interval) |" in text
    assert "| **agrees** |" not in text
    assert "**Many questions.**" not in text
    assert "**Seeds.** 1 per setting." in text
    assert "one seed has no interval" in text
    assert "from three seeds" not in text


def test_the_rule_for_the_best_share_is_told_above_the_verdicts():
    text = report({"a": made_up.allocation(**SMALL)}).markdown(str)
    assert "A best share from 60 to 95 % counts as the paper's, which calls 75 to 85 % best" in text


def test_kinds_of_result(tmp_path):
    file = tmp_path / "x.json"

    def read(data, **options):
        file.write_text(data if isinstance(data, str) else json.dumps(data))
        return read_result(file, **options)

    assert read(made_up.slots()).kind == "slots"
    assert read(made_up.throughput()).kind == "throughput"
    assert read(made_up.copying()).kind == "copying"
    assert read(made_up.looks()).kind == "looks"
    assert read(made_up.memory_off()).kind == "memory_off"
    both = read(made_up.long_context()).data["models"]["engram_equal_loss"]
    assert both["held_out_loss_before"] == 2.9
    assert (both["held_out_loss"], both["scores"][1]["exact"], both["scores"][1]["answers"]) == (3.1, 405, 512)
    assert both["scores"][1]["by_seed"] == {0: (200, 256), 1: (205, 256)}
    least, most = both["scores"][1]["wilson"]
    assert 0.74 < least < 405 / 512 < most < 0.84
    assert both["scores"][1]["low"] < least < most < both["scores"][1]["high"]  # of two seeds
    recall = read({name: {**one, "provenance": {"command": "engram recall"}} for name, one in made_up.recall().items()})
    assert set(recall.data["models"]) == {"without memory", "with memory"}
    assert "- x: `engram recall`" in Report([recall], {}, judge(group_results([recall])), PAPER).markdown(str)
    assert read("", strict=False) is None  # a command is at work on it
    assert read({"runs": []}, strict=False) is None
    with pytest.raises(DataError, match="of no kind that can be drawn"):
        read({"runs": []})
    with pytest.raises(DataError, match="not JSON"):
        read("{")
    with pytest.raises(DataError, match="lacks points, summary"):
        read({k: v for k, v in made_up.slots().items() if k not in ("points", "summary")})
    with pytest.raises(DataError, match="No such file"):
        read_result(tmp_path / "none.json")
    broken = made_up.slots()
    del broken["points"][3]["test"]
    with pytest.raises(DataError, match=r"result x \(slots\) is malformed \(no 'test'\)"):
        draw_result(read(broken), tmp_path)


def test_repeats_tell_apart_what_came_back_to_the_last_digit():
    first, second = made_up.slots(), made_up.slots()
    told = report({"a": first, "b": second}).markdown(str)
    beginning = "12 runs stand in two sweeps: one recipe, text and seed, run twice. To the last digit came back "
    assert f"{beginning}without a memory 3 of 3, with a memory 9 of 9.\n" in told
    for point, shift in zip(second["points"], (0.03, -0.04)):
        point["test"] = {**point["test"], "loss": point["test"]["loss"] + shift}
    told = report({"a": first, "b": second}).markdown(str)
    assert (
        f"{beginning}without a memory 1 of 3, with a memory 9 of 9; the other 2 differ by 0.0354 (root mean square; at most 0.0400)."
        in told
    )


def test_operations_are_told_as_they_are_counted():
    told = " ".join(report({"slots": made_up.slots()}).markdown(str).split())
    assert (
        "count attention over all positions, masked ones included; embeddings, head and the mixing of residual streams" in told
    )


def test_intervals_of_long_context_are_over_seeds_and_named(tmp_path):
    def told(result):
        models = pool_recall(result)["models"]
        caption = plot_recall(models, tmp_path / "recall.png").caption
        return models["engram_equal_loss"]["scores"][1], "\n".join(long_context({"models": models})), caption

    score, text, caption = told(made_up.long_context(seeds=(0, 1, 2), queries=(100, 205, 190)))
    low, high = score["low"], score["high"]
    shares = [exact / answers for exact, answers in score["by_seed"].values()]
    assert low < min(shares) < max(shares) < high == 1.0  # Wilson's would leave out all of them
    assert score["wilson"][0] > min(shares)
    assert f"| 64.5 [{100 * low:.1f}, 100.0] |" in text
    for part in (text, caption):
        assert "Student's t over seeds" in part
    score, text, caption = told(made_up.long_context(seeds=(0, 1), queries=(200, 200)))
    assert (score["low"], score["high"]) == score["wilson"]  # seeds that agree by chance
    score, text, caption = told(made_up.long_context(seeds=(0,), queries=(200,)))
    assert (score["low"], score["high"]) == score["wilson"]
    for part in (text, caption):
        assert "Wilson's over answers of one seed" in part
        assert "Student" not in part
    assert "shown a second time" not in text
    result = made_up.long_context()
    for entry in result["entries"]:
        entry["copying_before"] = 1.25 + 0.5 * entry["seed"]
    assert "dense 1.25, 1.75 by seed; engram\\_equal\\_loss 1.25, 1.75 by seed. A" in told(result)[1]
    for entry in result["entries"]:
        entry["copying_before"] = 1.25
    assert "dense 1.25; engram\\_equal\\_loss 1.25. A" in told(result)[1]


def test_experts_are_called_a_weak_control_only_where_a_model_without_memory_beats_them():
    sweeps = {"allocation": made_up.allocation(budgets=("small",)), "dense": made_up.comparison()}
    for shift, told in (
        (-9, "Experts alone lose to a model without a memory"),
        (9, "No model without a memory is clearly better"),
    ):
        for point in sweeps["dense"]["points"]:
            if point["labels"]["arm"] == "dense":
                point["test"] = {**point["test"], "loss": point["test"]["loss"] + shift}
        assert told in experts_as_control(sweeps)


def test_what_arms_of_other_sweeps_have_otherwise_than_experts_alone_stands_beside_them():
    sweeps = {"allocation": made_up.allocation(budgets=("small",)), "dense": made_up.comparison()}
    for sweep in sweeps.values():
        sweep["recipe"]["base"] = {"data": {"seq_len": 128}, "balance_rate": 0.01, "optimizer": "muon", "save_steps": 7}
    base, arms = sweeps["dense"]["recipe"]["base"], sweeps["dense"]["recipe"]["variants"]["arm"]
    base |= {"bf16": False, "save_steps": 8, "engram": {"layer_ids": [1]}}
    del base["balance_rate"]
    arms["dense"] = {"backbone.architecture": "llama", "engram": None}
    arms["experts"] = {"bf16": True, "balance_rate": 0.01}
    for point in sweeps["dense"]["points"]:
        if point["labels"]["arm"] == "dense":
            point["counts"] = {**point["counts"], "experts": 0, "total": 400_000}
        if point["labels"]["arm"] == "experts and memory":
            point["learning_rate"] = 8e-3
    told = re.findall(r"nats against experts alone of allocation, small \(([^)]*)\)", experts_as_control(sweeps))
    assert told == [
        "backbone.architecture llama for deepseek\\_v3, bf16 off, 400,000 parameters for 4,288,000",
        "no other setting",
        "balance\\_rate 0.001 for 0.01, bf16 off, learning\\_rate 0.008 for 0.003, with a memory",
    ]
    assert "Same text, tokens and seeds, in brackets what differs beside them" in experts_as_control(sweeps)
    control = [point for point in sweeps["allocation"]["points"] if point["counts"]["rho"] == 1]
    mine = [{**point, "labels": {"arm": "experts"}, "counts": {**point["counts"], "experts": 90}} for point in control]
    assert differing_settings(sweeps["dense"], mine, sweeps["allocation"], control) == ["experts 90 for 96"]


def test_arms_without_a_memory_are_not_judged_by_the_noise_of_those_with_one():
    result = made_up.ablation()
    far = next(p["labels"]["arm"] for p in result["points"] if p["labels"]["arm"] != "reference")
    summary = result["summary"]["all"][far]
    summary["against_reference"] = {**summary["against_reference"], "mean": 9.0}
    assert f"clearly unlike the reference: {literal_text(far)} (" in report({"ablation": result}).markdown(str)
    for point in result["points"]:
        if point["labels"]["arm"] == far:
            point["counts"] = {**point["counts"], "table_rows": 0}
    assert f"unlike the reference: {literal_text(far)}" not in report({"ablation": result}).markdown(str)


def test_copying_is_told_by_seed_and_at_equal_loss(tmp_path):
    result = made_up.copying()
    told = section(report({"copying": result}).markdown(str), "Copying from the context")
    assert "| nats at 100,000 tokens | nats at its own end |" in told
    assert "| 0 | dense | 100,000 | 0.75 | 0.75 | 100,000 | 3.0000 | 0.75 |" in told
    assert "| 0 | engram | not by 100,000 (ended there) | 0.05 | 0.05 | 50,000 | 3.0000 | 0.01 |" in told
    assert "| 1 | dense | not by 100,000 (ended there) | 0.00 | 0.00 | – | – | – |" in told
    assert (
        "less that with one, seed by seed: +0.32 [-4.44, +5.09] nats at equal tokens (2 seeds), +0.74 (no interval) nats"
        in told
    )
    assert "nats at equal loss (1 seed)." in told
    assert "by their own loss alone" in told
    smoothed = {**result, "sizes": {"equal": 0.01, "smoothed": 3}}
    assert "the median of 3 neighbouring checkpoints" in "\n".join(copying(smoothed))
    assert plot_copying(result["entries"], tmp_path / "copying.png").path.is_file()


def test_looks_are_told_over_seeds(tmp_path):
    result = made_up.looks()
    told = section(report({"looks": result}).markdown(str), "Looks inside, seed by seed")
    assert "3 trainings of either kind" in told
    assert "memory at blocks 1, counted from 0. Looked at: 6,000 tokens of 8 held-out documents." in told
    assert "memory 4.0000 (seed 0), without 4.2500 (seed 0)" in told
    assert "| 1 | 0.990 | 2.500 | 1.500 | +0.510 [+0.485, +0.535] |" in told
    assert "| 1 | 2.01 | 1.50 | +0.51 [+0.49, +0.53] |" in told
    assert "| 1 | 0.500 [0.500, 0.500] | 0.750 [0.750, 0.750] | 0.510 [0.485, 0.535] | 0.250 [0.250, 0.250] |" in told
    assert "| +0.250 [+0.250, +0.250] | +0.240 [+0.215, +0.265] | +0.500 [+0.500, +0.500] |" in told
    assert "regular expression, event loop" in told
    alone = section(report({"looks": made_up.looks((0,), other=False)}).markdown(str), "Looks inside, seed by seed")
    assert "(no interval)" in alone
    assert "Soft alignment" not in alone
    (picture,) = draw_result(ResultFile("looks", "looks", result), tmp_path)
    assert picture.path.stat().st_size > 5000


def test_what_is_kept_with_the_memory_off_is_told_by_arm(tmp_path):
    result = made_up.memory_off()
    told = section(report({"off": result}).markdown(str), "With the memory off")
    assert "| together | facts | 100.0 | 21.0 | 21.0 [18.5, 23.5] |" in told
    assert "| new | reading | 100.0 | 90.0 | 90.0 [90.0, 90.0] |" in told
    assert "together 3.000 and 3.250 (off less on +0.250 [+0.250, +0.250])" in told
    assert "| dropout | reading: needle, 128 tokens | 100 | 25.0 | 50.0 | 100.0 | 90.0 | 90.0 [90.0, 90.0] |" in told
    (picture,) = draw_result(ResultFile("off", "memory_off", result), tmp_path)
    assert picture.path.stat().st_size > 5000
    for entry in result["entries"]:
        entry["memory_off"]["on"]["facts"]["port"][0] = 0
        entry["curve"] = []
    told = section(report({"off": result}).markdown(str), "With the memory off")
    assert "| together | facts | 0.0 | 21.0 | – |" in told
    draw_result(ResultFile("off", "memory_off", result), tmp_path)


def test_runs_that_ended_at_different_tokens_are_compared_where_both_were_measured():
    """Seed 0: the model without a memory went on for longer, and copied only then; seed 1 has one run."""
    result = made_up.copying()
    of_both = [entry for entry in result["entries"] if (entry["seed"], entry["model"]) != (1, "engram")]
    longer = {**of_both[1], "step": 150, "tokens": 150_000, "copying": 1.5}
    of_both[1] = {**of_both[1], "copying": 0.25}
    result["entries"] = [longer, *of_both]
    told = "\n".join(copying(result))
    assert "| nats at equal tokens | nats at its own end |" in told
    assert "| 0 | dense | 150,000 | 0.25 (at 100,000) | 1.50 |" in told
    assert "| 0 | engram | not by 100,000 (ended there) | 0.05 (at 100,000) | 0.05 |" in told
    assert "| 1 | dense | not by 100,000 (ended there) | – | 0.00 |" in told


def test_recall_stands_beside_what_copying_at_random_finds():
    result = made_up.long_context()
    models = pool_recall(result)["models"]
    told = "\n".join(long_context({"models": models}))
    assert "| answers | copying at random, % | exact, % [" in told
    assert re.search(r"\| tracking \| 256 \| 512 \| 50\.0 \| 30\.1 \[", told)  # from before chance was written down: two chains
    assert "another noted number" not in told
    assert (
        "at random finds: tracking 50.0 % then, 25.0 % now. The command it was made with asks the harder questions today"
        in told
    )
    file = ResultFile("old", "long_context", pool_recall(result))
    assert "long_context.py`; asks harder questions now; a machine" in Report([file], {}, [], PAPER).markdown(str)
    for entry in result["entries"]:
        for one in entry["scores"]:
            if one["kind"] == "tracking":
                one |= {"chance": 0.25, "other_value": 64 + 64 * entry["seed"]}
    models = pool_recall(result)["models"]
    told = "\n".join(long_context({"models": models}))
    assert re.search(r"\| tracking \| 256 \| 512 \| 25\.0 \| 30\.1 \[.*\| 37\.5 \|", told)
    assert "Asked more easily" not in told
    assert re.search(r"\| needle \| 256 \| 512 \| 100\.0 \|.*\| – \|", told)
    assert [score["other_value"] for score in models["dense"]["scores"]] == [None, None, 192]
    result["entries"][0]["scores"][2]["chance"] = 0.5
    with pytest.raises(DataError, match="tracking: seeds were asked among different numbers of notes"):
        pool_recall(result)


def test_shares_are_told_apart_by_the_noise_of_all_of_them():
    """The noise of one share happens to be even over its seeds: its own interval is wider than all others', or next to nothing."""
    entries = []
    for rho, loss, noise in (
        (1.0, 3.2, (0, 0, 0)),
        (0.8, 3.0, (0.001, 0, -0.001)),
        (0.6, 3.05, (0.03, -0.03, 0)),
        (0.4, 3.004, (0.001, 0, -0.001)),
    ):
        for seed in (0, 1, 2):
            entries.append(made_up.entry({"rho": str(rho)}, seed, loss + noise[seed], rho, round(100 * (1 - rho))))
    result = made_up.sweep("allocation", {"rho": {str(rho): {} for rho in (1.0, 0.8, 0.6, 0.4)}}, entries)
    half = half_width_over_settings([[p["test"]["loss"] for p in entries[3 * n : 3 * n + 3]] for n in range(4)])
    assert 0.004 < half < 0.05
    text = report({"a": result}).markdown(str)
    assert (
        "Shares that are not told apart from it if all are as noisy: 40, 80 %; by the interval of each alone: 60, 80 %." in text
    )
    assert f"95 % of differences lie within ±{half:.4f} of the truth" in text
    assert f"| [{-0.2 - half:+.4f}, {-0.2 + half:+.4f}] |" in text
    one = report({"a": made_up.allocation((0,), budgets=("small",))}).markdown(str)
    assert "Shares that these seeds do not tell apart from it: " in one
    assert "as noisy as each other" not in one


def test_pieces_of_markdown():
    assert [span([1000, 1000]), span([2.4012, 2.4013]), span([0.5, 2])] == ["1,000", "2.4", "0.5 to 2"]
    assert literal_text("a|b_c\n<d>*") == r"a\|b\_c \<d\>\*"
    assert interval(None) == "–"
    assert interval({"mean": 0.5, "low": None, "high": None}, 1, signed=True) == "+0.5 (no interval)"
    assert interval({"mean": 0.5, "low": 0.25, "high": 0.75}, 0, factor=100) == "50 [25, 75]"
    assert table(("a", "b"), [("1", "2")], right=(1,)) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_many_questions_are_corrected_for_and_counted_by_claim():
    result = made_up.looks(seeds=range(6))
    text = report({"looks": result}).markdown(str)
    assert "Claim by claim, by the judgements that can tell: " in text
    assert re.search(r"\(Holm's rule\), (\d) of the \1 that are told to agree stay\.", text)
    ends = {"sure": (1.0, 0.9, 1.1), "weak": (1.0, 0.1, 1.9), "weaker": (-1.0, -1.95, -0.05)}
    verdicts = [
        {"statement": name, "where": "a_sweep", "verdict": verdict, "value": value, "low": low, "high": high, "seeds": 5}
        for (name, (value, low, high)), verdict in zip(ends.items(), ("agrees", "agrees", "disagrees"))
    ]
    told = limits({}, verdicts, PAPER)
    assert (
        "1 of the 2 that are told to agree and 0 of the 1 that are told to disagree stay. Not: weak (a\\_sweep); weaker (a\\_sweep)."
        in told
    )


def test_what_figures_do_not_tell_is_told(tmp_path):
    result = made_up.slots()
    result["recipe"]["remarks"] = "Seed 2 was added after a look at [0, 1]."
    text = report({"slots": result}).markdown(str)
    assert "**Remarks**\n\n- slots: Seed 2 was added after a look at \\[0, 1\\]." in text
    assert "Remarks" not in report({"slots": made_up.slots()}).markdown(str)
