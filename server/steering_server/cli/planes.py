"""``steering import`` and ``steering inspect``: planes from elsewhere, and what a plane is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from steering_planes import Plane

BUNDLED = Path(__file__).parents[3] / "steering_vectors"
"""In a checkout, the planes that come with it."""


def import_plane(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A folder with plane.pt, plane.pt itself, an .npy file, or two .gguf files."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; its name names the plane.")
    ],
    name: Annotated[str | None, typer.Option(help="Another name for the plane.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The model it is for; by default what the source says.")
    ] = None,
    model_type: Annotated[
        str | None, typer.Option(help="As in the model's config.json: llama, qwen2, gemma2, …")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Of the model; by default as many as the source names.")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Which to steer, as 18.attn_in,18.mlp_in; by default the source's."),
    ] = None,
    default_mode: Annotated[
        Literal["rotate_by", "rotate_to"], typer.Option(help="The mode of requests that name none.")
    ] = "rotate_by",
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
) -> None:
    """Bring in a plane that others have published, without running any code of theirs."""
    from steering_planes import Site, legacy

    try:
        chosen = None if sites is None else [Site.parse(site) for site in sites.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sites") from None
    plane = legacy.import_plane(
        sources,
        name=name or output.resolve().name,
        base_model=base_model,
        model_type=model_type,
        num_layers=num_layers,
        sites=chosen,
        default_mode=default_mode,
    )
    plane.save(output, overwrite=force)
    config = plane.config
    typer.echo(
        f"{output}: plane {config.name} for {config.base_model_name_or_path}, "
        f"{len(config.sites)} sites"
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
        "digest": plane.digest,
        "steers": f"{len(config.sites)} sites in {len(layers)} layers: "
        + " ".join(map(str, config.sites)),
        "default": config.default_mode
        + ("" if config.default_angle is None else f" at {config.default_angle:g} degrees")
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
