"""What Linux says of files that are mapped into this process, and files that are large but cheap to write."""

import json
import re
from pathlib import Path

import torch


def permissions(path: Path) -> set[str]:
    """Of the mappings of a file in this process, as the system writes them: "r--s" is shared and only read."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[1] for line in lines if line.endswith(str(path))}


def data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Write a float32 safetensors file of holes; returns where its first tensor begins."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text)


def mapped_bytes(path: Path) -> int:
    """Of a file that are mapped into this process."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            begin, end = line.split()[0].split("-")
            total += int(end, 16) - int(begin, 16)
    return total
