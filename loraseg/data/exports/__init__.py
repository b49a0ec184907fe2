"""Committed synthetic pairs in the formats of others.

Why whole folders that must not exist yet: an export is made beside its place and renamed when it is
complete, so a partial export is never visible, and no files of an older one remain.
"""

from loraseg.data.exports.coco import export_coco
from loraseg.data.exports.folder import export_folder
from loraseg.data.exports.hf_parquet import export_hf_parquet
from loraseg.data.exports.webdataset import export_webdataset

__all__ = ["EXPORTERS", "export_coco", "export_folder", "export_hf_parquet", "export_webdataset"]

EXPORTERS = {
    "folder": export_folder,
    "webdataset": export_webdataset,
    "coco": export_coco,
    "hf-parquet": export_hf_parquet,
}
