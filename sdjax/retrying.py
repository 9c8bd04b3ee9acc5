"""Calls to disks and networks, tried again while what they fail by may pass."""

import errno
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 9
FIRST_WAIT = 0.25  # doubled at each attempt: about a minute in all


class FinalError(OSError):
    """What no further attempt would mend."""


_PERMANENT = (FinalError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_PERMANENT_NUMBERS = {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_OF_NETWORKS = {"aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub", "requests"}
_TRANSIENT_CODES = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later: cut connections, timeouts, 429 and 5xx answers, a full disk."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return is_transient(error.__cause__)  # fsspec says so of any answer of a web server but a good one
    if isinstance(error, _PERMANENT) or str(error).startswith("Forbidden"):
        return False
    if isinstance(error, OSError) and error.errno in _PERMANENT_NUMBERS:
        return False
    if isinstance(status := getattr(error, "status", None), int):  # a web server's, whatever it is to gcsfs
        return status in _TRANSIENT_CODES
    if type(error).__module__.startswith("aiohttp."):  # a connection was cut, or, of a ValueError, the URL is none
        return not isinstance(error, ValueError)
    gcs = sys.modules.get("gcsfs.retry")  # only where some path is a gs:// one
    if gcs is not None and gcs.is_retriable(error):
        return True
    return isinstance(error, OSError) or str(getattr(error, "code", "")) in map(str, _TRANSIENT_CODES)


def is_absent(error: Exception) -> bool:
    """Whether a file is truly not there; fsspec says so of any answer of a web server but a good one."""
    if not isinstance(error, FileNotFoundError):
        return False
    return getattr(error.__cause__, "status", 404) in (404, 410) and not is_transient(error)


def is_of_a_network(error: Exception) -> bool:
    """Whether a library that reads and writes URLs raised it: the errors of some are no OSError."""
    return type(error).__module__.partition(".")[0] in _OF_NETWORKS


def retry(call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """The call's value, tried again with growing waits while its errors are transient."""
    for attempt in range(attempts - 1):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
        # Not all at one time: a hundred hosts that failed together do not come back together.
        time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1))
    return call()
