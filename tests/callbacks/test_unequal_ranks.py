"""Two ranks with batches of five and of two in training: what is measured is that of all data, by brute force."""

import pytest
import torch
from torch.nn import functional as F

from lightning_interp.functional.dead import dormancy_scores
from tests.callbacks.ddp_unequal import BATCHES, EPOCHS, OWN, SIZES, Images, Net
from tests.callbacks.two_ranks import run_two_ranks

pytestmark = pytest.mark.slow
# Batches between two reports: the first, the rest of the first epoch, the second epoch.
WINDOWS = [(0, 1), (1, BATCHES), (BATCHES, EPOCHS * BATCHES)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two_ranks("ddp_unequal.py", tmp_path_factory.mktemp("unequal"))


def of_both(ranks, what, first, end):
    """What both ranks have seen from a batch on, up to another."""
    return [row for rank in ranks for row in rank["seen"][what][first:end]]


def average(rows):
    """Mean over all values of sums over some of them."""
    return sum(torch.tensor(each, dtype=torch.float64) for each, _ in rows) / sum(count for _, count in rows)


def test_the_batches_are_unequal(ranks):
    """Else all below would say nothing."""
    counts = [[count for _, count in rank["seen"]["zeros"]] for rank in ranks]
    assert counts == [[size * 16] * BATCHES * EPOCHS for size in SIZES]


def test_dead_filters_are_those_that_fired_on_no_rank(ranks):
    alive = torch.tensor(of_both(ranks, "alive", BATCHES, None)).any(dim=0)
    for rank in ranks:
        alone = torch.tensor(rank["seen"]["alive"][BATCHES:]).any(dim=0)
        assert alone.sum() < alive.sum()
        assert rank["dead"]["net.0"] == (~alive).nonzero().flatten().tolist() == [2]


def test_dormancy_scores_are_those_of_all_activations(ranks):
    for rank in ranks:
        assert len(rank["scores"]) == len(WINDOWS)  # the first batch belongs to the window of its epoch too
        for scores, (first, end) in zip(rank["scores"], [WINDOWS[0], (0, BATCHES), WINDOWS[2]], strict=True):
            expected = dormancy_scores(average(of_both(ranks, "magnitudes", first, end)))
            torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), expected, rtol=1e-6, atol=0)


def test_sparsity_is_the_share_of_all_activations(ranks):
    expected = [average(of_both(ranks, "zeros", first, end)).mean().item() for first, end in WINDOWS]
    for rank in ranks:
        assert rank["history"]["sparsity"]["net.0"] == pytest.approx(expected, rel=1e-6)


def test_dynamics_are_the_own_loss_and_the_gradient_of_the_mean_loss_of_the_ranks(ranks):
    """By one process that takes the batches of both. The mean is DDP's: a small batch counts as much as a large one."""
    data, model, losses, norms = Images(), Net(), ([], []), []
    optimizer = model.configure_optimizers()
    for batch in list(range(BATCHES)) * EPOCHS:
        optimizer.zero_grad()
        for rank, size in enumerate(SIZES):
            own = list(OWN[rank])[batch * size : (batch + 1) * size]
            loss = F.cross_entropy(model(data.images[own]), data.labels[own])
            losses[rank].append(loss.item())
            (loss / 2).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        optimizer.step()
    for rank, own in zip(ranks, losses, strict=True):
        assert rank["history"]["loss"]["None"] == pytest.approx(own, rel=1e-5)
        assert rank["history"]["gradient_norm"]["None"] == pytest.approx(norms, rel=1e-4)


def test_loss_of_each_sample_is_the_mean_of_its_losses(ranks):
    for rank in ranks:
        means, counts = rank["sample_losses"]
        for number, (mean, count) in enumerate(zip(means, counts, strict=True)):
            own = [loss for each, loss in of_both(ranks, "samples", 0, None) if each == number]
            assert count == len(own) == EPOCHS
            assert mean == pytest.approx(sum(own) / count, rel=1e-5)
