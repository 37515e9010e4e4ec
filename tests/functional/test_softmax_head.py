"""The softmax head reaches its optimum, also where that is hard, and refuses what it can't fit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from lightning_interp.errors import ArgumentError
from lightning_interp.functional import influence_solvers
from lightning_interp.functional.softmax_head import fit_softmax_head


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels)[:300] / 16, torch.tensor(labels)[:300]


def gradient(head, embeddings, labels):
    """Of the objective as it is written down, by autograd."""
    weight = head.weight.clone().requires_grad_()
    features = torch.cat([embeddings.double(), torch.ones(len(embeddings), 1, dtype=torch.float64)], dim=1)
    loss = cross_entropy(features @ weight.T, labels) + head.weight_decay / 2 * weight.square().sum()
    assert float(loss.detach()) == pytest.approx(head.loss, rel=1e-9, abs=1e-12)
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("weight_decay", [1.0, 1e-2, 1e-4, 1e-6])
def test_gradient_is_zero_at_the_optimum(digits, weight_decay):
    """Autograd of the objective agrees, also where the classes can be separated and the penalty is tiny."""
    head = fit_softmax_head(*digits, weight_decay=weight_decay)
    assert head.converged
    assert head.gradient_norm < 1e-8
    assert float(gradient(head, *digits).norm()) < 1e-8


def test_two_points_have_the_optimum_of_the_scalar_equation():
    """For points -1 and 1 of two classes F = log(1 + exp(-2 w)) + lambda w^2, so lambda w = sigmoid(-2 w)."""
    head = fit_softmax_head(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), weight_decay=0.1)
    slope = float(head.weight[1, 0])
    assert 0.1 * slope == pytest.approx(1 / (1 + math.exp(2 * slope)), rel=1e-8)
    assert head.weight[0].tolist() == pytest.approx([-slope, 0.0], abs=1e-9)


def test_scikit_learn_finds_the_same_optimum(digits):
    """Its C is 1 / (n weight_decay) for a sum of losses; the intercept as a feature."""
    embeddings, labels = digits
    head = fit_softmax_head(embeddings, labels, weight_decay=1e-2)
    oracle = LogisticRegression(C=1 / (300 * 1e-2), fit_intercept=False, tol=1e-10, max_iter=10_000)
    oracle.fit(torch.cat([embeddings, torch.ones(300, 1)], dim=1).numpy(), labels.numpy())
    torch.testing.assert_close(head.weight, torch.tensor(oracle.coef_), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e6])
def test_size_of_the_features_does_not_matter(digits, scale):
    """Newton's steps don't depend on the unit of the features."""
    head = fit_softmax_head(digits[0][:100] * scale, digits[1][:100], weight_decay=1e-6)
    assert head.converged
    assert head.gradient_norm < 1e-8


@pytest.mark.parametrize("count", [1, 2, 5, 31])
@pytest.mark.parametrize("weight_decay", [1e-2, 1e-6])
def test_few_points_are_enough(digits, count, weight_decay):
    embeddings, labels = digits[0][:count], digits[1][:count]
    head = fit_softmax_head(embeddings, labels, weight_decay=weight_decay, num_classes=10)
    assert head.weight.shape == (10, 65)
    assert head.gradient_norm < 1e-8
    assert float(gradient(head, embeddings, labels).norm()) < 1e-8
    assert bool((head.scores(embeddings).argmax(dim=1) == labels).all())


def test_one_class_alone_has_nothing_to_learn(digits):
    head = fit_softmax_head(digits[0], torch.zeros(300, dtype=torch.int64))
    assert head.loss == 0
    assert head.weight.shape == (1, 65)
    assert not bool(head.weight.any())


def test_dead_features_change_nothing(digits):
    """With columns of zeros, and with the dead pixels of the digits cut out by hand, the optimum is the same."""
    embeddings, labels = digits
    alive = (embeddings != 0).any(dim=0)
    assert not bool(alive.all())
    padded = torch.cat([embeddings, torch.zeros(300, 7)], dim=1)
    with_dead, without = fit_softmax_head(padded, labels), fit_softmax_head(embeddings[:, alive], labels)
    assert with_dead.kept.tolist() == [*alive.tolist(), *[False] * 7]
    assert not bool(with_dead.weight[:, :-1][:, ~with_dead.kept].any())
    torch.testing.assert_close(with_dead.weight[:, :-1][:, with_dead.kept], without.weight[:, :-1], rtol=0, atol=1e-12)
    assert float(gradient(with_dead, padded, labels).norm()) < 1e-8


def test_only_dead_features_leave_the_intercept():
    """Equal classes, no feature: the uniform distribution."""
    head = fit_softmax_head(torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]))
    assert head.loss == pytest.approx(math.log(4))
    assert fit_softmax_head(torch.zeros(4, 0), torch.tensor([0, 1, 2, 3])).loss == pytest.approx(math.log(4))


def test_conjugate_gradients_and_cholesky_find_the_same_head(digits, monkeypatch):
    """Beyond the limit of the factorisation the optimum is the same."""
    dense = fit_softmax_head(*digits, weight_decay=1e-3, tolerance=1e-12)
    monkeypatch.setattr("lightning_interp.functional.softmax_head.DENSE_LIMIT", 0)
    monkeypatch.setattr("lightning_interp.functional.softmax_head._FACTORISE_AT_ONCE", 0)
    monkeypatch.setattr(influence_solvers, "_CLASS_AXES_LIMIT", 0)
    monkeypatch.setattr(influence_solvers, "_FEATURE_AXES_LIMIT", 0)
    jacobi = fit_softmax_head(*digits, weight_decay=1e-3, tolerance=1e-12)
    torch.testing.assert_close(jacobi.weight, dense.weight, rtol=0, atol=1e-8)


def test_ten_thousand_classes_are_fitted():
    """Without a matrix of 170,000 x 170,000."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(300, 16, generator=generator)
    labels = torch.randint(0, 10_000, (300,), generator=generator)
    head = fit_softmax_head(embeddings, labels, num_classes=10_000, weight_decay=0.1)
    assert head.converged
    assert float(gradient(head, embeddings, labels).norm()) < 1e-8


def test_hundred_thousand_points_are_fitted():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(100_000, 8, generator=generator)
    labels = (embeddings[:, :4] + torch.randn(100_000, 4, generator=generator)).argmax(dim=1)
    head = fit_softmax_head(embeddings, labels)
    assert float(gradient(head, embeddings, labels).norm()) < 1e-8


def test_start_at_the_optimum_takes_no_step(digits):
    """Also with the same vector added to the rows of all classes, which changes no probability."""
    head = fit_softmax_head(*digits)
    again = fit_softmax_head(*digits, start=head.weight + 3.0 * (head.weight[0] != 0))
    assert again.steps == 0
    torch.testing.assert_close(again.weight, head.weight)


def test_bad_start_does_no_harm(digits):
    """The optimum is one; a start worse than zeros is not used."""
    bad = torch.randn(10, 65, generator=torch.Generator().manual_seed(0)) * 1e3
    assert fit_softmax_head(*digits, start=bad).gradient_norm < 1e-8


def test_too_few_steps_are_told(digits):
    assert not fit_softmax_head(*digits, max_steps=1).converged


def test_losses_are_those_of_the_scores(digits):
    head = fit_softmax_head(*digits)
    penalty = head.weight_decay / 2 * float(head.weight.square().sum())
    assert float(head.losses(*digits).mean()) + penalty == pytest.approx(head.loss)
    assert head.losses(digits[0].float(), digits[1].to(torch.uint8)).dtype == torch.float64


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_order_of_the_points_does_not_matter(seed, count, classes, width):
    """And any few points have an optimum that is found."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, width, generator=generator).relu().double()
    labels = torch.randint(0, classes, (count,), generator=generator)
    order = torch.randperm(count, generator=generator)
    head = fit_softmax_head(embeddings, labels, num_classes=classes)
    other = fit_softmax_head(embeddings[order], labels[order], num_classes=classes)
    assert head.gradient_norm < 1e-8
    torch.testing.assert_close(other.weight, head.weight, rtol=0, atol=1e-6)


def test_rows_that_are_not_finite_are_counted():
    embeddings = torch.zeros(5, 2)
    embeddings[1, 0], embeddings[3, 1] = math.nan, math.inf
    with pytest.raises(ArgumentError, match=r"2 of the 5 rows of argument `embeddings` are not finite.*isfinite"):
        fit_softmax_head(embeddings, torch.arange(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(3)}, "`embeddings` to be a floating tensor"),
        ({"embeddings": torch.zeros(3, 2, dtype=torch.int64)}, "`embeddings` to be a floating tensor"),
        ({"embeddings": [[1.0]]}, "`embeddings` to be a floating tensor"),
        ({"embeddings": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.int64)}, "at least one point"),
        ({"labels": torch.tensor([0, 1])}, "a tensor of 3 class indices"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "a tensor of 3 class indices"),
        ({"labels": torch.tensor([0, -1, 1])}, r"class indices in 0, 1, 2, \.\.\., but got \[-1\]"),
        ({"num_classes": 2}, r"class indices in \[0, 2\), but got \[2\]. This concerns 1 of 3"),
        ({"num_classes": 0}, "`num_classes` to be a positive integer"),
        ({"weight_decay": 0.0}, "`weight_decay` to be a number above 0"),
        ({"weight_decay": math.nan}, "`weight_decay` to be a number above 0"),
        ({"start": torch.zeros(3, 2)}, r"`start` to be a tensor of shape \(3, 3\)"),
        ({"max_steps": -1}, "`max_steps`"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"embeddings": torch.randn(3, 2), "labels": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ArgumentError, match=message):
        fit_softmax_head(arguments.pop("embeddings"), arguments.pop("labels"), **arguments)
