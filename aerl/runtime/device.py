"""Device, precision, memory layout, threads, and random streams."""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

import aerl
from aerl.errors import UserError, foreign_code
from aerl.runtime.ddp import world_size

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

# The settings at the start of this process, for jobs of a multirun that do not set them.
_THREADS = torch.get_num_threads()
_WORKSPACE = os.environ.get("CUBLAS_WORKSPACE_CONFIG")

Precision = Literal["fp32", "bf16"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Hardware:
    """Where and how a run computes. Training may run in bf16; validation and evaluation are fp32."""

    device: torch.device
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    fused: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def place(self, model: ModuleT) -> ModuleT:
        """Move a model to the device, in the memory layout of the configuration."""
        return model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload, no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        """For the forward passes of training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def set_up(
    *, device: str, tf32: bool, threads: int | None, deterministic: bool, distributed: bool = False, **settings: Any
) -> Hardware:
    """Configure this process; UserError if the machine cannot do it. `settings` are those of `Hardware`.

    Every setting that changes numbers is set either way: the jobs of a multirun share a process.
    With `distributed`, each process of torchrun takes a GPU of its own, if there are GPUs.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device=cuda: PyTorch finds no GPU; use hardware=cpu or hardware=auto")
    if device == "cuda" and distributed:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UserError("hardware=ddp: torchrun started more processes than GPUs; use --nproc-per-node=gpu")
        torch.cuda.set_device(device)
    if device == "cpu":
        _keep_freed_memory()
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
    return Hardware(torch.device(device), **settings)


# The messages of PyTorch, cuDNN, cuBLAS, oneDNN, NumPy and the operating system.
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
    """UserError if torch.compile finds no compiler; called before a run starts."""
    with foreign_code("hardware.compile=true", remedy="needs a C++ compiler; or use hardware.compile=false"):
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=hardware.device))


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory: mapping large activations again in every step costs a good part of it on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def describe(hardware: Hardware) -> dict[str, str]:
    """The machine and the software, for readers of the numbers."""
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
        **{name: version(name) for name in ("torchvision", "numpy", "pyautoattack", "wandb")},
        "platform": platform.platform(),
    }
    return {name: value for name, value in environment.items() if value}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f"{match[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def _commit() -> str:
    """The commit of the code, with -dirty if files differ from it; "" outside a repository of aerl's own."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", f"--git-dir={root}/.git", f"--work-tree={root}", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    return ""


def seed_from(*words: int | str) -> int:
    """A 63-bit seed that depends on every word: streams of one run never overlap by accident."""
    digest = hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*words: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. `stream(seed, "actions", epoch)`."""
    return torch.Generator(device).manual_seed(seed_from(*words))
