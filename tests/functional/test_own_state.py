"""Calling a model with other numbers in the place of its own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_interp.functional.own_state import call_with, places_of


class Woven(nn.Module):
    """A module under two names, a weight and a buffer in two modules, a parametrised weight, a bias that is None."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.again, self.other.weight = self.first, self.first.weight
        self.norm, self.twin = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.twin.running_mean = self.norm.running_mean
        self.last = parametrizations.weight_norm(nn.Linear(3, 2))

    def forward(self, x):
        return self.last(self.twin(self.norm(self.other(self.again(self.first(x))))))


def test_every_place_has_one_name():
    """Tensors may repeat, modules don't."""
    names = set(places_of(Woven()))
    assert {"first.weight", "first.bias", "other.weight", "norm.running_mean", "twin.running_mean"} < names
    assert not any(name.startswith("again.") for name in names)
    assert "other.bias" not in names


def test_call_equals_that_of_a_converted_copy_and_the_model_gets_its_own_back():
    """The very same objects, in the same places, with the same bits."""
    torch.manual_seed(0)
    model, x = Woven().eval(), torch.randn(4, 3)
    places = {name: (id(tensor), tensor.detach().clone()) for name, tensor in places_of(model).items()}
    state = {name: t.detach().double() if t.is_floating_point() else t for name, t in places_of(model).items()}
    assert torch.equal(call_with(model, state, x.double()), copy.deepcopy(model).double()(x.double()))
    now = places_of(model)
    assert {name: id(tensor) for name, tensor in now.items()} == {name: place[0] for name, place in places.items()}
    assert all(torch.equal(now[name], value) for name, (_, value) in places.items())


def test_the_model_gets_its_own_back_after_an_exception():
    """Inputs of another type."""
    model = Woven().eval()
    places = {name: id(tensor) for name, tensor in places_of(model).items()}
    state = {name: t.detach().double() if t.is_floating_point() else t for name, t in places_of(model).items()}
    with pytest.raises(RuntimeError):
        call_with(model, state, torch.randn(4, 3))
    assert {name: id(tensor) for name, tensor in places_of(model).items()} == places
