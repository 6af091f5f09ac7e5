"""Silences what a library says when it is imported and no user can act on; imported before the others."""

import logging


TRANSFORMERS = "transformers.utils.import_utils"  # its image processors name their other backend, which reads the same


def is_of_use(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back" not in record.getMessage()


logging.getLogger(TRANSFORMERS).addFilter(is_of_use)
