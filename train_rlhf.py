"""Fine-tune a language model with PPO so that it says positive things, and show that it learned.

    python train_rlhf.py                            # TinyLlama-1.1B-Chat, with the constants below
    python train_rlhf.py --model-name demo_model    # the small model beside this file: offline
    python train_rlhf.py --help                     # every constant is also a flag

Read it from top to bottom, as the data flows: constants, run, policy, rollout, reward, PPO step.
"""

import difflib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import sys
import textwrap
import time
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace


def missing_quotes(kind, error, trace):
    """Tell in one line of a constant that lacks its quotes, as in DEVICE = cpu."""
    where = traceback.extract_tb(trace)[-1]
    if kind is NameError and (where.filename, where.name) == (__file__, "<module>"):
        line = where.line.partition("#")[0].strip()
        print(f'{line}: give "{error.name}", in quotes', file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


if __name__ == "__main__" and "__file__" in globals():  # a script, not a cell of a notebook
    sys.excepthook = missing_quotes
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds: no stack trace there
for library in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(library).setLevel(logging.ERROR)  # here, since one speaks when it is imported

import numpy
import psutil
import torch
import transformers
from accelerate.tracking import TensorBoardTracker
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import masked_mean

# --- Model
MODEL_NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # a name on the Hub, or a local folder
OUTPUT_DIR = "trained_model"  # all that a run leaves; an earlier run there is moved aside
LORA_RANK = 16  # rank of the update of each adapted layer; less saves memory, more can express more
LORA_ALPHA = 32  # the update is multiplied by LORA_ALPHA / LORA_RANK
LORA_TARGETS = ["all-linear"]  # layers to adapt, by name; all-linear = all but the output head
QUANTIZATION = "none"  # 8bit or 4bit keep the frozen weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda or cpu; auto = cuda where there is one
DTYPE = "auto"  # float32, bfloat16 or float16 weights; auto = float32 on a CPU, 16 bits on a GPU

# --- Prompts and reward
PROMPTS = [  # beginnings to continue, in turn; a .txt or .jsonl file stands for its prompts
    "I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling",
]  # fmt: skip
EVAL_PROMPTS = [  # never trained on, but measured, to see what carries over; [] = not measured
    "Right now I am", "My day was", "It makes me feel", "Tonight I feel", "Everything seems",
    "I woke up feeling",
]  # fmt: skip
POSITIVE_WORDS = [  # a response with one of these whole words, in any case, scores +1, else -1
    "happy", "glad", "good", "great", "smile", "joy", "love", "wonderful", "amazing", "excited",
    "pleased", "delighted", "cheerful", "grateful", "blessed", "fantastic",
]  # fmt: skip
SCORE_PREFIXES = True  # a token earns what it adds to the score; False = the last gets it all
REWARD = "positive_word_reward"  # or FILE.py:FUNCTION, from a response's text to its score

# --- Rollout
TRAINING_EPOCHS = 150  # passes over PROMPTS; 150 passes over 6 prompts are 900 samples
BATCH_SIZE = 10  # responses sampled for one PPO step; more is steadier but slower to react
MAX_NEW_TOKENS = 10  # length of a response in tokens, at most
TEMPERATURE = 1.0  # divides the logits of policy and base model everywhere; 1.0 = as they are

# --- PPO
LEARNING_RATE = 3e-4  # of the first step; the later ones follow TARGET_APPROX_KL
TARGET_APPROX_KL = 0.0025  # nats per token of a step, falling to 0; 0 = LEARNING_RATE stays
PPO_EPOCHS = 4  # passes over a batch; 1 = every sample is used once (needs TARGET_APPROX_KL 0)
MINI_BATCH_SIZE = 0  # responses in one update, a divisor of BATCH_SIZE; less saves memory; 0 = all
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
LOG_EVERY = 5  # steps between two lines of progress where the output is no terminal
SAVE_EVERY = 10  # steps between two checkpoints; 0 = only where the run ends or is stopped
RESUME = False  # go on from the checkpoint in OUTPUT_DIR
REPORT_TO = "none"  # tensorboard = the metrics there too (pip install it); none = off


# ----------------------------------------------------------------------------------------- the run
def run(settings):
    """Do the whole run: load, train with PPO, measure before and after, save, show."""
    reward = load_reward(settings.reward, settings.positive_words, settings.prompts[0])
    device, dtype = pick_device(settings.device, settings.dtype)
    remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model(settings.model_name)
        tokenizer = load_tokenizer(path)
        check_length(path, tokenizer, settings)
        model = load_base_model(path, device, dtype, settings.quantization)
    policy = make_policy(model, tokenizer, settings)
    trainer = make_trainer(policy, tokenizer, settings, device, dtype)

    with claim_output(settings.output_dir, settings.resume):
        learner = trainer.model, trainer.optimizer, trainer.accelerator.scaler
        metrics = []
        if settings.resume:
            metrics = load_checkpoint(*learner, settings, RULES, count_steps(settings))
        announce(policy, settings, device, dtype, metrics)
        train(trainer, tokenizer, reward, settings, metrics)
        report = make_report(trainer, tokenizer, reward, settings, metrics, device, dtype)
        save_results(policy, tokenizer, report, metrics, settings.output_dir)
    print(summarize(report, os.path.join(".", settings.output_dir)))


def train(trainer, tokenizer, reward, settings, metrics):
    """Take PPO steps until the samples are used up; append the record of each to metrics."""
    total_steps = count_steps(settings)
    learner = trainer.model, trainer.optimizer, trainer.accelerator.scaler
    try:
        with stop_on_signal(after_step=True) as stop, open_log(settings, metrics) as log:
            for step in range(len(metrics) + 1, total_steps + 1):
                set_seeds(settings.seed, step)
                prompts = prompts_of_step(step, settings.prompts, settings.batch_size)
                queries, responses, texts = rollout(trainer.model, tokenizer, prompts)
                scores = score_responses(reward, prompts, texts)
                sampled = zip(prompts, queries, responses, scores)
                token_scores = score_tokens(reward, tokenizer, sampled, settings.score_prefixes)
                stats = trainer.step(queries, responses, token_scores)
                metrics.append(make_record(step, texts, scores, stats, settings))
                log(metrics)
                give_up_on_bad_numbers(metrics)
                set_learning_rate(trainer.optimizer, metrics, total_steps, settings)
                stopping = stop.requested
                if stopping or is_checkpoint_due(metrics, total_steps, settings.save_every):
                    save_checkpoint(*learner, settings, metrics)
                if stopping:
                    break
    except RewardError:
        save_checkpoint(*learner, settings, metrics)  # the steps before it are worth keeping
        raise


def set_learning_rate(optimizer, metrics, total_steps, settings):
    """Set the rate with which the next step moves as far as its target, in nats per token.

    The target falls from TARGET_APPROX_KL to 0 as (1 - progress)^3: large steps early, to get there,
    and ever finer ones later, since the noise of the last steps stays in the result.
    """
    if settings.target_approx_kl > 0:
        target = settings.target_approx_kl * (1 - len(metrics) / total_steps) ** 3
        for group in optimizer.param_groups:
            group["lr"] = adapt_learning_rate(group["lr"], metrics[-1]["approx_kl"], target)


def adapt_learning_rate(learning_rate, approx_kl, target, limit=1.5):
    """Return the rate with which the last step would have moved as far as the target.

    The rates that suit small and large models differ by orders of magnitude, the nats that a step
    moves do not. The nats grow with the square of the rate. From step to step the rate changes by
    the factor `limit` at most. An approx_kl of None was not finite: it counts as far too much.
    """
    factor = 0 if approx_kl is None else math.sqrt(target / max(approx_kl, 1e-12))
    return learning_rate * min(max(factor, 1 / limit), limit)


# -------------------------------------------------------------------------------------- the policy
class PolicyWithValueHead(AutoModelForCausalLMWithValueHead):
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

    def forward(self, input_ids, attention_mask, earned):
        """Return the logits that each response token was drawn from, and the value before it.

        input_ids, attention_mask: (batch, query length + response length), as from pad_batch.
        earned: (batch, response length), the sum of the scores of the tokens before each one. A
        value is what is still to come, which depends on that: it is a linear function of it, with
        both of its coefficients from the value head.
        Returns float32 logits (batch, response length, vocabulary), divided by TEMPERATURE as in
        sampling, and values (batch, response length).
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_positions:
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding has none
        logits, _, values = super().forward(**inputs)
        before = slice(-earned.shape[1] - 1, -1)  # a token is drawn where the one before it stands
        values = values[:, before]
        return logits[:, before] / self.temperature, values[..., 0] + values[..., 1] * earned


def make_policy(model, tokenizer, settings):
    """Add a LoRA adapter and a value head to the base model, both float32; set how it samples."""
    # PPO needs the logprobs of the very distribution that is sampled: no top-k, penalty, minimum.
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    targets = settings.lora_targets
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        lora_dropout=0.0,  # dropout would change the ratio of a policy to itself
    )
    torch.manual_seed(settings.seed)  # of the adapter's first values
    with blame("LORA_TARGETS", targets, "name linear layers of this model, or all-linear"):
        adapted = get_peft_model(model, lora)
        names = adapted.base_model.targeted_module_names
        unknown = [target for target in targets if not any(target in name for name in names)]
        if unknown and targets != ["all-linear"]:  # PEFT says so only where no name is known
            raise ValueError(f"the model has no layer {unknown}")
    return PolicyWithValueHead(adapted, settings.temperature).to(model.device).eval()


# ------------------------------------------------------------------------------------- the rollout
def prompts_of_step(step, prompts, batch_size):
    """Return the next batch_size prompts, in turn; steps count from 1."""
    first = (step - 1) * batch_size
    return [prompts[index % len(prompts)] for index in range(first, first + batch_size)]


def rollout(policy, tokenizer, prompts):
    """Sample a response to each prompt.

    Returns queries and responses, lists of 1-D tensors of token ids, and the responses' texts.
    """
    device = policy.pretrained_model.device
    queries = [torch.tensor(tokenizer(prompt)["input_ids"], device=device) for prompt in prompts]
    responses = generate(policy.pretrained_model, tokenizer, queries)
    texts = [response_text(tokenizer, *pair) for pair in zip(queries, responses)]
    return queries, responses, texts


@torch.no_grad()
def generate(model, tokenizer, queries):
    """Sample one response to each query, all at once: 1-D tensors up to the first end token."""
    batch = tokenizer.pad({"input_ids": queries}, padding_side="left", return_tensors="pt")
    # Logits that are not finite become finite here; they end in a skipped update.
    sequences = model.generate(**batch.to(model.device), remove_invalid_values=True)
    end_ids = torch.tensor(model.generation_config.eos_token_id, device=model.device)  # or several
    responses = []
    for row in sequences[:, batch["input_ids"].shape[1] :]:  # without the query, which is no action
        ends = torch.isin(row, end_ids).nonzero()
        responses.append(row[: ends[0, 0] + 1] if len(ends) else row)
    return responses


def response_text(tokenizer, query, response):
    """Return the text that the response adds to the query's, with the space before it, if any."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    both = tokenizer.decode([*query.tolist(), *response.tolist()], **options)
    return both[len(tokenizer.decode(query, **options)) :]


def pad_batch(tokenizer, queries, responses):
    """Put the queries, padded on the left, before the responses, padded on the right.

    So the responses stand in the same columns. Returns input_ids and attention_mask by name, both
    (batch, query length + response length), and the mask of the response tokens (batch, response
    length).
    """
    device = queries[0].device  # which pad does not keep
    left = tokenizer.pad({"input_ids": queries}, padding_side="left", return_tensors="pt")
    right = tokenizer.pad({"input_ids": responses}, padding_side="right", return_tensors="pt")
    inputs = {name: torch.cat([left[name], right[name]], dim=1).to(device) for name in left}
    return inputs, right["attention_mask"].to(device)


# -------------------------------------------------------------------------------------- the reward
def positive_word_reward(text, positive_words=None):
    """Return +1.0 if the text has one of the words (None = POSITIVE_WORDS), whole, else -1.0."""
    words = POSITIVE_WORDS if positive_words is None else positive_words
    pattern = "|".join(re.escape(word.strip()) for word in words)
    return 1.0 if re.search(rf"(?<!\w)({pattern})(?!\w)", text, re.IGNORECASE) else -1.0


def score_responses(reward, prompts, texts):
    """Return the score of each response, a list of floats: what the reward says of its text.

    Letters that only prolong the prompt's last word are left out: they are no word of their own.
    """
    scores = []
    for prompt, text in zip(prompts, texts):
        if prompt[-1].isalnum():
            text = re.sub(r"^\w+", "", text, flags=re.ASCII)  # not of scripts without spaces
        scores.append(call_reward(reward, text))
    return scores


def score_tokens(reward, tokenizer, sampled, score_prefixes):
    """Return what each token of each response earns, 1-D tensors as long as the responses.

    sampled: (prompt, query, response, score) of each response. With score_prefixes a token earns
    what it adds to the score of the text so far, so the reward is asked about every beginning, the
    empty one too. It all sums up to the response's score less that of the empty text, so the best
    policy stays the best: potential-based shaping (Ng, Harada and Russell 1999), exact for GAMMA 1.
    Without score_prefixes the last token earns the whole score.
    """
    token_scores = []
    for prompt, query, response, score in sampled:
        before = torch.zeros(len(response))
        if score_prefixes:
            ends = range(len(response))
            prefixes = [response_text(tokenizer, query, response[:end]) for end in ends]
            before = torch.tensor(score_responses(reward, [prompt] * len(prefixes), prefixes))
        after = torch.cat([before[1:], torch.tensor([score])])
        token_scores.append(after - before)
    return token_scores


# ------------------------------------------------------------------------------------ the PPO step
class ExactKLTrainer(PPOTrainer):
    """TRL's PPOTrainer, its step written out, with exact KLs and a score for each token.

    The KL against the base model is summed over the whole vocabulary at each position t,
    KL_t = sum_v p(v) ln(p(v) / p_ref(v)), where ln(p / p_ref) of the sampled token is usual: the
    same mean with far less noise. But it does not depend on the token sampled at t, so a reward
    that has it can't teach the policy to lower KL_t itself. The gradient of KL_t therefore joins
    the loss: of a reward that depends on the parameters, grad E[R] = E[R grad ln p] + E[grad R],
    where PPO's clipped loss is the first term.
    """

    def step(self, queries, responses, token_scores):
        """Improve the policy with one batch of responses; return the step's metrics as floats.

        queries, responses: lists of 1-D tensors of token ids. token_scores: what each token of each
        response earns, 1-D float tensors. Below, tensors are (batch, response length), and those
        that begin with all_ have the vocabulary as a third dimension.
        """
        config = self.config
        kl_coef = self.kl_ctl.value  # which stays as it is
        inputs, mask = pad_batch(self.tokenizer, queries, responses)
        tokens = inputs["input_ids"][:, -mask.shape[1] :]
        token_scores = pad_sequence(token_scores, batch_first=True).to(mask.device)
        inputs["earned"] = token_scores.cumsum(1) - token_scores  # before each token

        # The policy that sampled, and the base model: the same network with its adapter off.
        all_logprobs, values = self.forward_pass(inputs)
        with self.optional_peft_ctx():
            all_ref_logprobs, _ = self.forward_pass(inputs)
        logprobs = of_tokens(all_logprobs, tokens)

        # Rewards: the scores less the price of KL(policy || base model). TRL's _kl_penalty is the
        # KL(first || second) of its arguments.
        kl = self._kl_penalty(all_logprobs, all_ref_logprobs) * mask
        rewards = token_scores - kl_coef * kl

        # Advantages and returns, by TRL's GAE. TRL whitens its advantages, which would blow up the
        # noise of a batch of like scores; those here stay in units of the score.
        values, _whitened, returns = self.compute_advantages(values, rewards, mask)
        advantages = (returns - values) * mask

        updates, skipped_updates = [], 0
        scaler = self.accelerator.scaler  # of the loss, for float16; else None
        max_norm = config.max_grad_norm or math.inf
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for _ in range(config.ppo_epochs):
            order = numpy.random.permutation(config.batch_size)
            for rows in numpy.split(order, config.batch_size // config.mini_batch_size):
                logits, new_values = self.model(**{name: inputs[name][rows] for name in inputs})
                all_new_logprobs = torch.log_softmax(logits, dim=-1)

                # TRL's clipped losses, means per token; the value loss has its VF_COEF already.
                policy_loss, value_loss, stats = self.loss(
                    old_logprobs=logprobs[rows],
                    values=values[rows],
                    logits=logits,
                    vpreds=new_values,
                    logprobs=of_tokens(all_new_logprobs, tokens[rows]),
                    mask=mask[rows],
                    advantages=advantages[rows],
                    returns=returns[rows],
                )
                new_kl = self._kl_penalty(all_new_logprobs, all_ref_logprobs[rows])
                loss = policy_loss + kl_coef * masked_mean(new_kl, mask[rows]) + value_loss

                # An update whose loss or gradient is not finite is skipped: nothing moves. float16's
                # scaler must be asked all the same. It leaves out an update with bad gradients by
                # itself and lowers its scale; that is its way to find one, so it is not counted.
                self.accelerator.backward(loss)
                norm = self.accelerator.clip_grad_norm_(parameters, max_norm)
                finite = loss.isfinite() & norm.isfinite()
                if finite or scaler:
                    self.optimizer.step()
                self.optimizer.zero_grad()
                skipped_updates += int(not (loss.isfinite() if scaler else finite))

                step_kl = self._kl_penalty(all_logprobs[rows], all_new_logprobs.detach())
                update = {
                    "policy_loss": stats["loss/policy"],
                    "value_loss": stats["loss/value"],
                    "approx_kl": masked_mean(step_kl, mask[rows]),  # what earlier updates moved
                    "clip_fraction": stats["policy/clipfrac"],
                    "entropy": stats["policy/entropy"],
                }
                updates.append(update)
        means = {}
        for name in updates[0]:
            means[name] = torch.stack([update[name] for update in updates]).mean().item()
        return {
            "kl": kl.sum(1).mean().item(),  # nats per response, of the policy that sampled
            "kl_coef": kl_coef,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **means,
            "skipped_updates": skipped_updates,
        }

    @torch.no_grad()
    def forward_pass(self, inputs):
        """Return all_logprobs and values of a batch, MINI_BATCH_SIZE rows at a time."""
        size, parts = self.config.mini_batch_size, []
        for start in range(0, len(inputs["input_ids"]), size):
            rows = slice(start, start + size)
            parts.append(self.model(**{name: inputs[name][rows] for name in inputs}))
        logits, values = (torch.cat(tensors) for tensors in zip(*parts))
        return torch.log_softmax(logits, dim=-1), values


def of_tokens(all_logprobs, tokens):
    """Return the logprobs of the given tokens, (batch, length), out of those of all tokens."""
    return all_logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def make_trainer(policy, tokenizer, settings, device, dtype):
    """Return the trainer; its optimizer, TRL's Adam, holds the adapter and the value head alone."""
    precision = "fp16" if dtype == "float16" else "no"  # scales the loss, or gradients vanish
    config = PPOConfig(
        seed=settings.seed,
        batch_size=settings.batch_size,
        mini_batch_size=settings.mini_batch_size or settings.batch_size,
        ppo_epochs=settings.ppo_epochs,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        cliprange=settings.clip_range,
        cliprange_value=settings.value_clip_range,
        vf_coef=settings.vf_coef,
        gamma=settings.gamma,
        lam=settings.lam,
        init_kl_coef=settings.kl_coef,
        adap_kl_ctrl=False,  # TRL's controller takes some 10,000 samples to act
        kl_penalty="full",  # the exact KL
        accelerator_kwargs={"cpu": device == "cpu", "mixed_precision": precision},
    )
    return ExactKLTrainer(config, policy, ref_model=None, tokenizer=tokenizer)


# =================================================================== nothing below this line is PPO
# --------------------------------------------------------------------------------- the measurement
def make_report(trainer, tokenizer, reward, settings, metrics, device, dtype):
    """Measure base and trained model alike on both sets of prompts; return the report.json."""
    print(f"\nMeasuring before and after, {settings.eval_samples} samples each time", flush=True)
    base, trained = {}, {}
    sets = {"train_prompts": settings.prompts}
    if settings.eval_prompts:
        sets["eval_prompts"] = settings.eval_prompts
    for name, prompts in sets.items():
        for measured, context in ((base, trainer.optional_peft_ctx), (trained, nullcontext)):
            set_seeds(settings.seed, prompts)  # the same random numbers before and after
            with context():
                measured[name] = measure(trainer, tokenizer, prompts, reward, settings)
            rates = measured[name]["success_rate"], base[name]["success_rate"]
            measured[name]["kl_minimum"] = kl_minimum(*rates, base[name]["samples"])
    before, after = base["train_prompts"], trained["train_prompts"]
    mean = (before["success_rate"] + after["success_rate"]) / 2
    standard_error = math.sqrt(2 * mean * (1 - mean) / before["samples"])  # were both the mean
    libraries = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "settings": vars(settings),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
        "device": device_name(device),
        "dtype": dtype,
        "learned": after["success_rate"] - before["success_rate"] > 3 * standard_error,
        "close_to_base": after["kl"] <= settings.max_new_tokens,  # a nat per token
        "base": base,
        "trained": trained,
        "samples": metrics[-1]["samples"],
        "seconds": metrics[-1]["seconds"],
        "samples_per_second": metrics[-1]["samples"] / metrics[-1]["seconds"],
        "peak_memory_mb": peak_memory_mb(device),
    }


def measure(trainer, tokenizer, prompts, reward, settings):
    """Return the figures of the model as it is, on at least EVAL_SAMPLES fresh responses."""
    prompts = prompts[:: math.ceil(len(prompts) / settings.eval_samples)]  # of many, some
    each = math.ceil(settings.eval_samples / len(prompts))
    asked = [prompt for prompt in prompts for _ in range(each)]
    texts, scores, kls, ref_logprobs, tokens = [], [], [], [], 0
    starts = range(0, len(asked), settings.eval_batch_size)
    for start in tqdm(starts, leave=False, disable=not is_terminal()):
        batch = asked[start : start + settings.eval_batch_size]
        queries, responses, batch_texts = rollout(trainer.model, tokenizer, batch)
        kl, ref_logprob = compare_with_base(trainer, queries, responses)
        texts += batch_texts
        scores += score_responses(reward, batch, batch_texts)
        kls += kl.tolist()
        ref_logprobs += ref_logprob.tolist()
        tokens += sum(map(len, responses))
    if not math.isfinite(sum(kls)):
        remedy = "set DTYPE to float32, or lower TARGET_APPROX_KL"
        raise RunError(f"what was measured is not finite: {remedy}")
    return {
        "samples": len(texts),
        "success_rate": success_rate(scores),
        "score": sum(scores) / len(scores),
        "kl": sum(kls) / len(kls),
        "distinct": len(set(texts)) / len(texts),
        "perplexity_under_base": math.exp(min(-sum(ref_logprobs) / tokens, 700)),  # no overflow
        "first_sample": dict(zip(prompts, texts[::each])),
    }


def compare_with_base(trainer, queries, responses):
    """Return each response's KL(model || base model) in nats and base logprob, both (batch,)."""
    inputs, mask = pad_batch(trainer.tokenizer, queries, responses)
    inputs["earned"] = torch.zeros_like(mask)  # on which the values alone depend
    all_logprobs, _ = trainer.forward_pass(inputs)
    with trainer.optional_peft_ctx():
        all_ref_logprobs, _ = trainer.forward_pass(inputs)
    kl = trainer._kl_penalty(all_logprobs, all_ref_logprobs)
    ref_logprobs = of_tokens(all_ref_logprobs, inputs["input_ids"][:, -mask.shape[1] :])
    return (kl * mask).sum(1), (ref_logprobs * mask).sum(1)


def success_rate(scores):
    """Return the share of scores above 0."""
    return sum(score > 0 for score in scores) / len(scores)


def kl_minimum(rate, base_rate, samples=math.inf):
    """Return the least KL in nats that takes a base model from base_rate of success to rate.

    p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0)): no less by the data processing inequality, and
    reached by the base model with the odds of success changed and nothing else. Rates of so many
    samples can't tell how near to 0 or 1 they are, so they are kept half a sample away.
    """
    margin = 0.5 / samples
    p, p0 = (min(max(each, margin), 1 - margin) for each in (rate, base_rate))
    return sum(q * math.log(q / q0) for q, q0 in ((p, p0), (1 - p, 1 - p0)) if q > 0)


# ------------------------------------------------------------------------- steps, records, rewards
def count_steps(settings):
    """Return how many batches TRAINING_EPOCHS passes over PROMPTS take; the last is filled up."""
    return math.ceil(settings.training_epochs * len(settings.prompts) / settings.batch_size)


def set_seeds(*purpose):
    """Let the random numbers that follow depend on their purpose alone, whatever was drawn before.

    So a run that goes on needs no old random states, and both models of a measurement draw alike.
    """
    seed = zlib.crc32(repr(purpose).encode())
    torch.manual_seed(seed)
    numpy.random.seed(seed)  # which shuffles the batch


def make_record(step, texts, scores, stats, settings):
    """Return the line of metrics.jsonl for a step; what is not finite becomes None, JSON's null."""
    samples, score = step * settings.batch_size, sum(scores) / len(scores)
    record = {
        "step": step,
        "samples": samples,
        "epoch": samples / len(settings.prompts),
        "success_rate": success_rate(scores),
        "score": score,
        "reward": score - stats["kl_coef"] * stats["kl"],
        **stats,
        "distinct": len(set(texts)) / len(texts),
    }
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def is_checkpoint_due(metrics, total_steps, save_every):
    """Return whether to save: every few steps, but not after a bad one, and at the end."""
    step = len(metrics)
    due = save_every > 0 and step % save_every == 0 and not metrics[-1]["skipped_updates"]
    return due or step == total_steps


def give_up_on_bad_numbers(metrics):
    """Raise RunError where each of the last three steps had updates that were skipped."""
    if len(metrics) >= 3 and all(record["skipped_updates"] for record in metrics[-3:]):
        remedy = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or DTYPE float32"
        raise RunError(f"three steps in a row had updates that are not finite: {remedy}")


def load_reward(name, positive_words, example):
    """Return the function from a response's text to its score, once it has scored an example."""
    if name == "positive_word_reward":
        return lambda text: positive_word_reward(text, positive_words)
    remedy = "give positive_word_reward or FILE.py:FUNCTION"
    if not re.fullmatch(r".+\.py:\w+", name):
        raise SettingsError(f"REWARD is {shorten(name)}: {remedy}")
    with blame("REWARD", name, remedy):
        path, _, function_name = name.rpartition(":")
        function = runpy.run_path(path).get(function_name)
        if not callable(function):
            raise ValueError(f"it has no function {function_name}")
    try:
        for text in (example, ""):  # every response begins with the empty text
            call_reward(function, text)
    except RewardError as error:
        raise SettingsError(str(error)) from error
    return function


def call_reward(reward, text):
    """Return the score that the reward function, which is the user's, gives a text, as a float."""
    try:
        score = float(reward(text))
        if not abs(score) < 1e15:  # so that its square is finite in float32 too
            raise ValueError(f"{score} is too large or not finite")
        return score
    except (Exception, SystemExit) as error:
        name = getattr(reward, "__name__", type(reward).__name__)
        problem = f"{shorten(repr(error), 200)} for {text!r}"
        remedy = "let it return one finite number for one text"
        raise RewardError(f"REWARD is {name}: {problem}: {remedy}") from error


# ------------------------------------------------------------------------------------ the settings
class SettingsError(Exception):
    """Settings or input that can't work; each problem names a setting, its value and the remedy."""

    def __init__(self, *problems):
        self.problems = problems
        lines = ["Nothing was started or changed:", *(f"- {problem}" for problem in problems)]
        super().__init__("\n".join(lines))


RULES = [  # what a constant takes, within what, whether --resume may change it, and its name
    ("text", (), False, "MODEL_NAME REWARD"),
    ("text", (), True, "OUTPUT_DIR"),
    ("text", ("none", "8bit", "4bit"), False, "QUANTIZATION"),
    ("text", ("auto", "cpu", "cuda"), True, "DEVICE"),
    ("text", ("auto", "float32", "bfloat16", "float16"), False, "DTYPE"),
    ("text", ("none", "tensorboard"), True, "REPORT_TO"),
    ("texts", 1, False, "LORA_TARGETS POSITIVE_WORDS"),
    ("prompts", 1, False, "PROMPTS"),
    ("prompts", 0, True, "EVAL_PROMPTS"),
    ("switch", None, False, "SCORE_PREFIXES"),
    ("switch", None, True, "RESUME"),
    ("whole", (1, 10**6), False, "LORA_RANK LORA_ALPHA BATCH_SIZE MAX_NEW_TOKENS PPO_EPOCHS"),
    ("whole", (1, 10**6), True, "TRAINING_EPOCHS EVAL_SAMPLES EVAL_BATCH_SIZE LOG_EVERY"),
    ("whole", (0, 10**6), True, "MINI_BATCH_SIZE SAVE_EVERY"),
    ("whole", (0, 2**32 - 1), False, "SEED"),
    ("number", (1e-30, 1e30), False, "LEARNING_RATE"),  # float32 holds these, and their products
    ("number", (0, 1e30), False, "KL_COEF VF_COEF"),
    ("number", (0, 1e30), True, "TARGET_APPROX_KL MAX_GRAD_NORM"),
    ("number", (0.01, 100), False, "TEMPERATURE"),
    ("number", (1e-6, 1000), False, "CLIP_RANGE VALUE_CLIP_RANGE"),
    ("number", (0, 1), False, "GAMMA LAM"),
]


def convert(value, kind, allowed):
    """Return a value as its kind, within what is allowed, or raise whatever is in the way.

    A text may stand for a number, a path or function for a text, one text for a list of one.
    """
    if kind == "switch":
        return {"true": True, "false": False}[str(value).lower()]
    if kind in ("texts", "prompts"):
        several = value if isinstance(value, list | tuple) else [value]
        texts = [convert(entry, "text", ()) for entry in several]
        if len(texts) < allowed:
            raise ValueError
        return texts if kind == "texts" else [p for text in texts for p in read_prompts(text)]
    if kind == "text":
        text = value.__name__ if inspect.isfunction(value) else os.fspath(value)
        text.encode()  # an error for half a character, as "\ud800"
        if not text.strip() or "\0" in text or (allowed and text not in allowed):
            raise ValueError
        return text
    number = float(value)
    if isinstance(value, bool) or not allowed[0] <= number <= allowed[1]:
        raise ValueError
    if kind == "whole" and number != int(number):
        raise ValueError
    return int(number) if kind == "whole" else number


def describe(kind, allowed):
    """Return what convert takes, in words."""
    if kind in ("number", "whole"):
        return f"a {'whole ' * (kind == 'whole')}number from {allowed[0]} to {allowed[1]}"
    if kind == "text" and allowed:
        return f"{', '.join(allowed[:-1])} or {allowed[-1]}"
    return {"switch": "True or False", "text": "a text"}.get(kind, "a list of texts, none empty")


def read_settings(argv, constants, rules, checks):
    """Return a script's constants, overridden by the flags in argv, as a namespace.

    constants: the script's global names. rules: as RULES. checks: functions whose arguments are
    settings; one that uses a setting that is wrong by itself is left out.
    Raises SettingsError with all problems at once.
    """
    given, problems = read_flags(argv, constants, rules)
    settings = {}
    for kind, allowed, _, names in rules:
        for name in names.split():
            value = given.get(name, constants.get(name))
            try:
                settings[name.lower()] = convert(value, kind, allowed)
            except SettingsError as error:  # of a file
                problems += [f"{name}: {problem}" for problem in error.problems]
            except Exception:  # whatever an object may raise when it is converted
                problems.append(f"{name} is {shorten(value)}: give {describe(kind, allowed)}")
    for check in checks:
        names = inspect.signature(check).parameters
        if settings.keys() >= names.keys():
            problems += check(*(settings[name] for name in names))
    if problems:
        raise SettingsError(*problems)
    return SimpleNamespace(**settings)


def read_flags(argv, constants, rules):
    """Return {constant: value} of the flags in argv, and a list of problems; --help ends here."""
    if "--help" in argv or "-h" in argv:
        print(explain_flags(constants))
        sys.exit(0)
    kinds = {name: kind for kind, _, _, names in rules for name in names.split()}
    given, problems = {}, []
    values = strays = []
    for argument in argv:
        if not argument.startswith("--"):
            values.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_").upper()
        values = [value] if equals else []
        if name in kinds:
            given[name] = values
        elif kinds.get(name.removeprefix("NO_")) == "switch" and not equals:
            values.append("false")
            given[name.removeprefix("NO_")] = values
        else:
            problems.append(near_miss(flag, [flag_of(name) for name in kinds]))
    for name, values in given.items():
        if kinds[name] == "switch" and not values:
            given[name] = True
        elif kinds[name] not in ("texts", "prompts") and len(values) == 1:
            given[name] = values[0]
    strays = [f"{shorten(text)} follows no flag: --help lists all" for text in strays]
    return given, strays + problems


def explain_flags(constants):
    """Return the text of --help: the constants as they stand in the script, by their flags."""
    source = ""
    if os.path.isfile(constants.get("__file__", "")):  # there is none in a cell of a notebook
        source = Path(constants["__file__"]).read_text(encoding="utf-8")
    start = re.search(r"^# --- |^[A-Z_]+ *[:=]|\Z", source, re.M).start()
    block = source[start : source.find("\n# -----", start)].replace("  # fmt: skip", "")
    flags = re.sub("^[A-Z_]+", lambda name: flag_of(name[0]), block, flags=re.M)
    script = Path(sys.argv[0]).name
    return f"usage: {script} [--flag VALUE …]    (for this run, in place of a constant)\n\n{flags}"


def flag_of(name):
    """Return the flag of a constant: --learning-rate for LEARNING_RATE."""
    return "--" + name.lower().replace("_", "-")


def near_miss(given, flags):
    """Return the problem with an unknown flag, and those that may have been meant."""
    given = given.replace("_", "-")
    words = set(given[2:].split("-"))  # --epochs is in --ppo-epochs, --lr short for --learning-rate
    meant = [flag for flag in flags if words < set(flag[2:].split("-"))]
    meant += [flag for flag in flags if given == "--" + "".join(re.findall(r"-(\w)", flag))]
    meant = meant or difflib.get_close_matches(given, flags, n=1)
    hint = f"did you mean {' or '.join(meant)}?" if meant else "--help lists all"
    return f"{shorten(given)}: there is no such flag; {hint}"


def read_prompts(entry):
    """Return the prompts of a .txt file, a line each, or a .jsonl, {"prompt": …}, or the text."""
    if not entry.endswith((".txt", ".jsonl")):
        if os.path.isfile(entry):
            problem = f"{shorten(entry)} is a file of another kind"
            raise SettingsError(f"{problem}: give a .txt or .jsonl")
        return [entry]
    prompts, number = [], 0
    try:
        text = Path(entry).read_text(encoding="utf-8-sig")  # a BOM is part of no prompt
        for number, line in enumerate(text.strip().split("\n"), start=1):
            if line.strip() or number == 1:  # a first line that is empty is a file that is empty
                prompt = json.loads(line)["prompt"] if entry.endswith(".jsonl") else line.strip()
                prompts.append(convert(prompt, "text", ()))
        return prompts
    except Exception as error:
        where = f"{shorten(entry)}, line {number}," if number else shorten(entry)
        remedy = 'give one prompt a line in UTF-8, in a .jsonl as {"prompt": "I feel so"}'
        raise SettingsError(f"{where} can't be read ({shorten(error)}): {remedy}") from error


def check_prompts(prompts, eval_prompts):
    """Yield a problem for prompts that are given twice."""
    for name, given in (("PROMPTS", prompts), ("EVAL_PROMPTS", eval_prompts)):
        twice = [prompt for prompt, count in Counter(given).items() if count > 1]
        if twice:
            yield f"{name} has {shorten(twice)} twice: give each prompt once"
    shared = sorted(set(prompts) & set(eval_prompts))
    if shared:
        yield f"EVAL_PROMPTS has {shorten(shared)}, as PROMPTS has: give prompts that it has not"


def check_batches(batch_size, mini_batch_size, ppo_epochs, target_approx_kl):
    """Yield a problem for batches that can't be divided, or a step that can't be measured."""
    if mini_batch_size and batch_size % mini_batch_size:
        remedy = f"give 0 or a divisor of BATCH_SIZE, {batch_size}"
        yield f"MINI_BATCH_SIZE is {mini_batch_size}: {remedy}"
    elif target_approx_kl and ppo_epochs == 1 and mini_batch_size in (0, batch_size):
        remedy = "give 0, for a single update of a step can't be measured"
        yield f"TARGET_APPROX_KL is {target_approx_kl}: {remedy}"


def check_installed(device, dtype, report_to):
    """Yield a problem for a device or a tracker that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        yield "DEVICE is cuda: give cpu, since PyTorch sees no GPU"
    elif dtype == "float16" and pick_device(device, dtype)[0] == "cpu":
        yield "DTYPE is float16: give float32 or bfloat16 on a CPU"
    if report_to != "none" and not importlib.util.find_spec(report_to):
        yield f"REPORT_TO is {report_to}: give none, or pip install {report_to}"


def check_places(model_name, output_dir):
    """Yield a problem for a model that is not here, or an output that would harm something."""
    if os.path.isfile(model_name) or (model_name[0] in "/.~" and not os.path.isdir(model_name)):
        remedy = "name one, or a model on the Hub"
        yield f"MODEL_NAME is {shorten(model_name)}: there is no such folder: {remedy}"
    output, problem = Path(output_dir).absolute(), ""
    try:
        place = output.resolve()
        existing = next(path for path in (output, *output.parents) if path.exists())
        names = {path.name for path in output.iterdir()} if existing == output else set()
        if output_dir.startswith("~"):
            problem = "~ is no folder here"
        elif not existing.is_dir() or not os.access(existing, os.W_OK):
            problem = f"{existing} can't be written"
        elif names and names.isdisjoint({"metrics.jsonl", "report.json", "checkpoint"}):
            problem = "it holds files that are not a run's"
        elif Path.cwd().is_relative_to(place):
            problem = "it is or holds the current folder"
        elif os.path.isdir(model_name) and Path(model_name).resolve().is_relative_to(place):
            problem = "MODEL_NAME is read from there"
    except (OSError, RuntimeError) as error:  # the latter where links lead in a circle
        problem = f"it can't be written ({getattr(error, 'strerror', error)})"
    if problem:
        yield f"OUTPUT_DIR is {shorten(output_dir)}: {problem}: name another folder"


CHECKS = (check_prompts, check_batches, check_installed, check_places)


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
        problem = f"{name} is {shorten(value)}: it can't be loaded ({reason}): {remedy}"
        raise SettingsError(problem) from error


def find_model(name):
    """Return a local folder with the model, fetched from the Hub where the cache lacks it."""
    if os.path.isdir(name):
        return name
    files = {"allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]}
    files["ignore_patterns"] = ["*/*"]  # folders hold the same weights in other formats
    problem = f"MODEL_NAME is {shorten(name)}: there is no such folder"
    try:
        HfApi().model_info(name, timeout=5)
    except (HFValidationError, RepositoryNotFoundError, GatedRepoError) as error:
        remedy = "check the name, or run: hf auth login"
        raise SettingsError(f"{problem}, and no model that you may read: {remedy}") from error
    except Exception as error:  # no answer; the copy in the cache has to do
        with suppress(Exception):
            return snapshot_download(name, local_files_only=True, **files)
        problem += f", the cache lacks it, and the Hub can't be reached ({shorten(error)})"
        hint = "To see the script at work offline, give the small model beside it: demo_model"
        raise SettingsError(f"{problem}: check the name and the connection. {hint}") from error
    print(f"Fetching what the cache lacks of {name} from the Hub", flush=True)
    with blame("MODEL_NAME", name, "try again, what is fetched already stays"):
        return snapshot_download(name, **files)


def load_tokenizer(path):
    """Return the tokenizer, with a pad token that is no end token, if there is one to spare."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no end token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # as generation needs it
    return tokenizer


def check_length(path, tokenizer, settings):
    """Refuse prompts that leave no room for a response in the model's context."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    context = getattr(config, "max_position_embeddings", None) or math.inf
    for prompt in settings.prompts + settings.eval_prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if length + settings.max_new_tokens > context:
            room = f"with {shorten(prompt)!r}, {length} tokens, the model's context of {context}"
            problem = f"MAX_NEW_TOKENS is {settings.max_new_tokens}, too many {room}"
            raise SettingsError(f"{problem}: give less, or a shorter prompt")


def load_base_model(path, device, dtype, quantization):
    """Load a language model from safetensors, and make sure that it is whole and finite."""
    options = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    if quantization != "none":
        bits = {f"load_in_{quantization}": True, "bnb_4bit_quant_type": "nf4"}
        bits["bnb_4bit_compute_dtype"] = dtype
        options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path, use_safetensors=True, trust_remote_code=False, **options
    )
    if loading["missing_keys"]:  # transformers would go on with random numbers
        raise ValueError(f"it lacks weights such as {min(loading['missing_keys'])}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"it has weights that are not finite, such as {name}")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would repack for good
    return model


def pick_device(device, dtype):
    """Return the device, cuda or cpu, and the name of the dtype of the frozen weights."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    elif dtype == "auto":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float16"
    return device, dtype


# ----------------------------------------------------------------------------- output, checkpoints
@contextmanager
def claim_output(folder, resume):
    """Hold the output folder for this run alone; move an earlier run aside unless it is to go on.

    What is raised inside gets a note of what the last checkpoint has.
    """
    output = Path(folder)
    try:
        lock = lock_folder(output)
        earlier = [path for path in output.rglob("*") if path.is_file() and path.name != "lock"]
        if earlier and not resume:
            lock.lock.release()
            number = 1
            while Path(f"{output}-{number}").exists():
                number += 1
            output.rename(f"{output}-{number}")
            print(f"The earlier run in {output}/ was moved to {output}-{number}/")
            lock = lock_folder(output)
    except (OSError, Timeout) as error:
        reason = getattr(error, "strerror", None) or "another run is writing there"
        raise SettingsError(f"OUTPUT_DIR is {output}: {reason}: name another folder") from error
    with lock:
        try:
            yield
        except BaseException as error:
            if checkpoint_path(folder).exists():
                step = len(read_checkpoint(folder)["metrics"])
                saved = f"what was learned up to step {step} is saved"
                error.add_note(f"{saved}. To go on, run the same line with --resume")
            raise


def lock_folder(folder):
    """Return the lock of an output folder; the operating system frees it when the process ends."""
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "checkpoint" / "lock").acquire(blocking=False)


def checkpoint_path(folder):
    """Return where the last checkpoint is, if there is one."""
    return Path(folder, "checkpoint", "state.pt")


def read_checkpoint(folder):
    """Return the dictionary that save_checkpoint wrote last."""
    return torch.load(checkpoint_path(folder), map_location="cpu", weights_only=True)


def trained_weights(model):
    """Return {name: weight} of what is trained."""
    named = model.named_parameters()
    return {name: weight.detach() for name, weight in named if weight.requires_grad}


def save_checkpoint(model, optimizer, scaler, settings, metrics):
    """Save all that a run needs to go on, beside the last checkpoint, then replace that.

    Weights that are not finite never replace good ones. Random states are not needed: each step
    sets its own seed.
    """
    weights = trained_weights(model)
    if not metrics or not all(weight.isfinite().all() for weight in weights.values()):
        return
    state = {
        "settings": vars(settings),
        "model": os.path.realpath(settings.model_name),  # a folder may have several names
        "metrics": metrics,
        "weights": weights,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }
    path = checkpoint_path(settings.output_dir)
    new, content = path.with_name("state.new"), io.BytesIO()
    torch.save(state, content)  # not into the file: what it raises for a full disk says nothing
    try:
        with open(new, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # what a full disk left of it


def load_checkpoint(model, optimizer, scaler, settings, rules, steps):
    """Put all back to the last checkpoint, tell what has changed since, and return its metrics."""
    state, changed = check_resume(settings, rules, steps)
    with blame("RESUME", True, "start without it"):  # it may be of another model in the same folder
        for name, weight in trained_weights(model).items():
            weight.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    for name, (value, before) in changed.items():
        print(f"{name} is {shorten(value)} from now on, {shorten(before)} until now")
    return state["metrics"]


def check_resume(settings, rules, steps):
    """Return the last checkpoint, and {constant: (value, value in it)} where they differ.

    Raises SettingsError where what differs would make the rest of the run another one.
    """
    if not checkpoint_path(settings.output_dir).exists():
        problem = f"there is no checkpoint in {shorten(settings.output_dir)}"
        raise SettingsError(f"RESUME is True: {problem}: start without it")
    with blame("RESUME", True, "start without it"):
        state, now = read_checkpoint(settings.output_dir), vars(settings)
        before = state["settings"] | {"resume": True, "output_dir": settings.output_dir}
        if state["model"] == os.path.realpath(settings.model_name):
            before["model_name"] = settings.model_name
        differ = [name for name in now if now[name] != before.get(name)]
        changed = {name.upper(): (now[name], before.get(name)) for name in differ}
        done = len(state["metrics"])
    free = [name for _, _, is_free, names in rules for name in names.split() if is_free]
    problems = []
    for name, (value, old) in changed.items():
        if name not in free:
            problem = f"{name} is {shorten(value)}, but {shorten(old)} in the checkpoint"
            problems.append(f"{problem}: give that or start anew")
    if not problems and done > steps:
        problem = f"TRAINING_EPOCHS is {settings.training_epochs}, which takes {steps} steps"
        problems.append(f"{problem}, but the checkpoint has {done}: give more")
    if problems:
        raise SettingsError(*problems)
    return state, changed


# ------------------------------------------------------------------------------ stops and failures
class Stopped(KeyboardInterrupt):
    """Raised where Ctrl-C or SIGTERM ends the run; its argument is the signal's number."""


class RunError(Exception):
    """A failure in the middle of a run that the user can mend."""


class RewardError(RunError):
    """A reward function that raised, or that gave no number."""


@contextmanager
def stop_on_signal(after_step=False):
    """Raise Stopped where Ctrl-C or SIGTERM comes; give both back afterwards.

    With after_step the first one only sets `requested`, and is raised at the end of the block.
    """
    stop = SimpleNamespace(requested=None)

    def handle(number, frame):
        if stop.requested or not after_step:
            raise Stopped(number)
        stop.requested = number
        print("\nStopping after this step; once more to stop at once", file=sys.stderr)

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
    if lacks_memory(error):
        now = f"it is {settings.mini_batch_size or settings.batch_size}"
        remedy = f"lower MINI_BATCH_SIZE ({now}) or EVAL_BATCH_SIZE ({settings.eval_batch_size})"
        anew = f"QUANTIZATION 4bit, a BATCH_SIZE below {settings.batch_size} or a smaller model"
        return f"there is too little memory: {remedy} and go on, or start anew with {anew}"
    # The last one is of libraries that are written in Rust.
    if isinstance(error, OSError | SafetensorError) or "os error" in str(error):
        reason = shorten(getattr(error, "strerror", None) or error, 200)
        remedy = (
            f"make room in OUTPUT_DIR, {settings.output_dir}, or where the screen's output goes"
        )
        if isinstance(error, BrokenPipeError):
            remedy = "let what is printed be read to its end"
        return f"something can't be written ({reason}): {remedy}"
    return None


def lacks_memory(error):
    """Return whether an error comes from too little memory."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return of_memory or any(text in str(error) for text in texts)


# ---------------------------------------------------------------------------- screen and report
def shorten(value, length=80):
    """Return the first line of the value's text, of at most so many characters."""
    first, *others = str(value).strip().splitlines() or ["empty"]
    if not others and len(first) <= length:
        return first
    return first[: length - 1].rstrip(" .:") + "…"


def tell(text):
    """Print an error; no word is broken at the edge of the terminal."""
    wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns, break_long_words=False)
    wrapper.break_on_hyphens = False  # flags have them
    print("\n".join(wrapper.fill(line) for line in text.splitlines()), file=sys.stderr)


def is_terminal():
    """Return whether somebody watches: a bar in a file would be noise."""
    return all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))  # None if closed


def announce(policy, settings, device, dtype, metrics):
    """Print what is going to happen."""
    total = sum(parameter.numel() for parameter in policy.parameters())
    trained = sum(weight.numel() for weight in trained_weights(policy).values())
    reward = "+1 for a response with a word of POSITIVE_WORDS, else -1"
    steps, asked = count_steps(settings), settings.training_epochs * len(settings.prompts)
    samples = steps * settings.batch_size
    filled = f" ({asked} asked for, the last step filled up)" if samples > asked else ""
    going_on = f", going on after step {len(metrics)}" if metrics else ""
    print(f"Model     {settings.model_name}, {total:,} parameters, {trained:,} of them trained")
    print(f"Device    {device_name(device)}, {dtype} weights")
    print(f"Prompts   {len(settings.prompts)} to train on, {len(settings.eval_prompts)} held out")
    print(f"Reward    {reward if settings.reward == 'positive_word_reward' else settings.reward}")
    words = f"{steps} step{'s' * (steps > 1)}"
    print(f"Training  {samples} samples{filled} in {words}, seed {settings.seed}")
    print(f"Output    {settings.output_dir}/{going_on}\n", flush=True)


@contextmanager
def open_log(settings, metrics):
    """Yield a function that writes down the last of the metrics and shows progress.

    Progress is a live bar on a terminal, elsewhere a line every LOG_EVERY steps.
    """
    done, total = len(metrics), count_steps(settings)
    start = time.perf_counter() - (metrics[-1]["seconds"] if metrics else 0)
    path = Path(settings.output_dir, "metrics.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in metrics))
    shape = "{n_fmt}/{total_fmt} |{bar:12}| {remaining} left, {desc}"
    no_bar = done == total or not is_terminal()
    tracker = None
    if settings.report_to == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", settings.output_dir, purge_step=done + 1)
        tracker.start()
    with tqdm(total=total, initial=done, bar_format=shape, disable=no_bar) as bar:

        def log(metrics):
            step, record = len(metrics), metrics[-1]
            record["seconds"] = time.perf_counter() - start
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
            if tracker:
                tracker.log(record, step=step)  # it leaves out what is None
            for text in warnings_of(metrics, settings.max_new_tokens):
                tqdm.write(f"step {step}: {text}")
            success, score, kl = (recent(metrics, n) for n in ("success_rate", "score", "kl"))
            text = f"success {success:4.0%}, score {score:+.2f}, KL {kl:z.2f}"
            bar.set_description_str(text, refresh=False)
            bar.update()
            if no_bar and (step % settings.log_every == 0 or step == total):
                left = tqdm.format_interval(record["seconds"] / step * (total - step))
                print(f"step {step}/{total}, {left} left, {text}", flush=True)

        yield log


def recent(metrics, name):
    """Return the mean of a metric over the last 100 samples, of the steps where it was finite."""
    first = metrics[-1]["samples"] - 100
    values = [r[name] for r in metrics[-100:] if r["samples"] > first and r[name] is not None]
    return sum(values) / len(values) if values else math.nan


def warnings_of(metrics, max_new_tokens):
    """Return what the user should know of the last step: skipped updates, a KL that went wrong."""
    lines, kl = [], recent(metrics, "kl")
    before = recent(metrics[:-1], "kl") if len(metrics) > 1 else 0.0
    skipped_updates = metrics[-1]["skipped_updates"]
    if skipped_updates:
        lines.append(f"updates skipped, since their numbers were not finite: {skipped_updates}")
    if kl > max_new_tokens and not before > max_new_tokens:  # more than a nat per token, now
        remedy = "stop, and raise KL_COEF or lower TARGET_APPROX_KL"
        lines.append(f"the KL has run away to {kl:.1f} nats: {remedy}")
    return lines


def device_name(device):
    """Return the device in words."""
    threads = torch.get_num_threads()
    cpu = f"CPU with {threads} thread{'s' * (threads > 1)}"
    return torch.cuda.get_device_name() if device == "cuda" else cpu


def peak_memory_mb(device):
    """Return the most memory held so far in MB, 10^6 bytes: the GPU's, else the process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e6
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def save_results(policy, tokenizer, report, metrics, folder):
    """Write model and report into a folder of their own, then move them: no file is ever torn."""
    output, new = Path(folder), Path(folder, "checkpoint", "results.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        save_model(policy, tokenizer, new)
        card = summarize(report, ".") + "\n![Success and KL](training.png)\n"
        (new / "README.md").write_text(card, encoding="utf-8")
        (new / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw(report, metrics, new / "training.png")
        mode = (new / "README.md").stat().st_mode  # safetensors would let nobody else read
        for path in [path for path in new.rglob("*") if path.is_file()]:
            path.chmod(mode)
            place = output / path.relative_to(new)
            place.parent.mkdir(exist_ok=True)  # a tokenizer may have a folder of templates
            path.replace(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what a full disk left of it


def save_model(policy, tokenizer, folder):
    """Save the policy as an ordinary model, the adapter merged in, and the tokenizer."""
    model = policy.pretrained_model
    if getattr(model.get_base_model(), "is_quantized", False):  # 4 or 8 bits would lose the update
        adapter, lora = get_peft_model_state_dict(model), model.peft_config["default"]
        model = get_peft_model(model.unload().dequantize(), lora)
        set_peft_model_state_dict(model, adapter)
    merged = model.merge_and_unload()
    if not all(weight.isfinite().all() for weight in merged.state_dict().values()):
        remedy = "set DTYPE to float32, or lower TARGET_APPROX_KL"
        raise RunError(f"the trained weights are not finite: {remedy}")
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw(report, metrics, path):
    """Draw the learning curve, and success against KL under the line of what is possible."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    blue, orange, grey = "#0072B2", "#D55E00", "#666666"  # told apart by colour-blind readers too
    base, trained = report["base"]["train_prompts"], report["trained"]["train_prompts"]
    base_rate = base["success_rate"]
    steps = [n for n in range(1, len(metrics) + 1) if metrics[n - 1]["samples"] >= 100]
    steps = steps or [len(metrics)]  # means of fewer samples are noise
    samples = [metrics[step - 1]["samples"] for step in steps]
    success = [recent(metrics[:step], "success_rate") for step in steps]
    kl = [recent(metrics[:step], "kl") for step in steps]
    rates = numpy.linspace(base_rate, 1, 200)
    least = [kl_minimum(rate, base_rate, base["samples"]) for rate in rates]

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Learning", xlabel="samples", ylabel="success rate")
    left.plot(samples, success, color=blue, label="mean of the last 100 samples")
    left.axhline(base_rate, color=grey, linestyle="-.", label="base model, measured")
    right.set(title="What success costs", xlabel="KL against the base model (nats per response)")
    right.plot(least, rates, color="black", label="least KL for a success rate")
    right.plot(kl, success, ".-", color=blue, label="mean of the last 100 samples")
    right.plot(0, base_rate, "s", color=grey, label="base model, measured")
    right.plot(trained["kl"], trained["success_rate"], "*", color=orange, markersize=15)
    right.lines[-1].set_label("trained model, measured")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def summarize(report, folder):
    """Return the result in Markdown, with Python that loads the model from a folder."""
    settings, base, trained = report["settings"], report["base"], report["trained"]
    lines = [f"# {Path(settings['model_name']).name}, fine-tuned with PPO", ""]
    columns = {"  base": base["train_prompts"], "trained": trained["train_prompts"]}
    if "eval_prompts" in base:
        columns["base, held out"] = base["eval_prompts"]
        columns["trained, held out"] = trained["eval_prompts"]
    lines += [f"| {'':21} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ("success_rate", "score", "kl", "kl_minimum", "distinct", "perplexity_under_base"):
        figures = (f"{part[name]:z.3f}".rjust(len(title)) for title, part in columns.items())
        lines.append(f"| {name:21} | {' | '.join(figures)} |")
    where = f"{report['samples']} samples in {report['seconds']:.0f} seconds on {report['device']}"
    lines += ["", f"{where}, seed {settings['seed']}. The first response to each prompt,"]
    lines += ["with the same random numbers before and after:", ""]
    for prompts in base:
        after = trained[prompts]["first_sample"]
        for prompt, before in list(base[prompts]["first_sample"].items())[:6]:
            texts = [" ".join(text.split()) for text in (prompt, before, after[prompt])]
            texts[0] += " (held out)" * (prompts == "eval_prompts")
            lines.append("    {}\n        before  {}\n        after   {}".format(*texts))
    lines.append(f"""
{judge(report)}

The model is beside report.json and training.png. To load it:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained({folder!r})
    model = AutoModelForCausalLM.from_pretrained({folder!r})
    inputs = tokenizer({settings["prompts"][0]!r}, return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
""")
    return "\n".join(lines)


def judge(report):
    """Return the result in words, and what to try where it is not a good one."""
    base, trained = report["base"]["train_prompts"], report["trained"]["train_prompts"]
    text = f"Success: {base['success_rate']:.1%} before, {trained['success_rate']:.1%} after,"
    text += f" at {trained['kl']:z.1f} nats from the base model."
    if not report["close_to_base"]:
        text += " Little is left of it: try a lower LEARNING_RATE,"
        text += "\na lower TARGET_APPROX_KL or a higher KL_COEF."
    elif base["success_rate"] == trained["success_rate"] == 0:
        text += "\nThe base model never succeeded, so there was nothing to learn from:"
        text += "\ntry words or prompts with which it succeeds now and then."
    elif not report["learned"]:
        text += "\nThat is no rise beyond chance: this run did not learn."
        text += "\nTry more TRAINING_EPOCHS or a lower KL_COEF."
    return text


# ------------------------------------------------------------------------------------------- main
def main(argv=()):
    """Do a run with the constants, overridden by flags in argv; return the exit status."""
    with suppress(AttributeError):  # in a notebook, which shows everything anyway
        sys.stdout.reconfigure(errors="replace")  # a model may say what the screen can't show
    noise = r"`PPO(Config|Trainer)` is dep|No dataset is|.*is_gradient_checkpointing|fan_in_fan_out"
    warnings.filterwarnings("ignore", message=noise)  # what pinned libraries say of themselves
    warnings.filterwarnings("error", message=".*tied layer is part of the adapter")  # not mergeable
    transformers.logging.disable_progress_bar()  # of loading weights
    transformers.logging.set_verbosity_error()
    sys.set_int_max_str_digits(0)  # so that a number of any length can be shown, shortened
    settings = None
    try:
        with stop_on_signal():
            settings = read_settings(argv, globals(), RULES, CHECKS)
            if settings.resume:
                check_resume(settings, RULES, count_steps(settings))  # before anything is loaded
            run(settings)
            print(end="", flush=True)  # where the output can't be written, it is told here
        return 0
    except SettingsError as error:
        tell(str(error))
        return 2
    except Stopped as stopped:
        tell(f"\nStopped; {what_is_saved(stopped)}")
        return 128 + stopped.args[0]
    except Exception as error:
        reason = settings and explain(error, settings)
        if not reason:
            raise
        tell(f"\nStopped: {reason}; {what_is_saved(error)}")
        return 1


def what_is_saved(error):
    """Return the note that claim_output adds."""
    return getattr(error, "__notes__", ["there was nothing to save yet"])[0]


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__main__":  # in a cell of a notebook
    main()
