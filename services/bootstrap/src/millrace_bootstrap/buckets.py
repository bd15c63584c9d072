"""Buckets of an object storage, with the credentials and the endpoint of the environment."""

import logging
from typing import Any
from urllib.parse import urlsplit

import fsspec

log = logging.getLogger(__name__)


def bring_buckets(urls: tuple[str, ...]) -> None:
    """Make the buckets that are not there.

    Raises:
        OSError: the storage does not answer or refuses.
    """
    for url in urls:
        storage, bucket = _opened(url)
        if storage.exists(bucket):
            log.info("bucket %s is there", bucket)
            continue
        try:
            storage.mkdir(bucket)
        except FileExistsError:
            log.info("bucket %s was made by somebody else just now", bucket)
        else:
            log.info("bucket %s: made", bucket)


def check_bucket(url: str) -> None:
    """Look whether the bucket is there.

    Raises:
        OSError: the storage does not answer or refuses, or there is no such bucket.
    """
    storage, bucket = _opened(url)
    storage.ls(bucket)


def _opened(url: str) -> tuple[Any, str]:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return fsspec.filesystem("file", skip_instance_cache=True), parts.path
    return fsspec.filesystem(parts.scheme, skip_instance_cache=True), parts.netloc
