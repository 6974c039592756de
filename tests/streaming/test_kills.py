"""A short run of the kill test."""

from tests.kill_test import main


def test_runs_that_are_killed_and_repeated_give_the_same_bytes(capfd):
    main(kills=5, seed=1)
    assert "prune: 2 kills" in capfd.readouterr().out
