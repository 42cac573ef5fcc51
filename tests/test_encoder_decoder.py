"""Encoder-decoders, T5 and BART: queries are for the encoder, responses for the decoder."""

import contextlib
import io
import json
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from helpers import greedy, page_content, read_rows, refusals
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
from finetune import command, saving
from finetune.checkpoint import trained_weights
from finetune.errors import shorten
from finetune.loading import load_model
from finetune.processes import join_processes, random_numbers
from finetune.prompts import read_prompts
from finetune.sampling import sample_responses
from finetune.tokens import encode

PROMPTS = ["I feel so", "Today I am really tired, and it", "Life is"]  # of unequal lengths
TEMPERATURE = 0.8
FLAGS = ["--device", "cpu", "--batch-size", "3", "--max-new-tokens", "6", "--eval-samples", "6"]
FLAGS += ["--prompts", *PROMPTS, "--eval-prompts", "--learning-rate", "0.003"]
FLAGS += ["--temperature", str(TEMPERATURE)]
ONE_UPDATE = ["--ppo-epochs", "1", "--target-approx-kl", "0"]


def t5_config(tokenizer):
    """Return the shape of a tiny T5; its decoder starts with the pad token, as in real ones."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def bart_config(tokenizer):
    """Return the shape of a tiny BART; its decoder starts with the end token, as in real ones."""
    sizes = {}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 128}
    return BartConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        max_position_embeddings=64,
        init_std=0.1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )


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
    """Return the folders of a random T5 and a random BART."""
    tokenizer = end_queries(AutoTokenizer.from_pretrained(demo_model))
    configs = {"t5": t5_config(tokenizer), "bart": bart_config(tokenizer)}
    place = tmp_path_factory.mktemp("encoder_decoder")
    return {name: save(config, tokenizer, place / name) for name, config in configs.items()}


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(folders, request):
    return folders[request.param]


@pytest.fixture(scope="module")
def make(read_settings, tmp_path_factory):
    """Return rows, tokenizer, policy and trainer of a folder, as train_rlhf.load makes them."""

    def build(folder, *flags):
        places = ["--model-name", str(folder), "--output-dir", str(tmp_path_factory.mktemp("out"))]
        settings = read_settings(*places, *FLAGS, *flags)
        device = join_processes("cpu")
        prompts = read_prompts(settings.prompts, [], 0, "auto", settings.seed)
        dtype = "float32" if settings.dtype == "auto" else settings.dtype
        command.silence_libraries()
        model, tokenizer, prompts = load_model(settings, prompts, device, dtype)
        policy = train_rlhf.make_policy(model, tokenizer, settings)
        return SimpleNamespace(
            settings=settings,
            rows=prompts.rows,
            tokenizer=tokenizer,
            policy=policy,
            model=policy.pretrained_model,
            trainer=train_rlhf.make_trainer(policy, tokenizer, settings, device, dtype),
        )

    return build


def respond(built, key=(0, 0, 0)):
    """Return queries, random numbers, responses and texts."""
    queries = encode(built.tokenizer, built.rows, False)
    numbers = random_numbers(key, 3, built.settings.max_new_tokens)
    responses, texts = sample_responses(built.model, built.tokenizer, queries, numbers, 3)
    return queries, numbers, responses, texts


def take_step(built, key=(0, 0, 0)):
    """Take a PPO step on fresh responses, whose tokens earn something; return its metrics."""
    queries, _, responses, _ = respond(built, key)
    token_scores = [torch.linspace(-1, 1.5, len(response)) for response in responses]
    metrics, _ = built.trainer.step(queries, responses, token_scores)
    return metrics


def weights_of(built):
    """Return copies of what is trained."""
    return {name: weight.clone() for name, weight in trained_weights(built.policy).items()}


def evaluate(built, queries, responses):
    """Return the logprobs of all tokens at each token of each response, and the values."""
    token_scores = [torch.full((len(response),), 0.5) for response in responses]
    batch = built.trainer.make_batch(queries, responses, token_scores)
    with torch.no_grad():
        states, values = built.policy(**batch.inputs)
        all_logprobs = built.policy.head(states).log_softmax(-1)
    rows = zip(all_logprobs, values, batch.mask.bool())
    return [(logprobs[where], value[where]) for logprobs, value, where in rows]


def run_plain(model, query, response):
    """Return a plain model's output for one response to one query, without any padding."""
    start = torch.tensor([model.config.decoder_start_token_id])
    decoder_ids = torch.cat([start, response[:-1]])[None]
    with torch.no_grad():
        return model(query[None], decoder_input_ids=decoder_ids, output_hidden_states=True)


@pytest.fixture(scope="module")
def trained(folder, make, tmp_path_factory):
    """Return a policy after two steps, what it says of its responses, and where it was saved."""
    built = make(folder)
    before = weights_of(built)
    built.metrics = [take_step(built, (0, step, 0)) for step in (1, 2)]
    after = weights_of(built)
    built.moved = {name: not torch.equal(after[name], before[name]) for name in before}

    torch.nn.init.normal_(built.policy.v_head.summary.weight)  # two steps move it by little
    built.queries, built.numbers, built.responses, _ = respond(built)
    built.together = evaluate(built, built.queries, built.responses)
    built.alone = []
    for query, response in zip(built.queries, built.responses):
        built.alone += evaluate(built, [query], [response])

    built.greedy = greedy(built.model, built.tokenizer, PROMPTS)
    built.saved = tmp_path_factory.mktemp("saved")
    saving.save_model(built.model, built.tokenizer, built.settings, built.saved)  # merges it
    built.plain = AutoModelForSeq2SeqLM.from_pretrained(built.saved).eval()
    return built


# -------------------------------------------------------------- rollout
def test_the_responses_are_those_of_the_plain_model_drawn_by_hand(trained):
    """Each token is the first up to which its probabilities sum to the token's number.

    In a batch, queries are padded; here each is alone.
    """
    assert len({len(query) for query in trained.queries}) == 3
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


def test_a_response_ends_with_the_end_token_and_has_no_start_token(make, folder):
    built = make(folder, "--temperature", "1", "--max-new-tokens", "40")
    start = built.model.generation_config.decoder_start_token_id
    end = built.tokenizer.eos_token_id

    def make_the_end_likely(module, inputs, logits):
        logits[..., end] += 8.0

    built.model.get_output_embeddings().register_forward_hook(make_the_end_likely)
    _, _, responses, texts = respond(built)
    for response, text in zip(responses, texts):
        assert len(response) < 40 and response[-1] == end
        assert end not in response[:-1] and (start == end or response[0] != start)
        assert text == "" or re.match(r" \S", text)


def test_the_scores_of_the_tokens_sum_up(make, make_learner, folders):
    built = make(folders["bart"])
    learner = make_learner(built, lambda rows, texts: [float(len(text)) for text in texts])
    numbers = random_numbers((0, 0, 0), 3, built.settings.max_new_tokens)
    rollout = train_rlhf.sample_and_score(built.rows, numbers, learner)
    assert rollout.scores == [len(text) for text in rollout.texts]
    assert [earned.sum().item() for earned in rollout.token_scores] == rollout.scores
    assert [*map(len, rollout.token_scores)] == [*map(len, rollout.responses)]


# ----------------------------------------------------------- the policy
def test_logprobs_and_values_are_those_of_the_plain_model_whatever_the_padding(trained):
    """A value is linear in the decoder's state and in what was earned."""
    head = trained.policy.v_head.summary
    rows = zip(trained.queries, trained.responses, trained.together, trained.alone)
    for query, response, (logprobs, values), (logprobs_alone, values_alone) in rows:
        output = run_plain(trained.plain, query, response)
        wanted = torch.log_softmax(output.logits[0] / TEMPERATURE, dim=-1)
        assert torch.allclose(logprobs, wanted, atol=1e-4)
        assert torch.allclose(logprobs, logprobs_alone, atol=1e-5)

        with torch.no_grad():
            states = output.decoder_hidden_states[-1][0]
            constant, slope = (states @ head.weight.T + head.bias).unbind(-1)
        wanted = constant + slope * torch.arange(len(response)) / 2
        assert min(constant.abs().max(), slope.abs().max()) > 0.1
        assert torch.allclose(values, wanted, atol=1e-3)
        assert torch.allclose(values, values_alone, atol=1e-4)


def test_two_steps_begin_at_the_base_model_and_move_the_weights(trained):
    first, second = trained.metrics
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl"] > 1e-3
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert all(trained.moved.values())
    for part in (".encoder.", ".decoder.", "v_head."):
        assert any(part in name for name in trained.moved), part


def test_gradient_checkpointing_takes_the_same_step(make, folder):
    weights = []
    for flags in ([], ["--gradient-checkpointing"]):
        built = make(folder, *ONE_UPDATE, *flags)
        take_step(built)
        weights.append(weights_of(built))
    plain, checkpointed = weights
    assert all(torch.allclose(checkpointed[name], plain[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("flags", [["--quantization", "8bit"], ["--dtype", "bfloat16"]])
def test_a_step_with_smaller_weights(make, folders, tmp_path, flags):
    built = make(folders["t5"], *flags)
    before = weights_of(built)
    assert take_step(built)["skipped_updates"] == 0
    after = weights_of(built)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    saving.save_model(built.model, built.tokenizer, built.settings, tmp_path)
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not getattr(saved, "is_quantized", False)
    assert len(greedy(saved, built.tokenizer, PROMPTS)) == 3


# -------------------------------------------------------- what is saved
def test_the_saved_model_says_the_same(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained.saved)
    assert tokenizer.padding_side == "right"
    assert greedy(trained.plain, tokenizer, PROMPTS) == trained.greedy


def test_the_adapter_loads_with_peft(trained, folder):
    config = json.loads((trained.saved / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    query, response = trained.queries[0], trained.responses[0]
    wanted = run_plain(trained.plain, query, response).logits
    assert not torch.allclose(run_plain(base, query, response).logits, wanted, atol=1e-3)
    adapted = PeftModel.from_pretrained(base, trained.saved / "adapter")
    assert torch.allclose(run_plain(adapted, query, response).logits, wanted, atol=1e-4)


# ---------------------------------------------------------- a whole run
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
    flags = ["--model-name", str(place / "t5"), "--output-dir", str(place / "out")]
    flags += ["--device", "cpu", "--prompts", "ba", "de di", "fi", "--eval-prompts"]
    flags += ["--positive-words", "mo", "ni", "pe", "--max-new-tokens", "4", "--batch-size", "12"]
    flags += ["--target-approx-kl", "0.02", "--learning-rate", "0.01", "--kl-coef", "0.02"]
    flags += ["--eval-samples", "60"]
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        assert train_rlhf.main([*flags, "--training-epochs", "40"]) == 0
        assert train_rlhf.main([*flags, "--training-epochs", "60", "--resume"]) == 0
    report = json.loads((place / "out" / "report.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=place / "out", report=report, screen=screen.getvalue())


def test_a_random_t5_learns_a_rule_and_goes_on(learned):
    base, trained = (learned.report[name]["train_prompts"] for name in ("base", "trained"))
    assert base["success_rate"] < 0.3
    assert trained["success_rate"] > 0.8
    assert "going on after step 10\n" in learned.screen
    lines = (learned.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 16)]


def test_the_page_shows_the_tokens_of_each_step_once(learned):
    rows = read_rows(learned.folder / "samples.jsonl")
    assert [row["step"] for row in rows] == [step for step in range(1, 16) for _ in range(12)]
    for row in rows:
        assert "".join(row["tokens"]["text"]) == row["response"]
        assert sum(row["tokens"]["kl"]) == pytest.approx(row["kl"], rel=1e-3, abs=1e-6)
    steps = page_content(learned.folder / "watch.html")["steps"]
    assert [step["step"] for step in steps] == [*range(1, 16)]
    tokens = [response["tokens"] for step in steps for response in step["responses"]]
    assert tokens == [row["tokens"] for row in rows]


def test_screen_and_card_tell_how_to_load_it(learned, monkeypatch):
    card = (learned.folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(learned.folder)
    for text, there in ((learned.screen, str(learned.folder)), (card, ".")):
        snippet = text[text.rindex("    from transformers import") :].partition("\n\n!")[0]
        assert repr(there) in snippet
        names = {}
        exec(textwrap.dedent(snippet), names)
        assert names["model"].config.is_encoder_decoder


# ---------------------------------------------------- the other scripts
@pytest.mark.parametrize("script", [train_sft, make_instructions], ids=lambda each: each.__name__)
def test_what_continues_texts_is_refused_one(script, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "I am happy."}\n{"text": "I am sad."}\n')
    flags = ["--data", "rows.jsonl"] if script is train_sft else []
    status = script.main(["--model-name", str(folder), "--device", "cpu", *flags])
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith(f"MODEL_NAME is {shorten(folder)}: it can't be used (")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}
