"""Beginnings of texts that a causal model reads in one pass: which passes there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.beginnings import passes_for

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=9)


def beginnings(*ids, shortest=1):
    """Return a sequence and its beginnings as a step asks for them, shorter ones first."""
    return [list(ids[:end]) for end in range(shortest, len(ids) + 1)]


@given(st.lists(TOKENS, max_size=12), st.lists(TOKENS, max_size=3))
def test_every_text_ends_in_a_pass_where_its_last_token_is(others, responses):
    sequences = others + [part for response in responses for part in beginnings(*response)]
    passes = passes_for(sequences)
    assert sorted(place for one in passes for place in one.places) == [*range(len(sequences))]
    for one in passes:
        assert one.ids in sequences
        for place, end in zip(one.places, one.ends, strict=True):
            assert one.ids[: end + 1] == sequences[place]


@pytest.mark.parametrize(
    ("sequences", "count"),
    [
        (beginnings(1, 2, 3, 4, 5, 6, 7, 8), 1),
        (beginnings(1, 2, 3, 4, 5, 6, 7, 8) + beginnings(1, 9, 8, 7, 6, 5, 4, 3), 2),
        # Within a word the last token is another one: that beginning stands alone.
        ([[1, 2], [1, 2, 99], [1, 2, 3, 4], [1, 2, 3, 4, 98], [1, 2, 3, 4, 5, 6]], 3),
        ([[1, 2, 3], [4, 5, 6], [7, 8]], 3),
        ([], 0),
    ],
)
def test_there_are_as_few_passes_as_there_are_texts_in_line(sequences, count):
    assert len(passes_for(sequences)) == count
