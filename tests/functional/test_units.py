"""What is asked once for each layer must not look at all layers: it would cost the square of their number."""

from torch import nn
from torch.nn.utils import prune

from lightning_interp.functional.lifelines import Lifelines
from lightning_interp.functional.units import Unit, pruned_filters, sum_unit


class NotWalked(dict):
    """A dictionary in which names can be looked up, and nothing else."""

    def _refuse(self, *args):
        raise AssertionError("all units were looked at for one of them")

    __iter__ = keys = values = items = _refuse


def _sum(units, *layers, channels=8, new=True):
    return sum_unit(units, frozenset(layers), channels, new=new)


def test_the_unit_of_a_sum_is_found_by_its_name():
    """Not by a walk through all units; the second time it is the same one."""
    units = NotWalked()
    names = [_sum(units, f"block{i}.conv", f"block{i}.down") for i in range(50)]
    assert names == [f"block{i}" for i in range(50)]
    assert [_sum(units, f"block{i}.conv", f"block{i}.down", new=False) for i in range(50)] == names
    assert len(units) == 50


def test_sums_of_one_block_are_told_apart():
    """Several sums behind one name, and a layer that has it already."""
    units = NotWalked({"block": Unit("block", "conv", 8, layers=frozenset({"block"}))})
    assert _sum(units, "block.a", "block.b", new=False) is None
    assert _sum(units, "block.a", "block.b") == "block#2"
    assert _sum(units, "block.a", "block.c") == "block#3"
    assert _sum(units, "block.a", "block.b", channels=4) == "block#2"
    assert units["block#2"].num_filters == 4
    assert _sum(units, "a", "b") == "sum"


def test_pruned_filters_are_looked_up_by_the_name_of_the_layer():
    """Not by a walk through all modules."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 2, 1)))
    prune.ln_structured(net[1][0], "weight", amount=1, n=2, dim=0)
    net.named_modules = None
    assert pruned_filters(net, "1.0").sum() == 1
    assert pruned_filters(net, "0") is None
    assert pruned_filters(net, "1#2") is None


def test_a_window_without_news_leaves_the_list_of_events_as_it_is():
    """Copied for each layer of each window, it would cost more than all the rest."""
    lines = Lifelines()
    lines.update("conv", [1, 2], step=0, first=True)
    before = lines.events
    lines.update("conv", [1, 2], step=9)
    assert lines.events is before
    assert len(before) == 2
