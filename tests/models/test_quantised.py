"""A memory on a base model in 4 or 8 bits: trained, taught, saved, and loaded on the same model in full precision and back."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engram import CheckpointError, ConfigError, EngramModel, Fact, FingerprintError, MemoryEditor, get_engram_model
from engram.cli.main import app
from engram.evaluation import ask
from engram.models import load_model
from engram.models.identity import base_identity, identity_mismatch
from engram.models.quantised import gradients_pass, is_quantised, parameter_count
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.training.test_trainer import Rows, losses, make

bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks for it
]

FACTS = [Fact(("ACRONYM:GPU",), "Graphics", id="gpu")]
SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in full precision: large enough that bitsandbytes lays 4-bit weights out anew for CPUs that can read them so."""
    place = tmp_path_factory.mktemp("base") / "full"
    tiny_model(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=4).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def in_bits(folder, bits, **changes):
    config = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 8: {"load_in_8bit": True}}[bits]
    config = transformers.BitsAndBytesConfig(**config, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


@pytest.fixture(scope="module")
def folder4(folder):
    """The same, saved in 4 bits."""
    place = folder.parent / "four"
    in_bits(folder, 4).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def full(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def memory_on(base):
    torch.manual_seed(3)
    return get_engram_model(base, tiny_config(), tiny_tokenizer())


def state(memory):
    return {name: p.detach().clone() for name, p in memory.engrams.named_parameters()}


def own_words(caplog):
    """What this library has logged; bitsandbytes has words of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("engram")]


@torch.no_grad()
def run(model):
    return model(input_ids=torch.arange(2, 26).view(2, 12)).logits


@BITS
def test_a_memory_on_a_quantised_base_is_trained_and_resumes_exactly(folder, tmp_path, bits):
    straight = make(
        tmp_path / "straight", memory_on(in_bits(folder, bits)), held_out=Rows(8), eval_strategy="steps", eval_steps=2, **SAVING
    )
    before = state(straight.memory)
    straight.train()
    assert all(not torch.equal(p, before[name]) for name, p in state(straight.memory).items() if "norm" not in name)
    resumed = make(tmp_path / "resumed", memory_on(in_bits(folder, bits)), **SAVING)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert losses(resumed) == losses(straight)
    after = state(resumed.memory)
    assert all(torch.equal(p, after[name]) for name, p in state(straight.memory).items())
    straight.save_model(tmp_path / "saved")
    base = in_bits(folder, bits)
    loaded = EngramModel.from_pretrained(base, tmp_path / "saved", tiny_tokenizer())
    assert torch.equal(run(loaded.eval()), run(straight.memory.eval()))


@BITS
def test_lora_and_a_memory_are_trained_together_on_a_quantised_base(folder, tmp_path, bits):
    peft = pytest.importorskip("peft")

    def made():
        base = in_bits(folder, bits)
        torch.manual_seed(5)
        peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        return memory_on(base)

    straight = make(tmp_path / "straight", made(), **SAVING)
    straight.train()
    resumed = make(tmp_path / "resumed", made(), **SAVING)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert losses(resumed) == losses(straight)
    moved = [p for name, p in straight.backbone.named_parameters() if "lora_B" in name]
    assert moved
    assert all(bool(p.any()) for p in moved)


@BITS
@pytest.mark.parametrize("plain", [False, True])
def test_quantised_weights_are_not_trained(folder, tmp_path, bits, plain):
    base = in_bits(folder, bits)
    with pytest.raises(ConfigError, match=r"train_backbone: got True with a quantised base model.*expected False"):
        make(tmp_path, base if plain else memory_on(base), train_backbone=True)


def test_a_base_whose_method_passes_no_gradients_is_refused(folder, tmp_path, monkeypatch):
    memory = memory_on(in_bits(folder, 4))
    monkeypatch.setattr(type(memory.base_model.hf_quantizer), "is_trainable", False)
    with pytest.raises(ConfigError, match="quantised by bitsandbytes, whose weights pass no gradients"):
        make(tmp_path, memory)


@pytest.mark.parametrize("changes", [{}, {"bnb_4bit_use_double_quant": True}], ids=["one scale", "scales of scales"])
def test_gradients_pass_a_base_that_ran_before(folder, changes):
    """bitsandbytes lays 4-bit weights out anew in evaluation mode; no gradient passed them then, and going back lost the scales."""

    def gradients(memory):
        memory.zero_grad()
        ids = torch.arange(2, 26).view(2, 12)
        memory(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in memory.engrams.named_parameters() if p.grad is not None}

    def made():
        memory = tiny_memory(in_bits(folder, 4, **changes))
        memory.engrams.requires_grad_(True)
        return memory.train()

    wanted = gradients(made())
    memory = made()
    run(memory.eval())
    first = run(memory)
    found = gradients(memory.train())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].to_dense(), wanted[name].to_dense()) for name in wanted)
    assert torch.equal(run(memory.eval()), first)
    with gradients_pass(memory.base_model):
        run(memory)
        found = gradients(memory)
    assert all(torch.equal(found[name].to_dense(), wanted[name].to_dense()) for name in wanted)


def test_scales_that_were_rounded_before_a_memory_came_are_told_of(folder, caplog):
    base = in_bits(folder, 4)
    layer = base.model.layers[0].mlp.up_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this processor reads 4-bit weights as they are")
    with torch.no_grad():
        stream = torch.randn(3, 128)
        as_loaded = layer.train()(stream)
    run(base.eval())
    with caplog.at_level(logging.WARNING, "engram"):
        memory_on(base).train()
    assert "ran before a memory was attached" in caplog.text
    with torch.no_grad():  # rounded, but not transposed
        assert (layer(stream) - as_loaded).abs().max() < 0.01 * as_loaded.abs().max()


@BITS
def test_a_quantised_model_is_the_same_after_it_ran(folder, bits):
    base = in_bits(folder, bits)
    before = base_identity(base)
    run(base)
    assert base_identity(base) == before
    assert before["quantized"]
    assert is_quantised(base)
    assert not base_identity(full(folder))["quantized"]
    assert not identity_mismatch(before, base_identity(full(folder)))


def test_other_models_are_told_apart_by_what_is_not_quantised(folder, tmp_path):
    other = full(folder)
    with torch.no_grad():
        other.model.embed_tokens.weight[:5] += 1
    other.save_pretrained(tmp_path / "embeddings")
    with torch.no_grad():
        other.model.embed_tokens.weight[:5] -= 1
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "norm")
    memory = memory_on(in_bits(folder, 4))
    memory.save_pretrained(tmp_path / "memory")
    with pytest.raises(
        FingerprintError, match=r"embedding_sha256.*Made on a base that is quantised, and this one is not quantised"
    ):
        EngramModel.from_pretrained(full(tmp_path / "embeddings"), tmp_path / "memory", tiny_tokenizer())
    with pytest.raises(FingerprintError, match="weights_sha256"):
        EngramModel.from_pretrained(in_bits(tmp_path / "norm", 4), tmp_path / "memory", tiny_tokenizer())


@pytest.mark.parametrize("trained", [False, True])
def test_a_memory_goes_from_full_precision_to_4_bits_and_back(folder, tmp_path, trained, caplog):
    def made(base):
        if trained:
            return tiny_memory(base)
        editor = MemoryEditor.create(base, tiny_tokenizer())
        editor.teach(FACTS)
        return editor.memory

    for name, base in (("full", full(folder)), ("four", in_bits(folder, 4)), ("eight", in_bits(folder, 8))):
        made(base).save_pretrained(tmp_path / name)
    with caplog.at_level(logging.WARNING, "engram"):
        for name in ("full", "four", "eight"):
            for base in (full(folder), in_bits(folder, 4), in_bits(folder, 8)):
                memory = EngramModel.from_pretrained(base, tmp_path / name, tiny_tokenizer())
                if not trained:
                    assert ask(memory, tiny_tokenizer(), ["ACRONYM:GPU"]) == ["Graphics"]
    assert not own_words(caplog)


def test_facts_are_taught_and_asked_for_on_4_bits_without_a_warning(folder4, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "engram"):
        base, tokenizer = load_model(folder4)
        editor = MemoryEditor.create(base, tokenizer)
        editor.teach(FACTS)
        editor.save(tmp_path / "facts")
        editor.teach([Fact(("CAPITAL:France",), "Paris", id="paris")])
        assert all(editor.verify().values())
        editor.save(tmp_path / "facts")
        for command in (["ask", "ACRONYM:GPU"], ["why", "CAPITAL:France"]):
            done = CliRunner().invoke(app, [*command, "--memory", str(tmp_path / "facts")])
            assert done.exit_code == 0, done.output
            assert "Graphics" in done.output or "Paris" in done.output
        (tmp_path / "facts.jsonl").write_text('{"prompt": "ACRONYM:GPU", "answer": "Graphics"}\n')
        done = CliRunner().invoke(
            app,
            [
                "eval",
                "--facts",
                str(tmp_path / "facts.jsonl"),
                "--memory",
                str(tmp_path / "facts"),
                "--model",
                str(folder4.parent / "full"),
            ],
        )
        assert done.exit_code in (0, 1), done.output
    assert not own_words(caplog)


def test_a_memory_saved_before_quantisation_was_noted_loads(folder, tmp_path):
    base = in_bits(folder, 4)
    memory_on(base).save_pretrained(tmp_path)
    file = tmp_path / "engram.json"
    description = json.loads(file.read_text())
    del description["base_model"]["quantized"]
    description["base_model"]["weights_sha256"] = "of packed weights"
    file.write_text(json.dumps(description))
    EngramModel.from_pretrained(in_bits(folder, 4), tmp_path, tiny_tokenizer())
    with pytest.raises(FingerprintError, match="by an earlier version on a quantised form of this model"):
        EngramModel.from_pretrained(full(folder), tmp_path, tiny_tokenizer())


@BITS
def test_values_are_counted_and_not_bytes(folder, bits):
    memory = memory_on(in_bits(folder, bits))
    wanted = sum(p.numel() for p in full(folder).parameters())
    assert sum(map(parameter_count, memory.base_model.parameters())) == wanted
    assert memory.num_parameters_by_kind()["base"] == wanted


def test_a_missing_package_is_one_line(folder4, monkeypatch):
    def refuse(*args, **kwargs):
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes`\nmore")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match="Expected the package that reads its weights"):
        load_model(folder4)


RECIPE = """
data: {corpus: {folders: [{path: texts}], held_out_percent: 20}, seq_len: 32, held_out_by: file}
model: MODEL
train_backbone: BACKBONE
ENGRAM
tokens: 512
batch_size: 4
"""


@pytest.mark.parametrize("frozen", [True, False])
def test_engram_train_on_a_4_bit_model(folder4, tmp_path, frozen):
    (tmp_path / "texts").mkdir()
    for name in map(str, range(120)):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"The office of {name} is in Berlin, number {name}. " * 40)
    engram = "engram: {engram_vocab_size: 300, n_embed_per_ngram: 16, n_head_per_ngram: 4, layer_ids: [1]}"
    recipe = RECIPE.replace("MODEL", str(folder4)).replace("BACKBONE", str(not frozen).lower()).replace("ENGRAM", engram)
    (tmp_path / "run.yaml").write_text(recipe)
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")])
    if frozen:
        assert done.exit_code == 0, done.output
        assert (tmp_path / "out" / "memory" / "engram.json").is_file()
    else:
        assert isinstance(done.exception, ConfigError), done.output
        assert "train_backbone: got True" in str(done.exception)
