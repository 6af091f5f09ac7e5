"""Combine the weights that a run kept on its way: search for the best coefficients (LCSC, arXiv 2404.02241), and publish."""

import cm_diffusers.engine.early
from pathlib import Path

from cm_diffusers.combining.log import LOG, SearchLog
from cm_diffusers.combining.objective import ObjectiveConfig, make_bench
from cm_diffusers.combining.report import Report, write_report
from cm_diffusers.combining.result import publish
from cm_diffusers.combining.runs import CombineConfig, chosen, find_run, identity, judged, searched
from cm_diffusers.combining.search import SearchConfig
from cm_diffusers.combining.vectors import baselines
from cm_diffusers.engine.cli import parse_configs, run
from cm_diffusers.evaluation.reference import ReferenceConfig
from cm_diffusers.places import public


CONFIGS = (CombineConfig, SearchConfig, ObjectiveConfig, ReferenceConfig)


def main() -> None:
    configs = config, search, objective, data = parse_configs(CONFIGS, __doc__)
    source = find_run(config)
    steps = [one.step for one in source.kept]
    bench = make_bench(objective, data, source.result)
    network = source.on(bench.sampler.pipe, config)
    known = baselines(steps, config.ema_rates, config.sigma_rels)
    log = SearchLog(Path(config.output_dir) / LOG, identity(source, *configs))
    found, best = searched(network, bench.search, log, known, search)
    verdict = judged(network, bench.holdout, chosen(found, known), best)
    reference = public(data.dataset_name or data.train_data_dir)
    report = Report(objective, reference, steps, log.entries, verdict, bench.search.shown)
    write_report(report, Path(config.output_dir))
    folder = publish(report, source, config, configs)
    print(f"{report.text}\n{report.conclusion} It is in {folder}.")


if __name__ == "__main__":
    run(main)
