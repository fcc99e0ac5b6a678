"""Writes the seeds of the fuzz target into fuzz/seeds/idx: python3 fuzz/seeds.py"""

import gzip
import struct
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "seeds" / "idx"

PIXELS = 28 * 28


def images(count, rows=28, columns=28, announced=None):
    """An IDX file of images with some structure, so that copies of pieces differ."""
    header = struct.pack(">4I", 0x803, count if announced is None else announced, rows, columns)
    return header + bytes(i * i % 251 for i in range(count * rows * columns))


def labels(values, announced=None):
    """An IDX file of labels."""
    return struct.pack(">2I", 0x801, len(values) if announced is None else announced) + bytes(values)


def member(data, level=9, flags=0, fields=b""):
    """A gzip member whose header has the given flags and optional fields."""
    header = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff" + fields
    if flags & 2:
        header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    return header + body + struct.pack("<2I", zlib.crc32(data), len(data))


DIGITS = labels(range(10))
HALF = len(DIGITS) // 2

SEEDS = {
    "images": images(2),
    "images-another-size": images(1, rows=3, columns=5),
    "images-cut": images(1)[:700],
    "images-followed": images(1) + b"\0",
    "images-none": images(0),
    "images-too-many": images(1, announced=0xFFFFFFFF),
    "images-limit": images(1, announced=(256 << 20) // PIXELS),
    "labels": DIGITS,
    "labels-beyond-nine": labels([9, 10]),
    "labels-cut": labels([1, 2], announced=3),
    "labels-header-cut": DIGITS[:7],
    "gzip-images": gzip.compress(images(2), mtime=0),
    "gzip-labels-stored": member(DIGITS, level=0),
    "gzip-labels-fixed": member(labels([1, 2, 3])),
    "gzip-labels-members": member(DIGITS[:HALF]) + member(b"") + member(DIGITS[HALF:]),
    # An extra field, a name, a comment and a checksum of the header.
    "gzip-labels-fields": member(DIGITS, flags=0x1E, fields=b"\x02\0abname\0comment\0"),
    "gzip-cut": member(DIGITS)[:-9],
    "gzip-wrong-checksum": member(DIGITS)[:-8] + b"\0\0\0\0" + struct.pack("<I", len(DIGITS)),
    "gzip-followed": member(DIGITS) + b"more",
    "gzip-bomb": member(images(1) + bytes(1 << 20)),
    "empty": b"",
}


def main():
    """Replaces the seeds."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    for name, data in SEEDS.items():
        (FOLDER / name).write_bytes(data)
    size = sum(len(data) for data in SEEDS.values())
    print(f"{len(SEEDS)} seeds of {size} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
