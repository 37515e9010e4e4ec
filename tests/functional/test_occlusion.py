"""Occlusion maps: closed forms, a naive loop, an independent library, cost, no traces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp.errors import ArgumentError
from lightning_interp.functional.occlusion import occlusion, occlusion_map
from lightning_interp.functional.spatial import FeatureMaps
from lightning_interp.functional.windows import Grid
from tests.diary import Diary
from tests.functional.attribution_nets import Counting, linear_model, samples, spelled


def relative(found, expected):
    """Largest difference as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def naive(model, images, targets, *, window, stride, cover):
    """One window of one image at a time; all four maps, and the count of windows at each pixel."""
    count, _, height, width = images.shape
    sums = {key: torch.zeros(count, height, width) for key in ("drop", "probability", "feature_drop")}
    covered, nearest = torch.zeros(height, width), {}
    tops = [-(-(h - w) // s) * s for h, w, s in zip((height, width), window, stride, strict=True)]
    for n in range(count):
        before, features, strongest = look(model, images[n : n + 1])
        for top in range(0, tops[0] + 1, stride[0]):
            for left in range(0, tops[1] + 1, stride[1]):
                box = (slice(top, min(top + window[0], height)), slice(left, min(left + window[1], width)))
                image = images[n : n + 1].clone()
                image[0, :, box[0], box[1]] = cover[n, :, box[0], box[1]]
                after, now, _ = look(model, image)
                sums["drop"][n][box] += before[targets[n]] - after[targets[n]]
                sums["probability"][n][box] += after.softmax(0)[targets[n]]
                sums["feature_drop"][n][box] += 1 - now[strongest] / features[strongest]
                covered[box] += n == 0
                centre = tuple((part.start + part.stop - 1) / 2 for part in box)
                nearest[n, centre] = int(after.argmax())
    means = {key: value / covered for key, value in sums.items()}
    top_class = torch.zeros(count, height, width, dtype=torch.int64)
    for n, y, x in torch.cartesian_prod(torch.arange(count), torch.arange(height), torch.arange(width)).tolist():
        rows = sorted({centre[0] for _, centre in nearest})
        columns = sorted({centre[1] for _, centre in nearest})
        best = (min(rows, key=lambda r: abs(r - y)), min(columns, key=lambda c: abs(c - x)))
        top_class[n, y, x] = nearest[n, best]
    return {**means, "top_class": top_class}


def look(model, image):
    """Scores, sums of the feature maps, and the strongest of these."""
    with torch.no_grad(), FeatureMaps(model) as listener:
        scores = model(image)[0]
    sums = listener.maps[0].relu().sum((1, 2))
    return scores, sums, int(sums.argmax())


def test_single_pixels_of_a_linear_model_drop_by_weight_times_pixel():
    """With a black baseline."""
    model, weight = linear_model()
    images, targets = torch.randn(3, 1, 2, 3), torch.tensor([2, 0, 3])
    found = occlusion_map(model, images, targets, window=1, baseline=0.0)
    torch.testing.assert_close(found, (weight[targets] * images)[:, 0])


def test_windows_of_a_linear_model_drop_by_their_sum():
    """Two windows that share the middle column; each pixel is the mean of those that cover it."""
    model, weight = linear_model((1, 3))
    image = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    parts = weight[1, 0, 0] * image[0, 0, 0]
    left, right = parts[:2].sum(), parts[1:].sum()
    found = occlusion_map(model, image, torch.tensor([1]), window=(1, 2), stride=1, baseline=0.0)
    torch.testing.assert_close(found[0, 0], torch.stack([left, (left + right) / 2, right]))


def test_baseline_is_the_mean_colour_by_default():
    """Per channel, over all images and positions; a tensor may be given instead."""
    model, weight = linear_model(channels=3)
    images, targets = torch.randn(2, 3, 2, 3), torch.tensor([0, 1])
    mean = images.mean((0, 2, 3), keepdim=True)
    expected = (weight[targets] * (images - mean)).sum(1)
    torch.testing.assert_close(occlusion_map(model, images, targets, window=1), expected)
    torch.testing.assert_close(occlusion_map(model, images, targets, window=1, baseline=mean), expected)


WINDOWS = [((3, 4), (2, 3)), ((4, 4), (4, 4)), ((9, 12), (9, 12)), ((5, 5), (3, 5)), ((1, 12), (1, 1))]


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_maps_equal_a_naive_loop(window, stride):
    """Windows that divide the image and that don't, and one that is as large as it."""
    model = spelled()
    images, targets = samples(2)
    cover = images.mean((0, 2, 3), keepdim=True).expand_as(images)
    found = occlusion(model, images, targets, window=window, stride=stride)._asdict()
    expected = naive(model, images, targets, window=window, stride=stride, cover=cover)
    assert torch.equal(found.pop("top_class"), expected.pop("top_class"))
    assert {key: relative(found[key], value) < 1e-4 for key, value in expected.items()} == dict.fromkeys(expected, True)


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_drop_equals_captum(window, stride):
    """The independent library."""
    attr = pytest.importorskip("captum.attr")
    model = spelled()
    images, targets = samples(3)
    oracle = attr.Occlusion(model)
    expected = oracle.attribute(images, (3, *window), strides=(3, *stride), target=targets, perturbations_per_eval=4)
    found = occlusion_map(model, images, targets, window=window, stride=stride, baseline=0.0)
    assert relative(found, expected.mean(1)) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_grid_covers_every_pixel_and_averages_over_its_windows(data):
    """A constant stays; the mean over pixels of indicator windows counts them."""
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    window = tuple(data.draw(st.integers(1, side)) for side in size)
    stride = tuple(data.draw(st.integers(1, side)) for side in window)
    grid = Grid.of(size, window, stride)
    torch.testing.assert_close(grid.mean(torch.full((len(grid), 2), 3.0)), torch.full((2, *size), 3.0))
    counts = torch.zeros(size)
    for place in range(len(grid)):
        counts[grid[place]] += 1
    assert counts.min() >= 1
    values = torch.arange(len(grid), dtype=torch.float32)
    expected = torch.zeros(size)
    for place in range(len(grid)):
        expected[grid[place]] += values[place] / counts[grid[place]]
    torch.testing.assert_close(grid.mean(values[:, None])[0], expected)
    assert set(grid.nearest(torch.arange(len(grid))[:, None]).flatten().tolist()) <= set(range(len(grid)))


def test_model_without_feature_maps_has_no_feature_drop():
    """The other maps are there."""
    model, _ = linear_model((4, 4))
    found = occlusion(model, torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), window=2)
    assert found.feature_drop is None
    assert found.drop.shape == found.probability.shape == found.top_class.shape == (2, 4, 4)


def test_batches_bound_the_memory_and_give_the_same():
    """No forward sees more images than allowed."""
    images, targets = samples(5)
    whole = occlusion(spelled(), images, targets, window=4)
    counting = Counting(spelled())
    parts = occlusion(counting, images, targets, window=4, batch_size=3)
    assert counting.largest == 3
    for expected, found in zip(whole, parts, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Viewing(nn.Module):
    """Calls `view` on what a convolution returns, which fails with the channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 6 * 6, 3)
        self.layouts = Diary()

    def forward(self, x):
        self.layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        out = self.conv(x).relu()
        return self.head(out.view(len(out), -1))


def test_a_model_that_views_gets_images_that_it_can_view():
    images, targets = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    model = Viewing()
    found = occlusion(model, images, targets, window=2, batch_size=64)
    assert model.layouts == [False, True, False, False]  # the images themselves; a try; the 98 that are covered
    for part, expected in zip(found, occlusion(model, images, targets, window=2, batch_size=8), strict=True):
        torch.testing.assert_close(part, expected)


def test_large_batches_come_with_the_channels_last():
    layouts = []
    model = spelled()
    model.register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    images, targets = samples(3)
    occlusion_map(model, images, targets, window=4, batch_size=50)
    assert layouts == [False, True, False]  # 3, 50 and 10 images


def test_cost_is_one_forward_a_window_and_one_for_the_image():
    """Windows of 4 x 4 with stride 2 on 9 x 12: 4 x 5 positions; progress is told after each forward."""
    counting, told = Counting(spelled()), []
    images, targets = samples(3)
    occlusion(counting, images, targets, window=4, batch_size=50, progress=lambda *each: told.append(each))
    assert (counting.forwards, counting.backwards) == (3 * (4 * 5 + 1), 0)
    assert told == [(50, 60), (60, 60)]


def test_model_and_images_are_left_as_they_were():
    """Also one that writes over its input, under inference mode, and after an exception."""

    class Rude(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = spelled().train()
            self.register_buffer("calls", torch.zeros(()))
            self.limit = 100.0

        def forward(self, x):
            self.calls += 1
            torch.rand(1)
            if self.calls > self.limit:
                raise RuntimeError("odd")
            return self.net(x.mul_(0.5))

    model = Rude()
    images, targets = samples(2)
    copy, generator = images.clone(), torch.get_rng_state()
    expected = occlusion_map(model, images, targets, window=5)
    with torch.inference_mode():
        found = occlusion_map(model, images.clone(), targets.clone(), window=5)
    model.limit = 1.0
    with pytest.raises(RuntimeError, match="odd"):
        occlusion_map(model, images, targets, window=5)
    assert torch.equal(found, expected)
    assert torch.equal(images, copy)
    assert torch.equal(torch.get_rng_state(), generator)
    assert (model.calls, model.training, found.requires_grad) == (0, True, False)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "argument `window` to be a positive integer or a pair"),
        ({"window": (3, 4, 5)}, "argument `window` to be a positive integer or a pair"),
        ({"window": (10, 3)}, r"argument `window` to be at most the image, \(9, 12\)"),
        ({"window": 3, "stride": 4}, "argument `stride` to be at most the window"),
        ({"window": 3, "stride": (1, 0)}, "argument `stride` to be a positive integer or a pair"),
        ({"window": 3, "batch_size": 0}, "argument `batch_size` to be a positive integer"),
        ({"window": 3, "baseline": None}, 'argument `baseline` to be "mean", a number or a tensor'),
        ({"window": 3, "targets": torch.tensor([0, 9])}, "argument `targets` to be class indices"),
    ],
)
def test_wrong_argument_is_refused(change, message):
    """What was expected, and what came."""
    images, targets = samples(2)
    with pytest.raises(ArgumentError, match=message):
        occlusion_map(spelled(), images, **{"targets": targets, **change})
