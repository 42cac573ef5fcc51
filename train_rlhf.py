"""Fine-tune a language model with PPO so that it says positive things, and show that it learned.

    python train_rlhf.py                             # TinyLlama-1.1B-Chat, with the constants below
    python train_rlhf.py --model-name demo_model     # the small model beside this file: offline, about a minute
    python train_rlhf.py --help                      # every constant is also a flag

Read it from top to bottom, as the data flows: constants, policy, rollout, reward, PPO step, training, measurement,
main. What a run needs besides the algorithm (settings, models, checkpoints, failures, the report) stands after that.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from textwrap import wrap
from types import SimpleNamespace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds; Ctrl-C in there needs no stack trace
for chatty in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):  # one already when imported
    logging.getLogger(chatty).setLevel(logging.ERROR)

import numpy
import psutil
import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import masked_mean

# --- Model
MODEL_NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # a name on the Hugging Face Hub, or a local folder
OUTPUT_DIR = "trained_model"  # all that a run leaves; an earlier run found there is moved aside, not deleted
LORA_RANK = 16  # rank of the update of each adapted layer; less saves memory, more can express more
LORA_ALPHA = 32  # the update is multiplied by LORA_ALPHA / LORA_RANK
LORA_TARGETS = ["all-linear"]  # names of the layers to adapt; all-linear = every one but the output head
QUANTIZATION = "none"  # 8bit or 4bit keep the frozen weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda or cpu; auto = cuda where there is one
DTYPE = "auto"  # float32, bfloat16 or float16 weights; auto = float32 on a CPU, the card's best 16 bits on a GPU

# --- Prompts and reward
PROMPTS = [  # beginnings that the model continues, in turn; a .txt (one a line) or .jsonl file stands for its prompts
    "I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling",
]  # fmt: skip
EVAL_PROMPTS = [  # held out: measured only, never trained on, to see what carries over
    "Right now I am", "My day was", "It makes me feel", "Tonight I feel", "Everything seems", "I woke up feeling",
]  # fmt: skip
POSITIVE_WORDS = [  # a response with one of these as a whole word, in any case, scores +1, any other -1
    "happy", "glad", "good", "great", "smile", "joy", "love", "wonderful", "amazing", "excited", "pleased",
    "delighted", "cheerful", "grateful", "blessed", "fantastic",
]  # fmt: skip
SCORE_PREFIXES = True  # a token earns what it adds to the score of the text so far; False = the last one gets it all
REWARD = "positive_word_reward"  # scores a response: that, or my_file.py:my_function from its text to a number

# --- Rollout
TRAINING_EPOCHS = 150  # passes over PROMPTS; 150 passes over 6 prompts are 900 samples
BATCH_SIZE = 10  # responses sampled for one PPO step; more is steadier but slower to react
MAX_NEW_TOKENS = 10  # length of a response in tokens, at most
TEMPERATURE = 1.0  # divides the logits of policy and base model everywhere; 1.0 = the models as they are

# --- PPO
LEARNING_RATE = 3e-4  # of the first step; the later ones follow TARGET_APPROX_KL
TARGET_APPROX_KL = 0.0025  # size that the first step aims at, in nats per token, falling to 0; 0 = LEARNING_RATE always
PPO_EPOCHS = 4  # passes over a batch; 1 = every sample is used once, and nothing is ever clipped
MINI_BATCH_SIZE = 0  # responses in one update, a divisor of BATCH_SIZE; less saves memory; 0 = the whole batch
KL_COEF = 0.1  # price of one nat of KL against the base model, in units of the score; 0 = free to drift away
CLIP_RANGE = 0.2  # PPO's epsilon: nothing is gained by a probability ratio outside 1 ± CLIP_RANGE
VALUE_CLIP_RANGE = 0.2  # the same for a value's change in one step, in units of the score
VF_COEF = 0.1  # weight of the value loss in the loss; 0 = the value head stays at zero
GAMMA = 1.0  # discount per token; 1.0 = none: a response is short, and its score comes at the end
LAM = 0.95  # GAE's lambda: 1.0 trusts what happened, 0.0 trusts the value head
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0 = off

# --- Run
SEED = 0  # the same seed on the same machine gives the same run
EVAL_SAMPLES = 240  # responses in each of the four measurements at the end, spread evenly over the prompts
EVAL_BATCH_SIZE = 40  # responses generated at once there; less saves memory
LOG_EVERY = 5  # steps between two lines of progress where the output is no terminal
SAVE_EVERY = 10  # steps between two checkpoints; 0 = only where the run ends or is stopped
RESUME = False  # go on from the checkpoint in OUTPUT_DIR
REPORT_TO = "none"  # tensorboard = the metrics in OUTPUT_DIR/tensorboard too (pip install tensorboard); none = off


# --------------------------------------------------------------------------------------------------------- policy
class PolicyWithValueHead(AutoModelForCausalLMWithValueHead):
    """TRL's language model with a value head, its logits divided by TEMPERATURE as in sampling."""

    def __init__(self, model, temperature):
        super().__init__(model, summary_dropout_prob=0.0)
        self.temperature = temperature
        self.is_peft_model = True  # tells TRL that the base model is this one with its adapter off
        self.v_head.summary = torch.nn.Linear(self.v_head.summary.in_features, 2)
        for parameter in self.v_head.float().parameters():
            torch.nn.init.zeros_(parameter)  # random first values would be noise in the advantages

    def forward(self, earned=0.0, **inputs):
        """Return float32 logits (batch, length, vocabulary), no loss, and values (batch, length).

        A value is what is still to come after a token, which depends on what was earned up to it (batch, length): it is
        a linear function of that, with both of its coefficients from the value head.
        """
        logits, loss, values = super().forward(**inputs)
        return logits / self.temperature, loss, values[..., 0] + values[..., 1] * earned


def load_tokenizer(path, settings):
    """Return the tokenizer, once it is known that prompts and words suit the model."""
    try:
        config, tokenizer = (
            kind.from_pretrained(path, trust_remote_code=False) for kind in (AutoConfig, AutoTokenizer)
        )
    except Exception as error:  # a broken folder can make transformers raise anything
        raise bad_model(settings, error) from error
    if tokenizer.eos_token is None:
        raise bad_model(settings, "its tokenizer has no end token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # either will do: masks come from lengths
    if problems := check_texts(config, tokenizer, settings):
        raise SettingsError(*problems)
    return tokenizer


def load_policy(path, tokenizer, settings, device, dtype):
    """Load the base model; add a LoRA adapter and a value head, both float32."""
    base = load_base(path, tokenizer, settings, device, dtype)
    own = base.generation_config
    ids = {"bos_token_id": own.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["eos_token_id"] = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}  # and no penalties
    base.generation_config = GenerationConfig(max_new_tokens=settings.max_new_tokens, **sampling, **ids)
    targets = "all-linear" if settings.lora_targets == ["all-linear"] else settings.lora_targets
    # No dropout: it would change the ratio of a policy to itself.
    lora = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=targets, lora_dropout=0.0)
    try:
        model = get_peft_model(base, lora)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if base.config.tie_word_embeddings and any(hasattr(layer, "base_layer") for layer in ends):
            raise ValueError("this model's embeddings are tied, so the update can't be merged: leave them out")
        return PolicyWithValueHead(model, settings.temperature).to(device)
    except ValueError as error:
        raise SettingsError(f"LORA_TARGETS is {settings.lora_targets}: {shorten(error, 120)}") from error


# -------------------------------------------------------------------------------------------------------- rollout
def rollout(policy, tokenizer, prompts, reward):
    """Sample a response to each prompt and score it.

    Returns queries and responses, 1-D tensors of token ids; the texts of the responses; their scores.
    """
    device = policy.pretrained_model.device
    queries = [torch.tensor(tokenizer(prompt)["input_ids"], device=device) for prompt in prompts]
    responses = generate(policy, tokenizer, queries)
    texts = [response_text(tokenizer, query, response) for query, response in zip(queries, responses)]
    return queries, responses, texts, [score_response(reward, *pair) for pair in zip(prompts, texts)]


def generate(policy, tokenizer, queries):
    """Sample one response to each query, all at once: 1 to MAX_NEW_TOKENS ids, cut after the first end token."""
    model = policy.pretrained_model
    batch = tokenizer.pad({"input_ids": queries}, padding_side="left", return_tensors="pt").to(model.device)
    policy.eval()
    with torch.no_grad():
        sequences = model.generate(**batch, remove_invalid_values=True)  # bad logits end in a skipped update
    end_ids = torch.tensor(model.generation_config.eos_token_id, device=model.device)  # one id or several
    responses = []
    for row in sequences[:, batch["input_ids"].shape[1] :]:  # without the query, or it would be trained on too
        ends = torch.isin(row, end_ids).nonzero()
        responses.append(row[: ends[0, 0] + 1] if len(ends) else row)
    return responses


def response_text(tokenizer, query, response):
    """Return the text that the response adds to that of the query, with the space before it if there is one."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    both = tokenizer.decode([*query.tolist(), *response.tolist()], **options)
    return both[len(tokenizer.decode(query, **options)) :]


# --------------------------------------------------------------------------------------------------------- reward
def positive_word_reward(text, positive_words=POSITIVE_WORDS):
    """Return +1.0 if the text has one of the positive words as a whole word, in any case, else -1.0."""
    words = "|".join(re.escape(word) for word in positive_words)
    return 1.0 if re.search(rf"(?<!\w)({words})(?!\w)", text, re.IGNORECASE) else -1.0


def score_response(reward, prompt, text):
    """Return the score of a response; letters that only prolong the prompt's last word are no word of its own."""
    if prompt[-1].isalnum():  # ASCII, since not every script has spaces between words
        text = re.sub(r"^\w+", "", text, flags=re.ASCII)
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        score = reward(text)
    except (Exception, SystemExit) as error:  # the function is the user's and may raise anything
        raise RunError(f"REWARD, {name}, raised {shorten(repr(error), 200)} for {text!r}: mend it") from error
    with suppress(Exception):
        if abs(score) < 1e15:  # its square is finite in float32 too; a TypeError where it is no number
            return float(score)
    gave = f"gave {shorten(repr(score))} for {text!r}"
    raise RunError(f"REWARD, {name}, {gave}: it has to return one finite number for one text")


def score_tokens(reward, tokenizer, prompt, query, response, score):
    """Return what each token of a response adds to its score, a tensor as long as the response.

    The sum is the score of the response less that of an empty one, so the best policy stays the best (potential-based
    shaping, Ng, Harada and Russell 1999, exact for GAMMA 1), but now it shows which token made the difference.
    """
    starts = [response_text(tokenizer, query, response[:length]) for length in range(len(response))]
    before = torch.tensor([score_response(reward, prompt, text) for text in starts])
    return torch.cat([before[1:], torch.tensor([score])]) - before


# ------------------------------------------------------------------------------------------------------- PPO step
class ExactKLTrainer(PPOTrainer):
    """TRL's PPOTrainer with exact KLs, over the whole vocabulary, and with a reward for each token.

    With kl_penalty="full" TRL puts KL_t = sum_v p(v) ln(p(v) / p_ref(v)) into the reward where it usually puts
    ln(p / p_ref) of the sampled token: the same mean with far less noise. But KL_t does not depend on the token sampled
    at t, so that reward can't teach the policy to lower it. The gradient of KL_t therefore joins the loss; the policy
    gradient of a reward that depends on the parameters has both terms: grad E[R] = E[R grad ln p] + E[grad R].
    """

    def step(self, queries, responses, token_scores):
        """Take a PPO step; token_scores are what each token of each response earns, 1-D tensors."""
        config = self.config
        inputs = self.prepare_model_inputs(queries, responses)
        scores = torch.zeros(inputs["input_ids"].shape, device=self.current_device)
        for row, query, response, earned in zip(scores, queries, responses, token_scores):
            row[len(query) : len(query) + len(response)] = earned
        inputs["earned"] = scores.cumsum(1)

        with torch.no_grad():
            batch = self.model, queries, responses, inputs
            logprobs, logits, values, mask = self.batched_forward_pass(*batch, return_logits=True)
            all_logprobs = torch.log_softmax(logits, dim=-1)
            with self.optional_peft_ctx():
                _, ref_logits, _, _ = self.batched_forward_pass(*batch, return_logits=True)
            ref_logprobs = torch.log_softmax(ref_logits, dim=-1)
            kl = self._kl_penalty(all_logprobs, ref_logprobs)
            rewards = (scores[:, 1:] - self.kl_ctl.value * kl) * mask
            values, _, returns = self.compute_advantages(values, rewards, mask)
            advantages = (returns - values) * mask

        all_stats, skipped_updates = [], 0
        for _ in range(config.ppo_epochs):
            order = numpy.random.permutation(config.batch_size)
            for start in range(0, config.batch_size, config.mini_batch_size):
                rows = order[start : start + config.mini_batch_size]
                new_logprobs, logits, new_values, _ = self.batched_forward_pass(
                    self.model,
                    [queries[row] for row in rows],
                    [responses[row] for row in rows],
                    {name: value[rows] for name, value in inputs.items()},
                    return_logits=True,
                )
                policy_loss, value_loss, stats = self.loss(
                    logprobs[rows],
                    values[rows],
                    logits,
                    new_values,
                    new_logprobs,
                    mask[rows],
                    advantages[rows],
                    returns[rows],
                )
                new_all_logprobs = torch.log_softmax(logits, dim=-1)
                kl_loss = masked_mean(self._kl_penalty(new_all_logprobs, ref_logprobs[rows]), mask[rows])
                step_kl = self._kl_penalty(all_logprobs[rows], new_all_logprobs.detach())
                stats["policy/approxkl"] = masked_mean(step_kl, mask[rows])
                loss = policy_loss + self.kl_ctl.value * kl_loss + value_loss
                self.accelerator.backward(loss)
                norm = self.accelerator.clip_grad_norm_(self.model_params, config.max_grad_norm or math.inf)
                if norm.isfinite() or self.accelerator.scaler:
                    self.optimizer.step()
                self.optimizer.zero_grad()
                skipped_updates += int(not (loss if self.accelerator.scaler else norm).isfinite())
                all_stats.append(stats)
        self.skipped_updates = skipped_updates
        means = {
            f"ppo/{name}": torch.stack([s[name] for s in all_stats]).mean()
            for name in ("loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac", "policy/entropy")
        }
        return {
            **means,
            "ppo/learning_rate": self.optimizer.param_groups[0]["lr"],
            "objective/kl": (kl * mask).sum(-1).mean(),
            "objective/kl_coef": self.kl_ctl.value,
        }


def build_trainer(policy, tokenizer, settings, device, dtype):
    """Return the trainer; its optimizer, TRL's Adam, holds the adapter and the value head, and nothing else."""
    accelerator = {"cpu": device == "cpu"}
    if device == "cuda" and dtype == torch.float16:
        accelerator["mixed_precision"] = "fp16"  # scales the loss, since small gradients vanish in float16
    same = ("seed", "batch_size", "ppo_epochs", "learning_rate", "vf_coef", "gamma", "lam")
    config = PPOConfig(
        **{name: getattr(settings, name) for name in same},
        mini_batch_size=settings.mini_batch_size or settings.batch_size,
        max_grad_norm=settings.max_grad_norm or None,
        cliprange=settings.clip_range,
        cliprange_value=settings.value_clip_range,
        init_kl_coef=settings.kl_coef,
        adap_kl_ctrl=False,  # TRL's controller takes some 10,000 samples to act
        kl_penalty="full",
        accelerator_kwargs=accelerator,
    )
    tokenizer.padding_side = "right"  # in the loss, so that positions count from 0 as they do without padding
    trainer = ExactKLTrainer(config, policy, None, tokenizer)
    # TRL's is an iterator, empty after one use: no later gradient would be clipped.
    trainer.model_params = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return trainer


def adapt_learning_rate(learning_rate, approx_kl, target):
    """Return the rate with which the last step would have moved by the target, but at most 1.5 times more or less.

    The rates that suit small and large models differ by orders of magnitude, the nats that a step moves do not; they
    grow with the square of the rate.
    """
    return learning_rate * min(max(math.sqrt(target / max(approx_kl, 1e-12)), 1 / 1.5), 1.5)


# ------------------------------------------------------------------------------------------------------- training
def count_steps(settings):
    """Return how many batches TRAINING_EPOCHS passes over PROMPTS take; the last one is filled up."""
    return math.ceil(settings.training_epochs * len(settings.prompts) / settings.batch_size)


def train(trainer, tokenizer, reward, settings, metrics, stop):
    """Take PPO steps until the samples are used up or a signal came; append a record of each to metrics."""
    total_steps, start = count_steps(settings), time.perf_counter() - (metrics[-1]["seconds"] if metrics else 0)
    log = Log(total_steps, metrics, settings)
    for step in range(len(metrics) + 1, total_steps + 1):
        try:
            texts, scores, stats = take_step(trainer, tokenizer, reward, settings, step)
        except RunError:  # of the reward function: the steps before it are worth keeping
            save_checkpoint(trainer, settings, metrics)
            raise
        seconds = time.perf_counter() - start
        metrics.append(record_step(step, texts, scores, stats, trainer.skipped_updates, seconds, settings))
        if settings.target_approx_kl:
            target = settings.target_approx_kl * (1 - step / total_steps) ** 3  # large steps early, then ever finer
            approx_kl = metrics[-1]["approx_kl"]
            for group in trainer.optimizer.param_groups:
                group["lr"] = adapt_learning_rate(group["lr"], math.inf if approx_kl is None else approx_kl, target)
        log.write(metrics)
        if all(record["skipped_updates"] for record in metrics[-3:]) and step >= 3:
            remedy = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or with DTYPE float32"
            raise RunError(f"three steps in a row had updates with numbers that are not finite: {remedy}")
        last = step == total_steps or stop.signal
        due = settings.save_every and step % settings.save_every == 0 and not metrics[-1]["skipped_updates"]
        if last or due:
            save_checkpoint(trainer, settings, metrics)
        if last:
            break
    log.close()


def take_step(trainer, tokenizer, reward, settings, step):
    """Sample a batch, score it and improve the policy with it; return the texts, their scores, TRL's statistics."""
    set_seeds(settings.seed, step)
    indices = range((step - 1) * settings.batch_size, step * settings.batch_size)
    prompts = [settings.prompts[index % len(settings.prompts)] for index in indices]
    queries, responses, texts, scores = rollout(trainer.model, tokenizer, prompts, reward)
    if settings.score_prefixes:
        samples = zip(prompts, queries, responses, scores)
        token_scores = [score_tokens(reward, tokenizer, *sample) for sample in samples]
    else:
        token_scores = [torch.tensor([0.0] * (len(r) - 1) + [score]) for r, score in zip(responses, scores)]
    return texts, scores, trainer.step(queries, responses, token_scores)


def set_seeds(*purpose):
    """Let the random numbers that follow depend on their purpose alone, whatever was drawn before.

    So a run that goes on needs no old random states, and both models of a measurement draw alike.
    """
    seed = zlib.crc32(repr(purpose).encode())
    torch.manual_seed(seed)
    numpy.random.seed(seed)  # with which TRL shuffles


def record_step(step, texts, scores, stats, skipped_updates, seconds, settings):
    """Return the line of metrics.jsonl for one step; what is not finite becomes None, JSON's null."""
    score, samples = sum(scores) / len(scores), step * settings.batch_size
    kl, kl_coef = float(stats["objective/kl"]), stats["objective/kl_coef"]
    named = {"learning_rate": "learning_rate", "policy_loss": "loss/policy", "value_loss": "loss/value"}
    named |= {"approx_kl": "policy/approxkl", "clip_fraction": "policy/clipfrac", "entropy": "policy/entropy"}
    record = {
        "step": step,
        "samples": samples,
        "epoch": samples / len(settings.prompts),
        "success_rate": success_rate(scores),
        "score": score,
        "reward": score - kl_coef * kl,
        "kl": kl,  # nats per response, of the policy that sampled it
        "kl_coef": kl_coef,
        **{name: float(stats[f"ppo/{key}"]) for name, key in named.items()},
        "distinct": len(set(texts)) / len(texts),
        "skipped_updates": skipped_updates,
        "seconds": seconds,
    }
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


# ---------------------------------------------------------------------------------------------------- measurement
def measure(trainer, tokenizer, prompts, reward, settings, base):
    """Measure the trained model, or with the adapter off the base model, on at least EVAL_SAMPLES fresh responses.

    Returns the entry of report.json.
    """
    set_seeds(settings.seed, prompts)
    prompts = prompts[:: math.ceil(len(prompts) / settings.eval_samples)]  # of a long list, evenly spread ones
    each = math.ceil(settings.eval_samples / len(prompts))
    asked = [prompt for prompt in prompts for _ in range(each)]
    texts, scores, kls, ref_logprobs, tokens = [], [], [], [], 0
    starts = range(0, len(asked), settings.eval_batch_size)
    for start in tqdm(starts, leave=False, disable=not is_terminal()):
        batch = asked[start : start + settings.eval_batch_size]
        with trainer.optional_peft_ctx() if base else nullcontext():  # TRL's name for "adapter off"
            queries, responses, batch_texts, batch_scores = rollout(trainer.model, tokenizer, batch, reward)
            kl, ref_logprob = compare_with_base(trainer, queries, responses)
        texts, scores = texts + batch_texts, scores + batch_scores
        kls, ref_logprobs = kls + kl.tolist(), ref_logprobs + ref_logprob.tolist()
        tokens += sum(map(len, responses))
    of_prompt = {prompt: slice(i * each, (i + 1) * each) for i, prompt in enumerate(prompts)}
    return {
        "samples": len(texts),
        "success_rate": success_rate(scores),
        "score": sum(scores) / len(scores),
        "kl": sum(kls) / len(kls),
        "distinct": len(set(texts)) / len(texts),
        "perplexity_under_base": math.exp(min(-sum(ref_logprobs) / tokens, 700)),
        "success_by_prompt": {prompt: success_rate(scores[where]) for prompt, where in of_prompt.items()},
        "first_sample": {prompt: texts[where][0] for prompt, where in of_prompt.items()},
    }


@torch.no_grad()
def compare_with_base(trainer, queries, responses):
    """Return, for each response, its KL(model || base model) in nats and the base model's log-probability of it."""
    inputs = PPOTrainer.prepare_model_inputs(trainer, queries, responses)  # TRL's own, since nothing is earned here
    batch = trainer.model, queries, responses, inputs
    _, logits, _, mask = trainer.batched_forward_pass(*batch, return_logits=True)
    with trainer.optional_peft_ctx():
        ref_logprobs, ref_logits, _, _ = trainer.batched_forward_pass(*batch, return_logits=True)
    kl = trainer._kl_penalty(torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1))
    return (kl * mask).sum(-1), (ref_logprobs * mask).sum(-1)


def success_rate(scores):
    """Return the share of scores above 0."""
    return sum(score > 0 for score in scores) / len(scores)


def kl_minimum(rate, base_rate):
    """Return the least KL in nats from a base model that succeeds at base_rate to any policy that does at rate.

    p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0)): no less by the data processing inequality, and reached by the base
    model with the odds of success changed and nothing else.
    """
    return sum(p * math.log(p / p0) for p, p0 in ((rate, base_rate), (1 - rate, 1 - base_rate)) if p > 0)


def mean_kl_minimum(base, trained):
    """Return the kl_minimum of two measurements of the same prompts, the mean over the prompts.

    With few samples of each prompt it is that of the mean rates, which is never more, since the bound is convex. A base
    rate of 0 or 1 may be up to half a response away from it: so few samples can't tell how near it is.
    """
    pairs = [(rate, base["success_by_prompt"][prompt]) for prompt, rate in trained["success_by_prompt"].items()]
    each, bounds = base["samples"] / len(pairs), []
    if each < 10:
        pairs, each = [(trained["success_rate"], base["success_rate"])], base["samples"]
    for rate, base_rate in pairs:
        if base_rate in (0, 1):
            base_rate = min(max(rate, base_rate - 0.5 / each), base_rate + 0.5 / each)
        bounds.append(kl_minimum(rate, base_rate))
    return sum(bounds) / len(bounds)


def evaluate(trainer, tokenizer, reward, settings):
    """Measure base and trained model alike on both sets of prompts; return these parts of report.json."""
    results = {"base": {}, "trained": {}}
    for name, prompts in (("train_prompts", settings.prompts), ("eval_prompts", settings.eval_prompts)):
        for model, measured in results.items():
            measured[name] = measure(trainer, tokenizer, prompts, reward, settings, base=model == "base")
            if not math.isfinite(measured[name]["kl"]):
                raise RunError("what was measured is not finite: set DTYPE to float32, or lower TARGET_APPROX_KL")
            measured[name]["kl_minimum"] = mean_kl_minimum(results["base"][name], measured[name])
    base, trained = (measured["train_prompts"]["success_rate"] for measured in results.values())
    pooled, samples = (base + trained) / 2, results["base"]["train_prompts"]["samples"]
    error = math.sqrt(2 * pooled * (1 - pooled) / samples)  # standard error of the difference, were both rates one
    close = not ran_away(results["trained"]["train_prompts"]["kl"], settings)
    return {"learned": trained - base > 3 * error, "close_to_base": close, **results}


def ran_away(kl, settings):
    """Return whether a KL says that little is left of the base model: more than a nat for each token."""
    return kl > settings.max_new_tokens


# ----------------------------------------------------------------------------------------------------------- main
def main(argv=None):
    """Do a run with the constants, overridden by the flags in argv; return the exit status."""
    with suppress(AttributeError):  # in a notebook, which shows everything anyway
        sys.stdout.reconfigure(errors="replace")  # a model may say what the screen can't show
    noise = r"`PPO(Config|Trainer)` is dep|No dataset is|.*is_gradient_checkpointing|fan_in_fan_out is set|std\(\)"
    warnings.filterwarnings("ignore", message=noise)  # what pinned libraries say of themselves helps no user
    transformers.logging.disable_progress_bar()  # of loading weights
    transformers.logging.set_verbosity_error()
    stop, settings = StopSignal(), None
    try:
        settings = read_settings(argv)
        run(settings, stop)
        print(end="", flush=True)  # here an error is caught
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a third one would find nothing left to stop
        print(f"\nStopped; {what_is_saved(settings, stop)}", file=sys.stderr)
        return 128 + stop.signal
    except Exception as error:
        if settings is None or (reason := explain(error, settings)) is None:
            raise
        print(f"\nStopped: {reason}; {what_is_saved(settings, stop)}", file=sys.stderr)
        return 1
    return 0


def run(settings, stop):
    """Load, train, measure, save and show."""
    reward = load_reward(settings)
    path = find_model(settings.model_name)
    device, dtype = pick_device(settings)
    tokenizer = load_tokenizer(path, settings)
    torch.manual_seed(settings.seed)  # of the adapter's first values
    policy = load_policy(path, tokenizer, settings, device, dtype)
    trainer = build_trainer(policy, tokenizer, settings, device, dtype)
    with prepare_output(settings):
        stop.has_output = True
        metrics = load_checkpoint(trainer, settings) if settings.resume else []
        announce(policy, settings, device, dtype, metrics)

        stop.after_step = True
        train(trainer, tokenizer, reward, settings, metrics, stop)
        stop.after_step = False
        if stop.signal:
            raise Stopped

        print(f"\nMeasuring the model before and after, {settings.eval_samples} samples for each figure …", flush=True)
        report = {
            "settings": vars(settings),
            "versions": versions(),
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            **evaluate(trainer, tokenizer, reward, settings),
            **{name: metrics[-1][name] for name in ("samples", "seconds")},
            "samples_per_second": metrics[-1]["samples"] / metrics[-1]["seconds"],
            "peak_memory_mb": peak_memory_mb(device),
        }
        save_results(policy, tokenizer, report, metrics, settings)
    print(f"{samples_table(report)}\n{verdict(report)}")
    if not report["learned"]:
        print("Try more TRAINING_EPOCHS, a lower KL_COEF, or prompts for which the base model succeeds now and then.")
    print(f"\nThe model, its report and training.png are in {settings.output_dir}/. To load it:\n")
    folder = settings.output_dir if os.path.isabs(settings.output_dir) else f"./{settings.output_dir}"
    print(loading_snippet(folder, settings.prompts[0]))


# ------------------------------------------------------------------------------------------------------- settings
class SettingsError(Exception):
    """Settings or input that can't work; each problem names a setting, its value and the remedy."""

    def __init__(self, *problems):
        super().__init__("\n".join(["Nothing was started or changed:", *(f"- {problem}" for problem in problems)]))


class RunError(Exception):
    """A failure in the middle of a run that the user can mend."""


def shorten(value, length=80):
    """Return the first line of the value's text, of at most so many characters."""
    line, *others = str(value).strip().splitlines() or ["empty"]
    return line if not others and len(line) <= length else line[: length - 1].rstrip(" .:") + "…"


def constants():
    """Return {name: (section, default, comment)} for the constants at the top of this file."""
    found, section = {}, ""
    for line in Path(__file__).read_text(encoding="utf-8").splitlines():
        section = line[6:] if line.startswith("# --- ") else section
        if match := re.match(r"([A-Z_]+) = .*?  # (.*)", line):
            found[match[1]] = (section, globals()[match[1]], match[2])
    return found


def read_settings(argv):
    """Return the constants, overridden by flags, as a namespace with lower-case names, or raise all that is wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag VALUE …]   (each flag overrides a constant of the file for this run)",
        description=__doc__.splitlines()[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=118),
        allow_abbrev=False,
        exit_on_error=False,
    )
    groups = {}
    for name, (section, default, comment) in constants().items():
        several, flag = isinstance(default, list), "--" + name.lower().replace("_", "-")
        text = f"{comment} [{' '.join(map(repr, default)) if several else default}]".replace("%", "%%")
        count = {"nargs": "*"} if several else {"nargs": "?", "const": ""}
        groups[section] = groups.get(section) or parser.add_argument_group(section)
        groups[section].add_argument(flag, dest=name.lower(), default=default, metavar="VALUE", help=text, **count)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise SettingsError(error) from None
    problems, settings = [f"{text}: there is no such flag; --help lists all" for text in unknown], SimpleNamespace()
    for name, value in vars(given).items():
        default = globals()[name.upper()]
        try:
            setattr(settings, name, convert(value, default))
        except ValueError as error:
            setattr(settings, name, default)
            problems.append(f"{name.upper()} is {shorten(value)}: give {error}")
    for name in ("prompts", "eval_prompts"):
        try:
            setattr(settings, name, [prompt for entry in getattr(settings, name) for prompt in read_prompts(entry)])
        except ValueError as error:
            problems.append(f"{name.upper()}: {error}")
    problems += check_settings(settings) + check_places(settings)
    if settings.resume and not problems:
        problems = check_resume(settings)
    if problems:
        raise SettingsError(*problems)
    return settings


def convert(value, default):
    """Return the text behind a flag, or the default itself, in the default's type; a ValueError says what that is."""
    kind = type(default)
    if type(value) is kind and value != "":
        return value
    with suppress(ValueError, KeyError):
        if kind is bool:
            return {"": True, "true": True, "false": False}[value.lower()]
        if math.isfinite(float(value)):
            return kind(value)
    raise ValueError({bool: "true or false", int: "one whole number", float: "one number", str: "one value"}[kind])


def read_prompts(entry):
    """Return the prompts that an entry of PROMPTS stands for: those of a file, or itself; a ValueError says why not."""
    if not entry.endswith((".txt", ".jsonl")):
        return [entry]
    try:
        lines = Path(entry).read_text(encoding="utf-8-sig").split("\n")  # a BOM is no part of the first prompt
    except OSError as error:
        raise ValueError(f"{shorten(entry)} can't be read ({error.strerror}): name a file, or a text") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{shorten(entry)} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"] if entry.endswith(".jsonl") else line.strip())
            if not isinstance(prompts[-1], str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            example = '{"prompt": "I feel so"}'
            raise ValueError(f"{shorten(entry)}, line {number}, is {shorten(line)}: give {example}") from error
    if not prompts:
        raise ValueError(f"{shorten(entry)} has no prompts: give one a line")
    return prompts


def check_settings(settings):
    """Return a line for each impossible value or combination: name, value, remedy."""
    batch_size = max(settings.batch_size, 1)
    shared = sorted(set(settings.prompts) & set(settings.eval_prompts))
    updates = settings.ppo_epochs * batch_size / (max(settings.mini_batch_size, 0) or batch_size)
    countable = range(1, 10**6 + 1).__contains__
    function, texts = re.compile(r"positive_word_reward|.+\.py:\w+"), "one or more texts, none empty"
    rules = [
        ("LORA_RANK LORA_ALPHA TRAINING_EPOCHS BATCH_SIZE MAX_NEW_TOKENS PPO_EPOCHS", countable, "1 to 1000000"),
        ("EVAL_SAMPLES EVAL_BATCH_SIZE LOG_EVERY", countable, "1 to 1000000"),
        ("LEARNING_RATE", lambda v: v > 0, "a number above 0"),
        ("LEARNING_RATE TARGET_APPROX_KL KL_COEF VF_COEF MAX_GRAD_NORM", lambda v: v < 1e30, "a number below 1e30"),
        ("CLIP_RANGE VALUE_CLIP_RANGE", lambda v: 0 < v <= 1000, "a number above 0, at most 1000"),
        ("TEMPERATURE", lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100"),
        ("TARGET_APPROX_KL KL_COEF VF_COEF MAX_GRAD_NORM SAVE_EVERY MINI_BATCH_SIZE", lambda v: v >= 0, "0 or more"),
        ("SEED", lambda v: 0 <= v < 2**32, "a number from 0 to 4294967295"),
        ("GAMMA LAM", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        ("MINI_BATCH_SIZE", lambda v: v < 1 or batch_size % v == 0, f"0 or a divisor of BATCH_SIZE, {batch_size}"),
        ("LORA_TARGETS PROMPTS EVAL_PROMPTS POSITIVE_WORDS", lambda v: v and all(map(str.strip, v)), texts),
        ("MODEL_NAME OUTPUT_DIR REWARD LORA_TARGETS PROMPTS EVAL_PROMPTS POSITIVE_WORDS", is_text, "text in UTF-8"),
        ("EVAL_PROMPTS", lambda v: not shared, f"prompts that are not in PROMPTS, as {shared} is"),
        ("PROMPTS EVAL_PROMPTS", lambda v: len(set(v)) == len(v), "each prompt once"),
        ("POSITIVE_WORDS", lambda v: all(word == word.strip() for word in v), "words without spaces around them"),
        ("POSITIVE_WORDS", lambda v: "," not in "".join(v), "words with spaces between them, no commas"),
        ("QUANTIZATION", ("none", "8bit", "4bit").__contains__, "none, 8bit or 4bit"),
        ("DTYPE", ("auto", "float32", "bfloat16", "float16").__contains__, "auto, float32, bfloat16 or float16"),
        ("DTYPE", lambda v: v != "float16" or pick_device(settings)[0] != "cpu", "float32 or bfloat16 on a CPU"),
        ("DEVICE", ("auto", "cpu", "cuda").__contains__, "auto, cpu or cuda"),
        ("DEVICE", lambda v: v != "cuda" or torch.cuda.is_available(), "cpu, since PyTorch sees no GPU"),
        ("REPORT_TO", ("none", "tensorboard").__contains__, "none or tensorboard"),
        ("REPORT_TO", lambda v: v != "tensorboard" or importlib.util.find_spec(v), "none, or pip install it"),
        ("TARGET_APPROX_KL", lambda v: v == 0 or updates > 1, "0, for a single update of a step can't be measured"),
        ("REWARD", function.fullmatch, "positive_word_reward or FILE.py:FUNCTION"),
    ]
    return [
        f"{name} is {shorten(value)}: give {remedy}"
        for names, holds, remedy in rules
        for name in names.split()
        if not holds(value := getattr(settings, name.lower()))
    ]


def is_text(value):
    """Return whether a text, or each of several, has nothing that can't be written, such as half a character."""
    return all(ord(letter) not in range(0xD800, 0xE000) for letter in "".join(value))


def check_places(settings):
    """Return a line for each file or folder that can't be read or written as the settings want it."""
    problems, output, name = [], Path(settings.output_dir), settings.model_name
    try:
        existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
        if existing == output.absolute() and any(output.iterdir()) and not is_run(output):
            problems.append("it holds files that are not a run's")
        if Path.cwd().is_relative_to(output.resolve()):
            problems.append("it is or holds the current folder")
        if is_locked(output):
            problems.append("another run is writing there")
        if os.path.isdir(name) and Path(name).resolve().is_relative_to(output.resolve()):
            problems.append("MODEL_NAME is read from there")
    except (OSError, ValueError, RuntimeError) as error:  # the last one where links lead in a circle
        problems.append(f"it can't be written ({getattr(error, 'strerror', error)})")
    problems = [f"OUTPUT_DIR is {shorten(output)}: {problem}: name another folder" for problem in problems]
    if os.path.isfile(name) or (not os.path.isdir(name) and name.startswith(("/", ".", "~"))):
        problems.append(f"MODEL_NAME is {shorten(name)}: there is no such folder: name one, or a model on the Hub")
    return problems


def load_reward(settings):
    """Return the function from the text of a response to its score that REWARD names."""
    if settings.reward == "positive_word_reward":
        return lambda text: positive_word_reward(text, settings.positive_words)
    path, _, name = settings.reward.rpartition(":")
    try:
        function = getattr(SimpleNamespace(**runpy.run_path(path)), name)
        if not callable(function):
            raise TypeError(f"{name} is no function")
        return function
    except (Exception, SystemExit) as error:  # the file is the user's and may raise anything
        raise SettingsError(f"REWARD is {settings.reward}: it can't be loaded: {shorten(repr(error), 200)}") from error


# --------------------------------------------------------------------------------------------------------- models
def find_model(name):
    """Return a local folder with the model, fetched from the Hub where the cache lacks it.

    The Hub gets 6 seconds to answer; without an answer the copy in the cache has to do.
    """
    if os.path.isdir(name):
        return name
    answers = []

    def ask():
        try:
            answers.append(HfApi().model_info(name, timeout=5))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a host can outlast the time limit of a request
    thread.start()
    thread.join(6)
    answer = answers[0] if answers else TimeoutError("no answer within 6 seconds")
    if isinstance(answer, HFValidationError | RepositoryNotFoundError | GatedRepoError):
        raise SettingsError(f"MODEL_NAME is {shorten(name)}: no folder here, and no model on the Hub that you may read")
    online = isinstance(answer, ModelInfo)
    if online:
        print(f"Fetching what the cache lacks of {name} from the Hub", flush=True)
    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:  # folders hold the same weights in other formats
        return snapshot_download(name, local_files_only=not online, allow_patterns=files, ignore_patterns=["*/*"])
    except Exception as error:
        problem = f"its download broke off ({shorten(error)}): try again"
        if not online:
            demo_model = Path(__file__).resolve().parent / "demo_model"
            command = f"python {sys.argv[0]} --model-name {os.path.relpath(demo_model)}"
            remedy = f"This runs offline:\n\n    {command}\n" if demo_model.is_dir() else "Name a folder with a model."
            problem = f"no folder here, not in the cache, and the Hub can't be reached ({shorten(answer)}). {remedy}"
        raise SettingsError(f"MODEL_NAME is {shorten(name)}: {problem}") from error


def check_texts(config, tokenizer, settings):
    """Return a line for each prompt that leaves no room in the model's context, and each word it can't say."""
    context = getattr(config, "max_position_embeddings", None) or math.inf
    room = context - settings.max_new_tokens
    if room < 1:
        return [f"MAX_NEW_TOKENS is {settings.max_new_tokens}: give less than the context of {context}"]
    problems = [
        f"{name} has {shorten(prompt)!r} with {length} tokens: give one of at most {room}, or lower MAX_NEW_TOKENS"
        for name in ("PROMPTS", "EVAL_PROMPTS")
        for prompt in getattr(settings, name.lower())
        if (length := len(tokenizer(prompt)["input_ids"])) > room
    ]
    if settings.reward != "positive_word_reward":
        return problems
    words = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in settings.positive_words}
    for word, ids in words.items():
        if word.lower() not in tokenizer.decode(ids, skip_special_tokens=True).lower():
            problems.append(
                f"POSITIVE_WORDS has {shorten(word)!r}, which the model's tokenizer can't write: leave it out"
            )
    if (least := min(map(len, words.values()))) > settings.max_new_tokens:
        needed = f"each of POSITIVE_WORDS takes {least} tokens or more"
        problems.append(f"MAX_NEW_TOKENS is {settings.max_new_tokens}: give {least} or more, since {needed}")
    return problems


def load_base(path, tokenizer, settings, device, dtype):
    """Load the base model from safetensors, and make sure that it is whole."""
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True, "trust_remote_code": False}
    if settings.quantization != "none":
        bits = {f"load_in_{settings.quantization}": True, "bnb_4bit_quant_type": "nf4"}
        options["quantization_config"] = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=dtype)
    try:
        base, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:
        if lacks_memory(error):
            raise
        raise bad_model(settings, error) from error
    if loading["missing_keys"]:  # transformers would go on with random numbers
        raise bad_model(settings, f"it lacks weights such as {min(loading['missing_keys'])}")
    if bad := [name for name, weight in base.named_parameters() if not weight.isfinite().all()]:
        raise bad_model(settings, f"it has weights that are not finite, such as {min(bad)}")
    used, rows = tokenizer([*settings.prompts, *settings.eval_prompts]), base.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.pad_token_id, *map(max, used["input_ids"]))) >= rows:
        raise bad_model(settings, f"its tokenizer gives the token {largest}, but it knows {rows} tokens only")
    ends = base.generation_config.eos_token_id
    if not all(end is None or isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise bad_model(settings, f"its end token is {ends!r}, which is no number")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack the weights irreversibly
            module.support_avx512bf16_for_cpu = False
    return base


def bad_model(settings, error):
    """Return the SettingsError for a model that can't be loaded."""
    reason = shorten(error if " " in str(error) else repr(error), 200).rstrip(".")
    remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
    return SettingsError(f"MODEL_NAME is {shorten(settings.model_name)}: it can't be loaded ({reason}): {remedy}")


def pick_device(settings):
    """Return the device, cuda or cpu, and the dtype of the frozen weights."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.dtype != "auto" or device == "cpu":
        return device, getattr(torch, settings.dtype, torch.float32)
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# ---------------------------------------------------------------------------------------------------- checkpoints
class Stopped(KeyboardInterrupt):
    """Raised where Ctrl-C or SIGTERM ends the run."""


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a stop after the current training step, and a second one into a stop at once."""

    def __init__(self):
        self.signal = None  # its number, once it came
        self.after_step = False  # True while training: a stop waits for the end of the step
        self.has_output = False  # True once OUTPUT_DIR is this run's
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        at_once = self.signal or not self.after_step
        self.signal = number
        if at_once:
            raise Stopped
        print("\nStopping after this step; once more to stop at once", file=sys.stderr)


def is_run(folder):
    """Return whether a run left the folder."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "report.json", "checkpoint"))


def is_locked(folder):
    """Return whether another run is writing into the folder."""
    path = folder / "checkpoint" / "lock"
    try:
        if path.exists():  # a run leaves it behind, unlocked
            with FileLock(path, blocking=False):
                return False
    except Timeout:
        return True
    return False


def prepare_output(settings):
    """Make OUTPUT_DIR and return a lock on it; move an earlier run to OUTPUT_DIR-1, -2, …, unless it is to go on."""
    output, aside = Path(settings.output_dir), None
    try:
        if is_run(output) and not settings.resume and not is_locked(output):
            aside = next(path for n in itertools.count(1) if not (path := Path(f"{output}-{n}")).exists())
            output.rename(aside)
        (output / "checkpoint").mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / "checkpoint" / "lock").acquire(blocking=False)
    except Timeout as error:
        raise SettingsError(f"OUTPUT_DIR is {output}: another run is writing there: name another folder") from error
    except OSError as error:
        raise SettingsError(f"OUTPUT_DIR is {output}: {error.strerror}: name another folder") from error
    if aside:
        print(f"The earlier run in {output}/ was moved to {aside}/")
    return lock


def find_checkpoint(settings):
    """Return the file of the last checkpoint, or None."""
    path = Path(settings.output_dir, "checkpoint", "state.safetensors")
    return path if os.path.exists(path) else None


def save_checkpoint(trainer, settings, metrics):
    """Save all that a run needs to go on: written beside the last checkpoint, then put in its place.

    Random states are not among it: each step sets its own seed. Weights that are not finite never replace good ones.
    """
    if not metrics or not all(parameter.isfinite().all() for parameter in trainer.model_params):
        return
    tensors = {f"model.{name}": value for name, value in trainer.model.named_parameters() if value.requires_grad}
    optimizer = trainer.optimizer.state_dict()
    for index, moments in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    state = {
        "settings": vars(settings),
        "model": os.path.realpath(settings.model_name),
        "versions": versions(),
        "metrics": metrics,
        "param_groups": optimizer["param_groups"],
        "scaler": trainer.accelerator.scaler and trainer.accelerator.scaler.state_dict(),
    }
    new = Path(settings.output_dir, "checkpoint", "state.new")
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with open(new, "wb") as file:
            file.write(save(tensors, {"state": json.dumps(state)}))
            file.flush()
            os.fsync(file.fileno())
        new.replace(new.with_name("state.safetensors"))  # at one stroke: there is always a whole one
    finally:
        new.unlink(missing_ok=True)  # what a full disk left of it


def read_state(path):
    """Return the dictionary of a checkpoint, without reading its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])


def read_checkpoint(path):
    """Return what save_checkpoint wrote: the dictionary and the tensors by name."""
    return read_state(path), load(path.read_bytes())


def check_resume(settings):
    """Return a line for each setting that would make the rest of the run another one than its checkpoint's."""
    path = find_checkpoint(settings)
    if path is None:
        return [f"RESUME is True: there is no checkpoint in {settings.output_dir}: start without it"]
    try:
        state = read_state(path)
        changed, done = changed_settings(settings, state), len(state["metrics"])
    except Exception as error:
        return [broken_checkpoint(path, error)]
    free = "output_dir training_epochs eval_prompts eval_samples eval_batch_size log_every save_every resume report_to"
    free += " device mini_batch_size max_grad_norm target_approx_kl"
    problems = [
        f"{name.upper()} is {shorten(value)}, but {shorten(old)} in the checkpoint: give that or start anew"
        for name, (value, old) in changed.items()
        if name not in free.split()
    ]
    if not problems and done > (steps := count_steps(settings)):
        epochs = f"TRAINING_EPOCHS is {settings.training_epochs}"
        problems.append(f"{epochs}, which takes {steps} steps, but the checkpoint has {done}: give more")
    return problems


def broken_checkpoint(path, error):
    """Return the problem with a checkpoint that can't be read."""
    return f"RESUME is True: the checkpoint {path} is broken ({shorten(repr(error))}): start without it"


def changed_settings(settings, state):
    """Return {name: (value, value in the checkpoint)} where they differ."""
    old = state["settings"] | {"resume": settings.resume, "output_dir": settings.output_dir}
    if state["model"] == os.path.realpath(settings.model_name):  # the same folder by another name
        old["model_name"] = settings.model_name
    return {name: (value, old.get(name)) for name, value in vars(settings).items() if value != old.get(name)}


def load_checkpoint(trainer, settings):
    """Put the trainer back to the last checkpoint, tell what has changed since, and return its metrics."""
    path, moments = find_checkpoint(settings), {}
    try:
        state, tensors = read_checkpoint(path)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(tensors[f"model.{name}"])
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        trainer.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        if state["scaler"] and trainer.accelerator.scaler:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
    except Exception as error:  # it may be of another model in the same folder
        raise SettingsError(broken_checkpoint(path, error)) from error
    for name, (value, old) in changed_settings(settings, state).items():
        print(f"{name.upper()} is {shorten(value)} from now on, {shorten(old)} until now")
    return state["metrics"]


# ------------------------------------------------------------------------------------------------------- failures
def explain(error, settings):
    """Return what a user can do about an error in the middle of a run, or None where that is not known."""
    text = shorten(getattr(error, "strerror", None) or error, 200)
    if isinstance(error, RunError):
        return str(error)
    if lacks_memory(error):
        return f"there is too little memory: {memory_remedy(settings)}"
    if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and not can_print()):
        return f"the output can't be written ({text}): let it be read to its end, or send it to a file"
    if isinstance(error, OSError | SafetensorError) or "os error" in text:  # the latter are Rust libraries' own
        return f"OUTPUT_DIR is {settings.output_dir}: it can't be written ({text}): make room there"
    return None


def can_print():
    """Return whether what was printed has gone out, to somebody who reads it or to a disk with room for it."""
    try:
        print(end="", flush=True)
    except OSError:
        return False
    return True


def lacks_memory(error):
    """Return whether an error comes from too little memory."""
    texts = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def memory_remedy(settings):
    """Return which settings to lower, each with a value, the ones that change the result least first."""
    size = settings.mini_batch_size or settings.batch_size
    smaller = max((divisor for divisor in range(1, size) if settings.batch_size % divisor == 0), default=None)
    remedies = [f"MINI_BATCH_SIZE to {smaller}"] if smaller else []
    remedies += [f"EVAL_BATCH_SIZE to {settings.eval_batch_size // 2}"] if settings.eval_batch_size > 1 else []
    remedies += ["QUANTIZATION to 4bit"] if settings.quantization != "4bit" else []
    for name in ("BATCH_SIZE", "LORA_RANK"):
        remedies += [f"{name} to {value // 2}"] if (value := getattr(settings, name.lower())) > 1 else []
    return "set " + ", then ".join(remedies or ["MODEL_NAME to a smaller model"])


def what_is_saved(settings, stop):
    """Return how to go on after a stop."""
    if stop.has_output and (path := find_checkpoint(settings)):  # else it is an earlier run's
        step = len(read_state(path)["metrics"])
        return f"what was learned up to step {step} is saved. To go on, run the same line with --resume"
    return "there was nothing to save yet"


# ---------------------------------------------------------------------------------------------- screen and report
def announce(policy, settings, device, dtype, metrics):
    """Print what is going to happen."""
    total = sum(parameter.numel() for parameter in policy.parameters())
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    steps, asked = count_steps(settings), settings.training_epochs * len(settings.prompts)
    filled = f" ({asked} asked for, the last step filled up)" if steps * settings.batch_size > asked else ""
    going_on = f", going on after step {len(metrics)}" if metrics else ""
    words = f"+1 for a response with one of {len(settings.positive_words)} positive words, else -1"
    print(f"Model     {settings.model_name}, {total:,} parameters, {trained:,} of them trained")
    print(f"Device    {device_name(device)}, {str(dtype).removeprefix('torch.')} weights")
    print(f"Prompts   {len(settings.prompts)} to train on, {len(settings.eval_prompts)} held out")
    print(f"Reward    {words if settings.reward == 'positive_word_reward' else settings.reward}")
    print(f"Training  {steps * settings.batch_size} samples{filled} in {steps} steps, seed {settings.seed}")
    print(f"Output    {settings.output_dir}/{going_on}\n", flush=True)


class Log:
    """Keeps metrics.jsonl, and shows progress: a live bar on a terminal, elsewhere a line every LOG_EVERY steps."""

    def __init__(self, total_steps, metrics, settings):
        self.settings, self.start, self.done = settings, time.perf_counter(), len(metrics)
        self.path = Path(settings.output_dir, "metrics.jsonl")
        self.path.write_text("".join(json.dumps(record) + "\n" for record in metrics))  # of a run that goes on
        shape, terminal = "{n_fmt}/{total_fmt} |{bar:12}| {remaining} left, {desc}", is_terminal()
        self.bar = tqdm(total=total_steps, initial=self.done, bar_format=shape, disable=not terminal)
        self.tensorboard = None
        if settings.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # only here: it need not be installed

            self.tensorboard = SummaryWriter(Path(settings.output_dir, "tensorboard"), purge_step=self.done + 1)

    def write(self, metrics):
        """Write down the last record, and show how the last 100 samples did."""
        step, settings = len(metrics), self.settings
        with open(self.path, "a") as file:
            file.write(json.dumps(metrics[-1]) + "\n")
        for name, value in metrics[-1].items():
            if self.tensorboard and value is not None:
                self.tensorboard.add_scalar(name, value, step)
        for text in warnings_of(metrics, settings):
            tqdm.write(f"step {step}: {text}")
        rate, score, kl = (recent(metrics, name, settings) for name in ("success_rate", "score", "kl"))
        text = f"success {rate:4.0%}, score {score:+.2f}, KL {kl:.2f}"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (step % settings.log_every == 0 or step == self.bar.total):
            left = (time.perf_counter() - self.start) / (step - self.done) * (self.bar.total - step)
            print(f"step {step}/{self.bar.total}, {timedelta(seconds=int(left))} left, {text}", flush=True)

    def close(self):
        """Leave the bar as it stands and the files complete."""
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()


def is_terminal():
    """Return whether somebody watches: a bar in a file would be noise."""
    return all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))  # None where they are closed


def recent(metrics, name, settings, samples=100):
    """Return the mean of a metric over the steps of the last samples, those left out that were not finite."""
    values = [record[name] for record in metrics[-math.ceil(samples / settings.batch_size) :]]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


def warnings_of(metrics, settings):
    """Return what the user should know of the last step: skipped updates, and a KL that has just gone wrong."""
    lines = []
    if skipped := metrics[-1]["skipped_updates"]:
        lines.append(f"updates skipped, since their numbers were not finite: {skipped}")
    before = recent(metrics[:-1], "kl", settings) if len(metrics) > 1 else 0.0
    kl = recent(metrics, "kl", settings)
    if ran_away(kl, settings) and not ran_away(before, settings):
        lines.append(f"the KL has run away to {kl:.1f} nats: stop, and raise KL_COEF or lower TARGET_APPROX_KL")
    if kl < -0.1 <= before:
        lines.append(f"the KL is {kl:.1f} nats, and none can be below 0: what is sampled is not what is trained")
    return lines


def device_name(device):
    """Return the device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU with {torch.get_num_threads()} threads"


def versions():
    """Return the versions that a result depends on."""
    names = ("torch", "transformers", "trl", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def peak_memory_mb(device):
    """Return the most memory held so far in MB (10^6 bytes): the GPU's on a GPU, else the process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def save_results(policy, tokenizer, report, metrics, settings):
    """Write model, report and picture into a folder of their own, then move them into place: no file is ever torn."""
    output, new = Path(settings.output_dir), Path(settings.output_dir, "checkpoint", "results.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        save_model(policy, tokenizer, settings, new)
        write_report(report, metrics, settings, new)
        mode = (new / "README.md").stat().st_mode  # safetensors would let nobody else read the model
        for path in [path for path in new.rglob("*") if path.is_file()]:
            path.chmod(mode)
            place = output / path.relative_to(new)
            place.parent.mkdir(exist_ok=True)  # a tokenizer may have a folder of templates
            path.replace(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what a full disk left of it


def save_model(policy, tokenizer, settings, folder):
    """Save the policy as an ordinary model, with the adapter merged into its weights, and the tokenizer."""
    model = policy.pretrained_model
    if settings.quantization != "none":  # merged into 4 or 8 bits, most of the update would be rounded away
        adapter, lora = get_peft_model_state_dict(model), model.peft_config["default"]
        model = get_peft_model(model.unload().dequantize(), lora)
        set_peft_model_state_dict(model, adapter)
    tokenizer.padding_side = "left"  # as generation needs it
    merged = model.merge_and_unload()
    if not all(weight.isfinite().all() for weight in merged.state_dict().values()):
        raise RunError("the trained weights are not finite: set DTYPE to float32, or lower TARGET_APPROX_KL")
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw(report, metrics, settings, folder):
    """Draw training.png: the learning curve and, beside it, success against KL under the line of the possible."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    blue, orange, grey = "#0072B2", "#D55E00", "#666666"  # told apart by colour-blind readers too
    kl_label = "KL against the base model (nats per response)"
    base, trained = report["base"]["train_prompts"], report["trained"]["train_prompts"]
    names, steps = ("success_rate", "score", "kl"), range(1, len(metrics) + 1)
    steps = [step for step in steps if metrics[step - 1]["samples"] >= 100] or steps  # means of fewer are noise
    samples = [metrics[step - 1]["samples"] for step in steps]
    rate, score, kl = ([recent(metrics[:step], name, settings) for step in steps] for name in names)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(samples, rate, color=blue, label="success rate")
    left.plot(samples, score, color=blue, linestyle=":", label="score")
    left.axhline(base["success_rate"], color=grey, linestyle="-.", linewidth=1, label="success rate of the base model")
    left.set(xlabel="samples", ylabel="success rate, score", title="Learning (means of the last 100 samples)")
    nats = left.twinx()
    nats.plot(samples, kl, color=orange, linestyle="--", label="KL")
    nats.set(ylabel=kl_label, ylim=(0, None))
    left.legend(handles=[*left.lines, *nats.lines], loc="lower right", fontsize=8)

    margin = 0.5 / base["samples"]
    base_rate = min(max(base["success_rate"], margin), 1 - margin)
    rates = numpy.linspace(base_rate, 1, 200)
    right.plot([kl_minimum(r, base_rate) for r in rates], rates, color="black", label="least KL for a success rate")
    points = right.scatter(kl, rate, c=samples, cmap="cividis", s=14, label="training, mean of the last 100 samples")
    figure.colorbar(points, label="samples")
    right.plot(0, base["success_rate"], "s", color=grey, markersize=8, label="base model, measured")
    right.plot(trained["kl"], trained["success_rate"], "*", color=orange, markersize=15, label="trained, measured")
    right.set(xlabel=kl_label, ylabel="success rate", title="What success costs")
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(folder / "training.png", dpi=100)


def samples_table(report):
    """Return a table of the first response to each prompt, not a chosen one, before and after."""
    lines = ["The first response to each prompt, with the same random numbers before and after:", ""]
    widths = (20, 28, 28)
    for title, prompts in (("PROMPT", "train_prompts"), ("HELD-OUT PROMPT", "eval_prompts")):
        before, after = (report[model][prompts]["first_sample"] for model in ("base", "trained"))
        shown = list(before)[:6]
        for row in [(title, "BEFORE", "AFTER"), *((prompt, before[prompt], after[prompt]) for prompt in shown)]:
            cells = [wrap(cell.strip(), width) for cell, width in zip(row, widths)]
            for parts in itertools.zip_longest(*cells, fillvalue=""):
                lines.append("  ".join(f"{part:{width}}" for part, width in zip(parts, widths)).rstrip())
        lines.append("")
    return "\n".join(lines)


def verdict(report):
    """Return the result in words."""
    (base, base_eval), (trained, trained_eval) = (report[model].values() for model in ("base", "trained"))
    least = f" (the least possible is {trained['kl_minimum']:.1f})" if report["learned"] else ""
    before, after, before_eval, after_eval = (
        f"{part['success_rate']:.1%}" for part in (base, trained, base_eval, trained_eval)
    )
    text = f"Success: {before} before, {after} after, at {trained['kl']:z.1f} nats of KL{least}; "
    text += f"on held-out prompts {before_eval} before, {after_eval} after."
    if not report["learned"]:
        text += "\nThat is no rise beyond chance: this run did not learn."
    if not report["close_to_base"]:
        text += "\nLittle is left of the base model: raise KL_COEF or lower TARGET_APPROX_KL."
    return text


def loading_snippet(folder, prompt):
    """Return Python that loads the model and lets it speak."""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(tokenizer.decode(model.generate(**tokenizer({prompt!r}, return_tensors="pt"))[0]))"""


def write_report(report, metrics, settings, folder):
    """Write report.json, training.png and the model card README.md."""
    columns = [report[model][p] for p in ("train_prompts", "eval_prompts") for model in ("base", "trained")]
    names = ("success_rate", "score", "kl", "kl_minimum", "distinct", "perplexity_under_base")
    rows = [[name, *(f"{column[name]:.3f}" for column in columns)] for name in names]
    figures = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    card = f"""# {Path(settings.model_name).name}, fine-tuned with PPO

{verdict(report)}

Trained by `train_rlhf.py` on {report["samples"]} samples in {report["seconds"]:.0f} seconds on {report["device"]},
seed {settings.seed}; the LoRA adapter is merged into the weights. `report.json` has every setting and figure.

![Learning curve, and success against KL](training.png)

| | base | trained | base, held-out prompts | trained, held-out prompts |
|---|---|---|---|---|
{figures}

KL is in nats per response; `distinct` is the share of different responses.

```
{samples_table(report)}```

To load it, from this folder:

```python
{loading_snippet(".", settings.prompts[0])}
```
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, metrics, settings, folder)


if __name__ == "__main__":
    sys.exit(main())
