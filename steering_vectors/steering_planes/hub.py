"""Where a plane is: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from steering_planes.artifact import CONFIG_FILE, TENSORS_FILE, Plane, PlaneError

SCHEME = "hf://"


def open_plane(location: str | Path) -> Plane:
    """The plane in a folder, or at ``hf://organisation/repository[/folder][@revision]``.

    From a repository come its JSON and its safetensors, and no other file. With ``HF_HUB_OFFLINE``
    set, or without a network, what the Hub's cache has is used.

    Raises:
        PlaneError: for everything wrong with it.
    """
    if not str(location).startswith(SCHEME):
        return Plane.load(Path(location))
    return Plane.load(download(str(location)))


def download(location: str) -> Path:
    """The folder in the Hub's cache that holds an ``hf://`` location.

    Raises:
        PlaneError: a location that does not parse, or that the Hub does not have.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?", location)
    if match is None:
        rule = "must be hf://organisation/repository, with /folder and @revision if need be"
        raise PlaneError(location, "location", location, rule)
    repository, folder, revision = match[1], match[2].strip("/"), match[3]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{folder}/" if folder else ""
    try:
        snapshot = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[f"{prefix}{name}" for name in (CONFIG_FILE, TENSORS_FILE)],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        raise PlaneError(location, "repository", repository, f"can't be had: {said}") from None
    return Path(snapshot, folder) if folder else Path(snapshot)
