"""Damage that hypothesis searches for and shrinks: bytes of a file replaced, taken out, put in, or its end cut off."""

from hypothesis import settings
from hypothesis import strategies as st

TOKENS = [
    b"nan", b"inf", b"1e999", b"-1", b"null", b"{", b"{}", b"]", b'"', b",", b"\0", b"\xff\xfe", b"\n", b"\r",
    b"9" * 400, b"9" * 5000, b"[" * 2000,
]  # fmt: skip
# Headers lie at the start, and there damage tells most.
PLACES = st.one_of(st.floats(0, 1), st.floats(0, 0.02))
EDITS = st.lists(
    st.tuples(PLACES, st.integers(0, 40), st.one_of(st.binary(max_size=40), st.sampled_from(TOKENS))),
    min_size=1, max_size=6,
)  # fmt: skip
CUT = st.one_of(st.just(1.0), st.just(1.0), st.floats(0, 1))


def searched(rounds):
    """The same examples in every run, as many as `rounds`, however slow the machine."""
    return settings(max_examples=rounds, deadline=None, derandomize=True, database=None)


def damaged(data, edits, cut):
    """`data` with `edits` (place as a share of its length, bytes taken out, bytes put in), then only `cut` of it."""
    data = bytearray(data)
    for place, length, piece in edits:
        at = int(place * len(data))
        data[at : at + length] = piece
    return bytes(data[: int(cut * len(data))])
