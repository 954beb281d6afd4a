"""Models on the Hugging Face hub, as folders here: `hf://OWNER/NAME`, or `hf://OWNER/NAME@REVISION`.

Only files that cannot execute anything are fetched: safetensors, YAML and JSON. `huggingface_hub` is imported
where it is used; nothing here touches the network unless a name begins with hf://.
"""

import functools
import re
from pathlib import Path

from aerl.types import UserError, first_line

FILES = ("model.safetensors", "config.yaml", "summary.json")
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SECONDS = 10.0


def local(name: str, key: str = "checkpoint") -> Path:
    """The path that `name` means; the files of a model on the hub are downloaded, or found in its cache.

    A hub out of reach means the cache. Raises UserError about the `key` that named it.
    """
    try:
        return _fetch(name, key) if name.startswith("hf://") else Path(name).expanduser()
    except RuntimeError as error:  # no HOME and a user without a name, or ~nobody
        raise UserError(f"{key}={name}: ~ is unknown here; write the folder out, or set HOME") from error


@functools.cache  # one run asks several times, and should be given the same files
def _fetch(name: str, key: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{key}={name}: must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repo, revision = match.groups()
    try:
        # Asked first, and once: the download itself would repeat for minutes what times out.
        try:
            HfApi().model_info(repo, revision=revision, timeout=_SECONDS)
            reached = True
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # no network, HF_HUB_OFFLINE, a server in trouble
            reached = False
        paths = [Path(hf_hub_download(repo, file, revision=revision, local_files_only=not reached)) for file in FILES]
    except LocalEntryNotFoundError as error:
        raise UserError(f"{key}={name}: the hub cannot be reached, and the model is not in its cache") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{key}={name}: no such model on the hub; a private one needs HF_TOKEN or `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{key}={name}: the model has no such revision") from error
    except EntryNotFoundError as error:
        raise UserError(f"{key}={name}: is no model that aerl exported; that has {', '.join(FILES)}") from error
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"{key}={name}: cannot be downloaded ({first_line(error)})") from error
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise UserError(f"{key}={name}: changed while it was downloaded; repeat the command")
    return folders.pop()


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload an exported model to `repo` (OWNER/NAME), made if there is none; returns its address.

    A hub that does not answer is waited for ten seconds; an upload once begun takes what it takes. Raises
    UserError where there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push {repo}: must be OWNER/NAME")
    if get_token() is None:
        raise UserError(
            f"--push {repo}: there is no token; set HF_TOKEN or run `hf auth login`. The export is in {folder}"
        )
    api = HfApi()
    try:
        try:
            api.model_info(repo, timeout=_SECONDS)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*FILES, "README.md"])
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"--push {repo}: {first_line(error)}. The export is in {folder}") from error
    return f"{api.endpoint}/{repo}"
