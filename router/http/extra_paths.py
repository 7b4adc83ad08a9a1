"""Rejects extra inference paths that would shadow a route of the Router's own."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from queue_schemas import CannotStart
from telemetry.http.access import declared
from telemetry.http.methods import answered_methods


def check_extra_paths(web_app: FastAPI, extra_paths: Sequence[str], variable: str) -> None:
    """Raise ``CannotStart`` if one of ``extra_paths`` is, begins or lies below a path of ``web_app``, in any case.

    ``variable`` names the setting in the error."""
    if not extra_paths:
        return
    templates = {route.path.lower() for route in declared(web_app)}
    for path in extra_paths:
        plain = path.lower().rstrip("/")
        steps = plain.split("/")[1:]
        upwards = ["/" + "/".join(steps[:count]) for count in range(1, len(steps) + 1)]
        spellings = [*upwards, f"{plain}/", f"{plain}/x", path]
        if any(answered_methods(web_app, each) for each in spellings) or any(
            template.startswith(f"{plain}/") for template in templates
        ):
            raise CannotStart(
                f"{variable}: the Router answers {path} itself, or what lies above or "
                "below it: remove it; only paths that nothing but an engine answers may be passed on"
            )
