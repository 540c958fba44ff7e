"""Files of text: which ones a pattern names, here or behind a URL, and their decompressed content within bounds.

A broken archive ends reading with its name: what lies behind the break cannot be counted. (What no reader can see: a
file cut exactly between two members of a concatenated archive, and altered bytes inside a zstd frame that was written
without a checksum.)
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol, cast

import zstandard

from biomedlm_jax.errors import UserError, reason

# Bytes read from a file at once.
CHUNK_BYTES = 1 << 17
# Compressed bytes decoded at once. A zstd block of 4 bytes may stand for 128 KiB, so this bounds what comes out at
# once to 64 MiB; it is also the fastest size for zstd.
SLICE_BYTES = 1 << 11
# Longest piece of content that is passed on at once.
PIECE_BYTES = 1 << 20
# A line of JSON, an XML record, a member of a tar archive, a cell of Parquet: longer ones are dropped and counted.
MAX_RECORD_BYTES = 32 << 20

_OTHER_ARCHIVES = re.compile(
    rb"(?P<xz>\xfd7zXZ\0)|(?P<bzip2>BZh[1-9]1AY&SY)|(?P<zip>PK\x03\x04)|(?P<lz4>\x04\x22\x4d\x18)"
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


class Progress(Protocol):
    """Where bytes that are used up get counted: a `ReadReport`."""

    raw_bytes: int


def shown(name: str) -> str:
    """A file's name as a message of one line can hold it."""
    return name if name.isprintable() else repr(name)


def expand_globs(patterns: Sequence[str]) -> list[str]:
    """The files that paths, URLs and globs (`*`, `?`, `[a-z]`, `**` for any folders) name, sorted, each once, also
    where links lead to it.

    URLs are `gs://`, `s3://`, `https://`, `http://`, `file://`, and whatever else fsspec knows. In web addresses `?`
    is no wildcard, and globs need a server that lists its folders, as NLM's does.

    Raises:
      UserError: a pattern matches no file, or a link to nothing, or its server does not answer.
    """
    files: set[str] = set()
    for pattern in patterns:
        files.update(_remote_matches(pattern) if _URL.match(pattern) else _local_matches(os.path.expanduser(pattern)))
    # Of a file's names the shortest: links to folders above make no end of them.
    by_length = sorted(files, key=lambda file: (len(file), file), reverse=True)
    return sorted({real_path(file): file for file in by_length}.values())


def real_path(path: str) -> str:
    """What is the same for all names of a file."""
    return path if _URL.match(path) else os.path.realpath(path)


def _local_matches(pattern: str) -> list[str]:
    # A file whose name holds brackets is meant before the set of names that the brackets spell.
    matches = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    found = [match for match in matches if not os.path.isdir(match)]
    for match in found:
        # Of the real path, since the system does not follow more than some links.
        if not os.path.isfile(os.path.realpath(match)):
            raise UserError(
                f"{shown(match)}, which {pattern!r} matches, is no file (perhaps a link to one that is gone)"
            )
    if not found:
        hint = (
            f"it is a folder, write {shown(pattern.rstrip('/'))}/* for its files"
            if os.path.isdir(pattern)
            else f"the current folder is {shown(os.getcwd())}"
        )
        raise UserError(f"{pattern!r} matches no file ({hint})")
    return found


def _remote_matches(url: str) -> list[str]:
    system, path = _file_system(url)
    wildcards = "*[" if url.startswith("http") else "*?["
    if not set(wildcards) & set(url):
        file_size(url)
        return [url]
    with _explained(url):
        found = system.glob(path, detail=True)
    if files := [system.unstrip_protocol(name) for name, info in found.items() if info.get("type") != "directory"]:
        return files
    raise UserError(f"{url!r} matches no file there")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    import fsspec  # takes 0.1 s, and most runs read local files

    protocol = url.partition("://")[0].lower()
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'biomedlm_jax[{extra}]'" if extra else reason(error)
        raise UserError(f"{shown(url)}: reading {protocol}:// needs another package: {remedy}") from error
    except Exception as error:  # each file system has its own
        raise UserError(f"{shown(url)}: {_one_line(error)}; write a path, or gs://, s3:// or https://") from error


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what goes wrong with a file, or with the server behind a URL, into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Behind https:// all that goes wrong is said to be a missing file.
        cause = error.__cause__
        if isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) == 404):
            raise UserError(f"{shown(path)} does not exist") from error
        # Local files raise OSError, or ValueError for impossible names; clients of servers raise dozens of types.
        if _URL.match(path):
            raise UserError(
                f"{shown(path)} cannot be read ({_one_line(error)}); check the address, the network and your "
                "credentials, and start again"
            ) from error
        if not isinstance(error, OSError | ValueError):
            raise
        raise UserError(f"{shown(path)} cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    what = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
    return f"{type(error).__name__}: {shown(what)}" if _is_cryptic(what) else shown(what)


def _is_cryptic(what: str) -> bool:
    return not what or " " not in what


def file_size(path: str) -> int:
    """Bytes of a file or URL, before decompression; 0 where a server does not tell.

    Raises:
      UserError: it is not there.
    """
    with _explained(path):
        if not _URL.match(path):
            return os.stat(path).st_size
        return int(_info(path).get("size") or 0)


def file_identity(path: str) -> str:
    """A string that changes when a file is replaced: its size, with its time or what its server has for that purpose.

    Raises:
      UserError: it is not there.
    """
    with _explained(path):
        if not _URL.match(path):
            status = os.stat(path)
            return f"size={status.st_size} mtime_ns={status.st_mtime_ns}"
        info = _info(path)
        names = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "created", "Content-MD5")
        return " ".join(f"{name}={info[name]}" for name in names if info.get(name) is not None)


def _info(url: str) -> dict[str, Any]:
    system, path = _file_system(url)
    return cast(dict[str, Any], system.info(path))


class RawFile(io.RawIOBase):
    """A file or URL, open for reading; its errors are UserErrors that name it."""

    def __init__(self, path: str):
        self._path = path
        with _explained(path):
            if _URL.match(path):
                system, inner = _file_system(path)
                self._file: BinaryIO = system.open(inner, "rb")
            else:
                self._file = open(path, "rb")  # noqa: SIM115  (close() below)

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it can jump: not where a server cannot serve parts of files."""
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all for -1."""
        with _explained(self._path):
            return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place in the file."""
        with _explained(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place in the file."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            # Closing what could not be opened is no second error.
            with contextlib.suppress(Exception):
                self._file.close()
        super().close()


def chunks(file: str, progress: Progress) -> Iterator[bytes]:
    """The content of a file in pieces of up to `PIECE_BYTES`, decompressed if it is an archive, whatever its name.

    Raises:
      UserError: the file cannot be read, or the archive is corrupt or truncated.
    """
    newlines = 0
    with RawFile(file) as raw:
        try:
            for chunk in _decompressed(file, raw, progress):
                yield chunk
                newlines += chunk.count(b"\n")
        except (EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(
                f"{shown(file)}: the archive is corrupt or truncated soon after line {newlines} ({error}); "
                "fetch it again, or leave it out"
            ) from error


def _decompressed(file: str, raw: RawFile, progress: Progress) -> Iterator[bytes]:
    """Content by the magic number: RFC 1952 for gzip, RFC 8878 for zstd, whose parallel writers begin with a
    skippable frame; all else is plain.

    One loop serves both kinds, which may be several archives one after the other. zstandard's own stream reader ends
    quietly where a frame is cut short; a decoder that has not come to its end does not.
    """
    data = raw.read(max(CHUNK_BYTES, 4))
    if not data and file.endswith((".gz", ".tgz", ".zst")):
        raise UserError(f"{shown(file)} is empty, not even an archive; fetch it again")
    if other := _OTHER_ARCHIVES.match(data):
        raise UserError(
            f"{shown(file)} is a {other.lastgroup} archive, which is not read: unpack it, or pack it with zstd"
        )
    gzip = data.startswith(b"\x1f\x8b")
    zstd = data.startswith(b"\x28\xb5\x2f\xfd") or (data[1:4] == b"\x2a\x4d\x18" and data[0] >> 4 == 5)
    # Large shards are often written with windows beyond the default limit of 128 MiB.
    frames = zstandard.ZstdDecompressor(max_window_size=2**31)
    decoder = None
    while data:
        progress.raw_bytes += len(data)
        if gzip or zstd:
            view, at = memoryview(data), 0
            while at < len(data):
                if gzip and not decoder and not data[at]:
                    # Zeros that fill a tape's last block; gzip passes them over, too.
                    at = len(data) - len(data[at:].lstrip(b"\0"))
                    continue
                decoder = decoder or (zlib.decompressobj(wbits=31) if gzip else frames.decompressobj())
                piece = view[at : at + SLICE_BYTES]
                content = decoder.decompress(piece)
                for start in range(0, len(content), PIECE_BYTES):
                    yield content[start : start + PIECE_BYTES]
                at += len(piece) - len(decoder.unused_data)
                if decoder.eof:
                    decoder = None
        else:
            yield data
        data = raw.read(CHUNK_BYTES)
    if decoder:
        raise EOFError("it ends before its last block")


def head(content: Iterator[bytes], size: int) -> bytes:
    """The first `size` bytes or more of content, which is taken from it; fewer if there are no more."""
    taken = b""
    while len(taken) < size and (chunk := next(content, b"")):
        taken += chunk
    return taken


def lines(content: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their newline, in time linear in a line's length; None for one over `MAX_RECORD_BYTES`."""
    pieces: list[bytes] = []
    size = 0
    for chunk in content:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        size += len(first)
        if size > MAX_RECORD_BYTES:
            pieces.clear()
        for piece in others:
            yield b"".join(pieces) if size <= MAX_RECORD_BYTES else None
            pieces = [piece]
            size = len(piece)
    yield b"".join(pieces) if size <= MAX_RECORD_BYTES else None
