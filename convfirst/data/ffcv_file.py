"""The .beton file: whether it is whole, and what it holds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_handlers, get_metadata_type
from ffcv.utils import decode_null_terminated_string

FIELDS = ("image", "label")
# our note in the label field's unused `arguments`: FFCV keeps 1024 bytes a field and reads none of a label's
NoteType = np.dtype([("magic", "S8"), ("num_classes", "<u4"), ("classes", "S64")])
MAGIC = b"convfir1"


@dataclass(frozen=True)
class Beton:
    """A checked file.

    Attributes:
        num_classes: labels lie in [0, num_classes).
        classes: SHA-256 of the class names as hexadecimal, or "" in a file that another program wrote.
        labels: int64 [number of images].
    """

    path: Path
    num_classes: int
    classes: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def require_same_classes(self, other: "Beton") -> None:
        """Raise ValueError if both files name their classes, and differently, or if the numbers of classes differ."""
        if self.num_classes != other.num_classes or (self.classes and other.classes and self.classes != other.classes):
            raise ValueError(
                f"classes differ: {self.path} has {self.num_classes}, {other.path} has {other.num_classes}, "
                "or their names aren't the same; write both from one tree"
            )

    def require_classes(self, classes: Sequence[str], where: Path) -> None:
        """Raise ValueError unless the folders `classes`, found in `where`, are this file's, as far as it names them."""
        if len(classes) != self.num_classes or self.classes not in ("", _digest(classes)):
            raise ValueError(
                f"classes differ: {self.path} has {self.num_classes}, {where} has {len(classes)}, "
                "or their names aren't the same"
            )


def open_beton(path: str | Path, num_classes: int | None = None) -> Beton:
    """Check a file's header, tables and labels; images aren't decoded.

    Args:
        path: written by `convfirst.data.ffcv_writer`, or by any FFCV writer with the fields image and label.
        num_classes: expected number of classes; None takes the file's own statement.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is half-written, cut off or no .beton at all, has other fields, or a label is out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no FFCV file at {path}; scripts/write_ffcv.py writes one from an image folder")
    descriptors, metadata = _read_tables(path)
    names = tuple(map(decode_null_terminated_string, descriptors["name"]))
    if names != FIELDS:
        raise ValueError(f"{path} has the fields {', '.join(names)}; expected {', '.join(FIELDS)}")
    note = descriptors["arguments"][1].tobytes()[: NoteType.itemsize]
    note = np.frombuffer(note, NoteType)[0]
    stated = int(note["num_classes"]) if note["magic"] == MAGIC else None
    if stated is None and num_classes is None:
        raise ValueError(f"{path} doesn't say how many classes it has: give data.num_classes")
    if None not in (stated, num_classes) and stated != num_classes:
        raise ValueError(f"data.num_classes={num_classes}, but {path} has {stated} classes")
    count = stated or num_classes
    labels = metadata["f1"].astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise ValueError(f"{path}: image {wrong[0]} has label {labels[wrong[0]]}, out of the range 0 to {count - 1}")
    return Beton(path, count, note["classes"].decode() if stated else "", labels)


def _read_tables(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Field descriptors and per-image metadata of a file whose allocation table accounts for every image."""
    size = path.stat().st_size
    header = np.fromfile(path, HeaderType, 1)
    if len(header) == 0 or header[0]["version"] != CURRENT_VERSION or not 0 < header[0]["num_fields"] <= 64:
        raise ValueError(f"{path} isn't a .beton file of version {CURRENT_VERSION}")
    header = header[0]
    num_images, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    # FFCV writes the table, then the header that points to it, last of all
    rewrite = "half-written or cut off; write it anew with scripts/write_ffcv.py"
    if num_images == 0 or table == 0 or table > size:
        raise ValueError(f"{path} ({size} bytes) is {rewrite}")
    descriptors = np.fromfile(path, FieldDescType, int(header["num_fields"]), offset=HeaderType.itemsize)
    metadata_type = get_metadata_type(get_handlers(descriptors))
    offset = HeaderType.itemsize + descriptors.nbytes
    metadata = np.fromfile(path, metadata_type, num_images, offset=offset)
    allocations = np.fromfile(path, ALLOC_TABLE_TYPE, offset=table)
    whole = (
        len(metadata) == num_images
        and (size - table) % ALLOC_TABLE_TYPE.itemsize == 0
        and np.array_equal(np.unique(allocations["sample_id"]), np.arange(num_images))
        and (allocations["ptr"] + allocations["size"]).max() <= table
    )
    if not whole:
        raise ValueError(f"{path} ({size} bytes) is {rewrite}")
    return descriptors, metadata


def _digest(classes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(classes).encode()).hexdigest()


def write_note(path: Path, classes: Sequence[str]) -> None:
    """Put the number of classes and the digest of their names into a finished file."""
    note = np.zeros(1, NoteType)
    note["magic"], note["num_classes"] = MAGIC, len(classes)
    note["classes"] = _digest(classes).encode()
    place = HeaderType.itemsize + FieldDescType.itemsize * FIELDS.index("label") + FieldDescType.fields["arguments"][1]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(note.tobytes())
