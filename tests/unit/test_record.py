"""The recorder: what is written of what passes, which session it belongs to, and that a replay asks the same again."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, InternalServerError, OpenAI, OpenAIError

from tests.chat_upstream import ChatUpstream
from whiflash_workloads.loaders import load_traces
from whiflash_workloads.record import AsyncRecordingTransport, Recorder, RecordError, RecordingTransport
from whiflash_workloads.record.proxy import build_app
from whiflash_workloads.record.recorder import without_secrets
from whiflash_workloads.record.reply import NotWhole, read_reply
from whiflash_workloads.replay import replay
from whiflash_workloads.schema import AssistantMessage, Session
from whiflash_workloads.schema import ToolMessage as ToolOutput

Json = dict[str, Any]

SECRET = "sk-do-not-write-me"
TOOL: Json = {
    "type": "function",
    "function": {
        "parameters": {"type": "object", "properties": {"why": {"type": "string"}, "order": {"type": "integer"}}},
        "name": "look_up",
        "description": "Find größere Bestellungen.",
    },
}


# Clients


def start(text: str = "Where is order 7?") -> list[Json]:
    return [{"content": "You help.", "role": "system"}, {"role": "user", "content": [{"type": "text", "text": text}]}]


def run_agent(
    client: OpenAI, stream: bool, messages: list[Json], tools: list[Json] | None = None, **extra: Any
) -> None:
    """A tool loop as it is written with OpenAI's client; `messages` grows."""
    for _ in range(10):
        given = dict(model="m", messages=messages, tools=tools or [TOOL], temperature=0.5, **extra)
        if stream:
            with client.chat.completions.stream(**given) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(**given).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": f"found {call.id} ✓"})


def openai_client(base_url: str, http: httpx.Client | None = None) -> OpenAI:
    return OpenAI(base_url=base_url, api_key=SECRET, http_client=http, max_retries=0)


async def run_langchain(model: ChatOpenAI, use_async: bool, stream: bool) -> None:
    """The same loop with LangChain, which writes messages in its own way and drops the reasoning."""
    bound, messages = model.bind_tools([TOOL]), [SystemMessage("You help."), HumanMessage("Where is order 7?")]
    for _ in range(10):
        if stream:
            parts = [part async for part in bound.astream(messages)] if use_async else list(bound.stream(messages))
            reply = parts[0]
            for part in parts[1:]:
                reply = reply + part
        else:
            reply = await bound.ainvoke(messages) if use_async else await asyncio.to_thread(bound.invoke, messages)
        messages.append(reply)
        if not reply.tool_calls:
            return
        messages += [ToolMessage("found", tool_call_id=call["id"]) for call in reply.tool_calls]


@contextlib.contextmanager
def proxy(upstream: str, recorder: Recorder) -> Iterator[str]:
    """The proxy in a thread; its base URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = build_app(httpx.URL(upstream), recorder)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the proxy does not end"


@contextlib.contextmanager
def recording(how: str, upstream: str, recorder: Recorder) -> Iterator[OpenAI]:
    """A client whose requests are recorded in one of the two ways."""
    if how == "transport":
        with httpx.Client(transport=RecordingTransport(recorder)) as http:
            yield openai_client(f"{upstream}/v1", http)
    else:
        with proxy(upstream, recorder) as base_url, openai_client(base_url) as client:
            yield client


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def asked(bodies: list[Json]) -> list[str]:
    """What has to be the same again, to the byte."""
    return [json.dumps([body["messages"], body["tools"]]) for body in bodies]


def replayed(sessions: tuple[Session, ...]) -> list[str]:
    with ChatUpstream() as server:
        assert not [turn.error for turn in replay(sessions, server.url, max_tokens=10).turns if turn.error]
    return asked(server.bodies)


# Round trip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_a_recorded_run_replays_to_the_same_requests(tmp_path: Path, how: str, stream: bool) -> None:
    """Byte for byte in messages and tool schemas: order of keys, content parts and all."""
    with (
        ChatUpstream() as upstream,
        Recorder(tmp_path / "a.jsonl") as recorder,
        recording(how, upstream.url, recorder) as client,
    ):
        messages = start()
        run_agent(client, stream, messages)
        messages.append({"role": "user", "name": "Kim", "content": "And order 8?"})
        run_agent(client, stream, messages)
    assert str(recorder.summary()) == f"recorded 6 turns of 1 sessions in {tmp_path / 'a.jsonl'}"
    sessions = load_traces([recorder.path]).sessions
    assert [len(session.turns) for session in sessions] == [6]
    assert sessions[0].tools == [TOOL]
    assert replayed(sessions) == asked(upstream.bodies)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("use_async", [False, True])
def test_langchain_clients_of_both_kinds(tmp_path: Path, use_async: bool, stream: bool) -> None:
    """As in the module's manual. LangChain drops the reasoning: the trace has it, the replayed history does not."""
    with ChatUpstream() as upstream, Recorder(tmp_path / "a.jsonl") as recorder:
        model = ChatOpenAI(
            model="m",
            base_url=f"{upstream.url}/v1",
            api_key=SECRET,
            http_client=httpx.Client(transport=RecordingTransport(recorder)),
            http_async_client=httpx.AsyncClient(transport=AsyncRecordingTransport(recorder)),
        )
        asyncio.run(run_langchain(model, use_async, stream))
    (session,) = load_traces([recorder.path]).sessions
    replies = [message for message in session.messages if isinstance(message, AssistantMessage)]
    assert [reply.reasoning_content for reply in replies] == ["Look it up. ", "Look it up. ", None]
    assert len(session.turns) == 3
    assert replayed((session,)) == asked(upstream.bodies)


def test_both_ways_write_the_same_but_for_times(tmp_path: Path) -> None:
    written = []
    for how in ("transport", "proxy"):
        with (
            ChatUpstream() as upstream,
            Recorder(tmp_path / how) as recorder,
            recording(how, upstream.url, recorder) as client,
        ):
            run_agent(client, True, start())
        lines = [json.loads(line) for line in (tmp_path / how).read_text().splitlines()]
        for message in (message for line in lines for message in line["messages"]):
            assert message.pop("timestamp_s") > 1e9
            message.pop("tool_duration_s", None)
        written.append(lines)
    assert written[0] == written[1]


def test_what_a_turn_notes(tmp_path: Path) -> None:
    with (
        ChatUpstream(num_calls=1) as upstream,
        Recorder(tmp_path / "a") as recorder,
        recording("transport", upstream.url, recorder) as client,
    ):
        messages = start()
        reply = client.chat.completions.create(model="m", messages=messages, tools=[TOOL], seed=3)
        messages.append(reply.choices[0].message.model_dump(exclude_none=True))
        messages.append({"role": "tool", "tool_call_id": "call-1", "content": "shipped"})
        time.sleep(0.2)
        client.chat.completions.create(model="m", messages=messages, tools=[TOOL], max_tokens=9)
    (session,) = load_traces([recorder.path]).sessions
    _, user, first, output, second = session.messages
    assert isinstance(first, AssistantMessage) and isinstance(second, AssistantMessage)
    assert isinstance(output, ToolOutput) and output.tool_duration_s is not None
    assert output.tool_duration_s >= 0.2
    assert (first.options, second.options) == ({"model": "m", "seed": 3}, {"model": "m", "max_tokens": 9})
    assert first.output_tokens == 7
    assert user.timestamp_s and first.timestamp_s and output.timestamp_s
    assert output.timestamp_s - first.timestamp_s == pytest.approx(output.tool_duration_s, abs=1e-5)


# Streams


def test_a_stream_is_passed_on_as_it_comes(tmp_path: Path) -> None:
    """The client sees the first half while the upstream still holds back the second."""
    with ChatUpstream() as upstream, Recorder(tmp_path / "a") as recorder:
        upstream.hold = True
        with recording("proxy", upstream.url, recorder) as client:
            stream = client.chat.completions.create(model="m", messages=start(), tools=[TOOL], stream=True)
            next(stream)
            assert next(stream).choices[0].delta.reasoning_content == "Look "
            assert recorder.summary().turns == 0
            upstream.half[0].set()
            assert len(list(stream)) > 3
        assert recorder.summary().turns == 1


@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_a_client_that_leaves_ends_the_upstreams_reply(tmp_path: Path, how: str) -> None:
    with ChatUpstream() as upstream, Recorder(tmp_path / "a") as recorder:
        upstream.hold = True
        with recording(how, upstream.url, recorder) as client:
            stream = client.chat.completions.create(model="m", messages=start(), tools=[TOOL], stream=True)
            next(stream)
            stream.close()
            until(lambda: recorder.summary().unrecorded)
            upstream.half[0].set()
            until(lambda: upstream.broken_pipes)
    assert recorder.summary().unrecorded == {"the reply is incomplete": 1}
    assert recorder.path.read_text() == ""


def test_a_client_that_does_not_wait_for_a_reply(tmp_path: Path) -> None:
    """Not streamed: there is nothing to pass on when the client goes, and the upstream must not go on working."""
    silent = socket.create_server(("127.0.0.1", 0))
    with (
        silent,
        Recorder(tmp_path / "a") as recorder,
        proxy(f"http://127.0.0.1:{silent.getsockname()[1]}", recorder) as base_url,
    ):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{base_url}/chat/completions", json={"messages": start()}, timeout=0.3)
        connection, _ = silent.accept()
        connection.settimeout(5)
        received = connection.recv(65536)
        assert b"POST /v1/chat/completions" in received
        while received:
            received = connection.recv(65536)  # empty: the proxy has closed it
        connection.close()
    assert recorder.summary().unrecorded == {"the client disconnected": 1}


@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_a_reply_that_breaks_off_is_no_turn(tmp_path: Path, how: str) -> None:
    with (
        ChatUpstream(fail={0: "drop at half"}) as upstream,
        Recorder(tmp_path / "a") as recorder,
        recording(how, upstream.url, recorder) as client,
    ):
        stream = client.chat.completions.create(model="m", messages=start(), tools=[TOOL], stream=True)
        with pytest.raises((httpx.HTTPError, OpenAIError), match=r"peer closed connection|Connection error"):
            list(stream)
        run_agent(client, True, start())
    assert recorder.summary().unrecorded == {"the upstream failed (RemoteProtocolError)": 1}
    assert [len(session.turns) for session in load_traces([recorder.path]).sessions] == [3]


def test_a_turn_has_ended_before_the_client_sees_the_end(tmp_path: Path) -> None:
    """A client may ask the next thing as soon as it reads the end of the events; it may come in two pieces."""
    with Recorder(tmp_path / "a") as recorder:
        exchange = recorder.begin(json.dumps({"messages": [user("a")]}).encode(), None)
        assert exchange is not None
        exchange.respond(httpx.Headers({"Content-Type": "text/event-stream"}))
        exchange.feed(b'data: {"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}\n\ndata: [DO')
        assert recorder.summary().turns == 0
        exchange.feed(b"NE]\n\n")
        record(recorder, [user("a"), said("yes"), user("b")])
        exchange.end()
    assert sessions_of(recorder.path) == {"session-1": (1, 3)}


# Sessions


def record(
    recorder: Recorder, messages: list[Json], affinity: str | None = None, reply: str = "yes", **body: Any
) -> None:
    """One exchange, without a network."""
    exchange = recorder.begin(json.dumps({"messages": messages, **body}).encode(), affinity)
    assert exchange is not None
    exchange.respond(httpx.Headers({"Content-Type": "application/json"}))
    exchange.feed(json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode())
    exchange.end()


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text}


def sessions_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {session.session_id: session.turns for session in load_traces([path]).sessions}


def test_sessions_are_told_apart_by_what_they_extend(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a")])
        record(recorder, [user("b")])
        record(recorder, [user("a"), said("yes"), user("more")])
        record(recorder, [user("b"), said("yes"), user("more")])
    assert sessions_of(recorder.path) == {"session-1": (1, 3), "session-2": (1, 3)}


def test_the_same_messages_with_other_tools_are_another_session(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a")], tools=[TOOL])
        record(recorder, [user("a"), said("yes"), user("more")])
    assert sessions_of(recorder.path) == {"session-1": (1,), "session-2": (3,)}


def test_a_branch_is_a_session_of_its_own(tmp_path: Path) -> None:
    """Both extend the same reply: the first goes on with the session, the second has its history as given."""
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a")])
        record(recorder, [user("a"), said("yes"), user("left")])
        record(recorder, [user("a"), said("yes"), user("right")])
        record(recorder, [user("a"), said("yes"), user("right"), said("yes"), user("right again")])
    assert sessions_of(recorder.path) == {"session-1": (1, 3), "session-2": (3, 5)}


def test_branches_in_flight_together(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a")])
        bodies = [{"messages": [user("a"), said("yes"), user(text)]} for text in ("left", "right")]
        left, right = (recorder.begin(json.dumps(body).encode(), None) for body in bodies)
        for exchange in (right, left):
            assert exchange is not None
            exchange.respond(httpx.Headers({"Content-Type": "application/json"}))
            exchange.feed(b'{"choices": [{"message": {"content": "ok"}}]}')
            exchange.end()
    assert sessions_of(recorder.path) == {"session-1": (1, 3), "session-2": (3,)}


def test_the_header_names_a_session(tmp_path: Path) -> None:
    """Same prompts in two sessions; a changed history (here: shortened) is a session beside the first."""
    with Recorder(tmp_path / "a") as recorder:
        for name in ("alpha", "beta"):
            record(recorder, [user("a")], affinity=name)
        for name in ("beta", "alpha"):
            record(recorder, [user("a"), said("yes"), user(name)], affinity=name)
        record(recorder, [user("in short: a")], affinity="alpha")
    assert sessions_of(recorder.path) == {"alpha": (1, 3), "beta": (1, 3), "alpha.2": (1,)}
    assert [session.messages[2].wire for session in load_traces([recorder.path]).sessions[:2]] == [
        user("alpha"),
        user("beta"),
    ]


@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_the_header_is_read_from_requests(tmp_path: Path, how: str) -> None:
    with (
        ChatUpstream() as upstream,
        Recorder(tmp_path / "a") as recorder,
        recording(how, upstream.url, recorder) as client,
    ):
        run_agent(client, False, start(), extra_headers={"X-Session-Affinity": "desk-9"})
    assert sessions_of(recorder.path) == {"desk-9": (2, 4, 6)}
    assert {name.lower(): value for name, value in upstream.headers[0].items()}["x-session-affinity"] == "desk-9"


def test_a_history_that_was_begun_elsewhere_was_not_asked_for(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a"), said("an example"), user("b")])
    assert sessions_of(recorder.path) == {"session-1": (3,)}


@pytest.mark.parametrize(
    ("reply", "sent", "same"),
    [
        ("<think>hm</think>\n\nyes", "yes", True),
        ("\n\nyes", "yes", True),
        ("yes", [{"type": "text", "text": "yes"}], True),
        ("yes", "no", False),
        ("yes", "", False),
    ],
)
def test_a_reply_is_known_again_in_what_clients_make_of_it(tmp_path: Path, reply: str, sent: Any, same: bool) -> None:
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a")], reply=reply)
        record(recorder, [user("a"), said(sent), user("b")])
    assert len(load_traces([recorder.path]).sessions) == (1 if same else 2)
    last = load_traces([recorder.path]).sessions[-1]
    assert replayed_history(last) == [user("a"), said(sent), user("b")]


def replayed_history(session: Session) -> list[Json]:
    with ChatUpstream() as server:
        replay([session], server.url)
    return server.bodies[-1]["messages"]


@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_agents_side_by_side(tmp_path: Path, how: str) -> None:
    """The same first prompt in 16 threads: only the ids of the calls tell the sessions apart."""
    with (
        ChatUpstream() as upstream,
        Recorder(tmp_path / "a") as recorder,
        recording(how, upstream.url, recorder) as client,
        ThreadPoolExecutor(16) as threads,
    ):
        for result in [threads.submit(run_agent, client, i % 2 == 0, start()) for i in range(16)]:
            result.result()
    assert (recorder.summary().sessions, recorder.summary().turns) == (16, 48)
    sessions = load_traces([recorder.path]).sessions
    assert [session.turns for session in sessions] == [(2, 4, 6)] * 16
    assert sorted(replayed(sessions)) == sorted(asked(upstream.bodies))


# What is not written


@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_credentials_are_never_written(tmp_path: Path, how: str) -> None:
    headers = {"api-key": SECRET, "X-Api-Key": SECRET, "Cookie": f"session={SECRET}"}
    body = {"api_key": SECRET, "metadata": {"Authorization": f"Bearer {SECRET}", "team": "desk"}}
    with (
        ChatUpstream() as upstream,
        Recorder(tmp_path / "a") as recorder,
        recording(how, upstream.url, recorder) as client,
    ):
        run_agent(client, True, start(), extra_headers=headers, extra_body=body, extra_query={"api-key": SECRET})
    written = recorder.path.read_text()
    assert SECRET not in written and "secret-of-the-server" not in written
    assert '"team": "desk"' in written
    sent = {name.lower(): value for name, value in upstream.headers[0].items()}
    assert (sent["authorization"], sent["api-key"], sent["cookie"]) == (f"Bearer {SECRET}", SECRET, f"session={SECRET}")
    assert upstream.bodies[0]["api_key"] == SECRET
    assert recorder.path.stat().st_mode & 0o077 == 0


def test_a_schema_with_a_password_is_no_credential() -> None:
    schema = {"response_format": {"schema": {"properties": {"password": {"type": "string"}}}}, "max_tokens": 3}
    assert without_secrets(schema | {"extra": [{"password": "x", "a": 1}]}) == schema | {"extra": [{"a": 1}]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "the request is not JSON"),
        (b"[]", "the request has no list of messages"),
        (b'{"messages": []}', "the request has no list of messages"),
        (b'{"messages": [7]}', "the request has no list of messages"),
        (b'{"messages": [{"role": "user", "asked": 1}]}', "a message has the field asked"),
    ],
)
def test_requests_that_the_format_does_not_hold(tmp_path: Path, body: bytes, reason: str) -> None:
    with Recorder(tmp_path / "a") as recorder:
        assert recorder.begin(body, None) is None
        (found,) = recorder.summary().unrecorded
    assert found.startswith(reason)


def test_a_message_that_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    """The agent had its reply; the trace says that it lacks one, and stays readable."""
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a"), {"role": "tool", "content": "of no call"}])
        record(recorder, [user("b")])
    assert list(recorder.summary().unrecorded.values()) == [1]
    assert "tool_call_id" in str(recorder.summary())
    assert len(load_traces([recorder.path]).sessions) == 1


@pytest.mark.parametrize("how", ["transport", "proxy"])
def test_errors_of_the_upstream_are_passed_on_and_a_retry_goes_on(tmp_path: Path, how: str) -> None:
    with (
        ChatUpstream(num_calls=1, fail={1: "500"}) as upstream,
        Recorder(tmp_path / "a") as recorder,
        recording(how, upstream.url, recorder) as client,
    ):
        messages = start()
        with pytest.raises(InternalServerError, match="scripted failure"):
            run_agent(client, False, messages)
        run_agent(client, False, messages)
    assert recorder.summary().unrecorded == {"HTTP status 500": 1}
    assert sessions_of(recorder.path) == {"session-1": (2, 4)}


def test_other_routes_are_passed_on(tmp_path: Path) -> None:
    with ChatUpstream() as upstream, Recorder(tmp_path / "a") as recorder, proxy(upstream.url, recorder) as base_url:
        reply = httpx.get(f"{base_url}/models?a=%2F", headers={"Connection": "close, x-mine", "X-Mine": "1"})
        assert reply.json() == {"data": [{"id": "stub", "max_model_len": 100_000}]}
        assert reply.headers["set-cookie"] == "session=secret-of-the-server"
        assert httpx.post(f"{base_url}/completions", json={}).json() == {"object": "other"}
    assert upstream.others == ["/v1/models?a=%2F", "/v1/completions"]
    assert "passed through: 2 requests that are not chat completions" in str(recorder.summary())


# Replies


def test_compressed_replies_are_read() -> None:
    """An upstream may compress although it was asked not to."""
    from whiflash_workloads.record.recorder import Exchange

    document = b'{"choices": [{"message": {"content": "yes"}}]}'
    written: list[Any] = []

    class Book:
        def finish(self, exchange: Exchange, reply: Any) -> None:
            written.append(reply)

    exchange = Exchange(Book(), None, {}, 0.0)  # type: ignore[arg-type]
    exchange.respond(httpx.Headers({"Content-Type": "application/json", "Content-Encoding": "gzip"}))
    exchange.feed(gzip.compress(document))
    exchange.end()
    assert written[0].message == {"role": "assistant", "content": "yes"}


def test_events_are_put_together() -> None:
    """CRLF, comments, events of several lines, a second choice, calls in turns; nothing behind the end counts."""
    body = (
        b": a comment\r\n\r\n"
        b'data: {"choices": [{"delta": {"role": "assistant",\r\ndata:  "content": "Well"}}]}\r\n\r\n'
        b'event: x\ndata: {"choices": [{"index": 1, "delta": {"content": "other"}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": ", ", "refusal": null, "tool_calls": '
        b'[{"index": 1, "id": "b", "function": {"name": "g", "arguments": ""}}]}}]}\n\n'
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f"}}]}}]}\n\n'
        b'data: {"choices": [{"delta": {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}}]}\n\n'
        b'data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}\n\n'
        b"data: [DONE]\n\n"
        b'data: {"choices": [{"delta": {"content": "late"}}]}\n\n'
    )
    message, tokens = read_reply("text/event-stream", body)
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in [("a", "f", ""), ("b", "g", "{}")]
    ]
    assert message == {"role": "assistant", "content": "Well, ", "tool_calls": calls}
    assert tokens is None


@pytest.mark.parametrize(
    ("content_type", "body", "reason"),
    [
        ("application/json", b"{", "cannot be parsed"),
        ("application/json", b"{}", "has no choices"),
        ("application/json", b"[]", "cannot be parsed"),
        ("text/event-stream", b"", "is incomplete"),
        ("text/event-stream", b'data: {"error": {}}\n\n', "ended with a server error"),
        ("text/event-stream", b"data: {\n\n", "cannot be parsed"),
    ],
)
def test_what_is_no_whole_reply(content_type: str, body: bytes, reason: str) -> None:
    with pytest.raises(NotWhole, match=f"the reply {reason}"):
        read_reply(content_type, body)


# Files


def test_a_file_is_added_to_under_new_names(tmp_path: Path) -> None:
    for _ in range(2):
        with Recorder(tmp_path / "a") as recorder:
            record(recorder, [user("a")])
            record(recorder, [user("a")], affinity="desk")
    assert list(sessions_of(tmp_path / "a")) == ["session-1", "desk", "session-2", "desk.2"]


def test_what_a_crash_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with Recorder(path) as recorder:
        record(recorder, [user("a")])
        record(recorder, [user("a"), said("yes"), user("b")])
    path.write_bytes(path.read_bytes()[:-30])
    with Recorder(path) as recorder:
        record(recorder, [user("c")])
    assert sessions_of(path) == {"session-1": (1,), "session-2": (1,)}


def test_every_turn_is_in_the_file_when_it_has_ended(tmp_path: Path) -> None:
    """A killed process has written all turns but the one in flight."""
    program = """
import os, sys
from whiflash_workloads.record import Recorder
recorder = Recorder(sys.argv[1])
for text in "abc":
    exchange = recorder.begin(b'{"messages": [{"role": "user", "content": "%s"}]}' % text.encode(), None)
    if text == "c":
        os.kill(os.getpid(), 9)
    exchange.respond({"content-type": "application/json"})
    exchange.feed(b'{"choices": [{"message": {"content": "yes"}}]}')
    exchange.end()
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")])
    assert result.returncode == -signal.SIGKILL
    assert sessions_of(tmp_path / "a") == {"session-1": (1,), "session-2": (1,)}


def test_files_that_cannot_be_recorded_into(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="give a file in an existing folder"):
        Recorder(tmp_path / "no" / "a")
    (tmp_path / "other").write_text("{}\n")
    with pytest.raises(RecordError, match=r"other, line 1: is not a recorded session; give a new file"):
        Recorder(tmp_path / "other")
    with Recorder(tmp_path / "a"), pytest.raises(RecordError, match="share one Recorder"):
        Recorder(tmp_path / "a")
    Recorder(tmp_path / "a").close()


def test_a_disk_that_is_full_does_not_stop_the_agent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The lost turn is counted, and its session ends: what comes later stands in the file with its whole history."""
    with Recorder(tmp_path / "a") as recorder:
        record(recorder, [user("a")])
        whole, recorder._file = recorder._file, 2**20  # a descriptor that is not open
        record(recorder, [user("a"), said("yes"), user("b")])
        recorder._file = whole
        record(recorder, [user("a"), said("yes"), user("b"), said("yes"), user("c")])
    assert "not recorded: 1 x the file could not be written" in str(recorder.summary())
    assert "not recorded: a turn of session session-1" in caplog.text
    assert sessions_of(recorder.path) == {"session-1": (1,), "session-2": (5,)}


def test_a_transport_may_be_given_a_path(tmp_path: Path) -> None:
    with ChatUpstream() as upstream:
        with httpx.Client(transport=RecordingTransport(tmp_path / "a")) as http:
            run_agent(openai_client(f"{upstream.url}/v1", http), False, start())
        with Recorder(tmp_path / "a"):  # it has been let go of
            pass
    assert sessions_of(tmp_path / "a") == {"session-1": (2, 4, 6)}


# The command


def test_upstreams_that_do_not_answer(tmp_path: Path) -> None:
    """An error as OpenAI writes it, and one that names the upstream."""
    with ChatUpstream(fail={0: "drop"}) as upstream, Recorder(tmp_path / "a") as recorder:
        with recording("proxy", upstream.url, recorder) as client:
            with pytest.raises(InternalServerError, match=f"the upstream {upstream.url}") as dropped:
                run_agent(client, False, start())
            assert dropped.value.status_code == 502 and dropped.value.type == "upstream_error"
        assert len(upstream.bodies) == 1  # it may have been received, so that it is not sent again
    with Recorder(tmp_path / "b") as recorder, recording("proxy", upstream.url, recorder) as client:
        with pytest.raises(InternalServerError, match=r"ConnectError.*is it running") as refused:
            run_agent(client, True, start())
        assert refused.value.status_code == 502
    assert recorder.summary().unrecorded == {"the upstream failed (ConnectError)": 1}


@contextlib.contextmanager
def command(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m whiflash_workloads.record`, and the first line that it prints."""
    words = [sys.executable, "-m", "whiflash_workloads.record", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_recording_with_a_report(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "a.jsonl"
    with (
        ChatUpstream() as upstream,
        command("--upstream", f"{upstream.url}/v1", "--port", 0, "--out", out) as (process, line),
    ):
        assert line.startswith("recording http://127.0.0.1:") and f"-> {upstream.url}/v1 to {out}" in line
        with openai_client(line.split()[1]) as client:
            run_agent(client, True, start())
        process.send_signal(number)
        printed, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    assert printed == f"recorded 3 turns of 1 sessions in {out}\n"
    assert sessions_of(out) == {"session-1": (2, 4, 6)}


def test_an_upstream_that_is_not_there_yet_is_said_at_the_start(tmp_path: Path) -> None:
    with ChatUpstream() as upstream:
        gone = upstream.url
    with command("--upstream", gone, "--port", 0, "--out", tmp_path / "a") as (process, _):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
    assert errors.startswith(f"warning: --upstream {gone} does not respond (ConnectError")
    assert "until then clients get status 502" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--port": "70000"}, "argument --port: `70000` is not a port"),
        ({"--upstream": "127.0.0.1:1"}, "is not a plain address; give e.g. http://127.0.0.1:30000"),
        ({"--upstream": "http://kim:secret@127.0.0.1:1"}, "`http://127.0.0.1:1` is not a plain address"),
        ({"--out": "/no/such/folder/a"}, "error: /no/such/folder/a: cannot be written"),
    ],
)
def test_bad_flags_are_refused(tmp_path: Path, changed: Json, said: str) -> None:
    flags = {"--upstream": "http://127.0.0.1:9", "--port": "0", "--out": str(tmp_path / "a")} | changed
    words = [part for flag in flags.items() for part in flag]
    result = subprocess.run([sys.executable, "-m", "whiflash_workloads.record", *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert said in result.stderr and "secret" not in result.stderr and "Traceback" not in result.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["--upstream", "http://127.0.0.1:9", "--port", port, "--out", str(tmp_path / "a")]
        result = subprocess.run(
            [sys.executable, "-m", "whiflash_workloads.record", *words], capture_output=True, text=True
        )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --port {port}: cannot be bound (Address already in use)")


def test_async_openai_through_the_transport(tmp_path: Path) -> None:
    async def run(base_url: str) -> None:
        async with httpx.AsyncClient(transport=AsyncRecordingTransport(tmp_path / "a")) as http:
            client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key=SECRET, http_client=http)
            asks = [client.chat.completions.create(model="m", messages=start(str(i)), tools=[TOOL]) for i in range(8)]
            await asyncio.gather(*asks)

    with ChatUpstream() as upstream:
        asyncio.run(run(upstream.url))
    assert len(load_traces([tmp_path / "a"]).sessions) == 8
