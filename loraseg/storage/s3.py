# pyright: basic
"""An S3-compatible bucket as object store (boto3)."""

import base64
import concurrent.futures
import hashlib
import os
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions

from loraseg.errors import StoreError
from loraseg.storage.retry import REQUEST_ERRORS, error_code, retry_call
from loraseg.storage.store import (
    RETRY_TIMEOUT_S,
    ObjectInfo,
    ObjectNotFoundError,
    check_key,
    check_prefix,
)

__all__ = ["S3Store"]

MULTIPART_THRESHOLD_BYTES = 16 * 2**20
PART_BYTES = 8 * 2**20
_PART_THREADS = 4
_MAX_SINGLE_PUT_BYTES = 5 * 2**30
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 30  # Ceph holds requests, rather than failing them, while a disk is down

# Object metadata that names one write, so that a writer recognises what it stored.
_WRITE_ID_METADATA = "loraseg-write"

_NOT_FOUND_CODES = {"NoSuchKey", "404", "NotFound"}
_PRECONDITION_FAILED_CODES = {"PreconditionFailed", "412"}
_CREDENTIAL_ERROR_CODES = {
    "AccessDenied",
    "403",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
}
ResultT = TypeVar("ResultT")


class S3Store:
    """Objects below ``prefix`` of a bucket; the etag is the server's, without quotes.

    Endpoint, region and credentials come from the standard AWS variables and files. Conditions
    are only ever put on a single PutObject: some servers silently ignore them on multipart
    uploads. Uploads carry Content-MD5, which every server checks (Ceph RGW 16 knows no other
    checksum, and fails on the trailers that newer SDKs send by default).

    A request that fails for a reason that may pass (no connection, a broken answer, 429, 5xx) is
    repeated with growing, jittered pauses for ``patience_s`` seconds in all.

    Threads may share a store, and forked processes may use that of their parent.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        retry_timeout_s: float = RETRY_TIMEOUT_S,
        connections: "_ProcessLocalClient | None" = None,
    ) -> None:
        """Use ``bucket``; ``prefix`` has no slash at its ends; ``connections`` can be shared."""
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._retry_timeout_s = retry_timeout_s
        self._connections = connections or _ProcessLocalClient()
        self._bucket_exists = False

    @property
    def uri(self) -> str:
        """The ``s3://`` URI of the root."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def get(self, key: str) -> bytes:
        """Return the object's bytes."""
        return self.get_with_etag(key)[0]

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """Return the object's bytes and etag."""
        target = self._target(key)

        def request() -> tuple[bytes, str]:
            response = self._client.get_object(**target)
            return response["Body"].read(), _strip_quotes(response["ETag"])

        return self._call("read", key, request)

    def put(self, key: str, data: bytes) -> str:
        """Write the object, in parts if it is large, and return its etag."""
        target = self._target(key)
        if len(data) > MULTIPART_THRESHOLD_BYTES:
            return self._put_multipart(key, target, data)
        return self._call("write", key, lambda: self._put_single(target, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless the key exists; of concurrent writers exactly one succeeds."""
        return self._put_conditional(key, data, {"IfNoneMatch": "*"})

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Replace the object if it still has ``etag``; False if it has changed or was deleted."""
        # Without quotes: Ceph RGW 16 compares the header's text with the bare etag.
        return self._put_conditional(key, data, {"IfMatch": _strip_quotes(etag)})

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        target = self._target(key)
        try:
            self._call("look up", key, lambda: self._client.head_object(**target))
        except ObjectNotFoundError:
            # HEAD has no body, so a missing bucket looks like a missing object.
            if not self._bucket_exists:
                self._call("reach", "", lambda: self._client.head_bucket(Bucket=self._bucket))
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with ``prefix`` in code point order, page by page."""
        return (item.key for item in self.list_objects(prefix))

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield keys, sizes and etags in code point order, page by page."""
        request = {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix)}
        while True:
            page = self._call("list", prefix, lambda: self._client.list_objects_v2(**request))
            for item in page.get("Contents", ()):
                key = item["Key"][len(self._prefix) :]
                yield ObjectInfo(key, item["Size"], _strip_quotes(item["ETag"]))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """Delete the object; a missing object is not an error."""
        target = self._target(key)
        self._call("delete", key, lambda: self._client.delete_object(**target))

    def with_prefix(self, prefix: str) -> "S3Store":
        """Return the store rooted at ``prefix``, with the same connections."""
        return self._copy(self._prefix + check_key(prefix), self._retry_timeout_s)

    def with_retry_timeout(self, timeout_s: float) -> "S3Store":
        """Return the store with another retry timeout."""
        return self._copy(self._prefix.rstrip("/"), timeout_s)

    @property
    def _client(self) -> Any:
        return self._connections.client()

    def _copy(self, prefix: str, retry_timeout_s: float) -> "S3Store":
        return S3Store(
            self._bucket, prefix, retry_timeout_s=retry_timeout_s, connections=self._connections
        )

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + check_key(key)}

    def _put_single(self, target: dict[str, str], data: bytes, **options: Any) -> str:
        response = self._client.put_object(
            **target, Body=data, ContentMD5=_content_md5(data), **options
        )
        return _strip_quotes(response["ETag"])

    def _put_multipart(self, key: str, target: dict[str, str], data: bytes) -> str:
        mark = uuid.uuid4().hex
        created = self._call(
            "write",
            key,
            lambda: self._client.create_multipart_upload(
                **target, Metadata={_WRITE_ID_METADATA: mark}
            ),
        )
        upload = {**target, "UploadId": created["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            part = data[(number - 1) * PART_BYTES : number * PART_BYTES]
            response = self._call(
                "write",
                key,
                lambda: self._client.upload_part(
                    **upload, PartNumber=number, Body=part, ContentMD5=_content_md5(part)
                ),
            )
            return {"PartNumber": number, "ETag": response["ETag"]}

        try:
            with concurrent.futures.ThreadPoolExecutor(_PART_THREADS) as pool:
                parts = list(pool.map(send, range(1, -(-len(data) // PART_BYTES) + 1)))
            return self._complete_multipart(
                key, target, {**upload, "MultipartUpload": {"Parts": parts}}, mark
            )
        except BaseException:
            # Parts of an upload that is neither completed nor aborted are billed indefinitely.
            self._abort_multipart(upload)
            raise

    def _complete_multipart(
        self, key: str, target: dict[str, str], upload: dict[str, Any], write_id: str
    ) -> str:
        """Turn the parts into the object, whose etag Ceph RGW 16 leaves empty in its answer."""
        refusal = None
        try:
            self._retry("write", key, lambda: self._client.complete_multipart_upload(**upload))
        except REQUEST_ERRORS as error:
            if error_code(error) != "NoSuchUpload":
                raise self._store_error("write", key, error) from error
            refusal = error  # perhaps because an attempt whose answer was lost has completed it
        found = self._call("look up", key, lambda: self._client.head_object(**target))
        if found["Metadata"].get(_WRITE_ID_METADATA) == write_id:
            return _strip_quotes(found["ETag"])
        if refusal is not None:
            raise self._store_error("write", key, refusal) from refusal
        return f"replaced-{write_id}"

    def _abort_multipart(self, upload: dict[str, str]) -> None:
        try:
            self._client.abort_multipart_upload(**upload)
        except REQUEST_ERRORS:
            return  # the error that led here is the one to report

    def _put_conditional(self, key: str, data: bytes, condition: dict[str, str]) -> bool:
        if len(data) > _MAX_SINGLE_PUT_BYTES:
            raise StoreError(
                f"cannot write {key!r} to {self.uri} on a condition: {len(data)} bytes, at most "
                f"{_MAX_SINGLE_PUT_BYTES} fit into the single request that this needs"
            )
        target = self._target(key)
        mark = uuid.uuid4().hex
        attempts = 0

        def request() -> bool:
            nonlocal attempts
            attempts += 1
            self._put_single(target, data, Metadata={_WRITE_ID_METADATA: mark}, **condition)
            return True

        try:
            return self._retry("write", key, request)
        except REQUEST_ERRORS as error:
            code = error_code(error)
            if code in _PRECONDITION_FAILED_CODES:
                return attempts > 1 and self._stored_by_earlier_attempt(key, mark)
            if code in _NOT_FOUND_CODES and "IfMatch" in condition:
                return False
            raise self._store_error("write", key, error) from error

    def _stored_by_earlier_attempt(self, key: str, write_id: str) -> bool:
        """Distinguish a lost race from a failed repetition of our own write.

        If an attempt was stored and its response was lost or a server error (Ceph RGW 16 returns
        500 to some of the writers in a race), the next attempt finds the object that this process
        wrote, and is rejected. The write id in the metadata identifies the writer; the bytes do
        not, because another writer may have written the same.
        """
        target = self._target(key)
        try:
            found = self._call("look up", key, lambda: self._client.head_object(**target))
        except ObjectNotFoundError:
            return False
        return found["Metadata"].get(_WRITE_ID_METADATA) == write_id

    def _call(self, action: str, key: str, request: Callable[[], ResultT]) -> ResultT:
        try:
            return self._retry(action, key, request)
        except REQUEST_ERRORS as error:
            raise self._store_error(action, key, error) from error

    def _retry(self, action: str, key: str, request: Callable[[], ResultT]) -> ResultT:
        result = retry_call(request, self._retry_timeout_s, f"{self.uri}: {action} {key!r}")
        self._bucket_exists = True
        return result

    def _store_error(self, action: str, key: str, error: Exception) -> StoreError:
        """Return a message with operation, URI and advice, without any part of a credential."""
        what = f"cannot {action} {key!r} in {self.uri}" if key else f"cannot {action} {self.uri}"
        endpoint = _without_userinfo(self._client.meta.endpoint_url)
        if isinstance(error, botocore.exceptions.ClientError):
            code = error_code(error)
            if code in _NOT_FOUND_CODES and key:
                return ObjectNotFoundError(f"no object {key!r} in {self.uri}")
            if code == "NoSuchBucket" or code in _NOT_FOUND_CODES:
                next_step = "the bucket does not exist; create it, or correct the URI"
            elif code in _CREDENTIAL_ERROR_CODES:
                next_step = (
                    f"the server refused the credentials ({code}); check AWS_ACCESS_KEY_ID, "
                    "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, and what they may do in this bucket"
                )
            else:
                next_step = f"{code}: {error.response.get('Error', {}).get('Message', '')}"
            return StoreError(f"{what} at {endpoint}: {next_step}")
        if isinstance(
            error,
            botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError,
        ):
            return StoreError(
                f"{what} at {endpoint}: no credentials found; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        return StoreError(
            f"{what} at {endpoint}: no usable answer ({type(error).__name__}); check "
            "AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, and that the server runs"
        )


class _ProcessLocalClient:
    """The boto3 client of this process.

    After a fork the parent's sockets are open in the child too: who reads an answer on one of them
    may get the other's. So a child makes a client of its own at its first request.
    """

    def __init__(self) -> None:
        self._pid_and_client = os.getpid(), _new_client()

    def client(self) -> Any:
        """Return the client of the current process."""
        made_by, client = self._pid_and_client
        if made_by != os.getpid():
            # Without a lock, which might be held at the next fork: should two threads come here at
            # once, each has a client that works.
            client = _new_client()
            self._pid_and_client = os.getpid(), client
        return client


def _new_client() -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    session = boto3.Session()
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": _READ_TIMEOUT_S,
        "retries": {"mode": "standard", "total_max_attempts": 1},  # see loraseg.storage.retry
        "max_pool_connections": 32,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if endpoint:
        options["s3"] = {"addressing_style": "path"}
    try:
        return session.client(
            "s3",
            region_name=region,
            endpoint_url=endpoint or None,
            config=botocore.config.Config(**options),
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StoreError(
            f"cannot set up the S3 client: {type(error).__name__}; check AWS_ENDPOINT_URL_S3, "
            "AWS_ENDPOINT_URL, AWS_REGION and AWS_PROFILE"
        ) from error


def _strip_quotes(etag: str) -> str:
    return etag.strip('"')


def _content_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _without_userinfo(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
