"""Who is still alive: the storage of every activation, gradient and batch of a run, watched through weak references."""

from __future__ import annotations

import gc
import sys
import types

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.contract.nets import pl


def watch(tensor):
    """A weak reference to the memory of a tensor, which a view, a slice or `detach()` keeps alive like the tensor."""
    return StorageWeakRef(tensor.untyped_storage())


class Lifetimes(pl.Callback):
    """Notes what each training batch makes; stands first, and looks when the next batch begins.

    By then nothing but the model's own `.grad` may be left of the batch before: Lightning has let go of it.

    Attributes:
        alive: (step, what) of all that was left.
        noted: How many of each kind were looked at.
    """

    def __init__(self):
        self.alive = []
        self.noted = {}
        self._watched = []
        self._step = 0
        self._handles = []

    def setup(self, trainer, pl_module, stage):
        for name, module in pl_module.named_modules():
            if not list(module.children()):
                self._handles.append(module.register_forward_hook(self._listen(name)))
        for name, parameter in pl_module.named_parameters():
            self._handles.append(parameter.register_hook(self._catch(f"gradient of {name}")))

    def _listen(self, name):
        def hook(module, args, output):
            if not isinstance(output, torch.Tensor):
                return
            self._note(f"activation of {name}", output)
            if output.requires_grad:
                output.register_hook(self._catch(f"gradient of the activation of {name}"))

        return hook

    def _catch(self, what):
        return lambda gradient: self._note(what, gradient)

    def _note(self, what, tensor):
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self._watched.append((self._step, what, watch(tensor)))
            kind = what.split(" of ")[0]
            self.noted[kind] = self.noted.get(kind, 0) + 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look(pl_module)
        self._step = trainer.global_step
        self._note("batch of images", batch[0])
        self._note("batch of labels", batch[1])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.look(pl_module)
        self._note("batch of images", batch[0])
        self._note("batch of labels", batch[1])

    def on_train_epoch_start(self, trainer, pl_module):
        self.look(pl_module)

    def look(self, pl_module):
        """Whatever is left of what was noted, but what the model itself holds, should not be."""
        gc.collect()
        watched, self._watched = self._watched, []
        own = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        held = {watch(gradient).cdata for gradient in own}
        self.alive += [(step, what) for step, what, ref in watched if not ref.expired() and ref.cdata not in held]

    def teardown(self, trainer, pl_module, stage):
        for handle in self._handles:
            handle.remove()


def live_bytes(roots, others):
    """Size of all that hangs on these objects and not on the others: what a checkpoint does not show counts too."""
    seen = {id(other) for other in others}
    size, waiting = 0, list(roots)
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | types.ModuleType | types.FunctionType | types.BuiltinMethodType):
            continue
        seen.add(id(each))
        size += each.untyped_storage().nbytes() if isinstance(each, torch.Tensor) else sys.getsizeof(each)
        waiting += gc.get_referents(each)
    return size
