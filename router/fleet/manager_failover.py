"""Sends a Router's calls to the acting Manager, of however many there are: a :class:`~router.ports.ManagerPort`.

The acting Manager publishes its URL in Redis. Calls go there; while it cannot be reached, to the configured Managers in
turn: a standby Manager passes them on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from queue_schemas import CannotStart, ManagerUnavailable
from queue_schemas.fleet.acting_manager import ActingManager, why_not_followed
from telemetry import get_logger
from telemetry.http.fabric_calls import FabricCall, Forwarded

from .manager_client import RemoteManager

AVOID_S = 10.0
"""How long a Manager that could not be reached is tried last."""
NOBODY_ACTS_S = 15.0
"""How long after the last renewal of the leader lease a Router reports that no Manager acts."""
MAX_FOLLOWED = 32
"""How many Managers beside the configured ones it keeps clients for."""
_REFUSED = (401, 403)

OpenManager = Callable[[str], RemoteManager]
log = get_logger(__name__)


class ManagerRoute(RemoteManager):
    """Sends calls to the Managers at ``urls`` and to the URL that the acting one publishes with proof."""

    def __init__(
        self,
        urls: Sequence[str],
        join_token: str,
        open_manager: OpenManager,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(" or ".join(urls), join_token)
        self._urls = tuple(urls)
        self._open = open_manager
        self._clock = clock
        self._managers = {url: open_manager(url) for url in urls}
        self._avoided_until: dict[str, float] = {}
        self._acting = ""
        self._rejected = ""
        self._renewal_count = 0
        self._renewed_at = clock()
        self._unreachable = False

    def note_acting(self, acting: ActingManager) -> None:
        """Take note of the acting Manager in Redis. Its URL is used if it is proven with the join token."""
        if acting.renewal_count != self._renewal_count:
            self._renewal_count, self._renewed_at = acting.renewal_count, self._clock()
        url = acting.url.rstrip("/")
        if not acting.renewal_count or not url or url == self._acting:
            self._acting = url if acting.renewal_count else ""
            return None
        self._acting = ""
        if url not in self._managers:
            if why := why_not_followed(acting, self._join_token, self._urls):
                return self._reject(url, why)
            try:
                self._remember(url)
            except CannotStart as error:  # an actor of a Ray cluster that this Router is not in
                return self._reject(url, error.message)
        self._acting, self._rejected = url, ""
        log.info("manager_followed", url=url)
        return None

    @property
    def trouble(self) -> str:
        """Why workers cannot join through this Router; empty if they can. Requests are served in any case."""
        if self._unreachable:
            return "no acting Manager can be reached: workers cannot join through this router, requests go on"
        if self._clock() - self._renewed_at > NOBODY_ACTS_S:
            return "no Manager acts: workers cannot join until one does, requests go on"
        return ""

    async def forward(self, call: FabricCall) -> Forwarded:
        """The first answer of a Manager that is not on standby and accepts our token; else the refusal with the lowest
        status. Raises ``ManagerUnavailable`` if none answers."""
        fault: ManagerUnavailable | None = None
        refusals: list[Forwarded] = []
        for url, manager in self._order():
            try:
                answer = await manager.forward(call)
            except ManagerUnavailable as error:
                self._avoided_until[url] = self._clock() + AVOID_S
                fault = error
                continue
            self._avoided_until.pop(url, None)
            if answer.status not in _REFUSED and not _is_standby(answer):
                self._unreachable = False
                return answer
            refusals.append(answer)
        self._unreachable = True
        if refusals:
            return min(refusals, key=lambda answer: answer.status)
        raise fault or ManagerUnavailable("no Manager is known here: give --manager-url")

    async def close(self) -> None:
        for manager in self._managers.values():
            await manager.close()

    def _remember(self, url: str) -> None:
        followed = [known for known in self._managers if known not in self._urls]
        for forgotten in followed[: max(0, len(followed) + 1 - MAX_FOLLOWED)]:
            del self._managers[forgotten]
            self._avoided_until.pop(forgotten, None)
        self._managers[url] = self._open(url)

    def _order(self) -> list[tuple[str, RemoteManager]]:
        """The acting Manager first; those that could not be reached recently last."""
        now = self._clock()
        urls = dict.fromkeys([self._acting, *self._urls] if self._acting else self._urls)
        ordered = sorted(urls, key=lambda url: self._avoided_until.get(url, 0.0) > now)
        return [(url, self._managers[url]) for url in ordered]

    def _reject(self, url: str, why: str) -> None:
        if self._rejected != url:
            log.warning("acting_manager_not_followed", url=url[:200], why=why)
        self._rejected = url


def _is_standby(answer: Forwarded) -> bool:
    """Whether the answer comes from a standby Manager."""
    if answer.status != ManagerUnavailable.status:
        return False
    try:
        code: object = json.loads(answer.body)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True
    return code == ManagerUnavailable.code
