"""What people do with a memory, on a GPU: generate with a static cache, compile, train in 16 bits and resume, teach, place."""

import math

import pytest
import torch
from transformers import StaticCache

from engram import EngramTrainer, EngramTrainingArguments, TableConfig, TableError, get_engram_model
from engram.models import StaticDecoder
from engram.testing import assert_close, tiny_config, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor, same, tensors
from tests.training.test_trainer import Rows, fields_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of whatever versions that machine has
]

DEVICE = "cuda"
IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(5))
NEW = 12


def memory_on_the_device(tier="device", **changes):
    config = tiny_config(**{"table_init": "normal", **changes})
    return get_engram_model(tiny_model().to(DEVICE), config, tiny_tokenizer(), TableConfig(tier=tier)).eval()


def greedy(step, ids, cache):
    """Tokens that ``step`` (a forward pass) finds likeliest, one by one, on one cache."""
    tokens, given = ids, ids
    with torch.no_grad():
        for _ in range(NEW):
            logits = step(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
            given = logits.argmax(-1, keepdim=True).clone()
            tokens = torch.cat([tokens, given], dim=1)
    return tokens


@pytest.mark.parametrize("tier", ["device", "host"])
def test_generating_with_a_static_cache(tier):
    memory, ids = memory_on_the_device(tier), IDS.to(DEVICE)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    expected = memory.generate(ids, **options)
    for _ in range(2):  # what a first call left behind must not reach the second
        assert torch.equal(memory.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_compiled_model_that_replays_graphs(tier):
    memory, ids = memory_on_the_device(tier), IDS.to(DEVICE)
    expected = greedy(memory, ids, StaticCache(config=memory.base_model.config, max_cache_len=64))
    compiled = torch.compile(memory, mode="reduce-overhead")
    for _ in range(2):
        got = greedy(compiled, ids, StaticCache(config=memory.base_model.config, max_cache_len=64))
        assert torch.equal(got, expected)


def test_a_table_is_made_on_the_device():
    memory = memory_on_the_device(table_init="zero")
    table = memory.engrams["0"].table
    assert table.weight.device.type == DEVICE
    cpu = get_engram_model(tiny_model(), tiny_config(table_init="zero"), tiny_tokenizer()).eval()
    with torch.no_grad():
        assert_close(
            memory(input_ids=IDS.to(DEVICE), use_cache=False).logits.cpu(), cpu(input_ids=IDS, use_cache=False).logits, 1e-4
        )


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("bf16", [False, True])
def test_training_and_resuming(tmp_path, tier, bf16):
    def trainer(steps):
        memory = memory_on_the_device(tier, table_init="zero")
        saving = {"save_strategy": "steps", "save_steps": 4}
        training = {"max_steps": steps, "bf16": bf16, "train_backbone": True, "backbone_optimizer": "muon"}
        fields = fields_for(tmp_path, **saving, **training, use_cpu=DEVICE == "cpu")
        return EngramTrainer(memory, EngramTrainingArguments(**fields), train_dataset=Rows())

    straight = trainer(8)
    straight.train()
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(math.isfinite(loss) for loss in losses)
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert_close(torch.tensor(again)[-4:], torch.tensor(losses)[-4:], 1e-2 if bf16 else 1e-4)


def test_teaching_and_forgetting():
    editor = make_editor()
    editor.memory.to(DEVICE)
    report = editor.teach(FACTS)
    assert (len(report.taught), report.not_exact) == (len(FACTS), {})
    before = tensors(editor)
    editor.teach([FACTS[0]])  # known already
    assert same([t.cpu() for t in tensors(editor)], [t.cpu() for t in before])
    editor.forget(["door"])
    assert [fact.id for fact in editor.facts] == ["alpha", "beta"]
    assert editor.why(FACTS[1].prompts[0]).facts


def test_rows_that_pass_through_the_cpu_are_refused_before_a_capture(tmp_path):
    place = TableConfig(tier="mmap", path=str(tmp_path / "rows"))
    memory = get_engram_model(tiny_model().to(DEVICE), tiny_config(), tiny_tokenizer(), place).eval()
    memory.prefetch_rows = False
    decoder = StaticDecoder(memory, max_length=32)
    decoder.prefill(IDS.to(DEVICE))
    with pytest.raises(TableError, match="a graph cannot repeat"):
        decoder.step(torch.tensor([5, 6], device=DEVICE))
    torch.zeros(1, device=DEVICE).add_(1)  # the device is none the worse for it
