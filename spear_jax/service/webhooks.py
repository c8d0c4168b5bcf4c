"""Tells other programs of new rounds: a signed POST, tried again with growing pauses."""

import asyncio
import hashlib
import hmac
import json
from typing import Any

import httpx
import tenacity

ATTEMPTS = 6  # over about a minute
MOST = 1_000  # deliveries under way; more are dropped
SIGNATURE = "X-Spear-Signature"


def signature(secret: str, body: bytes) -> str:
    """Returns the value of the header X-Spear-Signature: "sha256=" and the HMAC in hex."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


class Webhooks:
    """Deliveries in the background. What is under way when the service ends is dropped.

    Args: pause: seconds before the second attempt; each later pause is twice as long.
    """

    def __init__(self, pause: float = 1.0):
        self._pause = pause
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, hooks: list[dict[str, Any]], event: dict[str, Any]) -> None:
        """Starts to tell every hook ({"url", "secret"}) of an event; returns at once."""
        body = json.dumps(event).encode()
        for hook in hooks[: MOST - len(self._tasks)]:
            task = asyncio.get_running_loop().create_task(self._deliver(hook, body))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, hook: dict[str, Any], body: bytes) -> None:
        headers = {
            "Content-Type": "application/json",
            SIGNATURE: signature(hook["secret"], body),
        }
        attempts = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=self._pause, max=30 * self._pause),
            retry_error_callback=lambda _: None,
        )
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            async for attempt in attempts:
                with attempt:
                    answer = await client.post(hook["url"], content=body, headers=headers)
                    answer.raise_for_status()

    async def close(self) -> None:
        """Gives up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
