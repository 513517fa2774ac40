"""The check that documents are written in short sentences."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.docs import sentences

LONG = " ".join(["word"] * (sentences.MAX_WORDS + 1)) + "."


def texts(markdown: str) -> list[str]:
    return [sentence.text for sentence in sentences.sentences(markdown)]


def test_sentences_end_at_full_stops_questions_and_exclamations() -> None:
    assert texts("One is here. Is two?\nThree (of 3.5)! `four` is last") == [
        "One is here.",
        "Is two?",
        "Three (of 3.5)!",
        "code is last",
    ]
    assert texts('He said "no." Then **he left.** The end.') == ['He said "no."', "Then he left.", "The end."]


def test_abbreviations_and_decimals_end_nothing() -> None:
    assert len(texts("Others, e.g. LRU vs. LFU (Smith et al. 2020), in 0.9 of .62 cases, i.e. most.")) == 1


def test_each_list_item_and_each_paragraph_stands_alone() -> None:
    markdown = "First\n\n- second\n  goes on\n    - third\n\n    of a paragraph of its own\n1. fourth\n\n> fifth\n"
    assert texts(markdown) == ["First", "second goes on", "third", "of a paragraph of its own", "fourth", "fifth"]


@pytest.mark.parametrize(
    "markdown",
    [
        f"```\n{LONG}\n```\n",
        f"- item\n\n  ```python\n  {LONG}\n  ```\n",
        f"Run:\n\n    {LONG}\n\n    {LONG}\n",
        f"- item\n\n## Heading\n\n    {LONG}\n",
        f"| head |\n|---|\n| {LONG} |\n",
        f"## {LONG}\n",
        f"<!-- {LONG}\n{LONG} -->\n",
        f"`{LONG}`",
        f"See [this]({LONG}).",
    ],
)
def test_what_is_no_prose_does_not_count(markdown: str) -> None:
    assert all(sentence.words < 5 for sentence in sentences.sentences(markdown))


def test_a_link_counts_by_its_text_and_a_code_span_as_one_word() -> None:
    (sentence,) = sentences.sentences("See [both pages](a/b c.md) and `three words here`, now.")
    assert sentence.words == 6


def test_a_paragraph_knows_its_line() -> None:
    found = list(sentences.sentences("<!-- a\nb -->\n\n# Head\n\nOne.\nTwo.\n\n```\ncode\n```\n\n- three\n"))
    assert [(sentence.line, sentence.text) for sentence in found] == [(6, "One."), (6, "Two."), (13, "three")]


def test_long_sentences_are_named_and_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Short.\n")
    for exempt in ("cli.md", "LOG.md"):
        (tmp_path / "docs" / exempt).write_text(LONG)
    assert sentences.main(tmp_path) == 0
    (tmp_path / "docs" / "page.md").write_text(f"Short.\n\n- {LONG} Short.\n")
    capsys.readouterr()
    assert sentences.main(tmp_path) == 1
    assert capsys.readouterr().out == f"docs/page.md:3: 26 words, more than 25: {LONG}\n"


def test_the_documents_are_in_short_sentences() -> None:
    assert sentences.main() == 0
