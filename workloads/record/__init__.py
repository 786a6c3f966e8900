"""Record an agent's chat completions as replayable traces (workloads/schema.py).

In the agent's process; sync and async clients may share one recorder:

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

Sessions are recognized by the header `X-Session-Affinity` and by content: a request whose messages extend an earlier
request and its reply, with the same tools, continues that session. A second request that extends the same reply is a
branch and becomes a new session, and so does a modified history (`ID.2`, `ID.3`, ...).

One line is appended per complete reply, so a crash loses only the turns in flight. Headers and fields named like
credentials are never written. Unrecorded requests (errors, incomplete replies) are counted in the summary by reason.
Recording never disturbs the agent.
"""

from whiflash_workloads.record.recorder import Recorder, RecordError
from whiflash_workloads.record.transport import AsyncRecordingTransport, RecordingTransport

__all__ = ["AsyncRecordingTransport", "RecordError", "Recorder", "RecordingTransport"]
