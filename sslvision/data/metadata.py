"""Image files without their metadata, for those whose color profile, text or EXIF a decoder rejects."""

import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"


def without_metadata(content: bytes) -> bytes | None:
    """Return a PNG or JPEG with only the parts that its pixels and its orientation depend on.

    Returns None for other files, and where there is nothing to leave out.
    """
    kept = _png(content) if content.startswith(PNG) else _jpeg(content) if content.startswith(JPEG) else content
    return kept if len(kept) < len(content) else None


def _png(content: bytes) -> bytes:
    kept, start = [PNG], len(PNG)
    while start + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        chunk = content[start : start + 12 + length]
        intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT") or (kind == b"eXIf" and intact):
            kept.append(chunk)
        start += len(chunk)
    return b"".join([*kept, content[start:]])


def _jpeg(content: bytes) -> bytes:
    kept, start = [JPEG], len(JPEG)
    while start + 4 <= len(content):
        mark, kind, length = struct.unpack_from(">BBH", content, start)
        if mark != 0xFF or kind == 0xDA:  # the pixels, up to the end of the file
            break
        segment = content[start : start + 2 + length]
        is_metadata = 0xE0 <= kind <= 0xEF or kind == 0xFE
        # The header and Adobe's segment say how colors are stored.
        needed = (segment[4:9] == b"JFIF\0" and length >= 16) or segment[4:10] == b"Exif\0\0" or kind == 0xEE
        if needed or not is_metadata:
            kept.append(segment)
        start += len(segment)
    return b"".join([*kept, content[start:]])
