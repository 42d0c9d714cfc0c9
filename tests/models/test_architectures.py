import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from engram import (
    AttachError,
    ConfigError,
    EngramConfig,
    EngramModel,
    Fact,
    MemoryEditor,
    get_engram_model,
    register_architecture,
)
from engram.models import ARCHITECTURES, DecoderLayout
from engram.testing import TINY_CONFIGS, assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.versions import MODEL_TYPES


def batch():
    rows = tiny_tokenizer()(["def lookup(self, ids): return", "The memory, the"], return_tensors="pt", padding=True)
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}


def test_every_architecture_has_a_tiny_model():
    assert set(TINY_CONFIGS) == set(ARCHITECTURES)


def test_documents_count_the_architectures():
    root = Path(__file__).parents[2]
    assert f"({len(ARCHITECTURES)} architectures" in (root / "README.md").read_text()
    assert f"the {len(ARCHITECTURES)} of `engram.models.ARCHITECTURES`" in (root / "docs" / "guides.md").read_text()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attach_speak_and_leave(model_type):
    model = tiny_model(model_type)
    assert model.config.model_type == model_type  # the whole model, and not its text part
    attach_speak_and_leave(model, 4 if model_type in ("deepseek_v4", "hy_v4_vl") else 1)


def in_two(memory, ids):
    """Logits of the first tokens, and of the others on the cache that these leave; one of recurrent states alone takes a single token."""
    count = -1 if memory.config.model_type in ("mamba", "mamba2") else 4
    first = memory(input_ids=ids[:, :count], use_cache=True)
    name = next((name for name in ("past_key_values", "cache_params") if name in first), None)
    cache = {} if name is None else {name: first[name]}  # recurrent_gemma keeps its states itself
    rest = memory(input_ids=ids[:, count:], use_cache=True, **cache)
    return torch.cat([first.logits, rest.logits], dim=1)


def attach_speak_and_leave(model, streams=1):
    """Zero tables change nothing, a memory that speaks is heard and decodes as it prefills, unloading leaves no trace."""
    inputs = batch()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        before = model(**inputs).logits
        memory = get_engram_model(model, tiny_config(), tiny_tokenizer())
        assert memory.engram_config.hc_mult == streams
        assert torch.equal(memory(**inputs).logits, before)
        memory.unload()
        memory = tiny_memory(model)
        spoken = memory(**inputs).logits
        assert not torch.allclose(spoken, before, atol=1e-3)
        with memory.disable_engram():
            assert torch.equal(memory(**inputs).logits, before)
        ids = inputs["input_ids"][:1]
        full = memory(input_ids=ids, use_cache=False).logits
        chunked = in_two(memory, ids)
        with memory.disable_engram():  # the base model's own error is the yardstick: sparse attention may round differently
            base_error = (in_two(memory, ids) - memory(input_ids=ids, use_cache=False).logits).abs().max()
        assert_close(chunked, full, max(1e-5, 20 * float(base_error)))
        assert torch.equal(memory.unload()(**inputs).logits, before)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generation_with_a_cache_is_generation_without(model_type):
    """Greedy and with beams, which move the state about; one row is padded on the left."""
    memory = tiny_memory(tiny_model(model_type), max_ngram_size=4)
    common = {**batch(), "max_new_tokens": 8, "do_sample": False}
    assert bool((common["attention_mask"][:, 0] == 0).any())
    for options in ({**common, "num_beams": beams} for beams in (1, 3)):
        assert torch.equal(memory.generate(**options), memory.generate(**options, use_cache=False))


def test_a_model_that_takes_pictures_too(tmp_path):
    model = tiny_model("gemma3", hidden_size=64, intermediate_size=96)
    memory, common = tiny_memory(model, max_ngram_size=4), {**batch(), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(memory.generate(**common, cache_implementation="static"), memory.generate(**common, use_cache=False))
    ids = torch.tensor([[5, 371, 370, 370, 370, 370, 372, 6, 7]])
    picture = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 28, 28), "token_type_ids": (ids == 370).long()}
    with torch.no_grad():
        with memory.disable_engram():
            base = memory(**picture).logits
        assert not torch.allclose(memory(**picture).logits, base, atol=1e-3)
    memory.unload()
    editor = MemoryEditor.create(model, tiny_tokenizer())
    editor.teach([Fact(prompts=("CAPITAL:France",), answer="Paris", id="france")])
    assert all(editor.verify().values())
    editor.save(tmp_path)
    editor.memory.unload()
    assert all(MemoryEditor.load(model, tmp_path, tiny_tokenizer()).verify().values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "pixels", "grid", "tokens"),
    [
        ("llava", (1, 3, 28, 28), None, 4),
        ("qwen2_5_vl", (16, 3 * 2 * 14 * 14), [[1, 4, 4]], 4),
        ("mistral3", (1, 3, 56, 28), None, 2),
    ],
)
def test_pictures_and_memory_go_together(model_type, pixels, grid, tokens):
    """Made by AutoModelForImageTextToText alone: silent, heard, switched off and unloaded as a model of text is."""
    torch.manual_seed(0)
    ids = torch.tensor([[5, 372, *[370] * tokens, 373, 6, 7, 8]])
    picture = {"input_ids": ids, "pixel_values": torch.rand(pixels)}
    picture |= {} if grid is None else {"image_grid_thw": torch.tensor(grid), "mm_token_type_ids": (ids == 370).int()}
    picture |= {"image_sizes": torch.tensor([[56, 28]])} if model_type == "mistral3" else {}
    model = tiny_model(model_type)
    before = model(**picture).logits
    assert not torch.allclose(model(**{**picture, "pixel_values": 1 - picture["pixel_values"]}).logits, before, atol=1e-4)
    memory = tiny_memory(model)
    assert not torch.allclose(memory(**picture).logits, before, atol=1e-3)
    with memory.disable_engram():
        assert torch.equal(memory(**picture).logits, before)
    options = {**picture, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(memory.generate(**options), memory.generate(**options, use_cache=False))
    assert torch.equal(memory.unload()(**picture).logits, before)


def test_unload_gives_back_trainable_flags():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    memory = get_engram_model(model, tiny_config(), tiny_tokenizer())
    assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.requires_grad for name, p in memory.unload().named_parameters()} == flags
    with pytest.raises(AttachError, match="unloaded"):
        memory(**batch())
    with pytest.raises(AttachError, match="unloaded"):
        memory.generate(**batch())


def test_print_trainable_parameters(capsys):
    memory = tiny_memory()
    memory.print_trainable_parameters()
    out = capsys.readouterr().out
    kinds = memory.num_parameters_by_kind()
    assert f"tables {kinds['tables']:,}" in out
    assert f"trainable params: {kinds['tables'] + kinds['reader']:,}" in out
    assert kinds["base"] == sum(p.numel() for p in memory.base_model.parameters())
    assert memory.table_config.dtype == "float32"


def test_what_is_assigned_for_the_base_model_reaches_it():
    memory = tiny_memory()
    memory.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    assert memory(**batch(), labels=batch()["input_ids"]).loss == 7
    config = type(memory.config)(**{**memory.config.to_dict(), "use_cache": False})
    memory.config = config
    assert memory.base_model.config is config
    assert memory.unload().config is config


class Hub:
    """What the hub's client is asked to do; uploaded files lie under ``folder`` as links, as in the hub's cache."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
        self.calls.append((repo_id, commit_message))
        for folder in (self.folder, self.folder / "blobs"):
            folder.mkdir(exist_ok=True)
        for old in filter_repo_objects([path.name for path in self.folder.iterdir()], allow_patterns=delete_patterns):
            (self.folder / old).unlink()
        for name in filter_repo_objects(os.listdir(folder_path), allow_patterns=allow_patterns):
            shutil.copy(os.path.join(folder_path, name), self.folder / "blobs" / name)
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).symlink_to(self.folder / "blobs" / name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


def test_a_memory_is_pushed_to_the_hub_and_not_its_base(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "snapshot")
    monkeypatch.setattr("engram.models.hub.HfApi", hub)
    memory, inputs = tiny_memory(), batch()
    memory.push_to_hub("mine")
    with torch.no_grad():
        memory.engrams["0"].value_proj.weight.mul_(2)
        expected = memory(**inputs).logits
    assert memory.push_to_hub("mine", private=True, token="t", commit_message="again") == "https://hub/me/mine"
    assert hub.calls[3:] == [("token", "t"), ("mine", True, True), ("me/mine", "again")]
    names = sorted(path.name for path in hub.folder.iterdir() if path.is_symlink())
    assert [name.split("-")[0] for name in names] == ["engram", "engram.json"]
    memory.unload()
    with torch.no_grad():
        assert torch.equal(EngramModel.from_pretrained(tiny_model(), hub.folder, tiny_tokenizer())(**inputs).logits, expected)


def test_saving_takes_no_options_that_it_would_not_heed(tmp_path):
    with pytest.raises(TypeError, match="push_to_hub"):
        tiny_memory().save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_ids": [0, 3]}, r"got \[3\], expected 0..2"),
        ({"hidden_size": 99}, "got 99, expected 32"),
        ({"hc_mult": 4}, "got 4, expected 1"),
        ({"pad_id": 100_000}, "pad_id"),
    ],
)
def test_config_that_does_not_fit_is_refused_before_anything_is_touched(changes, message):
    model = tiny_model()
    with pytest.raises(ConfigError, match=message):
        get_engram_model(model, tiny_config(**changes), tiny_tokenizer())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_that_do_not_fit_are_refused():
    memory = tiny_memory()
    with pytest.raises(AttachError, match="has a memory already"):
        get_engram_model(memory.base_model, tiny_config(), tiny_tokenizer())
    with pytest.raises(AttachError, match="expected a transformers model"):
        get_engram_model(torch.nn.Linear(2, 2), tiny_config(), tiny_tokenizer())
    with pytest.raises(AttachError, match="not its bare decoder"):
        get_engram_model(tiny_model().model, tiny_config(), tiny_tokenizer())
    with pytest.raises(AttachError, match="embeddings 300"):
        get_engram_model(tiny_model(vocab_size=300), tiny_config(), tiny_tokenizer())
    with pytest.raises(ConfigError, match="expected an EngramConfig"):
        get_engram_model(tiny_model(), {"layer_ids": [1]}, tiny_tokenizer())
    with pytest.raises(ConfigError, match="expected the model's Hugging Face tokenizer"):
        get_engram_model(tiny_model(), tiny_config(), 7)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_of_a_model_in_peft_the_model_itself_is_asked_for():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    message = r"^got a PeftModelForCausalLM, expected the model in it: give model.get_base_model\(\)"
    with pytest.raises(AttachError, match=message):
        get_engram_model(adapted, tiny_config(), tiny_tokenizer())
    with pytest.raises(AttachError, match=message):
        MemoryEditor.create(adapted, tiny_tokenizer())
    get_engram_model(adapted.get_base_model(), tiny_config(), tiny_tokenizer()).unload()


def test_unknown_architecture_can_be_registered(monkeypatch):
    model = tiny_model()
    model.config.model_type = "my_llama"
    with pytest.raises(AttachError, match="register_architecture"):
        get_engram_model(model, tiny_config(), tiny_tokenizer())
    monkeypatch.setattr("engram.models.architectures.ARCHITECTURES", dict(ARCHITECTURES))
    register_architecture("my_llama", DecoderLayout("model", "layers"))
    get_engram_model(model, tiny_config(), tiny_tokenizer()).unload()
    with pytest.raises(AttachError, match="already registered"):
        register_architecture("my_llama", DecoderLayout("model", "h"))


def test_branches_are_told_apart():
    """On four residual streams each has a gate of its own."""
    memory = tiny_memory(tiny_model("deepseek_v4"))
    with torch.no_grad(), memory.record() as traces:
        memory(**batch())
    gate = traces[2]["gate"]
    assert gate.shape[-1] == 4
    assert not torch.allclose(gate[..., 0], gate[..., 1])
    assert traces[0]["hash_ids"].shape[-1] == memory.engram_config.num_heads


def test_config_errors_name_the_field():
    for changes, message in (
        ({"max_ngram_size": 1}, "max_ngram_size: got 1"),
        ({"engram_vocab_size": [5]}, "engram_vocab_size"),
        ({"layer_ids": []}, "layer_ids"),
        ({"layer_ids": [1, 1]}, "layer_ids"),
        ({"n_embed_per_ngram": 10, "n_head_per_ngram": 4}, "multiple of n_head_per_ngram"),
        ({"gate": "tanh"}, "gate: got 'tanh'"),
        ({"table_init": "ones"}, "table_init"),
        ({"use_bias": 1}, "use_bias"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"pad_id": -1}, "pad_id"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm_eps": "a"}, "norm_eps: got 'a', expected a positive number"),
        ({"conv_norm_eps": None}, "conv_norm_eps: got None, expected a positive number"),
        ({"layer_ids": 1}, "layer_ids: got 1, expected a list of"),
        ({"layer_ids": None}, "layer_ids: got None"),
        ({"engram_vocab_size": 1.5}, "engram_vocab_size: got 1.5, expected 2 positive ints"),
    ):
        with pytest.raises(ConfigError, match=message):
            EngramConfig(**changes)
    with pytest.raises(ConfigError, match="unknown key"):
        EngramConfig.from_dict({"layers": [1]})
    config = EngramConfig(engram_vocab_size=7, max_ngram_size=4, layer_ids=[3])
    assert config.engram_vocab_size == (7, 7, 7)
    assert EngramConfig.from_dict(config.to_dict()) == config
