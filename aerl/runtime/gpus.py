"""Which GPUs this machine has, and one of them for each worker process of a multirun."""

import fcntl
import functools
import itertools
import logging
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

log = logging.getLogger("aerl")

_SECONDS_BETWEEN_TRIES = 1.0


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; PyTorch is not imported for it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:  # CUDA takes what comes before the first word that it does not know
        words = (word.strip() for word in given.split(","))
        return list(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, words))
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", listing.stdout, re.MULTILINE)


@functools.cache
def claim() -> None:
    """Take one GPU for as long as this process lives, whatever number of jobs it does; wait until one is free.

    Call it before CUDA is initialised, which reads CUDA_VISIBLE_DEVICES once. The claim is a lock on a file in a folder
    of this user's, so that the workers of two multiruns do not share a GPU either; the kernel frees it however
    the process ends. Without a GPU this does nothing.
    """
    names = visible()
    folder = Path(tempfile.gettempdir()) / f"aerl-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for attempt in itertools.count() if names else ():
        for name in names:
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            os.environ["CUDA_VISIBLE_DEVICES"] = name  # the file stays open, and locked
            log.info("on GPU %s", name)
            return
        if attempt == 0:
            log.info("waiting: other jobs have every GPU (%s)", ", ".join(names))
        time.sleep(_SECONDS_BETWEEN_TRIES)
