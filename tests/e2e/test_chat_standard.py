"""LangChain's own standard tests of chat models, on ChatWhiFlash and the bundled models behind a real server.

The bundled target knows the order desk only. What needs a model that knows more is switched off, with the reason, by the
suite's own means; `tests/e2e/test_agents.py` has tool calls and structured output as far as this model can.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

pytest.importorskip("sglang")
pytest.importorskip("langchain_tests")

from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from agents import ChatWhiFlash
from workloads.server import running_server

# The suite has coroutines and leaves it to its user to say who runs them.
NOT_ASYNC = "ignore:.*is marked with '@pytest.mark.asyncio' but it is not an async function"
pytestmark = [pytest.mark.e2e, pytest.mark.asyncio, pytest.mark.filterwarnings(NOT_ASYNC)]

needs_other_tools = pytest.mark.xfail(reason="the bundled target calls the tools of its desk, and never any other")


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    log = tmp_path_factory.mktemp("standard") / "server.log"
    with running_server("whiflash_sglang.launch_server", "--demo", log=log) as url:
        yield url


class TestStandard(ChatModelIntegrationTests):
    base_url: ClassVar[str]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, base_url: str) -> None:
        cls.base_url = base_url

    @property
    def chat_model_class(self) -> type[ChatWhiFlash]:
        return ChatWhiFlash

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "whiflash-demo",
            "base_url": f"{self.base_url}/v1",
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 100,
            # Away from its desk the model thinks and says nothing, and the suite wants a text.
            "extra_body": {"separate_reasoning": False},
        }

    @property
    def has_tool_choice(self) -> bool:
        """Off: forced by a grammar, a call to a tool that is not the desk's is a string that never ends."""
        return False

    @property
    def has_structured_output(self) -> bool:
        """Off: within a grammar that lets strings be of any length, this model's strings never end."""
        return False

    # Images, audio, PDF, JSON mode and Anthropic's format are off by default, and stay off: it is a text model, and the only
    # one that the server has, so there is none to override it with.

    @needs_other_tools
    def test_tool_calling(self, model: BaseChatModel) -> None:
        super().test_tool_calling(model)

    @needs_other_tools
    async def test_tool_calling_async(self, model: BaseChatModel) -> None:
        await super().test_tool_calling_async(model)

    @needs_other_tools
    def test_bind_runnables_as_tools(self, model: BaseChatModel) -> None:
        super().test_bind_runnables_as_tools(model)

    @needs_other_tools
    def test_tool_calling_with_no_arguments(self, model: BaseChatModel) -> None:
        super().test_tool_calling_with_no_arguments(model)

    @needs_other_tools
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @needs_other_tools
    def test_unicode_tool_call_integration(
        self, model: BaseChatModel, *, tool_choice: str | None = None, force_tool_call: bool = True
    ) -> None:
        super().test_unicode_tool_call_integration(model, tool_choice=tool_choice, force_tool_call=force_tool_call)
