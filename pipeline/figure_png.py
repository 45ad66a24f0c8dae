"""A matplotlib figure as a PNG. Knows nothing of what is drawn."""

import io

from matplotlib.figure import Figure

DOTS_PER_INCH = 100


def figure_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG of `DOTS_PER_INCH`; made in memory, so that any store can take it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
