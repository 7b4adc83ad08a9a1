"""Ray's usage statistics: off in every process that we start, and nobody is asked, unless the user has said on.

Ray's dashboard asks two things even when its statistics are off: cloud metadata services, which cloud it is in, and
usage-stats.ray.io, to be told that they are off. Neither can be switched off by itself, so both are led nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_ENABLED, _REPORT_URL = "RAY_USAGE_STATS_ENABLED", "RAY_USAGE_STATS_REPORT_URL"
_NOWHERE_URL = "off:"
"""Of no protocol that there is: refused by the HTTP library before anything is sent or looked up."""
_NOWHERE_PROXY = "http://127.0.0.1:9"
"""The discard port (RFC 863) of this machine."""
_METADATA_HOSTS = ("169.254.169.254", "metadata.google.internal")


def usage_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables for a process of Ray's that starts with ``environ``."""
    enabled = environ.get(_ENABLED, "0")
    variables = {_ENABLED: enabled}
    if enabled != "1":
        variables[_REPORT_URL] = environ.get(_REPORT_URL, _NOWHERE_URL)
        # A proxy for these hosts alone, as the library behind Ray's calls (requests) reads its environment.
        variables |= {f"http://{host}_proxy": _NOWHERE_PROXY for host in _METADATA_HOSTS}
    return variables


def direct_environment(*hosts: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that keep a proxy of ``environ`` away from loopback and ``hosts``: parts of Ray speak gRPC, which would
    ask it for them."""
    given = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    direct = [one.strip() for one in given.split(",") if one.strip()]
    direct += [host for host in ("localhost", "127.0.0.1", "::1", *hosts) if host and host not in direct]
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(direct))
