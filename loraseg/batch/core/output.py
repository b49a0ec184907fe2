"""Rules for a job's output: apart from its inputs, and each object written once."""

from loraseg.errors import ConfigError, StageError
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store

__all__ = ["check_disjoint", "publish"]


def check_disjoint(input_name: str, inputs: str, output: str) -> None:
    """Check that neither URI lies within the other: a second run would read the first one's output.

    Args:
        input_name: What the inputs are called in the config.
        inputs: URI that the job reads from.
        output: URI that it writes to.

    Raises:
        ConfigError: One lies within the other, or a URI is malformed.
    """
    first, second = (f"{open_store(uri).uri.rstrip('/')}/" for uri in (inputs, output))
    if first.startswith(second) or second.startswith(first):
        raise ConfigError(
            f"{input_name} and output must not lie within each other: {inputs}, {output}"
        )


def publish(output: ObjectStore, key: str, data: bytes, etag: str | None, *, conflict: str) -> bool:
    """Write an object by one conditional write.

    Args:
        output: Store of the job's output.
        key: Key of the object.
        data: Its new content.
        etag: Of the version to replace; None if there must not be any.
        conflict: Error message if another run has written other content.

    Returns:
        False if another run has written the same bytes first.

    Raises:
        StageError: Another run has written or deleted the object.
        StoreError: The store cannot be written.
    """
    if etag is None:
        written = output.put_if_absent(key, data)
    else:
        written = output.put_if_match(key, data, etag)
    if written:
        return True
    try:
        current = output.get(key)
    except ObjectNotFoundError as error:
        raise StageError(conflict) from error
    if current != data:
        raise StageError(conflict)
    return False
