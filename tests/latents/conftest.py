"""Small stores of synthetic moments."""

from pathlib import Path

import pytest
import synthetic_store as synthetic


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("pristine") / "store"
    synthetic.make(folder)
    return synthetic.contents(folder)


@pytest.fixture
def store_folder(_pristine: dict[str, bytes], tmp_path: Path) -> Path:
    """A finished store of 10 records, one of them rejected, in 3 shards; free to be damaged."""
    folder = tmp_path / "store"
    folder.mkdir()
    for name, content in _pristine.items():
        (folder / name).write_bytes(content)
    return folder
