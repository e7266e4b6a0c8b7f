"""``steering calibrate``: from a contrast to a plane's artifact."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

if TYPE_CHECKING:
    from steering_planes.contrast import Contrast
    from steering_server.calibrate.record import Token
    from steering_server.calibrate.run import Calibrated, Measured


def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A model's folder, or a repository.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; its name names the plane.")
    ],
    contrast_set: Annotated[
        str | None,
        typer.Option(
            help="Both classes in one file or data set: pairs, texts with a label, or our own JSON."
        ),
    ] = None,
    positive: Annotated[
        str | None,
        typer.Option(
            help="What 0 degrees is to be: JSON, JSONL, CSV, Parquet, text, or "
            "hf://datasets/organisation/name[@revision]:split."
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="The opposite, likewise.")] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Where the texts are; of pairs both sides, as A,B. By default the first "
            "of prompt, instruction, text, input, goal, question."
        ),
    ] = None,
    positive_label: Annotated[
        str | None, typer.Option(help="Of texts with a label: the positive class's.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Examples of each class, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, and of random planes.")] = 0,
    system_prompt: Annotated[str | None, typer.Option(help="For both classes alike.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="A file with a template in Jinja, or none for the text as it is; by "
            "default the tokenizer's own."
        ),
    ] = None,
    token: Annotated[
        str,
        typer.Option(
            help="Whose activation counts: last, mean (of the answer's tokens, else of "
            "the prompt's), or -K, the K-th from the end."
        ),
    ] = "last",
    name: Annotated[str | None, typer.Option(help="Another name for the plane.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="The model's public name; by default the folder's or repository's."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The model's revision.")] = None,
    direction: Annotated[
        Literal["max_sim", "max_norm", "mean", "random"],
        typer.Option(
            help="The candidate most like all others, the longest one, their mean, or a "
            "random plane: a study's null."
        ),
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
    sites: Annotated[
        str | None,
        typer.Option(
            help="Steer these, and not those that discriminate: all, 12-20, 12-20.mlp_in."
        ),
    ] = None,
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
    save_activations: Annotated[
        bool, typer.Option(help="Keep both classes' activations beside the plane.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(help="Replace an existing output; keep a plane of classes hardly separated."),
    ] = False,
) -> None:
    """Find the steering plane that separates two classes of prompts, or of answers.

    The model runs on vLLM, as it is served: every further flag is vLLM's (--dtype,
    --tensor-parallel-size, --quantization, …). Exits 2 where the classes do not separate.
    """
    # Before the minutes of work, and again when the plane is saved.
    overwrite = force or _holds_a_report_only(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists; --force replaces it")
    called = _name(name or output.resolve().name)
    which = _token(token)
    if gate is not None and not math.isfinite(gate):
        raise typer.BadParameter("must be a finite number", param_hint="--gate")
    if not math.isfinite(margin):
        raise typer.BadParameter("must be a finite number", param_hint="--margin")
    chosen = _sites(sites)
    contrast = _contrast(contrast_set, positive, negative, column, positive_label)
    if samples is not None:
        contrast = contrast.sampled(samples, seed)
    if system_prompt is not None:
        contrast = contrast.under(system_prompt)

    # vLLM's own lines would tear the progress bar.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from rich.progress import Progress

    from steering_planes.calibration import Options, format_confounds
    from steering_server.calibrate.card import card
    from steering_server.calibrate.chat import Chat
    from steering_server.calibrate.run import NoPlaneError
    from steering_server.calibrate.run import calibrate as find

    prompts = ([e.prompt for e in side] for side in (contrast.positive, contrast.negative))
    for warning in format_confounds(*prompts):
        typer.echo(f"warning: {warning}: the plane will hold that difference too", err=True)
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("activations", total=None)
            found = find(
                model,
                contrast,
                name=called,
                options=Options(direction, planes, granularity, margin, chosen, seed),
                chat=Chat.of(chat_template),
                token=which,
                base_model=base_model,
                revision=revision,
                default_mode=default_mode,
                default_angle=default_angle,
                gate=gate,
                engine=engine_arguments(model, context.args),
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except NoPlaneError as error:
        folder = _write_report(output, error.measured, save_activations)
        typer.echo(f"{folder}: no plane, but a report of why", err=True)
        raise
    _judge(found, force)
    found.plane.save(
        output,
        readme=card(
            found,
            _command(sys.argv),
            None if measured is None else measured.read_text("utf-8"),
        ),
        beside=_beside(found, save_activations),
        overwrite=overwrite,
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


def _contrast(
    contrast_set: str | None,
    positive: str | None,
    negative: str | None,
    column: str | None,
    positive_label: str | None,
) -> Contrast:
    from steering_planes.contrast import read_classes, read_contrast

    if contrast_set is not None and positive is None and negative is None:
        return read_contrast(contrast_set, column=column, positive_label=positive_label)
    if contrast_set is None and positive is not None and negative is not None:
        if positive_label is not None:
            rule = "is of a --contrast-set with labels; two files are two classes already"
            raise typer.BadParameter(rule, param_hint="--positive-label")
        return read_classes(positive, negative, column=column)
    raise typer.BadParameter("give --contrast-set, or --positive and --negative")


def _name(text: str) -> str:
    from steering_planes.artifact import NAME_PATTERN

    if re.fullmatch(NAME_PATTERN, text) is None:
        rule = f"{text!r}: a plane's name, as --name or the output's, must match {NAME_PATTERN}"
        raise typer.BadParameter(rule, param_hint="--name")
    return text


def _token(text: str) -> Token:
    if text in ("last", "mean"):
        return cast("Token", text)
    if text.startswith("-") and text[1:].isdecimal() and int(text) < 0:
        return int(text)
    raise typer.BadParameter(f"{text!r}: must be last, mean or -K", param_hint="--token")


def _sites(text: str | None) -> Any:
    from steering_planes import Selection

    try:
        return None if text is None else Selection.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sites") from None


def _holds_a_report_only(output: Path) -> bool:
    """What an earlier run left that found no plane."""
    from steering_server.calibrate import report

    files = {file.name for file in output.iterdir()} if output.is_dir() else set()
    ours = {report.PAGE, report.FIGURE}
    return ours <= files <= ours | {report.ACTIVATIONS} and report.is_page(output / report.PAGE)


def _beside(measured: Measured, activations: bool) -> dict[str, bytes]:
    from steering_server.calibrate import report

    files = {report.PAGE: report.page(measured).encode(), report.FIGURE: report.figure(measured)}
    return files | ({report.ACTIVATIONS: report.activations(measured)} if activations else {})


def _write_report(output: Path, measured: Measured, activations: bool) -> Path:
    """Where the plane would be, or, where there is something else, beside it."""
    if output.exists() and not _holds_a_report_only(output):
        output = output.with_name(f"{output.name}-report")
    output.mkdir(parents=True, exist_ok=True)
    for name, content in _beside(measured, activations).items():
        (output / name).write_bytes(content)
    return output


def _judge(found: Calibrated, force: bool) -> None:
    """Exit 2 where held-out examples say that the classes do not separate, unless forced."""
    from steering_server.calibrate.report import SEPARATED, best

    if found.calibration.options.direction == "random":
        return  # a null need not separate
    top = best(found.calibration)
    if top is None:
        typer.echo("warning: too few examples to hold any out: separation not measured", err=True)
    elif top < SEPARATED:
        said = (
            f"the classes do not separate: the best selected site's held-out AUROC is {top:.2f}, "
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
