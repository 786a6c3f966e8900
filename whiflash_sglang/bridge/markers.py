"""Span markers, taken from SGLang's reasoning and tool-call parsers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from whiflash_sglang.core.spans import TURN_ENDS_AFTER_OUTPUT, Markers, Pair, SpanReader, ToolOutput

if TYPE_CHECKING:
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class Pieces(dict[int, str]):
    """Token id -> the tokenizer's piece, filled lazily."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):
            piece = piece.decode("latin-1")
        self[token] = piece or ""  # padding ids of the vocabulary have none
        return self[token]


def span_reader(server_args: ServerArgs, target_worker: TpModelWorker) -> SpanReader:
    """A span reader with the markers of `--reasoning-parser` and `--tool-call-parser`."""
    tokenizer = target_worker.tokenizer
    if tokenizer is None:
        logger.warning("WHIFLASH: without a tokenizer (--skip-tokenizer-init) all text counts as span `answer`")
        return SpanReader(Markers(), {})
    pieces = Pieces(tokenizer)
    markers = model_markers(server_args.reasoning_parser, server_args.tool_call_parser, tokenizer, pieces)
    turn_ends = frozenset({*(target_worker.model_config.hf_eos_token_id or ()), tokenizer.eos_token_id} - {None})
    return SpanReader(markers._replace(turn_ends=turn_ends), pieces)


MARKER_ATTRIBUTES = (
    ("bot_token", "eot_token"),
    ("tool_call_start_token", "tool_call_end_token"),
    ("TOOL_CALL_START", "TOOL_CALL_END"),
    ("bot", "suffix"),
)
"""Names that SGLang's tool-call detectors use for their markers, outermost first."""


def model_markers(
    reasoning_parser: str | None, tool_call_parser: str | None, tokenizer: Any, pieces: Mapping[int, str]
) -> Markers:
    """The markers of SGLang's parsers, as joined pieces."""
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    def joined(marker: str | None) -> str:
        tokens = tokenizer.encode(marker.strip(), add_special_tokens=False) if marker else []
        # Some tokenizers prepend a space to the first word.
        return "".join([pieces[token] for token in tokens]).lstrip("▁Ġ ")

    markers = Markers()
    if reasoning_parser is not None:
        detector = ReasoningParser(reasoning_parser, tokenizer=tokenizer).detector
        markers = markers._replace(
            reasoning=Pair(joined(detector.think_start_token), joined(detector.think_end_token)),
            call_ends_reasoning=detector.tool_start_token is not None,
            begins_reasoning=detector.force_reasoning,
        )
    if tool_call_parser is not None:
        detector = FunctionCallParser([], tool_call_parser, tokenizer=tokenizer).detector
        found = [pair for pair in MARKER_ATTRIBUTES if getattr(detector, pair[0], "")]
        if found:
            opens, closes = (getattr(detector, name) for name in found[0])
            markers = markers._replace(tool_call=Pair(joined(opens), joined(closes)))
        else:
            logger.warning(
                "WHIFLASH: tool-call parser %s has no markers; its tool calls count as span `answer`", tool_call_parser
            )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = "".join(template.values())
    for marker, turn_ends in TURN_ENDS_AFTER_OUTPUT.items():
        if marker in (template or ""):
            return markers._replace(tool_output=ToolOutput(joined(marker), turn_ends))
    return markers
