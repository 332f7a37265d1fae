"""Many scans: manifests → case table → shards → streams. Ray Data lives here."""

from mu2llm.cases.ingest import OverBudget, ingest
from mu2llm.cases.manifest import FORMATS, read_manifest
from mu2llm.cases.shards import Shards
from mu2llm.cases.stream import Stream, dataset
from mu2llm.cases.table import NOTES, CaseTable

__all__ = [
    "FORMATS",
    "NOTES",
    "CaseTable",
    "OverBudget",
    "Shards",
    "Stream",
    "dataset",
    "ingest",
    "read_manifest",
]
