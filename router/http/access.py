"""Access checks of the Router's routes: an API key, the join token, or without keys any program on this machine."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request, params

from queue_schemas import JOIN_TOKEN_HEADER, AuthenticationFailed, Tenant
from telemetry.http.access import Access, allow, check_member, is_join_token
from telemetry.http.loopback_access import LoopbackAccess

from .api_keys import ApiKeys


class Gate:
    """Makes the dependencies that check who calls a route. Members show the join token, if there is one."""

    def __init__(self, keys: ApiKeys, join_token: str, local: LoopbackAccess) -> None:
        """``local``: who may call where no credential is configured. Its web origins are clients, never members."""
        self._keys = keys
        self._join_token = join_token
        self._local = replace(local, origins=frozenset())

    def tenant_of(self, request: Request) -> Tenant:
        """The tenant whose API key the request has. Raises as :meth:`ApiKeys.tenant`."""
        return self._keys.caller(request)

    def allow(self, access: Access) -> params.Depends:
        """A route's dependency, which raises ``AuthenticationFailed`` or ``PermissionRefused`` for other callers."""
        checks = {
            Access.PUBLIC: lambda _: None,
            Access.CLIENT: self._check_client,
            Access.CLIENT_OR_MEMBER: self._check_client_or_member,
            Access.MEMBER: self._check_member,
        }
        return allow(access, checks[access])

    def _check_client(self, request: Request) -> None:
        self._keys.caller(request)

    def _check_client_or_member(self, request: Request) -> None:
        if is_join_token(self._join_token, request.headers.get(JOIN_TOKEN_HEADER, "")):
            return
        try:
            self._keys.caller(request)
        except AuthenticationFailed as error:
            raise AuthenticationFailed(f"{error.message}, or the join token as {JOIN_TOKEN_HEADER}") from None

    def _check_member(self, request: Request) -> None:
        if self._keys.required and not self._join_token:
            raise AuthenticationFailed(
                "this router asks for API keys and was given no join token, so it refuses all calls to /fabric/v1: "
                "start it with the fleet's INFERQ_JOIN_TOKEN"
            )
        check_member(request, self._join_token, self._local)
