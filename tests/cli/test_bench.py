import json

from tests.cli.test_cli import invoke


def test_bench_shows_and_saves_what_it_measured(monkeypatch, capsys, tmp_path):
    out = tmp_path / "a new folder" / "bench.json"
    code, shown, err = invoke(
        monkeypatch, capsys, "bench", "hash", "--quick", "--rounds", "2", "--json", out, "--plots", tmp_path
    )
    assert (code, err) == (0, "")
    assert "hash: 2,048 tokens" in shown
    assert "times as fast as NumPy" in shown
    result = json.loads(out.read_text())
    assert result["command"] == f"engram bench hash --quick --rounds 2 --json '{out}'"
    assert result["rounds"] == 2
    assert (tmp_path / "bench_hash.png").stat().st_size > 1000


def test_bench_lists_and_refuses(monkeypatch, capsys):
    code, shown, _ = invoke(monkeypatch, capsys, "bench", "--list")
    assert code == 0
    assert [line.split()[0] for line in shown.splitlines()] == ["hash", "gather", "tiers", "cold", "layer"]
    code, _, err = invoke(monkeypatch, capsys, "bench", "speed")
    assert code == 2
    assert err.startswith("engram: benchmarks: got speed, expected some of hash")
