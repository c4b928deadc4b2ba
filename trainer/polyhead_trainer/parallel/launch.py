"""`trainer run --nproc N`: starts the ranks on this machine, and ends them all when one of them ends badly, or this."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from rich.console import Console
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, ProcessRaisedException, start_processes

from polyhead_core.errors import ConfigError, PolyheadError
from polyhead_trainer.config import RunConfig
from polyhead_trainer.errors import RankFailed

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
START_METHOD = "forkserver"
"""One process imports the libraries, the ranks are its copies; it has used neither a GPU nor threads."""
GRACE_S = 5.0
"""How long ranks may take to end by themselves after another one has failed."""
FIRST_ERROR = "polyhead_first_error"
"""Key in the ranks' store, which takes a message of any length without a reader, and with a full disk."""


def launch(config: RunConfig, nproc: int, *, overwrite: bool, resume: bool) -> None:
    """Runs `config` on `nproc` ranks. Raises what the first rank that failed raised, RankFailed where it just died."""
    if "RANK" in os.environ:
        raise ConfigError("--nproc inside of torchrun: it starts the ranks already; leave --nproc out")
    multiprocessing.set_forkserver_preload(["polyhead_trainer.run"])
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    arguments = (nproc, store.port, config, overwrite, resume)
    context: Any = start_processes(_rank, arguments, nprocs=nproc, join=False, start_method=START_METHOD)
    try:
        while not context.join(grace_period=GRACE_S):
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        if store.check([FIRST_ERROR]):
            raise _reported(store) from error
        _raise_for_killed(context.processes, error.error_index, config)
        raise
    finally:
        _end(context)


def _end(context: ProcessContext) -> None:
    """Those that are still there, because this process was interrupted; they were too, where it was by Control-C."""
    for stop in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        for process in context.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, stop)


def _report(error: PolyheadError, store: TCPStore) -> None:
    """For `launch`, unless another rank was earlier. What an error carries beside its message can be large, and
    stays."""
    store.compare_set(FIRST_ERROR, "", json.dumps([error.reason, error.message]))


def _reported(store: TCPStore) -> PolyheadError:
    reason, message = json.loads(store.get(FIRST_ERROR))
    return errors_by_reason()[reason](message)


def errors_by_reason() -> dict[str, type[PolyheadError]]:
    kinds = [PolyheadError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return {kind.reason: kind for kind in kinds}


def _raise_for_killed(processes: Sequence[BaseProcess], first: int, config: RunConfig) -> None:
    """The others then fail as well, with nobody to talk to: what counts is the one that was killed.

    `first`: the rank whose end was noticed first.
    """
    killed = {rank: -(one.exitcode or 0) for rank, one in enumerate(processes) if (one.exitcode or 0) < 0}
    # Who ended first may be another: gloo aborts a process whose peer has gone in the middle of a message. SIGTERM ends
    # the ranks that are left.
    by_kill = [rank for rank, number in killed.items() if number == signal.SIGKILL]
    others = [rank for rank, number in killed.items() if number != signal.SIGTERM]
    suspects = [*by_kill, *({first} & killed.keys()), *others]
    if not suspects:
        return
    rank = suspects[0]
    remark = " (the system does so when memory runs out)" if killed[rank] == signal.SIGKILL else ""
    raise RankFailed(
        f"rank {rank} of {len(processes)} was killed by {signal.Signals(killed[rank]).name}{remark}; all ranks have "
        f"been stopped. --resume continues after the last checkpoint in {config.output}.checkpoints"
    )


def _end_with_launcher() -> None:
    """Ends this rank when the process that started it has ended, however that was: nobody would wait for it."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        launcher.join()
        logger.error("the process that started this rank has ended: so does the rank")
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _rank(rank: int, size: int, port: int, config: RunConfig, overwrite: bool, resume: bool) -> None:
    from polyhead_trainer.cli import EXIT_USER_ERROR, quiet_libraries
    from polyhead_trainer.run import run

    _end_with_launcher()
    quiet_libraries()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if config.backbone.device == "cpu" and not config.training.num_threads:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    store = TCPStore(HOST, port, is_master=False)
    try:
        run(config, Console(), overwrite=overwrite, resume=resume, store=store)
    except PolyheadError as error:
        _report(error, store)
        sys.exit(EXIT_USER_ERROR)
