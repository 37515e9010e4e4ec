"""Finds where the output of each filter becomes its activation, while the model runs.

What counts, by construction of the network (a *filter* is an output channel of a convolution, of a transposed
convolution, or of a linear layer that a non-linearity follows):

| network | the activation of a filter |
|---|---|
| conv, ReLU in any spelling (module, in-place, shared, functional) | the output of the ReLU |
| conv, BatchNorm, ReLU; conv, pooling, ReLU; conv, dropout, ReLU | the output of the ReLU |
| conv, BatchNorm, sum with a shortcut, ReLU (ResNet) | the output of the BatchNorm; the ReLU is a unit of kind `sum` |
| conv whose output several layers read (DenseNet) | each branch; the filter is dead if all are |
| LeakyReLU, GELU, SiLU, Hardswish, ... | the output of that non-linearity |
| conv, permutation, LayerNorm, linear (ConvNeXt) | the output of the LayerNorm: no non-linearity follows it alone |
| no activation at all | the last output that still belongs to the layer alone |

Group- and LayerNorm mix channels: behind them a filter whose own output is constant may vary, and then it counts as
alive. A product with another activation (squeeze-and-excitation, gating) ends the chain like a sum does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_interp.functional import ops
from lightning_interp.functional.hooks import ATTENTION, QuietHook, enter_mode, function_stack, in_backward, leave_mode
from lightning_interp.functional.layout import Layout, mover
from lightning_interp.functional.strands import StrandBook, tensors_in
from lightning_interp.functional.undisturbed import nesting
from lightning_interp.functional.units import End, Reader, Strand, Unit, sum_unit

__all__ = ["ActivationTracer", "End", "Reader", "Unit"]


class ActivationTracer(TorchFunctionMode):
    """Follows the outputs of filter layers through a forward and hands each activation to a reader.

    Enter it around a forward: `with ActivationTracer(model, reader): model(images)`. It changes no result, and holds no
    tensor alive but what only a loss, or a number for a log, has read so far; an error in it, or in the reader, ends
    the tracing and is kept in `error`.

    Args:
        model: Any module.
        reader: Called with each `End`, under no_grad, in the middle of the forward; must not wait for the device.
        units: What earlier traces found; updated.
        follow: Names of the layers to follow; None follows all.
    """

    def __init__(
        self, model: nn.Module, reader: Reader, *, units: dict[str, Unit] | None = None, follow: set[str] | None = None
    ) -> None:
        super().__init__()
        self.units: dict[str, Unit] = {} if units is None else units
        self.error: Exception | None = None
        self.reached: set[str] = set()  # layers whose output came by
        self.seconds = 0.0  # on the host, inside the forward: to follow and to read
        self._model = model
        self._follow = follow
        self._book = StrandBook(self.units, reader)
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}
        self._inside = 0
        self._listening = False
        self._level = 0
        self._above: list[TorchFunctionMode] = []  # modes that were on when it was entered

    # ------------------------------------------------------------------ entering and leaving

    def __enter__(self) -> ActivationTracer:
        """Puts hooks on the layers to follow; the first that is called starts to listen to torch functions.

        Not before: a compiled function that would find the mode on is compiled anew for it, and calls no hook.
        """
        self._level, self._above = nesting(), function_stack()
        for name, module in self._model.named_modules():
            if isinstance(module, ops.OWNERS) and (self._follow is None or name in self._follow):
                self._hook_layer(name, module)
            elif isinstance(module, ATTENTION):
                self._handles[module] = [module.register_forward_pre_hook(QuietHook(self._before_attention))]
        return self

    def __exit__(self, *exception: object) -> None:
        """Takes everything off; what nothing has read yet is handed over as it is."""
        self._unhook(list(self._handles))
        leave_mode(self)
        self._listening = False
        if not any(exception):
            self._guard(self._book.finish)
        self._book.clear()

    def _hook_layer(self, name: str, module: nn.Module) -> None:
        training = module.training  # calls in another mode are not this batch's own forward
        before = functools.partial(self._enter_layer, training)
        after = functools.partial(self._leave_layer, name, training)
        self._handles[module] = [
            module.register_forward_pre_hook(QuietHook(before)),
            module.register_forward_hook(QuietHook(after), always_call=True),
        ]

    def _unhook(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for handle in self._handles.pop(module, ()):
                handle.remove()

    def _before_attention(self, module: nn.Module, args: Any) -> None:
        """In eval mode everything goes, until the next layer outside: the fast path must find nothing of ours."""
        if not module.training:
            if self._listening and self._concerned():
                self._guard(lambda: self._book.end(*tensors_in(args)))
            self._unhook(module.modules())
            leave_mode(self)
            self._listening = False

    # ------------------------------------------------------------------ layers with filters

    def _enter_layer(self, training: bool, module: nn.Module, args: Any) -> None:
        if not self._listening and self._concerned():
            enter_mode(self, self._above)
            self._listening = True
        self._inside += 1
        if self._inside == 1 and not self.error and self._concerned():
            self._guard(lambda: self._book.end(*tensors_in(args)))

    def _leave_layer(self, name: str, training: bool, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1
        if self._inside or self.error or module.training is not training or not self._concerned():
            return
        if isinstance(output, Tensor):
            self._guard(lambda: self._begin(name, module, output))

    def _begin(self, name: str, module: nn.Module, output: Tensor) -> None:
        if not output.is_floating_point():
            return
        self.reached.add(name)
        linear = isinstance(module, nn.Linear)
        axis = output.ndim - 1 if linear else output.ndim - 1 - len(module.kernel_size)  # type: ignore[arg-type]
        channels = output.shape[axis]
        if name not in self.units:
            self.units[name] = Unit(name, "linear" if linear else "conv", channels, layers=frozenset({name}))
        self.units[name].num_filters = channels  # the user may have put another layer in its place
        strand = Strand(name, Layout(axis, 0, channels, channels), frozenset({name}), self._book.next_call())
        self._book.put(output, (strand,))

    # ------------------------------------------------------------------ torch functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function as it is, and notes what it does to followed channels."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled function, which nobody can watch
            return func(*args, **kwargs)
        if self._inside or self.error or self._book.empty or not args:
            return func(*args, **kwargs)
        name = ops.base_name(func)
        if name in ops.OVERHEARD or not self._concerned():
            return func(*args, **kwargs)
        followed = self._book.among(args)
        if not followed:
            return func(*args, **kwargs)
        in_place = ops.writes(func, kwargs)
        plan = self._guard(lambda: self._before(name, followed, args, kwargs, in_place=in_place))
        result = func(*args, **kwargs)
        if plan is not None and not self.error:
            self._guard(lambda: self._after(plan, result))
        return result

    def _before(
        self, name: str, followed: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, in_place: bool
    ) -> Callable[[Tensor], tuple[Strand, ...]]:
        """What the operation will do, decided before it runs: it may write over its input."""
        first, strands = followed[0], self._book.of(followed[0])
        if name in ops.NON_LINEARITIES and args[0] is first:
            activation = ops.activation_name(name, args, kwargs)
            self._book.read(first)
            return lambda result: self._activate(activation, strands, result)
        if name in ops.CONCATENATIONS and (joined := self._concatenate(args, kwargs)) is not None:
            self._book.read(*followed)
            return lambda result: joined
        combines = name in ops.COMBINATIONS and not self._is_constant(name, args, first)
        moved = None if combines else mover(name, tuple(first.shape), args[1:], kwargs)
        if moved is not None:
            return lambda result: self._move(first, moved, result)
        # Something that is not this layer's alone reads the output: what counts is the output up to here.
        if in_place:
            self._book.end(*followed)
        summands = [strand for tensor in followed for strand in self._book.of(tensor)]

        def conclude(result: Tensor) -> tuple[Strand, ...]:
            if not in_place:
                self._conclude(followed, result)
            return self._sum(summands, result) if combines and name in ops.SUMS else ()

        return conclude

    def _move(
        self, tensor: Tensor, moved: Callable[[Layout, Tensor], Layout | None], result: Tensor
    ) -> tuple[Strand, ...]:
        if not result.ndim:
            self._conclude([tensor], result)
            return ()
        kept = []
        for strand in self._book.of(tensor):
            layout = moved(strand.layout, result)
            if layout is not None and layout.fits(result.shape):
                kept.append(strand if layout is strand.layout else strand._replace(layout=layout))
            else:  # mixed with other channels, or spread over several axes: it ends here
                self._book.end_strand(strand, tensor)
        self._book.read(tensor)
        return tuple(kept)

    def _conclude(self, followed: list[Tensor], result: Tensor) -> None:
        """Ends what a result was made of. A check is no reader, and a single number may be a loss or for a log."""
        if result.dtype == torch.bool:
            return
        if result.ndim:
            self._book.end(*followed)
            return
        self._book.postpone(followed)

    def _after(self, plan: Callable[[Tensor], tuple[Strand, ...]], result: Any) -> None:
        tensor = next(tensors_in(result), None)
        if tensor is None:
            return
        strands = plan(tensor)
        if strands:
            self._book.put(tensor, strands)
        else:
            self._book.forget(tensor)

    def _activate(self, activation: str, strands: tuple[Strand, ...], result: Tensor) -> tuple[Strand, ...]:
        for strand in strands:
            if strand.unit is not None:
                self.units[strand.unit].activations.add(activation)
                self._book.hand_over(strand, activation, result)
        layout = strands[0].layout
        sources = frozenset[str]().union(*(strand.sources for strand in strands))
        return (Strand(None, layout._replace(start=0, size=layout.width), sources),)

    def _concatenate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Strand, ...] | None:
        tensors = list(args[0])
        axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        axis = int(axis) % tensors[0].ndim
        width = sum(tensor.shape[axis] for tensor in tensors)
        joined: list[Strand] = []
        start = 0
        for tensor in tensors:
            for strand in self._book.of(tensor):
                layout = strand.layout
                if layout.axis != axis or layout.outer != 1 or layout.inner != 1:
                    return None
                joined.append(strand._replace(layout=layout._replace(start=start + layout.start, width=width)))
            start += tensor.shape[axis]
        return tuple(joined)

    def _is_constant(self, name: str, args: tuple[Any, ...], followed: Tensor) -> bool:
        """Whether the other operand only scales or shifts channels or samples, the same way at every position."""
        other = args[1] if len(args) > 1 and args[0] is followed else args[0]
        if not isinstance(other, Tensor) or other is followed:
            return not isinstance(other, Tensor)
        if self._book.of(other):
            return False
        if isinstance(other, nn.Parameter) or other.numel() == 1 or other.ndim < followed.ndim:
            return True
        if other.shape[0] == 1:  # in a batch of one that may be an activation too
            return followed.shape[0] > 1 or any(other is buffer for buffer in self._model.buffers())
        return name in ops.PRODUCTS and other.shape[0] == other.numel()  # one factor a sample: stochastic depth

    def _sum(self, strands: Sequence[Strand], result: Tensor) -> tuple[Strand, ...]:
        named = {strand.unit for strand in strands if strand.unit is not None}
        sources = frozenset[str]().union(*(strand.sources for strand in strands))
        layers = frozenset(name for name in named if self.units[name].kind != "sum") or sources
        layout = strands[0].layout
        layout = layout._replace(start=0, size=layout.width)
        if not layout.fits(result.shape):
            return ()
        # Where not all layers are followed, an unknown sum can only be a part of one that nobody asked for.
        name = sum_unit(self.units, layers, layout.width, new=self._follow is None)
        return (Strand(name, layout, layers, self._book.next_call()),) if name is not None else ()

    # ------------------------------------------------------------------ bookkeeping

    def _concerned(self) -> bool:
        """Whether this is the forward we came for: no recomputation in backward, no forward of another callback."""
        return nesting() == self._level and not in_backward()

    def _guard(self, work: Callable[[], Any]) -> Any:
        """Runs our own code inside the user's forward: an error of ours must not become one of theirs."""
        started = time.perf_counter()
        try:
            with torch._C.DisableTorchFunction():  # in a hook our own mode is on, and would hear each look at a shape
                return work()
        except Exception as error:  # reported by whoever owns the reader
            self.error = error
            return None
        finally:
            self.seconds += time.perf_counter() - started
