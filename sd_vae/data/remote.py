"""Files behind http(s), read in parts: what stalls or fails is asked for again, and what stays away ends the run.

A server must give parts of a file (range requests), as web servers and object stores do. Signed addresses are kept out
of messages from their question mark on, and user names and passwords before the host.
"""

from __future__ import annotations

import io
import logging
import os
import time
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from sd_vae.errors import UnreachableError, UserError

if TYPE_CHECKING:
    from requests import RequestException, Response, Session

__all__ = ["RemoteFiles", "RemoteState", "is_remote", "pause", "without_secrets"]

MISSING = (404, 410)
"""Answers that say that one file is not there; the others may be."""
PASSING = (408, 425, 429)
"""Answers below 500 after which asking again may help."""
BUFFER_SIZE = 4 * 2**20
"""Bytes that are read at a time where a whole file is gone through."""
LONGEST_PAUSE_S = 30.0

logger = logging.getLogger(__name__)


class RemoteState(NamedTuple):
    """What a server says of a file."""

    size: int
    """Bytes."""
    version: str
    """Changes when the file does, as far as the server tells."""


class RemoteFiles:
    """Reads files over http(s); can be sent to worker processes.

    Args:
        timeout_s: Seconds without a byte after which a request is given up.
        retries: Times in a row that a request is made again.
        pause_s: Seconds before that, doubled each time.
    """

    def __init__(self, *, timeout_s: float = 25.0, retries: int = 5, pause_s: float = 1.0) -> None:
        self.num_retries = 0
        """Requests that were made again, in this process."""
        self._timeout_s = timeout_s
        self._retries = retries
        self._pause_s = pause_s
        self._session: tuple[int, Session] | None = None

    def state(self, url: str) -> RemoteState:
        """Return size and version of a file.

        Raises:
            UserError: It is not there, or the server gives no parts of files; UnreachableError: no answer comes.
        """
        headers = self._ask(url, 0, 1).headers
        size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise UserError(f"{without_secrets(url)} has no known size; download it and name the folder.")
        return RemoteState(int(size), " ".join(headers.get(name, "") for name in ("ETag", "Last-Modified")))

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file.

        Raises:
            UserError: As `state`, or the file ends before.
        """
        found: bytes = self._ask(url, offset, size).content if size else b""
        if len(found) != size:
            missing = size - len(found)
            raise UserError(f"{without_secrets(url)} ends {missing} bytes early; it is cut off or was changed.")
        return found

    def open(self, url: str, size: int) -> IO[bytes]:
        """Return a file of `size` bytes to read from, anywhere in it."""
        return io.BufferedReader(_RemoteFile(self, url, size), BUFFER_SIZE)

    def _ask(self, url: str, offset: int, size: int) -> Response:
        """The answer with a part of a file, asked for until it comes."""
        from requests import RequestException

        tries = 0
        while True:
            try:
                return self._ask_once(url, offset, size)
            except RequestException as error:
                tries += 1
                reason = self._reason(error)
                if tries > self._retries or not _may_pass(error):
                    raise UnreachableError(
                        f"{without_secrets(url)} was asked for {tries} times in vain: {reason}; check the network and "
                        "the address, then go on from the last checkpoint with --resume."
                    ) from error
                self.num_retries += 1
                logger.warning("%s is asked for again: %s", without_secrets(url), reason)
                pause(self._pause_s, tries)

    def _ask_once(self, url: str, offset: int, size: int) -> Response:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        with self._own_session().get(url, headers=headers, timeout=self._timeout_s, stream=True) as response:
            if response.status_code in MISSING:
                raise UserError(
                    f"cannot read {without_secrets(url)}: {response.status_code} {response.reason}; check the address."
                )
            if response.status_code == 416:
                raise UserError(f"{without_secrets(url)} ends before byte {offset}; it is cut off or was changed.")
            response.raise_for_status()
            if response.status_code != 206:  # before the body, which would be all of the file
                raise UserError(
                    f"the server of {without_secrets(url)} gives whole files and no parts of them (range requests); "
                    "download it and name the folder."
                )
            response.content  # noqa: B018 - read here, where a stall is caught
            return response

    def _own_session(self) -> Session:
        """The connections of this process; those that a worker inherits are its parent's."""
        import requests

        if self._session is None or self._session[0] != os.getpid():
            self._session = os.getpid(), requests.Session()
        return self._session[1]

    def _reason(self, error: RequestException) -> str:
        """An error in few words, without the address."""
        if error.response is not None:
            return f"{error.response.status_code} {error.response.reason}"
        cause = error.args[0] if error.args else error
        words = " ".join(str(getattr(cause, "reason", cause)).split())
        return f"no byte for {self._timeout_s:g} s" if "timed out" in words else words.rpartition(": ")[2].rstrip(".")


class _RemoteFile(io.RawIOBase):
    """A remote file as Python's files are."""

    def __init__(self, files: RemoteFiles, url: str, size: int) -> None:
        self._files = files
        self._url = url
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        buffer[:size] = self._files.read(self._url, self._position, size)
        self._position += size
        return size


def is_remote(spec: str) -> bool:
    """Whether a name is an address on the web."""
    return spec.startswith(("http://", "https://"))


def without_secrets(url: str) -> str:
    """Return an address without user name, password, and what follows its path."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def pause(first_s: float, tries: int) -> None:
    """Wait before another try: `first_s` before the second, then twice as long each time, half a minute at most."""
    time.sleep(min(first_s * 2 ** min(tries - 1, 10), LONGEST_PAUSE_S))


def _may_pass(error: RequestException) -> bool:
    """Whether asking again may help: no answer, a server in trouble, or one that says so."""
    return error.response is None or error.response.status_code >= 500 or error.response.status_code in PASSING
