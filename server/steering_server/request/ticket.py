"""One request of a client, from its arrival to the last word of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from steering_server.request import carriers, metrics
from steering_server.request.admission import Admission
from steering_server.request.ask import FAN, parse, steering_fields
from steering_server.request.error import SteeringError
from steering_server.request.generation import Generation, fit
from steering_server.request.models import ServedModels
from steering_server.request.operation import EXTRA_ARG, Operation, fan_of

CURRENT: ContextVar[Ticket | None] = ContextVar("steering_ticket", default=None)
"""The request that this task, and every task begun by it, works for."""

GENERATING = frozenset(
    {
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/decisions",
        "/v1/messages",
        "/v1/responses",
        "/v1/systemone",
    }
)
"""Routes that ask the engine to generate; on any other, steering is refused."""

FANNING = frozenset({"/invocations", "/v1/chat/completions", "/v1/completions"})
"""Those of them whose answers have choices, each of which may have an angle of its own."""

RESPONSES = "/v1/responses"
_SAMPLING_PARAMS = frozenset({"/inference/v1/generate"})


@dataclass
class Ticket:
    """What a request asks for, and what became of it.

    The engine's front end finds it in :data:`CURRENT`, so that no route has to carry anything:
    whatever asks the engine to generate, for whichever request, is steered as that one asked.

    Attributes:
        path: the route, without the server's root path.
        admission: knows the planes.
        models: knows the model ids; None where model ids carry nothing.
        header: the request header ``steering``.
        operations: what the request will be steered by; None until its body has been read.
        admitted: what the engine was given, once it has been asked.
        error: why the request is refused.
    """

    path: str
    admission: Admission
    models: ServedModels | None = None
    header: str | None = None
    operations: tuple[Operation, ...] | None = None
    admitted: tuple[Operation, ...] | None = None
    error: SteeringError | None = None
    _background: bool = field(default=False, repr=False)

    @property
    def generates(self) -> bool:
        return self.path.rstrip("/") in GENERATING

    @property
    def is_kept(self) -> bool:
        """Whether the engine was given what was asked for, or the answer says that it was not.

        Of work that goes on behind the answer it is not asked.
        """
        if self.operations is None:
            return self.header is None
        is_given = self.admitted is not None or self._background
        return is_given or not self.operations or self.error is not None

    def read_json(self, body: Any) -> Any:
        """Take what a JSON body asks for, and give back what is left for the route.

        Raises:
            SteeringError: steering that cannot be given exactly as asked.
        """
        if not isinstance(body, dict):
            return body
        own = self.path.rstrip("/") in _SAMPLING_PARAMS
        if self.path.rstrip("/") == RESPONSES:
            self._background |= bool(body.get("background"))
        return self._read(body, lambda: carriers.take_body(body, sampling_params=own))

    def read_form(self, form: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`read_json`, of a form's fields."""
        return self._read(form, lambda: carriers.take_form(form))

    def _read(self, body: dict[str, Any], take: Any) -> dict[str, Any]:
        try:
            self._settle(body, take)
        except SteeringError as error:
            self.error = error
            raise
        return body

    def _settle(self, body: dict[str, Any], take: Any) -> None:
        try:
            asked = self._asked(body, take)
        except SteeringError as error:
            metrics.count_rejection(error.reason)
            raise
        source, fields = asked
        # A route may read its body twice, and asks once, unless something was written into it.
        if not self.generates or (self.operations is not None and not fields):
            return
        try:
            self.operations = self.admission.settle(fields)
        except SteeringError as error:
            raise _said_by(source, error) from None
        self._fan_out(body)
        if self.operations and body.get("use_beam_search"):
            rule = "beam search does not carry steering; leave out one of the two"
            raise _refused("use_beam_search", True, rule, reason="beam_search")

    def _fan_out(self, body: dict[str, Any]) -> None:
        """See that the answer has as many choices as angles."""
        operations = self.operations or ()
        if not (count := fan_of(operations)):
            return
        field, given = f"steering_{FAN}", body.get("n")
        if self.path.rstrip("/") not in FANNING:
            rule = f"{self.path} gives no choices; {', '.join(sorted(FANNING))} do"
            angles = operations[0].to_wire()[FAN]
            raise _refused(field, angles, rule, reason="unsupported_route")
        if given is not None and (isinstance(given, bool) or given != count):
            rule = f"must be absent or {count}, as many choices as {field}"
            raise _refused("n", given, rule, reason="bad_fan")
        body["n"] = count

    def _asked(self, body: dict[str, Any], take: Any) -> tuple[tuple[str, Any], dict[str, Any]]:
        """The one carrier that says something, as (its name, its text), and what it says."""
        said: list[tuple[tuple[str, Any], dict[str, Any]]] = []
        fields = take()
        if _asks(fields):
            said.append((("body", None), fields))
        else:
            parse(fields)  # Nulls ask for nothing, but for what must be known.
        if self.header is not None:
            said.append((("steering (header)", self.header), carriers.read_header(self.header)))
        if self.models is not None and isinstance(model := body.get("model"), str):
            body["model"], items = self.models.split(model)
            if items is not None:
                said.append((("model", model), {EXTRA_ARG: items}))
        if not said:
            return ("body", None), {}
        if not self.generates:
            (name, text), fields = said[0]
            key, value = next(iter(fields.items())) if name == "body" else (name, text)
            rule = f"{self.path} does not take steering; {', '.join(sorted(GENERATING))} do"
            raise SteeringError(key, value, rule, reason="unsupported_route")
        if len(said) > 1:
            (first, text), _ = said[1]
            others = " and ".join(name for (name, _), _ in said if name != first)
            rule = f"steering is given twice, also in the {others}"
            raise SteeringError(first, text, rule, reason="conflicting_fields")
        return said[0]

    def give(
        self, extra_args: Mapping[str, Any] | None, generation: Generation
    ) -> tuple[Operation, ...]:
        """What the engine, asked to generate for this request, is to steer by.

        Args:
            extra_args: of the engine's sampling parameters.
            generation: what the route asks for.

        Raises:
            SteeringError: steering that came past the request's body and cannot be given, or that
                does not fit what is to be generated.
        """
        fields = steering_fields(extra_args)
        try:
            if fields and self.operations and self.operations != self.admission.default:
                rule = "given twice, also by the request that it came with"
                key, value = next(iter(fields.items()))
                raise _refused(key, value, rule, reason="conflicting_fields")
            if fields or self.operations is None:
                self.operations = self.admission.settle(fields)
            by_default = self.operations is self.admission.default
            fit(self.operations, generation, by_default=by_default)
        except SteeringError as error:
            self.error = error
            raise
        self.admitted = self.operations
        return self.operations


def _asks(fields: Mapping[str, Any]) -> bool:
    return any(value is not None for value in fields.values())


def _said_by(source: tuple[str, Any], error: SteeringError) -> SteeringError:
    """The error in the terms of the carrier that the caller wrote."""
    name, text = source
    return error if name == "body" else SteeringError(name, text, str(error), reason=error.reason)


def _refused(field: str, value: Any, rule: str, *, reason: str) -> SteeringError:
    metrics.count_rejection(reason)
    return SteeringError(field, value, rule, reason=reason)
