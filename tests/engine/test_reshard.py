"""The whole training state moves between all layouts, bit by bit, and the run goes on as if it had not moved.

A *visit* to a layout loads a checkpoint, saves it again at once, takes a step, saves that, and takes two more. Of every
visit it is asked that

- what was saved at once has the same bits, name by name and kind by kind, as what was loaded: weights, every state of
  the optimizer, routers' biases and balances, running means, counters;
- the losses are those that the layout before went on with, to 1e-6, and to the last bit if it is the same layout
  (dropout is on, and random states are put back). The first of them depends on the weights alone, the second on the
  optimizer's state and on the biases, too;
- a rank was handed no more elements than its slots have.

Layouts are visited in a chain, each loading what the one before has *trained and saved*, so every layout saves and
loads. That covers all pairs: a visit shows that a layout puts in and takes out the same bits under the same names,
whoever wrote them, and a reader sees nothing of a writer but pieces of boxes, for which ``checkpoint/test_pieces.py``
tries arbitrary cuts. A layout that put a value in a wrong place and took it out of there again would keep the bits, but
not the loss. ``-m parity`` runs the pairs themselves.
"""

import json
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from runs import ledger
from safetensors import safe_open
from tiny import parallel

from megatron_ds.data.indexed import IndexedDatasetBuilder

DENSE = {"model": {"attention": {"kind": "soft_gate", "window": 5}, "hidden_size": 34, "kv_channels": 8}}
SPARSE = {
    "model": {"qk_layernorm": True},
    "moe": {
        "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 14,
        "moe_layer_freq": [0, 1, 1, 1], "moe_input_jitter_eps": 0.01, "moe_global_aux_loss_coeff": 1e-2,
        "router": {"kind": "softmax", "fine": "refine"}, "capacity": {"kind": "dynamic", "factor": 1.5},
    },
}  # fmt: skip
LATENT = {
    "model": {
        "num_query_groups": None, "rotary_interleaved": True, "untie_embeddings_and_output_weights": True,
        "mtp_num_layers": 2,
        "attention": {
            "kind": "latent", "q_lora_rank": 21, "kv_lora_rank": 13, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4,
            "v_head_dim": 6,
        },
    },
    "moe": {
        "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 12,
        "moe_layer_freq": [0, 1, 1, 1], "moe_seq_aux_loss_coeff": 1e-2,
        "router": {"kind": "sigmoid", "fine": "bias", "num_groups": 4, "group_topk": 2},
    },
}  # fmt: skip
ATTENTION_DROPOUT = {"model": DENSE["model"] | {"attention_dropout": 0.1}}
MODELS = {
    "v1": DENSE, "v2": SPARSE, "v3": LATENT,
    "rmsprop": DENSE | {"optimizer": "rmsprop"}, "attention dropout": ATTENTION_DROPOUT,
}  # fmt: skip
"""What each generation has that can be saved, then an optimizer and a kind of dropout that differ from the rest."""

ONE = {"stage": 0}
UNEVEN = {"pp": 4, "schedule": "interleaved", "layout": [1, 1, 0, 0, 0, 0, 1, 1]}
V_SHAPED = {"tp": 2, "sp": True, "pp": 2, "dp": 2, "schedule": "zb_v", "layout": [1, 2, 1, 0], "stage": 1}
BF16 = {"dtype": "bf16", "stage": 1}
FP16 = {"dtype": "fp16", "stage": 1}
CHAINS = {
    "v1": [
        ONE, {"dp": 4, "stage": 1}, {"tp": 2, "pp": 2, "stage": 1}, UNEVEN | {"stage": 0}, {"dp": 4, "stage": 3},
        {"dp": 4, "stage": 3}, V_SHAPED, {"dp": 2, "stage": 2}, {"dp": 2, "stage": 0}, {"dp": 2, "stage": 3},
        {"dp": 2} | BF16, {"tp": 2, "dp": 2} | BF16, {"dp": 2} | FP16, {"dp": 2} | FP16, {"dp": 4, "stage": 2}, ONE,
    ],
    "v2": [
        ONE, {"ep": 4, "stage": 1}, {"tp": 2, "pp": 2, "stage": 0}, {"ep": 2, "pp": 2, "layout": [1, 3], "stage": 1},
        {"ep": 2, "pp": 2, "layout": [1, 3], "stage": 1}, UNEVEN | {"stage": 1},
        {"tp": 2, "ep": 2, "pp": 2, "stage": 1}, {"ep": 2, "stage": 2}, {"ep": 2, "stage": 0},
        {"dp": 4, "ep": 2} | BF16, {"dp": 4, "stage": 2}, ONE,
    ],
    "v3": [
        ONE, {"tp": 2, "pp": 2, "schedule": "interleaved", "stage": 1}, {"tp": 2, "ep": 2, "etp": 2, "stage": 1},
        UNEVEN | {"stage": 0}, V_SHAPED | {"ep": 2, "etp": 2}, V_SHAPED | {"ep": 2, "etp": 2},
        {"tp": 4, "sp": True, "stage": 0}, {"dp": 4, "stage": 1}, {"ep": 2, "stage": 2}, ONE, ONE,
    ],
    "rmsprop": [ONE, {"dp": 2, "stage": 3}, {"tp": 2, "pp": 2, "stage": 1}, {"dp": 2} | BF16, ONE],
    "attention dropout": [{"tp": 2, "pp": 2, "stage": 1}] * 2,
}  # fmt: skip
"""The layouts of every model in the order of their visits; two equal ones in a row continue to the last bit."""
HOPS = [(name, number) for name, layouts in CHAINS.items() for number in range(1, len(layouts))]
PAIRS = [
    (name, *pair)
    for name, layouts in CHAINS.items()
    for pair in product([number for number, one in enumerate(layouts) if one not in layouts[:number]], repeat=2)
]
"""Name and the numbers of two visits: every layout once as the first, and once as the second."""
DECAY, RATE = 0.75, 3e-3


class CountingSource:
    """A checkpoint that counts the elements which it hands out."""

    def __init__(self, checkpoint):
        self.checkpoint, self.path, self.kinds = checkpoint, checkpoint.path, checkpoint.kinds
        self.elements = 0

    def read_range(self, name, kind, box, start, length):
        self.elements += length
        return self.checkpoint.read_range(name, kind, box, start, length)


def rmsprop(groups, params, lr):
    """An optimizer whose states have other names than Adam's."""
    return torch.optim.RMSprop(groups, lr=0.1 * lr, momentum=0.5, centered=True)


def build(groups, options):
    """Configuration, engine, weights and their mean."""
    import tiny
    from deepspeed.accelerator import get_accelerator

    from megatron_ds.engine.average import WeightAverage
    from megatron_ds.optim import optimizers

    get_accelerator().is_fp16_supported = lambda: True  # PyTorch computes it without instructions of the CPU
    kept = optimizers.OPTIMIZERS["AdamW"]
    if options.get("optimizer") == "rmsprop":
        optimizers.OPTIMIZERS["AdamW"] = rmsprop
    try:
        config, engine, weights = tiny.build(groups, options)
    finally:
        optimizers.OPTIMIZERS["AdamW"] = kept
    return config, engine, weights, WeightAverage(engine, weights, DECAY)


def needed(engine, weights, kinds):
    """Elements that belong to this rank: of every kind those of its slots, and the buffers."""
    from megatron_ds.engine.state import slots

    buffers = [weight.numel() for weight in weights.values() if not isinstance(weight, torch.nn.Parameter)]
    return kinds * sum(slot.length for slot in slots(engine, weights)) + sum(buffers)


def visit(groups, options, source, directory):
    """See the module's docstring; without a source the layout trains its own beginning.

    Returns losses, numbers drawn from the default generator beside them, and elements read per element needed.
    """
    import tiny

    from megatron_ds.checkpoint.store import CheckpointStore, open_checkpoint
    from megatron_ds.engine.state import counters, fragments, restore
    from megatron_ds.parallel.random import generator_state, set_generator_state

    config, engine, weights, average = build(groups, options)
    torch.manual_seed(groups.rank if source is None else 99)

    def save(name, step):
        CheckpointStore(Path(directory) / name, groups).save(
            step, fragments(engine, weights, average), rank_state=generator_state(groups.device),
            trainer={"engine": counters(engine)}, config=config.model_dump(mode="json"),
        )  # fmt: skip

    def advance(step):
        draw = torch.rand(1).item()  # what is drawn after a step comes from the seeds of its dropout
        loss = tiny.take_step(groups, config, engine, step, RATE)[0]
        average.update()
        return loss, draw

    begin, share = 1, None
    if source is None:
        advance(0)
    else:
        checkpoint = open_checkpoint(Path(source), peers=groups)
        counting = CountingSource(checkpoint)
        restore(engine, weights, counting, checkpoint.trainer["engine"], average)
        state = checkpoint.rank_state(groups.rank)
        if state is not None:
            set_generator_state(state, groups.device)
        begin, share = checkpoint.step, counting.elements / needed(engine, weights, 2 + len(states_of(options)))
        save("again", begin)
    results = [advance(begin)]
    save("trained", begin + 1)
    results += [advance(begin + 1), advance(begin + 2)]
    return *zip(*results), share


def states_of(options):
    """The optimizer's own names for what it keeps of a weight."""
    momenta = {"adamw": {"exp_avg", "exp_avg_sq"}, "rmsprop": {"square_avg", "grad_avg", "momentum_buffer"}}
    return momenta[options.get("optimizer", "adamw")]


def call(function, model, layout, *arguments):
    """The results of all ranks of a layout."""
    options = {**model, **layout, "model": model["model"] | {"hidden_dropout": 0.1}}
    size = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", layout.get("ep", 1))
    return run_ranks(function, size, options, *arguments, parallel=parallel(**layout), timeout=240)


def contents(directory):
    """Every tensor of a checkpoint, each value of which is stored once; and its counters."""
    from megatron_ds.checkpoint.reader import PIECES, PIECES_JSON
    from megatron_ds.checkpoint.store import open_checkpoint

    checkpoint = open_checkpoint(directory, verify=False)
    names = checkpoint.shapes()
    tensors = {(name, kind): checkpoint.read(name, kind) for name in names for kind in checkpoint.kinds(name)}
    stored = 0
    for path in Path(directory).rglob("shard_*"):
        with safe_open(path, "pt") as shard:
            stored += sum(piece.length for piece in PIECES_JSON.validate_json(shard.metadata()[PIECES]).values())
    assert stored == sum(tensor.numel() for tensor in tensors.values()), "a value is stored twice"
    return tensors, checkpoint.trainer["engine"]


class Chain:
    """Visits to layouts, one after another, each made when it is asked for."""

    def __init__(self, name, directory):
        self.model, self.layouts, self.directory = MODELS[name], CHAINS[name], directory
        self.visited = cache(self._visit)

    def _visit(self, number):
        source = None
        if number:
            self.visited(number - 1)
            source = self.saved(number - 1)
        return call(visit, self.model, self.layouts[number], source, str(self.directory / str(number)))

    def saved(self, number):
        return str(self.directory / str(number) / "trained")

    def check_next(self, number):
        """Compare a visit with the one before."""
        again = self.directory / str(number) / "again"
        self.compare(number - 1, self.layouts[number], self.visited(number), again)

    def check_pair(self, number, other, directory):
        """Visit a layout once more, loading what another has saved, and compare these two."""
        self.visited(number)
        layout = self.layouts[other]
        loader = call(visit, self.model, layout, self.saved(number), str(directory))
        self.compare(number, layout, loader, directory / "again")

    def compare(self, number, layout, loader, again):
        """What visit ``number`` has saved, and how it went on, with a visit that has loaded it."""
        saver, saver_layout = self.visited(number), self.layouts[number]
        same = layout == saver_layout
        (tensors, counters), (ours, our_counters) = contents(self.saved(number)), contents(again)
        assert ours.keys() == tensors.keys() and len(ours) > 100
        assert {kind for _, kind in ours} == {"weight", "ema"} | states_of(self.model)
        assert all(torch.equal(ours[key], tensor) for key, tensor in tensors.items()), "other bits"
        moved = {key for key in counters if key != "loss_scaler" or same}  # other precisions have none
        assert all(our_counters[key] == counters[key] for key in moved) and counters["global_steps"] == number + 2

        continued, losses = saver[0][0][1:], loader[0][0][:2]
        half = {saver_layout.get("dtype"), layout.get("dtype")} != {None}
        assert losses == (continued if same else pytest.approx(continued, rel=2e-2 if half else 1e-6, abs=0))
        assert len(set(loader[0][0])) == 3, "the losses must tell the steps apart"
        assert all(rank[0] == loader[0][0] for rank in loader), "the ranks disagree about a loss"
        assert all(rank[1][0] == old[1][1] for rank, old in zip(loader, saver)), "a rank draws other numbers"
        assert max(share for *_, share in loader) <= 1.1


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    return {name: Chain(name, tmp_path_factory.mktemp("chain")) for name in CHAINS}


@pytest.mark.parametrize(("name", "number"), HOPS)
def test_the_state_moves(chains, name, number):
    chains[name].check_next(number)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "number", "other"), PAIRS)
def test_every_pair(chains, tmp_path, name, number, other):
    chains[name].check_pair(number, other, tmp_path)


# --- schedules ------------------------------------------------------------------------------------------------------

GROWING = {
    "train_batch_size": 12, "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"params": {"lr": 3e-3}},
    "megatron_ds": {
        "generation": "v2",
        "model": {
            "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "seq_length": 24,
            "vocab_size": 61, "make_vocab_size_divisible_by": 16, "hidden_dropout": 0.1, "mtp_num_layers": 1,
        },
        "moe": {
            "num_experts": 4, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1, 1],
            "moe_router_bias_update_rate": "0:0.01 700:0.003",
        },
        "training": {
            "train_samples": 80, "rampup_batch_size": [4, 4, 24], "lr_warmup_samples": 8, "eval_interval": None,
            "lr_phases": ["700:constant", "1500:cosine:1e-3"], "mtp_loss_scaling_factor": "0:0.3 700:0.1",
            "eval_iters": 1, "ema_decay": 0.75, "exit_interval": 9,
        },
        "monitor": {"run_name": "growing"},
        "data": {"eod_id": 0, "split": "90,10,0"},
    },
}  # fmt: skip
"""Batch, learning rate, MTP weight and bias rate all change on the way: after steps 3 and 5, or so many tokens."""
CONDITIONS = ("optim/lr", "train/batch_size", "progress/samples", "progress/tokens")


def train(groups, directory, arguments):
    """Start the run in ``directory`` as ``pretrain.py`` does, on these ranks."""
    from megatron_ds.config.load import load_config
    from megatron_ds.train import loop
    from megatron_ds.train.build import build_run

    places = ("--run-dir", f"{directory}/runs", "--data-path", f"{directory}/corpus")
    argv = ["--deepspeed_config", f"{directory}/growing.json", *places, *arguments]
    with build_run(load_config(argv, world_size=groups.world_size), groups) as run:
        loop.train(run)


@pytest.fixture
def growing(tmp_path):
    """A directory with a configuration and a corpus."""
    generator = np.random.default_rng(0)
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as corpus:
        for _ in range(300):
            corpus.add_document(np.append(generator.integers(1, 61, generator.integers(5, 40)), 0))
        corpus.finalize()
    (tmp_path / "growing.json").write_text(json.dumps(GROWING))
    return tmp_path


def test_schedules_go_on_where_the_samples_are(growing):
    """A run that is stopped twice in its middle, each time to go on with other data ranks, equals the straight one."""
    run_ranks(train, 1, str(growing), ("--run-name", "straight"))
    for size, axes, last in ((2, {"ep": 2}, 3), (4, {"ep": 2}, 5), (2, {"pp": 2}, 9)):
        arguments = ["--exit-interval", str(last), "--zero-stage", "1"]
        arguments += ["--expert-model-parallel-size", str(axes.get("ep", 1))]
        arguments += ["--pipeline-model-parallel-size", str(axes.get("pp", 1))]
        run_ranks(train, size, str(growing), arguments, parallel=parallel(**axes))
        assert len(ledger(growing, "growing")) == last
    straight, ours = ledger(growing, "straight"), ledger(growing, "growing")
    assert [row["train/batch_size"] for row in straight] == [4, 4, 4, 8, 8, 12, 12, 12, 12]
    assert len({row["optim/lr"] for row in straight}) == 6, "the rate must change on the way"
    for name in CONDITIONS:
        assert [row[name] for row in ours] == [row[name] for row in straight]
    for name in ("train/loss", "train/mtp_loss"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in straight], rel=1e-6, abs=0)
    (whole, counters), (moved, our_counters) = (
        contents(growing / "runs" / name / "checkpoints" / "global_step9") for name in ("straight", "growing")
    )
    assert moved.keys() == whole.keys() and our_counters == counters
    biases = [key for key in whole if key[0].endswith("router.bias")]
    assert len(biases) == 3 and all(torch.equal(moved[key], whole[key]) for key in biases)
    for key, tensor in whole.items():
        torch.testing.assert_close(moved[key], tensor, rtol=1e-4, atol=1e-5 * tensor.abs().max().item())
