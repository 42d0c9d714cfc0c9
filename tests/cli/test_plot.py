import json
import sys

from tests.cli.test_cli import invoke
from tests.plots import made_up


def write(folder, **results):
    folder.mkdir(exist_ok=True)
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))


def test_without_arguments_all_results_make_the_report(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", sweep_slots=made_up.slots((0, 1)), other={"runs": []})
    code, out, err = invoke(monkeypatch, capsys, "plot")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "left out, of no kind that is drawn here: other.json",
        "docs/pictures/sweep_slots.png",
        "docs/pictures/sweep_slots_curves.png",
        "docs/report.md",
        "docs/report.html",
    ]
    text = (tmp_path / "docs" / "report.md").read_text()
    assert "](<pictures/sweep_slots.png>)" in text
    assert (tmp_path / "docs" / "pictures" / "sweep_slots.png").is_file()
    assert text.count("**not measured**") > 10


def test_named_files_are_drawn_where_one_says(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", run=made_up.throughput())
    code, out, _ = invoke(monkeypatch, capsys, "plot", "a/run.json", "--out", "b", "--html", "c/page.html")
    assert (code, out.splitlines()) == (0, ["b/run.png", "c/page.html"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_report_of_named_files_is_of_these_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", my_slots=made_up.slots((0, 1)))
    arguments = ("a/my_slots.json", "--out", "b c", "--html", "page.html", "--markdown", "page.md")
    code, _, err = invoke(monkeypatch, capsys, "plot", *arguments)
    assert (code, err) == (0, "")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Results: my\\_slots\n")
    assert "<title>Results: my_slots</title>" in (tmp_path / "page.html").read_text()
    assert "This report asks the same" not in text
    assert "not measured**" not in text
    assert "\n\nNot measured by these results: Loss is U-shaped" in text
    assert text.count("\n## ") == 5  # only what there is a result of has a section
    assert "intervals from 2 seeds are wide" in text
    assert "- this report: `engram plot a/my_slots.json --out 'b c' --html page.html --markdown page.md`" in text
    write(tmp_path / "a", **{f"r{number}": made_up.throughput() for number in range(6)})
    invoke(monkeypatch, capsys, "plot", *(f"a/r{number}.json" for number in range(6)), "--markdown", "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Results: r0, r1, r2, r3 and 2 more\n")
    assert "no claim of the paper is measured here" in text
    assert "is judged by the interval alone" not in text


def test_a_sweep_without_points_says_why_nothing_is_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    aside = made_up.slots()["points"][:6]
    write(tmp_path / "a", none=made_up.sweep("slots", {"rows": {"none": {}}}, [], other_points=aside))
    code, out, _ = invoke(monkeypatch, capsys, "plot", "a/none.json", "--markdown", "page.md")
    assert code == 0
    assert "none: no points so far, so nothing was drawn (6 points of another recipe, or not yet of this one, are kept" in out
    assert (
        "6 points of another recipe, or not yet of this one, are kept aside in the file." in (tmp_path / "page.md").read_text()
    )


def test_what_cannot_be_drawn_is_one_line_and_nothing_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", other={"runs": []})
    write(
        tmp_path / "more",
        other=made_up.throughput(),
        again=made_up.throughput(),
        broken={**made_up.slots(), "summary": {"curve": 1}},
    )
    write(tmp_path / "twice", again=made_up.throughput())
    for arguments, message in (
        ([], "no result in results/ is of a kind that can be drawn"),
        (["results/other.json"], "result results/other.json: of no kind that can be drawn"),
        (["none.json"], "result none.json: No such file"),
        (["more/again.json", "twice/again.json"], "result files of one name: again"),
        (["more/broken.json", "--html", "r.html"], "result broken (slots) is malformed"),
    ):
        code, _, err = invoke(monkeypatch, capsys, "plot", *arguments)
        assert code == 2
        assert err.startswith(f"engram: {message}"), err
        assert err.count("\n") == 1
    assert not (tmp_path / "docs").exists()
    assert not (tmp_path / "r.html").exists()


def test_without_matplotlib_nothing_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = invoke(monkeypatch, capsys, "plot")
    assert code == 2
    assert err == "engram: pictures need matplotlib; install it with: pip install 'engram-memory[plots]'\n"


def test_pictures_of_one_name_are_not_drawn_over_each_other(monkeypatch, capsys, tmp_path):
    result = made_up.allocation()
    for name in ("s.json", "s_curves.json"):
        (tmp_path / name).write_text(json.dumps(result))
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke(monkeypatch, capsys, "plot", "s.json", "s_curves.json", "--out", "pictures")
    assert code in (1, 2)
    assert "a picture of s and of s_curves; rename one of the result files" in err
