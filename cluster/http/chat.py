"""OpenAI's chat: /v1/chat/completions. Messages become a prompt by the model's own chat template, and nothing else differs.

    messages --intake.chat (off the event loop)--> the prompt's text --> jobs --> message, or chunks with a delta

Text only: images, tools, functions, formats other than text and templates of the caller are refused by name.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvbank.cluster.follow import Piece
from kvbank.cluster.http import choices
from kvbank.cluster.http.app import Front, read_body
from kvbank.cluster.http.choices import Choices, check, finish_reason, read_wish, respond, submit
from kvbank.cluster.http.logprobs import chat_logprobs, wanted_by_chat
from kvbank.cluster.http.routes import Routes
from kvbank.cluster.job import Job
from kvbank.errors import InvalidRequest

ANSWER_TOKENS = 4096                 # at most, of a chat that names no limit: quotas charge what an answer may become
KNOWN = frozenset({"messages", "logprobs", "top_logprobs"})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **choices.NEUTRAL, "response_format": ({"type": "text"},), "modalities": (["text"],), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "audio": (), "prediction": (), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "chat_template": (), "chat_template_kwargs": ({},),
}


def add_routes(made: Routes, front: Front) -> None:
    """The route of this dialect."""

    @made.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, front.limits)
        return await respond(request, await _begin(front, body, request.state.tenant))


async def _begin(front: Front, body: dict[str, Any], tenant: str) -> Choices:
    """Check the request and submit its jobs: all or none."""
    if "prompt" in body:
        raise InvalidRequest("a chat has messages and no prompt; send a prompt to /v1/completions", param="prompt")
    fields = check(front, body, KNOWN, NEUTRAL)
    wish = read_wish(body, fields, 1, wanted_by_chat(fields))
    prompt = await front.intake.chat(body.get("messages"), tenant=tenant)
    jobs = await submit(front, body, [prompt], tenant, max_tokens=ANSWER_TOKENS, fitting=True, logprobs=wish.logprobs)
    return Choices(front, jobs, wish, _Chat(front))


class _Chat:
    """choices.Shape of chats."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, front: Front) -> None:
        self._pieces = front.intake.pieces

    def opening(self, number: int) -> dict[str, Any] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def choice(self, number: int, job: Job) -> dict[str, Any]:
        message = {"role": "assistant", "content": job.output_text, "refusal": None}
        return {"index": number, "message": message, "logprobs": self._logprobs(job, 0, job.ids),
                "finish_reason": job.finish_reason}

    def delta(self, number: int, job: Job, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.token_ids or piece.text else {}
        return {"index": number, "delta": delta, "logprobs": self._logprobs(job, piece.index, piece.token_ids),
                "finish_reason": finish_reason(job, piece)}

    def _logprobs(self, job: Job, first: int, ids: list[int]) -> dict[str, Any] | None:
        if job.spec.logprobs is None or not ids:
            return None
        return chat_logprobs(self._pieces, ids, job.logprobs[first : first + len(ids)])
