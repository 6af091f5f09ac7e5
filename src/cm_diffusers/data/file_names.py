"""What a file holds, as its name tells."""

from pathlib import PurePath

from PIL import Image


NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow knows, but cannot draw by itself
IMAGE_SUFFIXES = {
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PIXELS
}
CAPTION_SUFFIXES = (".txt", ".caption")  # the first that is there is read
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # likewise
NO_DATA = {"thumbs.db", "desktop.ini", "readme.md", "license"}


def suffix_of(path: PurePath) -> str:
    """In lower case."""
    return path.suffix.lower()


def is_metadata(path: PurePath) -> bool:
    return path.name.lower() in METADATA


def is_hidden(path: PurePath) -> bool:
    """Whether a path inside a folder is what systems and notebooks leave behind."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
