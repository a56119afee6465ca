"""Runs nvcc on one source, keeps what ptxas says about each kernel, and fails on a register spill.

``compile --object OUT [--spills-allowed] -- nvcc ...`` writes OUT, OUT.d (make dependencies) and OUT.json:
{mangled kernel name: {architecture: {registers, spill_stores, spill_loads, stack, static_shared_memory}}}.
``merge OUT FILES...`` joins such tables into one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'")
SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers")
SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


def parse_ptxas(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """Resources of each entry function in a ``ptxas -v`` log, by kernel and architecture."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    row: dict[str, int] = {}
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            row = table.setdefault(entry["name"], {}).setdefault(entry["arch"], {})
        elif spills := SPILLS.search(line):
            # Not set twice: after the entry's own line may follow those of functions that were not inlined.
            row.setdefault("stack", int(spills["stack"]))
            row.setdefault("spill_stores", int(spills["stores"]))
            row.setdefault("spill_loads", int(spills["loads"]))
        elif used := USED.search(line):
            row["registers"] = int(used["registers"])
            shared = SHARED.search(line)
            row["static_shared_memory"] = int(shared["bytes"]) if shared else 0
    return table


def spilling(table: dict) -> list[str]:
    return [
        f"{name} for {arch}: {row['spill_stores']} bytes of spill stores, {row['spill_loads']} of loads"
        for name, rows in table.items()
        for arch, row in rows.items()
        if row.get("spill_stores", 0) or row.get("spill_loads", 0)
    ]


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def compile_source(command: list[str], target: Path, spills_allowed: bool) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*command, "-o", str(target), "-MD", "-MF", f"{target}.d", "-MT", str(target), "-Xptxas", "-v"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    noise = re.compile(r"^ptxas info|bytes stack frame|^$|Used \d+ registers|Function properties")
    print("\n".join(line for line in done.stdout.splitlines() if not noise.search(line)), end="")
    if done.returncode:
        return done.returncode
    table = parse_ptxas(done.stdout)
    found = [] if spills_allowed else spilling(table)
    # ptxas serialises wgmma where it cannot prove the accumulators untouched: C7510 to C7515.
    found += re.findall(r".*\(C751[0-5]\).*|.*wgmma.*serializ.*", done.stdout)
    if found:
        target.unlink()
        print(f"{target.stem}: kernels spill registers or serialise wgmma:", *found, sep="\n  ", file=sys.stderr)
        return 1
    write(Path(f"{target}.json"), json.dumps(table, indent=1, sort_keys=True))
    return 0


def merge(out: Path, files: list[Path]) -> int:
    table: dict[str, dict] = {}
    for file in files:
        for name, rows in json.loads(file.read_text()).items():
            table.setdefault(name, {}).update(rows)
    write(out, json.dumps(table, indent=1, sort_keys=True))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    one = commands.add_parser("compile")
    one.add_argument("--object", type=Path, required=True)
    one.add_argument("--spills-allowed", action="store_true")
    one.add_argument("command", nargs=argparse.REMAINDER)
    many = commands.add_parser("merge")
    many.add_argument("out", type=Path)
    many.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.action == "merge":
        return merge(arguments.out, arguments.files)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    return compile_source(command, arguments.object, arguments.spills_allowed)


if __name__ == "__main__":
    sys.exit(main())
