"""Networks that nobody thought of: drawn at random, counted by brute force, trained as without us."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_interp import DeadFilters
from tests.callbacks.watched import Watched, check, fit, loader
from tests.contract.battery import differences
from tests.contract.factories import often
from tests.contract.nets import Capture, seed_all
from tests.contract.odd import NUMBERS

EXACT = {"relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "relu6": nn.ReLU6, "hardswish": nn.Hardswish}
SMOOTH = {"leaky": nn.LeakyReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "mish": nn.Mish, "elu": nn.ELU}
NORMS = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda width: nn.GroupNorm(1, width),
    "instance": nn.InstanceNorm2d,
}
POOLS = {"none": nn.Identity, "max": lambda: nn.MaxPool2d(2), "mean": lambda: nn.AvgPool2d(2)}
CONVOLUTIONS = {
    "plain": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
    "no bias": lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False),
    "pointwise": lambda i, o: nn.Conv2d(i, o, 1),
    "dilated": lambda i, o: nn.Conv2d(i, o, 3, padding=2, dilation=2, padding_mode="circular"),
    "depthwise": lambda i, o: nn.Conv2d(i, i, 3, padding=1, groups=i),
    "twice as many, grouped": lambda i, o: nn.Conv2d(i, 2 * i, 3, padding=1, groups=i),
    "transposed": lambda i, o: nn.ConvTranspose2d(i, o, 3, padding=1),
}
BLOCK = st.fixed_dictionaries(
    {
        "convolution": st.sampled_from(list(CONVOLUTIONS)),
        "width": st.sampled_from([1, 3, 5, 7]),
        "norm": st.sampled_from(list(NORMS)),
        "activation": st.sampled_from([*EXACT, *SMOOTH]),
        "pool": st.sampled_from(list(POOLS)),
        "shortcut": st.booleans(),
        "dropout": st.booleans(),
    }
)


class Drawn(Watched):
    """Blocks of convolution, norm, activation, dropout; with a shortcut where shapes allow it, then pooling."""

    def __init__(self, channels, blocks):
        super().__init__()
        self.kinds, self.blocks = blocks, nn.ModuleList()
        for block in blocks:
            made = CONVOLUTIONS[block["convolution"]](channels, block["width"])
            parts = {
                "conv": made,
                "norm": NORMS[block["norm"]](made.out_channels),
                "act": {**EXACT, **SMOOTH}[block["activation"]](),
                "drop": nn.Dropout2d(0.2) if block["dropout"] else nn.Identity(),
                "pool": POOLS[block["pool"]](),
            }
            self.blocks.append(nn.ModuleDict(parts))
            channels = made.out_channels
        self.fc = nn.Linear(channels, 3)

    def features(self, x):
        for number, (block, kind) in enumerate(zip(self.blocks, self.kinds, strict=True)):
            y = block["act"](block["norm"](block["conv"](x)))
            self.note(f"blocks.{number}.conv", y, zero=kind["activation"] in EXACT)
            y = block["drop"](y)
            y = x + y if kind["shortcut"] and x.shape == y.shape else y
            x = block["pool"](y) if y.shape[-1] >= 4 else y
        return x.mean((2, 3))


@pytest.mark.filterwarnings("ignore:(guided_backprop|deconvnet) saw no activation")  # behind tanh and the like: true
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    channels=st.sampled_from([1, 2, 4, 13]),
    blocks=st.lists(BLOCK, min_size=1, max_size=4),
    seed=st.integers(0, 99),
    precision=st.sampled_from(["32-true", "64-true", "bf16-true"]),
)
def test_any_network_is_counted_rightly_and_left_alone(channels, blocks, seed, precision):
    """Dead filters window by window against a loop over full tensors; the weights bit for bit; no error."""

    def make():
        seed_all(seed)
        return Drawn(channels, blocks).rig()

    data = {"train": loader(5, shape=(channels, 8, 8)), "val": loader(3, shape=(channels, 8, 8), seed=1), "epochs": 1}
    data["precision"] = precision
    expected = make()
    fit(expected, **data)
    actual, capture = make(), Capture()
    others = [callback for callback in often() if not isinstance(callback, DeadFilters)]
    check(actual, split="train", window_steps=1, callbacks=others, logger=capture, log_every_n_steps=1, **data)
    assert differences(dict(expected.state_dict()), dict(actual.state_dict())) == []
    assert capture.of_interp().keys() >= NUMBERS
