"""Who renders what: one byte per row in one file, and the file system's locks on these bytes.

A row is claimed by a lock on its byte. The kernel gives the lock back when its holder dies, however
it dies, so a dead process's rows are free at once: no server, no heartbeat, no time-out, no
collective. Between machines the same holds on a shared file system with POSIX locks (NFS 4, Lustre
with `flock`, GPFS, CephFS), where the server frees a dead machine's locks after its lease.

Rows are handed out by a cursor in the file's header, in order; what it has passed and what is free
nevertheless, because its holder died, is found by a sweep at the end.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blockcache.errors import BlockCacheError

TODO, DONE, FAILED, BAD = b"\0", b"d", b"f", b"b"

# Header: a stop mark, the cursor, the number of rows, and the job's digest (32 hexadecimal digits).
_HEADER = struct.Struct("<cxxxxxxxQQ32s")
_STOP, _CURSOR, _ROWS = 0, 8, 64
# Bytes that are only locked. Door: held while entering and leaving. Presence: shared by all who are
# inside, so that the first and the last one know that they are.
_DOOR, _PRESENCE, _HAND = 0, 1, 2
_CHUNK = 1 << 16
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

# POSIX locks belong to a process: a second run in this one would be granted all of them.
_open_here: set[Path] = set()


class Claims:
    """The rows of one job in one folder, shared with every other process that works on it."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            BlockCacheError: this process has it open already.
        """
        self.path = path.resolve()
        if self.path in _open_here:
            raise BlockCacheError(f"this process is already generating into {path.parent}")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open_here.add(self.path)
        self.rows = 0
        # Our own locks are no hindrance to us, so what we hold has to be remembered.
        self._held: set[int] = set()

    def close(self) -> None:
        """Give back every lock."""
        os.close(self._file)
        _open_here.discard(self.path)

    # ---- coming and going ----------------------------------------------------------------------

    def enter(self, job: str, initialise: Callable[[], bytes]) -> None:
        """Join those who work on `job`. The first to come calls `initialise` for the rows' bytes.

        Raises:
            BlockCacheError: others are working on another job here, or there are no locks.
        """
        with self._locked(_DOOR):
            if self._lock(_PRESENCE, wait=False):
                status = initialise()
                header = _HEADER.pack(TODO, 0, len(status), job.encode())
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, header.ljust(_ROWS, b"\0") + status, 0)
            self._lock(_PRESENCE, shared=True)
            _, _, self.rows, found = _HEADER.unpack(os.pread(self._file, _HEADER.size, 0))
        if found != job.encode():
            raise BlockCacheError(
                f"another run with other prompts or settings is working in {self.path.parent}; "
                "wait for it, stop it, or give another --out"
            )

    @contextmanager
    def leaving(self) -> Iterator[bool]:
        """Whether we are the last one to leave. Inside, nobody can enter."""
        with self._locked(_DOOR):
            yield self._lock(_PRESENCE, wait=False)
            self._unlock(_PRESENCE)

    def stop(self) -> None:
        """Let nobody take any more rows."""
        os.pwrite(self._file, b"s", _STOP)

    def is_stopped(self) -> bool:
        """Whether somebody said stop."""
        return os.pread(self._file, 1, _STOP) == b"s"

    # ---- rows ----------------------------------------------------------------------------------

    def take(self) -> int | None:
        """Claim the next row that is to be done; None if none is free at the moment."""
        if self.is_stopped():
            return None
        with self._locked(_HAND):
            (cursor,) = struct.unpack("<Q", os.pread(self._file, 8, _CURSOR))
            row = self._claim_from(cursor)
            after = self.rows if row is None else row + 1
            os.pwrite(self._file, struct.pack("<Q", after), _CURSOR)
        return self._claim_from(0) if row is None else row

    def _claim_from(self, start: int) -> int | None:
        row = self._next_todo(start)
        while row is not None:
            if row not in self._held and self._lock(_ROWS + row, wait=False):
                # Its holder may have finished it between our look and our lock.
                if os.pread(self._file, 1, _ROWS + row) == TODO:
                    self._held.add(row)
                    return row
                self._unlock(_ROWS + row)
            row = self._next_todo(row + 1)
        return None

    def _next_todo(self, start: int) -> int | None:
        while start < self.rows:
            found = os.pread(self._file, min(_CHUNK, self.rows - start), _ROWS + start)
            if (at := found.find(TODO)) >= 0:
                return start + at
            if not found:
                return None
            start += len(found)
        return None

    def settle(self, row: int, status: bytes) -> None:
        """Say what became of a claimed row, and give the claim back."""
        os.pwrite(self._file, status, _ROWS + row)
        self._unlock(_ROWS + row)
        self._held.discard(row)

    def count(self) -> dict[bytes, int]:
        """How many rows are to do, done, failed and bad, in all processes together."""
        found = dict.fromkeys((TODO, DONE, FAILED, BAD), 0)
        for start in range(0, self.rows, _CHUNK):
            part = os.pread(self._file, min(_CHUNK, self.rows - start), _ROWS + start)
            for status in found:
                found[status] += part.count(status)
        return found

    # ---- locks ---------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        self._lock(byte)
        try:
            yield
        finally:
            self._unlock(byte)

    def _lock(self, byte: int, wait: bool = True, shared: bool = False) -> bool:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind if wait else kind | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if not wait and error.errno in _HELD:
                return False
            if error.errno in _NO_LOCKS:
                raise BlockCacheError(
                    f"the file system of {self.path.parent} has no locks ({error.strerror}); "
                    "use one that has, for example NFS 4 or a local disk"
                ) from None
            raise
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
