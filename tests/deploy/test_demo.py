"""deploy/demo.py"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from rich.console import Console

if TYPE_CHECKING:
    from servers import Server

REPOSITORY = Path(__file__).parents[2]


def test_asks_at_seven_angles(demo: ModuleType) -> None:
    assert demo.ANGLES == (0, 30, 60, 90, 120, 150, 180)


def ask(demo: ModuleType, response: httpx.Response, plane: str | None = None) -> tuple[str, Any]:
    """The answer, and the body that was sent."""
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return response

    transport = httpx.MockTransport(answer)
    with httpx.Client(base_url="http://fake", transport=transport) as client:
        text = demo.ask(client, demo.Demo(prompt="Why?", plane=plane), "m", 30)
    return text, sent[0]


def answered(headers: dict[str, str]) -> httpx.Response:
    choice = {"message": {"content": "Because."}}
    return httpx.Response(200, headers=headers, json={"choices": [choice]})


def test_asks_with_the_angle_and_names_a_plane_only_if_told(demo: ModuleType) -> None:
    text, body = ask(demo, answered({"steering": "angle=30"}))
    assert text == "Because."
    assert body["steering_angle"] == 30
    assert body["messages"] == [{"role": "user", "content": "Why?"}]
    assert "steering_plane" not in body
    _, body = ask(demo, answered({"steering": "angle=30"}), plane="style")
    assert body["steering_plane"] == "style"


def test_an_unsteered_answer_is_an_error(demo: ModuleType) -> None:
    with pytest.raises(demo.DemoError, match="answered unsteered"):
        ask(demo, answered({}))


def test_a_refusal_shows_the_servers_words(demo: ModuleType) -> None:
    with pytest.raises(demo.DemoError, match="400 no such plane"):
        ask(demo, httpx.Response(400, text="no such plane"))


def test_table_takes_nothing_for_markup(demo: ModuleType) -> None:
    console = Console(file=io.StringIO(), width=60)
    console.print(demo.table({0: "[bold]No[/red]", 30: "two\n\nlines"}, "[dim]Why?"))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[dim]Why?" in text
    assert "[bold]No[/red]" in text
    assert "two lines" in text


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/demo.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_without_a_server_it_says_so_and_fails() -> None:
    done = main("--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "no server at http://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_answers_at_every_angle(server: Server) -> None:
    done = main("--url", server.url, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    for angle in (0, 30, 60, 90, 120, 150, 180):
        assert f" {angle}° " in done.stdout
