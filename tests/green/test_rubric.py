"""A rubric of one's own: the worked example of the docs, asked of a small server here."""

import re
import sys
from pathlib import Path

import pytest
from green_server import serving

from mu2llm.errors import UserError
from mu2llm.green import check_judge, decides, load_judge, measures
from mu2llm.settings.green import JudgeConfig

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example as a module that can be imported."""
    [code] = [each for each in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "class Grade" in each]
    (tmp_path / "my_rubric.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "python:my_rubric:Grade"
    sys.modules.pop("my_rubric", None)


def test_the_example_of_the_docs_asks_and_reads(example):
    def reply(request):
        prompt = request["messages"][0]["content"]
        return "Grade: 9" if "Emphysema" in prompt else "I cannot say."

    with serving(reply) as server:
        config = JudgeConfig(name=f"{example}@openai:judge@{server.url}")
        check_judge(config)
        judge = load_judge(config)
        graded, silent, empty = judge.judge([("Emphysema. " * 400, "Emphysema."), ("Clear.", "Clear."), ("Clear.", "")])
    assert (graded.valid, graded.score) == (True, 0.9) and "grade 1" in graded.judge and "judge@127" in graded.judge
    assert not silent.valid and "Grade: N" in silent.why and (empty.valid, empty.score) == (True, 0.0)
    assert measures(judge) == "grade" and decides(config)["judge.rubric"] == "grade 1"
    assert len(server.requests) == 2  # a long report is graded as a whole


@pytest.mark.parametrize(
    "name", ["python:no_such_module:Grade@openai:m@http://h/v1", "python:re:Grade@hf:m", "crimson:m", "python:re:x@y"]
)
def test_what_is_no_rubric_is_said_before_anything_is_asked(name):
    with pytest.raises(UserError, match="judge"):
        check_judge(JudgeConfig(name=name))
