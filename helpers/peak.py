"""The peak of what torch allocates, on any device: what `torch.cuda.max_memory_allocated` says on a GPU. Imports nothing of the series."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations make while it is active: `live` now and `peak`. Storages of `known` tensors do not count."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size
