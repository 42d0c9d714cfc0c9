import json

import pytest

from engram import ConfigError, TableConfig


@pytest.mark.parametrize(
    "placement",
    [
        TableConfig(),
        TableConfig(tier="mmap", dtype="int8", path="rows", changed_rows="keep", resident_bytes=1 << 20),
        TableConfig(tier="hybrid", hot_rows=7),
        TableConfig(tier="host", sharded=True),
    ],
)
def test_a_placement_goes_through_json(placement):
    assert TableConfig.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement


def test_a_placement_is_changed_in_a_copy_and_keeps_to_itself_what_loading_filled_in():
    loaded = TableConfig(tier="mmap", path="rows", stamps={1: "saved"})
    assert loaded.replace(resident_bytes=4096).stamps == {1: "saved"}
    assert loaded.to_dict() == TableConfig(tier="mmap", path="rows").to_dict()
    assert not {"files", "stamps"} & loaded.to_dict().keys()
    with pytest.raises(ConfigError, match=r"TableConfig\.tier"):
        loaded.replace(tier="shelf")
