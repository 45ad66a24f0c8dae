"""The classes of the street scenes: the eleven of CamVid (Brostow et al., 2009, in the usual grouping)."""

CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
NAMES: tuple[str, ...] = tuple(name for name, _ in CLASSES)
PALETTE: tuple[tuple[int, int, int], ...] = tuple(colour for _, colour in CLASSES)
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(NAMES))
IGNORE_LABEL = 255
