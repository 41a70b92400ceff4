"""JSON is read with numbers that can be computed with."""

import pytest

from utils.records import parse


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5_000])
def test_numbers_that_are_none_or_infinite_are_refused(text):
    with pytest.raises(ValueError, match="is not a finite number"):
        parse(text, {})


@pytest.mark.parametrize(("text", "value"), [("1" + "0" * 30, 10**30), ("-0.5", -0.5), ("7", 7), ("null", None)])
def test_other_numbers_are_what_they_say(text, value):
    found = parse(text, {})
    assert found == value
    assert type(found) is type(value)
