"""Small tensors on their way to the host."""

import torch

from lightning_interp.functional.transfer import HostCopy, Parcel, to_host


def test_to_host_of_mixed_dtypes_keeps_order_and_values():
    """One list for each tensor, whatever the groups of the transfer."""
    tensors = [
        torch.tensor(1.5),
        torch.tensor([1 / 3], dtype=torch.float64),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor(3),
        torch.empty(0),
    ]
    assert to_host(tensors) == [[1.5], [1 / 3], [1.0, 2.0], [3.0], []]


def test_values_are_those_of_when_they_were_sent():
    """What is measured later does not get into a parcel that is under way."""
    tensors = [torch.tensor(1.0), torch.tensor(2.0)]
    parcel = Parcel(tensors)
    tensors[0].fill_(9.0)
    assert parcel.open() == [[1.0], [2.0]]
    assert parcel.open() == [[1.0], [2.0]]


def test_on_a_cpu_nothing_has_to_arrive():
    """The tensor itself, at once."""
    tensor = torch.arange(3)
    copy = HostCopy(tensor)
    assert copy.arrived
    assert copy.get().data_ptr() == tensor.data_ptr()
