"""Where a study's MLflow store is, and how it is spoken to: no call takes minutes, and no password is shown."""

from __future__ import annotations

import errno
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.update(  # defaults: what the user set stays
    {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow calls home otherwise
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # whoever calls asks again; MLflow would repeat a create that had succeeded
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    }
    | os.environ
)

import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for every failure that we handle

PAGE = 1000  # runs a search gives at most
BUSY = (408, 429, 502, 503, 504)  # HTTP
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
REFUSED = ("authentication failed", "does not exist", "no pg_hba.conf entry")  # a database's word that no waiting changes


def store_uri(folder: Path) -> str:
    """The MLflow store of the study in `folder`, unless it was given another one."""
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"


def open_store(uri: str) -> MlflowClient:
    """A client of the store. Raises what the database raises, at once: MLflow alone asks a missing one for minutes."""
    if is_database(uri):
        if uri.startswith("sqlite:///"):
            _let_readers_in(Path(uri.removeprefix("sqlite:///")))
        engine = sqlalchemy.create_engine(uri)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        finally:
            engine.dispose()
    return MlflowClient(tracking_uri=uri)


def is_database(uri: str) -> bool:
    """Whether MLflow opens the store itself, rather than ask a server."""
    return not uri.startswith(("http://", "https://"))


def _let_readers_in(file: Path) -> None:
    """Put an sqlite file into WAL mode: whoever reads it holds no writer up."""
    with closing(sqlite3.connect(file, timeout=60)) as database:
        database.execute("PRAGMA journal_mode = WAL")


def fold_wal(uri: str) -> None:
    """Bring what stands in an sqlite file's WAL into the file itself, so that a copy of the file is whole."""
    if uri.startswith("sqlite:///") and (file := Path(uri.removeprefix("sqlite:///"))).is_file():
        with closing(sqlite3.connect(file, timeout=60)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def is_away(error: BaseException) -> bool:
    """Whether the store may take later what it did not take now: it does not answer, or it is busy, locked or full."""
    for cause in _causes(error):
        if isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError | sqlalchemy.exc.TimeoutError):
            return not any(word in str(cause) for word in REFUSED)
        if isinstance(cause, RequestException | ConnectionError | TimeoutError):
            return True
        if isinstance(cause, MlflowException) and cause.get_http_status_code() in BUSY:
            return True
        if isinstance(cause, OSError) and cause.errno in PASSING:
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The deepest first."""
    if (below := error.__cause__ or error.__context__) is not None:
        yield from _causes(below)
    yield error


def shown(text: object, uri: str) -> str:
    """A text without the password of `uri`."""
    said = re.sub(r"(password=)[^&\s'\"]+", r"\1***", str(text))
    password = urlsplit(uri).password
    for secret in sorted({password, unquote(password)} if password else (), key=len, reverse=True):
        said = said.replace(secret, "***")
    return said


def search(client: MlflowClient, experiments: Sequence[str], wanted: str) -> list[Run]:
    """All runs that a filter wants, page by page."""
    runs, token = [], None
    while True:
        page = client.search_runs(list(experiments), wanted, max_results=PAGE, page_token=token)
        runs += list(page)
        token = page.token
        if not token:
            return runs
