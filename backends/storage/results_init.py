"""Writes the results: one row per item, as Parquet, CSV or JSON lines.

All functions block; call them in a thread.
"""

from .columns import RESULT_COLUMNS, rows
from .delimited import write_csv
from .jsonl import write_jsonl
from .results import write_parquet

__all__ = ["RESULT_COLUMNS", "rows", "write_csv", "write_jsonl", "write_parquet"]
