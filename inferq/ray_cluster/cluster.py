"""This process as a driver of a Ray cluster: let in within a time limit, or told why not."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from queue_schemas import RAY_NAMESPACE, CannotStart

from .head import Head, driver_environment, running_head
from .settings import RaySettings
from .usage import direct_environment, usage_environment

AUTO = "auto"
_CLOSED_LIMIT_S = 3.0
_HOW_TO_SHOW_IT = "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH naming the file that holds it"


@dataclass(frozen=True, slots=True)
class Target:
    """The cluster that a command works on. ``head`` is there if it is our own, started by `inferq ray up`."""

    address: str
    head: Head | None = None


def find_target(settings: RaySettings) -> Target | None:
    """The cluster that is meant: the given one, or our own if it runs."""
    head = running_head(settings.data_folder)
    if not settings.address:
        return None if head is None else Target(head.address, head)
    return Target(settings.address, head if head is not None and head.address == settings.address else None)


def require_ray() -> None:
    """Raises ``CannotStart`` with what to install if Ray is not there."""
    if importlib.util.find_spec("ray") is None:  # looks without loading it
        raise CannotStart("this needs Ray: pip install 'inferq[ray]'")


@contextmanager
def connected(target: Target, limit_s: float) -> Iterator[str]:
    """Be a driver of ``target``; gives its address. Raises ``CannotStart`` if it does not let us in in time."""
    require_ray()
    os.environ.update(usage_environment() | direct_environment(target.address.rpartition(":")[0]))
    if target.head is not None:
        os.environ.update(driver_environment(target.head.token_file, loopback=target.head.loopback))
    _check_open(target.address, limit_s)
    import ray  # noqa: PLC0415 - reads the variables above when it is loaded

    _connect(target.address, limit_s)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _check_open(address: str, limit_s: float) -> None:
    """Ray itself takes a minute to notice that nobody listens."""
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise CannotStart(f"--address {address!r} is not host:port, nor auto")
    try:
        socket.create_connection((host, int(port)), min(limit_s, _CLOSED_LIMIT_S)).close()
    except OSError as error:
        reason = error.strerror or "no answer in time"
        raise CannotStart(f"no Ray cluster answers at {address} ({reason.lower()}): correct --address") from error


def _connect(address: str, limit_s: float) -> None:
    import ray  # noqa: PLC0415

    failures: list[BaseException] = []

    def enter() -> None:
        try:
            ray.init(address=address, namespace=RAY_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            failures.append(error)

    # In a thread of its own: ray.init has no limit of its own, and waits where no signal reaches it.
    entering = threading.Thread(target=enter, name="ray.init", daemon=True)
    entering.start()
    entering.join(limit_s)
    if entering.is_alive():
        raise CannotStart(
            f"the Ray cluster at {address} did not let this process in within {limit_s:.0f} s: look whether that is "
            f"its head's port, this the same version of Ray, and its token here ({_HOW_TO_SHOW_IT})"
        )
    if failures:
        raise CannotStart(_why_not(address, failures[0])) from failures[0]


def _why_not(address: str, error: BaseException) -> str:
    import ray  # noqa: PLC0415

    if address == AUTO and isinstance(error, ConnectionError):
        return "no Ray cluster runs here: leave --address out to start one, or give its head's host:port"
    if isinstance(error, ray.exceptions.AuthenticationError):
        return f"the Ray cluster at {address} wants its token: give it ({_HOW_TO_SHOW_IT})"
    return f"the Ray cluster at {address} does not let this process in: {str(error).splitlines()[0]}"
