"""A plan as it is printed: a table of the strategies, what was counted, and which one to take."""

from cm_diffusers.tasks.memory import GIB, SPARE
from cm_diffusers.tasks.plan import TERA, Counted, PlanConfig, Strategy, strategies


CLOSE = 0.99  # of the best rate: as good, and the plainer strategy is taken


def page(counted: Counted, config: PlanConfig) -> str:
    """Markdown."""
    found = strategies(config)
    memory = {how: counted.memory(how) for how in found}
    names = dict.fromkeys(name for parts in memory.values() for name in parts)
    lines = [_row("GiB per GPU", *(_title(how) for how in found)), _row("---", *["---:"] * len(found))]
    for name in names:
        cells = [f"{memory[how][name] / GIB:.2f}" if name in memory[how] else "–" for how in found]
        lines.append(_row(name, *cells))
    lines.append(_row("**sum**", *(f"**{_sum(memory[how]):.1f}**" for how in found)))
    lines.append(
        _row(f"fits {config.gpu_memory:g} GiB", *("yes" if fits(counted, how, config) else "no" for how in found))
    )
    seconds = [counted.seconds(how, config) for how in found]
    lines.append(_row("computation of a step, s", *(f"{one[0]:.3g}" for one in seconds)))
    lines.append(_row("traffic of a step, s", *(f"{one[1]:.3g}" for one in seconds)))
    lines.append(_row("images/s of all", *(f"{counted.images_per_second(how, config):.3g}" for how in found)))
    told = (
        f"{counted.flops / TERA:.3g} TFLOP for an image, micro-batches of {counted.batch_size} on each of {config.gpus} GPUs, "
        f"{counted.micro_batches} a step, at {config.share_of_peak:g} of {config.peak_tflops:g} TFLOP/s: an expectation, not a "
        "measurement. VAE, text towers and rewards are not counted."
    )
    return "\n".join([*lines, "", told, "", advice(counted, config)])


def fits(counted: Counted, how: Strategy, config: PlanConfig) -> bool:
    return _sum(counted.memory(how)) + SPARE <= config.gpu_memory


def recommended(counted: Counted, config: PlanConfig) -> Strategy | None:
    """The plainest of those that fit and are as fast as any of them."""
    fitting = [how for how in strategies(config) if fits(counted, how, config)]
    best = max((counted.images_per_second(how, config) for how in fitting), default=0.0)
    return next((how for how in fitting if counted.images_per_second(how, config) >= CLOSE * best), None)


def advice(counted: Counted, config: PlanConfig) -> str:
    if (how := recommended(counted, config)) is not None:
        return f"Take {_title(how)}: of what fits, nothing is faster, and nothing as fast is plainer."
    least = min(_sum(counted.memory(how)) for how in strategies(config)) + SPARE
    return (
        f"Nothing fits: at the least {least:.0f} GiB a GPU are needed. Take --gradient_checkpointing, a smaller --train_batch_size "
        "with more --gradient_accumulation_steps, --cast_teacher bf16, --lora, or more GPUs."
    )


def _title(how: Strategy) -> str:
    return f"{how.name} ({how.replicas} x {how.shards})" if how.name == "HSDP" else how.name


def _sum(parts: dict[str, float]) -> float:
    return sum(parts.values()) / GIB


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
