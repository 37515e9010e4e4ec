"""Runs a network on images that differ from known ones in a small rectangle, and computes only what that changes.

The covered images of an occlusion map are such images. A `PatchedTensor` takes the place of a batch of them: layer by
layer it keeps the feature maps of the few whole images and, of each version, the rectangle that can differ. Once that
is most of a map, or an operator comes that no rule is for, it becomes the ordinary tensor that it stands for. So every
model gives what it always gives, up to rounding; how much is saved depends on how far its convolutions spread a change.

Shapes: M whole images, B versions of them, K channels, H x W positions, h x w of them in a rectangle.

Source: Nakandala, Kumar and Papakonstantinou 2019, section 4 (exact incremental inference; none of their
approximations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lightning_interp.functional.regions import EverywhereError, Regions, Sliding, union

aten = torch.ops.aten
Function = Any  # an operator of PyTorch
Rule = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]


class PatchedTensor(Tensor):
    """(B, K, H, W): whole maps, and what each of B versions of them has in its rectangle.

    Not part of a graph: call the model under `no_grad`.

    Attributes:
        whole: (M, K, H, W).
        patches: (B, K, h, w).
        regions: Where these are.
    """

    whole: Tensor
    patches: Tensor
    regions: Regions
    _ordinary: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[PatchedTensor], whole: Tensor, patches: Tensor, regions: Regions) -> PatchedTensor:
        """Has the layout of the whole maps: channels last or not."""
        size = (len(patches), *whole.shape[1:])
        strides = torch.empty(size, device="meta").contiguous(memory_format=_layout(whole)).stride()
        made = Tensor._make_wrapper_subclass(cls, size, strides=strides, dtype=whole.dtype, device=whole.device)
        made.whole, made.patches, made.regions, made._ordinary = whole, patches, regions, None
        return made

    def __init__(self, whole: Tensor, patches: Tensor, regions: Regions) -> None:
        """Takes what the attributes say."""

    def ordinary(self) -> Tensor:
        """The tensor that it stands for; from then on it is a name for that one, so that a view of it stays one."""
        if self._ordinary is None:
            maps = self.whole[torch.from_numpy(self.regions.source).to(self.whole.device)]
            maps = maps.contiguous(memory_format=_layout(self.whole))
            self.regions.write(self.patches, maps)
            self._ordinary = maps
            del self.whole, self.patches
        return self._ordinary

    def data_ptr(self) -> int:
        """There is no memory to read it from."""
        raise RuntimeError("A patched tensor has no memory of its own.")

    @property
    def is_patched(self) -> bool:
        """Whether it still is whole maps and patches."""
        return self._ordinary is None

    @property
    def size_of_maps(self) -> tuple[int, int]:
        """(H, W)."""
        return self.shape[2], self.shape[3]

    def patches_in(self, regions: Regions) -> Tensor:
        """The values in rectangles that hold its own."""
        if regions is self.regions:
            return self.patches
        found = regions.read(self.whole)
        self.regions.within(regions).write(self.patches, found)
        return found.contiguous(memory_format=_layout(self.whole))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator by its rule, or else on ordinary tensors."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None or _is_pointwise(func):
            try:
                return (rule or _pointwise)(func, args, kwargs)
            except EverywhereError:
                pass
        plain_args, plain_kwargs = tree_map_only(PatchedTensor, PatchedTensor.ordinary, (args, dict(kwargs)))
        result = func(*plain_args, **plain_kwargs)
        if not (func._schema.is_mutable and isinstance(args[0], PatchedTensor) and result is plain_args[0]):
            return result
        if result.shape != args[0].shape:
            raise RuntimeError(f"{func} changes the shape of a tensor that is already known by another one.")
        return args[0]


def _layout(maps: Tensor) -> torch.memory_format:
    last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


# ---------------------------------------------------------------------- operators on each position alone


def _is_pointwise(func: Function) -> bool:
    return torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags


def _pointwise(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Activations, sums, products, comparisons: of patched tensors, and of what is the same at all positions."""
    leaves, structure = tree_flatten((args, dict(kwargs)))
    patched = _patched(leaf for leaf in leaves if isinstance(leaf, PatchedTensor))
    constant = (leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PatchedTensor))
    if not all(map(_is_same_everywhere, constant)):
        raise EverywhereError
    writes = func._schema.is_mutable
    if writes and (args[0] is not patched[0] or "out" in kwargs):
        raise EverywhereError
    regions = _around(patched)

    def run(values: Callable[[PatchedTensor], Tensor]) -> Tensor:
        own = [values(leaf) if isinstance(leaf, PatchedTensor) else leaf for leaf in leaves]
        own_args, own_kwargs = tree_unflatten(own, structure)
        result: Tensor = func(*own_args, **own_kwargs)
        return result

    patches, whole = run(lambda tensor: tensor.patches_in(regions)), run(lambda tensor: tensor.whole)
    if not writes:
        return PatchedTensor(whole, patches, regions)
    patched[0].whole, patched[0].patches, patched[0].regions = whole, patches, regions
    return patched[0]


def _patched(tensors: Iterable[Any]) -> list[PatchedTensor]:
    """Those tensors, if all of them have patches, of the same images and for maps of one size."""
    found = list(tensors)
    if not all(isinstance(tensor, PatchedTensor) and tensor.is_patched for tensor in found):
        raise EverywhereError
    first = found[0]
    for tensor in found[1:]:
        same_images = len(tensor.whole) == len(first.whole) and tensor.regions.source is first.regions.source
        if not same_images or tensor.size_of_maps != first.size_of_maps:
            raise EverywhereError
    return found


def _is_same_everywhere(tensor: Tensor) -> bool:
    """Whether it has one value for all positions and images, or one for each channel."""
    if tensor.ndim in {3, 4}:
        return tensor.shape[-2:] == (1, 1) and (tensor.ndim == 3 or tensor.shape[0] == 1)
    return tensor.ndim == 0


def _around(patched: Sequence[PatchedTensor]) -> Regions:
    first = patched[0].regions
    same = all(tensor.regions is first for tensor in patched)
    return first if same else union([tensor.regions for tensor in patched], patched[0].size_of_maps)


def _batch_norm(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """With stored statistics: (input, weight, bias, mean, variance, training, momentum, eps)."""
    if kwargs or args[5] is not False:
        raise EverywhereError
    return _normalise(func, args)


def _stored_batch_norm(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The same without `training`."""
    if kwargs:
        raise EverywhereError
    return _normalise(func, args)


def _normalise(func: Function, args: tuple[Any, ...]) -> Any:
    (tensor,) = _patched(args[:1])
    whole, *statistics = func(tensor.whole, *args[1:])
    return PatchedTensor(whole, func(tensor.patches, *args[1:])[0], tensor.regions), *statistics


def _concatenate(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Of channels."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if axis not in {1, -3}:
        raise EverywhereError
    patched = _patched(args[0])
    regions = _around(patched)
    whole = func([tensor.whole for tensor in patched], 1)
    return PatchedTensor(whole, func([tensor.patches_in(regions) for tensor in patched], 1), regions)


# ---------------------------------------------------------------------- windows that slide


def _slide(tensor: Any, sliding: Sliding, fill: float, apply: Callable[[Tensor], Tensor]) -> PatchedTensor:
    """A convolution or pooling; `apply` is without its padding."""
    (tensor,) = _patched([tensor])
    after, read = tensor.regions.after(sliding, tensor.size_of_maps)
    vertical, horizontal = sliding.padding
    border = (horizontal, horizontal, vertical, vertical)
    whole = pad(tensor.whole, border, value=fill) if any(border) else tensor.whole
    if sliding.pointwise:
        patches = tensor.patches
    else:
        patches = read.read(whole)
        tensor.regions.moved(vertical, horizontal).within(read).write(tensor.patches, patches)
        patches = patches.contiguous(memory_format=_layout(tensor.whole))
    return PatchedTensor(apply(whole), apply(patches), after)


def _convolve(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    tensor, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if transposed or isinstance(weight, PatchedTensor) or isinstance(bias, PatchedTensor):
        raise EverywhereError
    sliding = Sliding.of(weight.shape[2:], stride, padding, dilation)
    return _slide(
        tensor, sliding, 0.0, lambda x: func(x, weight, bias, stride, [0, 0], dilation, False, output_padding, groups)
    )


def _pool_maximum(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """(input, kernel, stride, padding, dilation, ceil_mode); where the maxima were is not told."""
    tensor, kernel, stride, padding, dilation, ceil_mode = _filled(args, (), (0, 0), (1, 1), False)
    if kwargs or ceil_mode:
        raise EverywhereError
    sliding = Sliding.of(kernel, stride, padding, dilation)
    found = _slide(tensor, sliding, -torch.inf, lambda x: func(x, kernel, sliding.stride, [0, 0], dilation)[0])
    return found, None


def _pool_average(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)."""
    tensor, kernel, stride, padding, ceil_mode, counts_padding, divisor = _filled(args, (), (0, 0), False, True, None)
    sliding = Sliding.of(kernel, stride, padding)
    if kwargs or ceil_mode or (any(sliding.padding) and not counts_padding):
        raise EverywhereError
    return _slide(tensor, sliding, 0.0, lambda x: func(x, kernel, sliding.stride, [0, 0], False, True, divisor))


def _filled(args: tuple[Any, ...], *defaults: Any) -> tuple[Any, ...]:
    """Arguments of a pooling, of which the first two have no default."""
    return args + defaults[len(args) - 2 :]


RULES: dict[Function, Rule] = {
    aten.convolution.default: _convolve,
    aten.max_pool2d_with_indices.default: _pool_maximum,
    aten.avg_pool2d.default: _pool_average,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _stored_batch_norm,
    aten.cat.default: _concatenate,
    aten._prelu_kernel.default: _pointwise,
}
