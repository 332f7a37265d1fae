"""The parser of judges' answers: right, or invalid, however an answer is dressed or damaged."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm.green import parse
from mu2llm.green.prompt import Prompt
from mu2llm.records import Judgement

ANSWER = """[Explanation]:
The candidate misses the effusion and puts the nodule on the wrong side.

[Clinically Significant Errors]:
(a) False report of a finding in the candidate: 0.
(b) Missing a finding present in the reference: 2. Small pleural effusion; Nodule of 2.5 cm.
(c) Misidentification of a finding's anatomic location/position: 1. Atelectasis on the left instead of the right.
(d) Misassessment of the severity of a finding: 0.
(e) Mentioning a comparison that isn't in the reference: 0.
(f) Omitting a comparison detailing a change from a prior study: 0.

[Clinically Insignificant Errors]:
(a) False report of a finding in the candidate: 0.
(b) Missing a finding present in the reference: 0.
(c) Misidentification of a finding's anatomic location/position: 0.
(d) Misassessment of the severity of a finding: 1. Mild cardiomegaly instead of moderate.
(e) Mentioning a comparison that isn't in the reference: 0.
(f) Omitting a comparison detailing a change from a prior study: 0.

[Matched Findings]:
3. No pneumothorax; Cardiomegaly; Stable sternotomy wires.
"""
SIGNIFICANT = (0, 2, 1, 0, 0, 0)
INSIGNIFICANT = (0, 0, 0, 1, 0, 0)
HEADERS = ("[Clinically Significant Errors]", "[Clinically Insignificant Errors]", "[Matched Findings]")


@pytest.fixture
def answer() -> str:
    return ANSWER


def assert_read(judgement: Judgement) -> None:
    assert judgement.valid, judgement.why
    assert (judgement.significant, judgement.insignificant, judgement.matched) == (SIGNIFICANT, INSIGNIFICANT, 3)
    assert judgement.score == 0.5


def assert_invalid(judgement: Judgement, why: str = "") -> None:
    assert not judgement.valid
    assert judgement.score is None
    assert why in judgement.why and judgement.why


def test_well_formed(answer):
    judgement = parse(answer)
    assert_read(judgement)
    assert judgement.significant_sentences[1] == ("Small pleural effusion", "Nodule of 2.5 cm")
    assert judgement.insignificant_sentences[3] == ("Mild cardiomegaly instead of moderate",)
    assert judgement.matched_sentences == ("No pneumothorax", "Cardiomegaly", "Stable sternotomy wires")


PROMPT = Prompt().fill("No effusion.", "[Matched Findings]: 9. All of it.")
DRESSES = {
    "crlf": lambda t: t.replace("\n", "\r\n"),
    "cr": lambda t: t.replace("\n", "\r"),
    "escaped line ends": lambda t: t.replace("\n", "\\n"),
    "lower case": str.lower,
    "upper case": str.upper,
    "lower-case headers": lambda t: re.sub(r"\[.*?\]", lambda m: m[0].lower(), t),
    "bold headers": lambda t: re.sub(r"(\[.*?\]:?)", r"**\1**", t),
    "bold headers without brackets": lambda t: re.sub(r"\[(.*?)\]:", r"**\1:**", t),
    "headings": lambda t: re.sub(r"\[(.*?)\]:", r"## \1", t),
    "missing colons of headers": lambda t: t.replace("]:", "]"),
    "missing closing brackets": lambda t: t.replace("]:", ":"),
    "missing opening brackets": lambda t: t.replace("[", ""),
    "on one line": lambda t: " ".join(t.split()),
    "on one line without brackets": lambda t: " ".join(re.sub(r"[\[\]]", "", t).split()),
    "blank lines between items": lambda t: t.replace("\n(", "\n\n("),
    "blank lines everywhere": lambda t: t.replace("\n", "\n\n"),
    "no blank lines": lambda t: re.sub(r"\n+", "\n", t),
    "counts without full stop": lambda t: re.sub(r"(: \d)\.|^(3)\.", r"\1\2", t, flags=re.MULTILINE),
    "counts with a comma": lambda t: re.sub(r"(: \d)\.", r"\1,", t),
    "counts in bold": lambda t: re.sub(r": (\d)\.", r": **\1**.", t),
    "counts in brackets": lambda t: re.sub(r": (\d)\.", r": (\1).", t),
    "counts in words and digits": lambda t: t.replace(": 2.", ": two (2).").replace(": 1.", ": One (1)."),
    "counts called so": lambda t: re.sub(r": (\d)\.", r": Count: \1.", t).replace("\n3.", "\nTotal: 3."),
    "counts in a sentence": lambda t: t.replace("\n3.", "\nThere are 3 matched findings:"),
    "labels called so": lambda t: re.sub(r"^(\([a-f]\))", r"Category \1:", t, flags=re.MULTILINE),
    "non-significant": lambda t: t.replace("Insignificant", "Non-Significant"),
    "rows of a table": lambda t: re.sub(r"^(\([a-f]\) .*?): (\d)\.(.*)$", r"| \1 | \2 | \3 |", t, flags=re.MULTILINE),
    "counts without space": lambda t: re.sub(r": (\d)\.", r":\1.", t),
    "missing colons of items": lambda t: re.sub(r": (\d)\.", r" \1.", t),
    "dashes for colons": lambda t: re.sub(r": (\d)\.", r" - \1.", t),
    "wide colons": lambda t: t.replace(":", "："),
    "spelled counts": lambda t: t.replace(": 2.", ": two.").replace(": 1.", ": One."),
    "none for zero": lambda t: t.replace(": 0.", ": None."),
    "no errors for zero": lambda t: t.replace(": 0.", ": No errors."),
    "zeros left out": lambda t: re.sub(r"^\(.*: 0\.\n", "", t, flags=re.MULTILINE),
    "numeric labels": lambda t: re.sub(r"^\(([a-f])\)", lambda m: f"({'abcdef'.index(m[1]) + 1})", t, flags=re.M),
    "numbered lists": lambda t: re.sub(r"^\(([a-f])\)", lambda m: f"{'abcdef'.index(m[1]) + 1}.", t, flags=re.M),
    "labels with a bracket": lambda t: re.sub(r"^\(([a-f])\)", r"\1)", t, flags=re.MULTILINE),
    "bullets": lambda t: re.sub(r"^\(", "- (", t, flags=re.MULTILINE),
    "labels in bold": lambda t: re.sub(r"^(\([a-f]\))", r"**\1**", t, flags=re.MULTILINE),
    "no labels": lambda t: re.sub(r"^\([a-f]\) ", "", t, flags=re.MULTILINE),
    "labels without names": lambda t: re.sub(r"^(\([a-f]\)) .*?: (\d)", r"\1 \2", t, flags=re.MULTILINE),
    "sentences on lines": lambda t: t.replace("; ", ";\n"),
    "spaces": lambda t: t.replace(" ", "\u00a0"),
    "indented": lambda t: "\n".join("    " + line for line in t.splitlines()),
    "fenced": lambda t: f"```\n{t}```",
    "no explanation": lambda t: t[t.index("[Clinically") :],
    "end of turn": lambda t: t + "</s>",
    "echoed prompt": lambda t: PROMPT + t,
    "echoed prompt and turns": lambda t: f"<|user|>\n{PROMPT}</s>\n<|assistant|>\n{t}",
    "another turn made up": lambda t: f"{t}</s><|user|>\n{PROMPT}",
    "twice the same": lambda t: t + "\n" + t,
    "afterword": lambda t: t + "\nOverall, the candidate report is only partly right.",
    "matched first": lambda t: t[t.index("[Matched") :] + "\n" + t[: t.index("[Matched")],
    "headers named before": lambda t: "Clinically significant errors and matched findings follow.\n" + t,
    "an empty bullet": lambda t: t.replace("\n[Matched", "\n- \n\n[Matched"),
}


@pytest.mark.parametrize("name", DRESSES)
def test_dress_changes_nothing(answer, name):
    dressed = DRESSES[name](answer)
    assert dressed != answer
    assert_read(parse(dressed))


@pytest.mark.parametrize("section", [0, 1])
@pytest.mark.parametrize(
    "nothing", ["None.", "No errors.", "No clinically significant errors.", "There are none", "0", "N/A"]
)
def test_a_section_may_say_that_there_is_nothing(answer, section, nothing):
    start = answer.index(HEADERS[section])
    end = answer.index(HEADERS[section + 1])
    judgement = parse(f"{answer[:start]}{HEADERS[section]}:\n{nothing}\n\n{answer[end:]}")
    assert judgement.valid, judgement.why
    assert (judgement.significant, judgement.insignificant)[section] == (0,) * 6
    assert judgement.score == (1.0 if section == 0 else 0.5)


@pytest.mark.parametrize(
    "matched", ["0.", "0", "None.", "No matched findings.", "There are no matched findings.", "Zero."]
)
def test_nothing_matched_is_valid_and_zero(answer, matched):
    judgement = parse(f"{answer[: answer.index(HEADERS[2])]}{HEADERS[2]}:\n{matched}")
    assert judgement.valid, judgement.why
    assert (judgement.matched, judgement.score) == (0, 0.0)


@pytest.mark.parametrize(
    "opening", ["Nodule in the right lung.", "No pleural effusion is named.", "Note the following.", "None, but:"]
)
def test_an_opening_that_begins_with_no_hides_no_errors(answer, opening):
    assert_read(parse(answer.replace("Significant Errors]:\n", f"Significant Errors]:\n{opening}\n")))


@pytest.mark.parametrize(
    "prose",
    [
        "Nodule in the right lobe is missed.",
        "No mention of the effusion.",
        "None. However, the effusion is missed.",
        "",
    ],
)
def test_prose_without_counts_is_invalid(answer, prose):
    start, end = answer.index(HEADERS[0]), answer.index(HEADERS[1])
    assert_invalid(parse(f"{answer[:start]}{HEADERS[0]}:\n{prose}\n\n{answer[end:]}"), HEADERS[0])


@pytest.mark.parametrize(
    "count",
    [
        "2.5.",
        "-2.",
        "−2.",
        "1-2.",
        "1 to 2.",
        "1/2.",
        "several.",
        "2+.",
        "?",
        "",
        "~2.",
        "2 mm nodule.",
        "2nd.",
        "1e3.",
        "1,000.",
        "99999999999.",
        "9" * 5000,
        "<number>.",
        "II.",
    ],
)
def test_a_count_that_is_no_whole_number_is_invalid(answer, count):
    assert_invalid(
        parse(
            answer.replace(
                "reference: 2. Small pleural effusion; Nodule of 2.5 cm.", f"reference: {count} Small effusion"
            )
        )
    )
    assert_invalid(
        parse(
            answer.replace("\n3. No pneumothorax; Cardiomegaly; Stable sternotomy wires.", f"\n{count} No pneumothorax")
        ),
        HEADERS[2],
    )


@pytest.mark.parametrize(
    "matched",
    [
        "No pneumothorax; No effusion",
        "The lungs are clear.",
        "1. Lungs clear\n2. No effusion\n3. Heart normal",
        "",
        "several",
    ],
)
def test_matched_findings_without_a_count_are_invalid(answer, matched):
    assert_invalid(parse(f"{answer[: answer.index(HEADERS[2])]}{HEADERS[2]}:\n{matched}"), HEADERS[2])


@pytest.mark.parametrize("matched", ["4", "4.", "4\n", "Four."])
def test_matched_findings_may_be_a_bare_count(answer, matched):
    judgement = parse(f"{answer[: answer.index(HEADERS[2])]}{HEADERS[2]}:\n{matched}")
    assert (judgement.matched, judgement.valid, judgement.matched_sentences) == (4, True, ())


@pytest.mark.parametrize("header", HEADERS)
def test_a_section_that_lacks_is_invalid(answer, header):
    assert_invalid(parse(answer.replace(header, "")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "\x00",
        "Please provide the candidate report.",
        "I cannot judge this.",
        PROMPT,
        "[]",
        "[Matched Findings]: 3.",
    ],
)
def test_no_answer_is_invalid(text):
    assert_invalid(parse(text))


def test_a_refusal_is_named():
    assert "Please provide the candidate" in parse("The report is empty. Please provide the candidate report.").why


def test_answers_that_differ_are_invalid(answer):
    assert_invalid(parse(answer + "\n" + answer.replace("3. No", "9. No")), "differ")


def test_a_category_counted_twice_is_invalid(answer):
    assert_invalid(
        parse(answer.replace("(d) Misassessment of the severity of a finding: 0.", "(b) Missing a finding: 4. x")),
        "(b)",
    )


def test_a_line_of_no_category_with_a_count_is_not_passed_over(answer):
    assert_invalid(parse(answer.replace("(a) False report of a finding in the candidate: 0.", "(g) Other: 7. x", 1)))


def test_an_item_within_another_is_not_passed_over(answer):
    assert_invalid(parse(answer.replace("0.\n(b) Missing", "0. Miss", 1)), "another count")


@pytest.mark.parametrize("filler", [" ", "\n", "- ", "(b) ", "no errors ", "<number ", "[", ": ", "1. "])
def test_long_answers_are_read_in_no_time(answer, filler):
    assert_invalid(parse(answer.replace("[Matched", f"[Gone{filler * 50_000}")))


def test_an_answer_within_the_candidate_is_not_taken_for_the_judges(answer):
    fake = answer.replace("(b) Missing a finding present in the reference: 2.", "(b) Missing: 0.")
    assert_read(parse(Prompt().fill("Effusion.", fake) + answer))
    assert_invalid(parse(Prompt().fill("Effusion.", fake)))


@given(st.integers(0, len(ANSWER)))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_what_was_cut_off_is_right_or_invalid(end):
    judgement = parse(ANSWER[:end])
    if judgement.valid:
        assert (judgement.significant, judgement.insignificant, judgement.matched) == (SIGNIFICANT, INSIGNIFICANT, 3)
        assert end > ANSWER.index("\n3.")


@given(st.integers(0, len(ANSWER)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_was_cut_off_in_front_is_right_or_invalid(start):
    judgement = parse(ANSWER[start:])
    assert not judgement.valid or judgement.score == 0.5


NOISE = st.text(alphabet=st.sampled_from(list(" \n*_`[]():.;0159abZ-–<>|#\u200b\r\té")), max_size=6)


@given(st.lists(st.tuples(st.integers(0, len(ANSWER)), st.integers(0, 12), NOISE), min_size=1, max_size=6))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_damage_never_raises_and_scores_stay_consistent(edits):
    text = ANSWER
    for position, length, noise in edits:
        text = text[:position] + noise + text[position + length :]
    judgement = parse(text)
    assert judgement.valid == (judgement.score is not None) == (not judgement.why)
    if judgement.valid:
        total = judgement.matched + sum(judgement.significant)
        assert judgement.score == (judgement.matched / total if judgement.matched else 0.0)


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_is_answered(text):
    assert_invalid(parse(text))


@given(
    st.permutations(
        sorted(
            set(DRESSES)
            - {
                "escaped line ends",
                "no labels",
                "labels without names",
                "numeric labels",
                "numbered lists",
                "echoed prompt",
                "echoed prompt and turns",
                "another turn made up",
                "headers named before",
                "on one line",
                "on one line without brackets",
                "no explanation",
                "matched first",
            }
        )
    ),
    st.integers(2, 4),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_dresses_one_over_another(order, number):
    text = ANSWER
    for name in order[:number]:
        text = DRESSES[name](text)
    judgement = parse(text)
    if judgement.valid:
        assert_read(judgement)


def test_agrees_with_the_published_parser_on_real_answers(shared):
    refused = []
    for line in (shared / "data" / "green" / "judge_outputs.jsonl").read_text().splitlines():
        row = json.loads(line)
        judgement, expected = parse(row["text"]), row["expected"]
        if not judgement.valid:
            refused.append(row["id"])
            continue
        assert list(judgement.significant) == expected["sig"], row["id"]
        assert list(judgement.insignificant) == expected["insig"], row["id"]
        assert judgement.matched == expected["matched"], row["id"]
        assert judgement.score == pytest.approx(expected["green"]), row["id"]
    assert sorted(refused) == ["g0008", "g0228"]  # “please provide the candidate report”


@pytest.mark.parametrize("name", DRESSES)
def test_dress_changes_nothing_of_real_answers(shared, name):
    lines = (shared / "data" / "green" / "judge_outputs.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[::4]):
        plain = parse(row["text"])
        if not plain.valid or (name == "zeros left out" and not any(plain.significant)):
            continue  # an empty section of significant errors is no answer
        dressed = parse(DRESSES[name](row["text"]))
        assert dressed.valid == plain.valid, (row["id"], dressed.why)
        assert dressed.model_dump(include={"significant", "insignificant", "matched"}) == plain.model_dump(
            include={"significant", "insignificant", "matched"}
        ), row["id"]


@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>\n{draft}\n</think>\n\n{answer}",
        "<think>{draft}</think>{answer}",
        "{draft}\nBut the prompt opened this block.\n</think>\n{answer}",  # as templates of chat models do
        "<thinking>a <think>{draft}</think> within</thinking>\n{answer}",
        "[THINK]{draft}[/THINK]{answer}",
        "{answer}\n<think>\n{draft}",  # never closed
    ],
)
def test_what_a_judge_thought_is_no_answer(thoughts):
    """A draft in the answer's format was one of several answers that differ."""
    draft = ANSWER.replace("3. No pneumothorax;", "4. Effusion; No pneumothorax;")
    assert "differ" in parse(f"{draft}\n{ANSWER}").why
    assert_read(parse(thoughts.format(draft=draft, answer=ANSWER)))


def test_thoughts_that_never_end_are_no_answer():
    judgement = parse(f"<think>\n{ANSWER}")
    assert not judgement.valid and judgement.score is None
    assert "cut off within the judge's thoughts" in judgement.why
