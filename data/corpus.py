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
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from data.files import UserError, whole_file

CACHE = Path(__file__).parent / "cache"


class Corpus(NamedTuple):
    name: str
    train: np.ndarray  # (bytes,) uint8, read-only
    val: np.ndarray    # (bytes,) uint8, read-only
    note: str          # one line for the screen: what was read, what was skipped and why
    bytes_per_token: float = 1.0  # more than one where the tokens are words of byte pairs


# ---------------------------------------------------------------------------------------------------------------------
# 1. One file


def map_bytes(name, path):
    """The bytes of a file, (bytes,) uint8, read-only. UserError if there are fewer than two."""
    size = path.stat().st_size
    if size < 2:
        raise UserError(f"--data {name} has {size} bytes, one to train on and one to validate on "
                        "are the least; choose a larger file or folder")
    return np.memmap(path, np.uint8, mode="r")


def split(name, data, note, val_end=100):
    """The first 90 % of the bytes train; those from there to val_end % validate."""
    cut = len(data) * 90 // 100
    return Corpus(name, data[:cut], data[cut:len(data) * val_end // 100], note)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Many files as one: a folder, and the standard library


def gather(root, cache, objection):
    """The files below root, as sorted relative posix paths, and how many others are skipped, {reason: count}.

    objection(path) is a reason to skip a file or a whole folder, or None. The cache is skipped: a corpus that holds
    itself would grow with every run.
    """
    files = []
    skipped = Counter()
    for folder, subfolders, names in os.walk(root):
        inside = [] if Path(folder) == cache.resolve() else [*names, *subfolders]
        reasons = {name: objection(Path(folder, name)) for name in inside}
        skipped.update(reason for reason in reasons.values() if reason)
        kept = {name for name in inside if not reasons[name]}
        paths = [Path(folder, name) for name in names if name in kept]
        files += [path.relative_to(root).as_posix() for path in paths]
        subfolders[:] = [name for name in subfolders if name in kept]  # which os.walk enters
    return sorted(files), skipped


def join(root, files, label, cache):
    """The bytes of all files, one after the other, as one file of the cache, written if it is not there yet.

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
    return map_bytes(root, target)


NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def not_stdlib(path):
    """Why a file or folder is no part of the standard library, or None."""
    unwanted = path.name in NOT_STDLIB if path.is_dir() else path.suffix != ".py"
    return "not standard library" if unwanted else None


def load_python(cache):
    """The standard library's *.py files in the order of the sha1 of their paths; every 20th validates.

    So whole files validate, drawn from everywhere, and the same ones wherever that Python runs.
    """
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files, _ = gather(root, cache, not_stdlib)
    if len(files) < 20:
        raise UserError(f"--data python: {root} has {len(files)} source files, expected 20; "
                        "use --data FILE with any file of yours")
    files.sort(key=lambda file: hashlib.sha1(os.fsencode(file), usedforsecurity=False).digest())
    val = files[::20]
    train = [file for i, file in enumerate(files) if i % 20]
    version = platform.python_version()
    note = f"{len(files)} files of Python {version}'s standard library, {len(val)} of them validate"
    return Corpus("python", join(root, train, "python-train", cache),
                  join(root, val, "python-val", cache), note)


def not_text(path):
    """Why a file or folder below the one that was named is left out, or None."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():  # a link to one may be a loop
        return "linked folder" if path.is_symlink() else None
    if not path.is_file() or not os.access(path, os.R_OK):
        return "unreadable"  # or a pipe, which open would wait for
    with open(path, "rb") as file:
        return "binary" if b"\0" in file.read(8192) else None


def load_folder(name, cache):
    """The text files below a folder, in sorted order; the last 10 % of their bytes validate."""
    root = Path(name).resolve()
    files, skipped = gather(root, cache, not_text)
    left_out = ", ".join(f"{skipped[reason]} {reason}" for reason in sorted(skipped)) or "nothing"
    if not files:
        raise UserError(f"--data {name} has no text files (skipped: {left_out}); "
                        "choose another folder")
    note = f"{len(files)} files, the last 10 % of the bytes validate (skipped: {left_out})"
    return split(name, join(root, files, "folder", cache), note)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Downloads


class Download(NamedTuple):
    url: str
    forms: tuple        # names it may have in the cache: the corpus first, the download last
    size: int           # of the corpus, unpacked
    sha256: str         # likewise
    val_end: int = 100  # validation is from 90 % of the bytes to here; the rest is for a test


DOWNLOADS = {
    "shakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        ("shakespeare.txt",), 1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": Download(
        "https://mattmahoney.net/dc/enwik8.zip", ("enwik8", "enwik8.zip"), 100_000_000,
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8", val_end=95),
}


def download(name, part):
    """Downloads to part, from where an earlier try stopped. UserError: where to put the file by hand."""
    item = DOWNLOADS[name]
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    try:
        with open(part, "r+b") as file:
            have = file.seek(0, os.SEEK_END)
            request = Request(item.url, headers={"Range": f"bytes={have}-"} if have else {})
            with urlopen(request, timeout=30) as answer:
                file.seek(have if answer.status == 206 else 0)  # 200: all of it
                with tqdm.wrapattr(answer, "read", total=answer.length, desc=name) as body:
                    shutil.copyfileobj(body, file)
                if answer.length:
                    raise ConnectionError(f"broke off {answer.length:,} bytes before the end")
            file.truncate()
    except (OSError, HTTPException) as problem:
        if getattr(problem, "code", None) == 416:  # part is as long as the file, or longer
            return
        places = " or ".join(str(part.with_name(form)) for form in item.forms)
        raise UserError(f"--data {name}: no download from {item.url} ({problem}); run again to go "
                        f"on with it, or put the file by hand at {places}") from problem


def unpack(source):
    """The bytes of a file, or of the one file inside it if it is a zip. UserError for a damaged zip."""
    if not zipfile.is_zipfile(source):
        return source.read_bytes()
    try:
        with zipfile.ZipFile(source) as archive:
            member, = archive.namelist()
            return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as problem:
        raise UserError(f"{source} is not a whole zip of one file ({problem}); replace that file, "
                        "or run again without it") from problem


def load_download(name, cache):
    """A corpus of DOWNLOADS: from the cache, from a zip put there, or from the network; always checked."""
    item = DOWNLOADS[name]
    target = cache / item.forms[0]
    packed = cache / item.forms[-1]
    part = cache / f"{item.forms[-1]}.part"
    if not (target.exists() or packed.exists()):
        download(name, part)
    source = next((path for path in (target, packed) if path.exists()), part)
    try:
        data = unpack(source)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != item.sha256:
            raise UserError(f"--data {name}: {source} holds {len(data):,} bytes, SHA-256 {sha256}, "
                            f"expected {item.size:,} bytes, SHA-256 {item.sha256}; "
                            "replace that file, or run again without it")
        if source != target:
            with whole_file(target) as file:
                file.write(data)
    finally:
        part.unlink(missing_ok=True)  # spoilt, it costs one try
    note = f"{len(data):,} bytes, SHA-256 as published"
    return split(name, map_bytes(name, target), note, item.val_end)


# ---------------------------------------------------------------------------------------------------------------------
# 4. What the scripts call


def load_corpus(name, cache=CACHE):
    """The corpus of a known name (python, shakespeare, enwik8), a file or a folder. Failures are UserErrors.

    A known name wins over a path of that name, so that a folder called python does not change the default; the path
    is then ./python.
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
        what = f"it must be readable, and {cache} writable"
        raise UserError(f"--data {name}: {problem}; {what}") from problem
    found = "neither a file nor a folder" if os.path.exists(name) else "no such file or folder"
    known = ", ".join(["python", *DOWNLOADS])
    raise UserError(f"--data {name}: {found}, and the known names are {known}")


def load_tokens(name, vocab):
    """A file of token ids below vocab, the last 10 % of which validate. UserError for any other.

    .npy holds uint16 or uint32 and says which; .bin is nothing but the ids, uint16 if vocab fits, else uint32.
    """
    raw = np.uint16 if vocab <= 1 << 16 else np.uint32
    try:
        npy = name.endswith(".npy")
        data = np.load(name, mmap_mode="r") if npy else np.memmap(name, raw, mode="r")
    except (OSError, ValueError) as problem:
        raise UserError(f"--data {name}: {problem}; a model of {vocab:,} tokens reads a file of "
                        "token ids, .npy or .bin of uint16 or uint32") from problem
    if data.ndim != 1 or data.dtype not in (np.uint16, np.uint32) or len(data) < 2:
        raise UserError(f"--data {name} holds {data.dtype} of shape {data.shape}, "
                        "expected uint16 or uint32 in one row")
    if data.max() >= vocab:
        raise UserError(f"--data {name} has token id {data.max():,}, but the model has {vocab:,}; "
                        "it is another tokenizer's, or a .bin of ids of another size: write .npy")
    note = f"{len(data):,} token ids, the last 10 % validate; a byte is a token below"
    return split(name, data, note)


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def epoch_starts(last, stride, count, seed, epoch):
    """Where an epoch's windows begin, in the order of reading; last is the last place where one fits."""
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(last - stride * (count - 1) + 1)
    return offset + stride * rng.permutation(count)


def windows(data, length, batch, seed, step):
    """The windows of one training step, (batch, length) int64. UserError if the data is shorter than one window.

    An epoch cuts the data, from a random offset on, into windows that share one byte with the next, and reads them in
    random order. No byte is a target twice, and all but up to two windows' worth at the ends are targets. Random
    starts would leave 1/e = 37 % of the bytes unread after as many reads as there are bytes. This is a pure function
    of (seed, step), so a resumed run reads what the uninterrupted one would have read.
    """
    if len(data) < length:
        raise UserError(f"the data has {len(data):,} bytes, but one window needs {length:,}; "
                        "lower --seq_len or choose a larger --data")
    last = len(data) - length
    stride = max(length - 1, 1)
    count = max(last // stride, 1)  # one fewer than fit, so the offset has a whole window's room
    nth = range(step * batch, (step + 1) * batch)
    starts = [epoch_starts(last, stride, count, seed, i // count)[i % count] for i in nth]
    return data[np.array(starts)[:, None] + np.arange(length)].astype(np.int64)  # (batch, length)


COMPRESSORS = {"gzip -9": "gzip", "bz2 -9": "bz2", "xz -9": "lzma"}  # name: module


def compressed_bpb(data):
    """Bits per byte of the data under gzip -9, bz2 -9 and xz -9: the figures that a model has to beat."""
    raw = data.tobytes()
    bpb = {}
    for name, module in COMPRESSORS.items():
        try:
            compress = importlib.import_module(module).compress
        except ImportError:  # some Pythons are built without bz2 or xz
            continue
        best = {"preset": 9} if module == "lzma" else {"compresslevel": 9}
        bpb[name] = 8 * len(compress(raw, **best)) / len(raw)
    return bpb
