"""Rank pretrained networks as critics: where a linear probe tells a student's images from real ones, it sees its faults.

Run it on a student that was distilled without a critic for a while, and give the first row to distill_scott.py:
--critic vision --critic_backbone <first row> --critic_inputs clean."""

import cm_diffusers.engine.early

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.evaluation.separability import RankingConfig, rank_backbones, write_ranking


CONFIGS = (RankingConfig, ReferenceConfig)


def main() -> None:
    config, data = parse_configs(CONFIGS, __doc__)
    print(write_ranking(config, data, rank_backbones(config, data)))


if __name__ == "__main__":
    run(main)
