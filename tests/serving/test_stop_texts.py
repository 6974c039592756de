"""A text is cut before its first stop text, however it is split into pieces."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from ace_triton.serving.stop_texts import StopTexts


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_the_pieces_give_the_text_before_the_first_stop(text, stops, cuts):
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    reader = StopTexts(stops)
    given_out = ""
    for start, end in itertools.pairwise(places):
        given_out += reader.feed(text[start:end])
        if reader.found:
            break
    given_out += reader.end()
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    # A piece may end before a stop text that begins earlier is complete; the first complete one counts.
    assert reader.found == bool(found)
    if not found:
        assert given_out == text
    else:
        first_end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert text.startswith(given_out)
        assert min(found) <= len(given_out) < first_end
        assert not any(stop in given_out for stop in stops)


def test_what_may_begin_a_stop_text_waits():
    reader = StopTexts(["END"])
    assert reader.feed("the E") == "the "
    assert reader.feed("N") == ""
    assert reader.feed("ough") == "ENough"
    assert reader.feed("! EN") == "! "
    assert reader.end() == "EN"
    assert not reader.found
