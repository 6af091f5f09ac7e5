"""The scripts of `gpu_smoke.py` with flags that need the bundled models and images alone."""

IMAGES = "--train_data_dir {assets}/fashion_captioned/train --max_train_samples 64 --resolution 32"
CLIPS = (
    "--moving_articles {assets}/fashion_captioned --num_clips 16 --sample_n_frames 8 --sample_stride 1 --resolution 32"
)
TAUGHT = "--pretrained_teacher_model {assets}/fashion_teacher " + IMAGES
TOLD = "--pretrained_teacher_model {assets}/fashion_teacher --beta_schedule scaled_linear " + CLIPS
NEW = "--unet_config unet_fashion_latents --pretrained_vae {assets}/fashion_teacher " + IMAGES
NOISE = " --sigma_min 0.03 --sigma_max 14"  # that Stable Diffusion knows
JUDGED = " --adversarial_start 0 --adversarial_ramp 0"
REWARDED = "--pretrained_student_model {assets}/fashion_lcm --resolution 32 --prompts fashion --rewards "
FLOW = "--pretrained_pipeline {assets}/fashion_teacher --transformer_config sd3_fashion --text_length 10 "
METHODS = {  # name -> script, its flags; {EDM} and {motion} are the folders of those runs, which come before
    "EDM": ("train_edm", NEW),
    "motion": ("train_motion", TOLD + " --motion_num_attention_heads 4 --motion_max_seq_length 8"),
    "LCM": ("distill_lcm", TAUGHT),
    "LCM-LoRA": ("distill_lcm", TAUGHT + " --lora --lora_rank 8"),
    "SCott": ("distill_scott", TAUGHT + JUDGED),
    "PCM": ("distill_pcm", TAUGHT + JUDGED),
    "TCD": ("distill_tcd", TAUGHT),
    "BOOT": ("distill_boot", "--pretrained_teacher_model {assets}/fashion_teacher --prompts fashion --resolution 32"),
    "LCF": ("finetune_lcf", "--pretrained_student_model {assets}/fashion_lcm " + IMAGES),
    "CD": ("distill_cd", TAUGHT + NOISE + " --loss_type l2"),
    "sCD": ("distill_scd", TAUGHT + NOISE),
    "ECT": ("tune_ect", TAUGHT + NOISE),
    "CT": ("train_ct", NEW + " --loss_type l2"),
    "iCT": ("train_ict", NEW),
    "SLCT": ("train_slct", NEW + " --coupling independent"),
    "sCT": ("train_sct", NEW),
    "mean flow": ("train_mean_flow", NEW + " --condition_dropout 0"),
    "CTM": (
        "distill_ctm",
        "--pretrained_teacher_model {EDM}/pipeline --loss_type l2 --teacher_intervals 2 " + IMAGES + JUDGED,
    ),
    "time": ("tune_time", "--pretrained_teacher_model {EDM}/pipeline " + IMAGES),
    "AnimateLCM": (
        "distill_animatelcm",
        TOLD + " --pretrained_motion_adapter {motion}/motion_adapter --stage joint --lora_rank 8",
    ),
    "RLCM": (
        "finetune_rlcm",
        REWARDED + "jpeg_compressibility --samples_per_rollout 16 --gradient_accumulation_steps 3",
    ),
    "direct reward": (
        "finetune_direct_reward",
        REWARDED + "classifier:{assets}/fashion_classifier --through last_step",
    ),
    "diffusion": ("train_diffusion", "--pretrained_vae {assets}/fashion_teacher/vae " + IMAGES),
    "flow": ("train_flow", FLOW + IMAGES),
    "VAE": ("train_vae", IMAGES),
}
LOOKS_ITSELF = ("RLCM", "direct reward")  # at images, on the CPU
COMPILED, SHARDED = ("LCM", "CD", "EDM"), ("LCM", "LCM-LoRA", "SCott", "sCD")
