"""A whole training step on one core against the same model in stock transformers.

Both sides hold the same weights (the first losses are compared), see the same tokens, clip the gradient norm and run
PyTorch's fused AdamW; theirs is Qwen3ForCausalLM with SDPA and its own loss. Utilisation is the FLOPs that the model
needs (``model.cost``, causal) over the fastest matrix product measured in the same round. Peak memory is the growth of
VmHWM over two steps in a fresh process for each side.

    python benchmarks/dense_step.py --check
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import harness
import torch
from torch import Tensor, nn

from megatron_ds.config.model_schema import FullAttention, ModelConfig
from megatron_ds.model.cost import flops_per_token, measure_gemm_roof
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.init import initialize
from megatron_ds.parallel.loss import cross_entropy_sum

Step = Callable[[], float]

SEQ_LENGTH = 1024
SHARED = {"vocab_size": 16384, "seq_length": SEQ_LENGTH, "attention": FullAttention()}
MODELS = {
    512: ModelConfig(num_layers=8, hidden_size=512, num_attention_heads=8, num_query_groups=4, **SHARED),
    1024: ModelConfig(num_layers=4, hidden_size=1024, num_attention_heads=16, num_query_groups=8, **SHARED),
}
"""Width -> model; one sample of SEQ_LENGTH tokens per step."""


def main(argv: list[str]) -> int:
    made = harness.parser(__doc__, rounds=5)
    made.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    made.add_argument("--width", type=int, choices=MODELS, help="only this width")
    options = made.parse_args(argv)
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_memory(options.memory_of, MODELS[options.width]))
        return 0
    report = harness.Report(f"Training step on one core, fp32, 1 x {SEQ_LENGTH} tokens, full attention, V=16384, tied")
    for width, config in MODELS.items():
        if options.width in (None, width):
            compare(report, config, options.rounds)
    return report.finish(options)


def compare(report: harness.Report, config: ModelConfig, rounds: int) -> None:
    """Time both sides in turn, with the GEMM roof between them, then their memory."""
    steps = {side: build(config) for side, build in SIDES.items()}
    first = {side: step() for side, step in steps.items()}
    assert abs(first["ours"] - first["transformers"]) < 1e-4, f"the models differ: first losses {first}"
    roofs: list[float] = []
    seconds = harness.paired_seconds(
        steps | {"roof": lambda: roofs.append(measure_gemm_roof(torch.float32, torch.device("cpu")))}, rounds
    )
    del steps
    label = f"D={config.hidden_size} L={config.num_layers}"
    rates = {side: [SEQ_LENGTH / s for s in seconds[side]] for side in SIDES}
    for side, samples in rates.items():
        report.add(f"{label} {side}", "tokens/s", samples)
    report.add_ratio(f"{label} ours / transformers", rates["ours"], rates["transformers"], at_least=1.1)
    report.add(f"{label} GEMM roof", "GFLOP/s", [roof / 1e9 for roof in roofs[1:]])
    useful = [rate * flops_per_token(config) for rate in rates["ours"]]
    report.add_ratio(f"{label} ours, model FLOPs / roof", useful, roofs[1:], at_least=0.65)
    memory = {side: memory_in_a_fresh_process(side, config.hidden_size) for side in SIDES}
    for side, mib in memory.items():
        report.add(f"{label} {side} peak memory", "MiB", mib)
    less = memory["ours"] / memory["transformers"]
    report.add(f"{label} peak memory, ours / transformers", "ratio", less, at_most=1.0)


def our_step(config: ModelConfig) -> Step:
    """Decoder, vocabulary loss, clipping, fused AdamW."""
    decoder = our_model(config)
    token_BS, label_BS = batch(config)
    counted_T = torch.arange(SEQ_LENGTH) < SEQ_LENGTH - 1  # transformers has no target for the last token

    def loss() -> Tensor:
        logits_TV = decoder(token_BS).flatten(0, 1)
        return cross_entropy_sum(logits_TV, label_BS.flatten(), counted_T, config.vocab_size) / counted_T.sum()

    return training_step(decoder, loss)


def their_step(config: ModelConfig) -> Step:
    """Qwen3ForCausalLM with our weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, tie_word_embeddings=True,
            attn_implementation="sdpa", use_cache=False, dtype=torch.float32,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        )
    )  # fmt: skip
    with torch.no_grad():  # both list the same parameters, layer by layer, each in its own order
        ours = dict(our_model(config).named_parameters())
        for name, parameter in theirs.named_parameters():
            parameter.copy_(ours[our_name(name)])
    token_BS, _ = batch(config)
    return training_step(theirs, lambda: theirs(input_ids=token_BS, labels=token_BS).loss)


def our_model(config: ModelConfig) -> Decoder:
    decoder = Decoder(config)
    initialize(decoder.named_parameters(), config, seed=1)
    return decoder


def our_name(theirs: str) -> str:
    """Logical name of a parameter of Qwen3ForCausalLM."""
    for old, new in RENAMED:
        theirs = theirs.replace(old, new)
    return theirs


RENAMED = [
    ("model.", ""), ("embed_tokens", "embedding"), ("input_layernorm", "attention_norm"), ("self_attn", "attention"),
    ("post_attention_layernorm", "mlp_norm"), ("q_norm", "query_norm"), ("k_norm", "key_norm"), ("q_proj", "query"),
    ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output"), ("_proj", ""),
]  # fmt: skip


def batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """token_BS and label_BS, the tokens one to the left."""
    generator = torch.Generator().manual_seed(0)
    token_BS = torch.randint(config.vocab_size, (1, SEQ_LENGTH), generator=generator)
    return token_BS, token_BS.roll(-1, dims=1)


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward, backward, clip to norm 1, AdamW; returns the loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


SIDES: dict[str, Callable[[ModelConfig], Step]] = {"ours": our_step, "transformers": their_step}


def memory_in_a_fresh_process(side: str, width: int) -> float:
    """MiB that ``peak_memory`` finds in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, "--width", str(width)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_memory(side: str, config: ModelConfig) -> float:
    """MiB by which two steps and the model raise this process above what it needs for its imports."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401  both sides start from the same imports

    before = harness.memory_mib("VmRSS")
    step = SIDES[side](config)
    step(), step()
    return harness.memory_mib("VmHWM") - before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
