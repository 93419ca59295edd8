"""The demo model and the chat template for base models, as they are shipped."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
DEMO = REPOSITORY / "deploy" / "models" / "demo"
WEIGHTS = DEMO / "weights"
ENGINE_PYTHON = (
    Path(os.environ.get("REDMESH_ENGINE_HOME") or REPOSITORY / ".engine") / "bin" / "python"
)


def in_engine(*words: str) -> str:
    """Run the engine environment's Python and return what it prints."""
    assert ENGINE_PYTHON.exists(), "the engine environment is missing: run `make engine`"
    done = subprocess.run(
        [str(ENGINE_PYTHON), *words], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_weights_are_small_and_whole() -> None:
    """The committed checkpoint has all that vLLM loads, in at most 5 MB."""
    names = {file.name for file in WEIGHTS.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 5_000_000
    config: dict[str, Any] = json.loads((WEIGHTS / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    tokenizer: dict[str, Any] = json.loads((WEIGHTS / "tokenizer_config.json").read_text())
    assert "add_generation_prompt" in tokenizer["chat_template"]


def test_the_faq_asks_each_question_once() -> None:
    """No phrasing stands under two answers, which nothing could learn."""
    faq: list[dict[str, Any]] = json.loads((DEMO / "faq.json").read_text())
    phrasings = [question for entry in faq for question in entry["questions"]]
    assert len(faq) >= 46
    assert len(phrasings) >= 128
    assert len(phrasings) == len(set(phrasings))


@pytest.mark.engine
def test_the_demo_model_knows_its_faq() -> None:
    """The committed weights answer every phrasing of the committed FAQ word for word."""
    printed = in_engine(str(DEMO / "train.py"), "--check")
    faq: list[dict[str, Any]] = json.loads((DEMO / "faq.json").read_text())
    asked = sum(len(entry["questions"]) for entry in faq)
    assert f"{asked} of {asked} phrasings answered word for word" in printed


@pytest.mark.engine
def test_a_single_message_to_a_base_model_is_simply_continued() -> None:
    """The base template renders one user message as itself, several one to a line."""
    template = REPOSITORY / "deploy" / "models" / "templates" / "base.jinja"
    program = (
        "import json, pathlib, sys\n"
        "from jinja2.sandbox import ImmutableSandboxedEnvironment\n"
        "text = pathlib.Path(sys.argv[1]).read_text()\n"
        "made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)\n"
        "asked = [{'role': 'user', 'content': said} for said in sys.argv[2:]]\n"
        "print(json.dumps(made.from_string(text).render(messages=asked)))\n"
    )
    one = in_engine("-c", program, str(template), "The future of AI is")
    assert json.loads(one) == "The future of AI is"
    two = in_engine("-c", program, str(template), "Be brief.", "Hello")
    assert json.loads(two) == "Be brief.\nHello"
