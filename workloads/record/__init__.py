"""Record an agent's chat completions as traces that can be replayed (workloads/schema.py), from inside or from outside.

In the agent's own process, sync and async clients may share one recorder:

    recorder = Recorder("run.jsonl")
    model = ChatOpenAI(
        ...,
        http_client=httpx.Client(transport=RecordingTransport(recorder)),
        http_async_client=httpx.AsyncClient(transport=AsyncRecordingTransport(recorder)),
    )
    ...
    recorder.close()
    print(recorder.summary())

Any other client, through a reverse proxy on 127.0.0.1:

    python -m whiflash_workloads.record --upstream http://127.0.0.1:30000 --port 8000 --out run.jsonl

A session is recognised by the header `X-Session-Affinity`, and by what is asked: a request whose messages extend an
earlier request and its reply, with the same tools, goes on with that session. A second request that extends the same
reply is a branch and becomes a session of its own, as does a history that was changed (`ID.2`, `ID.3`, ...).

One line is appended for each whole reply, so that a crash of the process loses the turns in flight and no more. Headers
are never written, and of a request's body nothing that is named like a credential. What could not be recorded (errors,
replies that broke off) is counted in the summary with its reason, and never stands in the agent's way.
"""

from whiflash_workloads.record.recorder import Recorder, RecordError
from whiflash_workloads.record.transport import AsyncRecordingTransport, RecordingTransport

__all__ = ["AsyncRecordingTransport", "RecordError", "Recorder", "RecordingTransport"]
