"""Names for KV: a block's key says which KV it is, given everything that shaped it.

    root    = HMAC-SHA256(cache_secret, msgpack(version, tenant, model, adapter, Layout, fidelity, numerics))
    key[0]  = SHA-256(root     ‖ int32-LE ids of block 0)
    key[i]  = SHA-256(key[i-1] ‖ int32-LE ids of block i)

Equal keys mean the same tenant, weights, shape of bytes and every token before; one different early token changes
every later key. Keys are the same in every process and on every machine (never Python's `hash`), and nobody without the
secret can name another tenant's blocks. Shards share keys: the Layout named is the whole model's, the layer range
stands in the stored frame's header.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from kvbank.errors import ConfigError, InvalidRequest, ModelError
from kvbank.kvstore.layout import BlockKey, Layout

KEY_BYTES = 32
KEY_VERSION = 1                                # raised when the meaning of a key changes: old frames become unreachable

TokenIds = Sequence[int] | npt.NDArray[Any] | bytes | bytearray | memoryview


def key_space(tenant: str, salt: str) -> str:
    """What block keys grow from: the tenant, and its salt behind a character that no tenant has. Gateway and workers must say
    the same, since workers take the gateway's keys."""
    return f"{tenant}\0{salt}" if salt else tenant


def root_key(secret: bytes, *, tenant: str, model_digest: str, layout: Layout, adapter_digest: str = "",
             fidelity: str = "exact", numerics: str = "") -> bytes:
    """The 32 bytes every key of this (tenant, model, layout, fidelity) grows from. `numerics` only under `bitwise`."""
    named = [KEY_VERSION, tenant, model_digest, adapter_digest, layout.whole().canonical(), fidelity, numerics]
    return hmac.digest(secret, canonical(named), "sha256")


def block_keys(root: bytes, token_ids: TokenIds, block_size: int, *, parent: bytes | None = None) -> list[BlockKey]:
    """Chained keys of the full blocks of `token_ids`; a partial tail has no key.

    parent: the key of the block before `token_ids[0]`, to go on in the middle of a sequence; None starts at the root.
    Cost: about 25 µs per 1,000 tokens in blocks of 16 from an int32 array, 40 from a list. Raises InvalidRequest for
    an id that is no int32.
    """
    data, step = token_bytes(token_ids), 4 * block_size
    sha256, key = hashlib.sha256, (root if parent is None else parent)
    keys: list[BlockKey] = []
    for start in range(0, len(data) - len(data) % step, step):
        key = sha256(key + data[start:start + step]).digest()
        keys.append(BlockKey(key))
    return keys


def token_bytes(token_ids: TokenIds) -> bytes:
    """The ids as int32 little-endian; bytes are taken as being that already. InvalidRequest when one does not fit."""
    if isinstance(token_ids, (bytes, bytearray, memoryview)):
        if len(data := bytes(token_ids)) % 4:
            raise InvalidRequest(f"{len(data)} bytes of token ids are not whole int32 values")
        return data
    if isinstance(token_ids, np.ndarray):
        if token_ids.dtype.kind not in "iu":
            raise InvalidRequest(f"token ids must be integers, not {token_ids.dtype}")
        # astype wraps silently, so a wider type is looked at first
        if token_ids.dtype != np.int32 and token_ids.size and not (
                int(token_ids.min()) >= -2**31 and int(token_ids.max()) < 2**31):
            raise InvalidRequest(f"token ids must fit int32, got {token_ids.min()}..{token_ids.max()}")
        return token_ids.astype("<i4", copy=False).tobytes()
    try:
        ids = array("i", token_ids)            # unlike numpy it refuses floats, and is twice as fast on a list
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(f"token ids must be int32 integers: {error}") from None
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def canonical(value: Any) -> bytes:
    """One byte string per value: msgpack with the keys of every mapping in sorted order. Raises TypeError for a set."""
    packed: bytes = msgpack.packb(_sorted(value), use_bin_type=True)
    return packed


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return value


# -- the model's own name ----------------------------------------------------------------------------------------

def model_digest(folder: str | os.PathLike[str], config_fields: Mapping[str, Any], *,
                 state_folder: str | os.PathLike[str] | None = None) -> str:
    """SHA-256 (hex) over the config fields that matter and each weight file's own SHA-256.

    state_folder: where file digests are remembered by (path, size, mtime_ns), so that a restart reads no weights; None
    remembers nothing. First time about 1.8 GiB/s per file, files side by side. Raises ModelError without weight files.
    """
    files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.safetensors.index.json"))
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{folder} holds no *.safetensors file: nothing to load or to name")
    remembered = DigestCache(Path(state_folder) / "model-digests.json" if state_folder is not None else None)
    with ThreadPoolExecutor(max_workers=min(4, len(files))) as pool:        # hashlib lets go of the GIL
        digests = list(pool.map(remembered.digest, files))
    remembered.save()
    named = [[path.name, digest] for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256(canonical(["kvbank model", 1, config_fields, named])).hexdigest()


class DigestCache:
    """SHA-256 of files, remembered by (path, size, mtime_ns) in one 0600 JSON file; a damaged one is only forgotten."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = self._load()
        self._changed = False

    def digest(self, path: Path) -> str:
        """SHA-256 (hex) of the file's bytes. Raises ModelError when it cannot be read or changes meanwhile."""
        try:
            before = path.stat()
            stamp, name = [before.st_size, before.st_mtime_ns], os.path.realpath(path)
            known = self._known.get(name)
            if known is not None and known[:2] == stamp:
                return str(known[2])
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            after = path.stat()
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from None
        if [after.st_size, after.st_mtime_ns] != stamp:
            raise ModelError(f"{path} changed while it was read: wait for the copy to end and start again")
        # A file written this very moment could change again within the clock's grain and keep its stamp: look twice.
        if abs(time.time_ns() - before.st_mtime_ns) > 2_000_000_000:
            self._known[name] = [*stamp, found]
            self._changed = True
        return found

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        private_folder(self._path.parent)
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(self._known, file)
        os.replace(beside, self._path)

    def _load(self) -> dict[str, list[Any]]:
        if self._path is None:
            return {}
        try:
            loaded = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(loaded, dict):
            return {}
        return {name: row for name, row in loaded.items()
                if isinstance(row, list) and len(row) == 3 and isinstance(row[2], str) and len(row[2]) == 64}


# -- the secret --------------------------------------------------------------------------------------------------

def load_secret(state_folder: str | os.PathLike[str]) -> bytes:
    """The 32-byte cache secret of this installation, from a 0600 file that is made at the first call.

    Whoever loses the file loses what rests in Redis (every key changes), nothing else. Safe to call from several
    processes at once. Raises ConfigError when others may read the file, or when it holds no secret.
    """
    path = private_folder(Path(state_folder)) / "cache_secret"
    if not path.exists():
        beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(beside, path)              # appears with all its bytes, and never over another process's file
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise ConfigError(f"{path} may be read by others (mode {mode:o}): chmod 600 it, or delete it for a new one")
    try:
        secret = bytes.fromhex(path.read_text().strip())
    except ValueError:
        secret = b""
    if len(secret) < 16:
        raise ConfigError(f"{path} holds no secret of at least 16 bytes in hex: delete it to get a new one")
    return secret


def private_folder(path: Path) -> Path:
    """`path`, made with mode 0700 where it did not exist."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
