"""List what the cache of latents and text embeddings holds for nobody, and with --yes remove it."""

import cm_diffusers.engine.early

from cm_diffusers.data.housekeeping import PruneConfig, files_of, removable, removal_list, remove
from cm_diffusers.engine.cli import parse_configs, run


CONFIGS = (PruneConfig,)


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    files = removable(files_of(config.latent_cache_dir), config.unused_days)
    print(removal_list(files))
    if config.yes:
        remove(files)
    elif files:
        print("Nothing was removed: --yes removes these.")


if __name__ == "__main__":
    run(main)
