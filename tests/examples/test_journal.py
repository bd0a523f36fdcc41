"""A journal loses no finished work, whatever the moment of a kill, and never mixes two runs."""

import json

import pytest
from common import Problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal import Journal


def open_journal(out, overwrite=False, seed=False, **changes):
    return Journal(out, {"model": 1, "stride": 2} | changes, lambda r: r["row"], overwrite=overwrite, seed=seed)


def test_a_journal_cut_at_any_byte_keeps_the_lines_before(tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with open_journal(out) as journal:
        journal.append({"row": i, "text": "ñ\n\u2028"} for i in range(3))
    whole = partial.read_bytes()
    for size in range(len(whole)):
        partial.write_bytes(whole[:size])
        with open_journal(out) as journal:
            finished = whole[:size].count(b"\n")
            assert len(journal) == finished and [i in journal for i in range(3)] == [i < finished for i in range(3)]
            journal.append({"row": i, "text": "ñ\n\u2028"} for i in range(finished, 3))
        assert partial.read_bytes() == whole


@given(order=st.permutations(range(5)), wanted=st.lists(st.integers(0, 4), unique=True))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_finish_writes_what_is_wanted_in_that_order(tmp_path, order, wanted):
    out = tmp_path / "out.jsonl"
    with open_journal(out, overwrite=True) as journal:
        for row in order:
            journal.append([{"row": row}])
        journal.finish(wanted)
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.run.json"}


def test_a_failed_finish_leaves_the_old_results_and_the_work(tmp_path):
    out = tmp_path / "out.jsonl"
    with open_journal(out) as journal:
        journal.append([{"row": 0}])
        journal.finish([0])
    old = out.read_bytes()

    def full_disk(path, records):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with open_journal(out, seed=True) as journal:
        assert journal.complete and 0 in journal
        journal.append([{"row": 1}])
        with pytest.raises(Problem, match="cannot be written: No space left"):
            journal.finish([0, 1], full_disk)
    assert out.read_bytes() == old
    with open_journal(out) as journal:
        assert len(journal) == 2 and not journal.complete
    assert not list(tmp_path.glob(".*"))


def test_who_reads_the_old_results_reads_them_to_the_end(tmp_path):
    out = tmp_path / "out.jsonl"
    for rows in ([0], [0, 1]):
        with open_journal(out, seed=True) as journal:
            journal.append({"row": row} for row in rows if row not in journal)
            if out.exists():
                reader = out.open()
            journal.finish(rows)
    assert reader.read().count("\n") == 1 and out.read_text().count("\n") == 2
    reader.close()


def test_other_settings_foreign_files_and_a_second_writer(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(Problem, match="not from a run that could be resumed; give another --out"):
        open_journal(out)
    assert out.read_text() == "mine"
    with open_journal(out, overwrite=True) as journal:
        journal.append([{"row": 0}])
        with pytest.raises(Problem, match="is being written by another run"):
            open_journal(out)
    with pytest.raises(Problem, match="with another stride, window"):
        open_journal(out, stride=3, window=1)
    with open_journal(out) as journal:
        assert len(journal) == 1
