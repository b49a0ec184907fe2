"""A store as the pyarrow file system that Ray Train writes to."""

import os
import urllib.parse
from typing import Any

import boto3
from pyarrow import fs

from loraseg.storage import open_store

__all__ = ["pyarrow_filesystem"]

_MAX_ATTEMPTS = 10


def pyarrow_filesystem(uri: str) -> tuple[str, fs.FileSystem]:
    """Return the path of a store and the pyarrow file system that holds it.

    A file system on S3 holds this process's endpoint and credentials, so it also works in workers.

    Args:
        uri: As for :func:`loraseg.storage.open_store`.

    Raises:
        ConfigError: The URI is malformed.
    """
    store_uri = open_store(uri).uri
    parts = urllib.parse.urlsplit(store_uri)
    if parts.scheme == "file":
        return urllib.parse.unquote(parts.path), fs.LocalFileSystem()
    return store_uri.removeprefix("s3://"), _s3_filesystem()


def _s3_filesystem() -> fs.S3FileSystem:
    session: Any = boto3.Session()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        address = urllib.parse.urlsplit(endpoint)
        options |= {"endpoint_override": address.netloc, "scheme": address.scheme}
    if (credentials := session.get_credentials()) is not None:
        keys = credentials.get_frozen_credentials()
        options |= {"access_key": keys.access_key, "secret_key": keys.secret_key}
        options |= {"session_token": keys.token}
    if session.region_name:
        options["region"] = session.region_name
    return fs.S3FileSystem(
        **options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS)
    )
