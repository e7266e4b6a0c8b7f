"""The command line: one subcommand a module, imported when it is called."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from steering_server.cli.calibrate import calibrate
from steering_server.cli.planes import import_plane, inspect

app = typer.Typer(
    name="steering",
    help="Serve language models whose behaviour a request can dial by an angle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Without it typer would take a single subcommand for the whole program."""


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
    add_help_option=False,
)
def serve(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="MODEL [OPTIONS]")] = None,
) -> None:
    """Serve MODEL as `vllm serve` does, with steering; takes every flag of `vllm serve`."""
    from steering_server.cli import serve as command

    command.serve(arguments or [])


app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(calibrate)
app.command("import")(import_plane)
app.command()(inspect)


def main() -> None:
    """Run the command; an error that is the user's to mend is one line, not a traceback."""
    from steering_planes import PlaneError, SitesNotFoundError
    from steering_planes.calibration import CalibrationError
    from steering_planes.tables import ContrastError
    from steering_server.engine.settings import SettingsError

    try:
        app()
    except CalibrationError as error:
        # As where the classes hardly separate: there is no plane in them.
        typer.echo(f"steering: error: {error}", err=True)
        sys.exit(2)
    except (
        ContrastError,
        FileExistsError,
        PlaneError,
        SettingsError,
        SitesNotFoundError,
    ) as error:
        sys.exit(f"steering: error: {error}")
