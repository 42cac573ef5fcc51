"""Fine-tune a language model with PPO so that it says positive things, and show that it learned.

    python train_rlhf.py                            # TinyLlama-1.1B-Chat, with the constants below
    python train_rlhf.py --model-name demo_model    # the small model beside this file: offline
    python train_rlhf.py --help                     # every constant is also a flag

Read it from top to bottom, as the data flows: constants, run, policy, rollout, reward, PPO step.
"""

# /// script
# requires-python = "==3.11.*"
# dependencies = [  # those of requirements.txt, which says what each is for
#     "trl==0.11.4", "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2",
#     "accelerate==1.15.0", "numpy==2.4.6", "datasets==5.2.0", "bitsandbytes==0.50.2",
#     "safetensors==0.8.0", "huggingface_hub==2.4.0", "filelock==4.2.11", "matplotlib==3.11.2",
#     "rouge_score==0.1.2", "tqdm==4.70.1",
# ]
# ///

from __future__ import annotations

import argparse
import copy
import difflib
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

from filelock import FileLock
from tqdm import tqdm


def missing_quotes(kind, error, trace):
    """Tell in one line of a constant that lacks its quotes, as in DEVICE = cpu."""
    where = traceback.extract_tb(trace)[-1]
    script = getattr(sys.modules["__main__"], "__file__", None)
    if kind is NameError and (where.filename, where.name) == (script, "<module>"):
        line = where.line.partition("#")[0].strip()
        print(f'{line}: give "{error.name}", in quotes', file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


if __name__ == "__main__" and "__file__" in globals():  # a script, not a cell of a notebook
    sys.excepthook = missing_quotes


class Library(ModuleType):
    """A library that is imported where it is first used: --help and bad settings don't wait."""

    def __getattr__(self, attribute):
        """Return what the library has of that name."""
        return getattr(importlib.import_module(self.__name__), attribute)


accelerate = Library("accelerate")
datasets = Library("datasets")
huggingface_hub = Library("huggingface_hub")
numpy = Library("numpy")
peft = Library("peft")
torch = Library("torch")
transformers = Library("transformers")
trl = Library("trl")

# --- Model
MODEL_NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # a name on the Hub, or a local folder
OUTPUT_DIR = "trained_model"  # all that a run leaves; an earlier run there is moved aside
LORA_RANK = 16  # rank of the update of each adapted layer; less saves memory, more can express more
LORA_ALPHA = 32  # the update is multiplied by LORA_ALPHA / LORA_RANK
LORA_TARGETS = ["all-linear"]  # layers to adapt, by name; all-linear = all but the output head
QUANTIZATION = "none"  # 8bit or 4bit keep the frozen weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda, mps (Apple) or cpu; auto = cuda where there is one, else cpu
DTYPE = "auto"  # float32, bfloat16, float16; auto = 16 bits on a GPU or a CPU with AMX, else 32

# --- Prompts
PROMPTS = [  # texts to continue; a .txt, .jsonl, .json, .csv or .parquet file stands for its rows
    "I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling",
]  # fmt: skip
EVAL_PROMPTS = [  # never trained on, but measured; unless edited, a tenth of a file; [] = off
    "Right now I am", "My day was", "It makes me feel", "Tonight I feel", "Everything seems",
    "I woke up feeling",
]  # fmt: skip
PROMPT_FIELD = "auto"  # of a row; auto = prompt, messages, text, instruction (+ input), question
CHAT_TEMPLATE = False  # True = a prompt is what a user says, put into the tokenizer's template

# --- Reward
REWARD = "positive_word_reward"  # or FILE.py:FUNCTION, or a classifier: a folder, a Hub name
POSITIVE_WORDS = [  # a response with one of these whole words, in any case, scores +1, else -1
    "happy", "glad", "good", "great", "smile", "joy", "love", "wonderful", "amazing", "excited",
    "pleased", "delighted", "cheerful", "grateful", "blessed", "fantastic",
]  # fmt: skip
REWARD_LABEL = "POSITIVE"  # of a classifier with several labels: its log-odds are the score
SCORE_PREFIXES = True  # a token earns what it adds to the score; False = the last gets it all
SCALE_SAMPLES = 200  # of the base model: its graded scores get mean 0 and deviation 1; 0 = off
SUCCESS_THRESHOLD = "auto"  # a higher score is a success; auto = of rules and reward models alone

# --- Rollout
TRAINING_EPOCHS = 150  # passes over PROMPTS; 150 over 6 are 900 samples; 0.1 = a tenth of a pass
BATCH_SIZE = 10  # responses sampled for one PPO step; more is steadier but slower to react
MAX_NEW_TOKENS = 10  # length of a response in tokens, at most
TEMPERATURE = 1.0  # divides the logits of policy and base model everywhere; 1.0 = as they are

# --- PPO
LEARNING_RATE = 3e-4  # of the first step; the later ones follow TARGET_APPROX_KL
TARGET_APPROX_KL = 0.008  # nats per token of a step, falling to 0; 0 = LEARNING_RATE stays
PPO_EPOCHS = 2  # passes over a batch; 1 = every sample is used once (needs TARGET_APPROX_KL 0)
MINI_BATCH_SIZE = 0  # responses at once, a divisor of BATCH_SIZE; memory grows with it; 0 = all
GRADIENT_CHECKPOINTING = False  # True saves memory, most where responses are long; it is slower
KL_COEF = 0.1  # price of one nat of KL against the base model, in scores; 0 = free to drift
CLIP_RANGE = 0.2  # PPO's epsilon: nothing is gained by a probability ratio outside 1 ± CLIP_RANGE
VALUE_CLIP_RANGE = 0.2  # the same for a value's change in one step, in units of the score
VF_COEF = 0.1  # weight of the value loss in the loss; 0 = the value head stays at zero
GAMMA = 1.0  # discount per token; 1.0 = none: a response is short, and its score comes at the end
LAM = 0.95  # GAE's lambda: 1.0 trusts what happened, 0.0 trusts the value head
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0 = off

# --- Run
SEED = 0  # the same seed on the same machine gives the same run
EVAL_SAMPLES = 240  # responses in each of the four measurements at the end, spread over the prompts
EVAL_BATCH_SIZE = 40  # responses generated at once there; less saves memory
LOG_EVERY = 5  # steps between two samples shown, and two lines of progress in a log file
SAVE_EVERY = 10  # steps between two checkpoints; 0 = only where the run ends or is stopped
SAVE_ADAPTER = True  # the LoRA adapter alone, for PEFT, in adapter/ beside the model; False = off
RESUME = False  # go on from the checkpoint in OUTPUT_DIR
REPORT_TO = []  # tensorboard, wandb, trackio: the metrics there too (pip install them); [] = off


# ----------------------------------------------------------------------------------------- the run
def run(settings):
    """Do the whole run: load, train with PPO, measure before and after, save, show."""
    rows, eval_rows, given = read_prompts(
        settings.prompts, settings.eval_prompts, settings.prompt_field, settings.seed
    )
    files = hash_files(settings.prompts)
    if settings.resume:  # look before anything is loaded
        check_resume(settings, RULES, count_steps(settings, rows), files)
    device, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device)
    reward, scale = load_reward(settings, rows + eval_rows, device)
    model, tokenizer, rows, eval_rows = load_model(settings, rows, eval_rows, device, dtype)
    policy = make_policy(model, tokenizer, settings)
    trainer = make_trainer(policy, tokenizer, settings, device, dtype)

    with claim_output(settings.output_dir, settings.resume):
        learner = policy, trainer.optimizer, trainer.accelerator.scaler
        metrics = []
        if settings.resume:
            state = load_checkpoint(*learner, settings, RULES, count_steps(settings, rows), files)
            metrics, scale = state["metrics"], state["scale"]
        announce(policy, settings, device, dtype, rows, eval_rows, given, metrics)
        scale = scale or measure_scale(trainer, policy, reward, rows, settings)
        save = partial(save_checkpoint, *learner, settings, metrics, scale=scale, files=files)
        if settings.success_threshold != "auto":
            scale = scale | {"threshold": settings.success_threshold}
        parts = trainer, policy, reward, scale
        train(*parts, rows, settings, metrics, save)
        report, base_scores = make_report(*parts, rows, eval_rows, settings, metrics)
        save = partial(save_model, policy.pretrained_model, tokenizer, settings)
        picture = partial(draw, report, base_scores, metrics)
        save_results(report, summarize(report, "."), save, picture, settings.output_dir)
        print(summarize(report, os.path.join(".", settings.output_dir)), flush=True)
    trainer.accelerator.end_training()


class Rollout(NamedTuple):
    """What was said in a step, a list of an item for each response.

    queries, responses: 1-D tensors of token ids. scores: of the whole responses.
    token_scores: what each token of a response earns, 1-D float tensors, on the scale.
    """

    queries: list[torch.Tensor]
    responses: list[torch.Tensor]
    texts: list[str]
    scores: list[float]
    token_scores: list[torch.Tensor]


def sample_batch(rows, numbers, trainer, policy, reward, scale, settings):
    """Return the rollout of a process's share of a batch: a response to each row, scored."""
    tokenizer = trainer.tokenizer
    queries = encode(tokenizer, rows, settings.chat_template)
    size = trainer.config.mini_batch_size
    responses, texts = rollout(policy, tokenizer, queries, numbers, size)
    scores, token_scores = score_responses(
        reward, scale, tokenizer, rows, queries, responses, settings.score_prefixes
    )
    return Rollout(queries, responses, texts, scores, token_scores)


def train(trainer, policy, reward, scale, rows, settings, metrics, save):
    """Take PPO steps until the samples are used up; append the record of each to metrics."""
    total_steps = count_steps(settings, rows)
    start = time.perf_counter() - (metrics[-1]["seconds"] if metrics else 0)
    acting = {"trainer": trainer, "policy": policy, "reward": reward, "scale": scale}
    with stop_on_signal(True) as stop, open_log(settings, metrics, total_steps) as log:
        try:
            for step in range(len(metrics) + 1, total_steps + 1):
                torch.manual_seed(settings.seed * 10**6 + step)  # a run can go on anywhere
                batch = rows_of_step(step, rows, settings.batch_size, settings.seed)
                numbers = random_numbers((settings.seed, step, 0), batch, settings.max_new_tokens)
                said = share_out(sample_batch, batch, numbers, settings=settings, **acting)
                said = Rollout._make(said)
                stats, kls = trainer.step(said.queries, said.responses, said.token_scores)
                stats["seconds"] = time.perf_counter() - start
                metrics.append(make_record(step, said.texts, said.scores, stats, scale, rows))
                log(metrics, batch, said.texts, said.scores, kls)
                give_up_on_bad_numbers(metrics, "lower TARGET_APPROX_KL, or ")
                set_learning_rate(trainer.optimizer, metrics, total_steps, settings)
                stop.requested = max(accelerate.utils.gather_object([stop.requested]))
                due = settings.save_every and step % settings.save_every == 0
                if (due and not stats["skipped_updates"]) or stop.requested or step == total_steps:
                    save()
                if stop.requested:
                    break
        except RunError:
            if metrics and not metrics[-1]["skipped_updates"]:
                save()  # the steps before it are worth keeping
            raise


# -------------------------------------------------------------------------------------- the policy
class PolicyWithValueHead:
    """TRL's language model with a value head that also sees what a response has earned so far."""

    def __init__(self, model, temperature):
        super().__init__(model, summary_dropout_prob=0.0)
        self.temperature = temperature
        self.is_peft_model = True  # tells TRL that the base model is this one with its adapter off
        self.v_head.summary = torch.nn.Linear(self.v_head.summary.in_features, 2)
        for parameter in self.v_head.float().parameters():
            torch.nn.init.zeros_(parameter)  # random first values would be noise in the advantages
        arguments = inspect.signature(model.get_base_model().forward).parameters
        self.takes_positions = "position_ids" in arguments
        self.takes_columns = "logits_to_keep" in arguments
        self.start_id = model.generation_config.decoder_start_token_id  # of an encoder-decoder

    def forward(self, input_ids, attention_mask, earned):
        """Return the logprobs of all tokens at each place of the response, and the value before it.

        input_ids, attention_mask: (batch, query length + response length), as from pad_batch.
        earned: (batch, response length), the sum of the scores of the tokens before each one. A
        value, what is still to come, is a linear function of it with both coefficients learned.
        Returns float32 all_logprobs (batch, response length, vocabulary), of the logits divided by
        TEMPERATURE as in sampling, and values (batch, response length).
        """
        length, response_length = input_ids.shape[1], earned.shape[1]
        before = torch.arange(length - response_length - 1, length - 1, device=input_ids.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.pretrained_model.config.is_encoder_decoder:
            inputs, before = for_decoder(inputs, response_length, self.start_id)
        if self.takes_positions:
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding has none
        if self.takes_columns:
            inputs["logits_to_keep"] = before  # a token is drawn where the one before it stands
        logits, _, values = super().forward(**inputs)
        logits = logits if self.takes_columns else logits[:, before]
        values = values[:, before]
        all_logprobs = torch.log_softmax(logits / self.temperature, dim=-1)
        return all_logprobs, values[..., 0] + values[..., 1] * earned


# ------------------------------------------------------------------------------------- the rollout
def rollout(policy, tokenizer, queries, numbers, size):
    """Sample a response to each query, up to its first end token, `size` of them at once.

    numbers: (batch, MAX_NEW_TOKENS), uniform in (0, 1], one for each token that is drawn.
    Returns the responses, 1-D tensors of token ids, and their texts.
    """
    model = policy.pretrained_model
    end_ids = torch.tensor(model.generation_config.eos_token_id)
    responses = []
    for start in progress(range(0, len(queries), size)):
        some = {"input_ids": queries[start : start + size]}
        inputs = tokenizer.pad(some, return_tensors="pt").to(model.device)
        width = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        given = numbers[start : start + size].to(model.device)
        draw = partial(draw_tokens, given, width, model.generation_config.temperature)
        draw = transformers.LogitsProcessorList([draw])
        with torch.no_grad():
            sequences = model.generate(**inputs, do_sample=False, logits_processor=draw)
        for row in sequences[:, width:].cpu():  # without what was given, which is no action
            ends = torch.isin(row, end_ids).nonzero()
            responses.append(row[: ends[0, 0] + 1] if len(ends) else row)
    both = zip(queries, responses)
    return responses, [texts_of(tokenizer, query, [response])[0] for query, response in both]


def draw_tokens(numbers, width, temperature, sequences, logits):
    """Return logits that leave only one token: the first up to which probabilities sum to a number.

    Sampled thus a response depends on its own numbers alone, however the batch is put together.
    numbers: as above. width: of the queries. sequences: (batch, length). logits: of the next token.
    """
    # Logits that are not finite become finite here; they end in a skipped update.
    logits = (logits.float() / temperature).nan_to_num()
    sums = torch.softmax(logits, dim=-1).cumsum(-1)
    number = numbers[:, sequences.shape[1] - width, None]
    tokens = torch.searchsorted(sums, number * sums[:, -1:])
    return torch.full_like(logits, -math.inf).scatter(1, tokens, 0.0)


# -------------------------------------------------------------------------------------- the reward
def positive_word_reward(prompts, completions, positive_words=None, **kwargs):
    """Return +1.0 for each completion with one of the words (None = POSITIVE_WORDS), else -1.0.

    A word counts whole. Letters that only prolong the prompt's last word are no word of their own.
    This is the form of TRL's reward functions for GRPO; yours in another file has it too.
    """
    words = POSITIVE_WORDS if positive_words is None else positive_words
    pattern = "|".join(re.escape(word.strip()) for word in words)
    scores = []
    for prompt, completion in zip(prompts, completions):
        if prompt[-1].isalnum():
            completion = re.sub(r"^\w+", "", completion, flags=re.ASCII)  # scripts without spaces
        found = re.search(rf"(?<!\w)({pattern})(?!\w)", completion, re.IGNORECASE)
        scores.append(1.0 if found else -1.0)
    return scores


def score_responses(reward, scale, tokenizer, rows, queries, responses, score_prefixes):
    """Return the score of each response, and what each of its tokens earns, as 1-D tensors.

    With score_prefixes a token earns what it adds to the score of the text so far: the reward is
    asked about every beginning too. That sums up to the response's score less that of the empty
    text, so the best policy stays the best: potential-based shaping (Ng, Harada and Russell 1999),
    exact for GAMMA 1. Without, the last token earns it all. What is earned is on_scale.
    """
    asked, texts, counts = [], [], []
    for row, query, response in zip(rows, queries, responses):
        ends = range(0 if score_prefixes else len(response), len(response) + 1)
        texts += texts_of(tokenizer, query, [response[:end] for end in ends])
        asked += [row] * len(ends)
        counts.append(len(ends))
    scores, token_scores = [], []
    all_scores = torch.tensor(reward(asked, texts), dtype=torch.float64)
    for response, own in zip(responses, all_scores.split(counts)):
        scores.append(own[-1].item())
        scaled = on_scale(own, scale)
        unasked = torch.zeros(len(response) + 1 - len(scaled))
        token_scores.append(torch.cat([unasked, scaled]).diff().float())
    return scores, token_scores


# ---------------------------------------------------------------------- advantages and returns
def compute_advantages(
    values: "torch.Tensor",
    rewards: "torch.Tensor",
    mask: "torch.Tensor",
    gamma: float,
    lam: float,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return advantages and returns by generalized advantage estimation.

    delta_t = reward_t + gamma * value_t+1 - value_t, and advantage_t is the sum of all delta from
    t on, each discounted by another gamma * lam (Schulman et al. 2016, equation 16).
    values, rewards, mask: (batch, response length); so are the results, 0 where the mask is.
    """
    response_length = rewards.shape[1]
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(rewards)
    advantage, next_value = 0.0, 0.0
    for t in reversed(range(response_length)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    returns = advantages + values

    # Many trainers whiten advantages. That would blow up the noise of a batch of like scores; those
    # here stay in units of the score, and are what the returns, as they are rounded, leave of them.
    advantages = (returns - values) * mask
    return advantages, returns


# ---------------------------------------------------------------------------- the clipped losses
def policy_loss(
    logprobs: "torch.Tensor",
    old_logprobs: "torch.Tensor",
    advantages: "torch.Tensor",
    mask: "torch.Tensor",
    clip_range: float,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return PPO's clipped surrogate loss, and the share of tokens whose ratio was clipped.

    The larger one of two losses counts: so nothing is gained by a ratio of the probabilities, of
    the policy as it is to the one that sampled, beyond 1 ± clip_range (Schulman et al. 2017,
    equation 7). All tensors are (batch, response length); both results are means over the mask.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    unclipped = -advantages * ratio
    clipped = -advantages * clipped_ratio
    loss = masked_mean(torch.max(unclipped, clipped), mask)
    clip_fraction = masked_mean((clipped > unclipped).float(), mask)
    return loss, clip_fraction


def value_loss(
    values: "torch.Tensor",
    old_values: "torch.Tensor",
    returns: "torch.Tensor",
    mask: "torch.Tensor",
    clip_range: float,
) -> "torch.Tensor":
    """Return the clipped loss of the value head: half the mean of the larger squared error.

    Nothing is gained by a value further than clip_range from the one before the step.
    All tensors are (batch, response length).
    """
    lowest, highest = old_values - clip_range, old_values + clip_range
    clipped_values = torch.clamp(values, lowest, highest)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    return 0.5 * masked_mean(torch.max(unclipped, clipped), mask)


def masked_mean(values: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    """Return the mean of the values where the mask is 1."""
    return (values * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------ the PPO step
class Batch(NamedTuple):
    """The responses of a step as tensors, one a row.

    inputs: what the policy takes, by name: input_ids and attention_mask (batch, query length +
    response length), and earned (batch, response length), the scores of the tokens before each.
    tokens, mask, token_scores: (batch, response length), padded on the right.
    """

    inputs: dict[str, torch.Tensor]
    tokens: torch.Tensor
    mask: torch.Tensor
    token_scores: torch.Tensor

    def minibatch(self, rows: torch.Tensor) -> "Batch":
        """Return these rows of it."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Batch(inputs, self.tokens[rows], self.mask[rows], self.token_scores[rows])


class PolicyPass(NamedTuple):
    """What a pass of the policy, and one of the base model, say of some responses.

    Those that begin with all_ are (rows, response length, vocabulary), the others (rows, response
    length). kl is KL(policy || base model) at each token, in nats.
    """

    all_logprobs: torch.Tensor
    all_ref_logprobs: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    kl: torch.Tensor


class Experience(NamedTuple):
    """What a step learns from: the policy that sampled, and how it turned out.

    All are (batch, response length).
    """

    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def minibatch(self, rows: torch.Tensor) -> "Experience":
        """Return these rows of it."""
        return Experience._make(tensor[rows] for tensor in self)


UPDATE_METRICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "entropy")


class ExactKLTrainer:
    """TRL's PPOTrainer, its step written out, with exact KLs and a score for each token.

    The KL against the base model is summed over the whole vocabulary at each position t,
    KL_t = sum_v p(v) ln(p(v) / p_ref(v)), where ln(p / p_ref) of the sampled token is usual: the
    same mean with far less noise. But it does not depend on the token sampled at t, so a reward
    that has it can't teach the policy to lower KL_t itself. The gradient of KL_t therefore joins
    the loss: of a reward that depends on the parameters, grad E[R] = E[R grad ln p] + E[grad R],
    where PPO's clipped loss is the first term.

    Of several processes each has the whole batch, and does its share of each minibatch.
    """

    def step(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        token_scores: list[torch.Tensor],
    ) -> tuple[dict[str, float], list[float]]:
        """Improve the policy with one batch of responses.

        queries, responses: 1-D tensors of token ids. token_scores: what each token of a response
        earns, 1-D float tensors. Returns the step's metrics, and the KL of each response in nats.
        """
        config = self.config
        batch = self.make_batch(queries, responses, token_scores)

        # 1. Score and ref pass: the policy that sampled, and the base model.
        logprobs, values, kl, first_pass = self.look_at(batch)

        # 2. KL and rewards: what a token earns, less the price of its KL.
        kl = kl * batch.mask
        rewards = batch.token_scores - config.init_kl_coef * kl

        # 3. Advantages and returns.
        values = values * batch.mask
        advantages, returns = compute_advantages(
            values, rewards, batch.mask, gamma=config.gamma, lam=config.lam
        )

        # 4. Updates: several passes over the batch, in minibatches.
        experience = Experience(logprobs, values, advantages, returns)
        updates, skipped_updates = self.learn(batch, experience, first_pass)

        # 5. Metrics: means over the updates, but for the way of the whole step.
        means = dict(zip(UPDATE_METRICS, updates.mean(0).tolist()))
        means["approx_kl"] *= approx_kl_growth(len(updates))
        metrics = {
            "kl": kl.sum(1).mean().item(),
            "kl_coef": config.init_kl_coef,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **means,
            "skipped_updates": skipped_updates,
        }
        return metrics, kl.sum(1).tolist()

    def make_batch(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        token_scores: list[torch.Tensor],
    ) -> Batch:
        """Return a step's lists as padded tensors on the device."""
        inputs, mask = pad_batch(self.tokenizer, queries, responses, self.accelerator.device)
        tokens = inputs["input_ids"][:, -mask.shape[1] :]
        scores = torch.nn.utils.rnn.pad_sequence(token_scores, batch_first=True).to(mask.device)
        inputs["earned"] = scores.cumsum(1) - scores
        return Batch(inputs, tokens, mask, scores)

    # ---------------------------------------------------------------- 1. score and ref pass
    def look_at(
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PolicyPass | None]:
        """Return logprobs, values and KL of the policy that sampled, and its pass where it is kept.

        The three are (batch, response length). Where one minibatch is the whole batch, this pass is
        that of the first update too, and has its gradient.
        """
        is_whole = self.config.mini_batch_size >= len(batch.mask)
        logprobs = torch.zeros_like(batch.token_scores)
        values = torch.zeros_like(batch.token_scores)
        kl = torch.zeros_like(batch.token_scores)
        first_pass = None

        order = torch.arange(len(batch.mask), device=batch.mask.device)
        for rows in order.split(self.config.mini_batch_size):
            own_rows = self.share(rows)
            minibatch = batch.minibatch(own_rows)
            all_ref_logprobs = self.ref_pass(minibatch.inputs)
            with torch.set_grad_enabled(is_whole):
                first_pass = self.policy_pass(minibatch, all_ref_logprobs)
            logprobs[own_rows] = first_pass.logprobs.detach()
            values[own_rows] = first_pass.values.detach()
            kl[own_rows] = first_pass.kl.detach()

        # The rows of the other processes are 0 here, so that a sum over all puts them together.
        logprobs = self.accelerator.reduce(logprobs, "sum")
        values = self.accelerator.reduce(values, "sum")
        kl = self.accelerator.reduce(kl, "sum")
        return logprobs, values, kl, first_pass if is_whole else None

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the part of the rows that this process takes on: all, where it is the only one."""
        shares = rows.tensor_split(self.accelerator.num_processes)
        return shares[self.accelerator.process_index]

    def ref_pass(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return all_logprobs of the base model, which is the policy with its adapter off."""
        with torch.no_grad(), self.optional_peft_ctx():
            all_ref_logprobs, _ = self.accelerator.unwrap_model(self.model)(**inputs)
        return all_ref_logprobs

    def policy_pass(self, batch: Batch, all_ref_logprobs: torch.Tensor) -> PolicyPass:
        """Return what the policy, as it is now, says of the responses of a minibatch."""
        all_logprobs, values = self.model(**batch.inputs)
        kl = self._kl_penalty(all_logprobs, all_ref_logprobs)
        logprobs = of_tokens(all_logprobs, batch.tokens)
        return PolicyPass(all_logprobs, all_ref_logprobs, logprobs, values, kl)

    # ----------------------------------------------------------------------------- 4. updates
    def learn(
        self,
        batch: Batch,
        experience: Experience,
        first_pass: PolicyPass | None,
    ) -> tuple[torch.Tensor, int]:
        """Take PPO_EPOCHS passes over the batch, an update for each minibatch.

        Returns UPDATE_METRICS of the updates (updates, 5), and how many of them were skipped.
        """
        updates, skipped_updates = [], 0
        order = torch.arange(len(batch.mask), device=batch.mask.device)
        for epoch in range(self.config.ppo_epochs):
            # The order is drawn alike in all processes. That of a single minibatch is all the same.
            if first_pass is None:
                order = order[torch.randperm(len(order))]
                order = accelerate.utils.broadcast(order)

            for rows in order.split(self.config.mini_batch_size):
                own_rows = self.share(rows)
                minibatch = batch.minibatch(own_rows)
                if first_pass is None:
                    all_ref_logprobs = self.ref_pass(minibatch.inputs)
                    policy_pass = self.policy_pass(minibatch, all_ref_logprobs)
                elif epoch == 0:
                    policy_pass = first_pass
                else:
                    policy_pass = self.policy_pass(minibatch, first_pass.all_ref_logprobs)

                # Losses are means over tokens; those of a process count by its share of them.
                weight = minibatch.mask.sum() / batch.mask[rows].sum()
                own_experience = experience.minibatch(own_rows)
                figures, is_skipped = self.update(minibatch, own_experience, policy_pass, weight)
                updates.append(figures)
                skipped_updates += is_skipped
        return torch.stack(updates), skipped_updates

    def update(
        self,
        batch: Batch,
        experience: Experience,
        policy_pass: PolicyPass,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, bool]:
        """Take one update; return its UPDATE_METRICS (5,), and whether it was skipped.

        weight: the share of the minibatch's tokens that this process has, 1 for a single process.
        """
        config, mask = self.config, batch.mask
        surrogate_loss, clip_fraction = policy_loss(
            policy_pass.logprobs, experience.logprobs, experience.advantages, mask, config.cliprange
        )
        squared_error = value_loss(
            policy_pass.values, experience.values, experience.returns, mask, config.cliprange_value
        )
        mean_kl = masked_mean(policy_pass.kl, mask)
        loss = surrogate_loss + config.init_kl_coef * mean_kl + config.vf_coef * squared_error

        with torch.no_grad():
            change = policy_pass.logprobs - experience.logprobs
            approx_kl = 0.5 * masked_mean(change**2, mask)
            entropy = masked_mean(entropy_of(policy_pass.all_logprobs), mask)
        figures = [surrogate_loss, squared_error, approx_kl, clip_fraction, entropy, loss]
        figures = torch.stack([figure.detach() for figure in figures])
        figures = self.accelerator.reduce(figures * weight, "sum")
        is_skipped = self.descend(loss * weight, is_finite=figures[-1].isfinite())
        return figures[:-1], is_skipped

    def descend(self, loss: torch.Tensor, is_finite: torch.Tensor) -> bool:
        """Move the parameters down the gradient; return whether that was skipped.

        An update whose loss or gradient is not finite is skipped: nothing moves. is_finite: whether
        the loss of all processes together is.
        """
        # The gradients of several processes are averaged, where their sum is wanted.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        parameters = [weight for weight in self.model.parameters() if weight.requires_grad]
        max_norm = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
        has_finite_gradient = norm.isfinite()

        # float16's scaler leaves out an update with bad gradients by itself, and lowers its scale.
        # That is its way to find one, so it has to be asked, and what it leaves out is not counted.
        has_scaler = self.accelerator.scaler is not None
        if has_scaler or (is_finite and has_finite_gradient):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return not is_finite or not (has_scaler or has_finite_gradient)


def of_tokens(all_logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logprobs of the given tokens, (batch, length), out of those of all tokens."""
    return all_logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of the distributions over the last dimension."""
    probabilities = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - (probabilities * logits).sum(-1)


def approx_kl_growth(updates: int) -> float:
    """Return by how much a step's approx_kl is larger than the mean of those of its updates.

    Each was measured before its update, from the policy that sampled; wanted is the one after the
    last. The way grows with the number of updates taken, and a KL with the square of the way: 0
    before the first update, 1, 4, 9 … before the others, updates² after the last.
    """
    measured = sum(number**2 for number in range(updates))
    # The first is 0, whatever the step; where there is no other, nothing is known.
    return updates * updates**2 / max(measured, 1)


def make_trainer(policy, tokenizer, settings, device, dtype):
    """Return the trainer; its optimizer, TRL's Adam, holds the adapter and the value head alone."""
    precision = "fp16" if dtype == "float16" else "no"  # scales the loss, or gradients vanish
    same = ("seed", "batch_size", "ppo_epochs", "learning_rate", "max_grad_norm", "vf_coef")
    config = trl.PPOConfig(
        **{name: getattr(settings, name) for name in (*same, "gamma", "lam")},
        mini_batch_size=settings.mini_batch_size or settings.batch_size,
        cliprange=settings.clip_range,
        cliprange_value=settings.value_clip_range,
        init_kl_coef=settings.kl_coef,
        adap_kl_ctrl=False,  # TRL's controller takes some 10,000 samples to act
        kl_penalty="full",  # the exact KL
        accelerator_kwargs={"cpu": device.type == "cpu", "mixed_precision": precision},
    )
    kind = joined(ExactKLTrainer, trl.PPOTrainer)
    return kind(config, policy, ref_model=None, tokenizer=tokenizer)


# =================================================================== nothing below this line is PPO
# --------------------------------------------------------------------------- steps and records
def count_steps(settings, rows):
    """Return how many batches TRAINING_EPOCHS passes over the rows take; the last is filled up."""
    samples = round(settings.training_epochs * len(rows), 6)  # 0.07 * 100 is 7.000000000000001
    return math.ceil(samples / settings.batch_size)


def set_learning_rate(optimizer, metrics, total_steps, settings, limit=1.5):
    """Set the rate with which the last step would have moved as far as the next one should."""
    # Nats per token grow with the square of the rate, which ends at 100 LEARNING_RATE where nothing
    # can be learned. The target falls as a cube to 0: the noise of the last steps would stay.
    target = settings.target_approx_kl * (1 - len(metrics) / total_steps) ** 3
    approx_kl = metrics[-1]["approx_kl"]
    factor = 0 if approx_kl is None else math.sqrt(target / max(approx_kl, 1e-12))  # None: too much
    for group in optimizer.param_groups:
        if settings.target_approx_kl > 0:
            rate = group["lr"] * min(max(factor, 1 / limit), limit)
            group["lr"] = min(rate, 100 * settings.learning_rate)


def random_numbers(key, rows, length):
    """Return (rows, length) numbers, uniform in (0, 1], each row's by key and its place alone."""
    drawn = [numpy.random.default_rng([*key, place]).random(length) for place in range(len(rows))]
    return torch.tensor(1 - numpy.array(drawn), dtype=torch.float32)


def make_record(step, texts, scores, stats, scale, rows):
    """Return the line of metrics.jsonl for a step; what is not finite becomes None, JSON's null."""
    scaled = on_scale(torch.tensor(scores).double(), scale).mean().item()
    record = {
        "step": step,
        "samples": step * len(texts),
        "epoch": step * len(texts) / len(rows),
        "success_rate": success_rate(scores, scale["threshold"]),
        "score": sum(scores) / len(scores),
        "reward": scaled - stats["kl_coef"] * stats["kl"],
        **stats,
        "distinct": len(set(texts)) / len(texts),
    }
    return {name: x if math.isfinite(x or 0) else None for name, x in record.items()}


def success_rate(scores, threshold):
    """Return the share of scores above the threshold, None where there is none."""
    return None if threshold is None else sum(each > threshold for each in scores) / len(scores)


def give_up_on_bad_numbers(metrics, remedy=""):
    """Raise RunError where each of the last three steps had updates that were skipped."""
    if len(metrics) >= 3 and all(record["skipped_updates"] for record in metrics[-3:]):
        remedy += "start anew with a lower LEARNING_RATE or DTYPE float32"
        raise RunError(f"three steps in a row had updates that are not finite: {remedy}")


# --------------------------------------------------------------------------------- the measurement
AS_IT_IS = {"mean": 0.0, "deviation": 1.0, "graded": False, "threshold": None}  # no scale at all


def measure_scale(trainer, policy, reward, rows, settings):
    """Return what on_scale needs and a success's threshold, from samples of the base model."""
    if not settings.scale_samples:
        return AS_IT_IS
    samples = settings.scale_samples
    _, scores = measure(trainer, policy, reward, AS_IT_IS, rows, settings, samples, 0, base=True)
    if len(scores.unique()) <= 2:  # a rule is left as it is; its higher score is a success
        values = " or ".join(f"{value:g}" for value in scores.unique().tolist())
        print(f"Scale     the base model's samples score {values}: left as it is\n", flush=True)
        return AS_IT_IS | {"threshold": (scores.min() + scores.max()).item() / 2}
    mean, deviation = scores.mean().item(), scores.std().item()
    print(f"Scale     the base model's {mean:.3g} ± {deviation:.3g} becomes 0 ± 1\n", flush=True)
    return AS_IT_IS | {"mean": mean, "deviation": deviation, "graded": True}


def on_scale(scores, scale):
    """Return scores as they are trained on: graded ones begin with mean 0 and deviation 1."""
    scaled = (scores - scale["mean"]) / scale["deviation"]
    # Where good ones are rare, far from the mean, they would be worth any KL: so their logarithm.
    return scaled.asinh() if scale["graded"] else scaled


def make_report(trainer, policy, reward, scale, rows, eval_rows, settings, metrics):
    """Return the content of report.json, and the base model's scores on the training's prompts."""
    samples = settings.eval_samples
    print(f"\nMeasuring before and after, {samples} samples each time", flush=True)
    base, trained, base_scores = {}, {}, {}
    for number, part, asked in ((1, "train_prompts", rows), (2, "eval_prompts", eval_rows)):
        if asked:
            measured = trainer, policy, reward, scale, asked, settings, samples, number
            base[part], base_scores[part] = measure(*measured, base=True)
            trained[part], scores = measure(*measured)
            wins = (torch.sign(scores - base_scores[part]) + 1) / 2  # for a prompt; a tie is a half
            minimum = kl_minimum(trained[part]["score"], base_scores[part])
            base[part] |= {"win_rate": 0.5, "kl_minimum": 0.0}
            trained[part] |= {"win_rate": wins.mean().item(), "kl_minimum": minimum}
    before, after = base["train_prompts"], trained["train_prompts"]
    rise = after["score"] - before["score"]
    least_error = rise / math.sqrt(2 * before["samples"])  # a few samples may have no spread
    error = math.hypot(before["standard_error"], after["standard_error"], least_error)
    report = describe_run(policy.pretrained_model, settings, metrics, ["trl", "ppo"]) | {
        "scale": scale,
        "chat": is_turn(rows[0]["prompt"], settings.chat_template),
        "learned": rise > 3 * error,  # beyond chance
        "close_to_base": after["kl"] <= settings.max_new_tokens,  # a nat per token
        "base": base,
        "trained": trained,
    }
    return report, base_scores["train_prompts"]


def measure(trainer, policy, reward, scale, rows, settings, samples, number, base=False):
    """Return the figures of the model, or the base model, on so many responses, and their scores."""
    rows = rows[:: math.ceil(len(rows) / samples)]  # of many, some; each of them as often, in order
    rows = [row for row in rows for _ in range(math.ceil(samples / len(rows)))]
    numbers = random_numbers((settings.seed, 0, number), rows, settings.max_new_tokens)

    def act(rows, numbers):
        queries = encode(trainer.tokenizer, rows, settings.chat_template)
        with trainer.optional_peft_ctx() if base else nullcontext():
            size = settings.eval_batch_size
            responses, texts = rollout(policy, trainer.tokenizer, queries, numbers, size)
        kls, ref_logprobs = compare_with_base(trainer, policy, queries, responses, base)
        return texts, reward(rows, texts), kls, ref_logprobs, [len(each) for each in responses]

    texts, scores, kls, ref_logprobs, lengths = share_out(act, rows, numbers)
    first_sample = {}
    for row, text in zip(rows, texts):
        first_sample.setdefault(last_said(row["prompt"]), text)
    if not math.isfinite(sum(kls)):
        raise RunError("the measurement is not finite: set DTYPE float32 or lower TARGET_APPROX_KL")
    all_scores = torch.tensor(scores, dtype=torch.float64)
    figures = {
        "samples": len(texts),
        "score": all_scores.mean().item(),
        "standard_error": all_scores.std(correction=0).item() / math.sqrt(len(texts)),
        "success_rate": success_rate(scores, scale["threshold"]),
        "kl": sum(kls) / len(kls),
        "distinct": len(set(texts)) / len(texts),
        "perplexity_under_base": math.exp(min(-sum(ref_logprobs) / sum(lengths), 700)),
        "first_sample": first_sample,
    }
    return figures, all_scores


def compare_with_base(trainer, policy, queries, responses, base):
    """Return each response's KL(model || base model) in nats and base logprob, as lists."""
    kls, ref_logprobs = [], []
    size = trainer.config.mini_batch_size
    for start in progress(range(0, len(queries), size)):
        some = queries[start : start + size], responses[start : start + size]
        inputs, mask = pad_batch(trainer.tokenizer, *some, trainer.accelerator.device)
        inputs["earned"] = torch.zeros_like(mask)  # on which the values alone depend
        all_ref_logprobs = trainer.ref_pass(inputs)
        with torch.no_grad():
            all_logprobs = all_ref_logprobs if base else policy(**inputs)[0]
        tokens = inputs["input_ids"][:, -mask.shape[1] :]
        ref_logprobs += (of_tokens(all_ref_logprobs, tokens) * mask).sum(1).tolist()
        kls += (trainer._kl_penalty(all_logprobs, all_ref_logprobs) * mask).sum(1).tolist()
    return kls, ref_logprobs


def kl_minimum(score, base_scores):
    """Return the least KL of any policy with this mean score, None where all scores are one."""
    # It is the largest tilt * score - ln E[e^(tilt * score)] over all tilts (Donsker and Varadhan
    # 1983), E over samples of the base model, the mean kept half a sample off their best and worst.
    if base_scores.min() == base_scores.max():
        return None
    mean, deviation, kept = base_scores.mean(), base_scores.std(), 1 - 0.5 / len(base_scores)
    scores = (base_scores - mean) / deviation
    wanted = ((score - mean) / deviation).clamp(kept * scores.min(), kept * scores.max())
    tilts = wanted.sign() * torch.logspace(-3, 3, 1000, dtype=torch.float64)  # the others lower it
    means = torch.logsumexp(tilts[:, None] * scores, 1) - math.log(len(scores))
    return max((tilts * wanted - means).max().item(), 0.0)


# ------------------------------------------------------------------------------------- the rewards
def load_reward(settings, rows, device):
    """Return the function from rows and texts to scores, tried on two, and its scale or None."""
    name, scale, of_texts = settings.reward, None, False
    own = {one.__name__: one for one in reversed(globals().values()) if inspect.isfunction(one)}
    if own.get(name) is positive_word_reward:  # REWARD, a function, wins over one of that name
        function = partial(positive_word_reward, positive_words=settings.positive_words)
        scale, of_texts = AS_IT_IS | {"threshold": 0.0}, True
    elif name in own:  # of the script, or a notebook
        function = own[name]
    elif ".py" in name:
        with blame("REWARD", name, "give FILE.py:FUNCTION"):
            path, _, function_name = name.rpartition(":")
            sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # for what it imports
            function = runpy.run_path(path or name).get(function_name)
            if not callable(function):
                raise ValueError(f"it has no function {function_name}")
    else:
        options = settings.reward_label, settings.eval_batch_size, device
        function, scale = load_classifier("REWARD", name, *options)
        of_texts = True

    def reward(rows, texts):
        if of_texts:
            prompts, chat = [row["prompt"] for row in rows], settings.chat_template
            rows = [{"prompt": last_said(each) + "\n" * is_turn(each, chat)} for each in prompts]
        return call_reward(function, rows, texts)

    try:
        reward([rows[0], rows[-1]], ["", " fine"])  # every response begins with the empty text
    except RunError as error:
        raise SettingsError(str(error)) from error
    return reward, scale


def call_reward(function, rows, texts):
    """Return the scores of texts as floats, from a function called as TRL's GRPOTrainer would."""
    arguments = copy.deepcopy({name: [row[name] for row in rows] for name in rows[0]})
    prompts, completions = arguments.pop("prompt"), []
    for prompt, text in zip(prompts, texts):
        turn = [{"role": "assistant", "content": text}]
        completions.append(text if isinstance(prompt, str) else turn)
    try:
        given = list(function(**arguments | {"prompts": prompts, "completions": completions}))
        if len(given) != len(texts) or any(isinstance(each, str) for each in given):
            raise ValueError(f"it returned {shorten(given)} for {len(texts)} texts")
        scores = [float(each) for each in given]
        if not all(abs(each) < 1e15 for each in scores):  # its square is finite in float32 too
            raise ValueError(f"{shorten(scores)} has what is not finite or too large")
        return scores
    except (Exception, SystemExit) as error:
        for row, text in zip(rows, texts):
            if len(texts) > 1:
                call_reward(function, [row], [text])  # raises where this text alone is to blame
        code = getattr(inspect.unwrap(function), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if code and frame.filename == code.co_filename]
        place = f"{code.co_filename}, line {[code.co_firstlineno, *lines][-1]}" if code else "it"
        problem = f"{shorten(repr(error), 200)} for {texts[0]!r} in {place}"
        remedy = "let f(prompts, completions, **kwargs) return a finite number for each completion"
        name = getattr(function, "__name__", type(function).__name__)
        raise RunError(f"REWARD is {name}: {problem}: {remedy}") from error


def load_classifier(setting, name, label, size, device):
    """Return a sequence classifier as a reward function, and its scale where its config has one."""
    remedy = "name a sequence classifier, or give positive_word_reward or FILE.py:FUNCTION"
    with blame(setting, name, remedy):
        path = find_model(setting, name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        kind = transformers.AutoModelForSequenceClassification
        model = load_weights(kind, path, dtype="float32", device_map={"": str(device)}).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    labels = [text.lower() for _, text in sorted(model.config.id2label.items())]
    if len(labels) > 1 and label.lower() not in labels:
        remedy = f"give a label of {shorten(name)}: {shorten(' or '.join(labels))}"
        raise SettingsError(f"REWARD_LABEL is {shorten(label)}: {remedy}")
    others = [index for index in range(len(labels)) if labels[index] != label.lower()]
    names = ("score_mean", "score_std", "score_accuracy")  # as train_reward_model.py leaves them
    mean, deviation, accuracy = (getattr(model.config, name, None) for name in names)
    context = getattr(model.config, "max_position_embeddings", None) or 10**6
    options = {"padding": True, "truncation": True, "return_token_type_ids": False}
    options |= {"max_length": min(tokenizer.model_max_length, context), "return_tensors": "pt"}
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"  # the response is the end

    def classifier(prompts, completions):
        texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
        scores = []
        for start in range(0, len(texts), size):
            some = texts[start : start + size]
            with torch.no_grad():
                logits = model(**tokenizer(some, **options).to(device)).logits
            score = logits[:, 0]
            if len(labels) > 1:  # log-odds
                score = logits[:, labels.index(label.lower())] - logits[:, others].logsumexp(1)
            scores += (score if mean is None else (score - mean) / deviation).tolist()
        return scores

    scale = AS_IT_IS | {"threshold": 0.0, "accuracy": accuracy}  # 0: as likely chosen as rejected
    return classifier, None if mean is None else scale


# ------------------------------------------------------------------------------------- the prompts
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_prompts(prompts, eval_prompts, prompt_field, seed):
    """Return the rows to train on, the rows held out, and how many were given."""
    ends = eval_prompts[:1] + eval_prompts[5:]  # of those above, which suit no file
    holds_out = ends == ["Right now I am", "I woke up feeling"] and any(map(is_file, prompts))
    rows = read_rows("PROMPTS", prompts, prompt_field)
    given = rows + ([] if holds_out else read_rows("EVAL_PROMPTS", eval_prompts, prompt_field))
    fields, unique = {name: None for row in given for name in row}, {}
    for row in given:
        unique.setdefault(str(row["prompt"]), fields | row)
    unique.pop("", None)
    count = len({str(row["prompt"]) for row in rows} - {""})
    rows, eval_rows = list(unique.values())[:count], list(unique.values())[count:]
    if holds_out and count > 1:
        rows = [rows[index] for index in numpy.random.default_rng(seed).permutation(count)]
        eval_rows, rows = rows[: math.ceil(count / 10)], rows[math.ceil(count / 10) :]
    return rows, eval_rows, len(given)


def is_file(entry):
    """Return whether an entry of PROMPTS means a file: it is one, or has a name like one."""
    known = Path(entry).suffix.lower() in FORMATS
    return known or os.path.isfile(entry) or bool(re.fullmatch(r"\S+(\.\w{1,8}|/)", entry))


def read_rows(name, entries, prompt_field):
    """Return the rows that the entries of a setting stand for: those of a file, one for a text."""
    rows = []
    for entry in entries:
        with blame(name, entry, f"give a {', '.join(FORMATS)} file with a prompt a row, in UTF-8"):
            table = read_table(entry) if is_file(entry) else [entry]
            found = [with_prompt(row, prompt_field, i) for i, row in enumerate(table, start=1)]
            if not any(row["prompt"] for row in found):
                raise ValueError("it has no prompts")
            rows += found
    return rows


def read_table(path, other=None):
    """Return the rows of a file, dictionaries or texts; other is the form of unknown endings."""
    form = FORMATS.get(Path(path).suffix.lower(), other)
    if form in ("csv", "parquet"):
        options = {"encoding": "utf-8-sig", "keep_default_na": False} if form == "csv" else {}
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # for which it would use the network
        datasets.logging.set_verbosity(logging.CRITICAL)  # blame tells what it would
        options |= {"split": "train", "streaming": True}  # or a copy would stay in the cache
        rows = list(datasets.load_dataset(form, data_files=glob.escape(path), **options))
        if any("__index_level_0__" in row for row in rows):  # what pandas makes of unquoted commas
            raise ValueError("its rows have more fields than its first line")
        return rows
    if not form:
        raise ValueError("it is a file of another kind")
    text = Path(path).read_text(encoding="utf-8-sig").strip()
    rows = [line.strip() for line in text.split("\n") if line.strip()]
    if form == "json":  # datasets names no line, and takes texts like dates for dates
        rows = json.loads(text if text.startswith("[") else "[" + ",\n".join(rows) + "]")
    return rows


def with_prompt(row, prompt_field, number):
    """Return a row with its prompt: a text, which may be empty, or a list of messages."""
    if isinstance(row, str):
        return with_prompt({"prompt": row}, "prompt", number)
    names = ["prompt", "messages", "text", "instruction", "question"]
    names = [name for name in names if name in row] if prompt_field == "auto" else [prompt_field]
    if not names or names[0] not in row:
        fields = f"PROMPT_FIELD is {prompt_field}, and its fields are {', '.join(row)}"
        raise ValueError(f"row {number}: {fields}")
    prompt = row[names[0]]
    if isinstance(prompt, str) and not prompt.strip():
        return row | {"prompt": ""}
    if names[0] == "instruction" and row.get("input"):
        prompt = f"{prompt}\n{row['input']}"
    with suppress(Exception):
        while isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]  # which is for the policy to say
        convert(last_said(prompt), "text", ())
        return row | {"prompt": prompt}
    raise ValueError(f"row {number}: its {names[0]} is {shorten(row[names[0]])}, no text")


def last_said(prompt):
    """Return a prompt, or the last message of one that is a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def is_turn(prompt, chat_template):
    """Return whether a prompt goes through the chat template: CHAT_TEMPLATE, or it has messages."""
    return chat_template or not isinstance(prompt, str)


def rows_of_step(step, rows, batch_size, seed):
    """Return the next batch_size rows; every epoch has each once, in an order of its own."""
    places = [divmod(index, len(rows)) for index in range(step * batch_size)[-batch_size:]]
    drawn = {epoch: numpy.random.default_rng([seed, epoch]) for epoch, _ in places}
    orders = {epoch: numbers.permutation(len(rows)) for epoch, numbers in drawn.items()}
    return [rows[orders[epoch][place]] for epoch, place in places]


def texts_of(tokenizer, query, responses):
    """Return the texts that responses add to the query's, with the space before it, if any."""
    both = [torch.cat([query, response]) for response in responses]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    if query[-1] == tokenizer.eos_token_id:  # of an encoder: the response is a text of its own
        texts = tokenizer.batch_decode(responses, **options)
        return [text and f" {text.lstrip()}" for text in texts]
    before, *texts = tokenizer.batch_decode([query, *both], **options)
    return [text[len(before) :] for text in texts]


def encode(tokenizer, rows, chat_template):
    """Return the queries, a 1-D tensor of token ids for the prompt of each row."""
    queries = []
    for prompt in [row["prompt"] for row in rows]:
        if is_turn(prompt, chat_template):  # the template has a start token, where one is wanted
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        else:
            inputs = tokenizer(prompt)
        queries.append(torch.tensor(inputs["input_ids"]))
    return queries


def pad_batch(tokenizer, queries, responses, device):
    """Put the queries, padded on the tokenizer's side, before the responses, padded on the right.

    Returns input_ids and attention_mask by name, both (batch, query length + response length), and
    the mask of the response tokens (batch, response length).
    """
    left = tokenizer.pad({"input_ids": queries}, return_tensors="pt")
    right = tokenizer.pad({"input_ids": responses}, padding_side="right", return_tensors="pt")
    left, right = left.to(device), right.to(device)
    inputs = {name: torch.cat([left[name], right[name]], dim=1) for name in left}
    return inputs, right["attention_mask"]


def for_decoder(inputs, length, start_id):
    """Return inputs for an encoder-decoder, and where it draws the last `length` tokens of them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = torch.full_like(ids[:, :1], start_id)
    inputs |= {"input_ids": ids[:, :-length], "attention_mask": mask[:, :-length]}  # the queries
    inputs["decoder_input_ids"] = torch.cat([start, ids[:, -length:-1]], dim=1)
    return inputs, torch.arange(length, device=ids.device)


# ------------------------------------------------------------------------------------ the settings
class SettingsError(Exception):
    """Settings or input that can't work; its arguments each name a setting, its value, a remedy."""


RULES = [  # what to give for a constant, its limits, whether --resume may change it, and its name
    ("a text", None, False, "MODEL_NAME REWARD REWARD_LABEL PROMPT_FIELD"),
    ("a text", None, True, "OUTPUT_DIR"),
    ("none, 8bit or 4bit", None, False, "QUANTIZATION"),
    ("auto, cpu, cuda or mps", None, True, "DEVICE"),
    ("auto, float32, bfloat16 or float16", None, False, "DTYPE"),
    ("a list of texts, none empty", 1, False, "LORA_TARGETS POSITIVE_WORDS PROMPTS"),
    ("a list of texts, none empty", 0, False, "EVAL_PROMPTS"),
    ("a list of texts, tensorboard, wandb or trackio", 0, True, "REPORT_TO"),
    ("True or False", None, False, "SCORE_PREFIXES CHAT_TEMPLATE"),
    ("True or False", None, True, "RESUME GRADIENT_CHECKPOINTING SAVE_ADAPTER"),
    ("a whole number", (1, 10**6), False, "LORA_RANK LORA_ALPHA"),
    ("a whole number", (1, 10**6), False, "BATCH_SIZE MAX_NEW_TOKENS PPO_EPOCHS"),
    ("a whole number", (1, 10**6), True, "EVAL_SAMPLES EVAL_BATCH_SIZE LOG_EVERY"),
    ("a whole number", (0, 10**6), True, "MINI_BATCH_SIZE SAVE_EVERY"),
    ("a whole number", (0, 10**6), False, "SCALE_SAMPLES"),
    ("a whole number", (0, 2**32 - 1), False, "SEED"),
    ("a number", (1e-6, 10**6), True, "TRAINING_EPOCHS"),
    ("a number", (1e-30, 1e30), False, "LEARNING_RATE"),  # float32 holds these, and their products
    ("a number", (0, 1e30), False, "KL_COEF VF_COEF"),
    ("a number", (0, 1e30), True, "TARGET_APPROX_KL MAX_GRAD_NORM"),
    ("a number", (0.01, 100), False, "TEMPERATURE"),
    ("a number", (1e-6, 1000), False, "CLIP_RANGE VALUE_CLIP_RANGE"),
    ("a number", (0, 1), False, "GAMMA LAM"),
    ("a number, or auto,", (-(10**15), 10**15), True, "SUCCESS_THRESHOLD"),
]


def convert(value, kind, limits):
    """Return a value as its kind, which another may stand for, within the limits, or raise anything."""
    if kind == "True or False":
        return {"true": True, "false": False}[str(value).lower()]
    if "list" in kind:
        texts = value if isinstance(value, list | tuple) else [value]
        if len(texts) < limits:
            raise ValueError
        return [convert(text, "a text", None) for text in texts]
    if "number" not in kind:
        text = value.__name__ if inspect.isfunction(value) else os.fspath(value)
        text.encode()  # an error for half a character, as "\ud800"
        choices = re.split(", | or ", kind)
        if not text.strip() or "\0" in text or (len(choices) > 1 and text not in choices):
            raise ValueError
        return text
    if "auto" in kind and value == "auto":
        return value
    number, whole = float(value), "whole" in kind
    outside = isinstance(value, bool) or not limits[0] <= number <= limits[1]
    if outside or (whole and number % 1):
        raise ValueError
    return int(number) if whole else number


def read_settings(argv, constants, rules, checks):
    """Return constants as a namespace, flags in argv before them, or raise all problems at once."""
    if "--help" in argv or "-h" in argv:
        source = Path(constants["__file__"]).read_text(encoding="utf-8")
        block = "".join(re.findall("^# --- .+?(?=^# -----)", source, re.M | re.S))
        flags = re.sub("^[A-Z_]+", lambda name: flag_of(name[0]), block, flags=re.M)
        print(f"usage: {Path(sys.argv[0]).name} [--flag VALUE …]", end="    ")
        print(f"(for this run, in place of a constant)\n\n{flags.replace('  # fmt: skip', '')}")
        sys.exit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    kinds = {name: (kind, limits) for kind, limits, _, names in rules for name in names.split()}
    for name, (kind, _) in kinds.items():
        count = "*" if "list" in kind else "?"
        alone = True if kind == "True or False" else None
        parser.add_argument(flag_of(name), dest=name, nargs=count, const=alone)
    switches = "|".join(flag_of(name)[2:] for name in kinds if kinds[name][0] == "True or False")
    argv = [re.sub(rf"^--no-({switches})$", r"--\1=false", argument) for argument in argv]
    given, unknown = parser.parse_known_args(argv, SimpleNamespace(**constants))
    problems, settings = [], {}
    for text in unknown:
        meant = difflib.get_close_matches(text.partition("=")[0], map(flag_of, kinds), n=2)
        hint = f"did you mean {' or '.join(meant)}?" if meant else "--help lists all"
        problems.append(f"{shorten(text)} is no flag, and follows none: {hint}")
    for name, (kind, limits) in kinds.items():
        value = getattr(given, name)
        try:
            settings[name.lower()] = convert(value, kind, limits)
        except Exception:  # whatever an object may raise when it is converted
            reach = " from {} to {}".format(*limits) if "number" in kind else ""
            problems.append(f"{name} is {shorten(value)}: give {kind}{reach}")
    for check in checks:
        names = inspect.signature(check).parameters  # which are settings
        try:
            if settings.keys() >= names.keys():  # none of them is wrong by itself
                check(*(settings[name] for name in names))
        except SettingsError as error:
            problems += error.args
    if problems:
        raise SettingsError(*problems)
    return SimpleNamespace(**settings)


def flag_of(name):
    """Return the flag of a constant: --learning-rate for LEARNING_RATE."""
    return "--" + name.lower().replace("_", "-")


def check_batches(batch_size, mini_batch_size):
    """Refuse batches that can't be divided."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > (mini_batch_size or batch_size):
        name = "MINI_BATCH_SIZE" if mini_batch_size else "BATCH_SIZE"
        remedy = f"give at least {processes}, a response for each process"
        raise SettingsError(f"{name} is {mini_batch_size or batch_size}: {remedy}")
    if mini_batch_size and batch_size % mini_batch_size:
        remedy = f"give 0 or a divisor of BATCH_SIZE, {batch_size}"
        raise SettingsError(f"MINI_BATCH_SIZE is {mini_batch_size}: {remedy}")


def check_target(target_approx_kl, ppo_epochs, batch_size, mini_batch_size):
    """Refuse to steer by the size of a step that can't be measured."""
    if target_approx_kl and ppo_epochs == 1 and mini_batch_size in (0, batch_size):
        remedy = "give 0, for a single update of a step can't be measured"
        raise SettingsError(f"TARGET_APPROX_KL is {target_approx_kl}: {remedy}")


def check_installed(device, dtype, report_to):
    """Refuse a device, a dtype or a tracker that is not there."""
    if device in ("cuda", "mps") and not getattr(torch, device).is_available():
        raise SettingsError(f"DEVICE is {device}: give cpu, since PyTorch sees no such GPU")
    if dtype == "float16" and pick_device(device, dtype)[0] == "cpu":
        raise SettingsError("DTYPE is float16: give float32 or bfloat16 on a CPU")
    for name in report_to:
        if name not in ("tensorboard", "wandb", "trackio"):
            remedy = "give any of tensorboard, wandb and trackio"
            raise SettingsError(f"REPORT_TO is {shorten(name)}: {remedy}")
        found = importlib.util.find_spec(name)
        if not (found and found.origin):  # a folder of that name alone has none
            raise SettingsError(f"REPORT_TO is {name}: leave it out, or pip install {name}")
    if "wandb" in report_to and is_main_process():
        os.environ.setdefault("WANDB_SILENT", "true")
        with blame("REPORT_TO", "wandb", "run: wandb login, or set WANDB_MODE=offline"):
            importlib.import_module("wandb").login()


def check_output(model_name, output_dir):
    """Refuse an output folder that can't be written, or where that would harm something."""
    with blame("OUTPUT_DIR", output_dir, "name another folder"):
        output = Path(output_dir).absolute()
        existing = next(path for path in (output, *output.parents) if path.exists())
        names = {path.name for path in output.iterdir()} if existing == output else set()
        if output_dir.startswith("~"):
            raise ValueError("~ is no folder here")
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"{existing} can't be written")
        if names and names.isdisjoint({"metrics.jsonl", "report.json", "checkpoint"}):
            raise ValueError("it holds files that are not a run's")
        for path in (".", *bases_of(model_name)):
            if Path(path).resolve().is_relative_to(output.resolve()):
                raise ValueError("the current folder or the model is in it")


CHECKS = (read_prompts, check_batches, check_target, check_installed, check_output)


# -------------------------------------------------------------------------------------- the models
@contextmanager
def blame(name, value, remedy):
    """Turn what is raised here into a SettingsError that names a setting, its value, a remedy."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a broken folder can make transformers raise anything
        if isinstance(error, SettingsError) or lacks_memory(error):
            raise
        reason = shorten(error if " " in str(error) else repr(error), 200).rstrip(".")
        problem = f"{name} is {shorten(value)}: it can't be used ({reason}): {remedy}"
        raise SettingsError(problem) from error


def find_model(setting, name, remedy=""):
    """Return a local folder with the model, fetched from the Hub where the cache lacks it."""
    if os.path.isdir(name):
        return name
    files = {"allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]}
    files["ignore_patterns"] = ["*/*"]  # folders hold the same weights in other formats
    try:
        huggingface_hub.HfApi().model_info(name, timeout=5)
        print(f"Fetching what the cache lacks of {name} from the Hub", flush=True)
        return huggingface_hub.snapshot_download(name, **files)
    except Exception as error:  # no answer: a copy in the cache has to do
        with suppress(Exception):
            return huggingface_hub.snapshot_download(name, local_files_only=True, **files)
        problem = f"{setting} is {shorten(name)}: there is no such folder, the cache lacks it, and "
        problem += f"the Hub does not give it ({shorten(error)})"
        usual = "check name and connection, or run: hf auth login; offline there is demo_model"
        raise SettingsError(f"{problem}: {remedy or usual}") from error


def load_model(settings, rows, eval_rows, device, dtype):
    """Return the base model, its tokenizer, and those of the rows whose prompts fit into it."""
    remedy = "name a language model with config.json, *.safetensors and a tokenizer"
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model("MODEL_NAME", settings.model_name)
        tokenizer = load_tokenizer(path)
        context = context_of(path)
        rows = prompts_that_fit(context, tokenizer, rows, settings)
        eval_rows = prompts_that_fit(context, tokenizer, eval_rows, settings)
        kind = "AutoModelForCausalLM"
        if config_of(path).is_encoder_decoder:
            kind, tokenizer.padding_side = "AutoModelForSeq2SeqLM", "right"  # as encoders have it
        model = load_base_model(path, device, dtype, settings.quantization, kind)
    return model, tokenizer, rows, eval_rows


def read_adapter(path):
    """Return the config of the adapter in a folder, None where there is none or a whole model."""
    lora = Path(path, "adapter_config.json")
    is_adapter = lora.exists() and not Path(path, "config.json").exists()
    return json.loads(lora.read_text(encoding="utf-8")) if is_adapter else None


def bases_of(model_name):
    """Return the name of a model and, of an adapter, of all that it is built on."""
    names = [model_name]
    remedy = "correct its adapter_config.json, or name the merged model"
    with blame("MODEL_NAME", model_name, remedy):
        while read_adapter(names[-1]):
            names.append(read_adapter(names[-1])["base_model_name_or_path"])
            if names[-1] in names[:-1]:  # its folder was moved aside, and another took its place
                raise ValueError(f"it is built on {shorten(names[-1])}, which is built on itself")
    return names


def base_of(path):
    """Return the folder of the model that an adapter is for; one that is no adapter's, as it is."""
    lora = read_adapter(path)
    if lora is None:
        return path
    if lora["task_type"] == "SEQ_CLS":
        raise ValueError("it is the adapter of a classifier")
    if not Path(path, "adapter_model.safetensors").exists():  # PEFT would ask the Hub
        raise ValueError("it has no adapter_model.safetensors")
    remedy = "start where that folder is, or correct base_model_name_or_path in adapter_config.json"
    return find_model("The base of MODEL_NAME", lora["base_model_name_or_path"], remedy)


def config_of(path):
    """Return the config of a model, or of the one that an adapter is for."""
    base, load = base_of(path), transformers.AutoConfig.from_pretrained
    return config_of(base) if base != path else load(path, trust_remote_code=False)


def context_of(path):
    """Return how many tokens a model takes, infinity where it has no limit."""
    config = config_of(path).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def load_tokenizer(path):
    """Return the tokenizer, with a pad token that is no end token, if there is one to spare."""
    path = path if Path(path, "tokenizer_config.json").exists() else base_of(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no end token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # as generation needs it
    return tokenizer


def end_tokens(own, tokenizer):
    """Return the ids of the tokens that end a response: the model's own and the chat template's."""
    ids = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with suppress(Exception):  # there is no template, or one for other conversations
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Hello")[2]
        tokens = tokenizer(after, add_special_tokens=False)["input_ids"]
        ids = [*ids, next(token for token in tokens if token in tokenizer.added_tokens_decoder)]
    return list(dict.fromkeys(ids))


def prompts_that_fit(context, tokenizer, rows, settings):
    """Return the rows whose prompts leave room for a response in the model's context."""
    remedy = "name a model with a chat template that takes these prompts, or give texts and False"
    with blame("CHAT_TEMPLATE", settings.chat_template, remedy):
        queries = encode(tokenizer, rows, settings.chat_template)
    room = context - settings.max_new_tokens
    fitting = [row for row, query in zip(rows, queries) if len(query) <= room]
    if rows and not fitting:
        problem = f"MAX_NEW_TOKENS is {settings.max_new_tokens}, too many for every prompt, such as"
        prompt = f"{shorten(last_said(rows[0]['prompt']))!r}, {len(queries[0])} tokens"
        remedy = f"give less, or shorter prompts; the model's context is {context}"
        raise SettingsError(f"{problem} {prompt}: {remedy}")
    return fitting


def make_policy(model, tokenizer, settings):
    """Add a LoRA adapter and a value head to the base model, both float32; set how it samples."""
    # PPO needs the logprobs of the very distribution that is sampled: no top-k, penalty, minimum.
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
    sampling["max_new_tokens"] = settings.max_new_tokens
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "decoder_start_token_id")}
    ids["pad_token_id"] = tokenizer.pad_token_id
    ids["eos_token_id"] = end_tokens(own.eos_token_id, tokenizer)
    model.generation_config = transformers.GenerationConfig(**sampling, **ids)
    if settings.gradient_checkpointing:  # backward computes again what is inside of a layer
        options = {"use_reentrant": False, "preserve_rng_state": False}  # which draws no numbers
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        layers = [module for module in model.modules() if isinstance(module, kind)]
        for layer in layers:
            layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, **options)
        if not layers:
            remedy = "give False, since the model has no layers made for it"
            raise SettingsError(f"GRADIENT_CHECKPOINTING is True: {remedy}")
    adapted = add_adapter(model, settings)  # without dropout: the ratio of a policy to itself is 1
    kind = "Seq2Seq" if model.config.is_encoder_decoder else "Causal"
    kind = joined(PolicyWithValueHead, getattr(trl, f"AutoModelFor{kind}LMWithValueHead"))
    with blame("MODEL_NAME", settings.model_name, "name a model of another family, as Llama"):
        if model.config.get_text_config() is not model.config:
            raise ValueError("it takes pictures or sound too")
        policy = kind(adapted, settings.temperature).to(model.device).eval()
        try_policy(policy, tokenizer)
    return policy


def try_policy(policy, tokenizer, length=3):
    """Refuse a model that says something else where its prompt is padded, or knows what follows."""
    device = policy.pretrained_model.device
    query = tokenizer("I am so very glad today", return_tensors="pt")["input_ids"][0]
    queries = [query[:2], query]  # beside the second the first is padded
    inputs = tokenizer.pad({"input_ids": queries}, return_tensors="pt")
    options = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        said = policy.pretrained_model.generate(**inputs.to(device), **options)
        chances = torch.softmax(torch.stack(said.logits, dim=1)[0].float(), dim=-1)
        for count in (1, 2):
            responses = [*said.sequences[:count, -length:].cpu()]
            inputs, mask = pad_batch(tokenizer, queries[:count], responses, device)
            all_logprobs, _ = policy(**inputs, earned=mask.float())
            again = torch.softmax(all_logprobs[0] * policy.temperature, dim=-1)  # which may hide it
            difference = (chances - again).abs().sum(-1).mean()  # of 2; 16 bits make 0.04
            if difference > 0.2:
                raise ValueError("padding, or what follows, changes its probabilities")


def add_adapter(model, settings, **options):
    """Return the model with a LoRA adapter on the layers that LORA_TARGETS names."""
    targets = settings.lora_targets
    options |= {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    options["target_modules"] = "all-linear" if targets == ["all-linear"] else targets
    torch.manual_seed(settings.seed)  # of the adapter's first values
    with blame("LORA_TARGETS", targets, "name linear layers of this model, or all-linear"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        names = " ".join(f".{name} " for name in adapted.base_model.targeted_module_names)
        unknown = [target for target in targets if f".{target} " not in names]
        if unknown and targets != ["all-linear"]:  # PEFT says so only where no name is known
            raise ValueError(f"the model has no layer {unknown}")
    return adapted


def joined(own, other):
    """Return the class of the script with that of a library, which takes seconds to import, as base."""
    return type(own.__name__, (own, other), {})


def load_base_model(path, device, dtype, quantization, kind="AutoModelForCausalLM", **options):
    """Load a model, its frozen weights in 16 or 32 bits, or in 8 or 4; an adapter is merged in."""
    base = base_of(path)
    if base != path:  # a second adapter would take the place of the first, without a word
        model = load_base_model(base, device, dtype, quantization, kind, **options)
        lora = peft.PeftConfig.from_pretrained(path)
        lora.task_type = None  # which asks for a model of one kind
        model = peft.PeftModel.from_pretrained(model, path, config=lora).merge_and_unload()
        check_finite(model)
        return model
    options |= {"dtype": dtype, "device_map": {"": str(device)}}
    if quantization != "none":
        bits = {f"load_in_{quantization}": True, "bnb_4bit_quant_type": "nf4"}
        bits |= {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
        if "new_head" in options:  # which is trained as it is
            bits["llm_int8_skip_modules"] = ["score", "classifier", "classification_head"]
        options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
    return load_weights(getattr(transformers, kind), path, **options)


def load_weights(kind, path, new_head=False, **options):
    """Load a model of a kind from safetensors, and make sure that it is whole and finite."""
    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, loading = kind.from_pretrained(path, ignore_mismatched_sizes=new_head, **options)
    architecture = (model.config.architectures or ["model of no architecture"])[0]
    is_classifier = "SequenceClassification" in architecture  # tied weights would hide it
    if not new_head and is_classifier != (kind is transformers.AutoModelForSequenceClassification):
        raise ValueError(f"it is a {architecture}")
    lacking = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if new_head:  # which is random, and nothing else
        lacking = {name for name in lacking if name.startswith(f"{model.base_model_prefix}.")}
    if lacking:  # transformers would go on with random numbers
        raise ValueError(f"it lacks weights such as {min(lacking)}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer and quantizer.pre_quantized:  # it could not be saved
        raise ValueError("it is quantized already, take the model that it was made from")
    kinds = {getattr(module, "source_cls", None) for module in model.modules()}  # before it was
    if quantizer and (kinds == {None} or transformers.pytorch_utils.Conv1D in kinds):
        raise ValueError("it could not be saved after QUANTIZATION, give none for that")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack for good
    check_finite(model)
    return model


def check_finite(model):
    """Refuse a model with weights that are no numbers."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"it has weights that are not finite, such as {name}")


def pick_device(device, dtype):
    """Return the kind of device, cuda, mps or cpu, and the name of the dtype of the frozen weights."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if dtype == "auto" and device == "cpu" and torch.cpu._is_amx_tile_supported():
        dtype = "bfloat16"  # for which such a CPU has matrix units
    return device, "float32" if dtype == "auto" else dtype


# ----------------------------------------------------------------------------- several processes
def is_main_process():
    """Return whether this process is the one that prints, writes and saves."""
    return os.environ.get("RANK", "0") == "0"


def join_processes(device):
    """Wait for the other processes of a launch, if there are any; return this one's own device."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if neighbours > 1:
        threads = max(os.cpu_count() // neighbours, 1)  # more than cores would wait for each other
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(threads))))
    return accelerate.PartialState(cpu=device == "cpu").device


def share_out(function, rows, numbers, **arguments):
    """Return the columns that the function finds for all rows, each process doing its share."""
    state = accelerate.PartialState()
    first, last = (len(rows) * (state.process_index + n) // state.num_processes for n in (0, 1))
    try:
        found = ()
        if first < last:
            found = function(rows[first:last], numbers[first:last], **arguments)
    except RunError as error:
        found = error
    all_found = accelerate.utils.gather_object([found])
    for found in all_found:
        if isinstance(found, RunError):
            raise found  # in all processes
    return [[*itertools.chain(*column)] for column in zip(*filter(None, all_found))]


# ----------------------------------------------------------------------------- output, checkpoints
@contextmanager
def claim_output(folder, resume):
    """Hold the output folder for this run alone; move an earlier run aside unless it goes on."""
    if not is_main_process():
        yield
        return
    output, new = Path(folder), Path(folder, "checkpoint", "new")
    lock = FileLock(output / "checkpoint" / "lock", blocking=False)  # free when the process ends
    try:
        with lock:
            earlier = [path for path in output.rglob("*") if path.is_file() and path.name != "lock"]
        if earlier and not resume:
            number = next(n for n in itertools.count(1) if not Path(f"{output}-{n}").exists())
            output.rename(f"{output}-{number}")
            print(f"The earlier run in {output}/ was moved to {output}-{number}/")
        lock.acquire()
    except OSError as error:
        reason = error.strerror or "another run is writing there"
        raise SettingsError(f"OUTPUT_DIR is {output}: {reason}: name another folder") from error
    try:
        shutil.rmtree(new, ignore_errors=True)  # what a killed run left
        new.mkdir()
        yield
    except BaseException as error:
        state = read_checkpoint(folder)
        if state:
            saved = f"what was learned up to step {len(state['metrics'])} is saved"
            error.add_note(f"{saved}. To go on, run the same line with --resume")  # main tells
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what was being written when the disk was full
        lock.release()


def read_checkpoint(folder):
    """Return the dictionary that save_checkpoint wrote last, None where there is none."""
    path = Path(folder, "checkpoint", "state.pt")
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def trained_weights(model):
    """Return {name: weight} of what is trained."""
    return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}


def save_checkpoint(model, optimizer, scaler, settings, metrics, **more):
    """Replace the last checkpoint, if there was a step and its weights are finite."""
    weights = trained_weights(model)
    finite = all(weight.isfinite().all() for weight in weights.values())
    if metrics and finite and is_main_process():
        state = more | {  # no random states: each step sets its own seed
            "settings": vars(settings),
            "metrics": metrics,
            "weights": weights,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        content, new = io.BytesIO(), Path(settings.output_dir, "checkpoint", "new", "state.pt")
        torch.save(state, content)  # not into the file: what it raises for a full disk says nothing
        with open(new, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        new.replace(new.parents[1] / "state.pt")
    accelerate.PartialState().wait_for_everyone()  # a process that ends would end the main one


def hash_files(paths):
    """Return {path: SHA-256} of those paths that are files."""
    files = [path for path in paths if os.path.isfile(path)]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files}


def load_checkpoint(model, optimizer, scaler, settings, rules, steps, files):
    """Put all back to the last checkpoint, and return it."""
    state = check_resume(settings, rules, steps, files)
    with blame("RESUME", True, "start without it"):  # it may be of another model in the same folder
        for name, weight in trained_weights(model).items():
            weight.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    return state


def check_resume(settings, rules, steps, files):
    """Return the last checkpoint; refuse what would make the rest of the run another one."""
    with blame("RESUME", True, "start without it"):
        state = read_checkpoint(settings.output_dir)
        if state is None:
            raise ValueError(f"there is no checkpoint in {settings.output_dir}")
        before, done, earlier = {**state["settings"]}, len(state["metrics"]), state["files"]
    problems = []
    for name in [name for _, _, free, names in rules for name in names.split() if not free]:
        value, old = getattr(settings, name.lower()), before.get(name.lower())
        if value != old:
            problem = f"{name} is {shorten(value)}, but {shorten(old)} in the checkpoint"
            problems.append(f"{problem}: give that or start anew")
    for path, content in files.items():
        if content != earlier.get(path, content):
            problems.append(f"{path} has changed since the checkpoint: put it back or start anew")
    if not problems and done > steps:
        problem = f"TRAINING_EPOCHS is {settings.training_epochs:g}, which takes {steps} steps"
        problems.append(f"{problem}, but the checkpoint has {done}: give more")
    if problems:
        raise SettingsError(*problems)
    return state


# ------------------------------------------------------------------------------ stops and failures
class Stopped(KeyboardInterrupt):
    """Raised where Ctrl-C or SIGTERM ends the run; its argument is the signal's number."""


class RunError(Exception):
    """A failure in the middle of a run that the user can mend."""


@contextmanager
def stop_on_signal(after_step=False):
    """Raise Stopped on Ctrl-C or SIGTERM; with after_step the first waits for the block's end."""
    stop = SimpleNamespace(requested=0, time=time.monotonic())  # the number of the signal
    pause = 2 if "WORLD_SIZE" in os.environ else 0  # in which a launcher passes on what all got

    def handle(number, frame):
        again = stop.requested and time.monotonic() - stop.time >= pause
        if again or not after_step:
            raise Stopped(number)
        if not stop.requested and is_main_process():
            print("\nStopping after this step; once more to stop at once", file=sys.stderr)
        stop.requested, stop.time = number, time.monotonic()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.requested:
        raise Stopped(stop.requested)


def explain(error, settings):
    """Return what a user can do about an error in the middle of a run, None where it is a bug."""
    if isinstance(error, RunError):
        return str(error)
    if lacks_memory(error) and not hasattr(settings, "mini_batch_size"):  # of a sibling
        remedy = f"lower BATCH_SIZE (it is {settings.batch_size}), or start anew with QUANTIZATION"
        return f"there is too little memory: {remedy} 4bit or a smaller model"
    if lacks_memory(error):
        now = f"it is {settings.mini_batch_size or settings.batch_size}"
        remedy = f"lower MINI_BATCH_SIZE ({now}) or EVAL_BATCH_SIZE ({settings.eval_batch_size})"
        anew = f"QUANTIZATION 4bit, a BATCH_SIZE below {settings.batch_size} or a smaller model"
        return f"there is too little memory: {remedy} and go on, or start anew with {anew}"
    if "WORLD_SIZE" in os.environ and re.search("gloo|nccl", repr(error), re.IGNORECASE):
        return "another process of this run has ended, and tells why"
    if isinstance(error, OSError) or re.search("SafetensorError|os error", repr(error)):  # of Rust
        reason = shorten(getattr(error, "strerror", None) or error, 200)
        place = f"OUTPUT_DIR, {settings.output_dir}, and let what is printed be read to its end"
        return f"something can't be written ({reason}): make room in {place}"
    return None


def lacks_memory(error):
    """Return whether an error comes from too little memory."""
    texts = "can't allocate memory|not enough memory|out of memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(texts, str(error)))


# ---------------------------------------------------------------------------- screen and report
def shorten(value, length=80):
    """Return the first line of the value's text, of at most so many characters."""
    first, *others = str(value).strip().splitlines() or ["empty"]
    is_whole = not others and len(first) <= length
    return first if is_whole else first[: length - 1].rstrip(" .:") + "…"


def announce(policy, settings, device, dtype, rows, eval_rows, given, metrics):
    """Print what is going to happen."""
    trained, total = policy.pretrained_model.get_nb_trainable_parameters()  # without the value head
    steps = count_steps(settings, rows)
    left_out = given - len(rows) - len(eval_rows)
    left = f", {left_out} left out: empty, given twice or too long" if left_out else ""
    going_on = f", going on after step {len(metrics)}" if metrics else ""
    print(f"Model     {settings.model_name}, {total:,} parameters, {trained:,} of them trained")
    print(f"Device    {device_name(device)}, {dtype} weights")
    print(f"Prompts   {len(rows)} to train on, {len(eval_rows)} held out{left}")
    print(f"Reward    {settings.reward}")
    print(f"Training  {steps * settings.batch_size} samples in {steps} steps, seed {settings.seed}")
    print(f"Output    {settings.output_dir}/{going_on}\n", flush=True)


@contextmanager
def open_log(settings, metrics, total):
    """Yield a function that writes down and shows the last of the metrics and its samples."""
    if not is_main_process():
        yield lambda *step: None
        return
    path = Path(settings.output_dir, "samples.jsonl")
    with open(path, "ab+") as file:  # never rewritten, only cut to the checkpoint's steps
        file.seek(0)
        file.truncate(sum(map(len, itertools.islice(file, len(metrics) * settings.batch_size))))
    with open_metrics(settings, metrics, total) as show:

        def log(metrics, rows, texts, scores, kls):
            samples = []
            for row, text, score, kl in zip(rows, texts, scores, kls):
                samples.append({"step": len(metrics), "prompt": row["prompt"], "response": text})
                samples[-1] |= {"score": score, "kl": kl if math.isfinite(kl) else None}
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in samples)
            rate, score, kl = (recent(metrics, n) for n in ("success_rate", "score", "kl"))
            text = f"score {score:+.2f}, KL {kl:z.2f}"
            text = text if math.isnan(rate) else f"success {rate:4.0%}, {text}"
            warnings = warnings_of(metrics, settings.max_new_tokens)
            show(metrics, text, samples, warnings)

        yield log


@contextmanager
def open_metrics(settings, metrics, total):
    """Yield a function that writes down the last of the metrics and shows what is said of it."""
    path = Path(settings.output_dir, "metrics.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics))
    shape = "{n_fmt}/{total_fmt} |{bar:12}| {remaining} left, {desc}"
    done = len(metrics)
    watched = done < total and all(file and file.isatty() for file in (sys.stdout, sys.stderr))
    say = tqdm.write if watched else partial(print, flush=True)
    bar = tqdm(total=total, initial=done, bar_format=shape, disable=not watched)
    with open_trackers(settings, done) as track, bar:

        def show(metrics, text, samples=(), warnings=()):
            step, record = len(metrics), metrics[-1]
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
            for warning in warnings:
                say(f"step {step}: {warning}")
            bar.set_description_str(text, refresh=False)
            bar.update()
            due = step % settings.log_every == 0 or step == total
            track(record, samples if due else ())
            if due:
                left = tqdm.format_interval(record["seconds"] / step * (total - step))
                if not watched:
                    say(f"step {step}/{total}, {left} left, {text}")
                for sample in samples[:1]:
                    line = f"{last_said(sample['prompt'])} | {sample['response']}"
                    line = " ".join(line.split())
                    width = shutil.get_terminal_size().columns // (1 if line.isascii() else 2)
                    say(f"    {shorten(line, max(width - 5, 1))}")

        yield show


@contextmanager
def open_trackers(settings, done):
    """Yield a function that hands a record, and samples as a table, to all that REPORT_TO names."""
    folder, trackers = Path(settings.output_dir), {}
    parts = folder.glob("wandb/*/run-*.wandb")  # of one run, whose id they have
    ids = [path.stem.partition("-")[2] for path in parts]
    of_all = {"run_name": "train_rlhf", "name": folder.name, "config": vars(settings)}
    of_all["resume"] = "allow" if done else "never"
    options = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": done + 1},
        "wandb": of_all | {"dir": folder, "id": ids[0] if ids else None},
        "trackio": of_all,
    }

    def track(record, samples):
        texts = [each | {"prompt": last_said(each["prompt"])} for each in samples]
        for name, tracker in [*trackers.items()]:
            figures, library = {**record}, importlib.import_module(name)
            try:
                if texts and hasattr(library, "Table"):
                    data = [[*each.values()] for each in texts]
                    figures["responses"] = library.Table(columns=[*texts[0]], data=data)
                tracker.log(figures, step=record["step"])
            except Exception as error:  # for which no run has to end
                print(f"\n{name} gets no more metrics: {shorten(error)}", file=sys.stderr)
                del trackers[name]

    try:
        for name in dict.fromkeys(settings.report_to):  # each once
            trackers[name] = accelerate.tracking.LOGGER_TYPE_TO_CLASS[name](**options[name])
            try:
                with redirect_stdout(io.StringIO()):  # trackio has much to say
                    trackers[name].start()
            except Exception as error:
                problem = f"REPORT_TO is {name}: it does not start ({shorten(error)}): leave it out"
                raise RunError(problem) from error
        yield track
    finally:  # by the library's own finish, or trackio would have more to say at the very end
        for name, tracker in trackers.items():
            finish = getattr(importlib.import_module(name), "finish", tracker.finish)
            with suppress(Exception), redirect_stdout(io.StringIO()):
                finish()


def recent(metrics, name):
    """Return the mean of a metric over the last 100 samples, of the steps where it was finite."""
    last = [record for record in metrics[-100:] if record["samples"] > metrics[-1]["samples"] - 100]
    values = [record[name] for record in last if record[name] is not None]
    return sum(values) / len(values) if values else math.nan


def warnings_of(metrics, max_new_tokens):
    """Return what the user should know of the last step."""
    lines, kl, skipped_updates = [], recent(metrics, "kl"), metrics[-1]["skipped_updates"]
    if skipped_updates:
        lines.append(f"updates skipped, since their numbers were not finite: {skipped_updates}")
    if kl > max_new_tokens and not recent(metrics[:-1], "kl") > max_new_tokens:  # a nat a token
        lines.append(f"the KL has run away to {kl:.1f} nats: lower TARGET_APPROX_KL, raise KL_COEF")
    scores = [record["score"] for record in metrics]
    if len(scores) == 10 and min(scores) == max(scores):
        lines.append(f"all scores are {scores[0]:g} so far: take words or prompts that vary them")
    return lines


def progress(steps):
    """Yield the steps, with a bar on a screen where there are several."""
    return tqdm(steps, leave=False, disable=None if len(steps) > 1 else True, file=sys.stdout)


def describe_run(model, settings, metrics, tags, task="text-generation"):
    """Return what report.json says of a run, whatever was measured; tags and task as on the Hub."""
    libraries = ("torch", "transformers", "trl", "peft", "accelerate")
    samples, seconds = metrics[-1]["samples"], metrics[-1]["seconds"]
    memory = None  # the most that was held, in bytes; Windows does not tell that of a process
    if model.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    elif importlib.util.find_spec("resource"):
        resource = Library("resource")
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "task": task,
        "tags": [*tags, *["lora"] * hasattr(model, "peft_config"), "rlhf"],
        "encoder_decoder": model.config.is_encoder_decoder,
        "settings": vars(settings),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
        "device": device_name(model.device),
        "dtype": str(model.get_input_embeddings().weight.dtype)[len("torch.") :],
        "samples": samples,
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "peak_memory_mb": memory and memory / 1e6,
    }


def device_name(device):
    """Return the device in words."""
    threads = torch.get_num_threads()
    names = {"cpu": f"CPU with {threads} thread{'s' * (threads > 1)}", "mps": "Apple GPU"}
    name = names.get(device.type) or torch.cuda.get_device_name(device)
    processes = accelerate.PartialState().num_processes
    return name if processes == 1 else f"{processes} processes, each {name}"


def save_results(report, card, save, draw, folder):
    """Write model and report into a folder of their own, then move them: no file is ever torn."""
    if not is_main_process():
        return
    output, new = Path(folder), Path(folder, "checkpoint", "new")
    save(new)
    card = f"---\n{card_data(report)}\n---\n\n{card}\n![What was measured](training.png)\n"
    (new / "README.md").write_text(card, encoding="utf-8")
    (new / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(new / "training.png")
    mode = (new / "README.md").stat().st_mode  # safetensors would let nobody else read
    shutil.rmtree(output / "adapter", ignore_errors=True)  # of the model that is replaced
    for path in [path for path in new.rglob("*") if path.is_file()]:
        path.chmod(mode)
        place = output / path.relative_to(new)
        os.makedirs(place.parent, exist_ok=True)  # a tokenizer may have a folder of templates
        path.replace(place)


def card_data(report):
    """Return what the Hub reads of a model: the head of its card, in YAML."""
    name, trained, results = report["settings"]["model_name"], report["trained"], []
    parts = trained if "train_prompts" in trained else {"held_out": trained}
    for part, figures in parts.items():
        for metric, value in figures.items():
            if isinstance(value, float) and math.isfinite(value):
                what = report["task"], "unknown", part, metric, value  # of no dataset on the Hub
                results.append(huggingface_hub.EvalResult(*what, dataset_split=part))
    return huggingface_hub.ModelCardData(
        model_name=Path(report["settings"]["output_dir"]).name,
        base_model=None if os.path.isdir(name) else name,  # a folder here is nobody else's
        library_name="transformers",
        pipeline_tag=report["task"],
        tags=report["tags"],
        eval_results=results,
    )


def save_model(model, tokenizer, settings, folder):
    """Save an adapted model as an ordinary one, and its adapter alone; each with the tokenizer."""
    if getattr(model.get_base_model(), "is_quantized", False):  # 4 or 8 bits would lose the update
        adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        model = peft.get_peft_model(model.unload().dequantize(), model.peft_config["default"])
        peft.set_peft_model_state_dict(model, adapter)
    if settings.save_adapter:
        lora = model.peft_config["default"]
        lora.base_model_name_or_path = settings.model_name
        kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        lora.task_type = lora.task_type or kind
        model.save_pretrained(Path(folder, "adapter"), save_embedding_layers=False)
        Path(folder, "adapter", "README.md").unlink()  # an empty form
        tokenizer.save_pretrained(Path(folder, "adapter"))
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw(report, base_scores, metrics, path):
    """Draw the learning curve, and the score against KL under the line of what is possible."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    base, trained = report["base"]["train_prompts"], report["trained"]["train_prompts"]
    first = min(100, metrics[-1]["samples"])  # means of fewer samples are noise
    steps = [n for n in range(1, len(metrics) + 1) if metrics[n - 1]["samples"] >= first]
    score, kl = ([recent(metrics[:step], name) for step in steps] for name in ("score", "kl"))

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Learning", xlabel="samples", ylabel="mean score")
    right.set(title="What it costs", xlabel="KL against the base model (nats per response)")
    samples = [metrics[step - 1]["samples"] for step in steps]
    for axes, x in ((left, samples), (right, kl)):
        axes.plot(x, score, ".-", label="mean of the last 100 samples")
        axes.plot(0, base["score"], "ks", label="base model, measured")
    right.plot(trained["kl"], trained["score"], "*", markersize=15, label="trained model, measured")
    if trained["kl_minimum"] is not None:
        reachable = torch.linspace(base["score"], base_scores.max(), 50).tolist()
        least = [kl_minimum(each, base_scores) for each in reachable]
        right.plot(least, reachable, "k", label="least KL for a mean score")
    right.legend()
    figure.savefig(path, dpi=100)


def summarize(report, folder):
    """Return the result in Markdown, with what to try, and Python that loads the model."""
    settings, base, trained = report["settings"], report["base"], report["trained"]
    parts = [report[model][prompts] for prompts in base for model in ("base", "trained")]
    titles = ["  base", "trained", "base, held out", "trained, held out"][: len(parts)]
    lines = [f"# {Path(settings['model_name']).name}, fine-tuned with PPO", ""]
    lines += [f"| {'':21} | {' | '.join(titles)} |", "|---" * (len(parts) + 1) + "|"]
    names = ("score", "standard_error", "win_rate", "success_rate", "kl", "kl_minimum", "distinct")
    for name in (*names, "perplexity_under_base"):
        figures = ["-" if part[name] is None else f"{part[name]:z.3f}" for part in parts]
        cells = [figure.rjust(len(title)) for figure, title in zip(figures, titles)]
        lines.append(f"| {name:21} | {' | '.join(cells)} |")
    where = f"{report['samples']} samples in {report['seconds']:.0f} seconds on {report['device']}"
    lines += ["", f"{where}, seed {settings['seed']}. The first response to each prompt:", ""]
    for prompts in base:
        after = trained[prompts]["first_sample"]
        for prompt, before in list(base[prompts]["first_sample"].items())[:6]:
            texts = [" ".join(text.split()) for text in (prompt, before, after[prompt])]
            texts[0] += " (held out)" * (prompts == "eval_prompts")
            lines.append("    {}\n        before  {}\n        after   {}".format(*texts))

    before, after = parts[:2]
    advice = ""
    if not report["close_to_base"]:
        advice = "\nLittle is left of it: lower LEARNING_RATE, TARGET_APPROX_KL or raise KL_COEF."
    elif before["standard_error"] == after["standard_error"] == 0:
        advice = "\nAll responses score the same: try words or prompts with which some are better."
    elif not report["learned"]:
        advice = "\nBeyond chance this run did not learn: raise TRAINING_EPOCHS or lower KL_COEF."
    scores = [f"{part['score']:+z.2f} ± {part['standard_error']:.2f}" for part in (before, after)]
    rates = [part["success_rate"] for part in (before, after)]
    success = "" if None in rates else f" Success: {rates[0]:.1%} before, {rates[1]:.1%} after."
    accuracy = report["scale"].get("accuracy")
    if accuracy is not None:
        advice += f"\nThe reward model, which says so, agrees with {accuracy:.0%} of held-out comparisons."
    prompt = next(iter(before["first_sample"]))
    asked = [{"role": "user", "content": prompt}] if report["chat"] else prompt
    load = "    from transformers import pipeline\n\n"
    load += f'    print(pipeline("text-generation", {folder!r})({asked!r}))'
    if report["encoder_decoder"]:  # for which there is no pipeline
        load = "    from transformers import AutoModelForSeq2SeqLM\n\n"
        load += f"    model = AutoModelForSeq2SeqLM.from_pretrained({folder!r})"
    lines.append(f"""
Score: {scores[0]} before, {scores[1]} after, a win rate of {after["win_rate"]:.0%},
at {after["kl"]:z.1f} nats from the base model.{success}{advice}

The model is beside report.json and training.png. To load it:

{load}
""")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- main
def silence_libraries():
    """Keep what pinned libraries say of themselves off the screen, by name, and nothing else."""
    noise = "`PPO(Config|Trainer)` is dep|No dataset is|.*is_gradient_checkpointing|fan_in_fan_out"
    noise += "|IProgress|Reserved keys|Merge lora"  # of tqdm in a notebook, trackio, 4 bits
    noise += "|The following (rank|alpha)_pattern"  # of experts, which PEFT adapts all the same
    warnings.filterwarnings("ignore", message=noise)
    wrong = ".*tied layer is part of the adapter|Found missing adapter keys"  # can't be merged
    warnings.filterwarnings("error", message=wrong)
    transformers.logging.disable_progress_bar()  # of loading weights
    for library in ("bitsandbytes", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # of WANDB_MODE=offline
        importlib.import_module("transformers.integrations.integration_utils")


def launch(run, argv, constants, rules, checks):
    """Do a run with the constants, overridden by flags in argv; return the exit status."""
    with suppress(AttributeError):  # in a notebook, which shows everything anyway
        sys.stdout.reconfigure(errors="replace")  # a model may say what the screen can't show
    sys.set_int_max_str_digits(0)  # so that a number of any length can be shown, shortened
    settings = None
    try:
        with stop_on_signal():
            settings = read_settings(argv, constants, rules, checks)
            silence_libraries()
            with nullcontext() if is_main_process() else redirect_stdout(io.StringIO()):
                run(settings)
            print(end="", flush=True)  # where the output can't be written, it is told here
        return 0
    except (Stopped, Exception) as error:
        if not is_main_process():  # which tells first: a launcher ends all with one
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(8)
        if isinstance(error, SettingsError):
            print("Nothing was started or changed:", *error.args, sep="\n- ", file=sys.stderr)
            return 2
        stopped = isinstance(error, Stopped)
        reason = "by a signal" if stopped else settings and explain(error, settings)
        if not reason:
            raise
        saved = getattr(error, "__notes__", ["there was nothing to save yet"])[0]
        print(f"\nStopped: {reason}; {saved}", file=sys.stderr)
        return 128 + error.args[0] if stopped else 1


def main(argv=()):
    """Train with PPO, by the constants above, overridden by flags in argv; return the exit status."""
    return launch(run, argv, globals(), RULES, CHECKS)


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__main__":  # in a cell of a notebook
    main()
