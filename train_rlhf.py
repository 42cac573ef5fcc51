"""Fine-tune a language model with PPO so that it says positive things, and show that it learned.

    python train_rlhf.py                            # TinyLlama-1.1B-Chat, with the constants below
    python train_rlhf.py --model-name demo_model    # the small model beside this file: offline
    python train_rlhf.py --help                     # every constant is also a flag

It maximises E[score - KL_COEF * KL(policy || base model)]. One step of PPO, take_step below:

    responses    the policy samples one to each prompt            (sample_and_score)
    scores       the reward function's; a token earns what it adds (score_responses)
    rewards      what a token earns - KL_COEF * its KL                        (step)
    advantages   how much better it went, from a token on,
                 than the value head expected                   (compute_advantages)
    PPO_EPOCHS times, for each minibatch, a step of Adam down the sum of:   (update)
        policy loss     a token gets likelier with its advantage, but only so far
        value loss      the value head learns to expect what came
        KL_COEF * KL    the policy is pulled back to the base model

Read it from top to bottom, as the data flows: constants, run, policy, rollout, reward,
advantages, losses, step. What is not PPO is in the folder finetune/ beside this file.
"""

# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [  # those of requirements.txt, which says what each is for
#     "trl==0.11.4", "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2",
#     "accelerate==1.15.0", "numpy==2.4.6", "datasets==5.2.0", "pyarrow==26.0.1",
#     "bitsandbytes==0.50.2", "safetensors==0.8.0", "huggingface_hub==2.4.0", "pydantic==2.14.4",
#     "filelock==4.2.11", "matplotlib==3.11.2", "rouge_score==0.1.2", "tqdm==4.70.1",
# ]
# ///

import inspect
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from finetune import checks, command
from finetune.errors import RunError, SettingsError, blame
from finetune.prompts import Prompts, batch_of_step, read_prompts
from finetune.settings import (
    Label,
    Number,
    NumberOrAuto,
    Switch,
    Text,
    Texts,
    TextsOrNone,
    TrainingSettings,
    Whole,
    changeable,
    limits,
)

if command.is_script(globals()):
    command.watch_the_start()

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
PROMPTS = [  # texts to continue; a file (.txt, .jsonl, .csv, .parquet, …) stands for its rows
    "I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling",
]  # fmt: skip
EVAL_PROMPTS = [  # never trained on, but measured; [] = off
    "Right now I am", "My day was", "It makes me feel", "Tonight I feel", "Everything seems",
    "I woke up feeling",
]  # fmt: skip
EVAL_SHARE = 0.1  # of PROMPTS in a file: held out in place of EVAL_PROMPTS; 0 = those are
PROMPT_FIELD = "auto"  # of a row; auto = the first of prompt, messages, …: see docs/data.md
CHAT_TEMPLATE = False  # True = a prompt is what a user says, put into the tokenizer's template

# --- Reward
REWARD = "positive_word_reward"  # or FILE.py:FUNCTION, or a classifier: a folder, a Hub name
POSITIVE_WORDS = [  # a response with one of these whole words, in any case, scores +1, else -1
    "happy", "glad", "good", "great", "smile", "joy", "love", "wonderful", "amazing", "excited",
    "pleased", "delighted", "cheerful", "grateful", "blessed", "fantastic",
]  # fmt: skip
REWARD_LABEL = "POSITIVE"  # of a classifier with several: its name or index; its log-odds count
SCORE_PREFIXES = True  # a token earns what it adds to the score; False = the last gets it all
MAX_PREFIXES = 40  # beginnings of a response that are scored for that, spread evenly; 0 = all
SCALE_SAMPLES = 200  # of the base model: its graded scores get mean 0 and deviation 1; 0 = off
SUCCESS_THRESHOLD = "auto"  # a higher score is a success; auto = of rules and reward models alone

# --- Rollout
TRAINING_EPOCHS = 150  # passes over PROMPTS; 150 over 6 are 900 samples; 0.1 = a tenth of a pass
BATCH_SIZE = 10  # responses sampled for one PPO step; more is steadier but slower to react
MAX_NEW_TOKENS = 10  # length of a response in tokens, at most
TEMPERATURE = 1.0  # divides the logits of policy and base model everywhere; 1.0 = as they are

# --- PPO
LEARNING_RATE = 3e-4  # of the first step; the later ones follow TARGET_APPROX_KL
TARGET_APPROX_KL = 0.008  # nats per token of a step; falls as it learns; 0 = LEARNING_RATE stays
PPO_EPOCHS = 2  # passes over a batch; 1 = every sample is used once (needs TARGET_APPROX_KL 0)
MINI_BATCH_SIZE = 0  # responses of an update, divides BATCH_SIZE; memory grows with it; 0 = all
GRADIENT_CHECKPOINTING = False  # True saves memory, most where responses are long; it is slower
KL_COEF = 0.1  # price of one nat of KL against the base model, in scores; 0 = free to drift
CLIP_RANGE = 0.2  # PPO's epsilon: nothing is gained by a probability ratio outside 1 ± CLIP_RANGE
VALUE_CLIP_RANGE = 0.2  # the same for a value's change in one step, in units of the score
VF_COEF = 0.1  # weight of the value loss in the loss; 0 = the value head stays at zero
GAMMA = 1.0  # discount per token; 1.0 = none, for a response is short
LAM = 0.95  # GAE's lambda: 1.0 trusts what happened, 0.0 trusts the value head
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0 = off

# --- Run
SEED = 0  # the same seed on the same machine gives the same run
EVAL_SAMPLES = 240  # responses in each of the four measurements at the end, spread over the prompts
EVAL_BATCH_SIZE = 40  # responses generated at once, there and in a step; less saves memory
LOG_EVERY = 5  # steps between two samples shown, and two lines of progress in a log file
SAVE_EVERY = 10  # steps between two checkpoints; 0 = only where the run ends or is stopped
SAVE_ADAPTER = True  # the LoRA adapter alone, for PEFT, in adapter/ beside the model; False = off
RESUME = False  # go on from the checkpoint in OUTPUT_DIR
REPORT_TO = []  # tensorboard, wandb, trackio: the metrics there too (pip install them); [] = off


# ------------------------------------------------------------ what the constants may be
class Settings(TrainingSettings):
    """What the constants of this script may be, beside those that others have too."""

    lora_rank: Whole = limits(1, 10**6)
    prompts: Texts
    eval_prompts: TextsOrNone
    eval_share: Number = limits(0, 0.9)
    prompt_field: Text
    chat_template: Switch
    reward: Text
    positive_words: Texts
    reward_label: Label
    score_prefixes: Switch
    max_prefixes: Whole = limits(0, 10**6)
    scale_samples: Whole = limits(0, 10**6)
    success_threshold: NumberOrAuto = changeable()
    training_epochs: Number = limits(1e-6, 10**6, changeable=True)
    max_new_tokens: Whole = limits(1, 10**6)
    learning_rate: Number = limits(1e-30, 1e30)
    temperature: Number = limits(0.01, 100)
    target_approx_kl: Number = limits(0, 1e30, changeable=True)
    ppo_epochs: Whole = limits(1, 10**6)
    kl_coef: Number = limits(0, 1e30)
    clip_range: Number = limits(1e-6, 1000)
    value_clip_range: Number = limits(1e-6, 1000)
    vf_coef: Number = limits(0, 1e30)
    gamma: Number = limits(0, 1)
    lam: Number = limits(0, 1)
    eval_samples: Whole = limits(1, 10**6, changeable=True)


def check_target(
    target_approx_kl: float, ppo_epochs: int, batch_size: int, mini_batch_size: int
) -> None:
    """Refuse to steer by the size of a step that can't be measured."""
    has_one_update = ppo_epochs == 1 and mini_batch_size in (0, batch_size)
    if target_approx_kl > 0 and has_one_update:
        remedy = "give 0, for a single update of a step can't be measured"
        raise SettingsError(f"TARGET_APPROX_KL is {target_approx_kl}: {remedy}")


CHECKS = (read_prompts, check_target, *checks.OF_TRAINING)

# The libraries below take seconds to load: --help and bad settings are answered before.
if command.is_script(globals()):
    settings = command.settings_or_exit(globals(), Settings, CHECKS)
command.silence_loggers()
# Large tensors lie in large pages of memory then, which are faster to get on Linux.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import accelerate
import torch
import transformers
import trl

from finetune import functions, measurement, models, output, processes, progress, scorers
from finetune.checkpoint import Checkpoint, check_resume
from finetune.evaluation import measure_and_save, measure_scale
from finetune.figures import RECENT
from finetune.files import Row, hash_files
from finetune.loading import load_model
from finetune.logits import OutputHead, find_head, inputs_of
from finetune.progress import Metrics
from finetune.samples import add_tokens, keeps_tokens, samples_of_step
from finetune.sampling import sample_responses
from finetune.saving import unquantized
from finetune.scale import Scale
from finetune.scorers import Scorer
from finetune.tokens import encode, for_decoder, pad_batch, texts_of
from finetune.words import has_word, whole_words

Tokenizer = transformers.PreTrainedTokenizerBase


# ------------------------------------------------------------------------------ the run
@dataclass(frozen=True)
class Learner:
    """What takes part in a run from its beginning to its end.

    scorer: the reward function. scale: what its scores are put on before they are
    trained on.
    """

    policy: "PolicyWithValueHead"
    trainer: "ExactKLTrainer"
    tokenizer: Tokenizer
    scorer: Scorer
    scale: Scale
    settings: Settings

    @property
    def threshold(self) -> float | None:
        """The score above which a response is a success, None where there is none."""
        if self.settings.success_threshold == "auto":
            return self.scale.threshold
        return self.settings.success_threshold


def run(settings: Settings) -> None:
    """Do the whole run: load, train with PPO, measure before and after, save, show."""
    prompts = read_prompts(
        settings.prompts,
        settings.eval_prompts,
        settings.eval_share,
        settings.prompt_field,
        settings.seed,
    )
    files = hash_files(settings.prompts)

    # Whether a run can go on is told before anything is loaded.
    if settings.resume:
        check_resume(settings, progress.count_steps(settings, prompts.rows), files)
    learner, prompts, scale = load(settings, prompts)
    rows, trainer = prompts.rows, learner.trainer

    with output.claim_output(settings.output_dir, settings.resume):
        scaler = trainer.accelerator.scaler
        checkpoint = Checkpoint(learner.policy, trainer.optimizer, scaler, settings, files)
        metrics: Metrics = []
        if settings.resume:
            state = checkpoint.load(progress.count_steps(settings, rows))
            metrics, scale = state["metrics"], Scale(**state["scale"])
        measurement.announce(
            learner.policy,
            settings,
            prompts,
            metrics,
            learner.scorer,
        )
        learner = replace(learner, scale=scale or measure_scale(learner, rows))

        train(learner, rows, metrics, checkpoint)
        measure_and_save(learner, rows, prompts.eval_rows, metrics)


def load(settings: Settings, prompts: Prompts) -> tuple[Learner, Prompts, Scale | None]:
    """Return what takes part, the prompts that fit, and the scale if it is known."""
    device_type, dtype = processes.pick_device(settings.device, settings.dtype)
    device = processes.join_processes(device_type)
    scorer, scale = load_reward(settings, prompts.rows + prompts.eval_rows, device)
    model, tokenizer, prompts = load_model(settings, prompts, device, dtype)
    policy = make_policy(model, tokenizer, settings)
    trainer = make_trainer(policy, tokenizer, settings, device, dtype)
    learner = Learner(policy, trainer, tokenizer, scorer, Scale(), settings)
    return learner, prompts, scale


def train(learner: Learner, rows: list[Row], metrics: Metrics, checkpoint: Checkpoint) -> None:
    """Take all PPO steps that are left; append the record of each to metrics."""
    settings, optimizer = learner.settings, learner.trainer.optimizer
    total_steps = progress.count_steps(settings, rows)
    start = time.perf_counter() - (metrics[-1]["seconds"] if metrics else 0)
    places = scored_places(settings, learner.scorer) if settings.score_prefixes else None
    log = progress.MetricsLog(
        settings, metrics, total_steps, "train_rlhf", settings.batch_size, places
    )
    scale = asdict(learner.scale)

    with command.stop_on_signal(after_step=True) as stop, log:
        try:
            for step in range(len(metrics) + 1, total_steps + 1):
                batch = batch_of_step(step, rows, settings.batch_size, settings.seed)
                rollout, stats, token_figures = take_step(learner, step, batch)
                stats["seconds"] = time.perf_counter() - start
                record = measurement.make_record(
                    step,
                    rollout.texts,
                    rollout.scores,
                    stats,
                    learner.scale,
                    learner.threshold,
                    prompt_count=len(rows),
                )
                metrics.append(record)
                samples = samples_of_step(step, batch, rollout, token_figures)
                if keeps_tokens(step, total_steps, settings):
                    add_tokens(samples, learner.tokenizer, rollout, token_figures)
                warnings = measurement.warnings_of(metrics, settings.max_new_tokens)
                log.write(metrics, measurement.progress_text(metrics), samples, warnings)
                progress.give_up_on_bad_numbers(metrics, "lower TARGET_APPROX_KL, or ")
                set_learning_rate(optimizer, metrics, total_steps, settings, learner.scale)

                # No regular checkpoint right after numbers that were not finite.
                stop.agree()
                is_due = settings.save_every > 0 and step % settings.save_every == 0
                is_due = is_due and not stats["skipped_updates"]
                if is_due or stop.requested or step == total_steps:
                    checkpoint.save(metrics, scale=scale)
                if stop.requested:
                    break
        except RunError:
            # The steps before it are worth keeping.
            if metrics and not metrics[-1]["skipped_updates"]:
                checkpoint.save(metrics, scale=scale)
            raise


def take_step(
    learner: Learner, step: int, rows: list[Row]
) -> tuple["Rollout", dict[str, float], "TokenFigures"]:
    """Let the policy respond to the prompts of a step, and improve it by how that scored.

    Returns what was said, and what ExactKLTrainer.step returns: its metrics and the
    figures of each token.
    """
    # All that is random in a step, the numbers that its tokens are sampled with and the
    # order of its minibatches, follows from SEED and step: so a run can go on anywhere.
    settings = learner.settings
    torch.manual_seed(settings.seed * 10**6 + step)
    key = (settings.seed, step, 0)
    numbers = processes.random_numbers(key, len(rows), settings.max_new_tokens)

    rollout = processes.share_out(sample_and_score, rows, numbers, learner=learner)
    stats, token_figures = learner.trainer.step(
        rollout.queries, rollout.responses, rollout.token_scores
    )
    return rollout, stats, token_figures


# --------------------------------------------------------------------------- the policy
class PolicyWithValueHead(torch.nn.Module):
    """A language model with a value head that also sees what a response has earned so far.

    It stands before TRL's model with a value head among the bases of the classes below.
    """

    # TRL's model has these.
    pretrained_model: Any
    v_head: Any

    def __init__(self, model: Any, head: OutputHead) -> None:
        super().__init__(model, summary_dropout_prob=0.0)
        self.head = head
        # This tells TRL that the base model is this one with its adapter off.
        self.is_peft_model = True

        # Random first values would be noise in the advantages: the head starts at zero.
        width = self.v_head.summary.in_features
        self.v_head.summary = torch.nn.Linear(width, 2)
        for parameter in self.v_head.float().parameters():
            torch.nn.init.zeros_(parameter)

        arguments = inspect.signature(model.get_base_model().forward).parameters
        self.takes_positions = "position_ids" in arguments
        self.takes_places = "logits_to_keep" in arguments

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, earned: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the output head gets at each place of the response, and its value.

        input_ids, attention_mask: (batch, query length + response length), of pad_batch.
        earned: (batch, response length), what all tokens before each one have earned.
        Returns states (batch, response length, width), of which self.head makes logits,
        and values (batch, response length).

        The value at t is what is still to come from token t on: a(h_t) + b(h_t) *
        earned_t, with h_t the hidden state before it, a and b learned. After a success
        nothing is still to come, and what was earned tells it for certain.
        """
        model = self.pretrained_model
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if model.config.is_encoder_decoder:
            start_id = model.generation_config.decoder_start_token_id
            inputs, places = for_decoder(inputs, earned.shape[1], start_id)
        else:
            # A token is sampled where the one before it stands.
            length = input_ids.shape[1]
            places = torch.arange(length - earned.shape[1] - 1, length - 1, device=earned.device)
        if self.takes_positions:
            # Padding on the left has no position of its own.
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if self.takes_places:
            inputs["logits_to_keep"] = places

        if self.head.layer is None:
            states, _, values = super().forward(**inputs, use_cache=False)
        else:
            # The logits themselves are made where they are needed, a piece at a time.
            with inputs_of(self.head.layer) as kept:
                _, _, values = super().forward(**inputs, use_cache=False)
            states = kept[0]
        if not self.takes_places:
            states = states[:, places]
        values = values[:, places]
        return states, values[..., 0] + values[..., 1] * earned

    def unquantize(self) -> None:
        """Take the base model in 16 or 32 bits, as it is saved."""
        self.pretrained_model = unquantized(self.pretrained_model)


class CausalPolicy(PolicyWithValueHead, trl.AutoModelForCausalLMWithValueHead):
    """The policy where the model is a causal language model."""


class EncoderDecoderPolicy(PolicyWithValueHead, trl.AutoModelForSeq2SeqLMWithValueHead):
    """The policy where an encoder reads the query, and a decoder responds."""


def make_policy(model: Any, tokenizer: Tokenizer, settings: Settings) -> PolicyWithValueHead:
    """Return the base model with a LoRA adapter and a value head, both float32.

    There is no dropout: the ratio of a policy to itself has to be 1.
    """
    models.set_sampling(model, tokenizer, settings)
    if settings.gradient_checkpointing:
        models.checkpoint_layers(model)
    adapted = models.add_adapter(model, settings)

    is_encoder_decoder = model.config.is_encoder_decoder
    policy_class = EncoderDecoderPolicy if is_encoder_decoder else CausalPolicy
    with blame("MODEL_NAME", settings.model_name, "name a model of another family, as Llama"):
        if model.config.get_text_config() is not model.config:
            raise ValueError("it takes pictures or sound too")
        head = find_head(adapted, settings.temperature)
        policy = policy_class(adapted, head).to(model.device).eval()
        unsplit = policy_class(adapted, replace(head, layer=None)).to(model.device).eval()
        if not models.head_is_whole(policy, unsplit, tokenizer):
            policy = unsplit
        models.check_padding(policy, tokenizer)
    return policy


# -------------------------------------------------------------------------- the rollout
class Rollout(NamedTuple):
    """What was said in a step, and how it scored: lists with an item for each response.

    queries, responses: 1-D tensors of token ids. scores: what the reward function says.
    token_scores: what each token of a response earns, 1-D float tensors.
    """

    queries: list[torch.Tensor]
    responses: list[torch.Tensor]
    texts: list[str]
    scores: list[float]
    token_scores: list[torch.Tensor]


def sample_and_score(rows: list[Row], numbers: torch.Tensor, learner: Learner) -> Rollout:
    """Return a response to the prompt of each row, sampled by the policy, and its score.

    numbers: (rows, MAX_NEW_TOKENS), uniform in (0, 1], one for each token that is
    sampled.
    """
    settings, tokenizer = learner.settings, learner.tokenizer
    queries = encode(tokenizer, rows, settings.chat_template)
    responses, texts = sample_responses(
        learner.policy.pretrained_model,
        tokenizer,
        queries,
        numbers,
        # Nothing is kept for a gradient here, so more than a minibatch fits.
        batch_size=max(settings.rows_at_once, settings.eval_batch_size),
    )
    scores, token_scores = score_responses(
        learner.scorer,
        learner.scale,
        tokenizer,
        rows,
        queries,
        responses,
        settings.score_prefixes,
        scored_places(settings, learner.scorer),
    )
    return Rollout(queries, responses, texts, scores, token_scores)


# --------------------------------------------------------------------------- the reward
def positive_word_reward(
    prompts: list[str],
    completions: list[str],
    positive_words: list[str] | None = None,
    **kwargs: Any,
) -> list[float]:
    """Return +1.0 for each completion with a positive word, else -1.0.

    positive_words: None stands for POSITIVE_WORDS. A word counts whole; letters that
    only prolong the prompt's last word are no word of their own. This is the form of
    TRL's reward functions for GRPO; yours in another file has it too.
    """
    words = POSITIVE_WORDS if positive_words is None else positive_words
    scores = []
    for prompt, completion in zip(prompts, completions):
        is_positive = has_word(completion, words, before=prompt)
        scores.append(1.0 if is_positive else -1.0)
    return scores


def load_reward(
    settings: Settings, rows: list[Row], device: torch.device
) -> tuple[Scorer, Scale | None]:
    """Return what REWARD names, tried on two of the rows, and its scale if it is known."""
    function = functions.local_function(settings.reward, REWARD, globals())
    is_rule = function is positive_word_reward
    if is_rule:
        function = partial(positive_word_reward, positive_words=settings.positive_words)
    scorer, scale = scorers.load_scorer(
        "REWARD",
        settings.reward,
        function,
        label=settings.reward_label,
        batch_size=settings.eval_batch_size,
        chat_template=settings.chat_template,
        device=device,
        of_texts=is_rule,
    )
    scorer.try_out(rows)
    if is_rule:
        scale = Scale(threshold=0.0, is_rule=True)
    return scorer, scale


def score_responses(
    scorer: Scorer,
    scale: Scale,
    tokenizer: Tokenizer,
    rows: list[Row],
    queries: list[torch.Tensor],
    responses: list[torch.Tensor],
    score_prefixes: bool,
    places: list[int],
) -> tuple[list[float], list[torch.Tensor]]:
    """Return the score of each response, and what each of its tokens earns on the scale.

    With score_prefixes a token earns what it adds to the score of the text so far:
    texts that score -1, -1, +1 earn 0, +2. The beginnings of so many tokens as places
    has, from 0 on, are scored for that; the last token of several between two places
    earns what they add. The sum is the response's score less that of the empty text, so
    with GAMMA 1 the best policy stays the best, and one sees which token did it:
    potential-based shaping (Ng, Harada and Russell 1999). Without score_prefixes the
    last token earns the whole score.
    """
    skips_some = places != list(range(len(places)))
    # All texts are scored in one call.
    asked_rows, texts, all_places = [], [], []
    for row, query, response in zip(rows, queries, responses):
        own_places = [len(response)]
        if score_prefixes:
            own_places = [*(place for place in places if place < len(response)), len(response)]
        asked_rows += [row] * len(own_places)
        texts += beginnings_of(tokenizer, query, response, own_places, whole_words_only=skips_some)
        all_places.append(torch.tensor(own_places))
    counts = [len(places) for places in all_places]
    all_scores = torch.tensor(scorer(asked_rows, texts), dtype=torch.float64)

    scores, token_scores = [], []
    for response, asked, text_scores in zip(responses, all_places, all_scores.split(counts)):
        scores.append(text_scores[-1].item())
        scaled = scale.apply(text_scores)
        earned = torch.zeros(len(response), dtype=torch.float64)
        if score_prefixes:
            earned[asked[1:] - 1] = scaled.diff()
        else:
            earned[-1] = scaled[-1]
        token_scores.append(earned.float())
    return scores, token_scores


def beginnings_of(
    tokenizer: Tokenizer,
    query: torch.Tensor,
    response: torch.Tensor,
    places: list[int],
    whole_words_only: bool,
) -> list[str]:
    """Return the texts of a response's beginnings, each of so many tokens, the longest last.

    whole_words_only: leave out what may be half a word at the end of all but the last.
    That follows from the beginning alone: if it depended on the next token, that token
    would have changed what the ones before it had earned, and the shaping would not be
    exact.
    """
    beginnings = [response[:place] for place in places]
    texts = texts_of(tokenizer, query, beginnings)
    if whole_words_only:
        texts[:-1] = [whole_words(text) for text in texts[:-1]]
    return texts


def scored_places(settings: Settings, scorer: Scorer) -> list[int]:
    """Return after how many tokens a response's beginnings are scored: MAX_PREFIXES, evenly."""
    length = settings.max_new_tokens
    count = min(settings.max_prefixes or length, length)
    # A classifier that reads beginnings has the scores of all in one pass.
    if scorer.reads_beginnings:
        count = length
    return [number * length // count for number in range(count)]


# ---------------------------------------------------------- what is needed of the logits
class TokenStatistics(NamedTuple):
    """What policy and base model say of tokens; all in nats, and of the same shape.

    kl is KL(policy || base model) at the place of the token, entropy that of the policy.
    """

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor


def token_statistics(
    states: torch.Tensor, ref_states: torch.Tensor, tokens: torch.Tensor, head: OutputHead
) -> TokenStatistics:
    """Return the statistics of tokens (batch, length), of states (batch, length, width).

    All is a function of logits, but (batch, length, vocabulary) of them would fill the
    memory: of a vocabulary of 150,000 each token has 0.6 MB. So they are made, used and
    dropped in pieces of some rows.
    """
    statistics = InPieces.apply(
        states.flatten(0, 1), ref_states.flatten(0, 1), tokens.flatten(), head
    )
    return TokenStatistics._make(column.view_as(tokens) for column in statistics)


class InPieces(torch.autograd.Function):
    """The statistics of tokens, and how they change with the states, a piece at a time.

    With z the logits of a place, p the probabilities that they stand for, p_ref those of
    the base model, and d = ln p - ln p_ref:

        logprob of token a    ln p_a              its gradient by z    onehot_a - p
        KL                    sum_v p_v d_v                            p (d - KL)
        entropy               - sum_v p_v ln p_v                       it is only measured

    The head takes a gradient by z to one by the state, of the model's width. Both are
    computed on the way forward, while the piece is at hand, so that nothing is computed
    twice, and backward is a sum of two small products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        ref_states: torch.Tensor,
        tokens: torch.Tensor,
        head: OutputHead,
    ) -> tuple[torch.Tensor, ...]:
        """Return the columns of TokenStatistics, each (rows,); states are (rows, width)."""
        rows = rows_of_a_piece(states, head)
        pieces = zip(states.split(rows), ref_states.split(rows), tokens.split(rows))
        results = [statistics_of_piece(*piece, head, states.requires_grad) for piece in pieces]
        statistics, gradients = zip(*results)
        if states.requires_grad:
            # Of logprobs and of KL, each (rows, width).
            ctx.save_for_backward(*[torch.cat(parts) for parts in zip(*gradients)])
        logprobs, ref_logprobs, kl, entropy = [torch.cat(parts) for parts in zip(*statistics)]
        ctx.mark_non_differentiable(ref_logprobs, entropy)
        return logprobs, ref_logprobs, kl, entropy

    @staticmethod
    def backward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the loss by the states.

        weights: its gradients by the statistics, each (rows,).
        """
        logprobs_by_states, kl_by_states = ctx.saved_tensors
        loss_by_logprobs, _, loss_by_kl, _ = weights
        loss_by_states = loss_by_logprobs[:, None] * logprobs_by_states
        loss_by_states += loss_by_kl[:, None] * kl_by_states
        return loss_by_states, None, None, None


def statistics_of_piece(
    states: torch.Tensor,
    ref_states: torch.Tensor,
    tokens: torch.Tensor,
    head: OutputHead,
    needs_gradient: bool,
) -> tuple[TokenStatistics, tuple[torch.Tensor, ...]]:
    """Return the statistics of some rows, and the gradients of logprobs and KL by the states.

    What is computed in place, by functions that end in _, takes no memory of its own.
    """
    # The graph that begins here reaches from these states to their logits, and no further.
    with torch.set_grad_enabled(needs_gradient):
        states = states.detach().requires_grad_(needs_gradient)
        logits = head(states)
    all_logprobs = logits.detach().log_softmax(-1)
    all_ref_logprobs = head(ref_states).log_softmax(-1)
    probabilities = all_logprobs.exp()
    logprobs = of_tokens(all_logprobs, tokens)
    ref_logprobs = of_tokens(all_ref_logprobs, tokens)
    entropy = -expectation(probabilities, all_logprobs)

    differences = all_logprobs.sub_(all_ref_logprobs)
    kl = expectation(probabilities, differences)
    statistics = TokenStatistics(logprobs, ref_logprobs, kl, entropy)
    if not needs_gradient:
        return statistics, ()

    # What is below 6e-8 is 0 in float16, and most of these gradients are: so they pass the
    # head multiplied, and are divided in float32. A power of two rounds nothing.
    factor = 2.0**6
    kl_by_logits = differences.sub_(kl[:, None]).mul_(probabilities).mul_(factor)
    (kl_by_states,) = torch.autograd.grad(logits, states, kl_by_logits, retain_graph=True)
    # onehot_a - p, in the place of p.
    logprobs_by_logits = probabilities.neg_()
    logprobs_by_logits[torch.arange(len(tokens)), tokens] += 1
    logprobs_by_logits.mul_(factor)
    (logprobs_by_states,) = torch.autograd.grad(logits, states, logprobs_by_logits)
    gradients = (logprobs_by_states, kl_by_states)
    return statistics, tuple(gradient.to(kl.dtype).div_(factor) for gradient in gradients)


def expectation(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values of each row by its probabilities, (rows,)."""
    return torch.einsum("rv,rv->r", probabilities, values)


def rows_of_a_piece(states: torch.Tensor, head: OutputHead, numbers: int = 2**24) -> int:
    """Return how many rows of logits are so many numbers, 64 MB in float32.

    Matrix products of fewer rows are slow on a CPU; more take memory and gain nothing.
    """
    vocabulary = states.shape[-1] if head.layer is None else head.layer.weight.shape[0]
    return max(numbers // vocabulary, 1)


def of_tokens(all_logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logprobs of the given tokens, (rows,), out of those of all, (rows, vocabulary)."""
    return all_logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


# --------------------------------------------------------------- advantages and returns
def compute_advantages(
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns by generalized advantage estimation (GAE).

    delta_t = reward_t + gamma * value_(t+1) - value_t tells how much better one token
    went than expected; the advantage at t is the sum of all delta from t on, each later
    one discounted by another gamma * lam (Schulman et al. 2016, equation 16). After the
    last token nothing is expected. The return, advantage + value, is what the value
    head should have said. All tensors are (batch, response length); what is 0 in the
    mask is padding.
    """
    response_length = rewards.shape[1]
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(response_length)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    returns = advantages + values

    # Many whiten advantages, which would blow up the noise of a batch of like scores:
    # these stay in units of the score. They are taken back from the returns, so that
    # policy loss and value loss work with the same rounded numbers.
    advantages = returns - values
    return advantages, returns


# ------------------------------------------------------------------- the clipped losses
def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's clipped surrogate loss, and the share of tokens where clipping counts.

    ratio is a token's probability now divided by that with which it was sampled: 1 in
    the first update of a step, where nothing is clipped. The larger of two losses
    counts, so nothing is gained by going further once a good token (advantage > 0) is 1
    + clip_range times as probable, or a bad one 1 - clip_range times; the way back is
    never clipped (Schulman et al. 2017, equation 7). All tensors are (batch, response
    length); both results are means over tokens.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * clipped_ratio
    loss = masked_mean(torch.max(unclipped_loss, clipped_loss), mask)
    clip_fraction = masked_mean((clipped_loss > unclipped_loss).float(), mask)
    return loss, clip_fraction


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
) -> torch.Tensor:
    """Return the value head's clipped loss: half the mean of the larger squared error.

    Nothing is gained by a value further than clip_range from that before the step: one
    batch is a noisy witness of what to expect. All tensors are (batch, response
    length).
    """
    lowest, highest = old_values - clip_range, old_values + clip_range
    clipped_values = torch.clamp(values, lowest, highest)
    unclipped_loss = (values - returns) ** 2
    clipped_loss = (clipped_values - returns) ** 2
    return 0.5 * masked_mean(torch.max(unclipped_loss, clipped_loss), mask)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values where the mask is 1."""
    return (values * mask).sum() / mask.sum()


# ------------------------------------------------------------------------- the PPO step
class Batch(NamedTuple):
    """The responses of a step as tensors, one a row.

    inputs: what the policy takes, by name: input_ids, attention_mask and earned. The
    others are (batch, response length), padded on the right.
    """

    inputs: dict[str, torch.Tensor]
    tokens: torch.Tensor
    mask: torch.Tensor
    token_scores: torch.Tensor

    def minibatch(self, indices: torch.Tensor) -> "Batch":
        """Return these responses of the batch."""
        return Batch(
            {name: tensor[indices] for name, tensor in self.inputs.items()},
            self.tokens[indices],
            self.mask[indices],
            self.token_scores[indices],
        )


class PolicyPass(NamedTuple):
    """What the policy, and the base model beside it, say of the tokens of some responses.

    All are (responses, response length), but ref_states, of which the output head makes
    the base model's logits: (responses, response length, width). kl is KL(policy || base
    model), entropy that of the policy, both in nats.
    """

    ref_states: torch.Tensor
    values: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor


class Experience(NamedTuple):
    """What a step learns from: logprobs and values as they were, and how it then went.

    All are (batch, response length), and stay the same in all updates of the step.
    """

    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def minibatch(self, indices: torch.Tensor) -> "Experience":
        """Return these responses of the batch."""
        return Experience._make(tensor[indices] for tensor in self)


class TokenFigures(NamedTuple):
    """What a step knew of each token before it learned: what one watches, token by token.

    Lists with a 1-D float tensor for each response. scores: what its tokens earned.
    ref_logprobs: of the base model.
    """

    scores: list[torch.Tensor]
    kl: list[torch.Tensor]
    values: list[torch.Tensor]
    advantages: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    ref_logprobs: list[torch.Tensor]


UPDATE_METRICS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "entropy")


class ExactKLTrainer(trl.PPOTrainer):
    """TRL's PPOTrainer, its step written out, with exact KLs and a score for each token.

    The KL against the base model is summed over the whole vocabulary at each position
    t, KL_t = sum_v p(v) ln(p(v) / p_ref(v)), where ln(p / p_ref) of the sampled token
    is usual: the same mean with far less noise. But it does not depend on the token
    sampled at t, so a reward that has it can't teach the policy to lower KL_t itself.
    The gradient of KL_t therefore joins the loss: of a reward R that depends on the
    parameters, grad E[R] = E[R grad ln p] + E[grad R], where PPO's clipped loss is the
    first term.

    Of several processes each has the whole batch, and does its share of each minibatch.
    """

    def step(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        token_scores: list[torch.Tensor],
    ) -> tuple[dict[str, float], TokenFigures]:
        """Improve the policy with one batch of responses.

        queries, responses: 1-D tensors of token ids. token_scores: what each token
        earns, 1-D float tensors. Returns the step's metrics, and the figures of each
        token.
        """
        config = self.config
        batch = self.make_batch(queries, responses, token_scores)

        # 1. Score and ref pass: the policy that sampled, and the base model.
        figures, all_ref_states, first_pass = self.score_and_ref_pass(batch)
        values, logprobs, ref_logprobs, kl, _ = figures

        # 2. KL and rewards: what a token earns, less the price of its KL.
        kl = kl * batch.mask
        rewards = batch.token_scores - config.init_kl_coef * kl

        # 3. Advantages and returns.
        advantages, returns = compute_advantages(
            values, rewards, batch.mask, gamma=config.gamma, lam=config.lam
        )

        # 4. Updates: several passes over the batch, in minibatches.
        experience = Experience(logprobs, values, advantages, returns)
        updates, skipped_updates = self.take_updates(batch, experience, all_ref_states, first_pass)

        # 5. Metrics: means over the updates, except approx_kl, which is of the whole step.
        means = dict(zip(UPDATE_METRICS, updates.mean(0).tolist()))
        means["approx_kl"] *= approx_kl_growth(len(updates))
        metrics = {
            "kl": kl.sum(1).mean().item(),
            "kl_coef": config.init_kl_coef,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **means,
            "skipped_updates": skipped_updates,
        }
        columns = (batch.token_scores, kl, values, advantages, logprobs, ref_logprobs)
        unpadded = [without_padding(tensor, batch.mask) for tensor in columns]
        return metrics, TokenFigures._make(unpadded)

    def make_batch(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        token_scores: list[torch.Tensor],
    ) -> Batch:
        """Return a step's lists as padded tensors on the device."""
        device = self.accelerator.device
        inputs, mask = pad_batch(self.tokenizer, queries, responses, device)
        tokens = inputs["input_ids"][:, -mask.shape[1] :]
        scores = torch.nn.utils.rnn.pad_sequence(token_scores, batch_first=True).to(device)
        inputs["earned"] = scores.cumsum(1) - scores
        return Batch(inputs, tokens, mask, scores)

    # -------------------------------------------------------------------- the passes
    @property
    def head(self) -> OutputHead:
        """What makes logits of the policy's states, and of the base model's."""
        return self.accelerator.unwrap_model(self.model).head

    def score_and_ref_pass(
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor | None, PolicyPass | None]:
        """Return what the policy that sampled says of the batch, and what updates use again.

        Returns figures (5, batch, response length), those of PolicyPass in its order. Where
        one minibatch is the whole batch, the third is its pass, with its gradient: it is
        that of the first update too. Where there are several, the second are the states of
        the base model, (batch, response length, width), unless they are logits, which would
        take too much memory.
        """
        is_whole = self.config.mini_batch_size >= len(batch.mask)
        keeps_states = not is_whole and self.head.layer is not None
        figures = batch.token_scores.new_zeros(5, *batch.mask.shape)
        all_ref_states: torch.Tensor | None = None
        order = torch.arange(len(batch.mask), device=batch.mask.device)
        for indices in order.split(self.config.mini_batch_size):
            own_indices = self.own_share(indices)
            minibatch = batch.minibatch(own_indices)
            ref_states = self.ref_pass(minibatch.inputs)
            with torch.set_grad_enabled(is_whole):
                policy_pass = self.policy_pass(minibatch, ref_states)

            # The step is measured against these: no gradient goes through them.
            figures[:, own_indices] = torch.stack(policy_pass[1:]).detach()
            if keeps_states:
                if all_ref_states is None:
                    shape = (len(batch.mask), *ref_states.shape[1:])
                    all_ref_states = ref_states.new_zeros(shape)
                all_ref_states[own_indices] = ref_states

        # What other processes found is 0 here, so the sum over all processes has it all.
        figures = self.accelerator.reduce(figures, "sum")
        if all_ref_states is not None:
            all_ref_states = self.accelerator.reduce(all_ref_states, "sum")
        return figures, all_ref_states, policy_pass if is_whole else None

    def own_share(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the responses that this process takes on: all, where it is the only one."""
        shares = indices.tensor_split(self.accelerator.num_processes)
        return shares[self.accelerator.process_index]

    def ref_pass(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states of the base model, which is the policy with its adapter off."""
        with torch.no_grad(), self.optional_peft_ctx():
            ref_states, _ = self.accelerator.unwrap_model(self.model)(**inputs)
        return ref_states

    def policy_pass(self, batch: Batch, ref_states: torch.Tensor) -> PolicyPass:
        """Return what the policy, as it is now, says of the responses of a minibatch."""
        states, values = self.model(**batch.inputs)
        statistics = token_statistics(states, ref_states, batch.tokens, self.head)
        return PolicyPass(ref_states, values, *statistics)

    # ------------------------------------------------------------------- the updates
    def take_updates(
        self,
        batch: Batch,
        experience: Experience,
        all_ref_states: torch.Tensor | None,
        first_pass: PolicyPass | None,
    ) -> tuple[torch.Tensor, int]:
        """Take PPO_EPOCHS passes over the batch, with an update for each minibatch.

        all_ref_states, first_pass: as of score_and_ref_pass. Returns UPDATE_METRICS of each
        update, (updates, 5), and how many were skipped.
        """
        updates, skipped_updates = [], 0
        order = torch.arange(len(batch.mask), device=batch.mask.device)
        for epoch in range(self.config.ppo_epochs):
            # Minibatches are drawn anew, and alike in all processes.
            if first_pass is None:
                order = order[torch.randperm(len(order))]
                order = accelerate.utils.broadcast(order)

            for indices in order.split(self.config.mini_batch_size):
                own_indices = self.own_share(indices)
                minibatch = batch.minibatch(own_indices)
                if first_pass is not None:
                    ref_states = first_pass.ref_states
                elif all_ref_states is not None:
                    ref_states = all_ref_states[own_indices]
                else:
                    ref_states = self.ref_pass(minibatch.inputs)

                if first_pass is not None and epoch == 0:
                    policy_pass = first_pass
                else:
                    policy_pass = self.policy_pass(minibatch, ref_states)

                # Losses are means over tokens: a process counts by its share of them.
                weight = minibatch.mask.sum() / batch.mask[indices].sum()
                own_experience = experience.minibatch(own_indices)
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
        """Take one update; return its UPDATE_METRICS, (5,), and whether it was skipped.

        weight: of the losses of this process among those of all, 1 where it is the only
        one.
        """
        config, mask = self.config, batch.mask
        surrogate_loss, clip_fraction = policy_loss(
            policy_pass.logprobs,
            experience.logprobs,
            experience.advantages,
            mask,
            config.cliprange,
        )
        critic_loss = value_loss(
            policy_pass.values,
            experience.values,
            experience.returns,
            mask,
            config.cliprange_value,
        )

        # The KL is not paid twice: through the rewards a token answers for the KL of
        # those after it; its own KL, which no sampled token changes, is here.
        mean_kl = masked_mean(policy_pass.kl, mask)
        loss = surrogate_loss + config.init_kl_coef * mean_kl + config.vf_coef * critic_loss

        with torch.no_grad():
            # KL(policy that sampled || policy now), to the second order.
            log_ratio = policy_pass.logprobs - experience.logprobs
            approx_kl = 0.5 * masked_mean(log_ratio**2, mask)
            entropy = masked_mean(policy_pass.entropy, mask)

            # In the order of UPDATE_METRICS.
            figures = [surrogate_loss, critic_loss, approx_kl, clip_fraction, entropy]
            figures = self.accelerator.reduce(torch.stack(figures) * weight, "sum")
            whole_loss = self.accelerator.reduce(loss * weight, "sum")
        return figures, self.descend(loss * weight, whole_loss)

    def descend(self, loss: torch.Tensor, whole_loss: torch.Tensor) -> bool:
        """Move the policy down the gradient of the loss; return whether that was skipped.

        whole_loss: of all processes. Where it, or the gradient, is not finite, nothing
        moves.
        """
        # The gradients of several processes are averaged, where their sum is wanted.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        parameters = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        max_norm = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, max_norm)

        # In float16 the loss is multiplied by a scale that is found by trying: where it
        # was too large for the gradient, the scaler leaves the update out and lowers
        # it. So it has to be asked each time, and what it leaves out is not counted.
        if self.accelerator.scaler is not None:
            is_good = whole_loss.isfinite()
            self.optimizer.step()
        else:
            is_good = whole_loss.isfinite() & norm.isfinite()
            if is_good:
                self.optimizer.step()
        self.optimizer.zero_grad()
        return not is_good

    # ------------------------------------------------------------------ the measurement
    def compare_with_base(
        self, queries: list[torch.Tensor], responses: list[torch.Tensor], is_base: bool
    ) -> tuple[list[float], list[float]]:
        """Return each response's KL(policy || base model) in nats, and base model's logprob.

        is_base: measure the base model itself, whose KL is 0.
        """
        kls, ref_logprobs = [], []
        size = self.config.mini_batch_size
        for start in progress.progress(range(0, len(queries), size)):
            some_responses = responses[start : start + size]
            # Only the values depend on what was earned, and they are not asked here.
            token_scores = [torch.zeros(len(response)) for response in some_responses]
            batch = self.make_batch(queries[start : start + size], some_responses, token_scores)
            states = ref_states = self.ref_pass(batch.inputs)
            if not is_base:
                with torch.no_grad():
                    states, _ = self.accelerator.unwrap_model(self.model)(**batch.inputs)

            statistics = token_statistics(states, ref_states, batch.tokens, self.head)
            kls += (statistics.kl * batch.mask).sum(1).tolist()
            ref_logprobs += (statistics.ref_logprobs * batch.mask).sum(1).tolist()
        return kls, ref_logprobs


def without_padding(tensor: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return what a tensor (batch, length) has of the tokens of each response, on the CPU."""
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(tensor.cpu(), lengths)]


def make_trainer(
    policy: PolicyWithValueHead,
    tokenizer: Tokenizer,
    settings: Settings,
    device: torch.device,
    dtype: str,
) -> ExactKLTrainer:
    """Return the trainer; its optimizer, TRL's Adam, has the adapter and the value head."""
    # The loss is scaled only in float16, where gradients would vanish.
    mixed_precision = "fp16" if dtype == "float16" else "no"
    config = trl.PPOConfig(
        seed=settings.seed,
        batch_size=settings.batch_size,
        mini_batch_size=settings.rows_at_once,
        ppo_epochs=settings.ppo_epochs,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        init_kl_coef=settings.kl_coef,
        adap_kl_ctrl=False,  # TRL's controller takes some 10,000 samples to act
        cliprange=settings.clip_range,
        cliprange_value=settings.value_clip_range,
        vf_coef=settings.vf_coef,
        gamma=settings.gamma,
        lam=settings.lam,
        accelerator_kwargs={
            "cpu": device.type == "cpu",
            "mixed_precision": mixed_precision,
        },
    )
    return ExactKLTrainer(config, policy, ref_model=None, tokenizer=tokenizer)


# -------------------------------------------------------------------- the learning rate
def approx_kl_growth(updates: int) -> float:
    """Return by how much the approx_kl of a step is larger than the mean of its updates.

    Each was measured before its update; wanted is the one after the last. Where all
    updates go equally far in one direction, a KL grows with the square of their number:
    measured are c times 0, 1, 4, 9 …, wanted is c * updates². With two updates that is
    8 times the mean.
    """
    measured = sum(number**2 for number in range(updates))
    if measured == 0:
        return 1.0  # a single update can't be measured
    return updates * updates**2 / measured


def target_of_next_step(
    metrics: Metrics, total_steps: int, settings: Settings, scale: Scale
) -> float:
    """Return how far the next step may move the policy, in nats per token.

    The target falls with the steps that are left, or the noise of the last ones would
    stay. Of a rule it falls with the responses that fail, too: where few do, little is
    left to learn, and where words are rare, so that all fail for long, there is no less
    time to learn them. It is TARGET_APPROX_KL at the beginning of a run of which half fail.
    """
    steps_left = 1 - len(metrics) / total_steps
    if not scale.is_rule:
        # Other scores can always get better, so time alone counts.
        return settings.target_approx_kl * steps_left**3

    # That none of the last 100 failed does not mean that none will: one more is counted.
    failure_rate = 1 - progress.recent(metrics, "success_rate") + 1 / RECENT
    return settings.target_approx_kl * 2 * failure_rate * steps_left


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    metrics: Metrics,
    total_steps: int,
    settings: Settings,
    scale: Scale,
    limit: float = 1.5,
) -> None:
    """Let the next step move the policy as far as its target, judging by how far the last went.

    approx_kl grows with the square of the rate, so the rate is multiplied by the square
    root of target / approx_kl. limit: the largest factor, for a single step is noisy.
    """
    if settings.target_approx_kl == 0:
        return
    target = target_of_next_step(metrics, total_steps, settings, scale)

    # None stands for one too large to be a number. Where nothing was earned yet nothing has
    # moved, which tells nothing about the rate.
    approx_kl = metrics[-1]["approx_kl"]
    if approx_kl == 0:
        return
    factor = 0.0 if approx_kl is None else math.sqrt(target / max(approx_kl, 1e-12))
    factor = min(max(factor, 1 / limit), limit)

    # Where nothing can be learned the rate would grow without end.
    highest = 100 * settings.learning_rate
    for group in optimizer.param_groups:
        group["lr"] = min(group["lr"] * factor, highest)


# --------------------------------------------------------------------------------- main
def main(argv: Sequence[str] = ()) -> int:
    """Train with PPO, by the constants above or flags in argv; return the exit status."""
    return command.run_main(run, argv, globals(), Settings, CHECKS)


if command.is_script(globals()):
    sys.exit(command.launch(run, settings))
elif __name__ == "__main__":  # in a cell of a notebook
    main()
