"""Command lines of diffusers' DreamBooth LoRA scripts, taken as they are."""

import logging
import shlex
from dataclasses import replace

import pytest

from shira_diffusers.dreambooth.command_line import _IGNORED, command_line, parse_config
from shira_diffusers.dreambooth.config import TrainingConfig

NEEDED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "p", "--instance_prompt", "a sks cat"]

# every flag of the two scripts beside those needed, as a person would give it
LORA = shlex.split("""
--revision main --variant fp16 --tokenizer_name t --class_data_dir c --class_prompt c --validation_prompt v
--num_validation_images 2 --validation_epochs 3 --with_prior_preservation --prior_loss_weight 0.5 --num_class_images 3
--output_dir out --seed 3 --resolution 64 --center_crop --train_text_encoder --train_batch_size 1 --sample_batch_size 1
--num_train_epochs 2 --max_train_steps 3 --checkpointing_steps 3 --checkpoints_total_limit 2
--resume_from_checkpoint latest --gradient_accumulation_steps 2 --gradient_checkpointing --learning_rate 1e-4 --scale_lr
--lr_scheduler cosine --lr_warmup_steps 0 --lr_num_cycles 1 --lr_power 1.0 --dataloader_num_workers 0 --use_8bit_adam
--adam_beta1 0.9 --adam_beta2 0.999 --adam_weight_decay 1e-2 --adam_epsilon 1e-8 --max_grad_norm 1.0 --push_to_hub
--hub_token x --hub_model_id y --logging_dir logs --allow_tf32 --report_to tensorboard --mixed_precision fp16
--prior_generation_precision fp32 --local_rank 0 --enable_xformers_memory_efficient_attention
--pre_compute_text_embeddings --tokenizer_max_length 77 --text_encoder_use_attention_mask --validation_images a b
--class_labels_conditioning timesteps --rank 4""")
SDXL = shlex.split("""
--pretrained_vae_model_name_or_path vae --image_column image --repeats 2 --random_flip --text_encoder_lr 5e-6
--snr_gamma 5.0 --optimizer AdamW --prodigy_beta3 0.9 --prodigy_decouple True --adam_weight_decay_text_encoder 1e-3
--prodigy_use_bias_correction True --prodigy_safeguard_warmup True --lora_dropout 0.1 --use_dora --output_kohya_format
--image_interpolation_mode lanczos --do_edm_style_training --enable_npu_flash_attention --cache_dir here
--crops_coords_top_left_h 0 --crops_coords_top_left_w 0""")


# what train_dreambooth.py has beyond those
FULL = shlex.split("""
--validation_steps 100 --set_grads_to_none --offset_noise --skip_save_text_encoder --validation_scheduler DDPMScheduler
""")


# what the scripts for SD3 and Flux have beyond those of Stable Diffusion
FLOW = shlex.split("""
--max_sequence_length 256 --weighting_scheme logit_normal --logit_mean 0.5 --logit_std 2.0 --mode_scale 1.0
--precondition_outputs 0 --guidance_scale 1.0 --upcast_before_saving --lora_layers attn.to_q,attn.to_k --lora_blocks 1,2
""")


def test_the_command_lines_for_sd3_and_flux_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = parse_config([*NEEDED, *FLOW])
    assert (config.max_sequence_length, config.weighting_scheme, config.guidance_scale) == (256, "logit_normal", 1.0)
    assert (config.logit_mean, config.logit_std, config.mode_scale) == (0.5, 2.0, 1.0)
    assert config.precondition_outputs is False
    told = {record.getMessage().split()[0] for record in caplog.records}
    assert told == {"--upcast_before_saving", "--lora_layers", "--lora_blocks"}
    chosen = replace(config, precondition_outputs=True)
    assert parse_config([part for flag in command_line(chosen) for part in flag]) == chosen


def test_the_command_line_of_the_full_script_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = parse_config([*NEEDED, *LORA, *FULL])
    assert config.noise_offset == 0.1  # which that script adds
    assert config.validation_scheduler == "DDPMScheduler"
    assert "--skip_save_text_encoder has no effect: an adapter's file holds trained entries only" in caplog.text
    assert "offset_noise" not in caplog.text
    assert parse_config([*NEEDED]).noise_offset == 0.0


def test_both_scripts_command_lines_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = parse_config([*NEEDED, *LORA, *SDXL])
    assert config.text_encoder_lr == 5e-6
    assert config.prior_generation_precision == "fp32"
    told = {record.getMessage().split()[0] for record in caplog.records}
    assert told == {flag for flag in [*LORA, *SDXL] if flag.removeprefix("--") in _IGNORED}
    assert "--rank" in told
    assert all(" has no effect: " in record.getMessage() for record in caplog.records)


def test_a_plain_command_line_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse_config(NEEDED) == TrainingConfig(
            pretrained_model_name_or_path="base", instance_data_dir="p", instance_prompt="a sks cat"
        )
    assert not caplog.records


@pytest.mark.parametrize("flag", ["--densty", "--rnk"])
def test_an_unknown_flag_is_an_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config([*NEEDED, flag, "0.1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False), ("0", False)])
def test_true_and_false_mean_what_they_say(text: str, value: bool) -> None:
    assert parse_config([*NEEDED, "--prodigy_decouple", text]).prodigy_decouple is value


def test_neither_true_nor_false_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config([*NEEDED, "--prodigy_decouple", "maybe"])
    assert "expected true or false, got 'maybe'" in capsys.readouterr().err
