"""Run compute-sanitizer over kernels/tests/sanitize.py: python scripts/sanitize.py [--tools ...] [--parts ...].

Every tool runs over every part in a process of its own, ``--jobs`` at a time; results/sanitizers.json has a row for
each as soon as it ends. ``errors`` and ``warnings`` are those of the tool, ``finished`` says whether the part ran to
its end, which it does not where ``--seconds`` are over before, ``cases`` how many cases it began, and ``first`` is the
first thing found; the rows of part "all" sum up. What the tools print is under ``--logs``. All but initcheck look at
this package's kernels alone (kernels/tests/sanitize.py says why). Where the repository's history is missing, the
environment variables KERNELS_TREE and GIT_COMMIT tell what ran.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from convfirst.app.results import REPOSITORY, environment, git_object, write_json

RESULTS = Path(REPOSITORY / "results/sanitizers.json")
PROGRAM = REPOSITORY / "kernels/tests/sanitize.py"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Those that take longest come first.
PARTS = ("backward", "chunked_backward", "direct", "winograd", "blocks", "patches", "stages", "mbconv", "few_pixels")
OURS = ["--kernel-name", "kns=convfirst"]
BRIEF = ["--show-backtrace", "no", "--print-limit", "10000"]  # a report with the host's frames takes half a second
SUMMARY = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: \d+ hazards? displayed \()(\d+) errors?(?:, (\d+) warn)?")
# initcheck takes what bulk copies (TMA) wrote for uninitialised: of the block it checks the portable kernels alone, and
# not the backward, between whose launches tensors pass that were written so.
PATHS = {("initcheck", "blocks"): "sm80"}
LEFT_OUT = {("initcheck", "backward"), ("initcheck", "chunked_backward")}
KINDS = "Host API|Invalid|Error|Warning|Uninitialized|Barrier|Divergent|Race|Potential|Program hit"
FOUND = re.compile(rf"^========= ((?:{KINDS}).*)")  # a line that begins a report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS, help="default: all")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=1800, help="after which what still runs is stopped")
    parser.add_argument("--logs", type=Path, help="folder for what the tools print; default: one that is removed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    here = {**environment(), "kernels_tree": git_object("HEAD:kernels", variable="KERNELS_TREE")}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in check_all(options, options.logs or Path(folder)):
            print(json.dumps(row), flush=True)
            rows.append(row)
            rows.sort(key=lambda row: (TOOLS.index(row["tool"]), PARTS.index(row["part"])))
            write_json(options.output, {"suite": "sanitizers", **here, "rows": rows + totals(rows)})
    clean = all(row["finished"] and not row["errors"] and not row["warnings"] for row in rows)
    print(f"wrote {options.output}: {'nothing found' if clean else 'not clean'}")
    return int(not clean)


def totals(rows: list[dict]) -> list[dict]:
    """A row for each tool over all its parts, whose ``seconds`` are the longest part's."""
    found = []
    for tool in dict.fromkeys(row["tool"] for row in rows):
        parts = [row for row in rows if row["tool"] == tool]
        sums = {key: sum(row[key] for row in parts) for key in ("cases", "errors", "warnings")}
        ended = sum(row["finished"] for row in parts)
        found.append({"tool": tool, "part": "all", "parts": len(parts), "parts_finished": ended, **sums})
        found[-1] |= {"finished": ended == len(parts), "first": next((r["first"] for r in parts if r["first"]), None)}
        found[-1]["seconds"] = max(row["seconds"] for row in parts)
    return found


def check_all(options: argparse.Namespace, logs: Path) -> Iterator[dict]:
    """Rows as the processes end; those of a part are started together."""
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    pairs = [(tool, part) for part in options.parts for tool in options.tools if (tool, part) not in LEFT_OUT]
    waiting = [Check(tool, part, logs / f"{tool}-{part}.log") for tool, part in pairs]
    running: list[Check] = []
    try:
        while waiting or running:
            out_of_time = time.monotonic() - start > options.seconds
            while waiting and (len(running) < options.jobs or out_of_time):
                running.append(waiting.pop(0))
                if not out_of_time:
                    running[-1].begin()
            for check in [check for check in running if out_of_time or check.ended()]:
                running.remove(check)
                yield check.row()
            time.sleep(0.1)
    finally:
        for check in running:
            check.stop()


class Check:
    """One tool over one part."""

    def __init__(self, tool: str, part: str, log: Path) -> None:
        self.tool, self.part, self.log = tool, part, log
        self.process: subprocess.Popen | None = None
        self.start = time.monotonic()

    def begin(self) -> None:
        command = ["compute-sanitizer", "--tool", self.tool, *BRIEF, *([] if self.tool == "initcheck" else OURS)]
        command += [sys.executable, str(PROGRAM), "--part", self.part, "--path", PATHS.get((self.tool, self.part), "")]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.start = time.monotonic()
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """The tool and the program that it runs."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def row(self) -> dict:
        code = self.process and self.process.poll()
        seconds = round(time.monotonic() - self.start, 1) if self.process else 0.0
        self.stop()
        found = read(self.log.read_text() if self.process else "", code)
        return {"tool": self.tool, "part": self.part, **found, "seconds": seconds}


def read(log: str, code: int | None) -> dict:
    """What a tool found, by its log; ``code`` is its exit status, None where it did not end.

    A tool that did not reach its summary counts what it printed so far.
    """
    lines = log.splitlines()
    found = [match[1].strip() for line in lines if (match := FOUND.match(line))]
    warnings = sum(line.startswith("Warning") for line in found)
    errors = len(found) - warnings
    for summary in SUMMARY.finditer(log):
        errors, warnings = int(summary[1]), int(summary[2] or 0)
    done = bool(re.search(r"^ *[\d.]+ s  done$", log, re.MULTILINE))
    cases = len(re.findall(r"^ *[\d.]+ s  (?!done$)", log, re.MULTILINE))
    first = found[0] if found else next((line for line in lines if re.match(r"\w*Error\b", line)), None)
    row = {"cases": cases, "errors": errors, "warnings": warnings, "finished": done and code == 0}
    return {**row, "first": first and first[:200]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
