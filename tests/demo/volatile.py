# SPDX-License-Identifier: GPL-2.0
"""A disk with a volatile write cache, served to a machine over NBD: what was not flushed is lost in part when the
power is cut, by sector and at random, as on a real disk.

Only what QEMU's client asks for is spoken of the protocol (fixed newstyle, simple replies).
"""

import os
import random
import socket
import struct
import tempfile
import threading

SECTOR = 512
NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_REPLY = 0x25609513, 0x67446698
OPT_EXPORT_NAME, OPT_ABORT, OPT_INFO, OPT_GO = 1, 2, 6, 7
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, 0x80000001
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
# has flags, flush, FUA, trim, write zeroes
EXPORT_FLAGS = 1 | 4 | 8 | 32 | 64
EIO = 5


class VolatileDisk:
    """Serves the file `path`. `drive` is what QEMU is told to open."""

    def __init__(self, path, seed):
        self.path = path
        self.dice = random.Random(seed)
        self.file = open(path, "r+b", buffering=0)
        self.size = os.path.getsize(path)
        # Sectors that were written and not flushed, with their newest content.
        self.cache = {}
        self.flushes = 0
        self.lost = 0
        self._off = False
        self._lock = threading.Lock()
        self._directory = tempfile.mkdtemp(prefix="pristine-nbd.")
        where = os.path.join(self._directory, "socket")
        self.drive = f"nbd+unix:///?socket={where}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(where)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    # -- the disk -----------------------------------------------------------------------------------

    def read(self, offset, length):
        """What the machine reads."""
        body = bytearray(os.pread(self.file.fileno(), length, offset))
        if self.cache:
            for n in range(offset // SECTOR, (offset + length) // SECTOR):
                sector = self.cache.get(n)
                if sector is not None:
                    at = n * SECTOR - offset
                    body[at:at + SECTOR] = sector
        return body

    def write(self, offset, body, durable):
        """A write into the cache, or past it."""
        first = offset // SECTOR
        if durable:
            os.pwrite(self.file.fileno(), body, offset)
            for n in range(first, first + len(body) // SECTOR):
                self.cache.pop(n, None)
            return
        for n in range(len(body) // SECTOR):
            self.cache[first + n] = bytes(body[n * SECTOR:(n + 1) * SECTOR])

    def flush(self):
        """The cache goes to the disk."""
        for n, sector in self.cache.items():
            os.pwrite(self.file.fileno(), sector, n * SECTOR)
        self.cache.clear()
        self.flushes += 1

    def cut(self):
        """The power goes: of what is in the cache all, nothing, or half of the sectors get to the disk."""
        with self._lock:
            self._off = True
            chance = self.dice.choice([0.0, 0.5, 0.5, 1.0])
            for n, sector in self.cache.items():
                if self.dice.random() < chance:
                    os.pwrite(self.file.fileno(), sector, n * SECTOR)
                else:
                    self.lost += 1
            self.cache.clear()
        self._end()

    def close(self):
        """The machine went off in order: a disk writes its cache then."""
        with self._lock:
            self._off = True
            self.flush()
        self._end()

    def _end(self):
        self._listener.close()
        self.file.close()
        os.unlink(os.path.join(self._directory, "socket"))
        os.rmdir(self._directory)

    # -- the protocol -------------------------------------------------------------------------------

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            with connection:
                if self._negotiate(connection):
                    while self._request(connection):
                        pass
        except (OSError, EOFError, ValueError):
            # The machine is gone.
            pass

    @staticmethod
    def _take(connection, length):
        body = bytearray()
        while len(body) < length:
            part = connection.recv(length - len(body))
            if not part:
                raise EOFError
            body += part
        return body

    def _negotiate(self, connection):
        connection.sendall(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 1 | 2))
        flags, = struct.unpack(">I", self._take(connection, 4))
        while True:
            magic, option, length = struct.unpack(">QII", self._take(connection, 16))
            if magic != IHAVEOPT:
                raise ValueError(magic)
            self._take(connection, length)

            def reply(kind, body=b"", option=option):
                connection.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(body)) + body)

            if option == OPT_EXPORT_NAME:
                zeroes = b"" if flags & 2 else bytes(124)
                connection.sendall(struct.pack(">QH", self.size, EXPORT_FLAGS) + zeroes)
                return True
            if option in (OPT_GO, OPT_INFO):
                reply(REP_INFO, struct.pack(">HQH", 0, self.size, EXPORT_FLAGS))
                reply(REP_INFO, struct.pack(">HIII", 3, SECTOR, 4096, 32 << 20))
                reply(REP_ACK)
                if option == OPT_GO:
                    return True
            elif option == OPT_ABORT:
                reply(REP_ACK)
                return False
            else:
                reply(REP_ERR_UNSUP)

    def _request(self, connection):
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self._take(connection, 28))
        if magic != REQUEST_MAGIC:
            raise ValueError(magic)
        body = self._take(connection, length) if kind == WRITE else b""
        error, answer = 0, b""
        with self._lock:
            if self._off:
                return False
            if kind == DISCONNECT:
                return False
            if offset % SECTOR or length % SECTOR or offset + length > self.size:
                error = EIO
            elif kind == READ:
                answer = self.read(offset, length)
            elif kind == WRITE:
                self.write(offset, body, flags & FUA)
            elif kind == WRITE_ZEROES:
                self.write(offset, bytes(length), flags & FUA)
            elif kind == FLUSH:
                self.flush()
            elif kind != TRIM:
                error = EIO
        connection.sendall(struct.pack(">IIQ", SIMPLE_REPLY, error, cookie) + answer)
        return True
