"""The code version in results and checkpoints."""

from rrt.common import provenance
from rrt.common.provenance import code_fingerprint, code_version
from rrt.version import __version__


def test_the_commit_of_files_without_history_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RRT_COMMIT", " 0123abc-dirty\n")
    assert code_version() == f"{__version__}+0123abc-dirty"
    monkeypatch.setenv("RRT_COMMIT", "")
    assert code_version() != f"{__version__}+" and code_version().startswith(__version__)


def test_the_fingerprint_of_the_code_changes_with_any_source_of_the_package(monkeypatch, tmp_path):
    def found() -> str:
        code_fingerprint.cache_clear()
        return code_fingerprint()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "rrt" / "common" / "provenance.py"))
    (tmp_path / "rrt" / "common").mkdir(parents=True)
    (tmp_path / "rrt" / "common" / "a.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    before = found()
    (tmp_path / "README.md").write_text("2")
    assert found() == before
    (tmp_path / "rrt" / "common" / "a.py").write_text("2")
    edited = found()
    (tmp_path / "rrt" / "common" / "a.py").rename(tmp_path / "rrt" / "b.py")
    assert len({before, edited, found()}) == 3
    code_fingerprint.cache_clear()
