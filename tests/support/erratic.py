"""A scheduler that deals out tokens at random: chunks of every size, down to a single token.

vLLM takes it by name (`scheduler_cls`); everything else is vLLM's own scheduler.
"""

from __future__ import annotations

import random
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

BUDGETS = (1, 2, 3, 7, 16, 17, 40, 64)


class _Erratic:
    max_num_scheduled_tokens: int

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        # Per step: the budget is what cuts prompts into chunks. Never over what buffers were
        # made for, hence the minimum.
        budgets = self.__dict__.setdefault("_budgets", random.Random(11))
        most = self.__dict__.setdefault("_most", self.max_num_scheduled_tokens)
        self.max_num_scheduled_tokens = min(most, budgets.choice(BUDGETS))
        return super().schedule(*args, **kwargs)  # type: ignore[misc]


class ErraticScheduler(_Erratic, Scheduler):  # type: ignore[misc]
    """For synchronous scheduling."""


class ErraticAsyncScheduler(_Erratic, AsyncScheduler):  # type: ignore[misc]
    """For asynchronous scheduling, vLLM's default."""
