"""Files of weights -> {name: tensor}. Whatever a file holds, reading it ends in tensors or in one line, never in code.

    safetensors        8 bytes of length, a JSON header {name: dtype, shape, offsets}, the tensors' bytes
    torch (.bin, .pt)  unpickled with weights_only: no code of a file ever runs
    *.index.json       {name: file}, where a checkpoint is cut into several files
    *.json             an object
"""
import json
import math
import os

import torch

from data.files import UserError

FORMAT = "bytestate-1"  # what our own files call themselves
FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json",
         "model.safetensors", "pytorch_model.bin")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def find(folder):
    """The file of a published checkpoint: a well-known name, or else the only file that ends like one, or None."""
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    others = [path for path in folder.iterdir() if path.suffix in ENDINGS]
    return others[0] if len(others) == 1 else None


def read_json(text):
    """The object that a JSON text holds."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} where an object was expected")
    return found


def read_safetensors(path):
    """{name: tensor}, each read straight into its own memory, all together as large as the file."""
    tensors = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = os.fstat(file.fileno()).st_size - 8 - length
        if room < 0:
            raise ValueError(f"a header of {length:,} bytes is longer than the file")
        header = read_json(file.read(length))
        header.pop("__metadata__", None)
        begin = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = DTYPES[entry["dtype"]]
            shape = entry["shape"]
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"{name} has shape {shape}")
            end = begin + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin, end] or end > room:
                raise ValueError(f"{name} has {entry}, expected bytes {begin} to {end} of {room}")
            tensors[name] = torch.empty(shape, dtype=dtype)
            file.readinto(tensors[name].flatten().view(torch.uint8).numpy())
            begin = end
    if begin != room:
        raise ValueError(f"{room - begin:,} bytes after the last tensor")
    return tensors


def write_safetensors(tensors, file):
    """The same backwards; the tensors' bytes begin at a multiple of 8."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        begin = end
        end += t.numel() * t.itemsize
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape),
                        "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def named_tensors(path, content):
    """content, if it is {name: tensor}, each a plain one whose memory is as large as its shape says."""
    wanted = f"expected {FORMAT} or named tensors"
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, {wanted}")
    for name, t in content.items():
        plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_quantized
        whole = plain and t.numel() * t.itemsize <= t.untyped_storage().nbytes()
        if not (whole and isinstance(name, str) and name.isprintable()):
            raise UserError(f"{path}: {str(name)[:80]!r} is {type(t).__name__}, {wanted}")
    return content


def some(names):
    """The first four names, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def read_shards(index):
    """{name: tensor} of all the files that an index names."""
    where = read_json(index.read_bytes())["weight_map"]
    tensors = {}
    for file in sorted(set(where.values())):
        path = index.with_name(file)
        shard = named_tensors(path, read_file(path))
        if twice := shard.keys() & tensors.keys():
            raise ValueError(f"{file} repeats an earlier file's {some(twice)}")
        tensors |= shard
    if tensors.keys() != where.keys():
        raise ValueError(f"its files differ from it in {some(tensors.keys() ^ where.keys())}")
    return tensors


def read_file(path):
    """The content of one file, by its ending; UserError for whatever is wrong with it."""
    try:
        with open(path, "rb") as file:
            start = file.read(11)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    if start == b"version htt":
        raise UserError(f"{path} is only a pointer to the file; fetch it: git lfs pull")
    try:
        if path.name.endswith(".index.json"):
            return read_shards(path)
        if path.suffix == ".json":
            return read_json(path.read_bytes())
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # the unpickler meets foreign bytes with any error there is
        size = path.stat().st_size
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{path}, {size:,} bytes, is not a checkpoint, "
                        f"or is cut short ({why})") from e
