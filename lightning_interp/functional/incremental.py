"""Runs a network on images that differ from known ones in a small rectangle, and computes only what that changes.

The covered images of an occlusion map are such images. A `PatchedTensor` takes the place of a batch of them: layer by
layer it keeps the feature maps of the few whole images and, of each version, the rectangle that can differ. Once that
is most of a map, or an operator comes that no rule is for, it becomes the ordinary tensor that it stands for. So a
model gives what it always gives, up to rounding; how much is saved depends on how far its convolutions spread a change.

Shapes: M whole images, B versions of them, K channels, H x W positions, h x w of them in a rectangle.

Source: Nakandala, Kumar and Papakonstantinou 2019 (Krypton): its exact incremental inference, without its
approximations.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lightning_interp.functional.regions import EverywhereError, Regions, Sliding, union
from lightning_interp.functional.small_maps import convolve

aten = torch.ops.aten
Function = Any  # an overload of an operator
Rule = Callable[[Function, tuple[Any, ...], Mapping[str, Any]], Any]


class Patches(NamedTuple):
    """Whole maps, and what each of B versions of them has in its rectangle.

    Attributes:
        whole: (M, K, H, W).
        values: (B, K, h, w).
        regions: Where these are.
    """

    whole: Tensor
    values: Tensor
    regions: Regions

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.whole.shape[2], self.whole.shape[3]

    @property
    def layout(self) -> torch.memory_format:
        """That of the whole maps: channels last or not."""
        last = self.whole.is_contiguous(memory_format=torch.channels_last) and not self.whole.is_contiguous()
        return torch.channels_last if last else torch.contiguous_format

    def inside(self, regions: Regions) -> Tensor:
        """The values in rectangles that hold its own."""
        if regions is self.regions:
            return self.values
        found = regions.read(self.whole)
        self.regions.within(regions).write(self.values, found)
        return found.contiguous(memory_format=self.layout)

    def pasted(self) -> Tensor:
        """(B, K, H, W), all versions."""
        maps = self.whole[torch.from_numpy(self.regions.source).to(self.whole.device)]
        maps = maps.contiguous(memory_format=self.layout)
        self.regions.write(self.values, maps)
        return maps


_pasting = threading.Lock()  # two threads of a model may need the same tensor


class PatchedTensor(Tensor):
    """(B, K, H, W): stands for all versions of some maps, of which it has but patches.

    What needs a tensor with memory, as `numpy` and `copy.deepcopy` do, gets the ordinary one; what reaches past
    PyTorch for it, in C, gets an error. No graph leads back through it.

    Attributes:
        content: Patches; or the ordinary tensor, once that was needed. From then on this is a name for that one, so
            that a view of it stays one.
    """

    content: Patches | Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[PatchedTensor], content: Patches) -> PatchedTensor:
        """Has the layout of the whole maps."""
        whole = content.whole
        size = (len(content.values), *whole.shape[1:])
        strides = torch.empty(size, device="meta").contiguous(memory_format=content.layout).stride()
        made = Tensor._make_wrapper_subclass(cls, size, strides=strides, dtype=whole.dtype, device=whole.device)
        torch._C._set_throw_on_mutable_data_ptr(made)  # its address would be null
        made.content = content
        return made

    def ordinary(self) -> Tensor:
        """The tensor that it stands for."""
        with _pasting:
            if not isinstance(self.content, Tensor):
                self.content = self.content.pasted()
            return self.content

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator by its rule, or else on ordinary tensors."""
        kwargs = kwargs or {}
        rule = RULES.get(func, _pointwise if _is_pointwise(func) else None)
        if rule is not None:
            try:
                return rule(func, args, kwargs)
            except EverywhereError:
                pass
        plain_args, plain_kwargs = tree_map_only(PatchedTensor, PatchedTensor.ordinary, (args, dict(kwargs)))
        result = func(*plain_args, **plain_kwargs)
        if not (func._schema.is_mutable and isinstance(args[0], PatchedTensor) and result is plain_args[0]):
            return result
        if (result.shape, result.stride()) != (args[0].shape, args[0].stride()):
            raise RuntimeError(f"{func} changes the shape of a tensor that is already known by another one.")
        return args[0]

    # ------------------------------------------------------------------ what asks for memory

    def numpy(self, *, force: bool = False) -> Any:
        """Of the ordinary tensor."""
        return self.ordinary().numpy(force=force)

    def data_ptr(self) -> int:
        """Of the ordinary tensor."""
        return self.ordinary().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the ordinary tensor."""
        return self.ordinary().untyped_storage()

    def storage(self) -> Any:
        """Of the ordinary tensor."""
        return self.ordinary().storage()  # type: ignore[no-untyped-call]

    def share_memory_(self) -> PatchedTensor:
        """That of the ordinary tensor."""
        self.ordinary().share_memory_()  # type: ignore[no-untyped-call]
        return self

    def apply_(self, function: Callable[[Any], Any]) -> PatchedTensor:
        """On the ordinary tensor."""
        self.ordinary().apply_(function)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A model that keeps what it computed can be copied, and then has ordinary tensors."""
        copied: Tensor = self.ordinary().detach().clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """And pickled."""
        return self.ordinary().detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __dlpack__(self, **options: Any) -> Any:
        """Of the ordinary tensor."""
        return self.ordinary().__dlpack__(**options)

    @property
    def data(self) -> Any:
        """As ever; but nothing can be put in its place, which would go unnoticed."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        raise RuntimeError("A patched tensor can't be given other data.")


# ---------------------------------------------------------------------- operators on each position alone


@functools.cache
def _is_pointwise(func: Function) -> bool:
    """Whether it makes one new tensor, or writes over its first, position by position."""
    if torch.Tag.pointwise not in func.tags or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    returned = func._schema.returns
    return len(returned) == 1 and (returned[0].alias_info is None or returned[0].alias_info.is_write)


def _pointwise(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Activations, sums, products, comparisons: of patched tensors, and of what is the same at all positions."""
    leaves, structure = tree_flatten((args, dict(kwargs)))
    contents = _contents(leaf for leaf in leaves if isinstance(leaf, PatchedTensor))
    constant = (leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PatchedTensor))
    if not all(map(_is_same_everywhere, constant)):
        raise EverywhereError
    writes = func._schema.is_mutable
    if writes and (not isinstance(args[0], PatchedTensor) or any(isinstance(v, Tensor) for v in kwargs.values())):
        raise EverywhereError  # not over its first
    regions = _around(contents)

    def run(own: Iterable[Tensor]) -> Tensor:
        rest = iter(own)
        own_args, own_kwargs = tree_unflatten(
            [next(rest) if isinstance(leaf, PatchedTensor) else leaf for leaf in leaves], structure
        )
        result: Tensor = func(*own_args, **own_kwargs)
        return result

    values, whole = run([each.inside(regions) for each in contents]), run([each.whole for each in contents])
    if not writes:
        return PatchedTensor(Patches(whole, values, regions))
    args[0].content = Patches(whole, values, regions)
    return args[0]


def _contents(tensors: Iterable[Any]) -> list[Patches]:
    """Of those tensors, if all of them have patches, of the same images and for maps of one size."""
    found = [tensor.content if isinstance(tensor, PatchedTensor) else None for tensor in tensors]
    contents = [content for content in found if isinstance(content, Patches)]
    if len(contents) < len(found):
        raise EverywhereError
    kinds = {(len(each.whole), id(each.regions.source), each.size) for each in contents}
    if len(kinds) != 1:
        raise EverywhereError
    return contents


def _is_same_everywhere(tensor: Tensor) -> bool:
    """Whether it has one value for all positions and images, or one for each channel."""
    if tensor.ndim in {3, 4}:
        return tensor.shape[-2:] == (1, 1) and (tensor.ndim == 3 or tensor.shape[0] == 1)
    return tensor.numel() == 1 and tensor.ndim < 3


def _around(contents: Sequence[Patches]) -> Regions:
    """Rectangles that hold those of all."""
    first = contents[0].regions
    same = all(each.regions is first for each in contents)
    return first if same else union([each.regions for each in contents], contents[0].size)


def _batch_norm(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """With stored statistics: (input, weight, bias, mean, variance, training, ...); one overload has no `training`."""
    if kwargs or args[5] is True:
        raise EverywhereError
    (content,) = _contents(args[:1])
    whole, *statistics = func(content.whole, *args[1:])
    values = func(content.values, *args[1:])[0]
    return PatchedTensor(Patches(whole, values, content.regions)), *statistics


def _concatenate(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Of channels."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if axis not in {1, -3}:
        raise EverywhereError
    contents = _contents(args[0])
    regions = _around(contents)
    values = func([each.inside(regions) for each in contents], 1)
    return PatchedTensor(Patches(func([each.whole for each in contents], 1), values, regions))


# ---------------------------------------------------------------------- windows that slide


def _slide(tensor: Any, sliding: Sliding, fill: float, apply: Callable[[Tensor], Tensor]) -> PatchedTensor:
    """A convolution or pooling; `apply` is without its padding."""
    (content,) = _contents([tensor])
    after, read = content.regions.after(sliding, content.size)
    vertical, horizontal = sliding.padding
    border = (horizontal, horizontal, vertical, vertical)
    whole = pad(content.whole, border, value=fill) if any(border) else content.whole
    if sliding.pointwise:
        values = content.values
    else:
        values = read.read(whole)
        content.regions.moved(vertical, horizontal).within(read).write(content.values, values)
        values = values.contiguous(memory_format=content.layout)
    return PatchedTensor(Patches(apply(whole), apply(values), after))


def _convolve(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    tensor, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if transposed or isinstance(weight, PatchedTensor) or isinstance(bias, PatchedTensor):
        raise EverywhereError
    sliding = Sliding.of(weight.shape[2:], stride, padding, dilation)
    rest = (bias, stride, [0, 0], dilation, False, output_padding, groups)
    return _slide(tensor, sliding, 0.0, lambda x: convolve(func, x, weight, *rest))


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
    """Arguments of a pooling with what was left out: the first two have no default."""
    return args + defaults[len(args) - 2 :]


RULES: dict[Function, Rule] = {
    aten.convolution.default: _convolve,
    aten.max_pool2d_with_indices.default: _pool_maximum,
    aten.avg_pool2d.default: _pool_average,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.cat.default: _concatenate,
    aten._prelu_kernel.default: _pointwise,
}
