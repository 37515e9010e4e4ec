"""Incremental inference: the same as a plain forward of all copies, on random and on real networks; and it is used."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_interp.functional.incremental import PatchedTensor, Patches
from lightning_interp.functional.occlusion import occlusion
from lightning_interp.functional.receptive_field import receptive_field
from lightning_interp.functional.regions import Regions
from lightning_interp.functional.windows import Grid
from tests.diary import Diary

SIZE = (24, 20)


def patched(seed=0, channels=3, size=SIZE, window=(5, 4), layout=torch.contiguous_format):
    """A patched tensor of seven versions of two images, and the ordinary one, made by slices."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(2, channels, *size, generator=generator).contiguous(memory_format=layout)
    patches = torch.randn(7, channels, *window, generator=generator)
    draw = np.random.default_rng(seed)
    top, left = (draw.integers(0, side - n + 1, 7) for side, n in zip(size, window, strict=True))
    top[:2], left[:2] = 0, 0
    top[2:4], left[2:4] = size[0] - window[0], size[1] - window[1]
    source = np.array([0, 1, 0, 1, 0, 0, 1])
    batch = whole[torch.from_numpy(source)]
    for each, patch, row, column in zip(batch, patches, top, left, strict=True):
        each[:, row : row + window[0], column : column + window[1]] = patch
    return PatchedTensor(Patches(whole, patches, Regions(source, top, left, *window))), batch


def assert_same(found, expected):
    """Up to rounding."""
    found = found.ordinary() if isinstance(found, PatchedTensor) else found
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


LAYERS = {
    "conv": lambda c: nn.Conv2d(c, 6, 3, padding=1),
    "strided": lambda c: nn.Conv2d(c, 6, (3, 2), stride=2, padding=(1, 0)),
    "skipping": lambda c: nn.Conv2d(c, 6, 1, stride=3),
    "dilated": lambda c: nn.Conv2d(c, 6, 3, dilation=2, padding=1, bias=False),
    "depthwise": lambda c: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
    "one by one": lambda c: nn.Conv2d(c, 6, 1),
    "same": lambda c: nn.Conv2d(c, 6, (3, 1), padding="same"),
    "reflecting": lambda c: nn.Conv2d(c, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda c: nn.ConvTranspose2d(c, 4, 2),
    "norm": lambda c: nn.BatchNorm2d(c),
    "own norm": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "group norm": lambda c: nn.GroupNorm(1, c),
    "relu": lambda c: nn.ReLU(),
    "relu in place": lambda c: nn.ReLU(inplace=True),
    "prelu": lambda c: nn.PReLU(c),
    "gelu": lambda c: nn.GELU(),
    "dropout": lambda c: nn.Dropout2d(),
    "maximum": lambda c: nn.MaxPool2d(2),
    "overlapping maximum": lambda c: nn.MaxPool2d(3, 2, padding=1),
    "maximum, rounded up": lambda c: nn.MaxPool2d(2, ceil_mode=True),
    "average": lambda c: nn.AvgPool2d(2),
    "average with a border": lambda c: nn.AvgPool2d(3, 1, padding=1),
    "average without its border": lambda c: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    "average, own divisor": lambda c: nn.AvgPool2d(2, divisor_override=3),
    "residual": lambda c: Branches(c, torch.add),
    "residual in place": lambda c: Branches(c, lambda x, y: y.add_(x)),
    "product": lambda c: Branches(c, torch.mul),
    "dense": lambda c: Branches(c, lambda x, y: torch.cat([x, y], 1)),
    "stacked": lambda c: Branches(c, lambda x, y: torch.cat([x, y], dim=2)),
    "gate": lambda c: Gate(),
    "scaled": lambda c: Scaled(c),
    "overwritten view": lambda c: Overwriting(),
    "shuffled": lambda c: nn.ChannelShuffle(c),
}


class Branches(nn.Module):
    """Two ways that meet again."""

    def __init__(self, channels, meet):
        super().__init__()
        self.way, self.meet = nn.Conv2d(channels, channels, 3, padding=1), meet

    def forward(self, x):
        return self.meet(x, self.way(x))


class Gate(nn.Module):
    """Squeeze and excitation: every position depends on all."""

    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Scaled(nn.Module):
    """Constants of all kinds: a factor a channel, a number, a map of positions."""

    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        x = (self.factor * x).clamp_(max=1.5) - 0.25
        return torch.where(x > 0, x, 0.1 * x) + torch.linspace(0, 1, x.shape[3])


class Overwriting(nn.Module):
    """Writes through a view, and reads what it wrote."""

    def forward(self, x):
        x = x * 1.0
        x[:, 0, 1:].mul_(-2.0)
        return x + x.detach().abs()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6), st.integers(0, 99), st.booleans())
def test_random_networks_give_the_same(names, seed, last):
    torch.manual_seed(seed)
    x, batch = patched(seed, layout=torch.channels_last if last else torch.contiguous_format)
    assert torch.equal(x * 1.0 if seed % 2 else x.clone(), batch)
    for name in names:
        if min(batch.shape[2:]) < 4:
            break
        layer = LAYERS[name](batch.shape[1])
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        layer.train(isinstance(layer, nn.BatchNorm2d) and not layer.track_running_stats)
        with torch.no_grad():
            x, batch = layer(x), layer(batch)
        assert tuple(x.shape) == tuple(batch.shape)
    assert_same(x, batch)


KEPT = [
    "conv", "strided", "dilated", "depthwise", "one by one", "same", "norm", "relu", "relu in place", "prelu", "gelu",
    "dropout", "maximum", "overlapping maximum", "average", "average with a border", "average, own divisor", "residual",
    "residual in place", "product", "dense",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_only_what_a_patch_changes_is_computed(name):
    """The rest is no patched tensor any more: squeeze and excitation, statistics of the batch, a flattened axis."""
    x, batch = patched(window=(3, 3))
    layer = LAYERS[name](3).eval()
    with torch.no_grad():
        found = layer(x)
        assert_same(found, layer(batch))
    if name != "skipping":  # that depends on where the patches lie
        assert isinstance(found, PatchedTensor) is (name in KEPT)


def test_a_patch_spreads_as_the_receptive_field_says():
    """Three convolutions and a pooling, whose numbers the measured receptive field gives."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    )
    whole, patches = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 6, 6)
    at = Regions(np.array([0]), np.array([30]), np.array([30]), 6, 6)
    with torch.no_grad():
        found = net(PatchedTensor(Patches(whole, patches, at))).content
    field = receptive_field(net, "3", (1, 64, 64))
    boxes = [field.box((row, 16))[0] for row in range(32)]
    touched = [row for row, (first, end) in enumerate(boxes) if first < 36 and end > 30]
    assert found.regions.top.tolist() == [touched[0]]
    assert found.regions.height == len(touched) == 7
    assert found.values.shape == (1, 4, 7, 7)


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "shufflenet_v2_x1_0",
             "efficientnet_b0", "convnext_tiny", "googlenet", "vit_b_16"],
)  # fmt: skip
def test_networks_of_torchvision_give_the_same(name):
    options = {"googlenet": {"init_weights": False, "aux_logits": False}, "vit_b_16": {"image_size": 64}}.get(name, {})
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10, **options).eval()
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim > 1:  # a head that begins at zero
            nn.init.normal_(parameter)
    x, batch = patched(size=(64, 64), window=(9, 9), layout=torch.channels_last)
    with torch.no_grad():
        expected, found = model(batch), model(x)
    assert type(found) is torch.Tensor
    assert float((found - expected).abs().max() / (expected - expected.mean(0)).abs().max()) < 1e-3


def test_nan_stays_where_it_is():
    """In one version's patch, or in one image: then in all its versions whose patch does not hide it."""
    conv = nn.Conv2d(3, 2, 3, padding=1)
    x, _ = patched()
    x.content.whole[1, 1, 12, 10] = torch.nan
    x.content.values[0, 0, 0, 0] = torch.nan  # at the corner
    regions = x.content.regions
    with torch.no_grad():
        numbers = conv(x).ordinary().isnan().sum((1, 2, 3)).tolist()
    found = x.ordinary()
    for version, source in enumerate(regions.source.tolist()):
        is_hidden = not bool(found[version, 1, 12, 10].isnan())
        assert numbers[version] == (2 * 4 if version == 0 else 2 * 9 * (source == 1 and not is_hidden))


class Looks(nn.Module):
    """Does something with its input that only an ordinary tensor can do."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen = look, Diary()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        self.seen.append(type(x))
        return self.net(self.look(x))


LOOKS = {
    "other data": lambda x: _with_data(x, x * 0.5),
    "shape changed in place": lambda x: x.unsqueeze_(0)[0],
    "axes changed in place": lambda x: x.transpose_(2, 3),
    "indices of a pooling": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
}


def _with_data(x, data):
    x.data = data
    return x


@pytest.mark.parametrize("look", sorted(LOOKS))
def test_a_model_that_needs_ordinary_tensors_gets_them(look):
    """Errors are caught once, and the maps are those of one image at a time."""
    model, images, targets = Looks(LOOKS[look]), torch.randn(2, 3, 12, 12), torch.tensor([0, 2])
    found = occlusion(model, images, targets, window=4, batch_size=20)
    kinds = model.seen
    assert kinds[0] is torch.Tensor  # the images themselves
    assert PatchedTensor in kinds[1:3]
    assert set(kinds[3:]) == {torch.Tensor}
    assert_maps(found, model, images, targets)


def assert_maps(found, model, images, targets):
    """As one image at a time gives them, without any patched tensor."""
    grid = Grid.of((12, 12), 4, None)
    cover = images.mean((0, 2, 3), keepdim=True)
    drops = torch.zeros(len(grid), len(images))
    with torch.no_grad():
        for place in range(len(grid)):
            for n in range(len(images)):
                covered = images[n : n + 1].clone()
                covered[(0, slice(None), *grid[place])] = cover[0]
                scores = [model(image)[0, targets[n]] for image in (images[n : n + 1].clone(), covered)]
                drops[place, n] = scores[0] - scores[1]
    torch.testing.assert_close(found.drop, grid.mean(drops), rtol=1e-4, atol=1e-6)


NEEDS_MEMORY = {
    "address": lambda x: x + 0 * (x.data_ptr() > 0) - (x.data_ptr() == 0) * 1e6,
    "numpy": lambda x: torch.from_numpy(x.numpy() * 1),
    "dlpack": lambda x: torch.from_dlpack(x),
    "capsule": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
    "numpy's dlpack": lambda x: torch.from_numpy(np.from_dlpack(x) * 1),
    "storage": lambda x: torch.empty(0).set_(x.untyped_storage(), 0, x.shape, x.stride()),
    "shared": lambda x: x.share_memory_() * 1,
    "function of a number": lambda x: x.apply_(lambda value: 2 * value),
    "data in place": lambda x: x.data.mul_(2) + x,
    "list": lambda x: torch.tensor(x.tolist()),
    "copy": lambda x: copy.deepcopy(x) * 2,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)) * 2,
}


@pytest.mark.parametrize("look", sorted(NEEDS_MEMORY))
def test_what_reads_memory_reads_that_of_the_ordinary_tensor_or_gets_an_error(look):
    """An address of nothing would end the process."""
    model, images, targets = Looks(NEEDS_MEMORY[look]), torch.randn(2, 3, 12, 12), torch.tensor([0, 2])
    found = occlusion(model, images, targets, window=4, batch_size=20)
    assert PatchedTensor in model.seen
    assert_maps(found, model, images, targets)


def test_a_model_that_keeps_what_it_computed_can_be_copied_and_saved():
    """Afterwards, when a callback of the user's does that."""
    model = Looks(lambda x: x)
    kept = []
    model.net[0].register_forward_hook(lambda module, args, output: kept.append(output))
    occlusion(model, torch.randn(2, 3, 12, 12), torch.tensor([0, 2]), window=4)
    assert type(kept[-1]) is PatchedTensor
    values = kept[-1].numpy()
    for other in (copy.deepcopy(kept[-1]), pickle.loads(pickle.dumps(kept[-1]))):
        assert type(other) is torch.Tensor
        assert np.array_equal(other.numpy(), values)


def test_an_alias_that_calls_itself_pointwise_is_one():
    """`+x`, which composite operators show in inference mode only."""

    def look(x):
        with torch.inference_mode():
            x = x * 1.0
            z = +x
            z[:, 0] = 0
            return x + z

    model, images, targets = Looks(look), torch.randn(2, 3, 12, 12), torch.tensor([0, 2])
    assert_maps(occlusion(model, images, targets, window=4), model, images, targets)


def test_threads_of_a_model_may_share_a_patched_tensor():
    """All ask for the ordinary one at once."""

    def look(x):
        def resized(scale):
            with torch.no_grad():  # which each thread has for itself
                return F.interpolate(x, size=(12, 12)) * scale

        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(resized, range(1, 9)))

    model, images, targets = Looks(look), torch.randn(2, 3, 12, 12), torch.tensor([0, 2])
    found = occlusion(model, images, targets, window=4)
    assert PatchedTensor in model.seen
    assert model.seen[-1] is PatchedTensor
    assert_maps(found, model, images, targets)


@pytest.mark.parametrize(("images", "calls"), [(2, 1), (40, 2)])
def test_a_model_that_fails_on_whole_images_is_not_tried_in_vain(images, calls):
    """Large batches may fail for their layout only."""

    def look(x):
        raise ValueError("broken")

    model = Looks(look)
    with pytest.raises(ValueError, match="broken"):
        occlusion(model, torch.randn(images, 3, 12, 12), torch.zeros(images, dtype=torch.int64), window=4)
    assert len(model.seen) == calls


def test_statistics_of_the_batch_are_those_of_a_batch_of_all_images():
    """Patches have none; and the order of the batches is that of the positions, as ever."""
    seen = []
    model = Looks(lambda x: x)
    model.net.insert(1, nn.BatchNorm2d(4, track_running_stats=False))
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    images = torch.randn(4, 3, 12, 12)
    occlusion(model, images, torch.zeros(4, dtype=torch.int64), window=4, batch_size=4)
    assert set(model.seen) == {torch.Tensor}
    assert len(seen) == 1 + 25
    for batch in seen[1:13]:  # windows in the upper half
        assert torch.equal(batch[:, :, -1], images[:, :, -1])


def test_images_with_the_channels_last_come_so_to_a_model_that_counts_on_it():
    """It could not view them otherwise."""
    model = Looks(lambda x: x + 0 * x.permute(0, 2, 3, 1).view(len(x), -1).sum())
    images = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    targets = torch.tensor([0, 2])
    assert_maps(occlusion(model, images, targets, window=4, batch_size=20), model, images, targets)


def test_a_script_never_meets_a_patched_tensor():
    """It would be specialised to it."""
    model = Looks(lambda x: x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but people have them
        scripted = torch.jit.script(model.net)
    model.net = nn.Sequential(scripted)
    occlusion(model, torch.randn(2, 3, 12, 12), torch.tensor([0, 2]), window=4)
    assert set(model.seen) == {torch.Tensor}


def test_ordinary_models_meet_patched_tensors():
    """Or the tests above would test nothing."""
    model = Looks(lambda x: x)
    occlusion(model, torch.randn(2, 3, 12, 12), torch.tensor([0, 2]), window=4)
    assert model.seen == [torch.Tensor, PatchedTensor]
