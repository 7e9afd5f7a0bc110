from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ShardHello(_message.Message):
    __slots__ = ("replica", "shard", "boot", "slots")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    shard: int
    boot: bytes
    slots: int
    def __init__(self, replica: _Optional[str] = ..., shard: _Optional[int] = ..., boot: _Optional[bytes] = ..., slots: _Optional[int] = ...) -> None: ...
