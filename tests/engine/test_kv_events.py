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


def stored(tiny: Tiny, requests: list[dict[str, Any] | None]) -> list[Any]:
    """The block events of requests with these steering fields, of one token each."""
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
                traffic.send(engine, [Ask(PROMPT, [], fields, tokens=1)])
                while socket.poll(1000):
                    _, _, payload = socket.recv_multipart()
                    batch = msgspec.msgpack.decode(payload, type=KVEventBatch)
                    events += [event for event in batch.events if isinstance(event, BlockStored)]
    return events


def test_events_keep_their_format_and_say_the_steering(tiny_llama: Tiny) -> None:
    steering = {"steering_plane": "two", "steering_angle": -90, "steering_mode": "rotate_by"}
    late = {**steering, "steering_tokens": "generated"}
    plain, steered, *rest = stored(tiny_llama, [None, steering, late])
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
