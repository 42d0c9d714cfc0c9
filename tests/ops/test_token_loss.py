"""The loss in half of the memory is the loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.ops.token_loss import plain_sum_of_token_losses, sum_of_token_losses


def loss_and_gradient(function, logits, labels, factor=1.0):
    logits = logits.clone().requires_grad_(True)
    loss = function(logits, labels) * factor
    loss.backward()
    return loss.detach(), logits.grad


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from([0.1, 3.0, 60.0]), st.integers(0, 99))
def test_it_equals_the_reference_gradients_included(count, vocabulary, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator) * spread
    labels = torch.randint(vocabulary, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < 0.3] = -100
    loss, grad = loss_and_gradient(sum_of_token_losses, logits, labels, 0.25)
    expected, expected_grad = loss_and_gradient(plain_sum_of_token_losses, logits, labels, 0.25)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_handled_in_float32(dtype):
    logits, labels = torch.randn(30, 50).to(dtype), torch.randint(50, (30,))
    loss, grad = loss_and_gradient(sum_of_token_losses, logits, labels)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, reduction="sum"))
    torch.testing.assert_close(grad, loss_and_gradient(plain_sum_of_token_losses, logits, labels)[1])


def test_logits_stay_as_they_are_and_a_second_pass_is_refused():
    logits, labels = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    before = logits.detach().clone()
    loss = sum_of_token_losses(logits * 1.0, labels)
    loss.backward(retain_graph=True)
    assert torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_a_second_derivative_is_refused():
    logits, labels = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    loss = sum_of_token_losses(logits, labels) + logits.square().sum()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_where_nothing_is_predicted_the_gradient_is_zero():
    logits = torch.randn(4, 9, requires_grad=True)
    labels = torch.full((4,), -100)
    (sum_of_token_losses(logits, labels) / (labels != -100).sum()).backward()  # NaN, as PyTorch's mean of nothing
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(4, 9))


def test_nothing_is_kept_without_a_gradient():
    logits, labels = torch.randn(4, 9), torch.randint(9, (4,))
    assert sum_of_token_losses(logits, labels).grad_fn is None
    with torch.no_grad():
        assert sum_of_token_losses(logits.requires_grad_(True), labels).grad_fn is None
