"""Scores, targets and losses out of whatever a model returns."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_interp.callbacks._verdicts import captions, verdicts
from lightning_interp.callbacks.batches import UnreadableError
from lightning_interp.callbacks.scores import ScoreModel, class_probabilities, read_scores, read_targets, sample_losses

SCORES = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
Pair = namedtuple("Pair", "logits aux")


@pytest.mark.parametrize(
    "output",
    [
        SCORES,
        (SCORES, torch.zeros(2, 7)),
        [torch.tensor(0.3), SCORES],  # a loss first
        (torch.zeros(2, 3, 4, 4), SCORES),  # feature maps first, one that holds scores
        Pair(SCORES, torch.zeros(2, 3)),
        {"loss": torch.tensor(1.0), "logits": SCORES, "hidden": torch.zeros(2, 8)},
        OrderedDict(classes=SCORES),
        SimpleNamespace(logits=SCORES),
        {"output": (SCORES, torch.zeros(2, 3))[0]},
    ],
)
def test_scores_are_found(output):
    """In a tensor, tuple, dict or object."""
    assert torch.equal(read_scores(output, 2), SCORES)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_binary_scores_become_two_columns_with_the_same_probability(shape):
    """Softmax of the columns is the sigmoid of the score."""
    score = torch.tensor([-2.0, 0.0, 5.0])
    found = read_scores(score.reshape(shape), 3)
    torch.testing.assert_close(found.softmax(1)[:, 1], score.sigmoid())
    torch.testing.assert_close(found.softmax(1)[:, 0], (-score).sigmoid())


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (torch.zeros(2, 3, 8, 8), r"a tensor of shape \(2, 3, 8, 8\)"),
        (torch.zeros(2, dtype=torch.int64), "a tensor .* torch.int64"),
        (torch.zeros(3, 4), r"a tensor of shape \(3, 4\)"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 4), torch.zeros(2, 4)), "a tuple of a tensor of shape"),
        ({"a": SCORES, "b": SCORES}, r"a dict with keys \['a', 'b'\]"),
        ((), "a tuple of nothing"),
        (None, "a NoneType"),
    ],
)
def test_output_without_scores_is_refused_with_a_way_out(output, what):
    """What came, and the method that helps."""
    with pytest.raises(UnreadableError, match=f"but got {what}.*interp_scores"):
        read_scores(output, 2)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([[2], [0]]), [2, 0]),
        (torch.tensor([1.0, 0.0]), [1, 0]),
        (torch.tensor([True, False]), [1, 0]),
        (torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), [2, 0]),
        (torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.1, 0.0]]), [2, 0]),
        (torch.tensor([[1, 1, 0], [1, 1, 1]]), [1, 2]),  # several: the one with the highest score
        (torch.tensor([3, 0]), None),
        (torch.tensor([-100, 0]), None),
        (torch.zeros(2, 5, 5), None),
        (torch.tensor([0]), None),
        (None, None),
    ],
)
def test_targets_are_read_from_labels(labels, expected):
    """Indices, one-hot, soft and multi-label."""
    found = read_targets(labels, SCORES)
    assert (found if found is None else found.tolist()) == expected


def test_probabilities_and_losses_follow_the_kind_of_labels():
    """Softmax and cross-entropy; sigmoid and binary cross-entropy where labels don't sum to one."""
    labels, many = torch.tensor([2, 0]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(class_probabilities(SCORES, labels), SCORES.softmax(1))
    torch.testing.assert_close(class_probabilities(SCORES, many), SCORES.sigmoid())
    torch.testing.assert_close(sample_losses(SCORES, labels), F.cross_entropy(SCORES, labels, reduction="none"))
    expected = F.binary_cross_entropy_with_logits(SCORES, many.float(), reduction="none").mean(1)
    torch.testing.assert_close(sample_losses(SCORES, many), expected)
    assert sample_losses(SCORES, None) is None
    assert sample_losses(SCORES, 3.5 * SCORES) is None  # of a regression


def test_the_loss_of_a_sure_prediction_is_written_without_a_sign():
    """Cross-entropy gives -0.0 there."""
    scores, labels = torch.tensor([[90.0, -90.0]]), torch.tensor([0])
    assert str(sample_losses(scores, labels).tolist()) == "[0.0]"
    ((line,),) = captions(verdicts(scores, labels, labels), str)
    assert "".join(text for text, _ in line) == "label 0 predicted 0 (1.00) loss 0"


class Dicted(nn.Module):
    """Takes images, gives a dict; or scores by a method of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, batch):
        return {"scores": self.body(batch["x"] if isinstance(batch, dict) else batch)}


class Own(Dicted):
    def interp_scores(self, images):
        return self({"x": images})


@pytest.mark.parametrize("kind", [Dicted, Own])
def test_score_model_calls_the_module_or_its_own_method(kind):
    """Layers keep the names that the user knows; gradients flow; nothing is registered on the module."""
    module = kind()
    model, images = ScoreModel(module), torch.randn(2, 1, 4, 4, requires_grad=True)
    assert torch.equal(model(images), module.body(images))
    assert dict(model.named_modules()) == dict(module.named_modules())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in module.named_parameters()]
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert gradient.abs().sum() > 0
    assert not any(p.grad is not None for p in module.parameters())


def test_forward_that_takes_no_images_is_said_with_a_way_out():
    """The user's error is part of the message."""

    class Odd(nn.Module):
        def forward(self, images, lengths):
            return images

    with pytest.raises(UnreadableError, match=r"Calling Odd with images .* raised TypeError: .*interp_scores"):
        ScoreModel(Odd())(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_float32_copies(dtype):
    """The module keeps its own parameters, and the result is that of a float32 model with the same values."""
    module = Dicted().to(dtype)
    images = torch.randn(2, 1, 4, 4)
    found = ScoreModel(module)(images.to(dtype))
    assert {p.dtype for p in module.parameters()} == {dtype}
    twin = Dicted()
    twin.load_state_dict(module.state_dict())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, twin(images.to(dtype).float())["scores"])


def test_forward_that_casts_by_itself_runs_in_its_own_type():
    """It would feed bfloat16 images to float32 weights."""

    class Casts(Dicted):
        def forward(self, batch):
            return super().forward(batch.to(torch.bfloat16))

    module = Casts().to(torch.bfloat16)
    images = torch.randn(2, 1, 4, 4)
    found = ScoreModel(module)(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, module(images)["scores"].float())


def test_float64_module_gets_float64_images():
    """As `precision="64-true"` would give them."""
    found = ScoreModel(Dicted().double())(torch.randn(2, 1, 4, 4))
    assert found.dtype == torch.float64
