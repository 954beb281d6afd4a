"""Work in batches that fit into memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from aerl.attacks import warn
from aerl.errors import UserError
from aerl.runtime.device import is_out_of_memory


def within_memory(work: Callable[[Tensor], None], index: Tensor, limit: int) -> int:
    """Do `work` on all samples of `index` (n,), at most `limit` at a time; returns the limit that sufficed.

    If memory runs out, the limit is halved with a warning, and the work repeated; UserError if one sample is too much.
    """
    while len(index):
        part = index[:limit]
        try:
            work(part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise UserError(
                    "out of memory with a single image; use hardware.device=cpu, a smaller dataset.size or model"
                ) from error
            limit = len(part) // 2
            warn(
                f"out of memory with {len(part)} images per batch, continuing with {limit}; this changes the draws of "
                "randomised models and of attacks with their own batch_size"
            )
        else:
            index = index[limit:]
            continue
        torch.cuda.empty_cache()  # now that the error holds no tensors; does nothing without CUDA
    return limit
