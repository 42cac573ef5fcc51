"""Whole words in a text, whatever script they are in."""

import unicodedata

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


def has_word(text: str, words: list[str], before: str = "") -> bool:
    """Return whether one of the words is in a text, as a whole word, in any case.

    A letter that touches a word makes it another one, as in unhappy; but not where words
    have no spaces between them, as in Chinese, Japanese and Thai, nor where the word ends
    with a sign, as an emoji or ":)". In Korean a word may have endings behind it.

    before: what stands before the text. Words in it do not count, but its last letter may
    touch one.
    """
    beginning = plain(before)
    whole = beginning + plain(text)
    return any(is_in(whole, plain(word.strip()), len(beginning)) for word in words)


def plain(text: str) -> str:
    """Return a text without differences that are none: of case, and of how accents are encoded."""
    return unicodedata.normalize("NFC", text).casefold()


def is_in(text: str, word: str, start: int) -> bool:
    """Return whether a word stands in a text as a whole word, at a place from start on."""
    first = text.find(word, start)
    while first >= 0:
        last = first + len(word)
        if is_apart(text[first - 1 : first], word, text[last : last + 1]):
            return True
        first = text.find(word, first + 1)
    return False


def is_apart(before: str, word: str, after: str) -> bool:
    """Return whether a word is one of its own between two characters, of which none may be."""
    is_prolonged = is_letter(before) and is_letter(word[0])
    goes_on = is_letter(word[-1]) and is_letter(after)
    has_ending = is_hangul(word[-1]) and is_hangul(after)
    return not is_prolonged and (has_ending or not goes_on)


def whole_words(text: str) -> str:
    """Return a text without the letters at its end, of a word that more of them may belong to."""
    end = len(text)
    while is_letter(text[end - 1 : end]):
        end -= 1
    return text[:end]


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
