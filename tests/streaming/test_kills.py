"""A short run of the kill test."""

import json

from tests.kill_test import main


def test_runs_that_are_killed_and_repeated_give_the_same_bytes(tmp_path):
    main(kills=5, seed=1, out=tmp_path / "kills.json")
    jobs = json.loads((tmp_path / "kills.json").read_text())["jobs"]
    assert sum(job["kills"] for job in jobs.values()) == 5
    assert all(job["results"] for job in jobs.values())
