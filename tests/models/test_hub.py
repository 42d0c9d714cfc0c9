"""Against the real client of ``huggingface_hub``, with a hub on this machine."""

import json

import pytest
import torch
from huggingface_hub import constants

from engram import CheckpointError, ConfigError, EngramModel, MemoryEditor, TableConfig
from engram.models.hub import found_at
from engram.testing import tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor
from tests.models.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub()
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        monkeypatch.chdir(tmp_path)
        yield hub


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(24).view(2, 12)).logits


def test_what_was_pushed_is_found_by_its_name(hub):
    memory = tiny_memory()
    expected = logits_of(memory)
    address = memory.push_to_hub("me/mine", private=True)
    first = address.rsplit("/", 1)[1]
    with torch.no_grad():
        memory.engrams["0"].value_proj.weight.mul_(2)
    changed = logits_of(memory)
    memory.push_to_hub("me/mine")
    assert len(hub.files("me/mine")) == 2  # the files of the first upload went with the second
    loaded = EngramModel.from_pretrained(tiny_model(), "me/mine", tiny_tokenizer())
    assert torch.equal(logits_of(loaded), changed)
    assert loaded.folder == "me/mine"
    before = EngramModel.from_pretrained(tiny_model(), "me/mine", tiny_tokenizer(), revision=first)
    assert torch.equal(logits_of(before), expected)
    hub.asked.clear()
    EngramModel.from_pretrained(tiny_model(), "me/mine", tiny_tokenizer())
    assert not [asked for asked in hub.asked if "/resolve/" in asked and asked.startswith("GET")]  # fetched once


def test_facts_come_with_their_ledger_and_go_on_in_a_folder(hub, tmp_path):
    editor = make_editor()
    editor.teach(FACTS[:2])
    editor.memory.push_to_hub("me/facts")
    taught, base = [fact.id for fact in editor.facts], editor.memory.unload()
    loaded = MemoryEditor.load(base, "me/facts", tiny_tokenizer())
    assert [fact.id for fact in loaded.facts] == taught
    loaded.teach(FACTS[2:3])
    loaded.save("me/facts")
    here = MemoryEditor.load(loaded.memory.unload(), "me/facts", tiny_tokenizer())  # the folder, which comes before the hub
    assert len(here.facts) == 3
    assert (tmp_path / "me" / "facts" / "engram.json").is_file()


def test_rows_are_placed_on_this_machine_as_this_machine_says(hub, tmp_path):
    tiny_memory().push_to_hub("me/mine")
    files = hub.repositories["me/mine"][-1]
    description = json.loads(files["engram.json"])
    told = {**description, "placement": {"tier": "mmap", "path": str(tmp_path / "theirs")}}
    hub.repositories["me/mine"].append({**files, "engram.json": json.dumps(told).encode()})
    loaded = EngramModel.from_pretrained(tiny_model(), "me/mine", tiny_tokenizer())
    assert loaded.table_config.tier == "device"
    assert not (tmp_path / "theirs").exists()
    loaded.unload()
    own = TableConfig(tier="host")
    assert EngramModel.from_pretrained(tiny_model(), "me/mine", tiny_tokenizer(), own).table_config.tier == "host"


def test_what_is_not_there_is_said(hub, tmp_path):
    hub.repositories["me/model"] = [{"config.json": b"{}"}]
    base, tokenizer = tiny_model(), tiny_tokenizer()
    (tmp_path / "here").mkdir()
    for name, message in (
        (
            "me/nothing",
            "no memory in me/nothing, and none of this name could be fetched from the hub: .*[^.]. Expected a folder",
        ),
        ("me/model", "me/model on the hub holds no memory: engram.json is missing"),
        ("no/such/folder", "no memory in no/such/folder: engram.json is missing"),
        ("here/nothing", "taken for a folder, because there is a folder 'here' here"),
        ("nowhere", "no memory in nowhere: engram.json is missing"),
        ("./nowhere", "no memory in ./nowhere: engram.json is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            EngramModel.from_pretrained(base, name, tokenizer)
    tiny_memory().push_to_hub("me/mine")
    with pytest.raises(CheckpointError, match="none of this name could be fetched"):
        EngramModel.from_pretrained(base, "me/mine", tokenizer, revision="never")
    with pytest.raises(ConfigError, match=r"revision: got 'v1' of .*, which is taken for a folder"):
        EngramModel.from_pretrained(base, tmp_path, tokenizer, revision="v1")
    EngramModel.from_pretrained(base, "me/mine", tokenizer)  # every refusal left the base free


def test_what_was_fetched_is_there_without_a_network(hub, monkeypatch):
    tiny_memory().push_to_hub("me/mine")
    fetched = found_at("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found_at("me/mine") == fetched
    with pytest.raises(CheckpointError, match="me/other"):
        found_at("me/other")


def test_a_network_that_fails_is_one_clear_error(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(CheckpointError, match="none of this name could be fetched from the hub"):
        found_at("me/mine")
    for name in ("me/mine", "not a name"):
        with pytest.raises(CheckpointError, match=f"push_to_hub: cannot upload to '{name}': "):
            tiny_memory().push_to_hub(name)


def test_a_connection_that_is_cut_is_one_clear_error(hub, monkeypatch):
    tiny_memory().push_to_hub("me/mine")
    monkeypatch.setattr(hub, "files", lambda *_: 1 / 0)  # the handler dies in the midst of an answer
    with pytest.raises(CheckpointError, match="none of this name could be fetched from the hub"):
        found_at("me/mine")


def test_arguments_in_another_order_are_refused(saved):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for load in (EngramModel.from_pretrained, MemoryEditor.load):
        for given in (
            (saved, model, tokenizer),
            (model, tokenizer, saved),
            (str(saved), saved, tokenizer),
            (model, None, tokenizer),
        ):
            with pytest.raises(ConfigError, match=r"expected \(model, path, tokenizer\)"):
                load(*given)
        with pytest.raises(ConfigError, match="expected a Hugging Face tokenizer"):
            load(tokenizer, saved, model)
