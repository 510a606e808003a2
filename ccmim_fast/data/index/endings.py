"""The one list of endings: what a file is by the end of its name, for folders, lists, URLs, tars and shards alike."""

import re
from typing import NamedTuple

from PIL import features


class Format(NamedTuple):
    """A format of images has `endings`, the one that is written first; `read` tells if it can be decoded here."""

    name: str  # Pillow's
    endings: tuple[str, ...]
    read: bool = True


def _has(feature: str) -> bool:
    """Tell whether Pillow decodes a format; an older Pillow does not know the name of a newer one, and would warn."""
    return feature in (*features.modules, *features.codecs) and bool(features.check(feature))


# In the order in which the image of a sample is chosen where it has several.
FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif")),
    Format("PNG", (".png",)),
    Format("WEBP", (".webp",), _has("webp")),
    Format("AVIF", (".avif",), _has("avif")),
    Format("TIFF", (".tif", ".tiff")),
    Format("JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), _has("jpg_2000")),
    Format("BMP", (".bmp", ".dib")),
    Format("PPM", (".ppm", ".pgm", ".pbm", ".pnm")),
    Format("GIF", (".gif",)),
    Format("NPY", (".npy",)),
)
IMAGES = tuple(ending for kind in FORMATS if kind.read for ending in kind.endings)
ARRAYS = (".npy", ".tif", ".tiff")  # of any number of channels
TAR, TABLES, LISTS = ".tar", (".parquet", ".arrow", ".feather"), (".txt", ".lst", ".tsv")
CONTAINERS = (TAR, *TABLES)
# Images that nothing here decodes, and archives whose members cannot be read one by one: who has them wants to know.
UNREAD = (
    *(ending for kind in FORMATS if not kind.read for ending in kind.endings),
    *(".jxl", ".heic", ".heif", ".hif", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".pfm", ".dds", ".eps"),
    *(".qoi", ".jxr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".dcm", ".nii"),
    *(".pef", ".srw", ".nrw", ".3fr", ".iiq", ".dcr", ".kdc", ".mrw", ".erf", ".mef", ".mos", ".rwl", ".sr2", ".x3f"),
    *(".nii.gz", ".mrc", ".fits", ".czi", ".nd2", ".lif", ".svs", ".ndpi", ".mrxs", ".npz", ".h5", ".hdf5"),
    *(".lmdb", ".tfrecord", ".tfrecords", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.zst", ".tzst", ".tar.lz4", ".zip", ".7z", ".rar"),
)
# What lies beside images and is none: it is not told of in every run.
COMPANIONS = (
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".lst", ".yaml", ".yml", ".md", ".html", ".pdf", ".cls"),
    *(".py", ".ipynb", ".sh", ".log", ".db", ".ini", ".mat", ".pkl", ".index", ".idx", ".sqlite", ".toml", ".rst"),
    *(".bad", ".verify", ".md5", ".sha256", ".pt", ".pth", ".safetensors", ".ckpt", ".caption"),
)
_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    *(b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\x93NUMPY", b"8BPS", b"II+\0", b"MM\0+"),
)
# A BMP, of which two letters would be too few to know it by, one without the header of its file, and a PPM.
_LIKELY = re.compile(rb"BM.{12}[\x0c(48@l|]\0{3}|[(48@l|]\0{3}.{8}\x01\0|P[1-6]\s+(?:#|\d)", re.DOTALL)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
SNIFFED = 132  # bytes by which an image is known; DICOM's name stands at their end


def file_suffixes(channels: int) -> tuple[str, ...]:
    """Return the lower-case endings of the files that are read as images of so many channels."""
    return IMAGES if channels in (1, 3) else ARRAYS


def ending_of(name: str, known: tuple[str, ...]) -> str:
    """Return which of the lower-case endings a name has, in whatever case, or ""; the longest counts."""
    lower = name.lower()
    return max((ending for ending in known if lower.endswith(ending)), key=len, default="")


def is_table(name: str) -> bool:
    """Tell whether a file is a table by its name."""
    return name.lower().endswith(TABLES)


def is_tar(name: str) -> bool:
    """Tell whether a file is a tar by its name."""
    return name.lower().endswith(TAR)


def begins_like_an_image(start: bytes) -> bool:
    """Tell whether the first `SNIFFED` bytes of a file are those of an image, whatever its name is."""
    film = start[4:8] == b"ftyp" and start[8:12] in _BRANDS
    known = start.startswith(_BEGINNINGS) or _LIKELY.match(start) is not None
    return known or film or start[8:12] == b"WEBP" or start[128:132] == b"DICM"
