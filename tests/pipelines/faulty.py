"""A file system that fails as clouds do: faulty:// URLs, kept in memory."""

from typing import ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class HttpError(Exception):
    def __init__(self, code):
        super().__init__(f"{code}")
        self.code = code


class FaultyFileSystem(MemoryFileSystem):
    """Memory that fails each write some times before it takes it, and now and then loses the answer of one it took."""

    protocol = "faulty"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    faults: ClassVar = []

    def pipe_file(self, path, value, mode="overwrite", **options):
        fault = self.faults.pop() if self.faults else None
        if fault == "answer lost":
            super().pipe_file(path, value, mode=mode, **options)
            raise ConnectionResetError("cut")
        if fault is not None:
            raise fault
        super().pipe_file(path, value, mode=mode, **options)
