"""Draw the curves of a run and the forest plot of the differences in arms.csv as SVG files in this folder.

    python tests/experiments/plots.py forest
    python tests/experiments/plots.py curves logs_rdrop/results_tiny_20260101-120000

`curves` reads the TensorBoard folder of a run. Needs matplotlib, which is not among the project's requirements.
"""

import argparse
from pathlib import Path

import arms
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).parent
GREY, BLUE, ORANGE = "#808080", "#3b82f6", "#e07b39"  # legible on white and on dark backgrounds
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "train_rdrop",  # the same file each time
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.prop_cycle": plt.cycler(color=[BLUE]),
    "grid.color": GREY,
    "grid.alpha": 0.25,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}
PANELS = {
    "train/ce": "Cross-entropy (train)",
    "train/kl": "KL between the passes (train)",
    "eval/f1": "F1 (evaluation)",
}
BASELINES = ("ce", "smooth", "two_pass")  # compared with `both`


def save(figure, file):
    """Write `figure` without the date, so that the same data give the same file."""
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {file}")


@plt.rc_context(STYLE)
def draw_curves(log_dir, file):
    """Draw the panels from the event files in `log_dir`."""
    events = EventAccumulator(str(log_dir), {"scalars": 0}).Reload()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.7), layout="constrained")
    for axis, (tag, title) in zip(axes, PANELS.items(), strict=True):
        steps, values = zip(*((event.step, event.value) for event in events.Scalars(tag)), strict=True)
        axis.plot(steps, values, marker="o" if tag.startswith("eval") else None, linewidth=1.8, markersize=4)
        axis.set(title=title, xlabel="step", xlim=(0, None))
        axis.grid(axis="y")
    axes[1].set_ylim(0, None)
    axes[2].set_ylim(None, 1.02)
    save(figure, file)


def name_of(setting):
    """What the plot calls a setting."""
    if "hidden_dropout_prob=0.3" in setting:
        return "500 reviews, dropout 0.3"
    if "{seed}" not in setting:
        return "500 reviews"
    return "100 reviews" if "--num_train_epochs 10" in setting else "300 reviews, a fifth mislabelled"


def groups_of(settings):
    """Yield the heading of each complete setting, and {arm: differences by seed} of `both` minus each arm."""
    for setting, found in settings.items():
        seeds = sorted({seed for arm, seed in found if arm == "both"})
        differences = {}
        for arm in BASELINES:
            pairs = [(found["both", seed], found[arm, seed]) for seed in seeds if (arm, seed) in found]
            if len(pairs) > 1 and arms.is_complete(setting, found):
                differences[arm] = [arms.difference(*pair) for pair in pairs]
        if differences:
            yield f"{name_of(setting)} (seeds {seeds[0]}-{seeds[-1]})", differences


@plt.rc_context(STYLE)
def draw_forest(settings, file):
    """Draw the differences in F1 and AUC with their 95 % intervals, and the published gains."""
    groups = list(groups_of(settings))
    height = sum(1.6 + len(differences) for _, differences in groups)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.9 + 0.24 * height), sharex=True, sharey=True, layout="constrained")
    y, ticks = 0, {}
    for heading, differences in groups:
        axes[0].text(0.01, y, heading, transform=axes[0].get_yaxis_transform(), va="center", weight="bold")
        for arm, values in differences.items():
            y += 1
            ticks[y] = f"both - {arm}"
            for axis, name in zip(axes, arms.PUBLISHED, strict=True):
                mean, width = arms.paired([100 * figures[name] for figures in values])
                axis.errorbar(mean, y, xerr=width, fmt="o", markersize=5, capsize=3, linewidth=1.6)
        for axis, gain in zip(axes, arms.PUBLISHED.values(), strict=True):
            top = y - len(differences) + 0.5
            axis.vlines(0, top, y + 0.5, color=GREY, linewidth=1)
            axis.vlines(100 * gain, top, y + 0.5, color=ORANGE, linewidth=1.6, linestyle="--")
        y += 1.6
    for axis, (name, gain) in zip(axes, arms.PUBLISHED.items(), strict=True):
        axis.set(title=f"{name.upper()} (dashed: published gain, {100 * gain:.1f})", xlabel="difference in points")
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    axes[0].set_ylim(y - 0.8, -0.8)
    save(figure, file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plot", choices=("forest", "curves"))
    parser.add_argument("log_dir", nargs="?", help="folder of the run, for curves")
    parser.add_argument("--csv", type=Path, default=arms.CSV, help="default: arms.csv next to this file")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="default: the folder of this file")
    options = parser.parse_args(argv)
    file = options.output_dir / f"{options.plot}.svg"
    if options.plot == "forest":
        draw_forest(arms.read(options.csv), file)
    elif options.log_dir:
        draw_curves(options.log_dir, file)
    else:
        parser.error("curves needs the TensorBoard folder of a run")


if __name__ == "__main__":
    main()
