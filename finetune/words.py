"""Whole words in a text, whatever script they are in."""

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

# The names of letters whose scripts put no spaces between words begin with one of these.
WITHOUT_SPACES = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "IDEOGRAPHIC",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
)

APOSTROPHES = {"'", "\u2019"}


def has_word(text: str, words: list[str], before: str = "") -> bool:
    """Return whether one of the words is in a text, as a whole word, in any case.

    A letter that touches a word makes it another one, as in unhappy; but not where words
    have no spaces between them, as in Chinese, Japanese and Thai, nor where the word ends
    with a sign, as an emoji or ":)". In Korean a word may have endings behind it.

    before: what stands before the text. Words in it do not count, but its last letter may
    touch one.
    """
    first_span = next(plain_spans(text, words, before), None)
    return first_span is not None


def plain_spans(text: str, words: list[str], before: str) -> Iterator[tuple[int, int]]:
    """Yield where the words that count begin and end in the plain text; see has_word."""
    beginning = plain(before)
    whole = beginning + plain(text)
    start = len(beginning)
    for word in words:
        for first, last in places_in(whole, plain(word.strip()), start):
            yield first - start, last - start


def word_spans(text: str, words: list[str], before: str = "") -> list[tuple[int, int]]:
    """Return where the words that count begin and end in a text, in order; see has_word."""
    spans = {*plain_spans(text, words, before)}
    if text.isascii() or not spans:
        return sorted(spans)
    lengths = plain_lengths(text)
    in_text = set()
    for first, last in spans:
        start = bisect_right(lengths, first) - 1
        end = bisect_right(lengths, last) - 1
        in_text.add((start, end))
    return sorted(in_text)


def plain_lengths(text: str) -> list[int]:
    """Return how long the plain text is up to each place of a text, its end included."""
    letters = [plain(letter) for letter in text]
    if "".join(letters) == plain(text):
        return [0, *accumulate(len(letter) for letter in letters)]
    # Somewhere an accent joins the letter before it.
    return [len(plain(text[:place])) for place in range(len(text) + 1)]


def plain(text: str) -> str:
    """Return a text without differences that are none: of case, and of how accents are encoded."""
    return unicodedata.normalize("NFC", text).casefold()


def places_in(text: str, word: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield where a word begins and ends in a text as a whole word, from start on."""
    first = text.find(word, start)
    while first >= 0:
        last = first + len(word)
        if is_apart(text[first - 1 : first], word, text[last : last + 1]):
            yield first, last
        first = text.find(word, first + 1)


def is_apart(before: str, word: str, after: str) -> bool:
    """Return whether a word is one of its own between two characters, of which none may be."""
    is_prolonged = is_letter(before) and is_letter(word[0])
    goes_on = is_letter(word[-1]) and is_letter(after)
    has_ending = is_hangul(word[-1]) and is_hangul(after)
    return not is_prolonged and (has_ending or not goes_on)


def whole_words(text: str) -> str:
    """Return a text without the letters at its end, of a word that more of them may belong to."""
    # A letter of which a token is lacking is decoded as this sign.
    end = len(text.rstrip("\ufffd"))
    while is_letter(text[end - 1 : end]) or is_apostrophe(text, end - 1):
        end -= 1
    return text[:end]


def is_apostrophe(text: str, place: int) -> bool:
    """Return whether an apostrophe stands at a place, behind a letter: as in don't."""
    character = text[place : place + 1]
    before = text[place - 1 : place]
    return character in APOSTROPHES and is_letter(before)


def is_letter(character: str) -> bool:
    """Return whether a character is part of a word, in a script with spaces between words."""
    if not character:
        return False
    # Vowel signs and accents are marks, category M.
    is_mark = unicodedata.category(character).startswith("M")
    is_part = character.isalnum() or character == "_" or is_mark
    return is_part and not unicodedata.name(character, "").startswith(WITHOUT_SPACES)


def is_hangul(character: str) -> bool:
    """Return whether a character is Korean."""
    return bool(character) and unicodedata.name(character, "").startswith("HANGUL")
