"""What `hf://` addresses: planes and files in repositories on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from steering_planes.artifact import CONFIG_FILE, TENSORS_FILE, Plane, PlaneError

SCHEME = "hf://"

SUFFIXES = (".gguf", ".json", ".npy", ".pt", ".pth", ".safetensors", ".svec")
"""Of the files that planes and vectors are published in."""

COMPANIONS = ("config.json", "metadata.json", "cfg.json")


@dataclass(frozen=True)
class Address:
    """``hf://[datasets/]organisation/repository[/path][@revision]``."""

    text: str
    repository: str
    kind: str
    """The Hub's type of repository: model or dataset."""
    path: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises PlaneError for what is no such address."""
        match = re.fullmatch(
            r"hf://(datasets/)?([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?", text
        )
        if match is None or match[2].startswith("datasets/"):
            rule = (
                "must be hf://organisation/repository or hf://datasets/organisation/repository, "
                "with /path and @revision if need be"
            )
            raise PlaneError(text, "location", text, rule)
        kind = "dataset" if match[1] else "model"
        return cls(text, match[2], kind, match[3].strip("/"), match[4])

    def download(self, patterns: Sequence[str]) -> Path:
        """What matches, in the Hub's cache: the folder or file at `path` (which may not exist).

        With ``HF_HUB_OFFLINE`` set, or without a network, what the cache has is used. Raises
        PlaneError where the Hub doesn't have the repository.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            snapshot = snapshot_download(
                self.repository,
                repo_type=self.kind,
                revision=self.revision,
                allow_patterns=list(patterns),
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            said = str(error).strip().splitlines()[0]
            rule = f"can't be had: {said}"
            raise PlaneError(self.text, "repository", self.repository, rule) from None
        return Path(snapshot, self.path) if self.path else Path(snapshot)


def open_plane(location: str | Path) -> Plane:
    """The plane in a folder, or at ``hf://[datasets/]organisation/repository[/folder][@revision]``.

    From a repository come its JSON and its safetensors, and no other file.

    Raises:
        PlaneError: for everything wrong with it.
    """
    if not str(location).startswith(SCHEME):
        return Plane.load(Path(location))
    address = Address.parse(str(location))
    prefix = f"{address.path}/" if address.path else ""
    files = [f"{prefix}{name}" for name in (CONFIG_FILE, TENSORS_FILE)]
    return Plane.load(address.download(files))


def fetch(location: str | Path) -> Path:
    """A file or folder of any kind, as it is, or downloaded from an ``hf://`` address.

    Raises:
        PlaneError: an address that does not parse, or that the Hub does not have.
    """
    if not str(location).startswith(SCHEME):
        return Path(location)
    address = Address.parse(str(location))
    if address.path:
        # A file or a folder: a name does not tell. What lies beside a file says what is in it.
        beside = [str(Path(address.path).with_name(name)) for name in COMPANIONS]
        patterns = [address.path, f"{address.path}/*", *beside]
    else:
        patterns = [f"*{suffix}" for suffix in SUFFIXES]
    found = address.download(patterns)
    if not found.exists():
        rule = f"is not in {address.repository}, or not in the Hub's cache"
        raise PlaneError(location, "path", address.path, rule)
    return found
