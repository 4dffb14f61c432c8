"""What DeepSpeed is given, read by DeepSpeed's own parser."""

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megatron_ds.config.deepspeed_keys import (
    PIPELINE_REFUSED,
    REFUSED,
    ZERO_REFUSED,
    DeepSpeedKeys,
    ZeroKeys,
)
from megatron_ds.config.load import deepspeed_dict, load_config
from megatron_ds.config.schema import RunConfig

DATA = ["--data-path", "data/corpus", "--tokenizer", "data/tokenizer"]


def parsed(flags: str) -> tuple[dict, DeepSpeedConfig]:
    settings = deepspeed_dict(load_config([*DATA, *flags.split()], world_size=1).config)
    return settings, DeepSpeedConfig(settings)


def test_values_arrive():
    _, config = parsed("--micro-batch-size 3 --gradient-accumulation-steps 2 --clip-grad 0.5 --zero-stage 2")
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (
        6,
        3,
        2,
    )
    assert config.gradient_clipping == 0.5
    assert config.zero_optimization_stage == 2
    assert config.steps_per_print is None
    assert config.pipeline["pipe_partitioned"] is False
    assert config.pipeline["grad_partitioned"] is False
    assert not config.monitor_config.wandb.enabled
    assert not config.wall_clock_breakdown
    assert config.zero_allow_untested_optimizer


def test_the_optimizer_schedule_wandb_and_our_section_stay_here():
    settings, config = parsed("--wandb --wandb-project p")
    assert not {"optimizer", "scheduler", "megatron_ds"} & set(settings)
    assert settings["wandb"] == {"enabled": False}
    assert config.optimizer_name is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_sums_and_reduces_in_fp32_in_every_zero_stage(stage):
    _, config = parsed(f"--bf16 --zero-stage {stage}")
    assert config.bfloat16_config.enabled
    assert config.grad_accum_dtype == "fp32"
    assert config.communication_data_type is torch.float32
    _, narrow = parsed(f"--bf16 --zero-stage {stage} --set communication_data_type=bf16")
    assert narrow.communication_data_type is torch.bfloat16


@pytest.mark.parametrize("precision", ["", "--fp16 --loss-scale 128 --hysteresis 3"])
def test_other_precisions_leave_the_types_to_deepspeed(precision):
    settings, config = parsed(precision)
    assert "data_types" not in settings
    assert config.communication_data_type is None
    assert config.float16_config.enabled == bool(precision)
    if precision:
        assert (config.float16_config.loss_scale, config.float16_config.hysteresis) == (128, 3)


def test_keys_that_are_passed_on_arrive():
    zero = 'zero_optimization={"stage":3,"stage3_max_live_parameters":7,"offload_optimizer":{"device":"cpu"}}'
    writers = 'tensorboard={"enabled":true,"output_path":"x"} comet={"project":"p"} csv_monitor.job_name=j'
    _, config = parsed(f"--set {zero} {writers} comms_logger.enabled=true steps_per_print=9")
    assert config.zero_config.max_live_parameters == 7
    assert config.zero_config.offload_optimizer.device == "cpu"
    assert config.monitor_config.tensorboard.output_path == "x"
    assert config.monitor_config.comet.project == "p"
    assert config.comms_config.comms_logger_enabled
    assert config.steps_per_print == 9


def test_deepspeed_knows_every_key_that_is_passed_on():
    aliases = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert aliases >= set(ZeroKeys.passed_on)
    assert aliases >= set(ZeroKeys.model_fields)


def test_nothing_is_both_accepted_and_refused():
    assert not set(REFUSED) & set(RunConfig.model_fields)
    assert not set(ZERO_REFUSED) & {*ZeroKeys.passed_on, *ZeroKeys.model_fields}
    assert not set(PIPELINE_REFUSED) & set(DeepSpeedKeys.model_fields["pipeline"].annotation.model_fields)
