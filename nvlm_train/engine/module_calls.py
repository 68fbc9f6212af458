"""`debug.collectives`: ranks that are about to use different weights find out before they hang.

Under ZeRO-3 a module's weights are gathered from all ranks when it is called. A rank that skips a module, or calls it
once more, leaves the others in a gather that never ends (gloo: or that aborts the process). With this on, the ranks
tell each other on a group of their own which module they are about to call, forward or backward, before its weights are
gathered; the first difference is raised on all of them.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvlm_train.engine.dist import World
from nvlm_train.errors import NvlmError

_SHOWN_BEFORE = 3  # calls that all ranks had in common, for the message


class ModuleCalls:
    """Compares the calls of every module that holds parameters of its own. Register it after DeepSpeed's hooks."""

    def __init__(self, model: nn.Module, world: World, timeout_s: float) -> None:
        self._rank = world.rank
        self.timeout_s = timeout_s
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._world_size = world.world_size
        # a call is told as two small numbers, the same on every rank
        self._names = ["end of"]
        self._phases = ["forward", "backward"]
        self._in_backward = False
        self._before: deque[str] = deque(maxlen=_SHOWN_BEFORE)
        self.num_calls = 0
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        self._names.append(name)

        def before_forward(module: nn.Module, args: Any) -> None:
            self.compare(name, "forward")

        def before_backward(gradient: Tensor) -> None:
            if not self._in_backward:  # its end is told before DeepSpeed reduces what is left
                self._in_backward = True
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
            self.compare(name, "backward")

        def after_forward(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(before_backward)

        # first of all before forward, and last after it: the gradient comes by here before DeepSpeed gathers for it
        module.register_forward_pre_hook(before_forward, prepend=True)
        module.register_forward_hook(after_forward)

    def _end_of_backward(self) -> None:
        self._in_backward = False
        self.compare("end of", "backward")

    def compare(self, name: str, phase: str) -> None:
        """Raises NvlmError on every rank unless all are at this call. phase: "forward" or "backward"."""
        self.num_calls += 1
        own = torch.tensor([self._names.index(name), self._phases.index(phase)])
        calls = [torch.empty_like(own) for _ in range(self._world_size)]
        try:
            dist.monitored_barrier(self._group, timedelta(seconds=self.timeout_s), wait_all_ranks=True)
            dist.all_gather(calls, own, group=self._group)
        except RuntimeError as error:
            raise NvlmError(
                f"debug.collectives: rank {self._rank} is at {name} {phase} (call {self.num_calls}), but not all ranks "
                f"made a call within {self.timeout_s:g} s: {error}"
            ) from None
        texts = [f"{self._names[int(call[0])]} {self._phases[int(call[1])]}" for call in calls]
        if len(set(texts)) > 1:
            at: dict[str, list[str]] = {}
            for rank, text in enumerate(texts):
                at.setdefault(text, []).append(str(rank))
            who = "; ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {text}" for text, ranks in at.items())
            raise NvlmError(
                f"debug.collectives: the ranks' module calls differ at call {self.num_calls}: {who}. The calls before, "
                f"the same on all: {', '.join(self._before) or 'none'}. Every rank must call every module alike, "
                "whatever its samples hold"
            )
        self._before.append(texts[0])
