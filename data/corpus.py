"""Where the bytes come from: a file, a folder, or a known name.

A corpus is two arrays of bytes, one to train on and one to validate on, mapped from the disk:

    python                 the standard library of the Python that runs this; nothing to download
    shakespeare, enwik8    downloaded once, resumed where it broke off, checked by SHA-256
    path/to/file           mapped where it lies
    path/to/folder         the text files below it, joined into one

What has to be written goes to the cache under a temporary name, and gets its own name when it is whole.
"""
import functools
import hashlib
import importlib
import os
import platform
import shutil
import sysconfig
import zipfile
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from data.files import UserError, whole_file

CACHE = Path(__file__).parent / "cache"
BLOCK = 1 << 16                        # bytes moved at a time: the most that a broken download loses
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


class Corpus(NamedTuple):
    name: str
    train: np.ndarray                  # (bytes,) uint8, read-only
    val: np.ndarray                    # (bytes,) uint8, read-only
    note: str                          # one line for the screen: what was read; what was skipped, and why
    bytes_per_token: float = 1.0       # more than one where the tokens are words of byte pairs


class Download(NamedTuple):
    url: str
    forms: tuple[str, ...]             # names it may have in the cache: the corpus first, the download last
    size: int                          # of the corpus, unpacked
    sha256: str                        # likewise
    val_end: int = 100                 # validation is from 90 % of the bytes to here; the rest is for a test


DOWNLOADS = {
    "shakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        ("shakespeare.txt",), 1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": Download(
        "https://mattmahoney.net/dc/enwik8.zip",
        ("enwik8", "enwik8.zip"), 100_000_000,
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8", val_end=95),
}


# ---- One file: write it whole, map it, split it ----------------------------------------------------------

def map_bytes(name: str, path: Path) -> np.ndarray:
    """The bytes of a file, (bytes,) uint8, read-only. UserError if there are fewer than two."""
    size = path.stat().st_size
    if size < 2:
        raise UserError(f"--data {name} has {size} bytes, but 2 are the least, one to train on and one to "
                        "validate on; choose a larger file or folder")
    return np.memmap(path, np.uint8, mode="r")


def split(name: str, data: np.ndarray, note: str, val_end: int = 100) -> Corpus:
    """The first 90 % of the bytes train; those from there to `val_end` % validate."""
    cut = len(data) * 90 // 100
    return Corpus(name, data[:cut], data[cut:len(data) * val_end // 100], note)


# ---- Many files as one: a folder, and the standard library -----------------------------------------------

def gather(root: Path, cache: Path, objection) -> tuple[list[str], Counter]:
    """The files below `root`, as sorted relative posix paths, and a count of the reasons to skip the others.

    `objection(path, is_folder)` is a reason to skip a file or a whole folder, or None. The cache is skipped:
    a corpus that holds itself would grow with every run. Links to folders are not followed, so loops end.
    """
    files, skipped, cache = [], Counter(), cache.resolve()
    for folder, subfolders, names in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        here = Path(folder)
        if here == cache:
            skipped["cache"] += 1
            subfolders.clear()
            continue
        reasons = {name: objection(here / name, is_folder=False) for name in names}
        files += [(here / name).relative_to(root).as_posix() for name in names if not reasons[name]]
        reasons |= {name: objection(here / name, is_folder=True) for name in subfolders}
        subfolders[:] = [name for name in subfolders if not reasons[name]]
        skipped.update(filter(None, reasons.values()))
    return sorted(files), skipped


def join(root: Path, files: list[str], label: str, cache: Path) -> Path:
    """All `files`, one after the other, as one file of the cache, written if it is not there yet.

    A hash of paths, sizes and modification times is part of its name: a changed listing is another file.
    """
    listing = hashlib.sha1(usedforsecurity=False)
    for file in files:
        info = (root / file).stat()
        listing.update(repr((str(root), file, info.st_size, info.st_mtime_ns)).encode())
    target = cache / f"{label}-{listing.hexdigest()[:16]}.bin"
    if not target.exists():
        with whole_file(target) as out:
            for file in files:
                with open(root / file, "rb") as source:
                    shutil.copyfileobj(source, out)
    return target


def not_stdlib(path: Path, is_folder: bool) -> str | None:
    unwanted = path.name in NOT_STDLIB if is_folder else path.suffix != ".py"
    return "not standard library" if unwanted else None


def load_python(cache: Path) -> Corpus:
    """The standard library's *.py files in the order of the sha1 of their paths; every 20th validates.

    So whole files validate, drawn from everywhere, and the same ones wherever that Python runs.
    """
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files, _ = gather(root, cache, not_stdlib)
    if len(files) < 20:
        raise UserError("--data python needs at least 20 source files of the standard library, but "
                        f"{root} has {len(files)}; use --data FILE with any file of yours")
    files.sort(key=lambda file: hashlib.sha1(os.fsencode(file), usedforsecurity=False).digest())
    val = files[::20]
    train = [file for i, file in enumerate(files) if i % 20]
    version = platform.python_version()
    note = f"{len(files)} files of Python {version}'s standard library, {len(val)} of them validate"
    return Corpus("python", map_bytes("python", join(root, train, "python-train", cache)),
                  map_bytes("python", join(root, val, "python-val", cache)), note)


def not_text(path: Path, is_folder: bool) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if is_folder:
        return "linked folder" if path.is_symlink() else None
    try:
        if not path.is_file():         # a broken link; or a pipe, where open would wait for ever
            return "unreadable"
        with open(path, "rb") as file:
            return "binary" if b"\0" in file.read(8192) else None
    except OSError:
        return "unreadable"


def load_folder(name: str, cache: Path) -> Corpus:
    """The text files below a folder, in sorted order; the last 10 % of their bytes validate."""
    root = Path(name).resolve()
    files, skipped = gather(root, cache, not_text)
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "nothing"
    if not files:
        raise UserError(f"--data {name} has no text files (skipped: {left_out}); choose another folder")
    return split(name, map_bytes(name, join(root, files, "folder", cache)),
                 f"{len(files)} files, the last 10 % of the bytes validate (skipped: {left_out})")


# ---- Downloads -------------------------------------------------------------------------------------------

def fetch(name: str, part: Path) -> None:
    """Downloads to `part`, going on where an earlier try stopped. UserError: where to put the file by hand.

    Blocks are written at their own place, not appended, so a second process on the same `part` does no harm.
    """
    url, forms = DOWNLOADS[name].url, DOWNLOADS[name].forms
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with open(part, "r+b") as file:
        have = file.seek(0, os.SEEK_END)
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urlopen(request, timeout=30) as answer:
                start = file.seek(have if answer.status == 206 else 0)  # 200: all of it, from the beginning
                length = answer.headers["Content-Length"]
                total = start + int(length) if length else None
                with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True) as bar:
                    while block := answer.read(BLOCK):
                        bar.update(file.write(block))
            if total and file.tell() < total:
                raise ConnectionError(f"broke off at {file.tell():,} of {total:,} bytes")
            file.truncate()
        except (OSError, HTTPException) as problem:
            if isinstance(problem, HTTPError):
                problem.close()
                if have and problem.code == 416:  # nothing was left to ask for
                    return
            places = " or ".join(str(part.with_name(form)) for form in forms)
            raise UserError(f"--data {name}: no download from {url} ({problem}); run again to go on with it, "
                            f"or put the file by hand at {places}") from problem


def check(name: str, path: Path, size: int, sha256: str, way_out: str) -> None:
    """UserError unless the bytes found in `path` have the digest of the corpus."""
    item = DOWNLOADS[name]
    if sha256 != item.sha256:
        raise UserError(f"--data {name}: {path} holds {size:,} bytes with SHA-256 {sha256}, but {name} is "
                        f"{item.size:,} bytes with SHA-256 {item.sha256}; {way_out}")


def open_unpacked(path: Path):
    """Opens a file, or the one file inside it if it is a zip."""
    if not zipfile.is_zipfile(path):
        return open(path, "rb")
    with zipfile.ZipFile(path) as archive:
        if len(archive.namelist()) != 1:
            raise zipfile.BadZipFile(f"{len(archive.namelist())} files inside, not one")
        return archive.open(archive.namelist()[0])  # keeps the zip open until it is closed itself


def install(name: str, source: Path, target: Path, way_out: str) -> None:
    """Copies `source`, unpacked, to `target`, which appears only if the bytes are right; else UserError."""
    digest, size = hashlib.sha256(), 0
    try:
        with open_unpacked(source) as file, whole_file(target) as out:
            while block := file.read(BLOCK):
                digest.update(block)
                size += out.write(block)
            check(name, source, size, digest.hexdigest(), way_out)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as problem:  # RuntimeError: password
        raise UserError(f"--data {name}: {source} is a damaged zip ({problem}); {way_out}") from problem


def load_download(name: str, cache: Path) -> Corpus:
    """A corpus of DOWNLOADS: from the cache, from a zip put there, or from the network; always checked."""
    forms = DOWNLOADS[name].forms
    target, packed, part = cache / forms[0], cache / forms[-1], cache / f"{forms[-1]}.part"
    if not target.exists() and packed.exists():
        install(name, packed, target, "replace that file")
    elif not target.exists():
        fetch(name, part)
        try:
            if not target.exists():    # else another process was faster
                install(name, part, target, "the download is deleted, run again")
        except UserError:
            part.unlink(missing_ok=True)
            raise
        part.unlink(missing_ok=True)
    data = map_bytes(name, target)
    check(name, target, len(data), hashlib.sha256(data).hexdigest(), "replace that file")
    return split(name, data, f"{len(data):,} bytes, SHA-256 as published", DOWNLOADS[name].val_end)


# ---- What the scripts call -------------------------------------------------------------------------------

def load_corpus(name: str, cache: Path = CACHE) -> Corpus:
    """The corpus of a known name (python, shakespeare, enwik8), a file or a folder. Failures are DataErrors.

    A known name wins over a path of that name, lest a folder called python change the default: the path is
    then ./python.
    """
    try:
        if name == "python":
            return load_python(cache)
        if name in DOWNLOADS:
            return load_download(name, cache)
        if os.path.isfile(name):
            data = map_bytes(name, Path(name))
            return split(name, data, f"{len(data):,} bytes, the last 10 % validate")
        if os.path.isdir(name):
            return load_folder(name, cache)
    except OSError as problem:
        raise UserError(f"--data {name}: {problem}; it must be readable, and {cache} writable") from problem
    found = "neither a file nor a folder" if os.path.exists(name) else "no such file or folder"
    raise UserError(f"--data {name}: {found}, and the known names are python, {', '.join(DOWNLOADS)}")


def load_tokens(name: str, vocab: int) -> Corpus:
    """A file of token ids below `vocab`, the last 10 % of which validate. UserError for any other.

    .npy holds uint16 or uint32 and says which; .bin is nothing but the ids, uint16 if `vocab` fits, else uint32.
    """
    try:
        raw = np.uint16 if vocab <= 1 << 16 else np.uint32
        data = np.load(name, mmap_mode="r") if name.endswith(".npy") else np.memmap(name, raw, mode="r")
    except (OSError, ValueError) as problem:
        raise UserError(f"--data {name}: {problem}; a model of {vocab:,} tokens reads a file of token ids, "
                        ".npy or .bin of uint16 or uint32") from problem
    if data.ndim != 1 or data.dtype not in (np.uint16, np.uint32) or len(data) < 2:
        raise UserError(f"--data {name} holds {data.dtype} of shape {data.shape}, expected uint16 or uint32 in one row")
    if data.max() >= vocab:
        raise UserError(f"--data {name} has token id {data.max():,}, but the model knows {vocab:,}; "
                        "it was made with another tokenizer, or .bin with ids of another size: write .npy")
    return split(name, data, f"{len(data):,} token ids, the last 10 % validate; a byte is a token below")


def windows(data: np.ndarray, length: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The windows of one training step, (batch, length) int64. UserError if the data is shorter than one window.

    An epoch cuts the data, from a random offset on, into windows that share one byte with the next, and reads them in
    random order. No byte is a target twice, and all but up to two windows' worth at the ends are targets: drawing every
    start by itself would leave 37 % of the bytes unread by the time it has drawn as many as there are. A pure function
    of (seed, step), so the step in a checkpoint is the reader's position, and a resumed run reads what the
    uninterrupted one would have read.
    """
    if len(data) < length:
        raise UserError(f"the data has {len(data):,} bytes, but one window needs {length:,}; "
                        "lower --seq_len or choose a larger --data")
    stride = max(length - 1, 1)
    count = max((len(data) - length) // stride, 1)  # one fewer than fit, which leaves the offset a whole window's room
    nth = step * batch + np.arange(batch)
    starts = np.array([_epoch(len(data) - length, stride, count, seed, i // count)[i % count] for i in nth.tolist()])
    return data[starts[:, None] + np.arange(length)].astype(np.int64)  # (batch, length)


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _epoch(last: int, stride: int, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where an epoch's windows begin, in the order of reading; last is the last place where one fits."""
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(last - stride * (count - 1) + 1)
    return offset + stride * rng.permutation(count)


COMPRESSORS = [("gzip -9", "gzip", "compresslevel"), ("bz2 -9", "bz2", "compresslevel"),
               ("xz -9", "lzma", "preset")]


def compressed_bpb(data: np.ndarray) -> dict[str, float]:
    """Bits per byte of the data under gzip -9, bz2 -9 and xz -9: the figures that a model has to beat."""
    raw, bpb = data.tobytes(), {}
    for tool, module, level in COMPRESSORS:
        try:
            compress = importlib.import_module(module).compress
        except ImportError:            # some Pythons are built without bz2 or xz
            continue
        bpb[tool] = 8 * len(compress(raw, **{level: 9})) / len(raw)
    return bpb
