"""Client and AsyncClient: submit long-context jobs, stream them as often as you like, read receipts and status.

    client = Client("http://127.0.0.1:8000")
    job = client.submit("a very long prompt", max_tokens=64)
    for delta in job.stream(): ...
    result = job.result(timeout_s=120)

Both speak to the gateway's /v1/jobs, where a job lives independently of any connection. Every failure is one of
`kvbank.errors`. Safe to use from several threads (Client) or tasks (AsyncClient).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from kvbank.cluster.answers import (
    Delta,
    JobStatus,
    LoanStatus,
    Prompt,
    Receipt,
    Result,
    Segment,
    Status,
    TierStatus,
    WorkerStatus,
)
from kvbank.cluster.client_wire import LIMITS, Broken, StreamReader, Waiting, Wire, as_bytes, job_body, job_path

__all__ = [
    "AsyncClient", "AsyncJob", "Client", "Delta", "Job", "JobStatus", "LoanStatus", "Receipt", "Result", "Segment",
    "Status", "TierStatus", "WorkerStatus",
]


class Client:
    """A connection pool to one gateway. `timeout_s` bounds every answer, and `result` where that names no other. `ca`: a PEM
    file with the authority of an https gateway; default: those that this machine trusts."""

    def __init__(self, address: str, *, api_key: str | None = None, timeout_s: float = 600.0, ca: str | None = None) -> None:
        self._wire = Wire(address, api_key, timeout_s, ca)
        self._http = httpx.Client(**self._wire.options(), limits=LIMITS)

    def submit(
        self, prompt: Prompt, *, max_tokens: int = 16, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        seed: int | None = None, stop: str | list[str] | None = None, stop_token_ids: list[int] | None = None,
        ignore_eos: bool = False, policy: str = "exact", job_id: str | None = None, deadline_s: float | None = None,
        cache_salt: str | None = None,
    ) -> Job:
        """Hand a job in and return at once. The same `job_id` with the same content is the job already there.

        max_tokens:      to generate at most; prompt and max_tokens must fit the model and the cluster, else TooLong
        temperature:     0 to 2; 0: greedy. top_p above 0 to 1, 1: off. top_k 0: off. seed: the same seed, the same draws
        stop:            texts before which the answer ends; never part of it. stop_token_ids: tokens that end it
        ignore_eos:      go on behind the model's end token
        policy:          what may be kept of the KV: `exact` is the only one in this version
        deadline_s:      give up this long after it was handed in: DeadlineExceeded
        cache_salt:      jobs that have one share KV with jobs of the same salt only
        """
        body = job_body(locals())
        for last in (False, True):                   # the job has a name: sending it twice makes one job
            try:
                return Job(self, self._call("POST", "/v1/jobs", json=body)["id"])
            except Broken:
                if last:
                    raise
        raise AssertionError

    def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> Result:
        """`submit` and `result` in one."""
        return self.submit(prompt, **options).result(timeout_s=timeout_s)

    def job(self, job_id: str) -> Job:
        """A handle on a job submitted earlier or elsewhere. Raises NotFound."""
        return Job(self, self._call("GET", job_path(job_id))["id"])

    def jobs(self) -> list[JobStatus]:
        """This tenant's jobs that the gateway still knows, oldest first."""
        return [JobStatus.read(body) for body in self._call("GET", "/v1/jobs")["data"]]

    def status(self) -> Status:
        """Workers, loans, jobs and tiers now."""
        return Status.read(self._call("GET", "/v1/status"))

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._http.request(method, path, **as_bytes(options))
        except httpx.HTTPError as error:
            raise self._wire.broken(error) from None
        return self._wire.read(answer.status_code, answer.content)


class Job:
    """A job on the gateway. Holds only its name: it can be made again from `client.job(id)`."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def stream(self) -> Iterator[Delta]:
        """Every delta from the first token on, whenever and however often it is called.

        Goes on where it was when the connection breaks. Ends with the job; raises its error when it failed.
        """
        reader = StreamReader(self._client._wire, self.id)
        while not reader.ended:
            try:
                with self._client._http.stream("GET", reader.path, timeout=reader.timeout) as answer:
                    if answer.status_code != 200:
                        self._client._wire.read(answer.status_code, answer.read())
                    for line in answer.iter_lines():
                        if (delta := reader.take(line)) is not None:
                            yield delta
                reader.closed()
            except httpx.HTTPError as error:
                reader.broke(error)

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the end. Raises the job's error, or DeadlineExceeded when `timeout_s` passed (the job runs on)."""
        waiting = Waiting(self.id, self._client._wire.timeout_s if timeout_s is None else timeout_s)
        while True:
            body = self._client._call("GET", job_path(self.id), **waiting.options())
            if (result := waiting.read(body)) is not None:
                return result

    def status(self) -> JobStatus:
        """Where the job is now."""
        return JobStatus.read(self._client._call("GET", job_path(self.id)))

    def cancel(self) -> None:
        """Ask the job to end. Harmless when it is over; `result` then raises Cancelled."""
        self._client._call("DELETE", job_path(self.id))


class AsyncClient:
    """The async twin of Client."""

    def __init__(self, address: str, *, api_key: str | None = None, timeout_s: float = 600.0, ca: str | None = None) -> None:
        self._wire = Wire(address, api_key, timeout_s, ca)
        self._http = httpx.AsyncClient(**self._wire.options(), limits=LIMITS)

    async def submit(
        self, prompt: Prompt, *, max_tokens: int = 16, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        seed: int | None = None, stop: str | list[str] | None = None, stop_token_ids: list[int] | None = None,
        ignore_eos: bool = False, policy: str = "exact", job_id: str | None = None, deadline_s: float | None = None,
        cache_salt: str | None = None,
    ) -> AsyncJob:
        """As Client.submit."""
        body = job_body(locals())
        for last in (False, True):
            try:
                return AsyncJob(self, (await self._call("POST", "/v1/jobs", json=body))["id"])
            except Broken:
                if last:
                    raise
        raise AssertionError

    async def generate(self, prompt: Prompt, *, timeout_s: float | None = None, **options: Any) -> Result:
        """As Client.generate."""
        return await (await self.submit(prompt, **options)).result(timeout_s=timeout_s)

    async def job(self, job_id: str) -> AsyncJob:
        """As Client.job."""
        return AsyncJob(self, (await self._call("GET", job_path(job_id)))["id"])

    async def jobs(self) -> list[JobStatus]:
        """As Client.jobs."""
        return [JobStatus.read(body) for body in (await self._call("GET", "/v1/jobs"))["data"]]

    async def status(self) -> Status:
        """As Client.status."""
        return Status.read(await self._call("GET", "/v1/status"))

    async def close(self) -> None:
        """As Client.close."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = await self._http.request(method, path, **as_bytes(options))
        except httpx.HTTPError as error:
            raise self._wire.broken(error) from None
        return self._wire.read(answer.status_code, answer.content)


class AsyncJob:
    """The async twin of Job."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    async def stream(self) -> AsyncIterator[Delta]:
        """As Job.stream."""
        reader = StreamReader(self._client._wire, self.id)
        while not reader.ended:
            try:
                async with self._client._http.stream("GET", reader.path, timeout=reader.timeout) as answer:
                    if answer.status_code != 200:
                        self._client._wire.read(answer.status_code, await answer.aread())
                    async for line in answer.aiter_lines():
                        if (delta := reader.take(line)) is not None:
                            yield delta
                reader.closed()
            except httpx.HTTPError as error:
                reader.broke(error)

    async def result(self, timeout_s: float | None = None) -> Result:
        """As Job.result."""
        waiting = Waiting(self.id, self._client._wire.timeout_s if timeout_s is None else timeout_s)
        while True:
            body = await self._client._call("GET", job_path(self.id), **waiting.options())
            if (result := waiting.read(body)) is not None:
                return result

    async def status(self) -> JobStatus:
        """As Job.status."""
        return JobStatus.read(await self._client._call("GET", job_path(self.id)))

    async def cancel(self) -> None:
        """As Job.cancel."""
        await self._client._call("DELETE", job_path(self.id))
