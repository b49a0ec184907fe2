# pyright: basic
"""A store as the file system that Ray Train and Ray Data write to."""

import os
import urllib.parse
from typing import Any

import boto3
from pyarrow import fs

from loraseg.storage import open_store

__all__ = ["pyarrow_filesystem"]

_MAX_ATTEMPTS = 10


def pyarrow_filesystem(uri: str) -> tuple[str, fs.FileSystem]:
    """Return a store's path and the pyarrow file system that the path is in.

    One on S3 holds this process's endpoint and credentials, so that it works where it
    travels to.

    Args:
        uri: As for :func:`loraseg.storage.open_store`.

    Raises:
        ConfigError: The URI is malformed.
    """
    place = open_store(uri).uri
    parts = urllib.parse.urlsplit(place)
    if parts.scheme == "file":
        return urllib.parse.unquote(parts.path), fs.LocalFileSystem()
    return place.removeprefix("s3://"), _s3_filesystem()


def _s3_filesystem() -> fs.S3FileSystem:
    session = boto3.Session()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        address = urllib.parse.urlsplit(endpoint)
        options |= {"endpoint_override": address.netloc, "scheme": address.scheme}
    if (found := session.get_credentials()) is not None:
        keys = found.get_frozen_credentials()
        options |= {"access_key": keys.access_key, "secret_key": keys.secret_key}
        options |= {"session_token": keys.token}
    if session.region_name:
        options["region"] = session.region_name
    return fs.S3FileSystem(
        **options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS)
    )
