import pytest

from engram import ConfigError
from engram.data import contamination
from engram.data.contamination import measure_contamination
from engram.data.reference import shared_ngrams


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13, 400])
@pytest.mark.parametrize(("part", "known"), [(1 << 18, 1 << 23), (7, 1 << 23), (100, 500)])
def test_counts_equal_the_plain_definition(store, monkeypatch, n, part, known):
    monkeypatch.setattr(contamination, "_PART", part)
    monkeypatch.setattr(contamination, "_KNOWN", known)
    found = measure_contamination(store, n)
    ids = {side: [store.ids(d)[1:].tolist() for d in store.split(side)] for side in ("train", "held_out")}
    expected = shared_ngrams(ids["train"], ids["held_out"], n)
    assert list(zip(found.shared.tolist(), found.ngrams.tolist(), strict=True)) == expected
    assert found.share == pytest.approx(sum(e[0] for e in expected) / max(1, sum(e[1] for e in expected)))
    assert 0 < found.share < 1 or n in (1, 400)


def test_the_report_names_the_worst_documents(store):
    found = measure_contamination(store, 5)
    report = found.to_dict(worst=3)
    shares = [entry["share"] for entry in report["most_contaminated"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(max(s / n for s, n in zip(found.shared, found.ngrams) if n), abs=1e-6)
    assert report["shared"] == found.shared.sum()
    assert set(report["share_by_kind"]) == {"prose", "code"}
    named = store.names.index(report["most_contaminated"][0]["document"])
    assert named in store.split("held_out")


def test_progress_and_mistakes(store, small_store):
    seen = []
    measure_contamination(store, 3, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(store.tokens), len(store.tokens))
    nothing = measure_contamination(small_store, 3)
    assert (nothing.share, nothing.to_dict()["ngrams"], nothing.to_dict()["most_contaminated"]) == (0, 0, [])
    with pytest.raises(ConfigError, match="got n = 0"):
        measure_contamination(store, 0)
