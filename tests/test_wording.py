"""Words in messages: each helper against values worked out by hand."""

import pytest

from lora_gan import wording


class WithoutRepr:
    def __repr__(self):
        raise RuntimeError("no")


def test_a_value_is_shown_by_the_beginning_of_its_repr():
    assert wording.shown([1, "a"]) == "[1, 'a']"
    assert wording.shown("x" * 100, 10) == "'xxxxxxxx…"
    assert wording.shown(WithoutRepr()) == "a value of type WithoutRepr"
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert wording.shown(nested) == "a value of type list"


@pytest.mark.parametrize("length", [1, 5, 6, 7])
def test_a_shortened_text_has_the_length(length):
    short = wording.shortened("abcdef", length)
    assert len(short) == min(length, 6)
    assert short == ("abcdef" if length >= 6 else "abcdef"[: length - 1] + "…")


def test_an_error_is_one_line():
    assert wording.error_line(ValueError("a\n   b")) == "a b"
    assert wording.error_line(KeyError()) == "KeyError"
    assert wording.error_line(ValueError("x" * 50), 10) == "x" * 9 + "…"


def test_the_nearest_name_is_hinted_at():
    assert wording.did_you_mean("bleau", {"bleu": 1, "rouge": 2}) == " (did you mean 'bleu'?)"
    assert wording.did_you_mean("nothing like it", ["bleu"]) == wording.did_you_mean(3, []) == ""


def test_counts():
    assert [wording.counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert [wording.counted(n, "retry", "retries") for n in (1, 2)] == ["1 retry", "2 retries"]


def test_sizes():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 37_400: "37 kB", 541.6e6: "542 MB", 1.74e9: "1.7 GB"}
    assert {count: wording.size(count) for count in sizes} == sizes


def test_durations():
    times = {
        0: "0 s", 0.0004: "0.4 ms", 0.025: "25 ms", 0.25: "0.25 s", 3: "3 s", 3.61: "3.6 s", 42.4: "42 s", 100: "2 min",
        5400: "90 min", 12_240: "3.4 h",
    }  # fmt: skip
    assert {seconds: wording.duration(seconds) for seconds in times} == times
