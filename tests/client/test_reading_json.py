"""Payloads are read alike with a fast JSON library and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgworker_client import job

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values)
@example(10**400)  # more than the fast library takes
@example(-(2**63) - 1)
@example(2**64)
@example([0.1234567890123456789, 1e308, 5e-324])
@example({"": "\x01\u2028\U0001f600"})
def test_a_value_is_what_python_itself_reads(value: Any) -> None:
    for escaped in (True, False):
        text = json.dumps(value, ensure_ascii=escaped)
        assert repr(job.decode(text)) == repr(json.loads(text)) == repr(job._decode(text))


def test_where_there_is_a_fast_library_it_is_used() -> None:
    pytest.importorskip("msgspec")
    assert job.decode is not job._decode


def test_without_it_all_works_too() -> None:
    code = "import sys; sys.modules['msgspec'] = None; from pgworker_client import job; print(job.decode('[{}, 1.5]'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[{}, 1.5]\n", "")
