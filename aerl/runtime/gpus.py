"""The GPUs of this machine, and one of them for each worker process of a multirun."""

import functools
import itertools
import logging
import os
import re
import tempfile
import time
from pathlib import Path

from aerl.runtime.files import try_lock

log = logging.getLogger("aerl")

_SECONDS_BETWEEN_TRIES = 1.0


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; does not initialise CUDA."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    words = (word.strip() for word in given.split(","))
    return list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, words))  # CUDA stops at any other word


@functools.cache
def claim() -> None:
    """Reserve one GPU for this process and all its jobs; wait until one is free. Call it before CUDA is initialised.

    The claim is a lock on a file in this user's temporary folder, so two multiruns do not share a GPU either; the
    kernel releases it when the process ends. Without a GPU this does nothing.
    """
    names = visible()
    folder = Path(tempfile.gettempdir()) / f"aerl-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for attempt in itertools.count() if names else ():
        for name in names:
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if not try_lock(file, folder):
                os.environ["CUDA_VISIBLE_DEVICES"] = name  # the file stays open and locked
                log.info("on GPU %s", name)
                return
            os.close(file)
        if attempt == 0:
            log.info("waiting: other jobs use all GPUs (%s)", ", ".join(names))
        time.sleep(_SECONDS_BETWEEN_TRIES)
