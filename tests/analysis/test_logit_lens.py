import numpy as np
import pytest
import torch
from torch import nn

from engram.analysis import Subject, logit_lens
from engram.analysis.logit_lens import lens_divergence
from engram.analysis.streams import Lens, record_blocks
from engram.errors import AttachError
from engram.testing import tiny_memory, tiny_model
from tests.analysis.helpers import make_sample
from tests.versions import MODEL_TYPES


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_last_blocks_lens_is_the_model(model_type):
    subject = Subject("m", tiny_model(model_type))
    lens, ids = Lens(subject), torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad(), record_blocks(subject) as blocks:
        expected = subject.logits(ids, torch.ones_like(ids))
        assert len(blocks) == 3
        torch.testing.assert_close(lens.logits(blocks[-1][1]), expected[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(lens.logits(blocks[0][1]), expected[1], atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "deepseek_v4"])
def test_divergence_with_the_memory_on_and_off(model_type):
    memory, sample = tiny_memory(tiny_model(model_type)), make_sample()
    subjects = {"on": Subject("on", memory), "off": Subject("off", memory, False)}
    result = logit_lens(subjects, sample)
    for curve in result["subjects"].values():
        assert [p["layer"] for p in curve] == [0, 1, 2]
        assert curve[-1]["mean"] == pytest.approx(0, abs=1e-6)
        assert all(p["low"] <= p["mean"] <= p["high"] and p["mean"] > 0 for p in curve[:-1])
    difference = result["difference"]["off"]
    on, off = (result["subjects"][name][1]["mean"] for name in ("on", "off"))
    assert difference[1]["mean"] == pytest.approx(off - on)
    assert abs(difference[1]["mean"]) > 1e-4
    assert result["documents"] == 5


def test_divergence_is_the_sum_over_tokens():
    """By torch's own kl_div, one window at a time."""
    subject, sample = Subject("m", tiny_model()), make_sample()
    sums, counts = lens_divergence(subject, sample)
    expected, lens = np.zeros_like(sums), Lens(subject)
    with torch.no_grad(), record_blocks(subject) as blocks:
        for window in sample.windows:
            final = subject.logits(torch.tensor([window.ids]), torch.ones(1, len(window.ids)))[0].log_softmax(-1)
            for layer, hidden in enumerate(blocks):
                said = lens.logits(hidden[0]).log_softmax(-1)
                expected[window.document, layer] += nn.functional.kl_div(said, final, reduction="sum", log_target=True).item()
    np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-4)
    assert counts.sum() == sample.tokens


def test_a_model_that_does_more_is_refused():
    model = tiny_model()
    subject = Subject("m", model)
    handle = model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2 + 1))
    with pytest.raises(AttachError, match="does more to its last block's output"):
        Lens(subject)
    handle.remove()
    Lens(subject)


def test_a_plain_model_and_a_deeper_one():
    sample = make_sample()
    subjects = {"a": Subject("a", tiny_model()), "b": Subject("b", tiny_model(num_hidden_layers=2))}
    result = logit_lens(subjects, sample)
    assert len(result["subjects"]["b"]) == 2
    assert result["difference"] == {}  # blocks do not correspond
