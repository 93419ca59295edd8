# pyright: basic, reportMissingImports=false
# Runs in the engine environment, whose packages (torch, transformers) the checker does not see.
"""Train the demo model: a two-million-parameter Llama that knows `faq.json` by heart.

It exists so that a machine without a GPU and without a model hub still serves real text through
real vLLM. Run by `make demo-model` in the engine environment; one thread, some minutes. With the
same seed on the same kind of processor it writes the same bytes; elsewhere the last bits of
floating-point sums differ, so what is promised is checked instead: every phrasing in the FAQ must
be answered word for word, or nothing is written.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
SEED = 20
STEPS = 400
BATCH = 24
WARMUP_STEPS = 25
PEAK_RATE = 3e-3
VOCABULARY = 1482
CONTEXT_TOKENS = 2048
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
# Each question stands alone: the model has never seen a conversation, so it is shown the last
# question only, and no system message.
CHAT_TEMPLATE = (
    "{%- set ask = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{%- set ask.text = message['content'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|user|>' + ask.text + '<|end|>' -}}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the FAQ itself, so that its words are one or two tokens each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def misspell(question: str, dice: random.Random) -> str:
    """Return the question as a hurried person might type it."""
    if dice.random() < 0.4:
        question = question.lower()
    if dice.random() < 0.4:
        question = question.rstrip("?.!")
    if dice.random() < 0.15:
        question = dice.choice(["Please: ", "Hey, ", "ok, ", "And "]) + question
    if len(question) > 8 and dice.random() < 0.4:
        letters = list(question)
        for _ in range(dice.choice([1, 1, 2])):
            at = dice.randrange(1, len(letters) - 1)
            act = dice.randrange(3)
            if act == 0:
                del letters[at]
            elif act == 1:
                letters.insert(at, letters[at])
            else:
                letters[at - 1], letters[at] = letters[at], letters[at - 1]
        question = "".join(letters)
    return question


class Examples:
    """The FAQ as endless training batches of (ids, labels); order and typos come from one seed."""

    def __init__(self, faq: list[dict], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._pairs = [
            (question, entry["answer"]) for entry in faq for question in entry["questions"]
        ]
        self._tokenizer = tokenizer
        self._dice = random.Random(seed)  # noqa: S311 - seeded: the run must repeat
        self._queue: list[tuple[list[int], int]] = []

    def _encode(self, question: str, answer: str) -> tuple[list[int], int]:
        asked = self._tokenizer.encode(
            f"{USER}{question}{END}{ASSISTANT}", add_special_tokens=False
        )
        said = self._tokenizer.encode(f"{answer}{END}", add_special_tokens=False)
        return asked + said, len(asked)

    def _refill(self) -> None:
        """Queue one epoch; each run of four batches is sorted by length, which halves padding."""
        self._dice.shuffle(self._pairs)
        epoch = []
        for question, answer in self._pairs:
            typed = misspell(question, self._dice) if self._dice.random() < 0.5 else question
            epoch.append(self._encode(typed, answer))
        for start in range(0, len(epoch), 4 * BATCH):
            self._queue += sorted(epoch[start : start + 4 * BATCH], key=lambda pair: len(pair[0]))

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next batch; only answers are learned, questions are not predicted."""
        while len(self._queue) < BATCH:
            self._refill()
        taken, self._queue = self._queue[:BATCH], self._queue[BATCH:]
        width = max(len(ids) for ids, _ in taken)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in taken])
        labels = torch.full_like(ids, -100)
        for line, (row, asked) in enumerate(taken):
            labels[line, asked : len(row)] = ids[line, asked : len(row)]
        return ids, labels


def learning_rate(step: int) -> float:
    """Warm up, then fall along a cosine to nearly nothing."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: LlamaForCausalLM, examples: Examples) -> None:
    """Run AdamW over the examples; print the loss now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    started = time.monotonic()
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        ids, labels = examples.batch()
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 40 == 0 or step == STEPS - 1:
            took = time.monotonic() - started
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.4f}  {took:.0f} s", flush=True)


def recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, faq: list[dict]
) -> list[str]:
    """Ask every phrasing, greedily; return those that are not answered word for word."""
    model.eval()
    wrong = []
    for entry in faq:
        for question in entry["questions"]:
            prompt = tokenizer.encode(f"{USER}{question}{END}{ASSISTANT}", add_special_tokens=False)
            said = tokenizer.encode(f"{entry['answer']}{END}", add_special_tokens=False)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + said])).logits[0]
            # Greedy decoding says the answer exactly when each next token is the likeliest one.
            likeliest = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            if likeliest != said:
                wrong.append(question)
    return wrong


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in the layout that vLLM loads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # Greedy unless asked otherwise: the same question gets the same answer in every demo.
    generation = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "temperature": 0.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def untrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the model before it has learned anything."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> int:
    """Train, check and write the model, or only check it; return the exit status."""
    parser = argparse.ArgumentParser(description="Train the demo model on faq.json.")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="folder to write")
    parser.add_argument("--check", action="store_true", help="only check the model in that folder")
    arguments = parser.parse_args()
    folder: Path = arguments.out

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    faq = json.loads((HERE / "faq.json").read_text())
    if arguments.check:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        texts = [text for entry in faq for text in [entry["answer"], *entry["questions"]]]
        tokenizer = train_tokenizer(texts)
        model = untrained(tokenizer)
        print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
        train(model, Examples(faq, tokenizer, SEED))
        model = model.to(torch.bfloat16)

    wrong = recall(model, tokenizer, faq)
    asked = sum(len(entry["questions"]) for entry in faq)
    print(f"{asked - len(wrong)} of {asked} phrasings answered word for word")
    if wrong:
        print("not these, so nothing is written:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    if not arguments.check:
        save(model, tokenizer, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
