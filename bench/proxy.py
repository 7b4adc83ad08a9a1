"""What inferq is measured against: the best simple proxy in Python that has no queue.

FastAPI on uvicorn with uvloop and httptools, one shared aiohttp session without cookies, decompression or headers of
its own; the body passes unread both ways, a stream passes as it comes. No retries, no durability, no limits: nothing
that costs. ``python -m bench.proxy --engine-url URL --port PORT``
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from yarl import URL

CHAT = "/v1/chat/completions"


def create_app(engine_url: str) -> FastAPI:
    """A proxy for the engine at ``engine_url``."""
    url = URL(engine_url + CHAT, encoded=True)
    headers = {"content-type": "application/json"}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3600),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding"),
        ) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post(CHAT)
    async def forward(request: Request) -> Response:
        session: aiohttp.ClientSession = app.state.session
        answer = await session.post(url, data=await request.body(), headers=headers)
        media_type = answer.headers["content-type"]
        if not media_type.startswith("text/event-stream"):
            async with answer:
                return Response(await answer.read(), answer.status, media_type=media_type)
        return StreamingResponse(_chunks(answer), answer.status, media_type=media_type)

    return app


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async with answer:
        async for chunk in answer.content.iter_any():
            yield chunk


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine-url", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        create_app(options.engine_url),
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=3600,
        log_level="warning",
    )
