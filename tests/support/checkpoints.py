# pyright: basic, reportMissingImports=false
# Runs in the engine environment, whose packages (torch, transformers) the checker does not see.
"""Make tiny checkpoints of the architectures that the shipped deployments serve.

The weights of GPT-2, TinyLlama and Phi-2 are too large for a test; their architectures are not.
`.engine/bin/python tests/support/checkpoints.py OUTDIR` writes, within seconds, one folder each
with random weights from a fixed seed, a small byte-level tokenizer and a generation_config:

  OUTDIR/gpt2       GPT2LMHeadModel   learned positions, no chat template (as GPT-2)
  OUTDIR/tinyllama  LlamaForCausalLM  grouped-query attention, a chat template (as TinyLlama)
  OUTDIR/phi2       PhiForCausalLM    partial rotary positions, heads of 80, no chat template
  OUTDIR/embedding  BertModel         for `--runner pooling`

Context lengths are those of the real models, so that shipped engine arguments fit. What they say
is noise, with broken UTF-8 now and then, which is good for tests of streams.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

FAQ = Path(__file__).resolve().parents[2] / "deploy" / "models" / "demo" / "faq.json"
SEED = 7
VOCABULARY = 512
END = "<|endoftext|>"
# Wide enough that greedy decoding wanders instead of repeating one token.
SPREAD = 0.25
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)


def make_tokenizer(context_tokens: int, chat_template: str | None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the demo model's FAQ."""
    faq = json.loads(FAQ.read_text())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([entry["answer"] for entry in faq], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        chat_template=chat_template,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def gpt2() -> PreTrainedModel:
    """GPT-2: learned positions, one fused attention projection, tied embeddings."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=1024,
            n_embd=128,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=SPREAD,
        )
    )


def tinyllama() -> PreTrainedModel:
    """TinyLlama: rotary positions, four query heads to a key-value head, heads of 64, untied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=SPREAD,
        )
    )


def phi2() -> PreTrainedModel:
    """Phi-2: parallel attention and MLP, rotary positions on 40 % of each head, heads of 80."""
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=2,
            partial_rotary_factor=0.4,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=SPREAD,
        )
    )


def embedding() -> PreTrainedModel:
    """BERT without a head: vLLM pools its hidden states into one vector for each text."""
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            architectures=["BertModel"],
        )
    )


# Name of the folder: (model, context length in tokens, chat template)
CHECKPOINTS: dict[str, tuple[Callable[[], PreTrainedModel], int, str | None]] = {
    "gpt2": (gpt2, 1024, None),
    "tinyllama": (tinyllama, 2048, CHAT_TEMPLATE),
    "phi2": (phi2, 2048, None),
    "embedding": (embedding, 512, None),
}


def write(name: str, folder: Path) -> None:
    """Write one checkpoint into `folder`; the same bytes each time on one kind of machine."""
    build, context_tokens, chat_template = CHECKPOINTS[name]
    torch.manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    build().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(context_tokens, chat_template).save_pretrained(folder, save_jinja_files=False)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "bos_token_id": 0}\n')


def main() -> int:
    """Write every checkpoint below the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make tiny checkpoints with random weights.")
    parser.add_argument("outdir", type=Path)
    outdir: Path = parser.parse_args().outdir
    transformers_logging.disable_progress_bar()
    for name in CHECKPOINTS:
        write(name, outdir / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
