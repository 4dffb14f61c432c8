"""Pretrain a model: load the configuration, join the job, build the run, train.

    deepspeed --num_gpus 2 pretrain.py --deepspeed_config ds_configs/v1_tiny.json --data-path data/corpus
    torchrun --nproc-per-node 2 pretrain.py --deepspeed_config ds_configs/v1_tiny.json --data-path data/corpus
    python pretrain.py --deepspeed_config ds_configs/v1.json --data-path data/corpus

``--help`` lists every setting. The same command again resumes from the newest whole checkpoint. ``--self-test`` only
checks that this topology computes what one process computes.
"""

from megatron_ds.config.load import load_config
from megatron_ds.errors import run_main
from megatron_ds.hf.sections import run_defaults


def main(argv: list[str]) -> None:
    loaded = load_config(argv, prog="pretrain.py", defaults_in=run_defaults)

    # torch and DeepSpeed take seconds to import; a mistake in the configuration should not have to wait for them.
    from megatron_ds.parallel.groups import distributed
    from megatron_ds.train.build import build_run
    from megatron_ds.train.loop import train
    from megatron_ds.train.self_test import self_test

    with distributed(loaded.config.megatron_ds.parallel) as groups:
        if loaded.config.megatron_ds.training.self_test:
            result = self_test(loaded.config, groups)
            if groups.rank == 0:
                print(result)
            return
        with build_run(loaded, groups) as run:
            train(run)


if __name__ == "__main__":
    run_main(main)
