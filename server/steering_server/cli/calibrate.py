"""``steering calibrate``: from a contrast set to a plane's artifact."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from steering_planes import Plane
    from steering_planes.calibration import Calibration

# Markdown, with the metadata block that Hugging Face reads.
_CARD = """\
---
base_model: {base}
tags: [activation-steering]
---

# Steering plane `{name}` for {base}

Turns the model's behaviour by an angle per request, without changing a weight or an activation's
length. 0° points at the positive class of the contrast set, about 180° at the negative one. The
default mode is `{mode}`.

## Intended use

Serving {base} with `steering serve … --steering-plane {name}=FOLDER`. Another model, a fine-tune
included, is refused unless a mismatch is allowed. A plane moves a tendency and is no safeguard: a
prompt can outweigh it, and whatever else differs between the two sides of the contrast set moves
too.

## How it was made

    {command}

From {data}, {n} examples a side, last prompt token, float32:
{options}.
The feature direction comes from site {feature_site}, PC1 explains {explained:.1%} of the
candidates' variance, and {steered} of {measured} sites are steered:

| site | positive class on b1 | negative class on b1 | length of the difference |
|---|---|---|---|
{rows}

Means of unit-length activations ± standard error.
"""


def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, or a repository.")],
    contrast_set: Annotated[
        Path,
        typer.Option(
            help="JSON: prompts and two system prompts, or two lists of prompts.",
            exists=True,
            dir_okay=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; its name names the plane.")],
    name: Annotated[str | None, typer.Option(help="Another name for the plane.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="The model's public name; by default the folder's or repository's."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The model's revision.")] = None,
    direction: Annotated[
        Literal["max_sim", "max_norm"],
        typer.Option(help="The candidate most like all others, or the longest one."),
    ] = "max_sim",
    planes: Annotated[
        Literal["global", "per_site"],
        typer.Option(help="One plane for all sites, or each site's own direction."),
    ] = "global",
    granularity: Annotated[
        Literal["layer", "site"],
        typer.Option(help="Select a layer if all its norms discriminate, or norm by norm."),
    ] = "layer",
    margin: Annotated[
        float, typer.Option(min=0, help="Standard errors between a class mean and 0.")
    ] = 0.0,
    default_mode: Annotated[
        Literal["rotate_by", "rotate_to"], typer.Option(help="The mode of requests that name none.")
    ] = "rotate_by",
    default_angle: Annotated[
        float | None, typer.Option(min=-360, max=360, help="Degrees; by default none.")
    ] = None,
    gate: Annotated[
        float | None, typer.Option(help="Steer only tokens whose c1 exceeds this.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="Markdown to include in the card as what was measured.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
) -> None:
    """Find the steering plane that separates the two sides of a contrast set."""
    # Before the minutes of work, and again when the plane is saved.
    if output.exists() and not force:
        raise FileExistsError(f"{output}: exists; --force replaces it")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steering_planes.artifact import Extraction
    from steering_planes.calibration import Options, format_confounds
    from steering_planes.calibration import calibrate as find
    from steering_planes.contrast import ContrastSet
    from steering_server.activations import chat_template_sha256, collect

    examples = ContrastSet.load(contrast_set)
    for warning in format_confounds(examples.positive_prompts(), examples.negative_prompts()):
        typer.echo(f"warning: {warning}: the plane will hold that difference too", err=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(model, revision=revision)
    network: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype="float32")
    positive, negative = (collect(network, tokenizer, side) for side in examples.conversations())
    options = Options(direction, planes, granularity, margin)
    calibration = find(positive, negative, options)
    folder = Path(model)
    plane = calibration.to_plane(
        name=name or output.resolve().name,
        base_model_name_or_path=base_model or (folder.resolve().name if folder.is_dir() else model),
        revision=revision,
        model_type=network.config.model_type,
        num_layers=network.config.get_text_config().num_hidden_layers,
        default_mode=default_mode,
        default_angle=default_angle,
        gate=gate,
        extraction=Extraction(
            method=str(options),
            data=f"{contrast_set.name} sha256:{_sha256(contrast_set)}",
            n=min(len(examples.positive_prompts()), len(examples.negative_prompts())),
            chat_template_sha256=chat_template_sha256(tokenizer),
        ),
    )
    card = _card(
        plane,
        calibration,
        _command(sys.argv),
        None if measured is None else measured.read_text("utf-8"),
    )
    plane.save(output, readme=card, overwrite=force)
    typer.echo(f"{output}: plane {plane.name}, sites {', '.join(map(str, plane.sites))}")


def _command(argv: list[str]) -> str:
    """The command line as it was typed, with ~ for the home folder."""
    words = argv[1:] if argv[1:2] == ["calibrate"] else ["calibrate", *argv[1:]]
    home = f"{Path.home()}{os.sep}"
    typed = [shlex.quote(word) for word in ["steering", *words]]
    return " ".join(f"~/{w.removeprefix(home)}" if w.startswith(home) else w for w in typed)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _card(plane: Plane, calibration: Calibration, command: str, measured: str | None) -> str:
    rows = [
        f"| {site} | {of.mean_positive:+.4f} ± {of.stderr_positive:.4f} "
        f"| {of.mean_negative:+.4f} ± {of.stderr_negative:.4f} | {of.difference_norm:.3f} |"
        for site, of in calibration.statistics.items()
        if site in calibration.bases
    ]
    card = _CARD.format(
        name=plane.name,
        base=plane.config.base_model_name_or_path,
        mode=plane.config.default_mode,
        command=command,
        data=plane.config.extraction.data,
        n=plane.config.extraction.n,
        options=calibration.options,
        feature_site=calibration.feature_site,
        explained=calibration.explained_variance,
        steered=len(calibration.bases),
        measured=len(calibration.statistics),
        rows="\n".join(rows),
    )
    return card + (f"\n## Measured\n\n{measured.strip()}\n" if measured else "")


def main() -> None:
    """Run this command alone; an error that is the user's to mend is one line."""
    from steering_planes import PlaneError, SitesNotFoundError
    from steering_planes.calibration import CalibrationError
    from steering_planes.contrast import ContrastSetError

    try:
        typer.run(calibrate)
    except (
        CalibrationError,
        ContrastSetError,
        FileExistsError,
        PlaneError,
        SitesNotFoundError,
    ) as error:
        sys.exit(f"steering: error: {error}")


if __name__ == "__main__":
    main()
