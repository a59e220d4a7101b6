# SPDX-License-Identifier: GPL-2.0
"""Damages metadata on purpose, and tells where its structures lie.

An independent reading of the on-disk format (rust/shared/{superblock,layout,checkpoint,log}.rs): what it
changes keeps a right checksum where that is the point, so that the field itself is what gets refused.

    meta.py get META FIELD                 prints a field of superblock copy 0
    meta.py set META FIELD VALUE           sets it in both copies, with right checksums
    meta.py where META STRUCTURE           prints "<byte offset> <name in error messages>"
    meta.py flip META STRUCTURE [BYTE]     flips one bit of the structure's page
    meta.py tear META                      the last record becomes one that a power cut tore
    meta.py records META                   prints the numbers of the records that recovery replays

META is a metadata device or a file; with --tail, a data device with the metadata in its tail. STRUCTURE is
one of sb0, sb1, index, plane, old-index, log-first, log-last; label (META is the data device then).
"""

import os
import struct
import sys

PAGE = 4096
FIELDS = {  # name: (offset, struct format)
    "version": (12, "<I"), "incompat": (16, "<Q"), "ro_compat": (24, "<Q"), "compat": (32, "<Q"),
    "sequence": (40, "<Q"), "meta_uuid": (48, "16s"), "data_uuid": (64, "16s"), "data_sectors": (80, "<Q"),
    "managed_sectors": (88, "<Q"), "image_bytes": (96, "<Q"), "block_shift": (104, "<I"),
    "extent_shift": (108, "<I"), "placement": (112, "<I"), "flags": (116, "<I"), "log_start": (120, "<Q"),
    "log_pages": (128, "<Q"), "area_start0": (136, "<Q"), "area_start1": (144, "<Q"), "area_pages": (152, "<Q"),
    "checkpoint_area": (160, "<I"), "checkpoint_seq": (168, "<Q"), "log_seq": (176, "<Q"),
    "dirty_blocks": (184, "<Q"), "stale_blocks": (192, "<Q"), "generation": (200, "<Q"), "image_id": (208, "32s"),
}
BITS_PER_PAGE = (PAGE - 32) * 8


def _table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


TABLE = _table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


class Meta:
    """Metadata in a file or on a device, open for reading and writing."""

    def __init__(self, path, tail=False):
        self.file = open(path, "r+b", buffering=0)
        self.pages = self.file.seek(0, 2) // PAGE
        self.tail = tail

    def anchor(self, copy):
        distance = 15 if copy else 0
        return self.pages - 1 - distance if self.tail else distance

    def read(self, page):
        self.file.seek(page * PAGE)
        return self.file.read(PAGE)

    def write(self, page, data):
        self.file.seek(page * PAGE)
        self.file.write(data)
        # The kernel's own I/O does not see what is cached for a block device.
        os.fsync(self.file.fileno())

    def get(self, field, copy=0):
        offset, form = FIELDS[field]
        value, = struct.unpack_from(form, self.read(self.anchor(copy)), offset)
        return value.hex() if isinstance(value, bytes) else value

    def set(self, field, value):
        offset, form = FIELDS[field]
        for copy in (0, 1):
            page = bytearray(self.read(self.anchor(copy)))
            struct.pack_into(form, page, offset, bytes.fromhex(value) if form.endswith("s") else int(value, 0))
            struct.pack_into("<I", page, 8, crc32c(page[12:]))
            self.write(self.anchor(copy), page)

    def record(self, page):
        """The sequence in each sector of a page of the log up to the first without entries, which ends the record; None
        for a blank one."""
        data = self.read(page)
        found = []
        for at in range(0, PAGE, 512):
            blank = not any(data[at:at + 512])
            found.append(None if blank else struct.unpack_from("<Q", data, at + 8)[0])
            if not blank and data[at + 6] == 0:
                break
        return found

    def records(self):
        first, pages = self.get("log_seq"), self.get("log_pages")
        found = []
        for seq in range(first, first + pages):
            if set(self.record(self.log_page(seq))) != {seq}:
                break
            found.append(seq)
        return found

    def log_page(self, seq):
        return self.get("log_start") + seq % self.get("log_pages")

    def where(self, structure):
        """The page of a structure, and what error messages call it."""
        area = self.get("checkpoint_area")
        if structure in ("sb0", "sb1"):
            copy = int(structure[2])
            return self.anchor(copy), f"superblock copy {copy}"
        if structure == "label":
            return self.pages - 1, "data device label"
        if structure == "index":
            return self.get(f"area_start{area}"), f"checkpoint area {area} index page 0"
        if structure == "old-index":
            return self.get(f"area_start{1 - area}"), f"checkpoint area {1 - area} index page 0"
        if structure == "plane":
            block_sectors = 1 << self.get("block_shift") - 9
            blocks = -(-self.get("managed_sectors") // block_sectors)
            planes = -(-blocks // BITS_PER_PAGE)
            start = self.get(f"area_start{area}")
            indexes = -(-planes * 2 // ((PAGE - 32) * 4))
            index = self.read(start)
            for n in range(min(planes, (PAGE - 32) * 4)):
                if index[32 + n // 4] >> n % 4 * 2 & 3 == 2:
                    return start + indexes + n, f"checkpoint area {area} plane page {n}"
            raise SystemExit("meta.py: no plane page is stored")
        if structure in ("log-first", "log-last"):
            found = self.records()
            if not found:
                raise SystemExit("meta.py: the log has no record that is needed")
            seq = found[0 if structure == "log-first" else -1]
            return self.log_page(seq), f"log record {seq}"
        raise SystemExit(f"meta.py: no structure {structure}")

    def flip(self, structure, byte=100):
        page, name = self.where(structure)
        data = bytearray(self.read(page))
        data[byte] ^= 0x10
        self.write(page, data)
        return name

    def tear(self):
        """All but the first sector of the last record becomes what was there before: nothing."""
        page, name = self.where("log-last")
        self.write(page, self.read(page)[:512] + bytes(PAGE - 512))
        return name


def main(args):
    tail = "--tail" in args
    args = [a for a in args if a != "--tail"]
    if len(args) < 2:
        raise SystemExit(__doc__)
    verb, meta = args[0], Meta(args[1], tail)
    if verb == "get":
        print(meta.get(args[2]))
    elif verb == "set":
        meta.set(args[2], args[3])
    elif verb == "where":
        page, name = meta.where(args[2])
        print(page * PAGE, name)
    elif verb == "flip":
        print(meta.flip(args[2], *map(int, args[3:4])))
    elif verb == "tear":
        print(meta.tear())
    elif verb == "records":
        print(*meta.records())
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
