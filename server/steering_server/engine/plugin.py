"""The entry point of ``vllm.general_plugins``: called once in each of vLLM's processes."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.32,<0.34")

PLUGIN = "steering"

# The groups that VLLM_PLUGINS filters once it is set. Endpoint plugins are not here: they are
# off unless named, and stay so.
_FILTERED_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


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


def enable_everywhere() -> None:
    """Name our plugin in ``VLLM_PLUGINS``, without switching any other off.

    An unset ``VLLM_PLUGINS`` means every plugin but the endpoint plugins; a set one means those
    named and no others.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        plugins = {e.name for group in _FILTERED_GROUPS for e in entry_points(group=group)}
    else:
        plugins = set(filter(None, named.split(",")))
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(plugins | {PLUGIN}))
