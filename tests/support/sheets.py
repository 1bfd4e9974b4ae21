"""What a sheet says, as texts that a test can compare."""

from __future__ import annotations

from experiments.engine.reporting.sheet import NoteKind, Sheet, SheetRow


def texts(sheet: Sheet, key: str) -> list[str]:
    """The printed cells of a column."""
    digits = sheet.column(key).digits
    return [cell.text(digits) for cell in sheet.values(key)]


def row_texts(sheet: Sheet, row: SheetRow) -> dict[str, str]:
    """The printed cells of a row, by key."""
    return {column.key: cell.text(column.digits) for column, cell in sheet.cells(row)}


def row_of(sheet: Sheet, label: str) -> SheetRow:
    """The row whose first cell is this label."""
    first = sheet.columns[0].key
    (row,) = [row for row in sheet.rows if row[first].text() == label]
    return row


def labelled(sheet: Sheet, label: str) -> dict[str, str]:
    """The printed cells of the row of a label, by key."""
    return row_texts(sheet, row_of(sheet, label))


def note_texts(sheet: Sheet, kind: NoteKind | None = None) -> list[str]:
    """The notes of a sheet, or those of one kind."""
    return [note.text for note in sheet.notes if kind in (None, note.kind)]


def note_about(sheet: Sheet, words: str) -> str:
    """The one note that holds these words."""
    found = [text for text in note_texts(sheet) if words in text]
    assert len(found) == 1, f"{len(found)} notes hold {words!r}: {note_texts(sheet)}"
    return found[0]
