"""A client outside the cluster: submits one prompt, tells when its answer begins, then the whole of it.

Reads {"address", "api_key", "ca", "prompt": token ids, "max_tokens", "within_s"} on stdin; answers two JSON lines.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from kvbank import Client


def main() -> None:
    asked = json.load(sys.stdin)
    client = Client(asked["address"], api_key=asked["api_key"], ca=asked["ca"], timeout_s=asked["within_s"])
    job = client.submit(asked["prompt"], max_tokens=asked["max_tokens"], temperature=0.0)
    streamed: list[int] = []
    for delta in job.stream():
        if not streamed and delta.token_ids:
            print(json.dumps({"began": True}), flush=True)
        streamed += delta.token_ids
    result = job.result(timeout_s=asked["within_s"])
    print(json.dumps({"token_ids": result.token_ids, "streamed": streamed, "receipt": asdict(result.receipt)}), flush=True)


if __name__ == "__main__":
    main()
