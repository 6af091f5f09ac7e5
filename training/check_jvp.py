"""Check without training whether a network bears the tangents of sCM: forward-mode AD, its error, the scale of time."""

import cm_diffusers.engine.early

from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.engine.rng import seed_everything
from cm_diffusers.models.check_jvp import JVPConfig, check_jvp, load_network
from cm_diffusers.models.examples import example_of


CONFIGS = (JVPConfig,)


def main() -> None:
    (config,) = parse_configs(CONFIGS, __doc__)
    seed_everything(0)
    network = load_network(config)
    example = example_of(network, time_range=config.time_range, time_start=config.time_start)
    print(check_jvp(network, example))


if __name__ == "__main__":
    run(main)
