"""What a store outside vLLM sees of steered blocks: vLLM's own events, with one key more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import zmq

import engines
import traffic
from engines import BLOCK
from servers import free_port
from steering_planes import Plane
from tiny import Tiny
from traffic import Ask

PROMPT = [5 + i % 200 for i in range(4 * BLOCK + 5)]


def stored(tiny: Tiny, requests: list[dict[str, Any] | None], tokens: int = 1) -> list[list[Any]]:
    """The block events of each of the requests with these steering fields, of so many tokens."""
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    endpoint = f"tcp://127.0.0.1:{free_port()}"
    context = zmq.Context.instance()
    with context.socket(zmq.SUB) as socket:
        socket.subscribe("")
        socket.connect(endpoint)
        starting = engines.start(
            tiny.model,
            tiny.planes,
            in_process=True,
            skip_tokenizer_init=True,
            kv_events_config={
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": endpoint.replace("127.0.0.1", "*"),
            },
        )
        events = []
        for engine in starting:
            for fields in requests:
                traffic.send(engine, [Ask(PROMPT, [], fields, tokens)])
                own: list[Any] = []
                while socket.poll(1000):
                    _, _, payload = socket.recv_multipart()
                    batch = msgspec.msgpack.decode(payload, type=KVEventBatch)
                    own += [event for event in batch.events if isinstance(event, BlockStored)]
                events.append(own)
    return events


def test_events_keep_their_format_and_say_the_steering(tiny_llama: Tiny) -> None:
    steering = {"steering_plane": "two", "steering_angle": -90, "steering_mode": "rotate_by"}
    late = {**steering, "steering_tokens": "generated"}
    (plain,), (steered,), rest = stored(tiny_llama, [None, steering, late])
    # Under `generated` the prompt's blocks are those of the unsteered request: nothing is stored.
    assert rest == []
    for event in (plain, steered):
        assert event.token_ids == PROMPT[: 4 * BLOCK]
        assert event.block_size == BLOCK
        assert len(event.block_hashes) == 4
    assert plain.extra_keys is None or plain.extra_keys == [None] * 4
    digest = Plane.load(Path(tiny_llama.planes["two"])).digest
    assert steered.extra_keys == [(f"{digest}:rotate_by:270.0:None",)] * 4
    assert not set(plain.block_hashes) & set(steered.block_hashes)


def test_blocks_are_shared_exactly_where_windows_and_ramps_agree(tiny_llama: Tiny) -> None:
    """The prompt ends 5 tokens into its fifth block, and 110 are generated: seven full blocks. How
    many of their hashes are equal is counted."""

    def fields(angle: Any, tokens: Any = "all") -> dict[str, Any]:
        return {
            "steering_plane": "two",
            "steering_mode": "rotate_to",
            "steering_angle": angle,
            "steering_tokens": tokens,
        }

    def ramp(start: float, stop: float, over: int) -> dict[str, Any]:
        return {"from": start, "to": stop, "over": over}

    asked = {
        "plain": None,
        "ramp": fields(ramp(180, 0, 64)),
        "half of it": fields(ramp(180, 90, 32)),
        "another": fields(ramp(180, 0, 65)),
        "held": fields(180),
        "later": fields(180, {"generated": [0, None]}),
        "of the block": fields(180, {"generated": [0, 27]}),
        "beyond the block": fields(180, {"generated": [0, 28]}),
        "in the block": fields(180, {"generated": [0, 26]}),
        "two blocks": fields(180, {"prompt": [None, 64]}),
        "more than two": fields(180, {"prompt": [None, 65]}),
    }
    events = stored(tiny_llama, list(asked.values()), tokens=110)
    # What a request found cached is not stored again: all that it went through is what it stored,
    # and what led there.
    parents = {
        block: parent
        for own in events
        for event in own
        for parent, block in zip(
            [event.parent_block_hash, *event.block_hashes], event.block_hashes, strict=False
        )
    }

    def chain(own: list[Any]) -> list[Any]:
        blocks = [own[-1].block_hashes[-1]]
        while (parent := parents[blocks[-1]]) is not None:
            blocks.append(parent)
        return blocks[::-1]

    chains = {name: chain(own) for name, own in zip(asked, events, strict=True)}
    assert {len(blocks) for blocks in chains.values()} == {7}

    def shared(one: str, other: str) -> int:
        equal = [a == b for a, b in zip(chains[one], chains[other], strict=True)]
        assert equal == sorted(equal, reverse=True)
        return sum(equal)

    # Four blocks of the prompt, the one with its end (to generated token 26), and no more: their
    # angles part at token 33.
    assert shared("ramp", "half of it") == 5
    assert shared("ramp", "another") == 4
    assert shared("ramp", "held") == 4
    assert shared("held", "later") == 0
    assert shared("plain", "later") == 4
    # To its block's very end, or beyond: equal within it.
    assert shared("of the block", "later") == 5
    assert shared("of the block", "beyond the block") == 5
    assert shared("of the block", "in the block") == 4
    assert shared("two blocks", "held") == 2
    assert shared("two blocks", "more than two") == 2
    assert shared("two blocks", "plain") == 0
