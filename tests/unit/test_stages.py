"""What an interruption means at each stage: a frozen table, and the same rows in the documentation."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from kvm_clone.execution.stages import TABLE, Cancelled, Failure, Lost, Row, Stage

DESIGN = (Path(__file__).parents[2] / "docs/design.md").read_text()


def test_every_stage_has_a_row_in_order() -> None:
    assert list(TABLE) == list(Stage)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TABLE[Stage.LOOKING] = TABLE[Stage.STAGING]  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        TABLE[Stage.LOOKING].cancelled = Cancelled.SOON  # type: ignore[misc]


@pytest.mark.parametrize("stage", Stage)
def test_a_lost_destination_always_ends_the_run(stage: Stage) -> None:
    assert TABLE[stage].destination_lost is Lost.ENDS


@pytest.mark.parametrize("stage", Stage)
def test_the_source_is_needed_up_to_the_commit(stage: Stage) -> None:
    row = TABLE[stage]
    assert row.is_before_commit is (stage in (Stage.LOOKING, Stage.STAGING))
    assert (row.source_lost is Lost.ENDS) is row.is_before_commit


@pytest.mark.parametrize("stage", Stage)
def test_what_is_committed_is_never_undone(stage: Stage) -> None:
    complete = stage in (Stage.COMMITTED, Stage.MERGING, Stage.POSTPONED)
    assert TABLE[stage].is_complete is complete
    assert (TABLE[stage].failure is Failure.COMPLETE) is complete


def test_only_the_commit_itself_waits_for_libvirt() -> None:
    assert [stage for stage in Stage if TABLE[stage].cancelled is Cancelled.ANSWERED] == [Stage.COMMITTING]
    assert [stage for stage in Stage if TABLE[stage].failure is Failure.LIBVIRT_DECIDES] == [Stage.COMMITTING]


def test_a_merge_is_not_waited_for() -> None:
    assert TABLE[Stage.MERGING].cancelled is Cancelled.AT_ONCE
    assert TABLE[Stage.COMMITTED].cancelled is Cancelled.SOON


def test_nothing_is_kept_before_anything_is_written() -> None:
    assert [stage for stage in Stage if TABLE[stage].failure is Failure.NOTHING] == [Stage.LOOKING]


def test_the_documentation_has_the_same_rows() -> None:
    def line(stage: Stage, row: Row) -> str:
        return f"| {stage} | {row.cancelled} | {row.source_lost} | {row.destination_lost} | {row.failure} |"

    table = DESIGN.partition("`execution/stages.py`):\n\n")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == [line(*row) for row in TABLE.items()]
