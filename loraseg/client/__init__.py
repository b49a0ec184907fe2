"""Talk to an endpoint, from any Python: neither torch nor Ray is loaded.

>>> with Client("https://segment.example.org", token=token) as client:
...     reply = client.segment(Path("street.jpg"), ["road", "car", "sky"])
...     reply.label_map, reply.adapters
"""

from loraseg.client.asking import Options
from loraseg.client.asynchronous import AsyncClient
from loraseg.client.reply import AdapterInfo, LibraryInfo, Reply, SkippedAdapter, UsedAdapter
from loraseg.client.synchronous import Client

__all__ = [
    "AdapterInfo",
    "AsyncClient",
    "Client",
    "LibraryInfo",
    "Options",
    "Reply",
    "SkippedAdapter",
    "UsedAdapter",
]
