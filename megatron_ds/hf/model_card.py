"""README.md of an export: what the model is, what it was trained on and how well, and who can run it.

Every figure comes from the checkpoint; what the run did not record is left out rather than guessed.
"""

import json
from importlib.metadata import version

import megatron_ds
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.schema import ModelConfig
from megatron_ds.hf.targets.common import Target

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- megatron_ds
- {model_type}
---

# {title}

A dense decoder trained with megatron_ds and exported as `{model_type}`.

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Engines: {engines}

## Training

Command of the export: `{command}`

Versions: {versions}

<details><summary>Configuration of the run</summary>

```json
{config}
```

</details>
"""


def model_card(
    title: str,
    checkpoint: Checkpoint,
    model: ModelConfig,
    target: Target,
    num_parameters: int,
    precision: str,
    command: str,
) -> str:
    """Text of README.md. ``num_parameters`` counts the exported tensors; ``command`` is the user's command line."""
    packages = ("torch", "transformers", "deepspeed")
    versions = [f"megatron_ds {megatron_ds.__version__}", *(f"{name} {version(name)}" for name in packages)]
    rows = _facts(checkpoint, model, num_parameters, precision)
    return CARD.format(
        title=title,
        model_type=target.model_type,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
        trust=", trust_remote_code=True" if target.code_files else "",
        engines=target.engines,
        command=command,
        versions=", ".join(versions),
        config=json.dumps(checkpoint.config, indent=2),
    )


def _facts(checkpoint: Checkpoint, model: ModelConfig, num_parameters: int, precision: str) -> list[tuple[str, str]]:
    trainer = checkpoint.trainer
    attention = model.attention
    window = f", window {attention.window}" if attention.kind != "full" else ""
    pattern = f" {attention.pattern}" if attention.kind == "hybrid" else ""
    facts = [
        ("Parameters", f"{num_parameters:,} ({precision})"),
        ("Layers x width", f"{model.num_layers} x {model.hidden_size}"),
        ("Heads (query, key/value) x width", f"({model.num_attention_heads}, {model.num_kv_heads}) x {model.head_dim}"),
        ("Feed-forward width", f"{model.ffn_size:,}"),
        ("Vocabulary", f"{model.vocab_size:,}"),
        ("Attention", f"{attention.kind}{pattern}{window}"),
        ("Sequence length", f"{model.seq_length:,}"),
        ("Optimizer steps", f"{checkpoint.step:,}"),
    ]
    if "consumed_tokens" in trainer:
        facts.append(("Training tokens", f"{trainer['consumed_tokens']:,}"))
    if trainer.get("train_loss") is not None:
        facts.append(("Training loss", f"{trainer['train_loss']:.4f}"))
    facts += [(f"Validation loss, {name}", f"{loss:.4f}") for name, loss in trainer.get("eval", {}).items()]
    return facts
