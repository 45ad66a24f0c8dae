"""A matplotlib figure as a PNG. Knows nothing of what is drawn."""

import io
import warnings

from matplotlib.figure import Figure

DOTS_PER_INCH = 100


def figure_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG of `DOTS_PER_INCH`; made in memory, so that any store can take it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that matplotlib's font lacks is drawn as boxes: the picture says so, four lines for each
        # character would not say more.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
