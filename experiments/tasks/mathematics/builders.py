"""Records of the mathematics sets for which TensorFlow Datasets has a builder, read without TensorFlow.

Importing this module imports TensorFlow Datasets, which is slow.
"""

from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.text import gsm8k


class _Gsm8k(gsm8k.Gsm8k, skip_registration=True):
    name = "gsm8k"
    # TensorFlow Datasets 4.9.10 has no checksums of this set, and would search for them with importlib_resources, which
    # it does not install.
    url_infos = None


BUILDERS: dict[str, Any] = {"gsm8k": _Gsm8k}
"""Name of a set in `experiments.tasks.mathematics.problems.SETS` -> its builder."""


def read_records_of(name: str, split: str, data_dir: str | None) -> list[Mapping[str, str]]:
    """Return all records of a split, after downloading the set if no earlier call has.

    Args:
        name: a key of `BUILDERS`.
        split: a split of the builder.
        data_dir: the folder of all data sets. None: that of TensorFlow Datasets.

    Raises:
        ValueError: if the set cannot be downloaded or cannot be read.
    """
    try:
        builder = _prepared(BUILDERS[name], data_dir)
        source = builder.as_data_source(split)
        examples = source.__getitems__(range(len(source)))
    except Exception as error:  # from the network, damaged files or data prepared in another format
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"TensorFlow Datasets cannot provide the {split} problems of {name} ({reason}): give their file as "
            f"{split}_path, or see to its copy of them in {data_dir or 'its default folder'}"
        ) from error
    return [{field: value.decode() for field, value in example.items()} for example in examples]


def _prepared(builder_type: Any, data_dir: str | None) -> Any:
    builder = builder_type(data_dir=data_dir)
    try:
        # The default format could not be read without TensorFlow.
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except OSError:  # the finished folder is renamed at the end, which fails if another process was faster
        builder = builder_type(data_dir=data_dir)
        if not builder.is_prepared():
            raise
    return builder
