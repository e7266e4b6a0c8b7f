"""``steering import`` and ``steering inspect``: planes from elsewhere, and what a plane is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

# Not in a function: typer reads the annotations.
from steering_planes.artifact import Mode, PlaneError
from steering_planes.sites import named

if TYPE_CHECKING:
    from steering_planes import Plane

BUNDLED = Path(__file__).parents[3] / "steering_vectors"
"""In a checkout, the planes that come with it."""


def import_plane(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A file or folder of a published layout, or hf://[datasets/]org/repository/path; "
            "or two with one direction a layer, for the two axes."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; its name names the plane.")
    ],
    name: Annotated[str | None, typer.Option(help="Another name for the plane.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="The model it is for: its folder, or a repository in the Hub's cache. Its config "
            "and its norms' gains are read, no more."
        ),
    ] = None,
    model_type: Annotated[
        str | None, typer.Option(help="As in the model's config.json, where that is not at hand.")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Likewise.")] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Which to steer: all, 12-20, 12-20.mlp_in, several by commas; by default the "
            "source's own."
        ),
    ] = None,
    default_mode: Annotated[
        Mode | None, typer.Option(help="The mode of requests that name none.")
    ] = None,
    index: Annotated[
        Literal["block-output", "hidden-states"] | None,
        typer.Option(
            help="What the source's numbers count: i is what block i puts out, or "
            "hidden_states[i], which layer i reads."
        ),
    ] = None,
    space: Annotated[
        Literal["residual", "norm"] | None,
        typer.Option(help="Where its directions live: the residual stream, or a norm's output."),
    ] = None,
    row: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Of a table of directions; twice for the two axes."),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Of a capping_config.pt: the experiment's id.")
    ] = None,
    residual_rms: Annotated[
        float | None,
        typer.Option(help="Of a capping_config.pt: the residual stream's rms where its caps hold."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
) -> None:
    """Bring in a plane that others have published, without running any code of theirs."""
    from steering_planes.formats import import_plane as bring_in

    if residual_rms is not None and not 0 < residual_rms < float("inf"):
        raise typer.BadParameter("must be above 0, and finite", param_hint="--residual-rms")
    plane = bring_in(
        sources,
        name=name or output.resolve().name,
        base_model=base_model,
        model_type=model_type,
        num_layers=num_layers,
        sites=sites,
        default_mode=default_mode,
        index=index,
        space=space,
        rows=row or (),
        experiment=experiment,
        residual_rms=residual_rms,
    )
    try:
        plane.save(output, overwrite=force)
    except FileExistsError:
        raise
    except OSError as error:
        rule = error.strerror or str(error)
        raise PlaneError(output, "output", output.name, f"can't be written: {rule}") from None
    config = plane.config
    typer.echo(
        f"{output}: plane {config.name} for {config.base_model_name_or_path}, "
        f"{len(config.sites)} sites: {named(config.sites)}"
    )


def inspect(
    plane: Annotated[
        str, typer.Argument(help="A folder, hf://organisation/repository, or a bundled plane.")
    ],
) -> None:
    """Say what a plane is, whether it is sound, and for which model."""
    from rich.console import Console
    from rich.table import Table

    found = locate(plane)
    config = found.config
    console = Console()
    facts = Table.grid(padding=(0, 2))
    for key, value in facts_of(found).items():
        facts.add_row(f"[bold]{key}[/bold]", value)
    console.print(facts)
    statistics = {site: dict(of) for site, of in config.statistics.items()}
    for site, means in (found.means or {}).items():
        statistics.setdefault(str(site), {})["rho"] = means.rho
    columns = sorted({key for of in statistics.values() for key in of})
    if columns:
        table = Table("site", "steered", *columns)
        for name, of in statistics.items():
            steered = "yes" if name in map(str, config.sites) else ""
            table.add_row(name, steered, *(f"{of[k]:.4f}" if k in of else "" for k in columns))
        console.print(table)


def locate(plane: str) -> Plane:
    """The plane at a location, or the bundled one of that name (``model/plane``).

    Raises:
        PlaneError: there is none, or it is not sound.
    """
    from steering_planes import open_plane

    bundled = BUNDLED / plane
    if not Path(plane).exists() and bundled.is_dir():
        return open_plane(bundled)
    return open_plane(plane)


def facts_of(plane: Plane) -> dict[str, str]:
    """What `inspect` says, in words."""
    from steering_planes import orthonormality_error

    config = plane.config
    worst = max(orthonormality_error(basis) for basis in plane.bases.values())
    layers = sorted({site.layer for site in config.sites})
    return {
        "plane": config.name,
        "model": f"{config.base_model_name_or_path} ({config.model_type}, {config.num_layers} "
        f"layers, hidden size {config.hidden_size})",
        "known by": "its name"
        if config.fingerprint is None
        else f"the gains of {len(config.fingerprint)} norms",
        "digest": plane.digest,
        "steers": f"{len(config.sites)} sites in {len(layers)} layers: "
        + " ".join(map(str, config.sites)),
        "default": config.default_mode
        + ("" if config.default_angle is None else f" at {config.default_angle:g} degrees")
        + ("" if config.default_strength is None else f", strength {config.default_strength:g}")
        + ("" if config.gate is None else f", where c1 exceeds {config.gate:g}"),
        "operations": ", ".join(plane.modes)
        + (
            " (made without class means; calibrate it again for add and cap)"
            if plane.means is None
            else ""
        ),
        "angles": config.angle_convention,
        "found by": f"{config.extraction.method}; {config.extraction.data}; "
        f"n = {config.extraction.n}",
        "sound": f"yes: finite, orthonormal to {worst:.1e}, digest as written",
    }
