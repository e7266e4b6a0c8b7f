"""The entry point of ``vllm.general_plugins``: called once in each of vLLM's processes."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.32,<0.34")


class UnsupportedVersionError(RuntimeError):
    """A vLLM whose internals have not been checked against the ledger."""


def register() -> None:
    """Patch vLLM.

    Raises:
        UnsupportedVersionError: before anything is touched.
        PatchError: a vLLM in range that is not as the ledger says.
    """
    import vllm

    # A local part (+cpu, +cu130) says how it was built, not what it is.
    version = Version(Version(vllm.__version__).public)
    if not SUPPORTED.contains(version, prereleases=True):
        raise UnsupportedVersionError(
            f"steering-server supports vLLM {SUPPORTED}, this is {vllm.__version__}"
        )
    from steering_server.engine import patches

    patches.apply()
