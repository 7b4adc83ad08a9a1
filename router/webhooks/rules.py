"""Reads requests about webhook endpoints. Pure; all functions raise ``BadRequest`` that names the field at fault."""

from __future__ import annotations

from webhooks.core.url_rules import UrlRules, check_url

from ..http.json_body import read_body_as
from .schemas import EndpointChange, EndpointCreate, EndpointTest, SecretRotation


def read_new_endpoint(body: bytes, rules: UrlRules) -> EndpointCreate:
    """The endpoint to create, its URL checked against ``rules``."""
    params = read_body_as(body, EndpointCreate)
    check_url(params.url, rules)
    return params


def read_endpoint_change(body: bytes, rules: UrlRules) -> EndpointChange:
    """What to change of an endpoint."""
    params = read_body_as(body, EndpointChange)
    if params.url is not None:
        check_url(params.url, rules)
    return params


def read_rotation(body: bytes) -> int:
    """For how many seconds the old secret stays valid; without a body: 0."""
    return read_body_as(body or b"{}", SecretRotation).keep_s


def read_test(body: bytes) -> str:
    """The type of the sample event to send."""
    return read_body_as(body, EndpointTest).event_type
