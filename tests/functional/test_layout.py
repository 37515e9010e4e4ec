"""Where the channels are after reshapes, permutations and reductions, against tensors of labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp.functional import ops
from lightning_interp.functional.layout import Layout, mover, reduced, reshaped


def labels(shape, axis):
    """Each value is the number of its channel."""
    size = [1] * len(shape)
    size[axis] = shape[axis]
    return torch.arange(float(shape[axis])).view(size).expand(shape).contiguous()


def moved(layout, name, x, *args, **kwargs):
    """The layout and the tensor after an operation, as the tracer applies it."""
    y = getattr(x, name)(*args, **kwargs)
    move = mover(name, tuple(x.shape), args, kwargs)
    assert move is not None
    return move(layout, y), y


def assert_same_channels(layout, x):
    """Each channel that the layout finds holds its own label and no other, and all of its values."""
    found = layout.channels_first(x)
    assert found.shape[1] == layout.size
    assert torch.equal(found, torch.arange(float(layout.size)).view(1, -1, 1).expand_as(found))
    assert found.numel() * layout.width == x.numel() * layout.size


@st.composite
def journeys(draw):
    """A tensor of labels, its layout, and some permutations, reshapes and flattenings drawn one after the other."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    axis = draw(st.integers(0, len(shape) - 1))
    x, layout = labels(shape, axis), Layout(axis, 0, shape[axis], shape[axis])
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["permute", "transpose", "movedim", "flatten", "reshape", "squeeze", "unsqueeze"]))
        axes = st.integers(-x.ndim, x.ndim - 1)
        if kind == "permute":
            args = tuple(draw(st.permutations(range(x.ndim))))
        elif kind in {"transpose", "movedim"}:
            args = (draw(axes), draw(axes))
        elif kind == "flatten":
            args = tuple(sorted((draw(axes) % x.ndim, draw(axes) % x.ndim)))
        elif kind == "reshape":
            args = (draw(factorings(x.numel())),)
        elif kind == "squeeze":
            args = ()
        else:
            args = (draw(st.integers(0, x.ndim)),)
        result = moved(layout, kind, x, *args)
        steps.append((kind, args))
        if result[0] is None:
            return x, None, result[1], layout, steps
        layout, x = result
    return x, layout, x, layout, steps


@st.composite
def factorings(draw, total=None):
    """A shape with so many values."""
    shape = []
    rest = total
    while rest > 1 and len(shape) < 4:
        factor = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
        shape.append(factor)
        rest //= factor
    return (*shape, rest)


@settings(max_examples=300, deadline=None)
@given(journeys())
def test_layout_follows_any_way_through_permutations_and_reshapes(journey):
    """Wherever the layout says that the channels are, there they are: every label at its place, none elsewhere."""
    x, layout, after, before, _ = journey
    if layout is not None:
        assert layout.fits(x.shape)
        assert_same_channels(layout, x)
    else:  # given up only where no axis of the result holds all channels in order
        assert before.size > 1 or after.ndim == 0
        for axis in range(after.ndim):
            for outer in range(1, after.shape[axis] + 1):
                if after.shape[axis] % (outer * before.width) == 0:
                    inner = after.shape[axis] // (outer * before.width)
                    found = Layout(axis, 0, before.size, before.width, outer, inner).channels_first(after)
                    assert not torch.equal(found, torch.arange(float(before.size)).view(1, -1, 1).expand_as(found))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.data())
def test_movedim_with_several_axes(ndim, data):
    """As torch moves them."""
    shape = data.draw(st.permutations([2, 3, 4, 5, 6]))[:ndim]
    axis = data.draw(st.integers(0, ndim - 1))
    count = data.draw(st.integers(1, ndim))
    ends = [data.draw(st.permutations(range(ndim)))[:count] for _ in range(2)]
    layout, y = moved(Layout(axis, 0, shape[axis], shape[axis]), "movedim", labels(shape, axis), *map(tuple, ends))
    assert_same_channels(layout, y)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("permute", ([0, 2, 3, 1],), {}),
        ("permute", (), {"dims": (0, 2, 3, 1)}),
        ("transpose", (), {"dim0": 1, "dim1": -1}),
        ("swapaxes", (), {"axis0": 1, "axis1": 2}),
        ("swapdims", (1, 0), {}),
        ("movedim", (), {"source": 1, "destination": -1}),
        ("moveaxis", ((1, 0), (0, 3)), {}),
        ("unflatten", (1, (5, 1)), {}),
        ("view", (2, 5, 12), {}),
        ("mean", (-1,), {}),
        ("sum", ((0, 2),), {"keepdim": True}),
        ("amax", (), {"dim": (2, 3)}),
    ],
)
def test_every_spelling_of_the_arguments(name, args, kwargs):
    """Positional, named, lists and negative axes."""
    layout, y = moved(Layout(1, 0, 5, 5), name, labels((2, 5, 3, 4), 1), *args, **kwargs)
    assert_same_channels(layout, y / (2 * 3 if name == "sum" else 1))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [0, 2, (2, 3), (0, -1), [0, 2, 3]])
def test_reductions_over_positions_keep_the_channels(dims, keepdim):
    """The axis moves up by the reduced ones before it."""
    layout = reduced(Layout(1, 0, 5, 5), 4, (dims,), {"keepdim": keepdim})
    assert_same_channels(layout, labels((2, 5, 3, 4), 1).amax(dims, keepdim=keepdim))


@pytest.mark.parametrize("args", [(), (1,), (-3,), ((1, 2),), (None,)])
def test_reductions_over_channels_end_the_chain(args):
    """No layout is left."""
    assert reduced(Layout(1, 0, 5, 5), 4, args, {}) is None


def test_slice_of_a_concatenation():
    """Channels 2 to 4 of seven; flattened they are found again."""
    x = labels((2, 7, 3), 1) - 2
    layout = Layout(1, 2, 3, 7)
    assert_same_channels(layout, x)
    flat, y = moved(layout, "flatten", x, 1)
    assert_same_channels(flat, y)


@pytest.mark.parametrize(
    ("old", "new"), [((2, 8, 3), (2, 2, 4, 3)), ((2, 8, 3), (2, 3, 8)), ((2, 8, 3), (48,)), ((0, 8), (0, 4, 2))]
)
def test_channels_over_several_axes_are_given_up(old, new):
    """Split in groups, mixed with positions, or empty; one flat axis is still (outer, channels, inner)."""
    assert (reshaped(Layout(1, 0, 8, 8), old, new) is None) is (new != (48,))


def test_fits_refuses_other_shapes():
    """Too few axes, or another number of channels."""
    layout = Layout(1, 0, 4, 4, inner=2)
    assert layout.fits((3, 8))
    assert not layout.fits((3, 4))
    assert not layout.fits((8,))


def test_what_mixes_channels_has_no_mover():
    """Only what the tables name keeps a filter's output its own."""
    assert mover("matmul", (2, 3), (), {}) is None
    assert mover("softmax", (2, 3), (), {}) is None


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        (torch.clamp, {"min": 0}, "relu"),
        (torch.clamp, {"min": 0, "max": 6}, "relu"),
        (torch.clamp, {"min": -1}, "clamp"),
        (nn.functional.hardtanh, {"min_val": 0.0}, "relu6"),
        (nn.functional.hardtanh, {}, "hardtanh"),
        (nn.functional.threshold, {"threshold": 0, "value": 0}, "relu"),
        (nn.functional.threshold, {"threshold": 1, "value": 0}, "threshold"),
    ],
)
def test_relu_in_disguise(module, args, expected):
    """By its arguments."""
    assert ops.activation_name(ops.base_name(module), ("x",), args) == expected
