"""Where images to be segmented come from: a prefix, a manifest, a canonical dataset, or tar files. Knows no Ray.

`parts` divides a source without listing it, `list_part` lists one part in bounded memory, and `read` gives the encoded
bytes of listed images, each verified to be of the very version that was listed. The first belongs to a driver, the
other two to tasks.

What an image is called (`image_uri`) in the predictions:

- an object of its own: its URL,
- a member of a tar file: `<URL of the tar>#<name of the member>`,
- a row of a canonical dataset: `<URL of the dataset>/<split>/<image_id>`, so that predictions join with the dataset
  on its `image_id`.
"""

from pipeline.image_sources.listing import CHANGED, LISTED, MISSING, STORAGE_ERROR, ImageSource, Kind, Listed, Part
from pipeline.image_sources.parts import list_part, parts, resolved
from pipeline.image_sources.reading import Unread, read

__all__ = [
    "CHANGED",
    "LISTED",
    "MISSING",
    "STORAGE_ERROR",
    "ImageSource",
    "Kind",
    "Listed",
    "Part",
    "Unread",
    "list_part",
    "parts",
    "read",
    "resolved",
]
