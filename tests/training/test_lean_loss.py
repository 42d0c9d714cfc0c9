"""While training lasts, the loss of a causal language model takes half of the memory and stays what it is."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from engram.testing import tiny_memory
from engram.training.lean_loss import causal_lm_loss, lean_loss


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
@pytest.mark.parametrize("shifted", [False, True])
def test_it_is_the_loss_of_transformers(items, shifted):
    logits, labels = torch.randn(2, 6, 13), torch.randint(13, (2, 6))
    labels[0, 2:4] = -100
    options = {"num_items_in_batch": items, "shift_labels": labels.roll(-1, 1) if shifted else None}
    results = []
    for loss in (causal_lm_loss, ForCausalLMLoss):
        x = logits.clone().requires_grad_(True)
        value = loss(x, labels, 13, **options)
        value.backward()
        results.append((value.detach(), x.grad))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


def test_a_model_has_it_for_a_while():
    memory, ids = tiny_memory(), torch.arange(2, 12).view(1, 10)
    base = memory.base_model
    expected = memory(input_ids=ids, labels=ids).loss
    with lean_loss(base):
        assert base.loss_function is causal_lm_loss
        torch.testing.assert_close(memory(input_ids=ids, labels=ids).loss, expected)
    assert base.loss_function is ForCausalLMLoss
    assert "_loss_function" not in vars(base)
    with pytest.raises(ValueError, match="within"), lean_loss(base):
        raise ValueError("within")
    assert base.loss_function is ForCausalLMLoss


def test_another_loss_is_left_alone():
    base = tiny_memory().base_model
    base.loss_function = own = lambda **_: torch.zeros(())
    with lean_loss(base):
        assert base.loss_function is own
    with lean_loss(torch.nn.Linear(1, 1)):
        pass
