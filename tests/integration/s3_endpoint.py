"""An S3 server that tests use, and fresh buckets on it."""

import uuid
from dataclasses import dataclass

import boto3
import botocore.config


@dataclass(frozen=True)
class S3Endpoint:
    """``restart`` is a shell command that kills the server hard and starts it again."""

    url: str
    access_key: str
    secret_key: str
    restart: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            # pyarrow's own S3 client: see the store's docstring for why boto3 is set likewise.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }

    def create_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        bucket = f"loraseg-test-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=bucket)
        return bucket

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )


@dataclass(frozen=True)
class S3Space:
    """A fresh bucket, whose server the environment names as long as the test runs."""

    endpoint: S3Endpoint
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        return self.endpoint.environment
