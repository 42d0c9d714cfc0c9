"""Keywords that nothing here has: of engram-peft, or misspelt; and padding that was not thought of."""

import copy
import inspect
import pickle

import pytest

from engram import ConfigError, EngramConfig, TableConfig, get_engram_model, load_bundled
from engram.config import _OF_ENGRAM_PEFT
from engram.models import attaching
from engram.testing import tiny_config, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("target_layers", "layer_ids"),
        ("ngram_sizes", "max_ngram_size"),
        ("engram_vocab_size_per_ngram", "engram_vocab_size, rows of one head and not of all heads together"),
        ("embedding_dim", "n_embed_per_ngram, the width of one order and not of all together"),
        ("enable_tokenizer_compression", "hash_spec, 'exact_v1' for raw ids"),
        ("conv_kernel_size", "kernel_size"),
        ("train_mode", r"EngramTrainingArguments\.train_backbone"),
        ("wrap_peft", "nothing: adapters"),
    ],
)
def test_names_of_engram_peft_are_told_with_ours(name, here):
    words = rf"EngramConfig: unknown key\(s\) {name}, expected names of this library, not of engram-peft: {name} is here {here}"
    for make in (
        EngramConfig,
        EngramConfig.for_teaching,
        EngramConfig().replace,
        lambda **fields: EngramConfig.from_dict(fields),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            make(**{name: [1]})
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="get_engram_model: " + words.partition(": ")[2]):
        get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), **{name: 1})
    assert name in _OF_ENGRAM_PEFT


def test_other_names_are_told_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"EngramConfig: unknown key\(s\) layer_idz, expected some of .*\. Did you mean layer_ids\?$"
    ):
        EngramConfig(layer_idz=[1])
    with pytest.raises(
        ConfigError, match=r"TableConfig: unknown key\(s\) teir, expected some of (?!.*(files|stamps)).* Did you mean tier\?$"
    ):
        TableConfig(teir="host")
    with pytest.raises(ConfigError, match=r"get_engram_model: unknown key\(s\) tabel_config, .* Did you mean table_config\?$"):
        get_engram_model(tiny_model(), tiny_config(), tiny_tokenizer(), tabel_config=None)
    with pytest.raises(ConfigError, match=r"unknown key\(s\) xyz, expected some of .*verify_rows\.$"):
        EngramConfig(xyz=1)


def test_what_is_known_is_as_it_was():
    config = EngramConfig(layer_ids=[3])
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert list(inspect.signature(EngramConfig).parameters)[:2] == ["engram_vocab_size", "max_ngram_size"]
    assert list(inspect.signature(get_engram_model).parameters)[:3] == ["model", "config", "tokenizer"]
    with pytest.raises(TypeError, match="missing 2 required"):
        get_engram_model(tiny_model())


def attach(tokenizer, model, **fields):
    config = EngramConfig(engram_vocab_size=50, n_embed_per_ngram=8, n_head_per_ngram=2, layer_ids=[0], **fields)
    get_engram_model(model, config, tokenizer).unload()


def test_padding_that_is_another_than_the_tokenizers_is_told_once(caplog):
    attaching._warn_of_padding.cache_clear()
    model, tokenizer = load_bundled()
    assert tokenizer.pad_token_id not in (None, EngramConfig.pad_id)
    attach(tokenizer, model, pad_id=tokenizer.pad_token_id)
    assert not caplog.records
    for _ in range(2):
        attach(tokenizer, model)
    (record,) = caplog.records
    assert f"pad_id is 2, the default, and the tokenizer's padding token {tokenizer.pad_token_id}" in record.getMessage()
    assert "Give pad_id=tokenizer.pad_token_id." in record.getMessage()


def test_padding_that_stands_in_no_text_is_not_told(caplog):
    attaching._warn_of_padding.cache_clear()
    model, tokenizer = load_bundled()
    tokenizer.add_special_tokens({"extra_special_tokens": [tokenizer.convert_ids_to_tokens(EngramConfig.pad_id)]})
    attach(tokenizer, model)
    tokenizer.pad_token = None
    attach(load_bundled()[1].__class__(tokenizer_object=tokenizer.backend_tokenizer), model)
    assert not caplog.records
