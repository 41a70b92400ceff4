"""Numbers in JSON are finite."""

import pytest

from utils.records import parse


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5_000])
def test_nonfinite_numbers_are_refused(text):
    with pytest.raises(ValueError, match="is not a finite number"):
        parse(text, {})


@pytest.mark.parametrize(("text", "value"), [("1" + "0" * 30, 10**30), ("-0.5", -0.5), ("7", 7), ("null", None)])
def test_finite_numbers_keep_their_value_and_type(text, value):
    found = parse(text, {})
    assert found == value
    assert type(found) is type(value)
