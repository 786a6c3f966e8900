"""A replay through a gateway: what only servers know is asked of those behind it, of all of them together."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from whiflash_workloads.client import Sampling, Server, ServerUnreachable

GATEWAY, ONE, TWO = "http://gateway", "http://one", "http://two"


def reply(request: httpx.Request) -> httpx.Response:
    """A gateway that names two servers, and these; the second has two replicas."""
    url = str(request.url)
    if url == f"{GATEWAY}/v1/models":
        return httpx.Response(200, json={"data": [{"id": "m"}]})
    if url == f"{GATEWAY}/workers":
        return httpx.Response(200, json={"workers": [{"url": ONE}, {"url": TWO}]})
    if url == f"{ONE}/v1/models":
        return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 512}]})
    rounds = {f"{ONE}/server_info": [3], f"{TWO}/server_info": [4, 5]}
    if url in rounds:
        states = [{"whiflash": {"rounds": n, "by": {"df": n}}} for n in rounds[url]]
        return httpx.Response(200, json={"speculative_algorithm": "WHIFLASH", "internal_states": states})
    return httpx.Response(404)


async def connect(handler) -> tuple[Server, httpx.AsyncClient]:
    http = httpx.AsyncClient(base_url=GATEWAY, transport=httpx.MockTransport(handler))
    return await Server.connect(http, GATEWAY, 0, Sampling(64, 0.0)), http


def test_context_and_figures_come_from_the_servers_behind() -> None:
    async def run() -> None:
        server, _ = await connect(reply)
        assert (server.model, server.context, server.behind) == ("m", 512, (ONE, TWO))
        assert await server.totals() == {"rounds": 12, "by": {"df": 12}}
        assert server.speculates and server.is_whiflash
        assert await server.speculation("nobody") == "HTTP 404"

    asyncio.run(run())


def test_a_server_that_does_not_say_its_context_is_no_gateway() -> None:
    def no_gateway(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404) if request.url.path == "/workers" else reply(request)

    with pytest.raises(ServerUnreachable, match="base-url"):
        asyncio.run(connect(no_gateway))
