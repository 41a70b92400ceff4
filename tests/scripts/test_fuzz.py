"""Some cases of tests/fuzz.py for every kind of file, the same in every run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import KINDS, fuzz, make_place

pytestmark = pytest.mark.xdist_group("fuzz")  # one process, so that its place is made once
CASES = 20  # of each kind


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    make_place(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_file_ends_in_one_sentence(place, kind):
    ends = set()

    @settings(max_examples=CASES, deadline=None, derandomize=True)
    @given(st.randoms(use_true_random=False))
    def check(rng):
        done, wrong = fuzz(kind, place, rng)
        ends.add((done.code, done.stdout))
        assert not wrong

    check()
    assert len(ends) > 1 or any(code for code, _ in ends)  # what is spoilt is read
