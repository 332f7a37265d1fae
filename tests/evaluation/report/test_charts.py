"""Charts as pictures that stand alone."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread

from mu2llm.evaluation.report.charts import INK, RUNS, STYLE, as_png


def test_a_picture_has_the_light_pages_colours():
    """The colours of the SVG stand for CSS variables; as they are, everything is black."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4, 2))
        axes = figure.subplots()
        axes.barh([0, 1], [1, 2], color=RUNS[0])
        axes.plot([0, 1], [0, 1], color=INK)
    picture = (imread(io.BytesIO(as_png(figure)), format="png")[..., :3] * 255).round().astype(int)
    seen = {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0)}
    assert (255, 255, 255) in seen and (0x2A, 0x78, 0xA8) in seen
    assert not {(1, 2, 3), (4, 5, 6), (10, 0, 1)} & seen
