"""An example LangGraph agent for the order desk of `workloads/demo`. Shows the speculation figures of each step.

    python -m whiflash_agents.desk ["Can I get the first item of order 1652 again?"] [--base-url URL] [--seed 3]

Without `--base-url` it starts a server with the bundled models for this question; that needs the server extra. `--seed`
generates the shop: customers, orders and stock. The tools are real: they query and modify the shop's in-process SQLite
database.

    agent = desk_agent(model, Desk.create(seed))
    agent.invoke({"messages": conversation(QUESTION)})

The bundled models are trained on exactly the demo's system prompt and tool schemas, and can do nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import StructuredTool
from langgraph.errors import GraphRecursionError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from rich.console import Console
from rich.text import Text

from whiflash_agents.chat import FIGURES, REASONING, ChatWhiFlash
from whiflash_agents.figures import acceptance_length, drafter_shares
from whiflash_workloads.demo.expert import SYSTEM
from whiflash_workloads.demo.world import TOOL_SCHEMAS, Desk
from whiflash_workloads.server import ServerError, running_server, stop_on_signals

# The bundled target answers this correctly; for its success rate see `make agent-bench`.
QUESTION = "Can I get the first item of order 1652 again?"
DEFAULT_SEED = 3  # this shop has order 1652
MAX_TOKENS = 256  # replies of the bundled models are shorter
MAX_STEPS = 20  # graph steps: ten replies with tool calls


def desk_agent(model: BaseChatModel, desk: Desk) -> CompiledStateGraph:
    """A graph that alternates between the model and `desk`'s tools until there are no more calls."""
    bound = model.bind_tools(TOOL_SCHEMAS)

    def think(state: MessagesState) -> dict[str, list[AIMessage]]:
        return {"messages": [bound.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", think)
    graph.add_node("tools", ToolNode(desk_tools(desk)))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


def desk_tools(desk: Desk) -> list[StructuredTool]:
    """The desk's tools for LangChain, with unchanged schemas. The desk itself reports wrong arguments."""

    def tool(name: str, description: str, parameters: dict[str, Any]) -> StructuredTool:
        def call(**arguments: Any) -> str:
            return desk.call(name, arguments)

        return StructuredTool(name=name, description=description, args_schema=parameters, func=call)

    return [tool(**schema["function"]) for schema in TOOL_SCHEMAS]


def conversation(question: str) -> list[AnyMessage]:
    """The demo's system prompt and the question."""
    return [SystemMessage(SYSTEM), HumanMessage(question)]


@dataclass(frozen=True)
class Step:
    """A message that the agent added, and its wall time."""

    message: AnyMessage
    seconds: float


def steps(agent: CompiledStateGraph, question: str) -> Iterator[Step]:
    """Run the agent and yield its steps. Raises GraphRecursionError after MAX_STEPS."""
    began = time.perf_counter()
    config: Any = {"recursion_limit": MAX_STEPS}
    for update in agent.stream({"messages": conversation(question)}, config, stream_mode="updates"):
        seconds, began = time.perf_counter() - began, time.perf_counter()
        for part in update.values():
            for message in part["messages"]:
                yield Step(message, seconds)


def connect(base_url: str, **options: Any) -> ChatWhiFlash:
    """A chat model for the first model of the server at `base_url` (without /v1). Raises openai.APIError."""
    url = base_url.rstrip("/") + "/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
    return ChatWhiFlash(model=name, base_url=url, api_key="none", temperature=0, max_tokens=MAX_TOKENS, **options)


# ---- output


def show(console: Console, number: int, step: Step) -> None:
    """Print one step."""
    message = step.message
    if isinstance(message, ToolMessage):
        console.print(Text.assemble((f"   {message.name} ", "bold"), ("-> " + str(message.content), "dim")))
        return
    reasoning = (message.additional_kwargs.get(REASONING) or "").strip()
    console.print(Text.assemble((f"{number}. ", "bold"), (reasoning, "italic")))
    for call in message.tool_calls:
        console.print(
            Text(f"   calls {call['name']}({json.dumps(call['args'], ensure_ascii=False)})", style="bold cyan")
        )
    for call in message.invalid_tool_calls:
        console.print(Text(f"   invalid tool call: {call['name']}({call['args']})", style="bold red"))
    if answer := message.text.strip():
        console.print(Text("   " + answer.replace("\n", "\n   "), style="bold green"))
    console.print(Text(f"   {measured(message, step.seconds)}", style="magenta"))


def measured(message: AIMessage, seconds: float) -> str:
    """One line with a step's tokens, time and speculation figures."""
    tokens = (message.usage_metadata or {}).get("output_tokens")
    cost = f"{tokens} tokens in {1000 * seconds:.0f} ms"
    figures = message.response_metadata.get(FIGURES)
    if figures is None:
        return f"{cost}, no speculation figures"
    length = acceptance_length(figures)
    if length is None:
        return f"{cost}, no rounds"
    shares = " ".join(f"{name} {share:.0%}" for name, share in drafter_shares(figures).items())
    return f"{cost}, {figures['rounds']} rounds: {shares}, AL {length:.2f}, {figures['switches']} switches"


@contextmanager
def server_at(base_url: str | None, console: Console) -> Iterator[str]:
    """Yield `base_url`, or the URL of a temporary server with the bundled models."""
    if base_url is not None:
        yield base_url
        return
    log = Path(tempfile.mkdtemp(prefix="whiflash-agent-")) / "server.log"
    console.print(f"starting a server with the bundled models (log in {log})", style="dim")
    with running_server("whiflash_sglang.launch_server", "--demo", log=log) as started:
        yield started


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION, help="default: %(default)s")
    parser.add_argument("--base-url", help="a running server, without /v1 (default: start a temporary one)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of the shop (default: %(default)s)")
    args = parser.parse_args()
    stop_on_signals()
    console = Console(highlight=False)
    try:
        with server_at(args.base_url, console) as base_url:
            agent = desk_agent(connect(base_url), Desk.create(args.seed))
            console.print(Text(args.question, style="bold"))
            replies = 0
            for step in steps(agent, args.question):
                replies += isinstance(step.message, AIMessage)
                show(console, replies, step)
            if not step.message.text.strip():
                sys.exit(f"error: the model gave no answer within {MAX_TOKENS} tokens; rephrase the question")
    except GraphRecursionError:
        sys.exit(f"error: no answer after {MAX_STEPS} steps; rephrase the question")
    except ServerError as error:
        sys.exit(f"error: {error}")
    except openai.APIError as error:
        fix = "start a server, e.g. with `make serve`, and give its address without /v1"
        sys.exit(f"error: --base-url {args.base_url}: {error}; {fix}")


if __name__ == "__main__":
    main()
