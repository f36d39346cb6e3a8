"""documents.parquet, read back with pandas: every score of every document of every run."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmalign.evaluation.items import read_results
from mmalign.study.report import write_study
from mmalign.study.scores import collect, key_of, write_parquet


@pytest.fixture(scope="module")
def table(finished):
    return pq.read_table(finished.study.output / "documents.parquet").to_pandas()


def test_the_mean_over_documents_is_the_metric(finished, table):
    for run in finished.study.runs:
        if not run.is_evaluated:
            continue
        mine = table.query(f"variant == '{run.variant}' and seed == {run.seed}")
        found = mine.groupby("metric", observed=True)["value"].mean()
        results = read_results(finished[run].scores)
        for metric in ("truthfulqa_mc1", "truthfulqa_mc2"):
            assert found[metric] == pytest.approx(results[metric]["acc"])


def test_what_the_picture_adds(finished):
    """Own minus another and minus none, in clusters of one picture; 0 for who sees none."""
    scores = collect(finished)
    for key, run in scores.items():
        sees = key[1] in ("visual", "part")
        assert ("visual_questions" in run) == sees
        for other in ("another", "none"):
            added = run[f"visual_questions_over_{other}"]
            assert added.clusters.tolist() == [0, 0, 1, 1, 2, 2]
            expected = np.zeros(6)
            if sees:
                pair = (run["visual_questions"], run[f"visual_questions_{other}"])
                expected = pair[0].values - pair[1].values
            assert np.array_equal(added.values, expected)


def test_rows_are_sorted_and_name_every_run(finished, table):
    keys = ["parent", "variant", "seed", "task", "metric", "doc_id"]
    rows = table[keys].astype({name: str for name in keys if name not in ("seed", "doc_id")})
    assert rows.equals(rows.sort_values(keys, ignore_index=True))
    assert not rows.duplicated().any()
    runs = {key_of(run) for run in finished.study.runs if run.is_evaluated}
    assert set(rows[keys[:3]].itertuples(index=False, name=None)) == runs


def test_the_same_runs_give_the_same_bytes(finished, tmp_path):
    path = finished.study.output / "documents.parquet"
    before = path.read_bytes()
    write_study(finished)
    assert path.read_bytes() == before
    scores = collect(finished)
    some = next(iter(scores.values()))["truthfulqa_mc2"]
    some.values[0] = np.nextafter(some.values[0], 2)
    write_parquet(tmp_path / "other.parquet", scores)
    assert (tmp_path / "other.parquet").read_bytes() != before
