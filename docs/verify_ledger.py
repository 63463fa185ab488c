"""Verify a downloaded ledger: python verify_ledger.py DIRECTORY [INDEX:HASH]. Written from ledger-format.md alone.

DIRECTORY holds log/, blobs/, index/ and head.json as in the bucket. INDEX:HASH is an entry that was there before.
Standard library only. Exit status: 0 fine, 1 corrupt, 2 cannot be read.
"""

import hashlib
import json
import re
import sys
from datetime import datetime
from pathlib import Path

HASH = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})")
ALIAS = re.compile(r"(?!head\Z|v[0-9]{10}\Z|[0-9a-f]{8,64}\Z)[A-Za-z][A-Za-z0-9._-]{0,63}")


def whole(value, least=0):
    return type(value) is int and least <= value < 2**64


def digest(value):
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def text(value):
    return isinstance(value, str)


def number(value):
    return type(value) in (int, float)


def every(kind):
    return lambda value: isinstance(value, list | dict) and all(map(kind, inner(value)))


def none_or(kind):
    return lambda value: value is None or kind(value)


def inner(value):
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


EVERY = {
    "format": lambda value: whole(value) and value == 1, "index": whole, "kind": text, "parent_hash": digest,
    "timestamp": lambda value: text(value) and TIME.fullmatch(value) and datetime.fromisoformat(value),
    "commit_id": text,
}  # fmt: skip
OPTIONAL = {"block": whole, "last_collect": lambda value: whole(value, -1)}
KINDS = {
    "commit": {
        "counter": whole, "content_hash": digest, "size": whole, "experiment": text,
        "step": lambda value: whole(value, -(2**63)), "loss": none_or(number),
        "metrics": lambda value: isinstance(value, dict) and every(number)(value),
        "message": text, "resumed_from": none_or(text),
    },
    "tag": {
        "alias": lambda value: text(value) and ALIAS.fullmatch(value), "counter": none_or(whole),
        "content_hash": none_or(digest), "message": text,
    },
    "collect": {"content_hashes": lambda value: isinstance(value, list) and every(digest)(value)},
    "spare": {"through": lambda value: whole(value, -1)},
}  # fmt: skip
KINDS["spare"] |= KINDS["collect"]
LEFT_OUT = {
    "commit": {
        "model_hash": none_or(digest), "parameters": lambda value: isinstance(value, dict),
        "plan_end": none_or(whole), "pruned": lambda value: isinstance(value, bool),
    }
}  # fmt: skip


def parse(line):
    """The entry in a line. Raises: ValueError saying what is wrong with it, by itself."""
    if not line.endswith(b"\n") or b"\r" in line:
        raise ValueError("truncated, or with a control character")
    try:
        entry = json.loads(line.decode(), parse_constant=int)
        # A lone surrogate is no Unicode, and an infinite number no JSON.
        json.dumps(entry, allow_nan=False, ensure_ascii=False).encode()
        if depth(entry) > 64 or not finite(entry):
            raise ValueError("nested too deep, or a number too large")
    except (RecursionError, OverflowError) as error:
        raise ValueError(repr(error)) from None
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    kind = entry["kind"] if text(entry.get("kind")) else ""
    for name, is_right in (OPTIONAL | LEFT_OUT.get(kind, {}) | EVERY | KINDS.get(kind, {})).items():
        may_miss = name in OPTIONAL or name in LEFT_OUT.get(kind, {})
        if not (is_right(entry[name]) if name in entry else may_miss):
            raise ValueError(f"{name} is missing or wrong")
    if entry["kind"] == "tag" and (entry["counter"] is None) != (entry["content_hash"] is None):
        raise ValueError("counter and content_hash go together")
    if entry["kind"] == "spare" and entry["through"] >= entry["index"]:
        raise ValueError("through is not before the entry")
    return entry


def depth(value):
    return 1 + max(map(depth, inner(value)), default=0) if isinstance(value, dict | list) else 0


def finite(value):
    return all(map(finite, inner(value))) and (type(value) is not int or abs(value) <= sys.float_info.max)


class Log:
    """Follows a log entry by entry. `problems` are (object, reason)."""

    def __init__(self):
        self.problems, self.hashes, self.versions, self.commit_ids = [], [], [], set()
        self.parent, self.index, self.last_collect = "0" * 64, 0, -1
        self.aliases, self.announced = {}, {}

    def block(self, number, data):
        """Take in the bytes of a block."""
        key, collects = f"log/{number:010d}.jsonl", False
        if not data:
            self.problems.append((key, "missing or empty"))
        for line in re.findall(rb"[^\n]*\n|[^\n]+\Z", data):
            try:
                entry = parse(line)
                collects |= entry["kind"] == "collect"
                for reason in self.wrong(entry, number):
                    self.problems.append((key, f"entry {entry['index']} {reason}"))
                self.take(entry)
            except ValueError as error:
                self.problems.append((key, f"not an entry: {error}"))
            self.parent = hashlib.sha256(line).hexdigest()
            self.hashes.append(self.parent)
        self.last_collect = number if collects else self.last_collect

    def wrong(self, entry, number):
        """What contradicts the entries before it."""
        if entry["parent_hash"] != self.parent:
            yield "does not name the hash of the line before it"
        if entry["index"] != self.index or entry.get("block", number) != number:
            yield f"stands where entry {self.index} of block {number} should"
        if entry.get("last_collect", self.last_collect) != self.last_collect:
            yield f"names another newest collection than {self.last_collect}"
        if entry["commit_id"] in self.commit_ids:
            yield "repeats a commit_id"
        if entry["kind"] == "commit" and entry["counter"] != len(self.versions):
            yield f"has a counter that should be {len(self.versions)}"
        if entry["kind"] == "tag" and entry["counter"] is not None:
            named = self.versions[entry["counter"] : entry["counter"] + 1]
            if not named or named[0]["content_hash"] != entry["content_hash"]:
                yield "lets an alias name what is not before it"

    def take(self, entry):
        self.index = entry["index"] + 1
        self.commit_ids.add(entry["commit_id"])
        if entry["kind"] == "commit":
            self.versions.append(entry)
            self.announced.pop(entry["content_hash"], None)
        elif entry["kind"] == "tag":
            self.aliases[entry["alias"]] = entry["content_hash"]
        elif entry["kind"] == "collect":
            self.announced |= {h: [*self.announced.get(h, []), entry["index"]] for h in entry["content_hashes"]}
        elif entry["kind"] == "spare":
            for h in entry["content_hashes"]:
                self.announced[h] = [i for i in self.announced.get(h, []) if i > entry["through"]]


def end_of(numbers):
    """How many blocks a log has. What stands behind a gap of more than 256 was never part of it."""
    end = 0
    for number in sorted(numbers):
        end = number + 1 if number - end <= 256 else end
    return end


def model_hash(file):
    """SHA-256 of a checkpoint's header and of what a prediction reads of it; None if it is no safetensors file."""
    size = 8 + int.from_bytes(file[:8], "little")
    try:
        places = {name: place["data_offsets"] for name, place in json.loads(file[8:size]).items() if name[:2] != "__"}
        spans = sorted(place for name, place in places.items() if name.startswith(("model.", "scaling.")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not any(name.startswith("model.") for name in places):
        return None
    return hashlib.sha256(b"".join([file[:size], *(file[size + a : size + b] for a, b in spans)])).hexdigest()


def verify(root, since=None):
    """Entries, versions, and every (object, reason) that is wrong."""
    log = Log()
    names = sorted(p.name for p in (root / "log").iterdir()) if (root / "log").is_dir() else []
    numbers = {int(name[:10]) for name in names if re.fullmatch(r"[0-9]{10}\.jsonl", name)}
    blocks = []
    for number in range(end_of(numbers)):
        path = root / f"log/{number:010d}.jsonl"
        blocks.append(path.read_bytes() if path.is_file() else b"")
        log.block(number, blocks[-1])
    problems = [(f"log/{n}", "not of this format") for n in names if not re.fullmatch(r"[0-9]{10}\.(jsonl|sig)", n)]
    problems += [(f"log/{n:010d}.jsonl", "not a block of this log") for n in sorted(numbers) if n >= len(blocks)]
    problems += log.problems
    derived = {f"index/{k:010d}.json": {"format": 1, "first": 256 * k} for k in range(len(blocks) // 256)}
    for wanted in derived.values():
        wanted["blocks"] = [block.decode(errors="replace") for block in blocks[wanted["first"] :][:256]]
    if blocks:
        derived["head.json"] = {"block": len(blocks) - 1, "index": log.index - 1, "hash": log.parent}
    for key, wanted in derived.items():
        expected = json.dumps(wanted, separators=(",", ":"), ensure_ascii=False).encode()
        if not (root / key).is_file() or (root / key).read_bytes() != expected:
            problems.append((key, "missing, or not what follows from the log"))
    of_model = {}
    kept = {*log.aliases.values(), *(version["content_hash"] for version in log.versions[:1])}
    for content_hash, size in {v["content_hash"]: v["size"] for v in log.versions}.items():
        path = root / f"blobs/{content_hash}.safetensors"
        if not path.is_file():
            if not log.announced.get(content_hash) or content_hash in kept:
                problems.append((f"blobs/{path.name}", "missing"))
        elif path.stat().st_size != size or hashlib.sha256(path.read_bytes()).hexdigest() != content_hash:
            problems.append((f"blobs/{path.name}", "does not have the size or the hash that its entry says"))
        else:
            of_model[content_hash] = model_hash(path.read_bytes())
    for version in log.versions:
        told = version.get("model_hash")
        if told is not None and told != of_model.get(version["content_hash"], told):
            problems.append((f"blobs/{version['content_hash']}.safetensors", "its model is not what its entry says"))
    if since is not None and log.hashes[since[0] : since[0] + 1] != [since[1]]:
        problems.append(("head.json", f"entry {since[0]}, which was there, is not, or is another"))
    return len(log.hashes), len(log.versions), problems


if __name__ == "__main__":
    before = re.fullmatch(r"([0-9]+):([0-9a-f]{64})", sys.argv[2]) if len(sys.argv) == 3 else None
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_dir() or (len(sys.argv) == 3 and not before):
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    entries, versions, found = verify(Path(sys.argv[1]), before and (int(before[1]), before[2]))
    for where, reason in found:
        print(f"{where}: {reason}")
    print(f"{'CORRUPT' if found else 'ok'}: {entries} entries, {versions} versions, {len(found)} problems")
    sys.exit(1 if found else 0)
