"""Numbers in JSON are finite."""

import pytest

from utils.records import SUBJECT, parse


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5_000])
def test_nonfinite_numbers_are_refused(text):
    with pytest.raises(ValueError, match="is not a finite number"):
        parse(text, {})


@pytest.mark.parametrize(("text", "value"), [("1" + "0" * 30, 10**30), ("-0.5", -0.5), ("7", 7), ("null", None)])
def test_finite_numbers_keep_their_value_and_type(text, value):
    found = parse(text, {})
    assert found == value
    assert type(found) is type(value)


def test_values_of_any_depth_are_refused_or_read():
    """Beyond some depth Python can parse a value, but not print it in the message."""
    for depth in [*range(1, 1100), 10_000, 100_000]:
        nested = "[" * depth + "]" * depth
        with pytest.raises(ValueError, match=r"nested too deeply|made_with\.rules"):
            parse(f'{{"made_with": {{"rules": {nested}}}, "files": {{}}}}', SUBJECT)
