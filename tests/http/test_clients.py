"""The clients that people have: their SDKs read the receipt, and what only knows models steers."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

import servers
from servers import Server

CLIENTS = Path(__file__).parents[2] / ".venv-clients/bin"
"""An environment of their own (`make test-slow` makes it): their pins are not vLLM's."""

OCEAN: Any = [{"role": "user", "content": "Tell me about the ocean."}]


def openai_client(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **options)


def test_openais_sdk_reads_the_receipt(server: Server) -> None:
    chat = openai_client(server).chat.completions
    answer: Any = chat.create(
        model="smollm2", messages=OCEAN, max_tokens=4, extra_body={"steering_angle": 180}
    )
    assert answer.steering["angle"] == 180
    answer = chat.create(model="smollm2:sentiment@90", messages=OCEAN, max_tokens=4)
    assert answer.steering["angle"] == 90
    plain = chat.create(model="smollm2", messages=OCEAN, max_tokens=4)
    assert not hasattr(plain, "steering")


def test_openais_sdk_reads_it_in_a_stream(server: Server) -> None:
    stream = openai_client(server).chat.completions.create(
        model="smollm2",
        messages=OCEAN,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"steering": 'plane="sentiment", angle=180'},
    )
    chunks: list[Any] = list(stream)
    assert chunks[0].steering["angle"] == 180
    assert chunks[-1].usage is not None
    assert chunks[-1].steering == chunks[0].steering


def test_openais_sdk_reads_it_in_responses(server: Server) -> None:
    client = openai_client(server, default_headers={"steering": "angle=180"})
    answer: Any = client.responses.create(model="smollm2", input="Hello", max_output_tokens=4)
    assert answer.steering["angle"] == 180


def test_openais_sdk_raises_what_we_say(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="steering_angle = 361") as caught:
        openai_client(server).chat.completions.create(
            model="smollm2", messages=OCEAN, extra_body={"steering_angle": 361}
        )
    assert caught.value.param == "steering_angle"


def test_anthropics_sdk_reads_the_receipt(server: Server) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none")
    message: Any = client.messages.create(
        model="smollm2", max_tokens=4, messages=OCEAN, extra_body={"steering_angle": 180}
    )
    assert message.steering["angle"] == 180
    events: list[Any] = list(
        client.messages.create(
            model="smollm2:sentiment@180", max_tokens=4, messages=OCEAN, stream=True
        )
    )
    assert events[0].type == "message_start"
    assert events[0].steering["angle"] == 180
    with pytest.raises(anthropic.BadRequestError, match="steering_angle = 361") as caught:
        client.messages.create(
            model="smollm2", max_tokens=4, messages=OCEAN, extra_body={"steering_angle": 361}
        )
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def needs(command: str) -> str:
    """A command of the clients' environment."""
    if not (CLIENTS / command).exists():
        pytest.skip(f"no {CLIENTS / command}; `make test-slow` installs it")
    return str(CLIENTS / command)


@contextmanager
def litellm(server: Server, folder: Path) -> Iterator[httpx.Client]:
    """litellm's proxy, dropping what it does not know, in front of a server."""
    names = ["smollm2", "smollm2:sentiment@0", "smollm2:sentiment@180", "gloomy"]
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"openai/{name}",
                "api_base": f"{server.url}/v1",
                "api_key": "none",
            },
        }
        for name in names
    ]
    settings = {"drop_params": True, "telemetry": False}
    general = {"forward_client_headers_to_llm_api": True}
    config = folder / "litellm.yaml"  # JSON is YAML.
    config.write_text(
        json.dumps(
            {"model_list": models, "litellm_settings": settings, "general_settings": general}
        )
    )
    port = servers.free_port()
    words = [needs("litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    key = f"sk-{secrets.token_hex(32)}"
    environment = {
        **os.environ,
        "LITELLM_MASTER_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PATH": f"{CLIENTS}:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    log = folder / "litellm.log"
    with (
        servers.running(words, log, environment) as process,
        servers.client("127.0.0.1", port) as client,
    ):
        servers.wait(client, process, log, "/health/liveliness")
        client.headers["authorization"] = f"Bearer {key}"
        yield client


@pytest.mark.slow
def test_behind_litellm_no_answer_is_unsteered(
    server: Server, strict_server: Server, tmp_path: Path
) -> None:
    def ask(proxy: httpx.Client, model: str, **options: Any) -> Any:
        body = {"model": model, "messages": OCEAN, "max_tokens": 16, "temperature": 0}
        answer = proxy.post("/v1/chat/completions", json=body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def text(answer: Any) -> str:
        content: str = answer["choices"][0]["message"]["content"]
        return content

    gloomy = text(server.chat(steering_angle=180).json())
    cheerful = text(server.chat(steering_angle=0).json())
    assert gloomy != cheerful
    with litellm(server, tmp_path) as proxy:
        assert text(ask(proxy, "smollm2:sentiment@180")) == gloomy
        assert text(ask(proxy, "smollm2:sentiment@0")) == cheerful
        assert text(ask(proxy, "gloomy")) == gloomy
        header = {"x-steering": "angle=180"}
        assert text(ask(proxy, "smollm2", headers=header)) == gloomy
    with litellm(strict_server, tmp_path) as proxy:
        # What the proxy lets through says nothing; the default steers it.
        assert text(ask(proxy, "smollm2")) == gloomy


LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
url, tokenizer, *models = sys.argv[1:]
scores = {}
for model in models:
    client = LocalCompletionsAPI(base_url=url, model=model, tokenizer=tokenizer,
                                 tokenizer_backend="huggingface", max_retries=1)
    asked = [Instance("loglikelihood", {}, ("The ocean is", text), i)
             for i, text in enumerate([" beautiful and calm", " dark and dreadful"])]
    scores[model] = [score for score, _ in client.loglikelihood(asked, disable_tqdm=True)]
print(json.dumps(scores))
"""


@pytest.mark.slow
def test_lm_evals_likelihoods_are_the_models_steered(server: Server, smollm2: Path) -> None:
    models = ["smollm2", "smollm2:sentiment@0", "smollm2:sentiment@180"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [needs("python"), "-c", LM_EVAL, f"{server.url}/v1/completions", str(smollm2), *models],
        env={**environment, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    scores = json.loads(run.stdout.splitlines()[-1])
    assert len({tuple(values) for values in scores.values()}) == 3
    for model, angle in (("smollm2:sentiment@0", 0), ("smollm2:sentiment@180", 180)):
        direct = [
            likelihood(server, " beautiful and calm", angle),
            likelihood(server, " dark and dreadful", angle),
        ]
        assert scores[model] == pytest.approx(direct, abs=1e-4)


def likelihood(server: Server, continuation: str, angle: float) -> float:
    """The log-probability of a continuation, asked directly."""
    body = {"model": "smollm2", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    prompt = "The ocean is"
    answer = server.client.post(
        "/v1/completions", json={**body, "prompt": prompt + continuation, "steering_angle": angle}
    ).json()
    found = answer["choices"][0]["logprobs"]
    within = [
        (offset, value)
        for offset, value in zip(found["text_offset"], found["token_logprobs"], strict=True)
        if len(prompt) <= offset < len(prompt + continuation)
    ]
    return sum(value for _, value in within)
