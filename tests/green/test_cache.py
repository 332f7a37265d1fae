"""One judgement asked once, whoever asks."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mu2llm import storage
from mu2llm.green.cache import CachedJudge
from mu2llm.records import Judgement


class Counting:
    """Scores by length and counts what it is asked."""

    def __init__(self, identity: str = "counting") -> None:
        self.identity, self.asked = identity, []

    def judge(self, pairs):
        self.asked += pairs
        return [
            Judgement(valid=True, score=1.0, matched=1, matched_sentences=(candidate,), judge=self.identity)
            if candidate
            else Judgement(valid=False, score=None, why="empty", judge=self.identity)
            for _, candidate in pairs
        ]


PAIRS = [("a", "b"), ("a", "c"), ("a", "b"), ("a", ""), ("ab", "c"), ("a", "bc")]


def test_asked_once(tmp_path):
    inner = Counting()
    judge = CachedJudge(inner, str(tmp_path))
    first = judge.judge(PAIRS)
    assert inner.asked == [("a", "b"), ("a", "c"), ("a", ""), ("ab", "c"), ("a", "bc")]
    assert first == Counting().judge(PAIRS)
    assert judge.judge(PAIRS) == first and len(inner.asked) == 5


def test_shared_through_storage(tmp_path):
    CachedJudge(Counting(), str(tmp_path)).judge(PAIRS)
    again = Counting()
    other = CachedJudge(again, str(tmp_path))
    assert other.judge([*PAIRS, ("new", "one")]) == Counting().judge([*PAIRS, ("new", "one")])
    assert again.asked == [("new", "one")]


def test_what_another_wrote_meanwhile_is_not_asked_again(tmp_path):
    mine, theirs = Counting(), Counting()
    early = CachedJudge(mine, str(tmp_path))
    early.judge([("a", "b")])
    CachedJudge(theirs, str(tmp_path)).judge([("x", "y")])
    early.judge([("x", "y")])
    assert mine.asked == [("a", "b")]


def test_another_judge_is_asked_anew(tmp_path):
    CachedJudge(Counting(), str(tmp_path)).judge(PAIRS)
    other = Counting("another")
    CachedJudge(other, str(tmp_path)).judge(PAIRS)
    assert len(other.asked) == 5


def test_what_was_judged_before_a_crash_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("mu2llm.green.cache._CHUNK", 2)

    class Failing(Counting):
        def judge(self, pairs):
            if len(self.asked) >= 2:
                raise ConnectionError
            return super().judge(pairs)

    with pytest.raises(ConnectionError):
        CachedJudge(Failing(), str(tmp_path)).judge(PAIRS)
    rest = Counting()
    CachedJudge(rest, str(tmp_path)).judge(PAIRS)
    assert rest.asked == [("a", ""), ("ab", "c"), ("a", "bc")]


def test_judgements_are_kept_as_they_come(tmp_path, monkeypatch):
    """128 pairs were waited for together, though all but one of them were done."""
    monkeypatch.setattr("mu2llm.green.cache._CHUNK", 2)

    class Streaming(Counting):
        def each(self, pairs):
            for number in reversed(range(1, len(pairs))):
                yield number, self.judge([pairs[number]])[0]
            raise ConnectionError

    with pytest.raises(ConnectionError):
        CachedJudge(Streaming(), str(tmp_path)).judge(PAIRS)
    rest = Counting()
    assert CachedJudge(rest, str(tmp_path)).judge(PAIRS) == Counting().judge(PAIRS)
    assert rest.asked == [("a", "b")]


def test_few_judgements_are_held_and_the_others_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr("mu2llm.green.cache._CHUNK", 2)
    monkeypatch.setattr("mu2llm.green.cache._RECENT", 3)
    pairs = [("r", str(i)) for i in range(11)]
    inner = Counting()
    judge = CachedJudge(inner, str(tmp_path))
    for _ in range(2):
        assert judge.judge(pairs) == Counting().judge(pairs)
    assert judge.judge([pairs[7], pairs[1], pairs[10]]) == Counting().judge([pairs[7], pairs[1], pairs[10]])
    assert inner.asked == pairs and len(judge._recent) == 3


def test_many_at_once(tmp_path):
    pairs = [("r", str(i)) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: CachedJudge(Counting(), str(tmp_path)).judge(pairs), range(4)))
    assert all(judgements == Counting().judge(pairs) for judgements in found)
    late = Counting()
    CachedJudge(late, str(tmp_path)).judge(pairs)
    assert late.asked == []


def test_half_a_character_is_a_key_too(tmp_path):
    judge = CachedJudge(Counting(), storage.join(str(tmp_path), "deep/er"))
    assert len(judge.judge([("\ud800", "a"), ("\ud801", "a")])) == 2
