"""Where a run computes: device, precision, layout, threads, and the random streams."""

import contextlib
import ctypes
import hashlib
import os
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from aerl.types import UserError

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

Precision = Literal["fp32", "bf16"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Hardware:
    """The machine as the rest of aerl sees it. Training may run in bf16; attacks are always fp32."""

    device: torch.device
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, model: ModuleT) -> ModuleT:
        """Move a model here, in the layout its convolutions are fastest in."""
        return model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload, no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward passes of training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def set_up(
    *,
    device: str,
    precision: Precision,
    tf32: bool,
    channels_last: bool,
    compile: bool,
    threads: int | None,
    deterministic: bool,
) -> Hardware:
    """Make this process compute as configured; a UserError where the machine cannot.

    TF32 is said either way, because PyTorch's default differs between matmul and convolution.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "hardware.device=cuda: PyTorch sees no GPU here; hardware=cpu or hardware=auto would do"
        )
    if device == "cpu":
        _keep_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if (
        deterministic != torch.are_deterministic_algorithms_enabled()
    ):  # even to say no imports the whole compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    return Hardware(torch.device(device), precision, channels_last, compile)


def _keep_memory() -> None:
    """Let glibc keep what it has freed: else every large activation is mapped and paged in anew at each step,
    which costs a good part of a training step on the CPU. Elsewhere than on glibc this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def describe(hardware: Hardware) -> dict[str, str]:
    """What a reader of the numbers must know of the machine and its software."""
    import torchvision

    cuda = hardware.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "precision": hardware.precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
    }


def seed_from(*words: int | str) -> int:
    """A 63-bit seed that depends on every word: streams of one run never overlap by accident."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one purpose, e.g. `stream(seed, "actions", epoch)`."""
    return torch.Generator(device).manual_seed(seed_from(*words))
