"""``steering serve``: ``vllm serve`` with steering attached."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

PLUGIN = "steering"

# The groups that VLLM_PLUGINS filters once it is set. Endpoint plugins are not here: they are
# off unless named, and stay so.
_FILTERED_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


def enable_plugin() -> None:
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


def serve(arguments: list[str]) -> None:
    """Run vLLM's own ``serve`` subcommand on ``arguments``, the words after ``steering serve``.

    vLLM's parser is used as it is: every flag of this vLLM is there, and the plugin adds its own.
    """
    enable_plugin()
    # What vLLM's own command sets; the helper that does so moved between 0.32 and 0.33.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="steering")
    command = ServeSubcommand()
    subparser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    subparser.usage = "steering serve [model_tag] [--steering-plane NAME=PATH ...] [options]"
    args = parser.parse_args(["serve", *arguments])
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
