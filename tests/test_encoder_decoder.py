"""Encoder-decoder models, T5 and BART, as policy: queries for the encoder, responses for the decoder."""

import contextlib
import io
import json
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import make_instructions
import train_rlhf
import train_sft

PROMPTS = ["I feel so", "Today I am really tired, and it", "Life is"]  # of unequal lengths
FLAGS = [
    "--device",
    "cpu",
    "--batch-size",
    "3",
    "--max-new-tokens",
    "6",
    "--learning-rate",
    "0.003",
]
FLAGS += ["--prompts", *PROMPTS, "--eval-prompts", "--eval-samples", "6"]
TEMPERATURE = 0.8
FLAGS += ["--temperature", str(TEMPERATURE)]
ONE_UPDATE = ["--ppo-epochs", "1", "--target-approx-kl", "0"]


def t5_config(tokenizer, **more):
    """Return the shape of a tiny T5; as in the real ones, the decoder starts with the pad token."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids |= {"decoder_start_token_id": tokenizer.pad_token_id}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True}
    return T5Config(vocab_size=len(tokenizer), **sizes, **ids, **gated, **more)


def bart_config(tokenizer):
    """Return the shape of a tiny BART; as in the real ones, the decoder starts with the end token."""
    sizes = {"d_model": 64, "max_position_embeddings": 64, "init_std": 0.1}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 128}
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name in ("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        ids[name] = tokenizer.eos_token_id
    return BartConfig(vocab_size=len(tokenizer), **sizes, **ids)


def save(config, tokenizer, folder):
    """Save a random model of that shape and the tokenizer."""
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def end_queries(tokenizer):
    """Let the tokenizer put its end token after a text, as those of encoders do."""
    end = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    template = TemplateProcessing(single=f"$A {tokenizer.eos_token}", special_tokens=end)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.fixture(scope="module")
def folders(demo_model, tmp_path_factory):
    """Return the folders of a random T5 and a random BART, with the tokenizer of demo_model."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    end_queries(tokenizer)
    configs = {"t5": t5_config(tokenizer), "bart": bart_config(tokenizer)}
    place = tmp_path_factory.mktemp("encoder_decoder")
    return {name: save(config, tokenizer, place / name) for name, config in configs.items()}


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(folders, request):
    return folders[request.param]


@pytest.fixture(scope="module")
def make(read_settings, tmp_path_factory):
    """Return rows, tokenizer, policy and trainer of a folder, as train_rlhf.run makes them."""

    def build(folder, *flags):
        places = ["--model-name", str(folder), "--output-dir", str(tmp_path_factory.mktemp("out"))]
        settings = read_settings(*places, *FLAGS, *flags)
        device = train_rlhf.join_processes("cpu")
        rows = [{"prompt": prompt} for prompt in settings.prompts]
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        train_rlhf.silence_libraries()
        model, tokenizer, rows, _ = train_rlhf.load_model(settings, rows, [], device, dtype)
        policy = train_rlhf.make_policy(model, tokenizer, settings)
        trainer = train_rlhf.make_trainer(policy, tokenizer, settings, device, dtype)
        parts = {"settings": settings, "rows": rows, "tokenizer": tokenizer}
        return SimpleNamespace(**parts, policy=policy, trainer=trainer)

    return build


def respond(built, key=(0, 0, 0)):
    """Return queries, numbers, responses and texts."""
    queries = train_rlhf.encode(built.tokenizer, built.rows, False)
    numbers = train_rlhf.random_numbers(key, queries, built.settings.max_new_tokens)
    size = built.settings.batch_size
    return (
        queries,
        numbers,
        *train_rlhf.rollout(built.policy, built.tokenizer, queries, numbers, size),
    )


def take_step(built, key=(0, 0, 0)):
    """Take a PPO step on fresh responses, whose tokens earn something, and return its metrics."""
    queries, _, responses, _ = respond(built, key)
    token_scores = [torch.linspace(-1, 1.5, len(response)) for response in responses]
    metrics, _ = built.trainer.step(queries, responses, token_scores)
    return metrics


def weights_of(built):
    return {name: each.clone() for name, each in train_rlhf.trained_weights(built.policy).items()}


def evaluate(built, queries, responses):
    """Return the logprobs of all tokens at each token of each response, and the values."""
    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, "cpu")
    inputs["earned"] = (mask.cumsum(1) - mask) / 2.0
    with torch.no_grad():
        all_logprobs, values = built.policy(**inputs)
    rows = zip(all_logprobs, values, mask.bool())
    return [(logprobs[where], value[where]) for logprobs, value, where in rows]


def run_plain(model, query, response):
    """Return a plain model's output for one response to one query, without any padding."""
    start = torch.tensor([model.config.decoder_start_token_id])
    given = {"input_ids": query[None], "decoder_input_ids": torch.cat([start, response[:-1]])[None]}
    with torch.no_grad():
        return model(**given, output_hidden_states=True)


def greedy(model, tokenizer):
    """Return the greedy response to each of the prompts."""
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        texts.append(tokenizer.decode(ids[0]))
    return texts


@pytest.fixture(scope="module")
def trained(folder, make, tmp_path_factory):
    """Return a policy after two steps, what it says of its responses, and where it was saved."""
    built = make(folder)
    before = weights_of(built)
    built.metrics = [take_step(built, (0, step, 0)) for step in (1, 2)]
    built.moved = {
        name: not torch.equal(each, before[name]) for name, each in weights_of(built).items()
    }
    built.queries, built.numbers, built.responses, built.texts = respond(built)
    built.told = evaluate(built, built.queries, built.responses)
    both = zip(built.queries, built.responses)
    built.told_alone = [evaluate(built, [query], [response])[0] for query, response in both]
    model, built.head = built.policy.pretrained_model, built.policy.v_head.summary
    built.greedy, built.saved = greedy(model, built.tokenizer), tmp_path_factory.mktemp("saved")
    train_rlhf.save_model(model, built.tokenizer, built.settings, built.saved)  # merges it
    built.plain = AutoModelForSeq2SeqLM.from_pretrained(built.saved).eval()
    return built


# ------------------------------------------------------------------------------------------ rollout
def test_the_responses_are_those_of_the_plain_model_drawn_by_hand(trained):
    """Each token is the first up to which its probabilities sum to the token's number."""
    end_ids = trained.plain.generation_config.eos_token_id
    for query, numbers, response in zip(trained.queries, trained.numbers, trained.responses):
        drawn = []
        for number in numbers:
            given = torch.tensor([*drawn, 0])  # the last is only asked for
            logits = run_plain(trained.plain, query, given).logits[0, -1] / TEMPERATURE
            sums = torch.softmax(logits, dim=-1).cumsum(-1)
            drawn.append((sums >= number * sums[-1]).nonzero()[0].item())
            if drawn[-1] in end_ids:
                break
        assert response.tolist() == drawn


def test_a_response_is_the_same_alone_and_in_a_batch(make, folder):
    built = make(folder)
    queries, numbers, responses, texts = respond(built)
    assert len({len(query) for query in queries}) == 3
    for n in range(3):
        alone = [queries[n]], numbers[n : n + 1]
        (response,), (text,) = train_rlhf.rollout(built.policy, built.tokenizer, *alone, 1)
        assert (response.tolist(), text) == (responses[n].tolist(), texts[n])


def test_a_response_ends_with_the_end_token_and_has_no_start_token(make, folder):
    built = make(folder, "--temperature", "1", "--max-new-tokens", "40")
    start, end = built.policy.start_id, built.tokenizer.eos_token_id
    with torch.no_grad():  # whose bias alone makes the end likely
        head = built.policy.pretrained_model.get_output_embeddings()
        forward = head.forward
        bias = torch.zeros(len(built.tokenizer))
        bias[end] = 8.0
        head.forward = lambda hidden: forward(hidden) + bias
    _, _, responses, texts = respond(built)
    assert all(len(response) < 40 and response[-1] == end for response in responses)
    for response, text in zip(responses, texts):
        assert end not in response[:-1] and (start == end or response[0] != start)
        assert text == "" or re.match(r" \S", text)


# ----------------------------------------------------------------------------------------- the texts
def test_a_response_is_a_text_of_its_own(make, folders):
    built = make(folders["t5"])
    (query,) = train_rlhf.encode(built.tokenizer, [{"prompt": "I feel so"}], False)
    assert query[-1] == built.tokenizer.eos_token_id
    ids = built.tokenizer(" happy and glad", add_special_tokens=False)["input_ids"]
    response = torch.tensor([*ids, built.tokenizer.eos_token_id])
    for row in (response, response[:-1]):
        (text,) = train_rlhf.texts_of(built.tokenizer, query, [row])
        assert text == " happy and glad"
    assert train_rlhf.texts_of(built.tokenizer, query, [response[:0], response[-1:]]) == ["", ""]
    reward = train_rlhf.positive_word_reward
    assert reward(["I feel so"], [text], ["happy"]) == [1.0]  # though the prompt ends in a letter
    assert reward(["I feel so"], [text.lstrip()], ["happy"]) == [-1.0]  # which would prolong it


def test_the_scores_of_the_tokens_sum_up(make, folders):
    built = make(folders["bart"])
    queries, _, responses, texts = respond(built)

    def reward(rows, texts):
        return [float(len(text)) for text in texts]

    scale, rows = train_rlhf.AS_IT_IS, built.rows
    asked = reward, scale, built.tokenizer, rows, queries, responses, True
    scores, token_scores = train_rlhf.score_responses(*asked)
    assert scores == [len(text) for text in texts]
    assert [each.sum().item() for each in token_scores] == scores
    assert [len(each) for each in token_scores] == [len(each) for each in responses]


# --------------------------------------------------------------------------------------- the policy
def test_logprobs_are_those_of_the_plain_model_whatever_the_padding(trained):
    told = zip(trained.queries, trained.responses, trained.told, trained.told_alone)
    for query, response, (logprobs, _), (alone, _) in told:
        logits = run_plain(trained.plain, query, response).logits[0] / TEMPERATURE
        wanted = torch.log_softmax(logits, dim=-1)
        assert torch.allclose(logprobs, wanted, atol=1e-4)
        assert torch.allclose(logprobs, alone, atol=1e-5)


def test_values_are_linear_in_the_decoders_states_and_in_what_was_earned(trained):
    told = zip(trained.queries, trained.responses, trained.told, trained.told_alone)
    for query, response, (_, values), (_, alone) in told:
        states = run_plain(trained.plain, query, response).decoder_hidden_states[-1][0]
        with torch.no_grad():
            constant, slope = (states @ trained.head.weight.T + trained.head.bias).unbind(-1)
        wanted = constant + slope * torch.arange(len(response)) / 2
        assert values.abs().max() > 1e-4  # it has learned something
        assert torch.allclose(values, wanted, atol=1e-4)
        assert torch.allclose(values, alone, atol=1e-5)


def test_two_steps_begin_at_the_base_model_and_move_the_weights(trained):
    first, second = trained.metrics
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl"] > 1e-3
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert all(trained.moved.values())
    for part in (".encoder.", ".decoder.", "v_head."):
        assert any(part in name for name in trained.moved), part


def test_gradient_checkpointing_takes_the_same_step(make, folder):
    built, other = make(folder, *ONE_UPDATE), make(folder, *ONE_UPDATE, "--gradient-checkpointing")
    for each in (built, other):
        take_step(each)
    ours, theirs = weights_of(built), weights_of(other)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_a_batch_in_small_parts_has_the_same_kls(make, folder):
    whole, parts = make(folder, *ONE_UPDATE), make(folder, *ONE_UPDATE, "--mini-batch-size", "1")
    take_step(whole)
    with torch.no_grad():
        for name, weight in train_rlhf.trained_weights(parts.policy).items():
            weight.copy_(train_rlhf.trained_weights(whole.policy)[name])
    queries, _, responses, _ = respond(whole)
    scores = [torch.ones(len(response)) for response in responses]
    ours, theirs = (each.trainer.step(queries, responses, scores)[1] for each in (whole, parts))
    assert min(ours) > 1e-4
    assert theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("flags", [["--quantization", "8bit"], ["--dtype", "bfloat16"]])
def test_a_step_with_smaller_weights(make, folders, tmp_path, flags):
    built = make(folders["t5"], *flags)
    before = weights_of(built)
    assert take_step(built)["skipped_updates"] == 0
    assert not all(torch.equal(before[name], each) for name, each in weights_of(built).items())
    train_rlhf.save_model(
        built.policy.pretrained_model, built.tokenizer, built.settings, tmp_path / "saved"
    )
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert not getattr(saved, "is_quantized", False)
    assert len(greedy(saved, built.tokenizer)) == 3


# -------------------------------------------------------------------------------------- what is saved
def test_the_saved_model_says_the_same(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained.saved)
    assert tokenizer.padding_side == "right"
    assert greedy(trained.plain, tokenizer) == trained.greedy


def test_the_adapter_loads_with_peft(trained, folder):
    config = json.loads((trained.saved / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    query, response = trained.queries[0], trained.responses[0]
    wanted = run_plain(trained.plain, query, response).logits
    assert not torch.allclose(run_plain(base, query, response).logits, wanted, atol=1e-3)
    adapted = PeftModel.from_pretrained(base, trained.saved / "adapter")
    assert torch.allclose(run_plain(adapted, query, response).logits, wanted, atol=1e-4)


# -------------------------------------------------------------------------------------- a whole run
@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Return a run of a T5 of 63 words, three of which are wanted, and one that goes on with it."""
    place = tmp_path_factory.mktemp("learned")
    words = [f"{consonant}{vowel}" for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    ids = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = end_queries(PreTrainedTokenizerFast(tokenizer_object=words, **special))
    save(t5_config(tokenizer), tokenizer, place / "t5")
    flags = ["--model-name", place / "t5", "--output-dir", place / "out", "--device", "cpu"]
    flags += ["--prompts", "ba", "de di", "fi", "--eval-prompts", "--eval-samples", "60"]
    flags += ["--positive-words", "mo", "ni", "pe", "--max-new-tokens", "4", "--batch-size", "12"]
    flags += ["--target-approx-kl", "0.02", "--learning-rate", "0.01", "--kl-coef", "0.02"]
    flags = [*map(str, flags)]
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        assert train_rlhf.main([*flags, "--training-epochs", "40"]) == 0
        assert train_rlhf.main([*flags, "--training-epochs", "60", "--resume"]) == 0
    report = json.loads((place / "out" / "report.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=place / "out", report=report, screen=screen.getvalue())


def test_a_random_t5_learns_a_rule_and_goes_on(learned):
    base, trained = (learned.report[model]["train_prompts"] for model in ("base", "trained"))
    assert base["success_rate"] < 0.3
    assert trained["success_rate"] > 0.8
    assert "going on after step 10\n" in learned.screen
    lines = (learned.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 16)]


def test_screen_and_card_tell_how_to_load_it(learned, monkeypatch):
    card = (learned.folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(learned.folder)
    for text, there in ((learned.screen, str(learned.folder)), (card, ".")):
        snippet = text[text.rindex("    from transformers import") :].partition("\n\n!")[0]
        assert repr(there) in snippet
        names = {}
        exec(textwrap.dedent(snippet), names)
        assert names["model"].config.is_encoder_decoder


# ------------------------------------------------------------------------------- the other scripts
@pytest.mark.parametrize("script", [train_sft, make_instructions], ids=lambda each: each.__name__)
def test_what_continues_texts_is_refused_one(script, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "I am happy."}\n{"text": "I am sad."}\n')
    flags = ["--data", "rows.jsonl"] if script is train_sft else []
    assert script.main(["--model-name", str(folder), "--device", "cpu", *flags]) == 2
    first, line = capsys.readouterr().err.splitlines()
    assert first == "Nothing was started or changed:"
    assert line.startswith(f"- MODEL_NAME is {train_rlhf.shorten(folder)}: it can't be used (")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}
