"""Small archives, honest ones, that tests unpack and serve."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from fishr.data.prepare import Prepared

NOISE = np.random.default_rng(0).bytes(300_000)


HOME = {
    f"{domain}/{name}/{number}.jpg": f"{domain} {name} {number}".encode()
    for domain in ("Art", "Real World")
    for name in ("Alarm_Clock", "Bed")
    for number in (1, 2)
}


TERRA_CATEGORIES = (("dog", 1), ("empty", 30), ("car", 33), ("bird", 7))
TERRA_IMAGES = (("a", 38), ("b", 38), ("c", "100"), ("d", 43), ("e", 46), ("f", 7), ("g", 100))
TERRA_LABELS = ("a", 1), ("a", 1), ("b", 1), ("b", 7), ("c", 30), ("d", 30), ("d", 33), ("e", 1), ("f", 1), ("g", 33)


TABLE_ROWS: tuple[tuple[Any, Any, Any], ...] = (
    ((b"\x89PNG 1", "pic_1.png"), "photo", 0),
    ((b"\xff\xd8 2", "pic_1.png"), "photo", 0),
    ((b"\xff\xd8 3", None), "photo", 1),
    ((b"\x89PNG 4", "../../outside"), "sketch", 1),
    ((b"\xff\xd8 5", "sub/pic_5.jpg"), "sketch", 0),
)


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    mode = {".gz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def contents(prepared: Prepared) -> dict[str, bytes]:
    folder = prepared.listing.root
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def terra_annotations() -> dict[str, bytes]:
    """All in one file, and some of them once more in another."""
    whole = {
        "categories": [{"id": number, "name": name} for name, number in TERRA_CATEGORIES],
        "images": [{"id": name, "file_name": f"{name}.jpg", "location": place} for name, place in TERRA_IMAGES],
        "annotations": [{"image_id": name, "category_id": number} for name, number in TERRA_LABELS],
    }
    some = {**whole, "annotations": whole["annotations"][:3], "images": whole["images"][:3]}
    return {
        "eccv/train_annotations.json": json.dumps(whole).encode(),
        "eccv/cis_val_annotations.json": json.dumps(some).encode(),
        "eccv/._train_annotations.json": b"\0\0",
    }


def terra_images(*left_out: str) -> dict[str, bytes]:
    return {f"eccv_18_all_images_sm/{name}.jpg": name.encode() for name, _ in TERRA_IMAGES if name not in left_out}


def parquet_of(path: Path, rows: list[tuple[Any, Any, Any]], *, names: dict[str, list[str]] | None = None) -> Path:
    """A table as the hub's datasets are: numbers stand for the names in the schema's metadata."""
    images, domains, labels = zip(*rows, strict=True)
    images = [image and {"bytes": image[0], "path": image[1]} for image in images]
    table = pa.table({"image": pa.array(images), "domain": pa.array(domains), "label": pa.array(labels)})
    features = {column: {"names": known, "_type": "ClassLabel"} for column, known in (names or {}).items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path
