"""Influences agree with autograd, with heads that were really refitted, and with captum."""

import copy
import math
import warnings

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from lightning_interp.errors import ArgumentError, InterpWarning
from lightning_interp.functional.influence import HeadInfluence, head_influence, self_influence
from lightning_interp.functional.softmax_head import fit_softmax_head

COUNT = 300


@pytest.fixture(scope="module")
def digits():
    """Training points, every tenth with a wrong label, and test points."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = torch.tensor(pixels) / 16, torch.tensor(labels)
    given = labels[:COUNT].clone()
    given[::10] = (given[::10] + 3) % 10
    return pixels[:COUNT], given, pixels[1000:1006], labels[1000:1006]


@pytest.fixture(scope="module")
def influence(digits):
    return HeadInfluence(digits[0], digits[1])


@pytest.fixture(scope="module")
def refitted(digits, influence):
    """30 points, the heads without one of them each, and how the test losses and their own loss come out."""
    embeddings, labels, test_embeddings, test_labels = digits
    indices = torch.arange(5, COUNT, 10).tolist()[:15] + torch.arange(0, COUNT, 10).tolist()[:15]
    before = influence.head.losses(test_embeddings, test_labels)
    changes, own = [], []
    for index in indices:
        rest = torch.arange(COUNT) != index
        # The others keep their weight of 1/n.
        head = fit_softmax_head(
            embeddings[rest], labels[rest], weight_decay=1e-2 * COUNT / (COUNT - 1), start=influence.head.weight
        )
        changes.append(head.losses(test_embeddings, test_labels) - before)
        own.append(head.losses(embeddings[index : index + 1], labels[index : index + 1])[0])
    return torch.tensor(indices), torch.stack(changes, dim=1), torch.stack(own)


def correlations(a, b):
    return float(pearsonr(a.flatten(), b.flatten())[0]), float(spearmanr(a.flatten(), b.flatten())[0])


def test_hessian_is_that_of_autograd(digits):
    """As a matrix, as a product and along the diagonal, to 1e-10."""
    influence = HeadInfluence(digits[0][:40], digits[1][:40], num_classes=10)
    loss, weight = influence.loss, influence.curvature.weight

    def objective(flat):
        value = cross_entropy(loss.features @ flat.view_as(weight).T, loss.labels)
        return value + loss.weight_decay / 2 * flat.square().sum()

    expected = torch.autograd.functional.hessian(objective, weight.flatten())
    unit = torch.eye(weight.numel(), dtype=torch.float64).view(-1, *weight.shape)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(influence.curvature.dense(), expected, **close)
    torch.testing.assert_close(influence.curvature.product(unit).flatten(1), expected, **close)
    torch.testing.assert_close(influence.curvature.diagonal().flatten(), expected.diagonal(), **close)


def test_diagonal_in_other_axes_is_that_of_the_turned_hessian(digits):
    influence = HeadInfluence(digits[0][:40, 20:28], digits[1][:40], num_classes=10)
    generator = torch.Generator().manual_seed(0)
    classes, features = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for size in influence.curvature.weight.shape
    )
    axes = torch.kron(classes, features)
    expected = (axes.T @ influence.curvature.dense() @ axes).diagonal()
    torch.testing.assert_close(influence.curvature.diagonal((classes, features)).flatten(), expected)


def test_predictions_correlate_with_refitted_heads(digits, influence, refitted):
    indices, changes, _ = refitted
    pearson, spearman = correlations(influence.on(*digits[2:])[:, indices], changes)
    assert pearson >= 0.98
    assert spearman >= 0.95


def test_steps_reach_the_refitted_heads(digits, influence, refitted):
    """One Newton step nearly; four: to 0.5 % of the largest change."""
    indices, changes, _ = refitted
    one, four = (influence.leave_one_out(*digits[2:], indices, steps=steps) for steps in (1, 4))
    assert min(correlations(one, changes)) >= 0.99
    assert min(correlations(four, changes)) >= 0.9999
    torch.testing.assert_close(four, changes, rtol=0, atol=5e-3 * float(changes.abs().max()))


def test_own_losses_are_those_of_refitted_heads(digits, influence, refitted):
    """By one Newton step; self-influence tells how far they rise, less exactly."""
    indices, _, own = refitted
    now = influence.leave_one_out_losses()
    assert min(correlations(now[indices], own)) >= 0.999
    rise = own - influence.head.losses(*digits[:2])[indices]
    assert correlations(influence.self_influence()[indices], rise)[0] >= 0.95


def test_sign_says_helpful_above_zero():
    """The points of a class are helpful for a test point of it, and harmful for one that looks like it but isn't."""
    points = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    influence = HeadInfluence(points, torch.tensor([0, 0, 1, 1]), weight_decay=0.1)
    test = torch.tensor([[1.5], [1.5]])
    found = influence.on(test, torch.tensor([1, 0]))
    actual = influence.leave_one_out(test, torch.tensor([1, 0]), torch.tensor([2]))
    assert bool((found[0, 2:] > 0).all())
    assert bool((found[1, 2:] < 0).all())
    assert float(actual[0, 0]) > 0 > float(actual[1, 0])


def test_wrong_labels_have_the_highest_scores(influence):
    """30 of the 300 labels are wrong: two thirds of the 30 highest scores are theirs."""
    wrong = torch.arange(COUNT) % 10 == 0
    for scores in (influence.self_influence(), influence.leave_one_out_losses()):
        assert int(wrong[scores.topk(30).indices].sum()) >= 20


def test_self_influence_is_the_influence_on_oneself(digits, influence):
    found = influence.self_influence()
    assert bool((found >= 0).all())
    torch.testing.assert_close(found, influence.on(*digits[:2]).diagonal())
    torch.testing.assert_close(found, self_influence(*digits[:2]))
    chosen = torch.tensor([7, 3])
    torch.testing.assert_close(influence.self_influence(chosen), found[chosen])
    torch.testing.assert_close(influence.leave_one_out_losses(chosen), influence.leave_one_out_losses()[chosen])


def test_influences_sum_to_what_the_penalty_holds_back(digits, influence):
    """At the optimum the gradients of the points sum to -n lambda W, so their influences to -lambda g^T H^-1 W."""
    solved = influence.inverse_gradient(*digits[2:])
    expected = -1e-2 * torch.einsum("mcd,cd->m", solved, influence.head.weight)
    torch.testing.assert_close(influence.on(*digits[2:]).sum(dim=1), expected)


def test_pure_function_is_the_same(digits, influence):
    torch.testing.assert_close(head_influence(*digits), influence.on(*digits[2:]))


def test_test_points_may_be_of_unseen_classes():
    """Such a class has its own row of weights."""
    found = head_influence(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.randn(2, 2), torch.tensor([5, 0]))
    assert found.shape == (2, 4)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("weight_decay", [1e-2, 1e-4])
def test_conjugate_gradients_agree_with_cholesky(digits, weight_decay):
    """For every question that is not about all points; the ranking of those agrees."""
    dense, large = (HeadInfluence(*digits[:2], weight_decay=weight_decay, solver=s) for s in ("cholesky", "cg"))
    assert (dense.exact, large.exact) == (True, False)
    chosen, test = torch.arange(0, COUNT, 150), [part[:3] for part in digits[2:]]
    torch.testing.assert_close(large.on(*test), dense.on(*test), rtol=0, atol=1e-9)
    torch.testing.assert_close(large.inverse_gradient(*test), dense.inverse_gradient(*test), rtol=0, atol=1e-6)
    torch.testing.assert_close(large.self_influence(chosen), dense.self_influence(chosen), rtol=0, atol=1e-9)
    exact = dense.leave_one_out_losses(chosen)
    torch.testing.assert_close(large.leave_one_out_losses(chosen), exact, rtol=1e-8, atol=1e-9)
    exact = dense.leave_one_out(*test, chosen)
    torch.testing.assert_close(large.leave_one_out(*test, chosen), exact, rtol=0, atol=1e-6)
    assert correlations(large.self_influence(), dense.self_influence())[1] >= 0.98
    assert correlations(large.leave_one_out_losses(), dense.leave_one_out_losses())[1] >= 0.98


def test_unreached_tolerance_is_told(digits):
    influence = HeadInfluence(*digits[:2], solver="cg")
    influence._solver.max_iterations = 2
    with pytest.warns(InterpWarning, match=r"stopped at a relative residual of .* instead of 1e-10"):
        influence.on(*digits[2:])


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("count", [1, 2, 5, 31])
def test_few_points_have_influences(digits, count, solver):
    """What is left without the only point is the head that knows nothing: a loss of log 10."""
    embeddings, labels, *test = digits
    influence = HeadInfluence(embeddings[:count], labels[:count], num_classes=10, weight_decay=1e-4, solver=solver)
    actual = influence.leave_one_out(*test, torch.arange(count))
    for found in (influence.on(*test), actual):
        assert found.shape == (6, count)
        assert bool(found.isfinite().all())
    if count == 1:
        after = actual[:, 0] + influence.head.losses(*test)
        assert after.tolist() == pytest.approx([math.log(10)] * 6)
    if count == 2:
        rest = fit_softmax_head(embeddings[1:2], labels[1:2], num_classes=10, weight_decay=2e-4)
        expected = rest.losses(*test) - influence.head.losses(*test)
        # Four steps don't get there from so far away: the head was refitted.
        torch.testing.assert_close(actual[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
def test_one_class_has_no_influence(solver):
    influence = HeadInfluence(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), solver=solver)
    test = (torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))
    assert not bool(influence.on(*test).any())
    assert not bool(influence.leave_one_out(*test, torch.arange(5)).any())
    assert not bool(influence.self_influence().any())


def test_no_question_has_no_answer(digits, influence):
    assert influence.on(digits[2][:0], digits[3][:0]).shape == (0, COUNT)
    assert influence.leave_one_out(*digits[2:], torch.arange(0)).shape == (6, 0)


def test_ten_thousand_classes_have_influences():
    """By conjugate gradients; the self-influence of all is a ranking, and the pure function says so."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(300, 16, generator=generator)
    labels = torch.randint(0, 10_000, (300,), generator=generator)
    influence = HeadInfluence(embeddings, labels, num_classes=10_000, weight_decay=0.1)
    test = (embeddings[:1] + 0.1, labels[:1])
    predicted = influence.on(*test)
    assert not influence.exact
    assert int(predicted.argmax()) == 0
    actual = influence.leave_one_out(*test, torch.arange(1), steps=1)
    assert float(actual[0, 0]) == pytest.approx(float(predicted[0, 0]), rel=0.1)
    assert influence.self_influence().shape == influence.leave_one_out_losses().shape == (300,)


def test_large_heads_say_that_self_influence_is_a_ranking():
    with pytest.warns(InterpWarning, match=r"head of 7,000 weights is too large .* fit for ranking"):
        self_influence(torch.randn(20, 6), torch.arange(20) * 52 + 11)


def test_hundred_thousand_points_have_influences():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(100_000, 8, generator=generator)
    labels = (embeddings[:, :4] + torch.randn(100_000, 4, generator=generator)).argmax(dim=1)
    influence = HeadInfluence(embeddings, labels)
    assert influence.on(embeddings[:2], labels[:2]).shape == (2, 100_000)
    found = influence.self_influence()
    chosen = torch.tensor([5, 99_999])
    torch.testing.assert_close(found[chosen], influence.self_influence(chosen))


def test_earlier_head_gives_the_same(digits, influence):
    again = HeadInfluence(*digits[:2], head=influence.head)
    assert again.head.steps == 0
    torch.testing.assert_close(again.on(*digits[2:]), influence.on(*digits[2:]))


def test_features_dead_in_training_count_only_for_the_perturbation(digits):
    """H is weight_decay I there: no influence, but H^-1 g_test is not zero."""
    embeddings, labels, test_embeddings, test_labels = digits
    padded = torch.cat([embeddings, torch.zeros(COUNT, 1)], dim=1)
    influence = HeadInfluence(padded, labels)
    without = HeadInfluence(embeddings, labels)
    test = torch.cat([test_embeddings, torch.ones(6, 1)], dim=1)
    torch.testing.assert_close(influence.on(test, test_labels), without.on(test_embeddings, test_labels))
    residual = torch.softmax(influence.head.scores(test), dim=1) - torch.eye(10)[test_labels]
    torch.testing.assert_close(influence.inverse_gradient(test, test_labels)[:, :, -2], residual / 1e-2)


def test_captum_finds_the_same(digits, tmp_path):
    """Its explicit inverse Hessian of the summed loss, damped by n weight_decay; it gets a copy of the head."""
    from captum.influence import NaiveInfluenceFunction

    embeddings, labels, *test = digits
    embeddings, labels = embeddings[:100, 16:40], labels[:100]
    test = (test[0][:, 16:40], test[1])
    influence = HeadInfluence(embeddings, labels)
    features, test_features = (torch.cat([e, torch.ones(len(e), 1)], dim=1).float() for e in (embeddings, test[0]))
    linear = torch.nn.Linear(25, 10, bias=False)
    linear.weight.data = influence.head.weight.float()
    path = tmp_path / "head.pt"
    torch.save(linear.state_dict(), path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="captum")
        oracle = NaiveInfluenceFunction(
            copy.deepcopy(linear),
            torch.utils.data.TensorDataset(features, labels),
            str(path),
            loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
            sample_wise_grads_per_batch=True,
            batch_size=100,
            hessian_reg=1e-2 * 100,
            hessian_inverse_tol=0.0,
            projection_dim=None,
        )
        found = oracle.influence((test_features, test[1]))
    # Captum's sign: above 0 lowers the loss while in the training set, as here.
    torch.testing.assert_close(found.double(), influence.on(*test), rtol=0, atol=2e-4 * float(found.abs().max()))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda i: i.on(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)), r"`test_embeddings` .* \(points, 64\)"),
        (lambda i: i.on(torch.full((2, 64), math.nan), torch.tensor([0, 1])), "2 of the 2 rows of argument `test_emb"),
        (lambda i: i.on(torch.zeros(1, 64), torch.tensor([10])), r"`test_labels` to be class indices in \[0, 10\)"),
        (lambda i: i.self_influence(torch.tensor([COUNT])), r"`indices` to be a vector .* in \[0, 300\)"),
        (lambda i: i.self_influence(torch.tensor([0.5])), "`indices`"),
        (lambda i: i.self_influence(torch.tensor(3)), "`indices`"),
        (
            lambda i: i.leave_one_out(torch.zeros(1, 64), torch.tensor([0]), torch.tensor([0]), steps=0),
            "`steps` to be an integer of at least 1",
        ),
    ],
)  # fmt: skip
def test_wrong_questions_are_refused(influence, question, message):
    with pytest.raises(ArgumentError, match=message):
        question(influence)


def test_wrong_solvers_are_refused(digits):
    with pytest.raises(ArgumentError, match="`solver` to be one of 'auto', 'cholesky', 'cg'"):
        HeadInfluence(*digits[:2], solver="lu")


def test_heads_that_are_no_optimum_are_told(digits, monkeypatch):
    import lightning_interp.functional.influence_head as module

    monkeypatch.setattr(module, "fit_softmax_head", lambda *a, start, **k: fit_softmax_head(*a, max_steps=1, **k))
    with pytest.warns(InterpWarning, match="not at its optimum"):
        HeadInfluence(*digits[:2])
