"""What the name of a file, a folder or a model on the Hugging Face hub means on this machine."""

import functools
import re
from pathlib import Path

from aerl.errors import UserError, first_line

FILES = ("model.safetensors", "config.yaml", "summary.json")  # of a model on the hub; none of them can execute anything
_SECONDS = 10.0  # how long to wait for a hub that does not answer


def local(name: str, key: str = "checkpoint") -> Path:
    """The path that `name` means; a model on the hub is downloaded, or found in the cache if the hub is out of reach.

    Raises UserError about the `key` that named it.
    """
    try:
        return _fetch(name, key) if name.startswith("hf://") else Path(name).expanduser()
    except RuntimeError as error:  # no HOME and a user without a name, or ~nobody
        raise UserError(f"{key}={name}: cannot resolve ~; write the full path, or set HOME") from error


@functools.cache  # one run asks several times, and needs the same files
def _fetch(name: str, key: str) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download

    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise UserError(f"{key}={name}: must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repo, revision = match.groups()
    missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    try:
        try:  # once: the download itself would retry for minutes
            HfApi().model_info(repo, revision=revision, timeout=_SECONDS)
            offline = False
        except missing:
            raise
        except Exception:  # no network, HF_HUB_OFFLINE, a server in trouble
            offline = True
        paths = [hf_hub_download(repo, file, revision=revision, local_files_only=offline) for file in FILES]
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{key}={name}: the hub cannot be reached, and the model is not in its cache") from error
    except missing as error:
        reason = f"not on the hub, or without {', '.join(FILES)} (private: set HF_TOKEN or run `hf auth login`)"
        raise UserError(f"{key}={name}: {reason}") from error
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"{key}={name}: cannot be downloaded ({first_line(error)})") from error
    return Path(paths[0]).parent
