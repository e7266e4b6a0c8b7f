"""What a request is to generate, and whether its operations can be given in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steering_server.request import metrics
from steering_server.request.error import SteeringError
from steering_server.request.operation import Operation, fan_of
from steering_server.request.window import ALL


@dataclass(frozen=True)
class Generation:
    """What an engine is asked to generate.

    Attributes:
        choices: of the answer.
        prompt_tokens: the prompt's length; None where it is not known yet.
        prompt_logprobs: whether the prompt's own log-probabilities are wanted.
    """

    choices: int = 1
    prompt_tokens: int | None = None
    prompt_logprobs: bool = False


def fit(
    operations: Sequence[Operation], generation: Generation, *, by_default: bool = False
) -> None:
    """See that a request's operations can be given in the answer that is to be generated.

    Args:
        operations: a request's.
        generation: what is to be generated.
        by_default: the server's default asks for them, and not the request.

    Raises:
        SteeringError: as many angles as there are not choices, prompt's log-probabilities that
            would be a different one for each of them, or a window without a token.
    """
    if problem := _misfit(operations, generation, "--steering-default " if by_default else ""):
        metrics.count_rejection(problem.reason)
        raise problem


def _misfit(
    operations: Sequence[Operation], generation: Generation, whose: str
) -> SteeringError | None:
    count = fan_of(operations)
    if count and generation.choices != count:
        rule = f"must be {count}, one an angle"
        return SteeringError("n", generation.choices, rule, reason="bad_fan")
    length = generation.prompt_tokens
    for operation in operations:
        window = operation.tokens
        if window.prompt is None:
            continue
        if count > 1 and generation.prompt_logprobs:
            rule = (
                f"{count} angles give the prompt {count} of them; steer the generated tokens alone"
            )
            return SteeringError("prompt_logprobs", True, rule, reason="bad_fan")
        if length is not None and window != ALL and not window.count(length, 0)[0]:
            rule = f"{whose}selects none of the prompt's {length} token(s)"
            return SteeringError("steering_tokens", window.to_wire(), rule, reason="bad_tokens")
    return None
