"""Loss functions are recognised, computed again, and never changed."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_interp.functional.losses import LOSSES, LossCapture

N, C = 6, 4


def _scores(seed=0):
    return torch.randn(N, C, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 1, 2, 3, 1, 0])
MIXED = torch.softmax(_scores(9), dim=1)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 4.0])

CALLS = {
    "cross_entropy": lambda s: F.cross_entropy(s, LABELS),
    "cross_entropy weighted": lambda s: F.cross_entropy(s, LABELS, weight=WEIGHT),
    "cross_entropy smoothed": lambda s: F.cross_entropy(s, LABELS, label_smoothing=0.2),
    "cross_entropy weighted, smoothed": lambda s: F.cross_entropy(s, LABELS, weight=WEIGHT, label_smoothing=0.1),
    "cross_entropy mixed targets": lambda s: F.cross_entropy(s, MIXED),
    "cross_entropy by name": lambda s: F.cross_entropy(target=LABELS, input=s, ignore_index=1, reduction="sum"),
    "cross_entropy none": lambda s: F.cross_entropy(s, LABELS, reduction="none"),
    "nll_loss": lambda s: F.nll_loss(s, LABELS),
    "binary_cross_entropy": lambda s: F.binary_cross_entropy(torch.sigmoid(s), MIXED),
    "binary_cross_entropy_with_logits": lambda s: F.binary_cross_entropy_with_logits(s, MIXED, pos_weight=WEIGHT),
    "mse_loss": lambda s: F.mse_loss(s, MIXED),
    "l1_loss": lambda s: F.l1_loss(s, MIXED),
    "smooth_l1_loss": lambda s: F.smooth_l1_loss(s, MIXED, beta=0.5),
    "huber_loss": lambda s: F.huber_loss(s, MIXED, delta=0.5),
    "kl_div": lambda s: F.kl_div(s, MIXED, reduction="batchmean"),
    "module": lambda s: nn.CrossEntropyLoss(weight=WEIGHT)(s, LABELS),
    "module BCE": lambda s: nn.BCEWithLogitsLoss(reduction="sum")(s, MIXED),
}


@pytest.mark.parametrize("name", CALLS)
def test_capture_changes_no_result_and_computes_the_same_loss_again(name):
    """With it and without it: one value, one gradient; and again on the same scores: the same value."""
    plain, seen = _scores().requires_grad_(), _scores().requires_grad_()
    expected = CALLS[name](plain)
    with LossCapture() as capture:
        got = CALLS[name](seen)
        [call] = capture.calls
        assert torch.equal(call.again(call.scores), got)
    assert torch.equal(expected, got)
    assert torch.equal(expected, call.value)
    assert not call.value.requires_grad
    expected.sum().backward()
    got.sum().backward()
    assert torch.equal(plain.grad, seen.grad)
    assert capture.error is None


def test_again_on_other_scores_equals_the_loss_of_these():
    """Weights and smoothing are those of the call."""
    with LossCapture() as capture:
        CALLS["cross_entropy weighted, smoothed"](_scores())
    expected = CALLS["cross_entropy weighted, smoothed"](_scores(1))
    assert torch.equal(expected, capture.calls[0].again(_scores(1)))


def test_each_recognised_function_is_tested():
    """A new entry of the table needs a case here."""
    with LossCapture() as capture:
        for call in CALLS.values():
            call(_scores())
    assert {call.function for call in capture.calls} == LOSSES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross_entropy", C),
        ("cross_entropy weighted", C),
        ("cross_entropy smoothed", C),
        ("nll_loss", C),
        ("module", C),
        ("cross_entropy mixed targets", None),
        ("cross_entropy by name", None),
        ("cross_entropy none", None),
        ("mse_loss", None),
        ("binary_cross_entropy_with_logits", None),
    ],
)
def test_num_classes_is_known_where_a_guess_costs_its_logarithm(name, expected):
    """Class indices and a mean; then equal scores cost ln C, with weights and with smoothing."""
    with LossCapture() as capture:
        loss = CALLS[name](torch.zeros(N, C))
    assert capture.calls[0].num_classes == expected
    if expected is not None and name != "nll_loss":
        assert loss.item() == pytest.approx(math.log(C))


def test_num_classes_of_pixels_and_of_a_single_sample():
    """The class axis is the second one, or the only one."""
    with LossCapture() as capture:
        F.cross_entropy(torch.zeros(2, 7, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long))
        F.cross_entropy(torch.zeros(5), torch.tensor(0))
        F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), size_average=None)
    assert [call.num_classes for call in capture.calls] == [7, 5, 3]


def test_losses_inside_losses_and_outside_of_it_are_not_noted():
    """`cross_entropy` calls others inside; before and after, nothing listens."""
    capture = LossCapture()
    CALLS["mse_loss"](_scores())
    with capture:
        CALLS["cross_entropy"](_scores())
        torch.relu(_scores()).sum()
    CALLS["l1_loss"](_scores())
    assert [call.name for call in capture.calls] == ["cross_entropy"]


def test_scores_are_not_kept_alive():
    """A tape of losses must not hold the graph of the step."""
    with LossCapture() as capture:
        scores = _scores()
        CALLS["mse_loss"](scores)
    assert capture.calls[0].scores is scores
    del scores
    gc.collect()
    assert capture.calls[0].scores is None


def test_losses_inside_backward_are_not_noted():
    """Activation checkpointing runs the forward a second time there."""
    scores = _scores().requires_grad_()
    with LossCapture() as capture:
        loss = torch.utils.checkpoint.checkpoint(lambda s: F.mse_loss(s * s, MIXED), scores, use_reentrant=False)
        loss.backward()
    assert len(capture.calls) == 1


def test_losses_inside_functional_transformations_are_not_noted():
    """Their tensors must not leave the transformation, and per-sample gradients stay right."""

    def gradient(s):
        return torch.func.vmap(torch.func.grad(lambda row, label: F.cross_entropy(row, label)))(s, LABELS)

    expected = gradient(_scores())
    with LossCapture() as capture:
        got = gradient(_scores())
    assert torch.equal(expected, got)
    assert capture.calls == []
    assert capture.error is None


def test_calls_are_bounded():
    """A training step that computes a loss in a loop does not fill the memory."""
    with LossCapture() as capture:
        for _ in range(300):
            CALLS["mse_loss"](_scores())
    assert len(capture.calls) == 256


def test_an_error_of_the_user_passes_through_and_is_no_error_of_ours():
    """Wrong shapes raise what they always raise."""
    with LossCapture() as capture, pytest.raises(ValueError, match="batch_size"):
        F.cross_entropy(_scores(), LABELS[:3])
    assert capture.calls == []
    assert capture.error is None


def test_deep_copies_under_the_mode_work():
    """A model is often copied in the middle of a training step."""
    model = nn.Linear(3, 2)
    with LossCapture():
        twin = copy.deepcopy(model)
    assert torch.equal(model.weight, twin.weight)


class _Other(TorchFunctionMode):
    """A mode of somebody else that counts."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_close_takes_the_mode_off_below_another_one():
    """The user may be inside a mode of their own when recording ends."""
    capture, other = LossCapture(), _Other()
    capture.__enter__()
    with other:
        capture.close()
        capture.close()
        before = other.seen
        CALLS["mse_loss"](_scores())
        assert other.seen > before
    assert capture.calls == []
    assert torch._C._len_torch_function_stack() == 0
