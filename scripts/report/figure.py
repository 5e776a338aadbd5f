"""An empty figure in the one style that all plots have."""


def new_figure(x: str, ys: list[str]):
    """A figure with an empty plot for each of `ys`, side by side; matplotlib loads only when something is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if len(ys) == 1 else 5 * len(ys), 4.2), layout="constrained")
    grid = figure.subplots(1, len(ys), squeeze=False)
    for axes, y in zip(grid[0], ys, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, list(grid[0])
