"""Ask a running server one question at the angles 0, 30, …, 180, and show the answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

ANGLES = tuple(range(0, 181, 30))


class DemoError(RuntimeError):
    """The question could not be asked; the message says what to change."""


@dataclass(frozen=True)
class Demo:
    """What is asked, and where."""

    url: str = "http://127.0.0.1:8000"
    prompt: str = "Tell me about the ocean."
    plane: str | None = None
    max_tokens: int = 60


def ask(client: httpx.Client, demo: Demo, model: str, angle: int) -> str:
    """The answer at an angle; greedy, so that the angle alone tells the answers apart.

    Raises:
        DemoError: the server refused, or answered without saying that it steered.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": demo.prompt}],
        "steering_angle": angle,
        "temperature": 0,
        "max_tokens": demo.max_tokens,
    }
    if demo.plane is not None:
        body["steering_plane"] = demo.plane
    response = client.post("/v1/chat/completions", json=body)
    if response.is_error:
        raise DemoError(f"angle {angle}: {response.status_code} {response.text}")
    if "steering" not in response.headers:
        raise DemoError(f"angle {angle}: answered unsteered; is it `steering serve`?")
    return str(response.json()["choices"][0]["message"]["content"])


def answers(demo: Demo) -> dict[int, str]:
    """Angle -> answer. All are asked at once: different angles share the server's batches.

    Raises:
        DemoError: no server there, or it refused.
    """
    with httpx.Client(base_url=demo.url, timeout=300) as client, ThreadPoolExecutor() as pool:
        try:
            model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
            texts = pool.map(lambda angle: ask(client, demo, model, angle), ANGLES)
            return dict(zip(ANGLES, texts, strict=True))
        except httpx.ConnectError as error:
            why = f"no server at {demo.url} ({error}); `make serve` starts one"
            raise DemoError(why) from error
        except httpx.HTTPError as error:
            raise DemoError(f"{demo.url}: {error!r}") from error


def table(found: dict[int, str], title: str) -> Table:
    """A row an angle."""
    # Text, not str: neither a question nor an answer is markup.
    shown = Table(title=Text(title), title_justify="left", show_lines=True)
    shown.add_column("angle", justify="right")
    shown.add_column("answer")
    for angle, text in found.items():
        shown.add_row(f"{angle}°", Text(" ".join(text.split())))
    return shown


def parse(arguments: Sequence[str] | None = None) -> Demo:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default=Demo.url, help="the server")
    parser.add_argument("--prompt", default=Demo.prompt, help="the question")
    parser.add_argument("--plane", help="which plane, where several are loaded")
    parser.add_argument("--max-tokens", type=int, default=Demo.max_tokens, help="of an answer")
    return Demo(**vars(parser.parse_args(arguments)))


def main() -> int:
    """Exit status: 0 if every answer came, 1 if not."""
    demo = parse()
    try:
        found = answers(demo)
    except DemoError as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return 1
    Console().print(table(found, demo.prompt))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
