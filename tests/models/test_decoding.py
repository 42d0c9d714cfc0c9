"""Decoding with a cache must be the same computation as a full forward pass, whatever the cache goes through."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, DynamicCache, GenerationConfig, StaticCache

from engram import (
    AttachError,
    ConfigError,
    EngramError,
    EngramModel,
    Fact,
    FingerprintError,
    MemoryEditor,
    get_engram_model,
    register_architecture,
)
from engram.layers import RollingTail
from engram.models import ARCHITECTURES, DecoderLayout
from engram.models.cache import cache_argument, cache_in
from engram.testing import assert_close, tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS
from tests.versions import needs_checkpointing, needs_torch_2_7

TEXTS = ["def lookup(self, ids): return self", "The memory", "CAPITAL:France is the capital of"]
ONE = torch.tensor([[5, 6, 7]])


@pytest.fixture
def memory():
    memory = tiny_memory(max_ngram_size=4)
    assert all(torch.count_nonzero(e.short_conv.conv.weight) for e in memory.engrams.values())
    return memory


def padded(texts=TEXTS):
    rows = tiny_tokenizer()(texts, return_tensors="pt", padding=True)
    return rows["input_ids"], rows["attention_mask"]


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def in_chunks(memory, ids, mask, sizes, cache=None, start=0):
    parts = []
    for size in sizes:
        end = start + size
        out = memory(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions(mask)[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, end
        parts.append(out.logits)
    return torch.cat(parts, dim=1), cache


@torch.no_grad()
def full(memory, ids, mask):
    return memory(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


def test_full_equals_chunked_equals_token_by_token_with_left_padding(memory):
    ids, mask = padded()
    expected, real = full(memory, ids, mask), mask.bool()
    length = ids.shape[1]
    for sizes in ([length], [1] * length, [5, length - 5], [length - 1, 1], [2, 3, 1, length - 6]):
        got, cache = in_chunks(memory, ids, mask, sizes)
        assert_close(got[real], expected[real])
        assert cache.get_seq_length() == length


def test_padding_does_not_matter(memory):
    ids, mask = padded()
    batched = full(memory, ids, mask)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        assert_close(full(memory, alone, torch.ones_like(alone))[0], batched[row][mask[row].bool()])


def test_four_dimensional_masks_tell_padding_too(memory):
    ids, mask = padded()
    length = ids.shape[1]
    allowed = torch.tril(torch.ones(length, length, dtype=torch.bool)) & mask[:, None, None, :].bool()
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected, real = full(memory, ids, mask), mask.bool()
    for four in (allowed, additive, {"full_attention": additive}):
        with torch.no_grad(), memory.record() as traces:
            if isinstance(four, dict):
                # Llama itself takes no dict, but padding is read from it first.
                with pytest.raises((AttributeError, TypeError, ValueError)):
                    memory(input_ids=ids, attention_mask=four, position_ids=positions(mask), use_cache=False)
                continue
            got = memory(input_ids=ids, attention_mask=four, position_ids=positions(mask), use_cache=False).logits
        assert_close(got[real], expected[real])
        assert torch.count_nonzero(traces[0]["value"][~real]) == 0
    with pytest.raises(AttachError, match="padding cannot be told"):
        memory(input_ids=ids, attention_mask=torch.ones(3, 2))


def test_a_tensor_of_ids_may_be_used_again(memory):
    """The next ids written into the tensor that the last ones were given in."""
    ids, _ = padded(TEXTS[:1])
    cache, one, logits = DynamicCache(config=memory.base_model.config), torch.empty(1, 1, dtype=torch.int64), []
    with torch.no_grad():
        for place in range(ids.shape[1]):
            one.copy_(ids[:, place : place + 1])
            logits.append(memory(input_ids=one, past_key_values=cache, use_cache=True).logits)
        assert_close(torch.cat(logits, dim=1), memory(input_ids=ids, use_cache=False).logits)


def test_any_number_but_zero_is_a_real_position(memory):
    ids, mask = padded()
    with torch.no_grad():
        got = memory(input_ids=ids, attention_mask=2 * mask, position_ids=positions(mask), use_cache=False).logits
    assert_close(got[mask.bool()], full(memory, ids, mask)[mask.bool()])


def test_a_mask_may_hold_biases(memory):
    ids, length = torch.randint(2, 300, (1, 9)), 9
    away = (torch.arange(length)[:, None] - torch.arange(length)).float()
    closed = torch.zeros(length, length).masked_fill(away < 0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        got, expected = (
            memory(input_ids=ids, attention_mask=mask[None, None], use_cache=False).logits
            for mask in (closed - 1e-7 * away, closed)
        )
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}],
    ids=["greedy", "beam", "beams-returned"],
)
def test_generation_with_cache_equals_generation_without(memory, options):
    ids, mask = padded()
    common = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 24, "do_sample": False, **options}
    assert torch.equal(memory.generate(**common), memory.generate(**common, use_cache=False))


def test_speculative_decoding_equals_greedy(memory):
    ids, mask = padded(["def lookup(self, ids): return self.table[ids] def lookup(self, ids): return"])
    common = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    expected = memory.generate(**common)
    assert torch.equal(memory.generate(**common, prompt_lookup_num_tokens=5), expected)
    assert torch.equal(memory.generate(**common, assistant_model=tiny_model(seed=1)), expected)


def test_sampling_follows_the_seed(memory):
    ids, mask = padded()
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(memory.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=True, use_cache=use_cache))
    assert torch.equal(*outs)


def test_calls_in_a_row_do_not_disturb_each_other(memory):
    ids, mask = padded()
    expected = [full(memory, ids[: n + 1], mask[: n + 1]) for n in range(3)]
    caches = []
    for n in (2, 0, 1):
        got, cache = in_chunks(memory, ids[: n + 1], mask[: n + 1], [4, 2])
        caches.append((n, cache))
        assert_close(got[mask[: n + 1, :6].bool()], expected[n][:, :6][mask[: n + 1, :6].bool()])
    for n, cache in caches:  # and go on with each of the three, interleaved
        rest = ids.shape[1] - 6
        got, _ = in_chunks(memory, ids[: n + 1], mask[: n + 1], [1] * rest, cache, start=6)
        assert_close(got[mask[: n + 1, 6:].bool()], expected[n][:, 6:][mask[: n + 1, 6:].bool()])


def test_cropped_copied_and_selected_caches_go_on_correctly(memory):
    ids, mask = padded()
    expected, real = full(memory, ids, mask), mask.bool()
    length = ids.shape[1]
    _, cache = in_chunks(memory, ids, mask, [length - 3, 1, 1, 1])
    twin = copy.deepcopy(cache)
    cache.crop(-(length - 7))
    assert cache.get_seq_length() == 7
    got, _ = in_chunks(memory, ids, mask, [2, length - 9], cache, start=7)
    assert_close(got[real[:, 7:]], expected[:, 7:][real[:, 7:]])
    twin.crop(-1)
    twin.batch_select_indices(torch.tensor([2, 0]))
    got, _ = in_chunks(memory, ids[[2, 0]], mask[[2, 0]], [1], twin, start=length - 1)
    assert_close(got[:, 0], expected[[2, 0], -1])
    _, cache = in_chunks(memory, ids, mask, [length - 1])
    cache.batch_repeat_interleave(2)
    repeated = torch.tensor([0, 0, 1, 1, 2, 2])
    got, _ = in_chunks(memory, ids[repeated], mask[repeated], [1], cache, start=length - 1)
    assert_close(got[:, 0], expected[repeated, -1])
    cache.reset()


def test_a_prompt_cache_can_be_reused(memory):
    ids, mask = padded(["The memory, the memory, the memory"])
    _, prompt = in_chunks(memory, ids, mask, [ids.shape[1]])
    for tail in ([[5, 9, 30]], [[44, 7, 8]]):
        whole = torch.cat([ids, torch.tensor(tail)], dim=1)
        got, _ = in_chunks(memory, whole, torch.ones_like(whole), [3], copy.deepcopy(prompt), start=ids.shape[1])
        assert_close(got, full(memory, whole, torch.ones_like(whole))[:, -3:])


def test_static_cache(memory):
    ids, _ = padded(["The memory, the memory"])
    mask = torch.ones_like(ids)
    cache = StaticCache(config=memory.base_model.config, max_cache_len=64)
    got, _ = in_chunks(memory, ids, mask, [3, 1, ids.shape[1] - 4], cache)
    assert_close(got, full(memory, ids, mask))
    common = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(memory.generate(**common, cache_implementation="static"), memory.generate(**common))


def test_transformers_is_told_not_to_compile_steps(memory, monkeypatch):
    """It would on a GPU, with a static cache; there is none here, so what it is told is looked at."""
    seen = []
    monkeypatch.setattr(type(memory.base_model), "device", property(lambda _: torch.device("cuda")))
    monkeypatch.setattr(type(memory.base_model), "generate", lambda *_, **options: seen.append(options.get("disable_compile")))
    memory.generate(ONE)
    memory.generate(ONE, disable_compile=False)
    memory.generate(ONE, compile_config=CompileConfig())
    memory.generate(ONE, generation_config=GenerationConfig(compile_config=CompileConfig()))
    with memory.disable_engram():
        memory.generate(ONE)
    assert seen == [True, False, None, None, None]


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_static_caches_that_hold_a_window_alone(kind):
    memory = tiny_memory(tiny_model(kind, sliding_window=16))
    ids, mask = padded(["The memory, the memory is", "the text"])
    common = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": 1,
        "eos_token_id": None,
    }
    assert torch.equal(memory.generate(**common, cache_implementation="static"), memory.generate(**common))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_that_is_filled_and_not_returned(kind):
    memory, cache = tiny_memory(tiny_model(kind)), DynamicCache()
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        memory(input_ids=ids[:, :7], past_key_values=cache, use_cache=False)
        got = memory(input_ids=ids[:, 7:], past_key_values=cache, use_cache=False).logits
        assert_close(got, memory(input_ids=ids, use_cache=False).logits[:, 7:])


def test_sliding_windows_do_not_cut_the_history():
    memory = tiny_memory(tiny_model("gemma3_text"), max_ngram_size=4)
    ids, _ = padded(["The memory is addressed by the last tokens of the text. def lookup(self, ids): return"])
    mask = torch.ones_like(ids)
    got, _ = in_chunks(memory, ids, mask, [20, *[1] * (ids.shape[1] - 20)])
    assert_close(got, full(memory, ids, mask), 1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma4_text", "gemma4"])
def test_only_the_last_logits_are_asked_for(kind):
    """As generate does for a prompt. Gemma 4 would give the last tokens alone to its last blocks, where a memory needs all."""
    memory, (ids, mask) = tiny_memory(tiny_model(kind), max_ngram_size=4), padded()
    with torch.no_grad():
        expected = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for keep, kept in ((1, [-1]), (3, [-3, -2, -1]), (torch.tensor([2, 5]), [2, 5])):
            assert_close(memory(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits, expected[:, kept])


def test_a_cache_the_memory_has_not_seen_is_refused(memory):
    ids, mask = padded()
    with memory.disable_engram(), torch.no_grad():
        foreign = memory(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(AttachError, match="of which this memory has seen 0"):
        memory(input_ids=ids[:, :1], past_key_values=foreign)
    _, own = in_chunks(memory, ids, mask, [6])
    with memory.disable_engram(), torch.no_grad():
        memory(input_ids=ids[:, 6:7], attention_mask=mask[:, :7], past_key_values=own)
    with pytest.raises(AttachError, match="with the memory disabled"):
        memory(input_ids=ids[:, 7:8], past_key_values=own)


def test_a_pass_that_failed_leaves_a_recurrent_cache_as_it_was():
    memory, ids = tiny_memory(tiny_model("mamba"), max_ngram_size=4), torch.randint(2, 300, (2, 9))

    def fail(*_):
        raise RuntimeError("on the way")

    with torch.no_grad():
        cache = memory(input_ids=ids[:, :-1], use_cache=True).cache_params
        handle = memory.base_model.backbone.layers[0].norm.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on the way"):
            memory(input_ids=ids[:, -1:], cache_params=cache)
        handle.remove()
        assert_close(memory(input_ids=ids[:, -1:], cache_params=cache).logits, memory(input_ids=ids).logits[:, -1:])


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_caches_of_recurrent_states_alone(kind):
    """They go by another name and cannot say how much they hold."""
    memory, (ids, mask) = tiny_memory(tiny_model(kind), max_ngram_size=4), padded([TEXTS[0], TEXTS[2]])
    assert int((mask == 0).sum()) > 0
    assert bool(mask[:, -4:].all())
    with torch.no_grad():
        expected = memory(input_ids=ids, attention_mask=mask, use_cache=False).logits
        out = memory(input_ids=ids[:, :-4], attention_mask=mask[:, :-4], use_cache=True)
        steps = []
        for place in range(ids.shape[1] - 4, ids.shape[1]):
            out = memory(input_ids=ids[:, place : place + 1], cache_params=out.cache_params, use_cache=True)
            steps.append(out.logits)
        assert_close(torch.cat(steps, 1), expected[:, -4:])
        cache = out.cache_params
        cache.reset()
        again = memory(input_ids=ids, attention_mask=mask, cache_params=cache, use_cache=True)
        assert_close(again.logits[mask.bool()], expected[mask.bool()])
        with memory.disable_engram():
            memory(input_ids=ids[:, :1], cache_params=cache, use_cache=True)
        with pytest.raises(AttachError, match="has not seen"):
            memory(input_ids=ids[:, :1], cache_params=cache, use_cache=True)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        common = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False, **options}
        assert torch.equal(memory.generate(**common), memory.generate(**common, use_cache=False))


def test_caches_that_cannot_be_followed_are_refused(monkeypatch):
    monkeypatch.setattr("engram.models.architectures.ARCHITECTURES", dict(ARCHITECTURES))
    register_architecture("rwkv", DecoderLayout("rwkv", "blocks"))
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 3, "vocab_size": len(tiny_tokenizer())}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes)).eval()
    memory, (ids, mask) = tiny_memory(model, max_ngram_size=4), padded(["The memory, the memory"])
    with pytest.raises(AttachError, match="class list, which the memory cannot follow"):
        memory.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    with memory.disable_engram(), torch.no_grad():
        state = memory(input_ids=ids, use_cache=True).state
    with pytest.raises(AttachError, match="use_cache=False"):
        memory(input_ids=ids[:, :1], state=state)
    memory.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, use_cache=False)


class Newer(torch.nn.Module):
    """Names of transformers 5.24."""

    def forward(self, input_ids, cache=None, use_cache=None):
        return SimpleNamespace(logits=None, cache=cache)


def test_caches_have_an_older_and_a_newer_name(memory):
    name, cache = cache_argument(memory.base_model), DynamicCache(config=memory.base_model.config)
    assert name in ("cache", "past_key_values")
    assert cache_argument(Newer()) == "cache"
    assert cache_in(Newer()(None, cache=cache)) is cache
    assert cache_in(SimpleNamespace(cache=None, past_key_values=cache)) is None
    assert cache_in((1, cache)) is cache
    ids, _ = padded(TEXTS[:1])
    outputs = [memory(input_ids=ids, use_cache=True, **{name: DynamicCache()}) for name in ("cache", "past_key_values")]
    for output in outputs:
        assert cache_in(output).engram_states.keys() == {memory.owner_token}
    assert torch.equal(*(output.logits for output in outputs))
    generated = [
        memory.generate(input_ids=ids, max_new_tokens=4, do_sample=False, **{name: DynamicCache()})
        for name in ("cache", "past_key_values")
    ]
    assert torch.equal(*generated)


def test_an_empty_cache_of_the_users_is_filled(memory):
    ids, mask = padded()
    got, cache = in_chunks(memory, ids, mask, [3, ids.shape[1] - 3], DynamicCache(config=memory.base_model.config))
    assert_close(got[mask.bool()], full(memory, ids, mask)[mask.bool()])
    assert isinstance(cache, DynamicCache)


def test_rolling_back_further_than_kept_is_refused():
    memory = get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), rollback_window=16)
    ids = torch.randint(2, 300, (1, 120))
    _, cache = in_chunks(memory, ids, torch.ones_like(ids), [40, *[1] * 80])
    cache.crop(-100)
    with pytest.raises(EngramError, match="rollback_window"):
        memory(input_ids=ids[:, :1], past_key_values=cache)


def test_a_long_prompt_is_not_held_whole():
    tail = RollingTail(window=16)
    tail.append(torch.randn(1, 10_000, 4))
    for _ in range(100):
        tail.append(torch.randn(1, 1, 4))
    assert 16 <= tail.kept <= 16 + 64 + 1
    assert sum(chunk.untyped_storage().nbytes() for chunk in tail._chunks) == tail.kept * 4 * 4


def test_embeddings_without_ids_are_refused_and_with_ids_work(memory):
    ids, mask = padded()
    embeds = memory.get_input_embeddings()(ids).detach()
    with pytest.raises(AttachError, match=r"in forward \(generate does not take it\) engram_input_ids"):
        memory(inputs_embeds=embeds, attention_mask=mask)
    with torch.no_grad():
        got = memory(
            inputs_embeds=embeds, attention_mask=mask, engram_input_ids=ids, position_ids=positions(mask), use_cache=False
        ).logits
    with pytest.raises(AttachError, match="without token ids"):  # those of the pass before are not these
        memory.base_model(inputs_embeds=embeds, attention_mask=mask)
    assert_close(got, full(memory, ids, mask))
    with memory.disable_engram():
        memory(inputs_embeds=embeds, attention_mask=mask)


def test_a_block_called_on_its_own_is_refused(memory):
    with pytest.raises(AttachError, match="outside its decoder"):
        memory.base_model.model.layers[0](torch.zeros(1, 2, 32))


@needs_checkpointing
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    ids, mask = padded()
    gradients, losses = [], []
    for checkpointing in (False, True):
        memory = tiny_memory(tiny_model())
        memory.base_model.requires_grad_(True)
        memory.train()
        if checkpointing:
            memory.activation_checkpointing_enable({"use_reentrant": reentrant})
        # two forward passes before one backward pass: a recomputation must see the ids of its own pass
        first = memory(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        second = memory(input_ids=ids.flip(1), labels=ids.flip(1), use_cache=False).loss
        (first + 2 * second).backward()
        losses.append((first.item(), second.item()))
        gradients.append(
            {n: p.grad.to_dense() if p.grad.is_sparse else p.grad for n, p in memory.named_parameters() if p.grad is not None}
        )
    assert losses[0] == losses[1]
    assert set(gradients[0]) == set(gradients[1])
    assert any("multi_head_embedding" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # raised inside torch's own compiler
@needs_torch_2_7("it compiles no forward pass of newer models")
def test_compiled_forward_equals_eager(memory):
    ids, mask = padded()
    expected = full(memory, ids, mask)
    compiled = torch.compile(memory, fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    assert_close(got[mask.bool()], expected[mask.bool()])


def test_the_hash_is_computed_once_for_all_layers(memory, monkeypatch):
    calls, original = [], type(memory.mapping).hash
    monkeypatch.setattr(type(memory.mapping), "hash", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    ids, mask = padded()
    full(memory, ids, mask)
    assert len(calls) == 1


def test_a_filled_cache_is_pickled_with_what_the_memory_knows_of_it(memory):
    ids = torch.arange(2, 12).view(1, 10)
    _, cache = in_chunks(memory, ids, torch.ones_like(ids), [6], DynamicCache())
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is type(cache)
    logits, _ = in_chunks(memory, ids, torch.ones_like(ids), [4], again, start=6)
    assert_close(logits, full(memory, ids, torch.ones_like(ids))[:, 6:])
    assert cache.get_seq_length() == 6


def test_recordings_inside_each_other(memory):
    ids, mask = padded()
    with torch.no_grad(), memory.record() as outer:
        full(memory, ids[:, :4], mask[:, :4])
        with memory.record() as inner:
            full(memory, ids, mask)
        assert memory.is_recording
        assert [traces[0]["hash_ids"].shape[1] for traces in (outer, inner)] == [4, ids.shape[1]]
        full(memory, ids[:, :3], mask[:, :3])
    assert outer[0]["hash_ids"].shape[1] == 3
    assert not memory.is_recording


@pytest.mark.parametrize("make", ["trained", "taught"])
def test_a_vocabulary_that_grows_under_a_memory(make, tmp_path):
    """New ids count as padding in n-grams, cached or not; they are never taught, for they have no address of their own."""
    tokenizer, model = copy.deepcopy(tiny_tokenizer()), tiny_model(hidden_size=64, intermediate_size=96)
    known = len(tokenizer)
    if make == "trained":
        memory = tiny_memory(model, max_ngram_size=4)
    else:
        editor = MemoryEditor.create(model, tokenizer)
        editor.teach(FACTS)
        memory = editor.memory
    memory.save_pretrained(tmp_path)
    ids, mask = padded()
    before = full(memory, ids, mask)[..., :known]
    tokenizer.add_tokens(["<tool>", "<user>"])
    memory.resize_token_embeddings(known + 4)
    assert_close(full(memory, ids, mask)[..., :known], before)
    new = ids.clone()
    new[:, -3] = torch.arange(known, known + 3)
    chunked, _ = in_chunks(memory, new, mask, [ids.shape[1] - 4, 1, 1, 2])
    assert_close(chunked[mask.bool()], full(memory, new, mask)[mask.bool()])
    with memory.record() as traces:
        full(memory, new, mask)
    as_padding = memory.mapping.hash(new.where(new < known, memory.engram_config.pad_id))
    assert all(torch.equal(trace["hash_ids"][0], as_padding[layer][0]) for layer, trace in traces.items())
    if make == "taught":
        with pytest.raises(ConfigError, match="tokens added to it since"):
            editor.teach([Fact(prompts=("<tool> says",), answer="rows")])
        editor.teach([Fact(prompts=("KEY:rho",), answer="<user>")])  # answers are spelled in tokens that the model can say
        assert all(editor.verify().values())
    memory.unload()
    with pytest.raises(FingerprintError, match=r"vocab_size.*with more tokens"):
        EngramModel.from_pretrained(model, tmp_path, tiny_tokenizer())
    again = EngramModel.from_pretrained(model, tmp_path, tiny_tokenizer(), allow_other_base=True)
    assert_close(full(again, ids, mask)[..., :known], before)
    again.unload()
    model.resize_token_embeddings(known)
    EngramModel.from_pretrained(model, tmp_path, tiny_tokenizer())


@pytest.mark.parametrize("make", ["trained", "taught"])
def test_ids_that_no_token_has_are_generated_and_continued(make):
    """Embeddings are wider than the tokenizer, and a model that samples says such ids now and then."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(hidden_size=64, intermediate_size=96, vocab_size=len(tokenizer) + 60)
    if make == "trained":
        memory = tiny_memory(model)
    else:
        editor = MemoryEditor.create(model, tokenizer)
        editor.teach(FACTS)
        memory = editor.memory
    torch.manual_seed(0)
    said = memory.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=40, do_sample=True, eos_token_id=None)
    assert int(said.max()) >= len(tokenizer)
    mask = torch.ones_like(said)
    assert_close(in_chunks(memory, said, mask, [20, *[1] * 22])[0], full(memory, said, mask))
    with pytest.raises(ConfigError, match=f"got id {len(tokenizer) + 60}, expected 0..{len(tokenizer) + 59}"):
        memory.mapping.hash(torch.tensor([[len(tokenizer) + 60]]))
