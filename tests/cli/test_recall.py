import json

import yaml

from engram.models import load_model
from engram.testing import tiny_memory
from engram.testing.tiny import tiny_model, tiny_tokenizer
from tests.cli.test_cli import invoke


def check_shown(shown, results):
    """Every number stands whole in one line, in a pipe of 80 columns or fewer."""
    assert "…" not in shown
    lines = [line.split() for line in shown.splitlines()]
    for name, result in results.items():
        for s in result["scores"]:
            if s["depth"] is None:
                reader = {"model": "none"}.get(name, name.split()[0])
                percents = f"{100 * s['share']:.1f} % {100 * s['low']:.1f}-{100 * s['high']:.1f} %".split()
                wanted = [s["kind"], str(s["length"]), str(s["answers"]), f"{100 * s['chance']:.1f}", "%", reader, *percents]
                assert [*wanted, f"{s['log_probability']:.2f}", f"{s['rank']:.1f}"] in lines


def test_recall_with_a_memory_and_without(monkeypatch, capsys, tmp_path):
    model, memory, out = tmp_path / "model", tmp_path / "memory", tmp_path / "new" / "recall.json"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    attached = tiny_memory(load_model(str(model))[0])
    attached.save_pretrained(memory)
    texts = tmp_path / "texts.yaml"
    texts.write_text(yaml.safe_dump({"prose": ["the memory is addressed by the last tokens.\n" * 40]}))
    common = ["--texts", texts, "--tasks", "needle, tracking", "--lengths", "180,220", "--examples", 2, "--json", out]
    monkeypatch.setenv("COLUMNS", "50")
    code, shown, err = invoke(monkeypatch, capsys, "recall", "--model", model, *common)
    assert code == 0, err
    check_shown(shown, json.loads(out.read_text()))
    alone = json.loads(out.read_text())["model"]
    assert [(s["kind"], s["length"]) for s in alone["scores"] if s["depth"] is None] == [
        ("needle", 180),
        ("needle", 220),
        ("tracking", 180),
        ("tracking", 220),
    ]
    assert alone["provenance"]["command"].endswith("--examples 2 --seed 0")
    # The model is the one it was made for.
    code, shown, err = invoke(monkeypatch, capsys, "recall", "--memory", memory, *common)
    assert code == 0, err
    plain = tmp_path / "all.txt"
    plain.write_text("the memory is addressed by the last tokens.\n" * 40)
    code, _, err = invoke(
        monkeypatch, capsys, "recall", "--model", model, "--texts", plain, *common[2:-1], tmp_path / "plain.json"
    )
    assert code == 0, err
    of_text = json.loads((tmp_path / "plain.json").read_text())["model"]
    assert [(s["kind"], s["length"]) for s in of_text["scores"]] == [(s["kind"], s["length"]) for s in alone["scores"]]
    assert f" --texts {plain} --tasks " in of_text["provenance"]["command"]
    both = json.loads(out.read_text())
    check_shown(shown, both)
    assert max(map(len, shown.splitlines())) <= 84
    assert list(both) == ["without memory", "with memory"]
    assert both["without memory"]["scores"] == alone["scores"]
    assert both["with memory"]["scores"] != alone["scores"]
