"""A valid file in; the same file changed in one to three ways out: values of its JSON, or bytes."""

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 1e308, -1e-300, float("nan")),
    *(float("inf"), "", "x", "\x1b[2J\x00", "../..", "é" * 300, "(a+)+$", "wq", [], {}, [[]]),
    *([1, 2, 3], {"a": {"b": []}}, ["wq", None], [float("nan")] * 3, "9" * 5000),
]


def changed_json(value: Any, rng: random.Random) -> Any:
    """Return JSON with one value replaced, removed, doubled or nested."""
    value = copy.deepcopy(value)
    place, key = value, None
    while isinstance(place, (dict, list)) and place:
        key = rng.choice([*place] if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if key is None:
        return rng.choice(ODD)
    how = rng.random()
    if how < 0.15:
        del place[key]
    elif how < 0.25 and isinstance(place, dict):
        place[f"{key}{rng.choice('_ 0')}"] = place[key]
    elif how < 0.3:
        for _ in range(rng.choice((5, 2000))):
            place[key] = [place[key]]
    else:
        place[key] = copy.deepcopy(rng.choice(ODD))
    return value


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes of which some are flipped, cut off, zeroed, doubled or inserted."""
    found, how = bytearray(content), rng.randrange(5)
    at = rng.randrange(max(1, len(found)))
    if how == 0:
        for _ in range(rng.choice((1, 1, 8, 64))):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del found[at:]
    elif how == 2:
        found[at : at + 64] = bytes(min(64, len(found) - at))
    elif how == 3:
        found[at:at] = found[at : at + 64]
    else:
        found[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    return bytes(found)


def changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with another header, or with numbers that are none."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if rng.random() < 0.3 and body:  # 0xff is no number in any format of floats
        at = 4 * rng.randrange(len(body) // 4)
        body[at : at + 4] = b"\xff\xff\xff\xff"
    elif rng.random() < 0.6 and "__metadata__" in header:
        own = header["__metadata__"]
        key = rng.choice([*own])
        try:
            own[key] = json.dumps(changed_json(json.loads(own[key]), rng))
        except ValueError:
            own[key] = str(rng.choice(ODD))
    else:
        header = changed_json(header, rng)
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + bytes(body)


def change(path: Path, rng: random.Random) -> None:
    """Change a file in one to three ways."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = path.read_bytes()
        try:
            if path.suffix == ".json" and rng.random() < 0.8:
                changed = json.dumps(changed_json(json.loads(content), rng)).encode()
            elif path.suffix == ".safetensors" and rng.random() < 0.7:
                changed = changed_tensors(content, rng)
            else:
                changed = changed_bytes(content, rng)
        except (ValueError, struct.error, LookupError, TypeError, RecursionError):
            changed = changed_bytes(content, rng) if content else b"x"
        path.write_bytes(changed)
