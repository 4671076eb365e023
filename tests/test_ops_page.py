"""docs/ops.md is what the registrations and the ops say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "ops.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="not in a checkout")
def test_page_is_current(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("ops_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0
    stale = tmp_path / "ops.md"
    stale.write_text(module.PAGE.read_text().replace("| refused |", "| yes |", 1))
    monkeypatch.setattr(module, "PAGE", stale)
    assert module.main(["--check"]) == 1
    assert "docs/ops.md is stale: python -P docs/ops.py" in capsys.readouterr().err
