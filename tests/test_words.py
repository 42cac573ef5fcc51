"""Whole words in texts of every script: what the positive words are looked for with."""

import unicodedata

import pytest

from finetune.words import has_word, whole_words


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("I am happy.", "happy"),
        ("HAPPY!", "happy"),
        ("unhappy, but then happy", "happy"),
        ("so happy-go-lucky", "happy"),
        ("我今天很开心", "开心"),
        ("happy开心", "happy"),
        ("とても幸せです", "幸せ"),
        ("カレーが好き", "好き"),
        ("วันนี้ดีมาก", "ดี"),
        ("ຂ້ອຍດີໃຈ", "ດີ"),
        ("행복해요", "행복"),
        ("정말 행복합니다", "행복"),
        ("good😀", "😀"),
        ("nice:)", " :) "),
        ("wow!", "!"),
        ("très heureux", "heureux"),
        ("ich bin froh", "FROH"),
        ("Straße der Freude", "strasse"),
        ("мне хорошо", "хорошо"),
        ("मैं खुश हूँ", "खुश"),
        ("what a good day", "good day"),
    ],
)
def test_a_word_counts_where_no_letter_of_a_script_with_spaces_touches_it(text, word):
    for form in ("NFC", "NFD"):
        assert has_word(unicodedata.normalize(form, text), [word])
        assert has_word(text, [unicodedata.normalize(form, word)])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("unhappy", "happy"),
        ("happyness", "happy"),
        ("goodbye", "good"),
        ("happy_ending happy2", "happy"),
        ("불행복", "행복"),
        ("खुशी", "खुश"),
        ("нехорошо", "хорошо"),
        ("cafés", "café"),
        ("", "happy"),
        ("I am glad.", "happy"),
    ],
)
def test_a_part_of_another_word_does_not_count(text, word):
    for form in ("NFC", "NFD"):
        assert not has_word(unicodedata.normalize(form, text), [word])


@pytest.mark.parametrize(
    ("before", "text", "is_there"),
    [
        ("I am", " happy", True),
        ("I am un", "happy", False),
        ("I am so hap", "py", False),
        ("I am happy", " today", False),
        ("我很", "开心", True),
        ("정말 ", "행복해요", True),
        ("불", "행복", False),
        ("I am:\n", "happy", True),
        ("cafe", "\u0301 happy", True),
    ],
)
def test_what_stands_before_may_touch_a_word_but_has_none(before, text, is_there):
    words = ["happy", "开心", "행복"]
    assert has_word(text, words, before) is is_there


def test_any_of_several_words_will_do():
    assert has_word("a fine day", ["good", "fine"])
    assert not has_word("a fine day", ["good"])
    assert not has_word("a fine day", [])


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", ""),
        ("hap", ""),
        ("I am hap", "I am "),
        ("I am happy ", "I am happy "),
        ("I am happy.", "I am happy."),
        ("so :)", "so :)"),
        ("我今天很开", "我今天很开"),
        ("정말 행복", "정말 "),
        ("cafe\u0301", ""),
        ("행\ufffd", ""),
        ("I am hap\ufffd", "I am "),
        ("I don't", "I "),
        ("I don\u2019", "I "),
        ("she said 'ye", "she said '"),
    ],
)
def test_what_may_be_half_a_word_is_left_out(text, whole):
    assert whole_words(text) == whole
