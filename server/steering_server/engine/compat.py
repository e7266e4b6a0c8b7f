"""Another vLLM against the ledger, read and never imported: ``make compat VLLM_SRC=…``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from steering_server.engine.patches import FRONT_END, OVERRIDES, PATCHES

OWN_CODE = Path(__file__).parents[1]
ENTRIES = [e for e in (*PATCHES, *FRONT_END, *OVERRIDES) if e.target.startswith("vllm.")]
"""Of the ledger: what a vLLM's source can be asked about."""


def problems(source: Path) -> list[str]:
    """What in a vLLM is not as this project needs it; empty if nothing.

    Checked are every entry of the ledger (the target exists and has the parameters relied on) and
    every name that our own code imports from vLLM.

    Args:
        source: a folder with ``vllm/`` in it: an unpacked wheel or a source tree.

    Raises:
        FileNotFoundError: no vLLM there.
    """
    if not (source / "vllm" / "__init__.py").is_file():
        raise FileNotFoundError(
            f"{source} has no vllm/__init__.py: must be a wheel's or a source tree"
        )
    found = []
    for entry in ENTRIES:
        module, _, qualname = entry.target.partition(":")
        node = _find(source, module, qualname.split("."))
        if isinstance(node, ast.ImportFrom):
            node = _find(source, node.module or "", qualname.split("."))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(f"{entry.target} does not exist; needed: {entry.why}")
            continue
        names = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        absent = [name for name in entry.parameters if name not in names | {"cls"}]
        if absent:
            found.append(f"{entry.target} lacks the parameters {', '.join(absent)}")
    for module, name in sorted(set(_imports())):
        if _file(source, f"{module}.{name}") is None and _find(source, module, [name]) is None:
            found.append(f"{module} has no {name}")
    return found


def _imports() -> Iterator[tuple[str, str]]:
    """(module, name) of everything that our code imports from vLLM."""
    for file in OWN_CODE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((node.module or "", alias.name) for alias in node.names)


def _file(source: Path, module: str) -> Path | None:
    path = source.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _find(source: Path, module: str, names: list[str]) -> ast.AST | None:
    """The definition (or assignment, or import) of a name in a module, by way of its classes."""
    file = _file(source, module)
    node: ast.AST | None = ast.parse(file.read_text()) if file else None
    for name in names:
        node = next((n for n in _statements(node) if name in _bound(n)), None)
    return node


def _statements(node: ast.AST | None) -> Iterator[ast.AST]:
    """A body's statements, those under `if` and `try` included."""
    for child in ast.iter_child_nodes(node) if node is not None else ():
        yield child
        if isinstance(child, ast.If | ast.Try):
            yield from _statements(child)


def _bound(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def main(arguments: list[str]) -> int:
    """Print what does not fit; the exit status is 1 if anything does not."""
    if len(arguments) != 1:
        sys.stderr.write("usage: make compat VLLM_SRC=<unpacked wheel or source tree>\n")
        return 2
    found = problems(Path(arguments[0]))
    entries = len(ENTRIES)
    imports = len(set(_imports()))
    for line in found:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{entries} ledger entries, {imports} imports: {len(found)} problem(s)\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
