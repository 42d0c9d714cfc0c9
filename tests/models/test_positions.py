"""How much text a model takes."""

from types import SimpleNamespace

from transformers import GPT2Config, LlamaConfig

from engram.models.positions import context_length


def test_the_text_part_says_it_under_either_name():
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=88)) == 88
    many = SimpleNamespace(get_text_config=lambda: LlamaConfig(max_position_embeddings=99))
    assert context_length(many) == 99
    assert context_length(SimpleNamespace()) is None
