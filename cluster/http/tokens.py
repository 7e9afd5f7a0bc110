"""/tokenize and /detokenize: what a prompt or a chat becomes, and what token ids say, without a job.

    {"prompt": ...} or {"messages": [...]}  -->  {"tokens": [...], "count": 7, "max_model_len": 4096}
    {"tokens": [...]}                       -->  {"prompt": "..."}
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvbank.cluster.fields import Fields
from kvbank.cluster.http.app import Front, read_body
from kvbank.cluster.http.choices import check_model
from kvbank.cluster.http.routes import Routes
from kvbank.errors import InvalidRequest

TOKENIZE = frozenset({"model", "prompt", "messages", "add_generation_prompt"})
DETOKENIZE = frozenset({"model", "tokens"})


def add_routes(made: Routes, front: Front) -> None:
    """The two routes."""
    intake = front.intake

    @made.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, front.limits)
        fields = Fields(body)
        fields.refuse_unknown(TOKENIZE)
        check_model(front, fields.text("model", None))
        asks = fields.flag("add_generation_prompt", True)
        if ("prompt" in body) == ("messages" in body):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        prompt, tenant = body.get("prompt"), request.state.tenant
        if "messages" in body:
            prompt = await intake.chat(body["messages"], tenant=tenant, add_generation_prompt=asks)
        ids = await intake.token_ids(prompt, tenant=tenant)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": intake.facts.max_position})

    @made.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, front.limits)
        fields = Fields(body)
        fields.refuse_unknown(DETOKENIZE)
        check_model(front, fields.text("model", None))
        given, limit = body.get("tokens"), intake.facts.max_position
        if isinstance(given, list) and len(given) > limit:           # a token may be a long word: the answer has a bound, too
            raise InvalidRequest(f"tokens has {len(given)} ids, at most {limit} become text at once: as many as the model reads",
                                 param="tokens")
        ids = intake.checked_ids(given, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(intake.decode, ids)})
