"""Are the project's own prompts complete, varied and well formed?"""

import collections
import json

import pytest

from experiments.prompts import CATEGORIES, load_prompts


def test_there_are_64_different_prompts_of_six_categories():
    prompts = load_prompts()
    assert len(prompts) == len({prompt.id for prompt in prompts}) == len({str(p.messages) for p in prompts}) == 64
    assert min(collections.Counter(prompt.category for prompt in prompts).values()) >= 9
    assert {prompt.category for prompt in load_prompts(6)} == set(CATEGORIES)


def test_lengths_vary():
    prompts = load_prompts()
    words = [sum(len(message["content"].split()) for message in prompt.messages) for prompt in prompts]
    assert min(words) < 10
    assert max(words) > 120
    assert min(p.max_tokens for p in prompts) <= 16
    assert max(p.max_tokens for p in prompts) == 256
    assert len({p.max_tokens for p in prompts}) >= 15


def test_a_summary_has_a_paragraph_of_80_to_200_words():
    for prompt in load_prompts(categories=["summary"]):
        instruction, paragraph = prompt.messages[0]["content"].split("\n\n")
        assert 80 <= len(paragraph.split()) <= 200
        assert len(instruction.split()) < 20


def test_dialogues_take_turns():
    for prompt in load_prompts(categories=["dialogue"]):
        roles = [message["role"] for message in prompt.messages if message["role"] != "system"]
        assert len(roles) >= 3
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"category \['rap'\] is unknown: question"):
        load_prompts(categories=["rap"])
    with pytest.raises(ValueError, match=r"num_prompts=65 must be in \[0, 64\]"):
        load_prompts(65)
    path = tmp_path / "bad.jsonl"
    good = {"id": "a", "category": "code", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    for change in ({"messages": []}, {"category": "rap"}, {"max_tokens": 0}, {"messages": [{"role": "user"}]}):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change))
        with pytest.raises(ValueError, match="line 2: not a prompt"):
            load_prompts(path=path)
