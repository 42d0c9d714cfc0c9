import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engram import CheckpointError, EngramConfig, EngramModel, get_engram_model
from engram.checkpoint import read_description
from engram.testing import assert_close, tiny_config, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, logits, make_editor
from tests.versions import needs_torch_2_7

PROMPTS = ["KEY:beta 20 7319", "The memory is", "What is alpha 17? blue window"]


@pytest.fixture(scope="module")
def editor():
    editor = make_editor()
    editor.teach(FACTS)
    return editor


@torch.no_grad()
def test_full_equals_chunked_equals_token_by_token_with_left_padding(editor):
    batch = tiny_tokenizer()(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    memory = editor.memory
    full = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for cuts in ([3], [1, 5], list(range(1, ids.shape[1]))):
        cache, parts = None, []
        for start, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
            out = memory(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        real = mask.bool()
        assert_close(torch.cat(parts, 1)[real], full[real], 1e-4)
    for row, text in enumerate(PROMPTS):
        alone = logits(editor, text)[0]
        assert_close(full[row][mask[row].bool()], alone, 1e-4)


def test_the_gradient_of_a_reader_is_zero_where_no_row_is_read():
    memory = get_engram_model(tiny_model(), tiny_config(verify_rows=True, use_conv=False), tiny_tokenizer())
    ids = tiny_tokenizer()("The memory is", return_tensors="pt")["input_ids"]
    memory(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    readers = {name: p for name, p in memory.engrams.named_parameters() if p.requires_grad and ".embedding." not in name}
    assert readers
    assert all(p.grad is not None and not p.grad.any() for p in readers.values())


@needs_torch_2_7("it compiles no forward pass of newer models")
def test_compiled_equals_eager(editor):
    ids = tiny_tokenizer()("KEY:beta 20", return_tensors="pt")["input_ids"]
    compiled = torch.compile(editor.memory, backend="eager")
    with torch.no_grad():
        assert_close(compiled(input_ids=ids, use_cache=False).logits, editor.memory(input_ids=ids, use_cache=False).logits)


def test_rows_that_are_damaged_are_refused(editor, tmp_path):
    editor.save(tmp_path)
    description = read_description(tmp_path)
    file = tmp_path / description["weights"]["file"]
    whole = load_file(file)
    assert not any("proj" in name or "norm" in name for name in whole)  # the reader follows from the seed
    prefix = "layers.2.multi_head_embedding.embedding."
    base = make_editor().memory
    for name, change in [
        ("row_ids", lambda x: x.flip(0)),
        ("tags", lambda x: x * 0),
        ("row_ids", lambda x: x + 10**15),
        ("tags", lambda x: x[1:]),
    ]:
        save_file({**whole, prefix + name: change(whole[prefix + name]).contiguous()}, file)
        text = (tmp_path / "engram.json").read_text()
        entry = {"file": file.name, "bytes": file.stat().st_size}  # without the checksum, which would notice first
        (tmp_path / "engram.json").write_text(json.dumps({**description, "weights": entry}))
        with pytest.raises(CheckpointError, match="out of order or out of range"):
            base.load_memory(tmp_path)
        (tmp_path / "engram.json").write_text(text)
        assert base.engrams["2"].table.stored_rows == 0
    save_file(whole, file)
    entry = {"file": file.name, "bytes": file.stat().st_size}
    (tmp_path / "engram.json").write_text(json.dumps({**description, "weights": entry, "reader_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="the reader that follows from seed"):
        base.load_memory(tmp_path)


def test_a_reader_may_be_trained_and_is_saved_then(tmp_path):
    editor = make_editor(reader="trained")
    editor.teach(FACTS)
    editor.save(tmp_path)
    assert all(editor.verify().values())
    base = editor.memory.unload()
    again = EngramModel.from_pretrained(base, tmp_path, tiny_tokenizer())
    assert torch.equal(again.engrams["2"].value_proj.weight, editor.memory.engrams["2"].value_proj.weight)
    assert again.num_parameters_by_kind()["tables"] == editor.table("2").weight.numel()


def test_the_teaching_configuration_round_trips():
    config = EngramConfig.for_teaching(layer_ids=(3,), seed=4)
    assert EngramConfig.from_dict(config.to_dict()) == config
    assert (config.verify_rows, config.longest_only, config.reader, config.hash_spec) == (True, True, "seeded", "exact_v1")
