"""The check of an experiment's recorded settings when training is resumed."""

import json

import pytest

from utils.cli import UserError
from utils.experiment import require_same_settings


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({}, {"grid": {"axcodes": "LPS"}}, False),  # started before grids were recorded
        ({"grid": None}, {"grid": {"axcodes": "LPS"}}, False),
        ({"grid": {"axcodes": "LPS"}}, {"grid": None}, False),
        ({}, {"grid": None}, False),
        ({"grid": {"axcodes": "LPS"}}, {"grid": {"axcodes": "LPS"}}, False),
        ({"grid": {"axcodes": "LPS"}}, {"grid": {"axcodes": "RAS"}}, True),
    ],
)
def test_training_resumes_unless_the_grid_is_known_to_differ(tmp_path, before, now, refused):
    (tmp_path / "opt000002.pt").touch()
    complete = {"spacing": [1, 1, 1], "shape": [48, 48]}
    before, now = ({"grid": data["grid"] | complete} if data.get("grid") else data for data in (before, now))
    kind = {"model_name": "unet", "training_process": "forward", "config": {"data": {}, "score_model": {}}}
    (tmp_path / "config.json").write_text(json.dumps(kind | {"data": before}))
    if refused:
        with pytest.raises(UserError, match=r"data\.grid\.axcodes=LPS, not RAS"):
            require_same_settings(tmp_path, {"data": now})
    else:
        require_same_settings(tmp_path, {"data": now})


@pytest.mark.parametrize("unused", [(), ("config.score_model.mask.",)])
def test_unused_settings_may_change(tmp_path, unused):
    def record(width: int) -> dict:
        score_model = {"mask": {"width": width}}
        return {"model_name": "unet", "training_process": "forward", "config": {"data": {}, "score_model": score_model}}

    (tmp_path / "config.json").write_text(json.dumps(record(8)))
    if unused:
        require_same_settings(tmp_path, record(4), unused)
    else:
        with pytest.raises(UserError, match=r"mask\.width=8, not 4"):
            require_same_settings(tmp_path, record(4))
