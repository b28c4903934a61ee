"""The files of a run and of a study."""

import io

import pandas as pd
import pytest
from results_of import TWO, runs, study

from histories import round_diagnostics, run_history
from prelort.errors import PrelortError
from prelort.report.write import write_page, write_results, write_tables


def test_of_a_run(tmp_path):
    results = runs(prelort=run_history(diagnostics=round_diagnostics))
    write_results(results, tmp_path)
    names = ["diagnostics.png", "measurements.csv", "rank_curves.png", "results.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    assert "untuned base" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_of_a_study_with_several_seeds_and_settings(tmp_path):
    write_results(study(TWO, ("iid", "a/b")), tmp_path)
    names = {"a-b.png", "iid.png", "cells.csv", "measurements.csv", "results.md", "summary.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_csv_files_have_the_frames(tmp_path):
    results = study(TWO)
    write_tables(results, tmp_path)
    for name, frame in {"measurements": results.to_pandas(), "summary": results.summary}.items():
        read = pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False, na_values=[""])
        text = io.StringIO(frame.to_csv(index=False))
        pd.testing.assert_frame_equal(
            read, pd.read_csv(text, keep_default_na=False, na_values=[""])
        )
    assert set(pd.read_csv(tmp_path / "cells.csv")["status"]) == {"finished"}


def test_the_page_is_written_where_it_is_wanted(tmp_path):
    path = write_page(runs(prelort=run_history()), tmp_path / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(PrelortError, match="nowhere"):
        write_page(runs(prelort=run_history()), tmp_path / "nowhere" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PrelortError, match="folder' cannot be written: Is a directory"):
        write_page(runs(prelort=run_history()), tmp_path / "folder")
    assert {file.name for file in tmp_path.iterdir()} == {"page.html", "folder"}
