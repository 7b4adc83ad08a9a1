"""The Managers that a Router here would be given: does one of them act?"""

from __future__ import annotations

import asyncio

import aiohttp

from router.settings import RouterSettings
from telemetry.http.fleet_session import fleet_session

from .findings import ASK_LIMIT_S, Finding, Level


async def check_managers() -> list[Finding]:
    """Check that exactly one Manager acts."""
    urls = [url for url in RouterSettings.load().manager_urls if url.startswith("http")]
    if not urls:
        return []
    async with fleet_session(ASK_LIMIT_S) as session:
        said = await asyncio.gather(*(_said(session, url) for url in urls))
    text = "; ".join(f"{url} {what}" for url, what in zip(urls, said, strict=True))
    if "acts" in said:
        away = any(what.startswith("does not answer") for what in said)
        fix = "start it, or take it out of INFERQ_ROUTER_MANAGER_URLS" if away else ""
        return [Finding("managers", Level.WARNING if away else Level.OK, text, fix)]
    fix = "start one with `inferq manager`, or correct INFERQ_ROUTER_MANAGER_URLS"
    return [Finding("managers", Level.WARNING, f"none of the configured Managers acts: {text}", fix)]


async def _said(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(f"{url}/readyz", allow_redirects=False) as answer:
            if answer.status == 200:
                return "acts"
            reasons = (await answer.json()).get("reasons", [])
            return str(reasons[0]) if reasons else f"answers {answer.status}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AttributeError) as error:
        return f"does not answer ({type(error).__name__})"
