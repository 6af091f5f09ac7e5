"""Share a finished student on the Hub, again or for the first time: card with measurements, licence, pipeline or LoRA."""

import cm_diffusers.engine.early

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.measured import run_name
from cm_diffusers.publishing.hub import HubConfig, check_hub, push_folder
from cm_diffusers.publishing.sharing import ShareConfig, prepare


CONFIGS = (ShareConfig, HubConfig)


def main() -> None:
    config, hub = parse_configs(CONFIGS, __doc__)
    repo_id = check_hub(hub, run_name(config.folder))
    folder = prepare(config, repo_id)
    print(
        push_folder(folder, repo_id, hub) if repo_id else f"{folder}/README.md is written; --push_to_hub uploads it."
    )


if __name__ == "__main__":
    run(main)
