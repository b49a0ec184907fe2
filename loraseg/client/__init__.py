"""Talk to an endpoint, from any Python: neither torch nor Ray is loaded.

>>> with Client("https://segment.example.org", token=token) as client:
...     reply = client.segment(Path("street.jpg"), ["road", "car", "sky"])
...     reply.label_map, reply.adapters
"""

from loraseg.client.asynchronous import AsyncClient
from loraseg.client.requests import SegmentOptions
from loraseg.client.responses import (
    AdapterInfo,
    LibraryInfo,
    SegmentResponse,
    SkippedAdapterInfo,
    UsedAdapterInfo,
)
from loraseg.client.synchronous import Client

__all__ = [
    "AdapterInfo",
    "AsyncClient",
    "Client",
    "LibraryInfo",
    "SegmentOptions",
    "SegmentResponse",
    "SkippedAdapterInfo",
    "UsedAdapterInfo",
]
