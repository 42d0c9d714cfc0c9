import pytest
import typer

from engram.cli.outputs import check_writable


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "r.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.json").write_text("{}")
    check_writable(tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "{}"
    with pytest.raises(typer.BadParameter, match="cannot write"):
        check_writable(tmp_path / "old.json" / "r.json")
