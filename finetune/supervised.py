"""Training on examples, by transformers' Trainer, for the two stages before PPO."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.batches import order_of
from finetune.checkpoint import Checkpoint
from finetune.command import Stop, stop_on_signal
from finetune.fields import Tally
from finetune.files import Row
from finetune.processes import device_name, process_count
from finetune.progress import Metrics, MetricsLog, count_steps, give_up_on_bad_numbers, recent
from finetune.rates import rate_of
from finetune.settings import StageSettings


@dataclass(frozen=True)
class Stage:
    """What a script trains, on what, and how it is measured."""

    model: Any  # transformers' or PEFT's; what does not require gradients is frozen
    examples: list[Row]  # to train on, each with input_ids
    collate: Callable[[list[Row]], Any]  # makes a batch of examples
    measure: Callable[..., Row]  # returns held-out figures; with whole=False loss and accuracy
    settings: StageSettings
    files: dict[str, str]  # {path: SHA-256} of the data
    project: str  # the name of the script, under which trackers keep its runs
    highest_rate: float = math.inf  # that auto may give

    @property
    def steps(self) -> int:
        """How many steps the whole run takes."""
        return count_steps(self.settings, self.examples)

    @property
    def learning_rate(self) -> float:
        """What LEARNING_RATE gives, at its highest."""
        return rate_of(self.settings.learning_rate, self.model.config, self.highest_rate)


@dataclass(frozen=True)
class Training:
    """A stage's training as it goes on: what takes the steps, and what is known so far."""

    stage: Stage
    trainer: transformers.Trainer
    checkpoint: Checkpoint
    metrics: Metrics  # a record for each step that is done
    base: Row  # the figures before the first step

    def save(self) -> None:
        """Replace the last checkpoint."""
        self.checkpoint.save(self.metrics, base=self.base)


# ------------------------------------------------------------------------- the training
def fit(
    stage: Stage,
    trainer_class: type[transformers.Trainer] = transformers.Trainer,
) -> tuple[Metrics, Row]:
    """Train what is not frozen; return the metrics of all steps, and the figures before the first.

    trainer_class: which has the loss. With RESUME it goes on from the checkpoint.
    """
    model, settings = stage.model, stage.settings
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, stage.learning_rate)
    checkpoint = Checkpoint(model, optimizer, None, settings, stage.files)
    state = restore(checkpoint, stage.steps) if settings.resume else {"metrics": [], "base": None}
    metrics = state["metrics"]
    base = state["base"] or stage.measure()

    # Trainer changes this, and it would be saved with the model.
    use_cache = getattr(model.config, "use_cache", None)
    trainer = make_trainer(stage, trainer_class, optimizer, done=len(metrics))

    # The scaler is the trainer's, which needs the optimizer as it was.
    checkpoint.scaler = trainer.accelerator.scaler
    if checkpoint.scaler and state.get("scaler"):
        checkpoint.scaler.load_state_dict(state["scaler"])

    train(Training(stage, trainer, checkpoint, metrics, base))
    model.config.use_cache = use_cache
    return metrics, base


def restore(checkpoint: Checkpoint, steps: int) -> dict[str, Any]:
    """Put weights and optimizer back to the last checkpoint, say so, and return it."""
    state = checkpoint.load(steps)
    print(f"Going on after step {len(state['metrics'])}", flush=True)
    return state


def train(training: Training) -> None:
    """Take the steps that are left, and record each."""
    stage, trainer, metrics = training.stage, training.trainer, training.metrics
    log = MetricsLog(stage.settings, metrics, stage.steps, stage.project)
    with stop_on_signal(after_step=True) as stop, log:
        trainer.add_callback(Recorder(training, log, stop))
        trainer.remove_callback(transformers.PrinterCallback)
        if len(metrics) < stage.steps:
            trainer.train()


def make_trainer(
    stage: Stage,
    trainer_class: type[transformers.Trainer],
    optimizer: torch.optim.Optimizer,
    done: int,
) -> transformers.Trainer:
    """Return the trainer of the steps that are left, where so many are done."""
    settings, total = stage.settings, stage.steps

    # The rate rises, then it falls along a cosine. A run that goes on is in the middle of that.
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(settings.warmup_share * total),
        num_training_steps=total,
        last_epoch=done - 1,
    )

    # The order of the whole run is known, so that it can go on anywhere.
    order = order_of(stage.examples, total, settings)
    rest = order[done * settings.batch_size :]
    return trainer_class(
        model=stage.model,
        args=make_arguments(stage, steps=max(total - done, 1)),
        data_collator=stage.collate,
        train_dataset=[stage.examples[place] for place in rest],
        optimizers=(optimizer, schedule),
    )


def make_arguments(stage: Stage, steps: int) -> TrainingArguments:
    """Return the arguments of Trainer for so many steps."""
    model, settings = stage.model, stage.settings
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        max_steps=steps,
        train_sampling_strategy="sequential",
        # BATCH_SIZE and MINI_BATCH_SIZE are those of all processes together.
        per_device_train_batch_size=settings.rows_at_once // process_count(),
        gradient_accumulation_steps=settings.batch_size // settings.rows_at_once,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,  # every adapted layer is used in each pass
        use_cpu=model.device.type == "cpu",
        fp16=model.dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # its checkpoints are torn by a kill; ours are not
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    # Trainer would spread a batch over all GPUs, and has no setting for that.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# --------------------------------------------------------------------------- the record
class Recorder(transformers.TrainerCallback):
    """What is done around each step of transformers' Trainer: records, checkpoints, stops."""

    def __init__(self, training: Training, log: MetricsLog, stop: Stop) -> None:
        self.training = training
        self.log = log
        self.stop = stop
        metrics = training.metrics
        before = metrics[-1]["seconds"] if metrics else 0
        self.start = time.perf_counter() - before

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        """Begin a step with random numbers of its own, so that a run can go on anywhere."""
        step = len(self.training.metrics) + 1
        # They are for LORA_DROPOUT: each process leaves out other inputs. No seed of SEED and
        # step is as large as what the second process begins with.
        of_process = args.process_index * 10**16
        torch.manual_seed(of_process + self.training.stage.settings.seed * 10**6 + step)
        # Or one loss that is not finite would stay for good.
        self.training.trainer._tr_loss.zero_()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        """Leave out an update whose gradient is not finite: without gradients nothing moves."""
        # float16's scaler leaves it out by itself.
        if args.fp16:
            return
        optimizer = self.training.checkpoint.optimizer
        weights = optimizer.param_groups[0]["params"]
        if not all(weight.grad.isfinite().all() for weight in weights if weight.grad is not None):
            optimizer.zero_grad()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Row | None = None,
        **others: Any,
    ) -> None:
        """Record a step that was taken, show it, and save what is due."""
        # Trainer's last log is a summary of them all.
        if logs is None or "loss" not in logs:
            return
        training = self.training
        metrics, settings, total = training.metrics, training.stage.settings, training.stage.steps
        metrics.append(self.make_record(logs, args.fp16))
        self.show()
        give_up_on_bad_numbers(metrics)

        self.stop.agree()
        step, skipped = len(metrics), metrics[-1]["skipped_updates"]
        due = settings.save_every and step % settings.save_every == 0
        if (due and not skipped) or self.stop.requested or step == total:
            training.save()
        control.should_training_stop = bool(self.stop.requested)

    def make_record(self, logs: Row, fp16: bool) -> Row:
        """Return the line of metrics.jsonl for a step; what is not finite is None, JSON's null.

        logs: Trainer's figures of the step.
        """
        stage, step = self.training.stage, len(self.training.metrics) + 1
        samples = step * stage.settings.batch_size
        figures = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
        wrong = [name for name in figures if not math.isfinite(figures[name])]

        # Gradients too large for float16 are no failure: so its scaler finds a scale.
        skipped = "loss" in wrong if fp16 else bool(wrong)

        every = stage.settings.eval_every
        due = every and step % every == 0 and step < stage.steps
        held_out = stage.measure(whole=False) if due else {}
        return {
            "step": step,
            "samples": samples,
            "epoch": samples / len(stage.examples),
            **figures,
            **dict.fromkeys(wrong),
            "skipped_updates": int(skipped),
            "eval_loss": held_out.get("loss"),
            "eval_accuracy": held_out.get("accuracy"),
            "seconds": time.perf_counter() - self.start,
        }

    def show(self) -> None:
        """Write down and show the last step."""
        metrics = self.training.metrics
        text = f"loss {recent(metrics, 'loss'):.3f}"
        losses = [record["eval_loss"] for record in metrics if record["eval_loss"] is not None]
        if losses:
            text += f", held out {losses[-1]:.3f}"
        self.log.write(metrics, text)


# --------------------------------------------------------------------------- the screen
def announce(stage: Stage, dtype: str, data: str, tally: Tally) -> None:
    """Print what is going to happen.

    data: how many examples there are, in words. tally: what is told of the others.
    """
    model, settings = stage.model, stage.settings
    total = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    print(f"Model     {settings.model_name}, {total:,} parameters, {trained:,} of them trained")
    print(f"Device    {device_name(model.device)}, {dtype} weights")
    print(f"Data      {settings.data}: {data}{tally.in_words()}")
    rate = f"learning rate {stage.learning_rate:.2g}"
    if settings.learning_rate == "auto":
        rate += f", auto for a width of {model.config.get_text_config().hidden_size}"
    print(f"Training  {stage.steps} steps of {settings.batch_size}, seed {settings.seed}, {rate}")
    print(f"Output    {settings.output_dir}/\n", flush=True)
