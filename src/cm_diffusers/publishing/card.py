"""What all model cards share: the methods they tell of, and the skeleton that every kind of result fills with sections."""

from collections.abc import Iterable

from cm_diffusers.markdown import fenced
from cm_diffusers.publishing.provenance import Provenance


LCM = "[Latent Consistency Models](https://arxiv.org/abs/2310.04378)"
LCM_LORA = "[LCM-LoRA](https://arxiv.org/abs/2311.05556)"
SCOTT = "[SCott](https://arxiv.org/abs/2403.01505)"
BOOT = "[BOOT](https://arxiv.org/abs/2306.05544)"
RLCM = "[RLCM](https://arxiv.org/abs/2404.03673)"
REWARD_GRADIENTS = "[RG-LCD](https://arxiv.org/abs/2403.11027), [DRaFT](https://arxiv.org/abs/2309.17400)"
CM = "[Consistency Models](https://arxiv.org/abs/2303.01469)"
SCM = "[sCM](https://arxiv.org/abs/2410.11081)"
MATCHING = "[rCM](https://arxiv.org/abs/2510.08431), [DMD](https://arxiv.org/abs/2311.18828)"  # of --dmd_weight
PCM = "[Phased Consistency Models](https://arxiv.org/abs/2405.18407)"
TCD = "[Trajectory Consistency Distillation](https://arxiv.org/abs/2402.19159)"
ANIMATELCM = "[AnimateLCM](https://arxiv.org/abs/2402.00769)"
EDM_METHODS = {  # in EDM's coordinates
    "cd": ("Consistency model (CD)", "distilled from", CM),
    "ct": ("Consistency model (CT)", "tuned from", CM),
    "ict": ("Consistency model (iCT)", "tuned from", "[iCT](https://arxiv.org/abs/2310.14189)"),
    "slct": ("Latent consistency model (sLCT)", "tuned from", "[sLCT](https://arxiv.org/abs/2502.01441)"),
    "ect": ("Consistency model (ECT)", "tuned from", "[ECT](https://arxiv.org/abs/2406.14548)"),
    "sct": ("Continuous-time consistency model (sCT)", "tuned from", SCM),
    "scd": ("Continuous-time consistency model (sCD)", "distilled from", SCM),
    "ctm": ("Consistency trajectory model (CTM)", "distilled from", "[CTM](https://arxiv.org/abs/2310.02279)"),
    "mean_flow": ("Mean flow (MeanFlow)", "tuned from", "[MeanFlow](https://arxiv.org/abs/2505.13447)"),
    "edm": ("Diffusion model in EDM's coordinates", "tuned from", "[EDM](https://arxiv.org/abs/2206.00364)"),
}
JUMPING = ("ctm", "mean_flow")  # whose students end at the data in one jump, too, without fresh noise in several
METHODS = {  # method of the record, with "-lora" where that is so -> title, how, paper
    "lcm": ("Latent consistency model", "distilled from", LCM),
    "lcm-lora": ("LCM-LoRA", "distilled from", LCM_LORA),
    "scott": ("Stochastic consistency distillation (SCott)", "distilled from", SCOTT),
    "scott-lora": ("Stochastic consistency distillation (SCott, LoRA)", "distilled from", f"{SCOTT}, {LCM_LORA}"),
    "pcm": ("Phased consistency model (PCM)", "distilled from", PCM),
    "pcm-lora": ("Phased consistency model (PCM, LoRA)", "distilled from", f"{PCM}, {LCM_LORA}"),
    "tcd": ("Trajectory consistency model (TCD)", "distilled from", TCD),
    "tcd-lora": ("Trajectory consistency model (TCD, LoRA)", "distilled from", f"{TCD}, {LCM_LORA}"),
    "boot": ("Student of one step (BOOT)", "distilled from", BOOT),
    "boot-lora": ("Student of one step (BOOT, LoRA)", "distilled from", BOOT),
    "lcf": ("Latent consistency fine-tuning", "fine-tuned from", LCM),
    "lcf-lora": ("Latent consistency fine-tuning (LoRA)", "fine-tuned from", f"{LCM}, {LCM_LORA}"),
    "rlcm": ("Consistency model tuned for a reward (RLCM)", "tuned from", RLCM),
    "rlcm-lora": ("Consistency model tuned for a reward (RLCM, LoRA)", "tuned from", RLCM),
    "direct_reward": ("Consistency model tuned by a reward's gradient", "tuned from", REWARD_GRADIENTS),
    "direct_reward-lora": ("Consistency model tuned by a reward's gradient (LoRA)", "tuned from", REWARD_GRADIENTS),
    **EDM_METHODS,
    "scd-lora": ("Continuous-time consistency model (sCD, LoRA)", "distilled from", f"{SCM}, {LCM_LORA}"),
    "animatelcm": ("Video consistency model (AnimateLCM)", "distilled from", ANIMATELCM),
}
TAGS = ("diffusers", "diffusers-training", "cm_diffusers")  # of everything that is made here


def card(front: str, title: str, sections: Iterable[str]) -> str:
    """Markdown with the Hub's front matter.

    Args:
        front: YAML.
        sections: Paragraphs, code blocks and tables, one below the other.
    """
    return "\n\n".join([f"---\n{front}\n---", f"# {title}", *sections]) + "\n"


def code_block(template: str, values: dict[str, object]) -> str:
    """Python code, in which `values` stand in the place of their names in braces."""
    return fenced("python", template.strip().format(**values))


def made_by(provenance: Provenance) -> str:
    """The code and the command line that repeat the training."""
    return f"Code: cm_diffusers at `{provenance.commit}`.\n\n{fenced('bash', provenance.command)}"
