"""LangChain's own standard unit tests of chat models, on ChatWhiFlash."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_tests")

from langchain_tests.unit_tests import ChatModelUnitTests

from whiflash_agents import ChatWhiFlash


class TestStandard(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatWhiFlash]:
        return ChatWhiFlash

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "whiflash-demo",
            "base_url": "http://127.0.0.1:9/v1",
            "api_key": "none",
            "session_id": "standard",
            "hints": {"route": "df"},
        }

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"OPENAI_API_KEY": "key", "OPENAI_API_BASE": "http://127.0.0.1:9/v1"}
        expected = {"openai_api_key": "key", "openai_api_base": "http://127.0.0.1:9/v1"}
        return environment, {"model": "whiflash-demo"}, expected
