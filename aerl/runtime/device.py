"""Where a run computes: device, precision, layout, threads, and the random streams."""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

import aerl
from aerl.runtime.ddp import local_rank, world_size
from aerl.types import UserError, foreign_code

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# What this process began with, for the jobs of a multirun that do not set it.
_THREADS = torch.get_num_threads()
_WORKSPACE = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

Precision = Literal["fp32", "bf16"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Hardware:
    """The machine as the rest of aerl sees it. Training may run in bf16; validation and evaluation are fp32."""

    device: torch.device
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    fused: bool = False

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
    fused: bool = False,
    distributed: bool = False,
) -> Hardware:
    """Make this process compute as configured; a UserError where the machine cannot.

    Every setting that changes numbers is set either way: the jobs of a multirun share a process.
    With `distributed` each process of torchrun takes a GPU of its own, where there are GPUs.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: PyTorch sees no GPU here; hardware=cpu or hardware=auto would do")
    if device == "cuda" and distributed:
        device = f"cuda:{local_rank()}"
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"hardware=ddp: torchrun has started more processes than there are GPUs here, "
                f"{torch.cuda.device_count()}; --nproc-per-node=gpu starts one for each"
            )
        torch.cuda.set_device(device)
    if device == "cpu":
        _keep_memory()
    if (threads or _THREADS) != torch.get_num_threads():
        torch.set_num_threads(threads or _THREADS)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif _WORKSPACE is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if deterministic != torch.are_deterministic_algorithms_enabled():  # either way imports the whole compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    return Hardware(torch.device(device), precision, channels_last, compile, fused)


# What PyTorch, cuDNN, cuBLAS, oneDNN, NumPy and the operating system say of memory that they do not get.
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can(no|')t allocate memory|unable to allocate|bad_alloc|alloc_failed"
    "|cublascreate|cudnncreate|could not (create|execute) a primitive$",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out, on a GPU or the CPU, whichever library reports it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(str(error)) is not None


def check_compiler(hardware: Hardware) -> None:
    """Compile something small: a UserError where torch.compile finds no compiler, before a run begins."""
    with foreign_code("hardware.compile=true", remedy="it needs a C++ compiler; hardware.compile=false does not"):
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=hardware.device))


def _keep_memory() -> None:
    """Let glibc keep freed memory: else every step maps and pages in its large activations anew, which costs a good
    part of a training step on the CPU. Without glibc this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def describe(hardware: Hardware) -> dict[str, str]:
    """What a reader of the numbers must know of the machine and its software."""
    import torchvision

    cuda = hardware.device.type == "cuda"
    environment = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "cpu": _cpu(),
        "processes": str(world_size()) if world_size() > 1 else "",
        "precision": hardware.precision,
        "aerl": aerl.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "" if cuda else "",
        "torchvision": torchvision.__version__,
        **{name: _version(name) for name in ("numpy", "pyautoattack", "wandb")},
        "platform": platform.platform(),
    }
    return {name: value for name, value in environment.items() if value}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f"{match[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the code, with -dirty where files differ from it; nothing where the code is in no repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""


def seed_from(*words: int | str) -> int:
    """A 63-bit seed that depends on every word: streams of one run never overlap by accident."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one purpose, e.g. `stream(seed, "actions", epoch)`."""
    return torch.Generator(device).manual_seed(seed_from(*words))
