"""GREEN: the score of a report against a reference (METHOD.md §4.1), its judges, and what rules read in a report."""

from mu2llm.green.consistency import agreement, parts
from mu2llm.green.findings import findings, labels
from mu2llm.green.identity import decides, rules_identity
from mu2llm.green.judge import GREEN, Judge, measures
from mu2llm.green.judges import check_judge, load_judge
from mu2llm.green.lexicon import LABELS
from mu2llm.green.paraphrase import judge_reworded, reworded, rewording
from mu2llm.green.parser import parse
from mu2llm.green.prompt import write_answer
from mu2llm.green.scoring import label_lines, parse_lines, score_lines, score_pairs
from mu2llm.green.sentences import sentences

__all__ = [
    "GREEN",
    "LABELS",
    "Judge",
    "agreement",
    "check_judge",
    "decides",
    "findings",
    "judge_reworded",
    "label_lines",
    "labels",
    "load_judge",
    "measures",
    "parse",
    "parse_lines",
    "parts",
    "reworded",
    "rewording",
    "rules_identity",
    "score_lines",
    "score_pairs",
    "sentences",
    "write_answer",
]
