"""The most bytes that tensors have held at a time: exact, and the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """`peak`: bytes of the tensors made while it was on, and still alive, at the worst moment. Kernels' own scratch is not seen."""

    def __init__(self):
        super().__init__()
        self.storages, self.bytes, self.peak = {}, 0, 0
        self.others = set()  # storages from before, weights say, of which views may be made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._pass_over(tensor.untyped_storage())
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage):
        key = storage._cdata
        if key in self.storages or key in self.others:
            return
        self.storages[key] = storage.nbytes()
        self.bytes += self.storages[key]
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, key)

    def _pass_over(self, storage):
        key = storage._cdata
        if key not in self.storages and key not in self.others:
            self.others.add(key)
            weakref.finalize(storage, self.others.discard, key)

    def _remove(self, key):
        self.bytes -= self.storages.pop(key)
