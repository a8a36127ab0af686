"""One form of log lines for every process of NEO."""

import logging


def log_to_stderr() -> None:
    """Write records from INFO on to standard error; for programs of ours, not for users of the library."""
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for noisy in ("httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
