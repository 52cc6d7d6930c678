"""Do the chat templates write what the models were trained on?"""

import json

import pytest

from nanojax.weights import chat

USER = {"role": "user", "content": " Hi "}


@pytest.mark.parametrize(
    ("family", "messages", "expected"),
    [
        (
            "smollm2",
            [USER],
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen2",
            [USER, {"role": "assistant", "content": "Yes?"}, USER],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
            "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen2.5",
            [USER],
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
        ),
        ("chatml", [USER], "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3",
            [{"role": "system", "content": "Be brief."}, USER],
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("raw", [{"role": "system", "content": "One"}, {"role": "user", "content": "two"}], "One\ntwo"),
    ],
)
def test_templates_hand_written(family, messages, expected):
    assert chat.TEMPLATES[family](messages) == expected


def test_own_system_message_replaces_the_default():
    text = chat.TEMPLATES["smollm2"]([{"role": "system", "content": "Be terse."}, USER])
    assert text.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user")
    assert "SmolLM" not in text


def test_smollm2_prompts_equal_the_golden_ones(shared_data):
    golden = json.loads((shared_data / "golden" / "smollm2_golden.json").read_text())
    prompts = [item["prompt"] for item in golden["items"] if item["kind"] == "chat"]
    conversations = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Write a haiku about the sea."}],
        [
            {"role": "system", "content": "You are a terse assistant."},
            {"role": "user", "content": "List three prime numbers."},
            {"role": "assistant", "content": "2, 3, 5"},
            {"role": "user", "content": "Now list the next three."},
        ],
    ]
    assert [chat.TEMPLATES["smollm2"](messages) for messages in conversations] == prompts


@pytest.mark.parametrize(
    ("template_text", "name", "family"),
    [
        (None, "SmolLM2-135M-Instruct", "smollm2"),
        (None, "Smollm2 135M 8k", "smollm2"),
        (None, "Qwen2.5-0.5B", "qwen2.5"),
        (None, "Qwen2-7B", "qwen2"),
        (None, "stories260K", "raw"),
        (
            "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}",
            "x",
            "smollm2",
        ),
        (
            r"{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}",
            "x",
            "qwen2.5",
        ),
        (r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}", "x", "qwen2"),
        ("{{ '<|im_start|>' + message['role'] }}", "Qwen2-tuned", "chatml"),
        ("{{ '<|start_header_id|>' + message['role'] }}", "x", "llama3"),
        ("{{ '[INST]' }}", "x", "raw"),
    ],
)
def test_family_is_read_off_the_template_else_the_name(template_text, name, family):
    assert chat.family_of(template_text, name) == family


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "message 0 has the keys"),
        ([USER, {"role": "tool", "content": "x"}], "message 1 has role 'tool'"),
    ],
)
def test_bad_conversations_are_named(messages, message):
    for template in chat.TEMPLATES.values():
        with pytest.raises(ValueError, match=message):
            template(messages)
