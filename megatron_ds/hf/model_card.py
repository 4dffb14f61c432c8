"""README.md of an export: what the model is, what it was trained on and how well, and who can run it.

Every figure comes from the checkpoint; what the run did not record is left out rather than guessed.
"""

import json

from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.config.model_schema import Attention, HybridAttention, LatentAttention, ModelConfig, SoftGateAttention
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import RunConfig
from megatron_ds.hf.report import public_config, versions
from megatron_ds.hf.targets.common import Target
from megatron_ds.model.cost import active_parameters, num_parameters

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- megatron_ds
- {model_type}
---

# {title}

{kind} trained with megatron_ds and exported as `{model_type}`.

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


MTP_CARD = """\
# {title}-mtp

The {blocks} block(s) of multi-token prediction of `{title}`, which draft tokens for it: layers {first} to {last}, with
copies of its embedding and output. Not a model of its own: vLLM loads it as the draft model of `{title}`, with
`--speculative-config '{{"method": "mtp", "model": "{title}-mtp", "num_speculative_tokens": {blocks}}}'`.
"""


def mtp_card(title: str, model: ModelConfig) -> str:
    """README.md of the directory of the MTP blocks of the export ``title``."""
    first = model.num_layers
    last = first + model.mtp_num_layers - 1
    return MTP_CARD.format(title=title, blocks=model.mtp_num_layers, first=first, last=last)


def model_card(
    title: str,
    checkpoint: Checkpoint,
    run: RunConfig,
    target: Target,
    precision: str,
    mtp: str,
    command: str,
) -> str:
    """Text of README.md; ``mtp`` is where the MTP blocks are, ``command`` the user's command line."""
    model, moe = run.megatron_ds.model, run.megatron_ds.moe
    rows = [*_model_facts(model, moe, precision), *_mtp_facts(title, model, mtp), *_training_facts(checkpoint)]
    return CARD.format(
        title=title,
        kind="A dense decoder" if moe is None else "A sparse mixture of experts",
        model_type=target.model_type,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
        trust=", trust_remote_code=True" if target.code_files else "",
        engines=target.engines,
        command=command,
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        config=json.dumps(public_config(run), indent=2),
    )


def _model_facts(model: ModelConfig, moe: MoEConfig | None, precision: str) -> list[tuple[str, str]]:
    """What the model is; parameters are counted without the vocabulary's padding, as they are exported."""
    exported = model.model_copy(update={"make_vocab_size_divisible_by": 1, "mtp_num_layers": 0})
    facts = [("Parameters", f"{num_parameters(exported, moe):,} ({precision})")]
    if moe is not None:
        facts.append(("Active parameters of a token", f"{active_parameters(exported, moe):,}"))
    facts += [
        ("Layers x width", f"{model.num_layers} x {model.hidden_size}"),
        _heads(model),
    ]
    if moe is None or any(not moe.is_moe_layer(layer) for layer in range(model.num_layers)):
        facts.append(("Feed-forward width", f"{model.ffn_size:,}"))
    if moe is not None:
        facts += _expert_facts(model, moe)
    return [
        *facts,
        ("Vocabulary", f"{model.vocab_size:,}"),
        ("Attention", _attention(model.attention)),
        ("Sequence length", f"{model.seq_length:,}"),
    ]


def _heads(model: ModelConfig) -> tuple[str, str]:
    attention = model.attention
    if isinstance(attention, LatentAttention):
        widths = f"{attention.qk_head_dim} + {attention.qk_pos_emb_head_dim} rotary, {attention.v_head_dim}"
        return ("Heads x widths (query and key, value)", f"{model.num_attention_heads} x ({widths})")
    heads = f"({model.num_attention_heads}, {model.num_kv_heads}) x {model.head_dim}"
    return ("Heads (query, key/value) x width", heads)


def _attention(attention: Attention) -> str:
    """Kind of attention and what sets it apart."""
    match attention:
        case LatentAttention(q_lora_rank=query, kv_lora_rank=key_value):
            return f"latent, keys and values from {key_value} channels" + (f", queries from {query}" if query else "")
        case HybridAttention(pattern=pattern, window=window):
            return f"hybrid {pattern}, window {window}"
        case SoftGateAttention(window=window):
            return f"soft_gate, window {window}"
    return attention.kind


def _mtp_facts(title: str, model: ModelConfig, mtp: str) -> list[tuple[str, str]]:
    if not model.mtp_num_layers:
        return []
    place = {"inline": "in the same files, not counted above", "separate": f"in {title}-mtp", "drop": "left out"}[mtp]
    return [("Blocks of multi-token prediction", f"{model.mtp_num_layers}, {place}")]


def _expert_facts(model: ModelConfig, moe: MoEConfig) -> list[tuple[str, str]]:
    width, shared = moe.moe_ffn_hidden_size or model.ffn_size, moe.moe_shared_expert_intermediate_size
    sparse = sum(moe.is_moe_layer(layer) for layer in range(model.num_layers))
    return [
        ("Layers with experts", f"{sparse} of {model.num_layers}"),
        ("Experts x width", f"{moe.num_experts} x {width:,}, {moe.moe_router_topk} for each token"),
        *([("Width of the shared expert", f"{shared:,}")] if shared else []),
        ("Router", f"{moe.router.kind}, fine stage {moe.router.fine}"),
    ]


def _training_facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """How it was trained; what the run did not record is left out."""
    trainer = checkpoint.trainer
    facts = [("Optimizer steps", f"{checkpoint.step:,}")]
    if "consumed_tokens" in trainer:
        facts.append(("Training tokens", f"{trainer['consumed_tokens']:,}"))
    if trainer.get("train_loss") is not None:
        facts.append(("Training loss", f"{trainer['train_loss']:.4f}"))
    return facts + [(f"Validation loss, {name}", f"{loss:.4f}") for name, loss in trainer.get("eval", {}).items()]
