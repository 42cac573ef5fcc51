"""Measure a step of the PPO trainer that TRL 1.12 has, on the job of vocabularies.py.

    python3 -m venv trl112
    trl112/bin/pip install torch==2.13.0 trl==1.12.0 transformers==5.24.0 peft==0.21.2
    trl112/bin/python benchmarks/stock_trl.py              # 151,936 tokens, responses of 100
    trl112/bin/python benchmarks/stock_trl.py 32000 10

In an environment of its own, for ours has TRL 0.11.4. The policy has the same adapter; value and
reward model, which this trainer takes as models of their own, have the policy's shape. One
minibatch, two epochs, float32. Prints the median seconds of a step, of which the first of three is
not counted, and the most memory that the process had.
"""

import resource
import statistics
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from vocabularies import make_model

BATCH_SIZE, STEPS = 10, 3
PROMPTS = ["I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling"]


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *arguments, **options):
        """Note it."""
        self.ends.append(time.perf_counter())


def main():
    """Take the steps, and print what they took."""
    vocabulary, length = map(int, sys.argv[1:] or (151_936, 100))
    with tempfile.TemporaryDirectory() as folder:
        make_model(vocabulary, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        policy = AutoModelForCausalLM.from_pretrained(folder)
        scorers = [
            AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            for _ in ("reward", "value")
        ]
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            local_rollout_forward_batch_size=BATCH_SIZE,
            num_mini_batches=1,
            num_ppo_epochs=2,
            total_episodes=BATCH_SIZE * STEPS,
            response_length=length,
            num_sample_generations=0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
        )
        rows = [tokenizer(PROMPTS[number % 6]) for number in range(BATCH_SIZE * STEPS)]
        clock = Clock()
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=scorers[0],
            value_model=scorers[1],
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
            eval_dataset=Dataset.from_list([{"input_ids": rows[0]["input_ids"]}]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[clock],
        )
        trainer.train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:])]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"TRL 1.12, {vocabulary:,} tokens, responses of {length}, {torch.get_num_threads()} threads:"
    )
    print(f"{statistics.median(seconds):.1f} s a step, {memory:.1f} GB at the peak")


if __name__ == "__main__":
    main()
