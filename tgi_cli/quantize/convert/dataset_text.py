"""Text out of the Parquet files of a data set, as far as it is needed.

Where the files come from is `hub_datasets`' business. Needs pyarrow (the extra `datasets`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tgi_cli.errors import UsageError
from tgi_cli.quantize.convert.calibration import JOIN, row_text

_COLUMNS = ("text", "messages")
_ROWS = 256  # decoded at a time


def dataset_text(name: str, files: Iterable[Path], enough: int) -> str:
    """The first rows' `text` or `messages`, at least `enough` characters if there are so many.

    Raises:
        UsageError: pyarrow is not installed, or there is no such column, or it holds no text.
    """
    parts: list[str] = []
    size = 0
    for row in _rows(name, files):
        part = row_text(row)
        if part is None:
            raise UsageError(
                f"row {len(parts)} of the data set `{name}` has no text in `{next(iter(row))}`",
                hint="save what is meant as .jsonl and give that file",
            )
        parts.append(part)
        size += len(part) + len(JOIN)
        if size >= enough:
            break
    return JOIN.join(parts)


def _rows(name: str, files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(
            f"data sets of the hub, such as `{name}`, need pyarrow, which is not installed",
            hint="pip install 'tgi-cli[datasets]', or save the text column as .jsonl",
        ) from error
    for path in files:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            found = [column for column in _COLUMNS if column in columns]
            if not found:
                raise UsageError(
                    f"the data set `{name}` has neither `text` nor `messages` among its columns "
                    f"{', '.join(columns)}",
                    hint="save the column that is meant as .jsonl, under the name `text`",
                )
            for batch in file.iter_batches(batch_size=_ROWS, columns=found[:1]):
                yield from batch.to_pylist()
