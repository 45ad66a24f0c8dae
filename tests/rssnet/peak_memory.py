"""The most memory that tensors take at once, counted exactly, on any device and on none (meta)."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active, as long as each lives.

    Args:
        known: Tensors that were there before; they don't count.

    Attributes:
        bytes: Alive now.
        peak: The most that were alive after any operation.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata for tensor in known}
        self.references: list[weakref.ref] = []
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.bytes += size

        def forget(_reference):
            self.alive.discard(key)
            self.bytes -= size

        self.references.append(weakref.ref(storage, forget))
