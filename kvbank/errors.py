"""Every error a user of kvbank can meet, as one tree. Imports nothing.

    KVBankError
    ├── InvalidRequest      the request itself is wrong: fix it, do not retry           400 invalid_request
    │   └── TooLong         prompt + max_tokens fit neither the model nor the cluster   400 too_long
    ├── Unauthorized        no credential, or a wrong one                               401 unauthorized
    ├── NotFound            no such job, model or route                                 404 not_found
    ├── Cancelled           the caller cancelled the job                                409 cancelled
    ├── Overloaded          the queue is full: retry after `retry_after_s`              429 overloaded
    ├── DeadlineExceeded    the job's own deadline passed                               504 deadline_exceeded
    ├── Unavailable         nobody can serve this now (workers lost, cluster stopping)  503 unavailable
    ├── ConfigError         a setting is wrong or two members disagree                  500 config_error
    └── ModelError          a model folder cannot be read or is not supported           500 model_error

`code` is stable and safe to show to anyone; the message says what happened, the numbers, and what to do;
`param` names the field of a request that is at fault, or a path into it such as messages[0].role, if it is one.
"""

from __future__ import annotations


class KVBankError(Exception):
    """Root of the tree; raised itself only for a failure no narrower class names."""

    code = "internal"
    http_status = 500

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        """param: the field of a request that is at fault, or a path into it such as messages[0].role; None: not one field."""
        super().__init__(message)
        self.param = param


class InvalidRequest(KVBankError):
    """The request is wrong as it stands; sending it again will fail again."""

    code = "invalid_request"
    http_status = 400


class TooLong(InvalidRequest):
    """Prompt plus max_tokens exceed the model's limit or the whole cluster's KV capacity."""

    code = "too_long"


class Unauthorized(KVBankError):
    """The call carried no credential, or one that is not valid here."""

    code = "unauthorized"
    http_status = 401


class NotFound(KVBankError):
    """There is no job, model or route of that name."""

    code = "not_found"
    http_status = 404


class Cancelled(KVBankError):
    """The job was cancelled by its caller before it finished."""

    code = "cancelled"
    http_status = 409


class Overloaded(KVBankError):
    """The bounded queue is full. Retry after `retry_after_s` seconds."""

    code = "overloaded"
    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(KVBankError):
    """The job's deadline passed before it finished."""

    code = "deadline_exceeded"
    http_status = 504


class Unavailable(KVBankError):
    """Nobody can serve this now: workers are gone, starting or stopping."""

    code = "unavailable"
    http_status = 503


class ConfigError(KVBankError):
    """A setting is unknown, out of range, or disagrees with another member's."""

    code = "config_error"


class ModelError(KVBankError):
    """A model folder is missing, damaged, or uses a feature that is not supported."""

    code = "model_error"


def from_code(code: str, message: str) -> KVBankError:
    """The error whose `code` this is, as a peer sent it over a wire. Unknown codes become KVBankError."""
    return _BY_CODE.get(code, KVBankError)(message)


_BY_CODE: dict[str, type[KVBankError]] = {
    cls.code: cls
    for cls in (InvalidRequest, TooLong, Unauthorized, NotFound, Cancelled, Overloaded, DeadlineExceeded, Unavailable,
                ConfigError, ModelError)
}
