"""The result's document: what others read stays as it is, whatever the result is made of."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import Any

from kvm_clone import Consistency, DiskResult, PointInTime, Result, Transfer
from kvm_clone.cli.output import print_json, result_document
from kvm_clone.findings import Finding, Severity

DISK = {
    "target": "vda",
    "source": "/a/web.qcow2",
    "destination": "/b/web.qcow2",
    "format": "qcow2",
    "virtual_size": 1 << 30,
    "data": 1 << 20,
    "sent": 4096,
    "method": "bitmap",
}
TRANSFER = {
    "route": "direct",
    "route_reason": "faster",
    "bytes_sent": 1,
    "bytes_resent": 2,
    "bytes_reused": 3,
    "bytes_compared": 4,
    "copy_seconds": 0.5,
    "prove_seconds": 0.25,
}
POINT = {"consistency": "filesystem", "frozen_seconds": 0.125, "scratch_bytes": 5, "checkpoint": "kvm-clone-1"}
ABOUT = {
    "operation": "0f",
    "source": "kc-a",
    "destination": "kc-b",
    "vm": "web",
    "name": "web-2",
    "uuid": "u",
    "changed": True,
    "verified": True,
    "proof": "sent",
}
KEYS = [
    *("operation", "source", "destination", "vm", "name", "uuid", "changed", "verified", "proof", "route"),
    *("route_reason", "disks", "bytes_sent", "bytes_resent", "bytes_reused", "bytes_compared", "consistency"),
    *("frozen_seconds", "scratch_bytes", "checkpoint", "hint", "seconds", "copy_seconds", "prove_seconds"),
    *("findings", "warnings", "removed"),
]


def printed(result: Result) -> dict[str, Any]:
    with redirect_stdout(io.StringIO()) as out:
        print_json(result_document(result))
    document: dict[str, Any] = json.loads(out.getvalue())
    return document


def test_the_document_is_flat_and_has_these_keys() -> None:
    finding = Finding("a-code", Severity.WARNING, "text", "remedy")
    point = {**POINT, "consistency": Consistency.FILESYSTEM}
    result = Result(
        **ABOUT,  # type: ignore[arg-type]
        disks=(DiskResult(**DISK),),  # type: ignore[arg-type]
        transfer=Transfer(**TRANSFER),  # type: ignore[arg-type]
        point_in_time=PointInTime(**point, no_bitmap_reason="it is gone"),  # type: ignore[arg-type]
        seconds=9.5,
        findings=(finding,),
        warnings=("beware",),
        removed=("/b/old",),
    )
    document = printed(result)
    assert list(document) == KEYS
    assert document.pop("findings")[0]["code"] == "a-code"
    assert document == {
        **ABOUT,
        **TRANSFER,
        **POINT,
        "hint": "it is gone",
        "disks": [DISK],
        "seconds": 9.5,
        "warnings": ["beware"],
        "removed": ["/b/old"],
    }
