"""Each metric: values worked out by hand, and the official definition derived a second time."""

from __future__ import annotations

import random
import re
import string
from collections import Counter

import pytest

from llavanext_cli.scoring.choices import find_choices, says_yes
from llavanext_cli.scoring.metrics import METRICS, anls, choice, exact, f1, relaxed, rouge, vqa, yesno
from llavanext_cli.scoring.text import squad_words, vqa_answer

WORDS = "a the two 2 cat cats, black-dog dont don't 1,000 12% (B) yes no not none . ! it's"


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS.split(), k=rng.randint(0, 6))) for _ in range(count)]


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("cat", ["cat"], 1),
        ("The cat.", ["cat"], 1),
        ("a  CAT", ["the cat!"], 1),
        ("cats", ["cat"], 0),
        ("two", ["2"], 0),
        ("dog", ["cat", "dog"], 1),
        ("", ["cat"], 0),
        ("", ["the"], 1),
        ("don't", ["dont"], 1),
        ("black-dog", ["blackdog"], 1),
    ],
)
def test_exact(answer, references, score):
    assert exact(answer, references) == score


@pytest.mark.parametrize(
    ("answer", "counts", "score"),
    [  # references as (text, how many of the people said so)
        ("cat", {"cat": 10}, 1.0),
        ("cat", {"cat": 4, "dog": 6}, 1.0),
        ("cat", {"cat": 3, "dog": 7}, 0.9),
        ("cat", {"cat": 2, "dog": 8}, 0.6),
        ("cat", {"cat": 1, "dog": 9}, 0.3),
        ("cat", {"dog": 10}, 0.0),
        ("Two cats!", {"2 cats": 10}, 1.0),
        ("the cat", {"a cat": 5, "cat": 5}, 1.0),
        ("dont", {"don't": 10}, 1.0),
        ("1,000", {"1000": 10}, 1.0),
        ("none", {"0": 2, "1": 8}, 0.6),
        ("", {"cat": 10}, 0.0),
        ("cat", {"Cat": 1}, 1.0),
        ("dog", {"cat": 1, "dog": 1}, 1.0),
    ],
)
def test_vqa(answer, counts, score):
    references = [text for text, count in counts.items() for _ in range(count)]
    assert vqa(answer, references) == pytest.approx(score)


def test_vqa_is_the_mean_over_nine_of_ten():
    """vqaEval.py: each reference is left out once, and the answer is compared with the nine others."""
    rng = random.Random(0)
    for _ in range(200):
        references = rng.choices(["cat", "dog", "two", "2"], k=10)
        said = rng.choice(["cat", "dog", "2", "bird"])
        right = [vqa_answer(text) for text in references]
        nine = [right[:left] + right[left + 1 :] for left in range(10)]
        expected = sum(min(1.0, others.count(said) / 3) for others in nine) / 10
        assert vqa(said, references) == pytest.approx(expected)


def test_vqa_normalisation_is_that_of_the_official_script():
    """Derived from the description of processPunctuation and processDigitArticle, character by character."""

    def derived(text: str) -> str:
        text = text.lower().strip()
        has_number_comma = any(
            text[at] == "," and text[at - 1 : at].isdigit() and text[at + 1 : at + 2].isdigit()
            for at in range(len(text))
        )
        result = text
        for mark in ';/[]"{}()=+\\_-><@`,?!':
            beside_space = mark + " " in text or " " + mark in text
            result = result.replace(mark, "" if beside_space or has_number_comma else " ")
        result = "".join(
            letter for at, letter in enumerate(result) if letter != "." or result[at + 1 : at + 2].isdigit()
        )
        numbers = "zero one two three four five six seven eight nine ten"
        digits = {word: number for number, word in enumerate(numbers.split())} | {"none": 0}
        words = [str(digits.get(word, word)) for word in result.split()]
        words = [word for word in words if word not in ("a", "an", "the")]
        return " ".join("don't" if word == "dont" else word for word in words)

    for text in [*random_texts(500, 1), "2.5 m.", "a.b", "3.", "1,000 a-b", "x -y", 'say "hi"']:
        assert vqa_answer(text) == derived(text), text


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("hello", ["hello"], 1),
        ("Hello ", ["hello"], 1),
        ("hallo", ["hello"], 0.8),
        ("help", ["hello"], 0.6),
        ("world", ["hello"], 0),
        ("", ["hello"], 0),
        ("ab", ["abcd"], 0),  # a distance of exactly one half
        ("abc", ["abcd", "abc"], 1),
        ("12.5", ["12.6"], 0.75),
        ("new  york", ["New York"], 1),
    ],
)
def test_anls(answer, references, score):
    assert anls(answer, references) == pytest.approx(score)


OPTIONS = ("a cat", "a dog", "a black dog", "two birds")


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B: a dog", "B"),
        ("B) a dog", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (C), because A is wrong.", "C"),
        ("The best answer is: D", "D"),
        ("option b", "B"),
        ("I think it is C", "C"),
        ("A", "A"),
        ("It is A", "A"),
        ("a dog", "B"),
        ("It is a black dog.", "C"),
        ("The cat", "A"),
        ("A or B", "AB"),
        ("A, B", "AB"),
        ("either C or D", "CD"),
        ("a cat and a dog", "AB"),
        ("A bird", ""),
        ("I do not know", ""),
        ("", ""),
        ("E", ""),
    ],
)
def test_the_option_that_a_text_names(answer, named):
    assert find_choices(answer, OPTIONS) == set(named)


@pytest.mark.parametrize(
    ("answer", "reference", "options", "score"),
    [
        ("B", "B", OPTIONS, 1),
        ("B", "(B)", OPTIONS, 1),
        ("b", "a dog", (), 0),
        ("a dog", "a dog", OPTIONS, 1),
        ("The answer is B", "a dog", OPTIONS, 1),
        ("C", "a dog", OPTIONS, 0),
        ("A or B", "B", OPTIONS, 0),
        ("", "B", OPTIONS, 0),
        ("D", "d", (), 1),
    ],
)
def test_choice(answer, reference, options, score):
    assert choice(answer, [reference], options) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Yes", "yes", 1),
        ("Yes, there is.", "yes", 1),
        ("No", "yes", 0),
        ("No, there is not.", "no", 1),
        ("There is no dog.", "no", 1),
        ("It is not here", "no", 1),
        ("There is a dog. It is not black.", "yes", 1),
        ("", "no", 0),
        ("", "yes", 1),
        ("Nothing", "yes", 1),
        ("yes", "No.", 0),
    ],
)
def test_yesno(answer, reference, score):
    assert yesno(answer, [reference]) == score


def test_yes_is_decided_as_pope_does():
    """POPE's evaluate.py: the first sentence, without commas, split at spaces; "No", "not" or "no" among the words."""
    for text in random_texts(300, 2):
        sentence = text.split(".")[0] if "." in text else text
        words = sentence.replace(",", "").split(" ")
        assert says_yes(text) == (not any(word in ("No", "not", "no") for word in words)), text


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("12%", "0.12", 1),
        ("12%", "12", 0),
        ("-10", "-10.4", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("Blue", "blue", 1),
        ("blue", "red", 0),
        ("nan", "1", 0),
        ("", "1", 0),
        ("1,000", "1000", 0),
    ],
)
def test_relaxed(answer, reference, score):
    assert relaxed(answer, [reference]) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("a black cat", ["cat"], 2 / 3),
        ("cat", ["the cat"], 1),
        ("cat dog", ["dog cat"], 1),
        ("cat cat", ["cat"], 2 / 3),
        ("bird", ["cat"], 0),
        ("", ["cat"], 0),
        ("", ["the"], 1),
        ("black cat", ["dog", "cat"], 2 / 3),
    ],
)
def test_f1(answer, references, score):
    assert f1(answer, references) == pytest.approx(score)


def test_f1_is_squads():
    """evaluate-v1.1.py: precision and recall of the common words."""

    def derived(said: str, right: str) -> float:
        def words(text: str) -> list[str]:
            kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
            return re.sub(r"\b(a|an|the)\b", " ", kept).split()

        common = Counter(words(said)) & Counter(words(right))
        if not words(said) or not words(right):
            return float(words(said) == words(right))
        if not common:
            return 0.0
        precision, recall = common.total() / len(words(said)), common.total() / len(words(right))
        return 2 * precision * recall / (precision + recall)

    for said, right in zip(random_texts(300, 3), random_texts(300, 4), strict=True):
        assert f1(said, [right]) == pytest.approx(derived(said, right)), (said, right)
        assert exact(said, [right]) == (squad_words(said) == squad_words(right))


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [  # beta is 1.2: F = 2.44 P R / (R + 1.44 P)
        ("a cat on a mat", ["a cat on a mat"], 1),
        ("a cat", ["a cat on a mat"], 2.44 * 1 * 0.4 / (0.4 + 1.44)),
        ("a cat on a mat", ["a cat"], 2.44 * 0.4 * 1 / (1 + 1.44 * 0.4)),
        ("mat cat", ["cat mat"], 2.44 * 0.5 * 0.5 / (0.5 + 1.44 * 0.5)),
        ("dog", ["cat"], 0),
        ("", ["cat"], 0),
        ("cat", ["..."], 0),
        ("A cat!", ["a cat"], 1),
        ("a cat sits", ["a cat lies here", "the cat sits"], 2.44 * (2 / 3) * (2 / 3) / (2 / 3 + 1.44 * 2 / 3)),
    ],
)
def test_rouge(answer, references, score):
    assert rouge(answer, references) == pytest.approx(score)


def test_rouge_is_the_longest_common_subsequence():
    def longest(one: list[str], two: list[str]) -> int:
        row = [0] * (len(two) + 1)
        for a in one:
            new = [0]
            for at, b in enumerate(two):
                new.append(row[at] + 1 if a == b else max(row[at + 1], new[at]))
            row = new
        return row[-1]

    rng = random.Random(5)
    for _ in range(200):
        said, right = rng.choices("abcd", k=rng.randint(1, 9)), rng.choices("abcd", k=rng.randint(1, 9))
        common = longest(said, right)
        precision, recall = common / len(said), common / len(right)
        expected = 2.44 * precision * recall / (recall + 1.44 * precision) if common else 0
        assert rouge(" ".join(said), [" ".join(right)]) == pytest.approx(expected)


def test_every_score_is_between_0_and_1():
    for name, metric in METRICS.items():
        for said, right in zip(random_texts(100, 6), random_texts(100, 7), strict=True):
            assert 0 <= metric(said, [right or "cat"], OPTIONS) <= 1, name
