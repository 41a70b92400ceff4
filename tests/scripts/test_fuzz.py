"""Run tests/fuzz.py on a few fixed cases of every kind of file."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import KINDS, fuzz, make_place

pytestmark = pytest.mark.xdist_group("fuzz")  # one process, so that the fixture is made once
CASES = 20  # per kind of file


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    make_place(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_file_causes_no_crash(workdir, kind):
    outcomes = set()

    @settings(max_examples=CASES, deadline=None, derandomize=True)
    @given(st.randoms(use_true_random=False))
    def check(rng):
        done, wrong = fuzz(kind, workdir, rng)
        outcomes.add((done.code, done.stdout))
        assert not wrong

    check()
    assert len(outcomes) > 1 or any(code for code, _ in outcomes)  # else no command reads the file
