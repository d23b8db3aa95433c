"""The code version in results and checkpoints."""

from rrt.common.provenance import code_version
from rrt.version import __version__


def test_the_commit_of_files_without_history_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RRT_COMMIT", " 0123abc-dirty\n")
    assert code_version() == f"{__version__}+0123abc-dirty"
    monkeypatch.setenv("RRT_COMMIT", "")
    assert code_version() != f"{__version__}+" and code_version().startswith(__version__)
