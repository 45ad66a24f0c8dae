"""Single requests to S3 that s3fs's file interface has no name for, with its own patience for each of them.

`pipeline.storage` hands in its s3fs client, and explains what fails. Keys are taken and given literally.
"""

from typing import Any

from fsspec.asyn import sync
from s3fs.core import S3_RETRYABLE_ERRORS
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential


def first_key(client: Any, bucket: str, prefix: str) -> dict[str, Any] | None:
    """The first key with a prefix, as the listing has it; if there is an object of that very name, it is this one."""
    contents = client.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1).get("Contents", [])
    return contents[0] if contents else None


def list_page(
    client: Any, bucket: str, *, prefix: str = "", delimiter: str = "", token: str | None = None
) -> dict[str, Any]:
    """The answer to one ListObjectsV2, up to 1000 keys in their order.

    Args:
        delimiter: keys that have it after the prefix are put together in `CommonPrefixes`.
        token: `NextContinuationToken` of the page before.
    """
    options = {**({"Delimiter": delimiter} if delimiter else {}), **({"ContinuationToken": token} if token else {})}
    return client.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **options)


def get_object(client: Any, bucket: str, key: str, start: int = 0, length: int | None = None) -> tuple[bytes, str]:
    """The bytes of an object, or `length` > 0 of them from `start` on, and the ETag of the version that they are of."""
    span = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}

    def attempt() -> tuple[bytes, str]:
        answer = client.call_s3("get_object", Bucket=bucket, Key=key, **span)
        try:
            data: Any = sync(client.loop, answer["Body"].read)
            return data, answer["ETag"]
        finally:
            answer["Body"].close()

    # The request itself has been repeated by s3fs; this is for connections that break while the body comes.
    attempts = Retrying(
        retry=retry_if_exception_type(S3_RETRYABLE_ERRORS),
        wait=wait_exponential(multiplier=0.1, exp_base=1.7, max=15),
        stop=stop_after_attempt(client.retries),
        reraise=True,
    )
    return attempts(attempt)


def put_object_if(client: Any, bucket: str, key: str, data: bytes, etag: str | None) -> str | None:
    """Put an object if the one that is there has this ETag, or, for None, if none is there.

    Returns:
        Its new ETag; None where the store says that it is otherwise.
    """
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
    try:
        return client.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
        if code in ("PreconditionFailed", "NoSuchKey"):
            return None
        raise  # ConditionalRequestConflict among others: two at once, of which the store takes neither; to be repeated
