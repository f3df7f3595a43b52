"""Errors and results as text and as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvm_clone.errors import ExitCode, KvmCloneError, OutputError
from kvm_clone.results import Result

_UNPAIRED = re.compile("[\ud800-\udfff]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def print_json(document: Any) -> None:
    """Print a command's one document on stdout, in ASCII. It is valid JSON whatever names are in it.

    Python keeps a byte of a path that is not UTF-8 as half of a surrogate pair, which JSON does not allow. It is
    printed as its escape, as text, like on stderr.
    """
    text = json.dumps(document, indent=2, default=str, ensure_ascii=False)
    text = _UNPAIRED.sub(lambda found: rf"\\u{ord(found[0]):04x}", text)
    print(_NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text))


_RESULT_KEYS = (
    *("operation", "source", "destination", "vm", "name", "uuid", "changed", "verified", "proof"),
    *("route", "route_reason", "disks", "bytes_sent", "bytes_resent", "bytes_reused", "bytes_compared"),
    *("consistency", "frozen_seconds", "scratch_bytes", "checkpoint", "hint", "seconds", "copy_seconds"),
    *("prove_seconds", "findings", "warnings", "removed"),
)
"""The result's document, flat and in this order: others read it."""


def result_document(result: Result) -> dict[str, Any]:
    """The result of a clone or sync as a JSON object."""
    known = asdict(result)
    known |= {**known["transfer"], **known["point_in_time"]}
    known["hint"] = known["no_bitmap_reason"]
    return {key: known[key] for key in _RESULT_KEYS}


def json_wanted(argv: Sequence[str]) -> bool:
    """Whether the command line asks for JSON. For errors that occur before it is parsed."""
    words = list(argv[: argv.index("--")] if "--" in argv else argv)
    pairs = zip(words, [*words[1:], ""], strict=True)
    return any(word == "--output=json" or (word, after) == ("--output", "json") for word, after in pairs)


def error_document(error: KvmCloneError) -> dict[str, Any]:
    """The error as a JSON object."""
    document: dict[str, Any] = {
        "type": type(error).__name__,
        "exit_code": int(error.exit_code),
        "message": str(error),
        "subject": error.subject,
        "remedy": error.remedy,
    }
    if error.findings:
        document["findings"] = [asdict(finding) for finding in error.findings]
    return document


def report(error: KvmCloneError, *, as_json: bool) -> None:
    """Print the error and its remedy on stderr, and with `as_json` also as a document on stdout."""
    if as_json:
        print_json({"error": error_document(error)})
    if len(error.findings) > 1:
        print("kvm-clone: refused, nothing was written:", file=sys.stderr)
        for finding in error.findings:
            print(f"  - {finding.text}", file=sys.stderr)
            if finding.remedy:
                print(f"    {finding.remedy}", file=sys.stderr)
        return
    print(f"kvm-clone: {error}", file=sys.stderr)
    if error.remedy:
        print(f"  what to do: {error.remedy}", file=sys.stderr)


def lost(failure: OSError) -> OutputError:
    """The error of a command that has done its work and could not print the result."""
    return OutputError(
        f"everything was done, but the result could not be written to stdout: {failure.strerror}",
        subject="stdout",
        remedy="write stdout to a place that takes it; the command need not be run again",
    )


def report_usage() -> None:
    """Print the document for a command line that cannot be understood. Its text is on stderr already."""
    print_json(
        {
            "error": {
                "type": "UsageError",
                "exit_code": int(ExitCode.USAGE),
                "message": "the command line cannot be understood; stderr says why",
                "subject": "",
                "remedy": "see kvm-clone --help",
            }
        }
    )


def report_bug(error: Exception, *, as_json: bool) -> None:
    """Report an unexpected exception as one error. The traceback is logged for --log-level debug."""
    logging.getLogger(__name__).debug("unexpected", exc_info=error)
    text = f"unexpected {type(error).__name__}: {error}"
    report(
        KvmCloneError(text, remedy="this is a bug: please report it with the output of --log-level debug"),
        as_json=as_json,
    )
