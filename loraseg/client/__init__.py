"""Client of an endpoint. It loads neither torch nor Ray.

>>> with Client("https://segment.example.org", token=token) as client:
...     response = client.segment(Path("street.jpg"), ["road", "car", "sky"])
...     response.label_map, response.adapters
"""

from loraseg.api_types import AdapterInfo, LibraryInfo, SkippedAdapterInfo, UsedAdapterInfo
from loraseg.client.asynchronous import AsyncClient
from loraseg.client.requests import SegmentOptions
from loraseg.client.responses import SegmentResponse
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
