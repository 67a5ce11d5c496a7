"""The processes of a run: one, or several started by ``accelerate launch`` or ``torchrun``.

Whatever can fail runs through `Processes.each`: all processes learn of a failure in one of them and stop with its text,
so none is left waiting for another.
"""

from __future__ import annotations

import datetime
import logging
import os
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import BackendError, PatchError, RankFailure, UserError
from ..log import logger

T = TypeVar("T")
# A process may wait for another one's hours of work.
_PATIENCE = datetime.timedelta(days=7)


class Processes:
    """The processes of this run.

    Args:
        device: the device asked for; ``"cpu"`` keeps all processes off the accelerators.
        tensor_parallel: all processes hold one model together, so that each of them takes part in all work.

    Attributes:
        index, count: which process this is, of how many.
        shard, shards: which part of the work it does, of how many parts.
        device: the device accelerate gave to this process; None in a run of one process.
        main: whether this process prints and writes.
    """

    def __init__(self, device: str | None = None, tensor_parallel: bool = False) -> None:
        self.index, self.count, self.device = 0, int(os.environ.get("WORLD_SIZE", "1")), None
        if self.count > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device == "cpu")
            self.index, self.count, self.device = state.process_index, state.num_processes, state.device
            # Objects travel over gloo: waiting there blocks neither a GPU nor, as NCCL would, gives up in ten minutes.
            self._talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        elif tensor_parallel:
            raise UserError("--tp needs several processes: accelerate launch --num_processes N -m hf_gdn.eval ... --tp")
        self.shard, self.shards = (0, 1) if tensor_parallel else (self.index, self.count)
        self.main = self.index == 0
        if not self.main:
            logger.setLevel(logging.CRITICAL)  # the main process says it

    def each(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; each gets its own result.

        Raises:
            UserError, RankFailure: in every process, when one call raised; with the text of the first that did. A
                single process raises what `work` raised.
        """
        if self.count == 1:
            return work()
        failure, result = None, None
        try:
            result = work()
        except (UserError, BackendError, PatchError) as error:
            failure = (True, str(error))
        except Exception:
            failure = (False, traceback.format_exc())
        for rank, other in enumerate(self._gather(failure)):
            if other is not None:
                mendable, text = other
                where = f"process {rank} of {self.count}"
                if mendable:
                    raise UserError(text if rank == 0 else f"{where}: {text}")
                raise RankFailure(f"{where} failed:\n{text}")
        return result  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> list[T]:
        """`each`, but every process gets the results of all."""
        result = self.each(work)
        return [result] if self.count == 1 else self._gather(result)

    def from_main(self, work: Callable[[], T]) -> T:
        """Run `work` in the main process alone; every process gets its result."""
        return self.together(lambda: work() if self.main else None)[0]  # type: ignore[return-value]

    def main_only(self, work: Callable[[], T]) -> T | None:
        """Run `work` in the main process alone, which gets its result; the others get None."""
        return self.each(lambda: work() if self.main else None)

    def _gather(self, mine: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, mine, group=self._talk)
        return everyone

    def close(self) -> None:
        """Leave the process group."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
