"""Reads the fields of a request's body that decide how it is queued: model, ``stream``, ``priority``, ``timeout``.

The body is parsed once and never rewritten: the job carries the client's own bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from openai_api.completions.continuable import choices_of, may_continue
from openai_api.json_complexity import TOO_MUCH, has_too_much_structure
from openai_api.json_types import json_type
from openai_api.paths import RESPONSES_PATH, wants_usage
from openai_api.request_limits import RequestLimits, check_request
from queue_schemas import BadMessage, BadRequest, Pool
from queue_schemas.ids import check_name
from queue_schemas.records import record
from scheduling.affinity import request_affinity
from scheduling.cost import estimate_cost, estimate_form_cost

from ..http.forms import boundary_of, form_fields

_TIMEOUT = "a number of seconds above 0: how long the request may take"
_FORM_FIELDS = ("model", "stream", "priority", "timeout")
_TRUE_WORDS = frozenset({"true", "1", "on", "yes", "t", "y"})
_FALSE_WORDS = frozenset({"", "false", "0", "off", "no", "f", "n"})


@record
class RequestFields:
    """What the Router needs to know of a body. ``priority`` is vLLM's: lower is earlier, 0 the default.

    ``timeout_s``: how long the request may take, None if it does not say. Gateways define it, engines ignore it.
    ``continuable``: another attempt can continue the stream behind what was delivered; ``usage``: the stream ends with
    its usage; ``choices``: how many the stream has; ``background``: a background response; ``cost``: what it will cost,
    by an estimate (:mod:`scheduling.cost`); ``affinity``: the digests of its prefix (:mod:`scheduling.affinity`);
    ``tier``: the ``service_tier`` that it names.
    """

    model: Pool
    stream: bool = False
    priority: int = 0
    continuable: bool = False
    usage: bool = False
    timeout_s: float | None = None
    choices: int = 1
    background: bool = False
    cost: int = 1
    affinity: str = ""
    tier: str = ""


def read_fields(
    body: bytes,
    content_type: str,
    path: str,
    limits: RequestLimits | None = None,
    affinity_of: str = "",
    session: bytes | None = None,
) -> RequestFields:
    """The fields in ``body``, sent to ``path``: a JSON object, or, where ``content_type`` says ``multipart/form-data``,
    a form. ``affinity_of``: the tenant for whom its prefix is read, '' for nobody; ``session``: the client's name for
    its conversation.

    Raises ``BadRequest`` that names the field or the position at fault, also for one that asks for more than
    ``limits``.
    """
    if content_type[:19].lower() == "multipart/form-data":
        return _from_form(form_fields(body, boundary_of(content_type), _FORM_FIELDS))
    return _from_json(body, path, limits, affinity_of, session)


def _from_json(
    body: bytes, path: str, limits: RequestLimits | None, affinity_of: str, session: bytes | None
) -> RequestFields:
    if has_too_much_structure(body):
        raise BadRequest(f"the body has {TOO_MUCH}; split it into several requests")
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not body:
            raise BadRequest("the body is empty: send a JSON object") from None
        raise BadRequest(
            f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}, byte {error.pos})"
        ) from None
    if type(request) is not dict:
        raise BadRequest(f"the body must be a JSON object, not {json_type(request)}")
    model = request.get("model")
    if type(model) is not str:
        raise _wrong("model", model, "text: the id of a model, as GET /v1/models lists them", required=True)
    stream = request.get("stream")
    if stream is not None and type(stream) is not bool:
        raise _wrong("stream", stream, "true or false")
    priority = request.get("priority")
    if priority is not None and type(priority) is not int:
        raise _wrong("priority", priority, "a whole number; lower is earlier")
    timeout = request.get("timeout")
    if timeout is not None:
        _check_timeout(timeout)
    background = path == RESPONSES_PATH and request.get("background")
    if background is not None and type(background) is not bool:
        raise _wrong("background", background, "true or false")
    if limits is not None:
        check_request(request, path, limits)
    cost = estimate_cost(path, body, request)
    named = request.get("service_tier")
    tier = named if type(named) is str else ""
    affinity = request_affinity(affinity_of, model, request, len(body), session)
    if not stream:
        return RequestFields(
            model=_checked_model(model),
            priority=priority or 0,
            timeout_s=timeout,
            background=bool(background),
            cost=cost,
            affinity=affinity,
            tier=tier,
        )
    return RequestFields(
        model=_checked_model(model),
        stream=True,
        priority=priority or 0,
        continuable=may_continue(path, request),
        usage=wants_usage(request),
        timeout_s=timeout,
        choices=choices_of(request),
        background=bool(background),
        cost=cost,
        affinity=affinity,
        tier=tier,
    )


def _from_form(fields: Mapping[str, str]) -> RequestFields:
    if "model" not in fields:
        raise _wrong("model", None, "a field of the form: the id of a model", required=True)
    word = fields.get("stream", "").strip().lower()
    if word not in _TRUE_WORDS and word not in _FALSE_WORDS:
        raise BadRequest(f"stream must be true or false, not {word[:40]!r}", param="stream")
    try:
        priority = int(fields.get("priority", "0"))
    except ValueError:
        raise BadRequest("priority must be a whole number; lower is earlier", param="priority") from None
    timeout_s = None
    if "timeout" in fields:
        try:
            timeout_s = float(fields["timeout"])
        except ValueError:
            raise _wrong("timeout", fields["timeout"], _TIMEOUT) from None
        _check_timeout(timeout_s)
    streams, cost = word in _TRUE_WORDS, estimate_form_cost()
    return RequestFields(_checked_model(fields["model"]), streams, priority, timeout_s=timeout_s, cost=cost)


def _check_timeout(value: object) -> None:
    if type(value) is not int and type(value) is not float:
        raise _wrong("timeout", value, _TIMEOUT)
    if not 0 < value < float("inf"):
        raise BadRequest(f"timeout must be {_TIMEOUT}", param="timeout")


def _checked_model(model: str) -> Pool:
    try:
        return Pool(check_name(model, "model"))
    except BadMessage as error:
        raise BadRequest(error.message, param="model") from None


def _wrong(param: str, value: object, expected: str, *, required: bool = False) -> BadRequest:
    if value is None and required:
        return BadRequest(f"{param} is missing; it must be {expected}", param=param)
    return BadRequest(f"{param} must be {expected}, not {json_type(value)}", param=param)
