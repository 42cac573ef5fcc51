"""Chat models: prompts in the tokenizer's own template, and the end of a turn as the end of a response."""

import json
import re
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_rlhf

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_START = "{{ bos_token }}" + CHATML
WITH_EOS = CHATML.replace("'<|im_end|>\n'", "eos_token")
FAST = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0", "--batch-size", "4"]
FAST += ["--max-new-tokens", "5", "--eval-samples", "6", "--training-epochs", "1"]


def user(text):
    return {"role": "user", "content": text}


def encode(tokenizer, *prompts, chat_template=True):
    """Return the queries of prompts, as lists of ids."""
    rows = [{"prompt": prompt} for prompt in prompts]
    return [query.tolist() for query in train_rlhf.encode(tokenizer, rows, chat_template)]


@pytest.fixture(scope="module")
def chat_model(demo_model, tmp_path_factory):
    """Return a copy of demo_model with turns that end in a token that is as likely as a full stop."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer))
    end, stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "."])
    assert stop is not None and end == len(tokenizer) - 1
    with torch.no_grad():
        weight = model.get_input_embeddings().weight  # of the output too: they are tied
        weight[end] = weight[stop]
    folder = tmp_path_factory.mktemp("chat_model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(chat_model):
    return AutoTokenizer.from_pretrained(chat_model)


# --------------------------------------------------------------------------------------- the queries
# <|user|> newline … </s> newline <|assistant|> newline; the marks are ordinary text to it
TINYLLAMA = {
    "Say something nice.": [
        *(529, 29989, 1792, 29989, 29958, 13, 29903, 388, 1554, 7575, 29889, 2, 13),
        *(29966, 29989, 465, 22137, 29989, 29958, 13),
    ],
    "Hi": [
        *(529, 29989, 1792, 29989, 29958, 13, 18567, 2, 13),
        *(29966, 29989, 465, 22137, 29989, 29958, 13),
    ],
}


def test_prompts_in_the_template_of_tinyllama(shared_model):
    tokenizer = train_rlhf.load_tokenizer(shared_model("tinyllama-shape"))
    assert encode(tokenizer, *TINYLLAMA) == [*TINYLLAMA.values()]
    messages = [[user(text)] for text in TINYLLAMA]
    assert encode(tokenizer, *messages, chat_template=False) == [*TINYLLAMA.values()]
    assert encode(tokenizer, "Hi", chat_template=False) == [[1, 6324]]  # its start token, once
    assert train_rlhf.end_tokens([2], tokenizer) == [2]


def test_a_prompt_is_a_turn_of_the_user_before_one_of_the_assistant(tokenizer):
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    (query,) = encode(tokenizer, "I feel so")
    text = "<|im_start|>user\nI feel so<|im_end|>\n<|im_start|>assistant\n"
    assert query == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert query.count(start) == 2 and tokenizer.bos_token_id not in query


def test_a_conversation_goes_through_the_template_and_a_text_only_where_it_is_wanted(tokenizer):
    turns = [{"role": "system", "content": "Be kind"}, user("Hi")]
    turns += [{"role": "assistant", "content": "Yes"}, user("And?")]
    text = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in turns)
    wanted = tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    plain = tokenizer("I feel so")["input_ids"]
    assert encode(tokenizer, turns, "I feel so", chat_template=False) == [wanted, plain]
    templated, other = encode(tokenizer, turns, "I feel so")
    assert templated == wanted and other != plain


@pytest.mark.parametrize("template", [CHATML, WITH_START], ids=["none", "its own"])
def test_there_are_never_two_start_tokens(tokenizer, template):
    """The tokenizer writes one by itself, where there is no template."""
    tokenizer.chat_template = template
    start = tokenizer.bos_token_id
    for query in encode(tokenizer, "I feel so", [user("Hi")]):
        assert query.count(start) == (template == WITH_START)
        assert start not in query[1:]
    (plain,) = encode(tokenizer, "I feel so", chat_template=False)
    assert plain.count(start) == 1 and plain[0] == start


def test_the_template_takes_of_the_context_too(chat_model, tokenizer, make_settings):
    """Of 256 tokens 4 are left for a prompt: enough for it, not for its template."""
    rows = [{"prompt": "I feel so"}]
    assert len(tokenizer("I feel so")["input_ids"]) <= 4
    settings = make_settings("--max-new-tokens", "252")
    context = train_rlhf.context_of(chat_model)
    assert train_rlhf.prompts_that_fit(context, tokenizer, rows, settings) == rows
    settings = make_settings("--max-new-tokens", "252", "--chat-template")
    with pytest.raises(train_rlhf.SettingsError, match="MAX_NEW_TOKENS is 252, too many for every"):
        train_rlhf.prompts_that_fit(context, tokenizer, rows, settings)


# ------------------------------------------------------------------------------ the end of a response
@pytest.mark.parametrize(
    ("own", "template", "ends"),
    [
        (2, CHATML, [2, "<|im_end|>"]),
        ([2, 1], CHATML, [2, 1, "<|im_end|>"]),
        (None, CHATML, [2, "<|im_end|>"]),  # the tokenizer's, where the model names none
        (2, WITH_EOS, [2]),
        (2, CHATML.replace("<|im_end|>", "<|im_end|><|im_start|>"), [2, "<|im_end|>"]),
        (2, None, [2]),
        (2, "{{ raise_exception('not for these') }}", [2]),
    ],
    ids=["one", "two", "none", "the same", "more after it", "no template", "another template"],
)
def test_the_end_tokens_are_those_of_the_model_and_of_a_turn(tokenizer, own, template, ends):
    tokenizer.chat_template = template
    ends = [tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end for end in ends]
    assert train_rlhf.end_tokens(own, tokenizer) == ends


def test_a_response_ends_with_the_turn(build, make_settings, chat_model, roll_out):
    flags = ("--model-name", str(chat_model), "--chat-template", "--max-new-tokens", "20")
    built = build(make_settings(*flags))
    end = built.tokenizer.convert_tokens_to_ids("<|im_end|>")
    queries = train_rlhf.encode(built.tokenizer, built.rows * 4, True)
    responses, texts = roll_out(built, queries)
    ended = [response.tolist() for response in responses if end in response]
    assert len(ended) > 3
    assert all(ids.index(end) == len(ids) - 1 for ids in ended)
    others = [response.tolist() for response in responses if end not in response]
    assert all(len(ids) == 20 or ids[-1] == built.tokenizer.eos_token_id for ids in others)
    assert not any("im_end" in text for text in texts)


# --------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("messages", [False, True], ids=["texts", "messages"])
def test_a_model_without_a_template_starts_nothing(
    call_main, demo_model, tmp_path, capsys, messages
):
    flags = ["--chat-template"]
    if messages:
        lines = [json.dumps({"messages": [user(text)]}) for text in ("Hi", "Ho")]
        (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
        flags = ["--prompts", "chats.jsonl"]
    assert call_main("--model-name", demo_model, *FAST, *flags) == 2
    first, line = capsys.readouterr().err.splitlines()
    assert first == "Nothing was started or changed:"
    assert line.startswith(f"- CHAT_TEMPLATE is {not messages}: ")
    assert line.endswith(
        ": name a model with a chat template that takes these prompts, or give texts and False"
    )
    assert not (tmp_path / "trained_model").exists()


@pytest.fixture
def asked(monkeypatch):
    """Return the queries that a run answers, as texts, gathered while it runs."""
    texts, answer = set(), train_rlhf.rollout

    def rollout(policy, tokenizer, queries, numbers, size):
        texts.update(tokenizer.decode(query) for query in queries)
        return answer(policy, tokenizer, queries, numbers, size)

    monkeypatch.setattr(train_rlhf, "rollout", rollout)
    return texts


def read_results(folder):
    """Return the report, the samples and what the card's Python prints."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = textwrap.dedent(card[card.index("    from transformers") : card.index("\n![")])
    return report, [json.loads(line) for line in lines], code


def test_a_run_with_the_template(call_main, chat_model, asked, tmp_path, monkeypatch, capsys):
    flags = ["--prompts", "I feel so", "Life is", "--eval-prompts", "My day was", "--chat-template"]
    assert call_main("--model-name", chat_model, *FAST, *flags) == 0
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert asked == {turn.format(text) for text in ("I feel so", "Life is", "My day was")}
    assert re.search(r"\n    (I feel so|Life is) \|", capsys.readouterr().out)  # the sample

    folder = tmp_path / "trained_model"
    report, samples, code = read_results(folder)
    assert report["chat"] is True
    assert {sample["prompt"] for sample in samples} == {"I feel so", "Life is"}
    assert not any("<|" in sample["response"] for sample in samples)
    saved = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in saved["eos_token_id"]
    assert tokenizer.chat_template == CHATML
    monkeypatch.chdir(folder)
    exec(code, {})
    told = "[{'role': 'user', 'content': 'I feel so'}, {'role': 'assistant', 'content': "
    assert told in capsys.readouterr().out


def test_a_run_on_conversations(call_main, chat_model, asked, tmp_path, monkeypatch):
    """Rows of messages use the template anyway, and the reward sees conversations and all fields."""
    rows = [{"messages": [user(f"Say {number}")], "answer": number} for number in (3, 4)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "chats.jsonl").write_text(text, encoding="utf-8")
    calls = []

    def kindness(prompts, completions, answer, **kwargs):
        calls.append((prompts, completions, answer))
        return [len(turn[0]["content"]) for turn in completions]

    monkeypatch.setattr(train_rlhf, "REWARD", kindness)
    flags = ["--prompts", "chats.jsonl", "--scale-samples", "6", "--eval-prompts"]
    assert call_main("--model-name", chat_model, *FAST, *flags) == 0
    turn = "<|im_start|>user\nSay {}<|im_end|>\n<|im_start|>assistant\n"
    assert asked == {turn.format(number) for number in (3, 4)}
    for prompts, completions, answers in calls:
        assert prompts == [[user(f"Say {number}")] for number in answers]
        for (message,) in completions:
            assert message.keys() == {"role", "content"} and message["role"] == "assistant"
    report, samples, _ = read_results(tmp_path / "trained_model")
    assert report["chat"] is True
    assert samples[0]["prompt"] in [row["messages"] for row in rows]
    assert all(sample["score"] == len(sample["response"]) for sample in samples)
