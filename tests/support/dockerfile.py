"""Reads a Dockerfile, and carries out what needs no container."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "RUN", "USER", "WORKDIR"}
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    argument: str


@dataclass(frozen=True)
class Dockerfile:
    """A Dockerfile of a single stage."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        """Parse a file.

        Raises:
            ValueError: an instruction that isn't known here, or one that does not end.
        """
        found, words = [], ""
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            words += line.strip().removesuffix("\\")
            if line.endswith("\\"):
                continue
            name, _, argument = words.partition(" ")
            if name not in KNOWN or not argument.strip():
                raise ValueError(f"{path.name}:{number}: not an instruction: {words!r}")
            found.append(Instruction(name, argument.strip()))
            words = ""
        if words:
            raise ValueError(f"{path.name}: ends within {words!r}")
        if [i.name for i in found].count("FROM") != 1 or found[0].name != "FROM":
            raise ValueError(f"{path.name}: not a single stage that begins with FROM")
        return cls(tuple(found))

    def all(self, name: str) -> list[str]:
        """The arguments of every instruction of that name."""
        return [i.argument for i in self.instructions if i.name == name]

    @property
    def entrypoint(self) -> list[str]:
        """The words of the last ENTRYPOINT, which must be in the exec form."""
        words: list[str] = json.loads(self.all("ENTRYPOINT")[-1])
        return words

    @property
    def copied(self) -> list[str]:
        """What COPY takes from the context."""
        return [source for copy in self.all("COPY") for source in copy.split()[:-1]]

    def install(self, context: Path, root: Path, env: Mapping[str, str]) -> Path:
        """Carry out WORKDIR, COPY and those RUNs that call pip, below ``root``.

        Returns:
            The working directory at the end.
        """
        cwd = root
        for instruction in self.instructions:
            match instruction.name:
                case "WORKDIR":
                    cwd = root / instruction.argument.lstrip("/")
                    cwd.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    *sources, target = instruction.argument.split()
                    for source in sources:
                        copy(context / source, cwd / target)
                case "RUN" if " pip " in instruction.argument:
                    run(["sh", "-c", instruction.argument], cwd, env)
        return cwd


def copy(source: Path, target: Path) -> None:
    """As COPY does: a folder's content, or a file into a folder."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=NOT_COPIED, dirs_exist_ok=True)
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def run(command: list[str], cwd: Path, env: Mapping[str, str]) -> str:
    """Standard output; what else it said is in the error if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
