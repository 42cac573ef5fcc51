"""Between texts and tokens: chat templates, the ends of prompts and responses, padding."""

import json
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_rlhf
from finetune import evaluation, tokens
from finetune.chat import rendering
from finetune.tokens import (
    appends_end,
    end_tokens,
    load_tokenizer,
    prompt_ids,
    texts_of,
    without_second_start,
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_START = "{{ bos_token }}" + CHATML
WITH_EOS = CHATML.replace("'<|im_end|>\n'", "eos_token")
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def user(text):
    return {"role": "user", "content": text}


def encode(tokenizer, *prompts, chat_template=True):
    """Return the queries of prompts, as lists of ids."""
    rows = [{"prompt": prompt} for prompt in prompts]
    return [query.tolist() for query in tokens.encode(tokenizer, rows, chat_template)]


def ids_of(tokenizer, *texts):
    return [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]


@pytest.fixture(scope="module")
def chat_model(demo_model, tmp_path_factory):
    """Return a copy of demo_model whose turns end in a token as likely as a full stop."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
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
    return load_tokenizer(str(chat_model))


@pytest.fixture(scope="module")
def tinyllama(shared_model):
    return load_tokenizer(str(shared_model("tinyllama-shape")))


# --------------------------------------------------------------- the tokenizer
def test_the_pad_token_is_no_end_token(tinyllama, copy_of_demo_model):
    """That of TinyLlama's tokenizer is; and where there is none it gets one."""
    assert tinyllama.pad_token_id not in (None, tinyllama.eos_token_id)
    path = copy_of_demo_model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config | {"padding_side": "right"}))
    tokenizer = load_tokenizer(str(copy_of_demo_model))
    assert tokenizer.pad_token is not None
    assert tokenizer.padding_side == "left"


# ----------------------------------------------------------------- the queries
# <|user|> newline … </s> newline <|assistant|> newline; the marks are ordinary text to it
USER = (529, 29989, 1792, 29989, 29958, 13)
ASSISTANT = (2, 13, 29966, 29989, 465, 22137, 29989, 29958, 13)
TINYLLAMA = {
    "Say something nice.": [*USER, 29903, 388, 1554, 7575, 29889, *ASSISTANT],
    "Hi": [*USER, 18567, *ASSISTANT],
}


def test_prompts_in_the_template_of_tinyllama(tinyllama):
    assert encode(tinyllama, *TINYLLAMA) == [*TINYLLAMA.values()]
    messages = [[user(text)] for text in TINYLLAMA]
    assert encode(tinyllama, *messages, chat_template=False) == [*TINYLLAMA.values()]
    # A text alone has its start token, once.
    assert encode(tinyllama, "Hi", chat_template=False) == [[1, 6324]]
    assert end_tokens([2], tinyllama) == [2]


def test_conversations_go_through_the_template_and_texts_where_wanted(tokenizer):
    """A text is a turn of the user before one of the assistant."""
    turns = [{"role": "system", "content": "Be kind"}, user("Hi")]
    turns += [{"role": "assistant", "content": "Yes"}, user("And?")]
    text = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    text += "<|im_start|>assistant\nYes<|im_end|>\n" + TURN.format("And?")
    both = [text, TURN.format("I feel so")]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in both]
    assert encode(tokenizer, turns, "I feel so") == wanted
    plain = tokenizer("I feel so")["input_ids"]
    assert encode(tokenizer, turns, "I feel so", chat_template=False) == [wanted[0], plain]


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


@pytest.fixture
def ending(tokenizer):
    """Return a tokenizer that puts start and end around every text, as some of decoders do."""
    start, end = tokenizer.bos_token, tokenizer.eos_token
    ids = [(start, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.mark.parametrize("chat_template", [False, True])
def test_an_end_token_of_the_tokenizer_s_own_is_not_put_behind_a_decoder_s_prompts(
    ending, chat_template
):
    """After it the answer would be over; but an encoder's query has one, as it has learned."""
    (query,) = encode(ending, "I feel so", chat_template=chat_template)
    assert ending.eos_token_id not in query
    assert tokens.decode(ending, [query])[0].count("I feel so") == 1
    if not chat_template:
        words = ending("I feel so", add_special_tokens=False)["input_ids"]
        assert query == [ending.bos_token_id, *words]
        ending.padding_side = "right"
        assert encode(ending, "I feel so", chat_template=False) == [[*query, ending.eos_token_id]]


def test_an_end_token_in_the_text_of_a_prompt_stays(ending):
    """Once: it may stand between what was said before and what is asked."""
    end, start = ending.eos_token_id, ending.bos_token_id
    one, other = (ending(text, add_special_tokens=False)["input_ids"] for text in ("Hi", "Yes"))
    between = prompt_ids(ending, f"Hi{ending.eos_token}Yes", drops_end=appends_end(ending))
    assert between[0] == start and between.count(end) == 1 and between[-1] != end
    assert between[1 : len(one) + 2] == [*one, end] and other
    behind = prompt_ids(ending, f"Hi{ending.eos_token}", drops_end=appends_end(ending))
    assert behind[: len(one) + 2] == [start, *one, end]


def test_an_end_token_at_the_end_of_a_text_does_not_get_a_second_one(ending):
    for text in (f"Hi{ending.eos_token}", f"Hi{ending.eos_token} "):
        ids = prompt_ids(ending, text, drops_end=appends_end(ending))
        assert ids.count(ending.eos_token_id) == 1


@pytest.mark.parametrize("text", ["I feel so", "{}I feel so"])
def test_a_text_with_a_start_token_of_its_own_does_not_get_a_second_one(tokenizer, text):
    start = tokenizer.bos_token_id
    words = tokenizer("I feel so", add_special_tokens=False)["input_ids"]
    (query,) = encode(tokenizer, text.format(tokenizer.bos_token), chat_template=False)
    assert query == [start, *words]


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [([1, 1, 5], [1, 5]), ([1, 5, 1], [1, 5, 1]), ([1, 1], [1]), ([1], [1]), ([], []), ([5], [5])],
)
def test_only_the_second_start_token_goes(ids, wanted):
    assert without_second_start(SimpleNamespace(bos_token_id=1), ids) == wanted
    assert without_second_start(SimpleNamespace(bos_token_id=None), ids) == ids


def test_tools_of_a_row_are_put_into_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool['name'] }};{% endfor %}" + CHATML
    )
    row = {"prompt": [user("Hi")], "tools": [{"name": "look"}]}
    (query,) = tokens.encode(tokenizer, [row], False)
    assert tokenizer.decode(query) == "look;" + TURN.format("Hi")
    assert rendering(tokenizer, row["prompt"], row["tools"], True) == "look;" + TURN.format("Hi")
    assert rendering(tokenizer, row["prompt"], None) == "<|im_start|>user\nHi<|im_end|>\n"
    (query,) = tokens.encode(tokenizer, [row | {"tools": None}], False)
    assert tokenizer.decode(query) == TURN.format("Hi")


# ------------------------------------------------------- the end of a response
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
    ids=["one", "two", "none", "the same", "more after it", "no template", "another"],
)
def test_end_tokens_are_those_of_the_model_and_of_a_turn(tokenizer, own, template, ends):
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    wanted = [end if token == "<|im_end|>" else token for token in ends]
    assert end_tokens(own, tokenizer) == wanted


# ------------------------------------------------------------------- the texts
def test_texts_of_responses_keep_the_space_before_them(tokenizer):
    """Such as the beginnings of one, the empty one first; an end token is no text."""
    query, whole = ids_of(tokenizer, "Life is", "Life is good today, I feel")
    response = whole[len(query) :]
    assert whole[: len(query)].tolist() == query.tolist()
    beginnings = [response[:end] for end in range(len(response) + 1)]
    texts = texts_of(tokenizer, query, beginnings)
    for beginning, text in zip(beginnings, texts):
        assert texts_of(tokenizer, query, [beginning]) == [text]
    assert texts[0] == "" and texts[-1] == " good today, I feel"
    assert all(texts[-1].startswith(text) for text in texts) and len({*texts}) > 4
    end = torch.tensor([tokenizer.eos_token_id])
    ended = torch.cat([response, end])
    assert texts_of(tokenizer, query, [ended, end]) == [" good today, I feel", ""]


def test_a_text_keeps_the_space_of_a_sentencepiece_tokenizer(tinyllama):
    query, both = ids_of(tinyllama, "I am really", "I am really happy, glad")
    assert texts_of(tinyllama, query, [both[len(query) :]]) == [" happy, glad"]


def test_after_the_query_of_an_encoder_a_text_stands_alone(tokenizer):
    """That query has an end token. The space shows that no word of the prompt goes on."""
    end = torch.tensor([tokenizer.eos_token_id])
    query, response = ids_of(tokenizer, "I feel so", "happy and glad")
    query = torch.cat([query, end])
    responses = [response, torch.cat([response, end]), end, end[:0]]
    assert texts_of(tokenizer, query, responses) == [" happy and glad"] * 2 + ["", ""]


# ------------------------------------------------------------------- the batch
def test_queries_are_padded_on_the_left_and_responses_on_the_right(tokenizer):
    """By their lengths: a pad token in the middle is an ordinary one."""
    pad = tokenizer.pad_token_id
    queries = [torch.tensor(ids) for ids in ([5, pad, 7], [8])]
    responses = [torch.tensor(ids) for ids in ([9, pad], [10, 11, 12])]
    inputs, mask = tokens.pad_batch(tokenizer, queries, responses, "cpu")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    wanted = [[5, pad, 7, 9, pad, pad], [pad, pad, 8, 10, 11, 12]]
    assert inputs["input_ids"].tolist() == wanted
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_decoder_begins_with_its_start_token():
    ids = torch.tensor([[5, 6, 7, 8, 9], [0, 6, 7, 8, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    inputs, places = tokens.for_decoder(inputs, length=3, start_id=1)
    assert {name: values.tolist() for name, values in inputs.items()} == {
        "input_ids": [[5, 6], [0, 6]],
        "attention_mask": [[1, 1], [0, 1]],
        "decoder_input_ids": [[1, 7, 8], [1, 7, 8]],
    }
    assert places.tolist() == [0, 1, 2]


# ----------------------------------------------------------------- a whole run
@pytest.fixture
def said(monkeypatch):
    """Return the queries that a run answers, as texts, and its responses."""
    queries_said, responses_said = set(), []
    sample = train_rlhf.sample_responses

    def see(model, tokenizer, queries, *args, **options):
        responses, texts = sample(model, tokenizer, queries, *args, **options)
        queries_said.update(tokenizer.decode(query) for query in queries)
        responses_said.extend(response.tolist() for response in responses)
        return responses, texts

    for module in (train_rlhf, evaluation):
        monkeypatch.setattr(module, "sample_responses", see)
    return queries_said, responses_said


def test_a_run_with_the_template(call_main, chat_model, said, tmp_path, monkeypatch, capsys):
    """Its responses end with the turn, at an end token, or where they are long enough."""
    flags = "--device cpu --ppo-epochs 1 --target-approx-kl 0 --batch-size 4 --eval-samples 6"
    flags += " --training-epochs 4 --max-new-tokens 20 --chat-template"
    prompts = ["--prompts", "I feel so", "Life is", "--eval-prompts", "My day was"]
    assert call_main("--model-name", chat_model, *flags.split(), *prompts) == 0
    queries, responses = said
    assert queries == {TURN.format(text) for text in ("I feel so", "Life is", "My day was")}
    assert re.search(r"\n    (I feel so|Life is) \|", capsys.readouterr().out)  # the sample

    folder = tmp_path / "trained_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = {end, tokenizer.eos_token_id}
    assert sum(response[-1] == end for response in responses) > 3
    for response in responses:
        assert not ends & {*response[:-1]}
        assert response[-1] in ends or len(response) == 20

    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["prompt"] for sample in samples} == {"I feel so", "Life is"}
    assert not any("<|" in sample["response"] for sample in samples)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["chat"] is True
    saved = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert end in saved["eos_token_id"]
    assert tokenizer.chat_template == CHATML

    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card[card.index("    from transformers") : card.index("\n![")]
    monkeypatch.chdir(folder)
    exec(textwrap.dedent(code), {})
    told = "[{'role': 'user', 'content': 'I feel so'}, {'role': 'assistant', 'content': "
    assert told in capsys.readouterr().out
