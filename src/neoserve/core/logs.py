"""One form of log lines for every process of NEO."""

import logging


def log_to_stderr() -> None:
    """Write our records and the requests served, from INFO on, and warnings of libraries to standard error.

    For programs of ours, not for users of the library.
    """
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    for ours in ("neoserve", "uvicorn.access"):
        logging.getLogger(ours).setLevel(logging.INFO)
