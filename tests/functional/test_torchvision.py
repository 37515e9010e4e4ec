"""Dead filters of real architectures against a brute-force count that knows how each is built."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation

from lightning_interp.functional import dead_filters


class Recorder:
    """Full outputs of modules, call by call; the reference has no suspects and no tracing."""

    def __init__(self):
        self.outputs = defaultdict(list)

    def watch(self, name, module):
        module.register_forward_hook(lambda m, args, out: self.outputs[name].append(out.detach().clone()))


def zero_everywhere(outputs, axis=1):
    """Channels that are zero at every position of every output."""
    return torch.stack([(o.movedim(axis, 0).flatten(1) == 0).all(1) for o in outputs]).all(0)


def constant_within(outputs, axis=1):
    """Channels that are constant within each output."""
    rows = [o.movedim(axis, 0).flatten(1) for o in outputs]
    return torch.stack([(r == r[:, :1]).all(1) for r in rows]).all(0)


def silence(module, *filters):
    """Makes filters of a normalisation, convolution or linear layer always negative, so that a ReLU kills them."""
    with torch.no_grad():
        for index in filters:
            module.weight[index] = 0
            module.bias[index] = -1


def resnet18():
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    silence(model.bn1, 3)
    silence(model.layer1[0].bn1, 0, 5)
    model.layer2[0].bn2.weight.data[7] = 0  # constant before the sum, alive behind it
    silence(model.layer3[0].bn2, 9)
    silence(model.layer3[0].downsample[1], 9)  # both summands below zero: the ReLU behind the sum is dead
    expected, recorder = {}, Recorder()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.ReLU | torchvision.models.resnet.BasicBlock):
            recorder.watch(name, module)

    def reference():
        out = recorder.outputs
        expected["conv1"] = zero_everywhere(out["relu"])
        for name, module in model.named_modules():
            if isinstance(module, torchvision.models.resnet.BasicBlock):
                first = [o.relu() for o in out[f"{name}.bn1"]]
                expected[f"{name}.conv1"] = zero_everywhere(first)
                expected[f"{name}.conv2"] = constant_within(out[f"{name}.bn2"])
                if module.downsample is not None:
                    expected[f"{name}.downsample.0"] = constant_within(out[f"{name}.downsample.1"])
                expected[name] = zero_everywhere(out[name])
        return expected

    return model, reference


def vgg11_bn():
    model = torchvision.models.vgg11_bn(weights=None, num_classes=10)
    silence(model.features[1], 0, 1)
    silence(model.features[9], 17)
    silence(model.classifier[0], 4)
    recorder = Recorder()
    layers = [
        *((f"features.{i}", m) for i, m in enumerate(model.features)),
        *((f"classifier.{i}", m) for i, m in enumerate(model.classifier)),
    ]
    for name, module in layers:
        if isinstance(module, nn.ReLU):
            recorder.watch(name, module)

    def reference():
        expected, owner = {}, ""
        for name, module in layers:
            if isinstance(module, nn.Conv2d | nn.Linear):
                owner = name
            elif isinstance(module, nn.ReLU):
                expected[owner] = zero_everywhere(recorder.outputs[name])
        return expected

    return model, reference


def activations_of_blocks(model):
    """Layer to (module whose output is its activation, whether that has an exact zero)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv2dNormActivation):
            activation = module[2] if len(module) > 2 else None
            found[f"{name}.0"] = (module, isinstance(activation, nn.ReLU | nn.Hardswish))
        elif isinstance(module, SqueezeExcitation):
            found[f"{name}.fc1"] = (module.activation, isinstance(module.activation, nn.ReLU))
            found[f"{name}.fc2"] = (module.scale_activation, isinstance(module.scale_activation, nn.Hardsigmoid))
    if isinstance(model.classifier[1], nn.Hardswish):
        found["classifier.0"] = (model.classifier[1], True)
    return found


def built_of_conv_norm_activation(make):
    """mobilenet_v3_small and efficientnet_b0: every convolution stands in a Conv2dNormActivation or an SE block."""

    def build():
        model = make(weights=None, num_classes=10)
        blocks = [module for module in model.modules() if isinstance(module, Conv2dNormActivation)]
        for block in blocks[::5]:
            block[1].weight.data[0] = 0
            block[1].bias.data[0] = -30  # SiLU(-30) is a constant, hardswish(-30) and ReLU(-30) are zero
        recorder, activations = Recorder(), activations_of_blocks(model)
        for name, (module, _) in activations.items():
            recorder.watch(name, module)

        def reference():
            return {
                name: (zero_everywhere if exact else constant_within)(recorder.outputs[name])
                for name, (_, exact) in activations.items()
            }

        return model, reference

    return build


def convnext_tiny():
    model = torchvision.models.convnext_tiny(weights=None, num_classes=10)
    block = model.features[1][0].block
    silence(block[3], 11)  # linear, GELU: a constant
    block[2].weight.data[5] = 0  # LayerNorm behind the depthwise convolution: a constant
    recorder = Recorder()
    pairs = {}  # layer -> (module whose output counts, channel axis)
    for name, module in model.named_modules():
        if isinstance(module, torchvision.models.convnext.CNBlock):
            pairs[f"{name}.block.0"] = (module.block[2], -1)
            pairs[f"{name}.block.3"] = (module.block[4], -1)
    pairs["features.0.0"] = (model.features[0][1], 1)
    for index in (2, 4, 6):
        pairs[f"features.{index}.1"] = (model.features[index][1], 1)
    for name, (module, _) in pairs.items():
        recorder.watch(name, module)

    def reference():
        return {name: constant_within(recorder.outputs[name], axis) for name, (_, axis) in pairs.items()}

    return model, reference


NETWORKS = {
    "resnet18": resnet18,
    "vgg11_bn": vgg11_bn,
    "mobilenet_v3_small": built_of_conv_norm_activation(torchvision.models.mobilenet_v3_small),
    "efficientnet_b0": built_of_conv_norm_activation(torchvision.models.efficientnet_b0),
    "convnext_tiny": convnext_tiny,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_dead_filters_of_a_real_architecture_equal_brute_force(name):
    """Layer by layer, filter by filter, over two batches in eval mode; some filters are made dead on purpose."""
    torch.manual_seed(0)
    model, reference = NETWORKS[name]()
    model.eval()
    batches = [torch.randn(2, 3, 64, 64), torch.randn(1, 3, 64, 64)]
    found = dead_filters(model, batches)
    expected = reference()
    assert found.keys() == expected.keys()
    for layer, mask in expected.items():
        assert torch.equal(found[layer], mask), layer
    assert sum(mask.sum() for mask in expected.values()) >= 2
