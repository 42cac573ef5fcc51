"""Make the demo model: a tiny Llama trained on texts about moods and days that grammar.txt generates."""

import argparse
import random
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

GRAMMAR_FILE = Path(__file__).with_name("grammar.txt")  # what the texts are made of
SEED = 7  # of the texts, the weights and the samples
VOCAB_SIZE = 1536  # tokens: 3 special ones, 256 bytes, the rest merges
MAX_LENGTH = 256  # positions; a text has about 22 tokens
TOKENIZER_TEXTS = 20_000  # texts the tokenizer is trained on
STEPS = 3400  # updates of the weights
BATCH_SIZE = 64  # texts in an update
CHUNK = 32  # batches whose texts are sorted by length together, so that little padding is needed
LEARNING_RATE = 4e-3  # at its peak; it falls to 0 along a cosine
WARMUP = 100  # updates in which the learning rate rises
WEIGHT_DECAY = 0.05  # of AdamW
REPORT_EVERY = 100  # updates between two progress lines
SAMPLES = 500  # continuations of each prompt that are measured
NEW_TOKENS = 10  # in a continuation

PROMPTS = ["I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling"]
HELD_OUT_PROMPTS = ["Right now I am", "My day was", "It makes me feel", "Tonight I feel"]
HELD_OUT_PROMPTS += ["Everything seems", "I woke up feeling"]
POSITIVE_WORDS = (  # the usual aim; as a regular expression
    "happy|glad|good|great|smile|joy|love|wonderful|amazing|excited|pleased|delighted|cheerful|grateful|"
    "blessed|fantastic"
)
CALM_WORDS = "calm|serene|peaceful"  # another aim the model can be trained for

TONES = {"up": 38, "down": 37, "flat": 25}  # weights; they decide how often a positive word comes
PRONOUNS = {  # which pronouns a subject can have, by its last word; those that are pronouns need no entry
    "she": "mother sister grandmother aunt daughter friend cousin neighbor teacher boss",
    "he": "father brother grandfather uncle son friend cousin neighbor teacher boss",
    "they": "friends children parents people",
}
FORMS = {  # what agrees with the subject, in the order of the first row
    "I": "I am was my me have",
    "we": "we are were our us have",
    "you": "you are were your you have",
    "she": "she is was her her has",
    "he": "he is was his him has",
    "they": "they are were their them have",
}
IRREGULAR_PAST = (
    "read/read write/wrote drink/drank sleep/slept go/went feed/fed take/took ride/rode sit/sat swim/swam "
    "run/ran make/made eat/ate buy/bought sing/sang meet/met think/thought"
)
CONTRACTIONS = {
    "I am": "I'm",
    "we are": "we're",
    "it is": "it's",
    "she is": "she's",
    "did not": "didn't",
}
CONTRACTED = 0.4  # share of the texts that use contractions


def parse_grammar(text):
    """Return the rules: for each name its alternatives and their weights."""
    rules = {}
    for line in re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\n  ", " ").splitlines():
        if not line:
            continue
        name, _, alternatives = line.partition(":")
        found = [
            re.fullmatch(r"\s*(?:(\d+)\*)?(.*)", part).groups() for part in alternatives.split("|")
        ]
        rules[name] = [text.strip() for _, text in found], [int(weight or 1) for weight, _ in found]
    return rules


def inflect(verb, form):
    """Return the third person ("s"), the past ("ed") or the participle ("ing") of a verb."""
    if form == "s":
        return verb + ("es" if verb.endswith(("ch", "sh", "go", "ss", "x")) else "s")
    past = dict(pair.split("/") for pair in IRREGULAR_PAST.split())
    if form == "ed" and verb in past:
        return past[verb]
    if verb in ("swim", "run", "sit", "plan"):
        verb += verb[-1]
    return verb.removesuffix("e") + form


class Writer:
    """Writes texts: expands the grammar from left to right, remembering the tone and the subject."""

    def __init__(self, rules, seed):
        self.rules = rules
        self.random = random.Random(seed)

    def write(self):
        """Return one text, mostly of two or three sentences."""
        self.expand("any")  # the tone to start with
        self.subject = "I"
        text = re.sub(r"\s+", " ", self.expand("text")).strip()
        text = re.sub(r" (?=[.,!])", "", text)
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        text = re.sub(r"\b(\w+) and \1\b", r"\1", text)  # not "happy and happy"
        if self.random.random() < CONTRACTED:
            for full, short in CONTRACTIONS.items():
                text = re.sub(rf"\b{full}\b", short, text)
        return re.sub(r"(?:^|[.!] )[a-z]", lambda match: match[0].upper(), text)

    def expand(self, name, form=""):
        """Return a text made by a rule, its first word inflected if a form is given."""
        if name == "any":
            self.tone = self.random.choices(list(TONES), TONES.values())[0]
            return ""
        if name == "flip":
            self.tone = self.random.choice([tone for tone in ("up", "down") if tone != self.tone])
            return ""
        if name == "s":  # a new sentence
            self.subject = "I"
        rule = self.rules.get(f"{name}_{self.tone}") or self.rules[name]
        text = self.random.choices(*rule)[0]
        if form:
            verb, _, rest = text.partition(" ")
            text = f"{verb}+s {rest}" if form == "s" else f"{inflect(verb, form)} {rest}"
        text = re.sub(r"<(\w+)\.?(\w*)>|@(\w+)|(\w+)\+s", self.replace, text)
        if name.startswith("who"):
            last = text.split()[-1]
            pronouns = [pronoun for pronoun, words in PRONOUNS.items() if last in words.split()]
            self.subject = self.random.choice(pronouns or [last])
        return text

    def replace(self, match):
        """Return what stands for <rule>, <rule.form>, @word or verb+s."""
        rule, form, word, verb = match.groups()
        if rule:
            return self.expand(rule, form)
        if word:
            return FORMS[self.subject].split()[FORMS["I"].split().index(word)]
        return inflect(verb, "s") if self.subject in ("she", "he") else verb


def train_tokenizer(texts):
    """Return a byte-level BPE tokenizer that puts <s> in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer):
    """Return the untrained model, in float32."""
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)  # no sampling settings
    return model


def batches(writer, tokenizer):
    """Yield token ids and labels of new texts without end, padded on the right."""
    while True:
        texts = [writer.write() + tokenizer.eos_token for _ in range(CHUNK * BATCH_SIZE)]
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        chunk = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
        writer.random.shuffle(chunk)
        for rows in chunk:
            rows = [torch.tensor(row) for row in rows]
            ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
            yield ids, ids.masked_fill(ids == tokenizer.pad_token_id, -100)


def train(model, tokenizer, writer):
    """Train the model on texts it never sees twice."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [WARMUP])
    start, total = time.time(), 0.0
    for step, (ids, labels) in zip(range(1, STEPS + 1), batches(writer, tokenizer)):
        loss = model(input_ids=ids, labels=labels).loss  # padding on the right needs no mask
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % REPORT_EVERY == 0:
            loss, seconds = total / REPORT_EVERY, time.time() - start
            print(f"step {step}/{STEPS}  loss {loss:.3f}  {seconds:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def sample(model, tokenizer, prompt, count=SAMPLES):
    """Return the token ids of continuations sampled at temperature 1, each up to and with </s>."""
    query = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **query, do_sample=True, top_k=0, num_return_sequences=count, max_new_tokens=NEW_TOKENS
    )
    responses = output[:, query["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in responses]


def share(texts, words):
    """Return the share of texts in which one of the words stands."""
    return sum(bool(re.search(rf"\b({words})\b", text, re.IGNORECASE)) for text in texts) / len(
        texts
    )


def measure(model, tokenizer, prompts):
    """Print what the model says after the prompts: one line each, and one for all together."""
    everything = []
    for prompt in prompts:
        rows = sample(model, tokenizer, prompt)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        first = max(sum(row[0] == token for row in rows) for token in {row[0] for row in rows})
        print(
            f"{prompt:20} positive {share(texts, POSITIVE_WORDS):.2f}  calm {share(texts, CALM_WORDS):.2f}  "
            f"different {len(set(texts[:200])) / 200:.2f}  most frequent first token {first / len(rows):.2f}  "
            f"tokens {sum(map(len, rows)) / len(rows):.1f}  e.g.{texts[0]}"
        )
        everything += texts
    positive, calm = share(everything, POSITIVE_WORDS), share(everything, CALM_WORDS)
    print(f"{'together':20} positive {positive:.3f}  calm {calm:.3f}")


def main():
    """Make the model, save it and measure what was saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output-dir", type=Path, default=Path(__file__).parent, help="default: %(default)s"
    )
    output_dir = parser.parse_args().output_dir
    start = time.time()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)
    writer = Writer(parse_grammar(GRAMMAR_FILE.read_text()), SEED)
    tokenizer = train_tokenizer(writer.write() for _ in range(TOKENIZER_TEXTS))
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, e.g. {writer.write()}")
    train(model, tokenizer, writer)
    model.half().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    size = sum(path.stat().st_size for path in output_dir.iterdir() if path.is_file())
    print(f"saved in {output_dir}, {size / 1e6:.1f} MB")
    model = LlamaForCausalLM.from_pretrained(output_dir, dtype=torch.float32).eval()
    measure(model, tokenizer, PROMPTS)
    measure(model, tokenizer, HELD_OUT_PROMPTS)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
