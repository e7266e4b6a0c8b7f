"""Which token's activation counts, on the engine and by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engines
import tiny
from contrasts import answer, user
from steering_planes import Site
from steering_planes.contrast import Contrast
from steering_planes.examples import Conversation, Example
from steering_planes.fingerprint import numbers
from steering_planes.tables import ContrastError
from steering_server.calibrate.chat import Chat
from steering_server.calibrate.record import Token, record

FP32 = {
    "dtype": "float32",
    "max_model_len": 512,
    # Prompts in chunks, as long ones come: a mean spans several steps.
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "enable_chunked_prefill": True,
    "kv_cache_memory_bytes": engines.KV_CACHE,
}

LONG = " ".join(["a rather long answer that says little"] * 12)
POSITIVE = [answer("Why is the sky blue?", "I know: (A)"), answer("And the sea?", LONG), user("Hi")]
NEGATIVE = [answer("Why is the sky blue?", "I know: (B)"), answer("And?", "x y z"), user("Hello")]


@pytest.fixture(scope="module", autouse=True)
def _without_triton() -> Iterator[None]:
    """V1 asks for no Triton, whatever this process's kernel tests do."""
    with engines.environment({"TRITON_INTERPRET": "0"}):
        yield


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A random model behind SmolLM2's tokenizer: (folder, transformers' own, the tokenizer)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    made = tiny.make("llama", folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder, made, tokenizer


def contrast(positive: list[Conversation], negative: list[Conversation]) -> Contrast:
    sides = [
        tuple(Example(c, f"{name}:{i}") for i, c in enumerate(side, 1))
        for name, side in (("p.jsonl", positive), ("n.jsonl", negative))
    ]
    return Contrast(sides[0], sides[1], ())


def truth(model: Any, tokenizer: Any, conversation: Conversation, token: Token) -> Tensor:
    """[d] at 2.mlp_in, by transformers; the prompt's tokens and the answer's joined by hand."""
    *asked, last = conversation
    said = last["content"] if last["role"] == "assistant" else ""
    asked = asked if said else conversation
    head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(head, add_special_tokens=False).input_ids
    begin = len(ids)
    ids = ids + tokenizer(said, add_special_tokens=False).input_ids
    kept: list[Tensor] = []
    norm = model.model.layers[2].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: kept.append(out[0].double()))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    if token == "mean":
        return kept[0][begin if said else 0 :].mean(0)
    return kept[0][-1 if token == "last" else token]


@pytest.mark.parametrize(
    ("token", "v2"),
    [
        ("last", False),
        ("mean", False),
        (-2, False),
        pytest.param("mean", True, marks=pytest.mark.slow),
    ],
)
def test_a_token_is_transformers_own(token: Token, v2: bool, model: tuple[Path, Any, Any]) -> None:
    folder, made, tokenizer = model
    environment = engines.v2_environment() if v2 else {}
    with engines.environment(environment), engines.triton_here(v2):
        recorded = record(str(folder), contrast(POSITIVE, NEGATIVE), token=token, engine=FP32)
    for rows, side in ((recorded.positive, POSITIVE), (recorded.negative, NEGATIVE)):
        wanted = torch.stack([truth(made, tokenizer, c, token) for c in side])
        got = rows[Site(2, "mlp_in")].double()
        assert float((got - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    assert recorded.num_layers == 4
    gain = made.model.layers[2].post_attention_layernorm.weight
    assert recorded.fingerprint["2.mlp_in"] == numbers(gain)
    assert len(recorded.fingerprint) == 8


def test_a_token_beyond_the_answer_names_the_example(model: tuple[Path, Any, Any]) -> None:
    few = contrast([answer("Why?", "x y z"), answer("Why?", "x")], [user("a"), user("b")])
    with pytest.raises(ContrastError, match=r"p\.jsonl:2: token=-2: the answer has 1 tokens"):
        record(str(model[0]), few, token=-2, engine=FP32)


def test_no_chat_template_is_said_before_the_model_is_loaded(
    model: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    folder, _, tokenizer = model
    bare = tmp_path / "base"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    tokenizer.save_pretrained(bare)
    tokenizer.chat_template = kept
    # There are no weights: an engine would fail otherwise.
    with pytest.raises(ContrastError, match=r"no chat template \(a base model\?\): give --chat"):
        record(str(bare), contrast(POSITIVE, NEGATIVE), engine=FP32)
    text = contrast([user("a b"), user("c")], [user("d"), user("e f g")])
    plain = record(str(folder), text, chat=Chat.of("none"), engine=FP32)
    assert plain.chat_template_sha256 is None
    assert len(plain.negative[Site(0, "mlp_in")]) == 2
