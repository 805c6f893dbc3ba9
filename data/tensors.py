"""Files of weights -> {name: tensor}. Whatever a file holds, reading it ends in tensors or in one line, never in code.

    safetensors        8 bytes of length, a JSON header {name: dtype, shape, offsets}, the tensors' bytes
    torch (.bin, .pt)  unpickled with weights_only: no code of a file ever runs
    *.index.json       {name: file}, where a checkpoint is cut into several files
    *.json             an object
"""
import json
import math
import os
import pickle

import torch

from data.files import UserError, require

FORMAT = "bytestate-1"  # what our own files call themselves
FILES = ("best.pt", "last.pt", "model.safetensors.index.json", "pytorch_model.bin.index.json",
         "model.safetensors", "pytorch_model.bin")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def find(path):
    """The file that path is, or in a folder the first of FILES, or else the only file that ends like one."""
    advice = f"; train one: python train.py --out {path.parent if path.suffix == '.pt' else path}"
    require(path.exists(), f"no checkpoint at {path}{advice}")
    if not path.is_dir():
        return path
    known = [path / name for name in FILES if (path / name).exists()]
    found = known[:1] or [file for file in path.iterdir() if file.suffix in ENDINGS]
    require(len(found) == 1, f"no {', '.join(FILES)} in {path}{advice}")
    return found[0]


def some(names):
    """The first four names, and how many more there are; in ASCII, since a foreign file's may hold line ends."""
    names = sorted(ascii(str(name))[1:-1] for name in names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def read_safetensors(path):
    """{name: tensor}, each read straight into its own memory, all together as large as the file."""
    tensors = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        room = os.fstat(file.fileno()).st_size - 8 - length
        require(room >= 0, f"{path} is shorter than its header of {length:,} bytes")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = DTYPES[entry["dtype"]]
            end = begin + math.prod(entry["shape"]) * dtype.itemsize
            place = [begin, end]
            require(entry["data_offsets"] == place and end <= room,
                    f"{path}: {some([name])} has {entry}, expected bytes {place} of {room}")
            tensors[name] = torch.empty(entry["shape"], dtype=dtype)
            file.readinto(tensors[name].flatten().view(torch.uint8).numpy())
            begin = end
    require(begin == room, f"{path} has {room - begin:,} bytes after the last tensor")
    return tensors


def write_safetensors(tensors, file):
    """The same backwards; the tensors' bytes begin at a multiple of 8."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, t in tensors.items():
        end = begin + t.numel() * t.itemsize
        header[name] = dict(dtype=names[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
        begin = end
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for t in tensors.values():
        file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_shards(index):
    """{name: tensor} of all the files that an index names."""
    where = json.loads(index.read_bytes())["weight_map"]
    tensors = {}
    for file in sorted(set(where.values())):
        require(file.endswith(ENDINGS) and index.with_name(file).is_file(),
                f"{index} names {some([file])}, which is missing or holds no tensors")
        shard = read_file(index.with_name(file))
        wrong = shard.keys() ^ {name for name in where if where[name] == file}
        require(not wrong, f"{index} and {file} differ in {some(wrong)}")
        tensors |= shard
    return tensors


def read_file(path):
    """The content of one file, by its ending; UserError for whatever is wrong with it."""
    require(path.is_file(), f"{path} is no file")  # open would wait for a pipe
    try:
        with open(path, "rb") as file:
            require(file.read(11) != b"version htt",
                    f"{path} is only a pointer to the file; fetch it: git lfs pull")
        if path.name.endswith(".index.json"):
            return read_shards(path)
        if path.suffix == ".json":
            return json.loads(path.read_bytes())
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # the unpickler meets foreign bytes with any error there is
        why = type(e).__name__
        if not isinstance(e, pickle.UnpicklingError):  # torch's advice there is to run the file's code
            why = " ".join(f"{why}: {e}".split())[:200]
        raise UserError(f"{path}, {path.stat().st_size:,} bytes, is not a checkpoint, "
                        f"or is cut short ({why})") from e
