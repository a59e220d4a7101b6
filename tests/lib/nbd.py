# SPDX-License-Identifier: GPL-2.0
"""Attaches a server that speaks on its standard input to a network block device.

    nbd.py attach DEVICE BYTES COMMAND...    until somebody detaches it; then waits for the server
    nbd.py detach DEVICE
"""

import fcntl
import os
import socket
import subprocess
import sys

(SET_SOCK, SET_BLKSIZE, DO_IT, CLEAR_SOCK, SET_SIZE_BLOCKS, DISCONNECT, SET_FLAGS) = (
    0xAB << 8 | n for n in (0, 1, 3, 4, 7, 8, 10))
HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES = 1 << 0, 1 << 2, 1 << 3, 1 << 5, 1 << 6
SECTOR = 512


def attach(device, size, command):
    ours, theirs = socket.socketpair()
    server = subprocess.Popen(command, stdin=theirs)
    theirs.close()
    fd = os.open(device, os.O_RDWR)
    fcntl.ioctl(fd, SET_BLKSIZE, SECTOR)
    fcntl.ioctl(fd, SET_SIZE_BLOCKS, size // SECTOR)
    fcntl.ioctl(fd, SET_FLAGS, HAS_FLAGS | FLUSH | FUA | TRIM | WRITE_ZEROES)
    fcntl.ioctl(fd, SET_SOCK, ours.fileno())
    print("attached", flush=True)
    try:
        fcntl.ioctl(fd, DO_IT)
    finally:
        fcntl.ioctl(fd, CLEAR_SOCK)
        ours.close()
        os.close(fd)
    raise SystemExit(server.wait())


def main(args):
    if len(args) > 3 and args[0] == "attach":
        attach(args[1], int(args[2]), args[3:])
    elif len(args) == 2 and args[0] == "detach":
        fd = os.open(args[1], os.O_RDWR)
        fcntl.ioctl(fd, DISCONNECT)
        os.close(fd)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
