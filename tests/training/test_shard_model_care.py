"""What a divided model puts up with (types, gradients that not all have, saves that fail), and what it refuses."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from engram import (
    CheckpointError,
    ConfigError,
    EngramAdamW,
    EngramConfig,
    EngramError,
    EngramModel,
    Fact,
    MemoryEditor,
    TableConfig,
    get_engram_model,
    replicate_tables,
)
from engram.distributed import process_count, process_rank, whole
from engram.models import find_decoder, fsdp, shard_model
from engram.optim import build_param_groups
from engram.tables import are_equal_but_tables
from engram.testing import assert_close, play_scenarios, run_processes, tiny_config, tiny_model, tiny_tokenizer
from engram.training.balance import BalanceCallback, find_routers
from engram.training.weight_files import load_backbone, save_backbone
from tests.training.test_several_processes import Rows, assert_curves_agree, curve, run, trainer_for
from tests.versions import needs_torch_2_7

pytestmark = [pytest.mark.slow, needs_torch_2_7("shard_model refuses it")]

PROMPT = torch.arange(5, 17)[None]


def memory_on(model, **config):
    torch.manual_seed(0)
    return get_engram_model(model, tiny_config(**config), tiny_tokenizer())


def errors_of(*calls):
    """What each call that must fail says, with its type."""
    said = []
    for call in calls:
        with pytest.raises(EngramError) as error:
            call()
        said.append((type(error.value).__name__, str(error.value)))
    return said


# What the processes do ----------------------------------------------------------------------------------------------------------------


def in_bfloat16(folder):
    """A base model in bfloat16 that is trained, beside readers in float32."""
    trainer = run(folder, memory=memory_on(tiny_model().bfloat16()), shard=True, train_backbone=True, learning_rate=1e-3)
    kinds = {str(parameter.dtype) for parameter in trainer.backbone.parameters()}
    return {"curve": curve(trainer), "types": kinds, "readers": {str(p.dtype) for p in trainer.memory.engrams.parameters()}}


def not_everywhere(folder):
    """A weight of which the second process has no gradient."""
    memory = memory_on(tiny_model()).requires_grad_(True)
    norm = find_decoder(memory.base_model).blocks[1].input_layernorm
    if process_count() > 1:
        replicate_tables(memory)
        shard_model(memory)
    optimizer, data = EngramAdamW(build_param_groups(memory, memory, lr=1e-3)), Rows(masked=False)
    for step in range(2):
        loss = torch.zeros(())
        for rank in [process_rank()] if process_count() > 1 else [0, 1]:
            norm.weight.requires_grad_(True)
            ids = data[2 * step + rank]["input_ids"][None]
            handle = norm.register_forward_hook(lambda _, args, output: args[0]) if rank else None
            loss = loss + memory(input_ids=ids, labels=ids, use_cache=False).loss / (2 // process_count())
            if handle is not None:
                handle.remove()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"norm": whole(norm.weight.detach()), "last": whole(memory.base_model.lm_head.weight.detach())}


def came_with_others(folder):
    """The second process comes with one value and one buffer of its own, late in the model."""
    memory = memory_on(tiny_model())
    memory.base_model.register_buffer("bias", torch.zeros(4, dtype=torch.bool))
    equal = are_equal_but_tables(memory)
    with torch.no_grad():
        memory.base_model.lm_head.weight[-1, -1] += process_rank()
        memory.base_model.bias[3] = process_rank() == 1
    expected = memory.base_model.lm_head.weight.detach().clone()
    differ = not are_equal_but_tables(memory)
    shard_model(memory)
    return {
        "seen": (equal, differ),
        "weight": whole(memory.base_model.lm_head.weight.detach()),
        "first": expected if process_rank() == 0 else None,
        "buffer": bool(memory.base_model.bias[3]),
    }


def saves(folder):
    """Saves that the first process cannot make, and those that it can, in a loop of one's own."""
    (folder / "file").write_text("in the way")
    table = TableConfig(sharded=True)
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), table)
    shard_model(memory.requires_grad_(True))
    memory(input_ids=PROMPT, labels=PROMPT).loss.backward()
    blocked = folder / "file" / "memory"
    said = errors_of(lambda: memory.save_pretrained(blocked))
    with pytest.raises((CheckpointError, OSError)):
        save_backbone(memory.base_model, blocked)
    memory.save_pretrained(folder / "memory")
    there = (folder / "memory" / "engram.json").is_file()  # in every process, as soon as it is back
    save_backbone(memory.base_model, folder / "base")
    there = there and (folder / "base" / "model.safetensors").is_file()
    load_backbone(memory.base_model, folder / "base" / "model.safetensors")
    (folder / "other").mkdir(exist_ok=True)
    if process_rank() == 0:
        save_backbone(tiny_model(num_hidden_layers=6), folder / "other")
    torch.distributed.barrier()
    said += errors_of(lambda: load_backbone(memory.base_model, folder / "other" / "model.safetensors"))
    return {"said": said, "there": there}


def refused(folder):
    """Calls that would leave FSDP in no known state, or that it knows nothing of."""
    plain, mixed = tiny_model(), memory_on(tiny_model())
    find_decoder(mixed.base_model).blocks[1].input_layernorm.bfloat16()
    shard_model(mixed.requires_grad_(True))
    memory = shard_model(memory_on(tiny_model()))
    facts = EngramConfig.for_teaching(layer_ids=(2,), pad_id=1, seed=0)
    taught = shard_model(get_engram_model(tiny_model(), facts, tiny_tokenizer()))

    def in_inference_mode():
        with torch.inference_mode():
            memory(input_ids=PROMPT)

    def generate_in_inference_mode():
        with torch.inference_mode():
            memory.generate(PROMPT, max_new_tokens=2)

    said = errors_of(
        lambda: shard_model(plain),
        lambda: mixed(input_ids=PROMPT, labels=PROMPT),
        in_inference_mode,
        generate_in_inference_mode,
        lambda: memory.base_model(input_ids=PROMPT),
        lambda: MemoryEditor(taught, tiny_tokenizer()),
    )
    with torch.no_grad():  # none of it did harm
        memory(input_ids=PROMPT)
    memory.requires_grad_(True)(input_ids=PROMPT, labels=PROMPT).loss.backward()
    return said


def typed_output(folder):
    """bfloat16 within, float32 out of the whole alone."""
    seen, memory = [], memory_on(tiny_model())
    for block in find_decoder(memory.base_model).blocks:
        block.register_forward_hook(
            lambda _, __, output: seen.append(output[0].dtype if isinstance(output, tuple) else output.dtype)
        )
    shard_model(memory, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    with torch.no_grad():
        return {"logits": memory(input_ids=PROMPT).logits.dtype, "within": set(seen)}


def divided_at_load(folder):
    """A base model that transformers divides while it loads it, beside one that is loaded whole; trained, and resumed."""
    if process_rank() == 0:
        tiny_model().save_pretrained(folder / "base")
    torch.distributed.barrier()

    def on(**options):
        return memory_on(AutoModelForCausalLM.from_pretrained(folder / "base", **options))

    def train(name, memory, resume=None):
        trainer = trainer_for(folder / name, memory=memory, shard=True, train_backbone=True)
        trainer.train(resume_from_checkpoint=resume)
        return curve(trainer)

    in_parts = {"distributed_config": DistributedConfig(fsdp_size=2)}
    result = {"whole": train("whole", on()), "parts": train("parts", on(**in_parts))}
    result["resumed"] = train("parts", on(**in_parts), str(folder / "parts" / "checkpoint-4"))
    alone, called = on(**in_parts), on(**in_parts)
    with torch.no_grad():
        called.base_model(input_ids=PROMPT)
    result["said"] = errors_of(
        lambda: trainer_for(folder / "alone", memory=alone),
        lambda: alone.save_pretrained(folder / "alone"),
        lambda: shard_model(called),
    )
    return result


def balanced(folder):
    """A router whose bias is a parameter, which FSDP divides."""
    memory = memory_on(tiny_model("ernie4_5_moe"))
    callbacks = [BalanceCallback(memory, 0.1)]
    trainer = trainer_for(
        folder, memory=memory, shard=True, train_backbone=True, max_steps=2, callbacks=callbacks, save_strategy="no"
    )
    trainer.train()
    return {name: whole(router.e_score_correction_bias.detach()) for name, router in find_routers(memory).items()}


def facts_read_by_one(folder):
    """The reader of a taught memory, trained on batches of which the second process's read nothing; then saved, and read by a divided model."""
    config = EngramConfig.for_teaching(layer_ids=(2,), pad_id=1, seed=0).replace(reader="trained")
    editor = MemoryEditor(get_engram_model(tiny_model(), config, tiny_tokenizer()), tiny_tokenizer())
    editor.teach([Fact(("KEY:alpha 17",), "blue window", id="alpha")])
    texts = [tiny_tokenizer()("KEY:alpha 17 blue window")["input_ids"], None]
    texts[1] = [7] * len(texts[0])
    data = [
        {"input_ids": torch.tensor(texts[number // 4 % 2]), "labels": torch.tensor(texts[number // 4 % 2])}
        for number in range(16)
    ]
    trainer = trainer_for(folder, memory=editor.memory, train_tables=False, logging_steps=50, max_steps=2, save_strategy="no")
    trainer.train_dataset = data
    trainer._get_train_sampler = lambda *_: SequentialSampler(data)
    trainer.train()
    return {name: p.detach().clone() for name, p in editor.memory.engrams.named_parameters()}


def taught_to_a_divided_base(folder):
    """A memory that was saved, on a base model that was divided while it was loaded."""
    if process_rank() == 0:
        tiny_model().save_pretrained(folder / "base")
        editor = MemoryEditor.create(AutoModelForCausalLM.from_pretrained(folder / "base"), tiny_tokenizer())
        editor.teach([Fact(("KEY:alpha 17",), "blue window", id="alpha")])
        editor.memory.save_pretrained(folder / "memory")
    torch.distributed.barrier()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=DistributedConfig(fsdp_size=2))
    memory = shard_model(EngramModel.from_pretrained(base, folder / "memory", tiny_tokenizer()))
    ids = tiny_tokenizer()("KEY:alpha 17", return_tensors="pt")["input_ids"]
    out = memory.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    return {"said": tiny_tokenizer().decode(out, skip_special_tokens=True).strip()}


def one_ends_sooner(folder):
    """Processes that generate together, with rows in both; the second one's text ends after two tokens."""
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), TableConfig(sharded=True))
    out = memory.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=None)
    stop = [int(out[0, PROMPT.shape[1] + 1])] if process_rank() else None
    length = memory.generate(PROMPT, max_new_tokens=6, do_sample=False, eos_token_id=stop, pad_token_id=1).shape[1]
    return {"tokens": length - PROMPT.shape[1]}


def otherwise_divided(folder):
    """Adapters that came too late, and a checkpoint of a model that was divided otherwise."""
    late = shard_model(memory_on(tiny_model()))
    peft.get_peft_model(late.base_model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    options = {"train_backbone": True, "max_steps": 2, "save_steps": 2}
    trainer_for(folder, {"sharded": True}, **options).train()
    again = trainer_for(folder, {"sharded": True}, shard=True, **{**options, "max_steps": 4})
    return errors_of(lambda: again.train(resume_from_checkpoint=True), lambda: trainer_for(folder / "late", memory=late))


ALL = (
    in_bfloat16,
    not_everywhere,
    came_with_others,
    saves,
    refused,
    typed_output,
    divided_at_load,
    balanced,
    facts_read_by_one,
    taught_to_a_divided_base,
    one_ends_sooner,
    otherwise_divided,
)
SCENARIOS = {f.__name__: f for f in ALL}

# What comes of it ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run_processes("tests.training.test_shard_model_care", tmp_path_factory.mktemp("care"))


def test_a_base_model_in_bfloat16_is_trained_beside_readers_in_float32(seen, tmp_path):
    alone = in_bfloat16(tmp_path)
    for result in (part["in_bfloat16"] for part in seen):
        assert result["types"] == alone["types"] == {"torch.bfloat16"}
        assert result["readers"] == {"torch.float32"}
        assert_curves_agree(result["curve"], alone["curve"], 2e-2, 0.2)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="FSDP fills in gradients from torch 2.13 on"
)
def test_a_weight_may_have_a_gradient_in_one_process_alone(seen, tmp_path):
    alone = not_everywhere(tmp_path)
    for result in (part["not_everywhere"] for part in seen):
        for name, weights in alone.items():
            assert_close(result[name], weights, 1e-4)
            assert torch.equal(result[name], seen[0]["not_everywhere"][name])


def test_a_late_difference_between_processes_is_seen(seen):
    for result in (part["came_with_others"] for part in seen):
        assert result["seen"] == (True, True)
        assert torch.equal(result["weight"], seen[0]["came_with_others"]["first"])
        assert result["buffer"] is False


def test_a_save_that_fails_in_one_process_fails_in_all(seen):
    for rank, result in enumerate(part["saves"] for part in seen):
        (kind, failed), (_, unfit) = result["said"]
        assert kind == "CheckpointError"
        assert ("another process could not save its part" in failed) == (rank > 0)
        assert "tensors that it has not, first model.layers." in unfit
        assert result["there"]


def test_what_would_do_harm_is_refused(seen):
    for said in (part["refused"] for part in seen):
        plain, mixed, inference, generated, alone, editor = said
        assert plain == ("ConfigError", plain[1])
        assert "expected an EngramModel" in plain[1]
        assert "bfloat16 and float32 that are trained together (base_model." in mixed[1]
        assert (
            inference
            == generated
            == ("ConfigError", "a divided model: got a call in torch.inference_mode(), expected torch.no_grad().")
        )
        assert "a call of the base model of a divided memory" in alone[1]
        assert editor[0] == "AttachError"


def test_what_comes_out_has_a_type_of_its_own(seen):
    for result in (part["typed_output"] for part in seen):
        assert result == {"logits": torch.float32, "within": {torch.bfloat16}}


def test_a_base_model_that_was_divided_while_it_was_loaded(seen):
    for result in (part["divided_at_load"] for part in seen):
        assert result["parts"] == result["resumed"]
        assert_curves_agree(result["parts"], result["whole"], 1e-5, 1e-4)
        trained, saved, called = result["said"]
        assert "expected shard_model(memory) first" in trained[1]
        assert "expected shard_model(memory) first" in saved[1]
        assert "a divided base model that was called before" in called[1]


@pytest.mark.parametrize("scenario", [balanced, facts_read_by_one])
def test_two_processes_do_what_one_does(seen, tmp_path, scenario):
    alone = scenario(tmp_path)
    for result in (part[scenario.__name__] for part in seen):
        assert result.keys() == alone.keys()
        for name, values in alone.items():
            assert_close(result[name], values, 1e-3)


def test_facts_are_known_to_a_model_that_was_divided_while_it_was_loaded(seen):
    assert [part["taught_to_a_divided_base"]["said"] for part in seen] == ["blue window"] * 2


def test_a_process_whose_text_has_ended_answers_the_others(seen):
    assert [part["one_ends_sooner"]["tokens"] for part in seen] == [6, 2]


def test_what_came_after_the_division_and_other_divisions_are_refused(seen):
    for other, late in (part["otherwise_divided"] for part in seen):
        assert "parameters that would be trained and came when it was divided already" in late[1]
        assert "with tables divided between processes, here is tables and weights" in other[1]


def test_rows_that_are_buffers_are_out_of_sight_while_a_model_is_divided():
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), TableConfig(dtype="int8", tier="host"))
    tables = [engram.table for engram in memory.engrams.values()]
    before = [dict(table.named_buffers()) for table in tables]
    assert all(before)
    with fsdp._buffers_aside(tables):
        assert not any(list(table.buffers()) for table in tables)
    assert [dict(table.named_buffers()) for table in tables] == before


def test_a_plain_model_is_not_divided():
    with pytest.raises(ConfigError, match="got a Linear, expected an EngramModel"):
        shard_model(nn.Linear(2, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    play_scenarios(SCENARIOS, Path(sys.argv[1]))
