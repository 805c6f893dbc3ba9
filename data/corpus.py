"""Where the bytes come from: a file, a folder, or a known name.

A corpus is two arrays of bytes, one to train on and one to validate on, mapped from the disk:

    python                 the standard library of the Python that runs this; nothing to download
    shakespeare, enwik8    downloaded once, checked by SHA-256
    path/to/file           mapped where it lies
    path/to/folder         the text files below it, joined into one
"""
import functools
import hashlib
import importlib
import io
import os
import platform
import sysconfig
import tempfile
import zipfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm

from data.files import UserError, require, whole_file

CACHE = Path(__file__).parent / "cache"


class Corpus(NamedTuple):
    name: str
    train: np.ndarray  # (bytes,) uint8, read-only
    val: np.ndarray    # (bytes,) uint8, read-only
    note: str          # one line for the screen: what was read
    bytes_per_token: float = 1.0  # more than one where the tokens are words of byte pairs


# ---------------------------------------------------------------------------------------------------------------------
# 1. One file


def map_bytes(name, file):
    """The bytes of an open file, (bytes,) uint8, read-only. UserError if there are fewer than two."""
    size = file.seek(0, os.SEEK_END)
    require(size > 1, f"--data {name} has {size} bytes, expected at least 2: "
                      "one to train on and one to validate on")
    return np.memmap(file, np.uint8, mode="r")


def split(name, data, note, val_end=100):
    """The first 90 % of the bytes train; those from there to val_end % validate."""
    cut = len(data) * 90 // 100
    return Corpus(name, data[:cut], data[cut:len(data) * val_end // 100], note)


def load_file(name, path, note, val_end=100):
    """The corpus that one file is."""
    with open(path, "rb") as file:
        data = map_bytes(name, file)
    return split(name, data, f"{len(data):,} bytes, {note}", val_end)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Many files as one: a folder, and the standard library

NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def of_stdlib(path):
    """True for a folder or file of the standard library."""
    return path.name not in NOT_STDLIB if path.is_dir() else path.suffix == ".py"


def is_text(path):
    """True for a folder or file that is not hidden, can be read, and has no NUL, which texts do not have."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return not path.is_symlink()  # a link may be a loop
    if not path.is_file() or not os.access(path, os.R_OK):
        return False  # open would wait for a pipe
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def gather(root, wanted):
    """The files below root that are wanted, as sorted relative posix paths, and how many others are skipped.

    A folder that is not wanted is not entered, and counts as one.
    """
    files = []
    skipped = 0
    for folder, subfolders, names in os.walk(root):
        inside = [Path(folder, name) for name in [*names, *subfolders]]
        kept = [path for path in inside if wanted(path)]
        skipped += len(inside) - len(kept)
        files += [path.relative_to(root).as_posix() for path in kept if not path.is_dir()]
        subfolders[:] = [path.name for path in kept if path.is_dir()]  # which os.walk enters
    return sorted(files), skipped


def join(root, files):
    """The bytes of all files, one after the other, in a temporary file, since they may be more than the memory."""
    with tempfile.TemporaryFile() as joined:
        for file in files:
            joined.write((root / file).read_bytes())
        return map_bytes(root, joined)


def load_python():
    """The standard library's *.py files in the order of the sha1 of their paths; every 20th validates.

    So whole files validate, drawn from everywhere, and the same ones wherever that Python runs.
    """
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files, _ = gather(root, of_stdlib)
    require(len(files) >= 20, f"--data python: {root} has {len(files)} source files, expected 20; "
                              "use --data FILE with any file of yours")
    files.sort(key=lambda file: hashlib.sha1(os.fsencode(file), usedforsecurity=False).digest())
    val = files[::20]
    train = [file for i, file in enumerate(files) if i % 20]
    version = platform.python_version()
    note = f"{len(files)} files of Python {version}'s standard library, {len(val)} of them validate"
    return Corpus("python", join(root, train), join(root, val), note)


def load_folder(name):
    """The text files below a folder, in sorted order; the last 10 % of their bytes validate."""
    root = Path(name).resolve()
    files, skipped = gather(root, is_text)
    require(files, f"--data {name} has no text files ({skipped} skipped); choose another folder")
    note = f"{len(files)} files ({skipped} skipped), the last 10 % of the bytes validate"
    return split(name, join(root, files), note)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Downloads


class Download(NamedTuple):
    url: str
    forms: tuple        # names it may have in the cache, the corpus first
    sha256: str         # of the corpus, unpacked
    val_end: int = 100  # validation is from 90 % of the bytes to here; the rest is for a test


DOWNLOADS = {
    "shakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        ("shakespeare.txt",), "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": Download(
        "https://mattmahoney.net/dc/enwik8.zip", ("enwik8", "enwik8.zip"),
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8", val_end=95),
}


KNOWN = ("python", *DOWNLOADS)  # names for --data that no path hides


def download(name, cache):
    """The bytes behind the address of a known name. UserError: where to put the file by hand."""
    item = DOWNLOADS[name]
    try:
        with urlopen(item.url, timeout=30) as answer:
            with tqdm.wrapattr(answer, "read", total=answer.length, desc=name) as body:
                data = b"".join(iter(lambda: body.read(1 << 16), b""))
            if answer.length:
                raise ConnectionError(f"broke off {answer.length:,} bytes before the end")
    except (OSError, HTTPException) as problem:
        places = " or ".join(str(cache / form) for form in item.forms)
        raise UserError(f"--data {name}: no download from {item.url} ({problem}); run again, or "
                        f"put the file by hand at {places}") from problem
    return data


def unpack(data):
    """The first file inside a whole zip, or any other bytes as they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(archive.namelist()[0])
    except Exception:  # whatever is wrong with a zip, its own bytes fail the check
        return data


def load_download(name, cache):
    """A corpus of DOWNLOADS: from the cache, from a zip put there, or from the network; always checked."""
    item = DOWNLOADS[name]
    target = cache / item.forms[0]
    source = next((cache / form for form in item.forms if (cache / form).exists()), None)
    data = unpack(source.read_bytes() if source else download(name, cache))
    sha256 = hashlib.sha256(data).hexdigest()
    require(sha256 == item.sha256,
            f"--data {name}: {source or item.url} holds {len(data):,} bytes, SHA-256 {sha256}, "
            f"expected SHA-256 {item.sha256}; replace that file, or run again without it")
    if source != target:
        with whole_file(target) as file:
            file.write(data)
    return load_file(name, target, "SHA-256 as published", item.val_end)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Interface of the scripts


def load_corpus(name, cache=CACHE):
    """The corpus of a known name (python, shakespeare, enwik8), a file or a folder. Failures are UserErrors.

    A known name wins over a path of that name, so that a folder called python does not change the default; the path
    is then ./python.
    """
    try:
        if name == "python":
            return load_python()
        if name in DOWNLOADS:
            return load_download(name, cache)
        if os.path.isfile(name):
            return load_file(name, name, "the last 10 % validate")
        if os.path.isdir(name):
            return load_folder(name)
    except OSError as problem:
        raise UserError(f"--data {name}: {problem}") from problem
    raise UserError(f"--data {name}: no such file or folder, and the known names are "
                    f"{', '.join(KNOWN)}")


def load_tokens(name, vocab):
    """A file of token ids below vocab, the last 10 % of which validate. UserError for any other.

    .npy holds uint16 or uint32 and says which; .bin is nothing but the ids, uint16 if vocab fits, else uint32.
    """
    raw = np.uint16 if vocab <= 1 << 16 else np.uint32
    try:
        require(os.path.isfile(name), "no such file")  # open would wait for a pipe
        require(name.endswith((".npy", ".bin")), "neither .npy nor .bin")
        data = np.load(name, "r") if name.endswith(".npy") else np.memmap(name, raw, "r")
        require(data.ndim == 1 and data.dtype in (np.uint16, np.uint32) and len(data) > 1,
                f"{data.dtype} of shape {data.shape}")
        highest = data.max()
        require(highest < vocab, f"token id {highest:,} is of another tokenizer")
    except (OSError, ValueError) as problem:
        raise UserError(f"--data {name}: {problem}; a model of {vocab:,} tokens reads a row of "
                        "their ids, .npy or .bin of uint16 or uint32") from problem
    note = f"{len(data):,} token ids, the last 10 % validate; a byte is a token below"
    return split(name, data, note)


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_starts(last, stride, count, seed, epoch):
    """Where an epoch's windows begin, in the order of reading; last is the last place where one fits.

    All starts are held at once: of a file of 20 GB in windows of 128, 2.6 GB and half a minute per epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(last - stride * (count - 1) + 1)
    return offset + stride * rng.permutation(count)


def windows(data, length, batch, seed, first):
    """The windows from number `first` on, (batch, length) int64. UserError if the data is shorter than one window.

    An epoch cuts the data, from a random offset on, into windows that share one byte with the next, and reads them in
    random order. No byte is a target twice, and all but up to two windows' worth at the ends are targets. Random
    starts would leave 1/e = 37 % of the bytes unread after as many reads as there are bytes. This is a pure function
    of (seed, first), so a resumed run reads what the uninterrupted one would have read.
    """
    require(len(data) >= length, f"the data has {len(data):,} bytes, but one window needs "
                                 f"{length:,}; lower --seq_len or choose a larger --data")
    last = len(data) - length
    stride = max(length - 1, 1)
    count = max(last // stride, 1)  # one fewer than fit, so the offset has a whole window's room
    nth = range(first, first + batch)
    starts = [epoch_starts(last, stride, count, seed, i // count)[i % count] for i in nth]
    return data[np.array(starts)[:, None] + np.arange(length)].astype(np.int64)  # (batch, length)


def compressed_bpb(data):
    """Bits per byte of the data under gzip -9, bz2 -9 and xz -9: the figures that a model has to beat."""
    bpb = {}
    for name, module in {"gzip -9": "gzip", "bz2 -9": "bz2", "xz -9": "lzma"}.items():
        with suppress(ImportError):  # some Pythons are built without bz2 or xz
            compress = importlib.import_module(module).compress
            best = {"preset": 9} if module == "lzma" else {"compresslevel": 9}
            bpb[name] = 8 * len(compress(data.tobytes(), **best)) / len(data)
    return bpb
