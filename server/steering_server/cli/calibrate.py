"""``steering calibrate``: from a contrast to a plane's artifact."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from steering_planes.contrast import Contrast
    from steering_server.calibration import Calibrated

SEPARATED = 0.75
"""The least held-out AUROC of the best selected site with which a plane is kept unasked."""

# Markdown, with the metadata block that Hugging Face reads.
_CARD = """\
---
base_model: {base}
tags: [activation-steering]
---

# Steering plane `{name}` for {base}

Turns the model's behaviour by an angle per request, without changing a weight or an activation's
length. 0° points at the positive class of the contrast set, about 180° at the negative one. The
default mode is `{mode}`; requests may also add, ablate or cap along a direction of the plane, which
changes lengths unless they are kept.

## Intended use

Serving {base} with `steering serve … --steering-plane {name}=FOLDER`. Another model, a fine-tune
included, is refused unless a mismatch is allowed. A plane moves a tendency and is no safeguard: a
prompt can outweigh it, and whatever else differs between the two sides of the contrast set moves
too.

## How it was made

    {command}

From {data}, {n} examples a side, last prompt token:
{options}.
The feature direction comes from site {feature_site}, PC1 explains {explained:.1%} of the
candidates' variance, and {steered} of {measured} sites are steered:

| site | positive class on b1 | negative class on b1 | length of the difference |
|---|---|---|---|
{rows}

Means of unit-length activations ± standard error. `report.md` says more.
"""


def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's folder, or a repository.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; its name names the plane.")
    ],
    contrast_set: Annotated[
        Path | None,
        typer.Option(
            help="JSON: prompts and two system prompts, or two lists of prompts.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    positive: Annotated[
        Path | None,
        typer.Option(
            help='JSONL, {"prompt": …} or {"messages": […]} a line: what 0 degrees is to be.',
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    negative: Annotated[
        Path | None,
        typer.Option(help="JSONL likewise: the opposite.", exists=True, dir_okay=False),
    ] = None,
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
    force: Annotated[
        bool,
        typer.Option(help="Replace an existing output; keep a plane of classes hardly separated."),
    ] = False,
) -> None:
    """Find the steering plane that separates two classes of prompts.

    The model runs on vLLM, as it is served: every further flag is vLLM's (--dtype,
    --tensor-parallel-size, --quantization, …). Exits 2 where the classes do not separate.
    """
    # Before the minutes of work, and again when the plane is saved.
    if output.exists() and not force:
        raise FileExistsError(f"{output}: exists; --force replaces it")
    contrast = _contrast(contrast_set, positive, negative)

    # vLLM's own lines would tear the progress bar.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from rich.progress import Progress

    from steering_planes.calibration import Options, format_confounds
    from steering_server import report
    from steering_server.calibration import calibrate as find

    prompts = ([e.prompt for e in side] for side in (contrast.positive, contrast.negative))
    for warning in format_confounds(*prompts):
        typer.echo(f"warning: {warning}: the plane will hold that difference too", err=True)
    with Progress(transient=True) as progress:
        task = progress.add_task("activations", total=None)
        found = find(
            model,
            contrast,
            name=name or output.resolve().name,
            options=Options(direction, planes, granularity, margin),
            base_model=base_model,
            revision=revision,
            default_mode=default_mode,
            default_angle=default_angle,
            gate=gate,
            engine=engine_arguments(model, context.args),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _judge(found, force)
    found.plane.save(
        output,
        readme=_card(
            found,
            _command(sys.argv),
            None if measured is None else measured.read_text("utf-8"),
        ),
        beside={report.PAGE: report.page(found).encode(), report.FIGURE: report.figure(found)},
        overwrite=force,
    )
    typer.echo(
        f"{output}: plane {found.plane.name}, sites {', '.join(map(str, found.plane.sites))}"
    )


def engine_arguments(model: str, words: list[str]) -> dict[str, Any]:
    """The arguments of vLLM's engine that its flags in ``words`` set, but the model.

    Exits 2, as vLLM's parser does, at a flag that it does not know.
    """
    if not words:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="steering calibrate"))
    given, untouched = (
        # With the model: vLLM would look its default one up on the Hub.
        vars(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *each])))
        for each in (words, [])
    )
    return {key: value for key, value in given.items() if value != untouched[key]}


def _contrast(contrast_set: Path | None, positive: Path | None, negative: Path | None) -> Contrast:
    from steering_planes.contrast import read_classes, read_contrast

    if contrast_set is not None and positive is None and negative is None:
        return read_contrast(contrast_set)
    if contrast_set is None and positive is not None and negative is not None:
        return read_classes(positive, negative)
    raise typer.BadParameter("give --contrast-set, or --positive and --negative")


def _judge(found: Calibrated, force: bool) -> None:
    """Exit 2 where held-out examples say that the classes do not separate, unless forced."""
    auroc = found.calibration.auroc
    best = max((auroc[site] for site in found.plane.sites if site in auroc), default=None)
    if best is None:
        typer.echo("warning: too few examples to hold any out: separation not measured", err=True)
    elif best < SEPARATED:
        said = (
            f"the classes do not separate: the best selected site's held-out AUROC is {best:.2f}, "
            f"must be at least {SEPARATED}"
        )
        if not force:
            typer.echo(f"steering: error: {said}; --force keeps the plane", err=True)
            raise typer.Exit(2)
        typer.echo(f"warning: {said}", err=True)


def _command(argv: list[str]) -> str:
    """The command line as it was typed, with ~ for the home folder, less ``--measured``: that
    file's text is in the card, and nobody else has the file."""
    words = argv[1:] if argv[1:2] == ["calibrate"] else ["calibrate", *argv[1:]]
    if "--measured" in words:
        at = words.index("--measured")
        words = [*words[:at], *words[at + 2 :]]
    words = [word for word in words if not word.startswith("--measured=")]
    home = f"{Path.home()}{os.sep}"
    typed = [shlex.quote(word) for word in ["steering", *words]]
    return " ".join(f"~/{w.removeprefix(home)}" if w.startswith(home) else w for w in typed)


def _card(found: Calibrated, command: str, measured: str | None) -> str:
    plane, calibration = found.plane, found.calibration
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
