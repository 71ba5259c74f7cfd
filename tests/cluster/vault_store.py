"""An fsspec store that takes its credentials in the URL: ``vault://user:password@host/local/path``, no local one.

Where SHEPHERD_TEST_VAULT names a file that does not exist yet, the next upload makes it and fails, naming its whole URL
as careless stores do.
"""

import os
import shutil
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem
from fsspec.utils import infer_storage_options


class Vault(AbstractFileSystem):
    protocol = "vault"

    def __init__(self, username: str = "", password: str = "", **options: object) -> None:
        super().__init__(**options)
        if not (username and password):
            raise PermissionError("no credentials")
        self._shown = f"vault://{username}:{password}@host"
        self._local = LocalFileSystem()

    @staticmethod
    def _get_kwargs_from_urls(path):
        options = infer_storage_options(path)
        return {name: options[name] for name in ("username", "password") if name in options}

    @classmethod
    def _strip_protocol(cls, path):
        if "://" in path:
            path = "/" + path.partition("://")[2].partition("/")[2]
        return path.rstrip("/") or "/"

    def ls(self, path, detail=True, **options):
        return self._local.ls(self._strip_protocol(path), detail=detail)

    def info(self, path, **options):
        return self._local.info(self._strip_protocol(path))

    def cat_file(self, path, start=None, end=None, **options):
        return self._local.cat_file(self._strip_protocol(path), start=start, end=end)

    def pipe_file(self, path, value, mode="overwrite", **options):
        path = Path(self._strip_protocol(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb" if mode == "create" else "wb") as file:
            file.write(value)

    def put_file(self, lpath, rpath, **options):
        failed = os.environ.get("SHEPHERD_TEST_VAULT")
        if failed and not Path(failed).exists():
            Path(failed).touch()
            raise OSError(f"{self._shown}{rpath} is away")
        path = Path(self._strip_protocol(rpath))
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(lpath, path)

    def rm(self, path, recursive=False, **options):
        self._local.rm(self._strip_protocol(path), recursive=recursive)

    def rm_file(self, path):
        self._local.rm_file(self._strip_protocol(path))

    def _open(self, path, mode="rb", **options):
        return self._local._open(self._strip_protocol(path), mode)
