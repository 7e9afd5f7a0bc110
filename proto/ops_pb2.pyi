from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpsRequest(_message.Message):
    __slots__ = ("draining", "recall", "clear", "pin")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    CLEAR_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    draining: Draining
    recall: RecallLoans
    clear: ClearCaches
    pin: Pin
    def __init__(self, draining: _Optional[_Union[Draining, _Mapping]] = ..., recall: _Optional[_Union[RecallLoans, _Mapping]] = ..., clear: _Optional[_Union[ClearCaches, _Mapping]] = ..., pin: _Optional[_Union[Pin, _Mapping]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: _Optional[bool] = ...) -> None: ...

class RecallLoans(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClearCaches(_message.Message):
    __slots__ = ("device", "host")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    device: bool
    host: bool
    def __init__(self, device: _Optional[bool] = ..., host: _Optional[bool] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("ends", "tail", "term_s")
    ENDS_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    TERM_S_FIELD_NUMBER: _ClassVar[int]
    ends: bytes
    tail: bytes
    term_s: int
    def __init__(self, ends: _Optional[bytes] = ..., tail: _Optional[bytes] = ..., term_s: _Optional[int] = ...) -> None: ...

class OpsReply(_message.Message):
    __slots__ = ("error", "blocks", "frames", "left_out")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    error: str
    blocks: int
    frames: int
    left_out: int
    def __init__(self, error: _Optional[str] = ..., blocks: _Optional[int] = ..., frames: _Optional[int] = ..., left_out: _Optional[int] = ...) -> None: ...
