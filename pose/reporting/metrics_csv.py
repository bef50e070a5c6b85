"""A run's metrics.csv, as Lightning writes it and as a crash or a disk may leave it."""

import csv
import logging
import re
from pathlib import Path

log = logging.getLogger(__name__)


def logged_rows(csv_file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, each with what it has: `step` and numbers, as they are written.

    Damaged rows, of which a part is no number, or the end is missing, are left out, and counted in a warning.
    """
    if not csv_file.is_file():
        return []
    header, *lines = csv_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
    try:
        names = next(csv.reader([header.strip()]), [])
    except csv.Error:
        names = []
    rows = []
    for line in lines:
        values = line.rstrip("\r\n").split(",")  # numbers alone: no quotes, that could join lines
        row = {name: value for name, value in zip(names, values, strict=False) if name and value}
        is_whole = line.endswith("\n") and len(values) == len(names)  # the last one may be cut off
        # -1 is before the first step
        if is_whole and re.fullmatch(r"-?[0-9]+", row.get("step", "")) and all(map(_is_number, row.values())):
            rows.append(row)
    if missing := len(lines) - len(rows):
        log.warning(f"{missing} rows of {csv_file} are damaged, and left out")
    return rows


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
