"""What a client is told of steering that it cannot have."""

from __future__ import annotations

import reprlib
from typing import Any

from vllm.exceptions import VLLMValidationError


class SteeringError(VLLMValidationError):  # type: ignore[misc]
    """Steering that cannot be given exactly as asked: HTTP 400 in OpenAI's shape.

    Attributes:
        rule: what the value must be.
        reason: a short code, the label of ``steering_rejections_total``.
    """

    def __init__(self, field: str, value: Any, rule: str, *, reason: str) -> None:
        # The value goes into the message: vLLM's own suffix would leave a null value out.
        shown = "null" if value is None else reprlib.repr(value)
        super().__init__(f"{field} = {shown}: {rule}", parameter=field)
        self.rule = rule
        self.reason = reason
