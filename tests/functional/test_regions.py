"""Rectangles through layers: against convolutions of ones over indicator images, and loops."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_interp.functional.regions import EverywhereError, Regions, Sliding, union

pair = st.tuples


@st.composite
def drawn(draw, most=14):
    """The size of maps, and three rectangles in two of them."""
    size = draw(pair(st.integers(1, most), st.integers(1, most)))
    height, width = (draw(st.integers(1, side)) for side in size)
    corners = [
        [draw(st.integers(0, side - n)) for _ in range(3)] for side, n in zip(size, (height, width), strict=True)
    ]
    source = np.array([draw(st.integers(0, 1)) for _ in range(3)])
    return size, Regions(source, np.array(corners[0]), np.array(corners[1]), height, width)


def indicators(regions, size, padding=(0, 0)):
    """(B, 1, H, W): 1 in the rectangles."""
    found = torch.zeros(len(regions.top), 1, *(side + 2 * extra for side, extra in zip(size, padding, strict=True)))
    for each, top, left in zip(found, regions.top, regions.left, strict=True):
        each[0, top : top + regions.height, left : left + regions.width] = 1
    return found


@settings(max_examples=150, deadline=None)
@given(drawn(), st.data())
def test_rectangles_after_a_convolution_hold_every_output_that_reads_them(found, data):
    """And the part of the padded input that is named is what these outputs read: no less, no more."""
    size, regions = found
    sides = [
        (
            data.draw(st.integers(1, 4)),
            data.draw(st.integers(1, 3)),
            data.draw(st.integers(0, 2)),
            data.draw(st.integers(1, 2)),
        )
        for _ in size
    ]
    for side, (kernel, _, padding, dilation) in zip(size, sides, strict=True):
        assume(dilation * (kernel - 1) + 1 <= side + 2 * padding)
    kernel, stride, padding, dilation = (tuple(side[i] for side in sides) for i in range(4))
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    reads = F.conv2d(indicators(regions, size), torch.ones(1, 1, *kernel), **options) > 0
    try:
        after, read = regions.after(Sliding(kernel, stride, padding, dilation), size)
    except EverywhereError:
        # A kernel with holes counts as one without.
        extent = [step * (side - 1) + 1 for side, step in zip(kernel, dilation, strict=True)]
        reads = F.conv2d(indicators(regions, size), torch.ones(1, 1, *extent), stride=stride, padding=padding) > 0
        outputs = reads.shape[2] * reads.shape[3]
        rows, columns = (int(reads[:, 0].any(axis).sum(1).max()) for axis in (2, 1))
        assert rows * columns == 0 or rows * columns > 0.599 * outputs
        return
    assert not (reads & (indicators(after, reads.shape[2:]) == 0)).any()
    padded = [side + 2 * extra for side, extra in zip(size, padding, strict=True)]
    source = torch.ones(3, 1, *padded, requires_grad=True)
    outputs = F.conv2d(source, torch.ones(1, 1, *kernel), stride=stride, dilation=dilation)
    (outputs * indicators(after, reads.shape[2:])).sum().backward()
    for touched, named in zip(source.grad[:, 0] > 0, indicators(read, padded)[:, 0], strict=True):
        assert (named.bool() >= touched).all()
        corners = [touched.nonzero().amin(0).tolist(), touched.nonzero().amax(0).tolist()]
        assert corners == [named.nonzero().amin(0).tolist(), named.nonzero().amax(0).tolist()]


@settings(max_examples=100, deadline=None)
@given(drawn(), st.booleans())
def test_what_is_read_is_what_slices_give(found, last):
    size, regions = found
    maps = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for patch, source, top, left in zip(regions.read(maps), regions.source, regions.top, regions.left, strict=True):
        assert torch.equal(patch, maps[source, :, top : top + regions.height, left : left + regions.width])


@settings(max_examples=200, deadline=None)
@given(drawn(), st.integers(-3, 3), st.integers(-3, 3))
def test_what_is_written_lies_in_the_rectangles_and_nowhere_else(found, down, right):
    """Also of rectangles that an edge cuts off, but not of those that lie outside."""
    size, regions = found
    moved = regions.moved(down, right)
    patches, maps = torch.randn(3, 2, regions.height, regions.width), torch.randn(3, 2, *size)
    expected, inside = maps.clone(), True
    for each, patch, top, left in zip(expected, patches, moved.top, moved.left, strict=True):
        rows, columns = (slice(max(at, 0), max(at + n, 0)) for at, n in ((top, moved.height), (left, moved.width)))
        part = patch[:, max(-top, 0) :, max(-left, 0) :]
        target = each[:, rows, columns]
        target.copy_(part[:, : target.shape[1], : target.shape[2]] if target.numel() else target)
        inside &= target.numel() > 0
    if not inside:
        with pytest.raises(EverywhereError):
            moved.write(patches, maps)
        return
    moved.write(patches, maps)
    assert torch.equal(maps, expected)


def test_a_union_holds_all_and_is_of_one_size():
    """Maps of 10 x 10; by hand."""
    zero = np.array([0, 0])
    first = Regions(zero, np.array([0, 8]), np.array([2, 8]), 2, 2)
    second = Regions(zero, np.array([1, 6]), np.array([0, 8]), 3, 1)
    found = union([first, second], (10, 10))
    assert (found.height, found.width) == (4, 4)
    assert found.top.tolist() == [0, 6]
    assert found.left.tolist() == [0, 6]  # the second would end outside


def test_rectangles_that_make_up_most_of_a_map_are_refused():
    at = np.array([0])
    Regions(at, at, at, 6, 10).check_share((10, 10))
    with pytest.raises(EverywhereError):
        Regions(at, at, at, 7, 9).check_share((10, 10))
    with pytest.raises(EverywhereError):
        union([Regions(at, at, at, 1, 1), Regions(at, at + 9, at + 9, 1, 1)], (10, 10))
