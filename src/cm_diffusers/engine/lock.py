"""One process writes into a folder: a lock that ends with the process, however that ends."""

import atexit
import logging
import os
import socket
from pathlib import Path
from typing import IO

from cm_diffusers.engine.own_files import LOCK
from cm_diffusers.errors import UserError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
logger = logging.getLogger(__name__)


class FolderLock:
    """`.lock` in a folder, with the host and the number of the process that holds it.

    Processes that a holder forks do not hold it.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.file = folder / LOCK, None

    def take(self) -> None:
        """Hold it from now on; where the system has no locks, only say so.

        Raises:
            ValueError: Another process holds it.
            OSError: The folder is missing, or may not be written to.
        """
        while self.file is None and fcntl:
            file = open(self.path, "a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self._refuse_other(file)
            except OSError as error:  # as on some network file systems
                logger.warning("%s cannot be locked (%s): do not start another run in it.", self.path.parent, error)
                return file.close()
            if self._is_at_its_place(file):  # or the holder before removed it between the two lines
                self._sign(file)
            else:
                file.close()

    def release(self) -> None:
        if self.file is not None and not self.file.closed:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def _is_at_its_place(self, file: IO[str]) -> bool:
        return self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat())

    def _sign(self, file: IO[str]) -> None:
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        self.file = file
        atexit.register(self.release)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=file.close)

    def _refuse_other(self, file: IO[str]) -> None:
        with file:
            file.seek(0)
            number, _, host = file.read().partition(" ")
        if (number, host) != (str(os.getpid()), socket.gethostname()):
            raise UserError(
                f"{self.path.parent} is in use by process {number or 'unknown'} on {host or 'this machine'}: wait until it has ended, or stop it, "
                "for two runs in one folder would overwrite each other."
            )
