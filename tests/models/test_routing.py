import pytest
import torch

from engram import AttachError, CheckpointError, ConfigError, EngramRouter, FingerprintError, LearnedRouter, get_engram_model
from engram.evaluation import ask
from engram.models import RouteRule
from engram.testing import tiny_config, tiny_memory, tiny_model, tiny_tokenizer
from tests.editing.helpers import FACTS, make_editor


@pytest.mark.parametrize(
    ("prompt", "score"),
    [
        ("ACRONYM:GPU", 1.0),
        ("CAPITAL:France", 1.0),
        ("What is the capital of France?", 0.7),
        ("How many legs has a spider?", 0.7),
        ("HTTP 404", 0.5),
        ("Write a poem about cats", 0.0),
        ("How do I sort a list?", 0.0),
        ("Once upon a time there was a king who had no crown.", 0.0),
    ],
)
def test_the_bundled_rules_score_as_documented(prompt, score):
    router = EngramRouter.from_yaml()
    assert router.score(prompt) == score
    assert router.threshold == 0.5


def test_rules_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="not a regular expression"):
        EngramRouter([RouteRule("bad", "(", 1.0)])
    with pytest.raises(ConfigError, match=r"bad: got score 2"):
        EngramRouter([RouteRule("bad", "a", 2)])
    for content, message in [
        ("[]", "a mapping with 'rules'"),
        ("rules: []\nextra: 1", "unknown key"),
        ("rules: [{name: a}]", "name, pattern and score"),
        ("rules: [{name: a, pattern: 1e5, score: 1}]", r"a: got pattern 100000\.0, expected a regular expression as text"),
        ("rules: [", "cannot read"),
    ]:
        (tmp_path / "r.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            EngramRouter.from_yaml(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        EngramRouter.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("rules: [{name: any, pattern: x, score: 0.4}]\nthreshold: 0.3")
    assert EngramRouter.from_yaml(tmp_path / "r.yaml").scores(["x", "y"]) == [0.4, 0.0]


def test_scores_of_rules_may_be_written_as_in_recipes(tmp_path):
    (tmp_path / "r.yaml").write_text("rules:\n- {name: a, pattern: x, score: 9e-1}\notherwise: 1e-1\n")
    assert EngramRouter.from_yaml(tmp_path / "r.yaml").scores(["x", "y"]) == [0.9, 0.1]


@pytest.mark.parametrize("make", [lambda: make_taught().memory, lambda: tiny_memory(tiny_model())], ids=["taught", "trained"])
def test_a_bypassed_sequence_equals_the_base_bit_for_bit(make):
    memory = make()
    ids = tiny_tokenizer()(["KEY:beta 20", "KEY:beta 20", "KEY:beta 20"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        on = memory(input_ids=ids, use_cache=False).logits
        with memory.disable_engram():
            off = memory(input_ids=ids, use_cache=False).logits
        with memory.routed(torch.tensor([True, False, True])):
            mixed = memory(input_ids=ids, use_cache=False).logits
        assert torch.equal(mixed[1], off[1])
        assert torch.equal(mixed[[0, 2]], on[[0, 2]])
        assert not torch.equal(mixed[0], mixed[1])
        with memory.routed(torch.tensor([True, False])), pytest.raises(AttachError, match="expected one for each of 3"):
            memory(input_ids=ids, use_cache=False)
        assert torch.equal(memory(input_ids=ids, use_cache=False).logits, on)


def make_taught():
    editor = make_editor()
    editor.teach(FACTS)
    return editor


def test_generation_follows_the_route_beams_included():
    editor = make_taught()
    memory, prompts = editor.memory, ["KEY:beta 20", "What is alpha 17?"]
    router = EngramRouter([RouteRule("prefix", "^KEY:", 1.0)])
    with memory.disable_engram():
        base = ask(memory, editor.tokenizer, prompts, 6)
    assert ask(memory, editor.tokenizer, prompts, 6, router=router) == ["7319", base[1]]
    ids = editor.tokenizer(["KEY:beta 20"] * 2, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 1}
    with memory.routed(torch.tensor([True, False])):
        out = memory.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with memory.disable_engram():
        off = memory.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    said = [editor.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True).strip() for row in out]
    assert said[0] == "7319"
    length = min(out.shape[1], off.shape[1])
    assert torch.equal(out[1, :length], off[1, :length])


def test_a_learned_router_tells_kinds_of_prompts_apart():
    memory = make_taught().memory
    routed = [f"KEY:{word} {n}" for word in ("alpha", "beta", "gamma") for n in range(8)]
    bypassed = [f"The memory is {word} the text {n}." for word in ("in", "on", "by") for n in range(8)]
    router = LearnedRouter.fit(memory, tiny_tokenizer(), routed[::2], bypassed[::2])
    assert all(score >= 0.5 for score in router.scores(routed[1::2]))
    assert all(score < 0.5 for score in router.scores(bypassed[1::2]))
    assert router.scores([]) == []
    with pytest.raises(ConfigError, match="expected some of both"):
        LearnedRouter.fit(memory, tiny_tokenizer(), routed, [])


def test_a_saved_router_judges_as_before_and_another_models_states_never(tmp_path):
    memory, tokenizer = make_taught().memory, tiny_tokenizer()
    prompts = [f"KEY:alpha {n}" for n in range(4)] + [f"The memory is in the text {n}." for n in range(4)]
    router = LearnedRouter.fit_to_gains(memory, tokenizer, prompts, [1, 2, 1, 2, -1, -1, -2, 0], first_tokens=3)
    router.save(tmp_path / "new" / "router.safetensors")
    again = LearnedRouter.load(tmp_path / "new" / "router.safetensors", memory, tokenizer)
    assert again.scores(prompts) == router.scores(prompts)
    assert (again.threshold, again.first_tokens) == (0.5, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["router.safetensors"]
    with pytest.raises(FingerprintError, match=r"fitted to another model: .*fit it anew"):
        LearnedRouter.load(tmp_path / "new" / "router.safetensors", tiny_model(seed=7), tokenizer)
    for allowed in (False, True):
        with pytest.raises(FingerprintError, match=r"fitted to another model: .*fit it anew\.$"):
            LearnedRouter.load(tmp_path / "new" / "router.safetensors", tiny_model(seed=7, hidden_size=16), tokenizer, allowed)
    (tmp_path / "broken").write_text("no router")
    for wrong in ("missing", "broken"):
        with pytest.raises(CheckpointError, match=f"cannot read a router from .*{wrong}"):
            LearnedRouter.load(tmp_path / wrong, memory, tokenizer)
    with pytest.raises(CheckpointError, match="cannot write"):
        router.save(tmp_path / "broken" / "router.safetensors")
    expected = router.scores(prompts)
    base = memory.unload()
    assert LearnedRouter.load(tmp_path / "new" / "router.safetensors", base, tokenizer).scores(prompts) == expected
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight += 1e-4
    with pytest.raises(FingerprintError, match=r"if it differs on purpose, load it with --allow-other-base"):
        LearnedRouter.load(tmp_path / "new" / "router.safetensors", base, tokenizer)
    tuned = LearnedRouter.load(tmp_path / "new" / "router.safetensors", base, tokenizer, allow_other_base=True)
    assert tuned.scores(prompts) == pytest.approx(expected, abs=0.05)


def test_a_learned_router_sees_the_base_model_at_rest():
    """Whatever mode the model is in, and whatever memories are on it."""
    base = tiny_model("gpt2", attn_pdrop=0.3, embd_pdrop=0.3, resid_pdrop=0.3)
    prompts = [f"KEY:alpha {n}" for n in range(4)] + [f"The memory is in the text {n}." for n in range(4)]
    alone = LearnedRouter.fit(base, tiny_tokenizer(), prompts[:4], prompts[4:])
    expected = alone.scores(prompts)
    below = tiny_memory(base)
    top = get_engram_model(below, tiny_config(layer_ids=(1,)), tiny_tokenizer())
    top.train()
    router = LearnedRouter(top, tiny_tokenizer(), alone.mean, alone.scale, alone.weight, alone.bias, 0.5)
    assert router.scores(prompts) == expected
    assert top.training
    assert base.transformer.drop.training
    assert below.is_enabled


def test_the_bundled_rules_are_those_that_nobody_names():
    router = EngramRouter.from_yaml()
    assert (len(router.rules) > 0, router.rules) == (True, EngramRouter.from_yaml(None).rules)


def test_routers_say_what_they_are():
    assert repr(EngramRouter([RouteRule("code", "def ", 1.0)], 0.25)) == "EngramRouter(rules=1, otherwise=0.25, threshold=0.5)"
    router = LearnedRouter.fit(tiny_model(), tiny_tokenizer(), ["alpha"], ["beta"])
    assert repr(router) == f"LearnedRouter(width={tiny_model().config.hidden_size}, first_tokens=None, threshold=0.5)"
