"""What inferq is measured against: the best simple proxy in Python that has no queue.

FastAPI and one shared aiohttp session; the body passes unread both ways, a stream passes as it comes. No retries, no
durability, no limits: nothing that costs. ``python -m bench.proxy --engine-url URL --port PORT``
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse


def create_app(engine_url: str) -> FastAPI:
    """A proxy for the engine at ``engine_url``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(engine_url, connector=connector, timeout=timeout) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/{path:path}")
    async def forward(path: str, request: Request) -> Response:
        session: aiohttp.ClientSession = request.app.state.session
        answer = await session.post(
            f"/v1/{path}", data=await request.body(), headers={"content-type": "application/json"}
        )
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
        access_log=False,
        log_level="warning",
    )
