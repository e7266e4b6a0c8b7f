"""The places of a request that steering may come in, each read into admission's fields.

Every reader takes away what it reads: no model of vLLM ever meets a steering field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from steering_server.request.ask import FAN, FIELDS, RECEIPTS, is_reserved, steering_fields
from steering_server.request.error import SteeringError
from steering_server.request.operation import EXTRA_ARG, RESERVED_PREFIX
from steering_server.request.words import parse_words

XARGS = "vllm_xargs"
WRAPPERS = ("extra_body", "extra_args", "extra_headers", "extra_query", "sampling_params")
"""Keys under which clients and proxies send, as JSON, what an SDK would have unpacked."""

_DEPTH = 4


def take_body(body: dict[str, Any], *, sampling_params: bool = False) -> dict[str, Any]:
    """Take the steering fields out of a request's body, its ``vllm_xargs`` included.

    Args:
        body: changed in place.
        sampling_params: the route reads ``sampling_params.extra_args``, which may then carry them.

    Raises:
        SteeringError: a field given in two places, or where nothing would read it.
    """
    places = [("", body)]
    if isinstance(xargs := body.get(XARGS), dict):
        places.append((f"{XARGS}.", xargs))
    params = body.get("sampling_params") if sampling_params else None
    if isinstance(params, dict) and isinstance(extra := params.get("extra_args"), dict):
        places.append(("sampling_params.extra_args.", extra))
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for where, place in places:
        fields = steering_fields(place)
        for key, value in fields.items():
            if key in found:
                rule = f"given twice, also as {where}{key}"
                raise SteeringError(first[key] + key, found[key], rule, reason="conflicting_fields")
            found[key], first[key] = value, where
            del place[key]
    for wrapper in (XARGS, *WRAPPERS):
        text = body.get(wrapper)
        if isinstance(text, str) and RESERVED_PREFIX in text.casefold():
            rule = "must be an object to carry steering"
            raise SteeringError(wrapper, text, rule, reason="unknown_field")
        for path, value in _within(wrapper, body.get(wrapper), _DEPTH):
            rule = f"nothing reads it there; give it in the body itself or in {XARGS}"
            raise SteeringError(path, value, rule, reason="unknown_field")
    if found and not xargs:
        body.pop(XARGS, None)
    return found


def _within(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The steering fields that an object holds, at whatever depth someone wrapped them."""
    if not isinstance(value, dict) or not depth:
        return
    for key, inner in value.items():
        if is_reserved(key):
            yield f"{path}.{key}", inner
        yield from _within(f"{path}.{key}", inner, depth - 1)


def take_form(form: dict[str, Any]) -> dict[str, Any]:
    """As :func:`take_body`, of a form, in which everything is text.

    Raises:
        SteeringError: see :func:`take_body`.
    """
    unpacked: dict[str, Any] = {}
    for key in [key for key in form if "[" in key]:
        # As SDKs send an object in a form: vllm_xargs[steering_angle].
        name, *parts = filter(None, re.split(r"[\[\].]", key))
        if name not in (XARGS, *WRAPPERS) or not any(map(is_reserved, parts)):
            continue
        if name != XARGS or len(parts) != 1:
            rule = f"nothing reads it there; give it in the form itself or in {XARGS}"
            raise SteeringError(key, form[key], rule, reason="unknown_field")
        unpacked[parts[0]] = form.pop(key)
    xargs: Any = None
    if isinstance(text := form.get(XARGS), str):
        try:
            xargs = json.loads(text)
        except (ValueError, RecursionError):
            xargs = None  # vLLM says what is wrong with it.
    if isinstance(xargs, dict):
        form[XARGS] = xargs
    fields = take_body(form)
    for key, value in unpacked.items():
        if key in fields:
            rule = f"given twice, also as {XARGS}[{key}]"
            raise SteeringError(key, fields[key], rule, reason="conflicting_fields")
        fields[key] = value
    if XARGS in form and isinstance(xargs, dict):
        form[XARGS] = json.dumps(xargs)
    return {key: _untext(key, value) for key, value in fields.items()}


def _untext(key: str, value: Any) -> Any:
    if key == "steering_gate" and value in ("null", "none"):
        return None
    if key == "steering_keep_norm":
        return {"true": True, "false": False}.get(value, value)
    if key in ("steering_angle", "steering_gate", "steering_strength") and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value  # A ramp, or admission says that it must be a number.
    return value


def read_header(text: str) -> dict[str, Any]:
    """The request header ``steering``: the structured dictionary (RFC 9651) that answers carry.

    ``layers`` and ``digest`` may be left out; given, they must be the plane's.

    Raises:
        SteeringError: naming the header.
    """
    # Here, since only a request with the header needs it.
    from http_sfv import Dictionary, InnerList

    def refused(rule: str, reason: str = "bad_header") -> SteeringError:
        return SteeringError("steering (header)", text, rule, reason=reason)

    dictionary = Dictionary()
    try:
        dictionary.parse(text.encode())
    except ValueError as error:
        rule = f"must be a structured dictionary, as answers carry it: {error}"
        raise refused(rule.rstrip(": ")) from None
    known = (*FIELDS, FAN, *RECEIPTS)
    columns: dict[str, list[Any]] = {}
    for name, member in dictionary.items():
        if name not in known:
            raise refused(f"unknown member {name!r}; known are {', '.join(known)}", "unknown_field")
        items = list(member) if isinstance(member, InnerList) else [member]
        if any(item.params for item in (member, *items)):
            raise refused(f"member {name!r} has parameters, which say nothing; commas part members")
        columns[name] = [_member(name, item.value) for item in items]
    if (fan := columns.pop(FAN, None)) is not None:
        columns[FAN] = [fan]
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise refused("every member must have as many items: one an operation")
    return {
        EXTRA_ARG: [
            {name: values[i] for name, values in columns.items()} for i in range(lengths.pop())
        ]
    }


def _member(name: str, value: Any) -> Any:
    if name in ("gate", "strength") and value is False:
        return None
    if name in ("angle", FAN, "gate", "strength"):
        # A decimal has three digits; an answer carries a finer number as a string.
        try:
            return value if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return value
    return str(value) if isinstance(value, str) else value


def split_model(
    model: str,
    *,
    served: Callable[[str], bool],
    base: str,
    presets: Mapping[str, str],
    may_be_served: bool = False,
) -> tuple[str, list[dict[str, Any]] | None]:
    """A model id -> the id that vLLM serves, and the steering behind it.

    ``model:words`` and ``model@angle`` (see :mod:`.words`), a preset's name, or ``model:preset``.
    Any other id that is served as it is stands for itself, whatever it looks like.

    Args:
        model: as the request has it.
        served: whether vLLM serves a name: the model's own, or a LoRA adapter's.
        base: the model's own name, which presets stand for.
        presets: name -> words.
        may_be_served: vLLM may yet find an adapter of a name that it does not hold.

    Raises:
        SteeringError: an id that asks for steering in words that cannot be read, or of a model
            that is not served.
    """
    if model in presets:  # First: an adapter loaded later may not take the name over.
        return base, parse_words(presets[model])
    if served(model):
        return model, None
    cuts = [i for i, sign in enumerate(model) if sign in ":@"]
    for cut in reversed(cuts):
        if served(model[:cut]):
            tail = model[cut + 1 :]
            if may_be_served and model[cut] == ":" and "@" not in tail and tail not in presets:
                return model, None
            return model[:cut], _words(model, cut, presets)
    # Nobody else writes so, and a server that is told not to look at names would answer unsteered.
    for cut in cuts:
        head, tail = model[:cut], model[cut + (model[cut] == ":") :]
        if tail in presets or ("@" in tail and _readable(tail)):
            if may_be_served:
                return head, _words(model, cut, presets)
            rule = f"asks for steering of {head!r}, which is not served"
            raise SteeringError("model", model, rule, reason="unknown_model")
    return model, None


def _words(model: str, cut: int, presets: Mapping[str, str]) -> list[dict[str, Any]]:
    tail = model[cut:] if model[cut] == "@" else model[cut + 1 :]
    try:
        return parse_words(presets.get(tail, tail))
    except ValueError as error:
        raise SteeringError("model", model, str(error), reason="bad_words") from None


def _readable(words: str) -> bool:
    try:
        parse_words(words)
    except ValueError:
        return False
    return True
