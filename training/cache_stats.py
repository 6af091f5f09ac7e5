"""Print what the cache of latents and text embeddings holds: files, rows and bytes of each kind."""

import cm_diffusers.engine.early

from cm_diffusers.data.housekeeping import CacheConfig, files_of, stats_table
from cm_diffusers.engine.cli import parse_configs, run


CONFIGS = (CacheConfig,)


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    print(stats_table(files_of(config.latent_cache_dir)))


if __name__ == "__main__":
    run(main)
