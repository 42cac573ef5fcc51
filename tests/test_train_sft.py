"""Supervised fine-tuning: what is read, learned, measured, shown and saved; the run is elsewhere."""

import contextlib
import functools
import gc
import io
import json
import math
import re
import statistics
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    OPTConfig,
)

import train_sft
from train_sft import TEMPLATE, SettingsError, chat_template_of, fill, read_examples, tokenize

SHORT = "Task: {instruction}\n\nInput: {input}\n\nAnswer:\n"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--template", SHORT, "--eval-every", "0"]
NAMES = ["Anna", "Ben", "a friend", "everyone", "the teacher", "my old neighbour next door"]
GREETINGS = ["hello", "good day", "thanks a lot", "good night, sleep well and dream of the sea"]
ROWS = [
    {"instruction": f"Say {said} to {name}.", "output": f"{said} {name}, I am so happy."}
    for said in GREETINGS
    for name in NAMES
]


def turns(*texts, first="user"):
    """Return a conversation of texts, the roles in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write(path, rows):
    """Write a file of rows, and return its path as a text."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def read(path, template=SHORT):
    """Return all rows of a file, sorted, and what was left out."""
    rows, eval_rows, left_out = read_examples(str(path), template, 0.1, 0)
    return sorted(rows + eval_rows, key=str), left_out


def row_of(prompt, answer):
    return {"prompt": prompt, "answer": answer, "shown": prompt or answer}


def learned(example):
    """Return the learned tokens of an example, in pieces without a gap."""
    pieces, before = [], False
    for token, label in zip(example["input_ids"], example["labels"]):
        assert label in (token, -100)
        if label != -100:
            pieces = pieces if before else [*pieces, []]
            pieces[-1].append(label)
        before = label != -100
    return pieces


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return right_padded(demo_model)


@pytest.fixture(scope="module")
def tinyllama(shared_model):
    return right_padded(shared_model("tinyllama-shape"))


def right_padded(path):
    """Return a tokenizer as the run has it."""
    found = train_sft.load_tokenizer(path)
    found.padding_side = "right"
    return found


@pytest.fixture(scope="module")
def teach(tmp_path_factory):
    """Do a run in this process; return its folder, report, metrics and what it printed."""
    gc.freeze()  # Trainer collects garbage, among all that was imported

    def run(model, rows, *flags, picture=False):
        folder = tmp_path_factory.mktemp("run")
        data = write(folder / "rows.json", rows)
        places = ["--model-name", str(model), "--data", data, "--output-dir", str(folder / "out")]
        with (
            contextlib.redirect_stdout(io.StringIO()) as printed,
            pytest.MonkeyPatch.context() as m,
        ):
            if not picture:  # which takes as long as the rest
                m.setattr(train_sft, "draw", lambda report, metrics, path: None)
            assert train_sft.main([*places, *FLAGS, *map(str, flags)]) == 0
        out = folder / "out"
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        text = printed.getvalue()
        return SimpleNamespace(folder=out, report=report, metrics=metrics, printed=text)

    yield run
    gc.unfreeze()


@pytest.fixture(scope="module")
def taught(teach, demo_model):
    """Return a run on demo_model."""
    flags = ["--training-epochs", 3, "--batch-size", 8, "--learning-rate", 1e-2]
    return teach(
        demo_model, ROWS, *flags, "--eval-share", 0.2, "--max-new-tokens", 12, picture=True
    )


# ------------------------------------------------------------------------------------ what is read
def test_an_instruction_is_read_with_its_input_and_without(tmp_path):
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Sing", "input": "", "output": "la"},
        {"instruction": "Hum", "input": " \n", "output": "mm"},
        {"instruction": "Rest", "input": "<No Input>", "output": "ok"},
        {"instruction": "Stop", "input": "\\<noinput\\>.", "output": "no"},
    ]
    found, left_out = read(write(tmp_path / "rows.json", rows))
    assert {row["prompt"]: (row["answer"], row["shown"]) for row in found} == {
        "Task: Add\n\nInput: 1 2\n\nAnswer:\n": ("3", "Add 1 2"),
        "Task: Sing\n\nAnswer:\n": ("la", "Sing"),
        "Task: Hum\n\nAnswer:\n": ("mm", "Hum"),
        "Task: Rest\n\nAnswer:\n": ("ok", "Rest"),
        "Task: Stop\n\nAnswer:\n": ("no", "Stop"),
    }
    assert left_out == {'inputs that say "noinput"': 2}


def test_prompts_are_read_from_a_list_in_a_jsonl_file_with_a_byte_order_mark(tmp_path):
    rows = [{"prompt": "봄은?", "completion": "따뜻합니다"}, {"prompt": "Hi", "completion": "Ho"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    found, _ = read(path)
    assert found == [
        {"prompt": "Task: Hi\n\nAnswer:\n", "answer": "Ho", "shown": "Hi"},
        {"prompt": "Task: 봄은?\n\nAnswer:\n", "answer": "따뜻합니다", "shown": "봄은?"},
    ]


def test_conversations_are_read_with_system_turns_and_several_answers(tmp_path):
    system = [{"role": "system", "content": "Be kind."}]
    talks = [turns("a", "b", "c", "d"), system + turns("a", "b"), turns("x", "y", "z")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk, "id": 1}) for talk in talks))
    found, _ = read(path)
    assert sorted(str(row["messages"]) for row in found) == sorted(map(str, talks))
    assert {row["shown"] for row in found} == {"a", "x"}


def test_lines_are_texts_to_learn_whole(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("Once upon a time there was one.\n\n{input} stays\n", encoding="utf-8")
    found, _ = read(path)
    assert [(row["prompt"], row["answer"]) for row in found] == [
        ("", "Once upon a time there was one."),
        ("", "{input} stays"),
    ]
    as_rows = write(tmp_path / "rows.json", [{"text": row["answer"]} for row in found])
    assert read(as_rows)[0] == found


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_tables_say_what_json_says(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"instruction": "Sing, loudly", "input": "", "output": 'He said "la"\nla'},
        {"instruction": "Add", "input": "1 2", "output": "three"},
    ]
    getattr(datasets.Dataset.from_list(rows), f"to_{form}")(str(tmp_path / f"rows.{form}"))
    assert read(tmp_path / f"rows.{form}") == read(write(tmp_path / "rows.json", rows))


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        {"instruction": "Sing", "output": "la"},
        {"instruction": "Sing", "input": "", "output": "la"},  # the same, said otherwise
        {"instruction": "Sing", "output": "lo"},
        {"instruction": "Hum", "output": " \n"},
        {"messages": turns("Hi", "")},
        {"messages": turns("Hi", "Ho", "Hi", " ")},
        {"messages": turns("Hello, I greet you", "Hi", first="assistant")},  # answers nothing
        {"text": " "},
    ]
    found, left_out = read(write(tmp_path / "rows.json", rows))
    assert [row["answer"] for row in found] == ["la", "lo"]
    assert left_out == {"given twice": 1, "without an answer": 5}


def test_rows_are_held_out_by_the_seed_and_no_row_is_lost(tmp_path):
    path = write(tmp_path / "rows.json", ROWS)
    parts = [read_examples(path, SHORT, 0.3, seed)[:2] for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
    for rows, eval_rows in parts:
        assert (len(rows), len(eval_rows)) == (16, 8)  # ceil(0.3 * 24) = 8
        assert len({row["shown"] for row in rows + eval_rows}) == 24


def test_alpaca_is_read(shared):
    path = shared("data/alpaca_5000.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    letters = ["".join(filter(str.isalpha, row["input"])).lower() for row in rows]
    noinput = letters.count("noinput")
    found, left_out = read(path, TEMPLATE)
    assert left_out.pop('inputs that say "noinput"') == noinput >= 20
    assert left_out == {"without an answer": 2}
    assert len(found) == 4998
    assert not any("noinput" in row["prompt"].lower() for row in found)
    with_block = sum("### Input:" in row["prompt"] for row in found)
    with_input = sum(bool(row["input"]) for row in rows if row["output"].strip())
    assert with_block == with_input - noinput


BAD = {
    "no output": ([{"instruction": "Hi"}], "row 2: it has no 'output'"),
    "no text": ([{"prompt": "Hi", "completion": None}], "row 2: its completion is None, no text"),
    "unknown": ([{"question": "Hi"}], "row 2: it has no 'text'"),
    "number": ([7], "row 2: "),
    "list": ([["Hi", "Ho"]], "row 2: "),
    "input": ([{"instruction": "Hi", "input": 7, "output": "Ho"}], "row 2: its input is 7"),
    "one turn": ([{"messages": turns("Hi")}], "row 2: its messages are"),
    "no turns": ([{"messages": "Hi"}], "row 2: its messages are Hi: no conversation"),
    "odd turns": ([{"messages": ["Hi", "Ho"]}], "row 2: "),
    "no content": ([{"messages": [{"role": "user"}] * 2}], "row 2: it has no 'content'"),
    "no answer": ([{"instruction": "Hi", "output": ""}], "1 rows of it can be used, where 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_nothing_is_made(case, call, tmp_path):
    rows, problem = BAD[case]
    write(tmp_path / "rows.json", ROWS[:1] + rows)
    told = call("--data", "rows.json")  # in whose folder it is called
    assert f"DATA is rows.json: it can't be used ({problem}" in told
    assert "give rows with instruction and output, prompt and completion, messages" in told
    assert [each.name for each in tmp_path.iterdir()] == ["rows.json"]


def test_prompts_without_completions_are_refused(call, shared):
    assert "row 1: it has no 'completion'" in call("--data", shared("data/kochatgpt_3_PPO.jsonl"))


@pytest.fixture
def call(demo_model, tmp_path, monkeypatch, capsys):
    """Call main with what it has to refuse; return what it says."""

    def refused(*flags):
        monkeypatch.chdir(tmp_path)
        places = ["--model-name", demo_model, "--output-dir", "out"]
        assert train_sft.main([*map(str, places), *FLAGS, *map(str, flags)]) == 2
        told = capsys.readouterr()
        assert told.out == "" and "Traceback" not in told.err
        assert told.err.startswith("Nothing was started or changed:\n- ")
        return told.err

    return refused


# -------------------------------------------------------------------------------------- the template
def test_a_template_is_filled_with_the_texts_as_they_are():
    assert fill(TEMPLATE, "Sing", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSing\n\n### Response:\n"
    )
    assert fill(TEMPLATE, "Sing", "a song").endswith(
        "### Instruction:\nSing\n\n### Input:\na song\n\n### Response:\n"
    )
    texts = "{input} {0} {{x}} \\1 {instruction}\n\nmore", "{instruction} {}"
    assert fill(SHORT, *texts) == f"Task: {texts[0]}\n\nInput: {texts[1]}\n\nAnswer:\n"
    assert fill("Q: {instruction}\nA:", "Add", "1 2") == "Q: Add\n1 2\nA:"
    assert fill("Q: {instruction}\nA:", "Add", "") == "Q: Add\nA:"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Answer:\n", "put {instruction} into it once"),
        ("{instruction}{instruction}", "put {instruction} into it once"),
        ("{instruction}\n\n{input}\n\n{input}\n", "{input} at most once"),
        ("{instruction}\n{input}\n", "give {input} a paragraph of its own"),
        ("Q: {instruction}\nA: ", "end it without the space"),
    ],
)
def test_a_template_that_would_not_work_is_refused(call, template, problem, tmp_path):
    told = call("--data", write(tmp_path / "rows.json", ROWS), "--template", template)
    assert "\n- TEMPLATE is " in told and problem in told


@pytest.mark.parametrize("model", ["demo_model", "tinyllama-shape", "stories260K"])
@pytest.mark.parametrize("template", [TEMPLATE, '{instruction} "}}" {{ x }} {% if %} \\n 🙂 봄\n'])
def test_the_chat_template_asks_in_the_tokens_of_the_training(
    model, template, demo_model, shared_model
):
    tokenizer = right_padded(demo_model if model == "demo_model" else shared_model(model))
    row = row_of(fill(template, "Say it.", ""), "You are kind.")
    (example,), _ = tokenize(tokenizer, [row], 512, Counter())
    trained = example["input_ids"][: example["labels"].count(-100)]
    assert trained[0] == tokenizer.bos_token_id
    tokenizer.chat_template = chat_template_of(tokenizer, [row], template)
    asked = [{"role": "user", "content": "Say it."}]
    for options in ({}, {"add_generation_prompt": True}):
        assert tokenizer.apply_chat_template(asked, **options)["input_ids"] == trained
    said = [*asked, {"role": "assistant", "content": "You are kind."}]
    assert tokenizer.apply_chat_template(said)["input_ids"] == example["input_ids"]


def test_a_tokenizer_without_a_start_token_gets_none(tokenizer, demo_model):
    without = AutoTokenizer.from_pretrained(demo_model, bos_token=None)
    without.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    without.chat_template = chat_template_of(without, [row_of("Hi\n", "Ho")], "{instruction}\n")
    asked = without.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "Hi\n"


def test_conversations_and_texts_keep_the_chat_template_there_is(tinyllama):
    for row in ({"messages": turns("Hi", "Ho")}, row_of("", "Ho")):
        assert chat_template_of(tinyllama, [row], SHORT) == tinyllama.chat_template


# -------------------------------------------------------------------------------- what is learned
def bytes_of(tokenizer, token):
    """Return the bytes that a token of TinyLlama stands for."""
    text = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch("<0x..>", text):
        return bytes([int(text[3:5], 16)])
    return b"" if token in tokenizer.all_special_ids else text.replace("▁", " ").encode()


@pytest.mark.parametrize("answer", ["You are kind.", "  two spaces", "\nnew", "봄은 뷁 🙂", "{}"])
def test_the_learned_tokens_are_those_that_reach_into_the_answer(tinyllama, answer):
    """The place of a token is counted in bytes, without the offsets that a tokenizer tells."""
    prompt = "Task: 봄은?\n\nAnswer:\n"
    (example,), _ = tokenize(tinyllama, [row_of(prompt, answer)], 512, Counter())
    ids, labels = example["input_ids"], example["labels"]
    assert ids == [*tinyllama(prompt + answer)["input_ids"], tinyllama.eos_token_id]
    reached, wanted = -1, []  # the space that the tokenizer puts before a text
    for token in ids:
        reached += len(bytes_of(tinyllama, token))
        is_learned = reached > len(prompt.encode()) or token == tinyllama.eos_token_id
        wanted.append(token if is_learned else -100)
    assert labels == wanted
    assert bytes_of(tinyllama, ids[1])[:1] == b" " and reached == len((prompt + answer).encode())


def test_prompt_and_answer_are_one_text(tokenizer):
    (example,), _ = tokenize(tokenizer, [row_of("I am hap", "py.")], 512, Counter())
    apart = (
        tokenizer("I am hap")["input_ids"] + tokenizer("py.", add_special_tokens=False).input_ids
    )
    assert example["input_ids"][:-1] != apart
    assert example["input_ids"][:-1] == tokenizer("I am happy.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(learned(example)[0]) == ["Ġhappy", ".", "</s>"]


def test_a_text_is_learned_whole(tokenizer):
    (example,), _ = tokenize(tokenizer, [row_of("", "I am so happy.")], 512, Counter())
    assert example["labels"] == [-100, *example["input_ids"][1:]]
    assert tokenizer.decode(example["input_ids"]) == "<s>I am so happy.</s>"


def test_the_end_is_learned_where_it_pads_too(demo_model):
    tokenizer = right_padded(demo_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [row_of("Q\n", "happy."), row_of("Q\n", "happy and glad and calm.")]
    examples, _ = tokenize(tokenizer, rows, 512, Counter())
    labels = train_sft.make_collator(None, tokenizer, False)(examples)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    usual = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ids = [{"input_ids": example["input_ids"]} for example in examples]
    assert (usual(ids)["labels"] == tokenizer.eos_token_id).sum() == 0


def test_an_end_that_the_tokenizer_adds_is_the_only_one_and_is_learned(demo_model, model_64):
    tokenizer = right_padded(demo_model)
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, ends)
    rows = [row_of("Say\n", "happy.")]
    examples, rows = tokenize(tokenizer, rows, 512, Counter())
    assert tokenizer.decode(examples[0]["input_ids"]) == "<s>Say\nhappy.</s>"
    assert tokenizer.convert_ids_to_tokens(learned(examples[0])[0]) == ["happy", ".", "</s>"]
    settings = SimpleNamespace(max_new_tokens=4)
    told = train_sft.answers(model_64, tokenizer, examples, rows, settings)
    prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Say\n")["input_ids"][1:-1]]])
    said = model_64.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :]
    assert told["Say\n"] == tokenizer.decode(said, skip_special_tokens=True)


def test_what_is_too_long_is_cut_or_dropped_and_told(tokenizer):
    rows = [row_of("Q\n", "I am happy."), row_of("Q\n", "I am so happy and so glad."), {}]
    rows[2] = row_of("I am so happy and so glad and so calm\n", "Yes.")
    whole, _ = tokenize(tokenizer, rows, 512, Counter())
    length, left_out = len(whole[0]["input_ids"]), Counter()
    examples, kept = tokenize(tokenizer, rows, length, left_out)
    assert kept == rows[:2]
    assert left_out == {"too long for an answer": 1, "cut": 1}
    assert examples[0] == whole[0]
    assert examples[1] == {name: whole[1][name][:length] for name in whole[1]}


def test_a_length_without_any_answer_is_named(call, tmp_path):
    told = call("--data", write(tmp_path / "rows.json", ROWS), "--max-length", 2)
    assert re.search(r"^- MAX_LENGTH is 2 here: give more", told, re.MULTILINE)


def test_of_a_conversation_the_answers_and_their_ends_are_learned(tinyllama):
    talk = [
        {"role": "system", "content": "Be kind."},
        *turns("Hi", "Hello there", "Bye", "See you"),
    ]
    left_out = Counter()
    (example,), _ = tokenize(tinyllama, [{"messages": talk}], 512, left_out)
    wanted = ["Hello there</s>", "See you</s>"]
    assert [tinyllama.decode(piece) for piece in learned(example)] == wanted
    text = tinyllama.apply_chat_template(talk, tokenize=False)
    assert example["input_ids"] == tinyllama(text, add_special_tokens=False)["input_ids"]
    assert not left_out["cut"]
    opened = turns("Welcome", "Hi", "Ho", first="assistant")
    (example,), _ = tokenize(tinyllama, [{"messages": opened}], 512, left_out)
    assert [tinyllama.decode(piece) for piece in learned(example)] == ["Ho</s>"]


FORGETFUL = "{% for m in messages[-2:] %}{{ m['content'] + eos_token }}{% endfor %}"
ENDS_ONCE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ENDS_ONCE += "{% if messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
ENDS_IN_ITS_OWN = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"


@pytest.mark.parametrize("template", [FORGETFUL, ENDS_ONCE])
def test_a_chat_template_that_changes_what_was_said_is_refused(demo_model, template):
    tokenizer = AutoTokenizer.from_pretrained(demo_model, chat_template=template)
    with pytest.raises(ValueError, match="chat template changes"):
        train_sft.conversation(tokenizer, turns("a", "b", "c", "d"))


# ------------------------------------------------------------------------- packing, measurement
@pytest.fixture(scope="module")
def model_64(gpt2):
    """Return a random GPT-2 with 64 positions."""
    return AutoModelForCausalLM.from_pretrained(gpt2).eval()


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Return examples of many lengths, with a text without a prompt among them."""
    answers = ["happy.", "I am so glad, and you are so calm.", "good day to you", "no", "봄은"]
    rows = [row_of("Say it now\n" * (n % 2), answer) for n, answer in enumerate(answers)]
    return tokenize(tokenizer, rows, 64, Counter())[0]


def nats_alone(model, examples):
    """Return the loss of each example in nats and its tokens, one at a time, by their names."""
    sums, counts = [], []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0].double()
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        pairs = [(n, label) for n, label in enumerate(example["labels"]) if n and label != -100]
        sums.append(-sum(logprobs[n - 1, label].item() for n, label in pairs))
        counts.append(len(pairs))
    return sums, counts


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packing_has_the_loss_of_padding(kind, demo_model, model_64, tokenizer, examples):
    model = model_64
    if kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32").eval()
    sums, counts = nats_alone(model, examples)
    for packing in (False, True):
        batch = train_sft.make_collator(model, tokenizer, packing)(examples)
        assert batch["input_ids"].shape[0] == (1 if packing else len(examples))
        with torch.no_grad():
            loss = model(**batch, num_items_in_batch=1, use_cache=False).loss.item()
        assert loss == pytest.approx(sum(sums), rel=1e-5)
        assert (batch["labels"][:, 1:] != -100).sum() == sum(counts)


def test_packing_is_refused_where_an_example_would_see_another(tokenizer):
    sizes = {"vocab_size": 99, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    opt = AutoModelForCausalLM.from_config(OPTConfig(**sizes, init_std=0.3)).eval()
    with pytest.raises(
        SettingsError, match=r"PACKING is True: .* sees the one before .* give False"
    ):
        train_sft.make_collator(opt, tokenizer, True)


def test_the_held_out_loss_counts_each_token_alike_whatever_the_batches(
    model_64, tokenizer, examples
):
    sums, counts = nats_alone(model_64, examples)
    wanted = sum(sums) / sum(counts)
    means = [total / count for total, count in zip(sums, counts)]
    assert abs(statistics.mean(means) - wanted) > 0.05  # which a mean of means would tell
    for size in (1, 2, 5):
        settings = SimpleNamespace(eval_batch_size=size, max_new_tokens=1)
        parts = model_64, tokenizer, examples, [], settings
        assert train_sft.measure(*parts, whole=False) == {"loss": pytest.approx(wanted, rel=1e-5)}
    figures = train_sft.measure(*parts)
    assert (figures["tokens"], figures["examples"]) == (sum(counts), len(examples))
    assert figures["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert figures["nats"] == pytest.approx(sums, rel=1e-5)


def test_a_ratio_is_a_mean_with_its_standard_error():
    mean, error = train_sft.ratio([1, 2, 3, 6], [1, 1, 1, 1])
    assert (mean, error) == (3, pytest.approx(statistics.pstdev([1, 2, 3, 6]) / 2))
    # By hand: 12 of 5 are 2.4 each; 10 are 0.4 above four of them, 2 are 0.4 below one.
    assert train_sft.ratio([10, 2], [4, 1]) == pytest.approx((2.4, math.sqrt(0.32) / 5))
    assert train_sft.ratio([2, 4], [1, 2]) == (2, 0)


def test_the_error_is_how_much_the_mean_varies_between_samples():
    drawn = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (2000, 50), generator=drawn).double()
    sums = counts * 2 + counts.sqrt() * torch.randn(2000, 50, generator=drawn)
    found = [train_sft.ratio(*both) for both in zip(sums.tolist(), counts.tolist())]
    means, errors = zip(*found)
    assert statistics.stdev(means) == pytest.approx(statistics.mean(errors), rel=0.1)


# ------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("grouped", [True, False])
def test_every_epoch_has_each_row_once_in_an_order_of_its_own(grouped):
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 500, (203,), generator=drawn).tolist()
    examples = [{"input_ids": [0] * length} for length in lengths]
    settings = SimpleNamespace(batch_size=10, seed=3, group_by_length=grouped)
    order = train_sft.order_of(examples, 41, settings)
    assert len(order) == 410
    epochs = order[:203], order[203:406]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(203))
    assert epochs[0] != epochs[1] and set(order[406:]) <= set(range(203))
    torch.rand(1)  # on which nothing depends
    assert train_sft.order_of(examples, 41, settings) == order
    assert train_sft.order_of(examples, 12, settings) == order[:120]  # as a longer run begins
    settings.seed = 4
    assert train_sft.order_of(examples, 41, settings) != order
    batches = [order[start : start + 10] for start in range(0, 200, 10)]
    spreads = [statistics.pstdev(lengths[place] for place in batch) for batch in batches]
    assert (statistics.mean(spreads) < statistics.pstdev(lengths) / 3) == grouped


# -------------------------------------------------------------------------------------- answers
def test_answers_end_at_the_end_token_and_stay_in_the_context(model_64, tokenizer):
    rows = [
        row_of("so " * 57 + "it", "is."),
        row_of("I am", " so."),
        row_of("", "I am so glad and"),
    ]
    rows[2]["shown"] = "I am so glad"
    examples, rows = tokenize(tokenizer, rows, 64, Counter())
    long = examples[0]["labels"].count(-100)
    assert 55 < long < 63
    settings = SimpleNamespace(max_new_tokens=40)
    said = train_sft.answers(model_64, tokenizer, examples, rows, settings)
    assert list(said) == [row["shown"] for row in rows]

    def greedy(query, count):
        ids = list(query)
        for _ in range(count):  # one at a time, by hand
            with torch.no_grad():
                ids.append(model_64(torch.tensor([ids])).logits[0, -1].argmax().item())
        return ids[len(query) :]

    query = examples[0]["input_ids"][:long]
    assert said[rows[0]["shown"]] == tokenizer.decode(greedy(query, 64 - long))
    assert said["I am so glad"] == tokenizer.decode(greedy(tokenizer("I am so glad").input_ids, 40))
    tokens = greedy(tokenizer("I am")["input_ids"], 40)
    place = next(n for n in range(1, 40) if tokens[n] not in tokens[:n])
    before, model_64.generation_config.eos_token_id = (
        model_64.generation_config.eos_token_id,
        [tokens[place]],
    )
    ended = train_sft.answers(model_64, tokenizer, examples[1:], rows[1:], settings)["I am"]
    model_64.generation_config.eos_token_id = before
    assert ended == tokenizer.decode(tokens[: place + 1])
    assert len(tokenizer(ended)["input_ids"]) < 40


# ------------------------------------------------------------------------------------ whole runs
def test_the_saved_model_says_what_the_card_shows(taught):
    model = AutoModelForCausalLM.from_pretrained(taught.folder)
    tokenizer = AutoTokenizer.from_pretrained(taught.folder)
    assert tokenizer.padding_side == "left"
    assert model.config.use_cache is True
    card = (taught.folder / "README.md").read_text(encoding="utf-8")
    said = taught.report["trained"]["first_sample"]
    assert len(said) == 5
    for prompt, answer in said.items():
        asked = [{"role": "user", "content": prompt}]
        query = tokenizer.apply_chat_template(asked, return_tensors="pt")
        sequence = model.generate(**query, max_new_tokens=12, do_sample=False)[0]
        text = tokenizer.decode(sequence[query["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == answer
        assert f"    {prompt}\n        before  " in card
        assert f"        after   {answer.strip()}\n" in card
        assert f"        after   {answer.strip()}\n" in taught.printed


def test_the_adapter_alone_makes_the_same_model(taught, demo_model):
    saved = AutoModelForCausalLM.from_pretrained(taught.folder, dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32")
    ids = torch.tensor([[1, 36, 71, 295, 342]])
    with torch.no_grad():
        untaught = base(ids).logits
        logits = PeftModel.from_pretrained(base, taught.folder / "adapter").eval()(ids).logits
        assert torch.allclose(logits, saved(ids).logits, atol=1e-4)
    assert not torch.allclose(logits, untaught, atol=0.1)
    lora = json.loads((taught.folder / "adapter" / "adapter_config.json").read_text())
    assert lora["base_model_name_or_path"] == str(demo_model)
    assert AutoTokenizer.from_pretrained(taught.folder / "adapter").chat_template


def test_the_report_tells_what_was_learned(taught):
    assert (taught.folder / "training.png").read_bytes().startswith(b"\x89PNG")
    base, trained = taught.report["base"], taught.report["trained"]
    assert trained["loss"] < base["loss"] - 1 and taught.report["learned"] is True
    for figures in (base, trained):
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["examples"] == 5
        assert {"nats", "counts"}.isdisjoint(figures)
    assert base["tokens"] == trained["tokens"]
    assert "19 rows to train on, 5 held out\n" in taught.printed
    assert taught.report["samples"] == len(taught.metrics) * 8 == 64  # ceil(3 * 19 / 8) steps
    assert "did not learn" not in taught.printed


def test_a_run_that_learns_nothing_says_so(teach, gpt2):
    run = teach(gpt2, ROWS, "--learning-rate", 1e-9, "--training-epochs", 0.1, *SMALL)
    assert run.report["learned"] is False
    assert "Beyond chance this run did not learn: raise TRAINING_EPOCHS" in run.printed


SMALL = ["--batch-size", 8, "--max-new-tokens", 2, "--max-length", 64]


@pytest.fixture(scope="module")
def steady(gpt2, save_random_model, tmp_path_factory):
    """Return the folder of a GPT-2 without dropout of its own."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = AutoConfig.from_pretrained(gpt2, **off)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    return save_random_model(config, tokenizer, tmp_path_factory.mktemp("steady"))


@pytest.fixture(scope="module")
def whole_batch(teach, steady):
    return teach(steady, ROWS, *UPDATES)


UPDATES = [*SMALL, "--training-epochs", 1, "--learning-rate", 1e-2]


@pytest.mark.parametrize("flags", [["--mini-batch-size", 2], ["--packing"]])
def test_minibatches_and_packing_make_the_same_updates(flags, teach, steady, whole_batch):
    run = teach(steady, ROWS, *UPDATES, *flags)
    assert len(run.metrics) == 3
    for name in ("loss", "grad_norm"):
        wanted = [record[name] for record in whole_batch.metrics]
        assert [record[name] for record in run.metrics] == pytest.approx(wanted, rel=1e-3)
    wanted = whole_batch.report["trained"]["loss"]
    assert run.report["trained"]["loss"] == pytest.approx(wanted, rel=1e-3)
    assert abs(wanted - whole_batch.report["base"]["loss"]) > 0.05


def test_dropout_is_on_in_training_and_off_in_measurement(teach, steady, whole_batch):
    run = teach(steady, ROWS, *UPDATES, "--lora-dropout", 0.5)
    assert run.report["base"]["loss"] == whole_batch.report["base"]["loss"]
    # Dropout is before the matrix that begins as zero: the gradient alone tells at first.
    assert run.metrics[0]["loss"] == pytest.approx(whole_batch.metrics[0]["loss"], rel=1e-5)
    assert run.metrics[0]["grad_norm"] != pytest.approx(whole_batch.metrics[0]["grad_norm"], 0.01)
    settings = run.report["settings"]
    sources = (settings[name] for name in ("data", "template", "eval_share", "seed"))
    _, eval_rows, _ = read_examples(*sources)
    tokenizer = right_padded(run.folder)
    examples, _ = tokenize(tokenizer, eval_rows, 64, Counter())
    sums, counts = nats_alone(AutoModelForCausalLM.from_pretrained(run.folder).eval(), examples)
    assert run.report["trained"]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-4)


def test_conversations_are_learned_up_to_the_end_of_the_template(teach, gpt2, tmp_path):
    """One has a last prompt that is longer than the model's context, and is shown all the same."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2, chat_template=ENDS_IN_ITS_OWN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"messages": turns("Hi", f"so {n}", "so " * 70, "no")} for n in range(9)]
    flags = ["--eval-share", 0.8, "--training-epochs", 0.1]
    run = teach(tmp_path / "model", rows, *SMALL, *flags)
    assert list(run.report["trained"]["first_sample"]) == ["Hi"]
    assert AutoTokenizer.from_pretrained(run.folder).chat_template == tokenizer.chat_template
    assert run.report["chat"] is True
    ends = GenerationConfig.from_pretrained(run.folder).eos_token_id
    assert ends == [model.config.eos_token_id, len(tokenizer) - 1]


# ------------------------------------------------------------------- a model nobody here trained
@pytest.fixture(scope="module")
def alpaca(shared):
    """Return the 200 shortest of the first thousand rows."""
    rows = json.loads(shared("data/alpaca_5000.json").read_text(encoding="utf-8"))[:1000]
    return sorted(rows, key=lambda row: len("".join(row.values())))[:200]


@pytest.fixture(scope="module")
def stories(teach, shared_model, alpaca):
    """Return a function that teaches stories260K those rows, each way once."""
    flags = ["--learning-rate", 3e-3, "--batch-size", 32, "--max-new-tokens", 2]
    flags += ["--training-epochs", 1]

    @functools.cache
    def run(quantization):
        quantized = ["--quantization", quantization]
        return teach(shared_model("stories260K"), alpaca, *flags, *quantized)

    return run


def test_alpaca_teaches_a_small_model(stories):
    report = stories("none").report
    assert report["trained"]["loss"] < report["base"]["loss"] - 0.3
    assert report["learned"] is True
    assert report["trained"]["perplexity"] == pytest.approx(math.exp(report["trained"]["loss"]))


def test_8_bits_learn_as_much(stories):
    report, wanted = stories("8bit").report, stories("none").report
    for name in ("base", "trained"):
        assert abs(report[name]["loss"] - wanted[name]["loss"]) < 0.02, name
