"""``steering serve``: ``vllm serve`` with steering attached."""

from __future__ import annotations

import os

from steering_server.engine.plugin import enable_everywhere


def serve(arguments: list[str]) -> None:
    """Run vLLM's own ``serve`` subcommand on ``arguments``, the words after ``steering serve``.

    vLLM's parser is used as it is: every flag of this vLLM is there, and the plugin adds its own.
    """
    enable_everywhere()
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
