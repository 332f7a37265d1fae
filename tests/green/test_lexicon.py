"""The lexicon as data."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mu2llm.green import LABELS
from mu2llm.green.lexicon import lexicon

DEMO = {
    "pleural effusion": True,
    "pneumothorax": True,
    "consolidation": True,
    "lung nodule": True,
    "pericardial effusion": False,
    "liver lesion": False,
    "renal cyst": True,
    "vertebral sclerosis": False,
}


def test_every_label_has_a_finding_and_every_finding_of_the_demo_is_there():
    assert {entry.label for entry in lexicon().entries} - {None} == set(LABELS)
    for name, sided in DEMO.items():
        assert lexicon().by_name[name].sided == sided


def test_rows_of_a_name_agree_on_side_and_places():
    for entry in lexicon().entries:
        first = lexicon().by_name[entry.name]
        assert (entry.sided, entry.places) == (first.sided, first.places)


TERMS = [term for entry in lexicon().entries for term in entry.terms if term.literal]


@given(st.sampled_from(TERMS).flatmap(lambda term: st.tuples(st.just(term.literal), st.from_regex(term.pattern))))
@settings(max_examples=600, deadline=None, derandomize=True)
def test_no_term_is_passed_over_by_its_literal(drawn):
    literal, match = drawn
    assert literal in match
