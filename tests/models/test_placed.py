"""Models that have n-gram tables of their own, with these in host memory, in files and in fewer bits."""

import copy
import gc
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from engram import CheckpointError, ConfigError, TableConfig, TableError
from engram.models.placed import NGRAM_EMBEDDINGS, PlacedEmbedding, _device_beside, load_placed, place_embeddings
from engram.tables import MmapTable
from engram.testing import tiny_model

NAME = "model.layers.1.ple.ple_embedding.ngram_embedding"
IDS = torch.arange(2, 26).view(2, 12)
FIELDS = {
    "vocab_size": 380,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1, 2],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 500,
    "split_ngram_parts": 12,
    "make_ngram_vocab_size_divisible_by": 12,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 8,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": 0,
}
pytestmark = pytest.mark.skipif("qwen4_exp_text" not in CONFIG_MAPPING, reason="this transformers has no Qwen4-Exp")

PLACES = [
    TableConfig(),
    TableConfig(tier="host"),
    TableConfig(tier="mmap", path="rows"),
    TableConfig(tier="mmap", path="rows", dtype="int8"),
    TableConfig(tier="host", dtype="bfloat16"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a random model, in several files, the parts of its tables in any of them."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen4_exp_text", **FIELDS)).eval()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def said(model):
    return model.generate(IDS, max_new_tokens=10, do_sample=False)


@pytest.mark.parametrize("config", PLACES, ids=lambda c: f"{c.tier} {c.dtype}")
def test_a_model_answers_as_before_wherever_its_rows_are(saved, here, config):
    reference = AutoModelForCausalLM.from_pretrained(saved).eval()
    tolerance = {"float32": 0.0, "bfloat16": 1e-3, "int8": 2e-3}[config.dtype]
    placed = AutoModelForCausalLM.from_pretrained(saved).eval()
    names = place_embeddings(placed, config)
    assert list(names) == [NAME.replace("1", "0"), NAME]
    loaded = load_placed(saved, config).eval() if config.path is None else None
    for model in filter(None, (placed, loaded)):
        assert (logits(model) - logits(reference)).abs().max() <= tolerance
        assert torch.equal(said(model), said(reference))
        assert type(model.get_submodule(NAME)) is PlacedEmbedding
        assert not [name for name, _ in model.named_parameters() if "ngram_embedding" in name]
    assert names[NAME].table.tier == config.tier
    assert names[NAME].table.format_name == config.dtype


def test_rows_go_from_the_files_into_row_files_and_are_found_there_again(saved, here, tmp_path):
    config = TableConfig(tier="mmap", path="rows")
    reference = logits(AutoModelForCausalLM.from_pretrained(saved).eval())
    first = load_placed(saved, config).eval()
    assert torch.equal(logits(first), reference)
    files = sorted((tmp_path / "rows").glob("*.rows"))
    assert [file.name for file in files] == ["layer-0.rows", "layer-1.rows"]
    times = [file.stat().st_mtime_ns for file in files]
    del first
    assert torch.equal(logits(load_placed(saved, config).eval()), reference)
    assert [file.stat().st_mtime_ns for file in files] == times  # read as they were
    placed = AutoModelForCausalLM.from_pretrained(saved).eval()
    place_embeddings(placed, config)  # the same rows from elsewhere
    assert torch.equal(logits(placed), reference)
    assert [file.stat().st_mtime_ns for file in files] == times
    del placed
    other = AutoModelForCausalLM.from_pretrained(saved).eval()
    other.get_submodule(NAME).weight.data[7] *= 2  # a single row
    changed = other.get_submodule(NAME).weight[7].clone()
    with pytest.raises(TableError, match="holds other rows than those of"):
        place_embeddings(other, config)
    assert type(other.get_submodule(NAME)) is torch.nn.Embedding
    place_embeddings(other, TableConfig(tier="mmap", path="rows", changed_rows="refill"))
    assert torch.equal(other.get_submodule(NAME)(torch.tensor(7)), changed)


@pytest.mark.parametrize("changed_rows", ["refuse", "keep"])
def test_a_filling_that_was_stopped_is_begun_again(saved, here, tmp_path, monkeypatch, changed_rows):
    placement = TableConfig(tier="mmap", path=str(tmp_path / "rows"), changed_rows=changed_rows)
    original = MmapTable.load_rows

    def stopped(self, start, rows):
        original(self, start, rows[: len(rows) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MmapTable, "load_rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            load_placed(str(saved), placement)
    expected = logits(AutoModelForCausalLM.from_pretrained(saved).eval())
    assert torch.equal(logits(load_placed(str(saved), placement).eval()), expected)


def test_several_models_read_one_set_of_files(saved, here, tmp_path):
    config = TableConfig(tier="mmap", path="rows", dtype="int8")
    models = [load_placed(saved, config).eval() for _ in range(3)]
    assert [model.get_submodule(NAME).table.mode for model in models] == ["r+", "r", "r"]
    first, *others = map(logits, models)
    assert all(torch.equal(first, other) for other in others)


def test_changes_of_type_reach_what_is_given_and_not_what_is_stored(saved):
    model = load_placed(saved, TableConfig(tier="host"), dtype=torch.bfloat16).eval()
    embedding = model.get_submodule(NAME)
    assert embedding(torch.tensor([[0, 5]])).dtype == torch.bfloat16
    assert embedding.table.format_name == "float32"
    model.float()
    rows = embedding(torch.tensor([[0, 5]]))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, AutoModelForCausalLM.from_pretrained(saved).get_submodule(NAME)(torch.tensor([[0, 5]])))


def test_the_rest_is_trained_and_nothing_is_saved_without_its_rows(saved, tmp_path):
    model = load_placed(saved, TableConfig(tier="host"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[1].ple.value_proj.weight.grad.abs().sum() > 0
    with pytest.raises(TableError, match="would be written without them"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    assert set(model.state_dict()) == {
        name for name in AutoModelForCausalLM.from_pretrained(saved).state_dict() if not name.endswith("ngram_embedding.weight")
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_on_a_placed_model_are_saved(saved, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load_placed(saved, TableConfig(tier="host")), config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(load_placed(saved, TableConfig(tier="host")), tmp_path / "lora").eval()
    assert torch.equal(logits(again), logits(adapted))


def test_a_placed_model_is_of_its_own_class_and_can_be_copied(saved):
    model = load_placed(saved, TableConfig(tier="host")).eval()
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(saved))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_other_embeddings_are_named(here):
    model, reference = tiny_model("gpt2"), tiny_model("gpt2")
    (placed,) = place_embeddings(model, TableConfig(tier="host"), names="wpe").values()
    assert torch.equal(logits(model), logits(reference))
    assert placed.table.rows == 256
    with pytest.raises(ConfigError, match=r"names: got 'nothing', which fits no embedding; expected one of transformer.wte"):
        place_embeddings(model, names="nothing")
    with pytest.raises(ConfigError, match=r"names: got none for a model of type 'gpt2', of which nobody knows"):
        place_embeddings(model)
    for kind, names, message in (
        ("gpt2", "wte", "the embeddings of the model's tokens"),
        ("gemma2", "embed_tokens", "the embeddings of the model's tokens"),
        ("opt", "embed_positions", "OPTLearnedPositionalEmbedding, which does more than to give rows"),
        ("gpt2", "", "names: got ''"),
        ("gpt2", ["wpe"], "names: got \\['wpe'\\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            place_embeddings(tiny_model(kind), names=names)
    with pytest.raises(ConfigError, match=r"transformer\.wpe: got an embedding that is placed already"):
        place_embeddings(model, names="wpe")


def test_what_cannot_be_placed_is_said_and_the_model_stays(saved, here, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    for placement, message in (
        (TableConfig(tier="mmap"), "got tier 'mmap' without a path"),
        (TableConfig(tier="hybrid", hot_rows=4), "got 'hybrid'"),
        (TableConfig(sharded=True), "TableConfig.sharded: got True"),
        ({"tier": "host"}, "table_config: got dict"),
    ):
        for call in (place_embeddings, lambda _, placement: load_placed(saved, placement)):
            with pytest.raises(ConfigError, match=message):
                call(model, placement)
    assert type(model.get_submodule(NAME)) is torch.nn.Embedding
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved))
    with pytest.raises(ConfigError, match="weights on the meta device"):
        place_embeddings(empty)
    (tmp_path / "bin").mkdir()
    (saved / "config.json").read_bytes()
    (tmp_path / "bin" / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "none").mkdir()
    for name, message in (
        ("./nowhere", "there is no such folder"),
        ("bin", "got no model.safetensors and no model.safetensors.index.json"),
        ("none", "cannot load model 'none': "),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_placed(name, TableConfig())
    for names in ("", ["wpe"]):
        with pytest.raises(ConfigError, match="names: got "):
            load_placed(saved, TableConfig(), names=names)
    with pytest.raises(ConfigError, match="output_loading_info"):
        load_placed(saved, TableConfig(), output_loading_info=True)


def test_files_that_lack_rows_are_refused(saved, tmp_path):
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.safetensors.index.json").unlink()
    for change, message in (
        ([f"{NAME}.shard_3.weight"], "got .* rows in the saved model, expected floating point tensors of"),
        ([key for key in index["weight_map"] if key.startswith(NAME)], "no tensor of the saved model is called so"),
    ):
        kept = {key: file for key, file in index["weight_map"].items() if key not in change}
        (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": kept}))
        with pytest.raises(CheckpointError, match=message):
            load_placed(folder, TableConfig(tier="host"))


def test_known_embeddings_are_those_of_models_there_are():
    assert set(NGRAM_EMBEDDINGS) <= set(CONFIG_MAPPING)


def test_rows_that_are_no_numbers_are_known_again(saved, here, tmp_path):
    """Files that lost their notes are compared with the model's rows bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.get_submodule(NAME).weight[3, 2] = float("nan")
    model.save_pretrained(tmp_path / "model")
    placement = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    del model
    load_placed(str(tmp_path / "model"), placement)
    gc.collect()
    for note in (tmp_path / "rows").glob("*.rows.json"):
        note.unlink()
    again = load_placed(str(tmp_path / "model"), placement)
    assert torch.isnan(again.get_submodule(NAME)(torch.tensor(3))[2])


def test_files_whose_times_are_alike_are_told_apart_by_their_rows(saved, here, tmp_path):
    """As reproducible builds leave them."""
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    for file in other.glob("*.safetensors"):
        tensors = {name: tensor + 1 if "ngram_embedding" in name else tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        before = (saved / file.name).stat()
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    place = TableConfig(tier="mmap", path="rows")
    load_placed(saved, place)
    gc.collect()
    with pytest.raises(TableError, match="holds other rows"):
        load_placed(other, place)
    load_placed(saved, place)


def test_rows_go_where_the_model_around_them_computes(saved, monkeypatch):
    """As ``device_map`` asks."""
    made = []
    monkeypatch.setattr("engram.models.placed.build_table", lambda *args, device, **options: made.append(device) or stop())
    monkeypatch.setattr("engram.models.placed.check_room", lambda *args, **options: None)
    monkeypatch.setattr(
        "engram.models.placed._device_beside", lambda model, name: torch.device("cuda", int(name.split(".")[2]))
    )
    with pytest.raises(KeyboardInterrupt):
        load_placed(saved, TableConfig())
    assert made == [torch.device("cuda", 0)]


def stop():
    raise KeyboardInterrupt


def test_the_device_of_a_part_is_that_of_the_next_around_it_with_weights():
    model = tiny_model()
    model.model.layers[1].to("meta")
    assert _device_beside(model, "model.layers.0.mlp.gone").type == "cpu"
    assert _device_beside(model, "model.layers.1.mlp.gone").type == "cpu"  # nobody computes on meta
    model.model.layers[1].mlp._hf_hook = SimpleNamespace(execution_device=torch.device("cuda", 1))
    assert _device_beside(model, "model.layers.1.mlp.gone") == torch.device("cuda", 1)
