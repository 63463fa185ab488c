"""Verify a downloaded ledger: python verify_ledger.py DIRECTORY. Written from ledger-format.md alone.

DIRECTORY holds log/, blobs/, index/ and head.json as in the bucket. Standard library only.
Exit status: 0 fine, 1 corrupt, 2 cannot be read.
"""

import hashlib
import json
import re
import sys
from pathlib import Path


def verify(root):
    """Entries, versions, and every (object, reason) that is wrong."""
    problems, parent, index, counter, seen, blobs, announced = [], "0" * 64, 0, 0, set(), {}, {}
    commits, aliases, raw, ends = {}, {}, [], [(-1, parent)]
    names = sorted(p.name for p in (root / "log").iterdir()) if (root / "log").is_dir() else []
    problems += [(f"log/{n}", "not of this format") for n in names if not re.fullmatch(r"\d{10}\.(jsonl|sig)", n)]
    for number in range(max((int(n[:10]) for n in names if re.fullmatch(r"\d{10}\.jsonl", n)), default=-1) + 1):
        key = f"log/{number:010d}.jsonl"
        raw.append(data := (root / key).read_bytes() if (root / key).is_file() else b"")
        if not data.endswith(b"\n") or b"\r" in data:
            problems.append((key, "missing, empty, truncated or with a control character"))
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if entry["format"] != 1 or not isinstance(entry["kind"], str):
                    problems.append((key, "an entry of another format"))
                if entry["parent_hash"] != parent:
                    problems.append((key, f"entry {entry['index']} does not name the hash of the line before it"))
                if entry["index"] != index or entry["commit_id"] in seen or seen.add(entry["commit_id"]):
                    problems.append((key, f"entry {entry['index']} is out of place or repeats a commit_id"))
                if entry["kind"] == "commit":
                    if entry["counter"] != counter:
                        problems.append((key, f"counter {entry['counter']} stands where {counter} should"))
                    counter, blobs[entry["content_hash"]] = entry["counter"] + 1, entry["size"]
                    commits[entry["counter"]] = entry["content_hash"]
                    announced.pop(entry["content_hash"], None)
                elif entry["kind"] == "collect":
                    announced |= {h: [*announced.get(h, []), index] for h in entry["content_hashes"]}
                elif entry["kind"] == "spare":
                    for h in entry["content_hashes"]:
                        announced[h] = [i for i in announced.get(h, []) if i > entry["through"]]
                elif entry["kind"] == "tag":
                    aliases[entry["alias"]] = entry["content_hash"]
                    if commits.get(entry["counter"]) != entry["content_hash"]:
                        problems.append((key, f"entry {entry['index']} lets an alias name what is not before it"))
                index = entry["index"] + 1
            except (ValueError, KeyError, TypeError) as error:
                problems.append((key, f"not an entry: {error!r}"))
            parent = hashlib.sha256(line).hexdigest()
        ends.append((index - 1, parent))
    derived = {f"index/{k:010d}.json": {"format": 1, "first": 256 * k} for k in range(len(raw) // 256)}
    for wanted in derived.values():
        wanted["blocks"] = [block.decode(errors="replace") for block in raw[wanted["first"] :][:256]]
    if raw:
        derived["head.json"] = {"block": len(raw) - 1, "index": ends[-1][0], "hash": ends[-1][1]}
    for key, wanted in derived.items():
        text = json.dumps(wanted, separators=(",", ":"), ensure_ascii=False).encode()
        if not (root / key).is_file() or (root / key).read_bytes() != text:
            problems.append((key, "missing, or not what follows from the log"))
    for digest, size in blobs.items():
        path = root / "blobs" / f"{digest}.safetensors"
        if not path.is_file():
            if not announced.get(digest) or digest in (commits.get(0), *aliases.values()):
                problems.append((f"blobs/{path.name}", "missing"))
        elif path.stat().st_size != size or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            problems.append((f"blobs/{path.name}", "does not have the size or the hash that its entry says"))
    return index, counter, problems


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(print(__doc__, file=sys.stderr) or 2)
    entries, versions, found = verify(Path(sys.argv[1]))
    for where, reason in found:
        print(f"{where}: {reason}")
    print(f"{'CORRUPT' if found else 'ok'}: {entries} entries, {versions} versions, {len(found)} problems")
    sys.exit(1 if found else 0)
