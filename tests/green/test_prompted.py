"""Judges that ask a language model: prompt, sections, truncation, what cannot be judged."""

import re
from collections.abc import Iterator

import pytest

from mu2llm.errors import UserError
from mu2llm.green import load_judge, parse, write_answer
from mu2llm.green.prompt import Prompt
from mu2llm.green.prompted import PromptedJudge, Unanswered
from mu2llm.green.sections import combine, sections
from mu2llm.records import ERROR_CATEGORIES, Judgement
from mu2llm.settings.green import JudgeConfig

RULES = load_judge(JudgeConfig(name="rules"))
PROMPT = Prompt("R<{reference}>C<{candidate}>")


class RulesWriter:
    """Answers each prompt as the rules would, and remembers what it was asked."""

    identity = "stand-in"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answers(self, prompts: list[str]) -> Iterator[tuple[int, str | Unanswered]]:
        self.asked += prompts
        pairs = [re.fullmatch(r"R<(.*)>C<(.*)>", prompt, re.DOTALL).groups() for prompt in prompts]
        judged = RULES.judge(pairs)
        yield from reversed([(i, write_answer(j) if j.valid else Unanswered(j.why)) for i, j in enumerate(judged)])


def long_report(words: int) -> str:
    lung = "Emphysema in both lungs. " + "The lungs are otherwise clear of any other change. " * (words // 18)
    abdomen = "Hypodense liver lesion of 2 cm. " + "The liver is otherwise normal and of the usual size. " * (
        words // 18
    )
    return f"{lung}{abdomen}Fracture of the L1 vertebra."


def test_the_prompt_holds_both_reports_and_the_format():
    text = Prompt().fill("REF {candidate}", "CAND")
    assert "REF {candidate}" in text and "CAND" in text
    for name in (*ERROR_CATEGORIES.values(), "[Clinically Significant Errors]:", "[Matched Findings]:"):
        assert name in text
    assert not parse(text).valid


@pytest.mark.parametrize("template", ["", "{reference}", "{candidate} {reference}"])
def test_a_template_must_have_its_slots(template):
    with pytest.raises(UserError, match="must hold"):
        Prompt(template)


def test_short_reports_are_one_prompt():
    writer = RulesWriter()
    judgements = PromptedJudge(writer, PROMPT).judge([("Emphysema.", "Emphysema."), ("Emphysema.", "Emphysema.")])
    assert [j.score for j in judgements] == [1.0, 1.0]
    assert writer.asked == [PROMPT.fill("Emphysema.", "Emphysema.")]
    assert "stand-in" in judgements[0].judge and PROMPT.version in judgements[0].judge


def test_long_reports_are_judged_by_section_and_summed():
    writer = RulesWriter()
    reference, candidate = long_report(400), long_report(700)
    judgement = PromptedJudge(writer, PROMPT).judge([(reference, candidate)])[0]
    assert judgement.valid, judgement.why
    assert judgement.score == 1.0 and judgement.matched >= 3
    assert {"20 mm liver lesion", "L1 fracture"} <= set(judgement.matched_sentences)
    assert len(writer.asked) >= 2


@pytest.mark.parametrize("words", [310, 700, 3000, 10_000])
def test_sections_are_short_and_lose_no_word(words):
    pair = long_report(words), long_report(350)
    parts = sections(pair)
    assert all(len(text.split()) <= 300 for part in parts for text in part)
    for side in (0, 1):
        said = [word for part in parts for word in part[side].split() if part[side] != "Nothing is stated."]
        assert sorted(said) == sorted(pair[side].split())


def test_one_endless_sentence_is_divided_too():
    parts = sections(("lung " * 1000, "Emphysema."))
    assert len(parts) == 4 and all(len(r.split()) <= 300 for r, _ in parts)


def test_the_published_cut_is_a_choice():
    writer = RulesWriter()
    reference = "Emphysema. " + "Clear. " * 400 + "Fracture of L1."
    judge = PromptedJudge(writer, PROMPT, truncate_words=300)
    judgement = judge.judge([(reference, "Emphysema.")])[0]
    assert sum(judgement.significant) == 0 and "cut 300 words" in judge.identity
    assert len(re.search(r"R<(.*)>C", writer.asked[0])[1].split()) == 300


def test_one_invalid_section_makes_the_pair_invalid():
    good = Judgement(valid=True, score=1.0, matched=1)
    whole = combine([good, Judgement(valid=False, score=None, why="cut off")])
    assert not whole.valid and whole.why == "section 2 of 2: cut off"


def test_what_cannot_be_judged_is_not_asked():
    writer = RulesWriter()
    judgements = PromptedJudge(writer, PROMPT).judge([("", "x"), ("Emphysema.", "Emphysema."), ("Clear.", "Нет.")])
    assert [(j.valid, j.score) for j in judgements] == [(False, None), (True, 1.0), (True, 0.0)]
    assert len(writer.asked) == 1 and "empty" in judgements[0].why and "English" in judgements[2].why


def test_no_answer_is_an_invalid_judgement():
    class Silent(RulesWriter):
        def answers(self, prompts):
            yield from enumerate(Unanswered("too long") for _ in prompts)

    judgement = PromptedJudge(Silent(), PROMPT).judge([("Clear lungs.", "Clear lungs.")])[0]
    assert not judgement.valid and judgement.why == "too long"


@pytest.mark.parametrize("name", ["rule", "openai:gpt", "hf:", "openai:m@ftp://host", ""])
def test_unknown_judges_are_named(name):
    with pytest.raises(UserError, match="judge"):
        load_judge(JudgeConfig(name=name))


def test_a_prompt_of_ones_own(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("{reference} against {candidate}")
    url = "openai:m@http://127.0.0.1:9/v1"
    ours, theirs = load_judge(JudgeConfig(name=url)), load_judge(JudgeConfig(name=url, prompt=str(path)))
    assert ours.identity != theirs.identity
    with pytest.raises(UserError, match="no such file"):
        load_judge(JudgeConfig(name=url, prompt=str(tmp_path / "gone.txt")))
