"""HeldKeys: the block keys that a follower holds, as its leader says, for the follower's own reports to the control plane."""

from __future__ import annotations

from threading import Lock

from kvbank.kvstore.layout import BlockKey

KEY_BYTES = 32


class HeldKeys:
    """Thread-safe: the follower's thread changes it, the heartbeat's reports it."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}
        self._changed: dict[bytes, bool] = {}            # since the last report: key -> held now
        self._lock = Lock()

    def change(self, added: bytes, removed: bytes, *, whole: bool = False) -> None:
        """KEY_BYTES each, one after the other; what is in both was added first. whole: no others are held."""
        if whole:
            self.clear()
        with self._lock:
            for key in split_keys(added):
                self._held[key] = None
                self._changed[key] = True
            for key in split_keys(removed):
                self._held.pop(key, None)
                self._changed[key] = False

    def clear(self) -> None:
        with self._lock:
            self._changed.update(dict.fromkeys(self._held, False))
            self._held.clear()

    def take_changes(self, *, full: bool) -> tuple[bytes, bytes]:
        """Keys (added, removed) since the last call; with `full` all that are held."""
        with self._lock:
            changed, self._changed = self._changed, {}
            if full:
                return b"".join(self._held), b""
            return (b"".join(key for key, held in changed.items() if held),
                    b"".join(key for key, held in changed.items() if not held))


def split_keys(keys: bytes) -> list[BlockKey]:
    return [BlockKey(keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES)]
