"""Pools of images: one array format, one cache format, one function for every source.

Your own data set is one of three things: a folder (``folder:PATH``), an npz file with the array names of ``Pool`` in
``data/raw``, or one function given to ``register_source``. A folder that memory does not hold is streamed:
``load("folder:PATH", size=224, stream=True)``.
"""

from mia_utils.datasets.cache import MappedImages, join_images, read_cache, write_cache
from mia_utils.datasets.labels import get_label_space, get_mapping, map_labels
from mia_utils.datasets.pool import VOID, Pool, check_arrays, join_pools, make_blocks, to_float
from mia_utils.datasets.sources import SOURCES, list_names, load, register_source, split_carelessly

__all__ = [
    "SOURCES", "VOID", "MappedImages", "Pool", "check_arrays", "get_label_space", "get_mapping", "join_images",
    "join_pools", "list_names", "load", "make_blocks", "map_labels", "read_cache", "register_source",
    "split_carelessly", "to_float", "write_cache",
]  # fmt: skip
