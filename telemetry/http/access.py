"""Declare who may call each route, with the dependency that enforces it.

:func:`allow` makes the dependency of a route (or of a whole ``APIRouter``); :func:`declared` reads the declarations of
an app back, for the table in ``docs/security.md`` and for the tests that call each path as each principal.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fastapi import FastAPI, Request, params
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from queue_schemas import JOIN_TOKEN_HEADER, AuthenticationFailed

from .loopback_access import LoopbackAccess, check_is_json

_DOCUMENTS = frozenset({"/openapi.json"})
"""FastAPI's own page, which is of no APIRouter."""


class Access(StrEnum):
    """Who may call a route. Where the credential is not configured, :class:`LoopbackAccess` decides."""

    PUBLIC = "anyone"
    """The page shows nothing about requests, addresses or credentials."""
    CLIENT = "client"
    """An API key; what belongs to a tenant is shown to that tenant's keys only."""
    CLIENT_OR_MEMBER = "client, member"
    """An API key or the join token."""
    WORKER = "worker, member"
    """A worker's credential, which allows some models, or the join token."""
    MEMBER = "member"
    """The join token: workers, Routers, Managers and operators."""


@dataclass(frozen=True, slots=True)
class DeclaredRoute:
    """One method and path of an app. ``access`` is None where the route declares none."""

    method: str
    path: str
    access: Access | None


def allow(access: Access, check: Callable[[Request], None] = lambda _: None) -> params.Depends:
    """A route's declaration: ``check`` raises what a caller without that access is answered."""

    async def checked(request: Request) -> None:
        check(request)

    checked.access = access  # type: ignore[attr-defined]  # what `declared` reads
    return params.Depends(checked)


def allow_members(join_token: str, local: LoopbackAccess) -> params.Depends:
    """The declaration of :attr:`Access.MEMBER`: the join token, or without one :class:`LoopbackAccess`."""

    return allow(Access.MEMBER, lambda request: check_member(request, join_token, local))


def check_member(request: Request, join_token: str, local: LoopbackAccess) -> None:
    """Raise the error for a caller without the join token or, where none is set, for one that ``local`` refuses."""
    headers = dict(request.scope["headers"])
    if join_token:
        check_join_token(join_token, request.headers.get(JOIN_TOKEN_HEADER, ""))
    else:
        local.check(headers)
    check_is_json(request.method, headers)


def is_join_token(expected: str, given: str) -> bool:
    """Whether ``given`` is the join token, compared in constant time; never, where none is ``expected``."""
    return bool(expected) and hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace"))


def check_join_token(expected: str, given: str) -> None:
    """Raises ``AuthenticationFailed`` for what is not the join token."""
    if not is_join_token(expected, given):
        raise AuthenticationFailed(
            f"the join token is missing or wrong: send the one the Manager was started with "
            f"(INFERQ_JOIN_TOKEN) in the header {JOIN_TOKEN_HEADER}"
        )


def declared(app: FastAPI) -> list[DeclaredRoute]:
    """Every method and path that ``app`` answers, with its declaration."""
    return [
        DeclaredRoute(method, path, access)
        for path, methods, access in _walk(app.routes)
        for method in sorted(set(methods or ()) - {"HEAD"} or {"HEAD"})
    ]


def _walk(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, Iterable[str] | None, Access | None]]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route.path, route.methods, _access_of(route.dependencies)
        elif hasattr(route, "effective_route_contexts"):  # FastAPI resolves an included router at each call
            for found in route.effective_route_contexts():
                yield found.path, found.methods, _access_of(found.dependencies)
        else:
            path = str(getattr(route, "path", ""))
            yield path, getattr(route, "methods", None), Access.PUBLIC if path in _DOCUMENTS else None


def _access_of(dependencies: Iterable[Any]) -> Access | None:
    """The one declaration among ``dependencies``. Raises ``ValueError`` if there are two that differ."""
    found = {access for each in dependencies if (access := getattr(each.dependency, "access", None)) is not None}
    if len(found) > 1:
        raise ValueError(f"a route declares more than one access: {sorted(found)}")
    return next(iter(found), None)
