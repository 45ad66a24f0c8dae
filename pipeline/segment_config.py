"""What a batch segmentation does: of which images, by which model, to where."""

from dataclasses import dataclass, field

from pipeline.image_sources import Kind
from pipeline.inference_config import InferenceConfig
from pipeline.mask_products import ProductsConfig


@dataclass(frozen=True)
class SegmentConfig:
    """Segment every image of a source that this model has not segmented yet.

    Args:
        model: URL of a saved model.
        images: URL of the images: a folder or prefix, a manifest of URLs, a canonical dataset, or tar files.
        out: URL that masks are added to; the same one may be used again for more images or another model.
        source: which of these `images` is; auto sees a tar file, a manifest (.csv, .txt, .parquet, or the manifest.json
            of an S3 Inventory) and a dataset, and takes everything else for a prefix.
        include: a list of patterns such as `["*/front/*"]`, matched against the place below `images`; one of them must
            fit.
        exclude: patterns of which none may fit.
        inference: how the model is applied.
        products: what rows hold beside the mask, and how the mask is simplified.
        workers: processes that hold a model each.
        min_workers: start with so many, and add others while images wait and the cluster has room; without it there are
            always `workers`.
        use_gpu: give each of them a GPU, or a part of one.
        gpus_per_worker: that part, such as 0.5 for two workers on each GPU.
        cpus_per_worker: CPUs, and threads, for each of them. Beside all workers 0.625 are needed, to read, encode and
            store.
        batch_size: images that a worker gets at a time.
        replace_model: at the end, take away the rows of other models for the images that have a row of this one.
        prune: take away the rows of images that are deleted or overwritten, and record them in `pruned/`.
        compact: at the end, merge small files of rows.
        summary: at the end, sum up the classes by prefix and day in `summary/`. `compact` and `summary` do their part
            alone when `model` and `images` are not given.
        summary_depth: folders of the prefix.
        new: start afresh: delete every mask at the output, of any model, and segment all images.
    """

    model: str = ""
    images: str = ""
    out: str = ""
    source: Kind = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    products: ProductsConfig = field(default_factory=ProductsConfig)
    workers: int = field(default=1, metadata={"identity": False})
    min_workers: int | None = field(default=None, metadata={"identity": False})
    use_gpu: bool = field(default=False, metadata={"identity": False})
    gpus_per_worker: float = field(default=1.0, metadata={"identity": False})
    cpus_per_worker: float = field(default=1, metadata={"identity": False})
    batch_size: int = field(default=4, metadata={"identity": False})
    replace_model: bool = False
    prune: bool = False
    compact: bool = False
    summary: bool = False
    summary_depth: int = 1
    new: bool = field(default=False, metadata={"identity": False})

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is not given: name the place of the masks.")
        if bool(self.model) != bool(self.images) or not (self.model or self.compact or self.summary):
            raise ValueError("model and images go together: give both, or neither with compact or summary true.")
        if not self.model and (self.replace_model or self.prune or self.new):
            raise ValueError("replace_model, prune and new need model and images: give these, or leave those out.")
        if self.summary_depth < 0:
            raise ValueError(f"summary_depth is {self.summary_depth}: give 0 or more folders.")
